# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Requests to the Hub that end: with limits on waiting, tried again where that is safe, and commits that land once."""

import json
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, set_client_factory
from huggingface_hub.errors import HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import _http
from huggingface_hub.utils.sha import git_hash, sha_fileobj


logger = logging.getLogger(__name__)
WAITS = (1, 4)  # seconds before the second and the third try
WRITE_PATIENCE = 6  # times the limit of a reading request: the Hub checks all files of a commit before it answers
_PASSING_ERRORS = ("TimeoutException", "ReadError", "WriteError", "RemoteProtocolError")
_PASSING_STATUS = (408, 429, 500, 502, 503, 504)
_Result = TypeVar("_Result")


def limit_waiting() -> None:
    """Gives a limit to each request of huggingface_hub in this process that has none.

    Without one it would wait for ever for a server that does not answer. The limit is `HF_HUB_DOWNLOAD_TIMEOUT` (10
    seconds without a byte). A writing request has six times as much.
    """
    make_client = _http._GLOBAL_CLIENT_FACTORY  # the user's, such as one with a proxy, or the default
    if getattr(make_client, "limits_waiting", False):
        return

    def make_limited_client() -> Any:
        client = make_client()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "request": [*hooks.get("request", []), _set_limit]}
        return client

    factory: Any = make_limited_client
    factory.limits_waiting = True
    set_client_factory(factory)


def _set_limit(request: Any) -> None:
    limit = constants.HF_HUB_DOWNLOAD_TIMEOUT * (1 if request.method in ("GET", "HEAD") else WRITE_PATIENCE)
    limits = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {
        name: limit if limits.get(name) is None else limits[name] for name in ("connect", "read", "write", "pool")
    }


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: the server was silent, hung up or has a problem."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in _PASSING_STATUS
    return any(base.__name__ in _PASSING_ERRORS for base in type(error).__mro__)


def retried(request: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
    """The result of a request that may be made twice: one that reads, or that creates what may be there."""
    for wait in WAITS:
        try:
            return request(*args, **kwargs)
        except HTTPError as error:
            if not is_passing(error):
                raise
            logger.warning(
                "The Hub: %s. Trying again in %s s.", str(error).strip().split("\n")[0] or "no answer", wait
            )
            time.sleep(wait)
    return request(*args, **kwargs)


def commit_once(
    api: HfApi, repo_id: str, operations: list, *, parent_commit: str, revision: str | None = None, **kwargs: Any
) -> CommitInfo:
    """Calls `HfApi.create_commit`, and again after a fault where it is known that the commit did not land.

    An answer that got lost says nothing of the commit. Whether it landed is read from the branch: it is still at
    `parent_commit`, or it holds exactly these files. A pull request is tried once.
    """
    waits = iter(WAITS)
    while True:
        try:
            return api.create_commit(repo_id, operations, revision=revision, parent_commit=parent_commit, **kwargs)
        except (HTTPError, json.JSONDecodeError) as error:
            is_lost = isinstance(error, json.JSONDecodeError) or is_passing(error)
            if not is_lost or kwargs.get("create_pr"):
                raise
            head = retried(api.model_info, repo_id, revision=revision).sha
            if head != parent_commit:
                if head is None or not _holds(api, repo_id, head, operations):
                    raise
                return CommitInfo(
                    commit_url=f"{api.endpoint}/{repo_id}/commit/{head}",
                    commit_message=kwargs["commit_message"],
                    commit_description=kwargs.get("commit_description") or "",
                    oid=head,
                )
            wait = next(waits, None)
            if wait is None:
                raise
            logger.warning("The commit to '%s' did not land. Trying again in %s s.", repo_id, wait)
            time.sleep(wait)


def _holds(api: HfApi, repo_id: str, revision: str, operations: list) -> bool:
    """Whether a commit has all files that `operations` add, and none that they delete."""
    tree = api.list_repo_tree(repo_id, revision=revision, recursive=True)
    there = {file.path: file for file in tree if isinstance(file, RepoFile)}
    for operation in operations:
        file = there.get(operation.path_in_repo)
        if not isinstance(operation, CommitOperationAdd):
            if file is not None:
                return False
            continue
        with operation.as_file() as content:
            ours = sha_fileobj(content).hex() if file and file.lfs else git_hash(content.read())
        if file is None or ours != (file.lfs.sha256 if file.lfs else file.blob_id):
            return False
    return True
