"""Numbers and events for those who watch."""

import asyncio
import json

import pytest

from hf_layershuffle.swarm import live_events
from hf_layershuffle.swarm.live_events import (
    LiveEvents,
    LiveNumbers,
    as_server_sent,
    layers_without_worker,
    quantile,
)


@pytest.mark.parametrize(
    "values, fraction, expected",
    [
        ([], 0.5, None),
        ([7], 0.95, 7),
        ([1, 2], 0.5, 1),
        ([1, 2, 3], 0.5, 2),
        (list(range(1, 101)), 0.95, 95),
        ([1, 2], 1, 2),
    ],
)
def test_a_quantile_is_the_least_value_that_covers_its_fraction(values, fraction, expected):
    assert quantile(values, fraction) == expected


def test_numbers_are_of_the_last_seconds_and_the_last_labelled():
    now = [100.0]
    numbers = LiveNumbers(num_labelled=4, clock=lambda: now[0])
    assert numbers.summary() == {
        "throughput": 0, "failures": 0, "p50": None, "p95": None, "accuracy": None, "num_labelled": 0,
        "totals": {"answered": 0, "failed": 0, "refused": 0},
    }  # fmt: skip
    for is_right in (False, False, True, True, True, False):
        numbers.add(0.5, is_right)
    numbers.add(0.7)
    numbers.add_failure("refused")
    assert numbers.summary()["accuracy"] == 0.75 and numbers.summary()["num_labelled"] == 4  # the first two are past
    now[0] += 5
    numbers.add(0.1)
    summary = numbers.summary()
    assert summary["throughput"] == pytest.approx(1 / 3) and summary["failures"] == 0
    assert (summary["p50"], summary["p95"]) == (0.5, 0.7)
    assert summary["totals"] == {"answered": 8, "failed": 0, "refused": 1}
    now[0] += 6
    assert numbers.summary()["p95"] == 0.1  # of the last ten seconds
    now[0] += 60
    assert numbers.summary()["p95"] is None and numbers.summary()["accuracy"] == 0.75


def test_only_healthy_workers_hold_layers():
    workers = [
        {"state": state, "layers": [layer]} for layer, state in enumerate(["healthy", "dead", "suspect", "starting"])
    ]
    assert layers_without_worker({"layers": [0, 1, 2, 3], "workers": workers}) == [1, 2, 3]


def test_a_slow_listener_loses_the_oldest_events_and_holds_up_nobody(monkeypatch):
    monkeypatch.setattr(live_events, "MOST_WAITING", 3)

    async def listen():
        events = LiveEvents()
        listener = events.listen(lambda: {"type": "beginning"})
        assert await anext(listener) == [{"type": "beginning"}]
        for number in range(10):
            events.publish({"type": "x", "number": number})
        heard = await anext(listener)
        assert events.num_listeners == 1
        events.publish({"type": "x", "number": 10})
        events.close()
        rest = [batch async for batch in listener]
        assert events.num_listeners == 0
        return heard, rest

    heard, rest = asyncio.run(listen())
    assert [event["number"] for event in heard] == [7, 8, 9]
    assert [event["number"] for batch in rest for event in batch] == [10]


def test_events_are_one_line_of_a_stream():
    text = as_server_sent([{"type": "x", "reason": "two\nlines"}])
    assert text.startswith("data: ") and text.endswith("\n\n") and text.count("\n") == 2
    assert json.loads(text[6:]) == [{"type": "x", "reason": "two\nlines"}]
