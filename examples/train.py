"""Trains a LayerShuffle ViT or DeiT image classifier with the Trainer and Accelerate: what to copy and change.

    python examples/train.py                                  # scikit-learn's digits, about two minutes on 2 cores
    python examples/train.py --baseline                       # and the same ViT trained the plain way, beside it
    python examples/train.py --dataset_name path/to/folder    # Parquet, one folder a class, IDX, or a Hub id
    python examples/train.py --model_name_or_path google/vit-base-patch16-224 --dataset_name cifar10 \
        --ignore_mismatched_sizes                             # fine-tunes
    python examples/train.py --teacher_model_name_or_path path/to/plain-vit   # also learns from its answers
    python examples/train.py arguments.yaml                   # or .json: from a file; arguments after it win
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/train.py
    python examples/train.py --torch_compile                  # layer by layer: five graphs for all orders

Does what `hf-layershuffle train` does. Prints, at the end, a table of the accuracy in sequential order and over
arbitrary orders, and writes to `--output_dir`: the model, the image processor and the code, a model card, and all
metrics in `all_results.json`. Run the same command again to go on with a run that was stopped.
"""

import sys

import hf_layershuffle as ls
from hf_layershuffle.training.session import TrainingSession, one_line_errors


def main(argv: list[str]) -> None:
    # Reads the arguments, loads the images, builds the models, and finds the checkpoints of a run that was stopped
    with TrainingSession(argv) as session:
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
    with one_line_errors("train.py"):
        main(sys.argv[1:])
