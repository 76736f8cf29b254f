# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A worker's side: some layers of a model, each of which runs at any position."""

import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..models.configuration_layershuffle import encoder_config
from ..models.families import CHANNELS_FIRST
from ..models.layer_program import LayerProgram, Run
from .parted_checkpoint import PartedCheckpoint
from .transport import LayerCall, LayerResult, WorkerFaultError, WorkerInfo, check_result
from .trees import map_leaves


class LayerWorker:
    """Holds some layers of a classifier, and nothing else of it but the depth embedding, and runs them.

    Several threads may run layers at the same time.

    Args:
        checkpoint: Folder or Hub id of a classifier, plain or LayerShuffle.
        layers: Indices of the layers to hold, each once.
        name: Of the worker.
        device: Where the layers are, such as "cuda".
        dtype: Of the weights; None for what the checkpoint says.
        attn_implementation, revision, token: As for `from_pretrained`.

    Raises:
        `ValueError`: if it is no classifier, its layers cannot be reordered, or a layer is none of its.
        `OSError`: if there is no such checkpoint, or it cannot be read.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        layers: Sequence[int],
        *,
        name: str = "worker",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ):
        self.name = name
        self._checkpoint = PartedCheckpoint(
            checkpoint,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            revision=revision,
            token=token,
        )
        config = self._checkpoint.model.config
        self._depth_embedding, self._depth_digest = self._checkpoint.load_depth_embedding()
        self._program = LayerProgram.mark(nn.ModuleList())
        self._skipped_mlps = getattr(config, "skipped_mlps", None) or ()
        self._hidden_size = getattr(encoder_config(config), "hidden_size", None)
        self._hidden_axis = 1 if config.plain_model_type in CHANNELS_FIRST else 2
        self._held: dict[int, tuple[nn.Module, str]] = {}
        self.load_layers(layers)

    @property
    def info(self) -> WorkerInfo:
        held = self._held
        digests: dict[int | str, str] = {layer: digest for layer, (_, digest) in held.items()}
        return WorkerInfo(self.name, tuple(held), digests | self._depth_digest, str(self._checkpoint.device))

    def load_layers(self, layers: Sequence[int]) -> WorkerInfo:
        """Holds these layers and no others. Those held before are not read again; calls that run are not disturbed.

        Raises:
            `ValueError`: if a layer is none of the model's, or cannot be read. The worker then holds what it held.
        """
        held = {}
        for layer in self._checkpoint.check_layers(layers):
            held[layer] = self._held[layer] if layer in self._held else self._load(layer)
        self._held = held
        return self.info

    def _load(self, layer: int) -> tuple[nn.Module, str]:
        module: Any
        module, digest = self._checkpoint.load_layer(layer)
        if getattr(module, "position_head", None) is not None:
            module.position_head = None  # of training
        return module, digest

    @torch.no_grad()
    def run(self, call: LayerCall) -> LayerResult:
        """Runs a layer at a position.

        Raises:
            `WorkerFaultError`: if it does not hold the layer, the hidden states are not of this model, or the layer
                fails or gives what is not finite.
        """
        if call.layer not in self._held:
            raise WorkerFaultError(f"{self.name} holds the layers {sorted(self._held)}, not layer {call.layer!r}")
        self._check(call)
        module, _ = self._held[call.layer]
        device = self._checkpoint.device
        started = time.perf_counter()
        try:
            hidden_states, args, kwargs = map_leaves(
                lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf,
                (call.hidden_states, tuple(call.args), call.kwargs),
            )
            called = Run(self._program, [], self._depth_embedding, skipped_mlps=self._skipped_mlps).at(
                module, call.position
            )
            output = called(hidden_states, *args, **kwargs)
            output = output[0] if isinstance(output, (tuple, list)) else output
            output = output.to(call.hidden_states.device)
        except Exception as error:  # whatever a family raises of arguments that do not fit
            reason = " ".join(str(error).split())[:200]
            raise WorkerFaultError(f"layer {call.layer} failed: {type(error).__name__}: {reason}") from error
        result = LayerResult(call.layer, call.position, output, time.perf_counter() - started)
        check_result(call, result)
        return result

    def _check(self, call: LayerCall) -> None:
        """Refuses hidden states that cannot be those of the model, before they are computed with."""
        states, dtype, size = call.hidden_states, self._checkpoint.dtype, self._hidden_size
        sizes = f"{size}, tokens" if self._hidden_axis == 1 else f"tokens, {size}"
        wanted = f"they must be {dtype} of shape (batch_size, {sizes})"
        if not isinstance(states, torch.Tensor):
            raise WorkerFaultError(f"hidden states are of type {type(states).__name__}; {wanted}")
        is_fitting = states.ndim == 3 and 0 not in states.shape and states.dtype == dtype
        if not is_fitting or size not in (None, states.shape[self._hidden_axis]):
            raise WorkerFaultError(f"hidden states are {states.dtype} of shape {tuple(states.shape)}; {wanted}")
        if not bool(torch.isfinite(states).all()):
            raise WorkerFaultError("hidden states are not finite")
        if isinstance(call.position, bool) or not isinstance(call.position, int) or call.position < 0:
            raise WorkerFaultError(f"the position is {call.position!r}; it must be an integer of at least 0")
