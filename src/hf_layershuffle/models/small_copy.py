# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A small model of the same class with random weights, on which to try what would take long on a large one.

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_layershuffle import BY_LAYER, encoder_config


Result = TypeVar("Result")
NUM_LAYERS = 3
MOST_PARAMETERS = 100_000_000  # of a copy that keeps the width of its model
# Fields of configurations, and what they are in a small copy
_SMALL: dict[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers"), NUM_LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers"), 1),
    "vocab_size": 128,
}
_FRAMES = ("num_frames", "frames_per_clip")
_NARROW: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "embed_dim", "pred_hidden_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "decoder_attention_heads", "pred_num_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 64),
    "head_dim": 8,
    "decoder_hidden_size": 32,
    "decoder_intermediate_size": 64,
    "decoder_num_attention_heads": 4,
}


def on_small_copy(
    plain_class: type[PreTrainedModel], config: PreTrainedConfig, function: Callable[[Any, dict], Result]
) -> Result:
    """What a function says of a small copy of a model: of few layers and words, and narrow too if that can be run.

    All weights of the copy are random, so that every part of it shows in what it computes. It is in evaluation mode,
    on the CPU, in float32. The state of torch's random numbers is not changed.

    Args:
        plain_class: The class of transformers.
        config: The configuration, of the class or with our flags. But for the sizes, the copy has the same.
        function: Is given the copy and inputs for it, as from [`example_inputs`].

    Raises:
        `ValueError`: if neither copy can be built and run, with the reason.
    """
    error: Exception | None = None
    for fields in (_SMALL | _NARROW, _SMALL):
        try:
            # Some parts draw random numbers on the CPU even if the model is built on the meta device
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                small = _shrink(_plain(plain_class, config), fields)
                with torch.device("meta"):
                    num_parameters = sum(parameter.numel() for parameter in plain_class(small).parameters())
                if num_parameters > MOST_PARAMETERS:
                    raise ValueError(f"with {NUM_LAYERS} layers it has {num_parameters:,} parameters")
                with torch.device("cpu"):
                    model: Any = plain_class(small).float().eval()
                    _randomize(model)
                    return function(model, example_inputs(model))
        except Exception as caught:  # whatever a configuration of these numbers breaks
            error = error or caught
    reason = " ".join(str(error).split())
    raise ValueError(f"no small {plain_class.__name__} could be run ({type(error).__name__}: {reason[:200]})")


def _plain(plain_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration as one of the plain class."""
    config_class: Any = plain_class.config_class
    values = config.to_dict() | {"model_type": config_class.model_type}
    plain = config_class.from_dict(copy.deepcopy(values))
    plain._attn_implementation = "eager"
    return plain


def _shrink(config: Any, fields: dict[str, int]) -> PreTrainedConfig:
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _shrink(value, fields)
        elif name in fields and isinstance(value, int) and not isinstance(value, bool):
            setattr(config, name, min(value, fields[name]))
        elif name.endswith("_token_id") and isinstance(value, int) and value >= fields["vocab_size"]:
            setattr(config, name, {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, 3))
        elif name in BY_LAYER and isinstance(value, list):
            setattr(config, name, value[:NUM_LAYERS])
    if hasattr(config, "model_args"):  # of timm, whose configuration names an architecture
        config.model_args = {**(config.model_args or {}), "depth": NUM_LAYERS}
    # Fewer patches. What else depends on their number is built from these
    patch, size = getattr(config, "patch_size", None), getattr(config, "image_size", None)
    if "hidden_size" in fields and isinstance(patch, int) and isinstance(size, int):
        config.image_size = min(size, 4 * patch)
    return config


def _randomize(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 0.2 if parameter.ndim > 1 else 0.1
        offset = 1.0 if parameter.ndim == 1 else 0.0  # of normalisations and scales, which may be zero at first
        parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))


def example_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Random inputs of two examples for a model of images, texts, audio or videos.

    Raises:
        `ValueError`: if its main input is none of these.
    """
    names = inspect.signature(model.forward).parameters
    config: Any = encoder_config(model.config)
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator)

    name = model.main_input_name
    if "spatial_shapes" in names:  # SigLIP 2: patches
        side = int(config.num_patches**0.5)
        patches = values(side * side, config.num_channels * config.patch_size**2)
        shapes = torch.tensor([[side, side]] * 2)
        mask = torch.ones(2, side * side, dtype=torch.long)
        return {name: patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    if name.startswith("pixel_values"):
        image = (getattr(config, "num_channels", None) or 3, *_image_size(config))
        frames = next((getattr(config, key) for key in _FRAMES if hasattr(config, key)), None)
        inputs = {name: values(*image) if frames is None else values(frames, *image)}
        return inputs | ({"skip_predictor": True} if "skip_predictor" in names else {})
    if name == "input_ids":
        return {name: torch.randint(5, min(config.vocab_size, 128) - 1, (2, 12), generator=generator)}
    if name == "input_values" and hasattr(config, "num_mel_bins"):
        return {name: values(config.max_length, config.num_mel_bins)}
    if name == "input_values":
        return {name: values(4000)}
    if name == "input_features" and hasattr(config, "feature_projection_input_dim"):
        return {name: values(20, config.feature_projection_input_dim)}
    if name == "input_features" and hasattr(config, "max_source_positions"):
        return {name: values(config.num_mel_bins, 2 * config.max_source_positions)}
    raise ValueError(f"no inputs are known for '{name}', which {type(model).__name__} takes")


def _image_size(config: Any) -> tuple[int, int]:
    size = next((getattr(config, key) for key in ("image_size", "crop_size") if hasattr(config, key)), 224)
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    return (size, size) if isinstance(size, int) else (size[0], size[1])
