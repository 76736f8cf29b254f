# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What tells a layer its position, and what lets it predict one: modules that belong to a layer and run inside it.

This file travels to the Hub beside the weights, so it imports nothing from this package.
"""

from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn


# A layer's class is made of the mixin and the family's
if TYPE_CHECKING:
    _FamilyLayer = nn.Module
else:
    _FamilyLayer = object


class DepthProjection(nn.Module):
    """Tells a layer the position it runs at: `LayerNorm -> Linear -> GELU` of the tokens joined with a depth vector.

    The linear map starts at zero and GELU(0) = 0, so a fresh projection adds exactly nothing. It learns,
    as GELU'(0) = 0.5.
    """

    def __init__(self, hidden_size: int, depth_embedding_dim: int, layer_norm_eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size + depth_embedding_dim, eps=layer_norm_eps)
        self.dense = nn.Linear(hidden_size + depth_embedding_dim, hidden_size)
        # Marked on the module that holds the weight: transformers passes over custom modules that have none themselves
        mark(self.dense, "starts_at_zero")
        self.activation = nn.GELU()

    def forward(self, hidden_states: torch.Tensor, depth_vector: torch.Tensor) -> torch.Tensor:
        # (batch_size, tokens, hidden_size) and (depth_embedding_dim,) -> (batch_size, tokens, hidden_size)
        vectors = depth_vector.expand(*hidden_states.shape[:-1], -1)
        return self.activation(self.dense(self.norm(torch.cat((hidden_states, vectors), dim=-1))))


def mark(module: nn.Module, what: str) -> None:
    """Tells the initialisation of a model that a module "starts_at_zero" or "writes_to_residual"."""
    setattr(module, what, True)


class PositionHead(nn.Module):
    """Predicts from the mean of a layer's output tokens the position at which the layer ran."""

    def __init__(self, hidden_size: int, num_layers: int, layer_norm_eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.dense = nn.Linear(hidden_size, num_layers)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # (batch_size, tokens, hidden_size) -> (batch_size, num_layers)
        return self.dense(self.norm(hidden_states.mean(dim=1)))


class PositionedLayerMixin(_FamilyLayer):
    """A layer that owns its depth projection and its position head.

    So it can be moved, merged, sharded and compiled as one thing. Both run inside its forward, since under FSDP2 their
    weights are there only then.
    """

    plain_class: ClassVar[type[nn.Module]]
    depth_projection: DepthProjection | None
    position_head: PositionHead | None

    def forward(
        self, hidden_states: torch.Tensor, depth_vector: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The plain layer's output: hidden states of shape `(batch_size, tokens, hidden_size)`, or a tuple of them
        first.

        With a position head it is a tuple. Last are the position logits, of shape `(batch_size, num_layers)`.
        """
        if self.depth_projection is not None:
            hidden_states = hidden_states + self.depth_projection(hidden_states, depth_vector)
        output = super().forward(hidden_states, *args, **kwargs)
        if self.position_head is None:
            return output
        if isinstance(output, (tuple, list)):
            # Of at least two, since one alone would look like a layer that gives a tensor
            output = output if len(output) > 1 else (*output, None)
            return (*output, self.position_head(output[0]))
        return output, self.position_head(output)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class is made on demand, so pickle cannot find it by name
        return _new_layer, (type(self).plain_class,), self.__getstate__()


def change_class(module: Any, made: type[Any]) -> None:
    """Makes a module one of a made class of its own, in place."""
    module.__class__ = made
    if "_old_forward" in vars(module):  # `device_map`: accelerate's forward calls this one
        module._old_forward = MethodType(made.forward, module)


def check_changeable(model: Any, layers: list[nn.Module], parts: list[str]) -> None:
    """Refuses a model that cannot be changed in place, before anything is.

    Args:
        model: A plain model.
        layers: Its layers.
        parts: The flags that give it further modules.

    Raises:
        `ValueError`: if a forward that changes was replaced, or if layers that get modules are offloaded.
    """
    for module in (model, model.base_model, *(layers if parts else ())):
        if "forward" in vars(module) and "_old_forward" not in vars(module):
            raise ValueError(
                f"The forward of this {type(module).__name__} was replaced, as `Accelerator.prepare` does, so it "
                "would not follow an execution order. Give the model free layer order before that, or take it back by "
                "`accelerator.unwrap_model(model, keep_fp32_wrapper=False)`."
            )
    is_offloaded = any(parameter.is_meta for layer in layers for parameter in layer.parameters())
    if parts and is_offloaded and hasattr(model, "hf_device_map"):
        raise ValueError(
            f"`{parts[0]}` is True, and layers of this {type(model).__name__} are offloaded by `device_map`, so they "
            f"cannot get modules. Load it by `LayerShuffle{type(model).__name__}.from_pretrained(..., "
            f"{parts[0]}=True, device_map=...)`."
        )


_POSITIONED_CLASSES: dict[type, type] = {}


def positioned_layer_class(plain_class: type[nn.Module]) -> type[nn.Module]:
    """A family's layer class with depth projection and position head: `LayerShuffleViTLayer` of `ViTLayer`."""
    if plain_class not in _POSITIONED_CLASSES:
        body = {"__module__": __name__, "__doc__": plain_class.__doc__, "plain_class": plain_class}
        name = f"LayerShuffle{plain_class.__name__}"
        _POSITIONED_CLASSES[plain_class] = type(name, (PositionedLayerMixin, plain_class), body)
    return _POSITIONED_CLASSES[plain_class]


def _new_layer(plain_class: type[nn.Module]) -> nn.Module:
    made = positioned_layer_class(plain_class)
    return made.__new__(made)


def position_loss(
    position_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of the predicted positions (arXiv 2407.04513), averaged over positions and the examples that
    count.

    Args:
        position_logits: Tensor of shape `(batch_size, positions, num_layers)`. Positions beyond the depth, as in
            orders with repeats, have no class and are left out.
        labels: Tensor of shape `(batch_size,)` or `(batch_size, labels_per_example)`. An example whose labels are all
            -100 is left out, as the class loss leaves it out.
        num_items_in_batch: The Trainer's count of labels that are not -100 in all micro-batches of a step, by which
            the class loss is divided. The losses of the micro-batches then add up to that of the whole batch.

    Returns:
        A float32 tensor of shape `()`, without `position_loss_weight`; 0 if no example counts.
    """
    batch_size, positions, num_layers = position_logits.shape
    positions = min(positions, num_layers)
    targets = torch.arange(positions, device=position_logits.device).expand(batch_size, -1)
    num_examples: int | torch.Tensor = batch_size
    num_labels: int | torch.Tensor = batch_size
    if labels is not None:
        is_label = labels.to(targets.device).reshape(batch_size, labels.numel() // max(batch_size, 1)) != -100
        is_counted = is_label.any(dim=1)
        targets = targets.masked_fill(~is_counted[:, None], -100)
        num_examples = is_counted.sum().clamp(min=1)
        num_labels = is_label.sum()
    logits = position_logits[:, :positions].flatten(0, 1).float()
    loss = nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum") / (positions * num_examples)
    if num_items_in_batch is None:
        return loss
    # The part of the step's labels that this micro-batch has, by which its mean counts
    num_items_in_batch = torch.as_tensor(num_items_in_batch, device=loss.device)
    return loss * num_labels / (num_items_in_batch + (num_items_in_batch == 0))
