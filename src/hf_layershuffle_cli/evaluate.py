# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""`hf-layershuffle evaluate`: what order and missing layers cost."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import inputs, options, outputs


if TYPE_CHECKING:
    from datasets import Dataset

    from hf_layershuffle import RobustnessReport


def evaluate(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Folders or Hub ids.")],
    dataset_name: options.DatasetName = None,
    dataset_config_name: options.DatasetConfigName = None,
    eval_split: options.EvalSplit = None,
    streaming: options.Streaming = False,
    image_column_name: options.ImageColumn = None,
    text_column_name: options.TextColumn = None,
    text_pair_column_name: options.TextPairColumn = None,
    label_column_name: options.LabelColumn = None,
    output_dir: Annotated[Path, typer.Option("--output_dir", help="For the reports and the pictures.")] = Path(
        "outputs/robustness"
    ),
    num_orders: Annotated[int, typer.Option("--num_orders", help="Arbitrary orders, at least 1.")] = 32,
    num_subsets: Annotated[
        int, typer.Option("--num_subsets", help="Random subsets of each number of layers, at least 1.")
    ] = 8,
    max_samples: options.MaxSamples = None,
    skip_damaged: options.SkipDamaged = False,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Evaluate again what has a report already.")] = False,
) -> None:
    """Accuracy of models in any order and with layers missing.

    Prints one table and writes a JSON report and pictures: for one model into the output folder, for several into a
    folder each, with the pictures of all beside them. A model that has a report made with the same settings is not
    evaluated again, and an evaluation that was stopped goes on.
    """
    from hf_layershuffle import RobustnessReport, compare_reports, evaluate_robustness
    from hf_layershuffle.plotting import save_report_pictures

    names = outputs.distinct_names(models)
    folders = outputs.distinct_folders(output_dir, names) if len(names) > 1 else [output_dir]
    for folder in folders:
        outputs.check_can_be_written(folder)
    outputs.claim(context, output_dir, *folders)
    # All is loaded before the first evaluation starts, so that bad input shows at once
    loaded_models = [inputs.load_model(each, device, dtype, revision, trust_remote_code) for each in models]
    dataset_name = inputs.dataset_of(models, dataset_name, revision)
    columns = inputs.columns_of(image_column_name, text_column_name, text_pair_column_name, label_column_name)
    split: dict[str, Any] = {"dataset_config_name": dataset_config_name, "eval_split": eval_split, **columns}
    split |= {"streaming": streaming, "skip_damaged": skip_damaged, "max_samples": max_samples, "seed": seed}
    datasets = inputs.load_evaluation_splits(loaded_models, dataset_name, **split)
    settings: dict[str, Any] = {"num_orders": num_orders, "num_subsets": num_subsets, "seed": seed}
    dataset = outputs.short_name(dataset_name)
    evaluations = list(zip(names, loaded_models, datasets, folders))
    found: dict[str, RobustnessReport | None] = dict.fromkeys(names)
    if not overwrite:
        expected = settings | {"dataset": dataset}
        for name, loaded, data, folder in evaluations:
            found[name] = find_report(folder, loaded, data, max_samples, expected)
    reports: dict[str, RobustnessReport] = {}
    unsaved = None
    for name, loaded, data, folder in evaluations:
        report = found[name] or evaluate_robustness(
            loaded.model,
            data,
            processing_class=loaded.processing_class,
            max_samples=max_samples,
            batch_size=batch_size,
            model_name=name,
            dataset_name=dataset,
            progress_file=folder / ".evaluation.npz",
            **settings,
        )
        reports[name] = report
        try:  # a disk that is full now does not take the other models' numbers
            if found[name] is None:
                report.save(folder)
            save_report_pictures({name: report}, folder)
        except OSError as error:
            unsaved = error
    table = compare_reports(reports) if len(reports) > 1 else reports[names[0]].table()
    with outputs.shown_before(table, output_dir):
        if unsaved is not None:
            raise unsaved
        if len(reports) > 1:
            save_report_pictures(reports, output_dir)


def find_report(
    folder: Path, loaded: inputs.LoadedModel, data: "Dataset", max_samples: int | None, expected: dict[str, Any]
) -> "RobustnessReport | None":
    """The report in the folder, if there is one of the same model, data and settings.

    Raises:
        `ValueError`: if there is another report.
    """
    from hf_layershuffle import RobustnessReport
    from hf_layershuffle.evaluation.fingerprint import expected_report, other_than
    from hf_layershuffle.evaluation.report import REPORT_FILE

    if not (folder / REPORT_FILE).exists():
        return None
    report = RobustnessReport.load(folder)
    loader = loaded.batches(data, max_samples=max_samples, seed=expected["seed"])
    other = other_than(report, expected_report(loaded.model, loader, loaded.processing_class, **expected))
    if other is not None:
        raise ValueError(
            f"'{folder}' holds a report of another evaluation ({other}); choose another --output_dir, or add "
            "--overwrite to replace it."
        )
    return report
