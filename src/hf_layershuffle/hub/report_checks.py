# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Whether the reports in a model's folder are of the model beside them."""

from collections.abc import Iterable
from pathlib import Path

import torch

from ..adaptive.budget_report import BudgetReport
from ..checkpoints.identity import weights_digest
from ..checkpoints.image_processors import load_image_processor
from ..checkpoints.loading import load_classifier
from ..checkpoints.locations import IMAGE_PROCESSOR_FILES, TOKENIZER_FILES
from ..checkpoints.tokenizers import load_tokenizer, tokenizer_digest
from ..common import yaml_files
from ..common.paths import inside
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
        expected = report.config.get("weights")
        if expected is None or not any(folder.glob("*.safetensors")):
            continue
        file = folder / report.file_name
        dtype = getattr(torch, report.environment.get("dtype", "float32"), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"'{file}' is of weights of the dtype {report.environment['dtype']!r}, which is none.")
        command = "budget" if isinstance(report, BudgetReport) else "publish"
        again = f"Evaluate again (`hf-layershuffle {command} --dataset_name ...`), or remove it."
        if dtype not in digests:
            digests[dtype] = weights_digest(load_classifier(str(folder), dtype=dtype))
        if digests[dtype] != expected:
            raise ValueError(f"'{file}' is a report of other weights than those beside it. {again}")
        _check_processing(folder, report, again)


def _check_depth(folder: Path, report: RobustnessReport | BudgetReport) -> None:
    path = inside(folder, "config.json")
    config = yaml_files.read_json(path, dict) if path.exists() else {}
    depth = config.get("num_hidden_layers", report.num_layers)
    if depth != report.num_layers:
        raise ValueError(f"The report is of a model with {report.num_layers} layers, and '{folder.name}' has {depth}.")


def _check_processing(folder: Path, report: RobustnessReport | BudgetReport, again: str) -> None:
    file = folder / report.file_name
    tokenizer = report.config.get("tokenizer")
    if tokenizer is not None and any((folder / name).exists() for name in TOKENIZER_FILES):
        if tokenizer_digest(load_tokenizer(folder)) != tokenizer:
            raise ValueError(f"'{file}' was made with another tokenizer than the one beside it. {again}")
    processor = report.config.get("image_processor")
    if processor is not None and any((folder / name).exists() for name in IMAGE_PROCESSOR_FILES):
        if processor_digest(load_image_processor(folder)) != processor:
            raise ValueError(
                f"'{file}' was made with other settings of the image processor than those beside it. {again}"
            )
