"""Swarms for tests: workers that fail on demand, and a model whose layers are exact functions of integers.

A result that mixes two requests, lacks a layer or has two of them in another order than it says is another number.
"""

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import torch

from hf_layershuffle.swarm.answers import SwarmAnswer
from hf_layershuffle.swarm.local_transport import LocalTransport
from hf_layershuffle.swarm.placement import place_evenly
from hf_layershuffle.swarm.policy import Policy
from hf_layershuffle.swarm.swarm import Swarm
from hf_layershuffle.swarm.transport import LayerCall, LayerResult, WorkerFaultError, WorkerGoneError, WorkerInfo


PRIME = 1_000_003.0


def integer_layer(hidden_states: torch.Tensor, layer: int, position: int, key: torch.Tensor) -> torch.Tensor:
    """What layer `layer` gives at a position. No two orders of the layers give the same."""
    return (hidden_states * (2 * layer + 3) + 7 * position + layer + key) % PRIME


class IntegerModel:
    """Like a `SplitModel`. Its input is a number for each example, and each layer is told the request's key."""

    def __init__(self, num_layers: int = 4):
        self.layers = list(range(num_layers))
        self.digests = {layer: f"digest-{layer}" for layer in self.layers}
        self.config = SimpleNamespace(shuffle_mode="arbitrary", layerdrop=0.0)

    def example_inputs(self) -> dict:
        return {"numbers": torch.ones(1, dtype=torch.float64)}

    def check_inputs(self, inputs) -> dict:
        named = dict(inputs) if isinstance(inputs, dict) else {"numbers": inputs}
        if named.keys() != {"numbers"} or not isinstance(named["numbers"], torch.Tensor) or not len(named["numbers"]):
            raise ValueError(f"{sorted(named)} are no inputs of this model; it takes `numbers`.")
        if not bool(torch.isfinite(named["numbers"]).all()):
            raise ValueError("`numbers` holds NaN.")
        return named

    def request(self, inputs) -> "IntegerRequest":
        return IntegerRequest(self.check_inputs(inputs)["numbers"])


class IntegerRequest:
    def __init__(self, numbers: torch.Tensor):
        self.hidden_states = numbers.reshape(-1, 1, 1) % PRIME
        self.key = numbers.sum()

    def call(self, layer: int) -> tuple:
        return (), {"key": self.key}

    def classify(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.flatten(1)


class IntegerWorker:
    """Like a `LayerWorker`."""

    def __init__(self, name: str, layers, model: IntegerModel):
        self.name, self.model = name, model
        self.load_layers(layers)

    @property
    def info(self) -> WorkerInfo:
        return WorkerInfo(self.name, self.layers, {layer: self.model.digests[layer] for layer in self.layers})

    def load_layers(self, layers) -> WorkerInfo:
        self.layers = tuple(layers)
        return self.info

    def run(self, call: LayerCall) -> LayerResult:
        if call.layer not in self.layers:
            raise WorkerFaultError(f"{self.name} does not hold layer {call.layer}")
        states = integer_layer(call.hidden_states, call.layer, call.position, call.kwargs["key"])
        return LayerResult(call.layer, call.position, states, 0.0)


class IntegerTransport(LocalTransport):
    """Workers of an [`IntegerModel`] in threads."""

    def __init__(self, model: IntegerModel):
        super().__init__("integers")
        self.model = model

    def make_worker(self, name: str, layers) -> IntegerWorker:
        return IntegerWorker(name, layers, self.model)


class FaultyTransport:
    """A transport whose workers fail on demand.

    `fail(name, kind, times)` lets the next calls of a worker fail in one of `KINDS`. A worker that was started again
    is sound. `hang(name)` is like SIGSTOP, and `go_on(name)` like SIGCONT.
    """

    KINDS = ("dies", "nan", "shape", "dtype", "layer", "position", "nothing", "raises", "strange")

    def __init__(self, transport):
        self.transport = transport
        self.seconds: dict[str, float] = {}  # that a worker's calls take longer
        self.digests: dict[str, dict] = {}  # by worker: what it says of some layers
        self.start_faults: Counter[str] = Counter()  # starts of a worker that will fail
        self.num_calls: Counter[str] = Counter()
        self.poison: float | None = None  # hidden states that hold it kill their worker
        self.deaths: list[str] = []
        self._faults: dict[str, list[str]] = {}
        self._going: dict[str, asyncio.Event] = {}

    def fail(self, name: str, kind: str, times: int = 1) -> None:
        assert kind in self.KINDS
        self._faults.setdefault(name, []).extend([kind] * times)

    def hang(self, name: str) -> None:
        self._going[name] = asyncio.Event()

    def go_on(self, name: str) -> None:
        self._going.pop(name).set()

    async def open(self) -> None:
        await self.transport.open()

    async def start_worker(self, name: str, layers) -> WorkerInfo:
        self._faults.pop(name, None)
        self._going.pop(name, None)
        if self.start_faults[name]:
            self.start_faults[name] -= 1
            raise WorkerGoneError(f"{name} does not start")
        return self._said(name, await self.transport.start_worker(name, layers))

    async def load_layers(self, name: str, layers) -> WorkerInfo:
        return self._said(name, await self.transport.load_layers(name, layers))

    def _said(self, name: str, info: WorkerInfo) -> WorkerInfo:
        return replace(info, digests={**info.digests, **self.digests.get(name, {})})

    async def ping(self, name: str) -> WorkerInfo:
        await self._until_it_runs(name)
        return self._said(name, await self.transport.ping(name))

    async def _until_it_runs(self, name: str) -> None:
        """Waits while the worker is stopped; a process that is killed then never answers."""
        while name in self._going:
            await self._going[name].wait()

    async def call(self, name: str, call: LayerCall) -> LayerResult:
        self.num_calls[name] += 1
        await self._until_it_runs(name)
        if name in self.seconds:
            await asyncio.sleep(self.seconds[name])
        if self.poison is not None and bool((call.kwargs["key"] == self.poison).any()):
            await self._die(name)
        faults = self._faults.get(name)
        kind = faults.pop(0) if faults else None
        if kind == "dies":
            await self._die(name)
        if kind == "raises":
            raise WorkerFaultError("out of memory")
        if kind == "strange":
            raise KeyError("a fault of the transport itself")
        return _changed(await self.transport.call(name, call), kind)

    async def _die(self, name: str) -> None:
        self.deaths.append(name)
        await self.transport.stop_worker(name, force=True)
        raise WorkerGoneError(f"{name} was killed")

    async def stop_worker(self, name: str, force: bool = False) -> None:
        await self.transport.stop_worker(name, force=force)

    async def close(self) -> None:
        await self.transport.close()


def _changed(result: LayerResult, kind: str | None):
    states = result.hidden_states
    if kind == "nan":
        return replace(result, hidden_states=torch.full_like(states, torch.nan))
    if kind == "shape":
        return replace(result, hidden_states=states[..., :0])
    if kind == "dtype":
        return replace(result, hidden_states=states.to(torch.float16))
    if kind == "layer":
        return replace(result, layer=result.layer + 1)
    if kind == "position":
        return replace(result, position=result.position + 1)
    return None if kind == "nothing" else result


def integer_swarm(num_layers=4, workers=4, replicas=1, placement=None, **options) -> Swarm:
    """A swarm of an [`IntegerModel`] that is not started. Its `transport` injects faults."""
    rules = {name: options.pop(name) for name in Policy.__dataclass_fields__ if name in options}
    rules["name"] = options.pop("policy", "free")
    model = IntegerModel(num_layers)
    transport = options.pop("transport", None) or FaultyTransport(IntegerTransport(model))
    placement = placement or place_evenly(model.layers, workers, replicas)
    quick = {"health_interval": 0.1, "suspect_timeout": 2.0, "start_timeout": 20.0}
    swarm = Swarm(model, transport, placement, Policy(**rules), name="integers", **{**quick, **options})
    swarm.transport = transport
    return swarm


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def check_answer(swarm: Swarm, inputs: torch.Tensor, answer: SwarmAnswer, max_skips: int | None = None) -> None:
    """What an answer says is true: its logits are those of its order, and each layer ran once or was skipped."""
    request = swarm.model.request(inputs)
    states = request.hidden_states
    for position, layer in enumerate(answer.execution_order):
        states = integer_layer(states, layer, position, request.key)
    assert torch.equal(answer.logits, request.classify(states)), answer
    skipped = [skip.layer for skip in answer.skipped]
    assert sorted(answer.execution_order + skipped) == swarm.model.layers, answer
    assert len(skipped) <= (swarm.policy.max_skips if max_skips is None else max_skips), answer
    assert all(skip.reason for skip in answer.skipped)
    assert [hop.layer for hop in answer.trace] == answer.execution_order
    assert all(hop.seconds >= 0 and hop.worker.startswith("worker-") for hop in answer.trace)


async def until(condition, seconds: float = 20.0) -> None:
    """Waits until something is so."""
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not become so in time")


def states(swarm: Swarm) -> dict[str, str]:
    return {worker["name"]: worker["state"] for worker in swarm.status()["workers"]}


@asynccontextmanager
async def nothing_left():
    """Checks that what runs inside leaves no task and no thread of ours."""
    import threading

    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in set(threading.enumerate()) - before if "layershuffle" in thread.name]
    assert not left, left
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    assert not tasks, tasks
