# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A model in another form: the plain one of its family, with one fixed order."""
