import json

import pytest
import torch
from conftest import REPOSITORY, run_here, script

import hf_layershuffle as ls


@pytest.fixture
def experiment(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "experiments")
    return script(REPOSITORY / "experiments" / "corrupted_images.py")


def test_both_controllers_are_measured_on_all_images_and_not_again(experiment, tmp_path):
    train = "--max_steps 2 --num_train_epochs 1 --max_train_samples 64 --max_eval_samples 32 --final_eval_orders 8"
    options = ["--seeds", 0, "--folders", tmp_path, "--layers", 3, 2, "--max_eval_samples", 40]
    command = ["corrupted_images.py", "digits", *options, "--train_arguments", train]
    for name in ("digits-free-0", "digits-controller-0"):
        model = ls.load_classifier(ls.example_model(), layer_controller="controller" in name)
        model.save_pretrained(tmp_path / name)
        ls.load_image_processor(ls.example_model()).save_pretrained(tmp_path / name)
        (tmp_path / name / "all_results.json").write_text("{}")
    first = run_here(experiment.main, *command)
    assert first.returncode == 0, first.stderr
    header, _, *rows = [line.strip("| ").split(" | ") for line in first.stdout.splitlines() if line.startswith("|")]
    assert header[:3] == ["controller", "images", "layers"]
    kinds = ["clean", "blur", "noise", "low contrast"]
    assert [row[1:3] for row in rows] == [[kind, count] for kind in kinds for count in "23"] * 2
    trained = json.loads((tmp_path / "digits-controller-0-corruptions" / "training.json").read_text())
    assert trained["arguments"]["augmentation"].endswith("policy=corruptions")
    # All layers answer without a controller, so those of both are the same; corrupted images are harder
    assert [row[3] for row in rows[:8]] == [row[3] for row in rows[8:]]
    assert float(rows[0][3]) > float(rows[6][3])
    again = run_here(experiment.main, *command)
    assert again.stdout.splitlines() == [line for line in first.stdout.splitlines() if line.startswith("|")]
    assert "clean" not in again.stderr
    # Other weights are measured
    model = ls.load_classifier(tmp_path / "digits-controller-0")
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path / "digits-controller-0")
    other = run_here(experiment.main, *command)
    assert other.returncode == 0 and "digits-controller-0: clean" in other.stderr
    lines = [line.strip("| ").split(" | ") for line in other.stdout.splitlines() if line.startswith("|")]
    assert lines[2:10] != rows[:8] and lines[10:] == rows[8:]


def test_cells_are_means_and_spreads_in_percent(experiment):
    assert experiment.cell([0.5, 0.7]) == "60.0 ± 14.1" and experiment.cell([0.5]) == "50.0"


def test_a_missing_model_is_named(experiment, tmp_path):
    result = run_here(
        experiment.main, "corrupted_images.py", "fashion-mnist", "--dataset_name", "digits", "--seeds", 0, "--folders",
        tmp_path,
    )  # fmt: skip
    assert result.returncode == 2 and "There is no free model in" in result.stderr and "--free" in result.stderr
    assert not any(tmp_path.iterdir())
