# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Safetensors files, read and written piece by piece."""

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from ..common.file_ranges import copy_range, write_all


DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
CHUNK_NUMBERS = 2**18  # few enough to stay in the processor's cache
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file.

    Args:
        source: Whose file it is, for messages.
        name: The tensor's name in the file.
        dtype: None if it is not of floats of 16 to 64 bits. Such tensors are not read in pieces.
        start: The place of its first byte in the file.
    """

    source: str
    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    start: int

    @property
    def float_dtype(self) -> torch.dtype:
        if self.dtype is None:
            raise ValueError(f"'{self.name}' in '{self.file}' is not a tensor of floats of 16 to 64 bits.")
        return self.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.float_dtype.itemsize

    def read(self) -> torch.Tensor:
        """The whole tensor, mapped from the file. The file is not kept open, which would keep it mapped."""
        with open_safetensors(self.source, self.file) as file:
            return file.get_tensor(self.name)

    def chunks(self) -> Iterator[torch.Tensor]:
        """The tensor's numbers in flat pieces of up to `CHUNK_NUMBERS`, each valid until the next.

        For large tensors this takes less time than `read`, which waits for every page to be mapped.
        """
        left = self.num_bytes
        buffer = bytearray(min(left, CHUNK_NUMBERS * self.float_dtype.itemsize))
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            while left:
                view = memoryview(buffer)[:left]
                self._fill(view, file)
                left -= len(view)
                yield torch.frombuffer(view, dtype=self.float_dtype)

    def _fill(self, view: memoryview, file: io.RawIOBase) -> None:
        """Reads until the view is full, since a single read may give less than there is."""
        while len(view):
            count = file.readinto(view)
            if not count:
                raise OSError(f"'{self.file}' became shorter while it was read. Copy or download it again.")
            view = view[count:]

    def is_finite(self) -> bool:
        """Whether there is neither NaN nor infinity."""
        return all(is_finite(chunk) for chunk in self.chunks())


def is_finite(numbers: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity. `torch.aminmax` takes one pass and no temporary."""
    return all(math.isfinite(value.item()) for value in torch.aminmax(numbers)) if numbers.numel() else True


class WrittenTensor(Protocol):
    """A tensor to write: a copy of a stored one, or numbers that are computed in pieces."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def copied(self) -> StoredTensor | None: ...

    def compute(self) -> Iterable[torch.Tensor]: ...


def list_tensors(source: str, file: Path) -> list[StoredTensor]:
    """The tensors that a file holds.

    Args:
        source: Whose file it is, for messages.

    Raises:
        `OSError`: if the file is truncated or corrupted.
    """
    with open_safetensors(source, file):
        pass  # checks the header, and that the file is as long as it says
    with open(file, "rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    header.pop("__metadata__", None)
    return [
        StoredTensor(
            source,
            file,
            name,
            tuple(item["shape"]),
            _DTYPES.get(item["dtype"]),
            8 + header_bytes + item["data_offsets"][0],
        )
        for name, item in header.items()
    ]


def open_safetensors(source: str, file: Path) -> safe_open:
    """The open file, whose tensors are read when they are asked for.

    Raises:
        `OSError`: if it is truncated or corrupted.
    """
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise OSError(
            f"Source '{source}': '{file}' cannot be read ({error}); it is truncated or corrupted. Copy or download it "
            "again."
        ) from error


def write_safetensors(file: Path, tensors: Iterable[WrittenTensor], advance: Callable[[int], object]) -> None:
    """Streams a file, which `safetensors.torch.save_file` would want to have in memory at once.

    What is computed is computed by several threads, a tensor each, which write at its place. What is copied is copied
    meanwhile.

    Its format: the length of the header (8 bytes, little-endian), the header (JSON), the tensors' bytes without gaps.

    Args:
        advance: Called with the number of bytes written.
    """
    # Each starts at a multiple of its item size. By name, since so they lie in files that safetensors wrote
    tensors = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with open(file, "wb", buffering=0) as stream:
        write_all(stream, len(text).to_bytes(8, "little") + text)
        with _threads() as submit:
            places = {tensor.name: start + header[tensor.name]["data_offsets"][0] for tensor in tensors}
            computed = [tensor for tensor in tensors if tensor.copied is None]
            writing = [submit(partial(_write_computed, file, places[each.name], each)) for each in computed]
            for part in _ranges(tensors):
                stream.seek(places[part.name])
                with open(part.file, "rb", buffering=0) as source:
                    copy_range(source, part.start, part.num_bytes, stream, advance)
            for each in as_completed(writing):
                advance(each.result())


@contextmanager
def _threads() -> Iterator[Callable[[Callable[[], int]], "Future[int]"]]:
    """Gives a function that lets a thread do a task. After an exception here or in a task no other task begins."""
    is_over = Event()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), "writes-tensors") as executor:

        def submit(task: Callable[[], int]) -> "Future[int]":
            def done() -> int:
                try:
                    return 0 if is_over.is_set() else task()
                except BaseException:
                    is_over.set()
                    raise

            return executor.submit(done)

        try:
            yield submit
        except BaseException:
            is_over.set()
            raise


def _write_computed(file: Path, place: int, tensor: WrittenTensor) -> int:
    """Writes a tensor at its place in a file that is there; returns the number of bytes."""
    with open(file, "r+b", buffering=0) as stream:
        stream.seek(place)
        return sum(write_all(stream, piece.reshape(-1).view(torch.uint8).numpy()) for piece in tensor.compute())


@dataclass
class _Range:
    """A part of a file, and the name of the tensor with which it starts."""

    name: str
    file: Path
    start: int
    num_bytes: int


def _ranges(tensors: Iterable[WrittenTensor]) -> list[_Range]:
    """What is copied; neighbours in the result that are neighbours in a file as one range of that file."""
    ranges: list[_Range] = []
    before: StoredTensor | None = None
    for tensor in tensors:
        copied = tensor.copied
        if copied is not None:
            if before is not None and (copied.file, copied.start) == (before.file, before.start + before.num_bytes):
                ranges[-1].num_bytes += copied.num_bytes
            else:
                ranges.append(_Range(tensor.name, copied.file, copied.start, copied.num_bytes))
        before = copied
    return ranges
