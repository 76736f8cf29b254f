import io

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from PIL import ImageOps
from support.images import image_dataset, processor, random_images
from support.streams import jpeg
from transformers import EfficientNetImageProcessorPil, MobileViTImageProcessorPil

from hf_layershuffle.data.augmentation import finish_batch
from hf_layershuffle.data.augmentation_settings import Augmentation
from hf_layershuffle.data.image_dataset import ImageClassificationDataset
from hf_layershuffle.data.image_decoding import ImageDecoder, decode_image, open_image


SIZE = (8, 12)


def parts(stored, boxes, channels: int = 3, **kwargs) -> np.ndarray:
    decoder = ImageDecoder(processor(channels=channels), channels)
    pixels = decoder.parts([open_image(each) for each in stored], lambda sizes: np.array(boxes), SIZE)
    return pixels.numpy().astype(int)


def expected(image: PILImage.Image, box) -> np.ndarray:
    """Cropped, then resized, as the field defines a resized crop."""
    top, left, height, width = box
    cropped = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(cropped.resize(SIZE[::-1], PILImage.Resampling.BILINEAR)).astype(int)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def in_file(image: PILImage.Image, kind: str = "PNG", **kwargs) -> dict:
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize("box", [(0, 0, 40, 60), (3, 10, 16, 24), (39, 59, 1, 1), (5, 0, 4, 60)])
def test_a_part_is_cropped_and_resized(box):
    image = PILImage.open(io.BytesIO(jpeg(1, (60, 40), "PNG")))
    (found,) = parts([in_file(image)], [box])
    # Pixels beside the part count at its edge, as they are there
    inner = np.abs(found - expected(image, box))[:, 1:-1, 1:-1]
    assert inner.max() <= 1
    assert np.abs(found - expected(image, box)).mean() <= 3


def test_a_whole_image_of_the_models_size_stays_as_it_is():
    image = random_images(1, SIZE)[0]
    (found,) = parts([in_file(image)], [(0, 0, *SIZE)])
    assert (found == np.asarray(image).transpose(2, 0, 1)).all()


def test_grey_images_arrays_and_bytes():
    image = random_images(1, (16, 24), mode="L")[0]
    for stored in (in_file(image), in_file(image)["bytes"], image, np.asarray(image)):
        (found,) = parts([stored], [(0, 0, 16, 24)], channels=1)
        assert (found == expected(image, (0, 0, 16, 24))).all()
    (found,) = parts([in_file(image)], [(0, 0, 16, 24)])  # as colours
    assert (found == expected(image.convert("RGB"), (0, 0, 16, 24))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_data_says(orientation):
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    stored = in_file(PILImage.open(io.BytesIO(jpeg(3, (640, 400), "PNG"))), "JPEG", exif=exif, quality=95)
    turned = ImageOps.exif_transpose(PILImage.open(io.BytesIO(stored["bytes"])))
    assert decode_image(stored, "RGB") == turned
    height, width = turned.height, turned.width
    decoder = ImageDecoder(processor(), 3)
    seen = []

    def boxes_of(sizes: np.ndarray) -> np.ndarray:
        seen.extend(sizes.tolist())
        return np.array([[height // 4, width // 8, height // 2, width // 2]])

    found = decoder.parts([open_image(stored)], boxes_of, SIZE).numpy().astype(int)[0]
    assert seen == [[height, width]]
    wanted = expected(turned, (height // 4, width // 8, height // 2, width // 2))
    assert np.abs(found - wanted).mean() < 2 and np.abs(found - wanted).max() < 12


@pytest.mark.parametrize(("box", "reduction"), [((0, 0, 640, 960), 8), ((64, 96, 40, 60), 4), ((8, 8, 15, 23), 1)])
def test_jpeg_files_are_decoded_no_larger_than_needed(box, reduction, monkeypatch):
    stored = {"bytes": jpeg(5, (960, 640)), "path": None}
    sizes = []
    resize = PILImage.Image.resize
    monkeypatch.setattr(
        PILImage.Image,
        "resize",
        lambda self, *args, **kwargs: (sizes.append(self.size), resize(self, *args, **kwargs))[1],
    )
    (found,) = parts([stored], [box])
    assert sizes[2:] == [(960 // reduction, 640 // reduction)]  # after the two of the check of the image processor
    monkeypatch.undo()
    difference = np.abs(found - expected(decode_image(stored, "RGB"), box))
    assert difference.mean() < 1.5 and difference.max() < 12


def test_a_small_part_of_a_large_image_keeps_its_pixels():
    """The part shrinks by less than two along one side, so nothing is decoded smaller."""
    stored = {"bytes": jpeg(5, (960, 640)), "path": None}
    (found,) = parts([stored], [(0, 0, 15, 600)])
    assert np.abs(found - expected(decode_image(stored, "RGB"), (0, 0, 15, 600))).mean() < 1.5


# --- Datasets ---


def of_files(contents: list[bytes]) -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    rows = [{"image": {"bytes": each, "path": None}, "label": row % 2} for row, each in enumerate(contents)]
    return Dataset.from_list(rows, features=features)


def test_a_dataset_takes_another_part_of_each_image_in_each_epoch():
    contents = [jpeg(row, (40 + row, 30)) for row in range(6)]
    settings = Augmentation(resized_crop_scale=(0.1, 0.5), crop_padding=0, horizontal_flip=False)
    dataset = ImageClassificationDataset(of_files(contents), processor(), augmentation=settings, seed=2)
    first = finish_batch(dataset.__getitems__([4, 1]).unfinished)["pixel_values"]
    assert first[1].equal(dataset[1]["pixel_values"])
    dataset.set_epoch(1)
    assert not first[1].equal(dataset[1]["pixel_values"])
    dataset.set_epoch(0)
    sizes = np.array([[30, 41]])
    (box,) = settings.crop_boxes(2, 0, np.array([1]), sizes).tolist()
    decoder = ImageDecoder(processor(), 3)
    pixels = decoder.parts([open_image(contents[1])], lambda sizes: np.array([box]), (8, 8))
    assert pixels.equal(dataset.__getitems__([1]).unfinished["pixel_values"])


def test_resized_crops_keep_no_decoded_copy(tmp_path):
    image_dataset(4).save_to_disk(tmp_path / "data")
    stored = Dataset.load_from_disk(str(tmp_path / "data"))
    settings = Augmentation(resized_crop_scale=(0.5, 1.0))
    dataset = ImageClassificationDataset(stored, processor(), augmentation=settings)
    assert not list((tmp_path / "data").glob("*layershuffle*"))
    assert torch.equal(dataset.labels, torch.tensor([0, 1, 0, 1]))


def test_damaged_images_among_resized_crops_are_named_or_left_out():
    contents = [jpeg(0), b"no image", jpeg(2)]
    settings = Augmentation(resized_crop_scale=(0.5, 1.0))
    dataset = ImageClassificationDataset(of_files(contents), processor(), augmentation=settings)
    with pytest.raises(ValueError, match=r"The image in row 1 cannot be read: it is not an image of a known format"):
        dataset.__getitems__([0, 1])
    left = ImageClassificationDataset(of_files(contents), processor(), augmentation=settings, skip_damaged=True)
    assert len(left) == 2 and left.labels.tolist() == [0, 0]
    whole = ImageClassificationDataset(of_files([contents[0], contents[2]]), processor(), augmentation=settings)
    assert (
        left.__getitems__([0, 1])
        .unfinished["pixel_values"]
        .equal(whole.__getitems__([0, 1]).unfinished["pixel_values"])
    )


@pytest.mark.parametrize("settings", [{}, {"do_flip_channel_order": False}])
def test_image_processors_that_reverse_channels_are_refused(settings):
    image_processor = MobileViTImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, **settings
    )
    if settings:
        ImageDecoder(image_processor, 3)
    else:
        with pytest.raises(ValueError, match="MobileViTImageProcessorPil does more with images than resize, crop"):
            ImageDecoder(image_processor, 3)


def test_image_processors_that_shift_values_are_refused():
    ImageDecoder(EfficientNetImageProcessorPil(rescale_offset=False, include_top=False), 3)
    with pytest.raises(ValueError, match="EfficientNetImageProcessorPil does more with images than resize, crop"):
        ImageDecoder(EfficientNetImageProcessorPil(rescale_offset=True, include_top=False), 3)
