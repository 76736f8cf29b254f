"""Requests at the door: refused, joined, given up."""

import asyncio
import threading

import pytest
import torch
from support.swarm import check_answer, integer_swarm, nothing_left, numbers, until

from hf_layershuffle.swarm.answers import SwarmBusyError, SwarmClosedError, SwarmError


def run(check, **options) -> None:
    async def main() -> None:
        async with nothing_left():
            async with integer_swarm(**options) as swarm:
                await asyncio.wait_for(check(swarm), 50)

    asyncio.run(main())


def test_the_queue_is_bounded_and_says_how_many_wait():
    async def check(swarm):
        swarm.transport.hang("worker-0")
        tasks = [asyncio.create_task(swarm.classify(numbers(i))) for i in range(5)]
        await until(lambda: swarm.status()["in_flight"] == 5)
        with pytest.raises(SwarmBusyError, match="5 requests have no answer yet, and `max_queue` is 5; send it again"):
            await swarm.classify(numbers(9))
        assert swarm.metrics()["refused"] == {"SwarmBusyError": 1}
        swarm.transport.go_on("worker-0")
        for i, answer in enumerate(await asyncio.gather(*tasks)):
            check_answer(swarm, numbers(i), answer)
        check_answer(swarm, numbers(9), await swarm.classify(numbers(9)))

    run(check, max_queue=5, suspect_timeout=20.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": numbers(float("nan"))}, "`numbers` holds NaN"),
        ({"inputs": numbers()}, "are no inputs of this model"),
        ({"inputs": None}, "are no inputs of this model"),
        ({"inputs": [1.0]}, "`inputs` is of type list; it must be a tensor, or tensors by name"),
        ({"inputs": numbers(1).numpy()}, "`inputs` is of type ndarray"),
        ({"inputs": {"pixels": numbers(1)}}, r"\['pixels'\] are no inputs"),
        ({"inputs": numbers(1), "numbers": numbers(1)}, "numbers came beside `inputs`; pass all inputs by name"),
        ({"deadline": 0}, "`deadline` is 0; it must be a number of seconds above 0"),
        ({"deadline": -1.0}, "`deadline` is -1.0"),
        ({"max_skips": -1}, "`max_skips` is -1; it must be an integer of at least 0"),
        ({"max_skips": 4}, "`max_skips` is 4, but only 4 layers run.*at most 3"),
        ({"max_skips": 1.5}, "`max_skips` is 1.5"),
        ({"request_id": "../x"}, r"`request_id` is '../x'; it must be a text of at most 128"),
        ({"request_id": ""}, "`request_id` is ''"),
        ({"request_id": 3}, "`request_id` is 3"),
    ],
)
def test_what_cannot_be_is_refused_before_it_is_accepted(arguments, message):
    async def check(swarm):
        with pytest.raises(ValueError, match=message):
            await swarm.classify(**{"inputs": numbers(1), **arguments})
        assert swarm.metrics()["accepted"] == 0 and swarm.status()["in_flight"] == 0

    run(check)


def test_inputs_come_by_name_too():
    async def check(swarm):
        for answer in (await swarm.classify({"numbers": numbers(3)}), await swarm.classify(numbers=numbers(3))):
            check_answer(swarm, numbers(3), answer)

    run(check)


def test_a_request_of_the_same_name_is_joined():
    async def check(swarm):
        swarm.transport.seconds["worker-0"] = 0.3
        tasks = [asyncio.create_task(swarm.classify(numbers(3), request_id="a")) for _ in range(3)]
        await asyncio.sleep(0.1)
        with pytest.raises(ValueError, match="`request_id` is 'a', which a request with other inputs has"):
            await swarm.classify(numbers(4), request_id="a")
        asked = asyncio.create_task(swarm.answer("a"))
        assert swarm.request_ids == ["a"]
        first, *others = await asyncio.gather(*tasks, asked)
        assert all(other is first for other in others)
        assert swarm.metrics()["accepted"] == 1
        with pytest.raises(
            ValueError, match="There is no request 'a' whose answer was not handed over; there are none"
        ):
            await swarm.answer("a")
        check_answer(swarm, numbers(4), await swarm.classify(numbers(4), request_id="a"))

    run(check)


def test_who_joins_a_request_that_is_refused_is_refused_too():
    async def check(swarm):
        bad = numbers(float("nan"))
        both = (swarm.classify(bad, request_id="a"), swarm.classify(bad, request_id="a"))
        errors = await asyncio.gather(*both, return_exceptions=True)
        assert [str(error) for error in errors] == ["`numbers` holds NaN."] * 2

    run(check)


def test_a_request_whose_caller_leaves_is_given_up():
    async def check(swarm):
        swarm.transport.hang("worker-0")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(swarm.classify(numbers(3), request_id="a"), 0.3)
        assert swarm.status()["in_flight"] == 0 and swarm.request_ids == []
        assert swarm.metrics()["failed"] == {"Cancelled": 1}
        swarm.transport.go_on("worker-0")
        check_answer(swarm, numbers(5), await swarm.classify(numbers(5), request_id="a"))

    run(check, suspect_timeout=20.0)


def test_a_request_for_which_another_caller_waits_goes_on():
    async def check(swarm):
        swarm.transport.seconds["worker-0"] = 0.3
        leaves = asyncio.create_task(swarm.classify(numbers(3), request_id="a"))
        stays = asyncio.create_task(swarm.classify(numbers(3), request_id="a"))
        await asyncio.sleep(0.1)
        leaves.cancel()
        check_answer(swarm, numbers(3), await stays)
        with pytest.raises(asyncio.CancelledError):
            await leaves

    run(check)


def test_a_refused_second_caller_does_not_keep_a_request_whose_first_left():
    async def check(swarm):
        swarm.transport.hang("worker-0")
        original, gate = swarm.model.check_inputs, threading.Event()
        leaves = asyncio.create_task(swarm.classify(numbers(3), request_id="a"))
        await until(lambda: swarm.metrics()["accepted"] == 1)

        def check_inputs(inputs):
            gate.wait(10)
            return original(inputs)

        swarm.model.check_inputs = check_inputs
        refused = asyncio.create_task(swarm.classify(numbers(4), request_id="a"))
        await asyncio.sleep(0.05)
        leaves.cancel()
        await asyncio.wait([leaves])
        gate.set()
        with pytest.raises(ValueError, match="which a request with other inputs has"):
            await refused
        assert swarm.request_ids == [] and swarm.metrics()["failed"] == {"Cancelled": 1}
        swarm.transport.go_on("worker-0")

    run(check, suspect_timeout=20.0)


def test_a_drained_swarm_answers_what_it_accepted_and_refuses_more():
    async def check(swarm):
        tasks = [asyncio.create_task(swarm.classify(numbers(i))) for i in range(20)]
        await asyncio.sleep(0)
        assert swarm.status()["in_flight"] == 20
        await swarm.drain()
        with pytest.raises(SwarmClosedError, match="takes no more requests"):
            await swarm.classify(numbers(1))
        assert swarm.status()["closed"]
        for i, task in enumerate(tasks):
            check_answer(swarm, numbers(i), await task)

    run(check)


def test_many_callers_that_leave_at_random_disturb_nobody():
    async def check(swarm):
        generator = torch.Generator().manual_seed(0)
        swarm.transport.seconds = dict.fromkeys(("worker-0", "worker-1"), 0.005)
        tasks = [asyncio.create_task(swarm.classify(numbers(i))) for i in range(100)]
        for _ in range(60):
            await asyncio.sleep(0.003)
            tasks[int(torch.randint(100, (), generator=generator))].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for i, result in enumerate(results):
            if not isinstance(result, asyncio.CancelledError):
                check_answer(swarm, numbers(i), result)
        assert swarm.status()["in_flight"] == 0
        assert 0 < sum(isinstance(result, asyncio.CancelledError) for result in results) < 100

    run(check)


def test_a_swarm_that_was_not_started_says_so():
    async def main() -> None:
        with pytest.raises(SwarmError, match="The swarm was not started; use it in `async with`"):
            await integer_swarm().classify(numbers(1))

    asyncio.run(main())
