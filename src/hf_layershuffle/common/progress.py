# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Functions that take `progress`. If it is False, nobody shows a bar: not we, nor datasets, nor transformers."""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import huggingface_hub.utils as hub
from transformers.utils import logging as transformers_logging


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
# Of a library: whether its bars were on, what switches them off, and what switches them on
_Switches = tuple[bool, Callable[[], object], Callable[[], object]]

_lock = threading.Lock()
_silent_calls = 0
_states: list[_Switches] = []


def silenceable(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Runs `function`, which has a keyword `progress`, without any progress bar if that is False."""

    @functools.wraps(function)
    def wrapper(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if kwargs.get("progress", True):
            return function(*args, **kwargs)
        with no_progress_bars():
            return function(*args, **kwargs)

    return wrapper


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Switches the libraries' bars off for the process, and then back as they were. Calls may overlap in threads."""
    global _silent_calls
    with _lock:
        if _silent_calls == 0:
            _states[:] = _read_states()
            for _, switch_off, _ in _states:
                switch_off()
        _silent_calls += 1
    try:
        yield
    finally:
        with _lock:
            _silent_calls -= 1
            if _silent_calls == 0:
                for is_on, switch_off, switch_on in _states:
                    (switch_on if is_on else switch_off)()


def _read_states() -> list[_Switches]:
    """Whether each library's bars are on, and its switches."""
    # transformers first: its switch is the Hub's too
    states: list[_Switches] = [
        (
            transformers_logging.is_progress_bar_enabled(),
            transformers_logging.disable_progress_bar,
            transformers_logging.enable_progress_bar,
        ),
        (not hub.are_progress_bars_disabled(), hub.disable_progress_bars, hub.enable_progress_bars),
    ]
    datasets = sys.modules.get("datasets")  # not imported for this alone
    if datasets is not None:
        is_on = not datasets.are_progress_bars_disabled()
        states.append((is_on, datasets.disable_progress_bars, datasets.enable_progress_bars))
    return states
