"""What a Trainer measures: of each task, and over the orders."""

import evaluate
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.trainers import RandomImages, arguments, recorded_orders, train
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer

import hf_layershuffle as ls


def test_accuracy_is_an_offline_evaluate_metric():
    metric = ls.Accuracy()
    assert isinstance(metric, evaluate.Metric)
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add_batch(predictions=np.array([2, 2]), references=np.array([2, 2]))
    assert metric.compute() == {"accuracy": 0.75}


LOGITS, LABELS = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), np.array([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("predictions", "labels", "expected"),
    [
        (LOGITS, LABELS, {"accuracy": 0.75}),
        (LOGITS.argmax(-1), LABELS, {"accuracy": 0.75}),
        (np.array([7, 2, 3]), np.array([7, 2, -100]), {"accuracy": 1.0}),
        (np.array([0.5, 1.0]), np.array([0.0, 1.0]), {"mse": 0.125, "mae": 0.25}),
        (LOGITS, np.array([0, -100, 1, -100]), {"accuracy": 0.5}),
        (LOGITS, np.full(4, -100), {}),
        ((LOGITS, (np.zeros((4, 5, 8)),) * 3), LABELS, {"accuracy": 0.75}),  # and hidden states
        ([(LOGITS[:3], ()), (LOGITS[3:], ())], [LABELS[:3], LABELS[3:]], {"accuracy": 0.75}),  # batches
        (np.array([[1.0], [3.0]]), np.array([2.0, 3.5]), {"mse": 0.625, "mae": 0.75}),
        (np.array([[1.0], [0.5]]), np.array([1, 0]), {"mse": 0.125, "mae": 0.25}),
        (np.array([[1.0, 0.0], [3.0, 2.0]]), np.array([[0.5, 0.0], [3.0, 3.0]]), {"mse": 0.3125, "mae": 0.375}),
        (
            np.array([[5.0, -1.0, 2.0], [-1.0, -1.0, 3.0]]),
            np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
            {"subset_accuracy": 0.5, "f1": 0.8},
        ),
        (np.full((2, 3), -1.0), np.zeros((2, 3)), {"subset_accuracy": 1.0, "f1": 1.0}),
    ],
)
def test_metrics_are_those_of_the_task(predictions, labels, expected):
    assert ls.compute_metrics(EvalPrediction(predictions, labels)) == pytest.approx(expected)


def test_metrics_refuse_predictions_of_other_images():
    with pytest.raises(ValueError, match="There are 4 predictions and 3 labels"):
        ls.compute_metrics(EvalPrediction(LOGITS, LABELS[:3]))


def test_a_model_that_returns_more_is_evaluated_all_the_same(vit, tmp_path):
    model = vit.classifier(output_hidden_states=True, output_attentions=True, attn_implementation="eager")
    plain = vit.classifier()
    options = {"eval_orders": 2, "eval_strategy": "steps", "eval_steps": 6}
    expected, metrics = (train(each, tmp_path, **options).evaluate() for each in (plain, model))
    assert model.config.output_attentions
    for name in ("eval_loss", "eval_accuracy", "eval_arbitrary_accuracy", "eval_arbitrary_accuracy_min"):
        assert metrics[name] == pytest.approx(expected[name], abs=1e-5), name


class Classes(Dataset):
    """RandomImages with the labels of another task."""

    def __init__(self, label_of):
        self.images, self.label_of = RandomImages(), label_of

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        item = self.images[index]
        return {"pixel_values": item["pixel_values"], "labels": self.label_of(item["labels"])}


TASKS = {
    "multi_label": (5, lambda label: torch.eye(5)[label] + torch.eye(5)[(label + 1) % 5], {"subset_accuracy", "f1"}),
    "regression": (1, float, {"mse", "mae"}),
    "several_outputs": (3, lambda label: torch.arange(3) / 2 + label, {"mse", "mae"}),
}


@pytest.mark.parametrize("task", list(TASKS))
def test_other_tasks_have_their_own_metrics_and_micro_batches(vit, tmp_path, task):
    num_labels, label_of, expected = TASKS[task]
    weights = []
    for micro_batches in (1, 4):
        problem_type = {"problem_type": "regression"} if task == "several_outputs" else {}
        model = vit.classifier(num_labels=num_labels, position_predictor=True, **problem_type)
        args = arguments(
            tmp_path,
            optim="sgd",
            learning_rate=0.01,
            max_steps=2,
            gradient_accumulation_steps=micro_batches,
            per_device_train_batch_size=8 // micro_batches,
        )
        data = Classes(label_of)
        trainer = ls.LayerShuffleTrainer(
            model, args, train_dataset=data, eval_dataset=data, compute_metrics=ls.compute_metrics
        )
        trainer.train()
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    metrics = trainer.evaluate()
    assert {f"eval_{name}" for name in expected} <= set(metrics) and "eval_accuracy" not in metrics
    args.eval_orders = 2
    with pytest.raises(ValueError, match="`eval_orders` is 2, and counts how often one class is right"):
        trainer.evaluate()


def own_metrics(prediction):
    return {"first": float(prediction.predictions[0, 0])}


@pytest.mark.parametrize(
    ("metrics", "options"),
    [
        (None, {}),
        (own_metrics, {}),
        (own_metrics, {"preprocess_logits_for_metrics": lambda logits, labels: logits.softmax(-1)}),
        (ls.compute_metrics, {"prediction_loss_only": True}),
        (ls.compute_metrics, {"eval_do_concat_batches": False}),
        (ls.compute_metrics, {"dataloader_drop_last": True, "per_device_eval_batch_size": 64}),
        (ls.compute_metrics, {"label_names": ["labels"], "eval_accumulation_steps": 1}),
    ],
)
def test_orders_are_measured_beside_any_metrics(vit, tmp_path, metrics, options):
    """By what the model says of each image in each order, of images with a label."""
    model, data = vit.classifier(shuffle_mode="arbitrary"), RandomImages()
    preprocess = options.pop("preprocess_logits_for_metrics", None)
    args = arguments(tmp_path, eval_orders=3, eval_orders_seed=5, **{"per_device_eval_batch_size": 16, **options})
    trainer = ls.LayerShuffleTrainer(
        model, args, eval_dataset=data, compute_metrics=metrics, preprocess_logits_for_metrics=preprocess
    )
    data.labels[:4] = -100
    with torch.no_grad():
        accuracies = [
            (model.eval()(data.images, execution_order=order).logits.argmax(-1) == data.labels)[4:].float().mean()
            for order in ls.arbitrary_execution_orders(4, 3, seed=5)
        ]
        accuracy = (model(data.images).logits.argmax(-1) == data.labels)[4:].float().mean().item()
    result = trainer.evaluate()
    assert result["eval_arbitrary_accuracy"] == pytest.approx(np.mean(accuracies))
    assert result["eval_arbitrary_accuracy_min"] == pytest.approx(min(accuracies))
    if metrics is ls.compute_metrics and "prediction_loss_only" not in options:
        assert result["eval_accuracy"] == pytest.approx(accuracy)
    assert args.dataloader_drop_last == options.get("dataloader_drop_last", False)
    unlabelled = [{"pixel_values": image} for image in data.images]
    prediction = trainer.predict(unlabelled)
    assert not any("arbitrary" in name or "accuracy" in name for name in prediction.metrics)


def test_evaluation_runs_its_own_orders_at_every_step(vit, tmp_path):
    """They are those of `eval_orders_seed`, and move training's orders by nothing."""
    runs = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 2, "eval_orders": 3, "eval_orders_seed": 5}):
        model = vit.classifier(shuffle_mode="arbitrary", execution_order="arbitrary")
        orders = recorded_orders(model)
        evaluated = recorded_orders(model, training=False)
        train(model, tmp_path, seed=3, per_device_eval_batch_size=40, **options)
        runs.append(orders)
    assert runs[0] == runs[1]
    # Of each evaluation: the three orders, and one that `execution_order="arbitrary"` draws, which is not training's
    # of that step
    fixed, others = ([tuple(order) for order in ls.arbitrary_execution_orders(4, 3, seed=seed)] for seed in (5, 3))
    assert fixed != others
    assert [evaluated[start : start + 3] for start in range(0, 12, 4)] == [fixed] * 3
    drawn = evaluated[3::4]
    assert len(drawn) == 3 and drawn != [runs[0][step] for step in (1, 3, 5)]
    model.eval().vit.seed_execution_order(3, 1)
    first = tuple(model.vit.resolve_execution_order())
    assert drawn[0] == first
    model.train()
    assert runs[0][1] == tuple(model.vit.resolve_execution_order()) != first


@pytest.mark.parametrize("extras", [{}, {"depth_embedding": True, "position_predictor": True}])
def test_evaluation_measures_the_seeded_orders(vit, tmp_path, extras):
    model = vit.classifier(shuffle_mode="arbitrary", **extras)
    trainer = train(
        model,
        tmp_path,
        eval_strategy="steps",
        eval_steps=3,
        eval_orders=3,
        eval_orders_seed=5,
        per_device_eval_batch_size=7,
    )
    data = RandomImages()
    model.eval()
    with torch.no_grad():
        accuracies = [
            (model(data.images, execution_order=order).logits.argmax(-1) == data.labels).float().mean().item()
            for order in ls.arbitrary_execution_orders(4, 3, seed=5)
        ]
        sequential = (model(data.images).logits.argmax(-1) == data.labels).float().mean().item()
    logged = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(logged) == 2
    for metrics in (logged[-1], trainer.evaluate()):
        assert metrics["eval_accuracy"] == pytest.approx(sequential)
        assert metrics["eval_arbitrary_accuracy"] == pytest.approx(np.mean(accuracies))
        assert metrics["eval_arbitrary_accuracy_std"] == pytest.approx(np.std(accuracies))
        assert metrics["eval_arbitrary_accuracy_min"] == pytest.approx(min(accuracies))


def test_the_best_checkpoint_can_be_chosen_by_arbitrary_accuracy(vit, tmp_path):
    trainer = train(
        vit.classifier(shuffle_mode="arbitrary"),
        tmp_path,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        eval_orders=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_arbitrary_accuracy",
        greater_is_better=True,
    )
    values = [e["eval_arbitrary_accuracy"] for e in trainer.state.log_history if "eval_arbitrary_accuracy" in e]
    assert trainer.state.best_metric == max(values)
    assert len(set(values)) > 1
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_a_resumed_run_that_was_moved_ends_with_its_best_checkpoint(vit, tmp_path):
    options = dict(save_strategy="best", eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    options |= dict(metric_for_best_model="loss", greater_is_better=True)  # so that the first is the best
    trainer = train(vit.classifier(), tmp_path / "run", **options)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-2")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    trainer = train(vit.classifier(), moved, resume=str(moved / "checkpoint-2"), **options)
    assert trainer.state.global_step == 6 and trainer.state.best_model_checkpoint == str(moved / "checkpoint-2")
    best = load_file(moved / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_the_least_spread_is_the_best(tmp_path):
    for metric, is_greater in (("eval_arbitrary_accuracy_std", False), ("eval_arbitrary_accuracy", True)):
        assert arguments(tmp_path, metric_for_best_model=metric).greater_is_better is is_greater
    assert arguments(tmp_path, metric_for_best_model="x_std", greater_is_better=True).greater_is_better is True
    with pytest.raises(ValueError, match=r"`label_smoothing_factor` is -0.1; it must lie in \[0, 1\]"):
        arguments(tmp_path, label_smoothing_factor=-0.1)


@pytest.mark.parametrize("name", ["eval_orders", "eval_orders_seed"])
def test_negative_counts_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` is -1; it must be an integer of at least 0"):
        arguments(tmp_path, **{name: -1})


def test_a_plain_trainer_sees_logits_only(vit, tmp_path):
    model = vit.classifier(shuffle_mode="arbitrary", position_predictor=True)
    trainer = Trainer(model, arguments(tmp_path), compute_metrics=ls.compute_metrics, eval_dataset=RandomImages())
    assert trainer.predict(RandomImages()).predictions.shape == (40, 5)
    assert "eval_accuracy" in trainer.evaluate()
