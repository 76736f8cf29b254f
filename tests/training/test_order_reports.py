"""What a run shows of the accuracy in arbitrary orders: pictures for `report_to`, and beside the progress bar."""

import io
import types

import numpy as np
import pytest
import transformers.trainer_callback
from PIL import Image
from support.trainers import Stop, train
from transformers.integrations import TrackioCallback, WandbCallback

import hf_layershuffle as ls
from hf_layershuffle.training import order_reports
from hf_layershuffle.training.order_reports import OrderProgressCallback, order_line, order_picture, report_orders


ORDERS = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]]
EVALUATED = dict(eval_strategy="steps", eval_steps=3, eval_orders=3)


def test_the_picture_shows_each_order(monkeypatch):
    titles = []

    def note(rows, title, **kwargs):
        titles.append((rows, title))
        return plot(rows, title=title, **kwargs)

    plot = ls.plotting.plot_accuracy_distribution
    monkeypatch.setattr(order_reports, "plot_accuracy_distribution", note)
    picture = order_picture([0.5, 0.25, 0.75], ORDERS, 0.8, 12)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    assert not np.array_equal(picture, order_picture([0.5, 0.25, 0.76], ORDERS, 0.8, 12))
    rows, title = titles[0]
    assert rows == {"arbitrary orders": [0.5, 0.25, 0.75], "its own order": [0.8]}
    assert title == "Step 12: best 0.7500 in 1 0 3 2\nworst 0.2500 in 3 2 1 0"


def test_tensorboard_gets_a_picture_and_a_histogram_at_each_evaluation(vit, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = train(vit.classifier(shuffle_mode="arbitrary"), tmp_path, report_to="tensorboard", **EVALUATED)
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    assert [event.step for event in events.Images("eval/orders")] == [3, 6]
    stored = Image.open(io.BytesIO(events.Images("eval/orders")[-1].encoded_image_string))
    assert min(stored.size) > 100
    histograms = events.Histograms("eval/accuracy_by_order")
    assert [event.step for event in histograms] == [3, 6]
    metrics = next(entry for entry in trainer.state.log_history if "eval_arbitrary_accuracy" in entry)
    histogram = histograms[0].histogram_value
    assert histogram.num == 3
    assert histogram.sum / 3 == pytest.approx(metrics["eval_arbitrary_accuracy"])
    assert histogram.min == pytest.approx(metrics["eval_arbitrary_accuracy_min"])
    assert trainer.evaluate()["eval_arbitrary_accuracy"] > 0  # after the writer is closed


@pytest.mark.parametrize(("reporter_class", "name"), [(WandbCallback, "_wandb"), (TrackioCallback, "_trackio")])
def test_weights_and_biases_and_trackio_get_them_too(reporter_class, name):
    """Of packages that the tests do without, stand-ins."""
    logged = []
    module = types.SimpleNamespace(
        Image=lambda image: ("image", image.size), Histogram=lambda values: ("histogram", values), log=logged.append
    )
    reporter = reporter_class.__new__(reporter_class)
    setattr(reporter, name, module)
    reporter._initialized = False
    report_orders([reporter], 6, [0.5, 0.25, 0.75], ORDERS)
    assert logged == []  # nothing was started yet
    reporter._initialized = True
    report_orders([reporter], 6, [0.5, 0.25, 0.75], ORDERS)
    [values] = logged
    assert values["eval/accuracy_by_order"] == ("histogram", [0.5, 0.25, 0.75])
    assert values["eval/orders"][0] == "image" and values["train/global_step"] == 6


def test_no_picture_is_drawn_without_a_reporter(monkeypatch):
    monkeypatch.setattr(order_reports, "plot_accuracy_distribution", lambda *args, **kwargs: pytest.fail("drawn"))
    report_orders([OrderProgressCallback()], 6, [0.5], [[0, 1]])


class Bar:
    """A bar that notes what it shows."""

    shown: list[str] = []

    def __init__(self, *args, **kwargs):
        pass

    def set_postfix_str(self, text):
        self.shown.append(text)

    def update(self, *args): ...

    def write(self, *args): ...

    def close(self): ...


def test_the_bar_shows_the_accuracy_in_arbitrary_orders(vit, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.trainer_callback, "tqdm", Bar)
    monkeypatch.setattr(Bar, "shown", [])
    options = dict(disable_tqdm=False, **EVALUATED)
    trainer = train(vit.classifier(shuffle_mode="arbitrary"), tmp_path, callbacks=[Stop(5)], **options)
    assert sum(isinstance(each, OrderProgressCallback) for each in trainer.callback_handler.callbacks) == 1
    metrics = next(entry for entry in trainer.state.log_history if "eval_arbitrary_accuracy" in entry)
    expected = f"arbitrary order {metrics['eval_arbitrary_accuracy']:.4f}, worst "
    assert len(Bar.shown) == 1 and Bar.shown[0].startswith(expected)
    assert Bar.shown[0].endswith(f"own order {metrics['eval_accuracy']:.4f}")
    last, Bar.shown[:] = Bar.shown[0], []
    train(vit.classifier(shuffle_mode="arbitrary"), tmp_path, resume=str(tmp_path / "checkpoint-5"), **options)
    assert len(Bar.shown) == 2 and Bar.shown[0] == last  # of the run that it goes on with


def test_the_line_says_what_is_known():
    assert order_line({"eval_arbitrary_accuracy": 0.5, "eval_loss": 1}) == "arbitrary order 0.5000"
    named = {"eval_small_arbitrary_accuracy": 0.5, "eval_small_accuracy": 0.25}
    assert order_line(named, "eval_small") == "arbitrary order 0.5000, own order 0.2500"
