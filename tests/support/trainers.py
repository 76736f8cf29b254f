"""A Trainer on a few random images."""

import torch
from torch.nn import functional as F
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


class MixedImages(RandomImages):
    """Items as of datasets that were put together: each says how it is to be mixed. Nothing is cut."""

    weights = torch.tensor([0.3, 1.0, 0.5, 0.8, 0.6, 0.9, 0.25, 0.7])

    def __getitem__(self, index):
        item = {"pixel_values": self.images[index], "labels": self.labels[index]}
        return {**item, "mixing": self.weights[index], "mixing_boxes": torch.zeros(4, dtype=torch.int64)}

    def mixed(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixed images and the classes of the other images, of batches of this size."""
        images = torch.cat([part.flip(0) for part in self.images.split(size)])
        weights = self.weights[:, None, None, None]
        others = torch.cat([part.flip(0) for part in self.labels.split(size)])
        return weights * self.images + (1 - weights) * images, others

    def cross_entropies(self, logits: torch.Tensor, size: int, smoothing: float = 0.0) -> torch.Tensor:
        """By the definition: a weighted sum of two losses."""
        others = self.mixed(size)[1]
        own, other = (
            F.cross_entropy(logits, each, label_smoothing=smoothing, reduction="none")
            for each in (self.labels, others)
        )
        weights = torch.where(others == -100, 1.0, self.weights)
        return torch.where(self.labels == -100, 0.0, weights * own + (1 - weights) * other)


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
