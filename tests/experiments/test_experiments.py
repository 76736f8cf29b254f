"""Runs experiments/grid.py as a user does, on the digits and with a tiny model."""

import json

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY, run_here, script

import hf_layershuffle as ls


EXPERIMENTS = REPOSITORY / "experiments"
SMALL = "--image_size 8 --patch_size 4 --hidden_size 16 --num_attention_heads 2 --num_hidden_layers 4 --max_steps 4"


def grid(folder, *arguments):
    paths = ("--records", folder / "runs.jsonl", "--work_dir", folder / "work", "--pages", folder / "docs" / "page.md")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        return run_here(script(EXPERIMENTS / "grid.py").main, "grid.py", *paths, *arguments)


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))  # the modules of experiments/, as the script finds them


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    arguments = ["--dataset_name", "digits", "--methods", "layershuffle", "--seeds", 0, 1, "--num_orders", 3]
    arguments += ["--num_subsets", 1, "--jobs", 2, "--train_arguments", f"{SMALL} --max_train_samples 64"]
    result = grid(folder, *arguments)
    assert result.returncode == 0, result.stderr
    assert "2 runs to do" in result.stdout
    return folder, arguments, [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_each_run_is_recorded_once(recorded):
    folder, arguments, records = recorded
    assert sorted(record["seed"] for record in records) == [0, 1]
    for record in records:
        assert record["images_seen"] == 4 * 64  # one batch a pass
        assert record["report"]["num_orders"] == 3 and record["report"]["num_images"] == 360
        assert (
            str(folder) not in record["command"]
            and "--output_dir outputs/reproduce/fashion-mnist-" in record["command"]
        )
        assert "--shuffle_mode" not in record["command"] and f"--seed {record['seed']}" in record["command"]
    result = grid(folder, *arguments)
    assert result.returncode == 0 and "0 runs to do" in result.stdout
    assert len((folder / "runs.jsonl").read_text().splitlines()) == 2


def test_the_page_is_rendered_from_the_records_alone(recorded):
    folder, _, records = recorded
    assert grid(folder, "--render").returncode == 0
    page = folder / "docs" / "page.md"
    by_seed = [[score["accuracy"] for score in each["report"]["arbitrary"]["scores"]] for each in records]
    row = next(line for line in page.read_text().splitlines() if line.startswith("| LayerShuffle"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2] == "2"
    assert cells[4] == f"{np.mean(by_seed):.4f} ± {np.std(np.mean(by_seed, axis=1), ddof=1):.4f}"
    assert cells[5] == f"{np.mean(np.std(by_seed, axis=1)):.4f}"
    assert cells[6] == f"{np.min(by_seed):.4f}"
    assert {path.name for path in page.parent.glob("*.png")} == {
        "fashion-mnist-orders.png",
        "fashion-mnist-pruning.png",
    }

    # what a person wrote around the tables stays
    page.write_text(page.read_text() + "\nWhat this means.\n")
    first = page.read_text()
    assert grid(folder, "--render").returncode == 0
    assert page.read_text() == first


def test_merges_of_the_seeds_are_recorded_once_and_rendered(recorded):
    from page import blocks_of, read_records

    folder, arguments, _ = recorded
    records = (folder / "runs.jsonl").read_text()
    try:
        result = grid(folder, *arguments, "--merges", "--num_merges", 3)
        assert result.returncode == 0, result.stderr
        added = (folder / "runs.jsonl").read_text().splitlines()[2:]
        assert len(added) == 1
        merges, command = (json.loads(added[0])[name] for name in ("merges", "command"))
        assert command == (
            "python experiments/grid.py --dataset_name digits --preset fashion-mnist --merges --methods layershuffle "
            f'--seeds 0 1 --num_merges 3 --train_arguments "{SMALL} --max_train_samples 64"'
        )
        assert [len(accuracies) for accuracies in merges.values()] == [3, 3]
        assert "3 merges" not in grid(folder, *arguments, "--merges", "--num_merges", 3).stderr
        merges["any_layer"] = [1.0, 0.0, 0.5]  # merges of so short a training may all be as accurate
        added = json.loads(added[0]) | {"merges": merges}
        (folder / "runs.jsonl").write_text(records + json.dumps(added) + "\n")
        rendered = blocks_of(read_records(folder / "runs.jsonl"))["fashion-mnist"]
        row = next(line for line in rendered.splitlines() if line.startswith("| LayerShuffle"))
        spread = np.std(merges["in_place"], ddof=1)
        assert f" {np.mean(merges['in_place']):.4f} ± {spread:.4f} |" in row
    finally:
        (folder / "runs.jsonl").write_text(records)


def with_accuracies(record, sequential, arbitrary, **fields):
    """A copy of the record with other accuracies, so that a mean, a minimum and a spread differ from each other."""
    record = json.loads(json.dumps(record)) | fields
    record["report"]["sequential"]["accuracy"] = sequential
    for score, accuracy in zip(record["report"]["arbitrary"]["scores"], arbitrary, strict=True):
        score["accuracy"] = accuracy
    for number, group in enumerate(record["report"]["pruning"]["arbitrary"], 1):
        for score in group["scores"]:
            score["accuracy"] = 0.1 * number
    return record


@pytest.fixture(scope="module")
def record():
    """Of a run, as run_one makes it; its accuracies are those of an untrained model."""
    items = [{"pixel_values": torch.zeros(3, 8, 8), "labels": number % 5} for number in range(360)]
    model = ls.LayerShuffleViTForImageClassification(ls.LayerShuffleViTConfig(**TINY))
    report = ls.evaluate_robustness(model, items, num_orders=3, num_subsets=1, batch_size=360, progress=False)
    key = {"dataset": "fashion-mnist", "split": "test", "train_arguments": "", "num_orders": 3}
    made = {"command": "python examples/train.py", "images_seen": 256, "date": "2026-11-25T00:00:00+00:00"}
    return key | made | {"report": report.to_dict()}


@pytest.fixture
def three_methods(record):
    """Two seeds each: a plain ViT, its stronger rival trained twice as long, and the preset."""
    arbitrary = {0: [0.3, 0.35, 0.5], 1: [0.45, 0.5, 0.7]}
    records = [with_accuracies(record, 0.5 + 0.1 * s, [0.1] * 3, method="plain", seed=s) for s in (0, 1)]
    longer = {"method": "plain-init", "train_arguments": "--num_train_epochs 16"}
    records += [with_accuracies(record, 0.8, [0.1] * 3, seed=s, **longer) for s in (0, 1)]
    records += [with_accuracies(record, 0.7, arbitrary[s], method="order-free", seed=s) for s in (0, 1)]
    return records


def cells_of(text, label):
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_cost_of_free_order_is_a_ratio_to_the_plain_models_with_its_intervals(three_methods):
    from page import blocks_of
    from scipy import stats

    section = blocks_of(three_methods)["fashion-mnist"].split("What freedom of order costs:")[1]
    header, cells = (cells_of(section, label) for label in ("method", "preset order-free, from scratch"))
    ratios = np.array([1.15 / 3 / 0.5, 1.65 / 3 / 0.6])
    seeds = stats.t.ppf(0.975, 1) * abs(ratios[0] - ratios[1]) / 2
    found = dict(zip(header, cells))
    assert found["/ plain ViT"].startswith(f"{ratios.mean():.4f} ± {seeds:.4f} ± ")
    assert found["/ plain ViT, initial weights of the preset, trained twice as long"].startswith("0.5833 ± ")
    assert "/ plain ViT, initial weights of the preset" not in found  # of as many images there is none
    gaps = np.array([1.15 / 3 - 0.3, 1.65 / 3 - 0.45]) * 100
    mean_gap = found["worst order below mean, points: mean of the seeds"]
    assert mean_gap == f"{gaps.mean():.2f} ± {12.7062 * abs(gaps[0] - gaps[1]) / 2:.2f}"
    assert found["the worst of all seeds"] == f"{100 * (2.8 / 6 - 0.3):.2f}"
    kept = np.array([0.3 / (1.15 / 3), 0.3 / (1.65 / 3)])
    assert found["3 of 4 / all, arbitrary"].startswith(f"{kept.mean():.4f} ± ")
    # a shorter run is compared with plain models of the same arguments only
    shorter = [
        each | {"train_arguments": "--num_train_epochs 2"} for each in three_methods if each["method"] != "plain-init"
    ]
    section = blocks_of(three_methods + shorter)["fashion-mnist"].split("What freedom of order costs:")[1]
    cells = cells_of(section, "preset order-free, from scratch (--num_train_epochs 2)")
    assert cells[2].startswith(f"{ratios.mean():.4f} ± ") and cells[3] == ""


def test_targets_are_decided_only_by_intervals(three_methods):
    from page import blocks_of

    table = blocks_of(three_methods)["targets"]
    plain = cells_of(table, "fashion-mnist: / plain ViT (0.5500)")
    assert plain[1] == "≥ 0.995" and plain[2].endswith(": not decided")
    one_seed = blocks_of([record for record in three_methods if record["seed"] == 0])["targets"]
    assert all("not decided (one seed)" in line for line in one_seed.splitlines()[2:])
    for record in three_methods:  # the same ratio of all seeds, far below the target
        if record["method"] == "order-free":
            for score in record["report"]["arbitrary"]["scores"]:
                score["accuracy"] = 0.3 + 0.06 * record["seed"]
    table = blocks_of(three_methods)["targets"]
    plain = cells_of(table, "fashion-mnist: / plain ViT (0.5500)")
    assert plain[2].startswith("0.6000 ± 0.0000 ± ") and plain[2].endswith(": missed")
    worst = cells_of(table, "fashion-mnist: worst order below the mean, points")
    assert worst[1:] == ["≤ 0.5", "0.00 ± 0.00; of all seeds 3.00: reached"]


def test_intervals_are_those_computed_by_hand():
    import intervals

    assert intervals.mean_std([1.0, 3.0]) == "2.0000 ± 1.4142"
    assert intervals.mean_std([1.0]) == "1.0000" and intervals.mean_std([]) == ""
    # t of 2 degrees of freedom 4.30265, standard deviation 1
    assert intervals.seeds_half_width([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert intervals.seeds_half_width([1.0]) is None
    # Wilson: z √(p q / n + z² / 4 n²) / (1 + z² / n), z = 1.95996
    assert intervals.images_half_width(0.5, 100) == pytest.approx(0.0961685, rel=1e-4)
    assert intervals.images_half_width(1.0, 360) == pytest.approx(3.841459 / 363.841459, rel=1e-4)
    # Katz: 1.125 (exp(z √(1/90 - 1/100 + 1/80 - 1/100)) - 1)
    assert intervals.ratio_images_half_width(0.9, 0.8, 100) == pytest.approx(0.140620, rel=1e-4)


@pytest.mark.parametrize(
    ("value", "seeds", "images", "at_most", "verdict"),
    [
        (0.99, 0.01, 0.03, False, "reached"),
        (0.91, 0.01, 0.03, False, "missed"),
        (0.91, 0.01, 0.03, True, "reached"),
        (0.99, 0.01, None, True, "missed"),
        (0.99, 0.05, 0.03, False, "not decided"),
        (0.99, 0.01, 0.05, False, "not decided (over seeds reached)"),
        (0.91, 0.01, 0.05, False, "not decided (over seeds missed)"),
        (0.10, None, 0.03, False, "not decided (one seed)"),
    ],
)
def test_a_verdict_needs_all_intervals_on_one_side(value, seeds, images, at_most, verdict):
    from intervals import Estimate

    assert Estimate(value, seeds, images).verdict(0.95, at_most) == verdict


def test_ratios_are_of_the_same_seeds():
    from intervals import ratio

    found = ratio({0: 0.4, 1: 0.9, 7: 0.1}, {1: 0.6, 0: 0.8, 2: 0.9}, num_images=100)
    assert found.value == pytest.approx((0.5 + 1.5) / 2)
    assert found.seeds == pytest.approx(12.7062 * 0.5, rel=1e-4)
    assert found.text(digits=1) == f"1.0 ± 6.4 ± {found.images:.1f}"
    assert ratio({0: 0.4}, {0: 0.8}, 100).text().startswith("0.5000 ± – ± ")


def test_the_short_table_has_the_methods_beside_each_other(three_methods):
    from page import blocks_of

    digits = [record | {"dataset": "digits"} for record in three_methods]
    for record in digits[-2:]:
        record["method"] = "layershuffle"
    table = blocks_of(digits)["digits-table"]
    assert table.splitlines()[0] == "|  | plain ViT | LayerShuffle |"
    assert cells_of(table, "sequential")[1:] == ["0.5500 ± 0.0707", "0.7000 ± 0.0000"]
    assert cells_of(table, "arbitrary, mean of 3 orders")[2] == "0.4667 ± 0.1179"
    spread = np.mean([np.std([0.3, 0.35, 0.5]), np.std([0.45, 0.5, 0.7])])
    assert cells_of(table, "arbitrary, standard deviation over orders")[2] == f"{spread:.4f}"
    assert cells_of(table, "arbitrary, worst of all seeds and orders")[2] == "0.3000"
    assert cells_of(table, "2 of 4 layers, in arbitrary order")[2] == "0.2000 ± 0.0000"
    assert "over 2 seeds" in table and "One image is 0.0028" in table


def test_a_run_counts_once_and_what_is_left_out_says_why(three_methods):
    from page import blocks_of

    again = json.loads(json.dumps(three_methods[0]))
    with pytest.raises(ValueError, match="Two records of plain ViT, seed 0, on fashion-mnist: keep one, or give"):
        blocks_of([*three_methods, again])
    blocks = blocks_of([*three_methods, again | {"left_out": "run again"}])
    assert blocks["fashion-mnist"] == blocks_of(three_methods)["fashion-mnist"]
    assert cells_of(blocks["left-out"], "fashion-mnist")[1:3] == ["plain ViT", "0"]
    assert blocks["left-out"].endswith("| run again |") and "seed 0, run again, 20" in blocks["commands"]
    held_out = [*three_methods, again | {"split": "held_out"}]
    short = {name: value for name, value in held_out[-1].items() if name != "report"} | {
        "split": "held_out",
        "seed": 1,
    }
    held_out.append(short | {"results": {"eval_samples": 100, "eval_accuracy": 0.5, "eval_arbitrary_accuracy": 0.25}})
    table = blocks_of(held_out)["held-out"]
    assert table.splitlines()[-1].endswith("| 100 | 0.5000 ± 0.0962 | 0.2500 |")
    assert cells_of(table, "fashion-mnist")[2:6] == ["as the preset", "0", "360", "0.5000 ± 0.0514"]


def test_longer_training_is_a_row_a_length(three_methods):
    from page import blocks_of

    for record in three_methods[2:4]:
        record |= {"images_seen": 512, "num_orders": 2}
    blocks = blocks_of(three_methods)
    label = "plain ViT, initial weights of the preset (--num_train_epochs 16)"
    assert cells_of(blocks["fashion-mnist"], label)[1] == "2 (2 orders)"
    table = blocks["fashion-mnist-length"]
    assert cells_of(table, "256")[1:4] == ["0.5500 ± 0.0707 (2)", "", "0.4667 ± 0.1179 (2)"]
    assert cells_of(table, "512")[1:] == ["", "0.8000 ± 0.0000 (2)", "", ""]
    assert cells_of(table, "256")[4].startswith("0.8417 ± ")


def test_blocks_of_other_pages_are_kept_up_to_date(three_methods, tmp_path):
    from page import fill, render_pages

    records, page, readme = tmp_path / "runs.jsonl", tmp_path / "page.md", tmp_path / "README.md"
    records.write_text("".join(json.dumps(record) + "\n" for record in three_methods))
    begin, end = (f"<!-- {word} targets: rendered by experiments/grid.py -->" for word in ("begin", "end"))
    readme.write_text(f"Above.\n{begin}\nstale\n{end}\nBelow.\n")
    render_pages(str(records), [str(page), str(readme)])
    text = readme.read_text()
    assert text.startswith(f"Above.\n{begin}\n|  | target |") and text.endswith(f"|\n{end}\nBelow.\n")
    assert "stale" not in text and "begin fashion-mnist:" in page.read_text()
    with pytest.raises(
        ValueError, match=r"README shows 'targets', of which there are no records; .* There are: digits\."
    ):
        fill(text, {"digits": "x", "targets": ""}, "README")
    with pytest.raises(ValueError, match=r"must have '<!-- begin targets.* once, and '<!-- end targets"):
        fill(text.replace(end, ""), {"targets": "x"})
    with pytest.raises(FileNotFoundError):
        render_pages(str(records), [str(page), str(tmp_path / "missing.md")])


def test_the_committed_pages_are_what_the_records_render():
    from grid import PAGES, RECORDS
    from page import blocks_of, fill, groups_by_dataset, read_records, with_all_datasets

    records = read_records(RECORDS)
    blocks = blocks_of(records)
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    assert with_all_datasets(texts[PAGES[0]], groups_by_dataset(records)) == texts[PAGES[0]]
    for page, text in texts.items():
        assert fill(text, blocks, page.name) == text, f"run python experiments/grid.py --render for {page.name}"


def test_pictures_are_of_the_runs_with_the_same_further_arguments(tmp_path):
    from grid import RECORDS
    from page import draw_pictures, group_records, read_records

    records = [each for each in read_records(RECORDS) if each["method"] == "plain-init-distilled"][:2]
    groups = group_records([{**each, "train_arguments": f"--seed {i}"} for i, each in enumerate(records)])
    draw_pictures("dataset", groups, tmp_path)
    drawn = (tmp_path / "dataset-orders.svg").read_text()
    assert drawn.count("initial weights") == 1 and "seed 0, all seeds" in drawn
    assert (tmp_path / "dataset-pruning.svg").is_file()


@pytest.mark.parametrize("name", ["recipe_trials.jsonl", "objective_trials.jsonl"])
def test_every_trial_is_on_the_page(name):
    from grid import PAGES, RECORDS, read_records

    page = PAGES[0].read_text(encoding="utf-8")
    for trial in read_records(RECORDS.with_name(name)):
        assert "| " + " | ".join(f"{trial[name]:.4f}" for name in ("seq", "arb", "min", "p9")) + " |" in page, trial


def test_digits_need_no_dataset_name_and_run_on_one_thread(monkeypatch, tmp_path):
    import grid as experiment

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = []

    def finished(command, env, **kwargs):
        threads.append(env.get("OMP_NUM_THREADS"))
        folder = tmp_path / "digits-plain-3"
        folder.mkdir(exist_ok=True)
        for name in ("all_results.json", "robustness.json"):
            (folder / name).write_text(json.dumps({"epoch": 2.0, "train_samples": 7}))

    monkeypatch.setattr(experiment.subprocess, "run", finished)
    args = experiment.GridArguments(preset="digits", work_dir=str(tmp_path))
    experiment.check(args)
    record = experiment.run_one(args, "plain", 3)
    assert threads == ["1", "1"] and record["images_seen"] == 14
    command = "OMP_NUM_THREADS=1 python examples/train.py --dataset_name digits --shuffle_mode none"
    assert record["command"].startswith(command)
    assert "--seed 3 --output_dir outputs/reproduce/digits-plain-3 " in record["command"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "digits", "--merges"], "Merges need models of two seeds or more; `seeds` is [0]"),
        (["--dataset_name", "digits", "--methods", "magic"], "`methods` holds 'magic'; choose from plain, layerdrop"),
        (["--dataset_name", "digits", "--preset", "imagenet"], "`preset` is 'imagenet'"),
        ([], "Give --dataset_name"),
        (
            ["--dataset_name", "digits", "--methods", "order-free-finetuned"],
            "starts from the model of method plain-init with seed 0",
        ),
        (["--render"], "holds no run on a test split"),
        (["--dataset_name", "./missing", "--methods", "plain"], "see the .log files"),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2(tmp_path, arguments, message):
    result = grid(tmp_path, *arguments)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("grid.py: error: ") and message in last
