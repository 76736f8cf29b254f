"""Image processors of each family: new ones, those for another size, timm's, and those that do not fit."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support.images import random_images
from transformers import AutoImageProcessor

import hf_layershuffle as ls
from hf_layershuffle.checkpoints.image_processors import (
    check_fits,
    load_image_processor,
    new_image_processor,
    resized_image_processor,
    timm_image_processor,
)


CLASSES = {
    "vit": "ViT",
    "deit": "ViT",  # as runs of earlier versions have it
    "ijepa": "ViT",
    "vit_msn": "ViT",
    "timm_wrapper": "ViT",
    "dinov2": "Bit",
    "dinov2_with_registers": "Bit",
    "clip": "CLIP",
    "metaclip_2": "CLIP",
    "siglip": "Siglip",
    "beit": "Beit",
    "data2vec-vision": "Beit",
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
UNEQUAL = [*random_images(1, (16, 16)), *random_images(1, (20, 50)), *random_images(1, (41, 17))]


@pytest.mark.parametrize("model_type", CLASSES)
def test_a_new_one_is_of_the_familys_class_and_keeps_the_whole_image(model_type, tmp_path):
    processor = new_image_processor(f"layershuffle_{model_type}", 16, 3, **HALF)
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["image_processor_type"] == f"{CLASSES[model_type]}ImageProcessor"
    for loaded in (processor, AutoImageProcessor.from_pretrained(tmp_path), load_image_processor(tmp_path)):
        pixels = loaded(UNEQUAL, return_tensors="pt").pixel_values
        assert pixels.shape == (3, 3, 16, 16)
        expected = np.asarray(UNEQUAL[0]).transpose(2, 0, 1) / 127.5 - 1
        np.testing.assert_allclose(pixels[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("model_type", ["vit", "clip", "dinov2", "siglip", "beit"])
def test_a_new_one_for_grey_images_leaves_them_grey(model_type):
    processor = new_image_processor(model_type, 8, 1, image_mean=[0.5], image_std=[0.5])
    images = [np.asarray(image)[None] for image in random_images(2, (10, 10), mode="L")]
    assert processor(images, input_data_format="channels_first", return_tensors="pt").pixel_values.shape[1] == 1


def test_for_another_size_the_crop_is_as_large_a_part():
    cropping = transformers.BitImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})
    resized = resized_image_processor(cropping, 32)
    assert resized.size.shortest_edge == 40 and resized.crop_size.height == resized.crop_size.width == 32
    assert type(resized) is type(cropping) and resized.image_mean == cropping.image_mean
    assert cropping.size.shortest_edge == 20
    whole = resized_image_processor(new_image_processor("siglip", 16, 3, **HALF), 24)
    assert (whole.size.height, whole.size.width) == (24, 24)
    squashing = transformers.BeitImageProcessorPil(
        size={"height": 20, "width": 24}, crop_size={"height": 16, "width": 16}, do_center_crop=True
    )
    assert resized_image_processor(squashing, 32).size.width == 48
    for each in (resized, whole):
        assert each(UNEQUAL, return_tensors="pt").pixel_values.shape[2] == (32 if each is resized else 24)


# --- timm ---


TIMM = {
    "input_size": [3, 24, 24],
    "crop_pct": 0.75,
    "crop_mode": "center",
    "interpolation": "bilinear",
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
}


def test_timms_configuration_becomes_a_processor_that_does_what_timm_does():
    processor = timm_image_processor(TIMM)
    for image in UNEQUAL:
        width, height = image.size
        short = 32  # 24 / 0.75
        size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR), dtype=np.float32) / 255
        top, left = (round((side - 24) / 2) for side in resized.shape[:2])
        expected = (resized[top : top + 24, left : left + 24] - TIMM["mean"]) / TIMM["std"]
        pixels = processor(image, return_tensors="pt").pixel_values[0].numpy().transpose(1, 2, 0)
        if (size[0] - 24) % 2 == (size[1] - 24) % 2 == 0:  # else the middle is between two pixels
            np.testing.assert_allclose(pixels, expected, atol=1e-5)
    squash = timm_image_processor({**TIMM, "crop_mode": "squash", "input_size": [3, 24, 36]})
    assert (squash.size.height, squash.size.width, squash.crop_size.width) == (32, 48, 36)


@pytest.mark.parametrize("name, value", [("crop_mode", "border"), ("interpolation", "random")])
def test_what_timms_configuration_may_not_say_is_named(name, value):
    with pytest.raises(ValueError, match=f"`pretrained_cfg` of the model's config.json has .*'{value}'"):
        timm_image_processor({**TIMM, name: value})


def test_a_timm_checkpoint_has_a_processor_and_a_file_beside_it_counts_more(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit", "pretrained_cfg": TIMM}))
    processor = load_image_processor(tmp_path)
    assert type(processor).__name__.startswith("BitImageProcessor") and list(processor.image_mean) == TIMM["mean"]
    assert processor.crop_size.height == 24 and processor.resample == Image.Resampling.BILINEAR
    new_image_processor("siglip", 8, 3, **HALF).save_pretrained(tmp_path)
    assert type(load_image_processor(tmp_path)).__name__.startswith("SiglipImageProcessor")


# --- What does not fit ---


def classifier(family: str, **kwargs):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    return getattr(ls, f"LayerShuffle{family}ForImageClassification")(
        getattr(ls, f"LayerShuffle{family}Config")(**sizes, **kwargs)
    )


def test_a_processor_fits_by_the_images_it_gives_whatever_family_it_is_of():
    vit = classifier("ViT", intermediate_size=16)
    check_fits(new_image_processor("clip", 8, 3, **HALF), vit, "'m'")
    with pytest.raises(
        ValueError, match=r"'m' \(CLIPImageProcessor.*\) gives pixels of shape \(3, 16, 16\).* \(3, 8, 8\)"
    ):
        check_fits(new_image_processor("clip", 16, 3, **HALF), vit, "'m'")
    # DINOv2 interpolates by itself: its checkpoints say 518 pixels and are used with 224
    check_fits(new_image_processor("dinov2", 16, 3, **HALF), classifier("Dinov2", mlp_ratio=1), "'m'")
    with pytest.raises(ValueError, match="'m' takes lists of patches"):
        check_fits(transformers.Siglip2ImageProcessorPil(), vit, "'m'")
    assert vit.training and torch.is_grad_enabled()
