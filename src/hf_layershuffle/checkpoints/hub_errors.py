# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What goes wrong between here and the Hub, as one line that says what to do."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, LocalTokenNotFoundError

from .hub_connection import limit_waiting, retried


_FAULTS_OF_PUBLISHING = (
    HTTPError,
    RuntimeError,  # a failed upload of a large file
    json.JSONDecodeError,  # an answer that is none
    ConnectionError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
)


@contextmanager
def explained_errors(repo_id: str, go_on: str) -> Iterator[None]:
    """Turns whatever goes wrong between here and the Hub into an `OSError` that says what to do."""
    limit_waiting()
    try:
        yield
    except _FAULTS_OF_PUBLISHING as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        raise OSError(f"'{repo_id}' was not published: {_explain(cause, status, repo_id)}. {go_on}.") from error


@contextmanager
def explained_download(name: str, revision: str | None = None, prefix: str = "") -> Iterator[None]:
    """Turns whatever goes wrong in finding a model on the Hub into an `OSError` of one line."""
    limit_waiting()
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        reason = _explain_no_answer(error) or reason
        at = f" at revision {revision!r}" if revision else ""
        raise OSError(
            f"{prefix}'{name}'{at} is neither a folder here nor a model that could be downloaded from the Hub: "
            f"{reason}"
        ) from error


def check_hub_model(name: str, revision: str | None = None) -> None:
    """Checks that a model is in the Hub's cache here or on the Hub.

    It asks once. transformers would ask for file after file, and wait between.

    Raises:
        `OSError`: if it is in neither, or the Hub cannot be reached.
    """
    with explained_download(name, revision):
        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            retried(HfApi().model_info, name, revision=revision)


def check_hub_answers(dataset_name: str) -> None:
    """Asks the Hub for a dataset, with a limit on waiting. `load_dataset` alone waits minutes for a silent server.

    Raises:
        `OSError`: if there is no answer, or not the Hub's. `load_dataset` tells of all else.
    """
    limit_waiting()
    try:
        retried(HfApi().dataset_info, dataset_name)
    except (HTTPError, OSError, ValueError) as error:
        reason = _explain_no_answer(error)
        if reason is not None:
            raise OSError(f"{reason}. What is in the cache is taken with HF_HUB_OFFLINE=1") from error


def _explain_no_answer(error: BaseException) -> str | None:
    """What is wrong with a server that is silent, or that does not answer as the Hub would; None for all else."""
    if any(base.__name__ == "TimeoutException" for base in type(error).__mro__):
        now = constants.HF_HUB_DOWNLOAD_TIMEOUT
        return f"the Hub did not answer in time; try later, or allow more seconds (HF_HUB_DOWNLOAD_TIMEOUT, now {now})"
    if isinstance(error, json.JSONDecodeError):
        begin = " ".join(error.doc[:60].split())
        return (
            f"what answers is not the Hub (its answer begins with {begin!r}); see that HF_ENDPOINT is right and no "
            "proxy or login page is in between"
        )
    return None


def _explain(error: BaseException, status: int | None, repo_id: str) -> str:
    no_answer = _explain_no_answer(error)
    if no_answer is not None:
        return no_answer
    said = getattr(error, "server_message", None)
    said = f" ({said.strip().rstrip('.')})" if said else ""
    owner = repo_id.split("/")[0] if "/" in repo_id else "the account"
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token; log in with `hf auth login`, or set HF_TOKEN"
    if status is None:
        detail = str(error).strip().splitlines() or [type(error).__name__]
        return (
            f"the connection to the Hub failed ({detail[0].rstrip('.')}); see that it can be reached and "
            "HF_HUB_OFFLINE is not set"
        )
    if status == 401:
        return (
            f"the Hub does not know the token, or there is none (401){said}; log in with `hf auth login`, or set "
            "HF_TOKEN"
        )
    if status == 403:
        return f"the token may not do this (403){said}; use one with write access to '{owner}'"
    if status == 404:
        return f"the Hub does not find it (404){said}; see that '{owner}' exists and the token may see it"
    if status in (409, 412):
        return f"it was changed by somebody else at the same time ({status}){said}"
    if status == 429:
        return f"the Hub was asked too often (429){said}; wait some minutes"
    if status >= 500:
        return f"the Hub has a problem of its own ({status}){said}; see https://status.huggingface.co and try later"
    return f"the Hub refused it ({status}){said}"
