"""A run that is killed, at random moments and while it saves, ends with the weights of the uninterrupted one."""

import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ENVIRONMENT
from safetensors.torch import load_file


COMMAND = [
    *(sys.executable, "-m", "hf_layershuffle_cli", "train", "--use_cpu", "--hidden_size", "32"),
    *("--num_hidden_layers", "4", "--max_steps", "60", "--save_steps", "6", "--final_eval_orders", "8"),
    *("--layerdrop", "0.2", "--depth_embedding", "--position_predictor", "--save_total_limit", "2"),
]


def start(folder) -> subprocess.Popen:
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([*COMMAND, "--output_dir", str(folder)], env=ENVIRONMENT, **silent)


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Its weights, and the seconds that it took."""
    folder, began = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
    assert start(folder).wait() == 0
    return load_file(folder / "model.safetensors"), time.monotonic() - began


def finish(folder) -> dict[str, torch.Tensor]:
    assert start(folder).wait() == 0
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_a_random_moment(whole, tmp_path, seed):
    weights, seconds = whole
    process = start(tmp_path / "run")
    time.sleep(random.Random(seed).uniform(0.3, 1.0) * seconds)
    kill(process)
    found = finish(tmp_path / "run")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_killed_while_it_saves(whole, tmp_path, number):
    weights, _ = whole
    process, checkpoint = start(tmp_path / "run"), tmp_path / "run" / f"checkpoint-{6 * (number + 1)}"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.001)
    time.sleep(0.004 * number)  # between the first and the last file
    kill(process)
    found = finish(tmp_path / "run")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
