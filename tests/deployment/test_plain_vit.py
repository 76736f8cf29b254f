"""Plain ViTs made of models with free order."""

import json
import shutil

import pytest
import torch
from conftest import of_both_architectures
from huggingface_hub import metadata_load
from support.cards import describe
from transformers import AutoModelForImageClassification, pipeline

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
