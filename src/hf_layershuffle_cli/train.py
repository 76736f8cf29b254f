# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""`hf-layershuffle train`: a model trained so that its layers run in any order."""

import typer


# All options are read by transformers' parser for training arguments, which knows them
SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def train(context: typer.Context) -> None:
    """A model trained so that its layers run in any order."""
    from hf_layershuffle.training.session import run

    try:
        run(context.args, "hf-layershuffle train")
    except ImportError as error:  # an argument needs a package that is not installed
        raise ValueError(str(error)) from error
