# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Bytes from one open file into another, copied by the system where it can."""

import errno
import os
from collections.abc import Callable
from io import FileIO
from typing import Any


STEP = 2**26  # bytes of one call, so that progress is seen
# What a system or a file system answers that cannot do it in this way, or not between these two files
_NOT_THIS_WAY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.ENOTSOCK}
_BUFFER = 2**20


def copy_range(
    source: FileIO,
    start: int,
    num_bytes: int,
    target: FileIO,
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Appends a part of a file to another at the place where that one is.

    It shares the bytes where the file system can (`copy_file_range`), else the kernel copies them (`sendfile`), else
    they are read and written.

    Args:
        source, target: Unbuffered files.
        start: Place of the first byte in `source`.
        advance: Called with the number of bytes written, now and then.

    Raises:
        `OSError`: if the disk is full, or `source` is shorter than it should be.
    """
    end = start + num_bytes
    for copy_some in (_share, _send, _read_and_write):
        while start < end:
            copied = copy_some(source, start, min(STEP, end - start), target)
            if not copied:
                break
            advance(copied)
            start += copied
    if start < end:
        raise OSError(f"'{source.name}' became shorter while it was read. Copy or download it again.")


def write_all(stream: FileIO, content: Any) -> int:
    """Returns the number of bytes. One unbuffered write takes 2 GiB at most."""
    view = memoryview(content)
    while len(view):
        view = view[stream.write(view) :]
    return len(content)


# Each copies at most `most` bytes and returns how many; 0 where there are none, or it cannot be done in this way


def _share(source: FileIO, start: int, most: int, target: FileIO) -> int:
    copy_file_range = getattr(os, "copy_file_range", None)
    return 0 if copy_file_range is None else _tried(copy_file_range, source.fileno(), target.fileno(), most, start)


def _send(source: FileIO, start: int, most: int, target: FileIO) -> int:
    sendfile = getattr(os, "sendfile", None)
    return 0 if sendfile is None else _tried(sendfile, target.fileno(), source.fileno(), start, most)


def _read_and_write(source: FileIO, start: int, most: int, target: FileIO) -> int:
    source.seek(start)
    content = source.read(min(most, _BUFFER))
    return write_all(target, content) if content else 0


def _tried(copy_some: Callable[..., int], *args: int) -> int:
    try:
        return copy_some(*args)
    except OSError as error:
        if error.errno not in _NOT_THIS_WAY:
            raise
        return 0
