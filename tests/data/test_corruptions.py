import pytest
import torch
from support.images import image_dataset, processor
from torch.utils.data import DataLoader, Subset

from hf_layershuffle.data import Augmentation
from hf_layershuffle.data.augmentation import finish_batch
from hf_layershuffle.data.corruptions import CORRUPTIONS, corrupted
from hf_layershuffle.data.image_dataset import ImageClassificationDataset, collate_images
from hf_layershuffle.data.image_filters import blurred
from hf_layershuffle.evaluation.fingerprint import data_digest, example_digests
from hf_layershuffle.layerwise import as_layerwise, batches_for


def pixels(dataset, rows=(0, 1, 2)) -> torch.Tensor:
    """Levels from 0 to 255."""
    batch = dataset.__getitems__(list(rows)).unfinished
    scale, shift = batch["normalization"].unbind(1)
    return (finish_batch(batch)["pixel_values"] - shift[:, :, None, None]) / scale[:, :, None, None]


CLEAN = ImageClassificationDataset(image_dataset(6), processor())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_image_is_changed_always_in_the_same_way(name):
    dataset = corrupted(image_dataset(6), processor(), name, seed=3)
    changed = pixels(dataset)
    assert all((one - other).abs().max() > 1 for one, other in zip(changed, pixels(CLEAN)))
    assert changed.min() >= -0.01 and changed.max() <= 255.01
    again = pixels(corrupted(image_dataset(6), processor(), name, seed=3), rows=(2, 0))
    torch.testing.assert_close(again, changed[[2, 0]])


def test_the_strengths():
    clean, of = pixels(CLEAN), {name: pixels(corrupted(image_dataset(6), processor(), name)) for name in CORRUPTIONS}
    torch.testing.assert_close(of["blur"], blurred(clean, torch.ones(3), 1.0), atol=1e-2, rtol=0)
    inside = (clean > 110) & (clean < 145)  # where nothing is cut off
    assert (of["noise"] - clean)[inside].std() == pytest.approx(51, rel=0.2)
    assert (of["low_contrast"].std() / clean.std()).item() == pytest.approx(0.3, abs=0.03)
    other = pixels(corrupted(image_dataset(6), processor(), "noise", seed=1))
    assert not other.equal(of["noise"])


def test_digests_tell_corrupted_data_apart_and_know_its_images(vit):
    """Also of a part of the data."""
    parts = as_layerwise(vit.classifier(num_labels=2))
    named = {name: corrupted(image_dataset(6), processor(), name) for name in CORRUPTIONS} | {"clean": CLEAN}
    for options in ({}, {"max_samples": 4}):
        loaders = {name: batches_for(parts, data, processor(), **options) for name, data in named.items()}
        assert len({data_digest(loader) for loader in loaders.values()}) == 4
        assert all(example_digests(loader) == example_digests(loaders["clean"]) for loader in loaders.values())
    assert data_digest(loaders["noise"]) == data_digest(batches_for(parts, named["noise"], processor(), max_samples=4))


def test_labels_are_numbered_as_the_models_classes(vit):
    """Also where the data numbers the same classes in another order."""
    classes = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    parts = as_layerwise(vit.classifier(num_labels=2, **classes))
    data = image_dataset(6, names=("dog", "cat"))
    images = corrupted(data, processor(), "noise")
    for options in ({}, {"max_samples": 3}):
        loaders = [batches_for(parts, each, processor(), **options) for each in (images, data)]
        ours, others = (torch.cat([batch["labels"] for batch in loader]).tolist() for loader in loaders)
        assert ours == others and set(ours) == {0, 1}
    assert images.labels.tolist() == [0, 1] * 3  # as they were


def test_mixed_images_are_not_evaluated_on(vit):
    mixed = ImageClassificationDataset(image_dataset(6), processor(), augmentation=Augmentation(mixup_alpha=0.5))
    with pytest.raises(ValueError, match="each is of two classes; evaluate on images that are not mixed"):
        batches_for(as_layerwise(vit.classifier(num_labels=2)), mixed, processor())


def test_digests_are_of_the_rows_that_a_loader_gives(vit):
    parts, images = as_layerwise(vit.classifier(num_labels=2)), corrupted(image_dataset(6), processor(), "blur")
    loaders = [DataLoader(images, 2, sampler=rows, collate_fn=collate_images) for rows in ([0, 1], [4, 5], [1, 0])]
    assert len({data_digest(loader) for loader in [*loaders, batches_for(parts, images, processor())]}) == 4
    nested = DataLoader(Subset(Subset(images, [5, 3, 1]), [2, 0]), 2, collate_fn=collate_images)
    assert example_digests(nested) == [
        example_digests(DataLoader(images, collate_fn=collate_images))[row] for row in (1, 5)
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corruption": "fog"}, "`corruption` is 'fog'; choose from blur, noise, low_contrast"),
        ({"seed": -1}, "`seed` is -1; it must be an integer of at least 0"),
        ({"dataset": "digits"}, "`dataset` is a str; pass a `datasets.Dataset`"),
        ({"image_processor": None}, "`image_processor` is a NoneType; pass the model's"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, message):
    given = {"dataset": image_dataset(2), "image_processor": processor(), "corruption": "blur"} | changes
    with pytest.raises(ValueError, match=message):
        corrupted(**given)
