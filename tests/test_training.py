import json
from types import SimpleNamespace

import evaluate
import numpy as np
import peft
import pytest
import torch
from accelerate import Accelerator
from conftest import record_layer_calls
from datasets import ClassLabel
from datasets import Dataset as ImageTable
from datasets import Image as ImageFeature
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset, Subset, random_split
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    ViTImageProcessor,
)

import hf_layershuffle as ls
from hf_layershuffle.data.datasets import load_image_datasets, match_labels
from hf_layershuffle.data.image_dataset import ImageClassificationDataset
from hf_layershuffle.models.position_modules import position_loss
from hf_layershuffle.training.nonfinite import NonFiniteWatch


class RandomImages(Dataset):
    """40 images of five classes that can be told apart by their mean."""

    def __init__(self, size: int = 40):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(size) % 5
        self.images = torch.randn(size, 3, 8, 8, generator=generator) + self.labels[:, None, None, None].float()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": int(self.labels[index])}


class Stop(TrainerCallback):
    """Stops after a step, as a user who interrupts a run that has just saved a checkpoint."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class RandomNumbers(TrainerCallback):
    """Something else that uses random numbers, at other times in each run."""

    def __init__(self, count: int):
        self.count = count

    def on_step_begin(self, args, state, control, **kwargs):
        torch.rand(self.count)


def arguments(folder, **kwargs):
    defaults = dict(
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    return ls.LayerShuffleTrainingArguments(output_dir=str(folder), **{**defaults, **kwargs})


def train(model, folder, trainer_class=ls.LayerShuffleTrainer, callbacks=(), resume=None, **kwargs):
    data = RandomImages()
    trainer = trainer_class(
        model=model,
        args=arguments(folder, **kwargs),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=ls.compute_metrics,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def recorded_orders(model, training: bool = True) -> list[tuple[int, ...]]:
    """Hooks the encoder; the returned list grows by the order of each forward in training, or in evaluation."""
    orders = []

    def record(module, args, output):
        if module.training == training:
            orders.append(tuple(output.execution_order.tolist()))

    model.base_model.register_forward_hook(record)
    return orders


# --- Metrics ---


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


@pytest.mark.parametrize("name", ["eval_orders", "eval_orders_seed"])
def test_negative_counts_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` is -1; it must be an integer of at least 0"):
        arguments(tmp_path, **{name: -1})


def test_a_plain_trainer_sees_logits_only(vit, tmp_path):
    model = vit.classifier(shuffle_mode="arbitrary", position_predictor=True)
    trainer = Trainer(model, arguments(tmp_path), compute_metrics=ls.compute_metrics, eval_dataset=RandomImages())
    assert trainer.predict(RandomImages()).predictions.shape == (40, 5)
    assert "eval_accuracy" in trainer.evaluate()


# --- Orders ---


def test_every_micro_batch_draws_a_new_order(vit, tmp_path):
    model = vit.classifier(shuffle_mode="arbitrary")
    orders = recorded_orders(model)
    train(model, tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=2, max_steps=5)
    assert len(orders) == 20
    assert all(len(set(orders[step : step + 4])) > 1 for step in range(0, 20, 4))


def test_orders_depend_on_the_seed_alone(vit, tmp_path):
    runs = []
    for seed, count in ((3, 0), (3, 5), (4, 0)):
        model = vit.classifier(shuffle_mode="arbitrary")
        orders = recorded_orders(model)
        train(model, tmp_path, callbacks=[RandomNumbers(count)], seed=seed)
        runs.append(orders)
    assert runs[0] == runs[1] != runs[2]


def test_the_callback_may_have_a_seed_of_its_own(vit, tmp_path):
    runs = []
    for callbacks in ([ls.LayerShuffleCallback(seed=4)], [ls.LayerShuffleCallback()], []):
        model = vit.classifier(shuffle_mode="arbitrary")
        orders = recorded_orders(model)
        train(model, tmp_path, callbacks=callbacks)
        runs.append(orders)
    assert runs[0] != runs[1] == runs[2]


def test_the_callback_refuses_a_model_without_orders(vit, tmp_path):
    with pytest.raises(ValueError, match="found no LayerShuffle model in ViTForImageClassification"):
        train(vit.plain_classifier(), tmp_path)


def test_a_plain_trainer_trains_on_one_process(vit, tmp_path):
    model = vit.classifier(shuffle_mode="arbitrary")
    orders = recorded_orders(model)
    trainer = train(model, tmp_path, trainer_class=Trainer, max_steps=30)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert len(set(orders)) > 10


# --- Stop and resume ---


@pytest.mark.parametrize("trainer_class", [ls.LayerShuffleTrainer, Trainer])
@pytest.mark.parametrize("stop_at", [3, 5])
def test_a_resumed_run_gives_the_weights_of_the_uninterrupted_one(vit, tmp_path, trainer_class, stop_at):
    flags = dict(
        shuffle_mode="arbitrary", layerdrop=0.2, depth_embedding=True, position_predictor=True, hidden_dropout_prob=0.1
    )
    options = dict(
        trainer_class=trainer_class, max_steps=8, gradient_accumulation_steps=2, per_device_train_batch_size=4
    )
    model = vit.classifier(**flags)
    expected_orders = recorded_orders(model)
    train(model, tmp_path / "whole", **options)

    first = vit.classifier(**flags)
    orders = recorded_orders(first)
    train(first, tmp_path / "parts", callbacks=[Stop(stop_at)], **options)
    checkpoint = tmp_path / "parts" / f"checkpoint-{stop_at}"
    resumed = vit.classifier(seed=99, **flags)
    resumed_orders = recorded_orders(resumed)
    torch.rand(1000)
    train(resumed, tmp_path / "parts", resume=str(checkpoint), **options)

    assert orders + resumed_orders == expected_orders
    assert len(expected_orders) == 16
    for (name, parameter), expected in zip(resumed.named_parameters(), model.parameters()):
        assert torch.equal(parameter, expected), name


def test_micro_batches_give_the_loss_of_the_batch(vit, tmp_path):
    """The Trainer divides by the number of images itself; class and position loss must both follow."""
    weights = []
    for micro_batches in (1, 4):
        model = vit.classifier(position_predictor=True)
        train(
            model,
            tmp_path,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            gradient_accumulation_steps=micro_batches,
            per_device_train_batch_size=8 // micro_batches,
        )
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=1e-4, msg=name)


# --- Weights in half precision ---


@pytest.mark.parametrize("mixed_precision", [{}, {"bf16": True}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_trains_like_one_in_float32(vit, tmp_path, caplog, mixed_precision, dtype):
    vit.classifier(shuffle_mode="arbitrary").to(dtype).save_pretrained(tmp_path / "half")
    weights = []
    for kwargs in ({}, {"dtype": torch.float32}):
        model = vit.classifier_class.from_pretrained(tmp_path / "half", **kwargs)
        assert model.dtype == kwargs.get("dtype", dtype)
        caplog.clear()
        train(model, tmp_path / "run", learning_rate=1e-5, **mixed_precision)
        name = str(dtype).removeprefix("torch.")
        warnings = [record for record in caplog.messages if f"The model is in {name}, in which small" in record]
        assert len(warnings) == (0 if kwargs else 1)
        weights.append(model.state_dict())
    start = vit.classifier_class.from_pretrained(tmp_path / "half").state_dict()
    for name, tensor in weights[0].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[1][name]), name
    assert not torch.equal(weights[0]["classifier.weight"], start["classifier.weight"].float())


def test_a_resumed_run_in_half_precision_does_not_round_its_checkpoint(vit, tmp_path):
    whole, first, resumed = (vit.classifier().half() for _ in "123")
    train(whole, tmp_path / "whole")
    train(first, tmp_path / "parts", callbacks=[Stop(2)])
    train(resumed, tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-2"))
    assert all(torch.equal(ours, other) for ours, other in zip(resumed.parameters(), whole.parameters()))


def test_a_model_made_by_the_trainer_is_trained_in_float32(vit, tmp_path):
    trainer = ls.LayerShuffleTrainer(
        model_init=lambda: vit.classifier(layerdrop=0.2).half(), args=arguments(tmp_path), train_dataset=RandomImages()
    )
    trainer.train()
    assert trainer.model.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "bf16"), [(torch.float16, False), (torch.bfloat16, True)])
def test_the_frozen_base_of_adapters_stays_in_half_precision(vit, tmp_path, dtype, bf16):
    base = vit.classifier(shuffle_mode="arbitrary", depth_embedding=True, position_predictor=True).to(dtype)
    saved = ["classifier", "depth_embedding", "depth_projection", "position_head"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    model = peft.get_peft_model(base, config)
    trainer = train(model, tmp_path, max_steps=30, gradient_checkpointing=True, bf16=bf16)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else dtype), name
    assert "eval_accuracy" in trainer.evaluate()
    if not bf16:
        with pytest.raises(ValueError, match="frozen weights in float16, which cannot be run in `bf16`"):
            train(model, tmp_path, bf16=True)


# --- Position loss ---


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
    args = arguments(
        tmp_path,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0,
        max_steps=1,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8 // micro_batches,
        gradient_accumulation_steps=micro_batches,
        train_sampling_strategy="sequential",
        **options,
    )
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


# --- Numbers that are not finite ---


class BrokenFrom(RandomImages):
    """Images of not-a-numbers from this access on."""

    def __init__(self, first: int):
        super().__init__()
        self.first, self.count = first, 0

    def __getitem__(self, index):
        self.count += 1
        item = super().__getitem__(index)
        return item if self.count <= self.first else {**item, "pixel_values": item["pixel_values"] * torch.nan}


@pytest.mark.parametrize("at_once", [True, False])
def test_training_stops_at_the_first_loss_that_is_not_finite(vit, tmp_path, monkeypatch, at_once):
    """An accelerator is asked when the Trainer logs or saves only, and the step is told all the same."""
    if not at_once:
        monkeypatch.setattr(ls.LayerShuffleTrainer, "_reads_at_once", lambda self: False)
    trainer = ls.LayerShuffleTrainer(
        vit.classifier(),
        arguments(tmp_path, save_strategy="steps", save_steps=2, logging_steps=5),
        train_dataset=BrokenFrom(2 * 8),
    )
    with pytest.raises(ValueError) as error:
        trainer.train()
    kept = tmp_path / "checkpoint-2"
    assert "Training stopped: the loss of step 3 is not finite." in str(error.value)
    assert f"the last good checkpoint is '{kept}'" in str(error.value)
    assert "Lower `learning_rate` (0.01)" in str(error.value)
    assert trainer.state.global_step == (2 if at_once else 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    assert all(tensor.isfinite().all() for tensor in load_file(kept / "model.safetensors").values())


class Overflow(TrainerCallback):
    """A step that is too large for the weights, of gradients that are finite."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.classifier.weight.data[0, 0] = torch.inf


def test_weights_that_are_not_finite_are_not_saved(vit, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(ValueError, match=r"the largest weight of step 3 is not finite\. .* is '.*checkpoint-2'"):
        train(vit.classifier(), tmp_path, callbacks=[Overflow()], **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    with pytest.raises(ValueError, match=r"Training stopped: the loss of step 2 .* no checkpoint .* \(1e\+36\)"):
        train(vit.classifier(), tmp_path / "rate", learning_rate=1e36)


def test_a_gradient_that_overflows_stops_training_but_for_loss_scaling(vit, tmp_path, monkeypatch):
    def overflow(self, model, grad_norm=None):
        return torch.tensor(torch.inf) if self.state.global_step == 1 else grad_norm

    monkeypatch.setattr(ls.LayerShuffleTrainer, "_get_grad_norm", overflow)
    with pytest.raises(ValueError, match="the gradient norm of step 2 is not finite"):
        train(vit.classifier(), tmp_path)
    trainer = train(vit.classifier(), tmp_path, stop_on_nonfinite=False)
    assert trainer.state.global_step == 6 and not trainer._watch._noted
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16"))
        assert train(vit.classifier(), tmp_path).state.global_step == 6


def test_numbers_are_read_after_a_hundred_steps_at_the_latest(vit, tmp_path, monkeypatch):
    monkeypatch.setattr(ls.LayerShuffleTrainer, "_reads_at_once", lambda self: False)
    monkeypatch.setattr("hf_layershuffle.training.trainer.CHECK_EVERY", 4)
    reads = []
    first = NonFiniteWatch.first
    monkeypatch.setattr(
        NonFiniteWatch, "first", lambda self, *args: reads.append(len(self._noted)) or first(self, *args)
    )
    train(vit.classifier(), tmp_path, max_steps=10, logging_strategy="no", num_train_epochs=9)
    # Loss and gradient norm of each step; once more where an epoch ends; the largest weight at the end of training
    assert reads == [8, 9, 5, 2]


# --- Data ---


class Wrapper:
    """One of a user's own, no subclass of PyTorch's."""

    def __init__(self, base):
        self.parts = {"images": base}

    def __len__(self):
        return len(self.parts["images"])

    def __getitem__(self, index):
        return self.parts["images"][index]


def split_in_two(dataset):
    return random_split(dataset, [30, 10], generator=torch.Generator().manual_seed(0))


WRAPPERS = {
    "subset": lambda dataset: Subset(dataset, range(40)),
    "concatenated": lambda dataset: ConcatDataset([Subset(dataset, range(15)), Subset(dataset, range(15, 40))]),
    "random split": lambda dataset: ConcatDataset(split_in_two(dataset)),
    "wrapper": Wrapper,
    "nested": lambda dataset: Subset(Wrapper(ConcatDataset([Wrapper(dataset)])), range(40)),
}


@pytest.mark.parametrize(("name", "workers"), [*((name, 0) for name in WRAPPERS), ("nested", 1)])
def test_augmentation_goes_on_inside_wrappers(vit, tmp_path, name, workers):
    def sums(wrap):
        augmented = ImageClassificationDataset(
            load_image_datasets("digits")["train"].select(range(40)),
            ViTImageProcessor(size={"height": 8, "width": 8}),
            augment=True,
            crop_padding=2,
            horizontal_flip=True,
        )
        model, found = vit.classifier(num_labels=10), []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: found.append(kwargs["pixel_values"].double().sum().item()), with_kwargs=True
        )
        args = arguments(
            tmp_path,
            num_train_epochs=3,
            max_steps=-1,
            per_device_train_batch_size=40,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=bool(workers),
        )
        ls.LayerShuffleTrainer(model, args, train_dataset=wrap(augmented)).train()
        return found

    expected, found = sums(lambda dataset: dataset), sums(WRAPPERS[name])
    assert len(set(found)) == 3
    assert found == pytest.approx(expected, rel=1e-9)


class Epochs(RandomImages):
    def __init__(self):
        super().__init__(24)
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def test_a_dataset_is_told_its_epoch_after_a_resume_too(vit, tmp_path):
    whole, parts = Epochs(), Epochs()
    options = {"num_train_epochs": 3, "max_steps": -1}
    ls.LayerShuffleTrainer(vit.classifier(), arguments(tmp_path, **options), train_dataset=whole).train()
    trainer = ls.LayerShuffleTrainer(
        vit.classifier(), arguments(tmp_path, **options), train_dataset=parts, callbacks=[Stop(4)]
    )
    trainer.train()
    trainer = ls.LayerShuffleTrainer(vit.classifier(), arguments(tmp_path, **options), train_dataset=parts)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    told = [[dict.fromkeys(data.epochs)] for data in (whole, parts)]
    assert told == [[dict.fromkeys([0, 1, 2])]] * 2
    assert all(type(epoch) is int for epoch in parts.epochs)
    # A third, thrice: the sum may lack its last bit
    state = TrainerState(epoch=1.9999999999999998)
    ls.LayerShuffleCallback().on_epoch_begin(None, state, None, train_dataloader=SimpleNamespace(dataset=whole))
    assert whole.epochs[-1] == 2


def raw_digits(**columns):
    dataset = load_image_datasets("digits")["train"].select(range(30))
    return dataset.rename_columns(columns) if columns else dataset


def as_pixels(rows):
    return {"pixel_values": [torch.tensor(image)[None] / 16.0 for image in rows["image"]], "labels": rows["label"]}


@pytest.mark.parametrize("columns", [{}, {"image": "img", "label": "digit"}])
def test_raw_images_are_prepared_by_the_processor(vit, tmp_path, columns):
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    raw = raw_digits()
    names = {str(9 - index): index for index in range(10)}  # the model's classes in another order than the dataset's
    flags = {"num_labels": 10, "num_channels": 1, "label2id": names, "id2label": {i: n for n, i in names.items()}}
    prepared = ImageClassificationDataset(match_labels(raw, vit.config(**flags)), processor, num_channels=1)
    results = []
    for dataset in (prepared, raw_digits(**columns)):
        model = vit.classifier(**flags)
        trainer = ls.LayerShuffleTrainer(
            model,
            arguments(tmp_path),
            train_dataset=dataset,
            eval_dataset={"a": dataset},
            processing_class=processor,
            compute_metrics=ls.compute_metrics,
        )
        trainer.train()
        metrics = trainer.evaluate()["eval_a_loss"], trainer.evaluate(dataset)["eval_loss"]
        results.append((metrics, trainer.predict(dataset).metrics["test_loss"], model.classifier.weight))
    assert results[0][:2] == results[1][:2] and torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize("kind", ["classes", "strings"])
def test_raw_datasets_in_other_class_orders_are_matched_by_name(vit, tmp_path, kind):
    pictures = [Image.fromarray(np.full((8, 8, 3), 40 * row, dtype=np.uint8)) for row in range(4)]
    features = [
        ClassLabel(names=names) for names in (["ant", "bee", "cat", "dog", "elk"], ["elk", "dog", "cat", "bee", "ant"])
    ]
    sets = []
    for feature, names in zip(features, (["ant", "bee", "cat", "dog"], ["dog", "cat", "dog", "cat"])):
        labels = names if kind == "strings" else [feature.str2int(name) for name in names]
        dataset = ImageTable.from_dict({"image": pictures, "label": labels}).cast_column("image", ImageFeature())
        sets.append(dataset.cast_column("label", feature) if kind == "classes" else dataset)
    trainer = ls.LayerShuffleTrainer(
        vit.classifier(), arguments(tmp_path), train_dataset=sets[0], eval_dataset=sets[1],
        processing_class=ViTImageProcessor(size={"height": 8, "width": 8}),
    )  # fmt: skip
    known = trainer.model.config.id2label
    assert [known[int(trainer.train_dataset[row]["labels"])] for row in range(4)] == ["ant", "bee", "cat", "dog"]
    assert [known[int(trainer.eval_dataset[row]["labels"])] for row in range(4)] == ["dog", "cat", "dog", "cat"]


def test_a_transform_is_taken_as_it_is(vit, tmp_path):
    dataset = raw_digits().with_transform(as_pixels)
    model = vit.classifier(num_labels=10, num_channels=1)
    trainer = ls.LayerShuffleTrainer(
        model, arguments(tmp_path), train_dataset=dataset, eval_dataset=dataset, compute_metrics=ls.compute_metrics
    )
    trainer.train()
    rows = as_pixels(raw_digits()[:])
    logits = model.eval()(torch.stack(rows["pixel_values"])).logits
    accuracy = (logits.argmax(-1) == torch.tensor(rows["labels"])).float().mean().item()
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(accuracy)


def test_raw_images_without_a_way_to_prepare_them_are_refused(vit, tmp_path):
    model, args = vit.classifier(num_labels=10, num_channels=1), arguments(tmp_path)
    for dataset in (raw_digits(), raw_digits().to_iterable_dataset()):
        with pytest.raises(
            ValueError, match=r"`train_dataset` has the columns image, label and no `pixel_values`. Pass"
        ):
            ls.LayerShuffleTrainer(model, args, train_dataset=dataset)
    with pytest.raises(ValueError, match="The transform of `eval_dataset` gives image, label; it must give"):
        ls.LayerShuffleTrainer(model, args, eval_dataset=raw_digits().with_transform(lambda rows: rows))
    named = raw_digits().cast_column("label", ClassLabel(names=list("abcdefghij")))
    flags = {"num_labels": 2, "id2label": {0: "a", 1: "z"}, "label2id": {"a": 0, "z": 1}}
    with pytest.raises(ValueError, match="the model does not know"):
        ls.LayerShuffleTrainer(
            vit.classifier(**flags), args, train_dataset=named, processing_class=ViTImageProcessor()
        )


def test_fewer_images_than_a_batch(vit, tmp_path):
    data = RandomImages(5)
    trainer = ls.LayerShuffleTrainer(
        vit.classifier(),
        arguments(tmp_path, dataloader_drop_last=True),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=ls.compute_metrics,
    )
    assert "eval_accuracy" in trainer.evaluate()
    with pytest.raises(ValueError, match="no batch to train on: 5 images, batches of 8 and `dataloader_drop_last`"):
        trainer.train()


@pytest.mark.parametrize(("layerdrop", "given", "expected"), [(0.2, None, True), (0.2, False, False), (0, None, None)])
def test_layerdrop_makes_ddp_look_for_unused_parameters(vit, tmp_path, layerdrop, given, expected):
    args = arguments(tmp_path, ddp_find_unused_parameters=given, gradient_checkpointing=True)
    trainer = ls.LayerShuffleTrainer(vit.classifier(layerdrop=layerdrop), args)
    assert trainer.args.ddp_find_unused_parameters is expected
    found = trainer.accelerator.ddp_handler.find_unused_parameters
    assert found == bool(layerdrop and given is not False)


# --- Features of the Trainer ---


def test_bf16_and_gradient_checkpointing(vit, tmp_path):
    model = vit.classifier(shuffle_mode="arbitrary", depth_embedding=True, position_predictor=True)
    trainer = train(model, tmp_path, bf16=True, gradient_checkpointing=True, max_steps=20)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_torch_compile_compiles_layer_by_layer(vit, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "")
    monkeypatch.delenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = vit.classifier(shuffle_mode="arbitrary")
    orders = recorded_orders(model)
    train(model, tmp_path, torch_compile=True, torch_compile_backend="aot_eager", max_steps=12)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5
    torch.compiler.reset()
    eager = vit.classifier(shuffle_mode="arbitrary")
    expected_orders = recorded_orders(eager)
    train(eager, tmp_path, max_steps=12)
    assert orders in ([], expected_orders)  # hooks set before compilation are not copied
    for (name, parameter), expected in zip(model.named_parameters(), eager.parameters()):
        torch.testing.assert_close(parameter, expected, msg=name)


def test_lora(vit, tmp_path, batch):
    flags = {"shuffle_mode": "arbitrary", "depth_embedding": True, "position_predictor": True}
    base = vit.classifier(**flags)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["classifier", "depth_embedding", "depth_projection", "position_head"],
    )
    model = peft.get_peft_model(base, config)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    # the layer list of a PEFT model is the same one
    calls = record_layer_calls(model.base_model.model)
    trainer = train(model, tmp_path / "run", max_steps=30)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert len({tuple(calls[start : start + 4]) for start in range(0, 120, 4)}) > 10
    assert frozen and all(torch.equal(dict(model.named_parameters())[name], tensor) for name, tensor in frozen.items())

    model.eval()
    expected = model(batch["pixel_values"], execution_order=[3, 1, 2]).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        ls.LayerShuffleViTForImageClassification.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    torch.testing.assert_close(loaded(batch["pixel_values"], execution_order=[3, 1, 2]).logits, expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(
        merged(batch["pixel_values"], execution_order=[3, 1, 2]).logits, expected, atol=1e-5, rtol=1e-4
    )


# --- Card ---


def test_the_trainer_writes_a_card_that_the_hub_understands(vit, tmp_path):
    trainer = train(
        vit.classifier(shuffle_mode="arbitrary"), tmp_path, eval_strategy="steps", eval_steps=6, eval_orders=2
    )
    trainer.create_model_card(dataset="random", finetuned_from="google/vit-base-patch16-224")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.library_name == "transformers"
    assert "layershuffle" in card.data.tags
    assert card.data.base_model == "google/vit-base-patch16-224"
    metrics = (
        trainer.state.log_history[-2]
        if "eval_accuracy" not in trainer.state.log_history[-1]
        else trainer.state.log_history[-1]
    )
    assert [result.metric_value for result in card.data.eval_results] == [
        round(metrics["eval_accuracy"], 4),
        round(metrics["eval_arbitrary_accuracy"], 4),
    ]
    assert f"{metrics['eval_arbitrary_accuracy_min']:.4f}" in card.text


def test_training_alone_writes_no_card(vit, tmp_path):
    train(vit.classifier(shuffle_mode="arbitrary"), tmp_path, save_strategy="steps", save_steps=3)
    assert not list(tmp_path.rglob("README.md"))


def test_training_arguments_are_saved_as_json_types(tmp_path):
    json.dumps(arguments(tmp_path, eval_orders=2).to_dict())


def test_the_plain_arguments_work_with_the_trainer(vit, tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    data = RandomImages()
    trainer = ls.LayerShuffleTrainer(vit.classifier(), args, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
