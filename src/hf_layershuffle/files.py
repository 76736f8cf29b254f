# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Files that are complete or not there."""

import json
import os
from pathlib import Path


def write_text(path: Path, text: str) -> Path:
    """Writes a file completely or not at all, and its folder if that is missing; returns its path."""
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(text.encode("utf-8"))
    os.replace(partial, path)
    return path


def read_json(path: Path):
    """What a file holds; None if there is no such file.

    Raises:
        `ValueError`: if it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is not valid JSON: {error}") from error
