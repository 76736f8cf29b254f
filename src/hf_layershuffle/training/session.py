# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A training session: what `hf-layershuffle train`, examples/train.py and train_text.py do around the Trainer."""

import copy
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, set_seed
from transformers.trainer_callback import TrainerCallback, TrainerState

from ..hub.folder_records import record_baseline
from ..hub.model_card import write_model_card
from ..models.exit_rule import forget_exits
from .argument_parser import parse_task
from .checkpointing import check_weights, trained_weights
from .evaluation import check_best_metric
from .model_building import Teacher
from .model_flags import PLAIN, layershuffle_flags
from .outcome import next_command, print_table, short_worker_errors
from .recipes import default_output_dir, method_name
from .recorded_arguments import recorded_arguments, stated_arguments
from .runs import (
    check_space,
    claimed_run_folder,
    explained_write_errors,
    find_checkpoint,
    is_finished_run,
    prepare_folder,
)
from .script_arguments import HALF_BUDGET_ACCURACY, ScriptTrainingArguments
from .stream_building import check_length, num_samples_of
from .tasks import ImageClassification
from .trainer import LayerShuffleTrainer


logger = logging.getLogger("hf_layershuffle.training.session")
SMALL_MODEL = 1_000_000  # parameters up to which one thread of the CPU is the default
STOPPED = "stopped; the same command goes on from the last checkpoint, or starts anew if there is none"


@dataclass
class Run:
    """One model to train, in an output folder of its own.

    Args:
        name: Name for the table, such as layershuffle-depth.
        model: The model to train. It has the trained weights if `state` is given.
        processing_class: The model's image processor or tokenizer.
        teacher: The model to distill from, if there is one.
        args: The arguments of the run.
        arguments: What is recorded of the run, as from [`recorded_arguments`].
        dtype: Dtype of the weights that are trained.
        checkpoint: The folder to go on from.
        state: State of the Trainer at the end of training, if the run got there before.
        is_finished: Whether the trained model is saved too.
    """

    name: str
    model: PreTrainedModel
    processing_class: Any
    teacher: Teacher
    args: ScriptTrainingArguments
    arguments: dict
    dtype: torch.dtype = torch.float32
    checkpoint: str | None = None
    state: TrainerState | None = None
    is_finished: bool = False


class TrainingSession:
    """The runs of one command, prepared: arguments checked, folders claimed, models built, images decoded
    or texts tokenized.

    Use it as a context manager, which sets the folders free at the end.

    Args:
        argv: Arguments as on the command line.
        prog: Name of the program in `--help`.
        task: "image-classification" or "text-classification", where the arguments name none.

    Attributes:
        runs: The model, and with `--baseline` the plain one.
        train_dataset, eval_dataset: The images or texts to train on and to evaluate on.
        rows: Metrics of the runs so far, by name.

    Raises:
        `ValueError`, `OSError`: for what a user can mend.
    """

    def __init__(self, argv: list[str], prog: str | None = None, task: str = ImageClassification.name):
        self.task_class, arguments = parse_task(argv, prog, task)
        self.model_args, self.data_args, self.args = arguments
        self.rows: dict[str, dict[str, float]] = {}
        self.failures: list[str] = []
        self._claims = ExitStack()
        self._set_up_logging()

    def __enter__(self) -> "TrainingSession":
        with ExitStack() as stack:
            stack.enter_context(self._claims)
            self._prepare()
            stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._claims.__exit__(*exception)

    def _set_up_logging(self) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logger.setLevel(logging.INFO if self.args.should_log else logging.ERROR)
        of_data = logging.getLogger("hf_layershuffle.data")
        self._claims.callback(of_data.setLevel, of_data.level)
        of_data.setLevel(logging.INFO if self.args.should_log else of_data.level)
        transformers.logging.set_verbosity(max(self.args.get_process_log_level(), transformers.logging.WARNING))

    def _prepare(self) -> None:
        set_seed(self.args.seed)
        self.task = task = self.task_class(self.model_args, self.data_args)
        teacher = task.teacher
        variants = [(layershuffle_flags(self.model_args), self.args, teacher)]
        if self.args.baseline:
            baseline_args = copy.copy(self.args)
            baseline_args.push_to_hub = False
            baseline_args.teacher_orders, baseline_args.teacher_layers = 0, None
            baseline_args.order_consistency = 0.0
            if str(self.args.metric_for_best_model).endswith(HALF_BUDGET_ACCURACY):  # which a plain model lacks
                baseline_args.metric_for_best_model = "eval_accuracy"
            kept = {name: value for name, value in variants[0][0].items() if name == "drop_path_rate"}
            variants.append((PLAIN | kept, baseline_args, type(teacher)()))
        self.runs: list[Run] = []
        for flags, args, variant_teacher in variants:
            set_seed(self.args.seed)  # the same initial weights for the baseline
            model, processing_class = task.build_model(flags)
            forget_exits(model.config)
            self._choose_output_dir(args, model.config, variant_teacher)
            if variant_teacher.model is not None:
                task.check_teacher(model, processing_class)
            # Refuses what it must before the images are decoded, and on all processes before one of them writes
            self.runs.append(self._claim(model, processing_class, args, variant_teacher, teacher))
        self._choose_threads(self.runs[0].model)
        with self.args.main_process_first(desc="decoding images"):  # the others then read its file
            datasets = task.build_datasets(self.runs[0].model, processing_class, self.args.seed)
            self.train_dataset, self.eval_dataset = datasets
        check_length(self.train_dataset, self.args.max_steps)

    def _choose_output_dir(self, args: ScriptTrainingArguments, config: PreTrainedConfig, teacher: Teacher) -> None:
        if self.args.has_default_output_dir:
            method = self._name(config, teacher)
            self.args.output_dir = default_output_dir(self.data_args.dataset_name, method, self.model_args.preset)
            self.args.has_default_output_dir = False
        if args is not self.args:
            args.output_dir = str(self.args.folder / "baseline")

    @staticmethod
    def _name(config: PreTrainedConfig, teacher: Teacher) -> str:
        return method_name(config) + ("-distilled" if teacher.model is not None else "")

    def _claim(
        self,
        model: PreTrainedModel,
        processing_class: Any,
        args: ScriptTrainingArguments,
        teacher: Teacher,
        any_teacher: Teacher,
    ) -> Run:
        """The run of a model, its folder claimed, with the checkpoint that it goes on from."""
        folder = args.folder
        if any_teacher.model is not None and folder.resolve() == Path(str(any_teacher.model.name_or_path)).resolve():
            raise ValueError(f"The output folder '{folder}' is the teacher's; choose another --output_dir.")
        arguments = recorded_arguments(self.model_args, self.data_args, args, teacher, self.task.digests)
        if args.should_save:
            self._claims.enter_context(claimed_run_folder(folder))
        run = Run(self._name(model.config, teacher), model, processing_class, teacher, args, arguments, model.dtype)
        run.checkpoint = find_checkpoint(args, model.config, arguments)
        run.is_finished = is_finished_run(folder, run.checkpoint)
        if not run.is_finished:
            check_best_metric(args, model.config)
        if not args.do_train and not run.is_finished:
            raise ValueError(
                f"`do_train` is False, and '{folder}' holds no finished run to evaluate; leave it out to train, or "
                "use `hf-layershuffle evaluate` for another model."
            )
        checkpoint = None if run.checkpoint is None else Path(run.checkpoint)
        state = None if checkpoint is None else check_weights(checkpoint)
        # At the end of training, the Trainer would train one more step
        if checkpoint is not None and state is not None and state.global_step >= state.max_steps:
            source = folder if run.is_finished else trained_weights(checkpoint, state, args)
            run.model = type(model).from_pretrained(source, dtype=model.dtype)
            run.state = state
        elif args.should_save:
            check_space(folder, model.num_parameters(), args)
        return run

    def _choose_threads(self, model: PreTrainedModel) -> None:
        """Sets the number of threads. On the CPU, small models take one on every machine.

        Sums differ in their last bits with the number of threads.
        """
        is_small = self.args.device.type == "cpu" and model.num_parameters() <= SMALL_MODEL
        threads = self.args.num_threads or (1 if is_small else None)
        if threads is None:
            return
        if self.args.num_threads is None and torch.get_num_threads() > 1:
            logger.info(
                "Trains %.1f million parameters with one thread, which gives the same numbers whatever the number of "
                "cores; --num_threads changes it.",
                model.num_parameters() / 1e6,
            )
        torch.set_num_threads(threads)

    @short_worker_errors()
    def train_and_evaluate(self, trainer: LayerShuffleTrainer, run: Run) -> None:
        """Trains, and saves the model, its card and its metrics into the output folder.

        The metrics are kept for the table.

        Args:
            trainer: The Trainer of the run's model and arguments.
            run: One of `runs`.
        """
        args = run.args
        folder = run.args.folder
        _announce(run)
        args.float32_weights = run.dtype == torch.float32
        if args.should_save:
            prepare_folder(folder, run.checkpoint, args.overwrite_output_dir, run.arguments)
        with explained_write_errors(folder):
            if run.state is None:
                metrics = trainer.train(resume_from_checkpoint=run.checkpoint).metrics
            else:
                trainer.state = run.state
                metrics = {"epoch": run.state.epoch}
            if not run.is_finished:
                # `_internal_call` does not push: that waits for the evaluation and the card
                trainer.save_model(_internal_call=True)
                trainer.save_state()
                seen = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
                samples = {"train_samples": num_samples_of(self.train_dataset, seen)}
                trainer.save_metrics("train", metrics | samples)
        args.eval_orders = args.final_eval_orders
        args.prediction_loss_only = False
        metrics = trainer.evaluate() if args.do_eval else {}
        self.rows[run.name] = metrics
        try:
            if metrics:
                trainer.save_metrics("eval", metrics)
        except OSError as error:
            self._note_failure(f"The metrics could not be saved in '{folder}': {error}")
        self._write_card(trainer, run, metrics)

    def _write_card(self, trainer: LayerShuffleTrainer, run: Run, metrics: dict[str, float]) -> None:
        card: dict[str, Any] = {
            "dataset": self.data_args.dataset_name,
            "dataset_arguments": stated_arguments(self.data_args),
            "finetuned_from": self.model_args.model_name_or_path,
            "metrics": metrics | {"num_orders": run.args.final_eval_orders} if metrics else {},
        }
        try:
            if run.args.push_to_hub:
                trainer.push_to_hub(**card)
            else:
                trainer.create_model_card(**card)
        except Exception as error:  # whatever is wrong with the card or the Hub, the trained model is saved
            if run.args.push_to_hub:
                self._note_failure(f"The model is saved in '{run.args.folder}', but not pushed to the Hub: {error}")
            else:
                logger.warning("The model is saved in '%s', but not its card: %s", run.args.output_dir, error)

    def _note_failure(self, message: str) -> None:
        self.failures.append(message)
        logger.error(message)

    def finish(self) -> None:
        """Prints the table and what to do next.

        Exits with code 1 if metrics could not be saved, or the model could not be pushed.
        """
        if self.args.baseline and self.args.should_save:
            self._record_baseline()
        if self.args.should_log:
            if any(self.rows.values()):
                rows = {name: (metrics, self.args.final_eval_orders) for name, metrics in self.rows.items()}
                orders = [run.model.config.execution_order for run in self.runs]
                print_table(rows, all(order == "sequential" for order in orders), self.task.noun)
            print(f"Saved to {self.args.output_dir}")
            print(f"Next: {next_command(self.data_args, self.args, self.runs[0].model.config)}")
        if self.failures:
            sys.exit(1)

    def _record_baseline(self) -> None:
        """Adds to the model's card how the baseline did."""
        metrics = list(self.rows.values())[-1]
        if metrics:
            metrics = metrics | {"num_orders": self.args.final_eval_orders}
            record_baseline(self.args.folder, "baseline: trained the plain way", metrics)
            write_model_card(self.args.folder, repo_id=self.args.hub_model_id)


def _announce(run: Run) -> None:
    if run.is_finished:
        message = "Already trained, so only evaluated: %s; add --overwrite_output_dir to start anew."
        logger.warning(message, run.args.output_dir)
    elif run.checkpoint is not None:
        logger.warning("Going on from %s; add --overwrite_output_dir to start anew.", run.checkpoint)


def run(argv: list[str], prog: str | None = None, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Trains and evaluates as the arguments say, from the command line to the table."""
    import hf_layershuffle as ls

    with TrainingSession(argv, prog) as session:
        for each in session.runs:
            trainer = ls.LayerShuffleTrainer(
                model=each.model,
                teacher_model=each.teacher.model,
                args=each.args,
                train_dataset=session.train_dataset,
                eval_dataset=session.eval_dataset,
                processing_class=each.processing_class,
                compute_metrics=ls.compute_metrics,
                callbacks=list(callbacks),
            )
            session.train_and_evaluate(trainer, each)
        session.finish()


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends a program with one line instead of a traceback.

    The exit code is 2 for bad input, and 130 for Ctrl-C or a request to terminate.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{program}: {STOPPED}.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:  # ImportError: an argument needs a package
        logger.debug("", exc_info=True)
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
