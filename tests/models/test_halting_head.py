"""Trained exits: the halting head, what it gives in training, and leaving by it."""

import pytest
import torch
from support.encoder_checks import free_model
from support.encoders import ENCODERS
from support.models import randomize
from torch.nn import functional as F

import hf_layershuffle as ls
from hf_layershuffle.models.families import CHANNELS_FIRST
from hf_layershuffle.models.halting_head import (
    HaltingHead,
    halting_losses,
    log_prior,
    log_probabilities_of_leaving,
    mean_and_first_token,
)
from hf_layershuffle.models.position_modules import position_loss


CLASSIFIERS = [
    name for name, encoder in ENCODERS.items() if encoder.is_classifier and encoder.model_type not in CHANNELS_FIRST
]
ORDERS = ([0, 1, 2, 3], [2, 0, 3, 1], [1, 1, 0], [3])
Q_EXIT = {"exit_threshold": 0.5, "exit_criterion": "halting"}


@pytest.fixture(scope="module")
def images():
    return torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def make_vit(is_random=True, **flags):
    torch.manual_seed(0)
    config = ls.LayerShuffleViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        **{"num_labels": 5, "halting_head": True, **flags},
    )  # fmt: skip
    model = ls.LayerShuffleViTForImageClassification(config).eval()
    return randomize(model) if is_random else model


def several(value):
    """Six examples of two, which differ."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.cat([value, value.flip(0), value.roll(1, -1) if value.is_floating_point() else value])


@torch.no_grad()
def spread(model, **inputs):
    """Makes the head say of different examples different things, and let half of them leave early."""
    out = model.halting_head.out
    said = []
    handle = out.register_forward_hook(lambda module, args, output: said.append(output))
    as_in_training(model)(**inputs)
    handle.remove()
    first = said[0][:, 0]
    scale = 2 / first.std()
    out.weight.mul_(scale)
    out.bias.copy_((out.bias - first.median()) * scale - 0.1)  # not at 0.5 for any
    return model.eval()


def as_in_training(model):
    """In training mode, but without dropout, whatever the family's default."""
    for module in model.modules():
        module.training = module is model
    return model


# --- By hand ---


def test_probabilities_by_hand():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).logit()
    # 0.2; 0.8 * 0.5; and all that is left
    torch.testing.assert_close(log_probabilities_of_leaving(logits).exp(), torch.tensor([[0.2, 0.4, 0.4]]))
    extreme = log_probabilities_of_leaving(torch.tensor([[-200.0, 200.0, 200.0], [200.0, -200.0, 0.0]]))
    assert extreme.exp().tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]] and extreme.isfinite().all()


def test_the_prior_is_geometric_cut_off_and_sums_to_one():
    expected = torch.tensor([0.1, 0.1 * 0.9, 0.1 * 0.9**2])
    torch.testing.assert_close(log_prior(0.1, 3).exp(), expected / expected.sum())


def test_the_loss_by_hand():
    probabilities, losses = torch.tensor([[0.2, 0.3, 0.5]]), torch.tensor([[3.0, 2.0, 1.0]])
    prior = log_prior(0.1, 3).exp()
    divergence = (probabilities * (probabilities / prior).log()).sum()
    expected = 0.2 * 3 + 0.3 * 2 + 0.5 * 1 + 0.25 * divergence
    torch.testing.assert_close(halting_losses(losses, probabilities.log(), 0.1, 0.25)[0], expected)
    assert halting_losses(0 * losses, log_prior(0.1, 3)[None], 0.1, 0.5).abs() < 1e-6
    # A layer that is never left at counts for nothing, and breaks nothing
    never = log_probabilities_of_leaving(torch.tensor([[-1e4, 0.0, 0.0]], requires_grad=True))
    loss = halting_losses(losses, never, 0.1, 0.5).sum()
    assert loss.isfinite()


def test_the_head_reads_the_states_before_and_after():
    torch.manual_seed(0)
    head = randomize(HaltingHead(8, 1e-5, 0.1))
    before, after = torch.randn(3, 16), torch.randn(3, 16)
    joined = F.layer_norm(torch.cat([before, after], -1), (32,), head.norm.weight, head.norm.bias, 1e-5)
    expected = head.out(F.gelu(head.dense(joined)))[:, 0]
    torch.testing.assert_close(head(before, after), expected)
    assert not torch.allclose(head(before, after), head(after, before))


def test_padding_is_left_out():
    states = torch.randn(3, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1]])
    means = torch.stack([states[0, :2].mean(0), states[1].mean(0), states[2, 1:].mean(0)])
    firsts = torch.stack([states[0, 0], states[1, 0], states[2, 1]])
    torch.testing.assert_close(mean_and_first_token(states, mask), torch.cat([means, firsts], 1))
    whole = torch.cat([states.mean(1), states[:, 0]], 1)
    torch.testing.assert_close(mean_and_first_token(states, torch.ones(3, 9)), whole)


# --- In training ---


def test_a_fresh_head_says_the_prior(images):
    output = make_vit(is_random=False, halting_prior=0.3).train()(images)
    expected = torch.tensor([0.3, 0.7 * 0.3, 0.7**2 * 0.3, 0.7**3]).expand(12, -1)
    torch.testing.assert_close(output.halting_log_probabilities.exp(), expected)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("flags", [{}, {"depth_embedding": True, "position_predictor": True}], ids=str)
def test_training_gives_the_answers_after_all_layers(images, order, flags):
    model = make_vit(**flags)
    labels = torch.arange(12) % 5
    labels[3] = -100
    with torch.no_grad():
        expected = torch.stack([model(images, execution_order=order[: n + 1]).logits for n in range(len(order))], 1)
    output = model.train()(images, labels=labels, execution_order=order)
    torch.testing.assert_close(output.layer_logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.logits, expected[:, -1])
    sums = output.halting_log_probabilities.exp().sum(1)
    torch.testing.assert_close(sums, torch.ones(12))
    by_layer = torch.stack([F.cross_entropy(each, labels, reduction="none") for each in expected.unbind(1)], 1)
    losses = halting_losses(by_layer, output.halting_log_probabilities, 0.1, 0.5)
    expected_loss = losses[labels != -100].mean()
    if output.position_logits is not None:
        expected_loss = expected_loss + position_loss(output.position_logits, labels)
    torch.testing.assert_close(output.loss, expected_loss)
    output.loss.backward()
    assert all(each.grad is not None for each in model.halting_head.parameters())  # also of one layer


def test_steps_of_micro_batches_add_up(images):
    model, labels = make_vit().train(), torch.arange(12) % 5
    labels[:4] = -100
    whole = model(images, labels=labels, execution_order=[1, 0]).loss
    parts = [
        model(images[rows], labels=labels[rows], execution_order=[1, 0], num_items_in_batch=8).loss
        for rows in (slice(0, 5), slice(5, 12))
    ]
    torch.testing.assert_close(sum(parts), whole)
    nothing = model(images, labels=torch.full((12,), -100)).loss
    assert nothing == 0


@torch.no_grad()
def test_evaluation_has_the_plain_loss_and_no_answers_of_layers(images):
    output = make_vit()(images, labels=torch.arange(12) % 5)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, torch.arange(12) % 5))
    assert output.layer_logits is None and output.halting_log_probabilities is None


def test_the_first_step_leaves_modes_and_random_numbers_as_they_are(images):
    model = make_vit(hidden_dropout_prob=0.5).train()
    model.vit.embeddings.eval()
    modes = [module.training for module in model.modules()]
    outputs = []
    for _ in "12":  # the first looks what the head reads, the second knows it
        torch.manual_seed(0)
        outputs.append(model(images, execution_order=[0, 1, 2, 3]).layer_logits)
    assert torch.equal(*outputs) and model._reads_inputs_after_layers is False
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    "flags", [{"shuffle_mode": "arbitrary"}, {"layerdrop": 0.5}, {"drop_path_rate": 0.3}], ids=str
)
def test_each_mode_of_training(images, flags):
    model = make_vit(**flags).train()
    model.seed_execution_order(3, 1)
    for _ in range(4):
        output = model(images, labels=torch.arange(12) % 5)
        assert output.layer_logits.shape == (12, len(output.execution_order), 5)
        assert torch.equal(output.layer_logits[:, -1], output.logits) and output.loss.isfinite()


def test_a_training_step_of_a_compiled_model(images):
    model, labels = make_vit().train(), torch.arange(12) % 5
    expected = model(images, labels=labels)
    torch._dynamo.reset()
    output = torch.compile(model, backend="eager")(images, labels=labels)
    torch.testing.assert_close(output.loss, expected.loss)


# --- Leaving ---


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_family_with_a_head(name):
    inputs = {key: several(value) for key, value in ENCODERS[name].inputs().items()}
    order = [2, 0, 3, 1]
    model = spread(randomize(free_model(ENCODERS[name], halting_head=True)), **inputs, execution_order=order)
    with torch.no_grad():
        depths = [model(**inputs, execution_order=order[:depth]).logits for depth in range(1, 5)]
        trained = as_in_training(model)(**inputs, execution_order=order)
        model.eval()
        torch.testing.assert_close(trained.layer_logits, torch.stack(depths, 1), rtol=1e-4, atol=1e-4)
        left = trained.halting_log_probabilities.exp().cumsum(1)
        # Between two examples after the first layer, so that some leave there
        threshold = float((left[:, 0].min() + left[:, 0].max()) / 2)
        output = model(**inputs, execution_order=order, exit_threshold=threshold, exit_criterion="halting")
    leaves = left > threshold
    leaves[:, -1] = True
    assert output.num_layers_run.tolist() == (leaves.int().argmax(1) + 1).tolist()
    assert output.num_layers_run.min() == 1
    for index, depth in enumerate(output.num_layers_run.tolist()):
        torch.testing.assert_close(output.logits[index], depths[depth - 1][index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@torch.no_grad()
def test_q_exit_leaves_where_half_have_left(images, order):
    model = spread(make_vit(), pixel_values=images)
    left = model.train()(images, execution_order=order).halting_log_probabilities.exp().cumsum(1)
    output = model.eval()(images, execution_order=order, **Q_EXIT)
    leaves = left > 0.5
    leaves[:, -1] = True
    assert output.num_layers_run.tolist() == (leaves.int().argmax(1) + 1).tolist()
    if len(order) > 1:
        assert len(set(output.num_layers_run.tolist())) > 1  # else nothing is shown
    for index, depth in enumerate(output.num_layers_run.tolist()):
        expected = model(images, execution_order=order[:depth]).logits[index]
        torch.testing.assert_close(output.logits[index], expected, rtol=1e-5, atol=1e-5)
    ends = [model(images, **(Q_EXIT | {"exit_threshold": each})).num_layers_run.unique() for each in (0.0, 1.0)]
    assert [each.tolist() for each in ends] == [[1], [4]]


@torch.no_grad()
def test_padding_changes_nothing():
    name = next(name for name in CLASSIFIERS if ENCODERS[name].model_class == "BertForSequenceClassification")
    model = randomize(free_model(ENCODERS[name], halting_head=True))
    tokens = torch.randint(5, 30, (6, 7), generator=torch.Generator().manual_seed(0))
    padded = {"input_ids": F.pad(tokens, (0, 5)), "attention_mask": F.pad(torch.ones_like(tokens), (0, 5))}
    alone = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    spread(model, **alone)
    assert torch.equal(model(**padded, **Q_EXIT).num_layers_run, model(**alone, **Q_EXIT).num_layers_run)
    as_in_training(model)
    torch.testing.assert_close(
        model(**padded).halting_log_probabilities, model(**alone).halting_log_probabilities, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_bfloat16(images):
    model = spread(make_vit(), pixel_values=images).to(torch.bfloat16)
    assert model(images.bfloat16(), **Q_EXIT).logits.dtype == torch.bfloat16
    assert model.train()(images.bfloat16()).halting_log_probabilities.dtype == torch.float32


# --- Its life with the weights ---


@torch.no_grad()
def test_it_travels_with_the_weights(images, tmp_path):
    model = spread(make_vit(**Q_EXIT), pixel_values=images)
    expected = model(images)
    model.save_pretrained(tmp_path / "whole")
    loaded = ls.LayerShuffleViTForImageClassification.from_pretrained(tmp_path / "whole")
    assert torch.equal(loaded(images).num_layers_run, expected.num_layers_run)
    torch.testing.assert_close(loaded(images).logits, expected.logits)
    encoder = ls.LayerShuffleViTModel.from_pretrained(tmp_path / "whole", add_pooling_layer=False)
    torch.testing.assert_close(encoder(images).last_hidden_state, model.vit(images).last_hidden_state)
    assert not hasattr(encoder.train(), "halting_head") and encoder(images).last_hidden_state is not None
    without = ls.LayerShuffleViTForImageClassification.from_pretrained(
        tmp_path / "whole", halting_head=False, exit_threshold=None
    )
    assert not hasattr(without, "halting_head")


@torch.no_grad()
def test_a_model_without_one_gets_one_at_the_prior(images, tmp_path):
    plain = make_vit(halting_head=False)
    plain.save_pretrained(tmp_path)
    for model in (
        ls.LayerShuffleViTForImageClassification.from_pretrained(tmp_path, halting_head=True, halting_prior=0.25),
        ls.free_order(ls.to_plain_vit(plain), halting_head=True, halting_prior=0.25),
    ):
        torch.testing.assert_close(model.eval()(images).logits, plain(images).logits)
        first = model.train()(images).halting_log_probabilities[:, 0].exp()
        torch.testing.assert_close(first, torch.full((12,), 0.25))


@torch.no_grad()
def test_smaller_merged_and_plain_models(images, tmp_path):
    model = spread(make_vit(**Q_EXIT), pixel_values=images)
    short = ls.prune_layers(model, [2, 0])
    assert short.config.halting_head and short.config.exit_threshold is None  # the head stays, the rule goes
    expected = model(images, execution_order=[2, 0], **Q_EXIT)
    assert torch.equal(short(images, **Q_EXIT).num_layers_run, expected.num_layers_run)
    plain = ls.to_plain_vit(make_vit())
    assert type(plain).__name__ == "ViTForImageClassification" and not hasattr(plain, "halting_head")
    assert not any("halting" in name for name in (*plain.state_dict(), *plain.config.to_dict()))
    for name in ("one", "two"):
        make_vit().save_pretrained(tmp_path / name)
    plan = ls.MergePlan(
        sources={"one": str(tmp_path / "one"), "two": str(tmp_path / "two")},
        layers=[{"source": "one", "layer": 0}, {"source": "two", "layer": 1}],
        base="one",
    )
    ls.merge(plan, tmp_path / "merged")
    merged = ls.LayerShuffleViTForImageClassification.from_pretrained(tmp_path / "merged")
    assert not merged.config.halting_head and not hasattr(merged, "halting_head")


# --- Bad input ---


@pytest.mark.parametrize(
    "flags",
    [
        {"halting_head": 1},
        {"halting_prior": 0.0},
        {"halting_prior": 1.0},
        {"halting_prior": "0.1"},
        {"halting_loss_weight": -1},
        {"halting_loss_weight": float("inf")},
    ],
    ids=str,
)
def test_bad_configurations(flags):
    name = next(iter(flags))
    with pytest.raises(ValueError, match=f"`{name}` is .*; it must be "):
        make_vit(**flags)


def test_refusals(images):
    without = make_vit(halting_head=False)
    with pytest.raises(ValueError, match=r"and this .* has no halting head"):
        without(images, **Q_EXIT)
    with pytest.raises(ValueError, match="in training mode"):
        make_vit().train()(images, **Q_EXIT)
    regression = make_vit(num_labels=1).train()
    with pytest.raises(ValueError, match="'regression'\\. Set `halting_head` to False, or take another model"):
        regression(images)
    several_classes = make_vit(problem_type="multi_label_classification").train()
    with pytest.raises(ValueError, match="'multi_label_classification'"):
        several_classes(images, labels=torch.ones(12, 5))
