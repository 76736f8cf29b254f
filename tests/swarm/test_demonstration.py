"""A load of labelled inputs, and workers slow enough for the eye."""

import asyncio

import pytest

from hf_layershuffle.swarm import demonstration
from hf_layershuffle.swarm.demonstration import LabelledInput, LabelledLoad, PacedTransport


ITEMS = [LabelledInput({}, {"text": str(number)}, str(number)) for number in range(5)]


def sent_by(load_of, seconds: float, **options) -> list[tuple[str, int]]:
    """What a load sends in some seconds: the label of each input, and how many layers it may skip."""
    sent = []

    async def send(item, max_skips):
        sent.append((item.label, max_skips))
        await load_of(item)

    async def run():
        task = asyncio.ensure_future(LabelledLoad(ITEMS, send, **options).run())
        await asyncio.sleep(seconds)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    return sent


async def at_once(item):
    pass


async def never(item):
    await asyncio.sleep(3600)


def test_inputs_are_sent_again_and_again_in_an_order_that_is_drawn():
    sent = sent_by(at_once, 0.5, rate=100.0, max_skips=2, seed=1)
    assert 10 <= len(sent) <= 60 and {skips for _, skips in sent} == {2}
    labels = [label for label, _ in sent]
    assert sorted(labels[:5]) == list("01234") and labels[5:10] == labels[:5] != list("01234")
    assert [label for label, _ in sent_by(at_once, 0.3, rate=100.0, seed=1)][:5] == labels[:5]
    assert sent_by(at_once, 0.1, rate=0.0) == []


def test_it_waits_for_answers_when_too_many_are_under_way(monkeypatch):
    monkeypatch.setattr(demonstration, "MOST_SENT", 7)
    assert len(sent_by(never, 0.5, rate=100.0)) == 7


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rate": -1}, "`rate` is -1; it must be a number from 0 to 100."),
        ({"rate": float("nan")}, "`rate` is nan"),
        ({"rate": True}, "`rate` is True"),
        ({"rate": "3"}, "`rate` is '3'"),
        ({"max_skips": -1}, "`max_skips` is -1; it must be an integer of at least 0."),
    ],
)
def test_a_load_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LabelledLoad(ITEMS, at_once, **options)


def test_a_load_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"There are no labelled inputs to send; pass at least one."):
        LabelledLoad([], at_once)


class Recording:
    """A transport that notes what is asked of it."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        async def asked(*arguments):
            self.asked.append((name, arguments))
            return name

        return asked


def test_a_worker_that_is_slowed_down_takes_as_many_times_longer(monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(demonstration.asyncio, "sleep", sleep)

    def times(factor: float) -> list[float]:
        slept.clear()
        inner = Recording()
        paced = PacedTransport(inner, 0.1)
        paced.slow_down("worker-1", factor)

        async def run():
            for _ in range(200):
                assert await paced.call("worker-1", "a call") == "call"
            assert await paced.call("worker-0", "a call") == "call"

        asyncio.run(run())
        assert inner.asked == [("call", ("worker-1", "a call"))] * 200 + [("call", ("worker-0", "a call"))]
        return list(slept)

    usual, slow = times(1), times(5)
    assert slow[:200] == pytest.approx([5 * seconds for seconds in usual[:200]]) and slow[200] == usual[200]
    assert 0.08 < sum(usual) / len(usual) < 0.12


def test_all_else_goes_to_the_transport_as_it_is():
    inner = Recording()
    paced = PacedTransport(inner, 0.0)

    async def run():
        await paced.open()
        assert await paced.start_worker("a", [1]) == "start_worker"
        assert await paced.load_layers("a", [2]) == "load_layers"
        assert await paced.ping("a") == "ping"
        await paced.stop_worker("a", True)
        await paced.close()

    asyncio.run(run())
    assert inner.asked == [
        ("open", ()), ("start_worker", ("a", [1])), ("load_layers", ("a", [2])), ("ping", ("a",)),
        ("stop_worker", ("a", True)), ("close", ()),
    ]  # fmt: skip


@pytest.mark.parametrize("factor", [0.5, 101, float("inf"), None])
def test_a_factor_out_of_range_is_refused(factor):
    with pytest.raises(ValueError, match=r"`factor` is .*; it must be a number from 1 to 100."):
        PacedTransport(Recording(), 0.1).slow_down("a", factor)
