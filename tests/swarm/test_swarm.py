"""The swarm as a whole: equal to the local model, true answers whatever fails, and nothing left at the end."""

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from support.encoder_checks import plain_model
from support.encoders import ENCODERS
from support.models import randomize
from support.swarm import FaultyTransport, check_answer, integer_swarm, nothing_left, numbers, states, until

import hf_layershuffle as ls
from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.swarm import life
from hf_layershuffle.swarm.answers import MissingLayersError, SwarmClosedError, SwarmError
from hf_layershuffle.swarm.local_transport import LocalTransport


@pytest.mark.parametrize("policy", ["strict", "free"])
@pytest.mark.parametrize("name", ["ViT", "DINOv2", "BERT"])
def test_logits_are_those_of_the_local_model_in_the_recorded_order(name, policy, tmp_path):
    encoder = ENCODERS[name]
    plain_model(encoder).save_pretrained(tmp_path)
    inputs = {key: value for key, value in encoder.inputs().items() if isinstance(value, torch.Tensor)}
    local = load_classifier(tmp_path).eval()

    async def main() -> None:
        swarm = ls.Swarm.from_pretrained(tmp_path, transport="local", workers=2, policy=policy)
        async with swarm:
            batches = [{key: value[:count] for key, value in inputs.items()} for count in (1, 2)] * 3
            for batch, answer in zip(batches, await asyncio.gather(*(swarm.classify(each) for each in batches))):
                assert isinstance(answer, ls.SwarmAnswer) and answer.skipped == []
                assert sorted(answer.execution_order) == swarm.model.layers
                if policy == "strict":
                    assert answer.execution_order == swarm.model.layers
                with torch.no_grad():
                    expected = local(**batch, execution_order=answer.execution_order).logits
                torch.testing.assert_close(answer.logits, expected, atol=1e-5, rtol=0)

    asyncio.run(main())


async def faults_under_load(swarm, send, num_requests: int) -> list:
    """Sends requests, 24 at a time, while workers are killed, hang and give what cannot be right, and the router is
    restarted. Returns what became of each."""
    faulty = swarm.transport
    done = 0

    async def sender(numbers_left) -> None:
        nonlocal done
        for number in numbers_left:
            outcomes[number] = await send(number)
            done += 1

    outcomes: dict = {}
    numbers_left = iter(range(num_requests))
    senders = [asyncio.create_task(sender(numbers_left)) for _ in range(24)]
    steps = [
        lambda: swarm.kill_worker("worker-0"),
        lambda: faulty.fail("worker-1", "nan", 3),
        lambda: faulty.hang("worker-2"),
        lambda: faulty.fail("worker-3", "shape"),
        swarm.restart_router,
        lambda: faulty.fail("worker-3", "layer"),
        lambda: swarm.kill_worker("worker-1"),
        lambda: faulty.fail("worker-0", "nothing"),
        lambda: faulty.fail("worker-3", "dtype"),
    ]
    for number, step in enumerate(steps):
        await until(lambda number=number: done >= (number + 1) * num_requests // (len(steps) + 2))
        outcome = step()
        if outcome is not None:
            await outcome
    await asyncio.gather(*senders)
    return [outcomes[number] for number in range(num_requests)]


@pytest.mark.parametrize(("num_requests", "replicas", "skips"), [(500, 1, 0), (150, 2, 1)])
def test_no_request_is_lost_or_wrong_whatever_fails(num_requests, replicas, skips, vit, tmp_path):
    model = randomize(vit.classifier(num_hidden_layers=6, shuffle_mode="arbitrary")).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(num_requests, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    async def main() -> None:
        async with nothing_left():
            swarm = ls.Swarm.from_pretrained(
                tmp_path,
                transport=(faulty := FaultyTransport(LocalTransport(tmp_path))),
                replicas=replicas,
                max_skips=skips,
                call_timeout=2.0,
                suspect_timeout=1.0,
                health_interval=0.2,
            )
            swarm.transport = faulty
            async with swarm:
                answers = await faults_under_load(swarm, lambda i: swarm.classify(images[i]), num_requests)
                await until(lambda: set(states(swarm).values()) == {"healthy"})
                held = {layer for worker in swarm.status()["workers"] for layer in worker["layers"]}
                assert held == set(range(6))
                counted = swarm.metrics()
        assert (counted["accepted"], counted["answered"], counted["failed"]) == (num_requests, num_requests, {})
        assert counted["restarts"] >= 3  # two that were killed and the one that hung
        for image, answer in zip(images, answers):
            with torch.no_grad():
                expected = model(pixel_values=image, execution_order=answer.execution_order).logits
            torch.testing.assert_close(answer.logits, expected, atol=1e-5, rtol=0)
            skipped = [skip.layer for skip in answer.skipped]
            assert sorted(answer.execution_order + skipped) == list(range(6)) and len(skipped) <= skips

    asyncio.run(main())


# The same faults without Ray are above. What Ray's processes do when they are killed and stopped is in
# test_ray_transport.py, and a service over Ray whose worker is killed in test_cli_swarm.py
@pytest.mark.slow
def test_processes_that_are_killed_and_stopped_lose_no_request(vit, tmp_path):
    """With Ray: `kill -9` of a worker, SIGSTOP of another and a restart of the router, in one run."""
    model = randomize(vit.classifier(shuffle_mode="arbitrary")).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(60, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    async def main() -> list[int]:
        async with nothing_left():
            options = {"workers": 2, "call_timeout": 3.0, "suspect_timeout": 2.0, "max_wait": 120.0}
            async with ls.Swarm.from_pretrained(tmp_path, transport="ray", **options) as swarm:
                tasks = [asyncio.create_task(swarm.classify(image)) for image in images[:30]]
                first, second = (worker["process_id"] for worker in swarm.status()["workers"])
                await until(lambda: swarm.metrics()["answered"] > 5, seconds=60)
                os.kill(first, signal.SIGKILL)
                await swarm.restart_router()
                os.kill(second, signal.SIGSTOP)
                tasks += [asyncio.create_task(swarm.classify(image)) for image in images[30:]]
                for image, answer in zip(images, await asyncio.gather(*tasks)):
                    with torch.no_grad():
                        expected = model(pixel_values=image, execution_order=answer.execution_order).logits
                    torch.testing.assert_close(answer.logits, expected, atol=1e-5, rtol=0)
                    assert sorted(answer.execution_order) == [0, 1, 2, 3] and answer.skipped == []
                await until(lambda: set(states(swarm).values()) == {"healthy"}, seconds=120)
                assert swarm.metrics()["restarts"] == 2
                return [first, second, *(worker["process_id"] for worker in swarm.status()["workers"])]

    processes = asyncio.run(main())
    assert len(set(processes)) == 4
    assert not [process for process in processes if Path(f"/proc/{process}").exists()]


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[] if seed in (0, 2, 3, 4) else pytest.mark.slow) for seed in range(12)]
)
def test_random_faults_make_no_answer_wrong(seed, monkeypatch):
    """The layers are exact functions of integers, so a mixture of requests or another order would show."""
    monkeypatch.setattr(life, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(life, "MOST_RESTARTS", 1000)
    rng = random.Random(seed)
    options = {
        "policy": rng.choice(["free", "free", "strict"]),
        "max_skips": rng.choice([0, 1, 3]),
        "skip_after": rng.choice([None, 0.02]),
        "hedge": rng.choice([None, 0.01]),
        "replicas": rng.choice([1, 1, 2, 3]),
        "max_attempts": 4,
        "call_timeout": 0.3,
        "suspect_timeout": 0.3,
        "health_interval": 0.05,
    }

    async def main() -> None:
        async with nothing_left():
            async with integer_swarm(num_layers=rng.randint(4, 7), workers=3, max_queue=1000, **options) as swarm:
                requests = [numbers(*range(i, i + rng.randint(1, 3))) for i in range(120)]
                tasks = []
                for i, inputs in enumerate(requests):
                    tasks.append(asyncio.create_task(swarm.classify(inputs)))
                    if i % 5 == 0:
                        await disturb(swarm, rng)
                    await asyncio.sleep(rng.choice([0.0, 0.0, 0.01]))
                outcomes = await asyncio.gather(*tasks, return_exceptions=True)
                failed = 0
                for inputs, outcome in zip(requests, outcomes):
                    if isinstance(outcome, SwarmError):  # only for a reason that it says
                        assert isinstance(outcome, MissingLayersError) or "was given up" in str(outcome)
                        failed += 1
                    else:
                        check_answer(swarm, inputs, outcome)
                counted = swarm.metrics()
                assert counted["answered"] == len(requests) - failed
                assert failed <= 6, [str(outcome) for outcome in outcomes if isinstance(outcome, SwarmError)]
                swarm.transport.seconds.clear()
                await until(lambda: set(states(swarm).values()) == {"healthy"})
                check_answer(swarm, numbers(1), await swarm.classify(numbers(1)))

    asyncio.run(main())


async def disturb(swarm, rng: random.Random) -> None:
    name = rng.choice(list(states(swarm)))
    kind = rng.choice(["fail", "fail", "fail", "kill", "hang", "slow", "restart", "add", "rebalance"])
    if kind == "fail":
        swarm.transport.fail(name, rng.choice(FaultyTransport.KINDS), rng.randint(1, 2))
    elif kind == "kill":
        await swarm.kill_worker(name)
    elif kind == "hang" and name not in swarm.transport._going:
        swarm.transport.hang(name)
        if rng.random() < 0.5:
            asyncio.get_running_loop().call_later(
                0.2, lambda: name in swarm.transport._going and swarm.transport.go_on(name)
            )
    elif kind == "slow":
        swarm.transport.seconds = {name: 0.02}
    elif kind == "restart":
        await swarm.restart_router()
    elif kind == "add" and len(states(swarm)) < 5:
        try:
            await swarm.add_worker()
        except SwarmError:
            pass  # it may be killed while it starts
    elif kind == "rebalance":
        try:
            await swarm.rebalance()
        except SwarmError as error:
            assert "No worker is there" in str(error) or "did not" in str(error) or "layer" in str(error)


def test_arguments_that_cannot_be_are_refused_before_anything_starts(tmp_path):
    folder = ls.example_model()
    cases = {
        "`workers` is 0; it must be an integer": {"workers": 0},
        "`replicas` is 5, more than the 4 `workers`": {"replicas": 5},
        "`workers` is 7, but there are 6 layers": {"workers": 7},
        r"gives layers \[1, 2, 3, 4, 5\] to no worker": {"placement": [[0]]},
        "`policy` is 'fastest'; it must be one of free, strict": {"policy": "fastest"},
        "`max_skips` is 6, but only 6 layers run": {"max_skips": 6},
        "`deadline` is 0; it must be a number of seconds above 0": {"deadline": 0},
        "`call_timeout` is None": {"call_timeout": None},
        "`max_queue` is 0": {"max_queue": 0},
        "`health_interval` is -1": {"health_interval": -1},
        "`transport` is 'tcp'; it must be 'ray', 'local' or a `Transport`": {"transport": "tcp"},
        "`address` is 'auto', which only `transport='ray'` uses": {"address": "auto"},
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            ls.Swarm.from_pretrained(folder, **{"transport": "local", **arguments})
    with pytest.raises(TypeError, match=r"Swarm.from_pretrained\(\) got an unexpected keyword argument 'replica'"):
        ls.Swarm.from_pretrained(folder, transport="local", replica=2)
    with pytest.raises((OSError, ValueError), match="no-such-folder"):
        ls.Swarm.from_pretrained(tmp_path / "no-such-folder", transport="local")


def test_images_of_another_size_are_refused_and_the_others_answered():
    async def main() -> None:
        async with ls.Swarm.from_pretrained(ls.example_model(), transport="local", workers=2) as swarm:
            for shape in ((1, 3, 9, 9), (0, 3, 8, 8), (1, 1, 8, 8), (3, 8, 8)):
                with pytest.raises(ValueError, match=r"pixel_values"):
                    await swarm.classify(torch.zeros(shape))
            answer = await swarm.classify(torch.zeros(2, 3, 8, 8))
            assert answer.logits.shape == (2, 10)
            assert swarm.metrics()["accepted"] == 1

    asyncio.run(main())


def test_the_status_says_what_is_where():
    async def main() -> None:
        swarm = integer_swarm(suspect_timeout=20.0)
        assert swarm.status()["workers"] == []
        async with swarm:
            swarm.transport.hang("worker-1")
            task = asyncio.create_task(swarm.classify(numbers(1), request_id="a"))
            await until(lambda: swarm.status()["workers"][1]["busy_with"])
            status = swarm.status()
            assert status["workers"][1]["busy_with"] == {"request": "a", "layer": 1}
            assert (status["model"], status["layers"], status["in_flight"]) == ("integers", [0, 1, 2, 3], 1)
            assert status["policy"]["name"] == "free" and status["closed"] is False
            swarm.transport.go_on("worker-1")
            await task
            worker = swarm.status()["workers"][1]
            assert worker["num_calls"] == 1 and worker["mean_seconds"] > 0 and worker["busy_with"] is None
            assert (worker["state"], worker["device"], worker["process_id"]) == ("healthy", "cpu", None)
        assert swarm.status()["closed"]

    asyncio.run(main())


def test_at_the_end_accepted_requests_are_answered_but_not_after_an_error():
    async def main() -> None:
        async with nothing_left(tasks=False):
            async with integer_swarm() as swarm:
                tasks = [asyncio.create_task(swarm.classify(numbers(i))) for i in range(20)]
                await asyncio.sleep(0)
            for i, task in enumerate(tasks):
                check_answer(swarm, numbers(i), await task)
            with pytest.raises(ZeroDivisionError):
                async with integer_swarm() as swarm:
                    swarm.transport.hang("worker-0")
                    tasks = [asyncio.create_task(swarm.classify(numbers(i))) for i in range(20)]
                    await asyncio.sleep(0)
                    raise ZeroDivisionError
            for error in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(error, SwarmClosedError)
            with pytest.raises(SwarmClosedError, match="The swarm is closed"):
                await swarm.classify(numbers(1))
            with pytest.raises(SwarmError, match="A swarm is started once"):
                await swarm.__aenter__()

    asyncio.run(main())


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.01, 0.05, 0.2])
def test_a_cancelled_start_or_end_leaves_nothing(seconds):
    async def use() -> None:
        async with integer_swarm() as swarm:
            swarm.transport.seconds["worker-1"] = 20.0
            await asyncio.gather(*(swarm.classify(numbers(i)) for i in range(3)))

    async def main() -> None:
        async with nothing_left():
            task = asyncio.create_task(use())
            await asyncio.sleep(seconds)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())


def test_a_swarm_is_used_in_the_loop_that_started_it():
    swarm = integer_swarm()
    with swarm.blocking():
        with pytest.raises(SwarmError, match=r"runs in another event loop; use it there, or `swarm.blocking\(\)`"):
            asyncio.run(swarm.classify(numbers(1)))
