# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""From stored images to uint8 of the model's size: whole, as an image processor resizes them, or a part of each."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Image as ImageFeature
from PIL import Image as PILImage
from PIL import ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from transformers import ImageProcessingMixin

from .image_reading import MISSING, oriented_size, to_pil
from .pixel_cache import unequal_sizes


Boxes = Callable[[np.ndarray], np.ndarray]
_BILINEAR = 2
_REDUCTIONS = (8, 4, 2)  # by which libjpeg makes images smaller while it decodes them


class ImageDecoder:
    """Decodes batches of images to uint8, and says what normalises them.

    Args:
        image_processor: The image processor that resizes the images and says their mean and standard deviation.
        num_channels: 3 to read all images as RGB, 1 as grey.

    Attributes:
        mode: "RGB", or "L" for grey.
        normalization: float32 of shape `(2, num_channels)`: `pixels * normalization[0] + normalization[1]` is what the
            model takes.

    Raises:
        `ValueError`: if `num_channels` is another number.
    """

    def __init__(self, image_processor: ImageProcessingMixin, num_channels: int | None):
        if num_channels not in (1, 3):
            raise ValueError(f"`num_channels` is {num_channels}; images are read with 1 (grey) or 3 (RGB) channels.")
        self.image_processor: Any = image_processor
        self.mode = "L" if num_channels == 1 else "RGB"
        self.normalization = _scale_and_shift(image_processor, num_channels)
        self._check_steps(num_channels)

    def _check_steps(self, num_channels: int) -> None:
        """Refuses an image processor that does more than resize, crop, rescale and normalise.

        What it did besides would be left out, wholly or where an augmentation takes parts of images.
        """
        colour = np.array([200, 90, 20][:num_channels], dtype=np.uint8)  # which no way to resize changes
        image = np.broadcast_to(colour, (32, 48, num_channels)).copy()
        given, layout = (image, "channels_last") if num_channels == 3 else (image[None, :, :, 0], "channels_first")
        try:
            pixels = self.whole([PILImage.fromarray(image.squeeze())])
            expected = self.image_processor([given], return_tensors="pt", input_data_format=layout).pixel_values
        except (ValueError, TypeError, AttributeError):
            return  # which is said where images are read
        scale, shift = self.normalization[:, :, None, None]
        middle = pixels[0, :, pixels.shape[2] // 2, pixels.shape[3] // 2]  # beside what may be padded
        differs = (pixels * scale + shift - expected).abs() > scale
        if differs.any() or (middle.int() - torch.from_numpy(colour).int()).abs().max() > 1:
            raise ValueError(
                f"{type(self.image_processor).__name__} does more with images than resize, crop, rescale and "
                "normalise them (it may reverse channels, shift values, or pad after that), which is not done here. "
                "Take an image processor that does not, such as ViTImageProcessor, and save it in the model's folder."
            )

    def whole(self, images: Sequence[PILImage.Image]) -> torch.Tensor:
        """Images as the image processor resizes and crops them.

        Args:
            images: Images of the mode `mode`, each of any size.

        Returns:
            uint8 of shape `(len(images), num_channels, height, width)`.

        Raises:
            `ValueError`: if the image processor does not bring all images to one size.
        """
        channels = {"input_data_format": "channels_first"} if self.mode == "L" else {}
        arrays = [np.asarray(image)[None] if self.mode == "L" else image for image in images]
        settings = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt", **channels}
        try:
            pixels = self.image_processor(arrays, **settings).pixel_values
        except ValueError as error:
            shapes = sorted(
                {tuple(self.image_processor([each], **settings).pixel_values.shape[1:]) for each in arrays}
            )
            if len(shapes) == 1:
                raise
            raise ValueError(unequal_sizes(shapes[0], shapes[-1])) from error
        if pixels.ndim != 4:
            raise ValueError(
                f"{type(self.image_processor).__name__} makes lists of patches of images, which are not taken here; "
                "take a model of images of one size, such as a ViT or a SigLIP, and its image processor."
            )
        return pixels.clamp(0, 255).to(torch.uint8)

    def parts(self, images: Sequence[Any], boxes_of: Boxes, size: tuple[int, int]) -> torch.Tensor:
        """A part of each image, resized.

        The boxes are in pixels of the original image. A JPEG file is decoded at a half, a quarter or an eighth of its
        size where the part then still has at least the pixels that are wanted of it.

        Args:
            images: Images from [`open_image`].
            boxes_of: Takes the heights and widths of the images, integers of shape `(len(images), 2)`, and gives the
                parts: top, left, height and width, of shape `(len(images), 4)`.
            size: Height and width of the result.

        Returns:
            uint8 of shape `(len(images), num_channels, *size)`.
        """
        images = [image if isinstance(image, PILImage.Image) else to_pil(image, self.mode) for image in images]
        boxes = boxes_of(np.array([oriented_size(image) for image in images], dtype=np.int64))
        resample = getattr(self.image_processor, "resample", None)
        resample = _BILINEAR if resample is None else int(resample)
        pixels = [self._part(image, box, size, resample) for image, box in zip(images, boxes)]
        stacked = torch.from_numpy(np.stack(pixels))
        return stacked[:, None] if self.mode == "L" else stacked.permute(0, 3, 1, 2).contiguous()

    def _part(self, image: PILImage.Image, box: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
        top, left, height, width = box.tolist()
        reduction = _reduce(image, min(height / size[0], width / size[1]))
        ImageOps.exif_transpose(image, in_place=True)
        image = to_pil(image, self.mode)
        edges = (left / reduction, top / reduction, (left + width) / reduction, (top + height) / reduction)
        limits = (image.width, image.height) * 2
        part = tuple(min(edge, limit) for edge, limit in zip(edges, limits))
        return np.asarray(image.resize((size[1], size[0]), PILImage.Resampling(resample), box=part))


def _reduce(image: PILImage.Image, shrinking: float) -> int:
    """Has a JPEG file decoded at a fraction of its size, and returns by what its sides are divided.

    Args:
        shrinking: Pixels of the part for one of the result, along the side where there are fewer.
    """
    reduction = next((each for each in _REDUCTIONS if shrinking >= each), None)
    if reduction is None or not isinstance(image, JpegImageFile):
        return 1
    size = (max(image.width // reduction, 1), max(image.height // reduction, 1))
    return 1 if image.draft(None, size) is None else reduction


def open_image(stored: Any) -> Any:
    """An image as a stream or an undecoded dataset holds it, opened: of a file only the header is read.

    Args:
        stored: `{"bytes", "path"}`, the bytes of a file, a PIL image or an array.

    Raises:
        `ValueError`: if there is no image. The errors of PIL for one that cannot be read.
    """
    if stored is None or (isinstance(stored, dict) and stored["bytes"] is None and stored["path"] is None):
        raise ValueError(MISSING)
    if isinstance(stored, bytes):
        stored = {"bytes": stored, "path": None}
    if not isinstance(stored, dict):
        return stored if isinstance(stored, PILImage.Image) else np.asarray(stored)
    if stored["bytes"] is None and "://" in stored["path"]:
        return ImageFeature().decode_example(stored)  # on the Hub
    return PILImage.open(stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"]))


def decode_image(stored: Any, mode: str) -> PILImage.Image:
    """A whole image of the mode "RGB" or "L", turned as its EXIF data says. `stored` is as for [`open_image`]."""
    image = open_image(stored)
    if isinstance(image, PILImage.Image):
        ImageOps.exif_transpose(image, in_place=True)
    return to_pil(image, mode)


def _scale_and_shift(image_processor: Any, num_channels: int) -> torch.Tensor:
    """The image processor's rescaling and normalisation as `pixels * scale + shift`; shape `(2, num_channels)`."""
    scale = np.ones(num_channels)
    shift = np.zeros(num_channels)
    if image_processor.do_rescale:
        scale = scale * image_processor.rescale_factor
    if image_processor.do_normalize:
        mean = np.asarray(image_processor.image_mean)
        std = np.asarray(image_processor.image_std)
        scale = scale / std
        shift = shift - mean / std
    return torch.tensor(np.stack(np.broadcast_arrays(scale, shift)), dtype=torch.float32)
