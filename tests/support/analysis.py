"""What is analysed."""

import torch
from torch.utils.data import DataLoader

import hf_layershuffle as ls
from hf_layershuffle.data import as_dataloader


def randomize(model, seed: int = 0):
    """Weights of a size at which parts differ; the modules that start at zero are no longer no-ops."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_items(num_images: int, num_labels: int = 5, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(num_images, 3, 8, 8, generator=generator)
    return [{"pixel_values": image, "labels": i % num_labels} for i, image in enumerate(pixels)]


def digits_batches(split: str, count: int, batch_size: int) -> DataLoader:
    """The first digits of a split as the example model takes them."""
    processor = ls.load_image_processor(ls.example_model())
    return as_dataloader(
        ls.load_image_datasets("digits")[split].select(range(count)), processor, batch_size=batch_size
    )
