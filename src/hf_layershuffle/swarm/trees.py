# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a model passes to a layer beside its hidden states: tensors in tuples, lists and dicts."""

from collections.abc import Callable, Mapping
from typing import Any


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """The same tuples, lists and dicts with `function` of all that stands in them."""
    if isinstance(value, Mapping):
        return {name: map_leaves(function, each) for name, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
        return type(value)(*(map_leaves(function, each) for each in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_leaves(function, each) for each in value)
    return function(value)
