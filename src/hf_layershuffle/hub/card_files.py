# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Cards in folders and on the Hub: their text, and the licence that they state."""

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from .card_text import split_card


def read_card(path: str | os.PathLike) -> str:
    """The text of a card.

    Raises:
        `ValueError`: if it is not in UTF-8.
    """
    try:
        # Not `read_text`, which would turn a Windows editor's line ends into others
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not text in UTF-8 ({error.reason}); save it as UTF-8.") from error


def stated_license(folder: str | os.PathLike) -> str | list[str] | None:
    """The licence, or licences, that the card in a folder states; None if it states none."""
    path = Path(folder) / "README.md"
    try:
        return license_in(read_card(path)) if path.is_file() else None
    except ValueError:  # a card that cannot be read states none; who writes this card is told what is wrong with it
        return None


def license_in(text: str) -> str | list[str] | None:
    """The licence, or licences, that the text of a card states; None if it states none."""
    license = split_card(text)[1].get("license")
    return license if isinstance(license, (str, list)) and license else None


def read_license(folder: str | os.PathLike) -> str | None:
    """The licence that a model made of the one in a folder takes over from its card.

    None if the card states none, several, or one that only its own text explains (`other`).
    """
    license = stated_license(folder)
    return license if isinstance(license, str) and license != "other" else None


def license_of(name_or_path: str, revision: str | None = None) -> str | None:
    """As [`read_license`], of a model's folder or of a model on the Hub; None where there is no card."""
    if Path(name_or_path).is_dir():
        return read_license(name_or_path)
    try:
        return read_license(Path(hf_hub_download(name_or_path, "README.md", revision=revision)).parent)
    except (OSError, ValueError, EntryNotFoundError):  # no card, no network, no such id: nothing is stated
        return None


def agreed_license(folders: Iterable[str | os.PathLike]) -> str | None:
    """As [`read_license`], of several models' folders, if it is the same for all."""
    licenses = {read_license(folder) for folder in folders}
    return licenses.pop() if len(licenses) == 1 else None


def filled_in(metadata: ModelCardData, **values: Any) -> ModelCard:
    """What `ModelCard.from_template` gives, which compiles the template anew for each card."""
    return ModelCard(_template().render(card_data=metadata.to_yaml(), **{**metadata.to_dict(), **values}))


@cache
def _template() -> jinja2.Template:
    return jinja2.Template(Path(__file__).with_name("model_card_template.md").read_text(encoding="utf-8"))
