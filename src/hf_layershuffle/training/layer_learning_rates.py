# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Learning rates that fall from the classifier to the first layer (layer-wise decay, as of ELECTRA and BEiT)."""

from typing import Any, cast

import torch
from torch import nn

from ..models.free_layers import FreeLayersMixin
from .evaluated_weights import switches_itself
from .trainer_part import TrainerPart


# Encoders whose last normalisation is registered before the layers, by a part of the class's name
_NORMALISED_LAST = ("StableLayerNorm", "Conformer")


def layer_depths(model: nn.Module) -> dict[nn.Parameter, int]:
    """How far from the input each parameter stands, by the order of the checkpoint's layers.

    Args:
        model: A model with free layer order, or one around it, as of peft.

    Returns:
        0 for what stands before the layers (embeddings) and for tables that every layer reads (relative positions),
        `index + 1` for layer `index`, and the number of layers plus 1 for the rest: the last normalisation, the
        classifier, and the vectors of `depth_embedding`, which are new.

    Raises:
        `ValueError`: if no model in it has free layer order.
    """
    free: Any = next((module for module in model.modules() if isinstance(module, FreeLayersMixin)), None)
    if free is None:
        raise ValueError(
            f"`layer_lr_decay` needs a model with free layer order, and there is none in {type(model).__name__}."
        )
    layers = list(free.free_layers._modules.values())
    inside = {each: index + 1 for index, layer in enumerate(layers) for each in layer.parameters()}
    depth_embedding = free._depth_embedding
    # Some classifiers are registered before the encoder. What DINOv3 calls its base model has no embeddings
    base: Any = free.base_model
    encoder = set((free if next(base.parameters()) in inside else base).parameters())
    new = set() if depth_embedding is None else set(depth_embedding.parameters())
    read_by_layers, behind = _exceptions(free)
    depths: dict[nn.Parameter, int] = {}
    is_before = True  # encoders register what stands before the layers before them
    for parameter in model.parameters():
        is_before = is_before and parameter not in inside
        is_embedding = is_before and parameter in encoder and parameter not in new | behind
        is_embedding = is_embedding or parameter in read_by_layers
        depths[parameter] = inside.get(parameter, 0 if is_embedding else len(layers) + 1)
    return depths


def _exceptions(free: Any) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
    """What is not where its registration says: what the layers read, and what stands behind them."""
    holder = free.get_submodule(free.layers_path.rpartition(".")[0])
    kind = type(holder).__name__
    read_by_layers: set[nn.Parameter] = set()
    behind = {each for name, part in free.named_modules() if name.endswith("pooler") for each in part.parameters()}
    for name, part in holder.named_children():
        if part in (free.free_layers, free._depth_embedding):
            continue
        # Beside its layers, DeBERTa's encoder has the normalisation of relative positions and, in DeBERTa-v2, a
        # convolution that goes with the first layer
        if isinstance(part, nn.Embedding) or name.startswith("rel") or kind.startswith("Deberta"):
            read_by_layers.update(part.parameters())
        if name == "layer_norm" and any(word in kind for word in _NORMALISED_LAST):
            behind.update(part.parameters())
    return read_by_layers, behind


def divide_groups(optimizer: torch.optim.Optimizer, depths: dict[nn.Parameter, int], decay: float) -> None:
    """Divides the groups of an optimizer by depth, and multiplies each learning rate by `decay` per step of depth.

    The first group has the highest, which a Trainer logs.

    Raises:
        `ValueError`: if the optimizer does not have the parameters in its groups.
    """
    kept = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    trained = {parameter for parameter in depths if parameter.requires_grad}
    if kept != trained:
        raise ValueError(
            f"`layer_lr_decay` is {decay}, and {type(optimizer).__name__} does not keep the parameters in groups of "
            "its own, each with a learning rate; choose another `optim`, such as adamw_torch, or leave it out."
        )
    last = max(depths.values())
    groups = []
    for depth in range(last, -1, -1):
        for group in optimizer.param_groups:
            parameters = [parameter for parameter in group["params"] if depths[parameter] == depth]
            if parameters:
                groups.append({**group, "params": parameters, "lr": group["lr"] * decay ** (last - depth)})
    optimizer.param_groups[:] = groups


class LearningRateMixin(TrainerPart):
    """The optimizer of a [`LayerShuffleTrainer`], with a learning rate for each layer (`layer_lr_decay`)."""

    _has_divided_groups = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        decay = self._argument("layer_lr_decay")
        self._has_divided_groups = self._has_divided_groups and not is_new
        if decay == 1 or self._has_divided_groups:
            return optimizer
        if not is_new:
            raise ValueError(
                f"`layer_lr_decay` is {decay}, and the Trainer got an optimizer whose learning rates it leaves alone; "
                "name the optimizer by `optim` and `optim_args`, or divide its groups by "
                "`hf_layershuffle.training.layer_learning_rates.divide_groups`."
            )
        divide_groups(optimizer, layer_depths(model or cast(nn.Module, self.model)), decay)
        self._has_divided_groups = True
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        # A schedule-free optimizer warms up by itself. transformers hands it `warmup_steps` as it is; a fraction would
        # be a first step of several times the learning rate
        if switches_itself(self.optimizer):
            for group in cast(torch.optim.Optimizer, self.optimizer).param_groups:
                if "warmup_steps" in group:
                    group["warmup_steps"] = self.args.get_warmup_steps(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)
