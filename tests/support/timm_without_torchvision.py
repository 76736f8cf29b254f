"""timm where there is no torchvision: a stand-in for the names that its import asks for.

torchvision cannot be installed beside the pinned PyTorch for CPUs. timm's models do not use it; its data loading does,
which no test here runs.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

import pytest
from torch import nn
from transformers.models.timm_wrapper import configuration_timm_wrapper, modeling_timm_wrapper
from transformers.utils import import_utils


_MODULES = ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional")
_MODES = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


def use_timm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """timm, as transformers and the training command have it where torchvision is installed too."""
    timm = _import_timm()
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "timm", (lambda: True, ""))
    monkeypatch.setattr("hf_layershuffle.training.model_building.is_timm_available", lambda: True)
    monkeypatch.setattr(modeling_timm_wrapper, "timm", timm, raising=False)
    for name in ("ImageNetInfo", "infer_imagenet_subset"):
        monkeypatch.setattr(configuration_timm_wrapper, name, getattr(timm.data, name), raising=False)
    return timm


def _import_timm() -> ModuleType:
    """Nothing of the stand-in is left for others to find."""
    if "timm" in sys.modules or find_spec("torchvision") is not None:
        return importlib.import_module("timm")
    with _stand_in():
        return importlib.import_module("timm")


@contextmanager
def _stand_in() -> Iterator[None]:
    names = [f"torchvision{name}" for name in _MODULES]
    for name in names:
        sys.modules[name] = _StandIn(name)
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, sys.modules[name])
    interpolation = type("InterpolationMode", (), {mode.upper(): mode for mode in _MODES})
    sys.modules["torchvision.transforms.functional"].InterpolationMode = interpolation
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class _StandIn(ModuleType):
    """A module that has an empty class of every name that begins as classes do."""

    __path__: list = []

    def __getattr__(self, name: str) -> type:
        if not name[:1].isupper():
            raise AttributeError(name)
        setattr(self, name, type(name, (nn.Module,), {}))
        return getattr(self, name)
