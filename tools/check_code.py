"""Checks what ruff and mypy do not: sizes of files and functions, and that public arguments have types.

    python tools/check_code.py        # or `make lint`; prints a line for each fault, exit code 1 if there is one

A file of the package has at most 350 lines. The body of a function, without its docstring, has at most 50 lines.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path


SOURCE = Path(__file__).resolve().parents[1] / "src"
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_BODY = 350, 50


def faults_of(path: Path) -> Iterator[str]:
    """A line for each fault of a file."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(SOURCE)
    num_lines = len(text.splitlines())
    if num_lines > MOST_LINES_OF_A_FILE:
        yield f"{name}: {num_lines} lines; at most {MOST_LINES_OF_A_FILE}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            where = f"{name}:{node.lineno}: `{node.name}`"
            num_lines = lines_of_body(node)
            if num_lines > MOST_LINES_OF_A_BODY:
                yield f"{where} has a body of {num_lines} lines; at most {MOST_LINES_OF_A_BODY}"
            yield from (f"{where}: the argument `{argument}` has no type" for argument in untyped_arguments(node))


def lines_of_body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines without signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def untyped_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Of a public function or an `__init__`: what it takes by name without a type."""
    if function.name.startswith("_") and function.name != "__init__":
        return []
    arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    return [each.arg for each in arguments if each.annotation is None and each.arg not in ("self", "cls")]


def main() -> int:
    faults = [fault for path in sorted(SOURCE.rglob("*.py")) for fault in faults_of(path)]
    print(
        "\n".join(faults)
        or f"Sizes and types of arguments: {len(list(SOURCE.rglob('*.py')))} files are as they should be."
    )
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
