# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a stranger sends, as the inputs of a model: an image or a text, checked before much is done with it."""

import base64
import io
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError
from transformers import AutoConfig, PreTrainedModel

from ..checkpoints.checks import explained_reading
from ..checkpoints.processing_classes import ProcessingClass, check_evaluable, load_processing_class
from ..checkpoints.tokenizers import input_kind, longest_text
from ..common.checks import check_integers
from ..data.image_reading import draw_rows, read_images, to_pil
from ..models.configuration_layershuffle import num_channels_of
from .demonstration import LabelledInput


# PIL reads more, of which some start other programs or hold other files
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# An image processor that scales the shorter side would make a strip of one pixel many gigabytes wide
LONGEST_SIDE = 100  # times the shorter
THUMBNAIL = 48  # pixels
SHOWN_LETTERS = 60


class RefusedInputError(ValueError):
    """An input that is none, is too large, or is not of the kind that the model takes.

    Args:
        status: Of HTTP, such as 413 for what is too large.
    """

    def __init__(self, message: str, status: int = 422):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What one service takes at most.

    Args:
        max_body_bytes: Bytes of a request.
        max_pixels: Pixels of an image, by its header; nothing is decoded before they are known.
        max_in_flight: Requests that are read or answered at the same time.
        body_timeout: Seconds in which a request must have been sent.
    """

    max_body_bytes: int = 10 * 2**20
    max_pixels: int = 25_000_000
    max_in_flight: int = 64
    body_timeout: float = 30.0

    def __post_init__(self) -> None:
        check_integers(
            max_body_bytes=(self.max_body_bytes, 1),
            max_pixels=(self.max_pixels, 1),
            max_in_flight=(self.max_in_flight, 1),
        )
        if not 0 < self.body_timeout < float("inf"):
            raise ValueError(f"`body_timeout` is {self.body_timeout!r}; it must be a number of seconds above 0.")


class RequestInputs:
    """Makes a model's inputs of one image or text, as its evaluation does.

    Args:
        config: The model's configuration.
        processing_class: The model's image processor or tokenizer.
        limits: What is taken at most.
        max_length: Tokens after which a text is cut off.

    Raises:
        `ValueError`: if the model takes neither images nor texts, or does not choose one class of several.
    """

    def __init__(
        self,
        config: Any,
        processing_class: ProcessingClass,
        limits: Limits | None = None,
        max_length: int | None = None,
    ):
        self.config = config
        self.kind = input_kind(config)
        if self.kind not in ("image", "text"):
            raise ValueError(
                f"The model is of type '{config.model_type}', whose inputs are {self.kind or 'not known'}; the "
                "service takes images and texts. Use the swarm in Python for others."
            )
        check_evaluable(config, processing_class)
        self.labels = [str(config.id2label[index]) for index in range(config.num_labels)]
        self.limits = limits or Limits()
        self.max_length = max_length
        self.processing_class: Any = processing_class
        self._lock = threading.Lock()  # a tokenizer keeps how it last cut and padded
        self._mode = "L" if num_channels_of(config) == 1 else "RGB"

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, limits: Limits | None = None, *, trust_remote_code: bool = False, **kwargs: Any
    ) -> "RequestInputs":
        """Reads a model's configuration, and its image processor or tokenizer.

        Args:
            name_or_path: Folder or Hub id.
            limits: What is taken at most.
            trust_remote_code: Whether code that they bring may run.
            kwargs: `revision`, `token` and the like, as for `from_pretrained`.

        Raises:
            `OSError`, `ValueError`: if one is missing, cannot be read, or is of another kind of model.
        """
        with explained_reading(f"'{name_or_path}'"):
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **kwargs)
        processing_class = load_processing_class(name_or_path, config, trust_remote_code=trust_remote_code, **kwargs)
        return cls(config, processing_class, limits)

    def cut_texts_for(self, model: PreTrainedModel) -> None:
        """Cuts texts off, from now on, after the tokens that the model and its tokenizer take."""
        if self.kind == "text":
            self.max_length = longest_text(self.processing_class, model)

    def labelled(self, dataset: Dataset, max_samples: int = 500, seed: int = 0) -> list[LabelledInput]:
        """Inputs of a dataset with the columns `image` or `text`, and `label`, of the model's classes.

        Args:
            max_samples: At most, drawn by `seed`.
        """
        made = []
        for row in draw_rows(len(dataset), max_samples, seed):
            if self.kind == "text":
                text = dataset[row]
                inputs, shown = self.of_text(text["text"], text.get("text_pair")), excerpt(text["text"])
            else:
                image = to_pil(read_images(dataset, [row])[0], self._mode)
                inputs, shown = self.of_image(image), thumbnail(image)
            made.append(LabelledInput(inputs, shown, self.labels[dataset[row]["label"]]))
        return made

    def check_takes_images(self) -> None:
        """Raises `RefusedInputError` if the model takes texts."""
        if self.kind != "image":
            raise RefusedInputError('The model takes texts; send JSON such as {"text": "..."}.', 415)

    def read_image(self, data: bytes) -> PILImage.Image:
        """The image in a file: its first one if there are several, turned upright, of 8 bits a channel.

        Raises:
            `RefusedInputError`: if it is none, too large, or damaged.
        """
        try:
            with PILImage.open(io.BytesIO(data), formats=FORMATS) as image:
                self._check_size(*image.size)
                return to_pil(ImageOps.exif_transpose(image), self._mode)
        except RefusedInputError:
            raise
        except UnidentifiedImageError as error:
            raise RefusedInputError(
                f"The {len(data):,} bytes are not an image of a known format; send one of {', '.join(FORMATS)}.", 415
            ) from error
        except PILImage.DecompressionBombError as error:
            raise RefusedInputError(f"The image is too large: {error}", 413) from error
        except Exception as error:  # PIL raises OSError, SyntaxError, struct.error and more for damaged files
            reason = str(error).strip().rstrip(".") or type(error).__name__
            raise RefusedInputError(f"The image cannot be decoded: {reason}.") from error

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.limits.max_pixels:
            raise RefusedInputError(
                f"The image has {width} × {height} pixels; at most {self.limits.max_pixels:,} are taken. Send a "
                "smaller one.",
                413,
            )
        if max(width, height) > LONGEST_SIDE * min(width, height):
            raise RefusedInputError(
                f"The image has {width} × {height} pixels; one side may be at most {LONGEST_SIDE} times the other."
            )

    def of_image(self, image: PILImage.Image) -> dict[str, torch.Tensor]:
        """`pixel_values` of shape `(1, num_channels, height, width)`."""
        grey = self._mode == "L"
        pixels: Any = np.asarray(image)[None] if grey else image
        channels = {"input_data_format": "channels_first"} if grey else {}
        return dict(self.processing_class([pixels], return_tensors="pt", **channels))

    def of_text(self, text: object, text_pair: object = None) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and the like, of shape `(1, tokens)`.

        Raises:
            `RefusedInputError`: if the model takes images, or a text is none.
        """
        if self.kind != "text":
            raise RefusedInputError("The model takes images, and this is JSON; send an image file.", 415)
        texts = {"text": text} | ({} if text_pair is None else {"text_pair": text_pair})
        for name, value in texts.items():
            if not isinstance(value, str) or not value.strip():
                raise RefusedInputError(f"`{name}` is {str(value)[:80]!r}; it must be a text that is not empty.")
        with self._lock:
            return dict(
                self.processing_class(
                    *texts.values(),
                    truncation=self.max_length is not None,
                    max_length=self.max_length,
                    return_tensors="pt",
                )
            )


def thumbnail(image: PILImage.Image) -> dict[str, str]:
    """A small picture, as pages take it: `image`, a `data:` address."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "PNG")
    return {"image": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"}


def excerpt(text: str) -> dict[str, str]:
    """The beginning of a text, as `text`."""
    text = " ".join(text.split())
    return {"text": text if len(text) <= SHOWN_LETTERS else f"{text[: SHOWN_LETTERS - 1]}…"}
