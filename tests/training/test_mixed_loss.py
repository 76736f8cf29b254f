"""The loss of mixed images, wherever it is computed."""

import copy

import pytest
import torch
from support.images import image_dataset, processor
from support.trainers import MixedImages, RandomImages, arguments, one_sgd_step
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Subset
from transformers import Trainer

import hf_layershuffle as ls
from hf_layershuffle.data import Augmentation, ImageClassificationDataset
from hf_layershuffle.data.augmentation import MIXING, finish_batch
from hf_layershuffle.training.mixed_loss import mixed_loss, mixed_targets


def one_step(tmp_path, model, data, micro_batches=1, trainer_class=ls.LayerShuffleTrainer, teacher=None, **options):
    func = options.pop("compute_loss_func", None)
    args = one_sgd_step(tmp_path, micro_batches, **options)
    trainer = trainer_class(model, args, train_dataset=data, compute_loss_func=func, teacher_model=teacher)
    return trainer.train().training_loss


def assert_a_step_of(expected, loss, model, logged):
    loss.backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    assert logged == pytest.approx(loss.item(), rel=1e-4)
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(parameter, other, atol=1e-5, rtol=1e-4, msg=name)


# --- The functions ---


def test_targets_are_weighted_and_sum_to_one():
    labels, others = torch.tensor([0, 1, -100, 2]), torch.tensor([2, 1, 0, -100])
    targets = mixed_targets(labels, others, torch.tensor([0.75, 0.5, 0.5, 0.5]), 3)
    assert targets.tolist() == [[0.75, 0, 0.25], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    smoothed = mixed_targets(labels, others, torch.tensor([0.75, 0.5, 0.5, 0.5]), 3, smoothing=0.3)
    assert smoothed[0].tolist() == pytest.approx([0.7 * 0.75 + 0.1, 0.1, 0.7 * 0.25 + 0.1])
    assert smoothed.sum(1).tolist() == pytest.approx([1, 1, 0, 1])


def test_the_loss_is_pytorchs_of_these_targets_and_nothing_comes_of_images_that_are_left_out():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    logits[2] = float("nan")
    labels, others, weights = torch.tensor([0, 1, -100, 2]), torch.tensor([2, 1, 0, 1]), torch.rand(4)
    losses = mixed_loss(logits, labels, others, weights, 0.1)
    targets = mixed_targets(labels, others, weights, 3, 0.1)
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses[[0, 1, 3]], expected[[0, 1, 3]])
    assert losses[2] == 0


# --- In the Trainer ---


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("flags", [{}, {"position_predictor": True, "position_loss_weight": 0.5}])
def test_a_step_follows_the_loss_of_the_mixtures(vit, tmp_path, micro_batches, smoothing, flags):
    model, expected = (vit.classifier(**flags) for _ in "12")
    data = MixedImages(8)
    data.labels[2] = -100
    size = 8 // micro_batches
    outputs = expected.train()(data.mixed(size)[0])
    loss = data.cross_entropies(outputs.logits, size, smoothing).sum() / 7
    if flags:
        known = [index for index in range(8) if index != 2]
        loss = loss + 0.5 * ls.models.position_modules.position_loss(outputs.position_logits[known])
    logged = one_step(tmp_path, model, data, micro_batches, label_smoothing_factor=smoothing)
    assert_a_step_of(expected, loss, model, logged)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_teacher_sees_the_same_mixtures(vit, tmp_path, micro_batches):
    model, teacher = vit.classifier(), vit.classifier()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    expected, data, size = copy.deepcopy(model), MixedImages(8), 8 // micro_batches
    images = data.mixed(size)[0]
    logits = expected.train()(images).logits
    with torch.no_grad():
        answers = teacher.eval()(images).logits
    distilled = 4 * F.kl_div(
        F.log_softmax(logits / 2, -1), F.log_softmax(answers / 2, -1), log_target=True, reduction="batchmean"
    )
    loss = 0.4 * data.cross_entropies(logits, size).mean() + 0.6 * distilled
    logged = one_step(
        tmp_path, model, data, micro_batches, teacher=teacher, distillation_weight=0.6, distillation_temperature=2.0
    )
    assert_a_step_of(expected, loss, model, logged)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_loss_function_of_your_own_gets_target_probabilities(vit, tmp_path, micro_batches):
    def of_a_step(outputs, labels, num_items_in_batch):
        assert labels.shape == (8 // micro_batches, 5) and labels.dtype == torch.float32
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    model, expected = vit.classifier(), vit.classifier()
    data, size = MixedImages(8), 8 // micro_batches
    loss = data.cross_entropies(expected.train()(data.mixed(size)[0]).logits, size).mean()
    logged = one_step(tmp_path, model, data, micro_batches, compute_loss_func=of_a_step)
    assert_a_step_of(expected, loss, model, logged)


class CallsOurs(ls.LayerShuffleTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (2 * loss, outputs) if return_outputs else 2 * loss


class OwnLoss(ls.LayerShuffleTrainer):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, **kwargs):
        return model(**inputs).loss


def test_a_loss_of_a_subclass_goes_on_working(vit, tmp_path):
    model, expected, data = vit.classifier(), vit.classifier(), MixedImages(8)
    loss = 2 * data.cross_entropies(expected.train()(data.mixed(8)[0]).logits, 8).mean()
    assert_a_step_of(expected, loss, model, one_step(tmp_path, model, data, trainer_class=CallsOurs))


def test_a_loss_of_a_subclass_that_knows_no_mixtures_is_said(vit, tmp_path, caplog, monkeypatch):
    from hf_layershuffle.training import losses

    said = []
    monkeypatch.setattr(losses.logger, "warning_once", said.append)
    model, expected, data = vit.classifier(), vit.classifier(), MixedImages(8)
    loss = F.cross_entropy(expected.train()(data.mixed(8)[0]).logits, data.labels)
    assert_a_step_of(expected, loss, model, one_step(tmp_path, model, data, trainer_class=OwnLoss))
    assert len(said) == 1 and "does not call LayerShuffleTrainer's" in said[0]
    one_step(tmp_path, vit.classifier(), RandomImages(8), trainer_class=OwnLoss)
    assert len(said) == 1


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_several_labels_and_regression_are_refused(vit, tmp_path, problem_type):
    model, data = vit.classifier(problem_type=problem_type), MixedImages(8)
    data.labels = torch.rand(8, 5)
    with pytest.raises(ValueError, match=f"one class an image; this model has `problem_type` '{problem_type}'"):
        one_step(tmp_path, model, data)


def test_an_evaluation_of_mixed_images_is_of_both_classes(vit, tmp_path):
    model, data = vit.classifier(), MixedImages(8)
    args = arguments(tmp_path, eval_orders=2)
    trainer = ls.LayerShuffleTrainer(model, args, eval_dataset=data, compute_metrics=ls.compute_metrics)
    metrics = trainer.evaluate()
    with torch.no_grad():
        expected = data.cross_entropies(model.eval()(data.mixed(8)[0]).logits, 8).mean()
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert 0 <= metrics["eval_accuracy"] <= 1 and "eval_arbitrary_accuracy" in metrics


# --- With the datasets of this package ---


def images(preset="cifar", count=20) -> ImageClassificationDataset:
    return ImageClassificationDataset(
        image_dataset(count), processor(), augmentation=Augmentation.from_preset(preset), seed=3
    )


def batches_of_a_run(vit, tmp_path, data, num_workers=0) -> list[dict]:
    batches = []
    args = arguments(tmp_path, max_steps=8, per_device_train_batch_size=6, dataloader_num_workers=num_workers)
    trainer = ls.LayerShuffleTrainer(vit.classifier(num_labels=2), args, train_dataset=data)
    finish = trainer._prepare_inputs
    trainer._prepare_inputs = lambda inputs: batches.append(finish(inputs)) or batches[-1]
    trainer.train()
    return batches


@pytest.mark.parametrize(
    "wrap", [lambda data: data, lambda data: Subset(data, range(20)), lambda data: ConcatDataset([data])]
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_trainer_mixes_images_of_wrapped_datasets_too(vit, tmp_path, wrap, num_workers):
    batches = batches_of_a_run(vit, tmp_path, wrap(images()), num_workers)
    assert [len(batch["labels"]) for batch in batches] == [6, 6, 6, 2] * 2
    assert not batches[0]["mixing"].equal(batches[4]["mixing"])  # another epoch
    for batch, expected in zip(batches, batches_of_a_run(vit, tmp_path, images())):
        assert batch.keys() == expected.keys() and batch["mixed_labels"].equal(expected["labels"].flip(0))
        torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=0)


def test_a_collator_that_leaves_out_the_mixing_is_said(vit, tmp_path, monkeypatch):
    from hf_layershuffle.training import trainer as module

    said = []
    monkeypatch.setattr(module.logger, "warning_once", said.append)

    def collate(items):
        labels = torch.tensor([item["labels"] for item in items])
        return {"pixel_values": torch.stack([item["pixel_values"] for item in items]), "labels": labels}

    plain = ImageClassificationDataset(image_dataset(20), processor())
    for data, collator in ((images(), None), (plain, collate), (Subset(images(), range(20)), collate)):
        assert not said
        args = arguments(tmp_path, max_steps=1)
        model = vit.classifier(num_labels=2)
        ls.LayerShuffleTrainer(model, args, train_dataset=data, data_collator=collator).train()
    assert len(said) == 1 and "`data_collator` leaves out how: they are not mixed" in said[0]


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Subset(data, range(20))])
def test_evaluation_on_the_mixed_images_of_training_is_refused(vit, tmp_path, wrap):
    model, args, mixed = vit.classifier(num_labels=2), arguments(tmp_path), wrap(images())
    trainer = ls.LayerShuffleTrainer(model, args, train_dataset=mixed, eval_dataset=images("none"))
    trainer.evaluate()
    for name, evaluate in (("eval_dataset", trainer.evaluate), ("test_dataset", trainer.predict)):
        with pytest.raises(ValueError, match=f"`{name}` mixes images .* evaluate on images that are not mixed"):
            evaluate(mixed)
    with pytest.raises(ValueError, match="`eval_dataset` mixes images"):
        ls.LayerShuffleTrainer(model, args, eval_dataset={"own": images("none"), "train": mixed})


def test_a_plain_trainer_augments_and_does_not_mix(vit, tmp_path):
    seen = []
    model = vit.classifier(num_labels=2)
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    data = images()
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=20, train_sampling_strategy="sequential")
    Trainer(model, args, train_dataset=data).train()
    assert not {"mixing", "mixed_labels"} & set(seen[0])
    unmixed = {
        name: each for name, each in data.__getitems__(list(range(20))).unfinished.items() if name not in MIXING
    }
    torch.testing.assert_close(seen[0]["pixel_values"], finish_batch(unmixed)["pixel_values"], atol=1e-5, rtol=0)
