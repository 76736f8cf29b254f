# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Many random merges of some models, evaluated in memory: none of them is built or written (arXiv 2407.04513)."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, ClassVar, cast

import datasets
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from ..checkpoints.checks import check_finite
from ..checkpoints.processing_classes import ProcessingClass, chosen_processing_class
from ..checkpoints.tokenizers import input_record
from ..common.environment import describe_environment
from ..common.paths import public_name
from ..common.progress import silenceable
from ..common.reports import Report
from ..evaluation.robustness import score_execution_orders
from ..evaluation.statistics import OrderScore, json_values, summarize, with_nan
from ..layerwise import LayerwiseClassifier, batches_for, check_evaluable
from ..models.configuration_layershuffle import lists_by_layer
from ..models.early_exit import all_layers
from .merged_model import COMPARED_FIELDS, check_configs_agree
from .random_layers import draw_layers


if TYPE_CHECKING:
    from rich.table import Table

REPORT_FILE = "random_merges.json"


class MergePool(LayerwiseClassifier):
    """The layers of several models under one model's embeddings, final LayerNorm and classifier.

    So a merge is an execution order over the pool.

    Args:
        models: Classifiers of images or texts by name, all of one family.
        base: Name of the model that gives everything but the layers. Defaults to the first.

    Raises:
        `ValueError`: if there is no model, or they differ where they must agree.
    """

    def __init__(self, models: Mapping[str, PreTrainedModel], base: str | None = None):
        if not models:
            raise ValueError("There are no models to merge; give at least one.")
        parts = {name: LayerwiseClassifier(model) for name, model in models.items()}
        if base is not None and base not in parts:
            raise ValueError(f"`base` is '{base}'; it must be one of {', '.join(map(repr, parts))}.")
        # Position heads play no part in what is measured here
        fields = [field for field in COMPARED_FIELDS if field != "position_predictor"]
        check_configs_agree({name: part.model.config for name, part in parts.items()}, fields)
        base_part = parts[base or next(iter(parts))]
        super().__init__(base_part.model)
        self.parts = parts
        self._layers = [layer for part in parts.values() for layer in part.layers]
        self._places = [index for part in parts.values() for index in range(part.num_layers)]
        self._kinds = [kind for part in parts.values() for kind in _kinds_of(part)]
        self._kinds_of_base = _kinds_of(base_part)
        missing = set(self._kinds) - set(self._kinds_of_base)
        if missing:
            raise ValueError(
                f"The base has no layer of kind '{missing.pop()}' (`layer_types`), as another model has; merge models "
                "whose layers are of the same kinds."
            )
        self.num_layers = len(self._layers)

    @property
    def layers(self) -> list[nn.Module]:
        return self._layers

    def _call_of(self, index: int) -> tuple[tuple, dict]:
        # As the base calls its own layer of the same index, or another one of the same kind
        place = min(self._places[index], len(self._calls) - 1)
        if self._kinds_of_base[place] != self._kinds[index]:
            place = self._kinds_of_base.index(self._kinds[index])
        return self._calls[place]

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self.parts.values():
                stack.enter_context(part.evaluation_mode())
            yield

    def execution_order(self, layers: Sequence[tuple[str, int]]) -> list[int]:
        """Indices in the pool of layers that are given as source and layer."""
        starts = {}
        start = 0
        for name, part in self.parts.items():
            starts[name] = start
            start += part.num_layers
        return [starts[source] + layer for source, layer in layers]


def _kinds_of(part: LayerwiseClassifier) -> Sequence[str | None]:
    """The kind of each layer; None where the configuration lists none."""
    return lists_by_layer(part.model.config).get("layer_types") or [None] * part.num_layers


@dataclass(frozen=True)
class MergeScore:
    """How well a merge does.

    `MergePlan.random` with the same sources and `seed` is the plan of this merge.

    Args:
        seed: Seed of the random draw.
        layers: Name of the source and index of its layer at each position.
        accuracy: Fraction in [0, 1] of images classified correctly.
        loss: Mean cross-entropy, in nats an image.
    """

    seed: int
    layers: list[list]
    accuracy: float
    loss: float


@dataclass(frozen=True, repr=False)
class RandomMergeReport(Report):
    """Accuracy of random merges beside that of their sources.

    Args:
        name, dataset: Names of the merges and of the evaluation set, for people.
        num_images: Number of images evaluated.
        num_layers: Number of layers of each merge.
        seed: Seed of the first merge. Each further merge has the next number.
        any_layer, base: As in [`MergePlan.random`].
        sources: Path and revision of each source by name.
        source_scores: Score of each source as it is, in sequential order.
        merges: Score of each merge.
        environment: Versions, device, dtype, machine, date (ISO 8601, UTC).
    """

    file_name: ClassVar[str] = REPORT_FILE
    kind: ClassVar[str] = "a report of random merges"

    name: str
    dataset: str
    num_images: int
    num_layers: int
    seed: int
    any_layer: bool
    base: str
    sources: dict[str, dict]
    source_scores: dict[str, OrderScore]
    merges: list[MergeScore]
    environment: dict = field(default_factory=dict)
    inputs: str = "images"

    @property
    def noun(self) -> str:
        return self.inputs

    def accuracies(self) -> dict[str, list[float]]:
        """Accuracies of the sources and of the merges, by the row of the table and of the picture."""
        return {
            f"{self.name}: sources": [score.accuracy for score in self.source_scores.values()],
            f"{self.name}: random merges": [merge.accuracy for merge in self.merges],
        }

    @property
    def model(self) -> str:
        return self.name

    def table(self) -> "Table":
        """The report as a [`rich.table.Table`]; `print(report)` shows it too."""
        return random_merge_table([self])

    def _summary(self) -> str:
        merges = summarize([merge.accuracy for merge in self.merges])
        return (
            f"accuracy {merges.mean:.4f} ± {merges.std:.4f} of {len(self.merges)} merges of {len(self.sources)} models"
        )

    def to_dict(self) -> dict:
        """JSON types only; NaN and infinity as None."""
        values = asdict(self)
        if self.inputs == "images":  # as of all reports of earlier versions
            del values["inputs"]
        return json_values(values)

    @classmethod
    def from_dict(cls, values: dict) -> "RandomMergeReport":
        """Undoes [`to_dict`]."""
        scores = {name: OrderScore(**with_nan(score)) for name, score in values["source_scores"].items()}
        merges = [MergeScore(**with_nan(merge)) for merge in values["merges"]]
        return cls(**{**values, "source_scores": scores, "merges": merges})


@silenceable
def evaluate_random_merges(
    models: Mapping[str, PreTrainedModel],
    data: datasets.Dataset | Dataset | DataLoader | Sequence,
    *,
    num_merges: int = 100,
    seed: int = 0,
    num_layers: int | None = None,
    any_layer: bool = False,
    base: str | None = None,
    processing_class: ProcessingClass | None = None,
    image_processor: ProcessingClass | None = None,
    batch_size: int = 64,
    max_samples: int | None = None,
    name: str = "random merges",
    dataset_name: str = "unnamed",
    sources: Mapping[str, dict] | None = None,
    progress: bool = True,
) -> RandomMergeReport:
    """Accuracy of `num_merges` random merges and of the models themselves.

    Merges that begin with the same layers share the computation of their beginning.

    Args:
        models: Classifiers of images or texts by name, all of one family and on one device.
        data, processing_class, image_processor, batch_size, max_samples, progress: As for [`score_execution_orders`].
        num_merges: Number of merges, at least 1.
        seed, num_layers, any_layer, base: As for [`MergePlan.random`]. Merge i has the seed `seed + i`. `seed` also
            draws the images of `max_samples`.
        name, dataset_name, sources: As in [`RandomMergeReport`].

    Raises:
        `ValueError`: if the models do not fit together, or an argument is not valid.
    """
    if isinstance(num_merges, bool) or not isinstance(num_merges, int) or num_merges < 1:
        raise ValueError(f"`num_merges` is {num_merges!r}; it must be an integer of at least 1.")
    processing_class = chosen_processing_class(processing_class, image_processor)
    pool = MergePool(models, base)
    for model, part in pool.parts.items():
        check_finite(f"'{model}'", part.model.state_dict().items())
        check_evaluable(part.model.config, processing_class)
    base = base or next(iter(models))
    depths = {model: part.num_layers for model, part in pool.parts.items()}
    num_layers = depths[base] if num_layers is None else num_layers
    draws = [draw_layers(depths, seed + index, num_layers, any_layer) for index in range(num_merges)]
    loader = batches_for(pool, data, processing_class, batch_size=batch_size, max_samples=max_samples, seed=seed)

    source_scores = {}
    for model, part in pool.parts.items():
        order = list(range(part.num_layers))
        source_scores[model] = score_execution_orders(
            part, loader, [order], description=f"Evaluating {model}", progress=progress
        )[0]
    orders = [pool.execution_order(layers) for layers in draws]
    with all_layers(pool.model, with_mlps=True):  # what the base leaves out was chosen for its own layers
        scores = score_execution_orders(
            pool, loader, orders, description=f"Evaluating {num_merges} merges", progress=progress
        )
    merges = [
        MergeScore(seed + index, [list(layer) for layer in layers], score.accuracy, score.loss)
        for index, (layers, score) in enumerate(zip(draws, scores))
    ]
    return RandomMergeReport(
        name=name,
        dataset=dataset_name,
        num_images=len(cast(Sized, loader.dataset)),
        num_layers=num_layers,
        seed=seed,
        any_layer=any_layer,
        base=base,
        sources={model: _public((sources or {}).get(model, {})) for model in models},
        source_scores=source_scores,
        merges=merges,
        environment=describe_environment(pool.model),
        **input_record(pool.model.config),
    )


def _public(source: Mapping) -> dict:
    """Path and revision of a source, without where on this machine it lies."""
    return {**source, "path": public_name(source["path"])} if "path" in source else dict(source)


def random_merge_table(reports: Sequence[RandomMergeReport]) -> "Table":
    """Reports on the same dataset as one [`rich.table.Table`].

    Accuracies are fractions in [0, 1], with their population standard deviation over the models of each row.

    Raises:
        `ValueError`: if they are of different datasets.
    """
    from rich.table import Table
    from rich.text import Text

    datasets = {(report.dataset, report.num_images, report.noun) for report in reports}
    if len(datasets) != 1:
        found = ", ".join(f"{dataset} ({count} {noun})" for dataset, count, noun in sorted(datasets)) or "none"
        raise ValueError(f"Reports to compare must be of one and the same dataset; they are of: {found}.")
    dataset, num_images, noun = datasets.pop()
    table = Table(title=Text(f"Accuracy on {dataset} ({num_images:,} {noun})", style="table.title"))
    table.add_column("models")
    for column in ("number", "mean", "std", "min", "max", "95 % interval of the mean"):
        table.add_column(column, justify="right")
    for report in reports:
        for label, values in report.accuracies().items():
            numbers = summarize(values)
            cells = [f"{value:.4f}" for value in (numbers.mean, numbers.std, numbers.min, numbers.max)]
            table.add_row(Text(label), str(len(values)), *cells, f"{numbers.ci_low:.4f} – {numbers.ci_high:.4f}")
    return table
