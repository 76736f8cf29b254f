# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Which modules of a model FSDP2 shards."""

from accelerate import Accelerator
from torch import nn


def shard_embeddings_once(accelerator: Accelerator, model: nn.Module) -> None:
    """Leaves the module around the input embeddings out of what FSDP2 shards by class, unless the user named classes.

    Accelerate 1.15 shards what `get_input_embeddings` gives by itself. That fails with `Invariant encountered: value
    was None` where it is a part of a module that was sharded before. So it is in all encoders whose
    `_no_split_modules` name a class of embeddings, such as `ViTEmbeddings` and `BertEmbeddings`.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2 or plugin.transformer_cls_names_to_wrap:
        return
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return
    around = {
        type(module).__name__
        for module in model.modules()
        if module is not embeddings and any(part is embeddings for part in module.modules())
    }
    names = getattr(model, "_no_split_modules", None) or []
    kept = [name for name in names if name not in around]
    if kept:
        plugin.transformer_cls_names_to_wrap = kept
