# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Float32 master weights, whatever a checkpoint is stored in: small steps are lost in half precision."""

import torch
from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)
HALF_PRECISIONS = (torch.float16, torch.bfloat16)


def use_float32_weights(model: nn.Module) -> torch.dtype | None:
    """Casts a model that is about to be trained to float32, with a warning, if it trains half-precision parameters.

    The frozen base of adapters or of a quantised model stays as it is; other models are cast whole, as layers of two
    precisions cannot follow each other.

    Args:
        model: The model, which is cast in place. Optimizers that hold its parameters stay valid.

    Returns:
        The dtype of the frozen base, in which the model must then be run by autocast; None if nothing asks for it.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = {parameter.dtype for parameter in trained} & set(HALF_PRECISIONS)
    if not found:
        return None
    if _has_frozen_base(model):
        for parameter in trained:
            parameter.grad = None
            parameter.data = parameter.data.float()
    else:
        model.float()
    logger.warning(
        "The model is in %s, in which small steps of training are lost: it is trained in float32. For speed and "
        "memory, add mixed precision (`bf16=True` or `fp16=True`). `float32_weights=False` trains them as "
        "they are.",
        " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found)),
    )
    return next((parameter.dtype for parameter in model.parameters() if parameter.dtype in HALF_PRECISIONS), None)


def check_mixed_precision(model: nn.Module, mixed_precision: str | None) -> None:
    """Raises a `ValueError` if frozen parameters are in one half precision and mixed precision is the other.

    PyTorch's autocast knows no way from one to the other.

    Args:
        model: The model to train.
        mixed_precision: `"bf16"`, `"fp16"` or another, as accelerate says it.
    """
    other = {"bf16": torch.float16, "fp16": torch.bfloat16}.get(mixed_precision or "")
    if any(parameter.dtype == other and not parameter.requires_grad for parameter in model.parameters()):
        name = str(other).removeprefix("torch.")
        raise ValueError(
            f"The model has frozen weights in {name}, which cannot be run in `{mixed_precision}`. Load it in float32 "
            "or in the precision of the training: from_pretrained(..., dtype=...)."
        )


def _has_frozen_base(model: nn.Module) -> bool:
    names = ("peft_config", "_hf_peft_config_loaded", "is_quantized")
    return any(bool(getattr(model, name, False)) for name in names)
