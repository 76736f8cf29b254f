"""Which splits are taken where a dataset is only evaluated on."""

import pandas as pd
import pytest
from support.images import image_dataset, in_classes, save, write_images

import hf_layershuffle as ls
from hf_layershuffle.data.datasets import load_image_datasets


def without_labels(dataset, by: str):
    return dataset.remove_columns("label") if by == "no column" else dataset.map(lambda row: {"label": -1})


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_dataset_without_a_training_split_can_be_evaluated_on(tmp_path, split):
    name = save(tmp_path, **{split: image_dataset(5, label="fine_label")})
    (evaluated,) = load_image_datasets(name, evaluation_only=True).items()
    assert evaluated[0] == "test" and evaluated[1].column_names == ["image", "label"] and len(evaluated[1]) == 5
    assert evaluated[1].features["label"].names == ["cat", "dog"]
    with pytest.raises(ValueError, match=f"has no split 'train'; it has '{split}'"):
        load_image_datasets(name)


@pytest.mark.parametrize("by", ["no column", "-1"])
def test_the_first_usual_split_with_labels_is_evaluated_on(tmp_path, by, caplog):
    name = save(
        tmp_path, validation=without_labels(image_dataset(4), by), test=image_dataset(6), extra=image_dataset(2)
    )
    assert len(load_image_datasets(name, evaluation_only=True)["test"]) == 6
    assert "Split 'validation' of dataset" in caplog.text
    assert len(load_image_datasets(name, evaluation_only=True, eval_split="extra")["test"]) == 2
    with pytest.raises(ValueError, match="has no split 'dev'; it has 'validation', 'test', 'extra'"):
        load_image_datasets(name, evaluation_only=True, eval_split="dev")


def test_a_dataset_without_any_usual_split_is_refused(tmp_path):
    name = save(tmp_path, extra=image_dataset(2), test=without_labels(image_dataset(2), "no column"))
    with pytest.raises(
        ValueError, match=r"none of the splits 'train', .* with labels; .* by `eval_split` \(--eval_split"
    ):
        load_image_datasets(name, evaluation_only=True)


def test_a_dataset_with_a_training_split_is_loaded_as_ever(tmp_path):
    name = save(tmp_path, train=image_dataset(20))
    kept = load_image_datasets(name, evaluation_only=True)
    assert {split: len(data) for split, data in kept.items()} == {"train": 16, "test": 4}
    assert len(load_image_datasets(name, evaluation_only=True, train_split="mine", eval_split="train")["test"]) == 20


def test_class_folders_of_a_test_split_alone(tmp_path):
    write_images(tmp_path, *in_classes("test/cat", "test/dog"), "train/0.png")  # of which the last has no class
    splits = load_image_datasets(str(tmp_path), evaluation_only=True, class_names=["bird", "cat", "dog"])
    assert splits["test"]["label"][:] == [0, 0, 0, 1, 1, 1] and [*splits] == ["test"]


def test_texts_of_a_test_split_alone(tmp_path):
    pd.DataFrame({"text": ["good", "bad"], "label": [1, 0]}).to_csv(tmp_path / "test.csv", index=False)
    splits = ls.load_text_datasets(str(tmp_path), evaluation_only=True, class_names=["negative", "positive"])
    assert [*splits] == ["test"] and splits["test"].features["label"].names == ["negative", "positive"]
    assert splits["test"]["label"][:] == [1, 0]
