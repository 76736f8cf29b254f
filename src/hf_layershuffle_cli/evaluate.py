# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""`hf-layershuffle evaluate`: what order and missing layers cost."""

from pathlib import Path
from typing import Annotated

import typer

from . import options


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Folders or Hub ids.")],
    dataset_name: options.DatasetName = "digits",
    dataset_config_name: options.DatasetConfigName = None,
    eval_split: options.EvalSplit = None,
    image_column_name: options.ImageColumn = None,
    label_column_name: options.LabelColumn = None,
    output_dir: Annotated[Path, typer.Option("--output_dir", help="For the reports and the pictures.")] = Path(
        "outputs/robustness"
    ),
    num_orders: Annotated[int, typer.Option("--num_orders", help="Arbitrary orders, at least 1.")] = 32,
    num_subsets: Annotated[
        int, typer.Option("--num_subsets", help="Random subsets of each number of layers, at least 1.")
    ] = 8,
    max_samples: options.MaxSamples = None,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    revision: options.Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Evaluate again what has a report already.")] = False,
) -> None:
    """Accuracy of models in any order and with layers missing.

    Prints one table and writes a JSON report and pictures: for one model into the output folder, for several into a
    folder each, with the pictures of all beside them. A model that has a report made with the same settings is not
    evaluated again, and an evaluation that was stopped goes on.
    """
    from hf_layershuffle import compare_reports, evaluate_robustness
    from hf_layershuffle.plotting import save_report_pictures

    names = options.distinct_names(models)
    folders = [output_dir / name.strip("./").replace("/", "--") if len(names) > 1 else output_dir for name in names]
    for folder in folders:
        options.check_not_a_file(folder)
    settings = {"num_orders": num_orders, "num_subsets": num_subsets, "seed": seed}
    evaluations = []  # all is loaded before the first evaluation starts, so that bad input shows at once
    for name, name_or_path in zip(names, models):
        loaded = options.load_model(name_or_path, device, dtype, revision)
        data = options.load_evaluation_split(
            loaded.model,
            dataset_name,
            dataset_config_name=dataset_config_name,
            eval_split=eval_split,
            image_column=image_column_name,
            label_column=label_column_name,
        )
        evaluations.append((name, loaded, data))

    dataset, reports = options.short_name(dataset_name), {}
    for (name, loaded, data), folder in zip(evaluations, folders):
        expected = settings | {"dataset": dataset, "num_images": min(max_samples or len(data), len(data))}
        reports[name] = None if overwrite else find_report(folder, loaded.model, expected)
    for (name, loaded, data), folder in zip(evaluations, folders):
        if reports[name] is None:
            reports[name] = evaluate_robustness(
                loaded.model,
                data,
                image_processor=loaded.image_processor,
                max_samples=max_samples,
                batch_size=batch_size,
                model_name=name,
                dataset_name=dataset,
                progress_file=folder / ".evaluation.npz",
                **settings,
            )
            reports[name].save(folder)
        save_report_pictures({name: reports[name]}, folder)
    if len(reports) > 1:
        save_report_pictures(reports, output_dir)
    options.print_table(compare_reports(reports) if len(reports) > 1 else reports[names[0]].table())
    print(f"Saved to {output_dir}")


def find_report(folder: Path, model, expected: dict):
    """The report in the folder, if there is one of the same model, data and settings.

    Raises:
        `ValueError`: if there is another one.
    """
    from hf_layershuffle import RobustnessReport
    from hf_layershuffle.layerwise import weights_digest
    from hf_layershuffle.report import REPORT_FILE

    if not (folder / REPORT_FILE).exists():
        return None
    report = RobustnessReport.load(folder)
    expected = expected | {"weights": weights_digest(model), "dtype": str(model.dtype).removeprefix("torch.")}
    found = {**report.to_dict(), **report.config, **report.environment}
    for name, value in expected.items():
        if found.get(name) != value:
            raise ValueError(
                f"'{folder}' holds a report of another evaluation (`{name}` is {found.get(name)!r} there and {value!r} here); "
                "choose another --output_dir, or add --overwrite to replace it."
            )
    return report
