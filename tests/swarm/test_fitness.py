"""Warnings of policies that a model was not trained for."""

from types import SimpleNamespace

import pytest
from support.models import randomize

import hf_layershuffle as ls
from hf_layershuffle.swarm.fitness import warn_if_skips_cover_no_worker, warn_if_unfit
from hf_layershuffle.swarm.policy import Policy


def config(shuffle_mode="none", layerdrop=0.0):
    return SimpleNamespace(shuffle_mode=shuffle_mode, layerdrop=layerdrop)


@pytest.mark.parametrize(
    ("model", "policy", "parts"),
    [
        (config(), Policy("free"), ["`policy='free'` runs its layers in any order"]),
        (config(), Policy("strict", max_skips=2), ["`max_skips=2` leaves layers out"]),
        (config(), Policy("free", max_skips=1), ["runs its layers in any order, `max_skips=1` leaves layers out"]),
        (config("window"), Policy("free"), [r"`shuffle_mode='window'`"]),
        (config(layerdrop=0.2), Policy("free", max_skips=1), ["runs its layers in any order. Expect"]),
        (SimpleNamespace(), Policy("free"), ["`shuffle_mode='none'`"]),
    ],
)
def test_what_a_model_was_not_trained_for_is_said(model, policy, parts, caplog, tmp_path):
    text = warn_if_unfit(model, tmp_path, policy)
    assert text in caplog.text
    assert all(part in text for part in [*parts, "Expect wrong answers", "hf-layershuffle evaluate"])


@pytest.mark.parametrize(
    ("model", "policy"),
    [
        (config("arbitrary"), Policy("free", max_skips=3)),
        (config(), Policy("strict")),
        (config(layerdrop=0.2), Policy("strict", max_skips=2)),
    ],
)
def test_what_a_model_was_trained_for_is_no_reason_to_warn(model, policy, caplog, tmp_path):
    assert warn_if_unfit(model, tmp_path, policy) is None
    assert not caplog.text


def test_the_models_own_report_says_what_it_costs(vit, batch, tmp_path, caplog):
    model = randomize(vit.classifier()).eval()
    model.save_pretrained(tmp_path)
    data = [{"pixel_values": image, "labels": int(label)} for image, label in zip(*batch.values())]
    report = ls.evaluate_robustness(model, data, num_orders=4, num_subsets=2)
    report.save(tmp_path)
    with_report = ls.Swarm.from_pretrained(tmp_path, transport="local", workers=2, max_skips=1)
    assert with_report.policy.max_skips == 1
    assert (
        f"accuracy {report.sequential.accuracy:.4f} in sequential order, {report.arbitrary.accuracy.mean:.4f} in "
        f"arbitrary order, {report.pruning['arbitrary'][2].accuracy.mean:.4f} with 3 of 4 layers (6 images of"
    ) in caplog.text
    (tmp_path / "robustness.json").write_text("{}")
    assert "Expect wrong answers" in warn_if_unfit(config(), tmp_path, Policy("free"))
    assert "The model's report could not be read" in caplog.text


@pytest.mark.parametrize(
    ("placement", "max_skips", "most"),
    [
        ({"a": (0, 1), "b": (2,)}, 1, 2),
        ({"a": (0, 1), "b": (2,)}, 2, None),
        ({"a": (0, 1), "b": (2,)}, 0, None),  # no skips are wanted
        ({"a": (0, 1, 2), "b": (1, 2)}, 1, None),  # replicas
    ],
)
def test_skips_that_cover_no_dead_worker_are_warned_of(placement, max_skips, most, caplog):
    warn_if_skips_cover_no_worker(placement, Policy(max_skips=max_skips))
    assert (f"Take `max_skips={most}`" in caplog.text) == (most is not None) == bool(caplog.text)
