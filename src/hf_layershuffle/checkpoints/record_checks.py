# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The records of a model's folder, checked before a card is made of them: they may come from somebody else."""

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, StrictInt, TypeAdapter, ValidationError
from pydantic.config import ConfigDict, with_config
from typing_extensions import NotRequired, Required, TypedDict


@with_config(ConfigDict(strict=True, extra="allow", allow_inf_nan=False))
class _Record(TypedDict, total=False):
    """Base of the records. All other fields are allowed."""


class BaselineRecord(_Record, total=False):
    """`baseline` of `training.json`."""

    name: Required[str]
    metrics: Required[dict[str, float]]


class TrainingRecord(_Record, total=False):
    """`training.json`."""

    dataset: str | None
    dataset_arguments: dict[str, JsonValue]
    num_train_images: StrictInt | None
    num_train_texts: StrictInt | None
    license: str | None
    baseline: BaselineRecord
    base_model: str | None
    teacher: str | None
    metrics: dict[str, float]
    tags: list[str]
    arguments: dict[str, JsonValue]
    versions: dict[str, str]


class ExportRecord(_Record):
    """`export.json`."""

    source: str
    execution_order: list[StrictInt]


class PruningRecord(_Record):
    """`pruned_from` of a configuration."""

    model: str | None
    num_layers: StrictInt
    layers: list[StrictInt]


class Answer(_Record):
    label: str
    score: float


class Example(_Record, total=False):
    """An entry of `examples/examples.json`: an image's file, or a text."""

    src: str
    text: str
    text_pair: str
    example_title: Required[str]
    output: Required[list[Answer]]


class _Score(TypedDict, total=False):
    execution_order: list[StrictInt]
    accuracy: float
    loss: float | None
    top5_accuracy: float | None


class _Group(TypedDict, total=False):
    scores: list[_Score]
    accuracy: dict[str, float]
    loss: dict[str, float | None]
    top5_accuracy: dict[str, float] | None


@with_config(ConfigDict(extra="allow"))
class _Flags(TypedDict, total=False):
    model_type: str
    shuffle_mode: Literal["none", "arbitrary", "window"] | None
    depth_embedding: bool | None
    position_predictor: bool | None
    layerdrop: float | None


@with_config(ConfigDict(extra="allow"))
class _Environment(TypedDict, total=False):
    versions: dict[str, str]
    dtype: str


class ReportRecord(_Record, total=False):
    """`robustness.json`. [`RobustnessReport.from_dict`] checks which fields there must be."""

    model: str
    dataset: str
    num_images: StrictInt
    num_classes: StrictInt
    num_layers: StrictInt
    num_orders: StrictInt
    num_subsets: StrictInt
    seed: StrictInt
    sequential: _Score
    reversed: _Score
    arbitrary: _Group
    pruning: dict[str, list[_Group]]
    leave_one_out: list[_Score]
    neighbour_swaps: list[_Score]
    config: _Flags
    environment: _Environment


_Count = Annotated[int, Field(strict=True, ge=1, lt=2**63)]
_Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
_Cost = Annotated[float, Field(ge=0)]
_BatchSize = Annotated[str, Field(pattern="^[1-9][0-9]{0,8}$")]  # it heads a column of a card


class _BudgetPoint(TypedDict, total=False):
    policy: Required[str]
    label: Required[str]
    accuracy: Required[Annotated[float, Field(ge=0, le=1)]]
    accuracy_interval: Required[_Pair]
    accuracy_loss: Required[float]
    accuracy_loss_interval: Required[_Pair]
    mean_num_layers: Required[_Cost | None]
    multiply_adds: Required[_Cost]
    seconds: dict[_BatchSize, _Cost]
    time_ratio: dict[_BatchSize, _Cost]
    chosen: dict[str, JsonValue]
    on_front: list[str]


class BudgetRecord(_Record, total=False):
    """`budget.json`. [`BudgetReport.from_dict`] checks which fields there must be."""

    model: str
    dataset: str
    num_images: _Count
    num_chosen_on: Annotated[int, Field(strict=True, ge=0, lt=2**63)]
    num_classes: _Count
    num_layers: _Count
    seed: StrictInt
    whole: _BudgetPoint
    points: list[_BudgetPoint]
    config: _Flags
    environment: _Environment


@with_config(ConfigDict(strict=True, extra="forbid"))
class PredictorRecord(TypedDict):
    """The header of a program predictor. `checked_programs` checks which programs there can be."""

    format: StrictInt
    programs: list[list[StrictInt]]
    num_features: _Count
    hidden_size: _Count
    num_layers: _Count
    weights: Annotated[str, Field(pattern="^[0-9a-f]{8}$")]
    skipped_mlps: NotRequired[list[StrictInt] | None]


@with_config(ConfigDict(strict=True, extra="allow"))
class MergedSource(TypedDict, total=False):
    path: str
    model: str
    revision: str | None


def check_record(values: Any, kind: Any, where: str) -> Any:
    """The values, if they are such a record.

    Args:
        kind: One of the records above, or a list or dictionary of them.
        where: The file, for the message.

    Raises:
        `ValueError`: naming the file, the field, its value and what it must be.
    """
    try:
        TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        found = repr(first["input"])
        found = found if len(found) <= 100 else f"{found[:100]}…"
        place = f"`{place}`: " if place else ""
        raise ValueError(f"{where} is not what its name says: {place}{first['msg']}; it is {found}.") from error
    return values
