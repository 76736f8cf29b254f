# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What publishing would do, and whether it can, without doing it."""

import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from ..checkpoints.hub_errors import explained_errors
from ..evaluation.report import REPORT_FILE
from .card_text import is_our_example_file
from .folder_records import EXAMPLES_FILE, EXAMPLES_FOLDER, PICTURES
from .published_files import added_code, published_files


def check_targets(*repo_ids: str | None) -> None:
    """Refuses what cannot be the name of a repository. None stands for a name that is not given.

    Raises:
        `ValueError`: if one cannot be a name.
    """
    for repo_id in repo_ids:
        if repo_id is not None:
            validate_repo_id(repo_id)


def check_access(*repo_ids: str, token: str | None = None, go_on: str) -> None:
    """Checks that the Hub can be reached and that the token may write to these repositories, without writing.

    Args:
        go_on: What to do when it is mended, for the message.

    Raises:
        `OSError`: if not.
    """
    first = repo_ids[0]
    with explained_errors(first, go_on):
        try:
            me = HfApi(token=token).whoami()
            role = me["auth"]["accessToken"]["role"]
            fine = me["auth"]["accessToken"].get("fineGrained") or {}
            owners = {me["name"].lower(): None} | {
                org["name"].lower(): org.get("roleInOrg") for org in me.get("orgs", [])
            }
        except (KeyError, TypeError, AttributeError):
            return  # another server's answer, which tells nothing of rights
        except ValueError as error:  # such as a page in HTML
            raise OSError(
                f"'{first}' was not published: the answer is not that of a Hub ({error}). {go_on}."
            ) from error
    for repo_id in repo_ids:
        owner = repo_id.split("/")[0] if "/" in repo_id else me["name"]
        why = _why_no_access(repo_id, owner, owners, role, fine)
        if why is not None:
            raise OSError(f"'{repo_id}' was not published: {why}. {go_on}.")


def _why_no_access(repo_id: str, owner: str, owners: dict, role: str, fine: dict) -> str | None:
    if owner.lower() not in owners:
        return f"'{owner}' is neither the token's account nor one of its organizations, which are {', '.join(owners)}"
    if role == "read" or owners[owner.lower()] == "read":
        return f"the token may only read; use one with write access to '{owner}'"
    if role == "fineGrained":
        of = {owner.lower(), repo_id.lower()}
        scopes = [
            scope for scope in fine.get("scoped") or [] if str((scope.get("entity") or {}).get("name")).lower() in of
        ]
        if not any("repo.write" in scope.get("permissions", []) for scope in scopes):
            return f"the token has no permission to write to repositories of '{owner}'; give it 'repo.write'"
    return None


def planned_files(folder: str | os.PathLike, *, evaluates: bool = False) -> dict[str, int | None]:
    """The files that [`publish`] would push and their sizes in bytes; None for what is made, or made anew, before.

    Args:
        folder: The model's folder.
        evaluates: Whether a report, its pictures and example images are made too.
    """
    folder = Path(folder)
    made = {"README.md"}
    if evaluates:
        made |= {REPORT_FILE, *PICTURES, f"{EXAMPLES_FOLDER}/*.png", f"{EXAMPLES_FOLDER}/{EXAMPLES_FILE}"}
    there = [
        name for name in published_files(folder) if name not in made and not (evaluates and is_our_example_file(name))
    ]
    sizes = {name: (folder / name).stat().st_size for name in there} | dict.fromkeys(made)
    sizes |= {path.name: path.stat().st_size for path in added_code(folder)}
    return dict(sorted(sizes.items()))
