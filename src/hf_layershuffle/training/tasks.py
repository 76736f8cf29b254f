# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a training session does in its own way for images and for texts."""

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, cast

from datasets import ClassLabel, DatasetDict
from transformers import PreTrainedModel

from ..checkpoints.checks import check_model_files, explained_reading
from ..checkpoints.identity import stored_weights_digest
from ..checkpoints.loading import classes_of
from ..checkpoints.tokenizers import takes_texts
from ..data.class_labels import quoted
from ..data.datasets import typical_image_size
from ..data.split_digest import split_digest
from .data_building import build_datasets, load_splits
from .distillation import check_teacher
from .model_building import (
    Teacher,
    build_model,
    check_same_pixels,
    checkpoint_class_names,
    load_teacher,
    stored_config,
)
from .script_arguments import DataArguments, ModelArguments, ScriptTrainingArguments
from .text_arguments import TextDataArguments, TextModelArguments, TextTrainingArguments
from .text_data_building import build_text_datasets, load_text_splits
from .text_model_building import TextTeacher, build_text_model, load_text_teacher


logger = logging.getLogger(__name__)


class Task:
    """Loads the data and the teacher of a session, and builds its models.

    Args:
        model_args, data_args: The arguments of the session.

    Attributes:
        splits: The labelled splits "train" and "test".
        teacher: The teacher, if there is one.

    Raises:
        `ValueError`, `OSError`: for what a user can mend.
    """

    name: ClassVar[str]
    noun: ClassVar[str]
    argument_classes: ClassVar[tuple[type, type, type]]
    splits: DatasetDict
    teacher: Teacher

    def __init__(self, model_args: ModelArguments, data_args: DataArguments):
        self.model_args = model_args
        self.data_args = data_args
        self._check_checkpoint()
        self._load()
        self._compare_classes()

    def _check_checkpoint(self) -> None:
        """Refuses a checkpoint of the other task before anything else is read."""
        name = self.model_args.model_name_or_path
        if name is None:
            return
        what = f"'{name}'"
        check_model_files(name)
        with explained_reading(what):
            model_type = str(stored_config(self.model_args).get("model_type"))
        _, model_class = classes_of(model_type, what)
        other = "texts" if takes_texts(cast(Any, model_class.config_class)) else "images"
        if other != self.noun:
            raise ValueError(
                f"{what} is a model of type '{model_type}', which takes {other}; train it with --task "
                f"{other.removesuffix('s')}-classification, or choose a model of {self.noun}."
            )

    def _load(self) -> None:
        raise NotImplementedError

    def _compare_classes(self) -> None:
        """Says that the dataset's classes replace those of the checkpoint; refuses it where they are not as many."""
        name, dataset = self.model_args.model_name_or_path, self.data_args.dataset_name
        theirs = checkpoint_class_names(self.model_args)
        saved_as = stored_config(self.model_args).get("architectures") or [] if theirs is not None else []
        if not any("Classification" in each for each in saved_as):
            return  # an encoder alone, whose classifier is new
        if theirs is None or set(theirs) == set(self.class_names):
            return
        if len(theirs) == len(self.class_names):
            ours, replaced = quoted(self.class_names, 5), quoted(theirs, 5)
            logger.warning("The classes of '%s' (%s) replace those of '%s' (%s).", dataset, ours, name, replaced)
        elif not self.model_args.ignore_mismatched_sizes:
            raise ValueError(
                f"'{name}' has {len(theirs)} classes and dataset '{dataset}' has {len(self.class_names)}; choose "
                "another dataset by --dataset_name, or add --ignore_mismatched_sizes to start a new classifier."
            )

    def _numbering(self) -> tuple[list[str] | None, bool]:
        """Names of classes in whose order the dataset is numbered, if it has the same ones.

        They are the checkpoint's, or else the teacher's. The second is whether integers without names may be others.
        """
        names = checkpoint_class_names(self.model_args)
        if names is None and self.teacher.model is not None:
            id2label = cast(dict[int, str], self.teacher.model.config.id2label)
            return [id2label[index] for index in sorted(id2label)], True
        return names, self.model_args.ignore_mismatched_sizes

    @cached_property
    def digests(self) -> dict[str, str | None]:
        """What tells the weights that training starts from, and the examples (of a stream the first), from others."""
        start = self.model_args.model_name_or_path
        weights = stored_weights_digest(start) if start else None
        return {"model_weights": weights, "training_data": split_digest(self.splits["train"])}

    @property
    def class_names(self) -> list[str]:
        return cast(ClassLabel, self.splits["train"].features["label"]).names

    def build_model(self, flags: dict) -> tuple[PreTrainedModel, Any]:
        """The model with these flags, and what makes its inputs.

        Args:
            flags: As from [`layershuffle_flags`].
        """
        raise NotImplementedError

    def check_teacher(self, model: PreTrainedModel, processing_class: Any) -> None:
        """Raises a `ValueError` unless the teacher can teach this model."""
        check_teacher(cast(PreTrainedModel, self.teacher.model), model)

    def build_datasets(self, model: PreTrainedModel, processing_class: Any, seed: int) -> tuple[Any, Any]:
        """The inputs to train on and to evaluate on, as the model takes them."""
        raise NotImplementedError


class ImageClassification(Task):
    name = "image-classification"
    noun = "images"
    argument_classes = (ModelArguments, DataArguments, ScriptTrainingArguments)

    def _load(self) -> None:
        self.teacher = load_teacher(self.model_args)
        self.splits = load_splits(self.data_args, *self._numbering())
        self._image_size = typical_image_size(self.splits["train"])

    def build_model(self, flags: dict) -> tuple[PreTrainedModel, Any]:
        return build_model(self.model_args, flags, self.class_names, self._image_size, self.teacher.normalization)

    def check_teacher(self, model: PreTrainedModel, processing_class: Any) -> None:
        super().check_teacher(model, processing_class)
        check_same_pixels(processing_class, self.teacher.normalization, self.model_args)

    def build_datasets(self, model: PreTrainedModel, processing_class: Any, seed: int) -> tuple[Any, Any]:
        return build_datasets(self.data_args, self.splits, model, processing_class, seed)


class TextClassification(Task):
    name = "text-classification"
    noun = "texts"
    argument_classes = (TextModelArguments, TextDataArguments, TextTrainingArguments)
    model_args: TextModelArguments
    data_args: TextDataArguments
    teacher: TextTeacher

    def _load(self) -> None:
        self.teacher = load_text_teacher(self.model_args)
        self.splits = load_text_splits(self.data_args, *self._numbering())

    def build_model(self, flags: dict) -> tuple[PreTrainedModel, Any]:
        return build_text_model(self.model_args, flags, self.class_names, self.splits["train"], self.teacher)

    def build_datasets(self, model: PreTrainedModel, processing_class: Any, seed: int) -> tuple[Any, Any]:
        return build_text_datasets(self.data_args, self.splits, model, processing_class, seed)


TASKS: Mapping[str, type[Task]] = {task.name: task for task in (ImageClassification, TextClassification)}
