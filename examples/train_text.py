"""Trains a LayerShuffle text classifier with the Trainer and Accelerate: what to copy and change.

    python examples/train_text.py                                  # Python's documentation, some minutes on a CPU
    python examples/train_text.py --baseline                       # and the same BERT trained the plain way, beside it
    python examples/train_text.py --architecture modernbert        # or roberta, distilbert, electra, ...
    python examples/train_text.py --dataset_name reviews.csv       # CSV, JSON, Parquet, a folder of them, or a Hub id
    python examples/train_text.py --model_name_or_path google-bert/bert-base-uncased --dataset_name imdb \
        --learning_rate 5e-5 --num_train_epochs 3                  # fine-tunes, with the checkpoint's tokenizer
    python examples/train_text.py --teacher_model_name_or_path path/to/plain-bert   # also learns from its answers
    python examples/train_text.py arguments.yaml                   # or .json: from a file; arguments after it win
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/train_text.py

Does what `hf-layershuffle train --task text-classification` does. A model from scratch gets a tokenizer that is
trained on the training texts. Prints, at the end, a table of the accuracy in sequential order and over arbitrary
orders, and writes to `--output_dir`: the model, the tokenizer and the code, a model card, and all metrics in
`all_results.json`. Run the same command again to go on with a run that was stopped.
"""

import sys

import hf_layershuffle as ls
from hf_layershuffle.training.session import TrainingSession, one_line_errors


def main(argv: list[str]) -> None:
    # Reads the arguments, loads the texts, builds the models, and finds the checkpoints of a run that was stopped
    with TrainingSession(argv, task="text-classification") as session:
        for run in session.runs:  # the model; with --baseline also the plain one
            # A `Trainer` of transformers: give it callbacks, another optimizer, other datasets or metrics here
            trainer = ls.LayerShuffleTrainer(
                model=run.model,
                teacher_model=run.teacher.model,
                args=run.args,
                train_dataset=session.train_dataset,
                eval_dataset=session.eval_dataset,
                processing_class=run.processing_class,
                compute_metrics=ls.compute_metrics,
            )
            # trainer.train(), trainer.save_model(), trainer.evaluate(), and the model card or push_to_hub
            session.train_and_evaluate(trainer, run)
        session.finish()


if __name__ == "__main__":
    with one_line_errors("train_text.py"):
        main(sys.argv[1:])
