"""Imports run down only: a room may import what stands before it in `FLOORS`.

What travels to the Hub imports nothing else of ours.
"""

import ast
from pathlib import Path

import pytest

import hf_layershuffle


PACKAGE = Path(hf_layershuffle.__file__).parent
FLOORS = (
    "common",
    "models",
    "checkpoints",
    "data",
    "layerwise",
    "deployment",
    "evaluation",
    "analysis",
    "compression",
    "merging",
    "adaptive",
    "plotting",
    "hub",
    "swarm",
    "training",
)
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.stem in FLOORS]


def imported_modules(path: Path):
    """Whole names of the package's modules that a file imports, anywhere in it, or names in a string."""
    package = ("hf_layershuffle", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = [node.module] if node.module else []
            # `from . import x` names a module too
            yield from (".".join([*above, *module, *([] if node.module else [alias.name])]) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            yield node.value  # such as import_module("hf_layershuffle.hub")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_down(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imported_modules(path):
        if name.startswith("hf_layershuffle."):
            other = name.split(".")[1]
            assert other == room or FLOORS.index(other) < FLOORS.index(room), f"{room} imports {name}"
            assert room != "models" or other == "models", f"{path.name} travels to the Hub and imports {name}"


def test_no_two_modules_import_each_other():
    imports = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(("hf_layershuffle", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        imports[name] = {other for other in imported_modules(path) if other.startswith("hf_layershuffle.")}
        imports[name].discard(name)  # the name of a logger
    done, under_way = set(), []

    def visit(name: str) -> None:
        assert name not in under_way, f"a circle of imports: {' -> '.join([*under_way, name])}"
        if name in done or name not in imports:
            return
        under_way.append(name)
        for other in sorted(imports[name]):
            visit(other)
        under_way.pop()
        done.add(name)

    for name in imports:
        if name != "hf_layershuffle":
            visit(name)
