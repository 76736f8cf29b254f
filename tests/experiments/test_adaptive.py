"""Runs experiments/adaptive.py as a user does, on few digits and with tiny models that are there already."""

import json
from dataclasses import replace

import pytest
from conftest import REPOSITORY, Architecture, run_here, script
from support.analysis import randomize
from transformers import ViTImageProcessor

from hf_layershuffle.adaptive.budget_report import BudgetReport


PROGRAM = REPOSITORY / "experiments" / "adaptive.py"
MARKERS = [f"<!-- {word} adaptive: rendered by experiments/adaptive.py -->" for word in ("begin", "end")]
LABELS = {"id2label": {i: str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)}}


def adaptive(folder, *arguments):
    paths = ("--records", folder / "records.jsonl", "--page", folder / "page.md", "--folders", folder)
    return run_here(script(PROGRAM).main, "adaptive.py", *arguments, *paths)


def save(model, folder):
    randomize(model).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    (folder / "all_results.json").write_text("{}")  # it is trained


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adaptive")
    vit = Architecture("vit")
    sizes = dict(num_labels=10, num_hidden_layers=3, **LABELS)
    for seed in (0, 1):
        save(vit.classifier(seed=seed, **sizes), folder / f"digits-free-{seed}")
        save(vit.classifier(seed=seed, halting_head=True, **sizes), folder / f"digits-exits-{seed}")
        save(vit.classifier(seed=seed, layer_controller=True, **sizes), folder / f"digits-controller-{seed}")
        plain = vit.plain_classifier(seed=seed, **(sizes | {"num_hidden_layers": 2}))
        save(plain, folder / f"digits-plain-{seed}-2")
    (folder / "page.md").write_text("before\n\n" + "\n".join(MARKERS) + "\n\nafter\n")
    few = ("--layers", 2, "--max_eval_samples", 40, "--max_calibration_samples", 40, "--batch_size", 20)
    result = adaptive(folder, "digits", "--seeds", 0, 1, *few)
    assert result.returncode == 0, result.stderr
    return folder


def test_each_seed_is_a_line_with_every_kind_of_model(measured):
    records = [json.loads(line) for line in (measured / "records.jsonl").read_text().splitlines()]
    assert [(each["dataset"], each["seed"]) for each in records] == [("digits", 0), ("digits", 1)]
    assert set(records[0]["models"]) == {"free", "exits", "controller", "plain 2"}
    report = BudgetReport.from_dict(records[1]["report"])
    policies = report.by_policy()
    assert {"exit-halting", "layer-controller", "searched-program", "exit-probability"} <= policies.keys()
    assert "exit-probability, weights of trained exits" in policies
    assert {each.label for each in policies["other models"]} == {"plain, 2 layers", "trained exits, all layers"}
    assert report.num_images == report.num_chosen_on == 40


def test_the_page_holds_means_and_the_picture_is_beside_it(measured):
    page = (measured / "page.md").read_text()
    assert page.startswith("before") and page.endswith("after\n")
    assert "Mean and sample standard deviation over 2 seeds" in page
    reports = [
        BudgetReport.from_dict(json.loads(line)["report"])
        for line in (measured / "records.jsonl").read_text().splitlines()
    ]
    whole = [report.whole.accuracy for report in reports]
    deviation = abs(whole[0] - whole[1]) / 2**0.5
    assert f"| all layers | in its own order | {sum(whole) / 2:.4f} | {deviation:.4f} | 3.00 |" in page
    assert (measured / "adaptive-budget.png").is_file()
    (measured / "page.md").write_text("\n".join(MARKERS))
    assert adaptive(measured, "--render").returncode == 0
    assert (measured / "page.md").read_text().count("|") == page.count("|")


@pytest.fixture
def point(measured):
    line = (measured / "records.jsonl").read_text().splitlines()[0]
    whole = BudgetReport.from_dict(json.loads(line)["report"]).whole

    def made(label: str, cost: float, limit: int | None = None):
        chosen = {} if limit is None else {"max_mean_layers": limit}
        return replace(whole, policy="p", label=label, multiply_adds=cost, chosen=chosen)

    return made


@pytest.fixture
def aligned(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "experiments")

    def names(*seeds):
        return [{name: each.label for name, each in named} for named in script(PROGRAM).aligned(list(seeds))]

    return names


def test_seeds_are_aligned_by_the_numbers_of_layers(point, aligned):
    """The second has one threshold for two and three layers, the third nothing for two."""
    all_three = [point("threshold 0.3", 1, 2), point("threshold 0.7", 3, 4), point("threshold 0.5", 2, 3)]
    two = [point("threshold 0.4", 1, 2), point("threshold 0.6", 3, 4)]
    late = [point("threshold 0.8", 2, 3), point("threshold 0.9", 3, 4), point("threshold 0.5 (Q-exit)", 9)]
    first, second, third = aligned(all_three, two, late)
    names = ["threshold 1 of 3", "threshold 2 of 3", "threshold 3 of 3"]
    assert first == dict(zip(names, ("threshold 0.3", "threshold 0.5", "threshold 0.7")))
    assert second == dict(zip(names, ("threshold 0.4", "threshold 0.4", "threshold 0.6")))
    fixed = {"threshold 0.5 (Q-exit)": "threshold 0.5 (Q-exit)"}
    assert third == dict(zip(names[1:], ("threshold 0.8", "threshold 0.9"))) | fixed
    # A number of layers whose threshold is the fixed one
    both, _ = aligned([point("threshold 0.5 (Q-exit)", 1, 2), point("threshold 0.9", 3, 4)], all_three)
    expected = ("threshold 0.5 (Q-exit)", "threshold 0.5 (Q-exit)", "threshold 0.9")
    assert both == dict(zip(names, expected)) | fixed


def test_without_numbers_of_layers_the_rank_of_a_seed_counts(point, aligned):
    first, second = aligned(
        [point("cost weight 0.2", 1), point("cost weight 0.1", 4)],
        [point("cost weight 0.3", 2), point("patience 2", 1)],
    )
    assert first == {"cost weight 1 of 2": "cost weight 0.2", "cost weight 2 of 2": "cost weight 0.1"}
    assert second == {"patience 2": "patience 2", "cost weight 1 of 1": "cost weight 0.3"}


def test_a_setting_that_a_seed_lacks_is_left_out_of_the_means(measured, point, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "experiments")
    report = BudgetReport.from_dict(json.loads((measured / "records.jsonl").read_text().splitlines()[0])["report"])
    reports = [
        replace(report, points=[point("patience 2", 2.0), point("patience 3", 3.0)]),
        replace(report, points=[point("patience 2", 4.0)]),
    ]
    mean, groups = script(PROGRAM).means_of(reports)
    assert [(each.label, each.multiply_adds) for each in mean.points] == [("patience 2", 3.0)]
    assert len(groups["p", "patience 2"]) == 2


def test_what_is_missing_is_said(tmp_path):
    (tmp_path / "page.md").write_text("nothing")
    result = adaptive(tmp_path, "fashion-mnist", "--seeds", 3)
    assert result.returncode == 2 and "There is no free model in" in result.stderr and "--free" in result.stderr
    assert not (tmp_path / "records.jsonl").exists()
    assert adaptive(tmp_path).returncode == 2
