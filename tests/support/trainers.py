"""A Trainer on a few random images."""

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

import hf_layershuffle as ls


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


def one_sgd_step(folder, micro_batches=1, **kwargs):
    """Arguments of one step of plain SGD on eight images in their sequence, by which a test can take the same step."""
    return arguments(
        folder,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0,
        max_steps=1,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8 // micro_batches,
        gradient_accumulation_steps=micro_batches,
        train_sampling_strategy="sequential",
        **kwargs,
    )
