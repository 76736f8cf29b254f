# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The upper bound of choosing a program for each example, and how much of it chance explains.

An oracle knows the labels, and takes the cheapest program that is right. Several programs that answer differently are
more often right than one, whatever the label is. So its accuracy alone says little: the control is the same oracle
with labels of other examples.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .program_answers import Program, ProgramAnswers


@dataclass(frozen=True)
class ProgramOracle:
    """What knowing the labels would give, and what the same rule gives with labels that say nothing of the example.

    Args:
        num_programs: Programs to choose from.
        num_examples: Labelled examples.
        accuracy: Fraction of examples for which a program is right.
        mean_num_layers: Layers run on average: of the cheapest right program, or of the cheapest of all where none is
            right.
        accuracy_with_shuffled_labels: The expected accuracy of the oracle if the labels were shuffled.
        base_program: The program that the others are compared with.
        base_accuracy: Its accuracy.
        base_accuracy_with_shuffled_labels: Its expected accuracy if the labels were shuffled.
        num_wrong: Examples that it gets wrong.
        repaired: Fraction of these for which another program is right; None if there are none.
        repaired_by_chance: The fraction expected if each of these had the label of another of them: that many are
            "repaired" because the programs answer differently, whatever the label.
        repaired_by_confusion: The same with the label of another one to which the base program answers the same. It
            also counts that programs answer with classes that are easily confused.
    """

    num_programs: int
    num_examples: int
    accuracy: float
    mean_num_layers: float
    accuracy_with_shuffled_labels: float
    base_program: Program
    base_accuracy: float
    base_accuracy_with_shuffled_labels: float
    num_wrong: int
    repaired: float | None
    repaired_by_chance: float | None
    repaired_by_confusion: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self) | {"base_program": list(self.base_program)}


def program_oracle(answers: ProgramAnswers, base_program: Program | list[int] | None = None) -> ProgramOracle:
    """The oracle of some programs beside its control.

    Args:
        answers: From [`answers_of_programs`].
        base_program: One of the programs. Defaults to the longest, and of several of this length the first.

    Raises:
        `ValueError`: if it is none of them.

    ```python
    >>> answers = ls.answers_of_programs(model, data, ls.programs_by_length(12), processing_class=processor)
    >>> print(ls.program_oracle(answers))
    ```
    """
    depths = answers.num_layers_run
    given = answers.programs[int(depths.argmax())] if base_program is None else tuple(base_program)
    if given not in answers.programs:
        raise ValueError(f"`base_program` is {list(given)}; it must be one of the programs that were run.")
    base = answers.answers[:, answers.programs.index(given)]
    is_right = answers.is_right
    costs = np.where(is_right, depths, depths.max() + 1).min(1)
    wrong = np.flatnonzero(base != answers.labels)
    found = _matches(answers)
    classes = np.bincount(answers.labels, minlength=found.shape[1]) / len(base)
    by_chance = _chances(found, answers.labels, base, wrong, lambda _: wrong)
    same = {answer: wrong[base[wrong] == answer] for answer in np.unique(base[wrong])}
    by_confusion = _chances(found, answers.labels, base, wrong, lambda index: same[base[index]])
    return ProgramOracle(
        num_programs=len(depths),
        num_examples=len(base),
        accuracy=float(is_right.any(1).mean()),
        mean_num_layers=float(np.where(is_right.any(1), costs, depths.min()).mean()),
        accuracy_with_shuffled_labels=float((found @ classes).mean()),
        base_program=given,
        base_accuracy=float((base == answers.labels).mean()),
        base_accuracy_with_shuffled_labels=float(np.where(base >= 0, classes[base], 0.0).mean()),
        num_wrong=len(wrong),
        repaired=float(is_right[wrong].any(1).mean()) if len(wrong) else None,
        repaired_by_chance=by_chance,
        repaired_by_confusion=by_confusion,
    )


def _matches(answers: ProgramAnswers) -> np.ndarray:
    """Whether any program answers a class to an example: booleans of shape `(num_examples, classes)`."""
    num_classes = max(answers.labels.max(), answers.answers.max()) + 1
    found = np.zeros((len(answers.labels), num_classes), dtype=bool)
    rows, columns = np.nonzero(answers.answers >= 0)
    found[rows, answers.answers[rows, columns]] = True
    return found


def _chances(
    found: np.ndarray, labels: np.ndarray, base: np.ndarray, wrong: np.ndarray, others: Callable[[int], np.ndarray]
) -> float | None:
    """Mean chance that a program answers the label of another example, one that the base program did not answer.

    Args:
        others: Gives the examples, by their numbers, whose labels an example may get. It may be among them itself.
    """
    chances = []
    for index in wrong:
        from_others = others(index)
        from_others = from_others[(from_others != index) & (labels[from_others] != base[index])]
        if len(from_others):
            chances.append(found[index, labels[from_others]].mean())
    return float(np.mean(chances)) if chances else None
