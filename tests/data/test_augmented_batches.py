"""Augmented batches: erased, mixed, and the same however they are read."""

import pytest
import torch
from support.images import AUGMENTATIONS, augmentation_named, image_dataset, processor
from torch.utils.data import ConcatDataset, DataLoader, Subset

from hf_layershuffle.data import Augmentation, ImageClassificationDataset
from hf_layershuffle.data.augmentation import erase, finish_batch, finish_images_together, mix
from hf_layershuffle.data.image_dataset import collate_for_device, collate_images
from hf_layershuffle.data.operation_policies import OPERATIONS


def dataset(preset: str = "cifar", num_images: int = 20, **changes) -> ImageClassificationDataset:
    augmentation = augmentation_named(preset, **changes)
    return ImageClassificationDataset(image_dataset(num_images), processor(), augmentation=augmentation, seed=5)


def boxes(*rows) -> torch.Tensor:
    return torch.tensor(rows)


def assert_equal_batches(ours: dict, others: dict) -> None:
    assert ours.keys() == others.keys()
    for name, values in ours.items():
        assert values.equal(others[name]) and values.dtype == others[name].dtype, name


# --- Erasing and mixing, by hand ---


def test_a_box_is_erased_and_no_other_pixel():
    pixels = torch.arange(1.0, 19).view(2, 1, 3, 3)
    erased = erase(pixels, boxes([0, 1, 2, 1], [1, 1, 0, 2]))
    assert erased[0, 0].tolist() == [[1, 0, 3], [4, 0, 6], [7, 8, 9]]
    assert erased[1].equal(pixels[1])


def test_images_are_averaged_with_those_from_the_other_end_of_the_batch():
    pixels = torch.tensor([1.0, 10.0, 100.0])[:, None, None, None].expand(-1, 1, 2, 2)
    mixed = mix(pixels, torch.tensor([0.75, 0.5, 1.0]), torch.zeros(3, 4, dtype=torch.int64))
    assert mixed[:, 0, 0, 0].tolist() == [0.75 * 1 + 0.25 * 100, 10, 100]


def test_a_box_of_the_other_image_takes_the_place():
    pixels = torch.stack([torch.zeros(1, 2, 3), torch.ones(1, 2, 3)])
    mixed = mix(pixels, torch.tensor([4 / 6, 1.0]), boxes([0, 1, 1, 2], [0, 0, 0, 0]))
    assert mixed[0, 0].tolist() == [[0, 1, 1], [0, 0, 0]] and mixed[1].equal(pixels[1])


def test_a_finished_batch_says_both_classes_and_is_not_mixed_again():
    batch = dataset().__getitems__(list(range(6))).unfinished
    finished = finish_batch(batch)
    assert finished.keys() == {"pixel_values", "labels", "mixed_labels", "mixing"}
    assert finished["mixed_labels"].equal(batch["labels"].flip(0)) and finished["labels"].equal(batch["labels"])
    assert finished["mixing"].equal(batch["mixing"]) and finished["pixel_values"].dtype == torch.float32
    assert finish_batch(finished)["pixel_values"] is finished["pixel_values"]
    assert batch["pixel_values"].dtype == torch.uint8 and "operations" in batch  # as it was


def test_what_is_erased_and_what_moves_into_view_has_the_mean_colour():
    """Which is 0 of the normalised image."""
    processing = processor()
    processing.image_mean, processing.image_std = [0.2, 0.4, 0.6], [0.1, 0.2, 0.3]
    augmentation = Augmentation(crop_padding=0, horizontal_flip=False, policy="trivialaugment")
    data = ImageClassificationDataset(image_dataset(4), processing, augmentation=augmentation)
    batch = data.__getitems__([0, 1]).unfinished
    batch["operations"][:], batch["magnitudes"][:] = (
        OPERATIONS.index("translate_x"),
        9.0,
    )  # moved by the whole width of 8 pixels
    finished = finish_batch(batch)["pixel_values"]
    torch.testing.assert_close(finished, torch.zeros_like(finished), atol=1e-5, rtol=0)
    batch["operations"][:] = 0
    batch["erased"] = boxes([0, 0, 8, 8], [0, 0, 8, 8])
    assert not finish_batch(batch)["pixel_values"].any()


def test_an_identity_of_a_policy_changes_nothing():
    plain = dataset("none").__getitems__([3, 4]).unfinished
    batch = {**plain, "operations": torch.zeros(2, 3, dtype=torch.int64), "magnitudes": torch.zeros(2, 3)}
    torch.testing.assert_close(finish_batch(batch)["pixel_values"], finish_batch(plain)["pixel_values"])


def test_images_that_get_noise_get_their_own():
    """Also two images that are equal."""
    batch = dataset("none", policy="corruptions").__getitems__([3, 4]).unfinished
    batch["pixel_values"][1] = batch["pixel_values"][0]
    batch["operations"][:], batch["magnitudes"][:] = OPERATIONS.index("noise"), 20.0
    first, second = finish_batch(batch)["pixel_values"]
    assert not first.equal(second)
    batch["noise_seeds"][1] = batch["noise_seeds"][0]
    first, second = finish_batch(batch)["pixel_values"]
    assert first.equal(second)


# --- The same, however they are read ---


@pytest.mark.parametrize("preset", AUGMENTATIONS)
def test_pixels_do_not_depend_on_the_number_of_workers(preset):
    data = dataset(preset)
    data.set_epoch(2)
    loaders = [
        DataLoader(data, batch_size=6, num_workers=num_workers, collate_fn=collate)
        for num_workers, collate in ((0, collate_images), (1, collate_for_device), (2, collate_for_device))
    ]
    for finished, *others in zip(*loaders):
        for other in others:
            assert_equal_batches(finished, finish_batch(other))


@pytest.mark.parametrize("preset", AUGMENTATIONS)
def test_pixels_do_not_depend_on_the_batch_but_for_mixing(preset):
    data = dataset(preset, mixing_probability=0.0)
    data.set_epoch(1)
    whole = finish_batch(data.__getitems__(list(range(20))).unfinished)["pixel_values"]
    of_two_processes = [finish_batch(data.__getitems__(list(range(rank, 20, 2))).unfinished) for rank in (0, 1)]
    for rank, part in enumerate(of_two_processes):
        torch.testing.assert_close(part["pixel_values"], whole[rank::2], atol=1e-5, rtol=0)
    torch.testing.assert_close(data[7]["pixel_values"], whole[7], atol=1e-5, rtol=0)


def test_epochs_differ():
    data = dataset()
    first = collate_images(data.__getitems__([0, 1, 2]))["pixel_values"]
    data.set_epoch(1)
    assert not collate_images(data.__getitems__([0, 1, 2]))["pixel_values"].equal(first)


def test_a_cut_batch_is_mixed_within_its_parts():
    """As a launcher cuts it that reads on one process for all."""
    batch = dataset().__getitems__(list(range(8))).unfinished
    part = finish_batch({name: values[:4] for name, values in batch.items()})
    assert part["mixed_labels"].equal(batch["labels"][:4].flip(0)) and len(part["pixel_values"]) == 4


@pytest.mark.parametrize("wrap", [lambda data: Subset(data, range(20)), lambda data: ConcatDataset([data])])
@pytest.mark.parametrize("collate", [collate_images, collate_for_device])
def test_wrapped_datasets_give_the_same_mixed_batches(wrap, collate):
    data = dataset()
    expected = DataLoader(data, batch_size=6, collate_fn=collate_images)
    for ours, other in zip(DataLoader(wrap(data), batch_size=6, collate_fn=collate), expected):
        ours = finish_batch(ours)
        assert ours.keys() == other.keys()
        for name, values in ours.items():
            torch.testing.assert_close(values, other[name], atol=1e-5, rtol=0, msg=name)


def test_grey_images_are_augmented_with_every_preset():
    for preset in AUGMENTATIONS:
        data = ImageClassificationDataset(
            image_dataset(8),
            processor(channels=1),
            num_channels=1,
            augmentation=augmentation_named(preset),
        )
        finished = collate_images(data.__getitems__(list(range(8))))["pixel_values"]
        assert finished.shape == (8, 1, 8, 8) and finished.isfinite().all(), preset


# --- Several batches of a step at once ---


@pytest.mark.parametrize("num_at_once", [3, 2**25])
def test_batches_finished_together_are_those_finished_one_by_one(monkeypatch, num_at_once):
    monkeypatch.setattr("hf_layershuffle.data.augmentation.MAX_AT_ONCE", num_at_once)
    images = dataset()
    batches = [collate_for_device(images.__getitems__(rows)) for rows in ([0, 1, 2, 3], [4, 5, 6], [7])]
    together = finish_images_together([dict(batch) for batch in batches])
    assert all("operations" not in batch and "mixing_boxes" in batch for batch in together)
    for ours, batch in zip(together, batches):
        ours, alone = finish_batch(ours), finish_batch(batch)
        assert ours.keys() == alone.keys() and ours["mixed_labels"].equal(alone["mixed_labels"])
        torch.testing.assert_close(ours["pixel_values"], alone["pixel_values"])


def test_batches_without_operations_are_left_as_they_are():
    batches = [collate_for_device(dataset("light").__getitems__([row])) for row in (0, 1)]
    assert finish_images_together(batches) is batches
