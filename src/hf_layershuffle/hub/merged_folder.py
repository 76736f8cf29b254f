# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A merged model as a folder that is ready for the Hub, with its card."""

import os
from pathlib import Path

from ..common.progress import silenceable
from ..merging.merged_model import PreparedMerge, write_merged_model
from ..merging.plan import MergePlan
from .card_files import agreed_license
from .folder_records import FolderRecords
from .model_card import write_model_card


@silenceable
def merge(
    plan: MergePlan,
    output_dir: str | os.PathLike,
    *,
    max_shard_size: int | str = "5GB",
    token: str | None = None,
    progress: bool = True,
) -> Path:
    """Writes the merged model into a new folder.

    The folder holds the weights, the configuration with the plan (`config.merge_plan`), the plan as `merge_plan.yaml`,
    an image processor or a tokenizer, the code for `trust_remote_code=True`, and a card. The card states the sources'
    licence if the cards of all of them state the same.

    Memory holds a piece of a tensor at a time, whatever the number and size of the sources. A tensor keeps its dtype.
    Where tensors of its kind (the same one of any layer) have several dtypes, it gets the widest of them.

    An evaluation order of the base that is a list of layers is kept where the depth is the same. Otherwise it becomes
    `"sequential"`.

    Args:
        plan: The plan, whose paths are trusted. [`MergePlan.load`] checks the paths of a file.
        output_dir: Folder that does not exist, or is empty. It appears when all is written.
        max_shard_size: Bytes of a weight file at most, such as `"200MB"`. A larger tensor has a file of its own.
        token: Token for the Hub. Defaults to the logged-in one.
        progress: Whether to show progress bars.

    Raises:
        `ValueError`, `OSError`: as in [`prepare_merge`] and [`PreparedMerge.check_values`]. Nothing is left then.
    """
    return write_merged_model(
        plan, output_dir, max_shard_size=max_shard_size, token=token, progress=progress, finish=_write_card
    )


def _write_card(prepared: PreparedMerge, folder: Path, name: str) -> None:
    license = agreed_license(source.folder for source in prepared.sources.values())
    records = FolderRecords.read(folder, prepared.config, num_parameters=prepared.model.num_parameters())
    write_model_card(folder, repo_id=f"your-name/{name}", license=license, records=records)
