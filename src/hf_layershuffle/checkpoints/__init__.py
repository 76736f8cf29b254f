# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Models on disk or on the Hub: found, read a tensor at a time, loaded, told apart."""
