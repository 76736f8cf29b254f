"""The benchmark of the swarm: real workers that sleep as the simulation drew. Orders and counts, no times."""

import asyncio

import pytest
import torch
from conftest import REPOSITORY, script

from hf_layershuffle.swarm.policy import Policy
from hf_layershuffle.swarm.simulated_nodes import SimulationSettings
from hf_layershuffle.swarm.swarm import Swarm
from hf_layershuffle.swarm.transports import transport_of


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return script(REPOSITORY / "benchmarks" / "swarm.py")


def test_real_workers_that_sleep_run_what_the_policies_allow(benchmark, tmp_path):
    path = benchmark.write_model(tmp_path / "model", num_layers=6)
    settings = SimulationSettings(
        num_layers=6, nodes=3, num_requests=20, in_flight=4, service="constant", service_seconds=0.002, stragglers=0.34
    )
    policies = {
        "strict": (Policy("strict"), 1),
        "free": (Policy("free"), 1),
        "skipping": (Policy("free", max_skips=2, skip_after=0.001), 1),
        "copied": (Policy("free"), 2),
    }

    async def run_all():
        transport = benchmark.SleepingTransport(transport_of("local", path, None, {}))
        found = {}
        async with Swarm.from_pretrained(path, workers=3, transport=transport, policy="free") as swarm:
            for name, (policy, replicas) in policies.items():
                case = benchmark.Case(name, settings, policy, replicas)
                found[name] = await case.real(swarm, torch.zeros(1, 3, 8, 8), seed=0)
                assert sum(transport._attempts.values()) >= 20 * (6 - policy.max_skips)
        return found

    runs = asyncio.run(asyncio.wait_for(run_all(), 120))
    assert {name: len(run.answers) for name, run in runs.items()} == dict.fromkeys(policies, 18)  # two are to warm up
    orders = {name: [answer.execution_order for answer in run.answers] for name, run in runs.items()}
    assert all(order == list(range(6)) for order in orders["strict"])
    assert all(sorted(order) == list(range(6)) for order in orders["free"] + orders["copied"])
    assert any(order != list(range(6)) for order in orders["free"])
    assert all(4 <= len(order) == len(set(order)) for order in orders["skipping"])
    assert any(len(order) < 6 for order in orders["skipping"])
    for run in runs.values():
        for answer in run.answers:
            skipped = {skip.layer for skip in answer.skipped}
            assert (
                sorted({*answer.execution_order, *skipped}) == list(range(6)) and len(answer.trace) + len(skipped) == 6
            )


def test_the_simulated_counterpart_has_the_same_draws(benchmark):
    settings = SimulationSettings(num_requests=400, service="constant")
    case = benchmark.Case("strict", settings, Policy("strict"))
    # Without a way or a busy router, 12 layers of 20 ms are 50 requests a second
    assert case.simulated(0, 0.0, 0.0).throughput == pytest.approx(50, rel=0.02)
    assert case.simulated(0, 0.0, 0.005).throughput == pytest.approx(1 / 0.06, rel=0.05)
    # With equal times, strict order is as good as can be
    assert benchmark.simulated_ratio(case, benchmark.Case("free", settings, Policy("free")), 1) < 1
