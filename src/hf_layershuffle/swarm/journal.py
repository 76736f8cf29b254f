# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Accepted requests on disk, so that none is lost with the router's process."""

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..common.checks import check_integers
from ..common.claims import claimed_folder
from ..common.files import replaced_file
from .policy import Policy


Result = TypeVar("Result")
logger = logging.getLogger(__name__)
SUFFIX, DAMAGED = ".request.safetensors", ".damaged"


@dataclass(frozen=True)
class Record:
    """What is known of a request at the door."""

    name: str
    inputs: Any
    deadline: float | None = None
    max_skips: int | None = None


class Journal:
    """A folder with a file for each request that was accepted and whose answer was not handed over.

    A file is there whole or not at all, and can be read by its owner only. One process at a time has the journal.

    Args:
        folder: Is made if it is missing.
        digests: Of the model's parts: the requests are for this model.
    """

    def __init__(self, folder: str | os.PathLike, digests: Mapping[int | str, str]):
        if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
            raise ValueError(f"`journal` is {folder!r}; it must be the path of a folder.")
        self.folder = Path(folder).expanduser()
        said = json.dumps(sorted((str(name), digest) for name, digest in digests.items()))
        self.model = hashlib.sha256(said.encode()).hexdigest()[:16]
        self._executor: ThreadPoolExecutor | None = None
        self._claim = ExitStack()

    async def open(self) -> list[Record]:
        """Takes the journal for this process, and returns the requests in it, the oldest first.

        A file that is damaged gets another name, and a warning says so.

        Raises:
            `ValueError`: if another process has the journal, or its requests are for another model.
            `OSError`: if the folder cannot be written into.
        """
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="hf-layershuffle-journal")
        try:
            return await self._in_thread(self._open)
        except BaseException:
            await self.close()
            raise

    def _open(self) -> list[Record]:
        is_new = not self.folder.exists()
        self._claim.enter_context(claimed_folder(self.folder, "choose another folder for `journal`"))
        if is_new:
            self.folder.chmod(0o700)
        records = []
        for path in sorted(self.folder.glob(f"*{SUFFIX}"), key=lambda path: path.lstat().st_mtime_ns):
            try:
                model, record = _read(path)
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                path.rename(path.with_name(path.name + DAMAGED))
                logger.warning("'%s' is damaged and was set aside as '%s%s': %r", path, path.name, DAMAGED, error)
                continue
            if model != self.model:
                raise ValueError(
                    f"The journal '{self.folder}' holds requests for another model, or of another version of this "
                    f"package ('{path.name}'); choose another folder for `journal`, answer them by what wrote them, "
                    "or remove its files."
                )
            records.append(record)
        return records

    async def write(self, record: Record) -> None:
        """Writes a request down. When this comes back, it outlives this process.

        Raises:
            `OSError`: if it cannot be written.
        """
        await self._in_thread(self._write, record)

    def _write(self, record: Record) -> None:
        tensors = {name: value for name, value in record.inputs.items() if isinstance(value, torch.Tensor)}
        flags = {name: value for name, value in record.inputs.items() if name not in tensors}
        said = {"model": self.model, "deadline": record.deadline, "max_skips": record.max_skips, "flags": flags}
        with replaced_file(self._path(record.name)) as path:
            # Copies, since tensors that share memory are refused
            copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
            try:
                save_file(copies, path, metadata={"request": json.dumps(said)})
            except SafetensorError as error:  # such as of a full disk
                raise OSError(f"'{self._path(record.name)}' cannot be written: {error}") from error
            path.chmod(0o600)
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    async def remove(self, name: str) -> None:
        """Removes a request whose answer is handed over. If that fails, a warning says so: the answer counts more."""
        try:
            await self._in_thread(lambda: self._path(name).unlink(missing_ok=True))
        except OSError as error:
            logger.warning("'%s' stays in the journal, and will be run again: %s", name, error)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    async def _in_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    async def close(self) -> None:
        """Gives the journal back. Its files stay."""
        if self._executor is not None:
            await self._in_thread(self._claim.close)
            self._executor.shutdown()
            self._executor = None


def _read(path: Path) -> tuple[str, Record]:
    """A file of a journal: the digest of the model, and the request."""
    with safe_open(path, framework="pt") as file:
        said = json.loads((file.metadata() or {})["request"])
        inputs: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}
    Policy(deadline=said["deadline"])
    check_integers(max_skips=(said["max_skips"] or 0, 0))
    name = path.name.removesuffix(SUFFIX)
    return said["model"], Record(name, inputs | dict(said["flags"]), said["deadline"], said["max_skips"])
