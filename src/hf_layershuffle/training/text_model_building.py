# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The text classifier, its tokenizer and its teacher that the arguments of a run describe."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.identity import weights_digest
from ..checkpoints.loading import classes_of, load_classifier
from ..checkpoints.tokenizers import (
    check_tokenizer,
    load_tokenizer,
    longest_text,
    num_positions_of,
    position_offset,
    takes_texts,
    tokenizer_digest,
)
from ..data.tokenizer_training import train_tokenizer
from .model_building import Teacher, attention_settings, build_model, check_parts, class_settings
from .model_sizes import transformer_sizes
from .text_arguments import MAX_LENGTH, TEXT_SCRATCH_DEFAULTS, VOCAB_SIZE, TextModelArguments


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# What families call the width of the MLP
_MLP_WIDTHS = ("intermediate_size", "hidden_dim", "ffn_dim", "n_inner", "d_inner", "d_ff", "dff", "ffn_hidden_size")
_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "seq_classif_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "classifier_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
)
# The tokens of a trained tokenizer, by the names that configurations give their ids
_TOKENS = {"pad": "pad", "bos": "cls", "cls": "cls", "eos": "sep", "sep": "sep", "mask": "mask", "unk": "unk"}


@dataclass
class TextTeacher(Teacher):
    """The text classifier to distill from, if there is one.

    Args:
        model, normalization, weights: As in [`Teacher`]. There is nothing to normalise.
        tokenizer: The teacher's tokenizer.
    """

    tokenizer: PreTrainedTokenizerBase | None = None


def load_text_teacher(args: TextModelArguments) -> TextTeacher:
    """The teacher that the arguments name, and its tokenizer.

    Raises:
        `ValueError`: if it is no trained text classifier, or its tokenizer does not fit.
    """
    name = args.teacher_model_name_or_path
    if name is None:
        return TextTeacher()
    hub = {"revision": args.teacher_model_revision, "token": args.token}
    model = load_classifier(name, as_saved=True, trust_remote_code=args.trust_remote_code, **hub)
    if not takes_texts(model.config):
        raise ValueError(
            f"The teacher '{name}' is a model of type '{model.config.model_type}', which is no text classifier."
        )
    tokenizer = load_tokenizer(name, trust_remote_code=args.trust_remote_code, **hub)
    check_tokenizer(tokenizer, model.config, f"The teacher '{name}'")
    return TextTeacher(model.float(), {}, weights_digest(model), tokenizer)


def build_text_model(
    args: TextModelArguments, flags: dict, class_names: list[str], texts: Dataset, teacher: TextTeacher
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer: from a checkpoint, or small and from scratch.

    The tokenizer's `model_max_length` says after how many tokens texts are cut off.

    Args:
        args: The arguments of the run.
        flags: The flags, as from [`layershuffle_flags`].
        class_names: Names of the dataset's classes.
        texts: The training texts, on which a tokenizer is trained for a model from scratch without a teacher.
        teacher: The teacher, if there is one.

    Raises:
        `ValueError`: if an argument is not allowed, or does not apply to the checkpoint; if the tokenizer does not fit
            the model's vocabulary, or is another than the teacher's.
    """
    if args.model_name_or_path is None:
        model, tokenizer = _build_from_scratch(args, flags, class_names, texts, teacher)
    else:
        what = f"'{args.model_name_or_path}'"
        built: Any = build_model(args, flags, class_names, (0, 0), {})
        model, tokenizer = built
        check_tokenizer(tokenizer, model.config, what)
        if args.vocab_size not in (None, model.config.vocab_size):
            raise ValueError(
                f"`vocab_size` is {args.vocab_size}, and {what} has {model.config.vocab_size}, which fine-tuning "
                "keeps; leave out --vocab_size, or train from scratch without --model_name_or_path."
            )
        if teacher.tokenizer is not None and tokenizer_digest(tokenizer) != tokenizer_digest(teacher.tokenizer):
            raise ValueError(
                f"The tokenizer of {what} is another than that of its teacher '{args.teacher_model_name_or_path}'; "
                "both models read the same tokens, so choose a teacher with the same."
            )
    tokenizer.model_max_length = _max_length(args, model, tokenizer, teacher)
    return model, tokenizer


def _max_length(
    args: TextModelArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, teacher: TextTeacher
) -> int:
    """Tokens of a text at most, which model, tokenizer and teacher take."""
    models = [each for each in (model, teacher.model) if each is not None]
    possible = [length for each in models if (length := longest_text(None, each)) is not None]
    if args.max_length is not None and args.max_length > min(possible, default=args.max_length):
        raise ValueError(
            f"`max_length` is {args.max_length}; the model and its teacher take texts of at most {min(possible)} "
            "tokens."
        )
    given = tokenizer.model_max_length if args.max_length is None else args.max_length
    return min([given, *possible])


def _build_from_scratch(
    args: TextModelArguments, flags: dict, class_names: list[str], texts: Dataset, teacher: TextTeacher
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    name = args.architecture or TEXT_SCRATCH_DEFAULTS["architecture"]
    _, model_class = classes_of(name, f"`architecture` is '{name}', which")
    config_class = cast(type[PreTrainedConfig], model_class.config_class)
    defaults: Any = config_class()
    if not takes_texts(defaults):
        raise ValueError(
            f"`architecture` is '{name}', which is no model of texts; take bert, roberta, distilbert, ..."
        )
    has_pairs = "text_pair" in texts.column_names
    tokenizer = teacher.tokenizer or train_tokenizer(
        (text for column in texts.column_names if column != "label" for text in texts[column] if text is not None),
        VOCAB_SIZE if args.vocab_size is None else args.vocab_size,
        MAX_LENGTH if args.max_length is None else args.max_length,
        has_segments=has_pairs and getattr(defaults, "type_vocab_size", 0) > 1,
    )
    vocab_size = len(tokenizer) if teacher.model is None else cast(Any, teacher.model.config).vocab_size
    if teacher.model is not None and args.vocab_size not in (None, vocab_size):
        raise ValueError(
            f"`vocab_size` is {args.vocab_size}, and the teacher has {vocab_size}; leave out --vocab_size."
        )
    sizes = {"vocab_size": vocab_size, **text_sizes(args, defaults), **_token_ids(tokenizer, defaults)}
    values = {"shuffle_mode": "arbitrary", **class_settings(class_names), **sizes}
    try:
        if num_positions_of(defaults) is not None:
            length = tokenizer.model_max_length
            values["max_position_embeddings"] = _positions(model_class, config_class, values, length)
        model = model_class._from_config(config_class.from_dict(values, **flags), **attention_settings(args))
    except NotImplementedError as error:  # of families whose configurations have sizes of another kind
        raise ValueError(
            f"`architecture` is '{name}', of which no small model can be made by these options ({error}). Fine-tune a "
            "checkpoint by --model_name_or_path, or take bert, roberta, distilbert, ..."
        ) from error
    check_parts(flags, model)
    return model.to(getattr(torch, args.dtype)), tokenizer


def _positions(model_class: Any, config_class: Any, values: dict, max_length: int) -> int:
    """Position vectors with which a model takes texts of `max_length` tokens."""
    with torch.device("meta"):
        return max_length + position_offset(model_class(config_class.from_dict(values)))


def _token_ids(tokenizer: PreTrainedTokenizerBase, defaults: Any) -> dict[str, int]:
    """The ids of the special tokens, for those that the family's configuration has."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{token}_token_id") for name, token in _TOKENS.items()}
    names = [name for name, value in ids.items() if value is not None]
    return {name: ids[name] for name in names if name == "pad_token_id" or getattr(defaults, name, None) is not None}


def text_sizes(args: TextModelArguments, defaults: Any) -> dict[str, Any]:
    """The sizes of a model from scratch, as its family's configuration names them.

    Args:
        args: The arguments of the run. What is None gets its default.
        defaults: A configuration of the family.

    Raises:
        `ValueError`: if sizes do not fit together, or the family has none of that name.
    """
    sizes = transformer_sizes(args, TEXT_SCRATCH_DEFAULTS)
    if not hasattr(defaults, "num_hidden_layers"):
        raise ValueError(
            f"`architecture` is '{defaults.plain_model_type}', whose configuration holds several models; fine-tune a "
            "checkpoint by --model_name_or_path, or take bert, roberta, distilbert, ..."
        )
    width = next((name for name in _MLP_WIDTHS if hasattr(defaults, name)), None)
    if width is not None:
        sizes[width] = sizes["intermediate_size"]
    if width != "intermediate_size":
        del sizes["intermediate_size"]
    if hasattr(defaults, "embedding_size"):  # of ELECTRA, whose embeddings may be narrower than its layers
        sizes["embedding_size"] = sizes["hidden_size"]
    # Decoders say these apart from the number of heads
    heads = {"num_key_value_heads": sizes["num_attention_heads"]}
    heads["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
    sizes |= {name: value for name, value in heads.items() if getattr(defaults, name, None) is not None}
    dropout = sizes.pop("hidden_dropout_prob")
    sizes |= {name: dropout for name in _DROPOUTS if isinstance(getattr(defaults, name, None), float)}
    for name in (*SIZES, "initializer_range"):
        if getattr(args, name) is not None and not hasattr(defaults, name) and name != "intermediate_size":
            raise ValueError(
                f"`{name}` is {getattr(args, name)}, and a model of type '{defaults.plain_model_type}' has none."
            )
    return sizes
