"""Workers that come and go while requests run."""

import asyncio

import pytest
from support.swarm import check_answer, integer_swarm, nothing_left, numbers, states, until

from hf_layershuffle.swarm.answers import SwarmError


def run(check, **options) -> None:
    async def main() -> None:
        async with nothing_left():
            async with integer_swarm(**options) as swarm:
                stop = asyncio.Event()
                load = asyncio.create_task(under_load(swarm, stop))
                await asyncio.sleep(0.05)
                await asyncio.wait_for(check(swarm), 50)
                stop.set()
                assert await load > 0

    asyncio.run(main())


async def under_load(swarm, stop: asyncio.Event) -> int:
    """Sends requests until it shall stop; how many were answered, each as it should be."""
    number = 0
    while not stop.is_set():
        inputs = [numbers(number + i) for i in range(8)]
        answers = await asyncio.gather(*(swarm.classify(each) for each in inputs))
        for each, answer in zip(inputs, answers):
            check_answer(swarm, each, answer)
            assert not answer.skipped
        number += len(inputs)
    return number


def held(swarm) -> dict:
    return {worker["name"]: worker["layers"] for worker in swarm.status()["workers"]}


def test_a_worker_is_added_while_requests_run():
    async def check(swarm):
        assert await swarm.add_worker() == "worker-2"
        assert held(swarm)["worker-2"] == [0, 1]
        assert await swarm.add_worker([3]) == "worker-3"
        await until(lambda: all(worker["num_calls"] > 0 for worker in swarm.status()["workers"]))

    run(check, workers=2)


@pytest.mark.parametrize("layers", [[7], [], [1, 1], "01", [None]])
def test_layers_that_cannot_be_are_refused(layers):
    async def check(swarm):
        with pytest.raises(ValueError, match="`layers`"):
            await swarm.add_worker(layers)
        assert len(held(swarm)) == 4

    run(check)


def test_a_removed_worker_finishes_its_call_first():
    async def check(swarm):
        swarm.transport.seconds["worker-1"] = 0.3
        await until(lambda: any(worker["busy_with"] for worker in swarm.status()["workers"][1:2]))
        await swarm.remove_worker("worker-1")
        assert "worker-1" not in held(swarm)
        assert swarm.metrics()["faults"] == {}

    run(check, replicas=2)


def test_without_draining_its_call_is_made_again():
    async def check(swarm):
        swarm.transport.hang("worker-1")
        await until(lambda: any(worker["busy_with"] for worker in swarm.status()["workers"][1:2]))
        await swarm.remove_worker("worker-1", drain=False)
        assert "worker-1" not in held(swarm)

    run(check, replicas=2)


def test_the_last_holder_of_a_layer_stays_unless_others_load_it():
    async def check(swarm):
        message = r"worker-1 alone holds the layers \[1\].*`rebalance=True`.*`force=True`"
        with pytest.raises(SwarmError, match=message):
            await swarm.remove_worker("worker-1")
        assert states(swarm)["worker-1"] == "healthy"
        await swarm.remove_worker("worker-1", rebalance=True)
        assert sorted(layer for layers in held(swarm).values() for layer in layers) == [0, 1, 2, 3]
        await swarm.add_worker([2])
        await swarm.remove_worker("worker-2")  # no longer the last
        with pytest.raises(ValueError, match="There is no worker 'worker-2'; there are worker-0, worker-1, worker-3"):
            await swarm.remove_worker("worker-2")
        with pytest.raises(ValueError, match="There is no worker 'nobody'"):
            await swarm.kill_worker("nobody")

    run(check)


def test_with_force_a_layer_goes_with_its_worker():
    async def main() -> None:
        async with integer_swarm(max_skips=1) as swarm:
            await swarm.remove_worker("worker-1", force=True)
            answer = await swarm.classify(numbers(1))
            check_answer(swarm, numbers(1), answer)
            assert [(skip.layer, skip.reason) for skip in answer.skipped] == [(1, "worker-1 was removed")]
            await swarm.rebalance()
            assert not (await swarm.classify(numbers(1))).skipped

    asyncio.run(main())


def test_rebalancing_evens_out_what_workers_hold():
    async def check(swarm):
        await swarm.rebalance()
        assert sorted(map(len, held(swarm).values())) == [2, 2, 2]
        before = held(swarm)
        await swarm.rebalance()
        assert held(swarm) == before

    run(check, num_layers=6, placement={"worker-0": (0, 1, 2, 3), "worker-1": (4,), "worker-2": (5,)})


def test_a_worker_that_dies_while_it_loads_layers_comes_back():
    async def check(swarm):
        original = swarm.transport.load_layers

        async def load_layers(name, layers):
            swarm.transport.load_layers = original
            swarm.transport.seconds[name] = 0.5  # it is not back when the others drop layers
            await swarm.transport.transport.stop_worker(name, force=True)
            return await original(name, layers)

        swarm.transport.load_layers = load_layers
        await swarm.rebalance()
        await until(lambda: set(states(swarm).values()) == {"healthy"})
        assert {layer for layers in held(swarm).values() for layer in layers} == set(range(6))

    run(check, num_layers=6, placement={"worker-0": (0, 1, 2, 3), "worker-1": (4,), "worker-2": (5,)})


@pytest.mark.parametrize("error", [OSError("the file is gone"), ValueError("no such layer")])
def test_layers_that_cannot_be_read_are_an_error_that_names_the_worker(error):
    async def check(swarm):
        async def load_layers(name, layers):
            raise error

        swarm.transport.load_layers = load_layers
        before = held(swarm)
        with pytest.raises(SwarmError, match=rf"worker-1 could not load layers \[\d, 4\]: {error}"):
            await swarm.rebalance()
        assert held(swarm) == before

    run(check, num_layers=6, placement={"worker-0": (0, 1, 2, 3), "worker-1": (4,), "worker-2": (5,)})


def test_no_worker_comes_after_the_end():
    async def main() -> None:
        async with nothing_left(tasks=False):
            async with integer_swarm() as swarm:
                swarm.transport.seconds["worker-4"] = 0.3
                first = asyncio.create_task(swarm.add_worker([0]))
                waits = asyncio.create_task(swarm.add_worker([1]))
                await asyncio.sleep(0.05)
            for error in await asyncio.gather(first, waits, return_exceptions=True):
                assert isinstance(error, SwarmError)
            assert not swarm.transport.transport._workers

    asyncio.run(main())


def test_nobody_is_left_to_load_layers():
    async def main() -> None:
        async with integer_swarm(workers=1, restart=False) as swarm:
            await swarm.kill_worker("worker-0")
            await until(lambda: states(swarm)["worker-0"] == "dead")
            with pytest.raises(SwarmError, match="No worker is there that could hold further layers; add one"):
                await swarm.rebalance()
            await swarm.remove_worker("worker-0")
            assert held(swarm) == {}
            assert await swarm.add_worker() == "worker-0"
            check_answer(swarm, numbers(1), await swarm.classify(numbers(1)))

    asyncio.run(main())
