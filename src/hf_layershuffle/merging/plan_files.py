# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Merge plans as YAML, and what is wrong with a file that is none."""

from collections.abc import Iterable

import yaml
from pydantic import ValidationError


class _FlowRows(yaml.SafeDumper):
    """Writes one layer a line."""


def _represent_mapping(dumper: yaml.SafeDumper, values: dict) -> yaml.MappingNode:
    return dumper.represent_mapping("tag:yaml.org,2002:map", values.items(), flow_style="source" in values)


_FlowRows.add_representer(dict, _represent_mapping)


def to_yaml(values: dict) -> str:
    """The text of a plan's file, with one layer a line."""
    return yaml.dump(
        values, Dumper=_FlowRows, sort_keys=False, default_flow_style=False, allow_unicode=True, width=110
    )


def explain_error(error: ValidationError, known_keys: Iterable[str]) -> str:
    """The first thing that is wrong with a plan, in one line.

    Args:
        error: As pydantic raised it.
        known_keys: The keys that a plan may have.
    """
    first = error.errors(include_url=False)[0]
    place = "".join(f"[{item}]" if isinstance(item, int) else f".{item}" for item in first["loc"]).lstrip(".")
    message = first["msg"].removeprefix("Value error, ")
    if not place:
        return message
    if first["type"] == "missing":
        return f"`{place}`: {message}."
    known = ", ".join(f"`{name}`" for name in known_keys)
    hint = f" (a plan has {known})" if first["type"] == "extra_forbidden" and len(first["loc"]) == 1 else ""
    return f"`{place}`: {message}{hint}; it is {first['input']!r}."
