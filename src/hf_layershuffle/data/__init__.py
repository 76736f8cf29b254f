# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Labelled images and texts as the models take them."""

from ..checkpoints.image_processors import load_image_processor
from .augmentation_settings import Augmentation
from .class_labels import match_labels
from .dataloading import as_dataloader
from .datasets import load_image_datasets
from .image_dataset import ImageClassificationDataset
from .image_stream import ImageStream
from .streamed_splits import load_image_stream
from .text_dataset import TextClassificationDataset
from .text_datasets import load_text_datasets


__all__ = [
    "Augmentation",
    "ImageClassificationDataset",
    "ImageStream",
    "TextClassificationDataset",
    "as_dataloader",
    "load_image_datasets",
    "load_image_processor",
    "load_image_stream",
    "load_text_datasets",
    "match_labels",
]
