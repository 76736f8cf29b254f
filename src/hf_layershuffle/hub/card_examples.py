# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Example images or texts for a model card, with what the model says to them.

The Hub shows them where no provider serves the model, as is so for models with custom code. Only those that the model
classifies correctly are taken, as the card says.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.loading import load_classifier
from ..checkpoints.processing_classes import ProcessingClass
from ..checkpoints.tokenizers import longest_text
from ..common.files import replaced_folder, write_text
from ..common.paths import inside
from ..data.image_reading import is_grey, read_images, to_pil
from .card_text import is_our_example_file
from .folder_records import EXAMPLES_FILE, EXAMPLES_FOLDER, read_examples


TRIED_IMAGES = 20  # of a class; texts too
LONGEST_TEXT = 500  # characters of a text that a card shows
SMALLEST_SIZE = 96  # pixels; smaller images are enlarged, or the Hub shows a dot


def write_examples(
    folder: str | os.PathLike,
    dataset: datasets.Dataset,
    processing_class: ProcessingClass,
    *,
    num_examples: int = 4,
    top_k: int = 5,
) -> list[dict]:
    """Writes images of different classes into `folder/examples`, and the model's answers into `examples.json`.

    Texts stand in `examples.json` themselves. Those that the model would cut off, and long ones, are passed over.

    Images smaller than 96 pixels are enlarged by a whole factor without smoothing. The answers are to the files as
    they are, decoded and resized by the image processor as a `pipeline` does. Of each class, in their order, the first
    image is taken that the model classifies correctly; a class without one among its first `TRIED_IMAGES` is left out.

    Args:
        folder: The model's folder.
        dataset: Images or texts with the columns `image` or `text`, and `label`, numbered as the model's classes.
        processing_class: The model's image processor or tokenizer.
        num_examples: Number of images or texts, at least 1.
        top_k: Number of classes in an answer.

    Returns:
        The entries of the card's `widget`: `src` or `text`, `example_title` and `output`, a list of `label` and
        `score` in [0, 1]. None, and no folder, if the model classifies nothing correctly.

    Raises:
        `ValueError`: if `num_examples` is out of range.
    """
    if num_examples < 1:
        raise ValueError(f"`num_examples` is {num_examples}; it must be at least 1.")
    names = dataset.features["label"].names
    rows_of = defaultdict(list)
    for row, label in enumerate(dataset["label"][:]):
        if label is not None and label >= 0:  # -1 stands for none
            rows_of[label].append(row)
    model = load_classifier(str(folder)).eval()
    entries: list[dict] = []
    with _examples_folder(folder) as target:
        for label, rows in sorted(rows_of.items()):
            tried = rows[:TRIED_IMAGES]
            if isinstance(processing_class, PreTrainedTokenizerBase):
                example = _first_correct_text(model, processing_class, dataset, tried, label, top_k)
            else:
                file = target / f"{len(entries)}.png"
                image_processor = cast(BaseImageProcessor, processing_class)
                output = _first_correct(model, image_processor, dataset, tried, label, file, top_k)
                example = None if output is None else ({"src": f"{EXAMPLES_FOLDER}/{file.name}"}, output)
            if example is not None:
                shown, output = example
                entries.append({**shown, "example_title": f"Class {names[label]}", "output": output})
            if len(entries) == num_examples:
                break
        _write_entries(target, entries)
    return entries


def copy_examples(source: str | os.PathLike, folder: str | os.PathLike, processing_class: ProcessingClass) -> None:
    """Copies the examples of a model's folder, if there are any, to another model's folder.

    The other model is asked. Examples to which it gives another answer are left out.
    """
    entries = read_examples(source)
    if not entries:
        return
    model = load_classifier(str(folder)).eval()
    copied = []
    with _examples_folder(folder) as target:
        for entry in entries:
            top_k = len(entry["output"])
            if isinstance(processing_class, PreTrainedTokenizerBase):
                output = _answer_to_text(model, processing_class, _text_of(entry), top_k)
            else:
                file = inside(source, entry["src"])
                output = _answer(model, cast(BaseImageProcessor, processing_class), file, top_k)
            if output[0]["label"] == entry["output"][0]["label"]:
                if "src" in entry:
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


def _first_correct_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: datasets.Dataset,
    rows: Sequence[int],
    label: int,
    top_k: int,
) -> tuple[dict, list[dict]] | None:
    """The first of the rows' texts that is classified correctly, as an entry names it, and the model's answer."""
    class_names = cast(dict[int, str], model.config.id2label)
    longest = longest_text(tokenizer, model) or LONGEST_TEXT
    for row in dataset.select(rows):
        entry = {name: row[name] for name in ("text", "text_pair") if name in row}
        # What YAML and the Hub's widget show as it is
        is_short = all(text and text.isprintable() and len(text) <= LONGEST_TEXT for text in entry.values())
        if not is_short or len(tokenizer(*entry.values(), verbose=False)["input_ids"]) > longest:
            continue
        output = _answer_to_text(model, tokenizer, [*entry.values()], top_k)
        if output[0]["label"] == class_names[label]:
            return entry, output
    return None


def _text_of(entry: dict) -> list[str]:
    return [entry[name] for name in ("text", "text_pair") if name in entry]


def _answer_to_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], top_k: int
) -> list[dict]:
    return _likeliest(model, tokenizer(*texts, return_tensors="pt"), top_k)


def _answer(model: PreTrainedModel, image_processor: BaseImageProcessor, file: Path, top_k: int) -> list[dict]:
    """The likeliest classes of the image in a file: `label` and `score`."""
    mode = {1: "L"}.get(model.config.num_channels, "RGB")
    with Image.open(file) as opened:
        image = to_pil(opened, mode)
    layout: dict[str, Any] = {"input_data_format": "channels_first"} if mode == "L" else {}
    inputs = image_processor(np.asarray(image)[None] if mode == "L" else image, return_tensors="pt", **layout)
    return _likeliest(model, inputs, top_k)


def _likeliest(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], top_k: int) -> list[dict]:
    """The likeliest classes of one image or text: `label` and `score`."""
    with torch.no_grad():
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

    A person's files in `examples` stay. If the folder is still empty then, there is none.
    """
    target = Path(folder) / EXAMPLES_FOLDER

    def ours(parent: str, names: list[str]) -> list[str]:
        is_nested = Path(parent) != target
        return [] if is_nested else [name for name in names if is_our_example_file(f"{EXAMPLES_FOLDER}/{name}")]

    with replaced_folder(target, overwrite=True) as examples:
        yield examples
        if target.is_dir():
            shutil.copytree(target, examples, symlinks=True, ignore=ours, dirs_exist_ok=True)
    if not any(target.iterdir()):
        target.rmdir()


def _enlarged(stored: object) -> Image.Image:
    image = to_pil(stored, "L" if is_grey(stored) else "RGB")
    factor = -(-SMALLEST_SIZE // min(image.size))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image
