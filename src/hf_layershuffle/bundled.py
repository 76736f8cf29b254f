# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The trained model that comes with the package, for a first try without the Hub."""

from pathlib import Path


def example_model() -> str:
    """The folder of a small LayerShuffle ViT of scikit-learn's digits, which comes with the package.

    The model takes images of 8 × 8 pixels and has six layers and 303,000 parameters. Beside it are an image processor
    and ten images in `examples/`, named after their digits. It is a model's folder like any other: `from_pretrained`,
    `pipeline` and all commands take it.

    ```python
    >>> import hf_layershuffle as ls
    >>> from transformers import pipeline

    >>> folder = ls.example_model()
    >>> classify = pipeline("image-classification", model=folder)
    >>> classify(f"{folder}/examples/3.png", top_k=1)[0]["label"]
    '3'
    ```
    """
    return str(Path(__file__).with_name("bundled_model"))
