# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The command `hf-layershuffle`. What a command needs is imported when it runs."""

import logging
import sys

import typer


logger = logging.getLogger("hf_layershuffle")
app = typer.Typer(
    name="hf-layershuffle",
    help="Measure, prune and analyse vision transformers whose layers run in any order.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Runs a command; bad input is one line on the standard error and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        logger.debug("", exc_info=True)
        print(f"hf-layershuffle: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
