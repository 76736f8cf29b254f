# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What numbers depend on beside the model and the data."""

import os
import platform
from datetime import datetime, timezone
from importlib import metadata


_VERSIONS_OF = ("hf-layershuffle", "torch", "transformers", "datasets", "numpy")


def describe_environment(model=None) -> dict:
    """Versions of what the numbers depend on, the machine, the date (ISO 8601, UTC), and the model's device and dtype."""
    placement = (
        {} if model is None else {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    )
    return {
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in _VERSIONS_OF},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **placement,
    }
