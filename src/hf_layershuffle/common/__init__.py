# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Small tools of no domain: files that are complete or not there, files of others, paths, texts in Markdown."""
