# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Merge plans: which layer of which model stands where in a merged one. Data only; [`merge`] carries a plan out."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    model_validator,
)

from ..checkpoints.locations import is_local, name_sources, resolve_folder
from ..checkpoints.stored_checkpoint import read_config
from ..common.files import write_text
from ..common.paths import public_path
from ..common.yaml_files import read_mapping
from ..models.configuration_layershuffle import num_layers_of
from .plan_files import explain_error, to_yaml
from .random_layers import draw_layers


if TYPE_CHECKING:
    from rich.table import Table


PLAN_FILE = "merge_plan.yaml"
PARTS = ("embeddings", "layernorm", "classifier", "depth_embedding")
_WEIGHT_TOLERANCE = 1e-6


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MergeSource(_Strict):
    """A model to take from: a folder, or a Hub id with, *optionally*, a revision (branch, tag or commit)."""

    path: str = Field(min_length=1)
    revision: str | None = None


class MergePart(_Strict):
    """A source by its name in the plan, with its weight in an average, in (0, 1]. Without weights all count alike."""

    source: str
    weight: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)

    @property
    def share(self) -> float:
        """The weight, which every part of a plan has."""
        if self.weight is None:
            raise ValueError(f"The part of source '{self.source}' has no weight yet; make a plan of it first.")
        return self.weight


class MergeLayer(MergePart):
    """One layer of a source, by its index in that source."""

    layer: StrictInt = Field(ge=0)


_Part = TypeVar("_Part", bound=MergePart)
# Folders or Hub ids, in a list or by name
Sources = Sequence[str | os.PathLike] | Mapping[str, "str | os.PathLike | Mapping | MergeSource"]


def _as_list(value: object) -> object:
    """`"a"` and `{"source": "a"}` are short for `[{"source": "a"}]`."""
    value = {"source": value} if isinstance(value, str) else value
    return [value] if isinstance(value, (Mapping, MergePart)) else value


def _with_weights(parts: list[_Part]) -> list[_Part]:
    weights = [part.weight for part in parts if part.weight is not None]
    if not weights:
        return [part.model_copy(update={"weight": 1 / len(parts)}) for part in parts]
    if len(weights) < len(parts):
        raise ValueError(
            "some have a weight and some have none; give one to all of them, or to none for equal weights"
        )
    if not math.isclose(math.fsum(weights), 1, rel_tol=0, abs_tol=_WEIGHT_TOLERANCE):
        raise ValueError(f"the weights {weights} sum to {math.fsum(weights):.6g}; they must sum to 1")
    return parts


def _as_sources(value: Any) -> Any:
    """`"folder"` is short for `{"path": "folder"}`; a list of them is named by [`name_sources`]."""
    if isinstance(value, (list, tuple)):
        value = name_sources(value)
    if isinstance(value, Mapping):
        return {name: {"path": item} if isinstance(item, str) else item for name, item in value.items()}
    return value


_Parts = Annotated[list[MergePart], Field(min_length=1), BeforeValidator(_as_list), AfterValidator(_with_weights)]
_Layer = Annotated[list[MergeLayer], Field(min_length=1), BeforeValidator(_as_list), AfterValidator(_with_weights)]


class MergePlan(_Strict):
    """What a merged model is made of. Unknown keys are refused.

    ```yaml
    sources: {a: outputs/a, b: {path: org/model-b, revision: v1.0}}
    layers:
      - {source: a, layer: 0}
      - {source: b, layer: 7}                                    # any layer may stand anywhere
      - [{source: a, layer: 2, weight: 0.25}, {source: b, layer: 2, weight: 0.75}]
    classifier: b
    ```

    Args:
        sources: Models by name: folders or Hub ids. In a file, a folder is looked for beside that file first, then in
            the current directory.
        layers: For each layer of the result a layer of a source, or a weighted average of several.
        base: Name of the source that gives the configuration and each part that is not named. Defaults to the first
            source.
        embeddings, layernorm, classifier, depth_embedding: The source that gives the part, or a weighted average. The
            classifier includes poolers, which were trained with it; the layernorm is the rest of the encoder. The
            depth embedding has one vector a position: a shorter result takes the first ones, a longer one repeats the
            last, as a model does that runs an order longer than itself.
        image_processor: Name of the source that gives the image processor. Sources whose image processors differ need
            it, as only one of them can be that of the result. Defaults to the base.
        position_heads: Whether layers keep their position heads, if the base has them. A shorter result keeps their
            first outputs; a longer one must leave them out, since no head has learned its positions.

    Raises:
        `ValueError`: naming the field, the value and what is allowed.
    """

    sources: Annotated[dict[str, MergeSource], Field(min_length=1), BeforeValidator(_as_sources)]
    layers: list[_Layer] = Field(min_length=1)
    base: str | None = None
    embeddings: _Parts | None = None
    layernorm: _Parts | None = None
    classifier: _Parts | None = None
    depth_embedding: _Parts | None = None
    image_processor: str | None = None
    position_heads: StrictBool = True

    @model_validator(mode="after")
    def _fill_in_and_check(self) -> "MergePlan":
        self.base = self.base_name
        for name in PARTS:
            if getattr(self, name) is None:
                setattr(self, name, [MergePart(source=self.base, weight=1.0)])
        places = {"base": [self.base], "image_processor": [self.image_processor or self.base]}
        places |= {name: [part.source for part in getattr(self, name)] for name in PARTS}
        places |= {f"layers[{i}]": [part.source for part in parts] for i, parts in enumerate(self.layers)}
        for place, names in places.items():
            for name in names:
                if name not in self.sources:
                    known = ", ".join(f"'{source}'" for source in self.sources)
                    raise ValueError(f"`{place}` names the source '{name}', which does not exist; there are {known}")
        return self

    @classmethod
    def random(
        cls,
        sources: Sources,
        *,
        seed: int,
        num_layers: int | None = None,
        any_layer: bool = False,
        base: str | None = None,
        position_heads: bool = True,
    ) -> "MergePlan":
        """A random merge: layer i of the result is layer i of a source drawn at random (arXiv 2407.04513).

        Args:
            sources: Folders or Hub ids, in a list or by name.
            seed: Seed of the random draw, at least 0.
            num_layers: Number of layers of the result. Defaults to the base's.
            any_layer: Whether each position draws from all layers of all sources instead, with repeats.
            base: Name of the source that gives everything but the layers. Defaults to the first.
            position_heads: As in [`MergePlan`].

        Raises:
            `ValueError`: if a source lacks a layer that the result has, or an argument is not valid.
        """
        named = _checked_sources(sources)
        depths = _depths(named)
        base = next(iter(named)) if base is None else base
        if base not in named:
            raise ValueError(f"`base` is '{base}'; it must be one of {', '.join(map(repr, named))}.")
        drawn = draw_layers(depths, seed, depths[base] if num_layers is None else num_layers, any_layer)
        layers = [{"source": source, "layer": layer} for source, layer in drawn]
        return cls.model_validate({"sources": named, "layers": layers, "base": base, "position_heads": position_heads})

    @classmethod
    def average(cls, sources: Sources, *, weights: Iterable[float] | None = None) -> "MergePlan":
        """The average of all tensors of the sources, layer by layer.

        Args:
            sources: Folders or Hub ids, in a list or by name.
            weights: One weight for each source, which sum to 1. Defaults to equal weights.

        Raises:
            `ValueError`: if the sources differ in depth, or the weights are not valid.
        """
        named = _checked_sources(sources)
        depths = _depths(named)
        (first, num_layers), *others = depths.items()
        for name, depth in others:
            if depth != num_layers:
                raise ValueError(
                    f"`num_hidden_layers` is {num_layers} in '{first}' and {depth} in '{name}'; an average needs "
                    "sources of the same depth. Write a plan that says which layers to average."
                )
        shares: list[float | None] = [None] * len(named) if weights is None else list(weights)
        if len(shares) != len(named):
            raise ValueError(f"There are {len(shares)} weights for {len(named)} sources; give one to each.")
        parts = [{"source": name, "weight": share} for name, share in zip(named, shares)]
        layers = [[{**part, "layer": index} for part in parts] for index in range(num_layers)]
        return cls.model_validate({"sources": named, "layers": layers, **dict.fromkeys(PARTS, parts)})

    @property
    def base_name(self) -> str:
        """Name of the base, also where the plan leaves it to be the first source."""
        return next(iter(self.sources)) if self.base is None else self.base

    def to_dict(self) -> dict:
        """JSON types only; short forms where they say the same."""
        sources = {name: source.model_dump(exclude_none=True) for name, source in self.sources.items()}
        layers = [_short(parts) for parts in self.layers]
        parts = {name: _short(getattr(self, name)) for name in PARTS}
        return {
            "sources": sources,
            "base": self.base,
            "layers": layers,
            **parts,
            **({"image_processor": self.image_processor} if self.image_processor else {}),
            "position_heads": self.position_heads,
        }

    def to_record(self) -> dict:
        """As `to_dict`, but folders are named without where they lie on this machine, for a result that others
        read."""
        values = self.to_dict()
        for source in values["sources"].values():
            if is_local(source["path"]):
                source["path"] = public_path(source["path"])
        return values

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the plan to a `.yaml`, `.yml` or `.json` file; returns its path."""
        path = Path(path)
        values = self.to_dict()
        return write_text(path, json.dumps(values, indent=1) if path.suffix == ".json" else to_yaml(values))

    @classmethod
    def load(cls, path: str | os.PathLike, *, trust_paths: bool = False) -> "MergePlan":
        """Reads a plan from a YAML or JSON file.

        Args:
            path: The plan's file.
            trust_paths: Whether to accept sources that lie outside of the current directory and of the plan's folder.

        Raises:
            `OSError`: if there is no such file.
            `ValueError`: if it is not a plan, or a source's folder is not an allowed one.
        """
        path = Path(path).expanduser()
        values = read_mapping(path, "one mapping, of a merge plan (`sources`, `layers`, ...)")
        try:
            plan = cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(f"'{path}' is not a merge plan: {explain_error(error, cls.model_fields)}") from error
        for source in plan.sources.values():
            if not source.path.startswith("~") and (path.parent / source.path).is_dir():
                source.path = str(path.parent / source.path)
        if not trust_paths:
            plan.check_paths([Path.cwd(), path.parent])
        return plan

    def check_paths(self, allowed_folders: Iterable[str | os.PathLike]) -> None:
        """Refuses folders of sources that are not inside `allowed_folders`, with links followed.

        A plan may come from somebody else.

        Raises:
            `ValueError`: naming the folder.
        """
        allowed = list(dict.fromkeys(Path(folder).resolve() for folder in allowed_folders))
        for name, source in self.sources.items():
            if not is_local(source.path):
                continue
            folder = Path(source.path).expanduser().resolve()
            if not any(folder.is_relative_to(parent) for parent in allowed):
                inside = " and ".join(f"'{parent}'" for parent in allowed)
                raise ValueError(
                    f"Source '{name}' of the plan is the folder '{folder}', outside of {inside}. If you trust the "
                    "plan, pass `trust_paths=True` (--trust_paths)."
                )

    def table(self) -> "Table":
        """The plan as a [`rich.table.Table`]."""
        from rich.table import Table
        from rich.text import Text

        title = f"Merge of {len(self.sources)} sources: {len(self.layers)} layers, base '{self.base}'"
        table = Table(title=Text(title, style="table.title"))  # `Text`: brackets in a name are not markup
        for name in ("part", "source", "layer", "weight"):
            table.add_column(name, justify="left" if name in ("part", "source") else "right")
        rows = [(name, getattr(self, name)) for name in PARTS]
        rows[1:1] = [(f"layer {index}", parts) for index, parts in enumerate(self.layers)]
        for label, parts in rows:
            for part in parts:
                weight = f"{part.weight:.4g}" if len(parts) > 1 else ""
                table.add_row(label, Text(part.source), str(getattr(part, "layer", "")), weight)
                label = ""
        return table


def _depths(sources: Mapping[str, MergeSource]) -> dict[str, int]:
    """Number of layers of each source, from its configuration."""
    folders = {name: resolve_folder(name, source.path, source.revision)[0] for name, source in sources.items()}
    return {name: num_layers_of(read_config(name, folder)) for name, folder in folders.items()}


def _checked_sources(sources: Sources) -> dict[str, MergeSource]:
    if isinstance(sources, Mapping):
        sources = {name: os.fspath(item) if isinstance(item, os.PathLike) else item for name, item in sources.items()}
    named = _as_sources(sources)
    if not named:
        raise ValueError("There are no sources; give at least one folder or Hub id.")
    return {name: MergeSource.model_validate(source) for name, source in named.items()}


def _short(parts: Sequence[MergePart]) -> dict | list[dict] | str:
    if len(parts) > 1:
        return [{**part.model_dump(exclude={"weight"}), "weight": part.weight} for part in parts]
    values = parts[0].model_dump(exclude={"weight"})
    return values["source"] if len(values) == 1 else values
