"""What is analysed."""

import torch


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
