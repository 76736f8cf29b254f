# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Generation in an execution order, and caches of keys and values whose layers do not all run.

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import Any

from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.utils.import_utils import is_torchdynamo_compiling

from .execution_order import ExecutionOrder


# {id of a model: the execution order of the `generate` call that is running}
_GENERATING: ContextVar[dict[int, list[int]] | None] = ContextVar("layershuffle_generating", default=None)


def generating_order(model: Any) -> list[int] | None:
    """The order of the `generate` call of a model that is running; None if none is."""
    return (_GENERATING.get() or {}).get(id(model))


def generation_methods(plain_class: type[PreTrainedModel]) -> dict[str, Callable[..., Any]]:
    """`generate` with the argument `execution_order`, and what carries the order to each forward; nothing of a class
    that does not generate."""
    plain: Any = plain_class
    if not (hasattr(plain, "generate") and plain.can_generate()):
        return {}

    @wraps(plain.generate)
    def generate(self: Any, *args: Any, execution_order: str | ExecutionOrder | None = None, **kwargs: Any) -> Any:
        # One order for the whole text: a token attends to the keys and values of the tokens before it, and of other
        # tokens' orders they would be those of another model
        order = self.resolve_execution_order(execution_order)
        config = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("assistant_early_exit", getattr(config, "assistant_early_exit", None)) is not None:
            raise ValueError(_EARLY_EXIT)
        token = _GENERATING.set({**(_GENERATING.get() or {}), id(self): order})
        try:
            return plain.generate(self, *args, **kwargs)
        finally:
            _GENERATING.reset(token)

    @wraps(plain.prepare_inputs_for_generation)  # generate asks its signature what the family takes
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = plain.prepare_inputs_for_generation(self, *args, **kwargs)
        # Here, and not among the arguments of generate, which it also hands to an assistant model
        order = generating_order(self)
        return inputs if order is None else {"execution_order": order, **inputs}

    def _valid_auto_compile_criteria(self: Any, *args: Any, **kwargs: Any) -> bool:
        # A decoder is compiled in several graphs, which do not see the execution order. Layers are compiled one by one
        return False

    documented: Any = generate
    documented.__doc__ = (plain.generate.__doc__ or "") + _EXECUTION_ORDER_DOC
    methods = (generate, prepare_inputs_for_generation, _valid_auto_compile_criteria)
    return {method.__name__: method for method in methods}


_EARLY_EXIT = (
    "`assistant_early_exit` cuts layers off by the configuration, beside the execution order. Pass `assistant_model`: "
    "a model with free layer order whose `config.execution_order` are the layers that draft."
)

_EXECUTION_ORDER_DOC = """
        execution_order (`str`, `list[int]` or `torch.LongTensor` of shape `(positions,)`, *optional*):
            The order of the layers for all tokens of this call: `"sequential"`, `"arbitrary"` (drawn once for the
            call) or layer indices. Without it, `config.execution_order` counts. An order that holds a layer more than
            once needs `use_cache=False`.
"""


# --- Caches ---


class LeftOutPlace(CacheLayerMixin):
    """The place in a cache of a layer that does not run.

    It says of its length what the place of a layer that runs says: models ask the first layer's place how many tokens
    there were.

    Args:
        place: What was there. It comes back when the cache is empty again and its layer runs.
        stand_in: The place of a layer that runs, of the same kind if there is one.
    """

    supports_early_init = False

    def __init__(self, place: Any, stand_in: Any):
        super().__init__()
        self.place = place
        self.stand_in = stand_in
        for name in ("is_sliding", "is_compileable", "is_croppable"):
            setattr(self, name, getattr(place, name, False))

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None: ...

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("This layer is left out of the execution order, so it has no keys and values.")

    def get_seq_length(self) -> Any:
        return self.stand_in.get_seq_length()

    def get_mask_sizes(self, query_length: Any) -> Any:
        return self.stand_in.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return self.stand_in.get_max_length()

    def reset(self) -> None:
        self.place.reset()

    def offload(self) -> None: ...
    def prefetch(self) -> None: ...
    def reorder_cache(self, beam_idx: Any) -> None: ...
    def crop(self, *args: Any) -> None: ...
    def batch_repeat_interleave(self, repeats: int) -> None: ...
    def batch_select_indices(self, indices: Any) -> None: ...


def _places(cache: Any) -> list[Any]:
    """The place of each layer in a cache; none if there is no cache, or one of another kind."""
    cache = getattr(cache, "self_attention_cache", cache)
    # In a compiled step nothing is new: the prompt is not compiled
    return cache.layers if isinstance(cache, Cache) and not is_torchdynamo_compiling() else []


def check_cache(cache: Any, order: Sequence[int]) -> None:
    """Refuses a cache that lacks earlier tokens of a layer.

    Raises:
        `ValueError`: naming the layer.
    """
    places = _places(cache)
    for index in sorted(set(order)) if places else ():
        place = places[index] if index < len(places) else None
        if not isinstance(place, LeftOutPlace):
            continue
        if place.get_seq_length() > 0:
            raise ValueError(
                f"`execution_order` holds layer {index}, of which `past_key_values` lacks keys and values: an earlier "
                "call with this cache left the layer out. Keep to the layers of that call, or begin with a new cache."
            )
        places[index] = place.place


def leave_out_of_cache(cache: Any, order: Sequence[int], num_layers: int) -> None:
    """After a forward: the places of the layers that did not run follow those that did."""
    cache = getattr(cache, "self_attention_cache", cache)  # of one with cross-attention, which has no lengths
    places = _places(cache)
    running = [places[index] for index in order if index < len(places)]
    measured = [place for place in running if isinstance(place, CacheLayerMixin)]
    for index in sorted(set(range(num_layers)) - set(order)) if measured else ():
        if index == len(places) and cache.layer_class_to_replicate is not None:  # one that grows with the layers
            places.append(cache.layer_class_to_replicate())
        if index < len(places):
            place = getattr(places[index], "place", places[index])
            alike = [each for each in measured if type(each) is type(place)] or measured
            places[index] = LeftOutPlace(place, alike[0])
