# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Publishing to the Hub: a model's whole folder, a model in memory, a report, or a plain ViT made of a model.

Each is one commit: the Hub shows all of it or none of it.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import sha_fileobj
from transformers import PreTrainedModel

from ..checkpoints.hub_connection import commit_once, retried
from ..checkpoints.hub_errors import explained_errors
from ..checkpoints.locations import TOKENIZER_FILES
from ..checkpoints.processing_classes import ProcessingClass, chosen_processing_class
from ..common.files import write_text
from ..common.paths import inside
from ..common.reports import Report
from .card_files import license_in, read_card, stated_license
from .card_text import combine_cards, mark_published, published_license
from .folder_records import EXAMPLES_FOLDER, FolderRecords
from .model_card import write_model_card
from .published_files import added_code, check_folder, is_record, is_replaced, published_files
from .report_checks import check_pushed_report


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    overwrite_card: bool = False,
) -> CommitInfo:
    """Pushes a model's folder to the Hub in one commit.

    The commit holds weights, code files, the image processor, the card, pictures and records.
    The repository, and the branch `revision`, are created if missing. The card is built, or brought up to date, by
    [`write_model_card`]; what a person wrote into it stays, whether here or on the Hub.

    Args:
        folder: The model's folder, as `save_pretrained`, `examples/train.py` or a merge wrote it.
        repo_id: Repository to push to, such as `"org/vit-layershuffle"`.
        private: Whether a new repository is private. Defaults to what the owner has set.
        revision: Branch to push to. Defaults to `main`.
        token: Token for the Hub. Defaults to the one of `hf auth login`, or `HF_TOKEN`.
        commit_message, commit_description: Message and description of the commit.
        create_pr: Whether to open a pull request instead.
        license: Licence for the card, as the Hub names it, such as `"apache-2.0"`.
        overwrite_card: Whether the folder's card replaces one that was edited on the Hub.

    Raises:
        `ValueError`: if the folder is no complete model, or the card was edited here and on the Hub.
        `OSError`: if the Hub cannot be reached or refuses. The folder is complete; the message says how to go on.
    """
    go_on = f"'{folder}' is complete: publish it again when that is mended"
    return publish_folder(
        Path(folder),
        repo_id,
        go_on,
        private=private,
        revision=revision,
        token=token,
        license=license,
        overwrite_card=overwrite_card,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        create_pr=create_pr,
    )


def publish_folder(
    folder: Path,
    repo_id: str,
    go_on: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
    overwrite_card: bool = False,
    **commit_kwargs: Any,
) -> CommitInfo:
    """Does what [`publish`] says.

    Args:
        go_on: What to do when the Hub cannot be reached or refuses, for the message.
        tags: Further tags of the card.
        commit_kwargs: As for `HfApi.create_commit`.
    """
    check_folder(folder)
    card = folder / "README.md"
    card_kwargs: dict[str, Any] = {"revision": revision, "license": license, "tags": tags}
    stated = stated_license(folder)  # before the card states what the records do
    published = published_license(read_card(card)) if stated is not None else None
    records = FolderRecords.read(folder)
    write_model_card(folder, repo_id=repo_id, records=records, **card_kwargs)
    with explained_errors(repo_id, go_on):
        api = HfApi(token=token)
        repo_id = _make_repository(api, repo_id, private)
        _make_branch(api, repo_id, revision)
        # What is read here is what the commit builds on: it is refused if somebody has changed the repository since
        head = _head_of(api, repo_id, revision)
        tree = api.list_repo_tree(repo_id, revision=head, recursive=True)
        there = {file.path: file for file in tree if isinstance(file, RepoFile)}
        if _has_same_weights(folder, there):
            names = [name for name in there if is_record(name)]
            if _fetch_missing(api, repo_id, head, folder, names):
                records = FolderRecords.read(folder)
        hub_card = _read_hub_card(api, repo_id, head) if "README.md" in there and not overwrite_card else None
        if hub_card is not None:
            combined = combine_cards(read_card(card), hub_card, f"the Hub ({repo_id})")
            write_text(card, combined)
            on_hub = license_in(hub_card)
            is_kept = stated in (None, published) or (published is None and license_in(combined) == on_hub)
            if on_hub is not None and is_kept:  # not changed here, so a person may have changed it there
                stated = on_hub
        records = replace(records, license=stated or records.license)
        write_model_card(folder, repo_id=repo_id, records=records, **card_kwargs)
        write_text(card, mark_published(read_card(card), with_license=True))
        files = published_files(folder)
        paths = {name: folder / name for name in files} | {path.name: path for path in added_code(folder)}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, str(path)) for name, path in sorted(paths.items())
        ]
        operations += [CommitOperationDelete(name) for name in there if name not in paths and is_replaced(name)]
        return commit_once(api, repo_id, operations, revision=revision, parent_commit=head, **commit_kwargs)


def _has_same_weights(folder: Path, there: dict[str, RepoFile]) -> bool:
    for path in folder.glob("*.safetensors"):
        lfs = there[path.name].lfs if path.name in there else None
        if lfs is None or lfs.size != path.stat().st_size:
            return False
        with path.open("rb") as file:
            if sha_fileobj(file).hex() != lfs.sha256:
                return False
    return True


def _fetch_missing(api: HfApi, repo_id: str, revision: str | None, folder: Path, names: list[str]) -> bool:
    """Brings files that are on the Hub only into the folder; whether there were any."""
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        with tempfile.TemporaryDirectory() as download:  # beside the folder, it would leave its cache there
            api.snapshot_download(repo_id, revision=revision, local_dir=download, allow_patterns=missing)
            for name in missing:
                target = inside(folder, name)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(inside(download, name), target)
    return bool(missing)


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    processing_class: ProcessingClass | None = None,
    image_processor: ProcessingClass | None = None,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
    **kwargs: Any,
) -> CommitInfo:
    """`model.push_to_hub`: pushes a model in memory with its code files and a card in one commit.

    Args:
        model: The model to push.
        repo_id: Repository to push to.
        processing_class: Image processor or tokenizer that is pushed too, so that `pipeline` works. `image_processor`
            is another name of this argument.
        max_shard_size: Size of a weight file at most, such as `"5GB"`.
        tags: Further tags of the card.
        kwargs: As for [`publish`].
    """
    go_on = "The model is untouched: push it again when that is mended, or keep it with `save_pretrained`"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / repo_id.split("/")[-1]
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor = chosen_processing_class(processing_class, image_processor)
        if processor is not None:
            processor.save_pretrained(folder)
        kwargs = {"commit_message": "Upload model"} | {
            name: value for name, value in kwargs.items() if value is not None
        }
        return publish_folder(folder, repo_id, go_on, tags=tags or (), **kwargs)


def push_report(
    report: Report,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """`report.push_to_hub`: pushes a report, its pictures and the card that shows them in one commit, beside a model.

    If the repository holds weights, they are downloaded and compared with those that the report is of.

    Raises:
        `ValueError`: if the report is of another model than the repository's.
        `OSError`: as in [`publish`].
    """
    go_on = "The report is untouched: push it again when that is mended"
    with explained_errors(repo_id, go_on), tempfile.TemporaryDirectory() as temporary:
        api = HfApi(token=token)
        repo_id = _make_repository(api, repo_id, private)
        folder = Path(temporary) / repo_id.split("/")[-1]
        is_new = revision is not None and not retried(api.revision_exists, repo_id, revision)
        head = _head_of(api, repo_id, None if is_new else revision)
        _check_model(api, repo_id, head, report)
        _make_branch(api, repo_id, revision)
        # The weights and the code are not needed for the card
        patterns = ["*.json", "*.yaml", "*.png", "README.md", f"{EXAMPLES_FOLDER}/*"]
        api.snapshot_download(repo_id, revision=head, local_dir=folder, allow_patterns=patterns)
        report.save(folder)
        pictures = report.plot()
        pictures.save(folder)
        write_model_card(folder, repo_id=repo_id, revision=revision)
        names = ["README.md", report.file_name, *(f"{name}.png" for name in pictures)]
        return commit_once(
            api,
            repo_id,
            [CommitOperationAdd(name, str(folder / name)) for name in names],
            commit_message=commit_message or "Upload robustness report",
            revision=revision,
            parent_commit=head,
        )


def _check_model(api: HfApi, repo_id: str, revision: str, report: Report) -> None:
    """Refuses a report of another model than the one in the repository, if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        api.snapshot_download(
            repo_id,
            revision=revision,
            local_dir=folder,
            allow_patterns=["*.json", "*.safetensors", *TOKENIZER_FILES],
            ignore_patterns=["*/*"],
        )
        check_pushed_report(Path(folder), report, repo_id)


def _make_repository(api: HfApi, repo_id: str, private: bool | None) -> str:
    """Creates the repository where it is missing; returns its full name."""
    return retried(api.create_repo, repo_id, private=private, exist_ok=True).repo_id


def _make_branch(api: HfApi, repo_id: str, revision: str | None) -> None:
    if revision is not None and not revision.startswith("refs/"):
        retried(api.create_branch, repo_id, branch=revision, exist_ok=True)


def _head_of(api: HfApi, repo_id: str, revision: str | None) -> str:
    """The newest commit of the branch, which a repository that was just made has too."""
    return cast(str, retried(api.model_info, repo_id, revision=revision).sha)


def _read_hub_card(api: HfApi, repo_id: str, revision: str | None) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return read_card(api.hf_hub_download(repo_id, "README.md", revision=revision, local_dir=folder))
