# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The tokenizer that a model was trained with, and whether a tokenizer and a model fit together."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..common.paths import check_links
from ..models.auto_classes import plain_class_name, plain_type_of
from .checks import explained_reading
from .locations import TOKENIZER_FILES


# What the classifiers of an Auto class take, and what a report calls several of these
_KINDS = {
    "AutoModelForImageClassification": ("image", "images"),
    "AutoModelForSequenceClassification": ("text", "texts"),
    "AutoModelForAudioClassification": ("audio", "clips"),
    "AutoModelForVideoClassification": ("video", "videos"),
}


def input_kind(config: PreTrainedConfig | Any) -> str | None:
    """What a model takes: "image", "text", "audio" or "video"; None if its family has no classifier.

    It is told by the family's first classifier (see [`classes_of`]).
    """
    model_type = plain_type_of(str(getattr(config, "model_type", "")))
    return next((kind for name, (kind, _) in _KINDS.items() if plain_class_name(name, model_type) is not None), None)


def takes_texts(config: PreTrainedConfig | Any) -> bool:
    """Whether a model is of texts."""
    return input_kind(config) == "text"


def input_record(config: PreTrainedConfig | Any) -> dict[str, str]:
    """What a report says of its model's inputs: nothing where they are images."""
    nouns = dict(_KINDS.values())
    noun = nouns.get(input_kind(config) or "image", "images")
    return {} if noun == "images" else {"inputs": noun}


def load_tokenizer(name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
    """Loads the tokenizer of a model as `AutoTokenizer` does.

    Args:
        name_or_path: Folder or Hub id.
        kwargs: Passed to `from_pretrained`: `revision`, `token`, ... Code that a model brings runs only with
            `trust_remote_code=True`.

    Raises:
        `OSError`: if there is none, or it cannot be read.
        `ValueError`: if it needs code that the model brings.
    """
    folder = Path(name_or_path)
    there = [name for name in TOKENIZER_FILES if (folder / name).exists() or (folder / name).is_symlink()]
    if folder.is_dir() and not there:
        raise OSError(
            f"The folder '{folder}' holds no tokenizer ('{TOKENIZER_FILES[0]}'). Save the one that the model was "
            f"trained with there: tokenizer.save_pretrained('{folder}')."
        )
    if folder.is_dir():
        check_links(folder, there)  # what is read here is written into results
    with explained_reading(f"The tokenizer of '{name_or_path}'"):
        return AutoTokenizer.from_pretrained(name_or_path, **{"trust_remote_code": False} | kwargs)


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig | Any, what: str = "The model"
) -> None:
    """Refuses a tokenizer that gives ids that a model does not have, or that cannot pad.

    Args:
        tokenizer: The tokenizer.
        config: The model's configuration.
        what: The model, as the message names it.

    Raises:
        `ValueError`: naming the ids or the token.
    """
    remedy = "Save the tokenizer that it was trained with beside it."
    largest = max(tokenizer.get_vocab().values(), default=0)
    vocab_size = getattr(config, "vocab_size", None)
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"{what} has a vocabulary of {vocab_size:,} tokens (`vocab_size`), and its tokenizer gives ids up to "
            f"{largest:,}, which it does not have. {remedy}"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"The tokenizer of {what[0].lower() + what[1:]} has no padding token, with which texts of a batch become "
            "equally long. Give it one that it has, and save it: tokenizer.pad_token = tokenizer.eos_token."
        )
    expected = getattr(config, "pad_token_id", None)
    if expected is not None and expected != tokenizer.pad_token_id:
        raise ValueError(
            f"{what} pads with the id {expected} (`pad_token_id`), and its tokenizer with {tokenizer.pad_token_id}. "
            f"{remedy}"
        )


def longest_text(tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel) -> int | None:
    """Tokens of the longest text that a tokenizer and a model take; None where neither has a limit."""
    positions = num_positions_of(model.config)
    limits = [positions - position_offset(model)] if positions is not None else []
    limit = None if tokenizer is None else length_limit(tokenizer)
    return min(limits if limit is None else [*limits, limit], default=None)


def length_limit(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens after which a tokenizer cuts texts off; None if it has no limit."""
    limit = tokenizer.model_max_length
    return int(limit) if limit < 10**9 else None  # it is 10**30 if nobody has said it


def num_positions_of(config: PreTrainedConfig | Any) -> int | None:
    """Position vectors of a model, or the tokens that its positions are meant for; None where it has no limit."""
    try:
        positions = getattr(config, "max_position_embeddings", None)
    except NotImplementedError:  # of XLNet and Transformer-XL, instead of an attribute
        return None
    return positions if isinstance(positions, int) and positions > 0 else None


def position_offset(model: nn.Module) -> int:
    """Position vectors that no token has: RoBERTa and its like count positions from behind the padding's id."""
    paddings = [
        module.padding_idx
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None
    ]
    return max(paddings, default=-1) + 1


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Eight hexadecimal digits that tell tokenizers apart by what changes the ids of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one that is written in Python
        content: dict = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        content = json.loads(backend.to_str())
        for name in ("truncation", "padding"):  # of the last call
            content.pop(name, None)
    content["special_tokens"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
