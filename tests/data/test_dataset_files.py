"""Layouts of folders, and tables of images as pandas and pyarrow write them."""

import io
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from support.images import image_dataset, in_classes, processor, random_images, write_images

from hf_layershuffle.data.datasets import ImageClassificationDataset, load_image_datasets
from hf_layershuffle.data.streamed_splits import load_image_stream
from hf_layershuffle.data.text_datasets import load_text_datasets


IMAGES = random_images(10)
LABELS = ["cat", "dog"] * 5


def png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def check(splits) -> None:
    """The images and labels above, in the training split."""
    names = splits["train"].features["label"].names
    assert splits["train"].column_names == ["image", "label"]
    assert [names[label] for label in splits["train"]["label"][:]] == LABELS
    for expected, image in zip(IMAGES, splits["train"]["image"]):
        assert np.array_equal(np.asarray(image), np.asarray(expected))


# --- Tables ---


def columns(kind: str, folder: Path) -> list:
    if kind == "struct":
        return [{"bytes": png(image), "path": f"{row}.png"} for row, image in enumerate(IMAGES)]
    if kind == "bytes only":
        return [{"bytes": png(image), "path": None} for image in IMAGES]
    if kind == "binary":
        return [png(image) for image in IMAGES]
    (folder / "pictures").mkdir()
    for row, image in enumerate(IMAGES):
        image.save(folder / "pictures" / f"{row}.png")
    return [
        {"path": "pictures/{}.png", "name": "{}.png"}.get(kind, str(folder / "pictures" / "{}.png")).format(row)
        for row in range(10)
    ]


@pytest.mark.parametrize("writer", ["pandas", "pyarrow"])
@pytest.mark.parametrize("kind", ["struct", "bytes only", "binary", "path", "name", "absolute"])
def test_parquet_of_pandas_and_pyarrow(tmp_path, writer, kind):
    content = {"image": columns(kind, tmp_path), "label": LABELS}
    for split in ("train", "test"):
        path = tmp_path / f"{split}.parquet"
        pd.DataFrame(content).to_parquet(path) if writer == "pandas" else pq.write_table(pa.table(content), path)
    splits = load_image_datasets(str(tmp_path))
    check(splits)
    assert len(ImageClassificationDataset(splits["test"], processor())) == 10


def test_parquet_with_large_binaries(tmp_path):
    table = pa.table({"picture": pa.array([png(image) for image in IMAGES], pa.large_binary()), "label": LABELS})
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    check(load_image_datasets(str(tmp_path)))


@pytest.mark.parametrize("column", ["image", "file_name", "path"])
def test_csv_with_paths(tmp_path, column):
    content = {column: columns("path", tmp_path), "label": LABELS}
    for split in ("train", "test"):
        pd.DataFrame(content).to_csv(tmp_path / f"{split}.csv", index=False)
    pd.DataFrame({"id": [1]}).to_csv(tmp_path / "sample_submission.csv", index=False)
    check(load_image_datasets(str(tmp_path)))


def test_a_csv_of_labels_beside_a_test_table_without_them(tmp_path):
    content = {"image": columns("name", tmp_path), "label": LABELS}
    pd.DataFrame(content).to_csv(tmp_path / "train.csv", index=False)
    pd.DataFrame(content).drop(columns="label").to_csv(tmp_path / "test.csv", index=False)
    splits = load_image_datasets(str(tmp_path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 8, "test": 2}


def test_a_csv_cannot_hold_images(tmp_path):
    content = {"image": columns("binary", tmp_path), "label": LABELS}
    pd.DataFrame(content).to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(ValueError, match=r"in 10 of 10 rows, first in row 0: \"b'.*a CSV file cannot hold the images"):
        load_image_datasets(str(tmp_path))


def test_paths_that_lead_nowhere_are_counted(tmp_path):
    content = {"image": columns("path", tmp_path), "label": LABELS}
    for row in (3, 4):
        (tmp_path / "pictures" / f"{row}.png").unlink()
    pd.DataFrame(content).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"in 2 of 10 rows, first in row 3: 'pictures/3.png'. Give paths relative to"):
        load_image_datasets(str(tmp_path))


def write_table(folder: Path, split: str, paths: list[str], labels=None, **columns) -> None:
    labels = {"label": LABELS[: len(paths)] if labels is None else labels}
    pd.DataFrame({"file_name": paths, **(columns or labels)}).to_csv(folder / f"{split}.csv", index=False)


@pytest.mark.parametrize(
    ("folders", "num_missing"), [(("train", "test"), 1), (("first", "second"), 1), (("first", "second"), 10)]
)
def test_an_image_that_is_missing_is_not_one_of_the_same_name_elsewhere(tmp_path, folders, num_missing):
    paths = [f"{folder}/{row}.png" for folder in folders for row in range(10)]
    write_images(tmp_path, *paths)
    for path in paths[:num_missing]:
        (tmp_path / path).unlink()
    if num_missing == 10:
        (tmp_path / folders[0]).rmdir()
    paths = paths[:10] if "train" in folders else paths
    write_table(tmp_path, "train", paths, ["cat", "dog"] * (len(paths) // 2))
    message = f"no path of an image that is there in {num_missing} of {len(paths)} rows, first in row 0: '{paths[0]}'"
    with pytest.raises(ValueError, match=message):
        load_image_datasets(str(tmp_path))


def test_paths_of_a_small_table_do_not_lead_to_another_split(tmp_path):
    write_images(tmp_path, *(f"train/{row}.png" for row in range(10)), "test/0.png")
    write_table(tmp_path, "train", [f"train/{row}.png" for row in range(10)])
    write_table(tmp_path, "test", ["test/5.png"])
    with pytest.raises(ValueError, match=r"no path of an image that is there in 1 of 1 rows, .* 'test/5.png'"):
        load_image_datasets(str(tmp_path))


@pytest.mark.parametrize("written", ["/home/someone/pictures/{}.png", "old/{}.png"])
def test_paths_that_were_written_elsewhere_lead_to_images_by_their_names(tmp_path, written):
    columns("path", tmp_path)
    write_table(tmp_path, "train", [written.format(row) for row in range(10)])
    write_table(tmp_path, "test", [written.format(row) for row in range(2)])
    check(load_image_datasets(str(tmp_path)))
    write_table(tmp_path, "test", [written.format(3), "elsewhere/3.png"])  # which of them?
    with pytest.raises(ValueError, match=r"no path of an image that is there in 2 of 2 rows"):
        load_image_datasets(str(tmp_path))


def test_a_table_of_paths_is_a_dataset_by_itself(tmp_path):
    write_table(tmp_path, "mine", columns("path", tmp_path))
    assert len(load_image_datasets(str(tmp_path / "mine.csv"))["train"]) == 8


@pytest.mark.parametrize("name", ["None", "NA", "null"])
def test_a_class_of_a_csv_whose_name_is_read_as_no_label_is_told(tmp_path, name):
    write_table(tmp_path, "train", columns("path", tmp_path), [name, "cat"] * 5)
    with pytest.raises(
        ValueError, match=r"has no label, as have 4 others\. In a CSV file the words None, NA, .* another"
    ):
        load_image_datasets(str(tmp_path))


# --- Tables beside folders ---


@pytest.mark.parametrize("with_folder", [True, False])
def test_a_csv_tells_the_classes_of_images_in_several_folders(tmp_path, with_folder, caplog):
    caplog.set_level("INFO", "hf_layershuffle.data")
    paths = [f"train/part_{1 + row // 5}/{row}.png" for row in range(10)]
    write_images(tmp_path, *paths, "test/part_1/10.png", "test/part_2/11.png")
    for path, image in zip(paths, IMAGES):
        image.save(tmp_path / path)
    write_table(tmp_path, "train", paths if with_folder else [Path(path).name for path in paths])
    write_table(tmp_path, "test", ["test/part_1/10.png", "test/part_2/11.png"], ["dog", "dog"])
    splits = load_image_datasets(str(tmp_path))
    check(splits)
    assert splits["test"]["label"][:] == [1, 1]
    assert "are the labels in 'test.csv', 'train.csv', not the names of its folders." in caplog.text
    with pytest.raises(ValueError, match=r"are in 'test.csv', 'train.csv', and paths .* leave out --streaming"):
        load_image_stream(str(tmp_path))


def test_class_folders_stay_the_classes_if_a_csv_tells_the_same_ones(tmp_path, caplog):
    paths = in_classes("train/cat", "train/dog", "test/cat", "test/dog")
    write_images(tmp_path, *paths)
    write_table(tmp_path, "all", paths, [path.split("/")[1].upper() for path in paths])
    splits = load_image_datasets(str(tmp_path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "test": 6}
    assert splits["train"].features["label"].names == ["cat", "dog"] and not caplog.text


@pytest.mark.parametrize(
    ("table", "warning"),
    [
        (
            {"paths": ["test/0.png", "train/cat/0.png", "train/dog/1.png"], "labels": ["?", "?", "?"]},
            "are the names of its folders; the labels in 'mine.csv' name 2 of the 6 images",
        ),
        (
            {"paths": in_classes("train/cat", "train/dog"), "labels": list("xxxyyy")[::2] * 2},
            "'mine.csv' name no split",
        ),
        ({"paths": ["gone/0.png", "gone/1.png"]}, None),
        ({"paths": ["train/cat/0.png"], "dx": ["mel"]}, None),
        ({"paths": ["train/cat/0.png"], "labels": ["long" * 50_000]}, None),
        ({"paths": [], "label": []}, None),
    ],
)
def test_a_csv_that_does_not_tell_the_classes_leaves_the_folders(tmp_path, table, warning, caplog):
    write_images(tmp_path, *in_classes("train/cat", "train/dog"), "test/0.png")
    write_table(tmp_path, "mine", **table)
    splits = load_image_datasets(str(tmp_path), eval_fraction=0.34)
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert re.search(warning, caplog.text) if warning else ".csv" not in caplog.text


def test_a_column_of_numbers_is_no_column_of_images(tmp_path):
    pd.DataFrame({"image": range(10), "label": LABELS}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"holds values of type int64, such as 0; choose a column of images"):
        load_image_datasets(str(tmp_path))


# --- Folders ---


def test_folders_of_one_class_are_said_to_be_too_few(tmp_path):
    write_images(tmp_path, *in_classes("train/cat", "test/cat"))
    with pytest.raises(ValueError, match="one folder for each class, of which there must be two at least"):
        load_image_datasets(str(tmp_path))


@pytest.mark.parametrize("names", [("train", "test"), ("training", "testing")])
def test_a_flat_test_folder_is_left_out(tmp_path, names, caplog):
    train, test = names
    write_images(tmp_path, *in_classes(f"{train}/cat", f"{train}/dog", count=10), f"{test}/0.png", f"{test}/1.png")
    splits = load_image_datasets(str(tmp_path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 16, "test": 4}
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert f"{test}' lie in no class folders" in caplog.text
    with pytest.raises(ValueError, match=r"split 'test' .* lie in no class folders, so they have no labels.* 'train'"):
        load_image_datasets(str(tmp_path), eval_split="test")


def test_a_validation_folder_with_classes_is_used_beside_a_flat_test_folder(tmp_path):
    write_images(tmp_path, *in_classes("train/cat", "train/dog", "val/cat", "val/dog"), "test/0.png")
    splits = load_image_datasets(str(tmp_path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "test": 6}


def test_the_cause_of_an_error_in_a_file_is_told(tmp_path):
    (tmp_path / "train.csv").write_text("image,label\na.png,0\nb.png,0,1\n")
    with pytest.raises(ValueError, match=r"cannot be loaded: .*Expected 2 fields in line 3, saw 3") as caught:
        load_image_datasets(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_table_replaced_with_the_same_modification_time_is_read_anew(tmp_path):
    path = tmp_path / "train.parquet"
    image_dataset(20).to_parquet(path)
    before, stat = load_image_datasets(str(tmp_path))["train"], path.stat()
    other = Dataset.from_dict({"image": random_images(20, seed=7), "label": [0, 1] * 10}, features=before.features)
    other.to_parquet(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = load_image_datasets(str(tmp_path))["train"]
    assert not np.array_equal(np.asarray(before[0]["image"]), np.asarray(after[0]["image"]))


@pytest.mark.parametrize("layout", ["parquet", "other classes", "paths", "split folders", "class folders"])
def test_brackets_in_a_path_are_no_pattern(tmp_path, layout):
    folder = tmp_path / "pictures [old]" / "data[1]"
    folder.mkdir(parents=True)
    if layout in ("parquet", "other classes"):
        for split, names in (("train", ("cat", "dog")), ("test", ("dog", "cat"))):
            table = image_dataset(10, names=names if layout == "other classes" else ("cat", "dog"))
            table.to_parquet(folder / f"{split}-0.parquet")
    elif layout == "paths":
        content = {"image": columns("path", folder), "label": LABELS}
        pd.DataFrame(content).to_csv(folder / "[all].csv", index=False)
    elif layout == "split folders":
        write_images(folder, *in_classes("train/[cat]", "train/dog", "test/[cat]", "test/dog", count=5))
    else:
        write_images(folder, *in_classes("[cat]", "dog", count=5))
    splits = load_image_datasets(str(folder))
    held_out = layout in ("paths", "class folders")
    assert [len(splits[name]) for name in ("train", "test")] == ([8, 2] if held_out else [10, 10])
    assert [name.strip("[]") for name in splits["train"].features["label"].names] == ["cat", "dog"]


def test_a_readme_that_names_files_is_not_passed_over(tmp_path):
    folder = tmp_path / "pictures [old]"
    folder.mkdir()
    image_dataset(20).to_parquet(folder / "first.parquet")
    image_dataset(10).to_parquet(folder / "second.parquet")
    files = "[{split: train, path: first.parquet}, {split: test, path: second.parquet}]"
    (folder / "README.md").write_text(f"---\nconfigs: [{{config_name: default, data_files: {files}}}]\n---\n")
    for load in (load_image_datasets, load_image_stream):
        with pytest.raises(
            ValueError, match=r"README.md' names the files of each split .* rename the folder, or remove"
        ):
            load(str(folder))
    splits = load_image_datasets(str(folder.rename(tmp_path / "pictures")))
    assert {name: len(split) for name, split in splits.items()} == {"train": 20, "test": 10}


def test_brackets_in_the_name_of_a_table_are_no_pattern(tmp_path):
    pd.DataFrame({"text": ["red"] * 10, "label": LABELS}).to_csv(tmp_path / "all [10].csv", index=False)
    assert len(load_text_datasets(str(tmp_path / "all [10].csv"))["train"]) == 8


def test_the_split_to_train_on_is_not_evaluated_on(tmp_path):
    image_dataset(20).to_parquet(tmp_path / "validation.parquet")
    splits = load_image_datasets(str(tmp_path), train_split="validation")
    assert {name: len(split) for name, split in splits.items()} == {"train": 16, "test": 4}
