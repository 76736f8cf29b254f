"""Checks of the Trainer as one process on one CUDA device of a distributed run.

test_gpu_launches.py runs them: accelerate launch --config_file FILE --num_processes 1 gpu_checks.py NAMES
"""

import copy
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from distributed_checks import FullBatch, build
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import hf_layershuffle as ls
from hf_layershuffle.training.evaluated_weights import MovingAverage


BACKEND, DEVICE = "nccl", "cuda"
ALL_FLAGS = {"shuffle_mode": "arbitrary", "depth_embedding": True, "position_predictor": True}
SEED = 3


def trainer_of(model, folder, **options):
    """A Trainer whose every step is of all 16 images, so that it does not depend on how they are shuffled."""
    defaults = dict(
        per_device_train_batch_size=16,
        max_steps=4,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        seed=SEED,
        eval_orders=3,
    )
    args = ls.LayerShuffleTrainingArguments(str(folder), **{**defaults, **options})
    return ls.LayerShuffleTrainer(
        model, args, train_dataset=FullBatch(), eval_dataset=FullBatch(), compute_metrics=ls.compute_metrics
    )


def trained_by_hand(model, steps=range(4)):
    """The same steps on the CPU."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        model.vit.seed_execution_order(seed=SEED, step=step)
        model(**FullBatch.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def weights_of(trainer) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def assert_same(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance) -> None:
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def assert_distributed(trainer, kind: str) -> None:
    assert trainer.accelerator.distributed_type == kind, trainer.accelerator.distributed_type
    assert BACKEND in dist.get_backend(), dist.get_backend()
    assert dist.get_world_size() == 1
    assert trainer.args.device.type == DEVICE


def check_steps(kind: str) -> None:
    """The steps of one process without anything distributed."""
    for flags in ({}, ALL_FLAGS, {"shuffle_mode": "arbitrary", "layerdrop": 0.3}):
        for checkpointing in (False, True):
            model = build(**flags)
            expected = dict(trained_by_hand(copy.deepcopy(model)).named_parameters())
            with tempfile.TemporaryDirectory() as folder:
                trainer = trainer_of(model, folder, gradient_checkpointing=checkpointing)
                trainer.train()
            assert_distributed(trainer, kind)
            if kind == "MULTI_GPU":
                assert isinstance(trainer.model_wrapped, DistributedDataParallel)
            else:
                assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
            expected = {name: parameter.detach() for name, parameter in expected.items()}
            assert_same(weights_of(trainer), expected, atol=1e-4, rtol=1e-3)


def check_runs(kind: str) -> None:
    """bfloat16, accumulation, a teacher, evaluation, checkpoints, a resumed run, the saved model."""
    options = dict(
        bf16=True, per_device_train_batch_size=4, gradient_accumulation_steps=2, optim="adamw_torch",
        learning_rate=1e-2, max_steps=6, max_grad_norm=1.0, save_strategy="steps", save_steps=3,
        eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(build(**ALL_FLAGS), f"{folder}/whole", **options)
        trainer.train()
        assert_distributed(trainer, kind)
        entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        assert len(entries) == 2 and all("eval_arbitrary_accuracy" in entry for entry in entries)
        assert sorted(path.name for path in Path(folder, "whole").glob("checkpoint-*")) == [
            "checkpoint-3",
            "checkpoint-6",
        ]
        resumed = trainer_of(build(**ALL_FLAGS), f"{folder}/whole", **options)
        resumed.train(resume_from_checkpoint=f"{folder}/whole/checkpoint-3")
        assert resumed.state.global_step == 6
        weights = weights_of(trainer)
        # bfloat16 products may differ in their last bit from run to run
        assert_same(weights_of(resumed), weights, atol=5e-3, rtol=5e-2)
        trainer.save_model(f"{folder}/saved")
        assert Path(folder, "saved", "modeling_layershuffle.py").exists()
        saved = ls.LayerShuffleViTForImageClassification.from_pretrained(f"{folder}/saved")
        assert_same({name: each.detach() for name, each in saved.named_parameters()}, weights, atol=0, rtol=0)


def check_averages(kind: str) -> None:
    """The average is that of one process without anything distributed; it is evaluated, saved and gone on with."""
    flags = {"shuffle_mode": "arbitrary", "drop_path_rate": 0.2}
    options = dict(ema_decay=0.5, layer_lr_decay=0.8, optim="adamw_torch", learning_rate=1e-2, max_steps=6)
    options |= dict(save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3)
    expected = build()
    average = MovingAverage(expected, 0.5)
    for step in range(1, 5):
        trained_by_hand(expected, range(step - 1, step))
        average.update(step)
    average.finish()
    with tempfile.TemporaryDirectory() as folder:
        plain = trainer_of(build(), f"{folder}/plain", ema_decay=0.5)
        plain.train()
        assert_distributed(plain, kind)
        weights = {name: parameter.detach() for name, parameter in expected.named_parameters()}
        assert_same(weights_of(plain), weights, atol=1e-4, rtol=1e-3)

        trainer = trainer_of(build(**flags), f"{folder}/whole", **options)
        trainer.train()
        resumed = trainer_of(build(**flags), f"{folder}/whole", **options)
        resumed.train(resume_from_checkpoint=f"{folder}/whole/checkpoint-3")
        assert_same(weights_of(resumed), weights_of(trainer), atol=1e-4, rtol=1e-3)
        trainer.save_model(f"{folder}/saved")
        saved = ls.LayerShuffleViTForImageClassification.from_pretrained(f"{folder}/saved")
        saved_weights = {name: each.detach() for name, each in saved.named_parameters()}
        assert_same(saved_weights, weights_of(trainer), atol=0, rtol=0)


if __name__ == "__main__":
    Accelerator.multi_device = property(lambda self: True)  # which else leaves out DDP for one process
    torch.backends.cudnn.allow_tf32 = False
    kind = sys.argv[1]
    for name in sys.argv[2:]:
        globals()[f"check_{name}"](kind)
        print(f"{kind}: {name} passed", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # as distributed_checks.py does
