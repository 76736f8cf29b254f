# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Checks of arguments."""

import math


def check_integers(**values: tuple[object, int]) -> None:
    """Checks that each `name=(value, least)` is an integer of at least `least`.

    Raises:
        `ValueError`: if one is not.
    """
    for name, (value, least) in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least {least}.")


def check_seconds(**values: object) -> None:
    """Checks that each value is a number of seconds.

    Raises:
        `ValueError`: if one is none above 0 and below 1e9, some thirty years.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise ValueError(f"`{name}` is {str(value)[:40]}; it must be a number of seconds above 0 and below 1e9.")


def check_number(name: str, value: float, least: float, most: float) -> float:
    """A number in a range.

    Raises:
        `ValueError`: if it is not.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not least <= value <= most:
        raise ValueError(f"`{name}` is {value!r}; it must be a number from {least:g} to {most:g}.")
    return float(value)
