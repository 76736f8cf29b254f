# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Whether the reports in a model's folder are of the model beside them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..adaptive.budget_report import BudgetReport
from ..checkpoints.checks import ADAPTER_FILE
from ..checkpoints.identity import skipped_mlps_of, weights_digest
from ..checkpoints.image_processors import load_image_processor
from ..checkpoints.loading import load_classifier
from ..checkpoints.locations import IMAGE_PROCESSOR_FILES, TOKENIZER_FILES
from ..checkpoints.tokenizers import load_tokenizer, tokenizer_digest
from ..common import yaml_files
from ..common.paths import inside
from ..common.reports import Report
from ..evaluation.fingerprint import processor_digest
from ..evaluation.report import RobustnessReport


def check_reports(folder: Path, reports: Iterable[RobustnessReport | BudgetReport]) -> None:
    """Refuses reports of another model: of another depth, or of other weights than the folder's.

    Training into the same folder again leaves such a report behind.

    Raises:
        `ValueError`: naming the file, and what to do.
    """
    digests: dict[torch.dtype, str] = {}
    for report in reports:
        _check_depth(folder, report)
        difference = _difference(folder, report, digests)
        if difference is not None:
            command = "budget" if isinstance(report, BudgetReport) else "publish"
            raise ValueError(
                f"'{folder / report.file_name}' {difference} beside it. Evaluate again "
                f"(`hf-layershuffle {command} --dataset_name ...`), or remove it."
            )


def check_pushed_report(folder: Path, report: Report, repo_id: str) -> None:
    """Refuses a report of another model than the one that was downloaded from a repository into a folder.

    What holds no whole model, as an adapter of PEFT, is not looked at.

    Raises:
        `ValueError`: if it is.
    """
    if not (folder / "config.json").exists() or (folder / ADAPTER_FILE).exists():
        return
    difference = _difference(folder, report, {})
    if difference is not None:
        raise ValueError(
            f"'{report.file_name}' {difference} of '{repo_id}'. Push it to the repository of its own model, or "
            "evaluate the model of this one."
        )


def _difference(folder: Path, report: Report, digests: dict[torch.dtype, str]) -> str | None:
    """What tells a report from one of the folder's model, such as "is a report of other weights than those".

    None if nothing does, or if the folder holds no weights.

    Args:
        digests: Those of the folder's weights by dtype, as far as they are known.
    """
    config = getattr(report, "config", {})
    if config.get("weights") is None or not any(folder.glob("*.safetensors")):
        return None
    name = getattr(report, "environment", {}).get("dtype", "float32")
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"'{folder / report.file_name}' is of weights of the dtype {name!r}, which is none.")
    if dtype not in digests:
        digests[dtype] = weights_digest(load_classifier(str(folder), dtype=dtype))
    if digests[dtype] != config["weights"]:
        return "is a report of other weights than those"
    stored: Any = SimpleNamespace(**yaml_files.read_json(inside(folder, "config.json"), dict))
    if isinstance(report, RobustnessReport) and skipped_mlps_of(stored) != config.get("skipped_mlps"):
        return "is a report of other `skipped_mlps` than those of the config.json"
    return _processing_difference(folder, config)


def _check_depth(folder: Path, report: RobustnessReport | BudgetReport) -> None:
    path = inside(folder, "config.json")
    config = yaml_files.read_json(path, dict) if path.exists() else {}
    depth = config.get("num_hidden_layers", report.num_layers)
    if depth != report.num_layers:
        raise ValueError(f"The report is of a model with {report.num_layers} layers, and '{folder.name}' has {depth}.")


def _processing_difference(folder: Path, config: Mapping) -> str | None:
    tokenizer = config.get("tokenizer")
    if tokenizer is not None and any((folder / name).exists() for name in TOKENIZER_FILES):
        if tokenizer_digest(load_tokenizer(folder)) != tokenizer:
            return "was made with another tokenizer than the one"
    processor = config.get("image_processor")
    if processor is not None and any((folder / name).exists() for name in IMAGE_PROCESSOR_FILES):
        if processor_digest(load_image_processor(folder)) != processor:
            return "was made with other settings of the image processor than those"
    return None
