"""The published models in model_cards/: their cards say what was recorded, and the weights do what the cards say."""

import json
import math
import os
import re
import shutil
import sys

import pytest
import torch
from conftest import REPOSITORY, run_python
from huggingface_hub import ModelCard, metadata_load
from safetensors import safe_open

import hf_layershuffle as ls
from hf_layershuffle.checkpoints.image_processors import load_image_processor
from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.data.datasets import load_image_datasets
from hf_layershuffle.evaluation.report import pruning_points
from hf_layershuffle.evaluation.statistics import OrderGroup
from hf_layershuffle.hub.model_card import write_model_card
from hf_layershuffle.hub.published_files import added_code, check_folder, package_code, published_files


FOLDERS = sorted((REPOSITORY / "model_cards").iterdir())
of_each_model = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
DIGITS = [folder for folder in FOLDERS if folder.name.startswith("vit-digits")]
LARGER = [folder for folder in FOLDERS if folder not in DIGITS]
LARGEST_BYTES = {"digits": 2e6, "fashion": 6e6, "cifar10": 6e6}
# Folders with the test images of the larger models: --dataset_name as for the commands
IMAGES = {
    "fashion": os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"),
    "cifar10": os.environ.get("CIFAR10", "cifar10"),
}


def numbers_in(value) -> list[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, (int, float)) else []


def test_there_is_a_folder_for_each_model_that_the_script_builds():
    sys.path.insert(0, str(REPOSITORY / "experiments"))
    import build_model_cards

    names = {*build_model_cards.MODELS, build_model_cards.MERGED, *build_model_cards.LARGER_MODELS}
    assert {folder.name for folder in FOLDERS} == names


@of_each_model
def test_the_folder_is_exactly_what_would_be_pushed(folder):
    check_folder(folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == set(published_files(folder))
    assert (folder / "model.safetensors").stat().st_size < LARGEST_BYTES[folder.name.split("-")[1]]


@of_each_model
def test_weights_are_float32(folder):
    """Whoever fine-tunes them then trains master weights: transformers loads the stored dtype."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = [file.get_slice(name) for name in file.keys()]
        assert {tensor.get_dtype() for tensor in tensors} == {"F32"}
        num_parameters = sum(math.prod(tensor.get_shape()) for tensor in tensors)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert f"It has {num_parameters:,} parameters" in (folder / "README.md").read_text()


@of_each_model
def test_the_card_says_all_that_a_stranger_asks(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    for name in [*(card.data.datasets or []), *(card.data.base_model or [])]:
        assert name in ("zalando-datasets/fashion_mnist", "uoft-cs/cifar10")  # each is there, by this name
    for entry in card.data.to_dict()["widget"]:
        assert entry["output"][0]["label"] == entry["example_title"].removeprefix("Class ")
    if folder.name.endswith("-merged"):
        assert "fine-tuned on the same training images for 20 more epochs" in card.text
        assert "| mean of the sources: sequential |" in card.text
        return
    assert re.search(r"Trained on (1,437|60,000|50,000) images of `\S+`, \d+ epochs\.", card.text)
    assert ("comparison" in card.text) == (folder.name != "vit-digits-plain")
    if folder in LARGER:
        for name in ("orders_per_step", "residual_init_scale", "initializer_range", "distillation_weight"):
            assert f"| `{name}` |" in card.text
        assert "plain-init" not in card.text  # a folder's name


@of_each_model
def test_the_code_is_added_when_it_is_published(folder):
    assert added_code(folder) == package_code()


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
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        depth.append(sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys()))
    recorded = {round(number, 4) for number in numbers_in([records, derived, depth])}

    card = ModelCard.load(folder / "README.md")
    shown = numbers_in(card.data.to_dict())
    text = card.text.split("## Citation")[0].replace(folder.name, "").replace("95 % over orders", "")
    text = re.sub(r"\]\(https?://[^)]*\)", "]", text)
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    training = json.loads((folder / "training.json").read_text())
    text = text.replace(training.get("note", ""), "")
    for version in training["versions"].values():
        text = text.replace(version, "")
    shown += [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", text)]
    assert len(shown) > 100
    assert not {number for number in shown if number not in recorded}


def assert_the_weights_give_the_recorded_accuracy(folder, dataset_name: str) -> None:
    model, report = load_classifier(str(folder), dtype=torch.float32), ls.RobustnessReport.load(folder)
    orders = [report.sequential.execution_order, report.reversed.execution_order]
    # IDX files number their classes, which are then those of the model
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    scores = ls.score_execution_orders(
        model,
        load_image_datasets(dataset_name, class_names=names)["test"],
        orders,
        image_processor=load_image_processor(folder),
        progress=False,
    )
    # another processor may round an image to the other side of a tie
    assert [score.accuracy for score in scores] == [
        pytest.approx(score.accuracy, abs=1.5 / report.num_images) for score in (report.sequential, report.reversed)
    ]


@pytest.mark.parametrize("folder", DIGITS, ids=lambda folder: folder.name)
def test_the_weights_give_the_recorded_accuracy(folder):
    assert_the_weights_give_the_recorded_accuracy(folder, "digits")


@pytest.mark.slow
@pytest.mark.parametrize("folder", LARGER, ids=lambda folder: folder.name)
def test_the_larger_weights_give_the_recorded_accuracy(folder):
    """On images that are not in the repository: see `IMAGES`."""
    assert_the_weights_give_the_recorded_accuracy(folder, IMAGES[folder.name.split("-")[1]])


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
    published = [shutil.copytree(folder, tmp_path / folder.name) for folder in FOLDERS]
    for folder in published:
        for path in added_code(folder):
            shutil.copy(path, folder)
    result = run_python(FRESH_PROCESS, *published, environment={"HF_MODULES_CACHE": str(tmp_path / "modules")})
    assert result.returncode == 0, result.stderr
