# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The first weights of a model: those of the plain one, but for what starts at zero or is scaled.

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .free_layers import FreeLayersMixin
from .order_check import residual_writers
from .position_modules import mark


class InitialWeightsMixin(FreeLayersMixin):
    """Initialises depth vectors and projections to zero, and scales what writes into the residual stream."""

    if TYPE_CHECKING:
        plain_class: ClassVar[type[PreTrainedModel]]

    def _mark_residual_writers(self) -> None:
        try:
            names = residual_writers(self.plain_class, self.config)
        except ValueError as error:
            raise ValueError(
                f"`residual_init_scale` is {self.config.residual_init_scale}, but what it would scale in "
                f"{self.plain_class.__name__} could not be found: {error}. Set it to 1.0."
            ) from error
        for layer in self.free_layers:
            for name in names:
                try:
                    module = layer.get_submodule(name)
                except AttributeError as error:
                    raise ValueError(
                        f"`residual_init_scale` is {self.config.residual_init_scale}, and the layers of "
                        f"{self.plain_class.__name__} are of several kinds: not all have a '{name}'. Set it to 1.0."
                    ) from error
                mark(module, "writes_to_residual")
                if getattr(module, "_is_hf_initialized", False):  # by the plain encoder of a classifier
                    self._scale_residual_weight(module)

    @torch.no_grad()
    def _scale_residual_weight(self, module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.mul_(self.config.residual_init_scale)

    @classmethod
    def is_custom_code(cls) -> bool:
        """transformers passes over modules of custom code that have no weights of their own, by which some families
        initialise the weights of their children. Ours are initialised as the family's."""
        return False

    @torch.no_grad()
    def initialize_weights(self) -> None:
        # Some families initialise maps from the modules above them, once or again, and a plain encoder inside this
        # model does not know what starts at zero. So both come when all is done, to what was written meanwhile
        marked = [
            (module, parameter, parameter._version)
            for module in self.modules()
            if getattr(module, "writes_to_residual", False) or getattr(module, "starts_at_zero", False)
            for parameter in module.parameters()
        ]
        parent: Any = super()
        parent.initialize_weights()
        for module, parameter, version in marked:
            if parameter._version == version:
                continue
            if getattr(module, "writes_to_residual", False):
                parameter.mul_(self.config.residual_init_scale)
            elif parameter is module.weight:
                init.zeros_(parameter)
            elif hasattr(module, "first_bias"):
                init.constant_(parameter, cast(float, module.first_bias))

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        parent: Any = super()
        parent._init_weights(module)
        if getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
            if hasattr(module, "first_bias"):
                init.constant_(module.bias, module.first_bias)
