"""Counts and latencies."""

import asyncio
import json
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.swarm import integer_swarm, numbers, until

from hf_layershuffle.swarm.answers import MissingLayersError, SwarmError
from hf_layershuffle.swarm.metrics import BUCKETS, Latencies, Metrics


async def observed_swarm():
    """A swarm of which everything that is counted happened, with its metrics in both forms."""
    async with integer_swarm(max_skips=1, max_wait=0.1, restart=False) as swarm:
        swarm.transport.fail("worker-0", "nan")
        for number in range(3):
            await swarm.classify(numbers(number))
        await swarm.kill_worker("worker-2")
        await until(lambda: swarm.metrics()["workers"].get("dead"))
        await swarm.classify(numbers(1))
        with pytest.raises(MissingLayersError):
            await swarm.classify(numbers(1), max_skips=0)
        with pytest.raises(ValueError):
            await swarm.classify(numbers(1), max_skips=-1)
        return swarm.metrics(), swarm.prometheus()


def test_what_happened_is_counted():
    counted, _ = asyncio.run(observed_swarm())
    assert json.loads(json.dumps(counted)) == counted
    assert (counted["accepted"], counted["answered"]) == (5, 4)
    assert counted["failed"] == {"MissingLayersError": 1} and counted["refused"] == {"ValueError": 1}
    assert counted["skips"] == {"2": {"lost": 1}} and counted["faults"] == {"0": {"worker-0": 1}}
    assert counted["worker_changes"]["worker-2"] == {"starting": 1, "healthy": 1, "dead": 1}
    assert counted["workers"] == {"healthy": 3, "dead": 1}
    assert (counted["in_flight"], counted["waiting"], counted["restarts"]) == (0, 0, 0)
    assert counted["request_seconds"]["count"] == 4
    assert {layer: each["count"] for layer, each in counted["hop_seconds"].items()} == {"0": 5, "1": 5, "2": 3, "3": 5}
    assert counted["queue_seconds"]["count"] == 19


def test_prometheus_reads_the_same():
    _, text = asyncio.run(observed_swarm())
    families = {family.name: family for family in text_string_to_metric_families(text)}
    values = {
        (sample.name.removeprefix("layershuffle_swarm_"), *sorted(sample.labels.values())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert values["requests_accepted_total",] == 5 and values["requests_answered_total",] == 4
    assert values["requests_failed_total", "MissingLayersError"] == 1
    assert values["skips_total", "2", "lost"] == 1 and values["faults_total", "0", "worker-0"] == 1
    assert values["workers", "dead"] == 1 and values["in_flight",] == 0
    assert values["hop_seconds_count", "2"] == 3 and values["request_seconds_count",] == 4
    assert values["request_seconds_bucket", "+Inf"] == 4
    assert values["request_seconds_sum",] > 0
    assert families["layershuffle_swarm_hop_seconds"].type == "histogram"
    assert families["layershuffle_swarm_requests_accepted"].type == "counter"


def test_latencies_are_counted_in_buckets_that_add_up():
    latencies = Latencies()
    for seconds in (0.0005, 0.001, 0.0011, 0.2, 100.0):
        latencies.add(seconds)
    counts = dict(latencies.cumulative())
    assert (counts["0.001"], counts["0.0025"], counts["0.25"], counts["60"], counts["+Inf"]) == (2, 3, 4, 4, 5)
    assert len(counts) == len(BUCKETS) + 1
    assert latencies.to_dict()["mean"] == pytest.approx(100.2026 / 5)
    assert Latencies().to_dict()["mean"] is None


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        ("the deadline came", "deadline"),
        ("no worker was free for 2 s", "busy"),
        ("tried 3 times, at last worker-1: not finite", "failed"),
        ("worker-1 died (killed)", "lost"),
        ("no worker holds it", "lost"),
    ],
)
def test_skips_are_counted_by_a_few_causes(reason, cause):
    metrics = Metrics()
    metrics.record({"type": "skipped", "request": "a", "layer": 2, "reason": reason})
    assert metrics.to_dict()["skips"] == {"2": {cause: 1}}


def test_without_prometheus_client_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(SwarmError, match=r'pip install "hf-layershuffle\[swarm\]"'):
        Metrics().prometheus()
    assert Metrics().to_dict()["accepted"] == 0
