# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What the parts of [`LayerShuffleTrainer`] know of the whole. It is for type checkers: nothing of it runs."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, Trainer

    from .nonfinite import NonFiniteWatch
    from .order_agreement import TeacherAnswer

    class TrainerPart(Trainer):
        teacher_model: PreTrainedModel | None
        teacher_answer: TeacherAnswer
        _base_precision: torch.dtype | None
        _watch: NonFiniteWatch
        # transformers sets these to None first, from which a type checker would conclude that they stay so
        hub_model_id: Any
        push_in_progress: Any

        def _argument(self, name: str) -> Any:
            raise NotImplementedError

        def _config(self, name: str, default: Any = None) -> Any:
            raise NotImplementedError

        def _config_of_model(self) -> Any:
            raise NotImplementedError

        def _chooses_one_class(self, batches: Any = ()) -> bool:
            raise NotImplementedError

        def _prepare_for_training(self, *args: Any) -> Any:
            raise NotImplementedError

        def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

        def _reads_at_once(self) -> bool:
            raise NotImplementedError

        def _stop_if_nonfinite(self) -> None:
            raise NotImplementedError

else:
    TrainerPart = object
