"""Cards show what fewer layers cost, and say when a configuration lets examples leave."""

import dataclasses
import json
import shutil

import pytest
from support.cards import images, save_model
from transformers import ViTImageProcessor

import hf_layershuffle as ls
from hf_layershuffle.hub.model_card import write_model_card
from hf_layershuffle.hub.published_files import is_replaced, published_files


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "vit-tiny"
    model = save_model(folder)
    report = ls.evaluate_budget(
        model,
        images(10),
        images(25).select(range(10, 25)),
        policies=["evenly-spaced"],
        num_layers_run=[2],
        image_processor=ViTImageProcessor(size={"height": 8, "width": 8}),
        dataset_name="org/letters",
        measure_time=False,
        progress=False,
    )
    (point,) = report.points  # beside one that is on the front, one that is not
    point = dataclasses.replace(point, on_front=("multiply_adds",))
    worse = dataclasses.replace(point, label="worse layers", on_front=())
    report = dataclasses.replace(report, points=[point, worse])
    report.save(folder)
    report.plot().save(folder)
    return folder


@pytest.fixture
def folder(described, tmp_path):
    return shutil.copytree(described, tmp_path / "vit-tiny")


def card_of(folder) -> str:
    write_model_card(folder)
    return (folder / "README.md").read_text()


def test_the_table_and_the_picture_are_in_the_card(folder):
    report, text = ls.BudgetReport.load(folder), card_of(folder)
    point, _ = report.points
    assert "worse layers" not in text
    assert "on 10 images of `org/letters`; thresholds and programs were chosen on 15 others." in text
    row = next(line for line in text.splitlines() if line.startswith("| evenly-spaced | 2 layers |"))
    assert f"| {point.accuracy:.4f} |" in row and f"| {point.multiply_adds / 1e6:,.1f}" in row
    assert text.count("](budget.png)") == 1
    assert text.index("### With fewer layers") < text.index("## Use")
    assert {"budget.json", "budget.png"} <= set(published_files(folder))
    assert is_replaced("budget.json") and is_replaced("budget.png")  # by a push of other weights
    (folder / "budget.json").unlink()
    (folder / "budget.png").unlink()
    assert "With fewer layers" not in card_of(folder)


def test_a_budget_of_other_weights_is_refused(folder):
    save_model(folder, num_labels=5, depth_embedding=True)
    with pytest.raises(ValueError, match=r"budget.json' is a report of other weights .*`hf-layershuffle budget"):
        card_of(folder)


def test_a_card_says_that_a_controller_was_trained_and_nothing_else(folder):
    assert "controller" not in card_of(folder)
    ls.load_classifier(folder, layer_controller=True).save_pretrained(folder)
    (folder / "budget.json").unlink()
    text = card_of(folder)
    assert "a layer controller, with all else frozen" in text


def test_names_of_others_do_not_break_the_table(folder):
    report = ls.BudgetReport.load(folder)
    point = dataclasses.replace(report.points[0], policy="a | b", label="x\n<script>")
    (folder / "budget.json").write_text(json.dumps(dataclasses.replace(report, points=[point]).to_dict()))
    text = card_of(folder)
    assert "<script>" not in text and "| a | b |" not in text
    (folder / "budget.json").write_text("[]")
    with pytest.raises(ValueError, match=r"budget.json' is not a budget report"):
        card_of(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("accuracy_interval", [0.0, 0.5, 1.0]),
        ("accuracy_loss_interval", [0.0]),
        ("accuracy", 5.0),
        ("multiply_adds", -1.0),
        ("num_images", -1),
        ("num_images", 10**400),
        ("format", True),
        ("time_ratio", {"x|<script>alert(1)</script>": 1.0}),
        ("time_ratio", {"1\n# Own": 1.0}),
        ("seconds", {"[red]": 1.0}),
    ],
)
def test_budgets_of_others_that_cannot_be(folder, field, value):
    values = json.loads((folder / "budget.json").read_text())
    (values if field in values else values["points"][0])[field] = value
    (folder / "budget.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"budget.json' is not a budget report: .*{field}"):
        card_of(folder)


def test_a_folder_in_the_place_of_a_budget(folder):
    (folder / "budget.json").unlink()
    (folder / "budget.json").mkdir()
    with pytest.raises(ValueError, match=r"budget.json' is a folder, and not a budget report"):
        card_of(folder)


def test_mlps_that_are_left_out_are_named(folder):
    assert "MLP" not in card_of(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"skipped_mlps": [1, 2]}))
    assert "the layers that run at these positions leave out their MLP, counted from 0: 1, 2." in card_of(folder)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, None),
        ({"exit_threshold": 0.9}, "at the first layer whose highest class probability is at least 0.9;"),
        (
            {"exit_threshold": 0.8, "exit_criterion": "margin"},
            "at which the two highest class probabilities differ by",
        ),
        ({"exit_patience": 3}, "an example leaves after 3 layers in a row with the same answer;"),
    ],
)
def test_the_rule_of_the_configuration_is_named(tmp_path, fields, said):
    save_model(tmp_path, **fields)
    text = card_of(tmp_path)
    if said is None:
        assert "By its configuration" not in text
    else:
        assert said in text and '`exit_threshold="off"` in a call runs all layers' in text
