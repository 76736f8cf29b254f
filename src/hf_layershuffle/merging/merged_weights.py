# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The weight files of a merged model, written and checked in one go."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from huggingface_hub import StateDictSplit
from tqdm.auto import tqdm

from ..checkpoints.locations import INDEX_FILE
from ..checkpoints.tensor_files import StoredTensor, write_safetensors
from .merged_tensors import MergedTensor, refuse_nonfinite


def write_weights(tensors: Sequence[MergedTensor], shards: StateDictSplit, folder: Path, progress: bool) -> None:
    """Writes the weight files into a folder, and their index if there are several.

    What is copied is copied by the system, and checked in another thread meanwhile. What is computed is checked when
    it is computed.

    Raises:
        `ValueError`: if a tensor holds NaN or infinite values. What was written until then is of no use.
        `OSError`: if a file cannot be read or written.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)
    copied = [
        stored
        for names in shards.filename_to_tensors.values()
        for name in sorted(names)
        if (stored := by_name[name].copied)
    ]
    with (
        tqdm(total=total, desc="Writing", unit="B", unit_scale=True, disable=not progress) as bar,
        _checked_meanwhile(copied) as check,
    ):

        def advance(num_bytes: int) -> None:
            bar.update(num_bytes)
            if check.done():
                check.result()  # or its error

        for file, names in shards.filename_to_tensors.items():
            write_safetensors(folder / file, [by_name[name] for name in names], advance)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _checked_meanwhile(tensors: Iterable[StoredTensor]) -> Iterator[Future]:
    """Reads tensors in a thread of its own. At the end of the context all were read.

    Raises:
        `ValueError`, `OSError`: as in [`refuse_nonfinite`].
    """
    is_over = Event()

    def check() -> None:
        for stored in {(each.file, each.name): each for each in tensors}.values():
            if is_over.is_set():
                return
            refuse_nonfinite(stored)

    with ThreadPoolExecutor(1, "checks-tensors") as executor:
        future = executor.submit(check)
        try:
            yield future
            future.result()
        finally:
            is_over.set()
