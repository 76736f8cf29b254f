"""Causal language models: an order in forward and in generate is a plain model whose list of layers was rebuilt."""

import copy
import json
import threading

import pytest
import torch
import transformers
from conftest import run_python
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, StaticCache

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
CROSS = dict(vocab_size=97, n_positions=64, n_embd=32, n_layer=4, n_head=4, add_cross_attention=True)
ORDERS = {"permutation": [2, 0, 3, 1], "without the first layer": [3, 1]}
REPEAT = [0, 1, 1, 2, 3, 3]


def plain_model(name: str) -> nn.Module:
    """With large random weights, so that every layer matters."""
    cls, config = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.tie_weights()
    model.generation_config.eos_token_id = None  # no text ends early
    return model.eval()


def free_model(name: str, **flags) -> nn.Module:
    """The same model with free order."""
    return ls.free_order(plain_model(name), **flags)


def same(left: tuple, right: tuple) -> bool:
    return all(map(torch.equal, left, right))


def rebuilt(name: str, order: list[int]) -> nn.Module:
    """The plain model whose layers really stand in this order, numbered for the cache by where they stand."""
    model = plain_model(name)
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
    tokens, logits = written(free_model(name), **GENERATION[how], execution_order=order)
    expected_tokens, expected_logits = written(rebuilt(name, order), **GENERATION[how])
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(logits, expected_logits)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("order", [[2], [1, 0], [2, 1, 0], [1, 2, 3]])
def test_other_subsets_generate_as_rebuilt(name, order):
    assert same(written(free_model(name), execution_order=order), written(rebuilt(name, order)))


def test_the_order_matters_and_the_next_call_is_sequential_again():
    model = free_model("llama")
    before = written(model)
    assert not torch.equal(written(model, execution_order=[3, 1])[1], before[1])
    assert same(written(model), before)


def test_beams_take_a_tensor_for_the_order():
    """generate repeats each tensor among its arguments for each beam."""
    model, order = free_model("llama"), ORDERS["permutation"]
    expected = written(model, num_beams=2, num_return_sequences=2, execution_order=order)
    assert same(written(model, num_beams=2, num_return_sequences=2, execution_order=torch.tensor(order)), expected)


@pytest.mark.parametrize("name", MODELS)
def test_repeats_work_without_a_cache(name):
    model, plain = free_model(name), rebuilt(name, REPEAT)
    inputs = texts()
    expected = plain(**inputs, use_cache=False).logits
    outputs = model(**inputs, execution_order=REPEAT)  # a forward alone keeps no cache then
    assert torch.equal(outputs.logits, expected) and outputs.past_key_values is None
    assert same(written(model, use_cache=False, execution_order=REPEAT), written(plain, use_cache=False))


@pytest.mark.parametrize("name", MODELS)
def test_repeats_are_refused_with_a_cache(name):
    model = free_model(name)
    message = r"`execution_order` is \[0, 1, 1, 2, 3, 3\].* a cache has one place .* Pass `use_cache=False`"
    with pytest.raises(ValueError, match=message):
        model.generate(**texts(), max_new_tokens=2, execution_order=REPEAT)
    with pytest.raises(ValueError, match=message):
        model(**texts(), use_cache=True, execution_order=REPEAT)
    with pytest.raises(ValueError, match=message):
        model(**texts(), past_key_values=DynamicCache(), execution_order=REPEAT)


CACHES = {
    "made by the model": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "dynamic, of any model": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=12),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_cache_passed_by_hand_gives_the_logits_of_the_whole_text(name, make_cache, order):
    words, plain = texts(1, 12)["input_ids"], rebuilt(name, order)
    logits = []
    for model, kwargs in ((free_model(name), {"execution_order": order}), (plain, {})):
        cache, parts = make_cache(model.config), []
        for part in words.split([7, 1, 3, 1], dim=1):
            outputs = model(part, past_key_values=cache, use_cache=True, **kwargs)
            cache = outputs.past_key_values
            parts.append(outputs.logits)
        assert cache.get_seq_length() == 12
        logits.append(torch.cat(parts, dim=1))
    assert torch.equal(*logits)
    torch.testing.assert_close(logits[0], plain(words, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("order", [[3, 1], [2, 0, 3]])
def test_a_cache_of_cross_attention_too(order):
    torch.manual_seed(0)
    free = transformers.GPT2LMHeadModel(transformers.GPT2Config(**CROSS)).eval()
    plain = copy.deepcopy(free)
    plain.transformer.h = nn.ModuleList([free.transformer.h[index] for index in order])
    plain, free = copy.deepcopy(plain), ls.free_order(free)
    for position, layer in enumerate(plain.transformer.h):
        layer.attn.layer_idx = layer.crossattention.layer_idx = position
    plain.config.num_hidden_layers = len(order)
    words, seen = texts(1)["input_ids"], torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3))
    logits = []
    for model, kwargs in ((free, {"execution_order": order}), (plain, {})):
        cache, parts = None, []
        for part in words.split([5, 1, 3], dim=1):
            outputs = model(part, encoder_hidden_states=seen, past_key_values=cache, use_cache=True, **kwargs)
            cache = outputs.past_key_values
            parts.append(outputs.logits)
        logits.append(torch.cat(parts, dim=1))
    assert torch.equal(*logits)


@torch.no_grad()
def test_a_place_that_only_some_layers_use_is_not_missed():
    """A cache that grows gets no place for last layers of linear attention, which keep their state elsewhere."""
    config = transformers.MiniMaxConfig(
        **GROUPED, num_local_experts=2, num_experts_per_tok=1, block_size=4,
        layer_types=["full_attention", "linear_attention"] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = transformers.MiniMaxForCausalLM(config).eval()
    plain.generation_config.eos_token_id = None
    expected = plain.generate(texts(1)["input_ids"], max_new_tokens=4, do_sample=False)
    assert torch.equal(
        ls.free_order(plain).generate(texts(1)["input_ids"], max_new_tokens=4, do_sample=False), expected
    )


def test_layers_that_share_keys_and_values_are_refused():
    config = transformers.Gemma3nTextConfig(
        **GROUPED, layer_types=SLIDING, num_kv_shared_layers=2, activation_sparsity_pattern=[0.0] * 4,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=97,
    )  # fmt: skip
    message = r"The last 2 layers of Gemma3nForCausalLM take the keys and values of earlier ones .* Take a model whose"
    with pytest.raises(ValueError, match=message):
        ls.free_order(transformers.Gemma3nForCausalLM(config))


@torch.no_grad()
def test_a_cache_that_lacks_a_layer_is_refused_until_it_is_empty():
    model, words = free_model("qwen3 sliding"), texts(1)["input_ids"]
    for cache in (DynamicCache(config=model.config), DynamicCache(), StaticCache(model.config, max_cache_len=12)):
        model(words, past_key_values=cache, execution_order=[3, 1])
        model(words[:, :1], past_key_values=cache, execution_order=[1, 3])  # of the same layers
        with pytest.raises(ValueError, match="holds layer 0, of which `past_key_values` lacks keys and values"):
            model(words[:, :1], past_key_values=cache)
    cache.reset()  # a static one: transformers 5.17 keeps the length of others
    torch.testing.assert_close(model(words, past_key_values=cache).logits, model(words).logits)
    cache = DynamicCache()
    model(words, past_key_values=cache, execution_order=[1, 0])  # places for the first two layers only
    with pytest.raises(ValueError, match="holds layer 2, of which"):
        model(words[:, :1], past_key_values=cache, execution_order=[0, 2])


@torch.no_grad()
def test_a_prompt_read_by_all_layers_can_be_continued_by_some():
    """Each layer that runs has its keys and values of the prompt, and of the new tokens."""
    model, words = free_model("llama"), texts(1, 12)["input_ids"]
    cache = DynamicCache(config=model.config)
    model(words[:, :8], past_key_values=cache)
    logits = [model(words[:, 8:], past_key_values=copy.deepcopy(cache), execution_order=[2, 1]).logits]
    parts = []
    for part in words[:, 8:].split(1, dim=1):
        parts.append(model(part, past_key_values=cache, execution_order=[2, 1]).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), logits[0], rtol=1e-4, atol=1e-4)


def layers_that_run(model: nn.Module, **arguments) -> list[list[int]]:
    """The order of each forward pass of `generate`."""
    calls: list[list[int]] = []
    base = model.base_model.register_forward_pre_hook(lambda *args: calls.append([]))
    hooks = [
        layer.register_forward_hook(lambda *args, index=index: calls[-1].append(index))
        for index, layer in enumerate(model.free_layers)
    ]
    model.generate(**texts(1), max_new_tokens=4, do_sample=False, **arguments)
    for hook in (base, *hooks):
        hook.remove()
    return calls


@pytest.mark.parametrize("where", ["argument", "configuration"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_random_order_is_drawn_once_for_the_whole_text(where, use_cache):
    model = free_model("llama")
    arguments = {"execution_order": "arbitrary"} if where == "argument" else {}
    model.config.execution_order = "sequential" if where == "argument" else "arbitrary"
    model.seed_execution_order(3)
    first, second = (layers_that_run(model, **arguments, use_cache=use_cache) for _ in range(2))
    assert len(first) == 4 and first == [first[0]] * 4 and sorted(first[0]) == [0, 1, 2, 3]
    assert second == [second[0]] * 4 and second[0] != first[0]
    model.seed_execution_order(3)
    assert layers_that_run(model, **arguments) == first


def test_the_order_of_the_configuration_and_of_the_argument():
    model = free_model("llama")
    model.config.execution_order = [3, 1]
    assert layers_that_run(model) == [[3, 1]] * 4
    assert layers_that_run(model, execution_order=[0, 2]) == [[0, 2]] * 4
    with pytest.raises(ValueError, match="`execution_order` holds 4 at position 1"):
        model.generate(**texts(), execution_order=[0, 4])
    assert layers_that_run(model) == [[3, 1]] * 4


def test_unified_layer_skipping():
    """arXiv 2404.06954: the first, the last and evenly spaced layers, by how much faster it shall be."""
    model = free_model("llama")
    order = ls.layers_for_speedup(len(model.free_layers), 2)
    assert order == [0, 3]
    assert same(written(model, execution_order=order), written(rebuilt("llama", order)))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1]])
def test_a_static_cache_does_not_compile_the_model_whole(order):
    """As generate does by itself on an accelerator; the graphs of a decoder would not see the order."""
    model = free_model("llama")
    compiling = transformers.CompileConfig(backend="eager", fullgraph=False)
    compiling._compile_all_devices = True
    arguments = dict(cache_implementation="static", do_sample=False)
    found = written(model, **arguments, compile_config=compiling, execution_order=order)
    assert same(found, written(rebuilt("llama", order), **arguments))


def test_threads_generate_in_their_own_orders():
    model, found = free_model("qwen3 sliding"), {}
    orders = [[0, 1, 2, 3], [2, 0, 3, 1], [3, 1], [1, 0, 2, 3]]
    expected = [written(model, do_sample=False, execution_order=order)[1] for order in orders]

    def write(number: int) -> None:
        arguments = {**texts(), "max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
        for _ in range(3):
            output = model.generate(**arguments, do_sample=False, execution_order=orders[number])
            found.setdefault(number, []).append(torch.stack(output.logits, dim=1))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(orders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, expected[number]) for number in range(4) for each in found[number])


def test_an_assistant_has_its_own_order():
    """Whatever it drafts, greedy search gives the text of the model itself."""
    model, draft, order = free_model("llama"), free_model("llama"), ORDERS["permutation"]
    draft.config.execution_order = [2, 1]
    expected = model.generate(**texts(1), max_new_tokens=8, do_sample=False, execution_order=order)
    calls = []
    for index, layer in enumerate(draft.free_layers):
        layer.register_forward_hook(lambda *args, index=index: calls.append(index))
    arguments = dict(**texts(1), max_new_tokens=8, do_sample=False, execution_order=order)
    assert torch.equal(model.generate(**arguments, assistant_model=draft), expected)
    assert set(calls) == {1, 2}
    assert torch.equal(model.generate(**arguments, prompt_lookup_num_tokens=2), expected)
    with pytest.raises(ValueError, match=r"`assistant_early_exit` cuts layers off .* Pass `assistant_model`"):
        model.generate(**arguments, assistant_early_exit=2)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("order", [*ORDERS.values(), REPEAT], ids=[*ORDERS, "repeat"])
def test_loss_and_gradients_are_those_of_a_rebuilt_plain_model(name, order):
    inputs = texts()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    losses, gradients = [], []
    for model, kwargs in ((free_model(name), {"execution_order": order}), (rebuilt(name, order), {})):
        model.train()
        torch.manual_seed(2)  # dropout
        losses.append(model(**inputs, labels=labels, use_cache=False, **kwargs).loss)
        losses[-1].backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert torch.equal(*losses)
    assert torch.equal(*gradients)


def test_training_draws_orders_and_both_heads_of_positions_serve_a_language_model():
    model = free_model("llama", shuffle_mode="arbitrary", depth_embedding=True, position_predictor=True)
    with torch.no_grad():
        model._depth_embedding.weight.normal_()
        for layer in model.free_layers:
            layer.depth_projection.dense.weight.normal_(std=0.2)
    inputs = texts()
    orders = {tuple(model.train()(**inputs, labels=inputs["input_ids"]).execution_order.tolist()) for _ in range(8)}
    assert len(orders) > 1 and all(sorted(order) == [0, 1, 2, 3] for order in orders)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(layer.position_head.dense.weight.grad.abs().sum() > 0 for layer in model.free_layers)
    # A layer is told the position, not the token, so keys and values can be kept
    model.eval()
    order = [3, 0, 2]
    _, logits = written(model, execution_order=order)
    _, recomputed = written(model, execution_order=order, use_cache=False)
    torch.testing.assert_close(logits, recomputed, rtol=1e-4, atol=1e-4)
    # and what the heads of positions read, a mean of all tokens, does not reach the words that come before
    words = inputs["input_ids"][:1]
    prefix = model(words[:, :5], execution_order=order).logits
    torch.testing.assert_close(model(words, execution_order=order).logits[:, :5], prefix, rtol=1e-4, atol=1e-4)


def test_orders_leave_nothing_in_the_configuration():
    model = free_model("qwen3 sliding")
    before = model.config.to_json_string()
    model(**texts(), execution_order=[2, 0, 3, 1])
    assert model.config.to_json_string() == before
    assert copy.deepcopy(model.config).layer_types == SLIDING


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("is_free", [True, False])
def test_a_pruned_model_is_the_rebuilt_one_and_is_saved_as_it_is(name, is_free, tmp_path):
    order = [3, 0, 2]
    pruned = ls.prune_layers(free_model(name) if is_free else plain_model(name), order)
    expected = written(rebuilt(name, order))
    assert same(written(pruned), expected)
    pruned.save_pretrained(tmp_path)
    assert same(written(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), expected)


@torch.no_grad()
def test_a_pruned_model_runs_in_other_orders_each_layer_with_its_kind_of_attention():
    words, model = texts(1)["input_ids"], free_model("qwen3 sliding")
    pruned = ls.prune_layers(model, [0, 2, 3])
    assert torch.equal(pruned(words, execution_order=[2, 0, 1]).logits, model(words, execution_order=[3, 0, 2]).logits)


def test_a_layer_whose_place_is_in_its_weights_is_not_pruned_to_another():
    model = plain_model("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(**model.config.to_diff_dict() | {"scale_attn_by_inverse_layer_idx": True})
    with pytest.raises(ValueError, match=r"Layer 1 cannot stand at position 0: its 'attn.scaling' is not that"):
        ls.prune_layers(transformers.GPT2LMHeadModel(config), [1, 2])


def test_a_first_layer_of_another_kind_runs_anywhere():
    """Such as one MLP before layers of several experts: it computes nothing for the others."""
    config = transformers.Glm4MoeConfig(
        **GROUPED, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1
    )
    torch.manual_seed(0)
    plain = transformers.Glm4MoeForCausalLM(config).eval()
    twin = copy.deepcopy(plain)
    twin.model.layers = nn.ModuleList([twin.model.layers[index] for index in (2, 0, 3, 1)])
    expected = twin(**texts(), use_cache=False).logits
    free = ls.free_order(plain)
    assert torch.equal(free(**texts(), use_cache=False, execution_order=[2, 0, 3, 1]).logits, expected)


@pytest.fixture
def saved_folder(tmp_path):
    model = free_model("qwen3 sliding", shuffle_mode="arbitrary")
    model.config.execution_order = [2, 0, 3]
    model.save_pretrained(tmp_path)
    words = [f"w{number}" for number in range(97)]
    vocabulary = {"[PAD]": 0} | {word: number for number, word in enumerate(words) if number > 0}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="w1").save_pretrained(tmp_path)
    generated = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)
    torch.save(generated, tmp_path / "expected.pt")
    return tmp_path


def test_a_saved_folder_serves_the_auto_classes(saved_folder):
    auto_map = json.loads((saved_folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_layershuffle.LayerShuffleQwen3ForCausalLM"
    assert type(AutoModel.from_pretrained(saved_folder)).__name__ == "LayerShuffleQwen3Model"
    model = AutoModelForCausalLM.from_pretrained(saved_folder)
    assert type(model) is ls.LayerShuffleQwen3ForCausalLM
    assert model.config.execution_order == [2, 0, 3] and model.config.layer_types == SLIDING


def test_a_language_model_is_no_classifier(saved_folder):
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM is not a classifier .* pass a Qwen3ForSequenceClass"):
        ls.score_execution_orders(free_model("qwen3"), [], [[0, 1]])


FRESH_PROCESS = """
import sys, torch
if sys.argv[2] == "package":
    import hf_layershuffle
    remote = {}
else:
    sys.modules["hf_layershuffle"] = None  # not installed
    remote = {"trust_remote_code": True}
from transformers import AutoModelForCausalLM, pipeline

folder = sys.argv[1]
expected = torch.load(folder + "/expected.pt")
model = AutoModelForCausalLM.from_pretrained(folder, **remote).eval()
arguments = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
assert torch.equal(model.generate(torch.tensor([[5, 6, 7]]), **arguments), expected)
write = pipeline("text-generation", model=folder, **remote)
[found] = write("w5 w6 w7", **arguments, return_tensors=True)
assert found["generated_token_ids"] == expected[0].tolist(), found
[other] = write("w5 w6 w7", **arguments, return_tensors=True, execution_order=[3, 1])
assert other["generated_token_ids"] == model.generate(
    torch.tensor([[5, 6, 7]]), execution_order=[3, 1], **arguments)[0].tolist(), other
assert other != found
module = type(model).__module__
assert module.startswith("hf_layershuffle" if sys.argv[2] == "package" else "transformers_modules"), module
"""


@pytest.mark.parametrize("how", ["package", "remote code"])
def test_a_saved_folder_generates_in_a_fresh_process(saved_folder, tmp_path, how):
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = run_python(FRESH_PROCESS, saved_folder, how, environment=environment)
    assert result.returncode == 0, result.stderr
    assert "not supported for text-generation" not in result.stderr
