"""The Trainer on a CUDA device: half precision, images that travel as uint8, compiled layers, evaluation, resume."""

import copy

import pytest
import torch
from datasets import Dataset
from support.gpu import DEVICE, ON_GPU, deterministic, float32_numbers
from support.images import image_dataset, processor
from support.trainers import RandomImages, RandomNumbers, Stop, arguments, recorded_orders, train

import hf_layershuffle as ls
from hf_layershuffle.data.augmentation import finish_batch
from hf_layershuffle.data.image_dataset import ImageClassificationDataset
from hf_layershuffle.training import trainer as trainer_module


pytestmark = pytest.mark.gpu
ALL_FLAGS = {"shuffle_mode": "arbitrary", "depth_embedding": True, "position_predictor": True}


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(model, expected, **tolerance):
    for (name, ours), other in zip(model.named_parameters(), expected.named_parameters()):
        torch.testing.assert_close(
            ours.cpu(), other[1].cpu(), msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


def test_training_takes_the_steps_of_the_cpu_in_the_same_orders(vit, tmp_path):
    models = vit.classifier(**ALL_FLAGS), vit.classifier(**ALL_FLAGS)
    orders = [recorded_orders(model) for model in models]
    with float32_numbers():
        for model, where in zip(models, (ON_GPU, {"use_cpu": True})):
            # Plain SGD: the first steps of Adam depend on the signs of the smallest gradients
            trainer = train(model, tmp_path, optim="sgd", learning_rate=0.05, gradient_accumulation_steps=2, **where)
    assert trainer.args.device.type == "cpu"
    assert next(models[0].parameters()).device.type == DEVICE.type
    assert orders[0] == orders[1] and len(set(orders[0])) > 6
    assert_same_weights(*models, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {
            "bf16": True,
            "label_smoothing_factor": 0.1,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
        },
        {"bf16": True, "optim": "adamw_torch_fused", "max_grad_norm": 0.5},
        {"fp16": True},
    ],
    ids=["bf16 with everything", "bf16 fused", "fp16"],
)
def test_half_precision(vit, tmp_path, options):
    trainer = train(vit.classifier(**ALL_FLAGS), tmp_path, max_steps=60, **options, **ON_GPU)
    losses = losses_of(trainer)
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] > 0.3  # of five classes


@pytest.mark.parametrize("mixed_precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_weights_in_bfloat16_are_trained_in_float32_and_learn_from_a_teacher(vit, tmp_path, mixed_precision):
    data = RandomImages()
    teacher = vit.plain_classifier(seed=7)
    with torch.no_grad():
        teacher.classifier.weight.mul_(50)  # far from uniform
    model = vit.classifier(shuffle_mode="arbitrary").to(torch.bfloat16)
    args = arguments(tmp_path, max_steps=60, distillation_weight=1.0, **mixed_precision, **ON_GPU)
    trainer = ls.LayerShuffleTrainer(model=model, args=args, train_dataset=data, teacher_model=teacher)
    trainer.train()
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    assert {each.device.type for each in (model, teacher)} == {DEVICE.type}
    losses = losses_of(trainer)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_two_runs_on_one_device_differ_in_no_bit_and_so_does_a_resumed_one(vit, tmp_path):
    with deterministic():
        whole, again, first, resumed = (vit.classifier(**ALL_FLAGS) for _ in range(4))
        train(whole, tmp_path / "whole", bf16=True, **ON_GPU)
        train(again, tmp_path / "again", bf16=True, callbacks=[RandomNumbers(3)], **ON_GPU)
        assert_same_weights(again, whole, atol=0, rtol=0)
        train(first, tmp_path / "parts", bf16=True, callbacks=[Stop(3)], **ON_GPU)
        train(resumed, tmp_path / "parts", bf16=True, resume=str(tmp_path / "parts" / "checkpoint-3"), **ON_GPU)
    assert_same_weights(resumed, whole, atol=0, rtol=0)


# --- Images ---


class Watched:
    """Stands in for `finish_batch` and keeps what it is given and gives."""

    def __init__(self):
        self.pairs = []

    def __call__(self, batch):
        given = dict(batch)
        finished = finish_batch(batch)
        self.pairs.append((given, finished))
        return finished


@pytest.mark.parametrize("workers", [0, 2])
def test_images_travel_as_uint8_and_are_augmented_on_the_device(vit, tmp_path, monkeypatch, workers):
    images = ImageClassificationDataset(
        image_dataset(40, names="abcde"), processor(), augment=True, crop_padding=2, horizontal_flip=True, seed=1
    )
    watched = Watched()
    monkeypatch.setattr(trainer_module, "finish_batch", watched)
    args = arguments(
        tmp_path, max_steps=5, per_device_train_batch_size=8, bf16=True, dataloader_num_workers=workers, **ON_GPU
    )
    assert args.dataloader_pin_memory == torch.cuda.is_available()
    model = vit.classifier(shuffle_mode="arbitrary")
    ls.LayerShuffleTrainer(model=model, args=args, train_dataset=images).train()
    assert len(watched.pairs) == 5
    for given, finished in watched.pairs:
        assert given["pixel_values"].dtype == torch.uint8
        assert {each.device.type for each in given.values()} == {DEVICE.type}
        assert finished["pixel_values"].dtype == torch.float32
        assert finished["pixel_values"].device.type == DEVICE.type
        on_cpu = finish_batch({name: each.cpu() for name, each in given.items()})
        torch.testing.assert_close(finished["pixel_values"].cpu(), on_cpu["pixel_values"], atol=1e-5, rtol=1e-5)


# --- Compiled ---


@pytest.mark.parametrize("flags", [{"shuffle_mode": "arbitrary"}, ALL_FLAGS], ids=["arbitrary", "all flags"])
def test_torch_compile_makes_no_graph_for_another_order(vit, tmp_path, monkeypatch, flags):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "")
    monkeypatch.delenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    trainer = train(vit.classifier(**flags), tmp_path, torch_compile=True, bf16=True, max_steps=24, **ON_GPU)
    losses = losses_of(trainer)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6
    assert losses[-1] < 0.9 * losses[0]
    torch.compiler.reset()
    eager = train(vit.classifier(**flags), tmp_path, bf16=True, max_steps=24, **ON_GPU)
    assert losses == pytest.approx(losses_of(eager), abs=0.1)


# --- Evaluation, and what goes wrong ---


def test_evaluation_in_many_orders_is_that_of_the_cpu(vit, tmp_path):
    model = vit.classifier(shuffle_mode="arbitrary")
    train(model, tmp_path, max_steps=20, **ON_GPU)
    metrics = []
    with float32_numbers():
        for where in (ON_GPU, {"use_cpu": True}):
            args = arguments(tmp_path, eval_orders=8, per_device_eval_batch_size=16, **where)
            copied = copy.deepcopy(model).to("cpu")
            trainer = ls.LayerShuffleTrainer(
                model=copied, args=args, eval_dataset=RandomImages(), compute_metrics=ls.compute_metrics
            )
            metrics.append(trainer.evaluate())
    names = [
        name for name in metrics[0] if name.startswith("eval_") and "per_second" not in name and name[-7:] != "runtime"
    ]
    assert "eval_accuracy" in names and any("arbitrary" in name for name in names)
    for name in names:
        if isinstance(metrics[0][name], float):
            assert metrics[0][name] == pytest.approx(metrics[1][name], abs=1e-3), name


def test_training_stops_at_numbers_that_are_not_finite(vit, tmp_path):
    images = RandomImages()
    images.images[25] = torch.nan
    args = arguments(tmp_path, max_steps=12, logging_steps=6, bf16=True, **ON_GPU)
    trainer = ls.LayerShuffleTrainer(model=vit.classifier(), args=args, train_dataset=images)
    with pytest.raises(ValueError, match=r"loss of step \d is not finite"):
        trainer.train()


def test_a_dataset_of_images_is_evaluated_on_the_device(vit):
    model = vit.classifier(num_labels=2).to(DEVICE)
    data = image_dataset(12)
    assert isinstance(data, Dataset)
    scores = ls.score_execution_orders(
        model, data, [[0, 1, 2, 3], [3, 1]], processing_class=processor(), batch_size=5, progress=False
    )
    expected = ls.score_execution_orders(
        model.cpu(), data, [[0, 1, 2, 3], [3, 1]], processing_class=processor(), batch_size=5, progress=False
    )
    for ours, other in zip(scores, expected):
        assert ours.loss == pytest.approx(other.loss, rel=1e-3)
