"""Requests from worker to worker: what counts, what is dropped, and what ends a request."""

import asyncio
import gc
import time

import pytest
from support.swarm import check_answer, integer_swarm, nothing_left, numbers, states, until

from hf_layershuffle.swarm.answers import DeadlineError, MissingLayersError, SwarmError
from hf_layershuffle.swarm.heap import FEW
from hf_layershuffle.swarm.routed_request import RoutedRequest


def run(check, **options) -> None:
    async def main() -> None:
        async with nothing_left():
            async with integer_swarm(**options) as swarm:
                await asyncio.wait_for(check(swarm), 50)

    asyncio.run(main())


def slow_first_call(swarm, seconds: float) -> list[str]:
    """Lets the next call take longer; the list will name its worker."""
    original, first = swarm.transport.call, []

    async def call(name, layer_call):
        first.append(name)
        swarm.transport.call = original
        await asyncio.sleep(seconds)
        return await original(name, layer_call)

    swarm.transport.call = call
    return first


@pytest.mark.parametrize("policy", ["free", "strict"])
def test_many_requests_at_a_time_do_not_mix(policy):
    async def check(swarm):
        inputs = [numbers(i, 3 * i + 1) for i in range(40)]
        answers = await asyncio.gather(*(swarm.classify(each) for each in inputs))
        for each, answer in zip(inputs, answers):
            check_answer(swarm, each, answer)
        orders = {tuple(answer.execution_order) for answer in answers}
        assert (len(orders) == 1) == (policy == "strict")
        assert len({answer.request_id for answer in answers}) == 40

    run(check, policy=policy, num_layers=6)


@pytest.mark.parametrize(
    "kind", ["nan", "shape", "dtype", "layer", "position", "nothing", "raises", "strange", "dies"]
)
def test_what_cannot_be_right_is_dropped_and_the_layer_asked_again(kind):
    async def check(swarm):
        swarm.transport.fail("worker-1", kind)
        answer = await swarm.classify(numbers(1, 2))
        check_answer(swarm, numbers(1, 2), answer)
        assert answer.skipped == []
        assert swarm.metrics()["faults"]["1"] == {"worker-1": 1}

    run(check)


def test_a_late_result_is_dropped():
    async def check(swarm):
        first = slow_first_call(swarm, 1.2)
        answer = await swarm.classify(numbers(1))
        check_answer(swarm, numbers(1), answer)
        assert first[0] not in {hop.worker for hop in answer.trace}
        await until(lambda: states(swarm)[first[0]] == "healthy")  # it only was slow
        assert swarm.metrics()["worker_changes"][first[0]] == {"starting": 1, "healthy": 2, "suspect": 1}
        check_answer(swarm, numbers(2), await swarm.classify(numbers(2)))
        assert swarm.metrics()["answered"] == 2

    run(check, num_layers=2, placement={"worker-0": (0, 1), "worker-1": (0, 1)}, call_timeout=0.5)


def test_a_hedge_asks_a_replica_and_the_first_result_counts():
    async def check(swarm):
        first = slow_first_call(swarm, 0.5)
        answer = await swarm.classify(numbers(4))
        check_answer(swarm, numbers(4), answer)
        assert [hop.worker for hop in answer.trace] != first
        assert states(swarm) == {"worker-0": "healthy", "worker-1": "healthy"}
        await until(lambda: not any(worker["busy_with"] for worker in swarm.status()["workers"]))
        assert swarm.transport.num_calls == {"worker-0": 2, "worker-1": 2}  # of these one each to warm up
        assert swarm.metrics()["faults"] == {}

    run(check, num_layers=1, placement={"worker-0": (0,), "worker-1": (0,)}, hedge=0.05)


def test_layers_of_nobody_are_skipped_up_to_the_cap_and_said_to_be():
    async def check(swarm):
        await swarm.kill_worker("worker-2")
        await until(lambda: states(swarm)["worker-2"] == "dead")
        answer = await swarm.classify(numbers(3))
        check_answer(swarm, numbers(3), answer)
        assert [(skip.layer, skip.reason) for skip in answer.skipped] == [
            (2, "worker-2 died (worker-2 is not running)")
        ]
        await swarm.kill_worker("worker-3")
        await until(lambda: states(swarm)["worker-3"] == "dead")
        message = r"could not run layers 2 \(worker-2 died .*\), 3 \(.*\): 2 of 4 layers ran, and it may skip 1"
        with pytest.raises(MissingLayersError, match=message) as caught:
            await swarm.classify(numbers(3))
        assert caught.value.missing == [2, 3]
        answer = await swarm.classify(numbers(3), max_skips=2)
        check_answer(swarm, numbers(3), answer, max_skips=2)
        assert swarm.metrics()["skips"] == {"2": {"lost": 2}, "3": {"lost": 1}}
        assert swarm.metrics()["failed"] == {"MissingLayersError": 1}

    run(check, max_skips=1, restart=False, max_wait=0.2)


def test_a_deadline_gives_the_answer_of_what_ran_or_fails():
    async def check(swarm):
        swarm.transport.hang("worker-3")
        # One after the other: a request that is stuck in the worker that hangs may lack another layer too
        answer = await swarm.classify(numbers(3), deadline=1.5, max_skips=1)
        with pytest.raises(DeadlineError, match=r"came to its deadline of 1.5 s before it had run layers 3 \("):
            await swarm.classify(numbers(4), deadline=1.5)
        check_answer(swarm, numbers(3), answer, max_skips=1)
        assert [(skip.layer, skip.reason) for skip in answer.skipped] == [(3, "the deadline came")]

    run(check, suspect_timeout=60.0, health_interval=30.0)


def test_a_request_goes_on_from_its_hidden_states_when_the_router_restarts():
    async def check(swarm):
        swarm.transport.seconds.update(dict.fromkeys(("worker-0", "worker-1", "worker-2", "worker-3"), 0.1))
        inputs = [numbers(i, i + 5) for i in range(6)]
        tasks = [asyncio.create_task(swarm.classify(each)) for each in inputs]
        for _ in range(4):
            await asyncio.sleep(0.12)
            await swarm.restart_router()
        for each, answer in zip(inputs, await asyncio.gather(*tasks)):
            check_answer(swarm, each, answer)
        # But for the calls that ran when it restarted, and four to warm up, none was made twice
        assert 28 <= sum(swarm.transport.num_calls.values()) <= 28 + 4 * 4

    run(check)


def test_a_worker_that_hangs_since_before_the_restart_is_found():
    async def check(swarm):
        swarm.transport.hang("worker-1")
        task = asyncio.create_task(swarm.classify(numbers(5)))
        await until(lambda: swarm.status()["workers"][1]["busy_with"])
        await swarm.restart_router()
        check_answer(swarm, numbers(5), await task)
        assert swarm.metrics()["restarts"] == 1

    run(check, call_timeout=0.3, suspect_timeout=0.3)


@pytest.mark.parametrize("attempts", [1, 2, 3])
def test_a_request_that_kills_workers_kills_no_more_than_it_may(attempts):
    async def check(swarm):
        swarm.transport.poison = 13.0
        others = [asyncio.create_task(swarm.classify(numbers(i))) for i in range(10)]
        message = rf"was given up, since workers failed in it {attempts} times .*Its inputs may be the cause"
        with pytest.raises(SwarmError, match=message):
            await swarm.classify(numbers(13))
        assert len(swarm.transport.deaths) == attempts
        for i, answer in enumerate(await asyncio.gather(*others)):
            check_answer(swarm, numbers(i), answer)

    run(check, max_attempts=attempts)


def test_a_request_that_makes_workers_hang_is_given_up():
    async def check(swarm):
        for name in states(swarm):
            swarm.transport.hang(name)
        with pytest.raises(SwarmError, match="was given up, since workers failed in it 2 times"):
            await swarm.classify(numbers(1))
        # One call each to warm up; no third worker was asked
        assert sum(swarm.transport.num_calls.values()) == 4 + 2

    run(check, max_attempts=2, call_timeout=0.1, suspect_timeout=5.0)


@pytest.mark.parametrize("options", [{"restart": False, "max_skips": 1}, {"deadline": 50.0}])
def test_what_is_known_of_requests_goes_with_them(options):
    """Also where a layer has no worker any more, so that nobody takes a request from its queue."""

    async def check(swarm):
        if "max_skips" in options:
            await swarm.remove_worker("worker-2", force=True)
        for _ in range(30):
            await asyncio.gather(*(swarm.classify(numbers(i)) for i in range(10)))
        scheduler, router = swarm._router._scheduler, swarm._router
        kept = [scheduler._timers, scheduler._to_match, *scheduler._queues.values()]
        assert max(map(len, kept)) <= 2 * FEW
        assert not scheduler._requests and not router._requests and not router._open
        assert not any(router._calls.values())
        gc.collect()
        requests = [each for each in gc.get_objects() if type(each) is RoutedRequest]
        assert not any(hasattr(each, "hidden_states") or hasattr(each, "split") for each in requests)

    run(check, **options)


def test_the_deadline_counts_from_the_call_and_not_from_the_embedding():
    async def check(swarm):
        original = swarm.model.request

        def request(inputs):
            time.sleep(0.5)
            return original(inputs)

        swarm.model.request = request
        swarm.transport.seconds = dict.fromkeys(states(swarm), 0.01)
        with pytest.raises(DeadlineError, match=r"came to its deadline of 0.3 s .*: 0 of 4 layers ran"):
            await swarm.classify(numbers(1), deadline=0.3)
        assert (await swarm.classify(numbers(1), deadline=20.0)).seconds >= 0.5

    run(check)


def test_a_replica_that_is_later_and_wrong_has_a_fault():
    async def check(swarm):
        first = slow_first_call(swarm, 0.5)
        check_answer(swarm, numbers(4), await swarm.classify(numbers(4)))
        swarm.transport.fail(first[0], "nan")
        await until(lambda: swarm.metrics()["faults"] == {"0": {first[0]: 1}})

    run(check, num_layers=1, placement={"worker-0": (0,), "worker-1": (0,)}, hedge=0.05)


def test_a_replica_that_is_asked_too_did_not_wait():
    async def check(swarm):
        slow_first_call(swarm, 0.5)
        await swarm.classify(numbers(4))
        counted = swarm.metrics()["queue_seconds"]
        assert counted["count"] == 2 and counted["sum"] < 0.3

    run(check, num_layers=1, placement={"worker-0": (0,), "worker-1": (0,)}, hedge=0.4)


def test_a_request_on_which_sound_workers_fail_is_given_up():
    async def check(swarm):
        original = swarm.transport.call

        async def call(name, layer_call):
            result = await original(name, layer_call)
            if float(layer_call.kwargs["key"]) == 13.0:  # as an overflow that the inputs cause
                result.hidden_states.fill_(float("nan"))
            return result

        swarm.transport.call = call
        with pytest.raises(SwarmError, match="not finite"):
            await swarm.classify(numbers(13))
        check_answer(swarm, numbers(1), await swarm.classify(numbers(1)))
        assert swarm.metrics()["restarts"] <= 2

    run(check)


def test_a_call_that_cannot_be_made_ends_its_request_alone():
    async def check(swarm):
        inputs = numbers(5)
        original = swarm.model.request

        def request(given):
            split = original(given)
            if split.key == 5:
                split.call = None
            return split

        swarm.model.request = request
        with pytest.raises(TypeError, match="not callable"):
            await swarm.classify(inputs)
        check_answer(swarm, numbers(1), await swarm.classify(numbers(1)))

    run(check)


def test_a_call_that_is_cancelled_from_outside_is_a_fault():
    async def check(swarm):
        original = swarm.transport.call

        async def call(name, layer_call):
            swarm.transport.call = original
            raise asyncio.CancelledError

        swarm.transport.call = call
        check_answer(swarm, numbers(1), await swarm.classify(numbers(1)))
        await until(lambda: set(states(swarm).values()) == {"healthy"})
        check_answer(swarm, numbers(1), await swarm.classify(numbers(1)))

    run(check)


def test_a_fault_of_the_router_itself_lets_nobody_wait(caplog):
    async def check(swarm):
        def decide(now):
            raise ZeroDivisionError("a fault")

        swarm._router._scheduler.decide = decide
        with pytest.raises(SwarmError, match="ended by a fault of its own: ZeroDivisionError"):
            await swarm.classify(numbers(1))
        with pytest.raises(SwarmError, match="ended by a fault of its own; see the log"):
            await swarm.classify(numbers(1))
        await swarm.restart_router()
        check_answer(swarm, numbers(1), await swarm.classify(numbers(1)))

    run(check)
    assert "The router ended by a fault of its own" in caplog.text
