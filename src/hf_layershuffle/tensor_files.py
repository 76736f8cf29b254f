# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Safetensors files, read and written one tensor at a time."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its name there, its shape, and its dtype (None if it is not a float)."""

    source: str
    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    def read(self) -> torch.Tensor:
        """The tensor, mapped from the file: memory is taken only while it is used, and given back with the last reference."""
        # A file is opened for each tensor (0.3 ms), since an open one keeps all that was read from it mapped
        with open_safetensors(self.source, self.file) as file:
            return file.get_tensor(self.name)


def open_safetensors(source: str, file: Path):
    """The open file; `source` is whose it is, for the message.

    Raises:
        `OSError`: if it is truncated or corrupted.
    """
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise OSError(
            f"Source '{source}': '{file}' cannot be read ({error}); it is truncated or corrupted. Copy or download it again."
        ) from error


def dtype_of(header) -> torch.dtype | None:
    """Of a slice of an open file; None if it does not hold floats of 16 to 64 bits."""
    return _DTYPES.get(header.get_dtype())


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity. In one pass without a temporary, unlike `torch.isfinite`."""
    return tensor.numel() == 0 or all(map(math.isfinite, (value.item() for value in torch.aminmax(tensor))))


def write_safetensors(file: Path, tensors: Iterable, advance: Callable[[int], None]) -> None:
    """Streams a file, which `safetensors.torch.save_file` would want to have in memory at once.

    Its format: the length of the header (8 bytes, little-endian), the header (JSON), the tensors' bytes without gaps.

    Args:
        tensors: Objects with `name`, `shape`, `dtype` and `compute()`, which gives the tensor.
        advance: Called with the number of bytes written.
    """
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # each starts at a multiple of its item size
    header, offset = {"__metadata__": {"format": "pt"}}, 0
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
    with open(file, "wb", buffering=0) as stream:
        _write_all(stream, len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            # No name for it here, which would keep it in memory while the next one is computed
            advance(_write_all(stream, _as_bytes(tensor.compute())))


def _as_bytes(tensor: torch.Tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _write_all(stream, content) -> int:
    """Returns the number of bytes. One unbuffered write takes 2 GiB at most."""
    view = memoryview(content)
    while len(view):
        view = view[stream.write(view) :]
    return len(content)
