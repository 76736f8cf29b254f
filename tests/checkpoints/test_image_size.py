"""Models for images of another size: their logits are the first model's with interpolated position embeddings."""

import inspect

import pytest
import torch
import transformers
from support.models import randomize

import hf_layershuffle as ls
from hf_layershuffle.checkpoints.image_size import image_size_of, why_not_images_of, with_image_size
from hf_layershuffle.models.configuration_layershuffle import encoder_config


SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)
FLAT = {**SIZES, "intermediate_size": 64, "num_labels": 5}
TEXT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
TOWERS = {"vision_config": {**SIZES, "intermediate_size": 64}, "text_config": TEXT, "num_labels": 5}
FAMILIES = {
    "ViT": FLAT,
    "DeiT": FLAT,
    "ViTMSN": FLAT,
    "IJepa": FLAT,
    "Dinov2": {**SIZES, "mlp_ratio": 2, "num_labels": 5},
    "Dinov2WithRegisters": {**SIZES, "mlp_ratio": 2, "num_labels": 5},
    "Beit": {**FLAT, "use_relative_position_bias": True, "drop_path_rate": 0.0},
    "Beit absolute": {**FLAT, "use_absolute_position_embeddings": True, "use_shared_relative_position_bias": True},
    "Data2VecVision": {**FLAT, "use_relative_position_bias": True, "drop_path_rate": 0.0},
    "CLIP": TOWERS,
    "Siglip": TOWERS,
    "MetaClip2": TOWERS,
}
IMAGES = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def plain(family: str):
    torch.manual_seed(0)
    family, config = family.split()[0], FAMILIES[family]
    model = getattr(transformers, f"{family}ForImageClassification")
    return randomize(model(getattr(transformers, f"{family}Config")(**config))).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_resized_model_is_the_model_with_interpolated_positions_bit_for_bit(family, tmp_path):
    model = plain(family)
    free = ls.free_order(plain(family), shuffle_mode="arbitrary", depth_embedding=True, position_predictor=True)
    resized = with_image_size(free, 24)
    takes = why_not_images_of(model, (3, 24, 24)) is None  # without being asked to
    asked = (
        {}
        if takes and "interpolate" not in str(inspect.signature(model.forward))
        else {"interpolate_pos_encoding": True}
    )
    expected = model(IMAGES, **asked).logits
    assert torch.equal(resized(IMAGES).logits, expected)
    assert image_size_of(resized.config) == 24 and image_size_of(free.config) == 16
    resized.save_pretrained(tmp_path)
    loaded = ls.load_classifier(str(tmp_path)).eval()
    assert torch.equal(loaded(IMAGES, execution_order=[1, 0]).logits, resized(IMAGES, execution_order=[1, 0]).logits)
    assert torch.equal(transformers.AutoModelForImageClassification.from_pretrained(tmp_path)(IMAGES).logits, expected)
    pruned = ls.prune_layers(loaded, [1])
    assert torch.equal(pruned(IMAGES).logits, resized(IMAGES, execution_order=[1]).logits)
    assert with_image_size(resized, 24) is resized


def test_sizes_that_cannot_be_are_refused():
    model = ls.free_order(plain("ViT"))
    with pytest.raises(
        ValueError, match="`image_size` is 30, which the patch of 4 pixels does not divide; choose 28 or"
    ):
        with_image_size(model, 30)
    config = transformers.BertConfig(
        vocab_size=10, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(ValueError, match="`image_size` is 24, and BertForSequenceClassification has none to change"):
        with_image_size(transformers.BertForSequenceClassification(config), 24)


def test_a_family_that_cannot_interpolate_is_refused(monkeypatch):
    model = ls.free_order(plain("ViT"))
    monkeypatch.delattr(type(model.vit.embeddings), "interpolate_pos_encoding")
    with pytest.raises(
        ValueError, match="`image_size` is 24, and LayerShuffleViTForImageClassification takes images of"
    ):
        with_image_size(model, 24)
    assert encoder_config(model.config).image_size == 16
