# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The options that several commands share."""

from typing import Annotated

import typer


DatasetName = Annotated[
    str | None,
    typer.Option(
        "--dataset_name",
        help="digits, python-docs, a folder (Parquet, CSV, one folder a class, IDX, save_to_disk) or a Hub dataset "
        "id. Defaults to the one that the model's training.json names, if it can be found.",
    ),
]
DatasetConfigName = Annotated[
    str | None, typer.Option("--dataset_config_name", help="Configuration of a Hub dataset.")
]
EvalSplit = Annotated[
    str | None,
    typer.Option(
        "--eval_split", help="Split to evaluate on. Defaults to validation, then test, then a part of train."
    ),
]
Streaming = Annotated[
    bool,
    typer.Option(
        "--streaming", help="Store the evaluation split only, of images whose training split is read as a stream."
    ),
]
ImageColumn = Annotated[
    str | None, typer.Option("--image_column_name", help="Column of images. Defaults to the one found.")
]
TextColumn = Annotated[
    str | None, typer.Option("--text_column_name", help="Column of texts. Defaults to the one found.")
]
TextPairColumn = Annotated[
    str | None,
    typer.Option("--text_pair_column_name", help="Column of second texts. Defaults to the one found, if any."),
]
LabelColumn = Annotated[
    str | None, typer.Option("--label_column_name", help="Column of labels. Defaults to the one found.")
]
MaxSamples = Annotated[
    int | None, typer.Option("--max_samples", help="Use only this many images or texts, drawn by --seed.")
]
SkipDamaged = Annotated[
    bool,
    typer.Option(
        "--skip_damaged",
        help="Leave out images that cannot be read and rows without a text, instead of stopping at them.",
    ),
]
BatchSize = Annotated[int, typer.Option("--batch_size", help="Images or texts in a batch.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random, at least 0.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps, ... Defaults to the best there is.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="Dtype of the weights: float32, bfloat16 or float16.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub model.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust_remote_code",
        help="Run the code that a model, its image processor or its tokenizer brings, if you trust it.",
    ),
]
