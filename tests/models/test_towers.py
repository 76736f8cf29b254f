"""One tower of a model with several: features of its inputs, and generation that reads images in an order."""

import copy

import pytest
import torch
import transformers
from support.models import randomize

import hf_layershuffle as ls


SIZES = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
IMAGES = dict(image_size=16, patch_size=8)
TEXT = dict(vocab_size=100, max_position_embeddings=64, eos_token_id=99)
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[5, 6, 7, 99], [8, 9, 5, 99]])
ORDER = [3, 1, 0, 2]


def rebuilt(plain, path: str, order: list[int]):
    """A copy of a plain model whose layers stand in this order."""
    model = copy.deepcopy(plain)
    layers = model.get_submodule(path)
    model.set_submodule(path, torch.nn.ModuleList(layers[index] for index in order))
    return model


# --- Features ---


def two_towers(name: str):
    config_class, model_class = (getattr(transformers, f"{name}{kind}") for kind in ("Config", "Model"))
    further = {"projection_size": 32} if name == "Siglip" else {}
    config = config_class(vision_config=SIZES | IMAGES, text_config=SIZES | TEXT | further)
    torch.manual_seed(0)
    return randomize(model_class(config)).eval()


def features(model, tower: str, **kwargs) -> torch.Tensor:
    if tower == "vision":
        return model.get_image_features(pixel_values=PIXELS, **kwargs).pooler_output
    return model.get_text_features(input_ids=IDS, **kwargs).pooler_output


@torch.no_grad()
@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_features_follow_the_order(name, tower):
    plain = two_towers(name)
    model = ls.free_order(copy.deepcopy(plain), tower=tower)
    expected = features(rebuilt(plain, model.layers_path, ORDER), tower)
    assert torch.equal(features(model, tower), features(plain, tower)) and not torch.equal(
        features(model, tower), expected
    )
    assert torch.equal(features(model, tower, execution_order=ORDER), expected)
    model.config.execution_order = ORDER
    assert torch.equal(features(model, tower), expected)
    embeds = model(input_ids=IDS, pixel_values=PIXELS)["image_embeds" if tower == "vision" else "text_embeds"]
    torch.testing.assert_close(embeds, expected / expected.norm(dim=-1, keepdim=True))


@torch.no_grad()
def test_features_of_the_other_tower_take_no_order():
    plain = two_towers("CLIP")
    model = ls.free_order(copy.deepcopy(plain), tower="vision", execution_order=ORDER)
    assert torch.equal(features(model, "text"), features(plain, "text"))
    with pytest.raises(ValueError, match=r"`get_text_features` runs none of the layers .* `vision_model\."):
        features(model, "text", execution_order=ORDER)


def test_features_with_a_depth_embedding_learn():
    model = ls.free_order(two_towers("CLIP"), tower="vision", depth_embedding=True, shuffle_mode="arbitrary").train()
    features(model, "vision").sum().backward()
    assert all(layer.depth_projection.dense.weight.grad.abs().sum() > 0 for layer in model.free_layers.children())


# --- Models that read images and write texts ---

PROMPT = {"input_ids": torch.tensor([[5, 99, 99, 99, 99, 7]]), "pixel_values": PIXELS[:1]}


def llava():
    text = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 3}, vocab_size=100, eos_token_id=None)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SIZES, **IMAGES),
        text_config=text,
        image_token_id=99,
        image_seq_length=4,
    )
    torch.manual_seed(0)
    return randomize(transformers.LlavaForConditionalGeneration(config)).eval()


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_reads_its_images_in_the_order(use_cache):
    plain = llava()
    model = ls.free_order(copy.deepcopy(plain), tower="vision")
    arguments = {**PROMPT, "max_new_tokens": 4, "do_sample": False, "use_cache": use_cache}
    arguments |= {"output_logits": True, "return_dict_in_generate": True}
    other = rebuilt(plain, model.layers_path, ORDER)
    for kwargs, like in (({}, plain), ({"execution_order": ORDER}, other)):
        found, expected = model.generate(**arguments, **kwargs), like.generate(**arguments)
        assert torch.equal(found.sequences, expected.sequences)
        assert all(map(torch.equal, found.logits, expected.logits))
    assert torch.equal(model(**PROMPT, execution_order=ORDER).logits, other(**PROMPT).logits)
    assert not torch.equal(other(**PROMPT).logits, plain(**PROMPT).logits)


@torch.no_grad()
def test_texts_without_images_run_no_layer_of_the_vision_tower():
    plain = llava()
    model = ls.free_order(copy.deepcopy(plain), tower="vision", execution_order=ORDER)
    assert torch.equal(model(input_ids=IDS[:, :3]).logits, plain(input_ids=IDS[:, :3]).logits)


@torch.no_grad()
def test_a_cache_holds_the_layers_of_the_text_whatever_the_order_of_the_images():
    model = ls.free_order(llava(), tower="vision")
    cache = model(**PROMPT, execution_order=[3, 0, 0, 2], use_cache=True).past_key_values
    step = {"input_ids": torch.tensor([[8]]), "past_key_values": cache}
    assert model(**step, execution_order=ORDER).past_key_values.get_seq_length() == 7


@torch.no_grad()
@pytest.mark.parametrize("order", [[3, 1], [0, 1, 2, 3, 0]])
def test_an_order_of_another_length_is_refused_where_images_are_read_by_the_position(order):
    model = ls.free_order(llava(), tower="vision")
    for read in (model, model.generate):
        with pytest.raises(ValueError, match=rf"has {len(order)} layers, .* which has 4, .* neither more nor fewer"):
            read(**PROMPT, execution_order=order)
