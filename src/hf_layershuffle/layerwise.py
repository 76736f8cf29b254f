# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Models taken apart: any ViT or DeiT classifier as a LayerShuffle one, and its layers run one by one."""

import logging
import zlib
from contextlib import contextmanager

import torch
from transformers import (
    AutoConfig,
    DeiTForImageClassification,
    PreTrainedModel,
    ViTForImageClassification,
    modeling_utils,
)

from .checkpoint_checks import check_complete, check_finite, check_model_files, explained_reading
from .configuration_layershuffle import LayerShuffleDeiTConfig, LayerShuffleViTConfig
from .modeling_layershuffle import (
    LayerShuffleDeiTForImageClassification,
    LayerShuffleForImageClassificationMixin,
    LayerShuffleViTForImageClassification,
)


_FLAGS = ("model_type", "shuffle_mode", "shuffle_window", "depth_embedding", "position_predictor", "layerdrop")
_INTERFACE = ("num_layers", "num_labels", "device", "embed", "run_layer", "classify")
_CLASSES = {
    "vit": (ViTForImageClassification, LayerShuffleViTConfig, LayerShuffleViTForImageClassification),
    "deit": (DeiTForImageClassification, LayerShuffleDeiTConfig, LayerShuffleDeiTForImageClassification),
}


def load_classifier(
    name_or_path: str, *, as_saved: bool = False, trust_remote_code: bool = False, **kwargs
) -> PreTrainedModel:
    """Loads a LayerShuffle, ViT or DeiT image classifier, from a folder or the Hub, as a LayerShuffle model.

    A plain model has `shuffle_mode="none"` then, and computes what it did, but accepts an `execution_order`.

    Args:
        name_or_path (`str`): Folder or Hub id.
        as_saved (`bool`): Whether a plain model stays plain.
        trust_remote_code (`bool`): Whether code that a model brings may run to read its configuration. The model itself is
            always one of the classes here.
        kwargs: Passed to `from_pretrained`: `revision`, `token`, `dtype`, `attn_implementation`, ...

    Raises:
        `ValueError`: if the model is of another type, was not trained as a classifier, lacks tensors, or holds NaN.
        `OSError`: if there is no such model, or its files cannot be read.
    """
    what = f"'{name_or_path}'"
    check_model_files(name_or_path)
    hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}
    with explained_reading(what):
        model_type = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **hub).model_type
    plain_class, _, model_class = classes_of(model_type, what)
    if as_saved and model_type in _CLASSES:
        model_class = plain_class
    with explained_reading(what), _quiet(modeling_utils.logger):  # its table of tensors, which are checked below
        model, found = model_class.from_pretrained(
            name_or_path, output_loading_info=True, use_safetensors=True, **kwargs
        )
    check_complete(what, found["missing_keys"], found["unexpected_keys"], requested=kwargs)
    check_finite(what, model.state_dict().items())
    return model


@contextmanager
def _quiet(logger: logging.Logger):
    """Nothing but errors of a logger. Its level stays: a higher one makes transformers list what it did not shard."""

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)


def as_layershuffle(model: PreTrainedModel) -> LayerShuffleForImageClassificationMixin:
    """The model itself if it is a LayerShuffle classifier; a plain ViT or DeiT classifier as one that shares its weights.

    Raises:
        `ValueError`: if the model is of another type, or not a classifier, or its layers were cut by hand.
    """
    if isinstance(model, LayerShuffleForImageClassificationMixin):
        model.base_model.check_depth()
        return model
    plain_class, config_class, model_class = classes_of(model.config.model_type, type(model).__name__)
    if not isinstance(model, plain_class):
        raise ValueError(f"{type(model).__name__} is not an image classifier; pass a {plain_class.__name__}.")
    fields = {"model_type": config_class.model_type, "num_hidden_layers": len(model.base_model.layers)}
    config = config_class.from_dict({**model.config.to_dict(), **fields})
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        twin = model_class(config)
    twin.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return twin.train(model.training)


def classes_of(model_type: str, what: str):
    """The plain class, the configuration and the class that reorders layers; a `ValueError` that names `what` if none."""
    classes = _CLASSES.get(model_type.removeprefix("layershuffle_"))
    if classes is None:
        allowed = ", ".join(f"'{prefix}{name}'" for prefix in ("", "layershuffle_") for name in _CLASSES)
        raise ValueError(
            f"{what} is a model of type '{model_type}'; only {allowed} have layers that can be reordered."
        )
    return classes


def as_layerwise(model) -> "LayerwiseClassifier":
    """A [`LayerwiseClassifier`] of a model; anything that is none, which must have its interface, as it is.

    Raises:
        `TypeError`: if it has not.
    """
    if isinstance(model, PreTrainedModel):
        return LayerwiseClassifier(model)
    missing = [name for name in _INTERFACE if not hasattr(model, name)]
    if missing:
        what = f"{model!r} (str)" if isinstance(model, str) else f"a {type(model).__name__}"
        raise TypeError(
            f"`model` is {what}, which lacks {', '.join(missing)}; pass a LayerShuffle, ViT or DeiT image classifier, as "
            "from `hf_layershuffle.layerwise.load_classifier`."
        )
    return model


class LayerwiseClassifier:
    """An image classifier as three functions: embed, run one layer at a position, classify.

    Running the layers of an order one after the other gives the model's logits for that order. It is for work that the
    model's `forward` would repeat: many orders of the same images, every prefix of an order, or what happens in between.

    Args:
        model: A LayerShuffle classifier, or a plain ViT or DeiT one (see [`as_layershuffle`]), in evaluation mode.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = as_layershuffle(model)
        self.encoder = self.model.base_model
        self.num_layers = len(self.encoder.layers)

    @property
    def layers(self):
        return self.encoder.layers

    @property
    def num_labels(self) -> int:
        return self.model.config.num_labels

    @property
    def num_channels(self) -> int:
        return self.model.config.num_channels

    @property
    def device(self) -> torch.device:
        return self.model.device

    @contextmanager
    def evaluation_mode(self):
        """Without dropout inside; the model is then put back into the mode it was in."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images of shape `(batch_size, num_channels, height, width)` to hidden states `(batch_size, tokens, hidden_size)`."""
        dtype = self.encoder.embeddings.patch_embeddings.projection.weight.dtype
        return self.encoder.embeddings(pixel_values.to(dtype))

    def run_layer(self, hidden_states: torch.Tensor, index: int, position: int, **kwargs):
        """Runs layer `index` at `position`.

        Returns:
            Hidden states of shape `(batch_size, tokens, hidden_size)`, and position logits of shape
            `(batch_size, num_layers)`, or None without a position predictor.
        """
        depth_vector = self.encoder._depth_vectors(position + 1, hidden_states.device)[position]
        output = self.layers[index](hidden_states, None, depth_vector, **kwargs)
        return output if isinstance(output, tuple) else (output, None)

    def classify(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states after any layer to logits of shape `(batch_size, num_labels)`."""
        return self.model.classifier(self.encoder.layernorm(hidden_states[:, :1])[:, 0])


def check_evaluable(config, image_processor=None) -> None:
    """Refuses what has no accuracy, a model that does not choose one class of several, and an image processor for images
    with another number of channels than the model takes.

    Raises:
        `ValueError`: naming the field.
    """
    problem = getattr(config, "problem_type", None) or ("regression" if config.num_labels == 1 else None)
    if problem not in (None, "single_label_classification"):
        raise ValueError(
            f"The model is for '{problem}' (`problem_type` and `num_labels`, {config.num_labels}); accuracy is measured of "
            "models that choose one class of at least two. Take a model for single-label classification."
        )
    if image_processor is None or not getattr(image_processor, "do_normalize", False):
        return
    for name in ("image_mean", "image_std"):
        value = getattr(image_processor, name, None)
        if isinstance(value, (list, tuple)) and len(value) != config.num_channels:
            kind = {1: "grey", 3: "RGB"}.get(config.num_channels, f"{config.num_channels}-channel")
            raise ValueError(
                f"The model takes {kind} images (`num_channels` is {config.num_channels}), but `{name}` of its image processor "
                f"has {len(value)} numbers: {list(value)}. Save the image processor that it was trained with beside it."
            )


def labels_on_device(parts, labels) -> torch.Tensor:
    """Labels of shape `(batch_size,)` on the device of a [`LayerwiseClassifier`] or like object.

    Raises:
        `ValueError`: if one is no class of the model.
    """
    labels = torch.as_tensor(labels)
    outside = labels[(labels < 0) | (labels >= parts.num_labels)]
    if len(outside):
        raise ValueError(
            f"The data holds the label {outside[0].item()}, but the model has {parts.num_labels} classes, from 0 to "
            f"{parts.num_labels - 1}. Take the dataset it was trained on."
        )
    return labels.to(parts.device)


def weights_digest(model: torch.nn.Module) -> str:
    """Tells checkpoints apart: a digest of a model's parameters, eight hexadecimal digits, the same on every device."""
    digest = 0
    for parameter in model.parameters():
        # Their bytes: sums depend on the device and the number of threads
        digest = zlib.crc32(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), digest)
    return f"{digest:08x}"


def describe_model(model: PreTrainedModel) -> dict:
    """What a report says of the model it is about: its type, its LayerShuffle flags and a digest of its weights."""
    return {name: getattr(model.config, name, None) for name in _FLAGS} | {"weights": weights_digest(model)}


def check_integers(**values) -> None:
    """Each `name=(value, least)` must be an integer of at least `least`.

    Raises:
        `ValueError`: if one is not.
    """
    for name, (value, least) in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least {least}.")
