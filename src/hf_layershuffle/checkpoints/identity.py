# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What tells models apart."""

import os
import zlib
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.configuration_layershuffle import encoder_config


_FLAGS = ("model_type", "shuffle_mode", "shuffle_window", "depth_embedding", "position_predictor", "layerdrop")
# Of a family's configuration: they change what the layers give, and not their weights
FAMILY_SETTINGS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "rms_norm_eps")


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of a model's parameters: eight hexadecimal digits, the same on every device."""
    digest = 0
    for parameter in model.parameters():
        # Their bytes: sums depend on the device and the number of threads
        content = parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest = zlib.crc32(content.data, digest)
    return f"{digest:08x}"


def stored_weights_digest(folder: str | os.PathLike) -> str | None:
    """A digest of the weights as they are stored in a folder; None where there are none, as for a Hub id."""
    files = sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("pytorch_model*.bin")])
    digest = 0
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest = zlib.crc32(block, digest)
    return f"{digest:08x}" if files else None


def describe_model(model: PreTrainedModel) -> dict:
    """What a report says about its model: type and flags, what changes its outputs, and a digest of the weights."""
    flags = {name: getattr(model.config, name, None) for name in _FLAGS}
    return flags | describe_outputs(model.config) | {"weights": weights_digest(model)}


def describe_outputs(config: PreTrainedConfig) -> dict:
    """What of a configuration changes what layers give in a given order: left out MLPs, and `FAMILY_SETTINGS`."""
    encoder = encoder_config(config)
    settings = {name: getattr(encoder, name) for name in FAMILY_SETTINGS if hasattr(encoder, name)}
    return settings | {"skipped_mlps": skipped_mlps_of(config)}


def skipped_mlps_of(config: PreTrainedConfig) -> list[int] | None:
    """The positions at which a configuration leaves MLPs out, in ascending order; None if it leaves none out."""
    return sorted(getattr(config, "skipped_mlps", None) or ()) or None
