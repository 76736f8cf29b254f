"""Layers that are of several kinds, or depend on where they stand: what can be merged of them, and exported."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from support.merges import assert_refused

import hf_layershuffle as ls
from hf_layershuffle.merging.random_merges import MergePool


LAYERS = [0, 3, 2, 1, 4, 5]  # the first alone has no norm, so it stays first
WORDS = torch.randint(5, 90, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def sources(tmp_path) -> dict[str, str]:
    """Two ModernBERTs of six layers, of which 0 and 3 attend to all words and the others to their neighbours."""
    special = {f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    config = transformers.ModernBertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, intermediate_size=64,
        local_attention=4, num_labels=3, **special,
    )  # fmt: skip
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = transformers.ModernBertForSequenceClassification(config)
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in "ab"}


def plan_of(sources, layers) -> ls.MergePlan:
    return ls.MergePlan(sources=sources, layers=layers, embeddings="a", layernorm="a", classifier="a")


@torch.no_grad()
@pytest.mark.parametrize("layers", [LAYERS, [0, 3], [0, 1, 2, 3, 4, 5, 5, 3]], ids=str)
def test_the_kind_of_a_layer_moves_with_it(sources, tmp_path, layers):
    plan = plan_of({"a": sources["a"]}, [{"source": "a", "layer": layer} for layer in layers])
    ls.merge(plan, tmp_path / "out", progress=False)
    merged = ls.load_classifier(tmp_path / "out").eval()
    expected = ls.load_classifier(sources["a"]).eval()(WORDS, execution_order=layers).logits
    torch.testing.assert_close(merged(WORDS).logits, expected)
    kinds = ["full_attention" if layer in (0, 3) else "sliding_attention" for layer in layers]
    assert merged.config.layer_types == kinds


@torch.no_grad()
def test_a_merge_in_memory_is_the_saved_one(sources, tmp_path):
    models = {name: ls.load_classifier(source).eval() for name, source in sources.items()}
    pairs = [("a", 0), ("b", 3), ("a", 2), ("b", 1), ("b", 2), ("a", 3)]
    plan = plan_of(sources, [{"source": source, "layer": layer} for source, layer in pairs])
    ls.merge(plan, tmp_path / "out", progress=False)
    pool = MergePool(models)
    with pool.evaluation_mode():
        hidden_states = pool.embed(WORDS)
        for position, layer in enumerate(pool.execution_order(pairs)):
            hidden_states, _ = pool.run_layer(hidden_states, layer, position)
        logits = pool.classify(hidden_states)
    torch.testing.assert_close(logits, ls.load_classifier(tmp_path / "out").eval()(WORDS).logits)


@torch.no_grad()
def test_a_pool_calls_each_layer_as_one_of_its_kind(sources):
    models = {name: ls.load_classifier(source).eval() for name, source in sources.items()}
    models["b"] = ls.prune_layers(models["b"], [0, 1, 2, 4, 3])  # layer 3 is of the kind that stands at 4 here
    pool = MergePool(models)
    moved = [("a", 0), ("b", 4), ("b", 1)]
    with pool.evaluation_mode():
        hidden_states = pool.embed(WORDS)
        for position, layer in enumerate(pool.execution_order(moved)):
            hidden_states, _ = pool.run_layer(hidden_states, layer, position)
    whole = ls.load_classifier(sources["b"]).eval()
    whole.set_submodule("model.layers.0", models["a"].model.layers[0])
    whole.model.embeddings, whole.model.final_norm = models["a"].model.embeddings, models["a"].model.final_norm
    whole.head, whole.classifier = models["a"].head, models["a"].classifier
    expected = whole(WORDS, execution_order=[0, 3, 1]).logits
    torch.testing.assert_close(pool.classify(hidden_states), expected)
    sliding = {name: ls.prune_layers(ls.load_classifier(source), [0, 3]) for name, source in sources.items()}
    with pytest.raises(ValueError, match=r"The base has no layer of kind 'sliding_attention'"):
        MergePool(sliding | {"c": models["a"]})


def test_what_a_layer_cannot_be_is_refused(sources, tmp_path):
    several = [{"source": "a", "layer": layer} for layer in LAYERS]
    first = [{"source": "b", "layer": 1}, *several[1:]]
    assert_refused(plan_of(sources, first), tmp_path, "Source 'b': Layer 1 cannot stand at position 0: its 'attn_norm")
    mixed = [*several[:1], [{"source": "a", "layer": 3}, {"source": "b", "layer": 1}]]
    message = r"`layers\[1\]` averages layers .*: layer 3 of 'a' is 'full_attention', layer 1 of 'b' is 'sliding_"
    assert_refused(plan_of(sources, mixed), tmp_path, message)
    two = [*several[:1], [{"source": "a", "layer": 2}, {"source": "a", "layer": 0}]]
    assert_refused(plan_of(sources, two), tmp_path, "averages layers|Layer 0 cannot stand at position 1")


@torch.no_grad()
def test_each_source_says_of_its_own_layers_what_they_are(sources, tmp_path):
    path = Path(sources["b"], "config.json")
    kinds = [f"{kind}_attention" for kind in ("full", "full", "sliding", "sliding", "sliding", "sliding")]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_types": kinds}))
    pairs = [("a", 0), ("a", 2), ("a", 1), ("b", 1), ("a", 4), ("a", 5)]
    ls.merge(plan_of(sources, [{"source": name, "layer": layer} for name, layer in pairs]), tmp_path / "out")
    expected = ls.load_classifier(sources["a"]).eval()
    of_b = ls.load_classifier(sources["b"]).model.layers[1]
    expected.model.layers[3].load_state_dict(of_b.state_dict())
    merged = ls.load_classifier(tmp_path / "out").eval()
    torch.testing.assert_close(merged(WORDS).logits, expected(WORDS, execution_order=[0, 2, 1, 3, 4, 5]).logits)


@torch.no_grad()
@pytest.mark.parametrize("layers", [LAYERS, [0, 1, 2], [0, 3, 3]], ids=str)
def test_a_plain_model_has_the_kinds_of_its_layers(sources, tmp_path, layers):
    model = ls.load_classifier(sources["a"]).eval()
    plain = ls.to_plain_vit(model, layers)
    expected = model(WORDS, execution_order=layers).logits
    torch.testing.assert_close(plain(WORDS).logits, expected)
    plain.save_pretrained(tmp_path / "plain")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(loaded(WORDS).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("layers", [[1, 3], [3, 0, 2, 1, 1]], ids=str)
def test_all_that_is_listed_of_a_layer_moves_with_it(layers, tmp_path, monkeypatch):
    """SmolLM3 lists the kind of attention of each layer, and whether it has rotary positions."""
    monkeypatch.setenv("HF_LAYERSHUFFLE_CHECK_FAMILIES", "0")
    config = transformers.SmolLM3Config(
        vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=64, max_position_embeddings=64, initializer_range=0.5, use_sliding_window=True,
        sliding_window=4, no_rope_layer_interval=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.SmolLM3ForSequenceClassification(config).save_pretrained(tmp_path / "a")
    model = ls.load_classifier(tmp_path / "a").eval()
    expected = model(WORDS, execution_order=layers).logits
    plan = ls.MergePlan(
        sources={"a": str(tmp_path / "a")}, layers=[{"source": "a", "layer": layer} for layer in layers]
    )
    ls.merge(plan, tmp_path / "out", progress=False)
    plain = ls.to_plain_vit(model, layers)
    plain.save_pretrained(tmp_path / "plain")
    for folder in ("out", "plain"):
        loaded = ls.load_classifier(tmp_path / folder).eval()
        torch.testing.assert_close(loaded(WORDS).logits, expected)
        assert loaded.config.no_rope_layers == [[1, 0, 1, 0][layer] for layer in layers]
