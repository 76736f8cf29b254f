"""One numbering of classes: of all splits, and the model's."""

from types import SimpleNamespace

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from support.images import image_dataset, processor, random_images, save, write_idx

from hf_layershuffle import evaluate_robustness
from hf_layershuffle.analysis import layer_contributions
from hf_layershuffle.compression.pruning import search_layers
from hf_layershuffle.data import class_labels
from hf_layershuffle.data.class_labels import replace_labels, unformatted
from hf_layershuffle.data.datasets import as_dataloader, load_image_datasets, match_labels, typical_image_size
from hf_layershuffle.data.image_stream import ImageStream
from hf_layershuffle.data.streamed_splits import load_image_stream


def labelled(labels: list, feature=None, seed: int = 0) -> Dataset:
    features = None if feature is None else Features({"image": Image(), "label": feature})
    return Dataset.from_dict({"image": random_images(len(labels), seed=seed), "label": labels}, features=features)


def named(names: list[str], labels: list[int] | None = None) -> Dataset:
    return labelled(list(range(len(names))) if labels is None else labels, ClassLabel(names=names))


def classes(dataset: Dataset) -> list[str]:
    return [dataset.features["label"].names[label] for label in dataset["label"][:]]


def model_config(names) -> SimpleNamespace:
    return SimpleNamespace(num_labels=len(names), id2label=dict(enumerate(names)))


TEN = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
UNNAMED = [f"LABEL_{index}" for index in range(10)]


# --- Of all splits ---


@pytest.mark.parametrize("loader", ["saved", "parquet"])
def test_splits_with_classes_in_another_order_get_one_numbering(tmp_path, loader):
    train, test = named(["cat", "dog"], [0, 0, 1]), named(["dog", "cat"], [0, 1, 1])
    if loader == "saved":
        name = save(tmp_path, train=train, test=test)
    else:
        name = str(tmp_path)
        train.to_parquet(tmp_path / "train.parquet")
        test.to_parquet(tmp_path / "test.parquet")
    splits = load_image_datasets(name)
    assert classes(splits["train"]) == ["cat", "cat", "dog"] and classes(splits["test"]) == ["dog", "cat", "cat"]
    assert splits["test"].features["label"].names == ["cat", "dog"]
    assert splits["test"]["label"][:] == [1, 0, 0]


def test_the_classes_of_many_folders_are_told_in_one_go(monkeypatch):
    names = [f"class {index:04d}" for index in range(1000)]
    folders = labelled([3, 1, 999], ClassLabel(names=names))
    folders.info.builder_name = "imagefolder"
    made = []
    monkeypatch.setattr(class_labels, "set", lambda values: made.append(values) or frozenset(values), raising=False)
    numbered = class_labels.with_class_labels({"train": folders}, "mine")["train"]
    assert classes(numbered) == ["class 0003", "class 0001", "class 0999"] and len(made) == 1


def test_parquet_files_of_one_split_with_other_classes_are_refused(tmp_path):
    named(["cat", "dog"]).to_parquet(tmp_path / "train-0.parquet")
    named(["dog", "cat"]).to_parquet(tmp_path / "train-1.parquet")
    named(["cat", "dog"]).to_parquet(tmp_path / "test-0.parquet")
    for load in (load_image_datasets, load_image_stream):
        with pytest.raises(ValueError, match=r"'dog', 'cat' in 'train-1.parquet' and 'cat', 'dog' in 'train-0.parq"):
            load(str(tmp_path))
    (tmp_path / "train-1.parquet").rename(tmp_path / "test-1.parquet")
    with pytest.raises(ValueError, match=r"'dog', 'cat' in 'test-1.parquet' and 'cat', 'dog' in 'test-0.parquet'"):
        load_image_stream(str(tmp_path))


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        (named(["cat", "dog"]), labelled(["dog", "cat"]), ["dog", "cat"]),
        (labelled(["cat", "dog"]), named(["dog", "cat"]), ["dog", "cat"]),
        (named(["cat", "dog"]), labelled([1, 0]), ["dog", "cat"]),
        (named(["cat", "dog"]), named(["bird", "dog", "cat"], [1, 2]), ["dog", "cat"]),  # declared, but without images
        (labelled([1, 0]), labelled([0, 0]), ["0", "0"]),
        (labelled([True, False]), labelled([True, False]), ["True", "False"]),
    ],
)
def test_labels_of_another_kind_are_understood(tmp_path, train, test, expected):
    splits = load_image_datasets(save(tmp_path, train=train, test=test))
    assert classes(splits["test"]) == expected
    assert splits["train"].features == splits["test"].features


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (["cat", "dog"], ["cat", "bird"], r"1 rows, first row 1, are of classes that .* 'train' lacks: 'bird'"),
        ([1, 2], [2, 3], r"1 rows, first row 1, are of classes that .* 'train' lacks: '3'; it has '1', '2'"),
        (["cat", "dog"], [0, 1], r"are names such as 'cat' in the split used for 'train' and integers such as 0 in"),
        ([0, 1], ["0", "1"], r"are integers such as 0 in the split used for 'train' and names such as '0' in"),
        (["cat", None, None], ["cat"], r"Row 1 of the split used for 'train' .* has no label, as have 1 others"),
        ([0.0, float("nan")], [0.0], r"Row 1 of the split used for 'train' .* has no label\."),
        ([0, 1, -1], [0], r"Row 2 of the split used for 'train' .* has the label -1; .* integers of at least 0"),
        ([[0], [1]], [[0]], r"holds \[0\]; labels are class names or integers"),
    ],
)
def test_labels_that_do_not_fit_are_named(tmp_path, train, test, message):
    with pytest.raises(ValueError, match=message):
        load_image_datasets(save(tmp_path, train=labelled(train), test=labelled(test, seed=1)))


def test_a_folder_only_the_test_split_has_is_no_class(tmp_path):
    for name in ("train/cat", "train/dog", "test/cat", "test/bird"):
        (tmp_path / name).mkdir(parents=True)
        random_images(1)[0].save(tmp_path / name / "0.png")
    with pytest.raises(ValueError, match=r"'test' .* 1 rows, .* are of classes that .* 'train' lacks: 'bird'"):
        load_image_datasets(str(tmp_path))


@pytest.mark.parametrize("unlabelled", ["no column", -1, None])
def test_a_test_split_without_labels_is_left_out(tmp_path, unlabelled, caplog):
    test = named(["cat", "dog"])
    test = test.remove_columns("label") if unlabelled == "no column" else named(["cat", "dog"], [unlabelled] * 2)
    name = save(tmp_path, train=image_dataset(20), test=test)
    splits = load_image_datasets(name)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 16, "test": 4}
    assert "Split 'test' of dataset" in caplog.text and "has no labels" in caplog.text
    with pytest.raises(ValueError, match="has no column 'label'" if unlabelled == "no column" else "has the label"):
        load_image_datasets(name, eval_split="test")


# --- Integers ---


def test_integers_are_class_indices_where_the_classes_have_names(tmp_path, caplog):
    name = save(tmp_path, train=labelled([7, 3, 3]), test=labelled([3, 7]))
    splits = load_image_datasets(name, class_names=TEN)
    assert classes(splits["test"]) == ["three", "seven"] and splits["test"]["label"][:] == [3, 7]
    assert "are integers; they are taken for the classes 0: zero, 1: one" in caplog.text
    with pytest.raises(ValueError, match=r"Row 0 .* has the label 7; labels are integers from 0 to 4"):
        load_image_datasets(name, class_names=TEN[:5])


def test_integers_are_names_for_classes_that_are_numbers(tmp_path):
    name = save(tmp_path, train=labelled([1, 2, 3]), test=labelled([1, 3]))
    splits = load_image_datasets(name, class_names=["1", "2", "3"])
    assert classes(match_labels(splits["test"], model_config(["1", "2", "3"]))) == ["1", "3"]


def test_an_idx_folder_holds_class_indices(tmp_path):
    for name in ("train", "t10k"):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", np.zeros((10, 8, 8)))
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", np.arange(10))
    assert classes(load_image_datasets(str(tmp_path))["test"]) == [str(index) for index in range(10)]
    assert classes(load_image_datasets(str(tmp_path), class_names=TEN)["test"]) == TEN


# --- With the format of another library ---


@pytest.mark.parametrize("format", ["numpy", "torch", "pandas", "arrow"])
def test_a_format_changes_nothing(tmp_path, format):
    images = named(["cat", "dog"], [0, 1] * 5)
    formatted = images.with_format(format)
    splits = load_image_datasets(save(tmp_path, train=formatted, test=formatted))
    assert splits["train"]["label"][:] == images["label"][:] and splits["train"][0]["image"].size == (8, 8)
    other = model_config(["dog", "cat"])
    assert match_labels(formatted, other)["label"][:] == [1, 0] * 5
    assert typical_image_size(formatted) == (8, 8)
    (expected,), (batch,) = (as_dataloader(each, processor(), config=other) for each in (images, formatted))
    assert all(batch[name].equal(expected[name]) for name in ("pixel_values", "labels"))
    streams = [each.to_iterable_dataset() for each in (images, images)]
    if format != "pandas":  # of which `datasets` makes no rows
        streams[1] = streams[1].with_format(format)
    streams = [ImageStream(each, processor(), shuffle_buffer_size=0) for each in streams]
    expected, batch = (each.__getitems__(list(each.samples(0))).unfinished for each in streams)
    assert all(batch[name].equal(expected[name]) for name in ("pixel_values", "labels"))


def test_a_transform_stays():
    images = named(["cat", "dog"]).with_transform(
        lambda rows: {"image": [each.rotate(90) for each in rows["image"]], "label": rows["label"]}
    )
    assert unformatted(images) is images


# --- As the model numbers them ---


@pytest.mark.parametrize(
    ("names", "model_names", "expected"),
    [
        (["dog", "cat"], ["cat", "dog"], [1, 0]),
        (["3", "5", "7"], [str(index) for index in range(10)], [3, 5, 7]),
        (["3", "5", "7"], UNNAMED, [3, 5, 7]),
        (["1", "2"], ["1", "2", "3"], [0, 1]),
        (["cat", "dog"], UNNAMED, [0, 1]),
        (["LABEL_0", "LABEL_1"], TEN, [0, 1]),
        (["2"], ["0", "crane", "2", "crane"], [2]),  # as in ImageNet
    ],
)
def test_classes_are_matched_by_name_or_by_number(names, model_names, expected):
    matched = match_labels(named(names), model_config(model_names))
    assert matched["label"][:] == expected
    assert matched.features["label"].num_classes == len(model_names)


@pytest.mark.parametrize(
    ("names", "model_names", "message"),
    [
        (
            ["3", "5", "7"],
            TEN,
            r"classes '3', '5', '7', which the model does not know.*Numbers are not matched with names",
        ),
        ([str(index) for index in range(10)], TEN, r"Numbers are not matched with names.* ClassLabel\(names="),
        (["0", "1", "2"], ["1", "2", "3"], r"classes '0', which the model does not know"),
        (["3", "5", "7"], UNNAMED[:3], r"classes '3', '5', '7', which the model does not know"),
        (["cat", "bird"], ["cat", "dog"], r"classes 'bird', which .* Evaluate it on the dataset it was trained on"),
        (["crane"], ["crane", "crane"], r"classes 'crane', which"),
    ],
)
def test_what_does_not_match_is_refused(names, model_names, message):
    with pytest.raises(ValueError, match=message):
        match_labels(named(names), model_config(model_names))


def test_classes_without_images_need_no_match():
    assert match_labels(named(["bird", "cat"], [1, 1]), model_config(["cat", "dog"]))["label"][:] == [0, 0]


def test_a_missing_label_is_not_the_last_class():
    with pytest.raises(ValueError, match=r"Row 1 of dataset 'mine' has the label -1; .* from 0 to 1"):
        match_labels(named(["cat", "dog"], [0, -1]), model_config(["cat", "dog"]), "mine")


def test_a_selection_that_is_renumbered_keeps_its_rows_and_copies_no_image(tmp_path):
    DatasetDict({"train": named(["cat", "dog"], [0, 1] * 5)}).save_to_disk(tmp_path / "data")
    data = DatasetDict.load_from_disk(str(tmp_path / "data"))["train"]
    selected = data.shuffle(seed=3).select([4, 1, 7])
    files = set(tmp_path.rglob("*"))
    matched = match_labels(selected, model_config(["dog", "cat"]))
    assert classes(matched) == classes(selected)
    assert [np.asarray(image).sum() for image in matched["image"]] == [
        np.asarray(image).sum() for image in selected["image"]
    ]
    assert matched._indices.column(0).to_pylist() == selected._indices.column(0).to_pylist()
    assert matched.cache_files == data.cache_files and set(tmp_path.rglob("*")) == files
    assert replace_labels(selected, selected["label"][:], selected.features["label"]) is selected


def test_everything_that_takes_a_dataset_numbers_its_classes_as_the_model_does(vit):
    model = vit.classifier(num_labels=2, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    data = labelled([0, 1, 1, 1] * 8, ClassLabel(names=["dog", "cat"]))
    same = labelled([1, 0, 0, 0] * 8, ClassLabel(names=["cat", "dog"]))
    given = {"image_processor": processor(), "progress": False}
    for measure in (
        lambda each: evaluate_robustness(model, each, num_orders=2, num_subsets=1, **given).sequential,
        lambda each: search_layers(model, each, 1, **given),
        lambda each: layer_contributions(model, each, num_orders=4, **given).mean["logit_change"].tolist(),
    ):
        assert measure(data) == measure(same)
    loader = as_dataloader(data, processor(), config=model.config)
    assert next(iter(loader))["labels"].tolist() == same["label"][:]


def test_the_class_names_of_a_string_column_stay(tmp_path):
    splits = load_image_datasets(
        save(tmp_path, train=labelled(["b", "a"], Value("string")), test=labelled(["a", "b"]))
    )
    assert splits["train"].features["label"].names == ["a", "b"]


def test_the_commands_take_integers_for_the_models_classes(tmp_path):
    from hf_layershuffle_cli.inputs import load_split

    model = SimpleNamespace(config=SimpleNamespace(**vars(model_config(TEN)), name_or_path=str(tmp_path)))
    data = load_split(model, "test", save(tmp_path, train=labelled([3, 7]), test=labelled([7, 3])))
    assert data["label"][:] == [7, 3] and data.features["label"].names == TEN
    with pytest.raises(ValueError, match="Numbers are not matched with names"):
        load_split(model, "test", "digits")
