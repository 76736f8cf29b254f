# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Memory that a long run gives back."""

import ctypes
from contextlib import suppress


_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE = 2**20


def give_back_large_blocks() -> None:
    """Has glibc map blocks of 1 MiB and more on their own, so that they go back to the system when they are freed.

    Its own threshold rises to the size of what was freed. Then batches lie among small blocks, and the memory of a
    worker that makes batches of all sizes doubles within some thousand images. With another libc it does nothing.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
