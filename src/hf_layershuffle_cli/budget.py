# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""`hf-layershuffle budget`: accuracy against cost, for every way to run fewer layers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import inputs, options, outputs


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_layershuffle.data.image_dataset import ImageClassificationDataset


def budget(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id.")],
    dataset_name: options.DatasetName = None,
    dataset_config_name: options.DatasetConfigName = None,
    eval_split: options.EvalSplit = None,
    calibration_split: Annotated[
        str, typer.Option("--calibration_split", help="Split on which thresholds and programs are chosen.")
    ] = "train",
    calibration_fraction: Annotated[
        float | None,
        typer.Option(
            "--calibration_fraction",
            help="Choose on this fraction of that split alone: the part that training with --eval_split train "
            "--eval_fraction 0.1 held out.",
        ),
    ] = None,
    policies: Annotated[
        str | None, typer.Option("--policies", help="Such as exit-margin,evenly-spaced. Defaults to all there are.")
    ] = None,
    rivals: Annotated[
        list[str] | None,
        typer.Option("--rivals", metavar="NAME=MODEL", help="Another model to compare with; may be given repeatedly."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            help="Numbers of layers to run, such as 3,6. Defaults to a quarter, a third, a half and three quarters.",
        ),
    ] = None,
    image_column_name: options.ImageColumn = None,
    text_column_name: options.TextColumn = None,
    text_pair_column_name: options.TextPairColumn = None,
    label_column_name: options.LabelColumn = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output_dir",
            help="For the report and the picture. Defaults to outputs/budget, with --corruption blur to "
            "outputs/budget-blur.",
        ),
    ] = None,
    max_eval_samples: Annotated[
        int | None, typer.Option("--max_eval_samples", help="Report on this many images or texts, drawn by --seed.")
    ] = None,
    max_calibration_samples: Annotated[
        int, typer.Option("--max_calibration_samples", help="Choose on this many images or texts, drawn by --seed.")
    ] = 2000,
    num_search_samples: Annotated[
        int, typer.Option("--num_search_samples", help="Search programs on this many of these.")
    ] = 256,
    measure_time: Annotated[
        bool, typer.Option("--time/--no_time", help="Whether to measure time, at batch 1 and 64.")
    ] = True,
    corruption: Annotated[
        str | None,
        typer.Option(
            "--corruption",
            help="Report on images of lower quality: blur, noise or low_contrast. What is chosen is chosen on images "
            "as they are.",
        ),
    ] = None,
    skip_damaged: options.SkipDamaged = False,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Accuracy against multiply-adds and time, for every way a model has to run fewer layers.

    What a setting needs is chosen on the training split (better on a part of it that the model was not trained on: see
    --calibration_fraction) and measured on the evaluation split. Prints a table in which the Pareto front is marked,
    and writes budget.json and a picture, which replace those of an earlier run. A run that was stopped goes on.
    """
    from hf_layershuffle import evaluate_budget
    from hf_layershuffle.adaptive.budget_evaluation import check_policy_names

    paths = named_models(rivals)
    numbers = numbers_of(layers)
    check_options(corruption, seed, max_eval_samples=max_eval_samples, max_calibration_samples=max_calibration_samples)
    if output_dir is None:
        output_dir = Path("outputs", "budget" if corruption is None else f"budget-{corruption}")
    outputs.check_can_be_written(output_dir)
    outputs.claim(context, output_dir)
    loaded = inputs.load_model(model, device, dtype, revision, trust_remote_code)
    names = None if policies is None else [name.strip() for name in policies.split(",")]
    check_policy_names(names, loaded.model)
    others = {name: inputs.load_model(path, device, dtype, None, trust_remote_code) for name, path in paths.items()}
    check_rivals(others, loaded)
    dataset_name = inputs.dataset_of([model], dataset_name, revision)
    split: dict[str, Any] = {"dataset_config_name": dataset_config_name} | inputs.columns_of(
        image_column_name, text_column_name, text_pair_column_name, label_column_name
    )
    data = inputs.load_split(loaded.model, "test", dataset_name, eval_split=eval_split, **split)
    held_out = calibration_data(
        loaded.model, dataset_name, calibration_split, calibration_fraction, eval_split=eval_split, **split
    )
    if skip_damaged:
        data = inputs.without_damaged(data, loaded, max_eval_samples, seed)
        held_out = inputs.without_damaged(held_out, loaded, max_calibration_samples, seed)
    if corruption is not None:
        data = of_lower_quality(data, loaded, corruption, max_eval_samples, seed)
    report = evaluate_budget(
        loaded.model,
        data,
        held_out,
        policies=names,
        rivals={name: other.model for name, other in others.items()},
        num_layers_run=numbers,
        processing_class=loaded.processing_class,
        batch_size=batch_size,
        max_samples=max_eval_samples,
        max_calibration_samples=max_calibration_samples,
        num_search_samples=num_search_samples,
        measure_time=measure_time,
        seed=seed,
        model_name=outputs.short_name(model),
        dataset_name=outputs.short_name(dataset_name) + ("" if corruption is None else f" (corruption: {corruption})"),
        progress_file=output_dir / ".budget.json",
    )
    with outputs.shown_before(report.table(), output_dir):
        report.plot().save(output_dir)
        report.save(output_dir)


def check_options(corruption: str | None, seed: int, **counts: int | None) -> None:
    """Raises a `ValueError` if there is no such corruption, the seed is below 0, or a count below 1. None is none."""
    from hf_layershuffle.common.checks import check_integers
    from hf_layershuffle.data.corruptions import check_corruption

    check_integers(seed=(seed, 0), **{name: (1 if value is None else value, 1) for name, value in counts.items()})
    if corruption is not None:
        check_corruption(corruption)


def of_lower_quality(
    data: "Dataset", loaded: inputs.LoadedModel, corruption: str, max_samples: int | None, seed: int
) -> "ImageClassificationDataset":
    """The images, corrupted, of all or of as many as `seed` draws.

    Raises:
        `ValueError`: if the model's inputs are texts.
    """
    from hf_layershuffle.checkpoints.tokenizers import takes_texts
    from hf_layershuffle.data.corruptions import corrupted
    from hf_layershuffle.data.image_reading import draw_rows
    from hf_layershuffle.layerwise import as_layerwise

    if takes_texts(loaded.model.config):
        raise ValueError(f"`corruption` is '{corruption}', but '{loaded.name}' is a model of texts; leave it out.")
    processor: Any = loaded.processing_class
    num_channels = as_layerwise(loaded.model).num_channels
    rows = draw_rows(len(data), max_samples, seed)
    return corrupted(data.select(rows), processor, corruption, seed=seed, num_channels=num_channels)


def named_models(rivals: list[str] | None) -> dict[str, str]:
    """Paths of models by name.

    Raises:
        `ValueError`: if one is not of the form NAME=MODEL, or a name comes twice.
    """
    found: dict[str, str] = {}
    for each in rivals or []:
        name, separator, path = each.partition("=")
        if not (name and separator and path):
            raise ValueError(f"`rivals` holds '{each}'; give NAME=MODEL, such as plain=outputs/plain.")
        if name in found:
            raise ValueError(f"`rivals` names '{name}' twice; give each rival a name of its own.")
        found[name] = path
    return found


def numbers_of(layers: str | None) -> list[int] | None:
    """Numbers of layers from a text such as "3,6"; None without one.

    Raises:
        `ValueError`: if it is something else.
    """
    try:
        return None if layers is None else [int(part) for part in layers.split(",")]
    except ValueError as error:
        raise ValueError(f"`layers` is '{layers}'; give numbers of layers such as 3,6.") from error


def check_rivals(rivals: dict[str, inputs.LoadedModel], loaded: inputs.LoadedModel) -> None:
    """Raises a `ValueError` where a rival cannot be compared with the model."""
    from hf_layershuffle.adaptive.budget_evaluation import check_rival

    for name, rival in rivals.items():
        inputs.check_same_inputs(f"the rival '{name}'", rival, loaded)
        check_rival(name, rival.model, loaded.model)


def calibration_data(
    model: "PreTrainedModel", dataset_name: str, split: str, fraction: float | None, *, eval_split: Any, **kwargs: Any
) -> "Dataset":
    """A split, or the fraction of it that training holds out to evaluate on.

    Raises:
        `ValueError`: if it cannot be apart from the evaluation split.
    """
    if fraction is None and split == "train":
        return inputs.load_split(model, "train", dataset_name, eval_split=eval_split, **kwargs)
    if split == eval_split:
        raise ValueError(
            f"`calibration_split` and `eval_split` are both '{split}'; choose on another split than the one to report "
            "on."
        )
    if fraction is None:
        return inputs.load_split(model, "test", dataset_name, eval_split=split, **kwargs)
    rest, held_out = (
        inputs.load_split(
            model, part, dataset_name, train_split=split, eval_split=split, eval_fraction=fraction, **kwargs
        )
        for part in ("train", "test")
    )
    if len(inputs.load_split(model, "train", dataset_name, train_split=split, eval_split=eval_split, **kwargs)) < len(
        rest
    ) + len(held_out):
        raise ValueError(
            f"'{dataset_name}' has one split only, of which a part is the evaluation split; leave out "
            "--calibration_fraction to choose on the rest of it."
        )
    return held_out
