"""A Hub that is silent, hangs up, loses answers, or is none: nothing hangs, and a commit lands once."""

import time

import pytest
from conftest import Architecture
from huggingface_hub import constants
from support.hub_server import HubServer
from transformers import ViTImageProcessor

import hf_layershuffle.checkpoints.hub_connection as hub_connection
from hf_layershuffle.checkpoints.hub_errors import check_hub_model
from hf_layershuffle.data import load_image_datasets
from hf_layershuffle.hub.publishing import publish


COMMIT, CREATE = {"method": "POST", "path": "/commit/"}, {"method": "POST", "path": "/api/repos/create"}
INFO, TREE = {"method": "GET", "path": "/api/models/[^/]+/[^/]+(/revision/.*)?$"}, {"method": "GET", "path": "/tree/"}
PREUPLOAD, BATCH = {"method": "POST", "path": "/preupload/"}, {"method": "POST", "path": "objects/batch"}
NO_ANSWER, NOT_THE_HUB = (
    "did not answer in time.*HF_HUB_DOWNLOAD_TIMEOUT",
    "what answers is not the Hub.*DOCTYPE.*HF_ENDPOINT",
)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub in this process, and a client that waits for 0.2 seconds."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub_connection, "WRITE_PATIENCE", 1)
        monkeypatch.setattr(hub_connection, "WAITS", (0, 0))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    Architecture("vit").classifier(seed=1).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stage", [CREATE, INFO, TREE, PREUPLOAD, BATCH, COMMIT], ids=lambda stage: stage["path"])
@pytest.mark.parametrize(("status", "message"), [("stall", NO_ANSWER), ("html", NOT_THE_HUB)])
def test_a_server_that_is_silent_or_no_hub_is_said_at_every_stage(hub, folder, stage, status, message):
    hub.faults[:] = [stage | {"status": status, "times": 99}]
    start = time.monotonic()
    with pytest.raises(OSError, match=f"'org/tiny' was not published: .*{message}.*'.*' is complete"):
        publish(folder, "org/tiny")
    assert time.monotonic() - start < 10
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())


@pytest.mark.parametrize(("status", "message"), [("stall", NO_ANSWER), ("html", NOT_THE_HUB)])
def test_the_same_is_said_of_a_model_to_load(hub, status, message):
    hub.faults[:] = [INFO | {"status": status, "times": 99}]
    with pytest.raises(
        OSError, match=f"'org/tiny' is neither a folder here nor a model that could be downloaded.*{message}"
    ):
        check_hub_model("org/tiny")


@pytest.mark.parametrize(("status", "message"), [("stall", NO_ANSWER), ("html", NOT_THE_HUB)])
def test_the_same_is_said_of_a_dataset_to_load(hub, monkeypatch, status, message):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    hub.faults[:] = [{"method": method, "path": "", "status": status, "times": 99} for method in ("GET", "HEAD")]
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"'org/letters' cannot be loaded: .*{message}.*HF_HUB_OFFLINE=1"):
        load_image_datasets("org/letters")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("status", ["drop", "stall", 503])
@pytest.mark.parametrize("stage", [CREATE, INFO, COMMIT], ids=lambda stage: stage["path"])
def test_a_fault_that_passes_is_survived(hub, folder, stage, status):
    hub.faults[:] = [stage | {"status": status, "times": 2}]
    commit = publish(folder, "org/tiny")
    repository = hub.repositories["org/tiny"]
    assert [each.message for each in repository.history()] == ["initial commit", "Upload model"]
    assert commit.oid == repository.branches["main"]


def test_a_commit_whose_answer_was_lost_is_found_and_not_made_twice(hub, folder):
    hub.faults[:] = [COMMIT | {"status": "lost"}]
    commit = publish(folder, "org/tiny", commit_message="Once")
    repository = hub.repositories["org/tiny"]
    assert [each.message for each in repository.history()] == ["initial commit", "Once"]
    assert commit.oid == repository.branches["main"] and commit.commit_url.endswith(f"/org/tiny/commit/{commit.oid}")


def test_somebody_elses_commit_is_not_taken_for_ours(hub, folder):
    publish(folder, "org/tiny")
    repository = hub.repositories["org/tiny"]
    (folder / "all_results.json").write_text("{}")
    hub.faults[:] = [COMMIT | {"status": "race", "then": "drop"}]
    with pytest.raises(OSError, match="was not published: the connection to the Hub failed"):
        publish(folder, "org/tiny")
    (folder / "all_results.json").unlink()
    assert [each.message for each in repository.history()][-1] == "Somebody else's"


def test_a_pull_request_is_tried_once(hub, folder):
    hub.faults[:] = [COMMIT | {"status": 503, "times": 9}]
    with pytest.raises(OSError, match=r"problem of its own \(503\)"):
        publish(folder, "org/tiny", create_pr=True)
    assert sum(path.endswith("/commit/main") for _, path in hub.requests) == 1


def test_limits_are_set_once_and_a_request_keeps_its_own(hub, monkeypatch):
    from huggingface_hub.utils import _http, get_session

    hub_connection.limit_waiting()
    factory = _http._GLOBAL_CLIENT_FACTORY
    hub_connection.limit_waiting()
    assert _http._GLOBAL_CLIENT_FACTORY is factory
    request = get_session().build_request("GET", hub.endpoint, timeout=3)
    hub_connection._set_limit(request)
    assert request.extensions["timeout"]["read"] == 3
    request = get_session().build_request("GET", hub.endpoint)
    hub_connection._set_limit(request)
    assert set(request.extensions["timeout"].values()) == {0.2}
    monkeypatch.setattr(hub_connection, "WRITE_PATIENCE", 6)
    request = get_session().build_request("POST", hub.endpoint)
    hub_connection._set_limit(request)
    assert request.extensions["timeout"]["read"] == pytest.approx(1.2)
