# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What runs layers outside of a forward, in an execution order: `get_image_features` and the like.

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

import re
from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers import PreTrainedModel

from .execution_order import ExecutionOrder
from .free_forward import check_run, explained_length
from .free_generation import generating_order
from .layer_program import LayerProgram, Run, run_by_position, run_program, running_program


# The last one is how `generate` gets the features of images before its first forward
_NAMES = re.compile(r"get_\w+_features|_prepare_multimodal_encoder_kwargs_for_generation")


def feature_methods(plain_class: type[PreTrainedModel]) -> dict[str, Callable[..., Any]]:
    """The methods of a class that give features of its inputs, with the argument `execution_order`."""
    return {name: _feature_method(plain_class, name) for name in dir(plain_class) if _NAMES.fullmatch(name)}


def _feature_method(plain_class: type[PreTrainedModel], name: str) -> Callable[..., Any]:
    plain: Any = getattr(plain_class, name)

    @wraps(plain)
    def method(self: Any, *args: Any, execution_order: str | ExecutionOrder | None = None, **kwargs: Any) -> Any:
        layers = LayerProgram.mark(self.free_layers)
        if execution_order is None and running_program(layers) is not None:  # called by a forward
            return plain(self, *args, **kwargs)
        order = self.resolve_execution_order(generating_order(self) if execution_order is None else execution_order)
        run = Run(layers, order, self._depth_embedding, self._dropped_paths, self._skipped_mlps)
        with run_program(layers, run), run_by_position(self, order), explained_length(self, order):
            features = plain(self, *args, **kwargs)
        if run.num_given > 0:
            check_run(self, run)
        elif execution_order is not None:  # else they are of another tower
            raise ValueError(
                f"`execution_order` is {order}, and `{name}` runs none of the layers in free order, which are "
                f"`{self.layers_path}`. Leave it out."
            )
        return features

    documented: Any = method
    documented.__doc__ = (plain.__doc__ or "") + _EXECUTION_ORDER_DOC
    return method


_EXECUTION_ORDER_DOC = """
        execution_order (`str`, `list[int]` or `torch.LongTensor` of shape `(positions,)`, *optional*):
            Overrides the order for this call, as in the forward: `"sequential"`, `"arbitrary"` or layer indices.
"""
