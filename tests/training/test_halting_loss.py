"""Trained exits in the Trainer: the expected loss over all layers, wherever it is computed."""

import copy

import pytest
import torch
from conftest import assert_all_refused, run_cli
from support.models import randomize
from support.trainers import MixedImages, RandomImages, RandomNumbers, Stop, arguments, one_sgd_step, train
from torch.nn import functional as F
from transformers import Trainer

import hf_layershuffle as ls
from hf_layershuffle.models.halting_head import halting_losses
from hf_layershuffle.training import session
from hf_layershuffle.training.layer_losses import losses_by_layer
from hf_layershuffle.training.recipes import method_name


FLAGS = {"halting_head": True, "halting_prior": 0.2, "halting_loss_weight": 0.3}


def expected_loss(model, images, by_layer, labels):
    """Of one forward pass: `by_layer` gives the losses `(images,)` of logits `(images, classes)`."""
    outputs = model.train()(images)
    losses = torch.stack([by_layer(logits) for logits in outputs.layer_logits.unbind(1)], dim=1)
    losses = halting_losses(losses, outputs.halting_log_probabilities, 0.2, 0.3)
    return torch.where(labels != -100, losses, 0.0).sum() / (labels != -100).sum()


def assert_step(
    tmp_path, expected, loss, model, data, micro_batches=1, trainer_class=ls.LayerShuffleTrainer, **kwargs
):
    """A Trainer takes the step of SGD that this loss of the other model says."""
    loss.backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    more = {name: kwargs.pop(name) for name in ("teacher_model", "compute_loss_func") if name in kwargs}
    args = one_sgd_step(tmp_path, micro_batches, **kwargs)
    logged = trainer_class(model, args, train_dataset=data, **more).train().training_loss
    assert logged == pytest.approx(loss.item(), rel=1e-4)
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(parameter, other, atol=1e-5, rtol=1e-4, msg=name)


def two_models(vit, **flags):
    model = randomize(vit.classifier(**FLAGS, **flags))
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("trainer_class", [ls.LayerShuffleTrainer, Trainer])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_step(vit, tmp_path, micro_batches, trainer_class, smoothing):
    if trainer_class is Trainer and smoothing:
        pytest.skip("transformers' own smoothing knows no answers of layers")
    model, expected = two_models(vit)
    data = RandomImages(8)
    data.labels[[0, 1, -1]] = -100  # two in one micro-batch, one in the other
    loss = expected_loss(
        expected,
        data.images,
        lambda logits: F.cross_entropy(logits, data.labels, label_smoothing=smoothing, reduction="none"),
        data.labels,
    )
    options = {"label_smoothing_factor": smoothing} if smoothing else {}
    assert_step(tmp_path, expected, loss, model, data, micro_batches, trainer_class, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_images(vit, tmp_path, smoothing):
    model, expected = two_models(vit)
    data = MixedImages(8)
    loss = expected_loss(
        expected, data.mixed(8)[0], lambda logits: data.cross_entropies(logits, 8, smoothing), data.labels
    )
    assert_step(tmp_path, expected, loss, model, data, label_smoothing_factor=smoothing)


@pytest.mark.parametrize("has_labels", [True, False])
def test_a_teacher_teaches_all_layers(vit, tmp_path, has_labels):
    model, expected = two_models(vit)
    teacher = randomize(vit.plain_classifier(), seed=5)
    data, weight = RandomImages(8), 0.7 if has_labels else 1.0
    with torch.no_grad():
        targets = (teacher.eval()(data.images).logits / 3).log_softmax(-1)

    def by_layer(logits):
        taught = 9 * F.kl_div((logits / 3).log_softmax(-1), targets, log_target=True, reduction="none").sum(-1)
        return (1 - weight) * F.cross_entropy(logits, data.labels, reduction="none") + weight * taught

    loss = expected_loss(expected, data.images, by_layer, data.labels)
    items = [data[index] for index in range(8)]
    if not has_labels:
        items = [{"pixel_values": item["pixel_values"]} for item in items]
    options = {"distillation_weight": weight, "distillation_temperature": 3.0, "teacher_model": teacher}
    assert_step(tmp_path, expected, loss, model, items, **options)


def test_the_position_loss_is_added(vit, tmp_path):
    model, expected = two_models(vit, position_predictor=True)
    data = RandomImages(8)
    loss = expected.train()(data.images, labels=data.labels).loss  # which tests of the model compute by hand
    assert_step(tmp_path, expected, loss, model, data)


def test_losses_by_layer_by_hand():
    logits = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, -100, 4])
    losses = losses_by_layer(logits, labels)
    expected = torch.stack([F.cross_entropy(logits[:, i], labels, reduction="none") for i in range(2)], 1)
    torch.testing.assert_close(losses, expected)
    assert losses[1].tolist() == [0, 0]


# --- Losses that leave the head out ---


def mean_over_the_step(outputs, labels, num_items_in_batch):
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


class OwnLoss(ls.LayerShuffleTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs["pixel_values"])
        return F.cross_entropy(outputs.logits, inputs["labels"])


class TwiceTheModelsLoss(ls.LayerShuffleTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 2 * model(**inputs).loss


@pytest.mark.parametrize("kind", [mean_over_the_step, OwnLoss], ids=lambda kind: kind.__name__)
def test_a_loss_of_the_last_answer_alone_is_refused(vit, tmp_path, kind):
    model = vit.classifier(**FLAGS)
    trainer_class, func = (kind, None) if isinstance(kind, type) else (ls.LayerShuffleTrainer, kind)
    trainer = trainer_class(model, one_sgd_step(tmp_path), train_dataset=RandomImages(8), compute_loss_func=func)
    with pytest.raises(ValueError, match="has a halting head, which learns by the losses of the answers"):
        trainer.train()


def test_a_loss_of_ones_own_may_take_the_models(vit, tmp_path):
    model, expected = two_models(vit)
    data = RandomImages(8)
    loss = 2 * expected.train()(data.images, labels=data.labels).loss
    assert_step(tmp_path, expected, loss, model, data, trainer_class=TwiceTheModelsLoss)


# --- Whole runs ---


def test_a_resumed_run_is_the_uninterrupted_one(vit, tmp_path):
    flags = {**FLAGS, "shuffle_mode": "arbitrary", "layerdrop": 0.2, "hidden_dropout_prob": 0.1}
    options = {"save_strategy": "steps", "save_steps": 3}
    whole, part, resumed = (vit.classifier(**flags) for _ in range(3))
    train(whole, tmp_path / "whole", callbacks=[RandomNumbers(0)], **options)
    train(part, tmp_path / "part", callbacks=[Stop(3)], **options)
    train(resumed, tmp_path / "part", resume=str(tmp_path / "part" / "checkpoint-3"), **options)
    for (name, parameter), other in zip(resumed.named_parameters(), whole.parameters()):
        assert torch.equal(parameter, other), name
    assert not torch.equal(whole.halting_head.out.weight, vit.classifier(**flags).halting_head.out.weight)


def test_evaluation_reports_the_mean_depth(vit, tmp_path):
    model, data = randomize(vit.classifier(halting_head=True)).eval(), RandomImages(20)
    args = arguments(tmp_path, per_device_eval_batch_size=8)
    trainer = ls.LayerShuffleTrainer(model, args, eval_dataset=data, compute_metrics=ls.compute_metrics)
    assert "eval_mean_num_layers" not in trainer.evaluate()
    rules = (
        {"exit_threshold": 0.5, "exit_criterion": "halting"},
        {"exit_threshold": 0.7, "exit_criterion": "probability"},
        {"exit_threshold": None, "exit_patience": 2},
    )
    for rule in rules:
        for name, value in rule.items():
            setattr(model.config, name, value)
        with torch.no_grad():
            outputs = model(data.images)
        metrics = trainer.evaluate(metric_key_prefix="test")
        assert metrics["test_mean_num_layers"] == pytest.approx(outputs.num_layers_run.double().mean().item())
        is_right = outputs.logits.argmax(-1) == data.labels
        assert metrics["test_accuracy"] == pytest.approx(is_right.double().mean().item())


# --- The command ---


RUN = """
    --max_train_samples 64 --max_eval_samples 40 --max_steps 4 --save_strategy no --eval_strategy no
    --per_device_train_batch_size 8 --final_eval_orders 8 --use_cpu --disable_tqdm True --report_to none
""".split()
SMALL = ["--hidden_size", "16", "--num_hidden_layers", "3", "--num_attention_heads", "2"]


def run(folder, *arguments):
    session.run([*RUN, "--output_dir", str(folder), *arguments])
    return ls.load_classifier(folder)


def test_from_scratch_on_from_there_and_without(tmp_path):
    model = run(tmp_path / "one", *SMALL, "--early_exit", "pondernet", "--halting_prior", "0.2")
    assert model.config.halting_head and model.config.halting_prior == 0.2
    assert method_name(model.config) == "layershuffle-pondernet"
    assert model.halting_head.out.weight.abs().max() > 0  # it learnt
    on = run(tmp_path / "two", "--model_name_or_path", str(tmp_path / "one"), "--learning_rate", "0")
    assert torch.equal(on.halting_head.out.weight, model.halting_head.out.weight)  # kept without being asked for
    without = run(tmp_path / "three", "--model_name_or_path", str(tmp_path / "one"), "--early_exit", "none")
    assert not without.config.halting_head and not hasattr(without, "halting_head")
    new = run(tmp_path / "four", "--model_name_or_path", str(tmp_path / "three"), "--early_exit", "pondernet")
    assert new.config.halting_head and new.halting_head.out.weight.abs().max() > 0


def test_what_cannot_be_meant_is_refused(tmp_path):
    cases = {
        "`early_exit` is 'soon'; it must be 'none' or 'pondernet'": ["--early_exit", "soon"],
        "`halting_prior` is 0.2 without `halting_head`; add --early_exit pondernet": ["--halting_prior", "0.2"],
        "`halting_prior` is 1.0; it must be a fraction in (0, 1)": [
            "--early_exit", "pondernet", "--halting_prior", "1",
        ],
        "`halting_loss_weight` is -1.0; it must be at least 0": [
            "--early_exit", "pondernet", "--halting_loss_weight", "-1",
        ],
    }  # fmt: skip
    arguments = {message: ["train", *RUN, *SMALL, "--output_dir", "run", *given] for message, given in cases.items()}
    assert_all_refused(run_cli, "hf-layershuffle", arguments, tmp_path)
