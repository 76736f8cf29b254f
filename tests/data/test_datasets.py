"""Where images come from, and what is made of them."""

import logging

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from support.images import image_dataset, in_classes, processor, random_images, save, write_idx, write_images

from hf_layershuffle.checkpoints.image_processors import load_image_processor
from hf_layershuffle.data.datasets import ImageClassificationDataset, as_dataloader, load_image_datasets


# --- Where the data comes from ---


def test_digits():
    splits = load_image_datasets("digits")
    assert {name: len(split) for name, split in splits.items()} == {"train": 1437, "test": 360}
    assert splits["train"].features["label"].names == [str(digit) for digit in range(10)]
    image = np.asarray(splits["train"][0]["image"])
    assert image.shape == (8, 8) and image.max() > 200
    assert np.bincount(splits["test"]["label"][:]).min() >= 34  # stratified
    assert splits["test"]["label"][:] == load_image_datasets("digits")["test"]["label"][:]


@pytest.mark.parametrize("eval_name", ["test", "validation"])
def test_parquet_folder(tmp_path, eval_name):
    image_dataset(10, image="img", label="fine_label").to_parquet(tmp_path / "train.parquet")
    image_dataset(4, image="img", label="fine_label").to_parquet(tmp_path / f"{eval_name}.parquet")
    splits = load_image_datasets(str(tmp_path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 10, "test": 4}
    assert splits["train"].column_names == ["image", "label"]
    assert splits["train"].features["label"].names == ["cat", "dog"]


def test_a_part_of_the_training_split_is_held_out_though_there_is_a_test_split(tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_layershuffle.data")
    image_dataset(20).to_parquet(tmp_path / "train.parquet")
    image_dataset(4).to_parquet(tmp_path / "test.parquet")
    splits = load_image_datasets(str(tmp_path), eval_split="train", eval_fraction=0.3)
    assert {name: len(split) for name, split in splits.items()} == {"train": 14, "test": 6}
    assert "6 of the 20 images of split 'train' are held out for evaluation." in caplog.text


def test_image_folder(tmp_path):
    write_images(tmp_path, *in_classes("train/cat", "train/dog"), *in_classes("test/cat", "test/dog", count=2))
    splits = load_image_datasets(str(tmp_path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "test": 4}
    assert splits["train"].features["label"].names == ["cat", "dog"]


@pytest.mark.parametrize("folder", ["data", "data[1]"])
def test_all_images_of_a_folder_a_class_are_loaded_whatever_their_names(tmp_path, folder):
    odd = ("car/train0.png", "car/test11.png", "car/zz.png", "bus/validation.JPEG")
    write_images(tmp_path / folder, *in_classes("bus", "car", "train"), *odd, ".hidden/0.png")
    (tmp_path / folder / "notes.txt").write_text("mine")
    splits = load_image_datasets(str(tmp_path / folder), eval_fraction=0.25)
    assert {name: len(split) for name, split in splits.items()} == {"train": 9, "test": 4}
    names = splits["train"].features["label"].names
    assert names == ["bus", "car", "train"]
    assert sorted(splits["train"]["label"][:] + splits["test"]["label"][:]) == 4 * [0] + 6 * [1] + 3 * [2]


@pytest.mark.parametrize("beside", ["extra/cat/0.png", "zz.png"])
def test_images_outside_the_splits_are_not_dropped_silently(tmp_path, beside):
    write_images(tmp_path, *in_classes("train/cat", "train/dog", "test/cat", "test/dog"), beside)
    with pytest.raises(ValueError, match=r"Only 12 of the 13 images in .* were found, in the splits 'train', 'test'"):
        load_image_datasets(str(tmp_path))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder(tmp_path, suffix):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 28, 28))
    for name, count in (("train", 6), ("t10k", 3)):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte{suffix}", images[:count])
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte{suffix}", np.arange(count) % 3)
    splits = load_image_datasets(str(tmp_path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "test": 3}
    assert np.array_equal(np.asarray(splits["train"][4]["image"]), images[4])
    assert splits["train"]["label"][:] == [0, 1, 2, 0, 1, 2]
    assert splits["train"].features["label"].num_classes == 3


def test_saved_dataset_with_named_labels(tmp_path):
    def with_names(count):
        return Dataset.from_dict(
            {"picture": random_images(count), "kind": ["b", "a"] * (count // 2)},
            features=Features({"picture": Image(), "kind": Value("string")}),
        )

    DatasetDict({"train": with_names(6), "test": with_names(2)}).save_to_disk(tmp_path / "data")
    splits = load_image_datasets(str(tmp_path / "data"), label_column="kind")
    assert splits["train"].features["label"].names == ["a", "b"]
    assert splits["train"]["label"][:2] == [1, 0]
    assert splits["test"]["label"][:] == [1, 0]


def test_integer_labels_become_classes(tmp_path):
    dataset = Dataset.from_dict({"image": random_images(4), "label": [7, 3, 7, 3]})
    DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "data")
    splits = load_image_datasets(str(tmp_path / "data"))
    assert splits["train"].features["label"].names == ["3", "7"]
    assert splits["train"]["label"][:] == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_name": "./missing"}, "There is no dataset folder './missing'"),
        ({"dataset_name": "nobody/no-such-dataset"}, "Dataset 'nobody/no-such-dataset' cannot be loaded"),
        ({"train_split": "training"}, "has no split 'training'; it has 'train', 'test'"),
        ({"eval_split": "dev"}, "has no split 'dev'"),
        ({"image_column": "picture"}, "has no column 'picture'; it has 'image', 'label'"),
        ({"label_column": "kind"}, "has no column 'kind'"),
        ({"eval_fraction": 1.0}, r"`eval_fraction` is 1.0; it must be a fraction in \(0, 1\)"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, arguments, message):
    name = save(tmp_path, train=image_dataset(4), test=image_dataset(2))
    with pytest.raises(ValueError, match=message):
        load_image_datasets(**{"dataset_name": name, **arguments})


def test_a_dataset_without_image_or_label_column_is_refused(tmp_path):
    text = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    with pytest.raises(ValueError, match=r"has no image column.*it has 'text', 'label'.*--image_column_name"):
        load_image_datasets(save(tmp_path, train=text, test=text))
    images = image_dataset(4).remove_columns("label")
    with pytest.raises(ValueError, match=r"has no label column.*it has 'image'.*--label_column_name"):
        load_image_datasets(save(tmp_path / "images", train=images, test=images))


def test_an_empty_dataset_is_refused(tmp_path, monkeypatch):
    (tmp_path / "parquet").mkdir()
    image_dataset(4).to_parquet(tmp_path / "parquet" / "train.parquet")
    image_dataset(4).select([]).to_parquet(tmp_path / "parquet" / "test.parquet")
    with pytest.raises(ValueError, match=r"cannot be loaded: .* no data"):
        load_image_datasets(str(tmp_path / "parquet"))
    splits = DatasetDict({"train": image_dataset(4), "test": image_dataset(4).select([])})
    monkeypatch.setattr("hf_layershuffle.data.dataset_files.load_dataset", lambda *args, **kwargs: splits)
    with pytest.raises(ValueError, match="is empty in the split used for 'test'"):
        load_image_datasets("someone/images")
    with pytest.raises(ValueError, match="The dataset is empty"):
        ImageClassificationDataset(image_dataset(4).select([]), processor())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"cannot be loaded|is empty"):
        load_image_datasets(str(tmp_path / "empty"))


@pytest.mark.parametrize("label", [-1, None])
def test_labels_outside_the_classes_are_refused(tmp_path, label):
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    test = Dataset.from_dict({"image": random_images(3), "label": [0, 1, label]}, features=features)
    with pytest.raises(ValueError, match=f"Row 2 of the split used for 'test' .* has the label {label}.*from 0 to 1"):
        load_image_datasets(save(tmp_path, train=image_dataset(4), test=test))


def test_continuous_labels_are_refused(tmp_path):
    dataset = Dataset.from_dict({"image": random_images(2), "label": [0.5, 1.5]})
    with pytest.raises(ValueError, match=r"holds 0.5; labels are class names or integers"):
        load_image_datasets(save(tmp_path, train=dataset, test=dataset))


def test_too_few_images_to_hold_some_out_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has one split only, and 20% of it cannot be held out"):
        load_image_datasets(save(tmp_path, train=image_dataset(3)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a complete IDX file"),
        (b"\0\0\x08\x03\0\0\0\x02\0\0\0\x02\0\0\0\x02\1", "is not a complete IDX file"),
        (b"\0\0\x0d\x03" + bytes(12), "it starts with 0x00000d03, not 0x00000803"),
    ],
)
def test_broken_idx_files_are_refused(tmp_path, content, message):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_image_datasets(str(tmp_path))


def test_an_idx_folder_lacking_a_file_is_refused(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((2, 8, 8)))
    with pytest.raises(ValueError, match="lacks the file 'train-labels-idx1-ubyte'"):
        load_image_datasets(str(tmp_path))


def test_a_model_folder_without_image_processor_says_what_to_do(tmp_path):
    with pytest.raises(OSError, match=r"holds no image processor .*ViTImageProcessor.*save_pretrained\('.*'\)"):
        load_image_processor(str(tmp_path))
    processor(12).save_pretrained(tmp_path)
    assert load_image_processor(str(tmp_path)).size["height"] == 12


# --- Pixels ---


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("size", [8, 12])
def test_pixels_are_those_of_the_image_processor(cached, size):
    images = random_images(5, size=(8, 8))
    dataset = ImageClassificationDataset(image_dataset(5), processor(size), max_cached_bytes=2**30 if cached else 0)
    expected = processor(size)(images, return_tensors="pt").pixel_values
    actual = torch.stack([item["pixel_values"] for item in dataset])
    # resized pixels are rounded to the 256 levels of an image
    torch.testing.assert_close(actual, expected, atol=1e-5 if size == 8 else 0.6 / 255 / 0.3, rtol=0)
    assert [item["labels"] for item in dataset] == [0, 1, 0, 1, 0]
    assert dataset.__getitems__([3, 1])[0]["pixel_values"].equal(actual[3])


def test_grey_images_become_rgb_or_stay_grey():
    grey = image_dataset(2, mode="L")
    rgb = ImageClassificationDataset(grey, processor())[0]["pixel_values"]
    assert rgb.shape == (3, 8, 8) and rgb[0].equal(rgb[2])
    single = ImageClassificationDataset(grey, processor(channels=1), num_channels=1)[0]["pixel_values"]
    assert single.shape == (1, 8, 8) and single[0].equal(rgb[0])


def augmented(count: int = 64, **kwargs) -> ImageClassificationDataset:
    options = {"augment": True, "crop_padding": 2, "horizontal_flip": True, "seed": 1}
    return ImageClassificationDataset(image_dataset(count), processor(), **{**options, **kwargs})


def stacked(dataset, indices=None) -> torch.Tensor:
    indices = list(range(len(dataset))) if indices is None else indices
    return torch.stack([item["pixel_values"] for item in dataset.__getitems__(indices)])


def test_augmentation_crops_the_padded_image_and_flips_half():
    original, dataset = stacked(augmented(augment=False)), augmented()
    black = (0 - 0.4) / 0.3
    padded = torch.nn.functional.pad(original, (2,) * 4, value=black)
    found, flips = [], 0
    for image, source in zip(stacked(dataset), padded):
        matches = [
            (top, left, flipped)
            for top in range(5)
            for left in range(5)
            for flipped, candidate in enumerate((image, image.flip(-1)))
            if torch.allclose(candidate, source[:, top : top + 8, left : left + 8], atol=1e-5)
        ]
        assert len(matches) == 1
        found.append(matches[0][:2])
        flips += matches[0][2]
    assert len(set(found)) > 15
    for offsets in zip(*found):  # both ends of the range, which is -padding to +padding
        assert set(offsets) == set(range(5))
    assert 20 <= flips <= 44


def test_augmentation_depends_on_seed_epoch_and_index_only():
    dataset, again = augmented(), augmented()
    torch.rand(10)
    first = stacked(dataset)
    assert stacked(again, [5, 3, 60]).equal(first[[5, 3, 60]])
    dataset.set_epoch(1)
    assert not stacked(dataset).equal(first)
    dataset.set_epoch(0)
    assert stacked(dataset).equal(first)
    assert not stacked(augmented(seed=2)).equal(first)


def test_workers_give_the_same_images():
    dataset = augmented()
    dataset.set_epoch(3)
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, num_workers=2)
    assert torch.cat([batch["pixel_values"] for batch in loader]).equal(stacked(dataset))


@pytest.mark.parametrize("cached", [True, False])
def test_an_unreadable_image_is_named(cached):
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    good = image_dataset(3).cast_column("image", Image(decode=False))["image"][:]
    broken = {"bytes": good[1]["bytes"][:40], "path": None}
    dataset = Dataset.from_dict({"image": [good[0], broken, good[2]], "label": [0, 1, 0]}, features=features)
    with pytest.raises(ValueError, match=r"The image in row 1 cannot be read: .*skip_damaged=True"):
        stacked(ImageClassificationDataset(dataset, processor(), max_cached_bytes=2**30 if cached else 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"crop_padding": -1}, "`crop_padding` is -1"), ({"num_channels": 4}, "`num_channels` is 4")],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageClassificationDataset(image_dataset(2), processor(), **arguments)


# --- Batches ---


def test_batches_of_a_dataset_of_a_sequence_and_of_a_dataloader_are_the_same():
    from_dataset = list(as_dataloader(image_dataset(10), processor(), batch_size=4))
    assert [len(batch["labels"]) for batch in from_dataset] == [4, 4, 2]
    items = list(ImageClassificationDataset(image_dataset(10), processor()))
    from_sequence = list(as_dataloader(items, batch_size=4))
    loader = as_dataloader(items, batch_size=4)
    assert as_dataloader(loader) is loader
    for first, second in zip(from_dataset, from_sequence):
        assert first["pixel_values"].equal(second["pixel_values"]) and first["labels"].equal(second["labels"])
    for limited in (as_dataloader(image_dataset(10), processor(), max_samples=3), as_dataloader(items, max_samples=3)):
        (batch,) = limited
        drawn = image_dataset(10).shuffle(seed=0).select(range(3))  # as training draws them
        assert batch["pixel_values"].equal(next(iter(as_dataloader(drawn, processor())))["pixel_values"])
    assert [item["labels"] for item in as_dataloader(items, max_samples=99).dataset] == 5 * [0, 1]


def test_the_images_drawn_from_sorted_data_are_of_all_classes_and_others_for_another_seed():
    data = image_dataset(60).sort("label")
    drawn = [
        torch.cat([batch["labels"] for batch in as_dataloader(data, processor(), max_samples=20, seed=seed)])
        for seed in (0, 0, 1)
    ]
    assert all(5 <= labels.sum() <= 15 for labels in drawn)
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])


def test_a_stream_is_refused_with_the_remedy(tmp_path):
    stream = image_dataset(4).to_iterable_dataset()
    for refused in (
        lambda: as_dataloader(stream, processor()),
        lambda: ImageClassificationDataset(stream, processor()),
    ):
        with pytest.raises(ValueError, match=r"streaming dataset has no length.* Load it without `streaming=True`"):
            refused()
    image_dataset(4).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"was loaded as a stream.* load it without `streaming=True`"):
        load_image_datasets(str(tmp_path), streaming=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": []}, "The evaluation set is empty"),
        ({"data": image_dataset(2)}, "needs an `image_processor`"),
        ({"data": [1], "batch_size": 0}, "`batch_size` is 0"),
        ({"data": [1], "max_samples": 0}, "`max_samples` is 0"),
        ({"data": torch.utils.data.DataLoader([1]), "max_samples": 1}, "does not apply to a DataLoader"),
        ({"data": torch.utils.data.DataLoader([])}, "The DataLoader is empty"),
    ],
)
def test_batches_refuse_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        as_dataloader(**arguments)
