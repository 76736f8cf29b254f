"""Stochastic depth by the layer program: examples that skip layers in training."""

import copy
import itertools

import pytest
import torch
from support.encoder_checks import fresh_model, labelled, tensors
from support.encoders import ENCODERS
from transformers import BeitConfig, BeitForImageClassification, CLIPConfig, CLIPForImageClassification

import hf_layershuffle as ls
from hf_layershuffle.models.layer_program import path_weights


RATE = 0.4
# One of each kind: of images, texts, sounds and videos, with tensors and with tuples, pre- and post-norm
FAMILIES = ("ViT", "DeiT", "CLIP", "SigLIP", "I-JEPA", "BERT", "DistilBERT", "ModernBERT", "AST", "Whisper, encoder",
            "VideoMAE", "Qwen3, classifier")  # fmt: skip


def test_the_rate_is_that_of_examples_and_the_mean_weight_is_one():
    torch.manual_seed(0)
    weights = torch.stack(path_weights(RATE, 3, 20_000))
    assert weights.shape == (3, 20_000)
    assert weights.unique().tolist() == pytest.approx([0, 1 / (1 - RATE)])
    spread = (RATE * (1 - RATE) / 20_000) ** 0.5
    assert ((weights == 0).float().mean(dim=1) - RATE).abs().max() < 4 * spread
    assert weights.mean() == pytest.approx(1, abs=0.03)
    # A layer is skipped whether or not another one is
    both = ((weights[0] == 0) & (weights[1] == 0)).float().mean()
    assert both == pytest.approx(RATE**2, abs=0.015)


def test_half_precision_and_mixed_precision(vit, batch):
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        model = vit.classifier(drop_path_rate=0.5).to(dtype).train()
        stream = []
        for layer in model.free_layers.children():
            layer.register_forward_pre_hook(lambda module, args, stream=stream: stream.append(args[0]))
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(batch["pixel_values"].to(dtype)).logits
        skips = [(before == after).all(dim=(1, 2)) for before, after in itertools.pairwise(stream)]
        assert 0 < torch.stack(skips).sum() < 3 * 6
        logits.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_examples_skip_layers_in_training(name):
    encoder = ENCODERS[name]
    model = fresh_model(encoder, drop_path_rate=RATE)
    assert not model.config.has_own_drop_path
    calls = []

    def note(module, args, kwargs, output):
        first = output[0] if isinstance(output, (tuple, list)) else output
        calls.append((args[0] if args else kwargs["hidden_states"], first))

    for layer in model.free_layers.children():
        layer.register_forward_hook(note, with_kwargs=True)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        calls.clear()
        model.train()(**labelled(encoder), execution_order=[2, 0])
        (before, output), (after, _) = calls
        for row in range(len(after)):
            skips = torch.equal(after[row], before[row])
            seen.add(skips)
            if not skips:
                scaled = before[row] + (output[row] - before[row]) / (1 - RATE)
                torch.testing.assert_close(after[row], scaled, atol=1e-4, rtol=1e-4)
    assert seen == {True, False}
    calls.clear()
    model.eval()(**encoder.inputs(), execution_order=[2, 0])
    assert torch.equal(calls[0][1], calls[1][0])  # in evaluation what one layer gives is what the next one gets


@pytest.mark.parametrize("name", FAMILIES)
def test_evaluation_and_a_rate_of_zero_are_the_plain_model(name):
    encoder = ENCODERS[name]
    dropping, plain = fresh_model(encoder, drop_path_rate=RATE), fresh_model(encoder)
    for left, right in zip(tensors(dropping(**encoder.inputs())), tensors(plain(**encoder.inputs())), strict=True):
        assert torch.equal(left, right)
    dropping.config.drop_path_rate = 0.0
    for model in (dropping, plain):
        torch.manual_seed(0)
        model.train()(**labelled(encoder)).loss.backward()
    for (name, left), right in zip(dropping.named_parameters(), plain.parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None), name
        assert left.grad is None or torch.equal(left.grad, right.grad), name


@pytest.mark.parametrize("flags", [{}, {"depth_embedding": True, "position_predictor": True}], ids=["plain", "extras"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_drops_the_same_paths(vit, batch, flags, use_reentrant):
    model = vit.classifier(shuffle_mode="arbitrary", drop_path_rate=RATE, **flags).train()
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for each in (model, other):
        torch.manual_seed(3)
        each(**batch, execution_order=[1, 3, 0]).loss.backward()
    for (name, left), right in zip(model.named_parameters(), other.named_parameters(), strict=True):
        # But for the order in which the gradients of the embeddings are added up
        torch.testing.assert_close(left.grad, right[1].grad, atol=1e-6, rtol=1e-5, msg=name)


def test_position_logits_are_of_all_examples(vit, batch):
    model = vit.classifier(shuffle_mode="arbitrary", drop_path_rate=0.9, position_predictor=True).train()
    assert model(**batch).position_logits.shape == (6, 4, 4)


def test_it_travels_with_the_configuration(vit, batch, tmp_path):
    model = vit.classifier(shuffle_mode="arbitrary", drop_path_rate=0.25)
    model.save_pretrained(tmp_path)
    loaded = ls.LayerShuffleViTForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.drop_path_rate == 0.25
    assert not hasattr(ls.to_plain_vit(loaded).config, "drop_path_rate")
    assert ls.free_order(vit.plain_classifier(), drop_path_rate=0.1).config.drop_path_rate == 0.1


def test_a_family_with_a_rate_of_its_own_keeps_it():
    sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=16)
    plain = BeitForImageClassification(BeitConfig(**sizes, patch_size=4, num_labels=5))
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in plain.beit.layers]
    assert rates == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])  # of the layer in the checkpoint, wherever it runs
    assert ls.LayerShuffleBeitConfig().drop_path_rate == BeitConfig().drop_path_rate == 0.1
    inputs = {"pixel_values": torch.randn(8, 3, 16, 16)}
    free = ls.free_order(copy.deepcopy(plain))
    assert free.config.drop_path_rate == 0.1 and free.config.has_own_drop_path
    logits = []
    for model in (plain, free):
        torch.manual_seed(0)
        logits.append(model.train()(**inputs).logits)
    assert torch.equal(*logits)
    assert ls.to_plain_vit(free).config.drop_path_rate == 0.1
    for name in ("DINOv2, drop path", "BEiT, absolute positions"):
        assert fresh_model(ENCODERS[name]).train()._dropped_paths == 0


def test_paths_are_not_dropped_twice():
    vision = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16)
    config = CLIPConfig(vision_config={**vision, "patch_size": 4}, text_config=dict(hidden_size=32, vocab_size=100))
    config.vision_config.drop_path_rate = 0.2
    with pytest.raises(ValueError, match=r"`drop_path_rate` is 0.1, and the layers of .* own, which is 0.2"):
        ls.free_order(CLIPForImageClassification(config), drop_path_rate=0.1)


def test_examples_without_a_row_of_their_own_are_refused():
    encoder = ENCODERS["Pixtral, vision tower"]  # all patches of a batch in one row
    model = fresh_model(encoder, drop_path_rate=RATE).train()
    with pytest.raises(ValueError, match=r"`drop_path_rate` is 0.4, .* which are not one row an example"):
        model(**encoder.inputs())


@pytest.mark.parametrize("rate", [1, -0.1, float("nan"), "0.1", True])
def test_a_rate_outside_its_range_is_refused(vit, rate):
    with pytest.raises(ValueError, match=r"`drop_path_rate` is .*; it must be a fraction in \[0, 1\)"):
        vit.config(drop_path_rate=rate)
