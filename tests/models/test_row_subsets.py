"""Which rows of a layer's arguments and of a model's inputs belong to which example."""

import pytest
import torch
from support.models import randomize
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

import hf_layershuffle as ls
from hf_layershuffle.models.row_subsets import inputs_of_rows


RULES = (
    {"exit_threshold": 0.7},
    {"exit_threshold": 0.8},
    {"exit_threshold": 0.5, "exit_criterion": "halting"},
    {"exit_patience": 2},
    {"layer_budget": 2},
)
MODELS = {
    "BERT": (
        BertForSequenceClassification,
        BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
            num_labels=3,
        ),
    ),
    "GPT-2": (
        GPT2ForSequenceClassification,
        GPT2Config(vocab_size=30, n_embd=16, n_layer=4, n_head=2, num_labels=3, pad_token_id=0),
    ),
    "BLOOM": (
        BloomForSequenceClassification,
        BloomConfig(vocab_size=30, hidden_size=16, n_layer=4, n_head=2, num_labels=3, pad_token_id=0),
    ),
}  # fmt: skip
POSITIONS = torch.arange(7)[None]


def make(name, **flags):
    torch.manual_seed(0)
    model_class, config = MODELS[name]
    return randomize(ls.free_order(model_class(config), **flags)).eval()


def make_with_heads(name):
    """Examples leave after different layers, and choose different ones."""
    model = make(name, halting_head=True, layer_controller=True)
    with torch.no_grad():
        model.halting_head.out.weight.mul_(5)
        model.layer_controller.dense.weight.mul_(5)
        model.layer_controller.scores.weight.mul_(20)
    return model


def texts():
    ids = torch.randint(5, 30, (6, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 4:] = mask[2, 5:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_batch_gives_what_its_texts_give_alone(name):
    model, inputs = make_with_heads(name), texts()
    for rule in RULES:
        outputs = model(**inputs, **rule)
        alone = [model(**{key: value[i : i + 1] for key, value in inputs.items()}, **rule) for i in range(6)]
        assert outputs.num_layers_run.tolist() == [each.num_layers_run.item() for each in alone]
        torch.testing.assert_close(outputs.logits, torch.cat([each.logits for each in alone]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_texts_of_bloom_run_on_parts_of_the_batch():
    model, sizes = make_with_heads("BLOOM"), []
    for layer in model.free_layers:
        layer.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    model(**texts(), layer_budget=2)
    assert sizes[-2:] == [5, 1]


@torch.no_grad()
def test_heads_before_the_examples_are_refused(monkeypatch):
    model = make("BLOOM")
    build = model.transformer.build_alibi_tensor

    def heads_first(*args, **kwargs):
        alibi = build(*args, **kwargs)
        return alibi.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)

    monkeypatch.setattr(model.transformer, "build_alibi_tensor", heads_first)
    with pytest.raises(ValueError, match=r"shape \(12, 1, 7\) for 6 examples.*take another family"):
        model(**texts(), exit_threshold=0.8)


@pytest.mark.parametrize("name", ["BERT", "GPT-2"])
@torch.no_grad()
def test_one_row_of_positions_is_for_all(name):
    model, inputs = make_with_heads(name), texts()
    for rule in RULES:
        outputs, expected = (
            model(**inputs, position_ids=each, **rule) for each in (POSITIONS, POSITIONS.expand(6, -1))
        )
        assert torch.equal(outputs.num_layers_run, expected.num_layers_run)
        torch.testing.assert_close(outputs.logits, expected.logits)


@pytest.mark.parametrize("name", ["BERT", "GPT-2"])
def test_one_row_of_positions_is_for_all_in_training(name):
    model, inputs = make(name, halting_head=True), texts()
    model.training = True  # without dropout
    labels = torch.arange(6) % 3
    outputs, expected = (
        model(**inputs, position_ids=each, labels=labels) for each in (POSITIONS, POSITIONS.expand(6, -1))
    )
    torch.testing.assert_close(outputs.loss, expected.loss)
    torch.testing.assert_close(outputs.layer_logits, expected.layer_logits)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@torch.no_grad()
def test_masks_of_other_types(dtype):
    model, inputs = make_with_heads("BERT"), texts()
    other = inputs | {"attention_mask": inputs["attention_mask"].to(dtype)}
    for rule in RULES:
        assert torch.equal(model(**inputs, **rule).logits, model(**other, **rule).logits)
    model.training = True
    for budget in ("off", 2):
        model.seed_execution_order(0, 0)
        expected = model(**inputs, layer_budget=budget)
        model.seed_execution_order(0, 0)
        found = model(**other, layer_budget=budget)
        torch.testing.assert_close(found.logits, expected.logits)
    assert torch.equal(
        model(**inputs, layer_budget="off").halting_log_probabilities,
        model(**other, layer_budget="off").halting_log_probabilities,
    )


def test_inputs_of_rows():
    inputs = {"a": torch.arange(3), "one": torch.ones(1, 4), "flag": True, "scalar": torch.tensor(2.0)}
    chosen = inputs_of_rows(inputs, torch.tensor([2, 0, 2]), 3)
    assert chosen["a"].tolist() == [2, 0, 2]
    assert all(chosen[name] is inputs[name] for name in ("one", "flag", "scalar"))
    assert inputs_of_rows({"a": torch.arange(1)}, torch.tensor([0, 0]), 1)["a"].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"`mask` has the shape \(2, 4\), and there are 3 examples"):
        inputs_of_rows({"mask": torch.ones(2, 4)}, slice(0, 1), 3)
