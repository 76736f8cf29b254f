# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Transformers whose layers run in any order (LayerShuffle, arXiv 2407.04513).

Public names stand in `__init__.pyi` and are imported when they are first used. So loading a model does not wait for
datasets, the Trainer or matplotlib. `LayerShuffle<Class>` is the class <Class> of transformers with free order.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

from .common.reports import Report
from .models.modeling_layershuffle import LayerShuffleMixin
from .models.registration import register_auto_classes


__version__ = "0.1.0"

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_MODULE_OF = {
    alias.name: f".{line.module}" for line in _STUB.body if isinstance(line, ast.ImportFrom) for alias in line.names
}
__all__ = sorted(_MODULE_OF)

register_auto_classes()
# What models and reports do by rooms that stand above theirs
LayerShuffleMixin.publisher = staticmethod(lambda: import_module(".hub.publishing", __name__))
Report.publishing = staticmethod(lambda: import_module(".hub.publishing", __name__))
Report.drawing = staticmethod(lambda: import_module(".plotting", __name__))


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name], __name__), name)
    elif name.startswith("LayerShuffle"):
        value = _made_on_demand(name)
    else:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    globals()[name] = value  # the next access does not come here
    return value


def _made_on_demand(name: str) -> type:
    for module in ("configuration_layershuffle", "modeling_layershuffle"):
        value = getattr(import_module(f".models.{module}", __name__), name, None)
        if value is not None:
            return value
    raise AttributeError(
        f"module '{__name__}' has no attribute '{name}'; `LayerShuffle<Class>` is made of the class <Class> of "
        "transformers."
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
