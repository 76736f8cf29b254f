# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a model's folder records about the model, from which its card is built.

`config.json`, also of a pruned model's origin; `training.json`, how it was trained; `robustness.json`, a
[`RobustnessReport`]; `budget.json`, a [`BudgetReport`]; `merge_plan.yaml`; `export.json`, a plain ViT's origin;
pictures; `examples/`, images with the model's answers; and the licence in `README.md`.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from ..adaptive.budget_report import BudgetReport
from ..checkpoints.checks import explained_reading
from ..checkpoints.loading import classes_of, saved_class_of
from ..checkpoints.record_checks import (
    Example,
    ExportRecord,
    MergedSource,
    PruningRecord,
    TrainingRecord,
    check_record,
)
from ..common import yaml_files
from ..common.environment import version_of
from ..common.files import write_text
from ..common.paths import inside, public_dataset, public_name
from ..common.reports import Report
from ..evaluation.report import REPORT_FILE, RobustnessReport
from ..models.auto_classes import is_free_model_type
from ..models.configuration_layershuffle import encoder_config
from ..models.modeling_layershuffle import free_order
from .card_files import license_of, stated_license
from .report_checks import check_reports


_Report = TypeVar("_Report", bound=Report)
TRAINING_FILE = "training.json"
EXPORT_FILE = "export.json"
MERGE_FILE = "merge_plan.yaml"
EXAMPLES_FOLDER = "examples"
EXAMPLES_FILE = "examples.json"
PICTURES = {
    "order_distribution.png": "Accuracy over arbitrary execution orders",
    "pruning_curves.png": "Accuracy against the number of layers that run",
    "layer_ablation.png": "Accuracy with one layer left out, and with two neighbours swapped",
}
BUDGET_PICTURE = "budget.png"
_CAPTIONS = PICTURES | {BUDGET_PICTURE: "Accuracy against multiply-adds and time, for ways to run fewer layers"}
_ARGUMENTS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "orders_per_step",
    "optim", "learning_rate", "layer_lr_decay", "lr_scheduler_type", "warmup_steps", "weight_decay", "ema_decay",
    "label_smoothing_factor", "augmentation", "bf16", "seed",
)  # fmt: skip
_OFF = {"layer_lr_decay": 1.0, "ema_decay": 0.0}  # which a card does not name
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
METRICS = {
    "eval_accuracy": "as configured",
    "eval_arbitrary_accuracy": "arbitrary, mean",
    "eval_arbitrary_accuracy_std": "arbitrary, standard deviation",
    "eval_arbitrary_accuracy_min": "arbitrary, worst",
}


def record_training(
    folder: str | os.PathLike,
    *,
    arguments: dict,
    dataset: str | None = None,
    dataset_arguments: Mapping[str, Any] | None = None,
    num_train_images: int | None = None,
    num_train_texts: int | None = None,
    base_model: str | None = None,
    teacher: str | None = None,
    metrics: Mapping[str, float] | None = None,
    tags: Iterable[str] = (),
) -> None:
    """Writes `training.json` into a model's folder, from which the card tells how the model was trained.

    Args:
        folder: The model's folder.
        arguments: Training arguments, as from `TrainingArguments.to_dict`. The ones that matter are kept.
        dataset: Name of the dataset.
        dataset_arguments: How it was loaded, by the names of [`~hf_layershuffle.load_image_datasets`], where that is
            not by default. Commands load it so again, and evaluate on the part that was held out.
        num_train_images, num_train_texts: Number of images, or of texts, that it was trained on.
        base_model: Hub id, or folder, of the model that was fine-tuned. Of a folder whose own `training.json` names a
            Hub id, it is that one.
        teacher: Hub id, or folder, of the model that it was distilled from.
        metrics: `eval_accuracy` and the like, as fractions in [0, 1], and `num_orders`, the number of arbitrary
            orders.
        tags: Further tags of the card.
    """
    names = _ARGUMENTS if teacher is None else (*_ARGUMENTS, "distillation_weight", "distillation_temperature")
    kept = {name: arguments[name] for name in names if name in arguments and arguments[name] != _OFF.get(name)}
    kept.pop("max_steps" if kept.get("max_steps", 0) <= 0 else "num_train_epochs", None)  # the one that did not count
    record = {
        "dataset": public_dataset(dataset),
        **({"dataset_arguments": dict(dataset_arguments)} if dataset_arguments else {}),
        **(
            {"num_train_images": num_train_images} if num_train_texts is None else {"num_train_texts": num_train_texts}
        ),
        "base_model": _origin_of(base_model),
        "teacher": public_name(teacher),
        "license": license_of(base_model) if base_model else None,
        "metrics": _card_metrics(metrics),
        "tags": list(tags),
        "arguments": kept,
        "versions": {name: version_of(name) for name in ("hf-layershuffle", "torch", "transformers")},
    }
    write_text(Path(folder) / TRAINING_FILE, json.dumps(record, indent=1) + "\n")


def read_training(folder: str | os.PathLike) -> dict:
    """`training.json` of a model's folder, or of the run that a checkpoint is of; empty where there is none.

    Raises:
        `ValueError`: if it cannot be read.
    """
    path = Path(folder, TRAINING_FILE)
    if not path.exists() and path.parent.name.startswith("checkpoint-"):
        path = path.parents[1] / TRAINING_FILE
    return read_json(path) or {}


def _origin_of(base_model: str | None) -> str | None:
    """The model on the Hub from which a model descends, or else what was fine-tuned."""
    origin = read_training(base_model).get("base_model") if base_model and Path(base_model).is_dir() else None
    return origin if isinstance(origin, str) and hub_id(origin) else public_name(base_model)


def record_baseline(folder: str | os.PathLike, name: str, baseline: Mapping[str, float] | RobustnessReport) -> None:
    """Adds to `training.json` how a baseline did on the same images, which the card shows beside the model.

    Args:
        folder: The model's folder.
        name: What the baseline is, such as `"plain ViT"`.
        baseline: Metrics as for [`record_training`], or a report.
    """
    if isinstance(baseline, RobustnessReport):
        spread = baseline.arbitrary.accuracy
        values = (baseline.sequential.accuracy, spread.mean, spread.std, spread.min)
        baseline = dict(zip(METRICS, values)) | {"num_orders": baseline.num_orders}
    record = read_json(Path(folder) / TRAINING_FILE) or {}
    record["baseline"] = {"name": name, "metrics": _card_metrics(baseline)}
    write_text(Path(folder) / TRAINING_FILE, json.dumps(record, indent=1) + "\n")


def _card_metrics(metrics: Mapping[str, float] | None) -> dict:
    return {name: value for name, value in (metrics or {}).items() if name in METRICS or name == "num_orders"}


def hub_id(name: str | None) -> str | None:
    """The name, if it is an id of the Hub such as `org/model`.

    None for a folder, and for a folder's name, which nobody else could find.
    """
    if name is None:
        return None
    is_id = _HUB_ID.fullmatch(name) and ".." not in name and "--" not in name
    return name if is_id and not Path(name).exists() else None


@dataclass
class FolderRecords:
    """What a model's folder records; see the module's docstring."""

    config: SimpleNamespace
    training: dict
    report: RobustnessReport | None
    budget: BudgetReport | None
    merge: dict | None
    pruned: dict | None
    export: dict | None
    widget: list[dict]
    pictures: list[tuple[str, str]]
    license: str | list[str] | None

    @property
    def is_plain(self) -> bool:
        """Whether transformers loads the model without code of this package, and so without `execution_order`."""
        return not is_free_model_type(self.config.model_type)

    @classmethod
    def read(
        cls, folder: str | os.PathLike, config: PreTrainedConfig | None = None, num_parameters: int | None = None
    ) -> "FolderRecords":
        """Reads the records of a folder.

        Args:
            folder: The model's folder.
            config: The model's configuration, where the folder has no `config.json` yet.
            num_parameters: Number of the model's parameters. Without it the model is built to count them.

        Raises:
            `ValueError`: if a file is not what its name says, or a record is of another model.
        """
        folder = Path(folder)
        report = _read_report(folder, RobustnessReport)
        budget = _read_report(folder, BudgetReport)
        check_reports(folder, [each for each in (report, budget) if each is not None])
        names = [*_CAPTIONS, *sorted(path.name for path in folder.glob("*.png") if path.name not in _CAPTIONS)]
        described = _read_config(folder, report, config, num_parameters)
        training, export = (read_json(folder / file) or {} for file in (TRAINING_FILE, EXPORT_FILE))
        return cls(
            config=described,
            training=_read_record(folder, TRAINING_FILE, TrainingRecord) or {},
            report=report,
            budget=budget,
            merge=_read_merge(folder),
            pruned=_checked_origin(folder, getattr(described, "pruned_from", None)),
            export=_read_record(folder, EXPORT_FILE, ExportRecord),
            widget=read_examples(folder),
            pictures=[
                (name, _CAPTIONS.get(name, Path(name).stem.replace("_", " ").capitalize()))
                for name in names
                if (folder / name).exists()
            ],
            license=stated_license(folder) or export.get("license") or training.get("license"),
        )


_SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "image_size", "patch_size", "num_channels")


def _read_config(
    folder: Path, report: RobustnessReport | None, config: PreTrainedConfig | None, num_parameters: int | None
) -> SimpleNamespace:
    """A configuration that has the fields of a LayerShuffle one, whatever the folder holds."""
    values = dict(
        model_type="vit",
        shuffle_mode="none",
        depth_embedding=False,
        position_predictor=False,
        layerdrop=0.0,
        execution_order="sequential",
        num_parameters=None,
    )
    if config is None and (folder / "config.json").exists():
        with explained_reading(f"'{folder}'"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config is not None:
        values |= config.to_dict()
        # What a card says of the layers is that of the tower that holds them
        tower = encoder_config(_with_shape(config))
        values |= {name: getattr(tower, name, None) for name in _SHAPE}
        values |= {"num_labels": config.num_labels, "num_parameters": num_parameters or _num_parameters(config)}
    elif report is not None:
        values |= {"num_hidden_layers": report.num_layers, "num_labels": report.num_classes} | report.config
    else:
        raise ValueError(
            f"'{folder}' holds neither 'config.json' nor '{REPORT_FILE}'; there is nothing to write a card of."
        )
    return SimpleNamespace(**values)


def _with_shape(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with the depth and width of its layers, which one of timm has when its model is built."""
    if hasattr(encoder_config(config), "num_hidden_layers"):
        return config
    plain_class, _ = classes_of(config.model_type, "The model")
    with torch.device("meta"):
        return cast(PreTrainedModel, free_order(plain_class(config))).config


def _num_parameters(config: PreTrainedConfig) -> int:
    """Number of parameters of the model that a configuration describes.

    It is a classifier, unless it was saved as a model without a head or, with free layer order, of another task.
    """
    is_encoder = str((config.architectures or [""])[0]).endswith("Model")
    plain_class, free_class = classes_of(config.model_type, "The model")
    model_class = saved_class_of(config) or (free_class if is_free_model_type(config.model_type) else plain_class)
    with torch.device("meta"):
        model = AutoModel.from_config(config) if is_encoder else model_class(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _read_report(folder: Path, kind: type[_Report]) -> _Report | None:
    path = folder / kind.file_name
    if path.is_dir():
        raise ValueError(f"'{path}' is a folder, and not {kind.kind}; remove or rename it.")
    return kind.load(inside(folder, kind.file_name)) if path.exists() else None


def read_json(path: Path) -> dict | None:
    """The mapping in a JSON file of a folder; None if there is none.

    Raises:
        `ValueError`: if it is something else, or a link to elsewhere.
    """
    return yaml_files.read_json(inside(path.parent, path.name), dict) if path.exists() else None


def read_examples(folder: str | os.PathLike) -> list[dict]:
    """The entries of `examples/examples.json`, texts or images in the folder; none without the file.

    Raises:
        `ValueError`: if the file is something else, or an image is not in the folder.
    """
    path = inside(folder, f"{EXAMPLES_FOLDER}/{EXAMPLES_FILE}")
    entries = yaml_files.read_json(path, list) if path.exists() else []
    check_record(entries, list[Example], f"'{path}'")
    for entry in entries:
        if ("src" in entry) == ("text" in entry):
            raise ValueError(f"'{path}' is not what its name says: an entry has either `src` or `text`.")
        if "src" in entry:
            inside(folder, entry["src"])
    return entries


def _read_record(folder: Path, name: str, kind: type) -> dict | None:
    record = read_json(folder / name)
    return None if record is None else check_record(record, kind, f"'{folder / name}'")


def _checked_origin(folder: Path, pruned: dict | None) -> dict | None:
    return (
        None if pruned is None else check_record(pruned, PruningRecord, f"`pruned_from` of '{folder / 'config.json'}'")
    )


def _read_merge(folder: Path) -> dict | None:
    """The merge plan beside the weights or in the configuration.

    Returns:
        `{"sources": {name: {"model", "revision"}}, "file"}`, or None if there is no plan.
    """
    path = inside(folder, MERGE_FILE)
    plan = yaml_files.read_mapping(path, "a merge plan") if path.exists() else None
    plan = plan or (read_json(folder / "config.json") or {}).get("merge_plan")
    if not isinstance(plan, Mapping) or not isinstance(plan.get("sources"), Mapping):
        return None
    sources = {}
    where = f"'{path if path.exists() else folder / 'config.json'}'"
    for name, source in plan["sources"].items():
        source = check_record(source if isinstance(source, Mapping) else {"path": source}, MergedSource, where)
        model = str(source.get("path", source.get("model")))
        revision = source.get("revision")
        # A model of the Hub has the commit it was taken at; of a folder, where it lay is nobody's business
        sources[name] = {"model": model if revision else None, "revision": revision}
    return {"sources": sources, "file": MERGE_FILE if path.exists() else None}
