# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Image processors: the one that a model was trained with, new ones as a family has them, and for another size."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import AutoImageProcessor, ImageProcessingMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available
from transformers.utils.generic import is_timm_config_dict

from ..common.paths import check_links
from ..models.auto_classes import plain_type_of
from ..models.configuration_layershuffle import num_channels_of
from ..models.timm_layers import TIMM_MODEL_TYPE
from .checks import explained_reading
from .image_size import as_pair, image_size_of, why_not_images_of
from .locations import IMAGE_PROCESSOR_FILES, hub_arguments


_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # PIL's numbers


def load_image_processor(name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
    """Loads the image processor of a model as `AutoImageProcessor` does.

    It works without torchvision too. In transformers before 5.23 that class needs it, although the processors do not.

    Args:
        name_or_path: Folder or Hub id.
        kwargs: Passed to `from_pretrained`: `revision`, `token`, ... Code that a model brings runs only with
            `trust_remote_code=True`.

    Raises:
        `OSError`: if there is none, or it cannot be read.
        `ValueError`: if it needs code that the model brings, or is of sounds.
    """
    folder = Path(name_or_path)
    kwargs = {"trust_remote_code": False} | kwargs
    timm_config = _timm_config(name_or_path, kwargs)
    is_missing = folder.is_dir() and not any((folder / name).exists() for name in IMAGE_PROCESSOR_FILES)
    if timm_config is not None and (is_missing or not folder.is_dir()):
        try:
            return _load_by_its_file(name_or_path, **kwargs)
        except OSError:  # timm's checkpoints on the Hub have none
            return timm_image_processor(timm_config)
    if is_missing:
        raise OSError(
            f"The folder '{folder}' holds no image processor ('{IMAGE_PROCESSOR_FILES[0]}'). Save the one that "
            "the model was trained with there, such as ViTImageProcessor(size={'height': 224, 'width': 224}, "
            "image_mean=[0.5, 0.5, 0.5], "
            f"image_std=[0.5, 0.5, 0.5]).save_pretrained('{folder}')."
        )
    if folder.is_dir():
        check_links(folder, IMAGE_PROCESSOR_FILES)  # what is read here is written into results
        _check_is_of_images(folder)
    try:
        with explained_reading(f"The image processor of '{name_or_path}'"):
            if timm_config is not None:  # for which AutoImageProcessor takes timm's own, without reading the file
                return _load_by_its_file(name_or_path, **kwargs)
            return AutoImageProcessor.from_pretrained(name_or_path, **kwargs)
    except ImportError:
        return _load_by_its_file(name_or_path, **kwargs)


def _check_is_of_images(folder: Path) -> None:
    path = folder / IMAGE_PROCESSOR_FILES[0]
    if not path.is_file():
        return
    with explained_reading(f"The image processor of '{folder}'"):
        settings, _ = ImageProcessingMixin.get_image_processor_dict(folder)
    kind = settings.get("feature_extractor_type")
    known = getattr(transformers, kind, None) if isinstance(kind, str) else None
    if isinstance(known, type) and issubclass(known, transformers.SequenceFeatureExtractor):
        raise ValueError(
            f"'{folder}' holds a feature extractor ({kind}), which is for sounds. Commands take images; measure a "
            "model of sounds by `hf_layershuffle.score_execution_orders(model, items, orders)`, with items of its "
            "feature extractor."
        )


def _load_by_its_file(name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
    del kwargs["trust_remote_code"]
    settings, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path, **kwargs)
    name = settings.get("image_processor_type", "ViTImageProcessor").removesuffix("Fast")
    return _without_torchvision(name).from_pretrained(name_or_path, **kwargs)


def _timm_config(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> dict | None:
    """How timm prepares images for this model, as its checkpoints say in config.json; None for models of others."""
    hub = hub_arguments(kwargs)
    try:
        config, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub)
    except (OSError, ValueError):  # which is said by those who need it
        return None
    if not isinstance(config, dict) or not is_timm_config_dict(config):
        return None
    return config["pretrained_cfg"] if isinstance(config["pretrained_cfg"], dict) else None


def timm_image_processor(config: dict[str, Any]) -> Any:
    """An image processor of transformers that does what timm does in evaluation.

    transformers' own one for timm needs torchvision, and is not saved with the model.

    Args:
        config: `pretrained_cfg` of one of timm's models: `input_size`, `mean`, `std`, `interpolation`, `crop_pct` and
            `crop_mode`.

    Raises:
        `ValueError`: if a value is none that timm's vision transformers have.
    """
    with explained_reading("`pretrained_cfg` of the model's config.json"):
        channels, height, width = config.get("input_size") or (3, 224, 224)
        crop = float(config.get("crop_pct") or 0.875)
        interpolation = config.get("interpolation") or "bicubic"
        mode = config.get("crop_mode") or "center"
        if interpolation not in _RESAMPLING or mode not in ("center", "squash"):
            raise ValueError(
                f"`pretrained_cfg` of the model's config.json has interpolation '{interpolation}' and crop_mode "
                f"'{mode}'; known are {', '.join(_RESAMPLING)}, and center and squash. Save an image processor in the "
                "model's folder."
            )
        whole = [int(side / crop) for side in (height, width)]
        is_square = mode == "center" and height == width
        return _without_torchvision("BitImageProcessor")(
            size={"shortest_edge": whole[0]} if is_square else {"height": whole[0], "width": whole[1]},
            crop_size={"height": height, "width": width},
            resample=_RESAMPLING[interpolation],
            image_mean=list(config.get("mean") or [0.485, 0.456, 0.406]),
            image_std=list(config.get("std") or [0.229, 0.224, 0.225]),
            do_convert_rgb=channels == 3,
        )


def new_image_processor(model_type: str, image_size: int, num_channels: int, **normalization: Any) -> Any:
    """An image processor of the class that a family has, for a model from scratch. It keeps the whole image.

    Args:
        model_type: The family's type, plain or LayerShuffle.
        image_size: Pixels of each side.
        num_channels: Channels of the images: 3, or 1 for grey.
        normalization: `image_mean`, `image_std` and the like.
    """
    plain_type = plain_type_of(model_type)
    # DeiT is trained as ViT is; its own processor crops
    name = "ViTImageProcessor" if plain_type == "deit" else processor_name_of(plain_type)
    processor_class = _without_torchvision(name)
    square = {"height": image_size, "width": image_size}
    defaults = processor_class().to_dict()
    settings: dict[str, Any] = {"size": square}
    if "shortest_edge" in (defaults.get("size") or {}):
        settings = {"size": {"shortest_edge": image_size}, "crop_size": square}
    if num_channels != 3 and defaults.get("do_convert_rgb"):
        settings["do_convert_rgb"] = False
    return processor_class(**settings, **normalization)


def processor_name_of(plain_type: str) -> str:
    """The class of image processors of a family, or of the one that it is named after; ViT's where there is none."""
    names: Any = IMAGE_PROCESSOR_MAPPING_NAMES
    known = [each for each in names if plain_type.startswith(each) and names[each]]
    if not known or plain_type == TIMM_MODEL_TYPE:
        return "ViTImageProcessor"
    entry = names[max(known, key=len)]
    name = entry.get("torchvision") or entry["pil"] if isinstance(entry, dict) else entry[0]
    return name.removesuffix("Fast").removesuffix("Pil")


def _without_torchvision(name: str) -> Any:
    """The class of this name.

    Where there is no torchvision, transformers would warn at every start that it takes the one without it. Some, as
    that of DINOv3, have none; ViT's then does the same, but for the rounding of pixels.
    """
    if is_torchvision_available():
        return getattr(transformers, name)
    without = getattr(transformers, f"{name}Pil", None)
    if without is not None:
        return without
    needed = getattr(getattr(transformers, name), "_backends", None) or ()
    name = "ViTImageProcessorPil" if "torchvision" in needed else name
    return getattr(transformers, name, transformers.ViTImageProcessor)


def resized_image_processor(image_processor: Any, image_size: int) -> Any:
    """An image processor that does the same for images of another size. What it crops is as large a part as before.

    Args:
        image_size: Pixels of each side that it gives.
    """
    settings = image_processor.to_dict()
    square = {"height": image_size, "width": image_size}
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    if not settings.get("do_center_crop") or "height" not in crop:
        settings["size"] = square
    else:
        settings["crop_size"] = square
        settings["size"] = {
            name: round(pixels * image_size / crop["width" if name == "width" else "height"])
            for name, pixels in size.items()
            if pixels is not None
        }
    return type(image_processor).from_dict(settings)


def processed_shape(image_processor: Any, num_channels: int) -> tuple[int, ...]:
    """The shape of what an image processor makes of one square image: usually channels, height and width."""
    blank = np.zeros((num_channels, 64, 64), dtype=np.uint8)
    pixels = image_processor([blank], input_data_format="channels_first", return_tensors="pt")["pixel_values"]
    return tuple(pixels.shape[1:])


def check_fits(image_processor: Any, model: PreTrainedModel, what: str) -> None:
    """Refuses an image processor that gives a model other images than it takes. It may be another family's.

    Args:
        what: The model, as the message names it.

    Raises:
        `ValueError`: naming both sizes.
    """
    if hasattr(image_processor, "max_num_patches"):
        raise ValueError(
            f"{what} takes lists of patches of images of any shape ({type(image_processor).__name__}), with which it "
            "cannot be trained here; take a model of images of one size, such as a ViT, a DINOv2 or a SigLIP."
        )
    size, channels = image_size_of(model.config), num_channels_of(model.config)
    if size is None or channels is None or getattr(image_processor, "do_resize", True) is False:
        return
    with explained_reading(f"The image processor of {what}"):
        shape = processed_shape(image_processor, channels)
    if shape == (channels, *as_pair(size)):
        return
    reason = why_not_images_of(model, (shape[0], shape[1], shape[2]))
    if reason is not None:
        raise ValueError(
            f"The image processor of {what} ({type(image_processor).__name__}) gives pixels of shape {shape}, and the "
            f"model takes {(channels, *as_pair(size))}: {reason}. Save the one that the model was trained with beside "
            "it, or say which size to train with by --image_size."
        )
