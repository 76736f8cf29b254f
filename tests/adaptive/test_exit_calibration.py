import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel

import hf_layershuffle as ls
from hf_layershuffle.adaptive.exit_calibration import calibrate_exit, interval_of_mean
from hf_layershuffle.adaptive.layer_answers import LayerAnswers, answers_after_layers
from hf_layershuffle.data.dataloading import as_dataloader
from hf_layershuffle.models.exit_rule import CRITERIA, ExitRule


@pytest.fixture(scope="module")
def processor():
    return ls.load_image_processor(ls.example_model())


@pytest.fixture
def model():
    return ls.load_classifier(ls.example_model())


@pytest.fixture(scope="module")
def digits():
    return ls.load_image_datasets("digits")["test"]


@pytest.fixture(scope="module")
def table(processor, digits):
    model = ls.load_classifier(ls.example_model())
    return answers_after_layers(model, digits, processing_class=processor, progress=False)[0]


def by_hand():
    """Three examples of class 0, three layers."""
    answers = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0]])
    sure = np.array([[0.9, 0.9, 0.9], [0.5, 0.8, 0.9], [0.7, 0.6, 0.95]], dtype=np.float32)
    return LayerAnswers((0, 1, 2), np.zeros(3, dtype=np.int64), answers, {"probability": sure})


def test_outcomes_by_hand():
    table = by_hand()
    assert table.num_layers_run(ExitRule(0.7)).tolist() == [1, 2, 1]
    assert table.is_right_by(ExitRule(0.7)).tolist() == [True, True, False]
    assert table.num_layers_run(ExitRule(1.0)).tolist() == [3, 3, 3]
    assert table.num_layers_run(ExitRule(patience=2)).tolist() == [2, 3, 2]
    assert table.is_right_by(ExitRule(patience=2)).tolist() == [True, True, False]
    assert table.at(np.array([2])).is_right.tolist() == [[False, False, True]]


@pytest.mark.parametrize(
    "rule", [ExitRule(0.9), ExitRule(0.8, "margin"), ExitRule(0.7, "entropy"), ExitRule(patience=2)]
)
def test_the_table_tells_what_the_model_does(model, processor, digits, table, rule):
    model.config.exit_criterion = rule.criterion
    model.config.exit_threshold, model.config.exit_patience = rule.threshold, rule.patience
    batch = next(iter(as_dataloader(digits, processor, batch_size=60)))
    with torch.no_grad():
        output = model(batch["pixel_values"])
    assert output.num_layers_run.tolist() == table.num_layers_run(rule)[:60].tolist()
    is_right = output.logits.argmax(-1).numpy() == table.labels[:60]
    assert is_right.tolist() == table.is_right_by(rule)[:60].tolist()
    assert len(set(output.num_layers_run.tolist())) > 1


@pytest.mark.parametrize("criterion", [*CRITERIA, "patience"])
def test_the_rule_keeps_the_limit_and_says_what_it_costs(model, processor, digits, table, criterion):
    common = {"processing_class": processor, "progress": False, "criterion": criterion}
    found = calibrate_exit(model, digits, max_accuracy_loss=0.02, **common)
    assert found.meets_target and found.num_chosen_on == found.num_measured_on == 180
    assert found.mean_num_layers < 5.5  # of 6: something is saved
    # The numbers are of the half that the rule was not chosen on
    rows = np.random.default_rng(0).permutation(360)
    first, second = table.at(rows[:180]), table.at(rows[180:])
    rule = ExitRule(found.exit_threshold, found.exit_criterion, found.exit_patience)
    assert first.is_right[:, -1].mean() - first.is_right_by(rule).mean() <= 0.02
    assert found.accuracy == pytest.approx(second.is_right_by(rule).mean())
    assert found.accuracy_of_all_layers == pytest.approx(second.is_right[:, -1].mean())
    assert found.mean_num_layers == pytest.approx(second.num_layers_run(rule).mean())
    low, high = found.accuracy_loss_interval
    assert low <= found.accuracy_loss <= high and low < high
    low, high = found.mean_num_layers_interval
    assert low < found.mean_num_layers < high
    # No other candidate of this rule's kind is cheaper and within the limit
    if found.exit_threshold is not None:
        lower = ExitRule(max(found.exit_threshold - 0.05, 0), found.exit_criterion)
        loss = first.is_right[:, -1].mean() - first.is_right_by(lower).mean()
        assert loss > 0.02 or first.num_layers_run(lower).mean() >= first.num_layers_run(rule).mean()


def test_intervals_by_hand():
    # Of 98 pairs none differs: 0 ± 1.96 sqrt(1 / 100 / 100)
    low, high = interval_of_mean(np.zeros(98), is_difference=True)
    assert (low, high) == pytest.approx((-0.0196, 0.0196))
    # Of 98 pairs 10 are lost and none won: mean 10 / 100, and 11 / 100 - 0.01 of variance
    low, high = interval_of_mean(np.repeat([1.0, 0.0], [10, 88]), is_difference=True)
    assert (low, high) == pytest.approx((0.1 - 0.06198, 0.1 + 0.06198), abs=1e-4)
    # 1, 2, 3, 4: mean 2.5, population variance 1.25
    assert interval_of_mean(np.arange(1.0, 5.0)) == pytest.approx((2.5 - 1.0957, 2.5 + 1.0957), abs=1e-4)


def test_by_depth(model, processor, digits):
    found = calibrate_exit(model, digits, max_mean_layers=3, processing_class=processor, progress=False)
    assert found.meets_target and 2 < found.mean_num_layers < 3.3
    all_of_it = calibrate_exit(model, digits, max_mean_layers=6, processing_class=processor, progress=False)
    assert all_of_it.accuracy >= found.accuracy
    out_of_reach = calibrate_exit(
        model, digits, max_accuracy_loss=0, criterion="patience", processing_class=processor, progress=False
    )
    assert out_of_reach.meets_target  # by all layers


def test_it_is_applied_and_saved(model, processor, digits, tmp_path):
    found = calibrate_exit(model, digits, max_accuracy_loss=0.02, processing_class=processor, progress=False)
    model.config.exit_patience = model.config.layer_budget = 2
    found.apply(model)
    assert model.config.layer_budget is None  # an example does one of both
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["exit_threshold"] == found.exit_threshold and config["exit_patience"] is None
    assert json.loads(json.dumps(found.to_dict()))["exit_threshold"] == found.exit_threshold


def test_orders_are_those_the_model_runs_in(model, processor, digits):
    common = {"processing_class": processor, "progress": False, "max_samples": 60}
    model.config.execution_order = [2, 0, 1]
    assert calibrate_exit(model, digits, max_accuracy_loss=0.1, **common).num_layers == 3
    model.config.execution_order = "arbitrary"
    found = calibrate_exit(model, digits, max_accuracy_loss=0.1, **common)
    assert found.num_layers == 6
    assert found == calibrate_exit(model, digits, max_accuracy_loss=0.1, **common)
    given = calibrate_exit(model, digits, max_accuracy_loss=0.1, execution_orders=[[0, 1]], **common)
    assert given.num_layers == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of them"),
        ({"max_accuracy_loss": 0.1, "max_mean_layers": 3}, "give one of them"),
        ({"max_accuracy_loss": 1.5}, "`max_accuracy_loss` is 1.5"),
        ({"max_mean_layers": 7}, "`max_mean_layers` is 7; it must be a number from 1 to 6"),
        ({"max_mean_layers": 0}, "from 1 to 6"),
        ({"max_mean_layers": 3, "criterion": "sure"}, "one of probability, entropy, margin, halting, patience"),
        ({"max_mean_layers": 3, "max_samples": 1}, "There is one example"),
        ({"max_mean_layers": 2, "seed": -1}, "`seed` is -1"),
        ({"max_mean_layers": 2, "execution_orders": [[0, 1], [0, 1, 2]]}, "2 to 3 layers; all must be equally long"),
        ({"max_mean_layers": 2, "execution_orders": [0, 1, 2]}, "a list of lists of layer indices"),
        ({"max_mean_layers": 2, "execution_orders": "arbitrary"}, "'arbitrary'; it must be a list of lists"),
        ({"max_mean_layers": 2, "execution_orders": []}, "a list of lists of layer indices"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments(model, processor, digits, arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate_exit(model, digits, processing_class=processor, progress=False, **arguments)


def test_one_layer_is_always_in_reach(model, processor, digits):
    found = calibrate_exit(model, digits, max_mean_layers=1, processing_class=processor, progress=False)
    assert found.meets_target and found.mean_num_layers == 1.0 and found.exit_threshold == 0.0


def test_outputs_that_are_not_numbers_are_wrong_and_never_sure(model, processor, digits):
    """A layer that diverged: what comes after it is no answer."""
    with torch.no_grad():
        next(model.free_layers[3].parameters()).fill_(float("nan"))
    common = {"processing_class": processor, "progress": False, "max_samples": 60}
    table = answers_after_layers(model, digits, **common)[0]
    assert (table.answers[:, 3:] == -1).all() and not table.is_right[:, 3:].any() and table.is_right[:, :3].any()
    rule = ExitRule(0.0)
    assert table.num_layers_run(rule).tolist() == [1] * 60
    found = calibrate_exit(model, digits, max_mean_layers=6, **common)
    assert found.accuracy > 0.3 and found.accuracy_of_all_layers == 0.0
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite after any layer"):
        calibrate_exit(model, digits, max_mean_layers=6, **common)


def test_other_classes_are_refused(model, processor, digits):
    other = digits.select(range(10)).cast_column("label", ClassLabel(names=[f"class {index}" for index in range(10)]))
    with pytest.raises(ValueError, match="the model does not know"):
        calibrate_exit(model, other, max_mean_layers=3, processing_class=processor)


def test_it_is_not_applied_to_a_plain_model(vit, model, processor, digits):
    found = calibrate_exit(model, digits, max_mean_layers=3, processing_class=processor, progress=False)
    plain = vit.plain_classifier()
    with pytest.raises(ValueError, match=r"has no free layer order; make it so by `free_order\(model\)`"):
        found.apply(plain)
    assert not hasattr(plain.config, "exit_threshold")
