# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""`hf-layershuffle publish`: a model's folder on the Hub, with its card."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from . import inputs, options, outputs


if TYPE_CHECKING:
    from datasets import Dataset

    from hf_layershuffle import RobustnessReport


def publish(
    context: typer.Context,
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Model's folder, as save_pretrained, train.py or merge wrote it."),
    ],
    repo_id: Annotated[str | None, typer.Option("--repo_id", help="Repository, such as org/vit-layershuffle.")] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Whether a new repository is private. Defaults to what its owner has set."
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch; made if missing. Defaults to main.")
    ] = None,
    token: Annotated[str | None, typer.Option("--token", help="Defaults to `hf auth login`'s, or HF_TOKEN.")] = None,
    commit_message: Annotated[str | None, typer.Option("--commit_message", help="Message of the one commit.")] = None,
    license: Annotated[str | None, typer.Option("--license", help="Licence for the card, such as apache-2.0.")] = None,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite_card", help="Replace a card that was edited on the Hub.")
    ] = False,
    card_only: Annotated[
        bool, typer.Option("--card_only", help="Write the card into the folder, and push nothing.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="List what would be pushed, and change nothing.")] = False,
    plain_vit: Annotated[
        bool,
        typer.Option(
            "--plain_vit",
            "--plain",
            help="Also push it as a plain ViT, or BERT, ..., to the branch plain-vit, or plain of a model of texts.",
        ),
    ] = False,
    plain_vit_repo_id: Annotated[
        str | None,
        typer.Option("--plain_vit_repo_id", "--plain_repo_id", help="Push the plain ViT to this repository instead."),
    ] = None,
    execution_order: Annotated[
        str | None,
        typer.Option("--execution_order", help="Order of the plain ViT, such as 2,0,1. Defaults to the model's."),
    ] = None,
    dataset_name: Annotated[
        str | None,
        typer.Option(
            "--dataset_name",
            help="Evaluate on it first, unless the folder holds its report, and add examples: digits, python-docs, a "
            "folder or a Hub dataset id.",
        ),
    ] = None,
    dataset_config_name: options.DatasetConfigName = None,
    eval_split: options.EvalSplit = None,
    image_column_name: options.ImageColumn = None,
    text_column_name: options.TextColumn = None,
    text_pair_column_name: options.TextPairColumn = None,
    label_column_name: options.LabelColumn = None,
    max_samples: options.MaxSamples = None,
    skip_damaged: options.SkipDamaged = False,
    num_orders: Annotated[int, typer.Option("--num_orders", help="Arbitrary orders of the evaluation.")] = 32,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Pushes a model's folder to the Hub in one commit.

    That is weights, code, image processor or tokenizer, card, pictures and records.
    """
    from hf_layershuffle.hub.model_card import card_text, write_model_card
    from hf_layershuffle.hub.publish_plan import check_targets
    from hf_layershuffle.hub.published_files import check_folder

    if repo_id is None and not (card_only or dry_run):
        raise ValueError(
            "`repo_id` is missing; say where to publish by --repo_id org/name, or add --card_only or --dry_run."
        )
    if execution_order is not None and not (plain_vit or plain_vit_repo_id):
        raise ValueError("`execution_order` is of the plain ViT; add --plain_vit, or leave it out.")
    check_folder(folder)
    check_targets(repo_id, plain_vit_repo_id)
    plain_vit = plain_vit or plain_vit_repo_id is not None
    target = (repo_id, revision, plain_vit_repo_id)
    order = _read_plain_order(folder, execution_order, *target) if plain_vit else None
    if not dry_run:
        outputs.claim(context, folder, remedy="publish a copy of it")
    if not (card_only or dry_run):
        _check_access(folder, cast(str, repo_id), plain_vit_repo_id, token)
    evaluates = dataset_name is not None
    if dataset_name is not None:
        loaded = inputs.load_model(str(folder), device, trust_remote_code=trust_remote_code)
        data = inputs.load_evaluation_split(
            loaded,
            dataset_name,
            dataset_config_name=dataset_config_name,
            eval_split=eval_split,
            **inputs.columns_of(image_column_name, text_column_name, text_pair_column_name, label_column_name),
            skip_damaged=skip_damaged and not dry_run,
            max_samples=max_samples,
            seed=seed,
        )
        if not dry_run:
            sizes = {"max_samples": max_samples, "num_orders": num_orders, "batch_size": batch_size, "seed": seed}
            _evaluate(folder, loaded, data, dataset_name, sizes)
    else:
        card_text(folder)  # refuses records that are broken or of other weights
    if dry_run:
        _print_plan(folder, repo_id, revision, plain_vit_repo_id, plain_vit, evaluates)
        return
    if card_only:
        write_model_card(folder, repo_id=repo_id, revision=revision, license=license)
        print(f"Wrote {folder / 'README.md'}")
        return
    plain = {"plain_repo_id": plain_vit_repo_id, "execution_order": order} if plain_vit else None
    pushing = {"private": private, "revision": revision, "token": token, "commit_message": commit_message}
    pushing |= {"license": license, "overwrite_card": overwrite_card}
    _push(folder, cast(str, repo_id), pushing, plain)


def _read_plain_order(folder: Path, text: str | None, *target: str | None) -> str | list[int] | None:
    """The order of the plain ViT, checked to be one of the folder's model; the target is checked, too."""
    from hf_layershuffle.hub.plain_vit_folder import check_plain_target, check_plain_vit
    from hf_layershuffle.models.execution_order import parse_execution_order

    order = None if text is None else parse_execution_order(text)
    check_plain_vit(folder, order)
    check_plain_target(folder, *target)
    return order


def _check_access(folder: Path, repo_id: str, plain_repo_id: str | None, token: str | None) -> None:
    """Checks that the token may write to the repositories."""
    from hf_layershuffle.hub.publish_plan import check_access

    targets = [repo_id] if plain_repo_id is None else [repo_id, plain_repo_id]
    check_access(*targets, token=token, go_on=f"'{folder}' is complete: publish it again when that is mended")


def _push(folder: Path, repo_id: str, kwargs: dict[str, Any], plain: dict[str, Any] | None) -> None:
    """Pushes the folder and, with the arguments `plain`, the plain ViT."""
    from hf_layershuffle.hub.plain_vit_folder import publish_with_plain_vit
    from hf_layershuffle.hub.publishing import publish

    if plain is not None:
        commits = list(publish_with_plain_vit(folder, repo_id, **kwargs, **plain))
    else:
        commits = [publish(folder, repo_id, **kwargs)]
    for commit in commits:
        print(f"Published {commit.commit_url}")


def _print_plan(
    folder: Path,
    repo_id: str | None,
    revision: str | None,
    plain_repo_id: str | None,
    plain_vit: bool,
    evaluates: bool,
) -> None:
    """Says what would be pushed, where to, and how large it is. What has no size is made before."""
    from hf_layershuffle.hub.plain_vit_folder import plain_revision, planned_plain_files
    from hf_layershuffle.hub.publish_plan import planned_files

    repo_id = repo_id or "the repository (--repo_id)"
    files = planned_files(folder, evaluates=evaluates)
    print(f"To {repo_id}, branch {revision or 'main'}:")
    for name, size in files.items():
        print(f"{'made' if size is None else f'{size:,}':>12} {name}")
    if plain_vit:
        target = f"{plain_repo_id}, branch main" if plain_repo_id else f"{repo_id}, branch {plain_revision(folder)}"
        print(f"To {target}:")
        print("\n".join(f"{'made':>12} {name}" for name in planned_plain_files(files)))
    print("Nothing was changed (--dry_run).")


def _evaluate(
    folder: Path, loaded: inputs.LoadedModel, dataset: "Dataset", dataset_name: str, sizes: dict[str, Any]
) -> None:
    """Writes the report, unless it is there, its pictures and the example images into the folder."""
    from hf_layershuffle import evaluate_robustness
    from hf_layershuffle.hub.card_examples import write_examples
    from hf_layershuffle.plotting import save_report_pictures

    dataset_name = outputs.short_name(dataset_name)
    report = _find_report(folder, loaded, dataset, sizes | {"dataset": dataset_name})
    if report is None:
        report = evaluate_robustness(
            loaded.model,
            dataset,
            processing_class=loaded.processing_class,
            model_name=outputs.short_name(str(folder)),
            dataset_name=dataset_name,
            **sizes,
        )
        report.save(folder)
    save_report_pictures({report.model: report}, folder)
    write_examples(folder, dataset, loaded.processing_class)


def _find_report(
    folder: Path, loaded: inputs.LoadedModel, dataset: "Dataset", settings: dict[str, Any]
) -> "RobustnessReport | None":
    """The report in the folder, if it is of these weights, images and settings. Otherwise it is made anew."""
    from hf_layershuffle import RobustnessReport
    from hf_layershuffle.evaluation.fingerprint import expected_report, other_than
    from hf_layershuffle.evaluation.report import REPORT_FILE

    if not (folder / REPORT_FILE).exists():
        return None
    try:
        report = RobustnessReport.load(folder)
    except ValueError:  # what is no report is replaced by one
        return None
    sizes = {name: settings.pop(name) for name in ("max_samples", "batch_size")}
    loader = loaded.batches(dataset, seed=settings.get("seed", 0), **sizes)
    expected = expected_report(loaded.model, loader, loaded.processing_class, **settings)
    return report if other_than(report, expected) is None else None
