# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""`hf-layershuffle prune`: a shorter model, saved as such."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from . import inputs, options, outputs


def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="New folder for the pruned model.")],
    keep: Annotated[
        str | None, typer.Option("--keep", help="Layers to keep, in the order in which they shall run, such as 0,2,5.")
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option("--speedup", help="Keep the first, the last and evenly spaced layers: 2 keeps half of them."),
    ] = None,
    num_kept: Annotated[
        int | None, typer.Option("--num_layers", help="For --search: number of layers to keep.")
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Drop greedily what costs least on training data of --dataset_name.")
    ] = False,
    dataset_name: options.DatasetName = None,
    dataset_config_name: options.DatasetConfigName = None,
    image_column_name: options.ImageColumn = None,
    text_column_name: options.TextColumn = None,
    text_pair_column_name: options.TextPairColumn = None,
    label_column_name: options.LabelColumn = None,
    max_samples: Annotated[
        int, typer.Option("--max_samples", help="For --search: training images or texts, drawn by seed.")
    ] = 512,
    skip_damaged: options.SkipDamaged = False,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
    device: options.Device = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """A model with fewer layers, which loads, trains and publishes as any other.

    Say which layers stay by one of --keep, --speedup or --search (with --num_layers or --speedup).
    """
    from hf_layershuffle.checkpoints.loading import load_classifier
    from hf_layershuffle.checkpoints.processing_classes import load_processing_class
    from hf_layershuffle.common.paths import check_links
    from hf_layershuffle.compression.pruning import prune_layers, search_layers
    from hf_layershuffle.hub.card_files import license_of
    from hf_layershuffle.hub.model_card import write_model_card
    from hf_layershuffle.layerwise import check_evaluable
    from hf_layershuffle.models.configuration_layershuffle import num_layers_of

    check_arguments(keep, speedup, search, num_kept)
    inputs.check_model(model, revision)
    if Path(model).is_dir():
        check_links(model, ("config.json", *(path.name for path in Path(model).glob("*.safetensors*"))))
    with outputs.new_folder(output_dir) as folder:
        hub: dict[str, Any] = {"trust_remote_code": trust_remote_code} | ({"revision": revision} if revision else {})
        whole = load_classifier(model, as_saved=True, dtype="auto", **hub).eval()
        processing_class = load_processing_class(model, whole.config, **hub)
        num_layers = num_layers_of(whole.config)
        layers = choose_layers(num_layers, keep, speedup, num_kept)
        if search:
            check_evaluable(whole.config, processing_class)
            data = inputs.load_split(
                whole,
                "train",
                inputs.dataset_of([model], dataset_name, revision),
                dataset_config_name=dataset_config_name,
                **inputs.columns_of(image_column_name, text_column_name, text_pair_column_name, label_column_name),
            )
            if max_samples < 1:
                raise ValueError(f"`max_samples` is {max_samples}; it must be at least 1.")
            data = data.shuffle(seed=seed).select(range(min(max_samples, len(data))))
            if skip_damaged:
                data = inputs.without_damaged(data, inputs.LoadedModel(model, whole, processing_class))
            on_device = cast(Any, whole).to(inputs.choose_device(device))  # transformers hides what `to` takes
            layers = search_layers(
                on_device, data, len(layers), processing_class=processing_class, batch_size=batch_size
            )
        pruned = prune_layers(whole, layers)
        pruned.save_pretrained(folder)
        processing_class.save_pretrained(folder)
        write_model_card(folder, repo_id=f"your-name/{output_dir.name}", license=license_of(model, revision))
    before, after = (each.num_parameters() for each in (whole, pruned))
    print(
        f"Kept layers {','.join(map(str, layers))}: {len(layers)} of {num_layers}, {after:,} of {before:,} parameters"
    )
    print(f"Saved to {output_dir}")


def choose_layers(num_layers: int, keep: str | None, speedup: float | None, num_kept: int | None) -> list[int]:
    """The layers to keep; for a search, as many as are to be kept.

    Raises:
        `ValueError`: if they cannot be those of a model with `num_layers` layers.
    """
    from hf_layershuffle.compression.pruning import layers_for_speedup
    from hf_layershuffle.models.execution_order import parse_execution_order

    if num_kept is not None:
        if not 1 <= num_kept <= num_layers:
            raise ValueError(f"`num_layers` is {num_kept}; it must be from 1 to {num_layers}, the model's layers.")
        return list(range(num_kept))
    if keep is not None:
        return cast(list[int], parse_execution_order(keep, "keep", names=()))
    return layers_for_speedup(num_layers, cast(float, speedup))  # `check_arguments` knows that it is given


def check_arguments(keep: str | None, speedup: float | None, search: bool, num_kept: int | None) -> None:
    """Raises a `ValueError` for options that do not go together."""
    if (keep is not None) + (speedup is not None) + (num_kept is not None) != 1 or (keep is not None and search):
        raise ValueError(
            "Say which layers stay: give one of --keep 0,2,5, --speedup 2, --search --num_layers 6 and --search "
            "--speedup 2."
        )
    if num_kept is not None and not search:
        raise ValueError("--num_layers needs --search, which chooses the layers; or name them with --keep 0,2,5.")
