"""Plain ViTs made of models with free order."""

import json
import shutil

import pytest
import torch
from conftest import of_both_architectures
from huggingface_hub import metadata_load
from support.cards import describe
from transformers import (
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    SiglipConfig,
    SiglipForImageClassification,
    pipeline,
)

import hf_layershuffle as ls
from hf_layershuffle.deployment.plain_vit import to_plain_vit
from hf_layershuffle.hub.model_card import write_model_card
from hf_layershuffle.hub.plain_vit_folder import save_plain_vit
from hf_layershuffle.hub.published_files import check_folder, published_files


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A folder with everything that a card can show."""
    return describe(tmp_path_factory.mktemp("models") / "vit-tiny")


@pytest.fixture
def folder(described, tmp_path):
    return shutil.copytree(described, tmp_path / "vit-tiny")


@of_both_architectures
@pytest.mark.parametrize("order", [None, "sequential", [3, 1, 0, 2], [2, 0], [1, 1, 3, 0, 2, 2]])
@pytest.mark.parametrize("position_predictor", [False, True])
def test_a_plain_vit_gives_the_same_logits(architecture, batch, order, position_predictor):
    model = architecture.classifier(
        shuffle_mode="arbitrary", position_predictor=position_predictor, layerdrop=0.5
    ).eval()
    model.config.execution_order = [1, 2, 3]
    plain = to_plain_vit(model, order)
    assert type(plain) is architecture.plain_classifier_class and not plain.training
    expected = model(batch["pixel_values"], execution_order=order).logits
    assert torch.equal(plain(batch["pixel_values"]).logits, expected)
    assert not any("position_head" in name for name in plain.state_dict())
    # copies: training one leaves the other
    with torch.no_grad():
        plain.base_model.layers[0].layernorm_before.weight.add_(1)
    assert torch.equal(model(batch["pixel_values"], execution_order=order).logits, expected)


def test_a_model_with_depth_embedding_is_no_plain_vit(vit):
    with pytest.raises(ValueError, match=r"`depth_embedding=True` cannot become a plain ViT.*trust_remote_code"):
        to_plain_vit(vit.classifier(depth_embedding=True))


def test_a_plain_vit_needs_one_fixed_order(vit):
    model = vit.classifier(execution_order="arbitrary")
    with pytest.raises(ValueError, match="'arbitrary', another one in each forward"):
        to_plain_vit(model)
    with pytest.raises(ValueError, match="holds 7 at position 0"):
        to_plain_vit(model, [7])
    assert to_plain_vit(model, [0]).config.num_hidden_layers == 1


def test_all_parts_of_a_plain_vit_have_its_configuration(vit, batch):
    plain = to_plain_vit(vit.classifier().eval(), [3, 1, 1, 0, 2])
    configs = [module.config for module in plain.modules() if hasattr(module, "config")]
    assert len(configs) > 5 and all(config is plain.config for config in configs)
    plain.set_attn_implementation("eager")
    assert len(plain(batch["pixel_values"], output_attentions=True).attentions) == 5


def test_a_plain_model_with_towers_can_have_free_order_again(batch):
    sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
    config = SiglipConfig(vision_config=dict(**sizes, image_size=8, patch_size=4), text_config=sizes, num_labels=5)
    model = ls.free_order(SiglipForImageClassification(config).eval())
    plain = to_plain_vit(model, [3, 1])
    assert plain.vision_model.config is plain.config.vision_config
    assert model.config.vision_config.num_hidden_layers == model.vision_model.config.num_hidden_layers == 4
    expected = model(batch["pixel_values"], execution_order=[1, 3]).logits
    found = ls.free_order(plain)(batch["pixel_values"], execution_order=[1, 0]).logits
    assert torch.equal(found, expected)


def test_a_plain_decoder_numbers_its_layers_anew():
    sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
    config = LlamaConfig(**sizes, vocab_size=100, pad_token_id=0)
    model, words = ls.free_order(LlamaForSequenceClassification(config).eval()), torch.randint(5, 90, (2, 12))
    plain = to_plain_vit(model, [3, 1, 3])
    assert [layer.self_attn.layer_idx for layer in plain.model.layers] == [0, 1, 2]
    expected = model(words, execution_order=[3, 1, 3]).logits
    torch.testing.assert_close(plain(words, use_cache=True).logits, expected)


def test_a_saved_plain_vit_is_an_ordinary_model(folder, tmp_path, batch):
    target = tmp_path / "plain"
    save_plain_vit(folder, target, source="org/vit-tiny", execution_order=[2, 0])
    write_model_card(target, repo_id="org/vit-tiny", revision="plain-vit")
    check_folder(target)
    files = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "export.json"}
    assert {name for name in published_files(target) if "/" not in name} == files
    assert "auto_map" not in json.loads((target / "config.json").read_text())
    model = ls.LayerShuffleViTForImageClassification.from_pretrained(folder).eval()
    plain = AutoModelForImageClassification.from_pretrained(target).eval()
    expected = model(batch["pixel_values"], execution_order=[2, 0]).logits
    torch.testing.assert_close(plain(batch["pixel_values"]).logits, expected)
    # its examples hold its own answers
    entry = metadata_load(target / "README.md")["widget"][0]
    (answer,) = pipeline("image-classification", model=str(target))(str(target / entry["src"]), top_k=1)
    assert entry["output"][0]["label"] == answer["label"]
    assert entry["output"][0]["score"] == pytest.approx(answer["score"], abs=1e-4)
