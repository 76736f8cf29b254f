"""Ray for one swarm: it is reached by its owner only, and ends without a trace however its process does."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT
from support.models import randomize
from support.processes import descendants, is_running, listening, no_ray_left, ray_folders, until
from support.swarm import states
from support.swarm import until as becomes

import hf_layershuffle as ls
from hf_layershuffle.swarm import ray_cluster
from hf_layershuffle.swarm.answers import SwarmError
from hf_layershuffle.swarm.ray_cluster import RayCluster, remove_folders_of_the_dead


SECONDS = 180.0  # after which something hangs

ASK = """
import sys
from ray._raylet import GcsClient
print(GcsClient(address=sys.argv[1]).internal_kv_get(b"no-such-key", None, timeout=20))
"""

HOLD = """
import asyncio
import sys
import hf_layershuffle as ls

async def main():
    async with ls.Swarm.from_pretrained(sys.argv[1], workers=1):
        print("ready", flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


def ask(address: str, **environment: str) -> subprocess.CompletedProcess:
    """Asks a Ray something in a fresh process."""
    command = [sys.executable, "-c", ASK, address]
    variables = ENVIRONMENT | environment
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=SECONDS)


def test_only_who_has_the_token_is_answered_and_nothing_is_left(tmp_path):
    with no_ray_left():
        cluster = RayCluster()
        try:
            cluster.start()
            processes = descendants(os.getpid())
            assert ray_folders() == {cluster.folder} and cluster.folder.stat().st_mode & 0o777 == 0o700
            token = cluster.folder / "token"
            assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) == 64
            assert {host for host, _ in listening(processes)} <= {"127.0.0.1", "::1"}

            import ray

            address = ray.get_runtime_context().gcs_address
            with pytest.raises(SwarmError, match="Ray is initialised in this process already"):
                RayCluster().start()
            with pytest.raises(SwarmError, match="this Ray runs already"):
                cluster.start()
            answer = ask(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
            assert (answer.returncode, answer.stdout) == (0, "None\n"), answer.stderr
            (tmp_path / "other").write_text("0" * 64)
            for others in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}):
                answer = ask(address, **others)
                assert answer.returncode == 1 and "nauthenticated" in answer.stderr, answer
        finally:
            cluster.stop()
        cluster.stop()
        assert not token.parent.exists() and not any(map(is_running, processes))


# Ray tries its first process for half a minute
@pytest.mark.slow
@pytest.mark.parametrize("how", ["at its first process", "after its last"])
def test_a_ray_that_cannot_start_leaves_nothing(how, monkeypatch):
    import ray
    from ray._private import services

    started, init = set(), ray.init

    def fail(*args, **kwargs) -> None:
        init(*args, **kwargs)
        started.update(descendants(os.getpid()))
        raise OSError("no space left\nfor this")

    if how == "after its last":
        monkeypatch.setattr(ray, "init", fail)
        message = r"Ray could not start \(OSError: no space left for this\)\."
    else:
        monkeypatch.setattr(services, "GCS_SERVER_EXECUTABLE", "/bin/false")
        message = r"Ray could not start \("
    cluster = RayCluster()
    with no_ray_left():
        with pytest.raises(SwarmError, match=message):
            cluster.start()
        assert not ray_folders() and not any(map(is_running, started))
        cluster.stop()
    assert (len(started) > 3) == (how == "after its last")
    until(lambda: "ray-home" not in {thread.name for thread in threading.enumerate()})


def test_a_ray_that_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SwarmError, match=r'Ray is missing; install it by `pip install "hf-layershuffle\[swarm\]"`'):
        RayCluster().start()


@pytest.mark.slow
def test_a_swarm_whose_workers_cannot_load_leaves_nothing(vit, tmp_path):
    folder = tmp_path / "model"
    vit.classifier(shuffle_mode="arbitrary").save_pretrained(folder)
    swarm = ls.Swarm.from_pretrained(folder, workers=1)
    (folder / "model.safetensors").write_bytes(b"damaged")

    async def main() -> None:
        async with swarm:
            raise AssertionError("it started")

    with no_ray_left():
        with pytest.raises((SwarmError, ValueError, OSError), match=r"worker-0|safetensors|[Hh]eader"):
            asyncio.run(asyncio.wait_for(main(), SECONDS))


def name_of(process_id: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{process_id}/cmdline").read_text().strip(" \0")
    return ""


@pytest.mark.slow  # a service that is ended by a signal is in test_cli_swarm.py
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_process_that_is_ended(how):
    command = [sys.executable, "-c", HOLD, ls.example_model()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=ENVIRONMENT, text=True, **pipes)
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        processes, folders = descendants(process.pid), ray_folders()
        assert len(processes) > 4 and len(folders) == 1
        process.send_signal(how)
        process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait(30)
    agents = set() if how is signal.SIGINT else {each for each in processes if name_of(each).endswith("Agent")}
    until(lambda: not any(map(is_running, processes - agents)))
    if how is signal.SIGKILL:  # nobody was left to remove its folder, and to end what else waits a minute for Ray
        remove_folders_of_the_dead()  # as the next start does
        until(lambda: not any(map(is_running, agents)))
    assert not [folder for folder in folders if folder.exists()]


def test_a_socket_elsewhere_would_be_seen():
    with socket.create_server(("0.0.0.0", 0)), socket.create_server(("::", 0), family=socket.AF_INET6):
        assert {"0.0.0.0", "::"} <= {host for host, _ in listening({os.getpid()})}


def test_folders_of_processes_that_run_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(ray_cluster.tempfile, "gettempdir", lambda: str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    mine, dead, other = (tmp_path / f"ls-ray-{name}-abc" for name in (os.getpid(), ended.pid, "word"))
    for folder in (mine, dead, other):
        folder.mkdir()
    remove_folders_of_the_dead()
    assert mine.exists() and other.exists() and not dead.exists()


@pytest.mark.slow  # test_swarm.py has a short one
@pytest.mark.parametrize("num_requests", [60, 500])
def test_no_request_is_lost_or_wrong_when_processes_are_killed_and_stopped(num_requests, vit, tmp_path):
    model = randomize(vit.classifier(num_hidden_layers=4, shuffle_mode="arbitrary")).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(num_requests, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    async def main() -> tuple[list, dict]:
        options = {"max_queue": num_requests, "call_timeout": 2.0, "suspect_timeout": 5.0, "max_wait": SECONDS}
        swarm = ls.Swarm.from_pretrained(tmp_path, workers=4, replicas=2, max_skips=1, **options)
        async with swarm:
            process_ids = {worker["name"]: worker["process_id"] for worker in swarm.status()["workers"]}
            tasks = [asyncio.create_task(swarm.classify(image)) for image in images]
            signals = {"worker-0": signal.SIGKILL, "worker-1": signal.SIGSTOP, "worker-2": signal.SIGKILL}
            for number, (name, how) in enumerate(signals.items(), 1):
                await becomes(lambda due=number * num_requests // 5: sum(map(asyncio.Task.done, tasks)) >= due, 60)
                os.kill(process_ids[name], how)
            answers = await asyncio.wait_for(asyncio.gather(*tasks), SECONDS)
            await becomes(lambda: set(states(swarm).values()) == {"healthy"}, 60)
            now = {worker["name"]: worker["process_id"] for worker in swarm.status()["workers"]}
            assert all(now[name] != process_ids[name] for name in ("worker-0", "worker-2"))
            return answers, swarm.metrics()

    with no_ray_left():
        answers, counted = asyncio.run(main())
    assert (counted["accepted"], counted["answered"], counted["failed"]) == (num_requests, num_requests, {})
    for image, answer in zip(images, answers):
        with torch.no_grad():
            expected = model(pixel_values=image, execution_order=answer.execution_order).logits
        torch.testing.assert_close(answer.logits, expected, atol=1e-5, rtol=0)
        skipped = [skip.layer for skip in answer.skipped]
        assert sorted(answer.execution_order + skipped) == list(range(4)) and len(skipped) <= 1
