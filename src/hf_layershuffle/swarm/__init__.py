# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Layers on workers that are slow, fail and come back."""
