# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a model is. All but this file and `registration.py` travels to the Hub beside the weights."""
