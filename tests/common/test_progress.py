"""`progress=False` silences every bar: ours, and those of the libraries."""

import threading

import datasets
import huggingface_hub.utils as hub
import pytest
from conftest import Architecture
from support.cards import images, save_model
from transformers import ViTImageProcessor
from transformers.utils import logging as transformers_logging

import hf_layershuffle as ls
from hf_layershuffle.common.progress import no_progress_bars, silenceable


@pytest.fixture(scope="module")
def classifier():
    return Architecture("vit").classifier(shuffle_mode="arbitrary").eval()


def calls(model, folder, tmp_path):
    common = {"image_processor": ViTImageProcessor(size={"height": 8, "width": 8}), "progress": False}
    data = images(25)
    yield "score", lambda: ls.score_execution_orders(model, data, [[0, 1, 2, 3]], **common)
    yield "evaluate", lambda: ls.evaluate_robustness(model, data, num_orders=1, num_subsets=1, **common)
    yield "analyze", lambda: ls.analyze(model, data, num_orders=1, **common)
    yield "search", lambda: ls.search_layers(model, data, 3, **common)
    yield "random merges", lambda: ls.evaluate_random_merges({"a": model, "b": model}, data, num_merges=2, **common)
    yield "merge", lambda: ls.merge(ls.MergePlan.average([folder, folder]), tmp_path / "merged", progress=False)


def test_no_bar_is_shown(classifier, tmp_path, capfd):
    save_model(tmp_path / "source")
    capfd.readouterr()
    for name, call in calls(classifier, str(tmp_path / "source"), tmp_path):
        call()
        assert "it/s" not in (shown := capfd.readouterr().err) and "%|" not in shown, name
    ls.score_execution_orders(  # and with `progress`, its default, they are
        classifier, images(25), [[0, 1, 2, 3]], image_processor=ViTImageProcessor(size={"height": 8, "width": 8})
    )
    assert "Decoding images" in capfd.readouterr().err


def switches() -> list[bool]:
    return [
        transformers_logging.is_progress_bar_enabled(),
        not hub.are_progress_bars_disabled(),
        not datasets.are_progress_bars_disabled(),
    ]


@pytest.mark.parametrize("hub_is_on", [True, False])
def test_what_was_switched_on_is_on_again(hub_is_on):
    @silenceable
    def function(progress: bool = True):
        inside.append(switches())
        if not progress:
            raise KeyError("something")

    inside = []
    try:
        if not hub_is_on:
            hub.disable_progress_bars()
        function()
        with pytest.raises(KeyError):
            function(progress=False)
        assert inside == [[True, hub_is_on, True], [False, False, False]]
        assert switches() == [True, hub_is_on, True]
    finally:
        hub.enable_progress_bars()


def test_calls_in_threads_do_not_leave_bars_off():
    started, go_on = threading.Event(), threading.Event()

    def long_call():
        with no_progress_bars():
            started.set()
            go_on.wait(10)

    thread = threading.Thread(target=long_call)
    thread.start()
    started.wait(10)
    with no_progress_bars():
        go_on.set()
        thread.join()
        assert switches() == [False, False, False]
    assert switches() == [True, True, True]
