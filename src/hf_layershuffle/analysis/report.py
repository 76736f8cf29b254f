# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What an analysis found: numbers that can be saved, loaded and read on a terminal."""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..common.reports import Report
from ..common.tables import render
from .attention import AttentionMaps
from .contributions import LayerContributions
from .embedding import Embedding
from .representations import PositionProbe, Similarity


if TYPE_CHECKING:
    from rich.table import Table

ANALYSIS_FILE = "analysis.json"
_PARTS = {
    "contributions": LayerContributions,
    "probe": PositionProbe,
    "similarity": Similarity,
    "embedding": Embedding,
    "attention": AttentionMaps,
}
# Fields that stay lists or numbers; all other lists become arrays
_LISTS = ("execution_orders",)


@dataclass(frozen=True, repr=False)
class AnalysisReport(Report):
    """What each layer of a model does at each position, from [`analyze`].

    Args:
        model, dataset: Names, for people.
        num_images: Number of images analysed.
        num_classes, num_layers: Numbers of the model's classes and layers.
        seed: Seed of the orders, the folds and the embedding.
        contributions: What layers add to the residual stream, by layer and position.
        probe: How well the position is read from a layer's output.
        similarity: CKA between the CLS tokens after all (layer, position) pairs.
        embedding: The same CLS tokens in two dimensions.
        attention: Attention maps of a few images under a few orders. None of a model of texts.
        config: The model's type, its LayerShuffle flags and a digest of its weights.
        environment: Versions, device, dtype, machine, date (ISO 8601, UTC).
    """

    file_name: ClassVar[str] = ANALYSIS_FILE
    kind: ClassVar[str] = "an analysis"
    indent: ClassVar[int | None] = None

    model: str
    dataset: str
    num_images: int
    num_classes: int
    num_layers: int
    seed: int
    contributions: LayerContributions
    probe: PositionProbe
    similarity: Similarity
    embedding: Embedding
    attention: AttentionMaps | None
    config: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        """The report in JSON types, without the images of `attention`.

        Floating point numbers have six digits.
        """
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        for name in _PARTS:
            if values[name] is not None:
                values[name] = {key: value for key, value in vars(values[name]).items() if key != "images"}
        return _json_values(values)

    @classmethod
    def from_dict(cls, values: dict) -> "AnalysisReport":
        """The inverse of `to_dict`.

        Raises:
            `ValueError`: if fields are missing or unknown.
        """
        names = {each.name for each in fields(cls)}
        required = names - {"config", "environment"}
        if not required <= set(values) <= names:
            wrong = sorted(required - set(values)) or sorted(set(values) - names)
            raise ValueError(f"This is no analysis: the fields {wrong} are missing or unknown.")
        parts = {
            name: None if values[name] is None and name == "attention" else part_class(**_arrays(values[name]))
            for name, part_class in _PARTS.items()
        }
        return cls(**{**values, **parts})

    def table(self) -> "Table":
        """The report by layer as a [`rich.table.Table`]; `print(report)` shows it too."""
        from rich.table import Table
        from rich.text import Text

        found = self.contributions
        sequential = self.contributions.sequential_mean
        title = (
            f"{self.model} on {self.dataset} ({self.num_images:,} {self.noun}, {len(found.execution_orders)} orders)"
        )
        caption = (
            "Update: ‖f(x) − x‖ / ‖x‖ of a layer f. Away/home: size of what the layer adds at other positions than "
            "its own in random orders, by that in sequential order; below 1, it does less there. Logit: change of the "
            "true class's. Position: fraction a linear probe reads from the layer's output, on unseen images and "
            f"orders; chance {self.probe.chance:.3f}."
        )
        table = Table(title=Text(title, style="table.title"), caption=caption)
        # A family that normalises after adding has no parts that add up
        parts = {"attention": "attention", "MLP": "mlp"}
        columns = {
            "update,\nsequential": sequential["update_norm"],
            "update,\nrandom": found.by_layer("update_norm"),
            "away/home:\nlayer": found.away_from_home(),
            **{
                f"away/home:\n{title}": found.away_from_home(f"{part}_size")
                for title, part in parts.items()
                if f"{part}_size" in found.mean
            },
            "logit,\nsequential": sequential["logit_change"],
            "logit,\nrandom": found.by_layer("logit_change"),
            "position\nread": self.probe.accuracy,
            "std\n(folds)": self.probe.std,
        }
        table.add_column("layer", justify="right")
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True)
        for layer in range(self.num_layers):
            table.add_row(str(layer), *(f"{values[layer]:.3f}" for values in columns.values()))
        table.add_section()
        table.add_row("mean", *(f"{np.mean(values):.3f}" for values in columns.values()))
        return table

    def plot(self, class_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Its pictures by name, which a notebook shows. `report.plot().save(folder)` writes them.

        Args:
            class_names: Names of the classes for the attention maps, which show numbers otherwise.
        """
        return super().plot(class_names=class_names, **kwargs)

    def _summary(self) -> str:
        away = np.mean(self.contributions.away_from_home())
        read = np.mean(self.probe.accuracy)
        return (
            f"layers add {away:.2f} times as much away from their positions, the probe reads {read:.2f} of positions"
        )

    def __str__(self) -> str:
        similarity = self.similarity
        return render(self.table()) + (
            f"CKA between outputs in different orders: {similarity.same_both:.4f} of one layer at one position, "
            f"{similarity.same_layer:.4f} of one layer at two positions, {similarity.same_position:.4f} of two layers "
            f"at one position, {similarity.neither:.4f} of two layers at two positions\n"
        )


def _json_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json_values(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        return _json_values(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_json_values(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _arrays(values: dict) -> dict:
    return {name: value if name in _LISTS else _array(value) for name, value in values.items()}


def _array(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _array(item) for name, item in value.items()}
    return np.asarray(value) if isinstance(value, list) else value
