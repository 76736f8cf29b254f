"""Averaged weights: evaluated, saved, kept in checkpoints, and gone on with exactly."""

import pytest
import torch
from safetensors.torch import load_file
from support.trainers import RandomImages, Stop, arguments, train
from transformers import TrainerCallback

import hf_layershuffle as ls


EMA = dict(ema_decay=0.7)
SCHEDULE_FREE = dict(optim="schedule_free_adamw", lr_scheduler_type="constant")
of_both_averages = pytest.mark.parametrize("options", [EMA, SCHEDULE_FREE], ids=["ema", "schedule-free"])


class Weights(TrainerCallback):
    """Notes the classifier's weights after each step, and those with which the model is evaluated and saved."""

    def __init__(self):
        self.trained = []
        self.seen = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.trained.append(model.classifier.weight.detach().clone())

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step] = model.classifier.weight.detach().clone()


def expected_average(initial: torch.Tensor, trained: list[torch.Tensor], decay: float) -> list[torch.Tensor]:
    average, averages = initial.double(), []
    for step, weights in enumerate(trained, 1):
        kept = min(decay, (1 + step) / (10 + step))
        average = kept * average + (1 - kept) * weights.double()
        averages.append(average)
    return averages


def test_the_average_is_evaluated_saved_and_left_in_the_model(vit, tmp_path):
    model = vit.classifier(shuffle_mode="arbitrary")
    initial = model.classifier.weight.detach().clone()
    weights = Weights()
    options = dict(save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3, eval_orders=2)
    evaluated = []
    model.register_forward_pre_hook(
        lambda module, args: None if module.training else evaluated.append(module.classifier.weight.detach().clone())
    )
    trainer = train(model, tmp_path, callbacks=[weights], ema_decay=0.4, max_steps=9, **options)
    averages = expected_average(initial, weights.trained, 0.4)
    assert not torch.allclose(averages[-1].float(), weights.trained[-1], atol=1e-4)
    per_evaluation = len(evaluated) // 3  # a forward for each batch in its own order and in two others
    for number, step in enumerate((3, 6, 9)):
        average = averages[step - 1].float()
        stored = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")["classifier.weight"]
        torch.testing.assert_close(stored, average)
        for each in evaluated[number * per_evaluation : (number + 1) * per_evaluation]:
            assert torch.equal(each, stored)
        assert torch.equal(weights.seen[step], weights.trained[step - 1])  # those of training, to their last bit
    torch.testing.assert_close(model.classifier.weight.detach(), averages[-1].float())
    trainer.save_model(str(tmp_path / "end"))
    assert torch.equal(load_file(tmp_path / "end" / "model.safetensors")["classifier.weight"], model.classifier.weight)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == losses[-1]


def test_an_average_changes_nothing_of_the_training(vit, tmp_path):
    plain, averaged = Weights(), Weights()
    options = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=1, eval_orders=1)
    train(vit.classifier(shuffle_mode="arbitrary"), tmp_path / "plain", callbacks=[plain], **options)
    train(vit.classifier(shuffle_mode="arbitrary"), tmp_path / "ema", callbacks=[averaged], **EMA, **options)
    assert all(torch.equal(one, other) for one, other in zip(plain.trained, averaged.trained, strict=True))


@of_both_averages
@pytest.mark.parametrize("stop_at", [3, 5])
def test_a_resumed_run_gives_the_weights_of_the_uninterrupted_one(vit, tmp_path, options, stop_at):
    flags = dict(shuffle_mode="arbitrary", layerdrop=0.2, drop_path_rate=0.2, depth_embedding=True)
    options = dict(max_steps=8, gradient_accumulation_steps=2, per_device_train_batch_size=4, **options)
    weights, first, second = Weights(), Weights(), Weights()
    model = vit.classifier(**flags)
    train(model, tmp_path / "whole", callbacks=[weights], **options)

    train(vit.classifier(**flags), tmp_path / "parts", callbacks=[Stop(stop_at), first], **options)
    resumed = vit.classifier(seed=99, **flags)
    torch.rand(1000)
    checkpoint = tmp_path / "parts" / f"checkpoint-{stop_at}"
    train(resumed, tmp_path / "parts", callbacks=[second], resume=str(checkpoint), **options)
    assert len(first.trained) == stop_at
    steps = zip(first.trained + second.trained, weights.trained, strict=True)
    assert all(torch.equal(one, other) for one, other in steps)
    for (name, parameter), expected in zip(resumed.named_parameters(), model.parameters()):
        assert torch.equal(parameter, expected), name


def test_schedule_free_evaluates_and_saves_its_average(vit, tmp_path):
    weights = Weights()
    model = vit.classifier(shuffle_mode="arbitrary")
    evaluated = []
    model.register_forward_pre_hook(
        lambda module, args: None if module.training else evaluated.append(module.classifier.weight.detach().clone())
    )
    options = dict(save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3)
    trainer = train(model, tmp_path, callbacks=[weights], **SCHEDULE_FREE, **options)
    z = trainer.optimizer.state[model.classifier.weight]["z"]
    x = weights.trained[-1].lerp(z, 1 - 1 / 0.9)
    stored = load_file(tmp_path / "checkpoint-6" / "model.safetensors")["classifier.weight"]
    torch.testing.assert_close(stored, x)
    assert not torch.allclose(stored, weights.trained[-1], atol=1e-5)
    assert torch.equal(model.classifier.weight, stored) and torch.equal(evaluated[-1], stored)
    assert torch.equal(weights.seen[6], weights.trained[-1])
    training = torch.load(tmp_path / "checkpoint-6" / "training_weights.pt", weights_only=True)
    assert torch.equal(training["classifier.weight"], weights.trained[-1])


def test_the_best_model_is_an_average(vit, tmp_path):
    model = vit.classifier(shuffle_mode="arbitrary")
    options = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, eval_orders=2)
    best = dict(load_best_model_at_end=True, metric_for_best_model="eval_arbitrary_accuracy", save_total_limit=1)
    trainer = train(model, tmp_path, **EMA, **options, **best)
    best_metric = trainer.state.best_metric
    assert trainer.evaluate()["eval_arbitrary_accuracy"] == best_metric
    stored = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in model.state_dict().items())


def test_only_what_is_trained_is_averaged(vit, tmp_path):
    model = vit.classifier(shuffle_mode="arbitrary")
    model.vit.requires_grad_(False)
    frozen = {name: value.clone() for name, value in model.vit.state_dict().items()}
    train(model, tmp_path, callbacks=[Stop(3)], **EMA)
    training = torch.load(tmp_path / "checkpoint-3" / "training_weights.pt", weights_only=True)
    assert set(training) == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(frozen[name], value) for name, value in model.vit.state_dict().items())


def test_an_interrupted_evaluation_leaves_the_weights_of_training(vit, tmp_path):
    model = vit.classifier()
    weights = Weights()
    data = RandomImages()
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=4, **EMA)
    trainer = ls.LayerShuffleTrainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[weights])

    def interrupt(module, args):
        if not module.training:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    assert torch.equal(model.classifier.weight, weights.trained[3])


@pytest.mark.parametrize("decay", [1, 1.5, -0.1, float("nan")])
def test_a_decay_outside_its_range_is_refused(tmp_path, decay):
    with pytest.raises(ValueError, match=r"`ema_decay` is .*; it must be a fraction in \[0, 1\)"):
        arguments(tmp_path, ema_decay=decay)


def test_what_cannot_be_combined_is_refused(vit, tmp_path):
    with pytest.raises(ValueError, match=r"`ema_decay` is 0.7, and .* averages the weights by itself"):
        train(vit.classifier(), tmp_path, **EMA, **SCHEDULE_FREE)
    with pytest.raises(ValueError, match=r"is trained in torch.bfloat16, in which an average loses small changes"):
        train(vit.classifier().to(torch.bfloat16), tmp_path, float32_weights=False, **EMA)


def test_an_optimizer_that_is_handed_over_goes_on(vit, tmp_path):
    import schedulefree

    def run(resume=None, callbacks=()):
        model = vit.classifier(shuffle_mode="arbitrary")
        args = arguments(tmp_path, lr_scheduler_type="constant")
        made_of = (schedulefree.AdamWScheduleFree, {"lr": 1e-2})
        trainer = ls.LayerShuffleTrainer(
            model, args, train_dataset=RandomImages(), optimizer_cls_and_kwargs=made_of, callbacks=list(callbacks)
        )
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = run()
    run(callbacks=[Stop(2)])
    resumed = run(resume=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(each, resumed[name]) for name, each in whole.items())


@of_both_averages
def test_resuming_in_another_way_is_refused(vit, tmp_path, options):
    train(vit.classifier(), tmp_path / "averaged", callbacks=[Stop(2)], **options)
    train(vit.classifier(), tmp_path / "plain", callbacks=[Stop(2)])
    with pytest.raises(ValueError, match=r"checkpoint-2' has averaged weights .* training would go on from them"):
        train(vit.classifier(), tmp_path / "averaged", resume=str(tmp_path / "averaged" / "checkpoint-2"))
    with pytest.raises(ValueError, match=r"checkpoint-2' holds no training_weights\.pt"):
        train(vit.classifier(), tmp_path / "plain", resume=str(tmp_path / "plain" / "checkpoint-2"), **options)
    path = tmp_path / "averaged" / "checkpoint-2" / "training_weights.pt"
    values = torch.load(path, weights_only=True)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"training_weights.pt' is not whole .*; resume from an earlier checkpoint"):
        train(vit.classifier(), tmp_path / "averaged", resume=str(path.parent), **options)
    torch.save({**values, "other": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"training_weights.pt' cannot be resumed from: they are of another model"):
        train(vit.classifier(), tmp_path / "averaged", resume=str(path.parent), **options)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (EMA, SCHEDULE_FREE),
        (EMA, {**EMA, "layer_lr_decay": 0.5}),
        ({}, {"optim": "sgd"}),
        ({"optim": "sgd"}, {}),
        ({"layer_lr_decay": 0.5}, {}),
    ],
)
def test_resuming_with_another_optimizer_is_refused(vit, tmp_path, first, then):
    train(vit.classifier(), tmp_path, callbacks=[Stop(2)], **first)
    checkpoint = tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match=r"checkpoint-2' is of another optimizer than .* same `optim` and `layer_lr"):
        train(vit.classifier(), tmp_path, resume=str(checkpoint), **then)
    train(vit.classifier(), tmp_path, resume=str(checkpoint), **first)
