# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A classifier whose layers stand on workers that are slow, fail and come back."""

import asyncio
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ..common.checks import check_integers
from .answers import SwarmAnswer, SwarmClosedError, SwarmError
from .blocking import BlockingSwarm
from .events import Events
from .fitness import warn_if_skips_cover_no_worker, warn_if_unfit
from .intake import Intake, check_max_skips
from .journal import Journal
from .life import Life
from .membership import Membership
from .metrics import Metrics
from .observation import Observable
from .placement import Placement, check_plan, place_evenly
from .policy import Policy
from .router import Router
from .split_model import SplitModel
from .transport import Transport
from .transports import model_options, transport_of


class Swarm(Observable):
    """Answers requests by a model whose layers stand on workers.

    A request visits whichever worker is free and holds a layer that it lacks. It loses nothing when a worker dies. A
    swarm is made by [`Swarm.from_pretrained`] and started by `async with`. At its end accepted requests are answered
    first; after an exception or Ctrl-C all ends at once.

    ```python
    >>> import hf_layershuffle as ls
    >>> async with ls.Swarm.from_pretrained(ls.example_model(), workers=3) as swarm:
    ...     answer = await swarm.classify(pixel_values)
    >>> answer.logits, answer.execution_order, answer.skipped, answer.trace
    ```

    Args:
        model: The router's part of the model, a [`SplitModel`].
        life: As for [`Life`].
    """

    def __init__(
        self,
        model: Any,
        transport: Transport,
        placement: Placement,
        policy: Policy,
        *,
        name: str = "",
        max_queue: int = 256,
        journal: str | os.PathLike | None = None,
        **life: Any,
    ):
        check_integers(max_queue=(max_queue, 1))
        check_max_skips(policy.max_skips, model.layers)
        self.model = model
        self.policy = policy
        self.name = name
        self.placement = placement
        self.events = Events()
        self._transport = transport
        self._router = Router(model, transport, policy, self.events)
        self._life = Life(self._router, transport, self.events, **life)
        self._members = Membership(self._life, model.layers, policy.call_timeout + self._life.suspect_timeout)
        self._intake = Intake(model, self._router, policy, self.events, max_queue)
        self._journal = None if journal is None else Journal(journal, model.digests)
        self._metrics = Metrics(self._gauges)
        self.events.sinks.append(self._metrics.record)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_up = self._is_over = False

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike,
        *,
        workers: int = 4,
        replicas: int = 1,
        placement: Mapping[str, Collection[int]] | Sequence[Collection[int]] | None = None,
        transport: str | Transport = "ray",
        policy: str = "free",
        max_skips: int = 0,
        skip_after: float | None = None,
        deadline: float | None = None,
        call_timeout: float = 30.0,
        hedge: float | None = None,
        max_attempts: int = 3,
        max_wait: float = 30.0,
        max_queue: int = 256,
        restart: bool = True,
        health_interval: float = 1.0,
        suspect_timeout: float = 10.0,
        start_timeout: float = 300.0,
        journal: str | os.PathLike | None = None,
        address: str | None = None,
        **kwargs: Any,
    ) -> "Swarm":
        """Loads the router's part of a model. Workers start with `async with`.

        Args:
            model: Folder or Hub id of a classifier, plain or LayerShuffle.
            workers: Number of workers, at least 1.
            replicas: Number of workers that hold each layer, from 1 to `workers`.
            placement: Layers of each worker, by its name or as a list. It takes the place of `workers` and `replicas`.
            transport: `"ray"`: workers are actors of Ray (extra `swarm`). `"local"`: they are threads of this process.
                Or a [`Transport`].
            policy: `"free"`: the next free worker among the layers still missing. `"strict"`: one layer after the
                other.
            max_skips: Most layers that may be missing in an answer, whatever the cause.
            skip_after: Seconds that a request waits for busy workers before it skips what it lacks, if `max_skips`
                allows; None to wait as long as they are there.
            deadline: Seconds from acceptance to the answer, which is then given without the layers still missing. With
                more than `max_skips` of them, the request fails. None for no deadline.
            call_timeout: Seconds that a worker has for one layer, before it is suspected and another one asked.
            hedge: Seconds after which a replica, if one is free, is asked for the same layer. None to ask none.
            max_attempts: Times that a layer is tried for one request; also workers that may fail in one request before
                it is given up.
            max_wait: Seconds that a request waits for a layer that no worker holds and it may not skip, such as for a
                restart, before it fails.
            max_queue: Most requests that may be accepted and unanswered. Further ones are refused.
            restart: Whether workers that died are started again, and the layers of those that do not start given to
                others.
            health_interval: Seconds between two pings of an idle worker.
            suspect_timeout: Seconds that a worker has to answer, once it missed a ping or a call's timeout, before it
                is ended.
            start_timeout: Seconds that a worker has to load its layers.
            journal: Folder in which accepted requests are kept until their answers are handed over, so that none is
                lost with this process. A new swarm with the same folder runs those that are left; `answer` gives their
                answers.
            address: Of a running Ray cluster, for `transport="ray"`; None to start one on this machine.
            kwargs: For the model and for each worker: `device`, `dtype`, `attn_implementation`, `revision` and
                `token`, as for `from_pretrained` of transformers.

        Raises:
            `ValueError`: if an argument cannot be, or the model is no classifier or cannot be taken apart.
            `OSError`: if there is no such model, or it cannot be read.
            `SwarmError`: if Ray is not installed.
        """
        rules = Policy(policy, max_skips, skip_after, deadline, call_timeout, hedge, max_attempts, max_wait)
        check_integers(workers=(workers, 1), replicas=(replicas, 1))
        split = SplitModel.from_pretrained(model, **model_options(kwargs))
        if placement is None:
            held = place_evenly(split.layers, workers, replicas)
        else:
            held = check_plan(placement, split.layers)
        swarm = cls(
            split,
            transport_of(transport, model, address, kwargs),
            held,
            rules,
            name=os.fspath(model),
            max_queue=max_queue,
            restart=restart,
            health_interval=health_interval,
            suspect_timeout=suspect_timeout,
            start_timeout=start_timeout,
            journal=journal,
        )
        warn_if_unfit(split.config, model, rules)
        warn_if_skips_cover_no_worker(held, rules)
        return swarm

    async def __aenter__(self) -> "Swarm":
        if self._loop is not None:
            raise SwarmError("A swarm is started once; make another one with `Swarm.from_pretrained`.")
        self._loop = asyncio.get_running_loop()
        try:
            self._router.start()
            records = [] if self._journal is None else await self._journal.open()
            await self._transport.open()
            await self._life.start(self.placement)
            self._intake.journal = self._journal
            self._intake.run_again(records)
            self._is_up = True
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None:
                await self.drain()
        finally:
            await self._end()

    async def _end(self) -> None:
        """Ends all that was started, also if this is cancelled meanwhile, as by Ctrl-C."""
        was_cancelled = False
        while True:
            ending = asyncio.ensure_future(self._close())
            while not ending.done():
                try:
                    await asyncio.wait([ending])
                except asyncio.CancelledError:
                    was_cancelled = True
            if not ending.cancelled():
                break
            was_cancelled = True  # `asyncio.run` cancels every task, this one too
        ending.result()
        if was_cancelled:
            raise asyncio.CancelledError

    async def _close(self) -> None:
        self._is_over = True
        try:
            await self._intake.close()
            await self._life.close()
            await self._router.close()
        finally:
            try:
                await self._transport.close()
            finally:
                if self._journal is not None:
                    await self._journal.close()
                self.events.close()

    # Requests

    async def classify(
        self,
        inputs: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        *,
        deadline: float | None = None,
        max_skips: int | None = None,
        request_id: str | None = None,
        **named_inputs: Any,
    ) -> SwarmAnswer:
        """Answers one request: a batch of examples that travel together.

        If this is cancelled, as by `asyncio.wait_for`, the request is given up.

        Args:
            inputs: The model's main input, such as images of shape `(batch_size, num_channels, height, width)`, or all
                inputs by name.
            deadline: Seconds from this call to the answer; None for that of the swarm.
            max_skips: Most layers that may be missing; None for that of the swarm.
            request_id: Name of the request. One whose answer was not handed over yet is joined, and not run twice.
            named_inputs: Inputs by name, such as `input_ids` and `attention_mask`.

        Raises:
            `ValueError`: if the model does not take these inputs, or an option cannot be.
            `SwarmBusyError`: if `max_queue` requests wait already.
            `SwarmClosedError`: if the swarm drains or is closed.
            `OSError`: if the request cannot be written into the journal.
            `MissingLayersError`, `DeadlineError`: if too many layers could not run.
            `SwarmError`: if the request ends its workers.
        """
        self._check_open()
        if inputs is None:
            inputs = named_inputs
        elif named_inputs:
            raise ValueError(f"{', '.join(named_inputs)} came beside `inputs`; pass all inputs by name.")
        elif not isinstance(inputs, (torch.Tensor, Mapping)):
            raise ValueError(f"`inputs` is of type {type(inputs).__name__}; it must be a tensor, or tensors by name.")
        return await self._intake.classify(inputs, deadline, max_skips, request_id)

    async def answer(self, request_id: str) -> SwarmAnswer:
        """The answer to a request that is under way, such as one of the journal. It is handed over once.

        Raises:
            `ValueError`: if there is no such request.
            `SwarmError`: if the request gets no answer.
        """
        self._check_open()
        return await self._intake.answer(request_id)

    @property
    def request_ids(self) -> list[str]:
        """Requests whose answers were not handed over yet, such as those of the journal."""
        return self._intake.names

    async def drain(self) -> None:
        """Takes no more requests, and waits until all accepted ones have their answers."""
        self._check_open()
        await self._intake.drain()

    async def restart_router(self) -> None:
        """Forgets who is where, and begins anew with the same workers. Requests go on from their hidden states."""
        self._check_open()
        self._router.restart()

    # Workers

    async def add_worker(self, layers: Collection[int] | None = None) -> str:
        """Starts a further worker, and returns its name when it is ready.

        Args:
            layers: Those that it holds; None for those that need it most.

        Raises:
            `ValueError`: if a layer is none of the model's.
            `SwarmError`: if it does not start, or holds another checkpoint than the router.
        """
        self._check_open()
        return await self._members.add(layers)

    async def remove_worker(
        self, name: str, drain: bool = True, *, force: bool = False, rebalance: bool = False
    ) -> None:
        """Ends a worker for good.

        Args:
            drain: Whether it finishes its call first.
            force: Whether it goes even if it alone holds a layer.
            rebalance: Whether others load such layers before it goes.

        Raises:
            `ValueError`: if there is no such worker.
            `SwarmError`: if it alone holds a layer.
        """
        self._check_open()
        await self._members.remove(name, drain, force, rebalance)

    async def kill_worker(self, name: str) -> None:
        """Ends a worker's process as `kill -9` does, for trials.

        Raises:
            `ValueError`: if there is no such worker.
        """
        self._check_open()
        await self._members.kill(name)

    async def rebalance(self) -> None:
        """Lets workers load the layers that nobody holds, and evens out how many each holds.

        Raises:
            `SwarmError`: if no worker is there, or one could not load its layers.
        """
        self._check_open()
        await self._members.rebalance()

    def blocking(self) -> BlockingSwarm:
        """This swarm for programs without an event loop, to be started by `with`."""
        return BlockingSwarm(self)

    def _check_open(self) -> None:
        if not self._is_up:
            raise SwarmError("The swarm was not started; use it in `async with`, or `with swarm.blocking()`.")
        if self._is_over:
            raise SwarmClosedError("The swarm is closed.")
        if asyncio.get_running_loop() is not self._loop:
            raise SwarmError("The swarm runs in another event loop; use it there, or `swarm.blocking()`.")
