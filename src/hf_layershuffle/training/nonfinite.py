# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Finds the first step that is not finite without making the host wait for the device at each step."""

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor


class NonFiniteWatch:
    """Notes scalars where they lie and reads them together, all at once, when it is asked.

    Processes must note the same things in the same order and ask at the same time; they get the same answer.
    """

    def __init__(self, is_on: bool = True):
        self.is_on = is_on
        self._noted: list[tuple[int, str, torch.Tensor | float]] = []

    def note(self, step: int, name: str, value: torch.Tensor | float | None) -> None:
        """Notes a number.

        Args:
            step: Optimizer step, counted from 1.
            name: What the number is, for the message.
            value: A scalar tensor, a number, or None, which is no value.
        """
        if self.is_on and value is not None:
            self._noted.append((step, name, value.detach() if isinstance(value, torch.Tensor) else value))

    def first(self, accelerator: Accelerator) -> tuple[int, str] | None:
        """Step and name of the first value that is not finite on any process, of those since this was last asked."""
        noted, self._noted = self._noted, []
        if not noted:
            return None
        values = [_as_float32(value, accelerator.device) for _, _, value in noted]
        is_finite = torch.stack(values).isfinite()
        count = torch.arange(len(noted), device=is_finite.device)
        first_here = torch.where(is_finite, len(noted), count).min()
        index = int(accelerator.gather(first_here[None]).min())
        return noted[index][:2] if index < len(noted) else None


def largest_weight(model: torch.nn.Module) -> torch.Tensor:
    """The largest absolute value of the trained parameters on this process; not finite if one of them is not."""
    trained = (parameter.detach() for parameter in model.parameters() if parameter.requires_grad)
    parameters = [each.to_local() if isinstance(each, DTensor) else each for each in trained]
    largest = [each.abs().max().float() for each in parameters if each.numel() > 0]  # ZeRO-3 leaves empty ones
    return torch.stack([each.to(largest[0].device) for each in largest]).max() if largest else torch.tensor(0.0)


def _as_float32(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    whole = value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)
    return whole.to(device, torch.float32).reshape(())
