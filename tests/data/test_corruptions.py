import pytest
import torch
from support.images import image_dataset, processor

from hf_layershuffle.data.augmentation import finish_batch
from hf_layershuffle.data.corruptions import CORRUPTIONS, corrupted
from hf_layershuffle.data.image_dataset import ImageClassificationDataset
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


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="`corruption` is 'fog'; choose from blur, noise, low_contrast"):
        corrupted(image_dataset(2), processor(), "fog")
