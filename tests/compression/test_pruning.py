import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import of_both_architectures, record_layer_calls, run_python
from transformers import AutoModelForImageClassification

import hf_layershuffle as ls
from hf_layershuffle.compression.pruning import layers_for_speedup, prune_layers, search_layers
from hf_layershuffle.evaluation.robustness import score_execution_orders
from hf_layershuffle.models.order_check import order_fault
from hf_layershuffle.models.small_copy import on_small_copy


FLAGS = [{}, {"depth_embedding": True, "position_predictor": True, "shuffle_mode": "window", "shuffle_window": 3}]


def lively(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("keep", [[0, 2], [3, 1, 0], [2], [0, 1, 2, 3]])
def test_a_pruned_model_computes_the_logits_of_its_layers(vit, batch, flags, keep):
    model = lively(vit.classifier(**flags))
    pruned = prune_layers(model, keep)
    assert type(pruned) is type(model) and not pruned.training
    assert pruned.config.num_hidden_layers == len(pruned.base_model.layers) == len(keep)
    with torch.no_grad():
        expected, found = model(**batch, execution_order=keep), pruned(**batch)
    torch.testing.assert_close(found.logits, expected.logits)
    assert found.execution_order.tolist() == list(range(len(keep)))
    if flags:
        torch.testing.assert_close(found.position_logits, expected.position_logits[..., : len(keep)])
        assert pruned.config.shuffle_window == min(3, len(keep))
    calls = record_layer_calls(pruned)
    with torch.no_grad():
        outputs = pruned(**batch, output_hidden_states=True)
    assert calls == list(range(len(keep))) and len(outputs.hidden_states) == len(keep) + 1


@pytest.mark.parametrize("hooked", [False, True])
def test_hidden_states_of_a_pruned_model_are_captured_once(vit, batch, hooked):
    model = vit.classifier().eval()
    if hooked:  # transformers installs its hooks on the first call that asks for hidden states
        model(**batch, output_hidden_states=True)
    pruned = prune_layers(model, [2, 0])
    outputs = pruned(**batch, output_hidden_states=True)
    expected = model(**batch, output_hidden_states=True, execution_order=[2, 0])
    assert len(outputs.hidden_states) == 3
    assert all(map(torch.equal, outputs.hidden_states, expected.hidden_states))


@of_both_architectures
def test_plain_models_and_base_models_are_pruned_alike(architecture, batch):
    plain = architecture.plain_classifier().eval()
    pruned = prune_layers(plain, [0, 3])
    assert type(pruned) is architecture.plain_classifier_class
    expected = ls.layerwise.as_layershuffle(plain)(**batch, execution_order=[0, 3]).logits
    torch.testing.assert_close(pruned(**batch).logits, expected)
    base = architecture.classifier(depth_embedding=True).base_model.eval()
    images = batch["pixel_values"]
    shorter = prune_layers(base, [2, 1])(images).last_hidden_state
    torch.testing.assert_close(shorter, base(images, execution_order=[2, 1]).last_hidden_state)


def test_the_whole_model_is_left_alone(vit, batch):
    model = lively(vit.classifier(execution_order=[3, 2, 1, 0])).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = prune_layers(model, [1, 2])
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.num_hidden_layers == 4 and model.config.execution_order == [3, 2, 1, 0]
    assert pruned.config.execution_order == "sequential" and pruned.training


def test_an_arbitrary_evaluation_order_is_kept(vit):
    assert prune_layers(vit.classifier(execution_order="arbitrary"), [1, 2]).config.execution_order == "arbitrary"


@pytest.mark.parametrize("flags", FLAGS)
def test_a_pruned_model_trains(vit, batch, flags):
    model = prune_layers(lively(vit.classifier(**flags)), [3, 0]).train()
    model.vit.seed_execution_order(0)
    model(**batch).loss.backward()
    missing = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert missing == set()


def test_a_pruned_model_records_its_origin(vit, tmp_path):
    for name, model in {"whole": vit.classifier(), "plain": vit.plain_classifier()}.items():
        model.save_pretrained(tmp_path / name)
        model = AutoModelForImageClassification.from_pretrained(tmp_path / name)
        prune_layers(model, [3, 0, 2]).save_pretrained(tmp_path / "short")
        short = AutoModelForImageClassification.from_pretrained(tmp_path / "short")
        assert short.config.pruned_from == {"model": name, "num_layers": 4, "layers": [3, 0, 2]}
        again = prune_layers(short, torch.tensor([2, 0]))
        assert again.config.pruned_from == {"model": name, "num_layers": 4, "layers": [2, 3]}
        assert not hasattr(model.config, "pruned_from")


def test_a_saved_pruned_model_loads_in_a_fresh_process(vit, batch, tmp_path):
    model = lively(vit.classifier(depth_embedding=True, position_predictor=True))
    pruned = prune_layers(model, [2, 0])
    pruned.save_pretrained(tmp_path / "pruned")
    with torch.no_grad():
        expected = model(batch["pixel_values"], execution_order=[2, 0]).logits
    torch.save({"images": batch["pixel_values"], "logits": expected}, tmp_path / "expected.pt")
    code = """
import sys, torch
import hf_layershuffle
from transformers import AutoModelForImageClassification, BertConfig, BertModel

model, info = AutoModelForImageClassification.from_pretrained(sys.argv[1] + "/pruned", output_loading_info=True)
assert not any(info.values()), info
expected = torch.load(sys.argv[1] + "/expected.pt")
with torch.no_grad():
    torch.testing.assert_close(model.eval()(expected["images"]).logits, expected["logits"])
print(model.num_parameters())
"""
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == pruned.num_parameters() < model.num_parameters()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([], r"`keep` is \[\]; pass a non-empty list of layer indices from 0 to 3"),
        ([0, 4], r"`keep` holds layer 4: \[0, 4\]; this model has the layers 0 to 3"),
        ([-1], "`keep` holds layer -1"),
        ([0.5], r"`keep` is \[0.5\]"),
        ([1, 2, 1], "`keep` holds layer 1 more than once"),
        ("0,1", "`keep` is '0,1'; pass a non-empty list"),
    ],
)
def test_bad_layers_are_refused(vit, keep, message):
    with pytest.raises(ValueError, match=message):
        prune_layers(vit.classifier(), keep)


@pytest.mark.parametrize("kind", ["peft model", "its base model", "adapter of transformers"])
def test_models_with_adapters_are_refused_with_the_remedy(vit, batch, kind):
    model, lora = (
        lively(vit.classifier()),
        peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    )
    if kind == "adapter of transformers":
        model.add_adapter(lora)
    else:
        adapted = peft.get_peft_model(model, lora).eval()
        model = adapted if kind == "peft model" else adapted.get_base_model()
    with pytest.raises(ValueError, match=r"holds adapters of PEFT.*prune `peft_model.merge_and_unload\(\)`"):
        prune_layers(model, [0, 2])
    if kind == "peft model":  # as the message says
        expected = adapted(**batch, execution_order=[0, 2]).logits
        found = prune_layers(adapted.merge_and_unload(), [0, 2])(**batch).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_other_models_are_refused(vit):
    for model, what in (("outputs/model", "str"), (vit.classifier().vit.layers, "LayerProgram")):
        with pytest.raises(ValueError, match=f"`model` is a {what}; pass a model of transformers"):
            prune_layers(model, [0])


def test_a_plain_model_whose_layers_were_cut_by_hand_is_pruned_to_its_layers(vit, batch):
    plain = lively(vit.plain_classifier())
    plain.base_model.layers = plain.base_model.layers[1:]
    pruned = prune_layers(plain, [0, 1, 2])
    assert pruned.config.num_hidden_layers == pruned.config.pruned_from["num_layers"] == 3
    torch.testing.assert_close(pruned(**batch).logits, plain(**batch).logits)
    ours = ls.layerwise.as_layershuffle(plain)
    assert torch.equal(ours(**batch).logits, plain(**batch).logits) and ours.config.num_hidden_layers == 3


def test_layers_for_a_speedup():
    assert layers_for_speedup(12, 2) == [0, 2, 4, 7, 9, 11]
    assert layers_for_speedup(12, 4) == [0, 6, 11]
    assert layers_for_speedup(12, 1) == list(range(12))
    assert layers_for_speedup(12, 12) == [0]
    for speedup in (0.5, 13, float("nan")):
        with pytest.raises(ValueError, match="it must be from 1 to 12"):
            layers_for_speedup(12, speedup)


def images(num_images=20):
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": i % 5} for i in range(num_images)]


def test_the_search_drops_what_costs_least(vit):
    model, data = lively(vit.classifier()), images()
    orders = [[j for j in range(4) if j != i] for i in range(4)]
    losses = [score.loss for score in score_execution_orders(model, data, orders, progress=False)]
    assert search_layers(model, data, 3, progress=False) == orders[int(np.argmin(losses))]
    assert search_layers(model, data, 4, progress=False) == [0, 1, 2, 3]
    assert set(search_layers(model, data, 1, progress=False)) <= set(search_layers(model, data, 2, progress=False))


def test_the_search_drops_layers_that_do_harm(vit):
    model, data = vit.classifier(), images()
    with torch.no_grad():
        for index in (1, 2):  # these write noise into the residual stream
            model.vit.layers[index].mlp.fc2.weight.normal_(std=30.0)
        logits = model(torch.stack([item["pixel_values"] for item in data]), execution_order=[0, 3]).logits
        # calibrate on what the other two layers say, so that they are right
        data = [item | {"labels": int(label)} for item, label in zip(data, logits.argmax(-1))]
    assert search_layers(model.eval(), data, 2, progress=False) == [0, 3]
    # Also where the harm is left out now, since a pruned model runs all of its MLPs
    model.config.skipped_mlps = [0, 1, 2, 3]
    assert search_layers(model, data, 2, progress=False) == [0, 3] and model.config.skipped_mlps == [0, 1, 2, 3]


@pytest.mark.parametrize("num_kept", [0, 5, 2.0, True])
def test_an_impossible_number_of_layers_is_refused(vit, num_kept):
    with pytest.raises(ValueError, match=r"`num_kept` is .*; it must be an integer from 1 to 4"):
        search_layers(vit.classifier(), images(), num_kept)


@torch.no_grad()
def test_the_kind_of_a_layers_attention_moves_with_it(tmp_path):
    """ModernBERT says it of each layer in its configuration. Its first layer alone has no norm, so it stays first."""
    special = {f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    config = transformers.ModernBertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, intermediate_size=64,
        local_attention=4, **special,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ls.free_order(transformers.ModernBertForSequenceClassification(config).eval())
    words = torch.randint(5, 90, (2, 20))
    assert config.layer_types[3] != config.layer_types[1]
    pruned = ls.prune_layers(model, [0, 3, 1])
    expected = model(words, execution_order=[0, 3, 1]).logits
    assert torch.equal(pruned(words).logits, expected)
    pruned.save_pretrained(tmp_path)
    torch.testing.assert_close(type(pruned).from_pretrained(tmp_path).eval()(words).logits, expected)
    with pytest.raises(ValueError, match=r"Layer 1 cannot stand at position 0: its 'attn_norm\..*' is not that"):
        ls.prune_layers(model, [1, 2])


SIZES = dict(vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
GROUPED = dict(**SIZES, num_key_value_heads=4, no_rope_layer_interval=2, pad_token_id=0, max_position_embeddings=64)
LLAMA4 = dict(**GROUPED, head_dim=8, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=4)
# Families whose configurations list more of each layer than the kind of its attention
LISTED = {
    "SmolLM3ForSequenceClassification": lambda: transformers.SmolLM3Config(
        **GROUPED, use_sliding_window=True, sliding_window=4, bos_token_id=1, eos_token_id=2
    ),
    "Llama4ForCausalLM": lambda: transformers.Llama4TextConfig(**LLAMA4, moe_layers=[]),
    "LongformerForSequenceClassification": lambda: transformers.LongformerConfig(
        **SIZES, attention_window=[4, 8, 16, 8], max_position_embeddings=66, pad_token_id=1
    ),
    "GPTNeoForCausalLM": lambda: transformers.GPTNeoConfig(
        vocab_size=100, hidden_size=32, num_layers=4, num_heads=4, intermediate_size=64, window_size=4,
        attention_types=[[["global", "local"], 2]], pad_token_id=0, max_position_embeddings=64,
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", LISTED)
@pytest.mark.parametrize("keep", [[1, 3], [2, 1, 0]], ids=str)
def test_what_a_configuration_lists_of_each_layer_moves_with_it(name, keep, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LAYERSHUFFLE_CHECK_FAMILIES", "0")
    torch.manual_seed(0)
    model = ls.free_order(lively(getattr(transformers, name)(LISTED[name]())))
    words = torch.randint(5, 90, (2, 16))
    pruned = prune_layers(model, keep)
    expected = model(words, execution_order=keep).logits
    torch.testing.assert_close(pruned(words).logits, expected)
    pruned.save_pretrained(tmp_path)
    loaded = type(pruned).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(words).logits, expected)
    if loaded.can_generate():  # the places of a cache too
        torch.testing.assert_close(pruned(words, use_cache=True).logits, expected)
        generated = [each.generate(words, max_new_tokens=3, do_sample=False) for each in (pruned, loaded)]
        assert torch.equal(*generated)


@pytest.mark.parametrize("name", LISTED)
def test_a_family_with_such_lists_is_tried_out(name):
    assert on_small_copy(getattr(transformers, name), LISTED[name](), order_fault) is None


def test_what_no_list_says_of_a_layer_is_refused(monkeypatch):
    """Llama 4 names the layers of several experts by their indices."""
    monkeypatch.setenv("HF_LAYERSHUFFLE_CHECK_FAMILIES", "0")
    config = transformers.Llama4TextConfig(**LLAMA4, interleave_moe_layer_step=2)
    model = ls.free_order(transformers.Llama4ForCausalLM(config))
    with pytest.raises(ValueError, match="Layer 1 cannot stand at position 0: its 'feed_forward"):
        prune_layers(model, [1, 3])
    assert prune_layers(model, [0, 1]).config.num_hidden_layers == 2


def test_layers_with_which_no_model_loads_are_refused(vit, monkeypatch):
    model = vit.classifier()

    def refuse(self):
        raise AssertionError("8 heads")

    monkeypatch.setattr(type(model), "post_init", refuse)
    with pytest.raises(ValueError, match=r"of these layers could not be loaded \(AssertionError: 8 heads\)"):
        prune_layers(model, [0, 2])


def test_activation_checkpointing_is_no_reason_to_refuse(vit):
    model = vit.classifier()
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in prune_layers(model, [2, 0]).free_layers.children())
    model.free_layers[0].gradient_checkpointing = False
    kept = prune_layers(model, [0, 3]).free_layers.children()
    assert [layer.gradient_checkpointing for layer in kept] == [False, True]
