"""Tiny models built in memory, and a way to run Python the way a user does: in a fresh process, offline."""

import os
import signal
import subprocess
import sys
from pathlib import Path


# Nothing here may reach a network; read when the libraries are imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
import transformers

import hf_layershuffle as ls


torch.set_num_threads(1)
# A shell that starts the tests in the background lets them, and what they start, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]
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


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request) -> Architecture:
    return Architecture(request.param)


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


def run_python(code_or_script, *arguments, **kwargs):
    """Runs a script (`Path`) or code (`str`) with this interpreter in a fresh process."""
    program = [code_or_script] if isinstance(code_or_script, Path) else ["-c", code_or_script]
    return run_command([sys.executable, *program, *arguments], **kwargs)


def run_train(*arguments, **kwargs):
    """Runs `examples/train.py` on the CPU."""
    return run_python(REPOSITORY / "examples" / "train.py", *arguments, "--use_cpu", "True", **kwargs)
