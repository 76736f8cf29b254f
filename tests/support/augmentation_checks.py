"""Two processes train on the same images as one, with every preset.

test_augmented_runs.py runs it: torchrun --nproc_per_node 2 augmentation_checks.py
"""

import tempfile

import torch
import torch.distributed as dist
from images import AUGMENTATIONS, augmentation_named, image_dataset, processor

import hf_layershuffle as ls
from hf_layershuffle.data import ImageClassificationDataset
from hf_layershuffle.data.augmentation import finish_batch


def fed_batches(folder: str, preset: str) -> list[dict]:
    """What the Trainer of this process feeds its model in two passes."""
    config = ls.LayerShuffleViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    data = ImageClassificationDataset(image_dataset(16), processor(), augmentation=augmentation_named(preset), seed=4)
    args = ls.LayerShuffleTrainingArguments(
        folder, num_train_epochs=2, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, train_sampling_strategy="sequential", logging_strategy="no",
    )  # fmt: skip
    assert args.world_size == 2
    trainer = ls.LayerShuffleTrainer(ls.LayerShuffleViTForImageClassification(config), args, train_dataset=data)
    batches, prepare = [], trainer._prepare_inputs
    trainer._prepare_inputs = lambda inputs: batches.append(prepare(inputs)) or batches[-1]
    trainer.train()
    return batches


def check(rank: int, preset: str, folder: str) -> None:
    batches = fed_batches(folder, preset)
    assert len(batches) == 4
    data = ImageClassificationDataset(image_dataset(16), processor(), augmentation=augmentation_named(preset), seed=4)
    for number, batch in enumerate(batches):
        data.set_epoch(number // 2)
        first = 8 * (number % 2) + 4 * rank  # each step takes eight images, the first four on process 0
        expected = finish_batch(data.__getitems__(list(range(first, first + 4))).unfinished)
        assert batch.keys() == expected.keys()
        for name, values in batch.items():
            torch.testing.assert_close(values, expected[name], msg=f"{preset}: {name}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for name in AUGMENTATIONS:
        with tempfile.TemporaryDirectory() as temporary:
            check(dist.get_rank(), name, temporary)
    print(f"rank {dist.get_rank()}: passed", flush=True)
    dist.destroy_process_group()
