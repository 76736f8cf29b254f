"""Images of all kinds become 8 bits, or are refused by name."""

import io

import numpy as np
import pytest
import torch
from datasets import Array2D, ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from support.images import image_dataset, processor, random_images

from hf_layershuffle.data.datasets import ImageClassificationDataset, as_dataloader, typical_image_size
from hf_layershuffle.data.image_reading import are_mostly_grey, draw_rows, to_pil
from hf_layershuffle.hub.card_examples import write_examples


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def encoded(image: PILImage.Image, format: str = "PNG", **kwargs) -> dict:
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return {"bytes": file.getvalue(), "path": None}


def of_images(images: list, feature=None) -> Dataset:
    features = Features({"image": feature or Image(), "label": ClassLabel(names=["cat", "dog"])})
    return Dataset.from_dict({"image": images, "label": [row % 2 for row in range(len(images))]}, features=features)


def levels(dataset: ImageClassificationDataset) -> np.ndarray:
    """The first image in 0..255."""
    return ((dataset[0]["pixel_values"][0] * 0.3 + 0.4) * 255).round().numpy().astype(int)


# --- Pixels ---


@pytest.mark.parametrize(
    "image",
    [
        PILImage.fromarray(GREY),
        PILImage.fromarray(GREY.astype(np.uint16) * 257),  # 16 bits
        PILImage.fromarray(GREY.astype(np.float32) / 255),
        PILImage.fromarray(GREY.astype(np.int32)),
        GREY,
        GREY.tolist(),
        GREY.astype(np.uint16) * 257,
        GREY / 255,
        GREY[:, :, None],
        GREY[None],
        np.stack([GREY] * 3),
        np.stack([GREY] * 3, axis=-1),
    ],
    ids=lambda image: getattr(image, "mode", None) or f"{np.asarray(image).dtype}{np.asarray(image).shape}",
)
def test_all_kinds_of_images_become_the_same_8_bits(image):
    assert np.array_equal(np.asarray(to_pil(image, "L")), GREY)
    assert np.array_equal(np.asarray(to_pil(image, "RGB")), np.stack([GREY] * 3, axis=-1))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_16_bit_files_are_scaled(format, num_channels):
    sixteen = PILImage.fromarray(GREY.astype(np.uint16) * 257)
    dataset = ImageClassificationDataset(
        of_images([encoded(sixteen, format)]), processor(channels=num_channels), num_channels=num_channels
    )
    assert np.array_equal(levels(dataset), GREY)


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1 / 255), ("uint16", 257), ("int64", 1)])
def test_arrays_in_a_dataset_are_scaled(dtype, scale):
    dataset = of_images([(GREY * np.float64(scale)).astype(dtype)], Array2D((8, 8), dtype))
    assert np.array_equal(levels(ImageClassificationDataset(dataset, processor())), GREY)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (GREY.astype(np.float32), r"floats from 0 to 252; floats must be in \[0, 1\]"),
        (PILImage.fromarray(GREY.astype(np.float32) - 1), r"floats from -1 to 251"),
        (np.full((8, 8), np.nan), "floats from nan to nan"),
        (GREY.astype(np.int64) * 100, "integers from 0 to 25200 of dtype int64"),
        (PILImage.fromarray(GREY.astype(np.int32) * 300), "integers from 0 to 75600"),
        (np.zeros((2, 8, 8), np.uint8), r"an array of shape \(2, 8, 8\)"),
        (np.zeros((0, 8)), r"dtype float64 and shape \(0, 8\)"),
        (None, "it is missing"),
    ],
)
def test_numbers_of_an_unknown_range_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        to_pil(image, "RGB")


def test_a_refused_image_is_named_by_its_file(tmp_path):
    paths = [str(tmp_path / f"{name}.tiff") for name in ("good", "bad")]
    for path, factor in zip(paths, (1 / 255, 1)):
        PILImage.fromarray(GREY.astype(np.float32) * factor).save(path)
    with pytest.raises(ValueError, match=r"row 1 \('.*bad.tiff'\) cannot be read: it holds floats from 0 to 252"):
        ImageClassificationDataset(of_images(paths), processor())


def test_the_examples_of_a_card_are_scaled(vit, tmp_path):
    vit.classifier(num_labels=2).save_pretrained(tmp_path)
    sixteen = PILImage.fromarray(GREY.astype(np.uint16) * 257)
    write_examples(tmp_path, of_images([encoded(sixteen)] * 2), processor())
    with PILImage.open(tmp_path / "examples" / "0.png") as image:
        assert image.mode == "L" and np.array_equal(np.asarray(image)[::12, ::12], GREY)


# --- Size ---


def test_the_typical_size_is_the_median_of_many_images_not_the_first():
    sizes = [(400, 5), (30, 40), (31, 41), (29, 42), (32, 43)]
    dataset = of_images([encoded(PILImage.new("RGB", size)) for size in sizes])
    assert typical_image_size(dataset) == (41, 31)
    assert typical_image_size(of_images([np.zeros((6, 9))] * 2, Array2D((6, 9), "uint8"))) == (6, 9)


def test_the_typical_size_reads_headers_only_and_turns_as_the_camera_did():
    exif = PILImage.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = encoded(PILImage.new("RGB", (40, 20)), "JPEG", exif=exif)
    dataset = of_images([turned])
    assert dataset[0]["image"].size == (20, 40) and typical_image_size(dataset) == (40, 20)
    header = {"bytes": encoded(random_images(1, size=(64, 48))[0])["bytes"][:100], "path": None}
    assert typical_image_size(of_images([header])) == (64, 48)


def test_the_typical_size_is_of_images_drawn_by_seed():
    dataset = of_images([encoded(PILImage.new("L", (width, 9))) for width in range(10, 30)])
    drawn = [dataset[row]["image"].width for row in draw_rows(20, 1, 5)]
    assert typical_image_size(dataset, num_images=1, seed=5) == (9, drawn[0])
    assert len({typical_image_size(dataset, num_images=1, seed=seed) for seed in range(5)}) > 1


def test_a_typical_size_of_nothing_is_refused():
    broken = {"bytes": b"nothing", "path": None}
    assert typical_image_size(of_images([broken, encoded(PILImage.new("L", (7, 9)))])) == (9, 7)
    with pytest.raises(ValueError, match=r"None of 2 images .* can be read. 2 of 2 .* not an image of a known format"):
        typical_image_size(of_images([broken] * 2))
    with pytest.raises(ValueError, match="`num_images` is 0"):
        typical_image_size(image_dataset(2), num_images=0)


def test_most_of_the_images_that_can_be_read_say_whether_they_are_grey():
    broken, grey, colour = (
        {"bytes": b"nothing", "path": None},
        *(encoded(PILImage.new(mode, (7, 9))) for mode in ("L", "RGB")),
    )
    assert are_mostly_grey(of_images([broken, grey, colour, grey]))
    assert not are_mostly_grey(of_images([grey, colour, colour, broken]))
    assert are_mostly_grey(of_images([np.zeros((6, 9))] * 2, Array2D((6, 9), "uint8")))
    with pytest.raises(ValueError, match=r"None of 2 images .* can be read"):
        are_mostly_grey(of_images([broken] * 2))


def test_rows_are_drawn_as_datasets_shuffles():
    dataset = image_dataset(50).add_column("number", list(range(50)))
    assert draw_rows(50, 7, 3) == dataset.shuffle(seed=3).select(range(7))["number"][:]
    assert draw_rows(5, 7, 3) == draw_rows(5, None, 3) == [0, 1, 2, 3, 4]


# --- Damaged images ---


def write_some_broken(folder, count: int, broken: set[int]) -> Dataset:
    paths = [folder / f"{row}.png" for row in range(count)]
    for row, (path, image) in enumerate(zip(paths, random_images(count))):
        image.save(path)
        if row in broken:
            path.write_bytes(path.read_bytes()[:50])
    return of_images([str(path) for path in paths])


def test_damaged_images_are_counted_and_named_by_file_and_own_row(tmp_path):
    dataset = write_some_broken(tmp_path, 30, {3, 29})
    shuffled = dataset.shuffle(seed=1).train_test_split(0.5, seed=0)
    messages = []
    for split in shuffled.values():
        try:
            ImageClassificationDataset(split, processor())
        except ValueError as error:
            messages.append(str(error))
    text = " ".join(messages)
    assert "row 3 (" in text and "3.png'" in text and "row 29 (" in text and "29.png'" in text
    with pytest.raises(
        ValueError, match=r"2 of 30 images cannot be read: row 3 \('.*/3.png'\): .*; row 29 \('.*/29.png'\)"
    ):
        ImageClassificationDataset(dataset, processor())


def test_of_many_damaged_images_five_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"8 of 9 images cannot be read: row 1 .*row 5 .*; and 3 more\. Mend or remove"
    ):
        ImageClassificationDataset(write_some_broken(tmp_path, 9, set(range(1, 9))), processor())


def test_a_missing_file_is_named(tmp_path):
    dataset = write_some_broken(tmp_path, 3, set())
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match=r"row 1 \('.*1.png'\) cannot be read: there is no such file"):
        ImageClassificationDataset(dataset, processor())


@pytest.mark.parametrize("limit", [2**30, 0])
def test_damaged_images_can_be_left_out(tmp_path, limit, caplog):
    dataset = write_some_broken(tmp_path, 8, {0, 5})
    options = {"max_cached_bytes": limit, "skip_damaged": True}
    left = ImageClassificationDataset(dataset, processor(), **options)
    assert "2 of 8 images cannot be read: row 0" in caplog.text and "They are left out." in caplog.text
    expected = ImageClassificationDataset(dataset.select([1, 2, 3, 4, 6, 7]), processor())
    assert len(left) == 6 and left.labels.tolist() == [1, 0, 1, 0, 0, 1]
    for first, second in zip(left, expected):
        assert first["pixel_values"].equal(second["pixel_values"]) and first["labels"] == second["labels"]
    caplog.clear()
    ImageClassificationDataset(dataset.select(range(5)), processor(), **options)
    assert "The image in row 0" in caplog.text and "It is left out." in caplog.text
    if limit:
        batches = list(as_dataloader(dataset, processor(), batch_size=4, skip_damaged=True))
        assert torch.cat([batch["labels"] for batch in batches]).tolist() == left.labels.tolist()
    with pytest.raises(ValueError, match="2 of 2 images cannot be read"):
        ImageClassificationDataset(dataset.select([0, 5]), processor(), **options)
