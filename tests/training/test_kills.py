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


COMMAND = [sys.executable, "-m", "hf_layershuffle_cli", "train"]
# Arguments, and the steps between two checkpoints. The default run takes minutes
RUNS = {
    "small": (
        [
            *(
                "--use_cpu",
                "--hidden_size",
                "32",
                "--num_hidden_layers",
                "4",
                "--max_steps",
                "60",
                "--save_steps",
                "6",
            ),
            *("--final_eval_orders", "8", "--layerdrop", "0.2", "--depth_embedding", "--position_predictor"),
        ],
        6,
    ),
    "default": ([], 270),
}
pytestmark = pytest.mark.slow


class Run:
    """One of `RUNS`, with the weights of an uninterrupted run and the seconds that it took."""

    def __init__(self, name: str, folder):
        self.arguments, self.save_steps = RUNS[name]
        began = time.monotonic()
        self.weights = self.finish(folder)
        self.seconds = time.monotonic() - began

    def start(self, folder) -> subprocess.Popen:
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*COMMAND, *self.arguments, "--output_dir", str(folder)], env=ENVIRONMENT, **silent)

    def finish(self, folder) -> dict[str, torch.Tensor]:
        assert self.start(folder).wait() == 0
        assert not [path for path in folder.rglob("*") if ".partial-" in path.name]
        return load_file(folder / "model.safetensors")

    def assert_goes_on(self, folder) -> None:
        found = self.finish(folder)
        assert list(found) == list(self.weights)
        assert all(torch.equal(found[name], tensor) for name, tensor in self.weights.items())


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory) -> Run:
    return Run(request.param, tmp_path_factory.mktemp("whole") / "run")


def kill(process: subprocess.Popen) -> bool:
    """Whether it was still alive."""
    was_alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return was_alive


@pytest.mark.parametrize("seed", range(10))
def test_killed_at_a_random_moment(run, tmp_path, seed):
    process = run.start(tmp_path / "run")
    time.sleep(random.Random(seed).uniform(0.2, 0.95) * run.seconds)
    print("killed" if kill(process) else "ended before", sorted(tmp_path.glob("run/*")))
    run.assert_goes_on(tmp_path / "run")


@pytest.mark.parametrize("number", range(10))
def test_killed_while_it_saves(run, tmp_path, number):
    process = run.start(tmp_path / "run")
    checkpoint = tmp_path / "run" / f"checkpoint-{run.save_steps * (number + 1)}"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.001)
    time.sleep(0.004 * number)  # between the first and the last file
    assert kill(process)
    print(sorted(checkpoint.iterdir()))
    run.assert_goes_on(tmp_path / "run")
