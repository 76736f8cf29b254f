import numpy as np
import pytest
import torch
from support.encoder_checks import free_model
from support.encoders import ENCODERS
from support.models import randomize

import hf_layershuffle as ls
from hf_layershuffle.deployment.plain_vit import to_plain_vit
from hf_layershuffle.models import layer_controller
from hf_layershuffle.models.layer_controller import choose_layers, draw_budget, gumbel_noise, straight_through_gates


CLASSIFIERS = [name for name, encoder in ENCODERS.items() if encoder.is_classifier]
ORDERS = ([0, 1, 2, 3], [2, 0, 3, 1], [3, 1], [1, 1, 0])


def make_vit(**flags):
    torch.manual_seed(0)
    config = ls.LayerShuffleViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        num_labels=5, **{"layer_controller": True, **flags},
    )  # fmt: skip
    return randomize(ls.LayerShuffleViTForImageClassification(config)).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def choices(model, inputs, order, budget):
    """The layers of each example, by the scores that the controller gives."""
    scores = []
    handle = model.layer_controller.register_forward_hook(lambda module, args, output: scores.append(output))
    model(**inputs, execution_order=order, layer_budget=budget)
    handle.remove()
    is_chosen = choose_layers(scores[0][:, order], budget).tolist()
    return [[layer for layer, runs in zip(order, row) if runs] for row in is_chosen]


def assert_runs_its_choice(model, inputs, order, budget):
    """Each example has the logits of the model run through its layers; gives the choices."""
    output = model(**inputs, execution_order=order, layer_budget=budget)
    assert output.num_layers_run.tolist() == [budget] * len(output.logits)
    chosen = choices(model, inputs, order, budget)
    for index, layers in enumerate(chosen):
        expected = model(**inputs, execution_order=layers, layer_budget="off").logits[index]
        torch.testing.assert_close(output.logits[index], expected, rtol=1e-5, atol=1e-5)
    return chosen


@pytest.mark.parametrize("flags", [{}, {"depth_embedding": True}, {"position_predictor": True}], ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
@torch.no_grad()
def test_each_image_runs_its_best_layers(images, flags, order):
    model = make_vit(**flags)
    kinds = set()
    for budget in range(1, len(order) + 1):
        kinds |= set(map(tuple, assert_runs_its_choice(model, {"pixel_values": images}, order, budget)))
    assert len(kinds) > len(order) or len(set(order)) < 3  # else all images choose alike, and nothing is shown


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_every_family_with_a_head(name):
    try:
        model = free_model(ENCODERS[name], layer_controller=True)
    except ValueError as error:
        assert "no depth embedding, position predictor, halting head or layer controller" in str(error)
        return
    inputs = ENCODERS[name].inputs()
    inputs = {
        key: torch.cat([value, value.flip(0)]) if isinstance(value, torch.Tensor) else value
        for key, value in inputs.items()
    }
    assert_runs_its_choice(model, inputs, [2, 0, 3, 1], 2)


@torch.no_grad()
def test_all_layers_are_the_model_bit_for_bit(images):
    model, order = make_vit(depth_embedding=True), [2, 0, 3, 1]
    output = model(images, execution_order=order, layer_budget=4)
    assert torch.equal(output.logits, model(images, execution_order=order).logits)
    assert output.execution_order.tolist() == order and output.position_logits is None


@torch.no_grad()
def test_only_images_that_chose_a_layer_run_it(images):
    model = make_vit()
    model(images, layer_budget=2)  # the first call of a model sees what its layers give
    counts = [0] * 4
    for index, layer in enumerate(model.free_layers):
        layer.register_forward_pre_hook(
            lambda module, args, index=index: counts.__setitem__(index, counts[index] + len(args[0]))
        )
    chosen = choices(model, {"pixel_values": images}, [0, 1, 2, 3], 2)
    assert sum(counts) == 24 and counts == [sum(layer in each for each in chosen) for layer in range(4)]
    assert len(set(map(tuple, chosen))) > 1


@torch.no_grad()
def test_the_first_layer_may_have_no_examples(images):
    model = make_vit()
    model.layer_controller.scores.weight.zero_()
    model.layer_controller.scores.bias.copy_(torch.tensor([-5.0, 0.0, 5.0, 1.0]))
    output = model(images[:1], layer_budget=2)  # of a model that was never run before
    torch.testing.assert_close(output.logits, make_vit()(images[:1], execution_order=[2, 3]).logits)


def test_choose_layers_by_hand():
    scores = torch.tensor([[0.1, 0.5, 0.3], [2.0, 2.0, 2.0]])
    assert choose_layers(scores, 1).tolist() == [[False, True, False], [True, False, False]]
    assert choose_layers(scores, 2).tolist() == [[False, True, True], [True, True, False]]
    assert choose_layers(scores, 3).all()


@torch.no_grad()
def test_padding_does_not_count():
    controller = layer_controller.LayerController(8, 3, 1e-6)
    torch.nn.init.normal_(controller.scores.weight)
    states = torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with_padding = controller(states, mask)
    torch.testing.assert_close(with_padding[:1], controller(states[:1, :3]))
    torch.testing.assert_close(with_padding[1:], controller(states[1:]))
    assert controller(states).dtype == torch.float32 and not torch.allclose(controller(states)[0], with_padding[0])


# --- Training ---


def test_gates_are_hard_and_their_gradient_is_of_the_softmax():
    scores = torch.tensor([[0.1, 0.5, 0.3]], requires_grad=True)
    gates = straight_through_gates(scores, 2)
    assert gates.tolist() == [[0.0, 1.0, 1.0]]
    weights = torch.tensor([[3.0, -1.0, 2.0]])
    (gates * weights).sum().backward()
    soft = scores.detach().softmax(1)
    torch.testing.assert_close(scores.grad, soft * (weights - (soft * weights).sum()))


def test_a_step_of_training_has_the_logits_of_the_choice(images):
    """With noise; the chosen layers run as in evaluation, and the gradient reaches the controller."""
    model = make_vit(depth_embedding=True, hidden_dropout_prob=0.5, position_predictor=True, layerdrop=0.5).train()
    labels = torch.arange(12) % 5
    model.seed_execution_order(0, step=3)
    output = model(images, labels=labels, layer_budget=2)
    model.seed_execution_order(0, step=3)
    rng = model.execution_order_stream.next_generator(True)
    noise = gumbel_noise(rng, 12, 4)
    states = []
    model.vit.embeddings.register_forward_hook(lambda module, args, out: states.append(out))
    model.eval()
    model(images)
    is_chosen = choose_layers(model.layer_controller(states[0]) + noise, 2)
    for index, row in enumerate(is_chosen.tolist()):
        layers = [layer for layer, runs in enumerate(row) if runs]
        expected = model(images, execution_order=layers, layer_budget="off").logits[index]
        torch.testing.assert_close(output.logits[index], expected, rtol=1e-5, atol=1e-5)
    assert output.position_logits is None and output.num_layers_run.tolist() == [2] * 12
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    output.loss.backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in model.layer_controller.parameters())


def test_layers_that_were_not_chosen_have_a_gradient(images):
    """The gate of each layer has the gradient of what it changes, by hand."""
    model = make_vit()
    parts = ls.LayerwiseClassifier(model)
    with torch.no_grad():
        states = parts.embed(images)
    gates = torch.zeros(12, 4, requires_grad=True)

    def logits():
        hidden = states
        for index in range(4):
            after, _ = parts.run_layer(hidden, index, index)
            hidden = hidden + gates[:, index].view(-1, 1, 1) * (after - hidden)
        return parts.classify(hidden)

    with torch.no_grad():
        scores = model.layer_controller(states)
        gates[:] = choose_layers(scores + gumbel_noise(np.random.default_rng(0), 12, 4), 2).float()
    labels = torch.arange(12) % 5
    (by_gate,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits(), labels), gates)
    assert (by_gate[gates == 0] != 0).any()
    model.train()
    model.execution_order_stream.next_generator = lambda training: np.random.default_rng(0)
    leaf = []

    def keep(module, args, output):
        leaf.append(output.detach().requires_grad_())
        return leaf[0]

    model.layer_controller.register_forward_hook(keep)
    model(images, labels=labels, layer_budget=2).loss.backward()
    soft = (leaf[0].detach() + gumbel_noise(np.random.default_rng(0), 12, 4)).softmax(1)
    expected = soft * (by_gate - (soft * by_gate).sum(1, keepdim=True))
    torch.testing.assert_close(leaf[0].grad, expected, rtol=1e-4, atol=1e-6)


def test_budgets_are_drawn_by_seed_step_and_micro_batch(images):
    model = make_vit().train()

    def drawn(seed, step, count=6):
        model.seed_execution_order(seed, step)
        return [int(model(images[:2]).num_layers_run[0]) for _ in range(count)]

    assert drawn(0, 0) == drawn(0, 0)
    together = [budget for step in range(8) for budget in drawn(0, step)]
    assert set(together) == {1, 2, 3}
    assert together != [budget for step in range(8) for budget in drawn(1, step)]
    counts = np.bincount([draw_budget(np.random.default_rng(seed), 4) for seed in range(600)], minlength=4)[1:]
    assert counts.sum() == 600 and abs(counts - 200).max() < 45
    assert draw_budget(np.random.default_rng(0), 1) == 1


def test_processes_share_the_noise_of_the_whole_batch(monkeypatch):
    whole = gumbel_noise(np.random.default_rng(5), 8, 4)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(gumbel_noise(np.random.default_rng(5), 4, 4))
    assert torch.equal(torch.cat(parts), whole)
    assert 0.05 < whole.std() < 0.3  # 0.1 pi / sqrt(6) = 0.128


def test_training_follows_the_order_of_evaluation(images):
    model = make_vit(shuffle_mode="arbitrary", execution_order=[3, 1, 0]).train()
    assert model(images).execution_order.tolist() == [3, 1, 0]
    assert model(images, layer_budget="off").execution_order.shape == (4,)
    assert model(images, layer_budget="off").num_layers_run is None


# --- The configuration, and what is stored ---


@torch.no_grad()
def test_the_configuration_says_it_too_and_a_call_wins(images, tmp_path):
    model = make_vit(layer_budget=2)
    expected = make_vit()(images, layer_budget=2)
    assert torch.equal(model(images).logits, expected.logits)
    assert [model(images, layer_budget=k).num_layers_run[0].item() for k in (3, 1, 4)] == [3, 1, 4]
    assert model(images, layer_budget="off").num_layers_run is None
    assert model(images, exit_patience=1).num_layers_run.tolist() == [1] * 12  # the call's rule, not the budget
    model.save_pretrained(tmp_path)
    loaded = ls.LayerShuffleViTForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(images).logits, expected.logits)
    assert (tmp_path / "layer_controller.py").is_file()
    encoder = ls.LayerShuffleViTModel.from_pretrained(tmp_path, add_pooling_layer=False)
    torch.testing.assert_close(encoder(images).last_hidden_state, make_vit().vit(images).last_hidden_state)
    rules = {"progress": False, "num_orders": 2, "num_subsets": 1}
    items = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(images)]
    assert ls.evaluate_robustness(loaded, items, **rules).sequential == (
        ls.evaluate_robustness(make_vit(), items, **rules).sequential
    )


@torch.no_grad()
def test_a_free_model_gets_a_new_controller(images, tmp_path):
    make_vit(layer_controller=False).save_pretrained(tmp_path)
    loaded = ls.LayerShuffleViTForImageClassification.from_pretrained(tmp_path, layer_controller=True)
    assert torch.equal(loaded(images, layer_budget=2).logits, loaded(images, execution_order=[0, 1]).logits)
    assert loaded.layer_controller.scores.weight.abs().sum() == 0  # it says nothing yet
    plain = ls.LayerShuffleViTForImageClassification.from_pretrained(tmp_path)
    assert plain.config.layer_controller is False and not hasattr(plain, "layer_controller")


def test_new_models_of_other_layers_do_not_keep_it(images, tmp_path, caplog):
    model = make_vit(layer_budget=2)
    short = ls.prune_layers(model, [0, 1, 3])
    assert not short.config.layer_controller and short.config.layer_budget is None
    assert not hasattr(short, "layer_controller") and model.layer_controller is not None
    with torch.no_grad():
        expected = model(images, execution_order=[0, 1, 3], layer_budget="off").logits
        torch.testing.assert_close(short(images).logits, expected)
        plain = to_plain_vit(model)
        torch.testing.assert_close(plain(images).logits, model(images, layer_budget="off").logits)
    assert not any("controller" in name for name in plain.state_dict())
    assert not hasattr(plain.config, "layer_budget")
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
    layers = [{"source": name, "layer": layer} for name, layer in (("one", 0), ("two", 1), ("two", 3))]
    plan = ls.MergePlan(sources={name: str(tmp_path / name) for name in ("one", "two")}, layers=layers, base="one")
    ls.merge(plan, tmp_path / "merged")
    merged = ls.LayerShuffleViTForImageClassification.from_pretrained(tmp_path / "merged")
    assert not merged.config.layer_controller and merged.config.layer_budget is None
    with torch.no_grad():
        torch.testing.assert_close(merged(images).logits, expected)


def test_a_controller_of_another_depth_is_refused(images, tmp_path):
    model = make_vit()
    model.layer_controller.scores = torch.nn.Linear(32, 6)
    with pytest.raises(ValueError, match="the number of layers that the layer controller scores is 6"):
        model(images, layer_budget=2)
    model.config.num_hidden_layers = 4
    make_vit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"position predictor or layer controller `num_hidden_layers`"):
        ls.LayerShuffleViTForImageClassification.from_pretrained(tmp_path, num_hidden_layers=3)


# --- What is refused ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer_budget": 0}, "`layer_budget` is 0; it must be an integer from 1 to 4"),
        ({"layer_budget": 5}, "`layer_budget` is 5; it must be an integer from 1 to 4"),
        ({"layer_budget": 3, "execution_order": [0, 1]}, "`layer_budget` is 3; it must be an integer from 1 to 2"),
        ({"layer_budget": True}, "`layer_budget` is True"),
        ({"layer_budget": 2.0}, r"`layer_budget` is 2\.0"),
        ({"layer_budget": "all"}, "'all'; it must be .* or 'off'"),
        ({"layer_budget": 2, "exit_threshold": 0.5}, "`layer_budget` is 2, and the call also says when"),
        ({"layer_budget": 2, "exit_patience": 1}, "give one of them"),
        (
            {"layer_budget": 2, "output_hidden_states": True},
            "`output_hidden_states` is True, and examples that choose",
        ),
        ({"layer_budget": 2, "output_attentions": True}, "Leave `layer_budget` out"),
    ],
    ids=str,
)
def test_bad_arguments(images, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_vit()(images, **arguments)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"layer_budget": 0}, "`layer_budget` is 0; it must be None or an integer of at least 1"),
        ({"layer_budget": 5}, "`layer_budget` is 5, and 4 layers run; it must be from 1 to 4"),
        ({"layer_budget": 2, "layer_controller": False}, "there is no layer controller to choose layers by"),
        ({"layer_budget": 2, "exit_threshold": 0.5}, "`layer_budget` is 2 and `exit_threshold` is 0.5"),
        ({"layer_controller": 1}, "`layer_controller` is 1; it must be True or False"),
    ],
    ids=str,
)
def test_bad_configurations(flags, message):
    with pytest.raises(ValueError, match=message):
        make_vit(**flags)


def test_models_that_cannot_choose(images):
    with pytest.raises(ValueError, match=r"LayerShuffleViTModel has no head that classifies"):
        make_vit().vit(images, layer_budget=2)
    with pytest.raises(ValueError, match="has no layer controller to choose layers by"):
        make_vit(layer_controller=False)(images, layer_budget=2)
    with pytest.raises(ValueError, match="has no layer controller to train"):
        layer_controller.train_controller_only(make_vit().vit)


@torch.no_grad()
def test_a_compiled_model_gives_the_same(images):
    model = make_vit()
    expected = model(images, layer_budget=2)
    torch._dynamo.reset()
    output = torch.compile(model, backend="eager")(images, layer_budget=2)
    torch.testing.assert_close(output.logits, expected.logits)
    assert output.num_layers_run.tolist() == [2] * 12


def test_models_of_other_tasks_have_budgets_too(images):
    """A budget asks for no class: regression and several labels an image are as they are."""
    model = make_vit()
    model.config.num_labels, model.config.problem_type = 1, "regression"
    with torch.no_grad():
        assert model(images, layer_budget=2).num_layers_run.tolist() == [2] * 12


def test_bfloat16(images):
    model = make_vit(depth_embedding=True).to(torch.bfloat16)
    with torch.no_grad():
        assert model(images.bfloat16(), layer_budget=2).logits.dtype == torch.bfloat16
    output = model.train()(images.bfloat16(), labels=torch.arange(12) % 5)
    output.loss.backward()
    assert model.layer_controller.scores.weight.grad.dtype == torch.bfloat16
