"""What is told of each request, and what a page that opens later has to know."""

import asyncio
import gc
from pathlib import Path

import pytest
import torch

import hf_layershuffle as ls
from hf_layershuffle.swarm.answers import DeadlineError, SwarmBusyError
from hf_layershuffle.swarm.demonstration import LabelledInput, PacedTransport
from hf_layershuffle.swarm.local_transport import LocalTransport
from hf_layershuffle.swarm.watched_swarm import WatchedSwarm


FOLDER = Path(ls.example_model())
LABELS = list("0123456789")
PIXELS = {"pixel_values": torch.zeros(1, 3, 8, 8)}


def watched(do, **options):
    """What a function makes of a watched swarm of two workers, and all that was told meanwhile."""
    heard = []

    async def run():
        paced = PacedTransport(LocalTransport(FOLDER), 0.0)
        async with ls.Swarm.from_pretrained(FOLDER, workers=2, transport=paced, max_skips=1) as swarm:
            watching = WatchedSwarm(swarm, LABELS, paced=paced, **options)

            async def listen():
                async for batch in watching.events.listen(watching.beginning):
                    heard.extend(batch)

            async with watching.watching():
                listener = asyncio.ensure_future(listen())
                await asyncio.sleep(0)
                result = await do(watching)
            await listener
            return result

    return asyncio.run(run()), heard


def test_a_request_is_told_from_its_beginning_to_its_answer():
    async def ask(watching):
        return await watching.classify(PIXELS, {"image": "data:,"}, expected="3")

    answer, heard = watched(ask)
    assert heard[0]["type"] == "beginning" and heard[0]["settings"] is None
    mine = [event for event in heard if event.get("request") == answer.request_id]
    assert mine[0] == {"type": "accepted", "request": answer.request_id, "expected": "3", "image": "data:,"}
    (told,) = [event for event in mine if event["type"] == "classified"]
    assert told["execution_order"] == answer.execution_order and told["expected"] == "3"
    assert told["label"] == LABELS[int(answer.logits.argmax())] and told["is_right"] == (told["label"] == "3")
    assert told["score"] == pytest.approx(float(answer.logits.softmax(-1).max()))
    ran = [event["layer"] for event in mine if event["type"] == "hop_ended"]
    assert ran == answer.execution_order


@pytest.mark.parametrize(
    "fault, count",
    [
        (DeadlineError("late", [1]), "failed"),
        (SwarmBusyError("full"), "refused"),
        (ValueError("wrong input"), None),
    ],
)
def test_a_request_without_answer_is_told_and_counted(fault, count):
    async def ask(watching):
        async def fails(*arguments, **options):
            raise fault

        watching.swarm.classify = fails
        with pytest.raises(type(fault), match=str(fault)):
            await watching.classify(PIXELS, {"text": "a"})
        assert watching.beginning()["requests"] == []
        return dict(watching.numbers.totals)

    totals, heard = watched(ask)
    assert totals == {"answered": 0, "failed": 0, "refused": 0} | ({count: 1} if count else {})
    (told,) = [event for event in heard if event["type"] == "unanswered"]
    assert told["reason"] == str(fault) and told["text"] == "a"


def test_a_page_that_opens_later_sees_what_was_before():
    async def ask(watching):
        for _ in range(30):
            await watching.classify(PIXELS, {"text": "a"}, expected="3")
        watching.paced.slow_down("worker-1", 5)
        waiting = asyncio.ensure_future(watching.classify(PIXELS, {"text": "b"}))
        await asyncio.sleep(0)
        beginning = watching.beginning()
        await waiting
        return beginning

    beginning, _ = watched(ask)
    assert [request["text"] for request in beginning["requests"]] == ["b"]
    assert len(beginning["answers"]) == 24 and beginning["num_labelled"] == 30
    assert beginning["factors"] == {"worker-1": 5.0} and beginning["without_worker"] == []
    assert beginning["totals"]["answered"] == 30


def test_seconds_and_states_of_workers_are_told():
    async def wait(watching):
        await watching.swarm.kill_worker("worker-0")
        await asyncio.sleep(1.5)

    _, heard = watched(wait)
    (second,) = [event for event in heard if event["type"] == "second"]
    assert {"throughput", "p50", "accuracy", "requests", "status", "without_worker"} <= second.keys()
    states = [event["status"]["workers"][0]["state"] for event in heard if event["type"] == "status"]
    assert states[-1] == "healthy" and {"dead", "starting"} & set(states)


def test_the_load_uses_the_limit_of_skips_of_the_swarm():
    items = [LabelledInput(PIXELS, {"text": "a"}, "3")]

    async def wait(watching):
        while watching.numbers.totals["answered"] < 3:
            await asyncio.sleep(0.02)
        return watching.beginning()["settings"]

    settings, heard = watched(wait, items=items, rate=50.0)
    assert settings == {"rate": 50.0, "max_skips": 1}
    assert sum(event["type"] == "classified" for event in heard) >= 3


@pytest.mark.parametrize("fault, count", [(ValueError, "refused"), (OSError, "failed"), (DeadlineError, "failed")])
def test_what_of_the_load_has_no_answer_is_counted_and_goes_to_no_log(fault, count, caplog):
    async def wait(watching):
        async def fails(*arguments, **options):
            raise fault("for a trial")

        watching.swarm.classify = fails
        for _ in range(500):
            if sum(watching.numbers.totals.values()) >= 2:
                break
            await asyncio.sleep(0.01)
        return dict(watching.numbers.totals)

    totals, heard = watched(wait, items=[LabelledInput(PIXELS, {"text": "a"}, "3")], rate=50.0)
    assert totals[count] >= 2 and sum(totals.values()) == totals[count]
    assert sum(event["type"] == "unanswered" for event in heard) >= 2
    gc.collect()
    assert "never retrieved" not in caplog.text
