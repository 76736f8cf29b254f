# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What models of timm have beside others: their configuration does not say their sizes, and they checkpoint by
themselves.

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import checkpoint

from .layer_lists import find_layers


# A model's class is made of the mixin and those of `modeling_layershuffle.py`
if TYPE_CHECKING:
    from .free_layers import FreeLayersMixin as _FreeModel
else:
    _FreeModel = object

TIMM_MODEL_TYPE = "timm_wrapper"


class TimmLayersMixin(_FreeModel):
    """A model of timm, as transformers wraps it, whose blocks run in any order."""

    timm_model: Any

    def _make_free(self, are_weights_new: bool = True) -> None:
        self._note_sizes()
        parent: Any = super()
        parent._make_free(are_weights_new)
        self.free_layers.follows_length = True
        if getattr(self.timm_model, "grad_checkpointing", False):  # enabled before the layers were free
            self.timm_model.set_grad_checkpointing(False)
            self._set_gradient_checkpointing(gradient_checkpointing_func=partial(checkpoint, use_reentrant=False))

    def _note_sizes(self) -> None:
        """Writes into the configuration what the model was built with, by the names that transformers' models have.

        Raises:
            `ValueError`: if the model has no single list of equal layers.
        """
        config: Any = self.config
        layers = list(self.get_submodule(find_layers(self)).children())
        config.num_hidden_layers = len(layers)
        config.hidden_size = getattr(self.timm_model, "embed_dim", self.timm_model.num_features)
        patches = getattr(self.timm_model, "patch_embed", None)
        for name, size in {
            "image_size": getattr(patches, "img_size", None),
            "patch_size": getattr(patches, "patch_size", None),
        }.items():
            if size is not None:
                setattr(config, name, size[0] if size[0] == size[1] else list(size))
        config.num_attention_heads = getattr(getattr(layers[0], "attn", None), "num_heads", None)
        config.num_channels = (config.model_args or {}).get("in_chans", 3)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        # timm would checkpoint what stands in for a layer, and with it what a layer hands over beside hidden states
        self.free_layers.checkpoint = gradient_checkpointing_func if enable else None
