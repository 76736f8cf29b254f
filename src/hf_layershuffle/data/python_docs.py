# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Real texts that every machine with Python has: passages of the documentation inside the standard library."""

import ast
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value


# Modules and packages of Python 3.10 to 3.14 by subject. Those that a version lacks are passed over
SUBJECTS = {
    "concurrency": "asyncio concurrent contextvars multiprocessing queue sched selectors signal subprocess threading",
    "development": "bdb cProfile doctest logging pdb pstats trace traceback unittest warnings",
    "files": "_pyio bz2 filecmp fileinput fnmatch glob gzip lzma os pathlib posixpath shutil tarfile tempfile zipfile",
    "formats": "configparser csv email html json mailbox mimetypes plistlib tomllib xml",
    "language": "abc ast collections contextlib copy dataclasses dis enum functools importlib inspect pickle typing",
    "network": "ftplib http imaplib ipaddress poplib smtplib socket socketserver ssl urllib wsgiref xmlrpc",
    "numbers": "_pydatetime _pydecimal calendar datetime fractions heapq numbers random statistics zoneinfo",
    "text": "argparse cmd codecs difflib gettext locale optparse pprint re shlex string textwrap",
}
PASSAGES_A_CLASS = 400
MIN_WORDS, MAX_WORDS = 16, 48
_FEWEST = 20  # passages of a class, below which it is no dataset


def load_python_docs() -> Dataset:
    """Passages of docstrings and comments of Python's standard library, labelled by what their module is about.

    The columns are `text` and `label`. There are eight classes of at most 400 passages, each of 16 to 48 words. They
    are read from the sources of the Python that runs, so they are the same in every call on one machine, and differ
    between versions of Python.

    Raises:
        `ValueError`: if this Python comes without its sources.
    """
    passages = [_passages_about(subject) for subject in SUBJECTS]
    columns = {
        "text": [text for texts in passages for text in texts],
        "label": [label for label, texts in enumerate(passages) for _ in texts],
    }
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(SUBJECTS))})
    return Dataset.from_dict(columns, features=features)


@cache
def _passages_about(subject: str) -> tuple[str, ...]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    modules = SUBJECTS[subject].split()
    found = list(dict.fromkeys(passage for module in modules for passage in _passages_of(folder, module)))
    if len(found) < _FEWEST:
        raise ValueError(
            f"The dataset 'python-docs' is read from the sources of Python's standard library, of which '{folder}' "
            f"holds too few (subject '{subject}'). Take a dataset of your own by --dataset_name."
        )
    # Evenly spaced, so that all modules have a part
    chosen = np.linspace(0, len(found) - 1, min(len(found), PASSAGES_A_CLASS)).round().astype(int)
    return tuple(found[index] for index in chosen)


def _passages_of(folder: Path, module: str) -> Iterator[str]:
    """The passages of a module, or of all modules of a package but its tests."""
    package = folder / module
    files = sorted(package.rglob("*.py")) if package.is_dir() else [folder / f"{module}.py"]
    for file in files:
        if not file.is_file() or {"test", "tests"} & set(file.relative_to(folder).parts):
            continue
        try:
            source = file.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, ValueError, SyntaxError):  # in another encoding
            continue
        words = " ".join((*_docstrings(tree), *_comments(source))).split()
        for start in range(0, len(words), MAX_WORDS):
            passage = words[start : start + MAX_WORDS]
            if len(passage) >= MIN_WORDS:
                yield " ".join(passage)


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def _comments(source: str) -> Iterator[str]:
    """The comments that stand on lines of their own, each block as one text."""
    block: list[str] = []
    for line in (*source.splitlines(), ""):
        stripped = line.strip()
        if stripped.startswith("#"):
            block.append(stripped.strip("#-=! "))
        elif block:
            yield " ".join(block)
            block = []
