"""Labelled texts: files of each kind, columns that are found, pairs, and what is refused."""

import json

import pytest
from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image
from support.texts import labelled_texts

import hf_layershuffle as ls
from hf_layershuffle.data.text_datasets import with_text_columns


ROWS = {"text": [f"a text of number {row}" for row in range(20)], "label": ["even", "odd"] * 10}


def write(folder, kind: str, rows: dict = ROWS):
    folder.mkdir(exist_ok=True)
    data = Dataset.from_dict(rows)
    path = folder / f"train.{kind}"
    if kind == "csv":
        data.to_csv(path)
    elif kind == "parquet":
        data.to_parquet(path)
    else:
        data.to_json(path, lines=kind == "jsonl")
    return path


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_a_file_and_a_folder_of_each_kind(tmp_path, kind):
    path = write(tmp_path / "data", kind)
    for name in (path, path.parent):
        splits = ls.load_text_datasets(str(name), eval_fraction=0.5)
        assert [len(split) for split in splits.values()] == [10, 10]
        assert splits["test"].column_names == ["text", "label"]
        assert splits["train"].features["label"].names == ["even", "odd"]
        for row in splits["test"]:
            assert row["label"] == int(row["text"].split()[-1]) % 2


def test_a_saved_dataset_and_its_splits(tmp_path):
    DatasetDict(train=labelled_texts(12), validation=labelled_texts(6, seed=1)).save_to_disk(tmp_path / "saved")
    splits = ls.load_text_datasets(str(tmp_path / "saved"))
    assert len(splits["train"]) == 12 and splits["test"]["text"][:] == labelled_texts(6, seed=1)["text"][:]
    held_out = ls.load_text_datasets(str(tmp_path / "saved"), eval_split="train", eval_fraction=0.25)
    assert len(held_out["test"]) == 3


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"id": "string", "sentence": "string", "label": "int64"}, {"text": "sentence"}),
        ({"content": "large_string", "target": "string"}, {"text": "content"}),
        ({"abstract": "string", "label": "string"}, {"text": "abstract"}),
        ({"premise": "string", "hypothesis": "string", "label": "int64"},
         {"text": "premise", "text_pair": "hypothesis"}),
        ({"sentence1": "string", "sentence2": "string", "idx": "int32", "label": "int64"},
         {"text": "sentence1", "text_pair": "sentence2"}),
    ],
)  # fmt: skip
def test_columns_are_found_by_name_or_as_the_only_text(columns, found):
    rows = {
        name: [f"{name} {row}" if "string" in kind else row % 2 for row in range(4)] for name, kind in columns.items()
    }
    data = Dataset.from_dict(rows, features=Features({name: Value(kind) for name, kind in columns.items()}))
    standard = with_text_columns(data, "the dataset")
    assert standard.column_names == [*found, "label"]
    for name, column in found.items():
        assert standard[name][0] == f"{column} 0"


def test_columns_that_are_named(tmp_path):
    rows = {"a": ["x"] * 8, "b": ["y"] * 8, "kind": ["p", "q"] * 4}
    path = str(write(tmp_path, "csv", rows))
    splits = ls.load_text_datasets(path, text_column="b", text_pair_column="a", label_column="kind", eval_fraction=0.5)
    assert splits["train"].column_names == ["text", "text_pair", "label"] and splits["train"]["text"][0] == "y"


@pytest.mark.parametrize(
    ("rows", "kwargs", "message"),
    [
        ({"a": ["x"] * 4, "b": ["y"] * 4, "label": [0, 1] * 2}, {}, r"the columns of texts 'a', 'b'\. Name the col"),
        ({"n": [1] * 4, "label": [0, 1] * 2}, {}, "no text column that could be told by its name; it has the colum"),
        ({"n": [1] * 4, "label": [0, 1] * 2}, {"text_column": "n"}, "holds values of type int64; choose a column of"),
        (ROWS, {"text_column": "body"}, "has no column 'body'; it has 'text', 'label'"),
        ({"text": ["x"] * 4}, {}, "has no label column"),
        ({"text": ["x"] * 4, "label": ["a", None] * 2}, {}, "has no label, as have 1 others"),
        ({"text": ["x"] * 3, "label": ["a", "a", "b"]}, {}, "more texts of each class"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(tmp_path, rows, kwargs, message):
    path = str(write(tmp_path, "parquet", rows))
    with pytest.raises(ValueError, match=message):
        ls.load_text_datasets(path, **kwargs)


def test_a_class_that_training_lacks(tmp_path):
    one, two = labelled_texts(9), labelled_texts(9).map(lambda row: {"kind": "other"})
    one = one.map(lambda row: {"kind": "this"})
    DatasetDict(train=one.remove_columns("label"), test=two.remove_columns("label")).save_to_disk(tmp_path / "d")
    with pytest.raises(
        ValueError, match=r"lacks: 'other'; it has 'this'\. Leave these rows out, or add such texts to"
    ):
        ls.load_text_datasets(str(tmp_path / "d"), label_column="kind")


def test_images_for_a_model_of_texts_and_the_other_way_round(tmp_path):
    with pytest.raises(ValueError, match=r"Column 'image' holds images, which are for a model of images"):
        ls.load_text_datasets("digits")
    with pytest.raises(ValueError, match=r"has no image column that could be told by its type or name; it has 'text'"):
        ls.load_image_datasets("python-docs")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"has no label column .* or put the images into one folder for each class"):
        ls.load_image_datasets(str(tmp_path))
    features = Features({"image": Array2D((2, 2), "uint8"), "text": Value("string"), "label": ClassLabel(names=["a"])})
    both = Dataset.from_dict({"image": [[[0, 0], [0, 0]]], "text": ["x"], "label": [0]}, features=features)
    assert with_text_columns(both, "both").column_names == ["text", "label"]


def test_what_there_is_not_and_what_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"There is no dataset folder"):
        ls.load_text_datasets(str(tmp_path / "missing.csv"))
    (tmp_path / "broken.json").write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(ValueError, match=r"cannot be loaded: .* Pass 'python-docs', a CSV, JSON or Parquet file"):
        ls.load_text_datasets(str(tmp_path / "broken.json"))
