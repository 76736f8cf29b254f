"""Auto classes that choose the free-order class of a checkpoint."""

import pytest
import torch
import transformers
from transformers import AutoModel

import hf_layershuffle as ls


SIZES = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
TEXT = dict(vocab_size=100, max_position_embeddings=64)
AUDIO = dict(patch_size=4, max_length=32, num_mel_bins=16, frequency_stride=4, time_stride=4)
DINOV2 = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=2, image_size=16, patch_size=4)
VIDEO = dict(image_size=16, patch_size=4, num_frames=4, tubelet_size=2)
# Auto class: plain class, and configuration
CASES = {
    "LayerShuffleAutoModel": ("Dinov2Model", lambda: transformers.Dinov2Config(**DINOV2)),
    "LayerShuffleAutoModelForImageClassification": (
        "Dinov2ForImageClassification",
        lambda: transformers.Dinov2Config(**DINOV2),
    ),
    "LayerShuffleAutoModelForSequenceClassification": (
        "BertForSequenceClassification",
        lambda: transformers.BertConfig(**SIZES, **TEXT),
    ),
    "LayerShuffleAutoModelForAudioClassification": (
        "ASTForAudioClassification",
        lambda: transformers.ASTConfig(**SIZES, **AUDIO),
    ),
    "LayerShuffleAutoModelForVideoClassification": (
        "VideoMAEForVideoClassification",
        lambda: transformers.VideoMAEConfig(**SIZES, **VIDEO),
    ),
    "LayerShuffleAutoModelForCausalLM": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**SIZES, **TEXT)),
}


@pytest.mark.parametrize("auto_class", CASES)
def test_the_class_is_chosen_by_the_checkpoint(auto_class, tmp_path):
    name, config = CASES[auto_class]
    plain = getattr(transformers, name)(config())
    plain.save_pretrained(tmp_path / "plain")
    loader = getattr(ls, auto_class)
    model = loader.from_pretrained(tmp_path / "plain", shuffle_mode="arbitrary", execution_order=[2, 0])
    assert type(model).__name__ == f"LayerShuffle{name}" and model.config.shuffle_mode == "arbitrary"
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in plain.state_dict().items())
    model.save_pretrained(tmp_path / "ours")
    again = loader.from_pretrained(tmp_path / "ours", layerdrop=0.1)
    assert type(again) is type(model)
    assert again.config.execution_order == [2, 0] and again.config.layerdrop == 0.1
    made = loader.from_config(config(), depth_embedding=True)
    assert type(made) is type(model) and made.config.depth_embedding


def test_a_configuration_can_be_given(tmp_path):
    plain = transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2))
    plain.save_pretrained(tmp_path)
    config = transformers.Dinov2Config(**DINOV2, hidden_dropout_prob=0.5)
    model = ls.LayerShuffleAutoModel.from_pretrained(tmp_path, config=config, shuffle_mode="arbitrary")
    assert model.config.hidden_dropout_prob == 0.5 and model.config.shuffle_mode == "arbitrary"
    assert type(config) is transformers.Dinov2Config
    model, found = ls.LayerShuffleAutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert (
        ls.LayerShuffleAutoModel.from_config(config, attn_implementation="eager").config._attn_implementation
        == "eager"
    )


def test_what_has_no_such_class_is_refused_with_the_class_to_take(tmp_path):
    transformers.BertModel(transformers.BertConfig(**SIZES, **TEXT)).save_pretrained(tmp_path / "bert")
    with pytest.raises(
        ValueError, match=r"is a model of type 'bert', of which LayerShuffleAutoModelForImageClassific"
    ):
        ls.LayerShuffleAutoModelForImageClassification.from_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"take .*LayerShuffleAutoModelForSequenceClassification"):
        ls.LayerShuffleAutoModelForImageClassification.from_pretrained(tmp_path / "bert")
    swin = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2])
    swin.save_pretrained(tmp_path / "swin")  # refused before weights are looked for
    with pytest.raises(ValueError, match=r"swin' \('swin'\) cannot run its layers in any order"):
        ls.LayerShuffleAutoModelForImageClassification.from_pretrained(tmp_path / "swin")
    with pytest.raises(ValueError, match=r"SwinConfig .'swin'. cannot run its layers"):
        ls.LayerShuffleAutoModel.from_config(swin)


def test_bad_input_is_said_in_one_line(tmp_path):
    with pytest.raises(OSError, match="no-such-folder"):
        ls.LayerShuffleAutoModel.from_pretrained(str(tmp_path / "no-such-folder"))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(ValueError, match="no_such_type"):
        ls.LayerShuffleAutoModel.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"LayerShuffleAutoModel\.from_pretrained\(name_or_path\)"):
        ls.LayerShuffleAutoModel()
    plain = transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2))
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"argument 'shufle_mode'. Correct the argument, or leave it out"):
        ls.LayerShuffleAutoModel.from_pretrained(tmp_path / "plain", shufle_mode="arbitrary")
    with pytest.raises(ValueError, match="`shuffle_mode` is 'random'; it must be one of"):
        ls.LayerShuffleAutoModel.from_pretrained(tmp_path / "plain", shuffle_mode="random")


def test_the_auto_classes_of_transformers_load_what_they_saved(tmp_path):
    model = ls.LayerShuffleAutoModel.from_config(transformers.Dinov2Config(**DINOV2), shuffle_mode="arbitrary")
    model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is type(model)


def test_a_configurations_attention_is_kept_unless_another_is_asked_for(tmp_path):
    transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2)).save_pretrained(tmp_path)
    for given in (transformers.Dinov2Config, ls.LayerShuffleDinov2Config):
        config = given(**DINOV2, attn_implementation="eager", dtype="bfloat16")
        for made in (
            ls.LayerShuffleAutoModel.from_config(config),
            ls.LayerShuffleAutoModel.from_pretrained(tmp_path, config=config),
        ):
            assert made.config._attn_implementation == "eager"
        assert ls.LayerShuffleAutoModel.from_config(config).dtype is torch.bfloat16
        other = ls.LayerShuffleAutoModel.from_config(config, attn_implementation="sdpa")
        assert other.config._attn_implementation == "sdpa" and config._attn_implementation == "eager"


def test_each_tower_keeps_its_attention():
    config = transformers.CLIPConfig(
        vision_config=SIZES | {"image_size": 16, "patch_size": 4}, text_config=SIZES | TEXT,
        attn_implementation={"": "sdpa", "vision_config": "eager", "text_config": "sdpa"},
    )  # fmt: skip
    found = ls.LayerShuffleAutoModelForImageClassification.from_config(config).config
    assert (found.vision_config._attn_implementation, found._attn_implementation) == ("eager", "sdpa")


def test_an_adapter_is_loaded_with_its_base(tmp_path):
    peft = pytest.importorskip("peft")
    plain = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**DINOV2))
    plain.save_pretrained(tmp_path / "base")
    model = ls.LayerShuffleAutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model.add_adapter(peft.LoraConfig(target_modules=["fc1"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    again = ls.LayerShuffleAutoModelForImageClassification.from_pretrained(tmp_path / "adapter")
    assert type(again) is type(model)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.eval()(images).logits, model.eval()(images).logits)
    assert not torch.equal(again(images).logits, plain.eval()(images).logits)
