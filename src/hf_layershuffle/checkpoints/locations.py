# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Where checkpoints are, and what their files are called."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from .hub_errors import explained_download


WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "entity_vocab.json",
    "word_shape.json",
    "word_pronunciation.json",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "chat_template.jinja",
)


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments of a `from_pretrained` that say where files are on the Hub, and how they are had."""
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download", "proxies")
    return {name: kwargs[name] for name in names if name in kwargs}


def name_sources(paths: Iterable[str | os.PathLike]) -> dict[str, str]:
    """Names folders and Hub ids by their last part, numbered from 2 where one is taken."""
    named: dict[str, str] = {}
    for each in paths:
        path = os.fspath(each)
        short = (Path(path).expanduser().resolve() if is_local(path) else Path(path)).name or path
        name = short
        count = 1
        while name in named:
            count += 1
            name = f"{short}-{count}"
        named[name] = path
    return named


def is_local(path: str) -> bool:
    """Whether this means a folder rather than a Hub id."""
    return Path(path).expanduser().is_dir() or path.startswith((".", "/", "~")) or path.count("/") > 1


def resolve_folder(
    name: str, path: str, revision: str | None = None, token: str | None = None
) -> tuple[Path, str | None]:
    """The folder of a source, and its commit if it was downloaded from the Hub."""
    if is_local(path):
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ValueError(f"Source '{name}': there is no folder '{path}'.")
        if revision is not None:
            raise ValueError(f"Source '{name}' is the folder '{path}'; `revision` ('{revision}') is for Hub ids only.")
        return folder, None
    # Nothing but weights, JSON and the card: a merge never runs code of its sources
    patterns = ["config.json", *IMAGE_PROCESSOR_FILES, *TOKENIZER_FILES, "model*.safetensors", INDEX_FILE, "README.md"]
    with explained_download(path, revision, f"Source '{name}': "):
        folder = Path(snapshot_download(path, revision=revision, token=token, allow_patterns=patterns))
    return folder, folder.name  # the cache has one folder a commit


def checkpoints_of(folder: Path) -> list[Path]:
    """The Trainer's checkpoints in its output folder, the newest first."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    found = {path: int(step) for path, step in steps.items() if step.isdecimal() and path.is_dir()}
    return sorted(found, key=found.__getitem__, reverse=True)


def has_weights(folder: Path) -> bool:
    """Whether there are safetensors weights in a folder, or an index of them."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))
