# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Example images for a model card, with what the model says to them.

The Hub shows them where no provider serves the model, as is so for models with custom code.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .common.files import replaced_folder, write_text
from .common.paths import inside
from .folder_records import EXAMPLES_FILE, EXAMPLES_FOLDER, read_examples
from .image_reading import is_grey, read_images, to_pil
from .layerwise import load_classifier


SMALLEST_SIZE = 96  # pixels; smaller images are enlarged, or the Hub shows a dot


def write_examples(folder, dataset, image_processor, *, num_examples: int = 4, top_k: int = 5) -> list[dict]:
    """Writes images of different classes into `folder/examples`, and into `examples.json` the model's answer to each file.

    Images smaller than 96 pixels are enlarged by a whole factor without smoothing. The answers are to the files as they
    are, decoded and resized by the image processor as a `pipeline` does.

    Args:
        folder (`str` or `os.PathLike`): Of the model.
        dataset (`datasets.Dataset`): With the columns `image` and `label`; the first image of each class is used.
        image_processor: The model's.
        num_examples (`int`): At least 1.
        top_k (`int`): Classes an answer.

    Returns:
        The entries of the card's `widget`: `src`, `example_title` and `output`, a list of `label` and `score` in [0, 1].

    Raises:
        `ValueError`: if `num_examples` is out of range.
    """
    if num_examples < 1:
        raise ValueError(f"`num_examples` is {num_examples}; it must be at least 1.")
    names = dataset.features["label"].names
    rows = {}
    for row, label in enumerate(dataset["label"][:]):
        rows.setdefault(label, row)
    images = {}
    for number, label in enumerate(sorted(rows)[:num_examples]):
        images[f"{EXAMPLES_FOLDER}/{number}.png"] = (_enlarged(*read_images(dataset, [rows[label]])), names[label])
    entries = [{"src": src, "example_title": f"Class {name}"} for src, (_, name) in images.items()]
    with replaced_folder(Path(folder) / EXAMPLES_FOLDER, overwrite=True) as target:
        for src, (image, _) in images.items():
            image.save(target / Path(src).name)
        return _answer(folder, target, entries, image_processor, top_k)


def copy_examples(source, folder, image_processor) -> None:
    """Copies the example images of a model's folder, if there are any, to another model's folder, and asks that one."""
    entries = read_examples(source)
    if entries:
        with replaced_folder(Path(folder) / EXAMPLES_FOLDER, overwrite=True) as target:
            for entry in entries:
                shutil.copyfile(inside(source, entry["src"]), target / Path(entry["src"]).name)
            _answer(folder, target, entries, image_processor, max(len(entry["output"]) for entry in entries))


def _answer(folder, images: Path, entries: list[dict], image_processor, top_k: int) -> list[dict]:
    """The entries with the `output` of the model in `folder`; also written to `images/examples.json`."""
    model = load_classifier(str(folder)).eval()
    mode = {1: "L"}.get(model.config.num_channels, "RGB")
    answered = []
    for entry in entries:
        with Image.open(images / Path(entry["src"]).name) as file:
            image = to_pil(file, mode)
        layout = {"input_data_format": "channels_first"} if mode == "L" else {}
        inputs = image_processor(np.asarray(image)[None] if mode == "L" else image, return_tensors="pt", **layout)
        with torch.inference_mode():
            scores = model(**inputs).logits[0].softmax(-1)
        values, classes = scores.topk(min(top_k, len(scores)))
        output = [
            {"label": model.config.id2label[index], "score": round(value, 4)}
            for index, value in zip(classes.tolist(), values.tolist())
        ]
        answered.append({**entry, "output": output})
    write_text(images / EXAMPLES_FILE, json.dumps(answered, indent=1) + "\n")
    return answered


def _enlarged(image) -> Image.Image:
    image = to_pil(image, "L" if is_grey(image) else "RGB")
    factor = -(-SMALLEST_SIZE // min(image.size))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image
