# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Requests at the door: checked, refused where too many wait, written down, and handed their answers."""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..common.checks import check_integers
from .answers import SwarmAnswer, SwarmBusyError, SwarmClosedError, SwarmError
from .events import Events
from .journal import Journal, Record
from .policy import Policy
from .router import Router


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(eq=False)
class _Entry:
    """A request from the door to the handing over of its answer.

    Args:
        inputs: As the model takes them, as soon as they were checked.
        is_kept: Whether it runs on if nobody waits for it, since it came from the journal.
        accepted: When it came, in seconds of `time.monotonic`.
    """

    record: Record
    inputs: "asyncio.Future[Mapping[str, Any]]"
    task: "asyncio.Task[SwarmAnswer]" = field(init=False)
    num_waiting: int = 0
    is_kept: bool = False
    accepted: float = field(default_factory=time.monotonic)


class Intake:
    """The bounded queue of a swarm.

    Args:
        model: A [`SplitModel`], or an object like one.
        max_queue: Most requests that may be accepted and unanswered.
    """

    def __init__(self, model: Any, router: Router, policy: Policy, events: Events, max_queue: int):
        self.model = model
        self.router = router
        self.policy = policy
        self.events = events
        self.max_queue = max_queue
        self.journal: Journal | None = None
        self._entries: dict[str, _Entry] = {}
        self._is_closed = False
        self._is_ended = False

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def num_unanswered(self) -> int:
        return sum(not entry.task.done() for entry in self._entries.values())

    async def classify(
        self, inputs: Any, deadline: float | None, max_skips: int | None, request_id: str | None
    ) -> SwarmAnswer:
        """Runs a request. If this is cancelled and nobody else waits for its answer, so is the request.

        Raises:
            `ValueError`: if the inputs or options cannot be.
            `OSError`: if it cannot be written into the journal.
            `SwarmBusyError`: if the queue is full.
            `SwarmClosedError`: if no more requests are taken.
            `SwarmError`: if it gets no answer.
        """
        try:
            self._check_options(deadline, max_skips, request_id)
            name = uuid.uuid4().hex if request_id is None else request_id
            entry = self._entries.get(name)
            if entry is None:
                self._check_room()
                entry = self._enter(Record(name, inputs, deadline, max_skips))
            else:
                async with self._waiting(entry):
                    await self._check_same(entry, inputs)
        except (ValueError, SwarmBusyError, SwarmClosedError) as error:
            self._refuse(error)
            raise
        return await self._outcome_of(entry)

    def _refuse(self, error: Exception) -> None:
        self.events.emit("refused", kind=type(error).__name__, reason=str(error))

    def _check_options(self, deadline: float | None, max_skips: int | None, request_id: str | None) -> None:
        Policy(deadline=deadline)  # refuses what is no number of seconds
        if max_skips is not None:
            check_max_skips(max_skips, self.model.layers)
        if request_id is not None and not (isinstance(request_id, str) and _NAME.fullmatch(request_id)):
            raise ValueError(
                f"`request_id` is {request_id!r}; it must be a text of at most 128 letters, digits, '.', '_' and '-' "
                "that begins with a letter or digit."
            )

    def _check_room(self) -> None:
        if self._is_closed:
            raise SwarmClosedError("The swarm takes no more requests: it drains, or is closed.")
        waiting = self.num_unanswered
        if waiting >= self.max_queue:
            raise SwarmBusyError(
                f"{waiting} requests have no answer yet, and `max_queue` is {self.max_queue}; send it again later."
            )

    async def _check_same(self, entry: _Entry, inputs: Any) -> None:
        """Refuses a second request of the same name with other inputs."""
        named = await self.router.in_thread(self.model.check_inputs, inputs)
        known = await asyncio.shield(entry.inputs)
        if named.keys() != known.keys() or not all(_are_equal(named[key], known[key]) for key in named):
            raise ValueError(
                f"`request_id` is {entry.record.name!r}, which a request with other inputs has; give each a name of "
                "its own."
            )

    def _enter(self, record: Record, is_written: bool = False) -> _Entry:
        entry = _Entry(record, asyncio.get_running_loop().create_future(), is_kept=is_written)
        entry.task = asyncio.create_task(self._run(entry, is_written))
        entry.task.add_done_callback(lambda task: _note_end(task, entry))
        self._entries[record.name] = entry
        return entry

    async def _run(self, entry: _Entry, is_written: bool) -> SwarmAnswer:
        name = entry.record.name
        try:
            answer = await self._run_accepted(entry, await self._accept(entry, is_written))
        except asyncio.CancelledError:
            if not self._is_ended:
                self.events.emit("failed", request=name, kind="Cancelled", reason="its caller left")
                raise
            self.events.emit("failed", request=name, kind="SwarmClosedError", reason="the swarm was closed")
            kept = "" if self.journal is None else " If it was accepted, a swarm that opens the journal again runs it."
            raise SwarmClosedError(f"The swarm was closed before '{name}' was answered.{kept}") from None
        self.events.emit("answered", request=name, seconds=answer.seconds, order=answer.execution_order)
        return answer

    async def _accept(self, entry: _Entry, is_written: bool) -> Any:
        """Checks, embeds and writes down a request; its part of the model."""
        record = entry.record
        try:
            named = await self.router.in_thread(self.model.check_inputs, record.inputs)
            split = await self.router.embed(named)
            entry.inputs.set_result(named)
            if self.journal is not None and not is_written:
                await self.journal.write(Record(record.name, named, record.deadline, record.max_skips))
        except (ValueError, OSError) as error:
            self._refuse(error)
            raise
        self.events.emit("accepted", request=record.name)
        return split

    async def _run_accepted(self, entry: _Entry, split: Any) -> SwarmAnswer:
        record = entry.record
        try:
            return await self.router.answer(record.name, split, entry.accepted, record.deadline, record.max_skips)
        except Exception as error:
            self.events.emit("failed", request=record.name, kind=type(error).__name__, reason=str(error))
            raise

    async def _outcome_of(self, entry: _Entry) -> SwarmAnswer:
        async with self._waiting(entry):
            await asyncio.wait([entry.task])
        await self._hand_over(entry)
        return entry.task.result()

    @asynccontextmanager
    async def _waiting(self, entry: _Entry) -> AsyncIterator[None]:
        """Gives a request up whose last caller leaves before its end."""
        entry.num_waiting += 1
        try:
            yield
        except BaseException:
            if entry.num_waiting == 1 and not entry.is_kept and not self._is_ended:
                entry.task.cancel()
                await self._hand_over(entry)
            raise
        finally:
            entry.num_waiting -= 1

    async def _hand_over(self, entry: _Entry) -> None:
        """Forgets a request whose outcome is known to who asked."""
        if self._entries.get(entry.record.name) is entry:
            del self._entries[entry.record.name]
            if self.journal is not None and not _was_closed(entry.task):
                await self.journal.remove(entry.record.name)

    async def answer(self, request_id: str) -> SwarmAnswer:
        """The answer to a request that is under way, or was read from the journal.

        Raises:
            `ValueError`: if there is no such request.
            `SwarmError`: if it gets no answer.
        """
        if request_id not in self._entries:
            raise ValueError(
                f"There is no request {request_id!r} whose answer was not handed over; there are "
                f"{', '.join(self.names[:10]) or 'none'}."
            )
        return await self._outcome_of(self._entries[request_id])

    @property
    def names(self) -> list[str]:
        """Requests whose answers were not handed over yet."""
        return sorted(self._entries)

    def run_again(self, records: list[Record]) -> None:
        """Runs requests of the journal."""
        for record in records:
            self._enter(record, is_written=True)

    async def drain(self) -> None:
        """Takes no more requests, and waits until all have their answers."""
        self._is_closed = True
        while tasks := [entry.task for entry in self._entries.values() if not entry.task.done()]:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """Ends all requests."""
        self._is_closed = self._is_ended = True
        tasks = [entry.task for entry in self._entries.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def check_max_skips(max_skips: int, layers: list[int]) -> None:
    """Refuses a number of skips after which no layer would be left.

    Raises:
        `ValueError`: if it is none from 0 to the number of layers less one.
    """
    check_integers(max_skips=(max_skips, 0))
    if max_skips >= len(layers):
        raise ValueError(
            f"`max_skips` is {max_skips}, but only {len(layers)} layers run; an answer needs one of them, so it must "
            f"be at most {len(layers) - 1}."
        )


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def _note_end(task: asyncio.Task, entry: _Entry) -> None:
    error = None if task.cancelled() else task.exception()  # asked for, so that asyncio does not log it
    if not entry.inputs.done():  # those who joined it learn why it was refused
        entry.inputs.set_exception(error or SwarmError(f"The first request '{entry.record.name}' was cancelled."))
        entry.inputs.exception()


def _was_closed(task: asyncio.Task) -> bool:
    """Whether a request ended with the swarm, and not by itself."""
    return task.done() and not task.cancelled() and isinstance(task.exception(), SwarmClosedError)
