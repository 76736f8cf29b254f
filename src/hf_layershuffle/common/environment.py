# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What numbers depend on beside the model and the data."""

import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from typing import Protocol

import torch


_VERSIONS_OF = ("hf-layershuffle", "torch", "transformers", "datasets", "numpy")


class PlacedModel(Protocol):
    """A model of PyTorch that says where it is and of which type its weights are."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...


def describe_environment(model: PlacedModel | None = None) -> dict:
    """What numbers depend on: versions, the machine, the date (ISO 8601, UTC), and the model's device and dtype."""
    placement = (
        {} if model is None else {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    )
    return {
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in _VERSIONS_OF},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **placement,
    }
