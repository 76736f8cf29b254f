"""A layer controller is trained alone, on a frozen model."""

import copy

import pytest
import torch
from conftest import assert_all_refused, run_train
from support.models import randomize
from support.trainers import RandomImages, Stop, arguments, train
from transformers import AutoModelForImageClassification

import hf_layershuffle as ls
from hf_layershuffle.models import layer_budget
from hf_layershuffle.training.evaluation import check_best_metric


@pytest.fixture
def model(vit):
    return randomize(vit.classifier(layer_controller=True, shuffle_mode="arbitrary"))


def changed_parts(model, before):
    """The first names of the parameters that are not what they were."""
    old = dict(before.named_parameters())
    return {name.partition(".")[0] for name, each in model.named_parameters() if not torch.equal(each, old[name])}


@torch.no_grad()
def loss_of_budgets(model, data):
    model.eval()
    losses = [model(data.images, labels=data.labels, layer_budget=budget).loss for budget in (1, 2, 3)]
    return float(torch.stack(losses).mean())


def test_it_learns_and_nothing_else_changes(model, tmp_path):
    before = copy.deepcopy(model)
    data = RandomImages()
    budgets = []
    model.register_forward_hook(lambda module, args, output: budgets.append(int(output.num_layers_run[0])))
    trainer = train(model, tmp_path, max_steps=60, learning_rate=1e-3, logging_steps=60)
    assert set(budgets) == {1, 2, 3}
    assert trainer.state.global_step == 60 and changed_parts(model, before) == {"layer_controller"}
    assert loss_of_budgets(model, data) < loss_of_budgets(before, data)
    # and of several images not the same
    scores = model.layer_controller(model.vit.embeddings(data.images))
    assert scores.std(dim=0).max() > 0.01


@pytest.mark.parametrize(
    "flags",
    [
        {"depth_embedding": True, "position_predictor": True, "hidden_dropout_prob": 0.3},
        {"halting_head": True, "layerdrop": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.1, "gradient_checkpointing": True},
        {"ema_decay": 0.9, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_it_is_trained_alone_with_other_options_too(vit, tmp_path, flags, options):
    model = randomize(vit.classifier(layer_controller=True, **flags))
    before = copy.deepcopy(model)
    train(model, tmp_path, max_steps=2, **options)
    assert changed_parts(model, before) == {"layer_controller"}


def test_it_learns_from_a_teacher(model, tmp_path):
    before = copy.deepcopy(model)
    teacher = copy.deepcopy(model).requires_grad_(False)
    args = arguments(tmp_path, max_steps=2, distillation_weight=1.0)
    ls.LayerShuffleTrainer(model, args, train_dataset=RandomImages(), teacher_model=teacher).train()
    assert changed_parts(model, before) == {"layer_controller"}


@pytest.mark.parametrize("stop_at", [3, 5])
def test_a_resumed_run_gives_the_weights_of_the_uninterrupted_one(vit, tmp_path, stop_at):
    options = dict(max_steps=8, gradient_accumulation_steps=2, per_device_train_batch_size=4)

    def fresh():
        return randomize(vit.classifier(layer_controller=True, depth_embedding=True))

    whole = fresh()
    train(whole, tmp_path / "whole", **options)
    train(fresh(), tmp_path / "parts", callbacks=[Stop(stop_at)], **options)
    resumed = fresh()
    torch.rand(1000)
    train(resumed, tmp_path / "parts", resume=str(tmp_path / "parts" / f"checkpoint-{stop_at}"), **options)
    for (name, parameter), expected in zip(resumed.named_parameters(), whole.named_parameters()):
        assert torch.equal(parameter, expected[1]), name


def test_what_cannot_train_one_is_refused(vit, model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"trains in one order only; .* its `layer_controller` to False"):
        train(model, tmp_path, order_consistency=1.0)
    encoder = model.vit
    with pytest.raises(ValueError, match="LayerShuffleViTModel has no layer controller to train"):
        train(encoder, tmp_path)
    monkeypatch.setattr(layer_budget, "is_sharded", lambda model: True)
    with pytest.raises(ValueError, match="sharded over several processes"):
        train(model, tmp_path)


def test_evaluation_follows_the_budget_of_the_configuration(model, tmp_path):
    data = RandomImages()
    model.config.layer_budget = 2
    trainer = train(model, tmp_path, max_steps=1)
    assert model.config.layer_budget == 2  # which is of the controller, and not forgotten
    metrics = trainer.evaluate()
    with torch.no_grad():
        right = model.eval()(data.images, layer_budget=2).logits.argmax(-1) == data.labels
    assert metrics["eval_accuracy"] == pytest.approx(right.float().mean().item())


def test_the_best_controller_is_chosen_by_what_it_changes(model, tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best"}
    with pytest.raises(
        ValueError, match="`metric_for_best_model` is 'loss', which is of all layers, and a layer contr"
    ):
        train(model, tmp_path, max_steps=1, **best)
    best["metric_for_best_model"] = "eval_half_budget_accuracy"
    trainer = train(model, tmp_path, max_steps=3, **best)
    accuracies = [entry[best["metric_for_best_model"]] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(accuracies) == 3 and trainer.state.best_metric == max(accuracies)
    named = best | {"metric_for_best_model": "eval_val_half_budget_accuracy"}
    check_best_metric(arguments(tmp_path, **named), model.config)  # of one of several datasets
    model.config.layer_budget = 2
    of_budget = best | {"metric_for_best_model": "loss"}
    train(model, tmp_path / "budget", max_steps=1, **of_budget)
    with pytest.raises(ValueError, match="is measured of models with a layer controller and no `layer_budget`"):
        train(model, tmp_path / "other", max_steps=1, **best)


@pytest.mark.parametrize(
    "fields, half",
    [
        ({"execution_order": [2, 0, 1, 1, 2], "output_hidden_states": True}, 2),
        ({"exit_threshold": 0.9}, 2),
    ],
    ids=str,
)
def test_evaluation_of_all_layers_tells_what_half_of_them_give(model, tmp_path, fields, half):
    data = RandomImages()
    data.labels[3] = -100
    model.config.update(fields)
    trainer = ls.LayerShuffleTrainer(model, arguments(tmp_path), eval_dataset=data)
    metrics = trainer.evaluate()
    with torch.no_grad():
        answers = model.eval()(data.images, layer_budget=half, output_hidden_states=False).logits.argmax(-1)
    right = (answers == data.labels)[data.labels != -100]
    assert 0 < metrics["eval_half_budget_accuracy"] == pytest.approx(right.float().mean().item())
    data.labels[:] = -100
    assert "eval_half_budget_accuracy" not in trainer.evaluate()
    model.config.update({"exit_threshold": None, "layer_budget": half, "output_hidden_states": False})
    assert "eval_half_budget_accuracy" not in trainer.evaluate()


def test_the_command(tmp_path):
    common = ["--num_train_epochs", "1", "--final_eval_orders", "8", "--report_to", "none", "--eval_strategy", "no"]
    common += ["--max_train_samples", "64", "--max_eval_samples", "32", "--save_strategy", "no"]
    base, out = tmp_path / "base", tmp_path / "controller"
    small = ["--hidden_size", "32", "--num_hidden_layers", "3"]
    assert run_train(*common, *small, "--output_dir", base).returncode == 0
    controlled = [*common, "--model_name_or_path", base, "--layer_controller", "True", "--output_dir", out]
    result = run_train(*controlled, "--layer_budget", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "layershuffle-controller" in result.stdout and "half of its layers" not in result.stdout
    model = AutoModelForImageClassification.from_pretrained(out)
    assert model.config.layer_budget == 2
    torch.manual_seed(7)  # of a new controller
    before = ls.LayerShuffleViTForImageClassification.from_pretrained(base, layer_controller=True)
    assert changed_parts(model, before) == {"layer_controller"}
    no_budget = [*common, "--model_name_or_path", base, "--layer_budget", "2", "--output_dir", tmp_path / "no"]
    scratch = [*common, *small, "--layer_controller", "True", "--output_dir", tmp_path / "no"]
    cases = {
        "there is no layer controller to choose layers by": no_budget,
        "`layer_controller` is True, which trains a controller for a trained model": scratch,
        "`layer_budget` is 9, and 3 layers run; it must be from 1 to 3": [*controlled, "--layer_budget", "9"],
        "`layer_budget` is 0": [*controlled, "--layer_budget", "0"],
    }
    assert_all_refused(run_train, "train.py", cases, tmp_path)
