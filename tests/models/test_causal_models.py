"""Causal language models: an order in forward and in generate is a plain model whose list of layers was rebuilt."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, StaticCache

import hf_layershuffle as ls


SIZES = dict(vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
GROUPED = dict(**SIZES, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0)
SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
# Name: class, configuration
MODELS = {
    "llama": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**GROUPED)),
    "qwen3": ("Qwen3ForCausalLM", lambda: transformers.Qwen3Config(**GROUPED)),
    "qwen3 sliding": (
        "Qwen3ForCausalLM",
        lambda: transformers.Qwen3Config(**GROUPED, layer_types=SLIDING, use_sliding_window=True, sliding_window=4),
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        lambda: transformers.Gemma3TextConfig(**GROUPED, layer_types=SLIDING, sliding_window=4),
    ),
    "mistral": ("MistralForCausalLM", lambda: transformers.MistralConfig(**GROUPED, sliding_window=4)),
    "gpt2": (
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            vocab_size=97, n_positions=64, n_embd=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=None,
            pad_token_id=0,
        ),
    ),
}  # fmt: skip
ORDERS = {"permutation": [2, 0, 3, 1], "without the first layer": [3, 1], "one layer": [2], "the first last": [1, 0]}
REPEAT = [0, 1, 1, 2, 3, 3]


def plain_model(name: str, **config_fields) -> nn.Module:
    """With large random weights, so that every layer matters."""
    cls, config, *_ = MODELS[name]
    config = config()
    for field, value in config_fields.items():
        setattr(config, field, value)
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.tie_weights()
    model.generation_config.eos_token_id = None  # no text ends early
    return model.eval()


def rebuilt(name: str, order: list[int], **config_fields) -> nn.Module:
    """The plain model whose layers really stand in this order, numbered for the cache by where they stand."""
    model = plain_model(name, **config_fields)
    path = ls.free_order(copy.deepcopy(model)).layers_path
    layers = model.get_submodule(path)
    moved = nn.ModuleList([copy.deepcopy(layers[index]) for index in order])
    for position, layer in enumerate(moved):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
    model.set_submodule(path, moved)
    kinds = getattr(model.config, "layer_types", None)
    model.config.num_hidden_layers = len(order)
    if kinds is not None:
        model.config.layer_types = [kinds[index] for index in order]
    return model


def texts(batch_size: int = 2, tokens: int = 9) -> dict:
    """Two prompts, of which the second is padded on the left."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 97, (batch_size, tokens), generator=generator)
    mask = torch.ones_like(words)
    if batch_size > 1:
        mask[1, :3], words[1, :3] = 0, 0
    return {"input_ids": words, "attention_mask": mask}


GENERATION = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "without cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prompt in chunks": {"prefill_chunk_size": 4},
}


def written(model: nn.Module, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that a model writes, of shape `(texts, tokens)`, and their logits, `(texts, new tokens, words)`."""
    torch.manual_seed(5)
    arguments = {**texts(), "max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True, **arguments}
    output = model.generate(**arguments)
    return output.sequences, torch.stack(output.logits, dim=1)


@pytest.mark.parametrize("name", MODELS)
def test_without_flags_it_generates_as_the_plain_model_bit_for_bit(name):
    plain = plain_model(name)
    expected, free = written(plain), written(ls.free_order(plain_model(name)))
    assert torch.equal(free[0], expected[0]) and torch.equal(free[1], expected[1])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", GENERATION)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_generation_in_an_order_is_that_of_a_rebuilt_plain_model(name, how, order):
    arguments = GENERATION[how]
    free, plain = ls.free_order(plain_model(name)), rebuilt(name, order)
    tokens, logits = written(free, **arguments, execution_order=order)
    expected_tokens, expected_logits = written(plain, **arguments)
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(logits, expected_logits)
    assert not torch.equal(logits[:, 0], written(free, **arguments)[1][:, 0])
