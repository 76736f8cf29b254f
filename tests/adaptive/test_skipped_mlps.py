import numpy as np
import pytest
import torch
from support.analysis import digits_batches

import hf_layershuffle as ls
from hf_layershuffle.adaptive.mlp_policies import RandomMlps, SkippedMlps
from hf_layershuffle.adaptive.mlp_skipping import (
    MlpSimilarities,
    choose_skipped_mlps,
    mlp_similarities,
    random_skipped_mlps,
    without_mlps,
)
from hf_layershuffle.adaptive.policies import Calibration


@pytest.fixture
def model():
    return ls.load_classifier(ls.example_model())


@pytest.fixture(scope="module")
def loader():
    return digits_batches("train", 60, 40)


def test_similarities_are_those_of_hidden_states_around_the_mlp(model, loader):
    """What hooks see of a pre-norm layer: its state before the MLP is the input of the norm before it."""
    before, after = [], []
    for layer in model.free_layers.children():
        layer.layernorm_after.register_forward_pre_hook(lambda _, args: before.append(args[0]))
        layer.register_forward_hook(lambda *args: after.append(args[2]))
    order = [3, 0, 5, 5]
    cosines = []
    with torch.no_grad():
        for batch in loader:
            model(batch["pixel_values"], execution_order=order)
            pairs = zip(before, after, strict=True)
            cosines.append(torch.stack([torch.cosine_similarity(x, y, dim=-1).mean(1) for x, y in pairs]))
            before.clear(), after.clear()
    expected = torch.cat(cosines, 1).mean(1).numpy()
    found = mlp_similarities(ls.load_classifier(ls.example_model()), loader, [order], progress=False)
    np.testing.assert_allclose(found.similarities[0], expected, atol=1e-6)
    assert found.num_examples == 60 and found.num_layers == 6 and found.similarities.shape == (1, 4)


def by_hand():
    """Two orders of six positions."""
    values = np.array([[0.9, 0.7, 0.95, 0.8, 0.6, 0.99], [0.9, 0.9, 0.85, 0.8, 0.8, 0.99]])
    return MlpSimilarities([[0, 1, 2, 3, 4, 5], [0, 2, 1, 3, 5, 4]], values, 6, 10)


def test_choice_by_hand():
    found = by_hand()
    np.testing.assert_allclose(found.by_position, [0.9, 0.8, 0.9, 0.8, 0.7, 0.99])
    assert found.most_similar(0) == []
    assert found.most_similar(1) == [2] and found.most_similar(3) == [1, 2, 3]
    assert found.most_similar(2, keep=0) == [0, 5] or found.most_similar(2, keep=0) == [2, 5]
    assert found.most_similar(2, keep=2) == [2, 3]
    assert found.most_similar(min_similarity=0.75) == [1, 2, 3]
    assert found.most_similar(min_similarity=0.75, keep=0) == [0, 1, 2, 3, 5]
    assert found.most_similar(min_similarity=1) == []
    table = found.by_layer_and_position
    assert table[2, 1] == 0.9 and table[2, 2] == 0.95 and table[0, 0] == 0.9
    assert np.isnan(table[5, 0]) and np.isnan(table).sum() == 36 - 10


def test_random_ones_are_a_control():
    drawn = random_skipped_mlps(8, 3, 200, seed=1)
    assert drawn == random_skipped_mlps(8, 3, 200, seed=1) != random_skipped_mlps(8, 3, 200, seed=2)
    assert all(len(set(each)) == 3 and each == sorted(each) for each in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=8)
    assert counts[0] == counts[7] == 0 and counts[1:7].min() > 70 and counts.sum() == 600


def test_the_context_sets_and_resets(model, loader):
    images = next(iter(loader))["pixel_values"][:4]
    model.config.skipped_mlps = [2]
    with torch.no_grad():
        configured = model(images).logits
        with without_mlps(model, None):
            whole = model(images).logits
        with without_mlps(model, [1, 3]):
            two = model(images).logits
            assert model.config.skipped_mlps == [1, 3]
        with pytest.raises(RuntimeError), without_mlps(model, [1]):
            raise RuntimeError("in the middle")
    assert model.config.skipped_mlps == [2]
    assert not torch.equal(configured, whole) and not torch.equal(two, whole) and not torch.equal(two, configured)


def test_what_is_configured_does_not_change_the_measurement(model, loader):
    found = mlp_similarities(model, loader, progress=False)
    model.config.skipped_mlps = [1, 2, 3]
    again = mlp_similarities(model, loader, progress=False)
    np.testing.assert_array_equal(found.similarities, again.similarities)
    assert choose_skipped_mlps(model, loader, 2, progress=False) == found.most_similar(2)


def test_accuracy_is_measured_without_them(model, loader):
    """What evaluates in any order leaves out the same MLPs."""
    batches = list(loader)
    with torch.no_grad(), without_mlps(model, [1, 2, 3, 4]):
        right = [(model(b["pixel_values"]).logits.argmax(-1) == b["labels"]).sum() for b in batches]
        score = ls.score_execution_orders(model, loader, [list(range(6))], progress=False)[0]
    assert score.accuracy == pytest.approx(float(sum(right)) / 60)


def test_policies(model, loader):
    calibration = Calibration(model, loader, loader, [1, 3, 5, 6])
    skipped = SkippedMlps(calibration).settings()
    assert [each.label for each in skipped] == ["without 4 MLPs", "without 3 MLPs", "without 1 MLP"]
    found = mlp_similarities(model, loader, progress=False)
    assert [each.chosen["skipped_mlps"] for each in skipped] == [found.most_similar(count) for count in (4, 3, 1)]
    controls = RandomMlps(calibration).settings()
    assert [each.label for each in controls] == [each.label for each in skipped]
    inputs = {"pixel_values": next(iter(loader))["pixel_values"][:4]}
    with torch.no_grad():
        with without_mlps(model, found.most_similar(3)):
            expected = model(**inputs).logits
        assert torch.equal(skipped[1].run(inputs).logits, expected)
        drawn = [controls[1].run(inputs).logits for _ in range(6)]
    assert all(each.is_random for each in controls) and not any(each.is_random for each in skipped)
    assert any(not torch.equal(drawn[0], each) for each in drawn)
    assert model.config.skipped_mlps is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of them"),
        ({"num_skipped": 1, "min_similarity": 0.9}, "give one of them"),
        ({"num_skipped": 5}, "`num_skipped` is 5; it must be at most 4"),
        ({"num_skipped": -1}, "`num_skipped` is -1"),
        ({"num_skipped": 3, "keep": 2}, "at most 2, since the MLPs at the first and the last 2 positions are kept"),
        ({"num_skipped": 1, "keep": -1}, "`keep` is -1"),
        ({"min_similarity": 1.5}, "`min_similarity` is 1.5"),
    ],
    ids=str,
)
def test_bad_choices(arguments, message):
    with pytest.raises(ValueError, match=message):
        by_hand().most_similar(**arguments)


def test_policies_are_of_models_whose_mlp_is_known(model):
    assert SkippedMlps.applies_to(model) and RandomMlps.applies_to(model)
    for layer in model.free_layers.children():
        layer.rest = layer._modules.pop("mlp")
    assert not SkippedMlps.applies_to(model) and not RandomMlps.applies_to(model)
    assert model.config.skipped_mlps is None


def test_bad_positions(model):
    with pytest.raises(ValueError, match="holds position 6"), without_mlps(model, [6]):
        pass
    for given in (5, "12"):
        with pytest.raises(ValueError, match=r"`positions` is .*; pass a list"), without_mlps(model, given):
            pass
    with pytest.raises(ValueError, match="`skipped_mlps` is"), without_mlps(model, [1, 1]):
        pass
    assert model.config.skipped_mlps is None
    plain = ls.to_plain_vit(model)
    with pytest.raises(ValueError, match="ViTForImageClassification has no free layer order"), without_mlps(plain, []):
        pass


def test_no_labels_are_needed(model):
    digits, processor = (
        ls.load_image_datasets("digits")["train"].select(range(30)),
        ls.load_image_processor(ls.example_model()),
    )
    settings = {"processing_class": processor, "progress": False}
    found = mlp_similarities(model, digits.remove_columns("label"), **settings)
    np.testing.assert_array_equal(found.similarities, mlp_similarities(model, digits, **settings).similarities)
