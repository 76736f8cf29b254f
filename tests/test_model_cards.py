"""The published models in model_cards/: their cards say what was recorded, and the weights do what the cards say."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_python
from huggingface_hub import ModelCard, metadata_load

import hf_layershuffle as ls
from hf_layershuffle.data import load_image_datasets, load_image_processor
from hf_layershuffle.layerwise import load_classifier
from hf_layershuffle.model_card import write_model_card
from hf_layershuffle.publishing import CODE_FILES, check_folder, published_files
from hf_layershuffle.report import OrderGroup, pruning_points


FOLDERS = sorted((REPOSITORY / "model_cards").iterdir())
of_each_model = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def numbers_in(value) -> list[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, (int, float)) else []


def test_there_is_a_folder_for_each_model_that_the_script_builds():
    sys.path.insert(0, str(REPOSITORY / "examples"))
    import build_model_cards

    assert {folder.name for folder in FOLDERS} == set(build_model_cards.MODELS)


@of_each_model
def test_the_folder_is_exactly_what_would_be_pushed(folder):
    check_folder(folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == set(published_files(folder))
    assert (folder / "model.safetensors").stat().st_size < 2e6


@of_each_model
def test_the_code_beside_the_weights_is_this_versions(folder):
    for name in CODE_FILES:
        ours = (Path(ls.__file__).with_name(name)).read_text()
        assert (folder / name).read_text() == ours, f"{name} has changed: run `make model-cards`"


@of_each_model
def test_the_card_is_what_the_records_give(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / folder.name)
    (copy / "README.md").unlink()
    write_model_card(copy, repo_id=f"hf-layershuffle/{folder.name}", license="apache-2.0")
    assert (copy / "README.md").read_text() == (folder / "README.md").read_text()
    assert ModelCard.load(folder / "README.md").data.to_dict() == metadata_load(folder / "README.md")


@of_each_model
def test_every_number_on_the_card_is_recorded_beside_it(folder):
    records = [json.loads(path.read_text()) for path in folder.rglob("*.json")]
    report = ls.RobustnessReport.load(folder)
    # Summaries of recorded scores, and what follows from the depth
    derived = [OrderGroup.of(scores) for scores in (report.leave_one_out, report.neighbour_swaps)]
    derived = [vars(group.accuracy) for group in derived] + [group.loss.mean for group in derived]
    depth = [*range(report.num_layers + 1), *pruning_points(report.num_layers), 1 / report.num_layers]
    recorded = {round(number, 4) for number in numbers_in([records, derived, depth])}

    card = ModelCard.load(folder / "README.md")
    shown = numbers_in(card.data.to_dict())
    text = card.text.split("## Citation")[0].replace(folder.name, "").replace("95 % interval", "")
    for version in json.loads((folder / "training.json").read_text())["versions"].values():
        text = text.replace(version, "")
    shown += [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", text)]
    assert len(shown) > 100
    assert not {number for number in shown if number not in recorded}


@of_each_model
def test_the_weights_give_the_recorded_accuracy(folder):
    model, report = load_classifier(str(folder)), ls.RobustnessReport.load(folder)
    orders = [report.sequential.execution_order, report.reversed.execution_order]
    scores = ls.score_execution_orders(
        model,
        load_image_datasets("digits")["test"],
        orders,
        image_processor=load_image_processor(folder),
        progress=False,
    )
    # another processor may round an image to the other side of a tie
    assert [score.accuracy for score in scores] == [
        pytest.approx(score.accuracy, abs=1.5 / report.num_images) for score in (report.sequential, report.reversed)
    ]


FRESH_PROCESS = """
import sys
sys.modules["hf_layershuffle"] = None  # not installed
from huggingface_hub import metadata_load
from transformers import pipeline

for folder in sys.argv[1:]:
    classify = pipeline("image-classification", model=folder, trust_remote_code=True)
    for example in metadata_load(folder + "/README.md")["widget"]:
        answers = {answer["label"]: answer["score"] for answer in classify(f"{folder}/{example['src']}", top_k=5)}
        for shown in example["output"]:
            assert abs(answers[shown["label"]] - shown["score"]) < 1e-3, (folder, example, answers)
"""


def test_the_examples_answers_are_the_models_own_without_the_package(tmp_path):
    result = run_python(FRESH_PROCESS, *FOLDERS, environment={"HF_MODULES_CACHE": str(tmp_path)})
    assert result.returncode == 0, result.stderr
