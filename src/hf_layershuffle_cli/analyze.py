# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""`hf-layershuffle analyze`: what each layer does at each position."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import inputs, options, outputs


if TYPE_CHECKING:
    from hf_layershuffle.analysis import AnalysisReport


def analyze(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id.")],
    dataset_name: options.DatasetName = None,
    dataset_config_name: options.DatasetConfigName = None,
    eval_split: options.EvalSplit = None,
    image_column_name: options.ImageColumn = None,
    text_column_name: options.TextColumn = None,
    text_pair_column_name: options.TextPairColumn = None,
    label_column_name: options.LabelColumn = None,
    output_dir: Annotated[Path, typer.Option("--output_dir", help="For the numbers and the pictures.")] = Path(
        "outputs/analysis"
    ),
    num_orders: Annotated[
        int, typer.Option("--num_orders", help="Random orders; rounded up to a multiple of the number of layers.")
    ] = 32,
    embedding: Annotated[
        str, typer.Option("--embedding", help="pca, or umap (needs pip install umap-learn).")
    ] = "pca",
    num_attention_images: Annotated[
        int, typer.Option("--num_attention_images", help="Images with attention maps, at least 1.")
    ] = 3,
    max_samples: options.MaxSamples = None,
    skip_damaged: options.SkipDamaged = False,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """What each layer of a model does at each position.

    Measures updates of the residual stream by layer and position, reads the position from each layer's output with a
    linear probe, and compares outputs and attention maps between orders. Prints a table and writes analysis.json and
    pictures (PNG and SVG) into the output folder, where they replace those of an earlier analysis.
    """
    from hf_layershuffle.analysis import analysis

    analysis.check_embedding(embedding)
    outputs.check_can_be_written(output_dir)
    outputs.claim(context, output_dir)
    loaded = inputs.load_model(model, device, dtype, revision, trust_remote_code)
    dataset_name = inputs.dataset_of([model], dataset_name, revision)
    data = inputs.load_evaluation_split(
        loaded,
        dataset_name,
        dataset_config_name=dataset_config_name,
        eval_split=eval_split,
        **inputs.columns_of(image_column_name, text_column_name, text_pair_column_name, label_column_name),
        skip_damaged=skip_damaged,
        max_samples=max_samples,
        seed=seed,
    )
    report = analysis.analyze(
        loaded.model,
        data,
        processing_class=loaded.processing_class,
        num_orders=num_orders,
        seed=seed,
        batch_size=batch_size,
        max_samples=max_samples,
        embedding=embedding,
        num_attention_images=num_attention_images,
        model_name=outputs.short_name(model),
        dataset_name=outputs.short_name(dataset_name),
    )
    with outputs.shown_before(report.table(), output_dir):
        write_analysis(report, output_dir, data.features["label"].names)


def write_analysis(report: "AnalysisReport", output_dir: Path, class_names: list[str]) -> None:
    """Writes all files into a folder of their own first, and moves them out when all are complete.

    The numbers are moved last.
    """
    from hf_layershuffle.common.files import temporary_folder

    with temporary_folder(output_dir / "analysis") as folder:
        report.plot(class_names).save(folder)
        numbers = report.save(folder)
        pictures = [path for path in folder.iterdir() if path.suffix in (".png", ".svg")]
        for path in (*pictures, numbers):
            os.replace(path, output_dir / path.name)
