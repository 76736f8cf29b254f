# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The command `hf-layershuffle`: one module a command.

It stands beside the package, not in it, so that `--help` answers without importing torch: importing `hf_layershuffle`
registers models with transformers. A command imports what it needs when it runs.
"""

import atexit
import gc
import logging
import signal
import sys
import traceback
from importlib import metadata
from typing import Annotated

import typer

from . import analyze, budget, evaluate, merge, prune, publish, swarm, train


logger = logging.getLogger("hf_layershuffle")
app = typer.Typer(
    name="hf-layershuffle",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"hf-layershuffle {metadata.version('hf-layershuffle')}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, measure, analyse, prune, merge and publish transformers whose layers run in any order."""


# What a stopped command leaves behind
STOPPED = {
    "evaluate": "stopped; run the same command again to go on",
    "budget": "stopped; run the same command again to go on behind the policies that are done",
    "train": "stopped; the same command goes on from the last checkpoint, or starts anew if there is none",
    "swarm simulate": "stopped; run the same command again to go on",
    "publish": "stopped; run the same command again. The Hub shows a commit whole or not at all",
}

app.command(context_settings=train.SETTINGS)(train.train)
for command in (evaluate.evaluate, budget.budget, analyze.analyze, prune.prune, merge.merge, publish.publish):
    app.command()(command)
app.add_typer(swarm.app)


REPORT_AT = "https://github.com/hf-layershuffle/hf-layershuffle/issues"


MAKE_ROOM = ". Make room on the disk, or write to another one"


def main() -> None:
    """Runs a command.

    What a user can cause is one line on the standard error and exit code 2. What is a fault of this program keeps its
    traceback, says so, and has exit code 1.

    Readers of others' files turn whatever goes wrong there into a `ValueError` or an `OSError` (`explained_reading`).
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a request to terminate ends as Ctrl-C does
    atexit.register(gc.freeze)  # else Python looks through all objects of torch when it ends
    names = (" ".join(sys.argv[1 : 1 + number]) for number in (2, 1))
    stopped = next((STOPPED[name] for name in names if name in STOPPED), "stopped; nothing was written")
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        fail(stopped, 130)
    except (ValueError, OSError) as error:
        logger.debug("", exc_info=True)
        fail(f"error: {' '.join(str(error).split())}{MAKE_ROOM if is_disk_full(error) else ''}", 2)
    except Exception as error:
        message = explain(error)
        if message is None:
            traceback.print_exc()
            fail(
                "this is a fault of the program, not of what was asked; please report it with the lines above: "
                f"{REPORT_AT}",
                1,
            )
        logger.debug("", exc_info=True)
        fail(f"error: {message}", 2)
    if code == 130:  # so typer returns from Ctrl-C
        fail(stopped, 130)
    sys.exit(code)


def is_disk_full(error: Exception) -> bool:
    if not isinstance(error, OSError) or error.errno is None:
        return False
    from hf_layershuffle.common.files import DISK_FULL

    return error.errno in DISK_FULL


def explain(error: Exception) -> str | None:
    """What a user can do about an error that is no `ValueError` or `OSError`, in one line; None if it is our fault."""
    if hasattr(error, "format_message"):  # the usage errors of typer have no public base class
        message = " ".join(error.format_message().split()).rstrip(".")
        return f"{message}{'' if message.endswith('?') else '.'} See --help."
    if isinstance(error, ImportError) and not (error.name or "").startswith("hf_layershuffle"):
        return f"a package is missing or does not fit: {' '.join(str(error).split())}"
    if type(error).__name__ == "SafetensorError" and "Error while serializing" in str(error):
        return f"{error}{MAKE_ROOM}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        detail = (str(error).strip().splitlines() or ["out of memory"])[0]
        return (
            f"there is not enough memory ({detail}); take a smaller --batch_size, another --device or --dtype bfloat16"
        )
    return None


def fail(message: str, code: int) -> None:
    print(f"hf-layershuffle: {message}", file=sys.stderr)
    sys.exit(code)
