"""What happens in a swarm, told to who listens."""

import asyncio
import gc

import pytest
from support.swarm import integer_swarm, numbers

from hf_layershuffle.swarm.events import MOST_EVENTS, Events


def test_a_request_and_a_worker_are_told_from_begin_to_end():
    async def main() -> None:
        swarm = integer_swarm()
        listener = swarm.subscribe()
        async with swarm:
            swarm.transport.fail("worker-1", "nothing")
            await swarm.classify(numbers(1), request_id="a")
        events = [event async for event in listener]  # ends with the swarm
        of_request = [event for event in events if event.get("request") == "a"]
        assert of_request[0]["type"] == "accepted" and of_request[-1]["type"] == "answered"
        hops = [event for event in of_request if event["type"].startswith("hop_")]
        assert [event["type"] for event in hops] == ["hop_started", "hop_ended"] * 5
        ended = [event for event in hops if event["type"] == "hop_ended"]
        assert [event["reason"] is None for event in ended].count(False) == 1
        assert all((event["seconds"] is None) == (event["reason"] is not None) for event in ended)
        assert [event["layer"] for event in ended if event["reason"] is None] == of_request[-1]["order"]
        of_worker = [event["state"] for event in events if event.get("worker") == "worker-1" and "state" in event]
        assert of_worker[:3] == ["starting", "healthy", "suspect"]
        assert all("time" in event for event in events)

    asyncio.run(main())


def test_skips_and_refusals_are_told():
    async def main() -> None:
        async with integer_swarm(max_skips=1) as swarm:
            await swarm.remove_worker("worker-2", force=True)
            listener = swarm.subscribe()
            await swarm.classify(numbers(1), request_id="a")
            with pytest.raises(ValueError):
                await swarm.classify(numbers(float("nan")))
        events = [event async for event in listener]
        skipped = [event for event in events if event["type"] == "skipped"]
        assert [(each["request"], each["layer"], each["reason"]) for each in skipped] == [
            ("a", 2, "worker-2 was removed")
        ]
        assert [event["reason"] for event in events if event["type"] == "refused"] == ["`numbers` holds NaN."]

    asyncio.run(main())


def test_a_slow_listener_loses_the_oldest_and_one_that_left_is_forgotten():
    async def main() -> None:
        events = Events()
        slow, gone = events.subscribe(), events.subscribe()
        for number in range(MOST_EVENTS + 5):
            events.emit("accepted", number=number)
        assert slow.num_lost == 5
        assert (await slow.__anext__())["number"] == 5
        del gone
        gc.collect()
        assert len(events._listeners) == 1
        events.close()
        assert len([event async for event in slow]) == MOST_EVENTS - 1
        assert [event async for event in events.subscribe()] == []

    asyncio.run(main())
