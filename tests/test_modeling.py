import copy
import itertools
import warnings
from collections import Counter

import peft
import pytest
import torch
from accelerate import disk_offload
from accelerate.utils import compile_regions
from conftest import of_both_architectures, record_layer_calls
from scipy.stats import chisquare
from torch import nn
from torch.func import functional_call, grad, vmap

import hf_layershuffle as ls
from hf_layershuffle.models.position_modules import DepthProjection, PositionHead, position_loss


EXTRAS = {"depth_embedding": True, "position_predictor": True}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Large random weights, so that the order matters and nothing is a no-op."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


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


# --- Depth embedding ---


def test_a_fresh_depth_path_changes_nothing_and_learns(vit, batch):
    plain = vit.plain_classifier().eval()
    model = vit.classifier(depth_embedding=True).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    base = model.base_model
    assert all(layer.depth_projection.dense.weight.abs().max() > 0 for layer in base.layers)
    assert (base.depth_embedding.weight.abs().amax(dim=1) > 0).all()


def normalized(hidden_states, norm, eps):
    """LayerNorm written out."""
    centered = hidden_states - hidden_states.mean(-1, keepdim=True)
    return centered * (centered.square().mean(-1, keepdim=True) + eps).rsqrt() * norm.weight + norm.bias


def test_the_depth_projection_is_layernorm_linear_gelu_of_the_joined_tokens():
    # An eps as large as the tokens' variance, so that another one is seen
    projection = randomize(DepthProjection(32, 7, 0.5)).double()
    hidden_states, vector = torch.randn(2, 5, 32, dtype=torch.double), torch.randn(7, dtype=torch.double)
    joined = torch.cat([hidden_states, vector.expand(2, 5, 7)], dim=-1)
    expected = projection.dense(normalized(joined, projection.norm, 0.5))
    torch.testing.assert_close(projection(hidden_states, vector), nn.functional.gelu(expected))


def test_the_depth_projection_of_constant_tokens_is_finite():
    projection = randomize(DepthProjection(32, 1, 1e-12))
    output = projection(torch.ones(1, 2, 32), torch.ones(1))
    torch.testing.assert_close(output, nn.functional.gelu(projection.dense(projection.norm.bias)).expand(1, 2, 32))


def test_the_position_head_is_layernorm_linear_of_the_mean_token():
    head = randomize(PositionHead(32, 4, 0.5)).double()
    hidden_states = torch.randn(2, 5, 32, dtype=torch.double)
    expected = head.dense(normalized(hidden_states.mean(dim=1), head.norm, 0.5))
    torch.testing.assert_close(head(hidden_states), expected)


def test_second_derivatives_of_the_depth_projection_are_exact():
    projection = randomize(DepthProjection(4, 3, 1e-12)).double()
    inputs = (torch.randn(2, 2, 4, dtype=torch.double), torch.randn(3, dtype=torch.double))
    assert torch.autograd.gradgradcheck(projection, tuple(each.requires_grad_() for each in inputs))


@torch.no_grad()
def test_the_depth_projection_is_added_before_the_block(vit, batch):
    model, plain = vit.classifier(depth_embedding=True).eval(), vit.plain_classifier().eval()
    randomize(model)
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    base, hidden_states = model.base_model, model.base_model.embeddings(batch["pixel_values"])
    for position, index in enumerate([2, 0]):
        vector = base.depth_embedding.weight[position]
        hidden_states = hidden_states + base.layers[index].depth_projection(hidden_states, vector)
        hidden_states = plain.base_model.layers[index](hidden_states)
    expected = model.classifier(base.layernorm(hidden_states)[:, 0])
    torch.testing.assert_close(model(batch["pixel_values"], execution_order=[2, 0]).logits, expected)


def test_a_fresh_model_with_depth_embedding_is_finite_in_fp16(vit, batch):
    model = vit.classifier(depth_embedding=True, layer_norm_eps=1e-12).train()
    with torch.autocast("cpu", torch.float16):
        loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.isfinite().all()] == []


def test_a_layer_is_told_its_position_not_its_index(vit, batch):
    model = randomize(vit.classifier(depth_embedding=True)).eval()
    vectors = []
    for layer in model.vit.layers:
        layer.depth_projection.register_forward_hook(lambda module, args, output: vectors.append(args[1]))
    model(**batch, execution_order=[2, 0, 3, 1, 1, 1])
    # positions beyond the depth reuse the last vector
    assert torch.equal(torch.stack(vectors), model.vit.depth_embedding.weight[[0, 1, 2, 3, 3, 3]])


# --- Position predictor ---


def test_the_position_loss_belongs_to_training_only(vit, batch):
    model = randomize(vit.classifier(position_predictor=True, position_loss_weight=0.5))
    order = [2, 0, 3, 1]
    evaluation = model.eval()(**batch, execution_order=order)
    training = model.train()(**batch, execution_order=order)
    class_loss = nn.functional.cross_entropy(training.logits, batch["labels"])
    position_loss = torch.stack(
        [
            nn.functional.cross_entropy(training.position_logits[:, position], torch.full((6,), position))
            for position in range(4)
        ]
    ).mean()
    torch.testing.assert_close(evaluation.loss, class_loss)
    torch.testing.assert_close(training.loss, class_loss + 0.5 * position_loss)
    assert model.train()(batch["pixel_values"]).loss is None


def test_the_position_head_reads_the_mean_of_the_output_tokens(vit, batch):
    model = randomize(vit.classifier(position_predictor=True)).eval()
    output = model(**batch, execution_order=[3, 1], output_hidden_states=True)
    for position, index in enumerate([3, 1]):
        head = model.vit.layers[index].position_head
        expected = head.dense(head.norm(output.hidden_states[position + 1].mean(dim=1)))
        assert torch.equal(output.position_logits[:, position], expected)


def test_positions_beyond_the_depth_are_left_out_of_the_position_loss():
    logits = torch.randn(3, 6, 4)
    assert torch.equal(position_loss(logits), position_loss(logits[:, :4]))


LABELS = {
    "none": (None, [0, 1, 2, 3, 4, 5]),
    "classes": (torch.arange(6), [0, 1, 2, 3, 4, 5]),
    "a column": (torch.arange(6)[:, None], [0, 1, 2, 3, 4, 5]),
    "one of six": (torch.tensor([-100, -100, 2, -100, -100, -100]), [2]),
    "several classes": (torch.ones(6, 5), [0, 1, 2, 3, 4, 5]),
    "several classes, rows left out": (torch.tensor([1.0, -100, 0, 1, -100, 1])[:, None].expand(6, 5), [0, 2, 3, 5]),
    "several classes, one of them unknown": (torch.tensor([-100.0, 0, 1, 0, 0]).expand(6, 5), [0, 1, 2, 3, 4, 5]),
    "no image": (torch.full((6,), -100), []),
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("sizes", [[6], [4, 2], [1, 2, 3]])
def test_the_position_loss_is_the_mean_over_images_that_count(labels, sizes):
    labels, images = LABELS[labels]
    logits = torch.randn(6, 4, 4).requires_grad_()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(4).repeat(6), reduction="none")
    expected = losses.view(6, 4)[images].mean() if images else 0 * losses.sum()
    num_items = 6 if labels is None else (labels != -100).sum()  # as the Trainer counts
    parts = logits.split(sizes)
    part_labels = [None] * len(parts) if labels is None else labels.split(sizes)
    actual = sum(position_loss(part, each, num_items) for part, each in zip(parts, part_labels))
    for loss in (actual, position_loss(logits, labels)):
        torch.testing.assert_close(loss, expected)
        gradients = [torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (loss, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_the_count_of_the_trainer_does_not_change_the_loss_of_a_whole_batch(vit, batch, problem_type):
    model = vit.classifier(position_predictor=True, problem_type=problem_type).train()
    labels = batch["labels"]
    if problem_type == "multi_label_classification":
        labels = nn.functional.one_hot(labels, 5).float()
    num_items = (labels != -100).sum()
    losses = [
        model(batch["pixel_values"], labels=labels, **kwargs).loss
        for kwargs in ({}, {"num_items_in_batch": num_items})
    ]
    torch.testing.assert_close(*losses)


def test_an_image_without_label_gives_no_loss(vit, batch):
    model = randomize(vit.classifier(position_predictor=True)).train()
    some = {name: tensor[2:3] for name, tensor in batch.items()}
    labels = torch.where(torch.arange(6) == 2, batch["labels"], -100)
    torch.testing.assert_close(model(batch["pixel_values"], labels=labels).loss, model(**some).loss)
    model(batch["pixel_values"], labels=torch.full((6,), -100)).loss.backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())  # NaN would be any


def test_micro_batches_give_the_gradients_of_the_batch(vit, batch):
    model = randomize(vit.classifier(position_predictor=True)).train()
    batch["labels"][[0, 4]] = -100
    model(**batch).loss.backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    for part in (slice(0, 1), slice(1, 3), slice(3, 6)):
        micro_batch = {name: tensor[part] for name, tensor in batch.items()}
        model(**micro_batch, num_items_in_batch=(batch["labels"] != -100).sum()).loss.backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)


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
    with pytest.raises(ValueError, match="several classes an image hold -100"):
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


# --- What users of transformers combine it with ---


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(vit, batch, use_reentrant):
    model = randomize(vit.classifier(shuffle_mode="arbitrary", **EXTRAS)).train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for each in (model, twin):
        each.base_model.seed_execution_order(5)
        calls = record_layer_calls(each)
        each(**batch).loss.backward()
        assert sorted(calls[:4]) == [0, 1, 2, 3]
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(other.grad, parameter.grad, msg=name)


def test_bf16_autocast(vit, batch):
    model = vit.classifier(shuffle_mode="arbitrary", **EXTRAS).train()
    expected = model(**batch, execution_order=[3, 2, 1, 0])
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch, execution_order=[3, 2, 1, 0])
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.logits.float(), expected.logits, atol=0.02, rtol=0.05)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_bf16_weights(vit, batch):
    model = vit.classifier(shuffle_mode="arbitrary", **EXTRAS).to(torch.bfloat16).train()
    output = model(**batch)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16


@pytest.mark.parametrize("flags", [{}, EXTRAS])
def test_compiling_layer_by_layer_needs_five_graphs_for_thirty_orders(vit, batch, flags):
    torch.compiler.reset()
    model = randomize(vit.classifier(shuffle_mode="arbitrary", **flags)).eval()
    graphs = []

    def count_graphs(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    counted = compile_regions(model, backend=count_graphs)
    orders = ls.arbitrary_execution_orders(4, 30)
    with torch.no_grad():
        for order in orders:
            expected = model(**batch, execution_order=order).logits
            assert torch.equal(counted(**batch, execution_order=order).logits, expected)
    assert 1 <= len(graphs) <= 5
    torch.compiler.reset()


def test_inductor_matches_eager(vit, batch):
    torch.compiler.reset()
    model = randomize(vit.classifier(shuffle_mode="arbitrary", **EXTRAS)).train()
    compiled = compile_regions(copy.deepcopy(model))
    for each in (model, compiled):
        each.base_model.seed_execution_order(3)
    for _ in range(3):
        expected, actual = model(**batch), compiled(**batch)
        # The compiled copy draws from the same stream
        assert torch.equal(actual.execution_order, expected.execution_order)
        torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


def test_a_stream_seeded_after_compilation_reaches_the_compiled_model(vit):
    model = vit.classifier(shuffle_mode="arbitrary").train()
    compiled = compile_regions(model, backend="eager")
    model.vit.seed_execution_order(11)
    first = [compiled.vit.resolve_execution_order() for _ in range(3)]
    model.vit.seed_execution_order(11)
    assert [compiled.vit.resolve_execution_order() for _ in range(3)] == first


def test_fsdp_and_device_maps_find_the_layer_class(vit):
    model = vit.classifier(**EXTRAS)
    names = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= names
    assert type(model.base_model.layers[0]).__name__ in model._no_split_modules


@pytest.mark.parametrize("flags", [{}, EXTRAS])
def test_gradients_of_single_images_by_torch_func(vit, batch, flags):
    model = randomize(vit.classifier(attn_implementation="eager", **flags)).train()
    parameters = dict(model.named_parameters())

    def loss(parameters, image, label):
        return functional_call(model, parameters, kwargs={"pixel_values": image[None], "labels": label[None]}).loss

    actual = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, batch["pixel_values"], batch["labels"])
    for i in (0, 5):
        model.zero_grad()
        loss(parameters, batch["pixel_values"][i], batch["labels"][i]).backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(actual[name][i], parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("target_modules", ["all-linear", ["dense"]])
def test_lora_takes_effect_before_it_is_merged(vit, batch, target_modules):
    lora = peft.get_peft_model(vit.classifier(**EXTRAS), peft.LoraConfig(target_modules=target_modules, r=2)).train()
    lora(**batch).loss.backward()
    trained = {name: parameter for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert sum("depth_projection" in name for name in trained) == 8
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    with torch.no_grad():
        for name, parameter in trained.items():
            if "depth_projection" in name:
                parameter.add_(torch.randn_like(parameter))
        lora.eval()
        whole, adapted = lora.get_base_model(), lora(**batch).logits
        with lora.disable_adapter():
            assert (whole(**batch).logits - adapted).abs().max() > 0.01
        torch.testing.assert_close(lora.merge_and_unload()(**batch).logits, adapted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_weights_offloaded_to_disk_give_the_same(vit, batch, tmp_path):
    model = randomize(vit.classifier(**EXTRAS)).eval()
    expected = model(**batch, execution_order=[3, 0, 2])
    disk_offload(model, tmp_path, execution_device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    actual = model(**batch, execution_order=[3, 0, 2])
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.position_logits, expected.position_logits)


@torch.no_grad()
def test_a_dynamically_quantized_model_is_near_the_model(vit, batch):
    model = randomize(vit.classifier(depth_embedding=True), seed=1).eval()
    expected = model(**batch).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that torchao will replace it
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    assert type(quantized.vit.layers[0].depth_projection.dense) is not nn.Linear
    actual = quantized(**batch).logits
    assert nn.functional.cosine_similarity(actual, expected).min() > 0.98 and not torch.equal(actual, expected)


# --- The whole model as one graph ---


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("flags", "order"),
    [({}, None), (EXTRAS, None), ({"shuffle_mode": "arbitrary"}, [3, 1, 0]), ({"execution_order": [2, 0]}, None)],
)
def test_an_order_that_does_not_change_compiles_to_one_graph(vit, batch, training, flags, order):
    torch.compiler.reset()
    model = randomize(vit.classifier(**flags)).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected, actual = (each(**batch, execution_order=order) for each in (model, compiled))
    assert torch.equal(actual.loss, expected.loss) and torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.execution_order, expected.execution_order)
    torch.compiler.reset()


def test_random_orders_still_run_in_a_compiled_model(vit, batch):
    torch.compiler.reset()
    model = vit.classifier(shuffle_mode="arbitrary").train()
    compiled = torch.compile(model, backend="eager")
    model.vit.seed_execution_order(0)
    expected = [model(**batch).execution_order.tolist() for _ in range(3)]
    model.vit.seed_execution_order(0)
    assert [compiled(**batch).execution_order.tolist() for _ in range(3)] == expected
    assert compiled(**batch, execution_order=torch.tensor([2, 1])).execution_order.tolist() == [2, 1]
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("flags", "order", "training"),
    [({}, None, False), (EXTRAS, None, True), (EXTRAS, None, False), ({}, [3, 1, 0], False)],
)
def test_strict_export_of_an_order_that_does_not_change(vit, batch, flags, order, training):
    model = randomize(vit.classifier(**flags)).train(training)
    inputs = {"pixel_values": batch["pixel_values"]} | ({"execution_order": order} if order else {})
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=2)}} | (
        {"execution_order": [None] * 3} if order else {}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=True).module()
    inputs["pixel_values"] = batch["pixel_values"][:4]
    expected, actual = model(**inputs), exported(**inputs)
    torch.testing.assert_close(actual.logits, expected.logits)
    assert torch.equal(actual.execution_order, expected.execution_order)


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
