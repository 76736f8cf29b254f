"""Workers that start, are suspected, come back, die and are restarted."""

import asyncio
import logging

import pytest
from support.swarm import check_answer, integer_swarm, nothing_left, numbers, states, until

from hf_layershuffle.swarm import life
from hf_layershuffle.swarm.answers import SwarmError


HEALTHY = {"healthy"}


def run(check, **options) -> None:
    async def main() -> None:
        async with nothing_left():
            async with integer_swarm(**options) as swarm:
                await asyncio.wait_for(check(swarm), 50)

    asyncio.run(main())


async def answered(swarm, *values: float) -> None:
    inputs = numbers(*values)
    check_answer(swarm, inputs, await swarm.classify(inputs))


def changes(swarm, worker: str) -> dict:
    return swarm.metrics()["worker_changes"][worker]


def test_workers_are_warmed_up_before_they_count_as_ready():
    async def check(swarm):
        assert swarm.transport.num_calls == {"worker-0": 2, "worker-1": 2}  # each layer once
        assert all(worker["num_calls"] == 0 for worker in swarm.status()["workers"])

    run(check, workers=2)


def test_a_slow_first_call_condemns_nobody():
    async def main() -> None:
        swarm = integer_swarm(call_timeout=0.3, suspect_timeout=0.3)
        swarm.transport.seconds = dict.fromkeys(("worker-0", "worker-1", "worker-2", "worker-3"), 1.0)
        async with swarm:
            swarm.transport.seconds.clear()
            await answered(swarm, 1)
            assert changes(swarm, "worker-0") == {"starting": 1, "healthy": 1}

    asyncio.run(main())


def test_a_stopped_worker_gets_no_work_and_is_taken_back_when_it_answers():
    async def check(swarm):
        swarm.transport.hang("worker-2")
        await until(lambda: states(swarm)["worker-2"] == "suspect")  # found by a ping, as nothing is asked of it
        task = asyncio.create_task(swarm.classify(numbers(7)))
        await asyncio.sleep(0.1)
        assert not task.done() and swarm.transport.num_calls["worker-2"] == 1
        swarm.transport.go_on("worker-2")
        check_answer(swarm, numbers(7), await task)
        assert changes(swarm, "worker-2") == {"starting": 1, "healthy": 2, "suspect": 1}
        assert swarm.metrics()["restarts"] == 0

    run(check, suspect_timeout=20.0)


def test_a_worker_that_does_not_recover_is_ended_and_restarted(caplog):
    async def check(swarm):
        swarm.transport.hang("worker-2")
        await asyncio.gather(*(answered(swarm, i) for i in range(5)))
        assert set(states(swarm).values()) == HEALTHY
        assert changes(swarm, "worker-2")["dead"] == 1
        assert swarm.metrics()["restarts"] == 1

    run(check, call_timeout=0.3, suspect_timeout=0.3)
    assert "worker-2 took longer than 0.3 s for layer 2, and it did not recover within 0.3 s" in caplog.text


def test_the_death_of_an_idle_worker_is_seen_and_its_layers_come_back():
    async def check(swarm):
        await swarm.kill_worker("worker-1")
        await until(lambda: changes(swarm, "worker-1").get("dead"))
        await until(lambda: set(states(swarm).values()) == HEALTHY)
        await answered(swarm, 4)
        assert [worker["layers"] for worker in swarm.status()["workers"]] == [[0], [1], [2], [3]]

    run(check)


def test_a_worker_that_fails_once_is_tried_out_and_goes_on():
    async def check(swarm):
        swarm.transport.fail("worker-0", "nan")
        await answered(swarm, 4)
        await until(lambda: set(states(swarm).values()) == HEALTHY)
        assert changes(swarm, "worker-0") == {"starting": 1, "healthy": 2, "suspect": 1}
        swarm.transport.fail("worker-0", "nan")  # later: not in a row
        await answered(swarm, 5)
        assert swarm.metrics()["restarts"] == 0

    run(check)


@pytest.mark.parametrize("kind", ["nan", "shape", "dtype", "layer", "position", "nothing", "raises", "strange"])
def test_a_worker_that_always_fails_is_restarted(kind):
    async def check(swarm):
        swarm.transport.fail("worker-0", kind, times=100)
        await answered(swarm, 4)
        assert changes(swarm, "worker-0")["dead"] == 1 and swarm.metrics()["restarts"] == 1

    run(check)


def test_a_worker_that_fails_requests_but_no_trial_is_restarted():
    async def check(swarm):
        original = swarm.transport.call

        async def call(name, layer_call):
            if layer_call.request_id != "warm-up" and name == "worker-0" and not swarm.metrics()["restarts"]:
                return None
            return await original(name, layer_call)

        swarm.transport.call = call
        await answered(swarm, 4)
        assert changes(swarm, "worker-0") == {"starting": 2, "healthy": 3, "suspect": 1, "dead": 1}

    run(check)


def test_restarts_pause_longer_each_time_and_end(monkeypatch, caplog):
    monkeypatch.setattr(life, "FIRST_PAUSE", 0.013)
    pauses = []
    sleep = asyncio.sleep

    async def noted(seconds, *rest):
        pauses.append(seconds)
        await sleep(seconds, *rest)

    async def check(swarm):
        swarm.transport.start_faults["worker-3"] = 100
        monkeypatch.setattr(life.asyncio, "sleep", noted)
        await swarm.kill_worker("worker-3")
        await until(lambda: "worker-3: it was restarted 5 times, and is tried again in 60 s" in caplog.text)
        monkeypatch.undo()
        # Its layer is given to another one
        await until(lambda: any(3 in worker["layers"] for worker in swarm.status()["workers"][:3]))
        await answered(swarm, 4)
        assert states(swarm)["worker-3"] == "dead" and swarm.transport.start_faults["worker-3"] == 94

    run(check, health_interval=0.5)
    assert [pause for pause in pauses if pause in (0.013, 0.026, 0.052, 0.104)] == [0.013, 0.026, 0.052, 0.104]


def test_when_no_worker_is_left_a_new_one_takes_all_layers(monkeypatch):
    monkeypatch.setattr(life, "FIRST_PAUSE", 0.001)

    async def check(swarm):
        for name in ("worker-0", "worker-1"):
            swarm.transport.start_faults[name] = 100
            await swarm.kill_worker(name)
        task = asyncio.create_task(swarm.classify(numbers(3)))
        await until(lambda: all(worker.is_given_up for worker in swarm._life.workers.values()))
        assert await swarm.add_worker([2]) == "worker-2"
        check_answer(swarm, numbers(3), await task)
        assert swarm.status()["workers"][2]["layers"] == [0, 1, 2, 3]

    run(check, workers=2)


def test_without_restart_the_dead_stay_dead():
    async def check(swarm):
        await swarm.kill_worker("worker-1")
        await until(lambda: states(swarm)["worker-1"] == "dead")
        await asyncio.sleep(0.3)
        assert states(swarm)["worker-1"] == "dead" and swarm.metrics()["restarts"] == 0
        await swarm.rebalance()
        await answered(swarm, 4)

    run(check, restart=False)


@pytest.mark.parametrize("part", [1, "depth_embedding"])
def test_another_checkpoint_is_refused_at_the_start(part):
    async def main() -> None:
        async with nothing_left():
            swarm = integer_swarm()
            swarm.model.digests["depth_embedding"] = "depth"
            swarm.transport.digests = {
                name: {"depth_embedding": "depth"} for name in ("worker-0", "worker-2", "worker-3")
            }
            swarm.transport.digests["worker-1"] = {"depth_embedding": "depth", part: "of another model"}
            named = "the depth embedding" if part == "depth_embedding" else "layer 1"
            message = f"worker-1 on local holds another checkpoint than the router: {named} has the digest of another"
            with pytest.raises(SwarmError, match=message):
                async with swarm:
                    pass

    asyncio.run(main())


def test_another_checkpoint_is_refused_at_a_restart_and_of_a_new_worker(caplog):
    async def check(swarm):
        swarm.transport.digests["worker-1"] = {1: "changed on the disk"}
        await swarm.kill_worker("worker-1")
        await until(lambda: "worker-1 did not start again: worker-1 on local holds another checkpoint" in caplog.text)
        del swarm.transport.digests["worker-1"]
        await until(lambda: set(states(swarm).values()) == HEALTHY)
        swarm.transport.digests["worker-4"] = {0: "changed on the disk"}
        with pytest.raises(SwarmError, match="worker-4 on local holds another checkpoint than the router: layer 0"):
            await swarm.add_worker([0])
        assert list(states(swarm)) == ["worker-0", "worker-1", "worker-2", "worker-3"]
        await answered(swarm, 4)

    run(check)


def test_a_worker_that_takes_too_long_to_start_is_refused():
    async def main() -> None:
        async with nothing_left():
            swarm = integer_swarm(start_timeout=0.2)
            swarm.transport.seconds["worker-1"] = 20.0
            with pytest.raises(SwarmError, match=r"worker-1 did not run layer 1 within 0.2 s \(`start_timeout`\)"):
                async with swarm:
                    pass

    asyncio.run(main())


def test_a_worker_that_does_not_start_lets_the_swarm_not_start():
    async def main() -> None:
        async with nothing_left():
            swarm = integer_swarm()
            swarm.transport.start_faults["worker-3"] = 1
            with pytest.raises(SwarmError, match="worker-3 does not start"):
                await swarm.__aenter__()

    asyncio.run(main())


def test_a_busy_worker_is_not_suspected_by_pings(monkeypatch):
    monkeypatch.setattr(life, "PING_TIMEOUT", 0.4)

    async def check(swarm):
        swarm.transport.seconds["worker-1"] = 0.7
        original = swarm.transport.ping

        async def ping(name):  # as of an actor, which answers after its call
            while any(worker["name"] == name and worker["busy_with"] for worker in swarm.status()["workers"]):
                await asyncio.sleep(0.01)
            return await original(name)

        swarm.transport.ping = ping
        await asyncio.gather(answered(swarm, 3), answered(swarm, 4))
        assert changes(swarm, "worker-1") == {"starting": 1, "healthy": 1}

    run(check, health_interval=0.02)


def test_a_worker_that_loads_layers_is_not_suspected_by_pings(monkeypatch):
    monkeypatch.setattr(life, "PING_TIMEOUT", 0.4)

    async def check(swarm):
        original_load, original_ping = swarm.transport.load_layers, swarm.transport.ping
        loading: set[str] = set()

        async def load_layers(name, layers):
            loading.add(name)
            await asyncio.sleep(1.2)
            loading.remove(name)
            return await original_load(name, layers)

        async def ping(name):  # as of an actor, which answers after it has loaded
            while name in loading:
                await asyncio.sleep(0.01)
            return await original_ping(name)

        swarm.transport.load_layers, swarm.transport.ping = load_layers, ping
        await swarm.rebalance()
        assert swarm.metrics()["restarts"] == 0
        assert sorted(len(worker["layers"]) for worker in swarm.status()["workers"]) == [2, 2]

    run(check, placement={"worker-0": (0, 1, 2), "worker-1": (3,)}, health_interval=0.02, suspect_timeout=0.5)


def test_numbers_that_cannot_be_are_refused():
    for name in ("health_interval", "suspect_timeout", "start_timeout"):
        for value in (0, -1.0, float("nan"), float("inf"), "1", True):
            with pytest.raises(ValueError, match=f"`{name}` is .*; it must be a number of seconds above 0"):
                integer_swarm(**{name: value})


@pytest.fixture(autouse=True)
def warnings_shown(caplog):
    caplog.set_level(logging.INFO)


def test_a_worker_that_was_given_up_is_tried_again_later(monkeypatch):
    monkeypatch.setattr(life, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(life, "RESTARTS_COUNT_FOR", 0.5)

    async def check(swarm):
        swarm.transport.start_faults["worker-1"] = 100
        await swarm.kill_worker("worker-1")
        await until(lambda: swarm._life.workers["worker-1"].is_given_up)
        swarm.transport.start_faults["worker-1"] = 0
        await until(lambda: states(swarm)["worker-1"] == "healthy")
        assert not swarm._life.workers["worker-1"].is_given_up
        await answered(swarm, 4)

    run(check)


def test_a_worker_that_is_killed_on_purpose_comes_back_each_time():
    async def check(swarm):
        for number in range(1, life.MOST_RESTARTS + 3):
            await swarm.kill_worker("worker-1")
            await until(lambda number=number: swarm.metrics()["restarts"] == number)
            await until(lambda: set(states(swarm).values()) == HEALTHY)
        await answered(swarm, 4)

    run(check)


def test_nothing_is_asked_of_a_swarm_that_is_not_ready():
    async def main() -> None:
        swarm = integer_swarm()
        swarm.transport.seconds = {"worker-0": 0.5}
        starting = asyncio.create_task(swarm.__aenter__())
        await until(lambda: "worker-0" in states(swarm))
        assert not starting.done()
        with pytest.raises(SwarmError, match="was not started"):
            await swarm.remove_worker("worker-0", force=True)
        with pytest.raises(SwarmError, match="was not started"):
            await swarm.classify(numbers(1))
        await starting
        swarm.transport.seconds.clear()
        await answered(swarm, 4)
        await swarm.__aexit__(None, None, None)

    asyncio.run(main())


def test_a_worker_that_was_removed_may_still_be_told_of():
    async def check(swarm):
        swarm._life.succeeded("worker-9", 0.1)
        swarm._life.timed_out("worker-9", "it took long")
        assert set(states(swarm).values()) == HEALTHY

    run(check)


def test_requests_that_fail_on_any_worker_end_each_worker_once_at_most():
    async def check(swarm):
        original = swarm.transport.call

        async def call(name, layer_call):
            return None if layer_call.request_id.startswith("poison") else await original(name, layer_call)

        swarm.transport.call = call
        for number in range(12):
            with pytest.raises(SwarmError, match=r"tried 2 times|Its inputs may be the cause"):
                await swarm.classify(numbers(number), request_id=f"poison-{number}")
        assert 1 <= swarm.metrics()["restarts"] <= 4
        await answered(swarm, 4)

    run(check, max_attempts=2)
