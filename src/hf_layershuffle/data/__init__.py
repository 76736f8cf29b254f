# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Labelled images as the models take them."""

from ..checkpoints.image_processors import load_image_processor
from .class_labels import match_labels
from .dataloading import as_dataloader
from .datasets import load_image_datasets
from .image_dataset import ImageClassificationDataset


__all__ = [
    "ImageClassificationDataset",
    "as_dataloader",
    "load_image_datasets",
    "load_image_processor",
    "match_labels",
]
