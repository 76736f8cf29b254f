"""What is free order worth on real workers, what does the router cost, and does the simulation say the same?

    python benchmarks/swarm.py                      # about four minutes; workers are threads
    python benchmarks/swarm.py --transport ray      # workers are processes; a minute longer, and 5 GB of memory
    python benchmarks/swarm.py --workers 4 --requests 60 --pairs 2

A ViT of 12 small layers runs on 12 workers, with 12 requests in flight. Each layer takes as long as the simulation
drew for it (a worker sleeps for the rest of 20 ms, or of an exponential time with this mean), so the real router and
the simulated one meet the same times. Policies take turns on the same workers: A B B A ... Then the deviation of the
simulation, the time from `kill -9` of a worker until the throughput is back, and what a hop through the router costs
beyond a bare call of the transport, for hidden states of three sizes. Prints the ratios and writes results/swarm.json.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from harness import Row, positive, quartiles, record

from hf_layershuffle import LayerShuffleViTConfig, LayerShuffleViTForImageClassification
from hf_layershuffle.swarm.placement import place_evenly
from hf_layershuffle.swarm.policy import Policy
from hf_layershuffle.swarm.scheduling import Scheduler
from hf_layershuffle.swarm.simulated_nodes import SimulatedNodes, SimulationSettings
from hf_layershuffle.swarm.simulation import SimulatedSwarm
from hf_layershuffle.swarm.swarm import Swarm
from hf_layershuffle.swarm.transports import transport_of


NUM_LAYERS = 12
WARM_UP = 0.1  # of the requests of a run do not count, as in the simulation
STRICT, FREE = Policy("strict"), Policy("free")
SKIPPING = Policy("free", max_skips=1, skip_after=0.05)
# Hidden states: batch size, tokens and hidden size, in float32
SIZES = {"tiny (1 KB)": (1, 5, 64), "390 KB": (1, 127, 768), "4.7 MB": (8, 197, 768)}


class SleepingTransport:
    """A transport each of whose calls takes as long as a simulation drew for it, beside the way there and back.

    Args:
        inner: Reaches the workers.
    """

    def __init__(self, inner):
        self.inner = inner
        self.nodes = None  # without any, nobody sleeps
        self.ways = []  # seconds of calls beyond what the layer took
        self.calls = []  # seconds of calls
        self._attempts = Counter()

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def begin(self, nodes):
        self.nodes, self.ways, self.calls, self._attempts = nodes, [], [], Counter()

    async def call(self, name, call):
        began = time.perf_counter()
        result = await self.inner.call(name, call)
        took = time.perf_counter() - began
        self.ways.append(took - result.seconds)
        if self.nodes is not None and call.request_id.startswith("request-"):
            request = int(call.request_id.rsplit("-", 1)[1])
            attempt = self._attempts[request, call.layer]
            self._attempts[request, call.layer] += 1
            node = f"node-{name.rsplit('-', 1)[1]}"
            # The nodes' draws hold no latency here; the real one is there already
            await asyncio.sleep(max(0.0, self.nodes.seconds(request, call.layer, attempt, node) - result.seconds))
        self.calls.append(time.perf_counter() - began)
        return result


@dataclass
class Run:
    """What a run of requests came to, counted as a simulation counts."""

    seconds: float = 0.0
    throughput: float = 0.0
    latencies: list[float] = field(default_factory=list)
    answers: list = field(default_factory=list)

    def latency(self, percentile: float) -> float:
        return float(np.percentile(self.latencies, percentile))


def write_model(folder, num_layers=NUM_LAYERS, hidden_size=32, image_size=8, patch_size=4):
    """Random weights. Sizes are those of the hidden states that are wanted."""
    config = LayerShuffleViTConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden_size // 64),
        image_size=image_size,
        patch_size=patch_size,
        num_labels=10,
        shuffle_mode="arbitrary",
    )
    LayerShuffleViTForImageClassification(config).save_pretrained(folder)
    return str(folder)


async def set_up(swarm, policy, replicas, num_workers, num_layers=NUM_LAYERS):
    """Lets a running swarm have another policy and placement, so that all cases run on the same workers."""
    held = place_evenly(range(num_layers), num_workers, replicas)
    for name, layers in held.items():
        await swarm._transport.load_layers(name, layers)
        swarm._router.add_worker(name, layers)
    swarm._router.policy = policy
    await swarm.restart_router()


async def send(swarm, settings, inputs, num_requests):
    """Sends requests, so many at any time, and waits for all answers."""
    run, numbers, started = Run(), iter(range(num_requests)), time.perf_counter()
    counting_from, last_sent, in_time = started, None, 0
    first_counted = int(WARM_UP * num_requests)

    async def client():
        nonlocal counting_from, last_sent, in_time
        for number in numbers:
            if number == first_counted:
                counting_from = time.perf_counter()
            if number == num_requests - 1:
                last_sent = time.perf_counter()
            answer = await swarm.classify(inputs, request_id=f"request-{number}")
            in_time += number >= 0 and last_sent is None and time.perf_counter() > counting_from > started
            if number >= first_counted:
                run.latencies.append(answer.seconds)
                run.answers.append(answer)

    await asyncio.gather(*(client() for _ in range(settings.in_flight or settings.nodes)))
    run.seconds = last_sent - counting_from
    run.throughput = in_time / run.seconds
    return run


@dataclass
class Case:
    """A way to run requests, real and simulated."""

    name: str
    settings: SimulationSettings
    policy: Policy
    replicas: int = 1

    async def real(self, swarm, inputs, seed):
        settings = replace(self.settings, latency_seconds=0.0, seed=seed)
        await set_up(swarm, self.policy, self.replicas, settings.nodes, settings.num_layers)
        swarm._transport.begin(SimulatedNodes(settings))
        return await send(swarm, settings, inputs, settings.num_requests)

    def simulated(self, seed, way, router_seconds):
        settings = replace(
            self.settings, latency_seconds=way, latency_spread=0.3, router_seconds=router_seconds, seed=seed
        )
        nodes = SimulatedNodes(settings)
        placement = place_evenly(range(settings.num_layers), settings.nodes, self.replicas)
        held = dict(zip(nodes.names, placement.values()))
        return SimulatedSwarm(Scheduler(range(settings.num_layers), self.policy), nodes, held).run()


async def compare(swarm, inputs, first, second, pairs, runs):
    """Runs A B, B A ... Returns throughputs of B against A, and keeps all runs by case."""
    ratios = []
    for pair in range(pairs):
        found = {}
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            case = (first, second)[side]
            found[side] = await case.real(swarm, inputs, seed=pair)
            runs[case.name].append(found[side])
        ratios.append(found[1].throughput / found[0].throughput)
    return ratios


def throughput_row(what, against, ratios, simulated, target, runs, first, second):
    absolute = [statistics.median(run.throughput for run in runs[case.name]) for case in (first, second)]
    notes = f"{absolute[0]:.1f} against {absolute[1]:.1f} requests/s; simulated {simulated:.2f}"
    return Row(
        what, against, statistics.median(ratios), quartiles(ratios), len(ratios), unit="throughput", target=target,
        notes=notes,
    )  # fmt: skip


def simulated_ratio(first, second, pairs):
    return statistics.median(
        second.simulated(seed, 0.0, 0.0).throughput / first.simulated(seed, 0.0, 0.0).throughput
        for seed in range(pairs)
    )


async def policies(swarm, inputs, args, runs):
    """Free order, a skip and a replica against strict order."""
    common = dict(num_layers=NUM_LAYERS, nodes=args.workers, num_requests=args.requests, service_seconds=args.seconds)
    exponential = SimulationSettings(**common)
    constant = SimulationSettings(**common, service="constant")
    slow = SimulationSettings(**common, service="constant", stragglers=1 / args.workers)
    cases = {
        name: Case(name, settings, policy, replicas)
        for name, settings, policy, replicas in (
            ("strict, equal workers", constant, STRICT, 1),
            ("free, equal workers", constant, FREE, 1),
            ("strict, exponential times", exponential, STRICT, 1),
            ("free, exponential times", exponential, FREE, 1),
            ("strict, one worker 5 times slower", slow, STRICT, 1),
            ("free with one skip, one worker 5 times slower", slow, SKIPPING, 1),
            ("free with a replica, one worker 5 times slower", slow, FREE, 2),
        )
    }
    by_name = list(cases.values())
    plan = (
        ("free order, equal workers", by_name[0], by_name[1], ""),
        ("free order, exponential service times", by_name[2], by_name[3], ">= 1.4"),
        ("free order with one skip, one worker 5 times slower", by_name[4], by_name[5], ">= 2.5"),
        ("free order with a replica, one worker 5 times slower", by_name[4], by_name[6], ">= 2.5"),
    )
    rows = []
    for what, first, second, target in plan:
        ratios = await compare(swarm, inputs, first, second, args.pairs, runs)
        expected = simulated_ratio(first, second, args.pairs)
        rows.append(throughput_row(what, "strict order", ratios, expected, target, runs, first, second))
    kept = [len(answer.execution_order) for run in runs[by_name[6].name] for answer in run.answers]
    rows.append(Row("layers that ran with a replica", "all", min(kept) / NUM_LAYERS, unit="share", target=">= 1"))
    return rows, cases


def deviation_rows(cases, runs, way, router_seconds):
    """The real swarm against the simulated one, with the same draws and the two costs of a hop as measured."""
    rows = []
    for name, case in cases.items():
        simulated = [case.simulated(seed, way, router_seconds) for seed in range(len(runs[name]))]
        for unit, of in (
            ("throughput", lambda run: run.throughput),
            ("median latency", lambda run: run.latency(50)),
            ("95 % of latencies", lambda run: run.latency(95)),
        ):
            ratios = [of(real) / of(other) for real, other in zip(runs[name], simulated)]
            numbers = (
                f"{statistics.median(map(of, runs[name])):.3g} against {statistics.median(map(of, simulated)):.3g}"
            )
            rows.append(
                Row(
                    name,
                    "simulated",
                    statistics.median(ratios),
                    quartiles(ratios),
                    len(ratios),
                    unit=unit,
                    notes=numbers,
                )
            )
    return rows


async def after_a_kill(swarm, inputs, args):
    """Seconds from `kill -9` of a worker, and from its restart, until as much is answered as before."""
    policy = Policy("free", max_skips=1, call_timeout=5.0)
    settings = SimulationSettings(num_layers=NUM_LAYERS, nodes=args.workers, service_seconds=args.seconds)
    await set_up(swarm, policy, 1, args.workers)
    swarm._transport.begin(SimulatedNodes(replace(settings, latency_seconds=0.0, num_requests=100_000)))
    ends, numbers, is_over, is_lost = [], iter(range(100_000)), False, 0

    async def client():
        nonlocal is_lost
        while not is_over:
            try:
                answer = await swarm.classify(inputs, request_id=f"request-{next(numbers)}")
                ends.append((time.perf_counter(), len(answer.skipped)))
            except Exception:
                is_lost += 1

    def state():
        return next(each["state"] for each in swarm.status()["workers"] if each["name"] == "worker-0")

    clients = [asyncio.create_task(client()) for _ in range(args.workers)]
    await asyncio.sleep(4)
    killed = time.perf_counter()
    before = sum(end > killed - 3 for end, _ in ends) / 3
    await swarm.kill_worker("worker-0")
    while state() == "healthy":
        await asyncio.sleep(0.002)
    seen = time.perf_counter() - killed
    while state() != "healthy" and time.perf_counter() - killed < 60:
        await asyncio.sleep(0.01)
    restarted = time.perf_counter()
    await asyncio.sleep(6)
    is_over = True
    await asyncio.gather(*clients)
    moments = (restarted + 0.05 * number for number in range(100))
    back = next((moment for moment in moments if _rate(ends, moment, 1.0) >= 0.9 * before), None)
    during = sum(killed < end <= restarted for end, _ in ends) / max(1e-9, restarted - killed)
    notes = (
        f"{before:.1f} requests/s before, {during:.1f} until the restart {restarted - killed:.1f} s after the kill; "
        f"seen after {1000 * seen:.0f} ms"
    )
    waited = 5.0 if back is None else back - restarted
    return [
        Row(
            "restart after a kill: until 90 % of the throughput",
            "5 s",
            waited / 5,
            unit="time",
            target="<= 1",
            notes=notes,
        ),
        Row("requests lost by a kill", "", float(is_lost), unit="count", target="<= 0", notes=f"of {len(ends)}"),
    ]


def _rate(ends, start, seconds):
    return sum(start < end <= start + seconds for end, _ in ends) / seconds


class SchedulerClock:
    """Counts the seconds that are spent in the scheduler while it is on."""

    METHODS = ("decide", "arrived", "accept", "next_check")

    def __enter__(self):
        self.seconds, self._originals = 0.0, {name: getattr(Scheduler, name) for name in self.METHODS}
        for name, original in self._originals.items():
            setattr(Scheduler, name, self._timed(original))
        return self

    def _timed(self, original):
        def timed(*args, **kwargs):
            began = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed

    def __exit__(self, *exception):
        for name, original in self._originals.items():
            setattr(Scheduler, name, original)


async def overhead(size, shape, args, folder):
    """A hop through the router against a bare call of the transport, one request at a time, nobody sleeping."""
    batch, tokens, hidden_size = shape
    image = 16 * round((tokens - 1) ** 0.5)
    if (image // 16) ** 2 + 1 != tokens:  # a wide image
        image = (16, 16 * (tokens - 1))
    path = write_model(f"{folder}/{size.split()[0]}", 4, hidden_size, image, 16)
    height, width = (image, image) if isinstance(image, int) else image
    inputs = torch.zeros(batch, 3, height, width)
    transport = SleepingTransport(transport_of(args.transport, path, None, {}))
    swarm = Swarm.from_pretrained(path, workers=4, transport=transport, policy="free")
    async with swarm:
        split = swarm.model.request(swarm.model.check_inputs(inputs))
        assert split.hidden_states.shape == (batch, tokens, hidden_size), split.hidden_states.shape
        for _ in range(3):
            await swarm.classify(inputs)
        bare, routed, layers = [], [], []
        from hf_layershuffle.swarm.transport import LayerCall

        with SchedulerClock() as clock:
            for _ in range(args.hops // 4):
                for layer in range(4):
                    call_args, call_kwargs = split.call(layer)
                    began = time.perf_counter()
                    result = await transport.inner.call(
                        f"worker-{layer}", LayerCall("bare", layer, layer, split.hidden_states, call_args, call_kwargs)
                    )
                    bare.append(time.perf_counter() - began - result.seconds)
                    layers.append(result.seconds)
                before = len(transport.calls)
                began = time.perf_counter()
                answer = await swarm.classify(inputs)
                ends = time.perf_counter() - began
                worked = sum(transport.calls[before:]) - sum(transport.ways[before:])
                first_and_last = _embed_and_classify(swarm, inputs)
                routed.append((ends - worked - first_and_last) / len(answer.execution_order))
            scheduler = clock.seconds / (len(routed) * 4)
    notes = (
        f"{1000 * statistics.median(bare):.2f} ms against {1000 * statistics.median(routed):.2f} ms a hop beside the "
        f"layer ({1000 * statistics.median(layers):.2f} ms); in the scheduler {1e6 * scheduler:.0f} µs"
    )
    ratios = [b / statistics.median(bare) for b in routed]
    return Row(
        f"a hop through the router, {size}", f"a bare call ({args.transport})", statistics.median(ratios),
        quartiles(ratios), len(ratios), notes=notes,
    )  # fmt: skip


def _embed_and_classify(swarm, inputs):
    began = time.perf_counter()
    split = swarm.model.request(swarm.model.check_inputs(inputs))
    split.classify(split.hidden_states)
    return time.perf_counter() - began


async def costs_of_a_hop(swarm, inputs, num_workers):
    """Seconds on the way to a worker and back, and for which the router is busy, measured with nobody sleeping.

    What a hop takes with many requests under way is what cannot be done at the same time. What one alone takes beyond
    that is the way.
    """
    transport = swarm._transport
    transport.begin(None)
    alone = [(await swarm.classify(inputs)).seconds / NUM_LAYERS for _ in range(20)]
    layer = statistics.mean(call - way for call, way in zip(transport.calls, transport.ways))
    began = time.perf_counter()

    async def client():
        for _ in range(15):
            await swarm.classify(inputs)

    await asyncio.gather(*(client() for _ in range(num_workers)))
    busy = (time.perf_counter() - began) / (15 * num_workers * NUM_LAYERS)
    return max(0.0, statistics.median(alone) - layer - busy), busy


async def measure(args, folder):
    path = write_model(f"{folder}/model")
    inputs = torch.zeros(1, 3, 8, 8)
    runs = defaultdict(list)
    transport = SleepingTransport(transport_of(args.transport, path, None, {}))
    swarm = Swarm.from_pretrained(path, workers=args.workers, transport=transport, policy="free")
    async with swarm:
        for _ in range(20):
            await swarm.classify(inputs)
        costs = await costs_of_a_hop(swarm, inputs, args.workers)
        rows, cases = await policies(swarm, inputs, args, runs)
        rows += deviation_rows(cases, runs, *costs)
        rows += await after_a_kill(swarm, inputs, args)
    for size, shape in SIZES.items():
        rows.append(await overhead(size, shape, args, folder))
    return rows, costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transport", default="local", choices=["local", "ray"])
    parser.add_argument("--workers", type=positive, default=12)
    parser.add_argument("--requests", type=positive, default=150, help="of each run")
    parser.add_argument("--seconds", type=float, default=0.02, help="that a layer takes, on average")
    parser.add_argument("--pairs", type=positive, default=3)
    parser.add_argument("--hops", type=positive, default=200, help="for each size of hidden states")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows, (way, busy) = asyncio.run(measure(args, folder))
    settings = {name: getattr(args, name) for name in vars(args)}
    notes = (
        f"The simulation was given what was measured before, with nobody sleeping: {1000 * way:.2f} ms on the way to "
        f"a worker and back, and {1000 * busy:.2f} ms for which the router is busy with a hop."
    )
    record("What is free order worth on real workers, and does the simulation say the same?", rows, settings, notes)


if __name__ == "__main__":
    main()
