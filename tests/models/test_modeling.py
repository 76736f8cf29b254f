"""The models: plain ones without flags, and the order that is asked for."""

import itertools
from collections import Counter

import pytest
import torch
from conftest import of_both_architectures, record_layer_calls
from scipy.stats import chisquare
from support.models import EXTRAS, randomize
from torch import nn

import hf_layershuffle as ls


# --- Without flags it is transformers' own model ---


@of_both_architectures
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_without_flags_it_equals_the_plain_model_bit_for_bit(architecture, batch, attn_implementation):
    """With dropout; test_families.py has it without."""
    kwargs = dict(attn_implementation=attn_implementation, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    plain, ours = architecture.plain_classifier(**kwargs), architecture.classifier(**kwargs)
    assert ours.config._attn_implementation == attn_implementation
    outputs = []
    for model in (plain.train(), ours.train()):
        torch.manual_seed(1)  # dropout
        output = model(**batch, output_hidden_states=True)
        output.loss.backward()
        outputs.append(output)
    expected, actual = outputs
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.logits, expected.logits)
    assert len(actual.hidden_states) == len(expected.hidden_states) == 5
    assert all(map(torch.equal, actual.hidden_states, expected.hidden_states))
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (plain, ours)]
    assert list(gradients[0]) == list(gradients[1])
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())


@pytest.mark.parametrize("scale", [0.0, 0.25])
def test_the_residual_init_scale_scales_what_writes_into_the_residual_stream(vit, scale):
    model = vit.classifier(residual_init_scale=scale, initializer_range=0.1, **EXTRAS)
    for layer in model.base_model.layers:
        for module in (layer.attention.o_proj, layer.mlp.fc2):
            assert module.weight.std().item() == pytest.approx(0.1 * scale, rel=0.1)
        for module in (layer.attention.v_proj, layer.mlp.fc1):
            assert module.weight.std().item() == pytest.approx(0.1, rel=0.1)


def test_with_a_residual_init_scale_of_0_no_order_differs_at_first_and_all_weights_learn(vit, batch):
    model = vit.classifier(residual_init_scale=0.0).train()
    logits = [
        model(batch["pixel_values"], execution_order=order).logits for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2])
    ]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(4):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


def test_a_residual_init_scale_leaves_loaded_weights_alone(vit, tmp_path):
    plain = vit.plain_classifier()
    plain.save_pretrained(tmp_path)
    loaded = vit.classifier_class.from_pretrained(tmp_path, residual_init_scale=0.0)
    weight = loaded.base_model.layers[0].mlp.fc2.weight
    assert torch.equal(weight, plain.base_model.layers[0].mlp.fc2.weight) and weight.abs().sum() > 0


@of_both_architectures
def test_the_base_model_without_flags_equals_the_plain_one(architecture, batch):
    torch.manual_seed(0)
    plain = architecture.plain_model_class(architecture.plain_classifier().config).eval()
    torch.manual_seed(0)
    ours = architecture.model_class(architecture.classifier().config).eval()
    ours.load_state_dict(plain.state_dict())
    expected, actual = plain(batch["pixel_values"]), ours(batch["pixel_values"])
    assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(actual.pooler_output, expected.pooler_output)


def test_without_flags_training_draws_no_random_numbers(vit, batch):
    model = vit.classifier().train()
    state = torch.get_rng_state()
    model(**batch)
    assert torch.equal(torch.get_rng_state(), state)


# --- The order that is asked for is the order that runs ---


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("sequential", [0, 1, 2, 3]),
        ([3, 1, 0, 2], [3, 1, 0, 2]),
        ([2], [2]),
        ([1, 1, 3, 3, 0, 0], [1, 1, 3, 3, 0, 0]),
        (torch.tensor([2, 0]), [2, 0]),
    ],
)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("flags", [{}, EXTRAS])
def test_the_order_of_a_call_is_the_order_that_runs(vit, batch, order, expected, training, flags):
    model = vit.classifier(**flags).train(training)
    calls = record_layer_calls(model)
    output = model(**batch, execution_order=order)
    assert calls == expected
    assert output.execution_order.dtype == torch.long
    assert output.execution_order.tolist() == expected
    if flags:
        assert output.position_logits.shape == (6, len(expected), 4)
    else:
        assert output.position_logits is None


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        ({"shuffle_mode": "none"}, lambda order: order == [0, 1, 2, 3]),
        ({"shuffle_mode": "arbitrary"}, lambda order: sorted(order) == [0, 1, 2, 3]),
        (
            {"shuffle_mode": "window", "shuffle_window": 1},
            lambda order: sorted(order) == [0, 1, 2, 3] and all(abs(p - i) <= 1 for p, i in enumerate(order)),
        ),
        ({"layerdrop": 0.5}, lambda order: order == sorted(set(order)) and order),
        ({"shuffle_mode": "arbitrary", "layerdrop": 0.5}, lambda order: len(set(order)) == len(order) > 0),
    ],
)
def test_training_draws_the_order_that_the_mode_allows(vit, batch, flags, allowed):
    model = vit.classifier(**flags).train()
    calls, orders = record_layer_calls(model), []
    for _ in range(20):
        calls.clear()
        orders.append(model(**batch).execution_order.tolist())
        assert calls == orders[-1]
        assert allowed(orders[-1])
    assert (len(set(map(tuple, orders))) > 1) == (flags != {"shuffle_mode": "none"})


def test_sampled_training_orders_are_uniform(vit):
    model = vit.model_class(vit.config(shuffle_mode="arbitrary")).train()
    model.seed_execution_order(0)
    counts = Counter(tuple(model.resolve_execution_order()) for _ in range(10_000))
    assert chisquare([counts[order] for order in itertools.permutations(range(4))]).pvalue > 0.01


@pytest.mark.parametrize("flags", [{"shuffle_mode": "arbitrary"}, {"layerdrop": 0.5}])
def test_evaluation_is_sequential_and_deterministic_by_default(vit, batch, flags):
    model = randomize(vit.classifier(**flags)).eval()
    assert model(**batch).execution_order.tolist() == [0, 1, 2, 3]
    assert torch.equal(model(**batch).logits, model(**batch).logits)


def test_evaluation_follows_the_configured_order(vit, batch):
    model = randomize(vit.classifier(execution_order=[3, 3, 0])).eval()
    expected = model(**batch, execution_order=[3, 3, 0]).logits
    assert torch.equal(model(**batch).logits, expected)
    model.config.execution_order = "arbitrary"
    orders = {tuple(model(**batch).execution_order.tolist()) for _ in range(20)}
    assert len(orders) > 5
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert model.train()(**batch).execution_order.tolist() == [0, 1, 2, 3]


def test_evaluation_in_between_leaves_the_orders_of_training_alone(vit, batch):
    model = vit.classifier(shuffle_mode="arbitrary", num_hidden_layers=8, execution_order="arbitrary")
    runs = []
    for num_evaluations in (0, 2):
        model.vit.seed_execution_order(5)
        runs.append([])
        for _ in range(4):
            runs[-1].append(model.train()(**batch).execution_order.tolist())
            evaluated = [model.eval()(**batch).execution_order.tolist() for _ in range(num_evaluations)]
    assert runs[0] == runs[1]
    assert not any(order in runs[0] for order in evaluated)


def test_hidden_states_are_in_execution_order(vit, batch):
    model = randomize(vit.classifier(**EXTRAS)).eval()
    outputs = {}
    for index, layer in enumerate(model.base_model.layers):
        layer.register_forward_hook(lambda module, args, output, index=index: outputs.update({index: output[0]}))
    states = model(**batch, execution_order=[3, 0, 2], output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert torch.equal(states[0], model.base_model.embeddings(batch["pixel_values"]))
    assert all(torch.equal(state, outputs[index]) for state, index in zip(states[1:], [3, 0, 2]))


def test_attentions_with_eager_attention(vit, batch):
    model = vit.classifier(attn_implementation="eager").eval()
    attentions = model(**batch, execution_order=[1, 0, 0], output_attentions=True).attentions
    assert [attention.shape for attention in attentions] == [(6, 2, 5, 5)] * 3


def test_tuples_instead_of_outputs(vit, batch):
    model = vit.classifier().eval()
    output = model(**batch)
    loss, logits, order = model(**batch, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits) and order.tolist() == [0, 1, 2, 3]


# --- Bad input ---


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("order", [[], [4], [-1], [0.0], [True], "backwards", torch.zeros(2, 2, dtype=torch.long), 3])
def test_bad_orders_are_refused(vit, batch, order, training):
    with pytest.raises(ValueError, match="`execution_order`"):
        vit.classifier().train(training)(**batch, execution_order=order)


def test_a_bad_configured_order_is_refused(vit, batch):
    model = vit.classifier().eval()
    model.config.execution_order = [9]
    with pytest.raises(ValueError, match="holds 9 at position 0; layer indices are integers from 0 to 3"):
        model(**batch)


@pytest.mark.parametrize("label", [5, -1])
def test_labels_outside_the_classes_are_refused(vit, batch, label):
    batch["labels"][2] = label
    with pytest.raises(ValueError, match=f"`labels` holds {label}, but this model has 5 classes"):
        vit.classifier()(**batch)


def test_ignored_labels_are_allowed(vit, batch):
    model = vit.classifier().eval()
    expected = nn.functional.cross_entropy(model(**batch).logits[1:], batch["labels"][1:])
    batch["labels"][0] = -100
    torch.testing.assert_close(model(**batch).loss, expected)


def test_labels_of_other_problem_types_are_left_to_transformers(vit, batch):
    model = vit.classifier(problem_type="multi_label_classification").train()
    loss = model(batch["pixel_values"], labels=torch.randint(2, (6, 5)).float()).loss
    assert loss.isfinite()


def test_left_out_labels_of_several_classes_are_refused(vit, batch):
    model = vit.classifier(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="several classes an example hold -100"):
        model(batch["pixel_values"], labels=torch.full((6, 5), -100.0))


@pytest.mark.parametrize(("shape", "message"), [((2, 3, 12, 12), "Input image size"), ((2, 1, 8, 8), "channel")])
def test_images_of_another_size_or_channel_count_are_refused(vit, shape, message):
    with pytest.raises(ValueError, match=message):
        vit.classifier()(torch.randn(shape))


def test_images_of_another_size_can_be_interpolated(vit):
    model = vit.classifier().eval()
    assert model(torch.randn(2, 3, 16, 16), interpolate_pos_encoding=True).logits.shape == (2, 5)


def test_missing_images_are_refused(vit):
    with pytest.raises(ValueError, match="`pixel_values` is None"):
        vit.classifier()(labels=torch.zeros(2, dtype=torch.long))


# --- Layers cut by hand ---


@pytest.mark.parametrize("flags", [{}, EXTRAS])
def test_layers_cut_by_hand_are_refused_with_the_remedy(vit, batch, tmp_path, flags):
    model = randomize(vit.classifier(**flags)).eval()
    expected = model(batch["pixel_values"], execution_order=[0, 1]).logits
    model.base_model.layers = model.base_model.layers[:2]
    for use in (
        lambda: model(**batch),
        lambda: model.save_pretrained(tmp_path / "cut"),
        lambda: ls.to_plain_vit(model),
    ):
        with pytest.raises(ValueError, match=r"has 2 layers.*is 4.*prune_layers\(model, \[0, 1\]\)"):
            use()
    assert not (tmp_path / "cut").exists()
    model = ls.prune_layers(model, [0, 1])  # as the message says
    model.save_pretrained(tmp_path / "pruned")
    loaded = vit.classifier_class.from_pretrained(tmp_path / "pruned").eval()
    torch.testing.assert_close(loaded(batch["pixel_values"]).logits, expected)


def test_the_depth_of_vectors_and_heads_is_checked_too(vit, batch, tmp_path):
    for flag in EXTRAS:
        model = vit.classifier(**{flag: True})
        model.base_model.layers, model.config.num_hidden_layers = model.base_model.layers[:2], 2
        with pytest.raises(ValueError, match=r"has 2 layers, but the number of .* is 4"):
            model.save_pretrained(tmp_path)
    model = vit.classifier()
    model.base_model.layers, model.config.num_hidden_layers = model.base_model.layers[:2], 2
    model.save_pretrained(tmp_path)
    assert len(vit.classifier_class.from_pretrained(tmp_path).base_model.layers) == 2
