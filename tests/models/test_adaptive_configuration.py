"""Fields of the configuration by which fewer layers or MLPs run, and how they go together."""

import pytest
import torch

import hf_layershuffle as ls
from hf_layershuffle.adaptive.exit_calibration import ExitCalibration
from hf_layershuffle.merging.merged_model import write_merged_model
from hf_layershuffle.models.exit_rule import forget_exits


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def make_vit(**flags):
    torch.manual_seed(0)
    config = ls.LayerShuffleViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        **{"num_labels": 5, "layer_controller": True, "halting_head": True, **flags},
    )  # fmt: skip
    return ls.LayerShuffleViTForImageClassification(config).eval()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"exit_threshold": 0.9, "layer_budget": 2}, "`layer_budget` is 2 and `exit_threshold` is 0.9"),
        ({"exit_threshold": 0.9, "exit_patience": 2}, "set the other to None"),
        ({"layer_budget": 99}, "`layer_budget` is 99, and 4 layers run; it must be from 1 to 4"),
        ({"layer_budget": 3, "execution_order": [0, 1]}, "must be from 1 to 2 .the length of `execution_order`"),
        ({"layer_budget": 2, "layer_controller": False}, "there is no layer controller"),
        ({"skipped_mlps": [9]}, "`skipped_mlps` holds position 9"),
        ({"skipped_mlps": [2], "execution_order": [0, 1]}, "`skipped_mlps` holds position 2"),
    ],
    ids=str,
)
@torch.no_grad()
def test_what_does_not_go_together_is_neither_run_nor_saved(values, message, tmp_path):
    model = make_vit()
    for name, value in values.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        model(IMAGES)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@torch.no_grad()
def test_a_budget_may_be_as_long_as_the_order(tmp_path):
    order = [0, 1, 2, 3, 0, 1]
    model = make_vit(execution_order=order, layer_budget=6)
    assert model(IMAGES).num_layers_run.tolist() == [6] * 4
    with pytest.raises(ValueError, match="`layer_budget` is 7, and 6 layers run"):
        make_vit(execution_order=order, layer_budget=7)


def test_a_rule_is_applied_instead_of_a_budget():
    model = make_vit(layer_budget=2)
    ExitCalibration(0.5, "probability", None, 1, 1, 0, (0, 0), 2, (1, 2), 4, 1, 1, True).apply(model)
    assert model.config.layer_budget is None
    assert model.config.exit_threshold == 0.5


@torch.no_grad()
def test_loading_without_a_part_leaves_out_what_needs_it(tmp_path, caplog):
    make_vit(layer_budget=2).save_pretrained(tmp_path / "budget")
    make_vit(exit_threshold=0.5, exit_criterion="halting").save_pretrained(tmp_path / "halting")
    make_vit(exit_threshold=0.5).save_pretrained(tmp_path / "sure")
    load = ls.LayerShuffleViTForImageClassification.from_pretrained
    model = load(tmp_path / "budget", layer_controller=False).eval()
    assert model(IMAGES).num_layers_run is None and model.config.layer_budget is None
    assert "`layer_budget` 2 is not kept" in caplog.text
    assert ls.load_classifier(tmp_path / "budget", layer_controller=False).config.layer_budget is None
    assert load(tmp_path / "budget").config.layer_budget == 2
    model = load(tmp_path / "halting", halting_head=False).eval()
    assert (model.config.exit_threshold, model.config.exit_criterion) == (None, "probability")
    assert "`exit_threshold` 0.5 is not kept" in caplog.text
    model(IMAGES, exit_threshold=0.9)
    assert load(tmp_path / "halting").config.exit_criterion == "halting"
    assert load(tmp_path / "sure", halting_head=False).config.exit_threshold == 0.5
    with pytest.raises(ValueError, match="there is no layer controller"):
        load(tmp_path / "budget", layer_controller=False, layer_budget=3)


def test_a_criterion_goes_with_its_head():
    config = make_vit(exit_threshold=0.5, exit_criterion="halting").config
    forget_exits(config)
    assert (config.exit_threshold, config.exit_criterion) == (None, "halting")
    config.halting_head = False
    forget_exits(config)
    assert config.exit_criterion == "probability"


@pytest.mark.parametrize("rule", [{"exit_criterion": "bogus"}, {"exit_criterion": "margin"}, {"exit_patience": 0}])
def test_a_call_with_a_budget_gives_no_half_of_a_rule(rule):
    with pytest.raises(ValueError, match=next(iter(rule)) if "exit_criterion" in rule else "give one of them"):
        make_vit()(IMAGES, layer_budget=2, **rule)
    with pytest.raises(ValueError, match=next(iter(rule))):
        make_vit(layer_budget=2)(IMAGES, **rule)


@torch.no_grad()
def test_off_is_of_its_own_field():
    model = make_vit(layer_budget=2)
    assert model(IMAGES, exit_threshold="off").num_layers_run.tolist() == [2] * 4
    assert model(IMAGES, layer_budget="off").num_layers_run is None


def test_a_shorter_merge_of_a_base_with_a_longer_order(tmp_path):
    base = make_vit(execution_order=[0, 1, 2, 3, 0, 1], layer_budget=6, skipped_mlps=[5])
    base.save_pretrained(tmp_path / "base")
    plan = ls.MergePlan(
        sources={"a": str(tmp_path / "base")}, base="a", layers=[{"source": "a", "layer": index} for index in (0, 2)]
    )
    write_merged_model(plan, tmp_path / "merged")
    config = ls.load_classifier(tmp_path / "merged").config
    assert (config.num_hidden_layers, config.execution_order, config.layer_budget) == (2, "sequential", None)
    assert config.skipped_mlps is None and config.exit_criterion == "probability"
