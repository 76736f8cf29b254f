# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Cards, records and one-commit publishing of a model's folder."""
