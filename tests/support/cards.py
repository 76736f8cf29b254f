"""A small model's folder with everything that a card can show."""

import torch
from conftest import Architecture
from datasets import Array2D, ClassLabel, Dataset, Features
from transformers import ViTImageProcessor

import hf_layershuffle as ls
from hf_layershuffle.hub.card_examples import write_examples
from hf_layershuffle.hub.folder_records import record_training
from hf_layershuffle.hub.model_card import write_model_card
from hf_layershuffle.plotting import save_report_pictures


PICTURES = ("order_distribution.png", "pruning_curves.png", "layer_ablation.png")


def save_model(folder, **flags):
    model = Architecture("vit").classifier(**{"shuffle_mode": "arbitrary", **flags}).eval()
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return model


def images(num_images: int = 10) -> Dataset:
    features = Features({"image": Array2D((8, 8), "uint8"), "label": ClassLabel(names=["a", "b", "c", "d", "e"])})
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (num_images, 8, 8), generator=generator, dtype=torch.uint8).numpy()
    return Dataset.from_dict({"image": pixels, "label": [i % 5 for i in range(num_images)]}, features=features)


def describe(folder):
    """Makes a folder with everything that a card can show."""
    model, processor = save_model(folder), ViTImageProcessor(size={"height": 8, "width": 8})
    arguments = {"learning_rate": 5e-4, "seed": 3, "max_steps": -1, "logging_dir": "/home/me"}
    metrics = {"eval_accuracy": 0.5, "eval_runtime": 3.0}
    record_training(folder, arguments=arguments, dataset="org/letters", base_model="google/vit-tiny", metrics=metrics)
    report = ls.evaluate_robustness(
        model,
        images(),
        image_processor=processor,
        num_orders=8,
        num_subsets=2,
        model_name="vit-tiny",
        dataset_name="org/letters",
        progress=False,
    )
    report.save(folder)
    save_report_pictures({report.model: report}, folder)
    write_examples(folder, images(), processor)
    assert write_model_card(folder, repo_id="org/vit-tiny", license="mit")
    return folder
