# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The tensors of a merged model: which stored tensors each is made of, and its numbers a piece at a time."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

import torch

from ..checkpoints.stored_checkpoint import SourceCheckpoint
from ..checkpoints.tensor_files import StoredTensor, is_finite
from .plan import PARTS, MergePart, MergePlan


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the result.

    It is a weighted average of stored tensors, whose weights sum to 1, or one stored tensor as it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: list[tuple[StoredTensor, float]]

    @property
    def copied(self) -> StoredTensor | None:
        """The stored tensor whose bytes are its own, if there is one."""
        (stored, _), *others = self.inputs
        is_copy = not others and (stored.shape, stored.dtype) == (self.shape, self.dtype)
        return stored if is_copy else None

    def compute(self) -> Iterator[torch.Tensor]:
        """Gives its numbers in pieces, each valid until the next.

        Raises:
            `ValueError`: if a number is NaN or infinite.
        """
        inputs = [stored for stored, _ in self.inputs]
        if all(stored.shape == self.shape for stored in inputs):
            pieces = [stored.chunks() for stored in inputs]
        else:
            pieces = [iter([_fit_rows(stored.read(), self.shape)]) for stored in inputs]
        total, result = torch.empty(0, dtype=self._sum_dtype), torch.empty(0, dtype=self.dtype)
        for values in zip(*pieces):
            if total.shape != values[0].shape:  # made once, since new memory costs more than the arithmetic
                total, result = total.new_empty(values[0].shape), result.new_empty(values[0].shape)
            averaged = self._average(values, total)
            if not is_finite(averaged):
                for stored in inputs:
                    refuse_nonfinite(stored)
                averaged = self._average_of_large(values)
            yield averaged if averaged.dtype == self.dtype else result.copy_(averaged)

    @property
    def _sum_dtype(self) -> torch.dtype:
        """float32 also for tensors of 16 bits."""
        return torch.promote_types(self.dtype, torch.float32)

    def _average(self, values: tuple[torch.Tensor, ...], total: torch.Tensor) -> torch.Tensor:
        """The tensor itself if there is one, else the average, in `total`.

        Each tensor pulls the average of those before it towards itself by its share. So an average of equal tensors
        gives themselves, bit for bit. The error is at most the number of tensors times the spacing of `total`'s dtype
        at the largest value. Summing in float64 takes twice the time.
        """
        if len(values) == 1:
            return values[0]
        weights = [weight for _, weight in self.inputs]
        total.copy_(values[0])
        for number, value in enumerate(values[1:], 1):
            share = weights[number] / math.fsum(weights[: number + 1])
            total.lerp_(value.to(total.dtype), share)
        return total

    def _average_of_large(self, values: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The average in float64 of finite numbers whose difference is too large. That of their halves is not."""
        total = torch.empty(values[0].shape, dtype=torch.float64)
        largest = torch.finfo(self.dtype).max  # beyond which rounding must not lead
        return self._average(tuple(value.double() / 2 for value in values), total).mul_(2).clamp_(-largest, largest)


def refuse_nonfinite(stored: StoredTensor) -> None:
    """Reads a tensor.

    Raises:
        `ValueError`: if it holds NaN or infinite values.
        `OSError`: if the file cannot be read.
    """
    if not stored.is_finite():
        raise ValueError(
            f"Source '{stored.source}': the tensor '{stored.name}' in '{stored.file}' holds NaN or infinite "
            "values. Take another source or an earlier checkpoint."
        )


def inputs_of(
    name: str, shape: tuple[int, ...], layers_path: str, plan: MergePlan, sources: Mapping[str, SourceCheckpoint]
) -> list[tuple[StoredTensor, float]]:
    """The stored tensors of which the tensor `name` of the result is made, with their weights."""
    part_name = part_of(name, layers_path)
    if part_name is not None:
        parts: list[MergePart] = getattr(plan, part_name)
        return [(_find(name, shape, sources[part.source]), part.share) for part in parts]
    prefix = f"{layers_path}."
    index, suffix = name.removeprefix(prefix).split(".", 1)
    layers = plan.layers[int(index)]
    return [(_find(f"{prefix}{layer.layer}.{suffix}", shape, sources[layer.source]), layer.share) for layer in layers]


# Modules and tensors of encoders, as transformers and timm name them
_OF_CLASSIFIER = re.compile(r"pooler|head|head_dist|fc_norm|attn_pool")
_OF_EMBEDDINGS = re.compile(
    r".*embed.*|.*_pos_emb|wte|wpe|.*_token|.*_(pos|position|attention)_bias|conv\d|feature_extractor"
    r"|feature_projection|input_conditioner"
)


def part_of(name: str, layers_path: str) -> str | None:
    """Which of `PARTS` a tensor belongs to, by its name; None of a tensor of the layers."""
    if name.startswith(f"{layers_path}."):
        return None
    root, *path = name.split(".")
    if root != layers_path.partition(".")[0] or any(map(_OF_CLASSIFIER.fullmatch, path)):
        return "classifier"
    if "depth_embedding" in path:
        return "depth_embedding"
    return "embeddings" if any(map(_OF_EMBEDDINGS.fullmatch, path)) else "layernorm"


def check_parts(plan: MergePlan, names: Iterable[str], layers_path: str) -> None:
    """Refuses a plan that takes a part from elsewhere than the base, where the result has no tensor of this part.

    A plan that says the same of all parts, such as an average, may do so.

    Args:
        plan: The plan.
        names: Names of the result's tensors.
        layers_path: Path of its list of layers.

    Raises:
        `ValueError`: naming the part.
    """
    taken: dict[str, list[tuple[str, float]]] = {
        part: [(each.source, each.share) for each in getattr(plan, part)] for part in PARTS
    }
    found = {part_of(name, layers_path) for name in names}
    everywhere = all(each == taken[PARTS[0]] for each in taken.values())
    for part, given in taken.items():
        if part not in found and {source for source, _ in given} != {plan.base_name} and not everywhere:
            raise ValueError(
                f"`{part}` names {' and '.join(repr(source) for source, _ in given)}, and models of this family have "
                f"no such part outside their layers; there are {', '.join(p for p in PARTS if p in found)}. Leave "
                f"`{part}` out."
            )


def _find(name: str, shape: tuple[int, ...], source: SourceCheckpoint) -> StoredTensor:
    stored = source.tensors.get(name)
    if stored is None:
        known = (
            f"The file holds {len(source.tensors)} tensors, but not this one." if source.tensors else "It is empty."
        )
        raise ValueError(
            f"Source '{source.name}' ('{source.path}') lacks the tensor '{name}'. {known} Sources must be complete "
            "image classifiers."
        )
    if stored.dtype is None:
        raise ValueError(
            f"Source '{source.name}': the tensor '{stored.name}' is not of floats of 16 to 64 bits; quantized models "
            "cannot be merged."
        )
    rows_may_differ = "depth_embedding" in name or "position_head.dense" in name
    if "position_head.dense" in name and stored.shape[0] < shape[0]:
        raise ValueError(
            f"The position heads of source '{source.name}' know {stored.shape[0]} positions, but the result has "
            f"{shape[0]} layers. Set `position_heads: false` in the plan to leave them out."
        )
    if stored.shape[rows_may_differ:] != shape[rows_may_differ:]:
        raise ValueError(
            f"Source '{source.name}': the tensor '{stored.name}' has shape {stored.shape}; with this configuration it "
            f"must be {shape}. Take a checkpoint whose weights belong to its config.json."
        )
    return stored


def _fit_rows(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Gives a tensor as many rows as the result has: only the first ones, or the last one repeated.

    Such a tensor has one row a position. A tensor of the right shape stays as it is.
    """
    if tensor.shape == shape:
        return tensor
    return tensor[torch.arange(shape[0]).clamp(max=len(tensor) - 1)]


def result_dtypes(inputs: dict[str, list[tuple[StoredTensor, float]]]) -> dict[str, torch.dtype]:
    """The widest dtype of each tensor's kind.

    A tensor's kind is its name without the number of the layer.
    """
    kinds = {name: re.sub(r"\.\d+\.", ".*.", name) for name in inputs}
    widest: dict[str, torch.dtype] = {}
    for name, kind in kinds.items():
        dtypes = [stored.dtype for stored, _ in inputs[name] if stored.dtype is not None]
        widest[kind] = reduce(torch.promote_types, dtypes, widest.get(kind, dtypes[0]))
    return {name: widest[kind] for name, kind in kinds.items()}
