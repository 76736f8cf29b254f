"""The analysis against straightforward computations by the models' own forward."""

import dataclasses
import itertools
import json
import re
import sys
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from conftest import Architecture, of_both_architectures
from sklearn.datasets import load_digits
from support.analysis import make_items, randomize
from support.encoder_checks import free_model
from support.encoders import DECODERS, IMAGE_ENCODERS
from support.timm_without_torchvision import use_timm
from torch.utils.data import DataLoader

import hf_layershuffle as ls
from hf_layershuffle.analysis import (
    QUANTITIES,
    AnalysisReport,
    Representations,
    analyze,
    attention_rollout,
    balanced_execution_orders,
    collect_representations,
    embed_representations,
    layer_contributions,
    output_similarity,
    probe_position,
    recorded_updates,
)
from hf_layershuffle.layerwise import LayerwiseClassifier


def stack(items) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([item["pixel_values"] for item in items]), torch.tensor([item["labels"] for item in items])


def representations_of(outputs: np.ndarray, group_size: int) -> Representations:
    """Of outputs of shape `(num_images, 2, num_layers, num_positions, size)`."""
    outputs = outputs.astype(np.float32)
    return Representations(outputs, outputs, np.arange(len(outputs)) // group_size)


# --- Orders ---


def test_balanced_orders_put_each_layer_equally_often_at_each_position():
    orders = np.array(balanced_execution_orders(5, 12, seed=3))
    assert orders.shape == (15, 5)  # rounded up
    assert (np.sort(orders, axis=1) == np.arange(5)).all()
    for position in range(5):
        assert set(Counter(orders[:, position].tolist()).values()) == {3}
    assert balanced_execution_orders(5, 5, seed=3) == orders[:5].tolist()
    assert balanced_execution_orders(5, 12, seed=4) != orders.tolist()


def test_a_balanced_order_is_uniform_over_permutations():
    counts = Counter(tuple(balanced_execution_orders(3, 1, seed)[0]) for seed in range(1200))
    assert set(counts) == set(itertools.permutations(range(3)))
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 0.001


# --- Contributions ---


@of_both_architectures
@pytest.mark.parametrize("depth_embedding", [False, True])
def test_recorded_updates_sum_to_the_layers_update(architecture, depth_embedding):
    parts = LayerwiseClassifier(randomize(architecture.classifier(depth_embedding=depth_embedding)))
    pixel_values, _ = stack(make_items(3))
    with torch.no_grad(), recorded_updates(parts) as updates:
        before = parts.embed(pixel_values)
        after, _ = parts.run_layer(before, 2, 1)
    assert set(updates) == {"attention", "mlp"} | ({"depth"} if depth_embedding else set())
    torch.testing.assert_close(sum(updates.values()), after - before)
    assert all(update.norm() > 0.1 for update in updates.values())
    assert not any(module._forward_hooks for module in parts.model.modules())


def naive_quantities(model, items, order) -> dict[str, np.ndarray]:
    """Some quantities of shape (positions, images), by one forward pass a prefix."""
    pixel_values, labels = stack(items)
    with torch.no_grad():
        states = model.base_model(pixel_values, execution_order=order, output_hidden_states=True).hidden_states
        first = model.classifier(model.base_model.layernorm(states[0])[:, 0])
        logits = [first] + [model(pixel_values, execution_order=order[: k + 1]).logits for k in range(len(order))]
    rows = {"update_norm": [], "update_size": [], "cosine": [], "logit_change": [], "log_probability_change": []}
    for x, y, before, after in zip(states, states[1:], logits, logits[1:]):
        rows["update_norm"].append((y - x).norm(dim=-1).mean(1) / x.norm(dim=-1).mean(1))
        rows["update_size"].append((y - x).norm(dim=-1).mean(1))
        rows["cosine"].append((((y - x) * x).sum(-1) / (y - x).norm(dim=-1) / x.norm(dim=-1)).mean(1))
        rows["logit_change"].append((after - before)[range(len(labels)), labels])
        change = after.log_softmax(-1) - before.log_softmax(-1)
        rows["log_probability_change"].append(change[range(len(labels)), labels])
    return {name: torch.stack(values).numpy() for name, values in rows.items()}


def test_contributions_are_those_of_the_naive_loop(vit):
    model = randomize(vit.classifier(depth_embedding=True))
    items = make_items(7)
    found = layer_contributions(model, items, num_orders=8, seed=1, batch_size=3, progress=False)
    assert set(found.mean) == set(found.sequential_std) == set(QUANTITIES)
    assert found.num_images == 7 and (found.counts == 14).all()  # 8 orders, 2 with each layer at each position
    by_order = [naive_quantities(model, items, order) for order in found.execution_orders]
    sequential = naive_quantities(model, items, [0, 1, 2, 3])
    for name in sequential:
        for layer in range(4):
            np.testing.assert_allclose(found.sequential_mean[name][layer], sequential[name][layer].mean(), rtol=1e-4)
            for position in range(4):
                values = [
                    quantities[name][position]
                    for quantities, order in zip(by_order, found.execution_orders)
                    if order[position] == layer
                ]
                np.testing.assert_allclose(found.mean[name][layer, position], np.mean(values), rtol=1e-4, atol=1e-6)
                np.testing.assert_allclose(found.std[name][layer, position], np.std(values), rtol=1e-3, atol=1e-5)


def test_contributions_do_not_depend_on_batches(vit):
    model, items = randomize(vit.classifier()), make_items(9)
    one, many = (layer_contributions(model, items, num_orders=4, batch_size=b, progress=False) for b in (9, 2))
    for name in one.mean:
        np.testing.assert_allclose(one.mean[name], many.mean[name], rtol=1e-5, atol=1e-6)


def test_a_layer_that_adds_nothing_is_seen_to(vit):
    model = randomize(vit.classifier())
    with torch.no_grad():
        for linear in (model.vit.layers[2].attention.o_proj, model.vit.layers[2].mlp.fc2):
            linear.weight.zero_()
            linear.bias.zero_()
    found = layer_contributions(model, make_items(4), num_orders=4, progress=False)
    for name in ("update_norm", "attention_size", "mlp_norm", "cosine", "logit_change", "log_probability_change"):
        assert (found.mean[name][2] == 0).all() and (found.std[name][2] == 0).all()
        assert (found.mean[name][[0, 1, 3]] != 0).all()
    assert "depth_norm" not in found.mean


@pytest.mark.parametrize("skipped", [[2], [0], [0, 1]])
def test_a_layer_without_its_mlp_adds_nothing_by_it(vit, skipped):
    model = randomize(vit.classifier())
    model.config.skipped_mlps = skipped
    found = layer_contributions(model, make_items(4), num_orders=4, progress=False)
    with_mlp = [position for position in range(4) if position not in skipped]
    for name in ("mlp_size", "mlp_norm"):
        assert (found.mean[name][:, skipped] == 0).all() and (found.mean[name][:, with_mlp] > 0).all()


def test_a_token_that_is_zero_is_no_harm(vit):
    """The special tokens of a fresh model."""
    found = layer_contributions(vit.classifier(), make_items(4), num_orders=4, progress=False)
    assert all(np.isfinite(values).all() and values.max() < 100 for values in found.mean.values())


def test_switching_off_is_the_ratio_to_the_own_position():
    found = layer_contributions_of(
        np.array([[2.0, 1.0, 1.0], [4.0, 4.0, 4.0], [3.0, 5.0, 9.0]]), np.array([2, 4, 8.0])
    )
    np.testing.assert_allclose(found.away_from_home(), [0.5, 1.0, 0.5])
    np.testing.assert_allclose(found.least_over_most(), [0.5, 1.0, 1 / 3])
    np.testing.assert_allclose(found.by_position("update_size"), [3, 10 / 3, 14 / 3])


def layer_contributions_of(sizes: np.ndarray, sequential: np.ndarray):
    counts = np.full(sizes.shape, 6)
    return ls.analysis.LayerContributions(
        {"update_size": sizes}, {}, {"update_size": sequential}, {}, counts, 6, [[0, 1, 2]]
    )


def test_plain_models_are_analysed_and_left_in_their_mode(vit):
    plain = randomize(vit.plain_classifier()).train()
    ours = randomize(vit.classifier(shuffle_mode="none"))
    items = make_items(4)
    expected = layer_contributions(ours, items, num_orders=4, progress=False)
    found = layer_contributions(plain, items, num_orders=4, progress=False)
    for name in expected.mean:
        np.testing.assert_array_equal(found.mean[name], expected.mean[name])
    assert plain.training and all(module.training for module in plain.modules())


# --- Representations ---


def test_representations_are_the_models_hidden_states(vit):
    model, items = randomize(vit.classifier(position_predictor=True)), make_items(41)
    found = collect_representations(model, items, max_images=21, seed=2, progress=False)
    assert found.cls.shape == found.mean.shape == (21, 2, 4, 4, 32) and found.cls.dtype == np.float32
    assert np.bincount(found.groups).tolist() == [5, 4, 4, 4, 4]
    orders = np.reshape(balanced_execution_orders(4, 40, seed=2), (5, 2, 4, 4))
    pixel_values, _ = stack(items[::2])  # evenly spaced over the data
    for group in range(5):
        chosen = torch.from_numpy(found.groups == group)
        for run, row in np.ndindex(2, 4):
            order = orders[group, run, row].tolist()
            with torch.no_grad():
                output = model.base_model(pixel_values[chosen], execution_order=order, output_hidden_states=True)
            for position, layer in enumerate(order):
                states = output.hidden_states[position + 1].numpy()
                np.testing.assert_allclose(found.cls[chosen, run, layer, position], states[:, 0], atol=1e-5)
                np.testing.assert_allclose(found.mean[chosen, run, layer, position], states.mean(1), atol=1e-5)


def test_representations_are_of_the_rows_that_are_read(vit):
    model, items = randomize(vit.classifier()), make_items(60)
    loader = DataLoader(items, batch_size=8, sampler=range(59, 29, -1))
    found = collect_representations(model, loader, progress=False)
    expected = collect_representations(model, items[30:], progress=False)
    np.testing.assert_array_equal(found.cls, expected.cls)
    assert analyze(model, loader, num_orders=1, progress=False).num_images == 30


def test_the_token_of_a_causal_model_is_the_one_that_its_head_reads():
    encoder = next(each for each in DECODERS if each.name == "Llama, classifier")
    model = free_model(encoder)
    words = torch.randint(5, 90, (20, 8), generator=torch.Generator().manual_seed(1))
    words[:, 0] = 5  # as the token with which texts begin
    lengths = [4 + i % 5 for i in range(20)]
    items = [
        {"input_ids": row, "attention_mask": (torch.arange(8) < length).long(), "labels": 0}
        for row, length in zip(words, lengths)
    ]
    found = collect_representations(model, items, progress=False)
    order = balanced_execution_orders(model.config.num_hidden_layers, 2 * 4 * 5, seed=0)[0]
    mask = torch.stack([item["attention_mask"] for item in items])
    with torch.no_grad():
        output = model.base_model(words, attention_mask=mask, execution_order=order, output_hidden_states=True)
    for image in range(4):  # the first group
        expected = output.hidden_states[1][image, lengths[image] - 1].numpy()
        np.testing.assert_allclose(found.cls[image, 0, order[0], 0], expected, atol=1e-5)
    assert output_similarity(found).same_both > 0.5


def test_outputs_that_are_not_finite_are_said_before_all_images_run(vit, monkeypatch):
    model = randomize(vit.classifier())
    with torch.no_grad():
        model.base_model.layers[1].mlp.fc1.weight.mul_(1e38)
    monkeypatch.setattr("hf_layershuffle.analysis.analysis.layer_contributions", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ValueError, match="are not finite, so there is nothing to compare; try --dtype float32"):
        analyze(model, make_items(25), progress=False)


def test_a_large_model_has_as_many_images_as_it_needs(vit):
    assert len(collect_representations(vit.classifier(), make_items(25), max_bytes=1, progress=False).cls) == 20
    with pytest.raises(ValueError, match=r"There are 19 images; this needs at least 20\. Use more of the dataset"):
        collect_representations(vit.classifier(), make_items(19), progress=False)


def test_representations_are_capped_in_bytes(vit):
    found = collect_representations(vit.classifier(), make_items(60), max_bytes=16 * 16 * 32 * 30, progress=False)
    assert len(found.cls) == 30 and found.cls.nbytes + found.mean.nbytes == 16 * 16 * 32 * 30


def test_probe_reads_a_position_that_is_there_and_none_that_is_not():
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(80, 2, 2, 4, 6))
    outputs[:, :, 0, :, 3] += 6 * np.arange(4)  # layer 0 tells its position along one line, layer 1 does not
    probe = probe_position(representations_of(outputs, 8), progress=False)
    assert probe.chance == 0.25 and probe.num_images == 80 and probe.num_folds == 5
    assert probe.accuracy[0] > 0.98
    assert abs(probe.accuracy[1] - 0.25) < 0.1


def test_probe_does_not_take_the_order_for_the_position():
    """What is the same for all images of an order, but not for other orders with the layer at the same position, is no
    knowledge of the position, even if it tells the seen orders apart perfectly."""
    rng = np.random.default_rng(0)
    of_order = rng.normal(size=(30, 1, 2, 1, 4, 256)) * 5
    outputs = (of_order + rng.normal(size=(30, 8, 2, 1, 4, 256))).reshape(240, 2, 1, 4, 256)
    assert probe_position(representations_of(outputs, 8), progress=False).accuracy[0] < 0.4
    leaking = Representations(outputs, outputs, np.arange(240) % 8)  # each order in every group
    assert probe_position(leaking, progress=False).accuracy[0] > 0.95


def test_probe_reads_the_position_of_a_trained_layershuffle_layer(vit):
    """Trained on digits for a few seconds; without any depth embedding, layers' outputs tell the position."""
    digits = load_digits()
    images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target)
    model = vit.classifier(num_labels=10, shuffle_mode="arbitrary").train()
    model.base_model.seed_execution_order(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(150):
        chosen = torch.randint(1400, (64,), generator=generator)
        loss = model(images[chosen], labels=labels[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.5 * losses[0]  # it did learn
    held_out = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images[1400:], labels[1400:])]
    probe = probe_position(collect_representations(model, held_out, progress=False), progress=False)
    assert probe.num_images == 256
    assert (probe.accuracy - 2 * probe.std > probe.chance).all(), probe


def test_similarity_is_unbiased_cka_between_the_runs():
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(24, 2, 2, 2, 40))  # fewer images in a group than dimensions: plain CKA would be near 1
    rotation = scipy.stats.ortho_group.rvs(40, random_state=0)
    outputs[:, 1, 0, 0] = (
        3 * outputs[:, 0, 0, 0] @ rotation + 7
    )  # the same layer at the same position, in the other run
    outputs[:, 1, 1, 0] = outputs[:, 0, 0, 1]
    outputs[:, 0, 1, 1] = outputs[:, 0, 0, 1]  # in the same run, which is not compared
    found = output_similarity(representations_of(outputs, 12))
    matrix = found.matrix
    assert matrix.shape == (4, 4) and found.num_images == 24
    np.testing.assert_allclose(matrix[0, 0], 1, rtol=1e-5)
    assert 0.4 < matrix[1, 2] < 0.6  # (0, 1) of the first run and (1, 0) of the second are equal, the reverse are not
    assert abs(matrix[1, 1]) < 0.2 and abs(matrix[1, 3]) < 0.2
    np.testing.assert_allclose(matrix, naive_unbiased_cka(outputs.reshape(24, 2, 4, 40), 12), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.same_both, matrix.diagonal().mean())
    np.testing.assert_allclose(found.same_layer, (matrix[0, 1] + matrix[2, 3]) / 2)
    np.testing.assert_allclose(found.same_position, (matrix[0, 2] + matrix[1, 3]) / 2)
    np.testing.assert_allclose(found.neither, (matrix[0, 3] + matrix[1, 2]) / 2)


def naive_unbiased_cka(outputs: np.ndarray, group_size: int) -> np.ndarray:
    """By the formula of HSIC_1 (Song et al. 2012, eq. 5; Nguyen et al. 2021, eq. 2-3)."""

    def hsic(x, y):
        n = len(x)
        k, m = x @ x.T, y @ y.T
        np.fill_diagonal(k, 0)
        np.fill_diagonal(m, 0)
        value = np.trace(k @ m) + k.sum() * m.sum() / (n - 1) / (n - 2) - 2 / (n - 2) * (k @ m).sum()
        return value / n / (n - 3)

    groups = np.split(outputs, len(outputs) // group_size)
    pairs = range(outputs.shape[2])

    def mean_hsic(run, pair, other_run, other_pair):
        return np.mean([hsic(each[:, run, pair], each[:, other_run, other_pair]) for each in groups])

    cka = np.array(
        [
            [mean_hsic(0, a, 1, b) / np.sqrt(mean_hsic(0, a, 0, a) * mean_hsic(1, b, 1, b)) for b in pairs]
            for a in pairs
        ]
    )
    return (cka + cka.T) / 2


def test_embedding_is_the_principal_components():
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(30, 2, 3, 3, 5)) * [1, 9, 1, 4, 1]
    representations = representations_of(outputs, 6)
    found = embed_representations(representations, max_points=100, seed=1)
    assert found.points.shape == (100, 2) and set(found.layer) == set(found.position) == {0, 1, 2}
    vectors = outputs.reshape(-1, 5) - outputs.reshape(-1, 5).mean(0)
    _, sizes, axes = np.linalg.svd(vectors, full_matrices=False)
    np.testing.assert_allclose(found.explained_variance, (sizes**2 / (sizes**2).sum())[:2], rtol=1e-4)
    everything = embed_representations(representations)
    np.testing.assert_allclose(np.abs(everything.points), np.abs(vectors @ axes[:2].T), atol=1e-3)
    np.testing.assert_array_equal(everything.layer, np.tile(np.repeat([0, 1, 2], 3), 60))
    np.testing.assert_array_equal(everything.position, np.tile([0, 1, 2], 180))
    np.testing.assert_array_equal(found.points, embed_representations(representations, max_points=100, seed=1).points)


# --- Attention ---


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2, 2]])
def test_rollout_is_the_product_in_execution_order(vit, order):
    eager = randomize(vit.classifier(attn_implementation="eager", depth_embedding=True))
    model = randomize(vit.classifier(attn_implementation="sdpa", depth_embedding=True))
    pixel_values, _ = stack(make_items(2))
    found = attention_rollout(model, pixel_values, [[0], order], labels=[4, 1])
    with torch.no_grad():
        output = eager(pixel_values, execution_order=order, output_attentions=True)
    tokens = output.attentions[0].shape[-1]
    rollout = torch.eye(tokens).expand(2, -1, -1)
    for weights in output.attentions:
        rollout = torch.bmm((weights.mean(1) + torch.eye(tokens)) / 2, rollout)
    torch.testing.assert_close(rollout.sum(-1), torch.ones(2, tokens))
    special = {"vit": 1, "deit": 2}[vit.name]
    assert tokens == special + 4 and found.maps.shape == (2, 2, 2, 2)
    np.testing.assert_allclose(found.maps[:, 1].reshape(2, 4), rollout[:, 0, special:], atol=1e-6)
    np.testing.assert_array_equal(found.predicted[:, 1], output.logits.argmax(-1))
    assert found.execution_orders == [[0], order] and found.labels.tolist() == [4, 1]
    assert found.images.shape == (2, 8, 8, 3) and found.images.min() == 0 and found.images.max() == 1
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("height, width", [(16, 16), (8, 12), (24, 16)])
def test_maps_are_of_the_images_size_and_not_of_the_configurations(height, width):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=16, patch_size=4)
    model = ls.free_order(randomize(transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**sizes))))
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    found = attention_rollout(model, images, [[0, 1]])
    assert found.maps.shape == (2, 1, height // 4, width // 4)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        first, second = (each.mean(1) for each in model(images, output_attentions=True).attentions)
    eye = torch.eye(first.shape[-1])
    rollout = (second + eye) / 2 @ (first + eye) / 2
    np.testing.assert_allclose(found.maps.reshape(2, -1), rollout[:, 0, 1:], atol=1e-6)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("data2vec vision", "does not give its weights"),
        ("SigLIP 2", r"does not divide inputs of shape \(2, 16, 48\)"),
    ],
)
def test_a_model_without_maps_is_analysed_without_them(name, reason, caplog):
    encoder = next(each for each in IMAGE_ENCODERS if each.name == name)
    inputs, model = encoder.inputs(), free_model(encoder)
    items = [{key: value[i % 2] for key, value in inputs.items()} | {"labels": i % 2} for i in range(20)]
    report = analyze(model, items, num_orders=1, num_attention_images=2, batch_size=20, progress=False)
    assert report.attention is None and report.probe.num_images == 20
    assert re.search(f"The analysis is without attention maps. .*{reason}", caplog.text)
    with pytest.raises(ValueError, match=f"{reason}.*so there are no attention maps of it"):
        attention_rollout(model, inputs["pixel_values"], [[0]])


def test_a_model_of_timm_has_no_maps(monkeypatch):
    use_timm(monkeypatch)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes, num_labels=3)
    model = ls.free_order(transformers.TimmWrapperForImageClassification(config)).eval()
    with pytest.raises(ValueError, match="so there are no attention maps of it"):
        attention_rollout(model, torch.zeros(5, 3, 32, 32), [[0]])


def test_attention_that_gives_a_tensor_has_no_maps(vit):
    """Its second item is that of the second image, and no weights."""
    model = vit.classifier()
    for layer in model.base_model.layers:
        layer.attention.register_forward_hook(lambda module, args, output: output[0])
    with pytest.raises(ValueError, match="does not give its weights"):
        attention_rollout(model, torch.zeros(2, 3, 8, 8), [[0]])


def test_the_attention_of_each_tower_is_restored():
    encoder = next(each for each in IMAGE_ENCODERS if each.name == "CLIP")
    model = free_model(encoder)
    model.config._attn_implementation = {"": "sdpa", "vision_config": "sdpa", "text_config": "eager"}
    attention_rollout(model, encoder.inputs()["pixel_values"], [[0]])
    config = model.config
    found = [each._attn_implementation for each in (config, config.vision_config, config.text_config)]
    assert found == ["sdpa", "sdpa", "eager"]


def test_a_failed_rollout_restores_the_attention(vit):
    model = vit.classifier(attn_implementation="sdpa")
    with pytest.raises(ValueError, match="match"):
        attention_rollout(model, torch.zeros(1, 3, 16, 16), [[0]])
    assert model.config._attn_implementation == "sdpa"


# --- Reports ---


@pytest.fixture(scope="module")
def report() -> AnalysisReport:
    model = randomize(Architecture("vit").classifier(depth_embedding=True, shuffle_mode="arbitrary"))
    return analyze(model, make_items(25), num_orders=4, model_name="tiny", dataset_name="noise", progress=False)


def test_report_is_saved_and_loaded(report, tmp_path):
    path = report.save(tmp_path / "new")
    assert path == tmp_path / "new" / "analysis.json" and list(path.parent.iterdir()) == [path]
    for source in (path, path.parent):
        loaded = AnalysisReport.load(source)
        assert loaded.to_dict() == report.to_dict()
    assert isinstance(loaded.contributions.mean["cosine"], np.ndarray)
    assert loaded.contributions.execution_orders == report.contributions.execution_orders
    assert loaded.attention.images is None and report.attention.images is not None
    values = json.loads(path.read_text())
    assert values["config"]["depth_embedding"] and values["config"]["model_type"] == "layershuffle_vit"
    assert values["environment"]["device"] == "cpu" and "torch" in values["environment"]["versions"]
    assert (values["num_images"], values["num_classes"], values["num_layers"], values["seed"]) == (25, 5, 4, 0)


def test_report_is_repeated_by_its_seed(report):
    torch.manual_seed(99)
    np.random.seed(99)
    model = randomize(Architecture("vit").classifier(depth_embedding=True, shuffle_mode="arbitrary"))
    settings = dict(num_orders=4, model_name="tiny", dataset_name="noise", progress=False)
    again = analyze(model, make_items(25), **settings)
    strip = lambda each: {**each.to_dict(), "environment": None}  # noqa: E731
    assert strip(again) == strip(report)
    other = analyze(model, make_items(25), seed=1, **settings)
    assert other.contributions.execution_orders != report.contributions.execution_orders


def test_report_is_readable(report):
    text = str(report)
    assert "tiny on noise (25 images, 4 orders)" in text
    row = next(line for line in text.splitlines() if line.startswith("│     2 │"))
    cells = [cell.strip() for cell in row.split("│")]
    assert cells[2] == f"{report.contributions.sequential_mean['update_norm'][2]:.3f}"
    assert cells[9] == f"{report.probe.accuracy[2]:.3f}"
    assert f"{report.similarity.same_both:.4f} of one layer at one position" in text


def test_what_is_no_report_is_refused(report, tmp_path):
    with pytest.raises(OSError, match=r"analysis\.json"):
        AnalysisReport.load(tmp_path / "analysis.json")
    path = tmp_path / "analysis.json"
    without = {name: value for name, value in report.to_dict().items() if name != "probe"}
    for content in ("{", "[]", "3", json.dumps(without), json.dumps({**report.to_dict(), "probe": {"x": 1}})):
        path.write_text(content)
        with pytest.raises(ValueError, match="is not an analysis"):
            AnalysisReport.load(path)


# --- Bad input ---


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_orders": 0}, "`num_orders` is 0; it must be an integer of at least 1"),
        ({"num_orders": 2.5}, "`num_orders` is 2.5"),
        ({"seed": -1}, "`seed` is -1"),
        ({"num_attention_images": 0}, "`num_attention_images` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"embedding": "tsne"}, "The embedding is 'tsne'; it must be one of pca, umap"),
        ({"max_samples": 19}, "There are 19 images; the analysis needs at least 20"),
    ],
)
def test_bad_arguments_are_refused(vit, arguments, message):
    with pytest.raises(ValueError, match=message):
        analyze(vit.classifier(), make_items(25), progress=False, **arguments)


def test_bad_models_and_data_are_refused(vit, monkeypatch):
    with pytest.raises(ValueError, match="The evaluation set is empty"):
        analyze(vit.classifier(), [], progress=False)
    with pytest.raises(ValueError, match="label 5, but the model has 5 classes, from 0 to 4"):
        analyze(vit.classifier(), make_items(25, num_labels=6), progress=False)
    with pytest.raises(ValueError, match="The model has one layer"):
        analyze(vit.classifier(num_hidden_layers=1), make_items(25), progress=False)
    blip = transformers.BlipTextConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(
        ValueError,
        match="BlipTextModel is not a classifier of its whole input; models of its family cannot be evaluated",
    ):
        analyze(transformers.BlipTextModel(blip), make_items(25), progress=False)
    with pytest.raises(ValueError, match="`execution_orders` is empty"):
        attention_rollout(vit.classifier(), torch.zeros(1, 3, 8, 8), [])
    with pytest.raises(ValueError, match="holds 4 at position 1"):
        attention_rollout(vit.classifier(), torch.zeros(1, 3, 8, 8), [[0, 4]])
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ValueError, match="pip install umap-learn"):
        analyze(vit.classifier(), make_items(25), embedding="umap", progress=False)


def test_bad_representations_are_refused():
    outputs = np.zeros((12, 2, 2, 2, 3))
    with pytest.raises(ValueError, match="There are 4 groups of images for 5 folds"):
        probe_position(representations_of(outputs, 3), progress=False)
    with pytest.raises(ValueError, match="A group holds 3 images"):
        output_similarity(representations_of(outputs, 3))
    with pytest.raises(ValueError, match="nothing to tell apart"):
        probe_position(representations_of(outputs[:, :, :1, :1], 2), progress=False)
    with pytest.raises(ValueError, match="`token` is 'patch'; it must be one of cls, mean"):
        embed_representations(representations_of(outputs, 3), token="patch")


def test_fields_of_parts_travel(report):
    """A field that is added to a part must survive saving, too."""
    for name in ("contributions", "probe", "similarity", "embedding", "attention"):
        part = getattr(report, name)
        expected = {field.name for field in dataclasses.fields(part)} - {"images"}
        assert set(report.to_dict()[name]) == expected
