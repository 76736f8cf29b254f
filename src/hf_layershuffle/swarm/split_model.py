# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The router's side of a model: embeddings and head. Its layers are elsewhere."""

import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoints.image_size import as_pair, image_size_of
from ..checkpoints.tokenizers import longest_text
from ..layerwise import Inputs, LayerwiseClassifier
from ..models.configuration_layershuffle import encoder_config
from ..models.modeling_layershuffle import free_order
from ..models.small_copy import example_inputs, on_small_copy
from .parted_checkpoint import PartedCheckpoint
from .trees import map_leaves


# Arguments of forwards that are no inputs of a classifier
_NO_INPUTS = {"labels", "execution_order", "return_dict", "output_attentions", "output_hidden_states", "kwargs"}
_NO_INPUTS |= {"use_cache", "past_key_values", "head_mask", "self"}


class SplitModel:
    """A classifier without its layers: embeddings and head, for several requests at a time.

    ```python
    >>> split = SplitModel.from_pretrained(folder)
    >>> request = split.request(pixel_values)
    >>> hidden_states = request.hidden_states
    >>> for layer in split.layers:
    ...     args, kwargs = request.call(layer)  # beside the hidden states
    ...     hidden_states = ...  # what layer `layer` gives, wherever it is
    >>> logits = request.classify(hidden_states)
    ```

    Attributes:
        model: The LayerShuffle classifier. The weights of its layers are on the meta device, without memory.
        layers: Those of its execution order.
        digests: Of the weights of each of these layers and of the depth embedding, as in [`WorkerInfo`], and, by the
            name `"rest"`, of all but the layers.
    """

    def __init__(self, checkpoint: PartedCheckpoint):
        self.model = checkpoint.model
        self.config: Any = self.model.config
        self.dtype, self.device = checkpoint.dtype, checkpoint.device
        self.layers = _layers_to_run(checkpoint)
        self.gives_tuple = _check_taken_apart(checkpoint)
        self.digests: dict[int | str, str] = {"rest": checkpoint.load_rest()}
        self.digests |= checkpoint.digests(self.layers)
        self._longest_text = longest_text(None, self.model)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | os.PathLike,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> "SplitModel":
        """Loads the part of a checkpoint that a router needs.

        Args:
            checkpoint: Folder or Hub id of a classifier, plain or LayerShuffle.
            device: Where embeddings and head are, such as "cuda".
            dtype: Of the weights; None for what the checkpoint says.
            attn_implementation, revision, token: As for `from_pretrained`.

        Raises:
            `ValueError`: if it is no classifier, cannot be taken apart, or runs a layer more than once.
            `OSError`: if there is no such checkpoint, or it cannot be read.
        """
        return cls(
            PartedCheckpoint(
                checkpoint,
                device=device,
                dtype=dtype,
                attn_implementation=attn_implementation,
                revision=revision,
                token=token,
            )
        )

    def request(self, inputs: Inputs) -> "SplitRequest":
        """Embeds inputs.

        Args:
            inputs: The model's main input, such as images of shape `(batch_size, num_channels, height, width)`, or all
                inputs by name.

        Raises:
            `ValueError`: if the model does not take them.
        """
        return SplitRequest(self, self.check_inputs(inputs))

    def example_inputs(self) -> dict[str, Any]:
        """Random inputs that the model takes, with which to try out workers."""
        return example_inputs(self.model)

    def check_inputs(self, inputs: Inputs) -> dict[str, Any]:
        """All inputs by name, on the device and in the dtype of the model.

        Raises:
            `ValueError`: if one is none of the model's, of another shape or dtype, or not finite. What only the
                model's own forward can tell is said by `request`.
        """
        main = self.model.main_input_name
        named = dict(inputs) if isinstance(inputs, Mapping) else {main: inputs}
        named = {name: value for name, value in named.items() if value is not None}
        known = [name for name in inspect.signature(self.model.forward).parameters if name not in _NO_INPUTS]
        for name in named:
            if name not in known:
                raise ValueError(f"`{name}` is no input of this model; it takes {', '.join(known)}.")
        if main not in named:
            raise ValueError(f"`{main}` is missing, the main input of this model; pass it with {', '.join(named)}.")
        for name, value in named.items():
            self._check_tensor(name, value, is_main=name == main)
        if main == "pixel_values":
            self._check_images(named[main])
        if main == "input_ids":
            self._check_texts(named)
        return {name: map_leaves(self._placed, value) for name, value in named.items()}

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

    def _check_tensor(self, name: str, value: Any, is_main: bool) -> None:
        if isinstance(value, bool) and not is_main:  # such as `interpolate_pos_encoding`
            return
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"`{name}` is of type {type(value).__name__}; it must be a tensor.")
        if value.is_nested or value.layout != torch.strided or value.device.type == "meta":
            kind = (
                "nested" if value.is_nested else f"of {value.layout}" if value.device.type != "meta" else "on 'meta'"
            )
            raise ValueError(f"`{name}` is a tensor {kind}; it must be a dense one that holds numbers.")
        if value.ndim == 0 or 0 in value.shape:
            raise ValueError(f"`{name}` has shape {tuple(value.shape)}; it must hold at least one example.")
        if is_main and value.is_floating_point() != (name != "input_ids"):
            wanted = "of integers, the ids of tokens" if name == "input_ids" else "of floats, as processors give them"
            raise ValueError(f"`{name}` is of {value.dtype}; it must be {wanted}.")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"`{name}` holds NaN or infinite values; leave out or mend the broken examples.")

    def _check_images(self, images: torch.Tensor) -> None:
        channels, size = getattr(encoder_config(self.config), "num_channels", None), image_size_of(self.config)
        if images.ndim == 4 and channels is not None and images.shape[1] != channels:
            raise ValueError(
                f"`pixel_values` has {images.shape[1]} channels (shape {tuple(images.shape)}); this model takes "
                f"{channels}: (batch_size, num_channels, height, width)."
            )
        is_patches = "spatial_shapes" in inspect.signature(self.model.forward).parameters
        if size is not None and not is_patches and images.ndim not in (4, 5):
            height, width = as_pair(size)
            raise ValueError(
                f"`pixel_values` has shape {tuple(images.shape)}; it must be a batch of images, such as "
                f"(batch_size, {channels or 'num_channels'}, {height}, {width})."
            )

    def _check_texts(self, named: dict[str, Any]) -> None:
        words = named["input_ids"]
        embeddings: Any = self.model.get_input_embeddings()
        vocabulary = embeddings.weight.shape[0]
        if words.ndim != 2:
            raise ValueError(f"`input_ids` has shape {tuple(words.shape)}; it must be (batch_size, tokens).")
        outside = words[(words < 0) | (words >= vocabulary)]
        if len(outside):
            raise ValueError(
                f"`input_ids` holds {outside[0].item()}; this model's tokens have ids from 0 to {vocabulary - 1}. "
                "Take the tokenizer that it was trained with."
            )
        if self._longest_text is not None and words.shape[1] > self._longest_text:
            raise ValueError(
                f"`input_ids` has {words.shape[1]} tokens; this model takes {self._longest_text}. Cut longer texts."
            )
        for name in ("attention_mask", "token_type_ids"):
            if name in named and named[name].shape[:2] != words.shape:
                raise ValueError(
                    f"`{name}` has shape {tuple(named[name].shape)}, and `input_ids` {tuple(words.shape)}; they must "
                    "be the same."
                )


class SplitRequest(LayerwiseClassifier):
    """One request's way through a [`SplitModel`]: what its layers get, and the logits of what they gave.

    Attributes:
        hidden_states: What the first layer gets, of shape `(batch_size, tokens, hidden_size)`.
    """

    @torch.no_grad()
    def __init__(self, split: SplitModel, inputs: dict[str, Any]):
        super().__init__(split.model)
        self._gives_tuple = split.gives_tuple
        shapes = ", ".join(f"`{name}` {tuple(getattr(value, 'shape', ()))}" for name, value in inputs.items())
        try:
            self.hidden_states = self.embed(inputs)
        except (ValueError, RuntimeError, IndexError, TypeError) as error:  # as families choose
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise ValueError(f"The model does not take these inputs, of shapes {shapes}: {reason}.") from error
        # Heads may read the inputs; they are given the whole batch
        self._is_one_enough = False

    def call(self, layer: int) -> tuple[tuple, dict[str, Any]]:
        """What the model passes to a layer beside the hidden states: arguments by place and by name."""
        return self._call_of(layer)

    @torch.no_grad()
    def classify(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states after any layer to logits of shape `(batch_size, num_labels)`."""
        return super().classify(hidden_states.to(self.device))


def _layers_to_run(checkpoint: PartedCheckpoint) -> list[int]:
    """The layers of the model's execution order; all of them if it is drawn."""
    order: Any = checkpoint.model.config.execution_order
    if isinstance(order, str):
        return list(range(checkpoint.num_layers))
    if len(set(order)) < len(order):
        raise ValueError(
            f"`execution_order` of {checkpoint.what} is {order}, which runs a layer more than once, and in a swarm "
            "each runs once at most. Set it to 'sequential' or to layers that differ in its config.json."
        )
    return list(order)


def _check_taken_apart(checkpoint: PartedCheckpoint) -> bool:
    """Whether a layer of the model gives a tuple, tried out on a small copy of it.

    Raises:
        `ValueError`: if the model cannot be taken apart, or that cannot be tried out.
    """
    config: Any = checkpoint.model.config

    def tried(small: Any, inputs: dict[str, Any]) -> bool | ValueError:
        parts = LayerwiseClassifier(free_order(small, tower=config.tower))
        try:
            parts.embed(inputs)
        except ValueError as error:
            return error
        return bool(parts._gives_tuple)

    found = on_small_copy(checkpoint.plain_class, config, tried)
    if isinstance(found, ValueError):
        raise ValueError(f"{checkpoint.what} cannot run on workers: {found}") from found
    return found
