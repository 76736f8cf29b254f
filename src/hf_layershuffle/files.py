# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Files that are complete or not there; see `common/files.py`."""

from .common.files import write_text


__all__ = ["write_text"]
