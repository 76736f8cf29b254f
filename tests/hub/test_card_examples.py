"""The example images of a card."""

import shutil

import pytest
import torch
from conftest import REPOSITORY
from datasets import Dataset
from huggingface_hub import metadata_load
from PIL import Image
from support.cards import describe, images, save_model
from transformers import ViTImageProcessor, pipeline

import hf_layershuffle as ls
from hf_layershuffle.checkpoints.image_processors import load_image_processor
from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.data.datasets import load_image_datasets
from hf_layershuffle.hub.card_examples import copy_examples, write_examples
from hf_layershuffle.hub.published_files import is_replaced


DIGITS = REPOSITORY / "model_cards" / "vit-digits-layershuffle"


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A folder with everything that a card can show."""
    return describe(tmp_path_factory.mktemp("models") / "vit-tiny")


def test_widget_examples_are_files_with_this_models_answers(described):
    widget = metadata_load(described / "README.md")["widget"]
    classify = pipeline("image-classification", model=str(described))
    assert [entry["example_title"] for entry in widget] == ["Class a"]  # this untrained model knows no other class
    assert "first ones of their classes that this model classifies correctly" in (described / "README.md").read_text()
    for row, entry in enumerate(widget):
        image = Image.open(described / entry["src"])
        assert image.size == (96, 96)
        assert (torch.tensor(list(image.resize((8, 8), Image.Resampling.NEAREST).tobytes())).view(8, 8)
                == torch.tensor(images()[row]["image"])).all()  # fmt: skip
        answers = {answer["label"]: answer["score"] for answer in classify(str(described / entry["src"]), top_k=5)}
        assert [answer["label"] for answer in entry["output"]] == list(answers)
        for answer in entry["output"]:
            assert answer["score"] == pytest.approx(answers[answer["label"]], abs=1e-4)


def test_a_persons_files_stay_beside_the_examples(tmp_path):
    save_model(tmp_path)
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    own = {"mine.png", "12-mine.png", "notes.json", "more/0.png"}
    for name in (*own, "7.png"):
        (tmp_path / "examples" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "examples" / name).write_text(name)
    (tmp_path / "examples" / "link").symlink_to("mine.png")
    assert len(write_examples(tmp_path, images(), processor)) == 1

    def there():
        files = (tmp_path / "examples").rglob("*")
        return {path.relative_to(tmp_path / "examples").as_posix() for path in files if path.is_file()}

    assert there() == {*own, "link", "0.png", "examples.json"}
    assert all((tmp_path / "examples" / name).read_text() == name for name in own)
    assert (tmp_path / "examples" / "link").is_symlink()
    assert not write_examples(tmp_path, images().select([1]), processor)  # an image that it has wrong
    assert there() == {*own, "link"}
    assert is_replaced("examples/0.png") and is_replaced("examples/examples.json")  # by a push of other weights
    assert not any(is_replaced(f"examples/{name}") for name in own)


def test_images_without_a_label_are_no_examples(tmp_path):
    save_model(tmp_path)
    data = images()
    columns = {"image": data["image"][:], "label": [-1, *data["label"][1:]]}
    unlabelled = Dataset.from_dict(columns, features=data.features)
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    (entry,) = write_examples(tmp_path, unlabelled, processor)
    assert entry["example_title"] == "Class a"


def test_grey_models_answer_grey_images(tmp_path):
    save_model(tmp_path, num_channels=1)
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    (entry,) = write_examples(tmp_path, images(), processor, num_examples=2, top_k=3)
    assert len(entry["output"]) == 3
    with pytest.raises(ValueError, match="`num_examples` is 0"):
        write_examples(tmp_path, images(), processor, num_examples=0)


def test_examples_are_images_that_the_model_has_right(tmp_path):
    """The first of its class, unless the model errs there, or knows none of that class."""
    folder = shutil.copytree(DIGITS, tmp_path / "digits")
    model, processor = load_classifier(str(folder)).eval(), load_image_processor(folder)
    dataset = load_image_datasets("digits")["test"]
    scores = ls.score_execution_orders(
        model, dataset.select([0]), [list(range(6))], image_processor=processor, progress=False
    )
    assert scores[0].accuracy == 1  # it is a 3, and called a 5 here: another 5 must be shown
    dataset = dataset.select(range(40)).map(
        lambda row, index: {"label": 5 if index == 0 else row["label"]}, with_indices=True
    )
    dataset = dataset.filter(lambda row: row["label"] in (1, 5, 7)).map(
        lambda row: {"label": {1: 2}.get(row["label"], row["label"])}
    )
    entries = write_examples(folder, dataset, processor)
    assert [entry["example_title"] for entry in entries] == ["Class 5", "Class 7"]  # each 1 is called a 2
    assert all(entry["output"][0]["label"] == entry["example_title"][-1] for entry in entries)
    assert {path.name for path in (folder / "examples").iterdir()} == {"0.png", "1.png", "examples.json"}
    assert not write_examples(folder, dataset.filter(lambda row: row["label"] == 2), processor)
    assert not (folder / "examples").exists()


def test_a_folder_without_examples_has_none_to_copy(tmp_path):
    copy_examples(tmp_path, tmp_path / "target", None)
    assert not (tmp_path / "target").exists()
