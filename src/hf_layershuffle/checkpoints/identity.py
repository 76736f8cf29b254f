# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What tells models apart."""

import zlib

import torch
from transformers import PreTrainedModel


_FLAGS = ("model_type", "shuffle_mode", "shuffle_window", "depth_embedding", "position_predictor", "layerdrop")


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of a model's parameters: eight hexadecimal digits, the same on every device."""
    digest = 0
    for parameter in model.parameters():
        # Their bytes: sums depend on the device and the number of threads
        content = parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest = zlib.crc32(content.data, digest)
    return f"{digest:08x}"


def describe_model(model: PreTrainedModel) -> dict:
    """What a report says about its model: the type, the LayerShuffle flags and a digest of the weights."""
    return {name: getattr(model.config, name, None) for name in _FLAGS} | {"weights": weights_digest(model)}
