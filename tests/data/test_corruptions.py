import numpy as np
import pytest
from support.images import image_dataset

from hf_layershuffle.data import load_image_datasets
from hf_layershuffle.data.corruptions import CORRUPTIONS, blur, corrupted, low_contrast, noise


GREY = np.random.default_rng(0).integers(0, 256, (3, 9, 11), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_image_is_changed_and_stays_one(name, images):
    before = images.copy()
    changed = CORRUPTIONS[name](images)
    assert changed.dtype == np.uint8 and changed.shape == images.shape
    assert all((one != other).any() for one, other in zip(changed, images)) and (images == before).all()


def test_blur_is_a_gaussian():
    image = np.zeros((1, 21, 21), dtype=np.uint8)
    image[0, 10, 10] = 255
    x = np.arange(-10, 11)
    kernel = np.exp(-0.5 * (x / 1.5) ** 2)
    expected = 255 * np.outer(kernel, kernel) / kernel.sum() ** 2
    assert np.abs(blur(image, sigma=1.5)[0] - expected).max() <= 1.5  # rounding, and what is beyond 3 sigma
    flat = np.full((1, 6, 6), 77, dtype=np.uint8)
    assert (blur(flat, sigma=4) == 77).all()  # edges are continued


def test_noise_has_its_strength_and_its_seed():
    flat = np.full((4, 50, 50), 128, dtype=np.uint8)
    changed = noise(flat, std=0.1, seed=1)
    assert abs(changed.astype(float).std() - 25.5) < 1 and abs(changed.mean() - 128) < 1
    assert (changed == noise(flat, std=0.1, seed=1)).all() and (changed != noise(flat, std=0.1, seed=2)).any()
    assert (noise(flat, std=0) == flat).all()


def test_low_contrast_by_hand():
    image = np.array([[[0, 100], [200, 100]]], dtype=np.uint8)
    assert low_contrast(image, factor=0.5).tolist() == [[[50, 100], [150, 100]]]
    assert (low_contrast(GREY, factor=1) == GREY).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_datasets(name):
    dataset = image_dataset(6)
    changed = corrupted(dataset, name, seed=3)
    assert changed["label"] == dataset["label"] and changed.features["label"] == dataset.features["label"]
    pairs = [(np.asarray(one), np.asarray(other)) for one, other in zip(changed["image"], dataset["image"])]
    assert all(one.shape == other.shape and (one != other).any() for one, other in pairs)
    again = corrupted(dataset, name, seed=3)
    assert all((np.asarray(one) == np.asarray(other)).all() for one, other in zip(again["image"], changed["image"]))


def test_the_noise_of_each_image_is_its_own():
    digits = load_image_datasets("digits")["test"].select([0, 0])  # arrays, and not image files
    first, second = (np.asarray(image) for image in corrupted(digits, "noise")["image"])
    assert (first != second).any()


def test_bad_values():
    with pytest.raises(ValueError, match="`corruption` is 'fog'; choose from blur, noise, low_contrast"):
        corrupted(image_dataset(2), "fog")
    for function, values in ((blur, {"sigma": 0}), (noise, {"std": 1.5}), (low_contrast, {"factor": -0.1})):
        with pytest.raises(ValueError, match=f"`{next(iter(values))}` is"):
            function(GREY, **values)
    with pytest.raises(ValueError, match=r"`images` is float64 of shape \(3, 9, 11\); pass uint8"):
        blur(GREY / 255)
