"""Depth embedding and position predictor."""

import pytest
import torch
from support.models import randomize
from torch import nn

from hf_layershuffle.models.position_modules import DepthProjection, PositionHead, position_loss


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
