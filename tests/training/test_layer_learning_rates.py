"""A learning rate for each layer, and optimizers of every kind."""

import peft
import pytest
import torch
from support.encoders import ENCODERS
from support.trainers import RandomImages, Stop, arguments, train
from torch import nn

import hf_layershuffle as ls
from hf_layershuffle.training.layer_learning_rates import layer_depths


def rates_by_name(trainer, model) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = trainer.optimizer
    return {names[each]: group["initial_lr"] for group in optimizer.param_groups for each in group["params"]}


def test_rates_fall_from_the_classifier_to_the_embeddings(vit, tmp_path):
    model = vit.classifier(shuffle_mode="arbitrary", depth_embedding=True, position_predictor=True)
    trainer = train(model, tmp_path, layer_lr_decay=0.5, weight_decay=0.1, learning_rate=0.64, max_steps=1)
    rates = rates_by_name(trainer, model)
    assert set(rates) == {name for name, _ in model.named_parameters()}
    for name, rate in rates.items():
        part = name.removeprefix("vit.")
        index = int(part.split(".")[1]) if part.startswith("layers.") else None
        depth = 0 if part.startswith("embeddings") else 5 if index is None else index + 1
        assert rate == pytest.approx(0.64 * 0.5 ** (5 - depth)), name
    decays = {names: group["weight_decay"] for group in trainer.optimizer.param_groups for names in group["params"]}
    assert decays[model.classifier.weight] == 0.1 and decays[model.classifier.bias] == 0.0
    assert decays[model.vit.layers[1].mlp.fc1.weight] == 0.1
    assert next(entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry) == 0.64


def test_a_step_is_as_long_as_its_rate_says(vit, tmp_path):
    """With plain gradient descent, a parameter moves by its rate times the gradient."""
    options = dict(optim="sgd", max_steps=1, learning_rate=0.1, max_grad_norm=0)
    start = vit.classifier().state_dict()
    usual, decayed = vit.classifier(), vit.classifier()
    train(usual, tmp_path, **options)
    train(decayed, tmp_path, layer_lr_decay=0.5, **options)
    depths = layer_depths(decayed)
    for (name, one), other in zip(usual.named_parameters(), decayed.parameters()):
        factor = 0.5 ** (5 - depths[other])
        torch.testing.assert_close(other - start[name], factor * (one - start[name]), atol=1e-7, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", ["ViT", "DINOv2", "CLIP", "BERT", "XLM-RoBERTa", "ModernBERT", "Whisper, encoder"])
def test_depths_of_families(name):
    encoder = ENCODERS[name]
    model = ls.free_order(encoder.plain_class(encoder.config()), shuffle_mode="arbitrary")
    depths = layer_depths(model)
    by_name = {name: depths[parameter] for name, parameter in model.named_parameters()}
    last = len(model.free_layers) + 1
    assert {depth for name, depth in by_name.items() if name.startswith(("classifier.", "head."))} == {last}
    assert {depth for name, depth in by_name.items() if "embeddings." in name or ".conv1." in name} == {0}
    for index, layer in enumerate(model.free_layers.children()):
        assert {depths[parameter] for parameter in layer.parameters()} == {index + 1}


@pytest.mark.parametrize("name", ENCODERS)
def test_what_runs_before_the_last_layer_has_the_rate_of_embeddings(name):
    """And what runs after it the classifier's. Encoders do not register all their parts in the order of their use."""
    encoder = ENCODERS[name]
    model = ls.free_order(encoder.plain_class(encoder.config())).eval()
    depths = layer_depths(model)
    layers = list(model.free_layers.children())
    last = len(layers) + 1
    runs, num_done = {}, []
    for layer in layers:
        layer.register_forward_hook(lambda *_: num_done.append(1))

    def note(module, _):
        runs.setdefault(module, len(num_done))

    for module in model.modules():
        module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(**encoder.inputs())
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    expected = {}
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if parameter not in inside and module in runs:
            expected[name] = last if runs[module] == len(layers) else 0
        # Of these, DeBERTa and LayoutLMv3 read the weight itself
        if parameter not in inside and any(word in name for word in ("rel_embeddings", "rel_pos_")):
            expected[name] = 0
    parameters = dict(model.named_parameters())
    assert {name: depths[parameters[name]] for name in expected} == expected
    assert 0 in expected.values()


def test_adapters_are_in_the_layers_that_they_adapt(vit, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    model = peft.get_peft_model(vit.classifier(shuffle_mode="arbitrary"), config)
    trainer = train(model, tmp_path, layer_lr_decay=0.5, learning_rate=0.64, max_steps=1)
    for name, rate in rates_by_name(trainer, model).items():
        index = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else 4
        assert rate == pytest.approx(0.64 * 0.5 ** (4 - index)), name


OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
SCHEDULE_FREE = ("schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam")


FEW = ("adamw_torch_fused", "adafactor", "schedule_free_adamw")  # the others take as long, and are tests marked slow


@pytest.mark.parametrize(
    "optim",
    [each if each in FEW else pytest.param(each, marks=pytest.mark.slow) for each in OPTIMIZERS + SCHEDULE_FREE],
)
def test_optimizers_go_on_exactly_with_all_options(vit, tmp_path, optim):
    is_free = optim in SCHEDULE_FREE
    flags = dict(shuffle_mode="arbitrary", layerdrop=0.2, drop_path_rate=0.2, depth_embedding=True)
    options = dict(optim=optim, layer_lr_decay=0.8, weight_decay=0.05, warmup_steps=0.5, max_steps=5)
    options |= dict(gradient_accumulation_steps=2, per_device_train_batch_size=4, max_grad_norm=0.5)
    options |= dict(eval_strategy="steps", eval_steps=2, eval_orders=2)
    options |= dict(lr_scheduler_type="constant") if is_free else dict(ema_decay=0.6)
    model = vit.classifier(**flags)
    train(model, tmp_path / "whole", **options)
    train(vit.classifier(**flags), tmp_path / "parts", callbacks=[Stop(3)], **options)
    resumed = vit.classifier(seed=9, **flags)
    train(resumed, tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-3"), **options)
    before = vit.classifier(**flags).state_dict()
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])
    for (name, parameter), expected in zip(resumed.named_parameters(), model.parameters()):
        assert torch.equal(parameter, expected), name


def test_schedule_free_warms_up_over_a_fraction_of_the_steps(vit, tmp_path):
    options = dict(optim="schedule_free_adamw", lr_scheduler_type="constant", warmup_steps=0.5, max_steps=6)
    trainer = train(vit.classifier(), tmp_path, **options)
    assert {group["warmup_steps"] for group in trainer.optimizer.param_groups} == {3}


@pytest.mark.parametrize("decay", [0, -1, 1.01, float("nan")])
def test_a_decay_outside_its_range_is_refused(tmp_path, decay):
    with pytest.raises(ValueError, match=r"`layer_lr_decay` is .*; it must be a fraction in \(0, 1\]"):
        arguments(tmp_path, layer_lr_decay=decay)


def test_optimizers_whose_rates_are_not_ours_are_refused(vit, tmp_path):
    args = arguments(tmp_path, layer_lr_decay=0.5)
    model = vit.classifier()
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = ls.LayerShuffleTrainer(model, args, train_dataset=RandomImages(), optimizers=(own, None))
    with pytest.raises(ValueError, match=r"`layer_lr_decay` is 0.5, and the Trainer got an optimizer"):
        trainer.train()
    one = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="SGD does not keep the parameters in groups of its own"):
        ls.training.layer_learning_rates.divide_groups(one, layer_depths(model), 0.5)
    with pytest.raises(ValueError, match=r"needs a model with free layer order, and there is none in Linear"):
        layer_depths(nn.Linear(2, 2))


def test_a_second_training_keeps_the_rates(vit, tmp_path):
    model = vit.classifier()
    trainer = train(model, tmp_path, layer_lr_decay=0.5, max_steps=1)
    before = rates_by_name(trainer, model)
    trainer.train()
    assert rates_by_name(trainer, model) == before
