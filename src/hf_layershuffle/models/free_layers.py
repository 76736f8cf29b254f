# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The order in which a model's layers run in a forward pass, and the layers themselves.

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .configuration_layershuffle import LayerShuffleConfigMixin, num_layers_of
from .execution_order import ExecutionOrder, ExecutionOrderStream, check_execution_order, draw_execution_order
from .layer_program import LayerProgram


# A model's class is made of the mixin and the family's, which is the one that comes from transformers
if TYPE_CHECKING:
    from transformers import PreTrainedModel as _FamilyModel
else:
    _FamilyModel = object


class FreeLayersMixin(_FamilyModel):
    """A model whose list of layers is a [`LayerProgram`], and where the order of its next forward pass comes from."""

    layers_path: str  # of the list of layers that run in free order, for `get_submodule`
    execution_order_stream: ExecutionOrderStream
    # Whether the head reads the inputs of all examples once more; None: not known yet
    _reads_inputs_after_layers: bool | None = None
    # Whether a layer gives a tuple, of which hidden states are the first; None: not known yet
    _layers_give_tuple: bool | None = None
    if TYPE_CHECKING:  # at run time, transformers would take it for the class's configuration
        config: LayerShuffleConfigMixin

    @property
    def free_layers(self) -> LayerProgram:
        """The list of the layers that run in free order, each by its index in the checkpoint."""
        layers: Any = self.get_submodule(self.layers_path)
        return layers

    def seed_execution_order(self, seed: int, step: int = 0) -> None:
        """Makes the random orders depend on `seed`, `step` and the number of forwards since this call only.

        [`LayerShuffleCallback`] calls it before each optimizer step of a `Trainer`. In a training loop of your own
        under FSDP, ZeRO-3 or tensor parallelism, call it on every process, and again with the step on a resume.
        """
        self.execution_order_stream.seek(seed, step)

    def check_depth(self) -> None:
        """Checks that the list of layers is as long as the configuration, depth vectors and position heads say.

        Raises:
            `ValueError`: if it is not, as after cutting layers by hand.
        """
        layers = self.free_layers
        num_layers = len(layers)
        depths = [("`config.num_hidden_layers`", num_layers_of(self.config))]
        depth_embedding = self._depth_embedding
        if depth_embedding is not None:
            depths.append(("the number of depth vectors", getattr(depth_embedding, "num_embeddings", num_layers)))
        controller = getattr(self, "layer_controller", None)
        if controller is not None:
            depths.append(("the number of layers that the layer controller scores", controller.scores.out_features))
        for layer in layers._modules.values():
            position_head = getattr(layer, "position_head", None)
            if position_head is not None:
                depths.append(("the number of outputs of a position head", position_head.dense.out_features))
        for what, depth in depths:
            if depth != num_layers:
                raise ValueError(
                    f"This model has {num_layers} layers, but {what} is {depth}. Layers cut by hand leave the "
                    "configuration, the depth vectors and the position heads as they were. Shorten them all by "
                    f"`hf_layershuffle.prune_layers(model, {list(range(num_layers))})`, of the whole model or of this "
                    "one."
                )

    @property
    def _depth_embedding(self) -> nn.Embedding | None:
        encoder: Any = self.base_model
        is_free = encoder is not self and isinstance(encoder, FreeLayersMixin)
        return encoder._depth_embedding if is_free else getattr(encoder, "depth_embedding", None)

    @property
    def _dropped_paths(self) -> float:
        """The `drop_path_rate` of the next forward pass, as far as the layer program and not the family follows it."""
        is_ours = self.training and not self.config.has_own_drop_path
        return self.config.drop_path_rate if is_ours else 0.0

    @property
    def _skipped_mlps(self) -> list[int]:
        """The positions of the next forward pass at which layers run without their MLPs."""
        return [] if self.training else self.config.skipped_mlps or []

    def resolve_execution_order(self, execution_order: str | ExecutionOrder | None = None) -> list[int]:
        """The order of the next forward pass.

        It is `execution_order` if given. Else it is drawn by `config.shuffle_mode` and `config.layerdrop` in training,
        and `config.execution_order` in evaluation.
        """
        self.check_depth()
        config = self.config
        num_layers = len(self.free_layers)
        if execution_order is None and self.training:
            if config.shuffle_mode == "none" and config.layerdrop == 0.0:
                return list(range(num_layers))
            return self._draw_execution_order(config.shuffle_mode, config.shuffle_window, config.layerdrop)
        if execution_order is None:
            execution_order = config.execution_order
        if isinstance(execution_order, str) and execution_order == "sequential":
            return list(range(num_layers))
        if isinstance(execution_order, str) and execution_order == "arbitrary":
            return self._draw_execution_order("arbitrary")
        return check_execution_order(execution_order, num_layers)

    # An order that does not change can stand in one graph of the whole model. Random ones would need a graph each
    @torch.compiler.disable
    def _draw_execution_order(self, *how: Any) -> list[int]:
        stream = self.execution_order_stream
        if stream.seed is None and is_sharded(self):
            raise ValueError(
                "This model's parameters are sharded over several processes, and a random execution order that is not "
                "the same on each of them would silently mix different layers' weights. Add `LayerShuffleCallback()` "
                "to the Trainer's callbacks, or call `seed_execution_order(seed, step)` on the model on every process."
            )
        return draw_execution_order(len(self.free_layers), stream.next_generator(self.training), *how)


def is_sharded(model: nn.Module) -> bool:
    """Whether layers' weights are gathered from several processes to run (FSDP, FSDP2, ZeRO-3, tensor parallel)."""
    return any(
        isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") or hasattr(parameter, "_is_flat_param")
        for parameter in model.parameters()
    ) or any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules())
