"""Runs examples/reproduce.py as a user does, on the digits and with a tiny model."""

import json

import numpy as np
import pytest
from conftest import REPOSITORY, run_python


SMALL = "--image_size 8 --patch_size 4 --hidden_size 16 --num_attention_heads 2 --num_hidden_layers 4 --max_steps 4"


def reproduce(folder, *arguments):
    paths = ("--records", folder / "runs.jsonl", "--work_dir", folder / "work", "--page", folder / "docs" / "page.md")
    return run_python(REPOSITORY / "examples" / "reproduce.py", *paths, *arguments)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    grid = ["--dataset_name", "digits", "--methods", "layershuffle", "--seeds", 0, 1]
    grid += [
        "--num_orders",
        3,
        "--num_subsets",
        1,
        "--jobs",
        2,
        "--train_arguments",
        f"{SMALL} --max_train_samples 64",
    ]
    result = reproduce(folder, *grid)
    assert result.returncode == 0, result.stderr
    assert "2 runs to do" in result.stdout
    return folder, grid, [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_each_run_is_recorded_once(recorded):
    folder, grid, records = recorded
    assert sorted(record["seed"] for record in records) == [0, 1]
    for record in records:
        assert record["images_seen"] == 4 * 64  # one batch a pass
        assert record["report"]["num_orders"] == 3 and record["report"]["num_images"] == 360
        assert (
            str(folder) not in record["command"]
            and "--output_dir outputs/reproduce/fashion-mnist-" in record["command"]
        )
        assert "--shuffle_mode" not in record["command"] and f"--seed {record['seed']}" in record["command"]
    result = reproduce(folder, *grid)
    assert result.returncode == 0 and "0 runs to do" in result.stdout
    assert len((folder / "runs.jsonl").read_text().splitlines()) == 2


def test_the_page_is_rendered_from_the_records_alone(recorded):
    folder, _, records = recorded
    assert reproduce(folder, "--render").returncode == 0
    page = folder / "docs" / "page.md"
    accuracies = [score["accuracy"] for each in records for score in each["report"]["arbitrary"]["scores"]]
    row = next(line for line in page.read_text().splitlines() if line.startswith("| LayerShuffle"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2] == "2"
    assert cells[4] == f"{np.mean(accuracies):.4f} ± {np.std(accuracies):.4f}"
    assert cells[5] == f"{min(accuracies):.4f}"
    assert {path.name for path in page.parent.glob("*.png")} == {
        "fashion-mnist-orders.png",
        "fashion-mnist-pruning.png",
    }

    # what a person wrote around the tables stays
    page.write_text(page.read_text() + "\nWhat this means.\n")
    first = page.read_text()
    assert reproduce(folder, "--render").returncode == 0
    assert page.read_text() == first


def test_merges_of_the_seeds_are_recorded_once_and_rendered(recorded):
    folder, grid, _ = recorded
    records = (folder / "runs.jsonl").read_text()
    try:
        result = reproduce(folder, *grid, "--merges", "--num_merges", 3)
        assert result.returncode == 0, result.stderr
        added = (folder / "runs.jsonl").read_text().splitlines()[2:]
        assert len(added) == 1
        merges = json.loads(added[0])["merges"]
        assert [len(accuracies) for accuracies in merges.values()] == [3, 3]
        assert "3 merges" not in reproduce(folder, *grid, "--merges", "--num_merges", 3).stderr
        merges["any_layer"] = [1.0, 0.0, 0.5]  # merges of so short a training may all be as accurate
        added = json.loads(added[0]) | {"merges": merges}
        (folder / "runs.jsonl").write_text(records + json.dumps(added) + "\n")
        assert reproduce(folder, "--render").returncode == 0
        row = next(
            line
            for line in (folder / "docs" / "page.md").read_text().splitlines()
            if line.startswith("| LayerShuffle")
        )
        assert row.split("|")[12].strip() == f"{np.mean(merges['in_place']):.4f} ± {np.std(merges['in_place']):.4f}"
    finally:
        (folder / "runs.jsonl").write_text(records)


def test_the_cost_of_free_order_is_a_ratio_to_the_plain_model(recorded):
    folder, _, records = recorded
    shuffled, plain = json.loads(json.dumps([records, [record | {"method": "plain"} for record in records]]))
    for seed, record in enumerate(shuffled):  # after so short a training all orders may be as accurate
        for number, score in enumerate(record["report"]["arbitrary"]["scores"]):
            score["accuracy"] = 0.3 + 0.1 * seed + 0.05 * number**2
    for record in plain:
        record["report"]["sequential"]["accuracy"] = 0.5
    (folder / "with_plain.jsonl").write_text("".join(json.dumps(record) + "\n" for record in shuffled + plain))
    result = reproduce(
        folder, "--render", "--records", folder / "with_plain.jsonl", "--page", folder / "ratio" / "p.md"
    )
    assert result.returncode == 0, result.stderr
    lines = (folder / "ratio" / "p.md").read_text().split("What freedom of order costs:")[1].splitlines()
    cells = [cell.strip() for cell in next(line for line in lines if line.startswith("| LayerShuffle")).split("|")]
    by_seed = [[score["accuracy"] for score in each["report"]["arbitrary"]["scores"]] for each in shuffled]
    assert cells[2:4] == ["256", f"{np.mean(by_seed) / 0.5:.4f}"]
    assert cells[5] == f"{100 * np.mean([np.mean(each) - min(each) for each in by_seed]):.2f}"


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
    result = reproduce(tmp_path, *arguments)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("reproduce.py: error: ") and message in last
