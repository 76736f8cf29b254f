# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""`hf-layershuffle merge`: one model from layers of several."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from . import inputs, options, outputs


if TYPE_CHECKING:
    from hf_layershuffle.merging.plan import MergePlan, MergeSource
    from hf_layershuffle.merging.random_merges import RandomMergeReport


PLAN_SUFFIXES = (".yaml", ".yml", ".json")


def merge(
    context: typer.Context,
    sources: Annotated[
        list[str], typer.Argument(metavar="PLAN | SOURCE...", help="A plan's file, or folders and Hub ids.")
    ],
    output_dir: Annotated[
        Path | None, typer.Option("--output_dir", help="New folder for the merged model, or for --evaluate's report.")
    ] = None,
    num_random: Annotated[
        int | None,
        typer.Option("--random", help="Number of random merges of the sources: 1, or more with --evaluate."),
    ] = None,
    average: Annotated[bool, typer.Option("--average", help="The average of the sources, layer by layer.")] = False,
    num_layers: Annotated[
        int | None, typer.Option("--num_layers", help="For --random: depth. Defaults to the base's.")
    ] = None,
    any_layer: Annotated[
        bool, typer.Option("--any_layer", help="For --random: let any layer stand anywhere, instead of layer i at i.")
    ] = False,
    base: Annotated[
        int, typer.Option("--base", help="For --random: which source gives the rest, counted from 1.")
    ] = 1,
    no_position_heads: Annotated[
        bool, typer.Option("--no_position_heads", help="For --random: leave the position heads out.")
    ] = False,
    evaluate: Annotated[
        str | None,
        typer.Option("--evaluate", help="For --random: evaluate on this dataset, in memory; no model is written."),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option("--compare", help="For --evaluate: earlier reports to show beside this one. Repeatable."),
    ] = None,
    dataset_config_name: options.DatasetConfigName = None,
    eval_split: options.EvalSplit = None,
    image_column_name: options.ImageColumn = None,
    text_column_name: options.TextColumn = None,
    text_pair_column_name: options.TextPairColumn = None,
    label_column_name: options.LabelColumn = None,
    max_samples: options.MaxSamples = None,
    skip_damaged: options.SkipDamaged = False,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    trust_remote_code: options.TrustRemoteCode = False,
    max_shard_size: Annotated[
        str, typer.Option("--max_shard_size", help="Size of a weight file at most, such as 200MB.")
    ] = "5GB",
    trust_paths: Annotated[
        bool,
        typer.Option("--trust_paths", help="Let a plan name folders outside of its own and of the current one."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", help="Show the plan and check everything; write nothing.")
    ] = False,
) -> None:
    """One model from layers of several.

    Give a plan (YAML or JSON), or the sources and --random 1 or --average. A source is a LayerShuffle, ViT or DeiT
    classifier: a folder, or a Hub id, also as ID@REVISION. With --random N --evaluate DATASET, N random merges are
    evaluated beside their sources without being written.
    """
    is_plan = len(sources) == 1 and sources[0].endswith(PLAN_SUFFIXES)
    check_arguments(is_plan, num_random, average, evaluate, compare, output_dir, dry_run)
    check_random_only(
        num_random, base=base != 1, num_layers=num_layers is not None, any_layer=any_layer,
        no_position_heads=no_position_heads,
    )  # fmt: skip
    named = {} if is_plan else name_sources(sources, base)
    drawing: dict[str, Any] = {"num_layers": num_layers, "any_layer": any_layer, "seed": seed}
    if evaluate is not None:
        columns = inputs.columns_of(image_column_name, text_column_name, text_pair_column_name, label_column_name)
        split = {"dataset_config_name": dataset_config_name, "eval_split": eval_split, **columns}
        sizes = {"batch_size": batch_size, "max_samples": max_samples, "skip_damaged": skip_damaged}
        drawing |= {"num_merges": num_random, "base": list(named)[base - 1], **sizes}
        loading = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        report_folder = cast(Path, output_dir)  # `check_arguments` knows that it is given
        evaluate_merges(context, named, report_folder, evaluate, split, loading, compare or [], **drawing)
        return
    from hf_layershuffle.merging.plan import MergePlan

    if is_plan:
        plan = MergePlan.load(sources[0], trust_paths=trust_paths)
    elif average:
        plan = MergePlan.average(named)
    else:
        drawing |= {"base": list(named)[base - 1], "position_heads": not no_position_heads}
        plan = MergePlan.random(named, **drawing)
    write_merge(plan, output_dir, max_shard_size, dry_run)


def check_arguments(
    is_plan: bool,
    num_random: int | None,
    average: bool,
    evaluate: str | None,
    compare: list[Path] | None,
    output_dir: Path | None,
    dry_run: bool,
) -> None:
    """Raises a `ValueError` for options that do not go together."""
    if is_plan and (num_random is not None or average or evaluate is not None):
        raise ValueError("A plan says what to merge; --random, --average and --evaluate are for sources.")
    if not is_plan and (num_random is not None) + average != 1:
        raise ValueError("Say how to merge the sources: give --random 1 or --average, or pass a plan's file instead.")
    if num_random is not None and num_random < 1:
        raise ValueError(f"--random is {num_random}; it must be at least 1.")
    if evaluate is not None and num_random is None:
        raise ValueError(
            "--evaluate needs --random, the number of merges; evaluate a merge on disk with `hf-layershuffle "
            "evaluate`."
        )
    if evaluate is None and (num_random or 1) > 1:
        raise ValueError(
            f"--random {num_random} needs --evaluate DATASET; one merge at a time is written, by --random 1 and "
            "--seed."
        )
    if compare and evaluate is None:
        raise ValueError("--compare is for --evaluate.")
    if evaluate is not None and dry_run:
        raise ValueError("--dry_run is for a merge that would be written; --evaluate writes a report only.")
    if output_dir is None and not dry_run:
        raise ValueError("--output_dir is missing: the folder for the result.")


def check_random_only(num_random: int | None, **is_given: bool) -> None:
    """Raises a `ValueError` for options of random merges that would change nothing."""
    given = [f"--{name}" for name, is_there in is_given.items() if is_there]
    if given and num_random is None:
        raise ValueError(
            f"{', '.join(given)} would change nothing: for --random only. Say it in a plan's file instead."
        )


def name_sources(sources: list[str], base: int) -> "dict[str, MergeSource]":
    """The sources by short names.

    Args:
        sources: Folders or Hub ids, also as ID@REVISION.
        base: Number of the base, counted from 1, which is checked to be one of them.
    """
    from hf_layershuffle.checkpoints.locations import is_local, name_sources
    from hf_layershuffle.merging.plan import MergeSource

    revisions = [("@" in source and not is_local(source) and source.split("@", 1)[1]) or None for source in sources]
    paths = [source.split("@", 1)[0] if revision else source for source, revision in zip(sources, revisions)]
    if not 1 <= base <= len(paths):
        raise ValueError(f"--base is {base}; it must be from 1 to {len(paths)}, the number of sources.")
    named = name_sources(paths)
    return {name: MergeSource(path=path, revision=rev) for (name, path), rev in zip(named.items(), revisions)}


def write_merge(plan: "MergePlan", output_dir: Path | None, max_shard_size: str, dry_run: bool) -> None:
    """Writes the merge of a plan, or says what would be written."""
    from hf_layershuffle.hub.merged_folder import merge
    from hf_layershuffle.merging.merged_model import check_output_folder, prepare_merge, split_into_shards

    if output_dir is not None:
        outputs.check_can_be_written(output_dir)
    shard_size = int(max_shard_size) if max_shard_size.isdigit() else max_shard_size
    if not dry_run:
        merge(plan, cast(Path, output_dir), max_shard_size=shard_size)
        print(f"Saved to {output_dir}")
        return
    prepared = prepare_merge(plan)
    if output_dir is not None:
        check_output_folder(output_dir, prepared.sources)
    num_files = len(split_into_shards(prepared, shard_size).filename_to_tensors)
    prepared.check_values()
    outputs.print_table(prepared.plan.table())
    files = "1 file" if num_files == 1 else f"{num_files} files"
    print(
        f"{len(prepared.tensors)} tensors, {prepared.num_bytes:,} bytes in {files}. Nothing was written (--dry_run)."
    )


def check_same_data(reports: "list[RandomMergeReport]", dataset: str, num_images: int) -> None:
    """Refuses reports of other data, before anything is evaluated."""
    for report in reports:
        if (report.dataset, report.num_images) != (dataset, num_images):
            raise ValueError(
                "Reports to compare must be of one and the same dataset; they are of: "
                f"{report.dataset} ({report.num_images} {report.noun}), {dataset} ({num_images} {report.noun})."
            )


def evaluate_merges(
    context: typer.Context,
    sources: "dict[str, MergeSource]",
    output_dir: Path,
    dataset_name: str,
    split: dict[str, Any],
    loading: dict[str, Any],
    compare: list[Path],
    **kwargs: Any,
) -> None:
    """Evaluates random merges of the sources, and prints and saves a report.

    Args:
        split: Arguments of the split to evaluate on.
        loading: Arguments with which the models are loaded.
        compare: Earlier reports to show beside this one.
        kwargs: As for [`evaluate_random_merges`], and `skip_damaged`.
    """
    from hf_layershuffle.checkpoints.locations import resolve_folder
    from hf_layershuffle.merging.random_merges import (
        REPORT_FILE,
        RandomMergeReport,
        evaluate_random_merges,
        random_merge_table,
    )
    from hf_layershuffle.plotting.merges import plot_random_merges

    outputs.check_output_dir(output_dir, REPORT_FILE)
    outputs.claim(context, output_dir)
    others = [RandomMergeReport.load(path) for path in compare]
    folders = {name: resolve_folder(name, source.path, source.revision) for name, source in sources.items()}
    loaded = {name: inputs.load_model(str(folder), **loading) for name, (folder, _) in folders.items()}
    base = loaded[kwargs["base"]]
    for name, each in loaded.items():  # all see the inputs of the base
        inputs.check_same_inputs(f"the source '{name}'", each, base)
    drawn = {"max_samples": kwargs["max_samples"], "seed": kwargs["seed"]}
    data = inputs.load_evaluation_split(base, dataset_name, skip_damaged=kwargs.pop("skip_damaged"), **drawn, **split)
    check_same_data(others, outputs.short_name(dataset_name), min(kwargs["max_samples"] or len(data), len(data)))
    report = evaluate_random_merges(
        {name: each.model for name, each in loaded.items()},
        data,
        processing_class=base.processing_class,
        name=output_dir.resolve().name,
        dataset_name=outputs.short_name(dataset_name),
        sources={name: {"path": source.path, "revision": folders[name][1]} for name, source in sources.items()},
        **kwargs,
    )
    with outputs.shown_before(random_merge_table([report, *others]), output_dir):
        report.save(output_dir)
        plot_random_merges([report, *others]).save(output_dir)
