"""Families that were never tried, those that are refused, towers, and what writes into the residual stream."""

import copy
import logging

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

import hf_layershuffle as ls
from hf_layershuffle.models import order_check
from hf_layershuffle.models.families import REFUSED_FAMILIES, TESTED_FAMILIES
from hf_layershuffle.models.order_check import order_fault, residual_writers
from hf_layershuffle.models.small_copy import NUM_LAYERS, on_small_copy


SIZES = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
IMAGES = dict(image_size=16, patch_size=4)
TEXT = dict(vocab_size=100, max_position_embeddings=64)


@pytest.fixture
def warnings(monkeypatch):
    """What was said of families that were not tested; a new process as far as they are concerned."""
    said = []
    monkeypatch.setattr(order_check, "_TRIED", set())
    monkeypatch.setattr(order_check, "TESTED_FAMILIES", TESTED_FAMILIES - {"rembert"})
    monkeypatch.setattr(order_check.logger, "warning", lambda text, *args: said.append(text % args))
    return said


def rembert():
    return transformers.RemBertConfig(**SIZES, **TEXT, input_embedding_size=16, output_embedding_size=16)


def test_a_family_that_nobody_tried_is_tried_once_with_one_warning(warnings):
    before = torch.get_rng_state()
    model = transformers.RemBertModel(rembert()).eval()
    expected = torch.get_rng_state()
    torch.set_rng_state(before)
    made = ls.LayerShuffleRemBertModel
    own = made(made.config_class.from_dict(rembert().to_dict() | {"model_type": "layershuffle_rembert"}))
    assert torch.equal(torch.get_rng_state(), expected)  # trying changes no random number
    ls.free_order(model)
    assert warnings == [
        "'rembert' is a family that was not tested with free layer order. A small copy of it followed two execution "
        "orders exactly."
    ]
    assert own(torch.tensor([[5, 6]]), execution_order=[1, 0]).execution_order.tolist() == [1, 0]


def test_families_of_the_table_are_not_tried(warnings, monkeypatch):
    monkeypatch.setattr(order_check, "on_small_copy", None)  # not called
    ls.free_order(transformers.BertModel(transformers.BertConfig(**SIZES, **TEXT)))
    assert warnings == []


class PlacedViTModel(transformers.ViTModel):
    """A model that adds something between its layers, by their place."""

    def forward(self, pixel_values, return_dict=None):
        hidden_states = self.embeddings(pixel_values)
        layers = list(self.layers)
        for layer in layers:
            hidden_states = layer(hidden_states) + 0.1 * (layer is self.layers[0])
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=hidden_states)


class IndexedViTModel(transformers.ViTModel):
    def forward(self, pixel_values, return_dict=None):
        hidden_states = self.embeddings(pixel_values)
        for index in range(len(self.layers)):
            hidden_states = self.layers[index](hidden_states)
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=hidden_states)


class FailingViTModel(transformers.ViTModel):
    def forward(self, pixel_values, return_dict=None):
        hidden_states = self.embeddings(pixel_values)
        for layer in self.layers:
            if layer.attention.layer_number == 0 and not torch.equal(hidden_states, self.embeddings(pixel_values)):
                raise IndexError("the first layer is not the first")
            hidden_states = layer(hidden_states)
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=hidden_states)

    def __init__(self, config):
        super().__init__(config)
        for number, layer in enumerate(self.layers):
            layer.attention.layer_number = number


@pytest.mark.parametrize(
    ("plain", "fault"),
    [
        (
            PlacedViTModel,
            r"in the execution order \[2, 1, 0\] it computes something else than with layers that stand so",
        ),
        (IndexedViTModel, "its forward takes none of 3 layers by iterating their list"),
        (
            FailingViTModel,
            r"in the execution order \[2, 1, 0\] it fails \(IndexError: the first layer is not the first",
        ),
    ],
)
def test_what_the_trial_finds_is_refused(plain, fault, warnings, monkeypatch):
    monkeypatch.setattr(order_check, "TESTED_FAMILIES", TESTED_FAMILIES - {"vit"})
    model = plain(transformers.ViTConfig(**SIZES, **IMAGES))
    with pytest.raises(ValueError, match=f"{plain.__name__} cannot run its layers in any order: {fault}"):
        ls.free_order(model)
    assert type(model) is plain and type(model.config) is transformers.ViTConfig  # as it was
    monkeypatch.setenv("HF_LAYERSHUFFLE_CHECK_FAMILIES", "0")
    ls.free_order(model)
    assert warnings == []


def test_a_family_that_cannot_be_tried_says_so(warnings, monkeypatch):
    monkeypatch.setattr(order_check, "TESTED_FAMILIES", TESTED_FAMILIES - {"vit"})

    class OddViTModel(transformers.ViTModel):
        main_input_name = "odd_values"

    ls.free_order(OddViTModel(transformers.ViTConfig(**SIZES, **IMAGES)))
    assert len(warnings) == 1 and "It could not be tried out: no small OddViTModel could be run" in warnings[0]
    assert "no inputs are known for 'odd_values'" in warnings[0]


def test_all_tested_and_refused_families_exist():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert not TESTED_FAMILIES & REFUSED_FAMILIES.keys()
    assert TESTED_FAMILIES | REFUSED_FAMILIES.keys() <= CONFIG_MAPPING_NAMES.keys()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: transformers.SwinModel(
                transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1])
            ),
            r"SwinModel \('swin'\) cannot run its layers in any order: its layers stand in stages.*Take dinov2, vit",
        ),
        (
            lambda: transformers.AlbertModel(transformers.AlbertConfig(**SIZES, **TEXT, embedding_size=16)),
            "all its layers are one and the same, so there is no order to choose. Take bert or roberta",
        ),
        (
            lambda: transformers.YolosModel(
                transformers.YolosConfig(**SIZES, image_size=[16, 16], patch_size=4, num_detection_tokens=2)
            ),
            "adds position embeddings between its layers",
        ),
        (
            lambda: transformers.XLMModel(transformers.XLMConfig(n_words=50, emb_dim=32, n_layers=2, n_heads=4)),
            "its forward asks for its layers by their index",
        ),
        (
            lambda: transformers.T5EncoderModel(
                transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
            ),
            "its first layer computes position biases for all others",
        ),
    ],
)
def test_families_are_refused_by_name_with_what_to_take_instead(make, reason):
    with pytest.raises(ValueError, match=reason):
        ls.free_order(make())


def clip(**flags) -> PreTrainedConfig:
    config = transformers.CLIPConfig(vision_config=dict(**SIZES, **IMAGES), text_config=dict(**SIZES, **TEXT))
    return ls.LayerShuffleCLIPConfig.from_dict(config.to_dict() | {"model_type": "layershuffle_clip"}, **flags)


def test_of_a_model_with_two_towers_one_is_chosen(tmp_path):
    with pytest.raises(
        ValueError, match=r"has several towers \(vision, text\), .* say which by `tower='vision'` or `tower='text'`"
    ):
        ls.LayerShuffleCLIPModel(clip())
    with pytest.raises(ValueError, match="`tower` is 'audio', and LayerShuffleCLIPConfig has no `audio_config`"):
        ls.LayerShuffleCLIPModel(clip(tower="audio"))
    with pytest.raises(ValueError, match="`tower` is 'text', and LayerShuffleCLIPForImageClassification has 'vision'"):
        ls.LayerShuffleCLIPForImageClassification(clip(tower="text"))
    with pytest.raises(ValueError, match="`tower` is 'left'; it must be None or one of 'vision', 'text', 'audio'"):
        clip(tower="left")
    plain = transformers.CLIPModel(transformers.CLIPConfig.from_dict(clip().to_dict() | {"model_type": "clip"}))
    with pytest.raises(ValueError, match="has several towers"):
        ls.free_order(plain)
    inputs = {"input_ids": torch.tensor([[5, 6, 99]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    for tower, embeds in (("text", "text_embeds"), ("vision", "image_embeds")):
        model = ls.free_order(copy.deepcopy(plain).eval(), tower=tower)
        assert model.layers_path.startswith(f"{tower}_model.")
        sequential, other = model(**inputs), model(**inputs, execution_order=[3, 0])
        changed = {name for name in ("text_embeds", "image_embeds") if not torch.equal(sequential[name], other[name])}
        assert changed == {embeds}
        model.save_pretrained(tmp_path / tower)
        again = ls.LayerShuffleAutoModel.from_pretrained(tmp_path / tower).eval()
        torch.testing.assert_close(again(**inputs, execution_order=[3, 0])[embeds], other[embeds])


# --- What writes into the residual stream ---

WRITERS = {
    "vit": ("ViTModel", ("attention.o_proj", "mlp.fc2")),
    "bert": ("BertModel", ("attention.output.dense", "output.dense")),
    "modernbert": ("ModernBertModel", ("attn.Wo", "mlp.Wo")),
    "gpt2": ("GPT2Model", ("attn.c_proj", "mlp.c_proj")),
    "timesformer": ("TimesformerModel", ("temporal_dense", "attention.output.dense", "output.dense")),
    "wav2vec2-bert": (
        "Wav2Vec2BertModel",
        ("ffn1.output_dense", "self_attn.linear_out", "conv_module.pointwise_conv2", "ffn2.output_dense"),
    ),
    "wav2vec2": ("Wav2Vec2Model", ("attention.out_proj", "feed_forward.output_dense")),
    "whisper": ("WhisperForAudioClassification", ("self_attn.out_proj", "fc2")),
}


@pytest.mark.parametrize("model_type", WRITERS)
def test_the_maps_that_write_into_the_stream_are_found(model_type):
    name, expected = WRITERS[model_type]
    plain = getattr(transformers, name)
    assert residual_writers(plain, AutoConfig.for_model(model_type)) == expected


def test_a_scale_that_cannot_be_applied_is_refused(monkeypatch):
    def fails(*args):
        raise ValueError("no small copy")

    monkeypatch.setattr(order_check, "on_small_copy", fails)
    monkeypatch.setattr(order_check, "_FOUND", {})
    config = ls.LayerShuffleViTConfig(**SIZES, **IMAGES, residual_init_scale=0.5)
    with pytest.raises(
        ValueError, match=r"`residual_init_scale` is 0\.5, but what it would scale in ViTModel could not"
    ):
        ls.LayerShuffleViTModel(config)


@torch.no_grad()
@pytest.mark.parametrize("name", ["SiglipVision", "CLIPVision", "ViT", "Dinov2"])
def test_a_tower_whose_children_its_parents_initialise_starts_as_the_identity(name):
    config_class = getattr(ls, f"LayerShuffle{name}Config")
    sizes = {key: value for key, value in SIZES.items() if name != "Dinov2" or key != "intermediate_size"}
    model = getattr(ls, f"LayerShuffle{name}Model")(config_class(**sizes, **IMAGES, residual_init_scale=0.0)).eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    outputs = [model(images, execution_order=order).last_hidden_state for order in ([0, 1, 2, 3], [2, 0])]
    assert torch.equal(*outputs)


def test_the_scale_is_that_of_the_initial_weights_of_the_plain_model():
    torch.manual_seed(0)
    plain = ls.LayerShuffleSiglipVisionModel(ls.LayerShuffleSiglipVisionConfig(**SIZES, **IMAGES)).state_dict()
    torch.manual_seed(0)
    scaled = ls.LayerShuffleSiglipVisionModel(
        ls.LayerShuffleSiglipVisionConfig(**SIZES, **IMAGES, residual_init_scale=0.25)
    ).state_dict()
    for key, tensor in plain.items():
        is_writer = "encoder.layers" in key and ("out_proj" in key or "fc2" in key)
        assert torch.equal(scaled[key], tensor * 0.25 if is_writer else tensor), key


def test_a_small_copy_is_small_and_keeps_what_is_no_size():
    config = transformers.Dinov2Config(use_swiglu_ffn=True, layerscale_value=0.3, num_hidden_layers=40)

    def look(model, inputs):
        assert isinstance(model.encoder.layer, nn.ModuleList) and len(model.encoder.layer) == NUM_LAYERS
        assert model.config.use_swiglu_ffn and model.config.layerscale_value == 0.3
        assert model.config.hidden_size == 32 and config.hidden_size == 768 and config.num_hidden_layers == 40
        return order_fault(model, inputs)

    assert on_small_copy(transformers.Dinov2Model, config, look) is None


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


@torch.no_grad()
def test_a_forward_that_goes_through_its_layers_before_it_runs_them():
    config = transformers.BigBirdConfig(**SIZES, **TEXT, block_size=4, num_random_blocks=1, num_labels=2)
    plain = transformers.BigBirdForSequenceClassification(config).eval()
    model = ls.free_order(copy.deepcopy(plain))
    texts = torch.arange(5, 11)[None]  # shorter than its blocks, so that it changes the kind of attention
    assert torch.equal(model(texts, execution_order=[0, 1, 2, 3]).logits, plain(texts).logits)


def test_flags_for_hidden_states_of_another_shape_are_refused():
    config = transformers.SqueezeBertConfig(**SIZES, **TEXT, embedding_size=32)
    for flag in ("depth_embedding", "position_predictor"):
        with pytest.raises(ValueError, match=r"hidden states of shape `\(batch_size, channels, tokens\)`, for which"):
            ls.free_order(transformers.SqueezeBertModel(config), **{flag: True})


def test_layers_that_give_a_list_predict_their_position():
    config = transformers.OpenAIGPTConfig(vocab_size=50, n_positions=16, n_embd=32, n_layer=3, n_head=4)
    model = ls.free_order(transformers.OpenAIGPTModel(config), position_predictor=True, depth_embedding=True)
    outputs = model(torch.arange(6)[None], execution_order=[2, 0])
    assert outputs.position_logits.shape == (1, 2, 3) and outputs.last_hidden_state.shape == (1, 6, 32)


@torch.no_grad()
def test_a_repeat_that_is_too_long_for_a_family_says_so():
    config = transformers.XLNetConfig(vocab_size=50, d_model=32, n_layer=3, n_head=4, d_inner=64)
    model = ls.free_order(transformers.XLNetModel(config).eval())
    texts = torch.arange(6)[None]
    assert model(texts, execution_order=[2, 0, 0]).execution_order.tolist() == [2, 0, 0]
    with pytest.raises(ValueError, match="`execution_order` has 4 layers, and LayerShuffleXLNetModel, which has 3,"):
        model(texts, execution_order=[2, 0, 0, 1])


def test_a_model_that_is_refused_stays_as_it_was():
    sizes = dict(conv_dim=(32,), conv_kernel=(10,), conv_stride=(5,), num_feat_extract_layers=1, vocab_size=32)
    model = transformers.HubertModel(transformers.HubertConfig(**SIZES, **sizes, layerdrop=0.0))
    with pytest.raises(ValueError, match=r"`layerdrop` is 0\.1, and HubertModel leaves layers out by itself"):
        ls.free_order(model, layerdrop=0.1)
    assert type(model) is transformers.HubertModel and type(model.config) is transformers.HubertConfig


def test_trying_seeds_no_accelerator(warnings, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.mps, "manual_seed", seeded.append)
    ls.free_order(transformers.RemBertModel(rembert()))
    assert len(warnings) == 1 and seeded == []


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("FNetModel", dict(SIZES, vocab_size=100), "or not such maps alone"),
        ("XLNetModel", dict(vocab_size=50, d_model=32, n_layer=3, n_head=4, d_inner=64), "or not such maps alone"),
        ("MixtralModel", dict(SIZES, vocab_size=50, num_key_value_heads=2, num_local_experts=2), "or not such maps"),
        (
            "DeepseekV3Model",
            dict(SIZES, vocab_size=50, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=1,
                 first_k_dense_replace=1, moe_intermediate_size=16, q_lora_rank=16, kv_lora_rank=16,
                 qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4),
            "are of several kinds",
        ),
    ],
)  # fmt: skip
def test_layers_that_write_by_other_means_are_not_scaled_in_part(name, values, reason):
    values = {key: value for key, value in values.items() if name != "FNetModel" or key != "num_attention_heads"}
    made = getattr(ls, f"LayerShuffle{name}")
    with pytest.raises(ValueError, match=rf"`residual_init_scale` is 0\.0, .*{reason}"):
        made(made.config_class(**values, residual_init_scale=0.0))


@torch.no_grad()
def test_maps_that_are_initialised_again_are_scaled():
    config = ls.LayerShuffleImageGPTConfig(
        n_embd=32, n_layer=4, n_head=4, vocab_size=17, n_positions=64, num_labels=3, residual_init_scale=0.0
    )
    model = ls.LayerShuffleImageGPTForImageClassification(config).eval()
    assert not any(layer.mlp.c_proj.weight.any() for layer in model.free_layers)
    pixels = torch.randint(0, 16, (2, 20))
    torch.testing.assert_close(
        model(input_ids=pixels, execution_order=[0, 1, 2, 3]).logits,
        model(input_ids=pixels, execution_order=[2]).logits,
    )


def test_trying_changes_no_random_number_of_any_family(warnings, monkeypatch):
    monkeypatch.setattr(order_check, "_FOUND", {})
    sizes = dict(conv_dim=(32,), conv_kernel=(10,), conv_stride=(5,), num_feat_extract_layers=1, vocab_size=32)
    plain = transformers.Wav2Vec2Config(**SIZES, **sizes, layerdrop=0.0, num_labels=3)
    weights = []
    for scale in (1.0, 0.5):
        config = ls.LayerShuffleWav2Vec2Config.from_dict(plain.to_dict() | {"residual_init_scale": scale})
        torch.manual_seed(0)
        model = ls.LayerShuffleWav2Vec2ForSequenceClassification(config)
        weights.append((model.classifier.weight, torch.get_rng_state()))
    assert torch.equal(weights[0][0], weights[1][0]) and torch.equal(weights[0][1], weights[1][1])
