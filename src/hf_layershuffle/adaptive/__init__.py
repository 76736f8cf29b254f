# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""As many layers as an example or a budget allows."""

from .exit_calibration import ExitCalibration, calibrate_exit
from .layer_answers import LayerAnswers, answers_after_layers
from .program_search import search_program


__all__ = ["ExitCalibration", "LayerAnswers", "answers_after_layers", "calibrate_exit", "search_program"]
