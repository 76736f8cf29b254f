"""Runs `hf-layershuffle budget` as a user does."""

import json
import shutil

import pytest
from conftest import Architecture, assert_all_refused, run_cli
from datasets import DatasetDict
from support.analysis import randomize
from transformers import BertConfig, BertForSequenceClassification, ViTImageProcessor

import hf_layershuffle as ls
from hf_layershuffle.adaptive import budget_evaluation
from hf_layershuffle.hub.folder_records import record_training
from hf_layershuffle_cli.budget import calibration_data, of_lower_quality
from hf_layershuffle_cli.inputs import LoadedModel, load_model


FEW = ["--max_eval_samples", "40", "--max_calibration_samples", "30", "--no_time"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A free model of the digits, a plain one, and one whose images are of another size."""
    root = tmp_path_factory.mktemp("models")
    labels = {"id2label": {i: str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)}}
    vit = Architecture("vit")
    models = {
        "free": vit.classifier(**labels, num_labels=10),
        "plain": vit.plain_classifier(**labels, num_labels=10, num_hidden_layers=2),
        "larger": vit.plain_classifier(**labels, num_labels=10, image_size=16),
    }
    for name, model in models.items():
        randomize(model).save_pretrained(root / name)
        size = model.config.image_size
        ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(root / name)
        record_training(root / name, arguments={}, dataset="digits")
    return root


def test_a_table_a_report_and_a_picture(folders, tmp_path):
    policies = ["--policies", "evenly-spaced, exit-patience", "--layers", "1,3"]
    rivals = ["--rivals", f"shallow={folders / 'plain'}"]
    result = run_cli("budget", folders / "free", *policies, *rivals, *FEW, "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"budget.json", "budget.png", "budget.svg"}
    report = ls.BudgetReport.load(tmp_path / "out")
    assert (report.model, report.dataset, report.num_images, report.num_chosen_on) == ("free", "digits", 40, 30)
    assert list(report.by_policy()) == ["evenly-spaced", "exit-patience", "other models"]
    assert [point.label for point in report.by_policy()["evenly-spaced"]] == ["1 layer", "3 layers"]
    shallow = report.by_policy()["other models"][0]
    assert (shallow.label, shallow.mean_num_layers) == ("shallow", 2)
    row = next(line for line in result.stdout.splitlines() if "│ shallow" in line)
    assert f"{shallow.accuracy:.4f}" in row and f"{shallow.multiply_adds / 1e6:.1f}" in row
    assert f"Saved to {tmp_path / 'out'}" in result.stdout
    assert report.config["rivals"].keys() == {"shallow"} and report.costs == ["multiply_adds"]


def test_a_stopped_command_says_so_and_goes_on(folders, tmp_path, quick_pictures, monkeypatch):
    asked: list[str] = []

    class Stopping(budget_evaluation.RandomPrograms):
        def settings(self):
            if asked.count(self.name) == 0:
                asked.append(self.name)
                raise KeyboardInterrupt
            return super().settings()

    class Counted(budget_evaluation.EvenlySpaced):
        def settings(self):
            asked.append(self.name)
            return super().settings()

    monkeypatch.setattr(budget_evaluation, "POLICIES", (Counted, Stopping))
    command = ["budget", folders / "free", *FEW, "--layers", "2", "--output_dir", tmp_path]
    result = run_cli(*command)
    assert result.returncode == 130 and "run the same command again to go on behind the policies" in result.stderr
    assert not (tmp_path / "budget.json").exists() and (tmp_path / ".budget.json").exists()
    assert run_cli(*command).returncode == 0
    assert asked.count("evenly-spaced") == 1 and not (tmp_path / ".budget.json").exists()
    assert list(ls.BudgetReport.load(tmp_path).by_policy()) == ["evenly-spaced", "random-programs"]


def test_bad_input_is_one_line_with_exit_code_2_and_leaves_nothing_behind(folders, tmp_path):
    shutil.copytree(folders / "plain", tmp_path / "other-classes")
    config = json.loads((tmp_path / "other-classes" / "config.json").read_text())
    config["id2label"] = {str(i): f"digit {i}" for i in range(10)}
    config["label2id"] = {f"digit {i}": i for i in range(10)}
    (tmp_path / "other-classes" / "config.json").write_text(json.dumps(config))
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    free = ["budget", str(folders / "free"), *FEW, "--output_dir", str(tmp_path / "out")]
    assert_all_refused(
        run_cli,
        "hf-layershuffle",
        {
            "There is no model folder './missing'": ["budget", "./missing", "--output_dir", str(tmp_path / "out")],
            "`policies` holds 'layer-controller', which this model has not; this model has": [
                *(*free, "--policies", "layer-controller")
            ],
            "`rivals` holds 'plain'; give NAME=MODEL": [*free, "--rivals", "plain"],
            "`rivals` names 'a' twice": [*free, "--rivals", "a=x", "--rivals", "a=y"],
            "The inputs of the rival 'b' are made in another way": [*free, "--rivals", f"b={folders / 'larger'}"],
            "The rival 'c' has the classes digit 0": [*free, "--rivals", f"c={tmp_path / 'other-classes'}"],
            "`layers` is '2,x'; give numbers of layers such as 3,6": ["budget", "./missing", "--layers", "2,x"],
            "`num_layers_run` holds 9": [*free, "--layers", "9"],
            "`corruption` is 'fog'; choose from blur, noise, low_contrast": [*free, "--corruption", "fog"],
            "`max_eval_samples` is 0": [*free, "--max_eval_samples", "0"],
            "`max_calibration_samples` is 0": [*free, "--max_calibration_samples", "0"],
            "'digits' has one split only, of which a part is the evaluation": [*free, "--calibration_fraction", "0.1"],
            "has no split 'validation'": [*free, "--calibration_split", "validation"],
            "`calibration_split` and `eval_split` are both 'train'": [
                *(*free, "--eval_split", "train", "--calibration_fraction", "0.5")
            ],
        },
        cwd=tmp_path,
    )
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_choosing_on_the_part_that_training_held_out(folders, tmp_path):
    """Of a dataset with two splits, the fraction is the one that `train.py` holds out, and not of the test split."""
    model = ls.load_classifier(folders / "free")
    digits = ls.load_image_datasets("digits")
    DatasetDict({"train": digits["train"].select(range(200)), "test": digits["test"].select(range(50))}).save_to_disk(
        tmp_path / "data"
    )
    name = str(tmp_path / "data")
    found = calibration_data(model, name, "train", 0.1, eval_split=None)
    expected = ls.load_image_datasets(name, eval_split="train", eval_fraction=0.1)["test"]
    assert found["label"][:] == expected["label"][:] and len(found) == 20
    assert len(calibration_data(model, name, "train", None, eval_split=None)) == 200
    assert len(calibration_data(model, name, "test", None, eval_split="train")) == 50


def test_a_report_on_images_of_lower_quality(folders, tmp_path):
    """Rules are chosen on the images as they are. The report has a folder of its own."""
    command = ["budget", folders / "free", *FEW, "--policies", "evenly-spaced", "--layers", "3"]
    reports = []
    for folder, options in (("budget", []), ("budget-noise", ["--corruption", "noise"])):
        assert run_cli(*command, *options, cwd=tmp_path).returncode == 0
        reports.append(ls.BudgetReport.load(tmp_path / "outputs" / folder))
    clean, noisy = reports
    assert (clean.dataset, noisy.dataset, noisy.num_images) == ("digits", "digits (corruption: noise)", 40)
    assert clean.config["data"] != noisy.config["data"] and clean.config["calibration"] == noisy.config["calibration"]


def test_the_corrupted_images_are_those_that_would_be_drawn(folders):
    loaded = load_model(str(folders / "free"), "cpu")
    digits = ls.load_image_datasets("digits")["test"]
    drawn = loaded.batches(digits, max_samples=12, seed=3).dataset
    changed = of_lower_quality(digits, loaded, "low_contrast", 12, 3)
    ours, others = changed.__getitems__(list(range(12))), drawn.__getitems__(list(range(12)))
    assert ours.unfinished["pixel_values"].equal(others.unfinished["pixel_values"]) and len(changed) == 12
    assert ours.unfinished["labels"].equal(others.unfinished["labels"])


def test_corrupted_images_on_which_rules_were_chosen_are_refused(folders, tmp_path):
    """They are told by what they were before."""
    data = ls.load_image_datasets("digits")["test"].select(range(20))
    DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "data")
    command = ["budget", folders / "free", "--dataset_name", tmp_path / "data", *FEW, "--corruption", "noise"]
    result = run_cli(*command, "--output_dir", tmp_path / "out")
    assert result.returncode == 2 and "are among those that are reported on" in result.stderr
    assert not (tmp_path / "out").exists()


def test_texts_are_not_blurred():
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    loaded = LoadedModel("texts", BertForSequenceClassification(config), None)
    with pytest.raises(ValueError, match="`corruption` is 'blur', but 'texts' is a model of texts; leave it out"):
        of_lower_quality(None, loaded, "blur", None, 0)
