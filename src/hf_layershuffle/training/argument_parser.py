# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Reads the arguments of `hf-layershuffle train` from the command line, or from a JSON or YAML file."""

import argparse
import dataclasses
import difflib
import json
import logging
from pathlib import Path
from typing import Any, NoReturn, cast

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from transformers.training_args import TrainingArguments

from ..checkpoints.locations import is_local
from ..common.yaml_files import read_mapping
from ..data.dataset_files import is_found_by_name
from ..hub.folder_records import read_training
from .argument_checks import check_kinds, check_numbers
from .arguments import LayerShuffleTrainingArguments
from .augmentation_arguments import augmentation_defaults, augmentation_of
from .recipes import PRESETS, SCRATCH_DEFAULTS, initializer_range_of
from .script_arguments import DataArguments, ModelArguments, ScriptTrainingArguments
from .tasks import TASKS, ImageClassification, Task


SUFFIXES = (".json", ".yaml", ".yml")
STRATEGIES = ("eval_strategy", "save_strategy", "logging_strategy")  # YAML reads their `no` as false
DESCRIPTION = """Trains a LayerShuffle {kind} classifier and prints its accuracy in sequential order and over arbitrary
orders.

All options of transformers' TrainingArguments are options too; they come last. The same command goes on with a run
that was stopped. `arguments.yaml` (or .json) holds options as `name: value`; options after it win."""


Parsed = tuple[ModelArguments, DataArguments, ScriptTrainingArguments]


logger = logging.getLogger(__name__)


class ArgumentParser(HfArgumentParser):
    """A parser that shows our options in groups, and transformers' after them.

    An error is one line instead of a usage of two hundred options.
    """

    def __init__(self, prog: str | None = None, task: type[Task] = ImageClassification):
        self.task = task
        super().__init__(
            cast(Any, task.argument_classes),  # annotated as an unbound type variable
            prog=prog,
            usage="%(prog)s [arguments.yaml] [--option value ...]",
            description=DESCRIPTION.format(kind=task.noun.removesuffix("s")),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(
            "--task", choices=TASKS, default=task.name, help=f"{' or '.join(TASKS)}; each has options of its own."
        )
        for action in self._actions:
            if action.type is string_to_bool:  # `--flag` for `--flag True`, also where the default is None
                action.nargs = "?"
                action.const = True
        self._group_options()

    def _group_options(self) -> None:
        model_class, data_class, _ = self.task.argument_classes
        order = ["task", *(each.name for cls in (model_class, data_class) for each in dataclasses.fields(cls))]
        own_training = [*ScriptTrainingArguments.__annotations__, *LayerShuffleTrainingArguments.__annotations__]
        groups = {
            "model": {"task", *(field.name for field in dataclasses.fields(model_class))},
            "data": {field.name for field in dataclasses.fields(data_class)},
            "training": set(own_training),
            "of transformers' TrainingArguments": {field.name for field in dataclasses.fields(TrainingArguments)},
        }
        position = {name: index for index, name in enumerate([*order, *own_training])}
        actions = [action for action in self._actions if action.dest != "help"]
        self._optionals._group_actions = [action for action in self._actions if action.dest == "help"]
        for title, names in groups.items():
            chosen = [action for action in actions if action.dest in names]
            actions = [action for action in actions if action.dest not in names]
            self.add_argument_group(title)._group_actions += sorted(
                chosen, key=lambda action: position.get(action.dest, len(position))
            )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists all options)")

    def parse(self, argv: list[str]) -> Parsed:
        """The arguments of a command line.

        Raises:
            `ValueError`: if an option does not exist, or a value is not allowed.
        """
        _, unknown = self.parse_known_args(argv)
        if unknown:
            raise ValueError(
                f"There is no option {unknown[0]}{self._suggestion(unknown[0])} (--help lists all options)"
            )
        # The last is what belongs to no dataclass: the task
        return cast(Parsed, self.parse_args_into_dataclasses(argv, look_for_args_file=False)[:3])

    def _suggestion(self, option: str) -> str:
        name = option.split("=")[0].replace("-", "_").lstrip("_")
        names = [action.dest for action in self._actions]
        close = difflib.get_close_matches(name, names, n=3) if option.startswith("-") else []
        return f"; did you mean {' or '.join(f'--{name}' for name in close)}?" if close else ""


class _HelpFormatter(argparse.HelpFormatter):
    """Each option once, though it may be written with hyphens too, and defaults only where they say something."""

    def __init__(self, prog: str, **kwargs: Any):
        super().__init__(prog, max_help_position=34, **kwargs)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[-1 if action.dest == "help" else 0]
        kind = getattr(action.type, "__name__", "").upper()
        return name if action.nargs in (0, "?") else f"{name} {kind}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default in (None, False, "", argparse.SUPPRESS) or action.default == []
        return action.help if says_nothing or action.nargs == 0 else f"{action.help} (default: %(default)s)"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(super(_HelpFormatter, self)._fill_text(part, width, indent) for part in text.split("\n\n"))


def parse_arguments(argv: list[str], prog: str | None = None) -> Parsed:
    """The arguments of a run, as [`parse_task`] gives them."""
    return parse_task(argv, prog)[1]


def parse_task(
    argv: list[str], prog: str | None = None, task: str = ImageClassification.name
) -> tuple[type[Task], Parsed]:
    """The task and the arguments of a run, with those of its preset filled in.

    Args:
        argv: Arguments as on the command line. They may start with a JSON or YAML file.
        prog: Name of the program in `--help`.
        task: The task, where the arguments name none.

    Returns:
        The task, and the arguments of the model, of the data and of the training.

    Raises:
        `ValueError`: if an option does not exist, or a value is not allowed.
    """
    if argv and not argv[0].startswith("-") and argv[0].endswith(SUFFIXES):
        argv = [*read_argument_file(Path(argv[0])), *argv[1:]]  # of two values of one argument, the later counts
    chosen = _task_of(argv, task)
    return chosen, _parse(ArgumentParser(prog, chosen), argv)


def _task_of(argv: list[str], default: str) -> type[Task]:
    """The task that a command line names, by which it is known which other options there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--task", default=default)
    try:
        name = parser.parse_known_args(argv)[0].task
    except argparse.ArgumentError as error:
        raise ValueError(f"{error} (--help lists all options)") from None
    if name not in TASKS:
        raise ValueError(f"`task` is '{name}'; choose from {', '.join(TASKS)}.")
    return TASKS[name]


def _parse(parser: ArgumentParser, argv: list[str]) -> Parsed:
    model_args, data_args, args = parser.parse(argv)
    check_numbers(model_args, data_args, args)
    check_consistency(model_args, args)
    augmentation_of(data_args)
    data_args.check_streaming(data_args.max_train_samples)
    defaults = augmentation_defaults(data_args)
    start = model_args.model_name_or_path
    if start is not None and not any(each.partition("=")[0].replace("-", "_") == "__dataset_name" for each in argv):
        defaults = [*defaults, *_dataset_of(start, data_args.dataset_name)]
    if model_args.preset is None:
        return parser.parse([*defaults, *argv]) if defaults else (model_args, data_args, args)
    if model_args.preset not in PRESETS:
        raise ValueError(f"`preset` is '{model_args.preset}'; choose from {', '.join(PRESETS)}.")
    given = model_args
    model_args, data_args, args = parser.parse([*PRESETS[model_args.preset], *defaults, *argv])
    if given.model_name_or_path is not None:  # a preset does not start a checkpoint's weights anew
        model_args.residual_init_scale = given.residual_init_scale
    elif model_args.initializer_range is None:
        model_args.initializer_range = initializer_range_of(model_args.hidden_size or SCRATCH_DEFAULTS["hidden_size"])
    return model_args, data_args, args


def _dataset_of(checkpoint: str, default: str) -> list[str]:
    """The options that load the dataset on which a checkpoint was trained, if its folder names one; else the default.

    Raises:
        `ValueError`: if it names one that is not here.
    """
    try:
        record = read_training(checkpoint) if Path(checkpoint).is_dir() else {}
    except ValueError:  # which is no reason not to train
        record = {}
    dataset, loading = str(record.get("dataset") or default), record.get("dataset_arguments")
    if not is_found_by_name(dataset):
        raise ValueError(
            f"'{checkpoint}' was trained on '{dataset}' (training.json), which is neither a folder here nor a Hub "
            "dataset id such as org/name; say on what to fine-tune it by --dataset_name."
        )
    logger.warning("No --dataset_name: fine-tunes '%s' on '%s'.", checkpoint, dataset)
    options = ["--dataset_name", dataset]
    for name, value in loading.items() if isinstance(loading, dict) else ():
        options += [f"--{name}_name" if name.endswith("_column") else f"--{name}", str(value)]
    return options


def check_consistency(model_args: ModelArguments, args: ScriptTrainingArguments) -> None:
    """Raises a `ValueError` for options that would do nothing without another, and for folders that are not there."""
    for name in ("model_name_or_path", "teacher_model_name_or_path"):
        value = getattr(model_args, name)
        revision = name.replace("name_or_path", "revision")
        if value is not None and (is_local(value) or Path(value).is_file()) and not Path(value).is_dir():
            raise ValueError(f"`{name}` is '{value}', where there is no folder; give a model's folder or a Hub id.")
        if value is None and getattr(model_args, revision) != "main":
            raise ValueError(f"`{revision}` is '{getattr(model_args, revision)}' without a model; add --{name}.")
    for name in ("distillation_weight", "distillation_temperature"):
        given = getattr(args, name) != getattr(ScriptTrainingArguments, name)
        if given and model_args.teacher_model_name_or_path is None:
            raise ValueError(f"`{name}` is {getattr(args, name)} without a teacher; add --teacher_model_name_or_path.")
    if model_args.dtype == "float16":
        raise ValueError(
            "`dtype` is 'float16', in which training loses small steps; use float32 with --fp16, which is mixed "
            "precision."
        )
    if model_args.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"`dtype` is '{model_args.dtype}'; it must be float32 or bfloat16.")


def read_argument_file(path: Path) -> list[str]:
    """The arguments of a JSON or YAML mapping, as on the command line, so that both are checked and converted alike.

    Raises:
        `ValueError`: if the file does not hold one mapping.
    """
    values = read_mapping(path, "one mapping from arguments to values")
    check_kinds(values, [each for task in TASKS.values() for each in task.argument_classes], f"'{path}'")
    argv = []
    for name, value in values.items():
        if value is False and name in STRATEGIES:
            value = "no"
        if isinstance(value, list):
            value = ",".join(map(str, value)) if name == "execution_order" else value
        items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        argv += [] if value is None else [f"--{name}", *map(str, items)]
    return argv
