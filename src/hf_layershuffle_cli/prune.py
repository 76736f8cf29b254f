# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""`hf-layershuffle prune`: a shorter model."""


def prune():
    """A shorter model, saved as such."""
