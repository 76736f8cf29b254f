# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Workers in processes of their own, on this machine or several: actors of Ray."""

import asyncio
import dataclasses
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.locations import is_local
from ..common.checks import check_integers
from .answers import SwarmError
from .ray_cluster import DEFAULT_OBJECT_STORE_BYTES, RayCluster
from .ray_worker import Failure, RayWorker, pack, unpack
from .transport import LayerCall, LayerResult, WorkerFaultError, WorkerGoneError, WorkerInfo


_CALLS_AT_A_TIME = 4  # of a worker: a layer that runs must not keep it from answering a ping
_SMALL_BYTES = 64 * 1024  # of hidden states that go with the call, and not into shared memory
_SECONDS_FOR_A_CALL = 60.0  # that a worker has to end the one it is in, before it is ended all the same


@dataclass
class _Actor:
    node: str
    handle: Any = None
    info: WorkerInfo | None = None
    calls: set[asyncio.Future] = field(default_factory=set)


class RayTransport:
    """Workers as actors of Ray: each a process with one thread, or with a part of a GPU.

    Without an `address`, Ray is started for this process alone: it listens on the loopback interface only, asks for a
    token, and ends with `close`, or with this process.

    Args:
        checkpoint: Folder or Hub id of a classifier. A folder must be at the same path on all machines.
        address: `host:port` of a running Ray of which this machine is a node. See "More machines" in docs/swarm.md.
        device: Where layers are, such as "cuda". Ray then gives each worker a part of a GPU.
        gpus_per_worker: How much of a GPU a worker takes, by which Ray spreads them over GPUs. None for 0.1 with a
            device that is a GPU, and else for none.
        num_threads: Of torch in each worker.
        object_store_bytes: Of shared memory for hidden states on their way, at least 76 MiB.
        dtype, attn_implementation, revision, token: As for [`LayerWorker`].

    Raises:
        `ValueError`: if an argument is not valid.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        *,
        address: str | None = None,
        device: str | torch.device | None = None,
        gpus_per_worker: float | None = None,
        num_threads: int = 1,
        object_store_bytes: int = DEFAULT_OBJECT_STORE_BYTES,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ):
        check_integers(num_threads=(num_threads, 1), object_store_bytes=(object_store_bytes, 76 * 2**20))
        on_gpu = torch.device(device or "cpu").type not in ("cpu", "meta")
        self._num_gpus = (0.1 if on_gpu else 0.0) if gpus_per_worker is None else gpus_per_worker
        if isinstance(self._num_gpus, bool) or not isinstance(self._num_gpus, (int, float)) or self._num_gpus < 0:
            raise ValueError(f"`gpus_per_worker` is {gpus_per_worker!r}; it must be a number of at least 0.")
        path = os.fspath(checkpoint)
        self._checkpoint = str(Path(path).expanduser().resolve()) if is_local(path) else path
        self._num_threads = num_threads
        self._options: dict[str, Any] = {
            "device": None if device is None else str(device),
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "revision": revision,
            "token": token,
        }
        self._cluster = RayCluster(address, object_store_bytes)
        self._actors: dict[str, _Actor] = {}
        self._is_open = False

    async def open(self) -> None:
        """Starts or joins Ray.

        Raises:
            `SwarmError`: if it cannot; nothing is left running then.
            `ValueError`: if joining the address would not be safe.
        """
        try:
            await asyncio.to_thread(self._cluster.start)
        except asyncio.CancelledError:  # such as by Ctrl-C, while the thread goes on
            await asyncio.to_thread(self._cluster.stop)
            raise
        self._is_open = True

    async def start_worker(self, name: str, layers: Sequence[int]) -> WorkerInfo:
        """Starts a process with these layers.

        Raises:
            `ValueError`, `OSError`: if the checkpoint or a layer cannot be loaded there.
            `WorkerGoneError`: if the process dies before it is ready.
        """
        await self.stop_worker(name, force=True)
        self._check_open()
        nodes = await asyncio.to_thread(self._cluster.nodes, self._num_gpus)
        if not nodes:
            raise SwarmError(f"no machine of Ray has {self._num_gpus} of a GPU left; leave `device` out for the CPU")
        actor = _Actor(min(nodes, key=lambda node: sum(other.node == node for other in self._actors.values())))
        self._actors[name] = actor
        options = self._options | {"name": name}

        def submit() -> Any:
            actor.handle = self._new_handle(actor.node)
            return actor.handle.start.remote(self._checkpoint, list(layers), self._num_threads, options)

        try:
            return await self._told(name, actor, submit)
        except BaseException:
            if self._actors.get(name) is actor:
                del self._actors[name]
            await self._end(actor)
            raise

    def _new_handle(self, node: str) -> Any:
        ray = _running_ray()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        made = ray.remote(RayWorker)
        return made.options(
            num_cpus=0,  # as many as the swarm says
            num_gpus=self._num_gpus,
            max_restarts=0,  # the swarm restarts them; Ray would say so a second later
            max_task_retries=0,
            max_concurrency=_CALLS_AT_A_TIME,
            # Ray itself would put actors without CPUs on any machine, all on one at times
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        ).remote()

    async def load_layers(self, name: str, layers: Sequence[int]) -> WorkerInfo:
        actor = self._actor(name)
        return await self._told(name, actor, lambda: actor.handle.load_layers.remote(list(layers)))

    async def ping(self, name: str) -> WorkerInfo:
        actor = self._actor(name)
        return await self._told(name, actor, lambda: actor.handle.info.remote())

    async def call(self, name: str, call: LayerCall) -> LayerResult:
        actor = self._actor(name)

        def submit() -> Any:
            fields = {each.name: getattr(call, each.name) for each in dataclasses.fields(call)}
            return actor.handle.run.remote(pack(fields))

        if call.hidden_states.nbytes <= _SMALL_BYTES:
            return LayerResult(**unpack(await self._asked(name, actor, submit, at_once=True)))
        return LayerResult(**await asyncio.to_thread(unpack, await self._asked(name, actor, submit)))

    async def stop_worker(self, name: str, force: bool = False) -> None:
        actor = self._actors.pop(name, None)
        if actor is None:
            return
        if actor.calls and not force:
            await asyncio.wait(set(actor.calls), timeout=_SECONDS_FOR_A_CALL)
        await self._end(actor)

    async def close(self) -> None:
        self._is_open = False
        try:
            for name in list(self._actors):
                await self.stop_worker(name, force=True)
        finally:
            await asyncio.to_thread(self._cluster.stop)

    # --- Asking an actor ---

    def _check_open(self) -> None:
        if not self._is_open:
            raise SwarmError("the transport is not open")

    def _actor(self, name: str) -> _Actor:
        self._check_open()
        actor = self._actors.get(name)
        if actor is None or actor.handle is None:
            raise WorkerGoneError(f"there is no worker {name}")
        return actor

    async def _told(self, name: str, actor: _Actor, submit: Callable[[], Any]) -> WorkerInfo:
        """What an actor says of itself."""
        actor.info = await self._asked(name, actor, submit)
        return actor.info

    async def _asked(self, name: str, actor: _Actor, submit: Callable[[], Any], at_once: bool = False) -> Any:
        """What an actor gives back. Its arguments go into shared memory in a thread, since that may be full.

        Args:
            at_once: Whether they are small: the way to a thread and back would take longer than to send them.
        """
        ray = _running_ray()

        def submit_to_running() -> Any:
            _running_ray()
            return submit()

        try:
            reference = submit_to_running() if at_once else await asyncio.to_thread(submit_to_running)
            answer = asyncio.wrap_future(reference.future())
            actor.calls.add(answer)
            answer.add_done_callback(actor.calls.discard)
            given = await answer
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ray.exceptions.RayError):  # what it was given was lost with a machine
                raise WorkerGoneError(f"{name} lost what it was given: {_first_line(cause)}") from None
            raise WorkerFaultError(f"{name} failed: {type(cause).__name__}: {_first_line(cause)}") from None
        except ray.exceptions.RayError as error:
            raise WorkerGoneError(f"{name} died or cannot be reached ({type(error).__name__})") from None
        if isinstance(given, Failure):
            raise _ERRORS[given.kind](given.message)
        return given

    async def _end(self, actor: _Actor) -> None:
        """Ends the process of an actor, at once."""

        def end() -> None:
            if actor.handle is not None:
                with suppress(Exception):  # Ray is gone already
                    _running_ray().kill(actor.handle, no_restart=True)
            if actor.info is not None and actor.info.process_id and actor.node == self._cluster.this_node:
                _kill(actor.info.process_id)

        await asyncio.to_thread(end)


_ERRORS: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "OSError": OSError,
    "WorkerFaultError": WorkerFaultError,
}


def _running_ray() -> Any:
    """Ray, which would start itself, with other settings than ours, where a function is called after its end."""
    import ray

    if not ray.is_initialized():
        raise WorkerGoneError("Ray has ended")
    return ray


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _kill(process_id: int) -> None:
    """Ends an actor's process that Ray could not, as one that was stopped."""
    with suppress(OSError):
        if b"ray::" in Path(f"/proc/{process_id}/cmdline").read_bytes():  # and not another of the same number
            os.kill(process_id, signal.SIGKILL)
