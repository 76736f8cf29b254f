# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Chooses a program for each example, by a small network that was trained on which programs are right.

CoLa (arXiv 2507.07996) shows that many inputs have shorter programs that are right, and PoLar (arXiv 2606.06574)
trains a predictor of them for a frozen model. Here all programs begin with the same layers, and the predictor sees
what these give, so that nothing is computed twice but the embedding.
"""

import json
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.checks import check_finite, explained_reading
from ..checkpoints.identity import skipped_mlps_of, weights_digest
from ..checkpoints.record_checks import PredictorRecord, check_record
from ..checkpoints.tensor_files import open_safetensors
from ..common.checks import check_number
from ..common.files import replaced_file
from ..common.yaml_files import parse_json
from ..layerwise import Inputs, LayerwiseClassifier, as_layerwise
from .program_answers import checked_programs, features_of, run_layers, shared_beginning


FILE_NAME = "program_predictor.safetensors"
_METADATA = "program_predictor"
_FORMAT = 1


@dataclass(frozen=True)
class PredictedAnswers:
    """What a model answers if each example runs through the program chosen for it.

    Args:
        logits: Of shape `(batch_size, num_labels)`.
        num_layers_run: Layers that each example ran through: int64 of shape `(batch_size,)`.
        program_indices: The program of each example: int64 of shape `(batch_size,)`.
    """

    logits: torch.Tensor
    num_layers_run: torch.Tensor
    program_indices: torch.Tensor


class ProgramPredictor(nn.Module):
    """Predicts for each program of a set whether it is right for an example, and runs the one that is chosen.

    [`train_program_predictor`] makes one. It belongs to the weights of one model.

    Args:
        programs: Two or more different execution orders of the model.
        num_features: Size of [`features_of`].
        hidden_size: Size of the hidden layer.
        num_layers: Layers of the model.
        weights: Digest of the model's weights ([`weights_digest`]).
        skipped_mlps: Positions at which the model runs without its MLP. None for none.

    Raises:
        `ValueError`: if the programs are not valid.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(
        self,
        programs: Sequence[Sequence[int]],
        num_features: int,
        hidden_size: int,
        num_layers: int,
        weights: str,
        skipped_mlps: list[int] | None = None,
    ):
        super().__init__()
        self.programs = checked_programs(programs, num_layers)
        self.settings = {
            "programs": [list(program) for program in self.programs],
            "num_features": num_features,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "weights": weights,
            "skipped_mlps": skipped_mlps,
        }
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("deviation", torch.ones(num_features))
        self.hidden = nn.Linear(num_features, hidden_size)
        self.output = nn.Linear(hidden_size, len(self.programs))
        self._checked: weakref.ref | None = None  # the model that was found to be the right one

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of each program being right: float32 of shape `(batch_size, programs)`."""
        scaled = (features - self.mean) / self.deviation
        return self.output(nn.functional.gelu(self.hidden(scaled)))

    @property
    def num_layers_run(self) -> torch.Tensor:
        """Layers of each program: int64 of shape `(programs,)`."""
        return torch.tensor([len(program) for program in self.programs], device=self.mean.device)

    def choose(self, features: torch.Tensor, cost_weight: float) -> torch.Tensor:
        """The program of each example: the one whose chance to be right, less its cost, is highest.

        Args:
            features: From [`features_of`], of shape `(batch_size, num_features)`.
            cost_weight: What all layers of the longest program cost, in units of accuracy, at least 0: with 0.1, an
                example runs through half of them more only if that makes it 5 points likelier to be right.

        Returns:
            Indices of programs: int64 of shape `(batch_size,)`.

        Raises:
            `ValueError`: if the weight is out of range.
        """
        check_number("cost_weight", cost_weight, 0, 1e6)
        depths = self.num_layers_run
        return (self(features).sigmoid() - cost_weight * depths / depths.max()).argmax(-1)

    @torch.no_grad()
    def run(
        self, model: PreTrainedModel | LayerwiseClassifier, inputs: Inputs, cost_weight: float = 0.05
    ) -> PredictedAnswers:
        """Runs each example through the program chosen for it. Examples with the same program run together.

        Args:
            model: The model that the predictor was trained for, in evaluation mode.
            inputs: Its main input, or all inputs by name, without labels. Each has the examples first.
            cost_weight: As for `choose`.

        Raises:
            `ValueError`: if the model is another one, or in training mode.
        """
        parts = as_layerwise(model)
        self.check_model(model if isinstance(model, PreTrainedModel) else parts.model)
        if parts.model.training:
            raise ValueError("Programs are chosen in evaluation only, and the model is in training mode: `eval()`.")
        by_name = {parts.model.main_input_name: inputs} if isinstance(inputs, torch.Tensor) else dict(inputs)
        beginning = shared_beginning(self.programs)
        states = run_layers(parts, parts.embed(by_name), beginning)
        features = features_of(parts, states).to(self.mean.device)
        chosen = self.choose(features, cost_weight).to(states.device)
        logits: Any = None
        for index in chosen.unique().tolist():
            rows = (chosen == index).nonzero()[:, 0]
            parts.embed(_rows_of(by_name, rows))  # so that the layers get these examples' masks
            after = run_layers(parts, states[rows], self.programs[index][len(beginning) :], start=len(beginning))
            answered = parts.classify(after)
            logits = answered.new_empty(len(chosen), answered.shape[-1]) if logits is None else logits
            logits[rows] = answered
        return PredictedAnswers(logits, self.num_layers_run.to(chosen.device)[chosen], chosen)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": None}  # a weak reference cannot be pickled

    def check_model(self, model: PreTrainedModel) -> None:
        """Checks that a model is the one that the predictor was trained for. Its weights are compared once.

        Raises:
            `ValueError`: if it has another depth or other weights, or leaves out other MLPs.
        """
        advice = "Train one for this model by `train_program_predictor`."
        skipped = skipped_mlps_of(model.config)
        if skipped != self.settings["skipped_mlps"]:
            raise ValueError(
                f"The predictor is of a model with `skipped_mlps` {self.settings['skipped_mlps']}, and this one has "
                f"{skipped}. {advice}"
            )
        if self._checked is not None and self._checked() is model:
            return
        depth, weights = len(as_layerwise(model).layers), weights_digest(model)
        if depth != self.settings["num_layers"]:
            raise ValueError(
                f"The predictor is of a model of {self.settings['num_layers']} layers, and this one has {depth}. "
                + advice
            )
        if weights != self.settings["weights"]:
            raise ValueError(
                f"The predictor is of a model whose weights have the digest {self.settings['weights']}, and those of "
                f"this one have {weights}. {advice} In another dtype the digest is another one, too."
            )
        self._checked = weakref.ref(model)

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Writes `program_predictor.safetensors` into `folder`, completely or not at all; returns its path.

        The programs and sizes are in its header, as JSON. The folder may be the model's.
        """
        path = Path(folder) / FILE_NAME
        header = json.dumps({"format": _FORMAT, **self.settings})
        tensors = {name: tensor.detach().cpu().float().contiguous() for name, tensor in self.state_dict().items()}
        with replaced_file(path) as partial:
            save_file(tensors, partial, metadata={_METADATA: header})
        return path

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "ProgramPredictor":
        """Reads a predictor from the folder or the file that `save_pretrained` wrote.

        Raises:
            `OSError`: if there is none, or it is truncated.
            `ValueError`: if the file is no such predictor.
        """
        path = Path(folder) / FILE_NAME if Path(folder).is_dir() else Path(folder)
        if not path.is_file():
            raise OSError(f"There is no '{path}'; `ProgramPredictor.save_pretrained` writes one.")
        with explained_reading(f"'{path}'"), open_safetensors(str(folder), path) as file:
            header = (file.metadata() or {}).get(_METADATA)
            settings = {} if header is None else parse_json(header, f"The header of '{path}'")
            if not isinstance(settings, dict) or settings.get("format") != _FORMAT:
                raise ValueError(
                    f"'{path}' is no program predictor of format {_FORMAT}; write one by "
                    "`ProgramPredictor.save_pretrained` of this version."
                )
            check_record(settings, PredictorRecord, f"The header of '{path}'")
            try:
                return cls._read(file, {name: value for name, value in settings.items() if name != "format"})
            except ValueError as error:
                raise ValueError(f"'{path}' does not hold what its header says: {str(error)[:300]}") from error

    @classmethod
    def _read(cls, file: Any, settings: dict[str, Any]) -> "ProgramPredictor":
        features, hidden, count = settings["num_features"], settings["hidden_size"], len(settings["programs"])
        shapes: dict[str, list[int]] = {
            "mean": [features],
            "deviation": [features],
            "hidden.weight": [hidden, features],
            "hidden.bias": [hidden],
            "output.weight": [count, hidden],
            "output.bias": [count],
        }
        slices = {name: file.get_slice(name) for name in file.keys()}
        found = {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}
        # Nothing is made before every size is that of numbers which are there, so no header asks for more memory
        for name in sorted(shapes.keys() | found.keys()):
            wanted = ("F32", shapes[name]) if name in shapes else None
            if found.get(name) != wanted:
                raise ValueError(f"`{name}` is {_described(found.get(name))}, and should be {_described(wanted)}.")
        predictor = cls(**settings)
        tensors = {name: file.get_tensor(name) for name in shapes}
        check_finite("It", tensors.items())
        if not (tensors["deviation"] > 0).all():
            raise ValueError("`deviation` holds numbers that are not above 0, and features are divided by it.")
        predictor.load_state_dict(tensors)
        return predictor.eval()


def _described(tensor: tuple[str, list[int]] | None) -> str:
    return "not there" if tensor is None else f"{tensor[0]} of shape {tuple(tensor[1])}"


def _rows_of(inputs: Mapping[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    return {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
