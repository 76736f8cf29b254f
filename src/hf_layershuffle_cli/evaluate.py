# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""`hf-layershuffle evaluate`: what order and missing layers cost."""


def evaluate():
    """Accuracy of models in any order and with layers missing."""
