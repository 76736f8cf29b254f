"""A swarm for programs without an event loop."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ENVIRONMENT, REPOSITORY
from support.swarm import check_answer, integer_swarm, numbers

from hf_layershuffle.swarm.answers import SwarmClosedError, SwarmError


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "layershuffle" in thread.name]


def test_all_methods_wait_for_what_they_give(tmp_path):
    swarm = integer_swarm(journal=tmp_path)
    with swarm.blocking() as blocking:
        check_answer(swarm, numbers(1, 2), blocking.classify(numbers(1, 2), deadline=20.0, max_skips=0))
        check_answer(swarm, numbers(3), blocking.classify(numbers=numbers(3), request_id="a"))
        assert blocking.request_ids == []
        with pytest.raises(ValueError, match="There is no request 'a'"):
            blocking.answer("a")
        with pytest.raises(ValueError, match="holds NaN"):
            blocking.classify(numbers(float("nan")))
        assert blocking.add_worker([2]) == "worker-4"
        blocking.rebalance()
        blocking.remove_worker("worker-4", rebalance=True)
        blocking.kill_worker("worker-0")
        blocking.restart_router()
        check_answer(swarm, numbers(4), blocking.classify(numbers(4)))
        assert blocking.status()["in_flight"] == 0 and blocking.metrics()["answered"] == 3
        assert "layershuffle_swarm_requests_answered_total 3.0" in blocking.prometheus()
        blocking.drain()
        with pytest.raises(SwarmClosedError, match="takes no more requests"):
            blocking.classify(numbers(4))
    assert ours() == []
    assert blocking.status()["closed"] and blocking.metrics()["answered"] == 3
    with pytest.raises(SwarmClosedError, match="The swarm is closed"):
        blocking.classify(numbers(4))
    with pytest.raises(SwarmError, match="A swarm is started once"):
        blocking.__enter__()


def test_several_threads_use_it_at_the_same_time():
    swarm = integer_swarm(num_layers=6)
    with swarm.blocking() as blocking, ThreadPoolExecutor(8) as threads:
        inputs = [numbers(i, 2 * i) for i in range(60)]
        for each, answer in zip(inputs, threads.map(blocking.classify, inputs)):
            check_answer(swarm, each, answer)


def test_events_come_as_an_iterator_that_ends_with_the_swarm():
    with integer_swarm().blocking() as blocking:
        events = blocking.subscribe()
        blocking.classify(numbers(1))
        assert next(events)["type"] == "accepted"
    assert list(events) == []


def test_a_failed_start_and_an_error_inside_leave_nothing():
    swarm = integer_swarm()
    swarm.transport.start_faults["worker-1"] = 1
    with pytest.raises(SwarmError, match="worker-1 does not start"):
        swarm.blocking().__enter__()
    assert ours() == []
    with pytest.raises(SwarmError, match="The swarm was not started; use it in `with`"):
        integer_swarm().blocking().classify(numbers(1))
    with pytest.raises(KeyError):
        with integer_swarm().blocking():
            raise KeyError("a fault of the caller")
    assert ours() == []


INTERRUPTED = """
import asyncio, sys, threading
from support.swarm import integer_swarm, numbers

def blocking(swarm):
    with swarm.blocking() as each:
        print("started", flush=True)
        each.classify(numbers(1))

async def awaiting(swarm):
    async with swarm:
        print("started", flush=True)
        await swarm.classify(numbers(1))

async def starting(swarm):
    swarm.transport.seconds["worker-1"] = 100.0
    asyncio.get_running_loop().call_later(0.2, lambda: print("started", flush=True))
    async with swarm:
        pass

def blocked_start(swarm):
    swarm.transport.seconds["worker-1"] = 100.0
    threading.Timer(0.5, lambda: print("started", flush=True)).start()
    with swarm.blocking():
        pass

for way in (blocking, awaiting, starting, blocked_start):
    swarm = integer_swarm(suspect_timeout=100.0, start_timeout=100.0)
    original = swarm.transport.call
    async def call(name, layer_call, original=original):
        if layer_call.request_id != "warm-up":
            await asyncio.sleep(100)
        return await original(name, layer_call)
    swarm.transport.call = call
    try:
        outcome = way(swarm)
        if asyncio.iscoroutine(outcome):
            asyncio.run(outcome)
    except KeyboardInterrupt:
        left = [thread.name for thread in threading.enumerate() if "layershuffle" in thread.name]
        print("interrupted", left, len(swarm.transport.transport._workers), flush=True)
"""


def test_ctrl_c_leaves_nothing_running():
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY / "tests")])}
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        for _ in range(4):
            assert process.stdout.readline() == "started\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted [] 0\n"
        assert process.wait(30) == 0


def test_a_second_end_is_no_error():
    blocking = integer_swarm().blocking()
    with blocking:
        pass
    blocking.__exit__(None, None, None)
    never_started = integer_swarm().blocking()
    with pytest.raises(SwarmError, match="was not started"):
        never_started.__exit__(None, None, None)
