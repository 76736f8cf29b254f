"""Models that `free_order` changes in place where accelerate or a quantization has changed them before."""

import copy
from types import MethodType

import pytest
import torch
import transformers
from accelerate import dispatch_model
from support.models import randomize
from support.trainers import RandomImages
from torch import nn

import hf_layershuffle as ls


SIZES = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
OTHERS = {"vit.embeddings": "cpu", "vit.layernorm": "cpu", "classifier": "cpu"}
# What a device map names gets a forward with a hook
DEVICE_MAPS = {
    "encoder": {"vit": "disk", "classifier": "cpu"},
    "list of layers": {"vit.layers": "disk", **OTHERS},
    "layers": {**{f"vit.layers.{index}": "disk" for index in range(4)}, **OTHERS},
}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=5)
    randomize(transformers.ViTForImageClassification(config)).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def load(folder, model_class=transformers.AutoModelForImageClassification, **kwargs):
    return model_class.from_pretrained(folder, offload_folder=str(folder / "offloaded"), **kwargs).eval()


@torch.no_grad()
@pytest.mark.parametrize("where", DEVICE_MAPS)
def test_an_offloaded_model_follows_the_order(folder, where):
    whole = ls.free_order(load(folder))
    model = ls.free_order(load(folder, device_map=DEVICE_MAPS[where]))
    assert any(parameter.is_meta for parameter in model.parameters())
    outputs = model(IMAGES, execution_order=[3, 1])
    expected = whole(IMAGES, execution_order=[3, 1])
    assert outputs.execution_order.tolist() == [3, 1]
    torch.testing.assert_close(outputs.logits, expected.logits)
    early = [each(IMAGES, exit_threshold=0.0).num_layers_run.tolist() for each in (model, whole)]
    assert early[0] == early[1]
    model.config.execution_order = [3, 1]
    torch.testing.assert_close(model(IMAGES).logits, expected.logits)


@torch.no_grad()
def test_an_offloaded_encoder_follows_the_order(folder):
    kwargs = {"add_pooling_layer": False, "model_class": transformers.AutoModel}
    whole = ls.free_order(load(folder, **kwargs))
    device_map = {"embeddings": "cpu", "layers": "disk", "layernorm": "cpu"}
    model = ls.free_order(load(folder, device_map=device_map, **kwargs))
    outputs = model(IMAGES, execution_order=[3, 1])
    assert outputs.execution_order.tolist() == [3, 1]
    torch.testing.assert_close(outputs[0], whole(IMAGES, execution_order=[3, 1])[0])


@torch.no_grad()
def test_layers_with_hooks_are_told_their_position(folder):
    flags = {"depth_embedding": True, "position_predictor": True}
    whole = ls.free_order(load(folder), **flags)
    device_map = dict.fromkeys(DEVICE_MAPS["layers"], "cpu")
    model = ls.free_order(dispatch_model(load(folder), device_map, force_hooks=True), **flags)
    assert "_old_forward" in vars(model.free_layers[0])
    model.load_state_dict(randomize(whole).state_dict())
    outputs, expected = (each(IMAGES, execution_order=[3, 1]) for each in (model, whole))
    torch.testing.assert_close(outputs.logits, expected.logits)
    torch.testing.assert_close(outputs.position_logits, expected.position_logits)


@torch.no_grad()
@pytest.mark.parametrize("position_predictor", [False, True])
def test_a_model_with_hooks_becomes_a_plain_one(folder, position_predictor):
    device_map = dict.fromkeys(DEVICE_MAPS["layers"], "cpu")
    hooked = dispatch_model(load(folder), device_map, force_hooks=True)
    model = ls.free_order(hooked, position_predictor=position_predictor)
    expected = model(IMAGES, execution_order=[3, 1]).logits
    torch.testing.assert_close(ls.to_plain_vit(model, [3, 1])(IMAGES).logits, expected)


def test_offloaded_layers_get_no_modules(folder):
    model = load(folder, device_map=DEVICE_MAPS["layers"])
    with pytest.raises(
        ValueError, match=r"`depth_embedding` is True, and layers of this .* Load it by `LayerShuffleViT"
    ):
        ls.free_order(model, depth_embedding=True)
    assert type(ls.free_order(model)) is ls.LayerShuffleViTForImageClassification  # nothing was changed before


@pytest.mark.parametrize("which", ["", "vit"])
def test_a_forward_that_was_replaced_is_refused(folder, which):
    model = load(folder)
    module = model.get_submodule(which)
    module.forward = MethodType(type(module).forward, module)
    with pytest.raises(ValueError, match=r"The forward of this ViT\w+ was replaced, as `Accelerator.prepare` does"):
        ls.free_order(model)
    assert not isinstance(model.config, ls.LayerShuffleViTConfig)


def test_a_plain_model_is_evaluated_and_exported_after_training_in_half_precision(vit, tmp_path):
    """Whose forward accelerate has replaced."""
    args = transformers.TrainingArguments(tmp_path, max_steps=1, bf16=True, use_cpu=True, report_to="none")
    trainer = transformers.Trainer(vit.plain_classifier(), args, train_dataset=RandomImages())
    trainer.train()
    trained = trainer.model.eval()
    images = torch.randn(3, 3, 8, 8)
    exported = ls.to_plain_vit(trained, [2, 1])
    layerwise = ls.LayerwiseClassifier(trained)
    hidden_states = layerwise.embed(images)
    for position, index in enumerate([2, 1]):
        hidden_states, _ = layerwise.run_layer(hidden_states, index, position)
    with torch.no_grad():
        torch.testing.assert_close(exported(images).logits, layerwise.classify(hidden_states))
    assert "_original_forward" in vars(trained)


class PackedLinear(nn.Module):
    """A linear map whose weights are numbers of 8 bits that hold two of 4, as of a quantized model."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.unpacked = [linear.weight.detach()]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.unpacked[0])


@torch.no_grad()
def test_quantized_layers_get_modules_of_the_type_in_which_they_compute():
    config = transformers.LlamaConfig(**SIZES, vocab_size=50)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, PackedLinear(child))
    ids = torch.tensor([[5, 6, 7]])
    expected = ls.free_order(copy.deepcopy(model))(ids, execution_order=[2, 1]).logits
    model = ls.free_order(model, depth_embedding=True, position_predictor=True)
    assert model.free_layers[0].depth_projection.dense.weight.dtype == torch.bfloat16
    assert torch.equal(model(ids, execution_order=[2, 1]).logits, expected)  # they begin by adding nothing
