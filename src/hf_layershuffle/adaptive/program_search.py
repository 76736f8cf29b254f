# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The best fixed program of k layers for a model and a dataset: which layers, in which order, and which of them twice.

Looking for another sequence of a trained model's layers is the idea of CoLa (arXiv 2507.07996), which searches by
Monte Carlo tree search for each example. Here one program is searched for all, as a device needs it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..checkpoints.processing_classes import ProcessingClass, chosen_processing_class
from ..common.checks import check_integers
from ..common.progress import silenceable
from ..compression.pruning import search_layers
from ..evaluation.order_plans import evenly_spaced_layers
from ..evaluation.robustness import score_execution_orders
from ..layerwise import LayerwiseClassifier, as_layerwise, batches_for
from ..models.early_exit import all_layers


Program = tuple[int, ...]


@silenceable
def search_program(
    model: PreTrainedModel | LayerwiseClassifier,
    data: Dataset | DataLoader | Sequence,
    num_layers_run: int,
    *,
    beam_width: int = 8,
    allow_repeats: bool = True,
    num_refinements: int = 3,
    processing_class: ProcessingClass | None = None,
    image_processor: ProcessingClass | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> list[int]:
    """Searches the execution order of `num_layers_run` layers with the least loss on a calibration set.

    A beam search first: the best programs of one layer, each with any layer after it, and so on. Then refinement: the
    best ones with one layer replaced or two neighbours exchanged, as long as that lowers the loss. It also starts from
    the layers that [`search_layers`] keeps and from evenly spaced ones, so on the calibration set it is never worse
    than these. Each round is one pass over the data, in which programs that begin alike share their beginning.

    Layers run with their MLPs: the configuration's `skipped_mlps` are positions of another program, and are to be
    chosen anew for this one.

    Args:
        model: A classifier of images or texts.
        data: The calibration set. Take data other than that on which the program will be judged: the best of many
            programs looks better there than it is.
        num_layers_run: Layers of the program, from 1 to the model's number.
        beam_width: Programs kept after each round, at least 1.
        allow_repeats: Whether a layer may run more than once.
        num_refinements: Rounds of refinement at most, at least 0.
        processing_class, image_processor: As for [`score_execution_orders`].
        progress: Whether to show a progress bar.
        kwargs: `batch_size`, `max_samples` and `seed`, as for [`score_execution_orders`].

    Returns:
        Layer indices, for `execution_order` of a call or a configuration.

    Raises:
        `ValueError`: if a number is out of range.

    ```python
    >>> model.config.execution_order = ls.search_program(model, held_out, 6, processing_class=processor)
    ```
    """
    check_integers(
        num_layers_run=(num_layers_run, 1), beam_width=(beam_width, 1), num_refinements=(num_refinements, 0)
    )
    parts = as_layerwise(model)
    depth = parts.num_layers
    if num_layers_run > depth:
        raise ValueError(f"`num_layers_run` is {num_layers_run}; it must be at most {depth}, the model's layers.")
    # One loader for all rounds, which decodes the images once
    loader = batches_for(parts, data, chosen_processing_class(processing_class, image_processor), **kwargs)
    known: dict[Program, float] = {}

    def best_of(programs: Iterable[Program]) -> list[Program]:
        candidates = list(dict.fromkeys(programs))
        new = [program for program in candidates if program not in known]
        if new:
            with all_layers(parts.model, with_mlps=True):
                scores = score_execution_orders(parts, loader, new, progress=False)
            # A loss that is not a number is the worst one
            known.update({p: s.loss if math.isfinite(s.loss) else math.inf for p, s in zip(new, scores)})
        return sorted(candidates, key=known.__getitem__)[:beam_width]

    rounds = num_layers_run + 1 + num_refinements
    with tqdm(total=rounds, desc="Searching a program", unit="round", disable=not progress) as bar:
        beam: list[Program] = [()]
        for _ in range(num_layers_run):
            beam = best_of(_extended(beam, depth, allow_repeats))
            bar.update()
        kept = search_layers(parts.model, loader, num_layers_run, progress=False)
        beam = best_of([*beam, tuple(kept), tuple(evenly_spaced_layers(depth, num_layers_run))])
        bar.update()
        _refine(beam, best_of, num_refinements, depth, allow_repeats, bar.update)
    whole = {program: loss for program, loss in known.items() if len(program) == num_layers_run}
    return list(min(whole.items(), key=itemgetter(1))[0])


def _extended(programs: Iterable[Program], depth: int, allow_repeats: bool) -> list[Program]:
    return [(*each, layer) for each in programs for layer in range(depth) if allow_repeats or layer not in each]


def _refine(
    beam: list[Program],
    best_of: Callable[[Iterable[Program]], list[Program]],
    num_rounds: int,
    depth: int,
    allow_repeats: bool,
    done: Callable[[], object],
) -> None:
    for _ in range(num_rounds):
        better = best_of([*beam, *(other for each in beam for other in _neighbours(each, depth, allow_repeats))])
        done()
        if better == beam:
            return
        beam = better


def _neighbours(program: Program, depth: int, allow_repeats: bool) -> Iterable[Program]:
    """Programs that differ in one layer, or in the order of two neighbouring ones."""
    for position, old in enumerate(program):
        for layer in range(depth):
            if layer != old and (allow_repeats or layer not in program):
                yield (*program[:position], layer, *program[position + 1 :])
        if position + 1 < len(program) and program[position + 1] != old:
            yield (*program[:position], program[position + 1], old, *program[position + 2 :])
