# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""YAML and JSON files of others, read so that none of them can do harm: with limits, and every fault as one line.

More is refused than by `yaml.safe_load` and `json.load`: files and nestings that are too large, keys that stand twice,
numbers that are not finite, and aliases that multiply (a few hundred bytes can stand for hundreds of megabytes).
"""

import json
import math
import os
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NoReturn

import yaml


MAX_YAML_BYTES = 2**18  # a plan of 100 layers that averages 40 models has 200,000
MAX_JSON_BYTES = 2**26
MAX_DEPTH = 50
MAX_NODES = 200_000  # values of a YAML text, with its aliases written out


def read_mapping(path: str | os.PathLike, what: str = "a mapping of names to values") -> dict:
    """Reads a YAML (or, by its name, JSON) file that holds one mapping with texts as its keys.

    Args:
        what: What the file should hold, for the message.

    Raises:
        `OSError`: if there is no such file.
        `ValueError`: naming the file, the line where it is known, and what is wrong.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file '{path}'. It must hold {what}.")
    values = (
        read_json(path) if path.suffix.lower() == ".json" else parse_yaml(_read(path, MAX_YAML_BYTES), f"'{path}'")
    )
    if not isinstance(values, dict):
        raise ValueError(f"'{path}' must hold {what}; it holds {_kind(values)}.")
    for key in values:
        if not isinstance(key, str):
            raise ValueError(f"'{path}' has the key {key!r}, which is {_kind(key)}; keys must be texts.")
    return values


def read_json(path: str | os.PathLike, kind: type | None = None) -> Any:
    """Reads a JSON file.

    Args:
        kind: `dict` or `list`, if it must hold one.

    Raises:
        `OSError`: if there is no such file.
        `ValueError`: naming the file and what is wrong.
    """
    path = Path(path)
    values = parse_json(_read(path, MAX_JSON_BYTES), f"'{path}'")
    if kind is not None and not isinstance(values, kind):
        raise ValueError(f"'{path}' must hold {_KINDS[kind]}; it holds {_kind(values)}.")
    return values


def parse_json(text: str, where: str) -> Any:
    """The values of a JSON text.

    Args:
        where: Where the text is from, for messages.

    Raises:
        `ValueError`: see [`read_json`].
    """
    try:
        values = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON in line {error.lineno}: {error.msg}.") from error
    except RecursionError:
        raise ValueError(_too_deep(where)) from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    level = [values]
    for _ in range(MAX_DEPTH + 1):
        level = [item for value in level if isinstance(value, (dict, list)) for item in _items(value)]
        if not level:
            return values
    raise ValueError(_too_deep(where))


def parse_yaml(text: str, where: str) -> Any:
    """The values of a YAML text.

    Args:
        where: Where the text is from, for messages.

    Raises:
        `ValueError`: see [`read_mapping`].
    """
    if len(text) > MAX_YAML_BYTES:  # PyYAML takes seconds for as much
        raise ValueError(f"{where} is larger than {MAX_YAML_BYTES:,} bytes, the most that such a text may have.")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{where} is not valid YAML{line}: {_one_line(error.problem or error.context)}.") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # such as 30 February, or a number of 5,000 digits
        raise ValueError(f"{where} is not valid YAML: {_one_line(error)}") from error
    except RecursionError:
        raise ValueError(_too_deep(where)) from None
    finally:
        if loader is not None:
            loader.dispose()


def _read(path: Path, max_bytes: int) -> str:
    if path.exists() and not path.is_file():  # a pipe or a device might never end
        raise ValueError(f"'{path}' is not a file; pass the path of one.")
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"'{path}' is larger than {max_bytes:,} bytes, the most that such a file may have.")
    try:
        return content.decode("utf-8-sig")  # editors of Windows write a mark at the start
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not text in UTF-8 ({error.reason} at byte {error.start:,}).") from error


class _Loader(yaml.SafeLoader):
    """Says where a nesting is too deep, a key stands twice, or a number is not finite."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"it is nested more than {MAX_DEPTH} levels deep", problem_mark=self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Hashable, int] = {}
        if isinstance(node, yaml.MappingNode):
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, Hashable) and key in lines:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key!r} is there already, in line {lines[key]}",
                        problem_mark=key_node.start_mark,
                    )
                if isinstance(key, Hashable):
                    lines[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        value = super().construct_yaml_float(node)
        if not math.isfinite(value):
            raise yaml.MarkedYAMLError(problem=f"{node.value} is not a finite number", problem_mark=node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def _measure(node: yaml.Node, sizes: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values a node stands for and how deep they are nested. An alias stands for all that it repeats."""
    if id(node) not in sizes:
        sizes[id(node)] = None  # until it is measured
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        children = [child for item in children for child in (item if isinstance(item, tuple) else (item,))]
        measured = [_measure(child, sizes) for child in children]
        size = 1 + sum(size for size, _ in measured)
        depth = 1 + max((depth for _, depth in measured), default=0)
        if size > MAX_NODES or depth > MAX_DEPTH:
            much = f"{MAX_NODES:,} values" if size > MAX_NODES else f"{MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(
                problem=f"with its aliases written out it has more than {much}", problem_mark=node.start_mark
            )
        sizes[id(node)] = (size, depth)
    found = sizes[id(node)]
    if found is None:
        raise yaml.MarkedYAMLError(problem="an alias stands inside of what it repeats", problem_mark=node.start_mark)
    return found


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {next(key for key in counts if counts[key] > 1)!r} is there more than once.")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number.")


def _finite_float(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse_constant(text)


def _items(value: dict | list) -> list:
    return list(value.values()) if isinstance(value, dict) else value


_KINDS: dict[type, str] = {
    dict: "a mapping of names to values",
    list: "a list",
    type(None): "nothing",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
}


def _kind(value: object) -> str:
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def _too_deep(where: str) -> str:
    return f"{where} is nested more than {MAX_DEPTH} levels deep."


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
