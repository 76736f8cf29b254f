"""Workers in threads."""

import asyncio
import threading

import pytest
import torch
from support.swarm import IntegerModel, IntegerTransport, nothing_left, until

from hf_layershuffle.swarm.answers import SwarmError
from hf_layershuffle.swarm.transport import LayerCall, WorkerFaultError, WorkerGoneError


STATES = torch.ones(2, 1, 1, dtype=torch.float64)


def call(layer: int = 0, position: int = 0) -> LayerCall:
    return LayerCall("request", layer, position, STATES, (), {"key": torch.tensor(1.0)})


def run(check) -> None:
    """Runs a check with a transport, and sees that nothing of it is left."""

    async def main() -> None:
        async with nothing_left():
            transport = IntegerTransport(IntegerModel())
            await transport.open()
            try:
                await check(transport)
            finally:
                await transport.close()
                await transport.close()

    asyncio.run(main())


def test_a_worker_says_what_it_is_and_runs_its_layers():
    async def check(transport):
        info = await transport.start_worker("a", [1, 2])
        assert (info.name, info.layers, info.process_id) == ("a", (1, 2), None)
        assert info.digests == {1: "digest-1", 2: "digest-2"}
        assert await transport.ping("a") == info
        result = await transport.call("a", call(2, 1))
        assert (result.layer, result.position) == (2, 1)
        with pytest.raises(WorkerFaultError, match="does not hold layer 0"):
            await transport.call("a", call(0))
        assert (await transport.load_layers("a", [0])).layers == (0,)
        await transport.call("a", call(0))

    run(check)


def test_each_worker_is_a_thread_and_runs_one_layer_at_a_time():
    async def check(transport):
        running, most, names = [], [], set()

        def slow(worker, layer_call):
            running.append(worker)
            most.append(running.count(worker))
            names.add(threading.current_thread().name)
            gate.wait(10)
            running.remove(worker)
            return layer_call.layer

        gate = threading.Event()
        for name in "ab":
            await transport.start_worker(name, [0])
            worker = transport._workers[name].worker
            worker.run = lambda layer_call, worker=worker: slow(worker, layer_call)
        calls = [asyncio.create_task(transport.call(name, call())) for name in "aabb"]
        while len(running) < 2:
            await asyncio.sleep(0.01)
        gate.set()
        assert await asyncio.gather(*calls) == [0] * 4
        assert max(most) == 1 and len(names) == 2

    run(check)


def test_what_a_killed_worker_was_asked_fails_at_once():
    async def check(transport):
        gate = threading.Event()
        await transport.start_worker("a", [0])
        transport._workers["a"].worker.run = lambda _: gate.wait(20)
        calls = [asyncio.create_task(transport.call("a", call())) for _ in range(3)]
        await asyncio.sleep(0.05)
        await transport.stop_worker("a", force=True)
        for each in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(each, WorkerGoneError)
        with pytest.raises(WorkerGoneError, match="a is not running"):
            await transport.ping("a")
        await transport.stop_worker("a", force=True)
        await transport.start_worker("a", [0])  # while the old thread still runs
        await transport.call("a", call())
        gate.set()

    run(check)


def test_threads_of_killed_workers_end_before_the_transport_does():
    async def check(transport):
        before = threading.active_count()
        for _ in range(10):
            await transport.start_worker("a", [0])
            await transport.stop_worker("a", force=True)
        await until(lambda: threading.active_count() == before)

    run(check)


def test_a_worker_that_is_stopped_finishes_its_call():
    async def check(transport):
        gate = threading.Event()
        await transport.start_worker("a", [0])
        transport._workers["a"].worker.run = lambda _: gate.wait(20)
        running = asyncio.create_task(transport.call("a", call()))
        await asyncio.sleep(0.05)
        stopping = asyncio.create_task(transport.stop_worker("a"))
        await asyncio.sleep(0.05)
        assert not stopping.done()
        gate.set()
        assert await running is True
        await stopping

    run(check)


def test_a_worker_that_cannot_be_made_leaves_nothing():
    async def check(transport):
        def broken(name, layers):
            raise MemoryError("no room")

        transport.make_worker = broken
        with pytest.raises(SwarmError, match=r"a could not load layers \[0\]: no room"):
            await transport.start_worker("a", [0])
        with pytest.raises(WorkerGoneError):
            await transport.ping("a")

    run(check)


def test_errors_of_a_layer_are_faults_of_the_worker():
    async def check(transport):
        await transport.start_worker("a", [0])
        transport._workers["a"].worker.run = lambda _: 1 / 0
        with pytest.raises(WorkerFaultError, match="a failed in layer 0: division by zero"):
            await transport.call("a", call())
        assert (await transport.ping("a")).name == "a"

    run(check)
