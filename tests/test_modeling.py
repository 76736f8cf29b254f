import copy
import itertools
from collections import Counter

import pytest
import torch
from accelerate.utils import compile_regions
from conftest import record_layer_calls
from scipy.stats import chisquare
from torch import nn

import hf_layershuffle as ls
from hf_layershuffle.modeling_layershuffle import DepthProjection, position_loss


EXTRAS = {"depth_embedding": True, "position_predictor": True}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Large random weights, so that the order matters and nothing is a no-op."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


# --- Without flags it is transformers' own model ---


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_without_flags_it_equals_the_plain_model_bit_for_bit(architecture, batch, attn_implementation, dropout):
    kwargs = dict(
        attn_implementation=attn_implementation, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
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
def test_the_residual_init_scale_scales_what_writes_into_the_residual_stream(architecture, scale):
    model = architecture.classifier(residual_init_scale=scale, initializer_range=0.1, **EXTRAS)
    for layer in model.base_model.layers:
        for module in (layer.attention.o_proj, layer.mlp.fc2):
            assert module.weight.std().item() == pytest.approx(0.1 * scale, rel=0.1)
        for module in (layer.attention.v_proj, layer.mlp.fc1):
            assert module.weight.std().item() == pytest.approx(0.1, rel=0.1)


def test_with_a_residual_init_scale_of_0_no_order_differs_at_first_and_all_weights_learn(architecture, batch):
    model = architecture.classifier(residual_init_scale=0.0).train()
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


def test_a_residual_init_scale_leaves_loaded_weights_alone(architecture, tmp_path):
    plain = architecture.plain_classifier()
    plain.save_pretrained(tmp_path)
    loaded = architecture.classifier_class.from_pretrained(tmp_path, residual_init_scale=0.0)
    weight = loaded.base_model.layers[0].mlp.fc2.weight
    assert torch.equal(weight, plain.base_model.layers[0].mlp.fc2.weight) and weight.abs().sum() > 0


def test_the_base_model_without_flags_equals_the_plain_one(architecture, batch):
    torch.manual_seed(0)
    plain = architecture.plain_model_class(architecture.plain_classifier().config).eval()
    torch.manual_seed(0)
    ours = architecture.model_class(architecture.classifier().config).eval()
    ours.load_state_dict(plain.state_dict())
    expected, actual = plain(batch["pixel_values"]), ours(batch["pixel_values"])
    assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(actual.pooler_output, expected.pooler_output)


def test_the_same_seed_gives_the_same_initial_weights_as_the_plain_model(architecture):
    plain, ours = architecture.plain_classifier().state_dict(), architecture.classifier().state_dict()
    assert list(plain) == list(ours)
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.items())


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
def test_the_order_of_a_call_is_the_order_that_runs(architecture, batch, order, expected, training, flags):
    model = architecture.classifier(**flags).train(training)
    calls = record_layer_calls(model)
    output = model(**batch, execution_order=order)
    assert calls == expected
    assert output.execution_order.dtype == torch.long
    assert output.execution_order.tolist() == expected
    if flags:
        assert output.position_logits.shape == (6, len(expected), 4)
    else:
        assert output.position_logits is None


def test_an_order_computes_what_its_layers_compute_one_after_the_other(architecture, batch):
    model = randomize(architecture.classifier()).eval()
    base = model.base_model
    hidden_states = base.embeddings(batch["pixel_values"])
    for index in [2, 0, 0, 3]:
        hidden_states = base.layers[index](hidden_states)
    expected = model.classifier(base.layernorm(hidden_states)[:, 0])
    assert torch.equal(model(batch["pixel_values"], execution_order=[2, 0, 0, 3]).logits, expected)
    assert not torch.equal(model(batch["pixel_values"]).logits, expected)


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
def test_training_draws_the_order_that_the_mode_allows(architecture, batch, flags, allowed):
    model = architecture.classifier(**flags).train()
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


def test_evaluation_follows_the_configured_order(architecture, batch):
    model = randomize(architecture.classifier(execution_order=[3, 3, 0])).eval()
    expected = model(**batch, execution_order=[3, 3, 0]).logits
    assert torch.equal(model(**batch).logits, expected)
    model.config.execution_order = "arbitrary"
    orders = {tuple(model(**batch).execution_order.tolist()) for _ in range(20)}
    assert len(orders) > 5
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert model.train()(**batch).execution_order.tolist() == [0, 1, 2, 3]


def test_hidden_states_are_in_execution_order(architecture, batch):
    model = randomize(architecture.classifier(**EXTRAS)).eval()
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


def test_a_fresh_depth_path_changes_nothing_and_learns(architecture, batch):
    plain = architecture.plain_classifier().eval()
    model = architecture.classifier(depth_embedding=True).eval()
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


def joined_reference(projection, hidden_states, vector):
    """LayerNorm -> Linear -> GELU, written out on the tokens joined with the vector."""
    joined = torch.cat([hidden_states, vector.expand(*hidden_states.shape[:-1], -1)], dim=-1)
    return nn.functional.gelu(projection.dense(projection.norm(joined)))


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("depth_embedding_dim", [1, 32])
def test_the_depth_projection_is_layernorm_linear_gelu_of_the_joined_tokens(vit, offset, depth_embedding_dim):
    projection = randomize(DepthProjection(vit.config(depth_embedding_dim=depth_embedding_dim))).double()
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(2, 5, 32, generator=generator, dtype=torch.double) + offset
    vector = torch.randn(depth_embedding_dim, generator=generator, dtype=torch.double)
    tensors = [hidden_states.requires_grad_(), vector.requires_grad_(), *projection.parameters()]
    results = []
    for function in (joined_reference, DepthProjection.forward):
        output = function(projection, hidden_states, vector)
        upstream = torch.linspace(-1, 1, output.numel(), dtype=torch.double).view_as(output)
        results.append((output, *torch.autograd.grad(output, tensors, upstream)))
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)
    single = projection.float()(hidden_states.float(), vector.float())
    # 100 leaves 24 - 7 bits of a token's differences
    torch.testing.assert_close(single.double(), results[0][0], atol=1e-6 if offset == 0 else 1e-4, rtol=1e-6)


def test_the_depth_projection_in_half_precision_is_as_exact_as_the_joined_one(vit):
    projection = randomize(DepthProjection(vit.config(layer_norm_eps=1e-6)))
    generator = torch.Generator().manual_seed(0)
    hidden_states, vector = 3 + torch.randn(64, 5, 32, generator=generator), torch.randn(32, generator=generator)
    exact = joined_reference(projection, hidden_states, vector)
    with torch.autocast("cpu", torch.bfloat16):
        actual, reference = (f(projection, hidden_states, vector) for f in (DepthProjection.forward, joined_reference))
    assert actual.dtype == reference.dtype
    assert (actual - exact).square().mean() < 1.5 * (reference - exact).square().mean()
    weights = copy.deepcopy(projection).to(torch.bfloat16)
    arguments = (weights, hidden_states.to(torch.bfloat16), vector.to(torch.bfloat16))
    actual, reference = DepthProjection.forward(*arguments), joined_reference(*arguments)
    assert actual.dtype == torch.bfloat16
    assert (actual - exact).square().mean() < 1.5 * (reference - exact).square().mean()


def test_the_depth_vector_is_not_copied_to_every_token(vit):
    projection, saved = randomize(DepthProjection(vit.config())), {}
    hidden_states = torch.randn(2, 100, 32, requires_grad=True)

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        projection(hidden_states, torch.randn(32))
    # The normalised tokens and the input of GELU; the parts of a joint copy would be twice as large
    assert sum(nbytes >= hidden_states.nbytes for nbytes in saved.values()) == 2
    assert max(saved.values()) == hidden_states.nbytes


def test_a_layer_is_told_its_position_not_its_index(vit, batch):
    model = randomize(vit.classifier(depth_embedding=True)).eval()
    vectors = []
    for layer in model.vit.layers:
        layer.depth_projection.register_forward_hook(lambda module, args, output: vectors.append(args[1]))
    model(**batch, execution_order=[2, 0, 3, 1, 1, 1])
    # positions beyond the depth reuse the last vector
    assert torch.equal(torch.stack(vectors), model.vit.depth_embedding.weight[[0, 1, 2, 3, 3, 3]])


# --- Position predictor ---


def test_theposition_loss_belongs_to_training_only(architecture, batch):
    model = randomize(architecture.classifier(position_predictor=True, position_loss_weight=0.5))
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


def test_positions_beyond_the_depth_are_left_out_of_theposition_loss():
    logits = torch.randn(3, 6, 4)
    assert torch.equal(position_loss(logits), position_loss(logits[:, :4]))


def test_theposition_loss_of_micro_batches_adds_up_to_that_of_the_batch():
    logits = torch.randn(6, 4, 4)
    parts = sum(position_loss(part, num_items_in_batch=torch.tensor(6)) for part in logits.split([4, 2]))
    torch.testing.assert_close(parts, position_loss(logits))


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
def test_labels_outside_the_classes_are_refused(architecture, batch, label):
    batch["labels"][2] = label
    with pytest.raises(ValueError, match=f"`labels` holds {label}, but this model has 5 classes"):
        architecture.classifier()(**batch)


def test_ignored_labels_are_allowed(vit, batch):
    model = vit.classifier().eval()
    expected = nn.functional.cross_entropy(model(**batch).logits[1:], batch["labels"][1:])
    batch["labels"][0] = -100
    torch.testing.assert_close(model(**batch).loss, expected)


def test_labels_of_other_problem_types_are_left_to_transformers(vit, batch):
    model = vit.classifier(problem_type="multi_label_classification").train()
    loss = model(batch["pixel_values"], labels=torch.randint(2, (6, 5)).float()).loss
    assert loss.isfinite()


@pytest.mark.parametrize(("shape", "message"), [((2, 3, 12, 12), "Input image size"), ((2, 1, 8, 8), "channel")])
def test_images_of_another_size_or_channel_count_are_refused(architecture, shape, message):
    with pytest.raises(ValueError, match=message):
        architecture.classifier()(torch.randn(shape))


def test_images_of_another_size_can_be_interpolated(architecture):
    model = architecture.classifier().eval()
    assert model(torch.randn(2, 3, 16, 16), interpolate_pos_encoding=True).logits.shape == (2, 5)


def test_missing_images_are_refused(architecture):
    with pytest.raises(ValueError, match="`pixel_values` is None"):
        architecture.classifier()(labels=torch.zeros(2, dtype=torch.long))


# --- What users of transformers combine it with ---


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(architecture, batch, use_reentrant):
    model = randomize(architecture.classifier(shuffle_mode="arbitrary", **EXTRAS)).train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for each in (model, twin):
        each.base_model.seed_execution_order(5)
        calls = record_layer_calls(each)
        each(**batch).loss.backward()
        assert sorted(calls[:4]) == [0, 1, 2, 3]
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(other.grad, parameter.grad, msg=name)


def test_bf16_autocast(architecture, batch):
    model = architecture.classifier(shuffle_mode="arbitrary", **EXTRAS).train()
    expected = model(**batch, execution_order=[3, 2, 1, 0])
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch, execution_order=[3, 2, 1, 0])
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.logits.float(), expected.logits, atol=0.02, rtol=0.05)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_bf16_weights(architecture, batch):
    model = architecture.classifier(shuffle_mode="arbitrary", **EXTRAS).to(torch.bfloat16).train()
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


def test_fsdp_and_device_maps_find_the_layer_class(architecture):
    model = architecture.classifier(**EXTRAS)
    names = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= names
    assert type(model.base_model.layers[0]).__name__ in model._no_split_modules
