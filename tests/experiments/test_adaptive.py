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


def test_a_seed_with_fewer_thresholds_has_its_last_one_in_their_place(measured, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "experiments")
    program = script(PROGRAM)
    report = BudgetReport.from_dict(json.loads((measured / "records.jsonl").read_text().splitlines()[0])["report"])

    def points(**costs):
        labels = {name: name.replace("_", " ").replace("Q", "(Q-exit)") for name in costs}
        return [replace(report.whole, policy="p", label=labels[name], multiply_adds=costs[name]) for name in costs]

    more = replace(report, points=points(threshold_7=20.0, threshold_3=10.0, threshold_5_Q=5.0, patience_2=1.0))
    fewer = replace(report, points=points(threshold_9=12.0, threshold_5_Q=7.0, patience_2=3.0, patience_3=4.0))
    mean, groups = program.means_of([more, fewer])
    # What a seed lacks otherwise is left out, here patience 3
    expected = {"threshold 1 of 2": 11.0, "threshold 2 of 2": 16.0, "threshold 5 (Q-exit)": 6.0, "patience 2": 2.0}
    assert {point.label: point.multiply_adds for point in mean.points} == expected
    assert [each.label for each in groups["p", "threshold 2 of 2"]] == ["threshold 7", "threshold 9"]


def test_what_is_missing_is_said(tmp_path):
    (tmp_path / "page.md").write_text("nothing")
    result = adaptive(tmp_path, "fashion-mnist", "--seeds", 3)
    assert result.returncode == 2 and "There is no free model in" in result.stderr and "--free" in result.stderr
    assert not (tmp_path / "records.jsonl").exists()
    assert adaptive(tmp_path).returncode == 2
