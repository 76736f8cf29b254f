# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Example images for a model card, with what the model says to them.

The Hub shows them where no provider serves the model, as is so for models with custom code. Only images that the model
classifies correctly are taken, as the card says.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from ..checkpoints.loading import load_classifier
from ..common.files import replaced_folder, write_text
from ..common.paths import inside
from ..data.image_reading import is_grey, read_images, to_pil
from .folder_records import EXAMPLES_FILE, EXAMPLES_FOLDER, read_examples


TRIED_IMAGES = 20  # of a class
SMALLEST_SIZE = 96  # pixels; smaller images are enlarged, or the Hub shows a dot


def write_examples(
    folder: str | os.PathLike,
    dataset: datasets.Dataset,
    image_processor: BaseImageProcessor,
    *,
    num_examples: int = 4,
    top_k: int = 5,
) -> list[dict]:
    """Writes images of different classes into `folder/examples`, and the model's answers into `examples.json`.

    Images smaller than 96 pixels are enlarged by a whole factor without smoothing. The answers are to the files as
    they are, decoded and resized by the image processor as a `pipeline` does. Of each class, in their order, the first
    image is taken that the model classifies correctly; a class without one among its first `TRIED_IMAGES` is left out.

    Args:
        folder: The model's folder.
        dataset: Images with the columns `image` and `label`, numbered as the model's classes.
        image_processor: The model's image processor.
        num_examples: Number of images, at least 1.
        top_k: Number of classes in an answer.

    Returns:
        The entries of the card's `widget`: `src`, `example_title` and `output`, a list of `label` and `score` in [0,
        1]. None, and no folder, if the model classifies nothing correctly.

    Raises:
        `ValueError`: if `num_examples` is out of range.
    """
    if num_examples < 1:
        raise ValueError(f"`num_examples` is {num_examples}; it must be at least 1.")
    names = dataset.features["label"].names
    rows_of = defaultdict(list)
    for row, label in enumerate(dataset["label"][:]):
        rows_of[label].append(row)
    model = load_classifier(str(folder)).eval()
    entries: list[dict] = []
    with _examples_folder(folder) as target:
        for label, rows in sorted(rows_of.items()):
            file = target / f"{len(entries)}.png"
            output = _first_correct(model, image_processor, dataset, rows[:TRIED_IMAGES], label, file, top_k)
            if output is not None:
                src = f"{EXAMPLES_FOLDER}/{file.name}"
                entries.append({"src": src, "example_title": f"Class {names[label]}", "output": output})
            if len(entries) == num_examples:
                break
        _write_entries(target, entries)
    return entries


def copy_examples(source: str | os.PathLike, folder: str | os.PathLike, image_processor: BaseImageProcessor) -> None:
    """Copies the example images of a model's folder, if there are any, to another model's folder.

    The other model is asked. Images to which it gives another answer are left out.
    """
    entries = read_examples(source)
    if not entries:
        return
    model = load_classifier(str(folder)).eval()
    copied = []
    with _examples_folder(folder) as target:
        for entry in entries:
            file = inside(source, entry["src"])
            output = _answer(model, image_processor, file, len(entry["output"]))
            if output[0]["label"] == entry["output"][0]["label"]:
                shutil.copyfile(file, target / file.name)
                copied.append({**entry, "output": output})
        _write_entries(target, copied)


def _first_correct(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    dataset: datasets.Dataset,
    rows: Sequence[int],
    label: int,
    file: Path,
    top_k: int,
) -> list[dict] | None:
    """Writes the first of the rows' images that is classified correctly into `file`.

    Returns:
        The model's answer; None if no image is classified correctly.
    """
    class_names = cast(dict[int, str], model.config.id2label)
    for row in rows:
        _enlarged(*read_images(dataset, [row])).save(file)
        output = _answer(model, image_processor, file, top_k)
        if output[0]["label"] == class_names[label]:
            return output
    file.unlink()
    return None


def _answer(model: PreTrainedModel, image_processor: BaseImageProcessor, file: Path, top_k: int) -> list[dict]:
    """The likeliest classes of the image in a file: `label` and `score`."""
    mode = {1: "L"}.get(model.config.num_channels, "RGB")
    with Image.open(file) as opened:
        image = to_pil(opened, mode)
    layout: dict[str, Any] = {"input_data_format": "channels_first"} if mode == "L" else {}
    inputs = image_processor(np.asarray(image)[None] if mode == "L" else image, return_tensors="pt", **layout)
    with torch.inference_mode():
        scores = model(**inputs).logits[0].softmax(-1)
    values, classes = scores.topk(min(top_k, len(scores)))
    class_names = cast(dict[int, str], model.config.id2label)
    return [
        {"label": class_names[index], "score": round(value, 4)}
        for index, value in zip(classes.tolist(), values.tolist())
    ]


def _write_entries(folder: Path, entries: list[dict]) -> None:
    if entries:
        write_text(folder / EXAMPLES_FILE, json.dumps(entries, indent=1) + "\n")


@contextmanager
def _examples_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """An empty folder that becomes `examples` of a model's folder when all is written.

    If it is still empty then, there is none.
    """
    target = Path(folder) / EXAMPLES_FOLDER
    with replaced_folder(target, overwrite=True) as examples:
        yield examples
    if not any(target.iterdir()):
        target.rmdir()


def _enlarged(stored: object) -> Image.Image:
    image = to_pil(stored, "L" if is_grey(stored) else "RGB")
    factor = -(-SMALLEST_SIZE // min(image.size))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image
