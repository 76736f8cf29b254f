import shutil
import tarfile

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from support.images import image_dataset, processor, save, write_images
from support.streams import image_bytes, write_parquet, write_tars

from hf_layershuffle.data import streamed_splits
from hf_layershuffle.data.datasets import load_image_datasets
from hf_layershuffle.data.image_stream import ImageStream
from hf_layershuffle.data.labelled_splits import find_label_column, standard_columns
from hf_layershuffle.data.streamed_splits import load_image_stream


def labels_of(splits) -> list[int]:
    """Classes of the images to train on, in the order of the files."""
    images = ImageStream(splits.stream, processor(), class_numbers=splits.class_numbers, shuffle_buffer_size=0)
    return images.__getitems__(list(images.samples(0))).unfinished["labels"].tolist()


def write_table(folder, split: str, labels: list, label_feature) -> None:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rows = [{"image": {"bytes": each, "path": None}, "label": label} for each, label in zip(image_bytes(20), labels)]
    dataset = Dataset.from_list(rows, features=Features({"image": Image(), "label": label_feature}))
    dataset.to_parquet(folder / "data" / f"{split}-00000.parquet")


def test_parquet_says_its_classes_and_its_length(tmp_path):
    splits = load_image_stream(write_parquet(tmp_path / "images"))
    assert splits.num_samples == 26 and splits.stream.num_shards == 4
    assert splits.test.features["label"].names == ["cat", "dog"] and len(splits.test) == 10
    head = splits.head()
    assert len(head) == 26 and head.features["label"].names == ["cat", "dog"] and head[1]["label"] == 1
    stored = load_image_datasets(str(tmp_path / "images"))["train"]
    assert labels_of(splits) == stored["label"][:]


def test_tar_files_have_the_classes_of_the_evaluation_split(tmp_path):
    splits = load_image_stream(write_tars(tmp_path / "tars", num_classes=3))
    assert splits.num_samples is None and splits.stream.num_shards == 4
    assert splits.test.features["label"].names == ["0", "1", "2"]
    assert labels_of(splits) == [row % 3 for row in range(26)]
    named = load_image_stream(str(tmp_path / "tars"), class_names=["ant", "bee", "cow", "doe"])
    assert named.test.features["label"].names == ["ant", "bee", "cow", "doe"]
    assert labels_of(named) == [row % 3 for row in range(26)]


@pytest.mark.parametrize("name, feature", [("label", Value("int64")), ("category", ClassLabel(names=["ant", "bee"]))])
def test_a_field_is_no_label_where_a_column_is(name, feature):
    """Whatever its type is."""
    fields = {"source": ClassLabel(names=["web", "camera"]), "label": ClassLabel(names=["up", "down"])}
    features = Features({"image": Image(), "json": fields, "meta": fields, name: feature})
    assert find_label_column(features, None, "mine") == name
    assert find_label_column(features, "meta.source", "mine") == "meta.source"
    del features[name]
    assert find_label_column(features, None, "mine") == "json.label"
    del features["json"]
    with pytest.raises(ValueError, match=r"no label column .*; it has .*'meta.source'"):
        find_label_column(features, None, "mine")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_field_of_a_column_whose_name_has_dots(streamed):
    features = Features({"image": Value("string"), "meta.json": {"label": Value("int64")}})
    split = Dataset.from_dict({"image": ["a", "b"], "meta.json": [{"label": 3}, {"label": 4}]}, features=features)
    split = split.to_iterable_dataset() if streamed else split
    columns = {"image": "image", "label": "meta.json.label"}
    assert [*standard_columns(split, columns, "train")] == [{"image": "a", "label": 3}, {"image": "b", "label": 4}]


@pytest.mark.parametrize("field, column", [("label", None), ("kind", "json.kind")])
def test_labels_in_json_files(tmp_path, field, column):
    folder = write_tars(tmp_path / "tars", num_classes=3, field=field)
    splits = load_image_stream(folder, label_column=column)
    assert labels_of(splits) == [row % 3 for row in range(26)]
    assert splits.test.features["label"].names == ["0", "1", "2"] and splits.test[0]["image"].size == (25, 17)
    rows = list(splits.stream)
    assert [row["image"]["bytes"] for row in rows] == image_bytes(36)[:26]  # not decoded and encoded again
    stored = load_image_datasets(folder, label_column=column)
    assert [len(stored["train"]), stored["train"][4]["label"], stored["test"][:]["label"][:3]] == [26, 1, [2, 0, 1]]
    with pytest.raises(ValueError, match=r"has no column 'json.sort'; it has 'json\.\w+', 'json\.\w+', "):
        load_image_stream(folder, label_column="json.sort")
    with pytest.raises(ValueError, match=r"has no column 'json.sort'; it has 'json\.\w+', 'json\.\w+', "):
        load_image_datasets(folder, label_column="json.sort")


def test_classes_by_name_whatever_their_order_in_the_evaluation_split(tmp_path):
    write_table(tmp_path, "train", [0, 1, 2], ClassLabel(names=["ant", "bee", "cow"]))
    write_table(tmp_path, "test", [0, 1, 1], ClassLabel(names=["cow", "ant"]))
    splits = load_image_stream(str(tmp_path))
    assert splits.test["label"][:] == [2, 0, 0]
    assert labels_of(splits) == [0, 1, 2]


def test_labels_that_are_names_are_numbered_by_the_evaluation_split(tmp_path):
    write_table(tmp_path, "train", ["bee", "ant", "bee"], Value("string"))
    write_table(tmp_path, "test", ["ant", "bee"], Value("string"))
    splits = load_image_stream(str(tmp_path))
    assert splits.test["label"][:] == [0, 1]
    assert labels_of(splits) == [1, 0, 1]
    write_table(tmp_path, "train", ["bee", "cow"], Value("string"))
    with pytest.raises(
        ValueError, match=r"Image 1 .* has the label 'cow'; the labels of this stream are 'ant', 'bee'"
    ):
        labels_of(load_image_stream(str(tmp_path)))


def test_folders_of_classes(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path, *(f"{split}/{name}/{row}.png" for name in ("ant", "bee") for row in range(3)))
    splits = load_image_stream(str(tmp_path))
    assert splits.test.features["label"].names == ["ant", "bee"]
    assert sorted(labels_of(splits)) == [0, 0, 0, 1, 1, 1]


def test_bytes_without_a_type_are_images(tmp_path):
    for split in ("train", "test"):
        rows = {"picture": image_bytes(4), "label": [0, 1, 0, 1]}
        features = Features({"picture": Value("binary"), "label": Value("int64")})
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    splits = load_image_stream(str(tmp_path))
    assert labels_of(splits) == [0, 1, 0, 1] and splits.test[0]["image"].size == (20, 16)


@pytest.mark.parametrize("write", [write_parquet, write_tars])
def test_brackets_in_a_path_are_no_pattern(tmp_path, write):
    folder = tmp_path / "images [old]"
    splits = load_image_stream(write(folder))
    assert labels_of(splits) == [row % 2 for row in range(26)] if write is write_tars else len(labels_of(splits)) == 26
    if write is write_tars:
        with tarfile.open(folder / "train-00000.tar", "w"):
            pass  # empty, so that `datasets` would find no columns
        assert len(labels_of(load_image_stream(str(folder)))) == 19


@pytest.mark.parametrize(
    ("train", "test", "class_names", "expected"),
    [
        ([0, 1, 2, 1], [0, 1], ["ant", "bee", "cow"], ["ant", "bee", "cow", "bee"]),
        ([0, 7, 3, 7], [0, 3], ["0", "3", "7"], ["0", "7", "3", "7"]),
        (["cow", "ant", "bee"], ["ant", "bee"], ["bee", "cow", "ant"], ["cow", "ant", "bee"]),
        (["cow", "ant"], ["ant", "cow"], ["bee", "dog"], ["cow", "ant"]),
        ([4, 5], [4, 5], ["0", "1"], ["4", "5"]),
    ],
)
def test_classes_of_the_checkpoint_that_the_evaluation_split_lacks(tmp_path, train, test, class_names, expected):
    feature = Value("int64" if isinstance(train[0], int) else "string")
    write_table(tmp_path, "train", train, feature)
    write_table(tmp_path, "test", test, feature)
    splits = load_image_stream(str(tmp_path), class_names=class_names)
    names = splits.test.features["label"].names
    assert [names[label] for label in labels_of(splits)] == expected
    stored = load_image_datasets(str(tmp_path), class_names=class_names)["train"]
    assert [stored.features["label"].names[label] for label in stored["label"][:]] == expected


def test_what_cannot_be_streamed_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'digits' comes with its library .* leave out --streaming"):
        load_image_stream("digits")
    with pytest.raises(ValueError, match="no dataset folder"):
        load_image_stream(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="`save_to_disk` wrote, which are read at any row"):
        load_image_stream(save(tmp_path, train=image_dataset(4)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"cannot be streamed: .* Pass a folder of Parquet"):
        load_image_stream(str(tmp_path / "empty"))


def test_splits_are_checked(tmp_path):
    folder = write_parquet(tmp_path / "images")
    with pytest.raises(ValueError, match="no split 'all'; it has 'train', 'validation'"):
        load_image_stream(folder, train_split="all")
    with pytest.raises(ValueError, match="no split 'test'; it has 'train', 'validation'"):
        load_image_stream(folder, eval_split="test")
    with pytest.raises(ValueError, match="`eval_split` is 'train', which is trained on"):
        load_image_stream(folder, eval_split="train")
    with pytest.raises(ValueError, match=r"no split to evaluate on, .* Give one by `eval_split` \(--eval_split\)"):
        streamed_splits._check_splits("of the Hub", ["train", "extra"], "train", None)
    shutil.rmtree(tmp_path / "images" / "data")
    write_table(tmp_path / "images", "train", [0, 1], ClassLabel(names=["ant", "bee"]))
    with pytest.raises(ValueError, match=r"no split to evaluate on, .*; it has 'train'\..*leave out --streaming"):
        load_image_stream(folder)


def test_tables_of_paths_are_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("image,label\na.png,0\nb.png,1\n")
    with pytest.raises(ValueError, match="holds paths, which cannot be streamed"):
        load_image_stream(str(tmp_path))
