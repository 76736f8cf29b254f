"""Tiny models built in memory, and ways to run a program offline: in this process or in a fresh one."""

import gc
import importlib.util
import io
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path


# Nothing here may reach a network; read when the libraries are imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# `pytest -m gpu` runs the tests that need a CUDA device. All others are of the CPU and see none
if not re.search(r" -m[ =]?.*(?<!not )\bgpu\b", " ".join(sys.argv)) and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Lets cuBLAS give the same numbers each time; read when it is first used
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
import transformers
from matplotlib.figure import Figure
from support.forked import run_forked

import hf_layershuffle as ls
import hf_layershuffle_cli
from hf_layershuffle.training.session import one_line_errors


torch.set_num_threads(1)
# What the libraries hold stays: no collection need look through it, nor a forked process copy it
gc.freeze()
# A shell that starts the tests in the background lets them, and what they start, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]
TRAIN = REPOSITORY / "examples" / "train.py"
TINY = dict(
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=8,
    patch_size=4,
    num_labels=5,
)
ARCHITECTURES = {
    "vit": (
        transformers.ViTConfig,
        transformers.ViTModel,
        transformers.ViTForImageClassification,
        ls.LayerShuffleViTConfig,
        ls.LayerShuffleViTModel,
        ls.LayerShuffleViTForImageClassification,
    ),
    "deit": (
        transformers.DeiTConfig,
        transformers.DeiTModel,
        transformers.DeiTForImageClassification,
        ls.LayerShuffleDeiTConfig,
        ls.LayerShuffleDeiTModel,
        ls.LayerShuffleDeiTForImageClassification,
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and `pytest -m gpu`")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


class Architecture:
    """The plain and the LayerShuffle classes of ViT or DeiT."""

    def __init__(self, name: str):
        self.name = name
        (
            self.plain_config_class,
            self.plain_model_class,
            self.plain_classifier_class,
            self.config_class,
            self.model_class,
            self.classifier_class,
        ) = ARCHITECTURES[name]

    def config(self, **kwargs):
        return self.config_class(**{**TINY, **kwargs})

    def classifier(self, seed: int = 0, attn_implementation: str | None = None, **kwargs):
        torch.manual_seed(seed)
        return self.classifier_class._from_config(self.config(**kwargs), attn_implementation=attn_implementation)

    def plain_classifier(self, seed: int = 0, attn_implementation: str | None = None, **kwargs):
        torch.manual_seed(seed)
        config = self.plain_config_class(**{**TINY, **kwargs})
        return self.plain_classifier_class._from_config(config, attn_implementation=attn_implementation)


# For what depends on the family: loading, saving, and being equal to the plain model
of_both_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES, indirect=True)


@pytest.fixture
def architecture(request) -> Architecture:
    """ViT, unless a test is `of_both_architectures`."""
    return Architecture(getattr(request, "param", "vit"))


@pytest.fixture
def vit() -> Architecture:
    return Architecture("vit")


@pytest.fixture
def batch() -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(6, 3, 8, 8, generator=generator),
        "labels": torch.randint(5, (6,), generator=generator),
    }


@pytest.fixture
def quick_pictures(monkeypatch) -> None:
    """Pictures are made as always and saved as a few bytes: drawing them takes most of the time of a command."""

    def savefig(figure, path, **kwargs) -> None:
        Path(path).write_bytes(b"a picture")

    monkeypatch.setattr(Figure, "savefig", savefig)
    monkeypatch.setattr(Figure, "draw_without_rendering", lambda figure: None)


def record_layer_calls(model) -> list[int]:
    """Hooks the layers; the returned list grows by a layer's index whenever that layer runs."""
    calls = []
    for index, layer in enumerate(model.base_model.layers):
        layer.register_forward_hook(lambda module, args, output, index=index: calls.append(index))
    return calls


# One thread, so that sums come out the same; on the CPU
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_command(command: list[str], cwd=None, environment: dict | None = None, timeout: float = 300):
    """Runs a command offline; returns the completed process with its text."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**ENVIRONMENT, **(environment or {})},
        timeout=timeout,
        capture_output=True,
        text=True,
    )


def run_python(
    code_or_script, *arguments, fresh: bool = False, cwd=None, environment: dict | None = None, timeout: float = 300
):
    """Runs a script (`Path`) or code (`str`) with this interpreter in a process of its own.

    Args:
        fresh: Whether the process is a fresh one, for what is told by its imports, memory or hashes. Else it has
            torch already, which saves seconds.
    """
    if not fresh and hasattr(os, "fork"):
        variables = {**ENVIRONMENT, **(environment or {})}
        return run_forked(code_or_script, [str(each) for each in arguments], variables, cwd, timeout)
    program = [code_or_script] if isinstance(code_or_script, Path) else ["-c", code_or_script]
    command = [sys.executable, *program, *arguments]
    return run_command(command, cwd=cwd, environment=environment, timeout=timeout)


def run_here(
    main: Callable[[], None], program: str, *arguments, cwd=None, errors: io.StringIO | None = None
) -> subprocess.CompletedProcess:
    """Runs a program's `main` in this process, which saves the seconds of its imports.

    Returns what `run_command` does. The standard error holds what is logged too. Warnings are left to pytest.
    """
    argv = sys.argv
    folder = os.getcwd()
    output, errors = io.StringIO(), errors or io.StringIO()
    logged = logging.StreamHandler(errors)
    sys.argv = [program, *map(str, arguments)]
    logging.getLogger().addHandler(logged)
    try:
        os.chdir(cwd or folder)
        with redirect_stdout(output), redirect_stderr(errors):
            main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv
        os.chdir(folder)
        logging.getLogger().removeHandler(logged)
    return subprocess.CompletedProcess([program, *arguments], code, output.getvalue(), errors.getvalue())


def run_cli(*arguments, **kwargs) -> subprocess.CompletedProcess:
    """Runs `hf-layershuffle` in this process."""
    return run_here(hf_layershuffle_cli.main, "hf-layershuffle", *arguments, **kwargs)


def script(path: Path):
    """The module of a script outside the package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_train(*arguments, cwd=None) -> subprocess.CompletedProcess:
    """Runs `examples/train.py` on the CPU, in this process."""

    def main() -> None:
        with one_line_errors("train.py"):
            script(TRAIN).main(sys.argv[1:])

    return run_here(main, "train.py", *arguments, "--use_cpu", "True", cwd=cwd)


def assert_all_refused(run: Callable, program: str, cases: dict[str, list], cwd) -> None:
    """Each case is refused by one line that holds its key, or matches it where the key has a `|`, with exit code 2."""
    for message, arguments in cases.items():
        result = run(*arguments, cwd=cwd)
        assert result.returncode == 2, (arguments, result.stderr)
        lines = [line for line in result.stderr.splitlines() if line.startswith(program)]
        assert len(lines) == 1 and lines[0].startswith(f"{program}: error: "), (arguments, result.stderr)
        assert message in lines[0] or ("|" in message and re.search(message, lines[0])), (message, lines)
