# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""One model from layers of several."""
