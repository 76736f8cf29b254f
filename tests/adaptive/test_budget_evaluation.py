"""Accuracy against cost: the numbers are those of the model run so, and what is chosen is chosen on other data."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import Architecture
from support.analysis import make_items, randomize
from torch.utils.data import DataLoader, IterableDataset

import hf_layershuffle as ls
from hf_layershuffle.adaptive import budget_evaluation, measured_cost
from hf_layershuffle.adaptive.budget_evaluation import evaluate_budget
from hf_layershuffle.adaptive.budget_measurement import wilson_interval
from hf_layershuffle.adaptive.budget_report import BudgetPoint, BudgetReport, with_fronts
from hf_layershuffle.adaptive.measured_cost import counted_multiply_adds, seconds_of_all, some_of
from hf_layershuffle.adaptive.policies import Setting
from hf_layershuffle.data.dataloading import as_dataloader
from hf_layershuffle.evaluation.robustness import score_execution_orders
from hf_layershuffle.models.exit_rule import ExitRule


ITEMS, OTHERS = make_items(48, seed=1), make_items(40, seed=2)
# Of the tiny ViT: 5 tokens of width 32, MLPs of width 64
LAYER = 5 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 5 * 5 * 32
PATCHES, HEAD = 4 * (3 * 4 * 4) * 32, 32 * 5
FIELDS = ("exit_threshold", "exit_criterion", "exit_patience")


def free_model(**flags):
    return randomize(Architecture("vit").classifier(**flags)).eval()


def evaluated(model, policies, **kwargs):
    arguments = {"num_layers_run": [2, 3], "measure_time": False, "progress": False, "batch_size": 16} | kwargs
    return evaluate_budget(model, ITEMS, OTHERS, policies=policies, **arguments)


class FixedOrder:
    """A policy of somebody else."""

    def __init__(self, model, name="mine", order=(1, 0)):
        self.model, self.name, self.order = model, name, list(order)
        self.times_asked = 0

    def settings(self):
        self.times_asked += 1
        return [Setting("one", lambda inputs: self.model(**inputs, execution_order=self.order))]


def test_static_points_are_those_of_the_model_in_that_order():
    model = free_model()
    report = evaluated(model, ["evenly-spaced", "searched-layers"], rivals={"other": free_model(seed=1)})
    scores = score_execution_orders(model, ITEMS, [[0, 3], [0, 2, 3], [0, 1, 2, 3]], progress=False)
    spaced = report.by_policy()["evenly-spaced"]
    assert [each.accuracy for each in (*spaced, report.whole)] == pytest.approx([s.accuracy for s in scores])
    assert [each.multiply_adds for each in spaced] == [PATCHES + HEAD + count * LAYER for count in (2, 3)]
    assert report.whole.multiply_adds == PATCHES + HEAD + 4 * LAYER
    assert [each.mean_num_layers for each in (*spaced, report.whole)] == [2, 3, 4]
    assert [each.accuracy_loss for each in spaced] == pytest.approx(
        [scores[2].accuracy - s.accuracy for s in scores[:2]]
    )
    assert [each.chosen["execution_order"] for each in spaced] == [[0, 3], [0, 2, 3]]
    kept = ls.search_layers(model, as_dataloader(OTHERS), 2, progress=False)  # on the calibration data
    assert report.by_policy()["searched-layers"][0].chosen["execution_order"] == kept
    rival = score_execution_orders(free_model(seed=1), ITEMS, [[0, 1, 2, 3]], progress=False)[0]
    assert report.by_policy()["other models"][0].accuracy == pytest.approx(rival.accuracy)


@pytest.mark.parametrize("criterion", ["margin", "patience"])
def test_exits_are_chosen_on_the_calibration_data_and_cost_what_they_run(criterion):
    model = free_model()
    report = evaluated(model, [f"exit-{criterion}"])
    table = ls.answers_after_layers(model, OTHERS, progress=False)[0]
    inputs = torch.stack([item["pixel_values"] for item in ITEMS])
    labels = torch.tensor([int(item["labels"]) for item in ITEMS])
    assert report.points
    for point in report.points:
        rule = {name: point.chosen[name] for name in FIELDS if name in point.chosen}
        with torch.no_grad():
            outputs = model(inputs, **rule)
        assert point.mean_num_layers == outputs.num_layers_run.float().mean().item()
        assert point.accuracy == pytest.approx((outputs.logits.argmax(-1) == labels).float().mean().item())
        known = ExitRule(*(rule.get(name, default) for name, default in zip(FIELDS, (None, "probability", None))))
        assert table.num_layers_run(known).mean() <= point.chosen["max_mean_layers"]
        layers_alone = PATCHES + point.mean_num_layers * LAYER
        assert layers_alone + HEAD < point.multiply_adds < layers_alone + 5 * (HEAD + PATCHES)  # heads between layers


def test_a_random_control_is_drawn_for_many_batches_and_averaged():
    model = free_model()
    orders = []
    forward = type(model).forward

    def noted(self, *args, execution_order=None, **kwargs):
        orders.append(tuple(execution_order or ()))
        return forward(self, *args, execution_order=execution_order, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", noted)
        report = evaluated(model, ["random-programs"], num_layers_run=[2])
    drawn = [order for order in orders if order]
    assert len(drawn) == 33 and len(set(drawn)) > 8 and all(len(set(order)) == 2 for order in drawn)  # 11 passes of 3
    found = {
        o: s.accuracy for o, s in zip(set(drawn), score_execution_orders(model, ITEMS, set(drawn), progress=False))
    }
    assert min(found.values()) < report.points[0].accuracy < max(found.values())


def test_what_a_model_learns_in_its_first_call_is_not_counted():
    """How its layers hand on, where images run different ones."""
    costs = {
        count: evaluated(free_model(layer_controller=True), ["layer-controller"], num_layers_run=counts)
        .by_policy()["layer-controller"][-1]
        .multiply_adds
        for count, counts in ((3, [2, 3]), ("first", [3]))
    }
    assert costs[3] == costs["first"]


def test_what_the_configuration_says_is_one_point_and_does_not_touch_the_others():
    model = free_model()
    plain = evaluated(model, ["evenly-spaced"])
    model.config.exit_threshold, model.config.exit_criterion = 0.0, "margin"
    report = evaluated(model, None)
    assert report.whole == plain.whole
    configured = report.by_policy()["as-configured"][0]
    assert configured.mean_num_layers == 1 and configured.label == "threshold 0.0, criterion margin"
    assert (model.config.exit_threshold, model.config.exit_criterion) == (0.0, "margin")
    assert {"exit-entropy", "searched-program", "random-programs", "skipped-mlps"} <= report.by_policy().keys()
    model.config.exit_threshold = None
    with pytest.raises(ValueError, match="'as-configured', which this model has not; this model has exit-probability"):
        evaluated(model, ["as-configured"])


def test_a_stopped_evaluation_goes_on_behind_what_is_done(tmp_path):
    model = free_model()
    first, second = FixedOrder(model, "first"), FixedOrder(model, "second", (2, 3))
    expected = evaluated(model, [first, second])

    class Stopping(FixedOrder):
        def settings(self):
            raise KeyboardInterrupt

    file = tmp_path / "out" / "progress.json"
    with pytest.raises(KeyboardInterrupt):
        evaluated(model, [first, Stopping(model, "second")], progress_file=file)
    assert file.is_file() and model.config.exit_threshold is None
    report = evaluated(model, [first, second], progress_file=file)
    assert (first.times_asked, second.times_asked) == (2, 2) and not file.exists()
    assert report.points == expected.points
    with pytest.raises(KeyboardInterrupt):
        evaluated(model, [first, Stopping(model, "second")], progress_file=file)
    evaluated(model, [first, second], progress_file=file, seed=1)  # of other settings
    assert first.times_asked == 4


def changed(model, fields):
    for name, value in fields.items():
        setattr(model.config, name, value)


@pytest.mark.parametrize(
    "fields",
    [{"execution_order": [1]}, {"exit_threshold": 0.3}, {"exit_patience": 1}, {"skipped_mlps": [1]}],
    ids=str,
)
@pytest.mark.parametrize("is_rival", [False, True])
def test_a_stopped_evaluation_of_another_configuration_begins_anew(tmp_path, fields, is_rival):
    model, rival = free_model(), free_model(seed=1)
    first, file = FixedOrder(model, "first"), tmp_path / "progress.json"

    class Stopping(FixedOrder):
        def settings(self):
            raise KeyboardInterrupt

    arguments = {"rivals": {"rival": rival}, "progress_file": file}
    with pytest.raises(KeyboardInterrupt):
        evaluated(model, [first, Stopping(model, "second")], **arguments)
    changed(rival if is_rival else model, fields)
    evaluated(model, [first, FixedOrder(model, "second")], **arguments)
    assert first.times_asked == 2


@pytest.mark.parametrize("seeded", [False, True])
def test_random_orders_are_those_of_the_seed(seeded):
    model = free_model(execution_order="arbitrary")
    if seeded:  # as a Trainer leaves it
        model.seed_execution_order(3)
    stream = model.execution_order_stream
    policy = FixedOrder(model, "whole")
    policy.settings = lambda: [Setting("whole", lambda inputs: model(**inputs))]
    reports = [evaluated(model, [policy]) for _ in range(3)]
    assert all((each.whole, each.points) == (reports[0].whole, reports[0].points) for each in reports)
    assert reports[0].points[0].accuracy == reports[0].whole.accuracy  # in the same orders
    assert model.execution_order_stream is stream
    assert len({evaluated(model, [policy], seed=seed).whole.accuracy for seed in range(6)}) > 1


def test_answers_that_are_not_numbers_are_wrong():
    model = free_model()

    class Broken(FixedOrder):
        def settings(self):
            def run(inputs):
                outputs = model(**inputs)
                outputs.logits = outputs.logits * float("nan")
                return outputs

            return [Setting("broken", run)]

    assert evaluated(model, [Broken(model)]).points[0].accuracy == 0.0


def test_modes_come_back_and_rivals_run_without_dropout():
    model, rival = free_model(), free_model(seed=1, hidden_dropout_prob=0.5)
    rival.train()
    first, second = (evaluated(model, [FixedOrder(model)], rivals={"rival": rival}) for _ in range(2))
    assert first.points == second.points and rival.training and not model.training


BAD = {
    "`policies` holds 'exit-hope', which is no policy; this model has ": dict(policies=["exit-hope"]),
    "`policies` holds 'evenly-spaced' more than once": dict(policies=["evenly-spaced", "evenly-spaced"]),
    "`policies` is 'evenly-spaced'; pass a list": dict(policies="evenly-spaced"),
    "`num_layers_run` holds 5; it must be a list of integers from 1 to 4": dict(num_layers_run=[2, 5]),
    "`num_layers_run` holds 0;": dict(num_layers_run=[0]),
    "`num_layers_run` holds 2.0;": dict(num_layers_run=[1, 2.0]),
    "`num_layers_run` holds True;": dict(num_layers_run=[True]),
    "`num_layers_run` is 3; pass a list of integers from 1 to 4": dict(num_layers_run=3),
    "`num_layers_run` is '3'": dict(num_layers_run="3"),
    "`num_layers_run` is empty": dict(num_layers_run=[]),
    "`num_search_samples` is 0": dict(num_search_samples=0),
    "`seed` is -1": dict(seed=-1),
    "`rivals` holds a str for 'x'": dict(rivals={"x": "a path"}),
    "`rivals` holds the name 5": dict(rivals={5: None}),
    "`rivals` is a list; pass models by name": dict(rivals=[None]),
    "`policies` is 5; pass a list": dict(policies=5),
    "`policies` holds '5'; each is a name, or an object": dict(policies=[5]),
    '`policies` holds "<class .*FixedOrder\'>"; each is a name': dict(policies=[FixedOrder]),
    "a policy with the name None": dict(policies=[FixedOrder(None, None)]),
    "'all layers' is that of the whole model": dict(policies=[FixedOrder(None, "all layers")]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ValueError, match=message):
        evaluated(free_model(), **({"policies": ["evenly-spaced"]} | BAD[message]))


def test_data_to_choose_on_is_needed_and_is_other_data():
    model = free_model()
    mixed = OTHERS[:35] + ITEMS[:5]
    for same, both in ((ITEMS, "48 of the 48"), (ITEMS[:20:-1], "27 of the 27"), (mixed, "5 of the 40")):
        with pytest.raises(ValueError, match=f"^{both} examples of `calibration_data` are among those"):
            evaluate_budget(model, ITEMS, same, progress=False)
    with pytest.raises(ValueError, match="'exit-margin' is made by calibration data, and `calibration_data` is None"):
        evaluate_budget(model, ITEMS, policies=["exit-margin"], progress=False)
    report = evaluate_budget(model, ITEMS, policies=[FixedOrder(model)], measure_time=False, progress=False)
    assert report.num_chosen_on == 0


def test_a_few_examples_in_both_are_told(caplog):
    """As the splits of many datasets have them. An image is the same whatever its label is."""
    model = free_model()
    few = OTHERS[:36] + [{**item, "labels": 0} for item in ITEMS[:4]]
    evaluate_budget(model, ITEMS, few, policies=[FixedOrder(model)], measure_time=False, progress=False)
    assert "4 of the 40 examples of `calibration_data` are among those that are reported on" in caplog.text
    caplog.clear()
    evaluated(model, [FixedOrder(model)], num_layers_run=np.array([2, 3]))
    assert "among those" not in caplog.text


def test_a_policy_may_not_have_the_name_of_the_rivals():
    model = free_model()
    policy = FixedOrder(model, "other models")
    assert evaluated(model, [policy]).points[0].policy == "other models"
    with pytest.raises(ValueError, match="one named 'other models', as `rivals` are called"):
        evaluated(model, [policy], rivals={"rival": free_model(seed=1)})


def test_a_model_that_runs_fewer_layers_by_its_order():
    """The choice is among the layers of its order, so no number of layers is above that of them."""
    model = free_model(layer_controller=True, execution_order=[3, 1])
    names = ["layer-controller", "layer-controller-for-all", "random-layers"]
    report = evaluated(model, names, num_layers_run=[1, 2, 3])
    for name in names:
        points = report.by_policy()[name]
        assert [(point.label, point.mean_num_layers) for point in points] == [("1 layer", 1), ("2 layers", 2)]


def test_rivals_of_other_classes_or_inputs_are_refused():
    model = free_model()
    for message, rival in {
        r"has the classes .* \(3\), and the model .* \(5\)": free_model(num_labels=3),
        "takes images of 1 channels, and the model of 3": free_model(num_channels=1),
    }.items():
        with pytest.raises(ValueError, match=message):
            evaluated(model, ["evenly-spaced"], rivals={"rival": rival})


def test_attention_counts_as_in_torch_on_an_accelerator():
    model = free_model(attn_implementation="sdpa")
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
    eager = free_model(attn_implementation="eager")
    with torch.no_grad():
        found, expected = (counted_multiply_adds(lambda x, m=m: m(**x), inputs)[1] for m in (model, eager))
    assert found == expected == 2 * (PATCHES + HEAD + 4 * LAYER)


def test_runs_take_turns_and_the_median_counts(monkeypatch):
    clock, calls = [0.0], []
    lasts = {"a": itertools.cycle([9.0, 1.0, 1.0, 5.0]), "b": itertools.cycle([9.0, 3.0, 2.0, 2.0])}

    def run_of(name):
        def run(inputs):
            calls.append(name)
            clock[0] += next(lasts[name])

        return run

    monkeypatch.setattr(measured_cost.time, "perf_counter", lambda: clock[0])
    found = seconds_of_all([run_of("a"), run_of("b")], [{"pixel_values": torch.zeros(1)}], 3)
    assert found == [1.0, 2.0]  # the first call of each, 9 seconds, is not counted
    assert calls == list("ab" * 4)


def test_some_examples_are_spread_over_the_data():
    loader = as_dataloader([{"pixel_values": torch.full((1,), i), "labels": 0} for i in range(10)], batch_size=4)
    found = torch.cat([batch["pixel_values"] for batch in some_of(loader, 4, 2)])
    assert found.flatten().tolist() == [0, 3, 6, 9]
    assert sum(len(batch["labels"]) for batch in some_of(loader, 25)) == 25


def test_some_examples_are_of_those_that_a_sampler_gives():
    items = [{"pixel_values": torch.full((1,), i), "labels": 0} for i in range(10)]
    rows_read = {
        "a sampler": DataLoader(items, batch_size=2, sampler=[9, 7, 5, 6]),
        "a sampler of batches": DataLoader(items, batch_sampler=[[9, 7], [5, 6]]),
    }
    for loader in rows_read.values():
        found = torch.cat([batch["pixel_values"] for batch in some_of(loader, 4)])
        assert found.flatten().tolist() == [5, 6, 7, 9]
    for loader in (DataLoader(items, batch_size=None), DataLoader(Stream())):
        with pytest.raises(ValueError, match=r"does not make batches of rows of its dataset .*; pass one of"):
            some_of(loader, 4)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


def test_programs_are_searched_on_the_calibration_data_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hf_layershuffle.adaptive.policies.search_layers",
        lambda model, loader, count, progress: [seen.extend(batch["labels"].tolist()) for batch in loader] and [0, 1],
    )
    both = [item | {"labels": int(i >= 30)} for i, item in enumerate(make_items(60))]
    reported, held_out = (DataLoader(both, batch_size=8, sampler=rows) for rows in (range(30), range(30, 60)))
    report = evaluate_budget(
        free_model(), reported, held_out, policies=["searched-layers"], num_layers_run=[2], num_search_samples=12,
        measure_time=False, progress=False,
    )  # fmt: skip
    assert seen == [1] * 12 and (report.num_images, report.num_chosen_on) == (30, 30)


def test_only_the_generator_whose_state_comes_back_is_seeded(monkeypatch):
    model = free_model()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: 1 / 0)  # which seeds accelerators, too
    evaluated(model, [FixedOrder(model), "predicted-programs"])


def test_wilson_interval():
    assert wilson_interval(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-4)
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def point(policy, accuracy, multiply_adds, time=None):
    ratio = {} if time is None else {"1": time}
    return BudgetPoint(policy, "x", accuracy, (0, 1), 0.0, (0, 0), None, multiply_adds, ratio, ratio)


def test_the_pareto_front():
    points = [point("a", 0.9, 10), point("b", 0.8, 5), point("c", 0.8, 6), point("d", 0.9, 10), point("e", 0.7, 5)]
    found = [each.policy for each in with_fronts(points, ["multiply_adds"]) if each.on_front]
    assert found == ["a", "b", "d"]  # `a` and `d` are equal; `c` and `e` are dominated
    control = with_fronts([point("random-layers", 0.9, 5, 2.0), point("b", 0.8, 5, 2.0)], ["multiply_adds"])
    assert [each.on_front for each in control] == [(), ("multiply_adds",)]  # a control stands on no front
    by_time = with_fronts([point("a", 0.9, 10, 2.0), point("b", 0.8, 5, 2.0)], ["multiply_adds", "time_at_batch_1"])
    assert [each.on_front for each in by_time] == [("multiply_adds", "time_at_batch_1"), ("multiply_adds",)]


def test_reports_save_load_and_say_what_is_wrong(tmp_path):
    model = free_model()
    report = evaluated(model, ["evenly-spaced"], measure_time=True, model_name="m", dataset_name="d")
    assert report.costs == ["multiply_adds", "time_at_batch_1", "time_at_batch_64"]
    assert report.whole.time_ratio == {"1": 1.0, "64": 1.0}
    assert all(0 < each.time_ratio["64"] and 0 < each.seconds["1"] for each in report.points)
    assert "Time: a fraction" in str(report) and "Time" not in str(evaluated(model, ["evenly-spaced"]))
    path = report.save(tmp_path)
    assert BudgetReport.load(tmp_path) == report
    text = str(report)
    assert "evenly-spaced" in text and f"{report.whole.accuracy:.4f}" in text and "million multiply-adds" in text
    values = json.loads(path.read_text())
    for change, message in {
        "format": "Its format is 2, and this version reads 1",
        "num_images": "num_images",
        "whole": "policy",
        "extra": r"\['extra'\] are missing or unknown",
    }.items():
        path.write_text(
            json.dumps(values | {change: {"format": 2, "num_images": "many", "whole": {}, "extra": 1}[change]})
        )
        with pytest.raises(ValueError, match=f"is not a budget report: .*{message}"):
            BudgetReport.load(path)
    with pytest.raises(ValueError, match="`cost` is 'joules'; this report has multiply_adds"):
        report.front("joules")


def test_policies_have_distinct_names():
    names = [policy.name for policy in budget_evaluation.POLICIES]
    assert len(set(names)) == len(names) and all(name.replace("-", "").isalpha() for name in names)
