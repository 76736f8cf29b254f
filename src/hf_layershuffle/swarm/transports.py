# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Transports by their names."""

import os
from collections.abc import Mapping
from typing import Any

from .local_transport import LocalTransport
from .transport import Transport


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
