# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Models taken apart: any classifier as a LayerShuffle one, and its layers run one by one."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, overload

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .checkpoints.loading import as_layershuffle, load_classifier
from .checkpoints.processing_classes import ProcessingClass, check_evaluable
from .checkpoints.tokenizers import longest_text
from .data.dataloading import LabelledData, as_dataloader
from .models.configuration_layershuffle import encoder_config, num_channels_of
from .models.early_exit import all_layers
from .models.layer_program import ConstantCall, LayerProgram, Run, StandIn, run_program
from .models.mlp_skipping import without_mlp


Inputs = torch.Tensor | Mapping[str, torch.Tensor]  # the main input of a model, or all inputs by name


class LayerwiseModel(Protocol):
    """What evaluation and analysis need of a model that is taken apart: [`LayerwiseClassifier`] or like objects."""

    @property
    def num_layers(self) -> int: ...

    @property
    def num_labels(self) -> int: ...

    @property
    def num_channels(self) -> int | None: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def layers(self) -> LayerProgram | list[torch.nn.Module]: ...

    def evaluation_mode(self) -> AbstractContextManager: ...

    def embed(self, inputs: Inputs) -> torch.Tensor: ...

    def run_layer(
        self, hidden_states: torch.Tensor, index: int, position: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...

    def classify(self, hidden_states: torch.Tensor) -> torch.Tensor: ...


_INTERFACE = tuple(name for name in vars(LayerwiseModel) if not name.startswith("_"))


@overload
def as_layerwise(model: "PreTrainedModel | LayerwiseClassifier") -> "LayerwiseClassifier": ...


@overload
def as_layerwise(model: PreTrainedModel | LayerwiseModel) -> LayerwiseModel: ...


def as_layerwise(model: PreTrainedModel | LayerwiseModel) -> LayerwiseModel:
    """A [`LayerwiseClassifier`] of a model. An object with the interface of one comes back as it is.

    Raises:
        `TypeError`: if the object lacks a part of the interface.
    """
    if isinstance(model, PreTrainedModel):
        return LayerwiseClassifier(model)
    missing = [name for name in _INTERFACE if not hasattr(model, name)]
    if missing:
        what = f"{model!r} (str)" if isinstance(model, str) else f"a {type(model).__name__}"
        raise TypeError(
            f"`model` is {what}, which lacks {', '.join(missing)}; pass a classifier of transformers, as from "
            "`hf_layershuffle.load_classifier`."
        )
    return model


# Families of which tests show that parts put together are the model; of others, the first batch is tried
TESTED_FAMILIES = ("vit", "deit", "dinov2", "beit", "siglip", "bert")


class LayerwiseClassifier:
    """A classifier as three functions: embed, run one layer at a position, classify.

    Running the layers of an order one after the other gives the model's logits for that order. Use it where the
    model's `forward` would repeat work: for many orders of the same inputs, for every prefix of an order, or to see
    what happens between layers. `embed` and `classify` run the family's own forward with stand-ins for its layers: in
    `embed` they only note how they are called, in `classify` the only one gives the hidden states. No example leaves
    early, whatever the configuration says.

    Args:
        model: A LayerShuffle classifier, or a plain one (see [`as_layershuffle`]), in evaluation mode.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = as_layershuffle(model)
        self.num_layers = len(self.model.free_layers)
        model_type = str(getattr(self.model.config, "plain_model_type", ""))
        self._is_checked = model_type in TESTED_FAMILIES or type(self) is not LayerwiseClassifier
        # Recorded calls with a cache would give a layer what it kept of its last run
        has_cache = "use_cache" in inspect.signature(self.model.forward).parameters
        self._options: dict[str, Any] = {"use_cache": False} if has_cache else {}
        self._gives_tuple: bool | None = None  # whether a layer gives a tuple, of which hidden states are the first
        self._is_one_enough: bool | None = None  # whether what follows the layers needs only one example of the inputs
        self._inputs: dict[str, torch.Tensor] = {}
        self._embedded: torch.Tensor
        self._run: Run
        self._calls: list[tuple[tuple, dict[str, Any]]]

    @property
    def layers(self) -> LayerProgram | list[torch.nn.Module]:
        return self.model.free_layers

    @property
    def num_labels(self) -> int:
        config: Any = self.model.config
        return config.num_labels

    @property
    def num_channels(self) -> int | None:
        return num_channels_of(self.model.config)

    @property
    def hidden_size(self) -> int:
        return encoder_config(self.model.config).hidden_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """A context without dropout. At its end the model is put back into the mode it was in."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    def embed(self, inputs: Inputs) -> torch.Tensor:
        """The hidden states, of shape `(batch_size, tokens, hidden_size)`, that the first layer gets.

        What the model passes to each layer beside them, such as attention masks, is kept for `run_layer` until the
        next call.

        Args:
            inputs: The model's main input, such as images of shape `(batch_size, num_channels, height, width)`, or all
                inputs by name.
        """
        earlier = self._inputs.keys()
        self._inputs = {self.model.main_input_name: inputs} if isinstance(inputs, torch.Tensor) else dict(inputs)
        if earlier != self._inputs.keys():
            self._is_one_enough = None
        layers = self.model.free_layers
        self._run = Run(layers, [], self.model._depth_embedding, skipped_mlps=self.model._skipped_mlps)
        self._calls = []
        with run_program(layers, [_Recorder(layer, self) for layer in layers._modules.values()]):
            try:
                self.model(**self._inputs, **self._options)
            except RuntimeError as error:  # as where the head weighs the hidden states after each layer
                if self._is_checked or not self._calls:
                    raise
                raise self._refusal() from error
        if not self._calls:
            raise ValueError(
                f"The forward of {type(self.model).__name__} did not call its layers, so it cannot be taken apart."
            )
        if not self._is_checked and not self.model.training:
            self._is_checked = True
            self._check_parts()
        return self._embedded

    def _check_parts(self) -> None:
        """Refuses a family whose forward does something between its layers that is lost here.

        Raises:
            `ValueError`: if embedding, layers and classification give other logits than the model.
        """
        sequential = list(range(self.num_layers))
        for order in (sequential, sequential[::-1]):
            with all_layers(self.model):
                expected = self.model(**self._inputs, execution_order=order).logits
            hidden_states = self._embedded
            for position, index in enumerate(order):
                hidden_states, _ = self.run_layer(hidden_states, index, position)
            if not torch.allclose(self._classify(hidden_states, self._inputs), expected, rtol=1e-3, atol=1e-3):
                raise self._refusal()

    def _refusal(self) -> ValueError:
        return ValueError(
            f"{type(self.model).__name__} cannot be taken apart: its forward does more between its layers than to "
            "call one after the other. Evaluate it by its own forward, with `execution_order`."
        )

    def run_layer(
        self, hidden_states: torch.Tensor, index: int, position: int, *, with_mlp: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs layer `index` at `position`, with its MLP or without.

        Returns:
            Hidden states of shape `(batch_size, tokens, hidden_size)`, and position logits of shape
            `(batch_size, num_layers)`, or None without a position predictor.
        """
        args, kwargs = self._call_of(index)
        layer = self.layers[index] if with_mlp else without_mlp(self.layers[index])
        output = self._run.at(layer, position)(hidden_states, *args, **kwargs)
        position_logits = self._run.position_logits.pop() if self._run.position_logits else None
        return output[0] if isinstance(output, (tuple, list)) else output, position_logits

    def classify(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states after any layer to logits of shape `(batch_size, num_labels)`."""
        if self._is_one_enough is None and len(hidden_states) > 1:
            logits = self._classify(hidden_states, self._inputs)
            self._is_one_enough = self._inputs.keys() == {self.model.main_input_name} and torch.equal(
                logits, self._classify(hidden_states, self._first_input())
            )
            return logits
        # The embeddings, which are computed again, then cost next to nothing
        return self._classify(hidden_states, self._first_input() if self._is_one_enough else self._inputs)

    @property
    def classifies_any_batch(self) -> bool:
        """Whether `classify` takes hidden states of more examples than the last inputs had, as of several orders."""
        return bool(self._is_one_enough)

    def _classify(self, hidden_states: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        layers = self.model.free_layers
        with run_program(layers, [ConstantCall(layers[0], hidden_states, bool(self._gives_tuple))]):
            return self.model(**inputs, **self._options).logits

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """The mask of padding among the inputs embedded last, if there is one."""
        return self._inputs.get("attention_mask")

    def mean_over_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Means over the tokens of the batch embedded last, without padding, of values `(batch_size, tokens, ...)`."""
        mask = self.attention_mask
        if mask is None or mask.shape != values.shape[:2]:
            return values.mean(1)
        weights = mask.to(values.dtype).reshape(*mask.shape, *[1] * (values.ndim - 2))
        return (values * weights).sum(1) / weights.sum(1).clamp(min=1)

    def _first_input(self) -> dict[str, torch.Tensor]:
        return {name: value[:1] for name, value in self._inputs.items()}

    def _call_of(self, index: int) -> tuple[tuple, dict[str, Any]]:
        """How the model calls a layer beside its hidden states; a pool of several models' layers has other indices."""
        return self._calls[index]


class _Recorder(StandIn):
    """Notes how a layer is called, and gives its input on."""

    def __init__(self, layer: torch.nn.Module, parts: LayerwiseClassifier):
        super().__init__(layer)
        self.parts = parts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden_states = args[0] if args else kwargs.pop("hidden_states")
        parts = self.parts
        args = args[1:]
        if not parts._calls:
            parts._embedded = hidden_states
        parts._calls.append((args, kwargs))
        if parts._gives_tuple is None:
            output = parts._run.at(self.layer, 0)(hidden_states, *args, **kwargs)
            parts._run.position_logits.clear()
            parts._gives_tuple = isinstance(output, (tuple, list))
        return (hidden_states, None) if parts._gives_tuple else hidden_states


def batches_for(
    parts: LayerwiseModel, data: LabelledData, processing_class: ProcessingClass | None = None, **kwargs: Any
) -> DataLoader:
    """Batches for a model that is taken apart, with its channels, its longest text and its numbers of the classes.

    Args:
        data, processing_class, kwargs: As for [`as_dataloader`].
    """
    if isinstance(parts, LayerwiseClassifier):  # an object that is only like one need not have a configuration
        kwargs["config"] = parts.model.config
        if isinstance(processing_class, PreTrainedTokenizerBase):
            kwargs["max_length"] = longest_text(processing_class, parts.model)
    return as_dataloader(data, processing_class, num_channels=parts.num_channels, **kwargs)


def rows_of(loader: DataLoader) -> list[int]:
    """The rows of its dataset that a loader reads, in ascending order, as its sampler says.

    Raises:
        `ValueError`: if it is a stream, or makes no batches of rows.
    """
    if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "The DataLoader does not make batches of rows of its dataset (it is a stream, or `batch_size` is None); "
            "pass one of a dataset with a length, and with a `batch_size`."
        )
    return sorted(row for batch in loader.batch_sampler for row in batch)


def inputs_on_device(
    parts: LayerwiseModel, batch: Mapping[str, torch.Tensor]
) -> torch.Tensor | dict[str, torch.Tensor]:
    """What `embed` takes of a batch: all but the labels, or the images alone where there is nothing else."""
    inputs = {name: value.to(parts.device) for name, value in batch.items() if name != "labels"}
    return inputs["pixel_values"] if inputs.keys() == {"pixel_values"} else inputs


def labels_on_device(parts: LayerwiseModel, labels: torch.Tensor | list[int]) -> torch.Tensor:
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


__all__ = [
    "LayerwiseClassifier",
    "LayerwiseModel",
    "as_layershuffle",
    "as_layerwise",
    "batches_for",
    "check_evaluable",
    "inputs_on_device",
    "labels_on_device",
    "load_classifier",
    "rows_of",
]
