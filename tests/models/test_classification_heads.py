"""Image classifiers of families of which transformers has the encoder only."""

import inspect
import json

import pytest
import torch
import transformers
from conftest import run_python
from transformers import AutoModelForImageClassification

import hf_layershuffle as ls
from hf_layershuffle.models.classification_heads import HEADS, plain_class_of


SIZES = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, num_labels=5)
IMAGES = dict(image_size=16, patch_size=4)


def config_of(model_type: str, **values):
    plain = transformers.AutoConfig.for_model(model_type).__class__
    images = IMAGES if model_type != "siglip2_vision_model" else dict(patch_size=4, num_patches=16)
    return plain(**SIZES, **images, **values)


def inputs_of(model_type: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    if model_type != "siglip2_vision_model":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    return {
        "pixel_values": torch.randn(3, 16, 48, generator=generator),
        "pixel_attention_mask": torch.ones(3, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * 3),
    }


def classifier(model_type: str, **flags):
    torch.manual_seed(0)
    model = ls.LayerShuffleAutoModelForImageClassification.from_config(config_of(model_type), **flags)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("model_type", HEADS)
def test_the_head_reads_what_the_authors_evaluate(model_type):
    model, inputs, head = classifier(model_type), inputs_of(model_type), HEADS[model_type]
    assert type(model).__name__ == f"LayerShuffle{head.name}"
    noise = {"noise": torch.arange(16.0).expand(3, -1)} if model_type == "vit_mae" else {}
    for order in ([0, 1, 2, 3], [2, 0, 3]):
        encoded = model.backbone(**inputs, **noise, execution_order=order)
        patches = encoded.last_hidden_state[:, 1:].mean(1)
        features = patches if model_type == "vit_mae" else encoded[head.reads]
        assert torch.equal(model(**inputs, execution_order=order).logits, model.classifier(features))
    assert encoded.last_hidden_state.shape[1] >= 16  # no patch is left out
    assert not torch.equal(model(**inputs).logits, model(**inputs, execution_order=[2, 0, 3]).logits)


@pytest.mark.parametrize("model_type", HEADS)
def test_it_takes_the_weights_of_an_encoder_and_is_saved_as_a_classifier(model_type, tmp_path):
    inputs, head = inputs_of(model_type), HEADS[model_type]
    torch.manual_seed(1)
    encoder = getattr(transformers, head.encoder)(config_of(model_type))
    encoder.save_pretrained(tmp_path / "encoder")
    names = [f"class {number}" for number in range(7)]
    model, found = ls.LayerShuffleAutoModelForImageClassification.from_pretrained(
        tmp_path / "encoder", id2label=dict(enumerate(names)), shuffle_mode="arbitrary", output_loading_info=True
    )
    assert found["missing_keys"] == {"classifier.weight", "classifier.bias"} and not found["unexpected_keys"]
    weights = model.backbone.state_dict()
    assert all(torch.equal(weights[key], tensor) for key, tensor in encoder.state_dict().items())
    output = model.train()(**inputs, labels=torch.tensor([0, 6, 3]))
    output.loss.backward()
    assert sorted(output.execution_order.tolist()) == [0, 1, 2, 3]
    assert torch.equal(output.loss, torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 6, 3])))
    model.eval().save_pretrained(tmp_path / "saved")
    auto_map = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageClassification"] == f"modeling_layershuffle.LayerShuffle{head.name}"
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    assert type(again) is type(model) and torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert type(ls.load_classifier(str(tmp_path / "saved"))) is type(model)


def test_it_is_loaded_without_the_package(tmp_path):
    model = classifier("clip_vision_model")
    model.save_pretrained(tmp_path)
    program = f"""
import sys, torch, transformers
model = transformers.AutoModelForImageClassification.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()
assert "hf_layershuffle" not in sys.modules
images = torch.ones(1, 3, 16, 16)
print(model(images, execution_order=[3, 1]).logits.sum().item())
"""
    printed = run_python(program).stdout.split()[-1]
    with torch.no_grad():
        expected = model(torch.ones(1, 3, 16, 16), execution_order=[3, 1]).logits.sum().item()
    assert float(printed) == pytest.approx(expected, abs=1e-5)


def test_the_vision_tower_of_a_two_tower_checkpoint_is_taken(tmp_path):
    tower = {key: value for key, value in SIZES.items() if key != "num_labels"}
    config = transformers.CLIPConfig(
        vision_config=dict(**tower, **IMAGES), text_config=dict(**tower, vocab_size=50, max_position_embeddings=16)
    )
    plain = transformers.CLIPModel(config)
    plain.save_pretrained(tmp_path)
    model = ls.LayerShuffleCLIPVisionForImageClassification.from_pretrained(tmp_path, num_labels=3)
    layer = plain.vision_model.encoder.layers[2].mlp.fc1.weight
    assert torch.equal(model.free_layers.get_submodule("2").mlp.fc1.weight, layer)


def test_without_its_pooling_the_mean_of_the_tokens_is_read():
    model = ls.LayerShuffleAutoModelForImageClassification.from_config(config_of("aimv2_vision_model", use_head=False))
    images = inputs_of("aimv2_vision_model")
    with torch.no_grad():
        features = model.eval().backbone(**images).last_hidden_state.mean(1)
        assert torch.equal(model(**images).logits, model.classifier(features))


def test_a_tuple_and_no_images():
    model = classifier("dinov3_vit")
    images = inputs_of("dinov3_vit")["pixel_values"]
    with torch.no_grad():
        logits = model(images, return_dict=False)[0]
        assert torch.equal(logits, model(images).logits)
    with pytest.raises(ValueError, match="`pixel_values` is None; pass images"):
        model()


def test_only_families_without_a_classifier_have_one_here():
    for head in HEADS.values():
        assert not hasattr(transformers, head.name)
        assert plain_class_of(head.name).__name__ == head.name
    assert plain_class_of("ViTForImageClassification") is transformers.ViTForImageClassification
    assert plain_class_of("NoSuchForImageClassification") is None


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["dinov3_vit", "clip_vision_model"])
def test_depth_vectors_are_found_however_deep_the_encoder_is(model_type, tmp_path):
    flags = {"depth_embedding": True, "position_predictor": True, "residual_init_scale": 0.0}
    model, inputs = classifier(model_type, **flags), inputs_of(model_type)
    assert sum("depth_embedding" in name for name, _ in model.named_parameters()) == 1
    sequential = model(**inputs, execution_order=[0, 1])
    assert sequential.position_logits.shape == (3, 2, 4)
    assert not torch.equal(sequential.logits, model(**inputs, execution_order=[1, 0]).logits)
    pruned = ls.prune_layers(model, [2, 0]).eval()
    assert pruned._depth_embedding.num_embeddings == 2
    pruned.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, model(**inputs, execution_order=[2, 0]).logits)


def test_there_is_no_plain_export_of_a_family_without_a_plain_classifier():
    with pytest.raises(ValueError, match="transformers has no image classifier of the family 'dinov3_vit'"):
        ls.to_plain_vit(classifier("dinov3_vit"))


def test_a_configuration_that_is_given_stays_as_it_is():
    config = config_of("vit_mae", mask_ratio=0.75)
    assert ls.LayerShuffleAutoModelForImageClassification.from_config(config).config.mask_ratio == 0.0
    own = ls.LayerShuffleViTMAEConfig(**SIZES, **IMAGES, mask_ratio=0.75)
    model = ls.LayerShuffleViTMAEForImageClassification(own)
    assert config.mask_ratio == own.mask_ratio == 0.75 and model.config.mask_ratio == 0.0


def test_a_checkpoint_of_pretraining_gives_its_encoder(tmp_path):
    """Those of ViT-MAE on the Hub are such: the encoder has a prefix, and there is a decoder beside it."""
    decoder = {f"decoder_{name}": SIZES[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
    pretrained = transformers.ViTMAEForPreTraining(config_of("vit_mae", **decoder, decoder_num_hidden_layers=1))
    pretrained.save_pretrained(tmp_path / "pretrained")
    for name in ("pretrained", "saved"):
        model = ls.LayerShuffleAutoModelForImageClassification.from_pretrained(tmp_path / name, num_labels=5)
        stored = model.backbone.state_dict()
        assert all(torch.equal(tensor, stored[key]) for key, tensor in pretrained.vit.state_dict().items())
        model.save_pretrained(tmp_path / "saved")


def test_its_signature_names_the_inputs_of_its_encoder():
    names = inspect.signature(ls.LayerShuffleSiglip2VisionForImageClassification.forward).parameters
    assert {"pixel_values", "pixel_attention_mask", "spatial_shapes", "labels", "execution_order"} <= set(names)
