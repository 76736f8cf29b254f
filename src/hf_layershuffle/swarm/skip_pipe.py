# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""SkipPipe's way to choose paths (arXiv 2502.19913), to compare the [`Scheduler`] with.

SkipPipe sends each microbatch on a path over the stages of a pipeline that is planned before it starts: a share of the
stages is skipped, neighbouring stages may be swapped a bounded number of times, the first stage always runs, and no
two microbatches meet on a node. Written from the paper's description alone. Requests differ from the microbatches of a
training step in that they come one after the other. So each path is planned when its request comes, around the paths
that are there; the paper resolves the conflicts of all microbatches at once. The paper says nothing of nodes that fail
under way: here a request whose path leads over such a node is planned anew from where it is. A stage is a layer.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from ..common.checks import check_integers
from .planned_paths import Bookings, Step, earliest_path
from .policy import Policy
from .scheduling import Decision, Failed, Finished, Start, TimedOut, Visit


def skips_of(num_layers: int, skip_ratio: float) -> int:
    """How many layers a share of them is, rounded down.

    Raises:
        `ValueError`: if the share is not in [0, 1).
    """
    if not 0 <= skip_ratio < 1:
        raise ValueError(f"`skip_ratio` is {skip_ratio}; it must be a fraction from 0 to below 1.")
    return int(skip_ratio * num_layers + 1e-9)


MOST_HOLDERS = 8  # of a layer that a plan looks at; others in turn for the next plan


@dataclass(eq=False)
class _Microbatch:
    request: Hashable
    accepted: float
    pending: list[int]  # neither begun nor passed by, in sequential order
    swaps_left: int
    path: list[Step] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    visits: list[tuple[Visit, float]] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)
    visit: Visit | None = None
    parked_since: float | None = None  # as long as no path leads on


@dataclass
class _Worker:
    layers: frozenset[int]
    bookings: Bookings = field(default_factory=Bookings)
    waiting: dict[Hashable, _Microbatch] = field(default_factory=dict)
    visit: Visit | None = None  # what it is at, also if that no longer counts
    is_suspected: bool = False


class PathScheduler:
    """Decides as SkipPipe does. It has those methods of a [`Scheduler`] that a simulation uses.

    Args:
        layers: Those of the model, in sequential order.
        seconds: Expected seconds of a visit, by worker. SkipPipe knows how fast its nodes are.
        skip_ratio: Fraction in [0, 1) of the layers that a path may leave out, rounded down to whole layers.
        max_swaps: Most neighbours that a path swaps.
        policy: Its `deadline`, `call_timeout` and `max_wait` are kept to; its other rules are not SkipPipe's.

    Raises:
        `ValueError`: if the skip ratio or the number of swaps is not in its range.
    """

    def __init__(
        self,
        layers: Sequence[int],
        seconds: Mapping[str, float],
        skip_ratio: float = 0.25,
        max_swaps: int = 2,
        policy: Policy | None = None,
    ):
        check_integers(max_swaps=(max_swaps, 0))
        self.layers = list(layers)
        self.max_skips = skips_of(len(self.layers), skip_ratio)
        self.max_swaps = max_swaps
        self.policy = policy or Policy()
        self._seconds = seconds
        self._workers: dict[str, _Worker] = {}
        self._holders: dict[int, list[str]] = {layer: [] for layer in self.layers}
        self._microbatches: dict[Hashable, _Microbatch] = {}  # the oldest first
        self._running: dict[int, Visit] = {}  # those that count, the oldest first
        self._parked: dict[Hashable, _Microbatch] = {}
        self._to_plan: dict[Hashable, _Microbatch] = {}
        self._ended: list[Decision] = []
        self._ready: set[str] = set()  # workers that may be free while something waits for them
        self._num_visits = self._num_plans = 0

    # What happens

    def add_worker(self, worker: str, layers: Collection[int]) -> None:
        self._workers[worker] = _Worker(frozenset(layers))
        for layer in self._workers[worker].layers:
            self._holders[layer].append(worker)
        self._plan_parked()

    def remove_worker(self, worker: str, reason: str) -> list[Visit]:
        gone = self._workers.pop(worker)
        for layer in gone.layers:
            self._holders[layer].remove(worker)
        lost = [] if gone.visit is None or gone.visit.number not in self._running else [gone.visit]
        for visit in lost:
            del self._running[visit.number]
            self._take_back(visit)
        self._plan_around(worker)
        return lost

    def accept(self, request: Hashable, now: float) -> None:
        microbatch = _Microbatch(request, now, list(self.layers), self.max_swaps)
        self._microbatches[request] = self._to_plan[request] = microbatch

    def arrived(self, visit: Visit, now: float) -> bool:
        worker = self._workers.get(visit.worker)
        if worker is not None and worker.visit is visit:
            worker.visit = None
            worker.bookings.forget(now)
            self._ready.add(visit.worker)
            if worker.is_suspected:
                worker.is_suspected = False
                self._plan_parked()
        if self._running.pop(visit.number, None) is None:
            return False
        microbatch = self._microbatches[visit.request]
        microbatch.visit = None
        microbatch.order.append(visit.layer)
        microbatch.visits.append((visit, now - visit.started))
        if microbatch.path:
            self._wait(microbatch)
        elif len(microbatch.pending) > self.max_skips - len(microbatch.skipped):
            self._to_plan[microbatch.request] = microbatch  # a worker of its path went while it ran
        else:
            self._finish(microbatch)
        return True

    def next_check(self) -> float | None:
        moments = [self._patience_ends(each) for each in self._parked.values()]
        if self._running:
            moments.append(next(iter(self._running.values())).started + self.policy.call_timeout)
        if self.policy.deadline is not None and self._microbatches:
            moments.append(next(iter(self._microbatches.values())).accepted + self.policy.deadline)
        return min(moments, default=None)

    def decide(self, now: float) -> list[Decision]:
        decisions = self._time_out(now)
        to_plan, self._to_plan = self._to_plan, {}
        for microbatch in to_plan.values():
            self._plan(microbatch, now)
        self._give_up(now)
        decisions += self._ended
        self._ended = []
        return decisions + self._start_visits(now)

    # Plans

    def _plan(self, microbatch: _Microbatch, now: float) -> None:
        self._num_plans += 1
        skips = self.max_skips - len(microbatch.skipped)
        free_from: dict[str, float] = {}

        def earliest_step(layer: int, moment: float) -> Step | None:
            steps = (self._step_on(name, layer, moment, now, free_from) for name in self._candidates(layer))
            return min(steps, key=lambda step: step.end, default=None)

        path = earliest_path(microbatch.pending, now, earliest_step, skips, microbatch.swaps_left, self.layers[0])
        if path is None:
            self._parked[microbatch.request] = microbatch
            microbatch.parked_since = now if microbatch.parked_since is None else microbatch.parked_since
            return
        microbatch.parked_since = None
        microbatch.path = path
        for step in path:
            self._workers[step.worker].bookings.book(step)
        if path:
            self._wait(microbatch)
        else:
            self._finish(microbatch)

    def _candidates(self, layer: int) -> list[str]:
        names = [name for name in self._holders[layer] if not self._workers[name].is_suspected]
        if len(names) <= MOST_HOLDERS:
            return names
        start = (self._num_plans * MOST_HOLDERS) % len(names)
        return (names + names)[start : start + MOST_HOLDERS]

    def _step_on(self, name: str, layer: int, moment: float, now: float, free_from: dict[str, float]) -> Step:
        worker, seconds = self._workers[name], self._seconds[name]
        if name not in free_from:
            # Those that should have run by now stand before a new one, although their bookings lie in the past
            late = sum(each.path[0].end <= now for each in worker.waiting.values())
            free_from[name] = now + seconds * late
        start = worker.bookings.first_gap(max(moment, free_from[name]), seconds)
        return Step(layer, name, start, start + seconds)

    def _plan_around(self, worker: str) -> None:
        """Plans anew what leads over a worker that is gone: at once, or, of a request that runs, when it has run."""
        for microbatch in self._microbatches.values():
            if any(step.worker == worker for step in microbatch.path):
                self._drop_path(microbatch)
                if microbatch.visit is None:
                    self._to_plan[microbatch.request] = microbatch

    def _drop_path(self, microbatch: _Microbatch) -> None:
        for step in microbatch.path:
            if step.worker in self._workers:
                self._workers[step.worker].bookings.release(step)
                self._workers[step.worker].waiting.pop(microbatch.request, None)
        microbatch.path = []

    def _plan_parked(self) -> None:
        self._to_plan |= self._parked
        self._parked = {}

    # Requests

    def _wait(self, microbatch: _Microbatch) -> None:
        name = microbatch.path[0].worker
        self._workers[name].waiting[microbatch.request] = microbatch
        self._ready.add(name)

    def _take_back(self, visit: Visit) -> None:
        """A visit that came to nothing: its layer is planned again with those that follow."""
        microbatch = self._microbatches[visit.request]
        self._drop_path(microbatch)
        microbatch.visit = None
        microbatch.pending = sorted({*microbatch.pending, visit.layer}, key=self.layers.index)
        self._to_plan[visit.request] = microbatch

    def _finish(self, microbatch: _Microbatch) -> None:
        self._pass_by(microbatch, microbatch.pending)
        self._forget(microbatch)
        self._ended.append(Finished(microbatch.request, microbatch.order, microbatch.visits, microbatch.skipped))

    def _forget(self, microbatch: _Microbatch) -> None:
        self._drop_path(microbatch)
        for requests in (self._microbatches, self._parked, self._to_plan):
            requests.pop(microbatch.request, None)
        if microbatch.visit is not None:
            self._running.pop(microbatch.visit.number, None)

    def _pass_by(self, microbatch: _Microbatch, layers: Sequence[int]) -> None:
        microbatch.skipped |= dict.fromkeys(layers, "not on the path")
        microbatch.pending = [layer for layer in microbatch.pending if layer not in microbatch.skipped]

    def _give_up(self, now: float) -> None:
        limit = self.policy.deadline
        late = []
        for microbatch in self._microbatches.values() if limit is not None else ():
            if now < microbatch.accepted + limit:  # type: ignore[operator]
                break
            late.append(microbatch)
        waited = [each for each in self._parked.values() if now >= self._patience_ends(each)]
        for microbatch in dict.fromkeys((*late, *waited)):
            running = [microbatch.visit.layer] if microbatch.visit is not None else []
            missing = dict.fromkeys((*running, *microbatch.pending), "no answer in time") | microbatch.skipped
            self._forget(microbatch)
            if microbatch.order and len(missing) <= self.max_skips:
                self._ended.append(Finished(microbatch.request, microbatch.order, microbatch.visits, missing))
            else:
                self._ended.append(Failed(microbatch.request, missing, microbatch in late))

    def _patience_ends(self, microbatch: _Microbatch) -> float:
        return (microbatch.parked_since or 0.0) + self.policy.max_wait

    # Visits

    def _time_out(self, now: float) -> list[Decision]:
        decisions: list[Decision] = []
        for visit in list(self._running.values()):
            if now < visit.started + self.policy.call_timeout:
                break
            del self._running[visit.number]
            self._workers[visit.worker].is_suspected = True
            self._take_back(visit)
            self._plan_around(visit.worker)
            decisions.append(TimedOut(visit))
        return decisions

    def _start_visits(self, now: float) -> list[Decision]:
        decisions: list[Decision] = []
        for name in sorted(self._ready):
            worker = self._workers.get(name)
            if worker is None or worker.visit is not None or worker.is_suspected or not worker.waiting:
                continue
            microbatch = min(worker.waiting.values(), key=lambda each: each.path[0].start)
            decisions.append(Start(self._begin(microbatch, now)))
        self._ready.clear()
        return decisions

    def _begin(self, microbatch: _Microbatch, now: float) -> Visit:
        step = microbatch.path.pop(0)
        worker = self._workers[step.worker]
        del worker.waiting[microbatch.request]
        worker.visit = Visit(self._num_visits, microbatch.request, step.worker, step.layer, len(microbatch.order), now)
        self._num_visits += 1
        self._running[worker.visit.number] = microbatch.visit = worker.visit
        microbatch.pending.remove(step.layer)
        ahead = {each.layer for each in microbatch.path}
        before = [layer for layer in microbatch.pending if layer < step.layer]
        microbatch.swaps_left -= any(layer in ahead for layer in before)
        self._pass_by(microbatch, [layer for layer in before if layer not in ahead])
        return worker.visit
