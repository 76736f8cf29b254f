# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint of which single layers are read: nobody needs the memory of the whole model."""

import copy
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Sequence
from operator import index as as_index
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import local_torch_dtype

from ..checkpoints.checks import check_complete, check_finite
from ..checkpoints.loading import classes_of
from ..checkpoints.stored_checkpoint import open_source
from ..checkpoints.tensor_files import StoredTensor
from ..checkpoints.tokenizers import takes_texts
from ..models.modeling_layershuffle import LayerShuffleMixin
from ..models.order_check import check_untested_family


# Building a model in a dtype changes for a moment what the whole process shares: torch's default dtype, and the
# functions that initialise weights
_BUILDING = threading.Lock()
DEPTH_EMBEDDING = "depth_embedding"


class PartedCheckpoint:
    """A classifier's checkpoint, plain or LayerShuffle, whose layers are read one by one.

    Args:
        checkpoint: Folder or Hub id.
        device: Where what is read goes.
        dtype: Of the weights, such as `torch.bfloat16` or "bfloat16". None for what the checkpoint says.
        attn_implementation: As for `from_pretrained`.
        revision, token: As for `from_pretrained`.

    Raises:
        `ValueError`: if it is no classifier, its layers cannot be reordered, or it has no safetensors weights.
        `OSError`: if there is none, or a file is truncated or corrupted.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ):
        self.what = f"'{checkpoint}'"
        self.device = _usable_device(device)
        self._source = open_source("model", os.fspath(checkpoint), revision, token)
        self.plain_class, self._free_class = classes_of(str(self._source.config.plain_model_type), self.what)
        self.dtype = self._chosen_dtype(dtype)
        # Its weights are on the meta device, which has no memory. Its buffers are as they were built
        self.model = self._build(attn_implementation)
        self._shared = getattr(self.model, "all_tied_weights_keys", None) or {}

    @property
    def num_layers(self) -> int:
        return len(self.model.free_layers)

    def check_layers(self, layers: Iterable[int]) -> list[int]:
        """Layers as a list of their indices.

        Raises:
            `ValueError`: if one is none of the model's, comes twice, or there is none.
        """
        found = [as_index(layer) for layer in layers]
        outside = [layer for layer in found if not 0 <= layer < self.num_layers]
        if outside or not found or len(set(found)) < len(found):
            raise ValueError(
                f"`layers` is {found}; it must name layers of {self.what}, from 0 to {self.num_layers - 1}, each once."
            )
        return found

    def load_layer(self, layer: int) -> tuple[nn.Module, str]:
        """A layer with its weights, and their digest.

        Raises:
            `ValueError`: if the checkpoint lacks one of its tensors, has it in another shape, or with NaN.
        """
        module = copy.deepcopy(self.model.free_layers._modules[str(layer)])
        assert module is not None
        return module, self._fill(module, self._prefix(layer), list(module.state_dict()))

    def load_depth_embedding(self) -> tuple[nn.Embedding | None, dict[int | str, str]]:
        """The depth embedding, and its digest by its name; nothing where the model has none."""
        module = copy.deepcopy(self.model._depth_embedding)
        if module is None:
            return None, {}
        return module, {DEPTH_EMBEDDING: self._fill(module, self._depth_prefix, list(module.state_dict()))}

    def load_rest(self) -> str:
        """Gives `model` the weights of all but its layers, which stay without memory. Returns their digest."""
        layers = f"{self.model.layers_path}."
        return self._fill(self.model, "", [name for name in self.model.state_dict() if not name.startswith(layers)])

    def digests(self, layers: Sequence[int]) -> dict[int | str, str]:
        """Of the weights of each layer, and of the depth embedding, as they are stored, with the configuration.

        They are those of `load_layer`, but are read piece by piece.
        """
        parts: dict[int | str, tuple[str, Any]] = {
            layer: (self._prefix(layer), self.model.free_layers._modules[str(layer)]) for layer in layers
        }
        if self.model._depth_embedding is not None:
            parts[DEPTH_EMBEDDING] = (self._depth_prefix, self.model._depth_embedding)
        found: dict[int | str, str] = {}
        for part, (prefix, module) in parts.items():
            digest = self._new_digest()
            for name, stored in self._stored(prefix, module, list(module.state_dict())).items():
                digest.update(_header(name, stored))
                for piece in [stored.read()] if stored.dtype is None else stored.chunks():
                    digest.update(_content(piece))
            found[part] = digest.hexdigest()
        return found

    def _build(self, attn_implementation: str | None) -> LayerShuffleMixin:
        config: Any = copy.deepcopy(self._source.config)
        config.residual_init_scale = 1.0  # of first weights, to find which a small copy with memory is run
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        check_untested_family(self.plain_class, config)  # here, since it too runs a small copy
        made: Any = self._free_class
        with _BUILDING, torch.random.fork_rng(devices=[]):
            with local_torch_dtype(self.dtype), torch.device("meta"):
                model = made(config)
            _compute_buffers(model)
        config.residual_init_scale = self._source.config.residual_init_scale
        model.check_depth()
        return model.eval().requires_grad_(False)

    def _chosen_dtype(self, dtype: str | torch.dtype | None) -> torch.dtype:
        chosen = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
        if dtype is None or dtype == "auto":
            stored = (tensor.dtype for tensor in self._source.tensors.values() if tensor.dtype is not None)
            chosen = getattr(self._source.config, "dtype", None) or next(stored, torch.float32)
        if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
            raise ValueError(f"`dtype` is {dtype!r}; it must be a float of torch, such as torch.bfloat16, or None.")
        return chosen

    def _prefix(self, layer: int) -> str:
        return f"{self.model.layers_path}.{layer}."

    @property
    def _depth_prefix(self) -> str:
        embedding = self.model._depth_embedding
        return next(f"{name}." for name, module in self.model.named_modules() if module is embedding)

    def _stored(self, prefix: str, module: nn.Module, names: list[str]) -> dict[str, StoredTensor]:
        """Where the tensors of a module are, of which all must be there."""
        tensors, shapes = self._source.tensors, {name: tuple(each.shape) for name, each in module.state_dict().items()}
        places = {name: f"{prefix}{name}" for name in names}
        for name, place in places.items():
            if place not in tensors:  # of two names for one tensor, the file holds one
                places[name] = self._shared.get(place, place)
        kind = "text" if takes_texts(self.model.config) else "image"
        check_complete(self.what, [place for place in places.values() if place not in tensors], input_kind=kind)
        for name, place in places.items():
            if tensors[place].shape != shapes[name]:
                raise ValueError(
                    f"{self.what} holds '{place}' of shape {tensors[place].shape}, and its config.json asks for "
                    f"{shapes[name]}. Copy or download it again, or correct its config.json."
                )
        return {name: tensors[place] for name, place in places.items()}

    def _new_digest(self) -> Any:
        """The beginning of a part's digest: what the configuration says, without which weights compute nothing."""
        said = self._source.config.to_dict()
        said = {name: value for name, value in said.items() if name not in ("transformers_version", "_name_or_path")}
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())

    def _fill(self, module: nn.Module, prefix: str, names: list[str]) -> str:
        """Gives a module its weights, and returns their digest."""
        values, digest = {}, self._new_digest()
        for name, stored in self._stored(prefix, module, names).items():
            tensor = stored.read()
            digest.update(_header(name, stored))
            digest.update(_content(tensor))
            dtype = self._dtype_of(f"{prefix}{name}") if tensor.is_floating_point() else tensor.dtype
            # A copy, since what is mapped from a file changes with the file
            values[name] = tensor.to(self.device, dtype, copy=True)
        check_finite(self.what, ((f"{prefix}{name}", value) for name, value in values.items()))
        module.load_state_dict(values, strict=False, assign=True)
        module.requires_grad_(False)
        for owner in module.modules():  # those that no checkpoint holds
            for name, buffer in owner._buffers.items():
                owner._buffers[name] = buffer if buffer is None else buffer.to(self.device)
        return digest.hexdigest()

    def _dtype_of(self, name: str) -> torch.dtype:
        """Of a weight: some families keep single ones in float32."""
        fixed = self.model._get_dtype_plan(self.dtype)
        return next((dtype for part, dtype in fixed.items() if f".{part}." in f".{name}."), self.dtype)


def _compute_buffers(model: LayerShuffleMixin) -> None:
    """Gives a model without memory the tables that no checkpoint holds, such as frequencies of positions.

    So does `from_pretrained`: families compute them where they initialise their weights.
    """
    tensor: Any
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, short = name.rpartition(".")
        model.get_submodule(owner)._buffers[short] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()


def _usable_device(device: str | torch.device | None) -> torch.device:
    try:
        found = torch.device(device or "cpu")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # no such device, or torch without it
        reason = str(error).split("\n")[0]
        raise ValueError(f"`device` is {str(device)!r}, which cannot be used here: {reason}") from error
    return found


def _header(name: str, stored: StoredTensor) -> bytes:
    return f"{name} {stored.dtype} {stored.shape}\n".encode()


def _content(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
