"""Layers without their MLPs: against the same model whose MLPs give zero."""

import copy
import threading

import pytest
import torch
import transformers
from support.encoder_checks import free_model
from support.encoders import ENCODERS
from support.models import randomize
from support.timm_without_torchvision import use_timm
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

import hf_layershuffle as ls
from hf_layershuffle.deployment.plain_vit import to_plain_vit
from hf_layershuffle.layerwise import LayerwiseClassifier
from hf_layershuffle.models.mlp_skipping import without_mlp


ORDER = [2, 0, 3, 1]
SKIPPED = [1, 2]  # the layers 0 and 3
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
# The last map of each family's MLP
LAST_MAPS = {
    "ViT": "mlp.fc2",
    "DeiT": "mlp.fc2",
    "DINOv2": "mlp.fc2",
    "BEiT, relative bias": "mlp.fc2",
    "SigLIP": "mlp.fc2",
    "BERT": "output.dense",
    "DistilBERT": "ffn.lin2",
    "ModernBERT": "mlp.Wo",
}


def make_vit(**flags):
    torch.manual_seed(0)
    config = ls.LayerShuffleViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        num_labels=5, **flags,
    )  # fmt: skip
    return randomize(ls.LayerShuffleViTForImageClassification(config)).eval()


def with_zeros(model, layers, last_map):
    """The model with the weights of some MLPs' last map at zero."""
    changed = copy.deepcopy(model)
    for layer in layers:
        last = changed.free_layers[layer].get_submodule(last_map)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
    return changed


def assert_same(model, expected_model, inputs):
    expected = expected_model(**inputs, execution_order=ORDER).logits
    whole = model(**inputs, execution_order=ORDER).logits
    model.config.skipped_mlps = SKIPPED
    found = model(**inputs, execution_order=ORDER).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found, whole, atol=1e-3)
    parts = LayerwiseClassifier(model)
    hidden_states = parts.embed(inputs)
    for position, index in enumerate(ORDER):
        hidden_states, _ = parts.run_layer(hidden_states, index, position)
    torch.testing.assert_close(parts.classify(hidden_states), expected)
    model.config.skipped_mlps = None
    assert torch.equal(model(**inputs, execution_order=ORDER).logits, whole)


@pytest.mark.parametrize("name", LAST_MAPS)
@torch.no_grad()
def test_families(name):
    model = randomize(free_model(ENCODERS[name])).eval()
    assert_same(model, with_zeros(model, [0, 3], LAST_MAPS[name]), ENCODERS[name].inputs())


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
@torch.no_grad()
def test_timm(monkeypatch, architecture):
    use_timm(monkeypatch)
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=4)
    config = TimmWrapperConfig(architecture=architecture, model_args=sizes, num_labels=5)
    model = ls.free_order(randomize(TimmWrapperForImageClassification(config))).eval()
    assert_same(model, with_zeros(model, [0, 3], "mlp.fc2"), {"pixel_values": IMAGES})


@torch.no_grad()
def test_with_depth_embedding_and_position_predictor():
    model = make_vit(depth_embedding=True, position_predictor=True)
    assert_same(model, with_zeros(model, [0, 3], "mlp.fc2"), {"pixel_values": IMAGES})


@torch.no_grad()
def test_the_mlp_does_not_run_and_hooks_see_the_layer():
    model = make_vit(skipped_mlps=SKIPPED)
    runs = []
    for index, layer in enumerate(model.free_layers.children()):
        layer.register_forward_hook(lambda *_, index=index: runs.append(("layer", index)))
        layer.mlp.register_forward_hook(lambda *_, index=index: runs.append(("mlp", index)))
    output = model(IMAGES, output_hidden_states=True)
    assert runs == [("mlp", 0), ("layer", 0), ("layer", 1), ("layer", 2), ("mlp", 3), ("layer", 3)]
    assert len(output.hidden_states) == 5


@torch.no_grad()
def test_examples_leave_early_without_mlps_too():
    model = make_vit(skipped_mlps=SKIPPED)
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    output = model(images, exit_threshold=0.7)
    assert len(set(output.num_layers_run.tolist())) > 1
    for index, depth in enumerate(output.num_layers_run.tolist()):
        expected = model(images, execution_order=list(range(depth))).logits[index]
        torch.testing.assert_close(output.logits[index], expected, rtol=1e-5, atol=1e-5)


def test_in_training_all_mlps_run():
    model, whole = make_vit(skipped_mlps=SKIPPED).train(), make_vit().train()
    model(IMAGES, labels=torch.tensor([0, 1, 2])).loss.backward()
    whole(IMAGES, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert torch.equal(model.free_layers[1].mlp.fc1.weight.grad, whole.free_layers[1].mlp.fc1.weight.grad)


@torch.no_grad()
def test_it_travels_with_the_weights(tmp_path):
    model = make_vit(skipped_mlps=SKIPPED)
    model.save_pretrained(tmp_path)
    loaded = ls.load_classifier(tmp_path)
    assert loaded.config.skipped_mlps == SKIPPED
    assert torch.equal(loaded(IMAGES).logits, model(IMAGES).logits)


@torch.no_grad()
def test_compiled_models_run_such_a_call_uncompiled():
    model = make_vit(skipped_mlps=SKIPPED)
    expected = model(IMAGES).logits
    for layer in model.free_layers.children():
        layer.compile(backend="eager")
    torch.testing.assert_close(model(IMAGES).logits, expected)
    whole = torch.compile(make_vit(skipped_mlps=SKIPPED), backend="eager")
    torch.testing.assert_close(whole(IMAGES).logits, expected)


@torch.no_grad()
def test_threads_do_not_disturb_each_other():
    """A layer without its MLP is a copy; the model's own stays whole."""
    model = make_vit()
    layer = model.free_layers[0]
    states = torch.randn(2, 5, 32)
    expected = layer(states)
    with_none = without_mlp(layer)
    found = []
    threads = [threading.Thread(target=lambda: found.append(layer(states))) for _ in range(4)]
    for thread in threads:
        thread.start()
    with_none(states)
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, expected) for each in found)
    assert with_none.attention is layer.attention and sum(1 for _ in layer.mlp.parameters()) == 4


@pytest.mark.parametrize("value", [[-1], [1, 1], [1.0], [True], "1", 2, {1}], ids=str)
def test_bad_values(value):
    with pytest.raises(ValueError, match=r"`skipped_mlps` is .*a list of distinct positions"):
        make_vit(skipped_mlps=value)


def test_positions_beyond_the_last():
    with pytest.raises(ValueError, match="holds position 4, and the execution order has the positions 0 to 3"):
        make_vit(skipped_mlps=[1, 4])
    assert make_vit(skipped_mlps=[4], execution_order=[0, 1, 2, 3, 3]).config.skipped_mlps == [4]


def test_what_changes_the_layers_forgets_it(tmp_path):
    model = make_vit(skipped_mlps=SKIPPED)
    assert ls.prune_layers(copy.deepcopy(model), [0, 1, 3]).config.skipped_mlps is None
    with pytest.raises(ValueError, match=r"`config.skipped_mlps` is \[1, 2\], and a layer of a plain model"):
        to_plain_vit(model)
    model.config.skipped_mlps = None
    to_plain_vit(model)


def test_layers_that_have_none_or_were_changed():
    with pytest.raises(ValueError, match="A Linear has no MLP by the name of mlp, ffn, feed_forward"):
        without_mlp(nn.Linear(2, 2))
    layer = make_vit().free_layers[0]
    layer.forward = lambda states: states
    with pytest.raises(ValueError, match="forward of this ViTLayer was replaced"):
        without_mlp(layer)


SIZES = {"vocab_size": 30, "num_labels": 3, "pad_token_id": 0}
OF_BERT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
REFUSED = {
    "Bloom": (SIZES | {"hidden_size": 16, "n_layer": 3, "n_head": 2}, "its MLP gets more than hidden states"),
    "Mpt": (
        SIZES | {"d_model": 16, "n_layers": 3, "n_heads": 2, "max_seq_len": 32},
        "its MLP gets more than hidden states",
    ),
    "IBert": (SIZES | OF_BERT, "its MLP gets more than hidden states"),
    "MobileBert": (
        SIZES | OF_BERT | {"hidden_size": 32, "embedding_size": 16, "intra_bottleneck_size": 16},
        "its `ffn` is several modules",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_mlps_that_do_more_are_refused(name):
    sizes, why = REFUSED[name]
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = ls.free_order(getattr(transformers, f"{name}ForSequenceClassification")(config)).eval()
    tokens = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=tokens)
    model.config.skipped_mlps = [1]
    with pytest.raises(ValueError, match=f"does not run without its MLP: {why}.*`config.skipped_mlps` to None"):
        model(input_ids=tokens)
    with pytest.raises(ValueError, match=f"does not run without its MLP: {why}"):
        without_mlp(model.free_layers[0])  # before it runs


class OwnResidual(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.inner = mlp

    def forward(self, hidden_states):
        return hidden_states + self.inner(hidden_states)


class AddingLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = OwnResidual(nn.Linear(4, 4))

    def forward(self, hidden_states):
        return self.mlp(hidden_states)


class TupleLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(4, 4)

    def forward(self, hidden_states):
        more, _ = self.mlp(hidden_states)
        return hidden_states + more


def test_a_layer_that_gives_nothing_without_its_mlp_is_refused():
    states = torch.randn(3, 5, 4)
    for layer, why in ((AddingLayer(), "adds the hidden states itself"), (TupleLayer(), "too many values to unpack")):
        with pytest.raises(ValueError, match=f"A {type(layer).__name__} does not run without its MLP: .*{why}"):
            without_mlp(layer)(states)


def test_what_cannot_be_seen_is_looked_at_later():
    layer = AddingLayer()
    assert without_mlp(layer)(torch.zeros(2, 3, 4)).eq(0).all()  # no token differs
    with pytest.raises(ValueError, match="adds the hidden states itself"):
        without_mlp(layer)(torch.randn(2, 3, 4))


def test_a_layer_that_is_without_its_mlp_stays_so():
    layer = make_vit().free_layers[0]
    once = without_mlp(layer)
    assert without_mlp(once) is once and without_mlp(layer) is not layer
