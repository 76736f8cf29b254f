# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a card says of models for images, texts, sounds and videos."""

from types import SimpleNamespace
from typing import Any

from ..checkpoints.loading import is_classifier, saved_class_of
from ..checkpoints.tokenizers import input_kind


_TASKS = {
    "image": {
        "kind": "image",
        "many": "images",
        "pipeline": "image-classification",
        "auto_class": "AutoModelForImageClassification",
        "processor": "AutoImageProcessor",
        "imports": "from PIL import Image",
        "inputs": 'images=Image.open("image.png").convert("RGB")',
        "example": "image.png",
    },
    "text": {
        "kind": "text",
        "many": "texts",
        "pipeline": "text-classification",
        "auto_class": "AutoModelForSequenceClassification",
        "processor": "AutoTokenizer",
        "inputs": '"A text."',
        "example": "A text.",
    },
    "audio": {
        "kind": "audio",
        "many": "clips",
        "pipeline": "audio-classification",
        "auto_class": "AutoModelForAudioClassification",
        "processor": "AutoFeatureExtractor",
        "imports": "import soundfile",
        "inputs": 'soundfile.read("clip.wav")[0], sampling_rate=processor.sampling_rate',
        "example": "clip.wav",
    },
    "video": {
        "kind": "video",
        "many": "videos",
        "pipeline": "video-classification",
        "auto_class": "AutoModelForVideoClassification",
        "processor": "AutoImageProcessor",
        "imports": "from PIL import Image",
        "inputs": '[Image.open(f"frame-{number}.png").convert("RGB") for number in range(model.config.num_frames)]',
        "example": "video.mp4",
    },
}


def card_task(config: SimpleNamespace) -> dict[str, Any]:
    """What the card says of the task, by the classifiers of the family. A model that is none has no pipeline.

    Of a family that is not known: a model of texts has a vocabulary, and no size of images.
    """
    kind = input_kind(config)
    if kind is None:
        has_words = getattr(config, "image_size", None) is None and getattr(config, "vocab_size", None) is not None
        kind = "text" if has_words else "image"
    saved_class = saved_class_of(config)
    is_other = saved_class is not None and not is_classifier(saved_class.plain_class)
    return _TASKS[kind] | ({"pipeline": None} if is_other else {})
