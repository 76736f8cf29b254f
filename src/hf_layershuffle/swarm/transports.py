# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Transports by their names."""

import os
from collections.abc import Mapping
from typing import Any

from .local_transport import LocalTransport
from .transport import Transport


_MODEL_OPTIONS = ("device", "dtype", "attn_implementation", "revision", "token")


def model_options(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments for a model and its workers, as they were given.

    Raises:
        `TypeError`: if one is none.
    """
    for name in kwargs:
        if name not in _MODEL_OPTIONS:
            raise TypeError(f"Swarm.from_pretrained() got an unexpected keyword argument '{name}'")
    return kwargs


def transport_of(
    transport: str | Transport, checkpoint: str | os.PathLike, address: str | None, kwargs: Mapping[str, Any]
) -> Transport:
    """The transport of this name for a checkpoint, or the one that was given.

    Raises:
        `ValueError`: if there is none of this name.
        `SwarmError`: if Ray is not installed.
    """
    if transport == "ray":
        from .ray_transport import RayTransport

        return RayTransport(checkpoint, address=address, **kwargs)
    if address is not None:
        raise ValueError(f"`address` is {address!r}, which only `transport='ray'` uses; leave it out.")
    if transport == "local":
        return LocalTransport(checkpoint, **kwargs)
    if isinstance(transport, str) or not hasattr(transport, "start_worker"):
        raise ValueError(f"`transport` is {transport!r}; it must be 'ray', 'local' or a `Transport`.")
    return transport
