"""Exits by a trained head: what the table of answers says of them, and the policies."""

import numpy as np
import pytest
import torch
from support.models import randomize
from torch.utils.data import DataLoader

import hf_layershuffle as ls
from hf_layershuffle.adaptive.halting_policies import HaltingDraws, HaltingExit
from hf_layershuffle.adaptive.layer_answers import LayerAnswers
from hf_layershuffle.adaptive.policies import Calibration
from hf_layershuffle.models.exit_rule import ExitRule


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ls.LayerShuffleViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        num_labels=5, halting_head=True,
    )  # fmt: skip
    model = randomize(ls.LayerShuffleViTForImageClassification(config)).eval()
    with torch.no_grad():
        said = []
        handle = model.halting_head.out.register_forward_hook(lambda module, args, output: said.append(output))
        model(IMAGES, exit_threshold=1.0, exit_criterion="halting")
        handle.remove()
        out, scale = model.halting_head.out, 2 / said[0].std()
        out.weight.mul_(scale)
        out.bias.copy_((out.bias - said[0].median()) * scale - 0.5)
    return model


IMAGES = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(1))
ITEMS = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(IMAGES)]


def by_hand():
    """Two examples of class 0, three layers."""
    left = np.array([[0.25, 0.5, 0.9], [0.75, 0.875, 0.875]], dtype=np.float32)
    answers = np.array([[1, 0, 0], [0, 1, 0]])
    return LayerAnswers((0, 1, 2), np.zeros(2, dtype=np.int64), answers, {"halting": left})


def test_q_exit_by_hand():
    rule = ExitRule(0.5, "halting")
    assert by_hand().num_layers_run(rule).tolist() == [3, 1]  # above 0.5, and not at it
    assert by_hand().is_right_by(rule).tolist() == [True, True]


def test_coins_fall_as_the_head_says():
    drawn = by_hand().drawn_exits(4000, seed=1)
    assert drawn.shape == (4000, 2) and np.array_equal(drawn, by_hand().drawn_exits(4000, seed=1))
    shares = [np.bincount(each, minlength=4)[1:] / 4000 for each in drawn.T]
    # Four standard deviations of a share of 4000 are 0.03
    assert shares[0] == pytest.approx([0.25, 0.25, 0.5], abs=0.03)
    assert shares[1] == pytest.approx([0.75, 0.125, 0.125], abs=0.03)
    assert by_hand().is_right_at(drawn).shape == (4000, 2)
    assert by_hand().is_right_at(np.array([[1, 1], [3, 2]])).tolist() == [[False, True], [True, False]]


def test_draws_vary_and_q_exit_does_not(model):
    table = ls.answers_after_layers(model, ITEMS, progress=False)[0]
    drawn = table.is_right_at(table.drawn_exits(50)).mean(axis=1)
    by_rule = [table.is_right_by(ExitRule(0.5, "halting")).mean() for _ in range(2)]
    assert drawn.std() > 0 == np.std(by_rule)


@torch.no_grad()
def test_the_table_tells_what_the_model_does(model):
    for order in ([0, 1, 2, 3], [3, 1]):
        table = ls.answers_after_layers(model, ITEMS, [order], progress=False)[0]
        output = model(IMAGES, execution_order=order, exit_threshold=0.5, exit_criterion="halting")
        rule = ExitRule(0.5, "halting")
        assert output.num_layers_run.tolist() == table.num_layers_run(rule).tolist()
        assert len(set(output.num_layers_run.tolist())) > 1
        is_right = output.logits.argmax(-1).numpy() == table.labels
        assert is_right.tolist() == table.is_right_by(rule).tolist()


def test_a_threshold_is_chosen_for_a_depth(model):
    found = ls.calibrate_exit(model, ITEMS, max_mean_layers=2.5, criterion="halting", progress=False)
    assert found.meets_target and found.exit_criterion == "halting" and 1 < found.mean_num_layers < 3.2
    found.apply(model)
    with torch.no_grad():
        assert model(IMAGES).num_layers_run.float().mean() < 3.2


def test_a_model_without_a_head():
    config = ls.LayerShuffleViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = ls.LayerShuffleViTForImageClassification(config)
    with pytest.raises(ValueError, match="`criterion` is 'halting', and the model has no halting head"):
        ls.calibrate_exit(model, ITEMS, max_mean_layers=2, criterion="halting", progress=False)
    assert not HaltingExit.applies_to(model) and not HaltingDraws.applies_to(model)
    table = LayerAnswers((0,), np.zeros(1, dtype=np.int64), np.zeros((1, 1), dtype=np.int64), {})
    with pytest.raises(ValueError, match="of a model without a halting head"):
        table.drawn_exits(1)


@torch.inference_mode()
def test_policies(model):
    loader = DataLoader(ITEMS, batch_size=60)
    calibration = Calibration(model, loader, search_loader=loader, num_layers_run=[2, 3])
    assert HaltingExit.applies_to(model)
    settings = HaltingExit(calibration).settings()
    assert "threshold 0.5 (Q-exit)" in [setting.label for setting in settings]
    depths = [setting.run({"pixel_values": IMAGES}).num_layers_run.float().mean().item() for setting in settings]
    assert depths == sorted(depths) and len(depths) >= 2  # cheapest first
    (control,) = HaltingDraws(calibration).settings()
    assert control.is_random
    head = model.halting_head
    drawn = torch.stack([control.run({"pixel_values": IMAGES}).num_layers_run for _ in range(30)])
    assert model.halting_head is head and len(drawn.unique(dim=0)) > 1
    table = ls.answers_after_layers(model, ITEMS, progress=False)[0]
    expected = np.bincount(table.drawn_exits(200).ravel(), minlength=5)[1:] / 12000
    shares = drawn.flatten().bincount(minlength=5)[1:] / drawn.numel()
    # Five standard deviations of a share of 1800 are 0.06
    assert shares.tolist() == pytest.approx(expected.tolist(), abs=0.06)
