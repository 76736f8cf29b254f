"""Sizes of models from scratch, in the fields of each family's configuration."""

import pytest
import transformers

from hf_layershuffle.training.argument_parser import parse_arguments
from hf_layershuffle.training.model_sizes import scratch_values


def values(architecture: str, *arguments: str) -> dict:
    args, _, _ = parse_arguments(["--architecture", architecture, *arguments, "--use_cpu"])
    kind = "timm_wrapper" if architecture.startswith("timm/") else architecture
    return scratch_values(transformers.CONFIG_MAPPING[kind], args, (8, 8))


def test_a_tower_gets_the_sizes_and_the_tower_that_is_not_used_is_small():
    made = values("siglip", "--hidden_size", "32", "--residual_init_scale", "0")
    assert made["vision_config"]["hidden_size"] == 32 and made["vision_config"]["image_size"] == 8
    assert made["text_config"]["num_hidden_layers"] == 1 and made["residual_init_scale"] == 0
    assert "hidden_dropout_prob" not in made["vision_config"]
    config = transformers.SiglipConfig(**made)
    assert config.vision_config.num_hidden_layers == 6


def test_families_say_the_width_of_the_mlp_and_positions_in_their_own_ways():
    assert values("dinov2", "--intermediate_size", "128")["mlp_ratio"] == 2
    assert "mlp_ratio" not in values("vit") and values("vit")["intermediate_size"] == 256
    beit = values("beit")
    assert beit["use_relative_position_bias"] and beit["use_absolute_position_embeddings"]
    assert beit["drop_path_rate"] == 0.0
    assert "initializer_range" not in values("siglip", "--preset", "order-free")["vision_config"]


def test_timms_own_sizes_count_unless_they_are_given():
    made = values("timm/vit_tiny_patch16_224", "--num_hidden_layers", "4", "--preset", "order-free")
    assert made["architecture"] == "vit_tiny_patch16_224" and made["residual_init_scale"] == 0
    assert made["model_args"] == {"img_size": 8, "patch_size": 2, "in_chans": 3, "depth": 4}
    sizes = ("--hidden_size", "32", "--intermediate_size", "64", "--num_channels", "1")
    given = values("timm/vit_tiny_patch16_224", *sizes)["model_args"]
    assert given["mlp_ratio"] == 2.0 and given["embed_dim"] == 32 and given["in_chans"] == 1


@pytest.mark.parametrize(
    "architecture, arguments, message",
    [
        (
            "resnet",
            [],
            "`architecture` is 'resnet', whose configuration has no `image_size`.* take a vision transformer",
        ),
        ("swin", [], "`architecture` is 'swin', whose configuration has no `hidden_size`"),
        ("convnext", [], "`architecture` is 'convnext', whose configuration has no `hidden_size`"),
        ("siglip2", [], "`architecture` is 'siglip2', whose models take lists of patches .* such as siglip"),
        (
            "dinov2",
            ["--intermediate_size", "100"],
            "`intermediate_size` is 100, .* choose 64, or another multiple of 64",
        ),
        (
            "siglip",
            ["--hidden_dropout_prob", "0.1"],
            "`hidden_dropout_prob` is 0.1, which models of type 'siglip' do not",
        ),
        (
            "siglip",
            ["--initializer_range", "0.1"],
            "`initializer_range` is 0.1, which models of type 'siglip' do not have",
        ),
        ("beit", ["--image_size", "8", "--patch_size", "3"], "`patch_size` is 3; it must divide the image size 8"),
        ("timm/vit_tiny_patch16_224", ["--intermediate_size", "9"], "`intermediate_size` is 9 without a width"),
        ("timm/vit_tiny_patch16_224", ["--hidden_dropout_prob", "0.1"], "`hidden_dropout_prob` is 0.1, which timm's"),
    ],
)
def test_what_a_family_does_not_have_is_named(architecture, arguments, message):
    with pytest.raises(ValueError, match=message):
        values(architecture, *arguments)
