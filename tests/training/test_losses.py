"""The losses, wherever they are computed."""

import pytest
import torch
from support.trainers import RandomImages, arguments, one_sgd_step
from torch.nn import functional as F

import hf_layershuffle as ls
from hf_layershuffle.models.position_modules import position_loss


def mean_over_the_step(outputs, labels, num_items_in_batch):
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


class OwnLoss(ls.LayerShuffleTrainer):
    """As the documentation of transformers shows it: means over a micro-batch, of outputs that know no labels."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class OwnLossBesideTheModels(OwnLoss):
    """The model computes its loss too, and it is not used."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = F.cross_entropy(model(**inputs).logits, inputs["labels"])
        return (loss, None) if return_outputs else loss


class TwiceTheModelsLoss(OwnLoss):
    def compute_loss(self, model, inputs, **kwargs):
        return 2 * model(**inputs).loss


class TwoForwards(OwnLoss):
    def compute_loss(self, model, inputs, **kwargs):
        return sum(F.cross_entropy(model(inputs["pixel_values"]).logits, inputs["labels"]) for _ in "12") / 2


class OwnPositionLoss(OwnLoss):
    def compute_loss(self, model, inputs, **kwargs):
        outputs = model(inputs["pixel_values"])
        return F.cross_entropy(outputs.logits, inputs["labels"]) + position_loss(outputs.position_logits)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    ("kind", "class_factor", "position_factor", "options"),
    [
        (ls.LayerShuffleTrainer, 1, 0.5, {}),
        (ls.LayerShuffleTrainer, 1, 0.5, {"label_smoothing_factor": 0.1}),
        (mean_over_the_step, 1, 0.5, {}),
        (OwnLoss, 1, 0.5, {}),
        (OwnLossBesideTheModels, 1, 0.5, {"gradient_checkpointing": True}),
        (TwiceTheModelsLoss, 2, 1, {}),
        (TwoForwards, 1, 0.5, {}),
        (OwnPositionLoss, 1, 1, {}),
    ],
)
def test_the_position_loss_counts_once_wherever_the_class_loss_is_computed(
    vit, tmp_path, kind, class_factor, position_factor, options, micro_batches
):
    """`position_factor` is the configuration's 0.5, but where the trainer of the test takes it into its own hands."""
    model, expected = (vit.classifier(position_predictor=True, position_loss_weight=0.5) for _ in "12")
    data, smoothing = RandomImages(8), options.get("label_smoothing_factor", 0)
    data.labels[[0, -1]] = -100  # as many in each micro-batch
    outputs = expected.train()(data.images)
    loss = class_factor * F.cross_entropy(outputs.logits, data.labels, label_smoothing=smoothing)
    positions = outputs.position_logits if kind is OwnPositionLoss else outputs.position_logits[1:-1]
    loss = loss + position_factor * position_loss(positions)
    loss.backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    trainer_class, compute_loss_func = kind, None
    if not isinstance(kind, type):
        trainer_class, compute_loss_func = ls.LayerShuffleTrainer, kind
    args = one_sgd_step(tmp_path, micro_batches, **options)
    trainer = trainer_class(model, args, train_dataset=data, compute_loss_func=compute_loss_func)
    logged = trainer.train().training_loss
    assert "compute_loss" not in vars(trainer)
    assert logged == pytest.approx(loss.item(), rel=1e-4)
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(parameter, other, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("flags", [{}, {"position_predictor": True}])
def test_images_without_a_label_teach_nothing(vit, tmp_path, flags):
    model, start = vit.classifier(**flags), vit.classifier(**flags)
    data = RandomImages(16)
    data.labels[:] = -100
    args = arguments(tmp_path, max_steps=2, optim="sgd")
    ls.LayerShuffleTrainer(model, args, train_dataset=data).train()
    assert all(torch.equal(ours, other) for ours, other in zip(model.parameters(), start.parameters()))


def test_only_training_has_a_position_loss(vit, tmp_path):
    model, data = vit.classifier(position_predictor=True), RandomImages()
    trainer = ls.LayerShuffleTrainer(
        model, arguments(tmp_path, label_smoothing_factor=0.1), eval_dataset=data, compute_metrics=ls.compute_metrics
    )
    expected = F.cross_entropy(model.eval()(data.images).logits, data.labels, label_smoothing=0.1).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
