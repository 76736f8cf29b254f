# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Model cards: built from what a model's folder records, and brought up to date without touching a person's words.

A card is a function of its folder: `config.json`, `training.json` (how it was trained), `robustness.json` (a
[`RobustnessReport`]), `merge_plan.yaml`, `export.json` (a plain ViT's origin), pictures and example images.
"""

import json
import logging
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig

from .card_text import mark_published, update_card_text
from .evaluation import weights_digest
from .layerwise import load_classifier
from .report import REPORT_FILE, RobustnessReport, pruning_points


logger = logging.getLogger(__name__)
TRAINING_FILE, EXPORT_FILE, MERGE_FILE = "training.json", "export.json", "merge_plan.yaml"
EXAMPLES_FOLDER, EXAMPLES_FILE = "examples", "examples.json"
PICTURES = {
    "order_distribution.png": "Accuracy over arbitrary execution orders",
    "pruning_curves.png": "Accuracy against the number of layers that run",
    "layer_ablation.png": "Accuracy with one layer left out, and with two neighbours swapped",
}
# Tells our entries of the metadata's `model-index` from a person's
SOURCE_NAME, SOURCE_URL = "hf-layershuffle", "https://github.com/hf-layershuffle/hf-layershuffle"
_ARGUMENTS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "label_smoothing_factor",
    "bf16",
    "seed",
)
_METRICS = {
    "eval_accuracy": "as configured",
    "eval_arbitrary_accuracy": "arbitrary, mean",
    "eval_arbitrary_accuracy_std": "arbitrary, standard deviation",
    "eval_arbitrary_accuracy_min": "arbitrary, worst",
}


def record_training(folder, *, arguments: dict, dataset=None, base_model=None, metrics=None, tags=()) -> None:
    """Writes `training.json` into a model's folder, from which the card tells how the model was trained.

    Args:
        folder (`str` or `os.PathLike`): Of the model.
        arguments (`dict`): As from `TrainingArguments.to_dict`; the ones that matter are kept.
        dataset (`str`, *optional*): Name of the dataset.
        base_model (`str`, *optional*): Hub id, or folder, of the model that was fine-tuned.
        metrics (`dict[str, float]`, *optional*): `eval_accuracy` and the like, fractions in [0, 1]; `num_orders`, the
            number of arbitrary orders.
        tags (`Iterable[str]`): Further tags of the card.
    """
    kept = {name: arguments[name] for name in _ARGUMENTS if name in arguments}
    if kept.get("max_steps", 0) <= 0:
        kept.pop("max_steps", None)
    record = {
        "dataset": dataset,
        "base_model": Path(base_model).name if base_model and Path(base_model).exists() else base_model,
        "metrics": {
            name: value for name, value in (metrics or {}).items() if name in _METRICS or name == "num_orders"
        },
        "tags": list(tags),
        "arguments": kept,
        "versions": {name: metadata.version(name) for name in (SOURCE_NAME, "torch", "transformers")},
    }
    write_text(Path(folder) / TRAINING_FILE, json.dumps(record, indent=1) + "\n")


def write_model_card(
    folder, *, repo_id: str | None = None, revision: str | None = None, license: str | None = None
) -> bool:
    """Writes `README.md` with the Hub's metadata into a model's folder, or brings the one that is there up to date.

    A card consists of sections between comments, which are written anew, and of whatever a person wrote around them,
    which stays. A section whose comments were removed is the person's. Of the metadata, our keys are updated and all
    others stay.

    Args:
        folder (`str` or `os.PathLike`): Of the model.
        repo_id (`str`, *optional*): Where the model will be. Defaults to `your-name/` and the folder's name.
        revision (`str`, *optional*): Branch or tag that the card's examples load.
        license (`str`, *optional*): As the Hub names it, such as `"apache-2.0"`.

    Returns:
        `bool`: False if the README.md that is there has none of our sections, so that only its metadata was updated.

    Raises:
        `ValueError`: if a file in the folder is not what its name says.
    """
    path = Path(folder) / "README.md"
    fresh = str(build_model_card(folder, repo_id=repo_id, revision=revision, license=license))
    text, has_sections = update_card_text(read_card(path), fresh) if path.exists() else (mark_published(fresh), True)
    if not has_sections:
        logger.warning(
            "'%s' has none of our sections: its text stays as it is, and only its metadata is updated.", path
        )
    write_text(path, text)
    return has_sections


def build_model_card(folder, *, repo_id=None, revision=None, license=None) -> ModelCard:
    """A new card from what the folder records; see [`write_model_card`]."""
    facts = FolderFacts.read(folder)
    model_name = (repo_id or Path(folder).resolve().name).split("/")[-1]
    training, report, config = facts.training, facts.report, facts.config
    dataset = report.dataset if report else training.get("dataset")
    versions = training.get("versions") or (report.environment.get("versions", {}) if report else {})
    shown = {name: versions[name] for name in ("torch", "transformers") if name in versions}
    size = getattr(config, "image_size", None)
    return ModelCard.from_template(
        ModelCardData(model_name=model_name, **_metadata(facts, dataset), license=license),
        template_path=str(Path(__file__).with_name("model_card_template.md")),
        model_name=model_name,
        repo_id=repo_id or f"your-name/{model_name}",
        revision=f', revision="{revision}"' if revision not in (None, "main") else "",
        config=config,
        image_size=f"{size} × {size}" if isinstance(size, int) else " × ".join(map(str, size or ["their model's"])),
        method=_describe_training(config),
        dataset=dataset,
        report=report,
        report_table=_markdown(report.table()) if report else None,
        rows=_metric_rows(training.get("metrics", {})),
        reversed_order=list(reversed(range(config.num_hidden_layers))),
        training=training,
        merge=facts.merge,
        export=facts.export,
        pictures=facts.pictures,
        versions=", ".join(f"{name} {version}" for name, version in shown.items()),
    )


@dataclass
class FolderFacts:
    """What a model's folder records; see the module's docstring."""

    config: object
    training: dict
    report: RobustnessReport | None
    merge: dict | None
    export: dict | None
    widget: list[dict]
    pictures: list[tuple[str, str]]

    @classmethod
    def read(cls, folder) -> "FolderFacts":
        folder = Path(folder)
        report = RobustnessReport.load(folder) if (folder / REPORT_FILE).exists() else None
        if report is not None:
            _check_report(folder, report)
        names = [*PICTURES, *sorted(path.name for path in folder.glob("*.png") if path.name not in PICTURES)]
        return cls(
            config=_read_config(folder, report),
            training=_read_json(folder / TRAINING_FILE) or {},
            report=report,
            merge=_read_merge(folder),
            export=_read_json(folder / EXPORT_FILE),
            widget=_read_json(folder / EXAMPLES_FOLDER / EXAMPLES_FILE) or [],
            pictures=[
                (name, PICTURES.get(name, Path(name).stem.replace("_", " ").capitalize()))
                for name in names
                if (folder / name).exists()
            ],
        )


def read_card(path) -> str:
    try:
        # Not `read_text`, which would turn a Windows editor's line ends into others
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not text in UTF-8 ({error.reason}); save it as UTF-8.") from error


def write_text(path: Path, text: str) -> None:
    """Writes a file completely or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(text.encode("utf-8"))
    os.replace(partial, path)


def _metadata(facts: FolderFacts, dataset: str | None) -> dict:
    """The Hub's keys, for `ModelCardData`."""
    if facts.merge:  # a merge notes the commit of each source that came from the Hub
        sources = [source["model"] for source in facts.merge["sources"].values() if source["revision"]]
    else:
        sources = [facts.export["source"] if facts.export else facts.training.get("base_model")]
    # The Hub refuses a base model that is not one of its own
    base_models = list(dict.fromkeys(name for name in sources if name and name.count("/") == 1))
    tags = {"vision-transformer", *facts.training.get("tags", []), *(["merge"] if facts.merge else [])}
    values = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": sorted(tags | ({"plain-vit-export"} if facts.export else {"layershuffle"})),
        "datasets": [dataset] if dataset and not Path(dataset).is_absolute() and " " not in dataset else None,
        "base_model": base_models[0] if len(base_models) == 1 else base_models or None,
        "eval_results": _eval_results(facts, dataset) or None,
    }
    if facts.merge:
        values["base_model_relation"] = "merge"
    elif base_models and not facts.export:
        values["base_model_relation"] = "finetune"
    return values | ({"widget": facts.widget} if facts.widget else {})


def _eval_results(facts: FolderFacts, dataset: str | None) -> list[EvalResult]:
    """Of the report; without one, of the evaluation at the end of the training."""
    rows = []
    if facts.report:
        report = facts.report
        orders = {"num_orders": report.num_orders, "seed": report.seed}
        spread = report.arbitrary.accuracy
        rows += [
            ("sequential order", report.sequential.accuracy, None),
            ("arbitrary orders (mean)", spread.mean, orders | {"std": round(spread.std, 4)}),
            ("arbitrary orders (worst)", spread.min, orders),
        ]
        for k in pruning_points(report.num_layers):
            what = f"{k} of {report.num_layers} layers"
            pruned = {method: report.pruning[method][k - 1].accuracy for method in ("evenly_spaced", "arbitrary")}
            rows.append((f"{what}, evenly spaced", pruned["evenly_spaced"].mean, None))
            spread = {"std": round(pruned["arbitrary"].std, 4)}
            rows.append((f"{what}, arbitrary order (mean)", pruned["arbitrary"].mean, orders | spread))
    else:
        metrics = facts.training.get("metrics", {})
        orders = {"num_orders": metrics["num_orders"]} if "num_orders" in metrics else None
        for name in ("eval_accuracy", "eval_arbitrary_accuracy"):
            if name in metrics:
                rows.append((f"order {_METRICS[name]}", metrics[name], orders if "arbitrary" in name else None))
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset or "unknown",
            dataset_name=dataset or "unknown",
            metric_type="accuracy",
            metric_name=f"Accuracy, {name}",
            metric_value=round(value, 4),
            metric_args=arguments,
            source_name=SOURCE_NAME,
            source_url=SOURCE_URL,
        )
        for name, value, arguments in rows
    ]


def _metric_rows(metrics: dict) -> list[tuple[str, str]]:
    orders = f" ({metrics['num_orders']} orders)" if "num_orders" in metrics else ""
    return [
        (label + (orders if "arbitrary" in name else ""), f"{metrics[name]:.4f}")
        for name, label in _METRICS.items()
        if name in metrics
    ]


def _describe_training(config) -> str:
    """Such as "with arbitrary execution orders and a depth embedding"."""
    if config.shuffle_mode == "window":
        method = f"with execution orders that move each layer by at most {config.shuffle_window} positions"
    else:
        method = {"none": "in sequential order", "arbitrary": "with arbitrary execution orders"}[config.shuffle_mode]
    extras = ["a depth embedding"] if config.depth_embedding else []
    extras += ["a position predictor"] if config.position_predictor else []
    extras += [f"LayerDrop {config.layerdrop}"] if config.layerdrop else []
    return " and ".join([method, *extras])


def _markdown(table) -> str:
    """A [`rich.table.Table`] as a Markdown table."""
    columns = [list(column.cells) for column in table.columns]
    rows = [[column.header for column in table.columns], ["---" if i == 0 else "---:" for i in range(len(columns))]]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [*rows, *zip(*columns)])


def _read_config(folder: Path, report: RobustnessReport | None):
    """With the fields of a LayerShuffle configuration, whatever the folder holds."""
    values = dict(
        model_type="vit",
        shuffle_mode="none",
        depth_embedding=False,
        position_predictor=False,
        layerdrop=0.0,
        execution_order="sequential",
    )
    if (folder / "config.json").exists():
        config = AutoConfig.from_pretrained(folder)
        values |= config.to_dict() | {"num_labels": config.num_labels}
    elif report is not None:
        values |= {"num_hidden_layers": report.num_layers, "num_labels": report.num_classes} | report.config
    else:
        raise ValueError(
            f"'{folder}' holds neither 'config.json' nor '{REPORT_FILE}'; there is nothing to write a card of."
        )
    return SimpleNamespace(**values)


def _check_report(folder: Path, report: RobustnessReport) -> None:
    """Refuses a report of other weights than the folder's, as training into the same folder again leaves behind."""
    expected = report.config.get("weights")
    if expected is None or not any(folder.glob("*.safetensors")):
        return
    dtype = getattr(torch, report.environment.get("dtype", "float32"))
    if weights_digest(load_classifier(str(folder), dtype=dtype)) != expected:
        raise ValueError(
            f"'{folder / REPORT_FILE}' is a report of other weights than those beside it. Evaluate again (`hf-layershuffle "
            "publish --dataset_name ...`), or remove it."
        )


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"'{path}' is not valid JSON: {error}") from error


def _read_merge(folder: Path) -> dict | None:
    """`{"sources": {name: {"model", "revision"}}, "file"}` of the merge plan beside the weights or in the configuration."""
    path = folder / MERGE_FILE
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    except yaml.YAMLError as error:
        raise ValueError(f"'{path}' is not valid YAML: {str(error).splitlines()[0]}") from error
    plan = plan or (_read_json(folder / "config.json") or {}).get("merge_plan")
    if not isinstance(plan, dict) or not isinstance(plan.get("sources"), dict):
        return None
    sources = {}
    for name, source in plan["sources"].items():
        source = source if isinstance(source, dict) else {"path": str(source)}
        sources[name] = {"model": source.get("path", source.get("model")), "revision": source.get("revision")}
    return {"sources": sources, "file": MERGE_FILE if path.exists() else None}
