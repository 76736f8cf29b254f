# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Image classifiers of families of which transformers has only the encoder: a linear map of what the encoder gives.

`DINOv3ViTForImageClassification` and the like are made on demand, as the classes with free layer order are. What the
head reads is what the family's authors evaluate.

This file travels to the Hub beside the weights, so it imports nothing from this package.
"""

import copy
import inspect
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


@dataclass(frozen=True)
class Head:
    """A classifier that transformers lacks.

    Args:
        encoder: Name of the encoder's class in transformers.
        reads: What the head reads: a field of the encoder's output, "mean" for the mean of its tokens, or "patches"
            for that without the first, the CLS token.
        source: Where the family's authors evaluate it so.
        pretrained_as: Name of the encoder in a checkpoint of the family's pretraining, if there is one.
    """

    encoder: str
    reads: str
    source: str
    pretrained_as: str | None = None

    @property
    def name(self) -> str:
        """Name of the classifier: `DINOv3ViTForImageClassification` of `DINOv3ViTModel`."""
        return f"{self.encoder.removesuffix('Model')}ForImageClassification"


_CLS = "the CLS token, as in arXiv "
_POOLING = "what its attention pooling gives, as in arXiv "
# By model type
HEADS: dict[str, Head] = {
    "dinov3_vit": Head("DINOv3ViTModel", "pooler_output", f"{_CLS}2508.10104, linear probing"),
    "vit_mae": Head(
        "ViTMAEModel", "patches", "the mean of the patches, as the fine-tuning of arXiv 2111.06377", "vit"
    ),
    "clip_vision_model": Head("CLIPVisionModel", "pooler_output", f"{_CLS}2103.00020, linear probes"),
    "mlcd_vision_model": Head("MLCDVisionModel", "pooler_output", f"{_CLS}2407.17331, linear probes"),
    "siglip_vision_model": Head("SiglipVisionModel", "pooler_output", f"{_POOLING}2303.15343"),
    "siglip2_vision_model": Head("Siglip2VisionModel", "pooler_output", f"{_POOLING}2502.14786"),
    "aimv2_vision_model": Head("Aimv2VisionModel", "pooler_output", f"{_POOLING}2411.14402, attentive probing"),
    "radio": Head("RadioModel", "summary", "the summary tokens, as in arXiv 2312.06709"),
}


class ImageClassifierMixin(PreTrainedModel):
    """An encoder with a linear classifier."""

    head: ClassVar[Head]
    main_input_name = "pixel_values"
    base_model_prefix = "backbone"

    def __init__(self, config: Any):
        if getattr(config, "mask_ratio", 0.0):  # of pretraining, where most patches are left out
            config = copy.deepcopy(config)
            config.mask_ratio = 0.0
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = getattr(transformers, self.head.encoder)(config)
        reads = self._reads(config)
        width = config.hidden_size * (len(config.summary_idxs) if reads == "summary" else 1)
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers does, also where the checkpoint is one of the family's pretraining."""
        if cls.head.pretrained_as is not None:
            kwargs.setdefault("key_mapping", {rf"^{cls.head.pretrained_as}\.": f"{cls.base_model_prefix}."})
        parent: Any = super()
        return parent.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def _reads(cls, config: Any) -> str:
        has_pooling = getattr(config, "use_head", True) and getattr(config, "vision_use_head", True)
        return cls.head.reads if has_pooling else "mean"

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        r"""
        Args:
            pixel_values: Images of shape `(batch_size, num_channels, height, width)`.
            labels: Classes of shape `(batch_size,)`, from 0 to `config.num_labels - 1`, for the loss.
        """
        if hasattr(self.config, "mask_ratio") and pixel_values is not None:  # patches in the order in which they stand
            patches = self.backbone.embeddings.patch_embeddings.patch_size
            height, width = (size // patch for size, patch in zip(pixel_values.shape[-2:], patches))
            noise = torch.arange(height * width, device=pixel_values.device)
            kwargs.setdefault("noise", noise.expand(len(pixel_values), -1))
        outputs = self.backbone(pixel_values, return_dict=True, **kwargs)
        reads = self._reads(self.config)
        if reads in ("mean", "patches"):
            features = outputs.last_hidden_state[:, int(reads == "patches") :].mean(dim=1)
        else:
            features = outputs[reads]
        logits = self.classifier(features)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        result = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return result if return_dict else result.to_tuple()


def is_own_head(name: str) -> bool:
    """Whether a classifier of this name is one of this module."""
    return any(head.name == name for head in HEADS.values())


_MADE: dict[str, type[PreTrainedModel]] = {}


def image_classifier_class(name: str) -> type[PreTrainedModel] | None:
    """The classifier of this name, such as "DINOv3ViTForImageClassification"; None if transformers lacks none such."""
    if name not in _MADE:
        head = next((head for head in HEADS.values() if head.name == name), None)
        if head is None:
            return None
        encoder: Any = getattr(transformers, head.encoder)
        family = next(each for each in encoder.__mro__ if each.__name__.endswith("PreTrainedModel"))
        body = {
            "__module__": __name__,
            "__doc__": f"[`{head.encoder}`] with a linear classifier that reads {head.source}.",
            "head": head,
            "config_class": encoder.config_class,
            "base_model_prefix": "backbone",
            "main_input_name": "pixel_values",
        }
        made: Any = type(name, (ImageClassifierMixin, family), body)
        made.forward = _with_inputs_of(encoder)
        _MADE[name] = made
    return _MADE[name]


def _with_inputs_of(encoder: Any) -> Any:
    """The forward of a classifier, whose signature names the inputs of its encoder: by it, the Trainer chooses columns
    of a dataset."""

    @wraps(ImageClassifierMixin.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ImageClassifierMixin.forward(self, *args, **kwargs)

    documented: Any = forward
    signature = inspect.signature(ImageClassifierMixin.forward)
    *own, others = signature.parameters.values()
    names = {parameter.name for parameter in own}
    inputs = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(encoder.forward).parameters.values()
        if parameter.name not in names and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    documented.__signature__ = signature.replace(parameters=[*own, *inputs, others])
    return forward


def plain_class_of(name: str) -> type[PreTrainedModel] | None:
    """A model's class by its name: one of transformers, or a classifier of this module; None if there is none."""
    found = getattr(transformers, name, None) or image_classifier_class(name)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None
