# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What numbers depend on beside the model and the data."""

import os
import platform
import sys
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
        "versions": {"python": platform.python_version()} | {name: version_of(name) for name in _VERSIONS_OF},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **placement,
    }


def version_of(name: str) -> str:
    """The version of a package, by its name in the registry. This package need not be installed to be used."""
    package = name.replace("-", "_")
    if package == __package__.split(".")[0]:
        return str(sys.modules[package].__version__)
    return metadata.version(name)
