"""The operations of the policies, held against Pillow's."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from support.filters import blur

from hf_layershuffle.data import image_operations
from hf_layershuffle.data.image_operations import apply_operations
from hf_layershuffle.data.operation_policies import BLENDS, FILTERS, MOVES, OPERATIONS, POLICIES, TABLES


FILL = (100, 120, 140)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """Smooth, since the outermost pixels of a moved image fade here, and do not in Pillow."""
    blocks = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((40, 30), Image.Resampling.BICUBIC)


def changed(image: Image.Image, name: str, magnitude: float) -> np.ndarray:
    """In levels of grey, of shape `(height, width, 3)`."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    fill = torch.tensor([FILL]).float()
    code, magnitudes = torch.tensor([[OPERATIONS.index(name)]]), torch.tensor([[float(magnitude)]])
    return apply_operations(pixels, code, magnitudes, fill)[0].permute(1, 2, 0).numpy()


def moved(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL)


def brightened_below(image: Image.Image, added: int) -> Image.Image:
    return image.point([min(255, level + added) if level < 128 else level for level in range(256)] * 3)


BY_PILLOW = {
    "identity": (0, lambda image, _: image),
    "auto_contrast": (0, lambda image, _: ImageOps.autocontrast(image)),
    "equalize": (0, lambda image, _: ImageOps.equalize(image)),
    "invert": (0, lambda image, _: ImageOps.invert(image)),
    "rotate": (27.0, lambda image, angle: image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=FILL)),
    "posterize": (3, ImageOps.posterize),
    "solarize": (77, ImageOps.solarize),
    "solarize_add": (60, brightened_below),
    "color": (-0.6, lambda image, change: ImageEnhance.Color(image).enhance(1 + change)),
    "contrast": (0.7, lambda image, change: ImageEnhance.Contrast(image).enhance(1 + change)),
    "brightness": (0.5, lambda image, change: ImageEnhance.Brightness(image).enhance(1 + change)),
    "sharpness": (0.9, lambda image, change: ImageEnhance.Sharpness(image).enhance(1 + change)),
    "shear_x": (0.25, lambda image, factor: moved(image, 1, factor, 0, 0, 1, 0)),
    "shear_y": (-0.3, lambda image, factor: moved(image, 1, 0, 0, factor, 1, 0)),
    "translate_x": (7.25, lambda image, pixels: moved(image, 1, 0, pixels, 0, 1, 0)),
    "translate_y": (-5.0, lambda image, pixels: moved(image, 1, 0, 0, 0, 1, pixels)),
    # Pillow's Gaussian is made of boxes, so by NumPy
    "blur": (1.07, lambda image, std: blur(np.asarray(image), std)),
}


@pytest.mark.parametrize("name", BY_PILLOW)
def test_an_operation_does_what_pillow_does(image, name):
    magnitude, by_pillow = BY_PILLOW[name]
    differences = np.abs(changed(image, name, magnitude) - np.asarray(by_pillow(image, magnitude)).astype(float))
    # Pillow rounds to whole levels, once or twice; and it does not fade the outermost pixels of what it moves
    is_off = (differences > 1.5).mean()
    assert is_off <= (0.06 if name.startswith(("rotate", "shear", "translate")) else 0)
    assert np.median(differences) < 0.5


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_channels", [1, 3])
def test_each_image_gets_its_own_operations_one_after_the_other(policy, num_channels):
    names = list(POLICIES[policy])
    generator = torch.Generator().manual_seed(0)
    pixels = 255 * torch.rand(3 * len(names), num_channels, 12, 16, generator=generator)
    codes = torch.tensor([OPERATIONS.index(name) for name in names]).repeat(3)
    operations = torch.stack([codes[torch.randperm(len(codes), generator=generator)], codes.flip(0)], dim=1)
    magnitudes = torch.tensor(
        [[POLICIES[policy][OPERATIONS[code]].strongest * 0.7 for code in row] for row in operations]
    )
    magnitudes[operations == OPERATIONS.index("blur")] = 0.3
    fill = 255 * torch.rand(len(codes), num_channels, generator=generator)
    seeds = torch.arange(len(codes))
    together = apply_operations(pixels.clone(), operations, magnitudes, fill, seeds)
    assert together.shape == pixels.shape and together.min() >= 0 and together.max() <= 255
    for row in range(len(codes)):
        alone = pixels[row : row + 1].clone()
        for slot in (0, 1):
            part = slice(slot, slot + 1)
            of_row = (values[row : row + 1] for values in (operations[:, part], magnitudes[:, part], fill))
            alone = apply_operations(alone, *of_row, seeds[row : row + 1] + slot)
        torch.testing.assert_close(together[row], alone[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["auto_contrast", "equalize", "sharpness"])
def test_an_image_of_one_level_and_a_tiny_one_stay_as_they_are(name):
    for pixels in (torch.full((1, 3, 8, 8), 90.0), torch.full((1, 3, 2, 2), 90.0)):
        code, magnitudes = torch.tensor([[OPERATIONS.index(name)]]), torch.tensor([[0.5]])
        result = apply_operations(pixels.clone(), code, magnitudes, torch.zeros(1, 3))
        torch.testing.assert_close(result, pixels, atol=1e-4, rtol=0)


def test_posterizing_leaves_at_least_one_bit(image):
    assert (changed(image, "posterize", 0) == changed(image, "posterize", 1)).all()
    assert set(np.unique(changed(image, "posterize", 0).round())) == {0, 128}


def test_each_operation_has_its_place_among_those_of_its_kind():
    """Images are sorted by code, and each kind expects its own."""
    assert (*image_operations._FIXED_TABLES, *image_operations._TABLES_BY_HISTOGRAM) == TABLES
    assert ("identity", *TABLES, *BLENDS, *MOVES, *FILTERS) == OPERATIONS and len(set(OPERATIONS)) == 18
