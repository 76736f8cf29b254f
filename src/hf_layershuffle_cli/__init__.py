# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The command `hf-layershuffle`: one module a command.

It stands beside the package, not in it, so that `--help` answers without importing torch: importing `hf_layershuffle`
registers models with transformers. A command imports what it needs when it runs.
"""

import logging
import signal
import sys
from importlib import metadata
from typing import Annotated

import typer

from . import analyze, evaluate, merge, prune, publish, train


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
    """Train, measure, analyse, prune, merge and publish vision transformers whose layers run in any order."""


# What a stopped command leaves behind
STOPPED = {
    "evaluate": "stopped; run the same command again to go on",
    "train": "stopped; run the same command again to go on from the last checkpoint",
    "publish": "stopped; run the same command again. The Hub shows a commit whole or not at all",
}

app.command(context_settings=train.SETTINGS)(train.train)
for command in (evaluate.evaluate, analyze.analyze, prune.prune, merge.merge, publish.publish):
    app.command()(command)


def main() -> None:
    """Runs a command; bad input is one line on the standard error and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a request to terminate ends as Ctrl-C does
    stopped = STOPPED.get(sys.argv[1] if len(sys.argv) > 1 else "", "stopped; nothing was written")
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        fail(stopped, 130)
    except (ValueError, OSError) as error:
        logger.debug("", exc_info=True)
        fail(f"error: {' '.join(str(error).split())}", 2)
    except Exception as error:  # the usage errors of typer have no public base class
        if not hasattr(error, "format_message"):
            raise
        message = " ".join(error.format_message().split()).rstrip(".")
        fail(f"error: {message}{'' if message.endswith('?') else '.'} See --help.", 2)
    if code == 130:  # so typer returns from Ctrl-C
        fail(stopped, 130)
    sys.exit(code)


def fail(message: str, code: int) -> None:
    print(f"hf-layershuffle: {message}", file=sys.stderr)
    sys.exit(code)
