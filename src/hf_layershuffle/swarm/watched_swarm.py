# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A swarm that is asked, and watched while it answers."""

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import torch

from .answers import SwarmAnswer, SwarmBusyError
from .demonstration import LabelledInput, LabelledLoad, PacedTransport
from .live_events import Event, LiveEvents, LiveNumbers, layers_without_worker


if TYPE_CHECKING:
    from .swarm import Swarm

HISTORY_SECONDS = 120
SHOWN_ANSWERS = 24


class WatchedSwarm:
    """Asks a swarm, and tells those who listen of each request: what it is, where it goes, what comes out.

    Args:
        swarm: It has been started.
        labels: Names of the model's classes.
        items: Labelled inputs to be sent while it is watched; none where it is not for show.
        rate: Of these, how many a second.
        paced: The swarm's transport, where workers can be slowed down.
    """

    def __init__(
        self,
        swarm: "Swarm",
        labels: Sequence[str],
        *,
        items: Sequence[LabelledInput] = (),
        rate: float = 4.0,
        paced: PacedTransport | None = None,
    ):
        self.swarm = swarm
        self.labels = list(labels)
        self.paced = paced
        self.events = LiveEvents()
        self.numbers = LiveNumbers()
        max_skips = swarm.status()["policy"]["max_skips"]
        self.load = LabelledLoad(items, self._send, rate=rate, max_skips=max_skips) if items else None
        self._shown: dict[str, Event] = {}  # requests under way, as the page shows them
        self._answers: deque[Event] = deque(maxlen=SHOWN_ANSWERS)
        self._history: deque[Event] = deque(maxlen=HISTORY_SECONDS)
        self._tasks: list[asyncio.Future] = []

    async def classify(
        self,
        inputs: Mapping[str, torch.Tensor],
        shown: Mapping[str, str],
        *,
        expected: str | None = None,
        deadline: float | None = None,
        max_skips: int | None = None,
    ) -> SwarmAnswer:
        """Asks the swarm, and tells of it.

        Args:
            inputs: By name, of a batch of one.
            shown: What the page shows of them, as of [`~request_inputs.thumbnail`] or [`~request_inputs.excerpt`].
            expected: Name of the true class, where it is known.
            deadline, max_skips: As for `Swarm.classify`.

        Raises:
            `SwarmError`, `ValueError`: as the swarm does.
        """
        request_id = uuid.uuid4().hex
        self._shown[request_id] = {"request": request_id, "expected": expected, **shown}
        # Not what the swarm says of it, which may come after the answer
        self.events.publish({"type": "accepted", **self._shown[request_id]})
        try:
            answer = await self.swarm.classify(inputs, deadline=deadline, max_skips=max_skips, request_id=request_id)
        except Exception as error:
            if not isinstance(error, ValueError):
                self.numbers.add_failure("refused" if isinstance(error, SwarmBusyError) else "failed")
            self._tell({"type": "unanswered", **self._shown[request_id], "reason": str(error)})
            raise
        finally:
            shown = self._shown.pop(request_id)
        scores = answer.logits[0].softmax(-1)
        label = self.labels[int(scores.argmax())]
        is_right = None if expected is None else label == expected
        self.numbers.add(answer.seconds, is_right)
        told = {"type": "classified", **shown, "label": label, "score": float(scores.max()), "is_right": is_right}
        self._tell(told | outcome_of(answer))
        return answer

    def _tell(self, event: Event) -> None:
        self._answers.append(event)
        self.events.publish(event)

    async def _send(self, item: LabelledInput, max_skips: int) -> None:
        try:
            await self.classify(item.inputs, item.shown, expected=item.label, max_skips=max_skips)
        except ValueError:  # `classify` counts it for nobody, since it is mostly the fault of who asks
            self.numbers.add_failure("refused")
        except (RuntimeError, OSError):  # of the swarm or its journal; it is counted and shown
            pass

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """A context in which events come, and the load is sent."""
        self._tasks = [asyncio.ensure_future(self._follow()), asyncio.ensure_future(self._count_seconds())]
        if self.load is not None:
            self._tasks.append(asyncio.ensure_future(self.load.run()))
        try:
            yield
        finally:
            self.end()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def end(self) -> None:
        """Ends what listeners hear, and the load."""
        self.events.close()
        for task in self._tasks:
            task.cancel()

    async def _follow(self) -> None:
        async for event in self.swarm.subscribe():
            if event["type"] != "accepted":
                self.events.publish(event)
            if event["type"] == "worker":
                self.events.publish({"type": "status", **self.now()})

    async def _count_seconds(self) -> None:
        while True:
            await asyncio.sleep(1)
            now = self.now()
            self._history.append(self.numbers.summary() | {"without_worker": now["without_worker"]})
            # Those under way, so that a page that lost events forgets the others
            self.events.publish({"type": "second", **now, **self._history[-1], "requests": list(self._shown)})

    def now(self) -> Event:
        """The swarm's status, the layers that no healthy worker holds, and how many times slower workers are."""
        status = self.swarm.status()
        factors = {} if self.paced is None else self.paced.factors
        return {"status": status, "without_worker": layers_without_worker(status), "factors": factors}

    def beginning(self) -> Event:
        """What a page that opens now has to know."""
        load = self.load
        return {
            "type": "beginning",
            "settings": None if load is None else {"rate": load.rate, "max_skips": load.max_skips},
            "layer_seconds": 0.0 if self.paced is None else self.paced.layer_seconds,
            "requests": list(self._shown.values()),
            "answers": list(self._answers),
            "history": list(self._history),
            **self.numbers.summary(),
            **self.now(),
        }


def outcome_of(answer: SwarmAnswer) -> dict[str, Any]:
    """What an answer says beside the classes."""
    return {
        "execution_order": answer.execution_order,
        "skipped": [{"layer": skip.layer, "reason": skip.reason} for skip in answer.skipped],
        "trace": [{"layer": hop.layer, "worker": hop.worker, "seconds": hop.seconds} for hop in answer.trace],
        "seconds": answer.seconds,
    }
