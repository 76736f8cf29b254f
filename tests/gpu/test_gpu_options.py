"""Averaged weights, stochastic depth, learning rates by layer and optimizers on a CUDA device."""

import pytest
import torch
from support.gpu import ON_GPU, deterministic, no_waiting
from support.trainers import Stop, train

import hf_layershuffle as ls
from hf_layershuffle.training.evaluated_weights import MovingAverage


pytestmark = pytest.mark.gpu
FLAGS = dict(shuffle_mode="arbitrary", depth_embedding=True, drop_path_rate=0.2)
OPTIMIZERS = {
    "fused": dict(optim="adamw_torch_fused", ema_decay=0.6),
    "adafactor": dict(optim="adafactor", ema_decay=0.6),
    "schedule-free": dict(optim="schedule_free_adamw", lr_scheduler_type="constant"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_differs_in_no_bit(vit, tmp_path, name):
    if name == "schedule-free":
        pytest.importorskip("schedulefree")
    options = dict(layer_lr_decay=0.8, bf16=True, eval_strategy="steps", eval_steps=2, eval_orders=2)
    options |= dict(gradient_accumulation_steps=2, per_device_train_batch_size=4, **OPTIMIZERS[name], **ON_GPU)
    with deterministic():
        whole, first, resumed = (vit.classifier(**FLAGS) for _ in range(3))
        train(whole, tmp_path / "whole", **options)
        train(first, tmp_path / "parts", callbacks=[Stop(3)], **options)
        train(resumed, tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-3"), **options)
    for (name, parameter), expected in zip(resumed.named_parameters(), whole.parameters()):
        assert torch.equal(parameter, expected), name
    saved = ls.LayerShuffleViTForImageClassification.from_pretrained(tmp_path / "parts" / "checkpoint-3")
    assert saved.config.drop_path_rate == 0.2


def test_neither_an_average_nor_stochastic_depth_makes_the_host_wait(vit, batch):
    model = vit.classifier(**FLAGS).cuda().train()
    images, labels = batch["pixel_values"].cuda(), batch["labels"].cuda()
    average = MovingAverage(model, 0.9)
    model(images, labels=labels).loss.backward()  # what is made once
    with no_waiting():
        model(images, labels=labels).loss.backward()
        average.update(1)
    with average.applied():
        assert not torch.equal(model.classifier.weight, average.training_values()["classifier.weight"])
