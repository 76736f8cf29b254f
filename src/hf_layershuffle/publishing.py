# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Model cards."""

import os
from importlib import metadata
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData


CARD_MARKER = (
    "<!-- Written by hf-layershuffle. Remove this line to keep your own text: a card without it is left alone. -->"
)
_ARGUMENTS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "label_smoothing_factor",
    "bf16",
    "seed",
)
_ROWS = {
    "eval_accuracy": "as configured",
    "eval_arbitrary_accuracy": "arbitrary, mean",
    "eval_arbitrary_accuracy_std": "arbitrary, standard deviation",
    "eval_arbitrary_accuracy_min": "arbitrary, worst",
}


def write_model_card(
    folder,
    config,
    *,
    dataset: str | None = None,
    metrics: dict | None = None,
    training_arguments: dict | None = None,
    base_model: str | None = None,
    tags=(),
    repo_id: str | None = None,
) -> bool:
    """Writes `README.md` with the Hub's metadata into `folder`.

    Args:
        folder (`str` or `os.PathLike`): Of the model.
        config: The model's configuration.
        dataset (`str`, *optional*): Name of the dataset of `metrics`.
        metrics (`dict[str, float]`, *optional*): `eval_accuracy` and the like, fractions in [0, 1]; `num_orders`, the
            number of arbitrary orders.
        training_arguments (`dict`, *optional*): As from `TrainingArguments.to_dict`; the ones that matter are listed.
        base_model (`str`, *optional*): Hub id, or folder, of the model that was fine-tuned.
        tags (`Iterable[str]`): Further tags.
        repo_id (`str`, *optional*): Where the model will be; defaults to the folder's name.

    Returns:
        `bool`: False where a card without our marker line is there: somebody's own text, which is left alone.
    """
    path, metrics = Path(folder) / "README.md", metrics or {}
    if path.exists() and CARD_MARKER not in path.read_text(encoding="utf-8"):
        return False
    model_name = (repo_id or Path(folder).resolve().name).split("/")[-1]
    orders = f" ({metrics['num_orders']} orders)" if "num_orders" in metrics else ""
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset or "unknown",
            dataset_name=dataset or "unknown",
            metric_type="accuracy",
            metric_name=f"Accuracy, execution order: {_ROWS[name]}{orders if 'arbitrary' in name else ''}",
            metric_value=round(metrics[name], 4),
        )
        for name in ("eval_accuracy", "eval_arbitrary_accuracy")
        if name in metrics
    ]
    card = ModelCard.from_template(
        ModelCardData(
            model_name=model_name,
            library_name="transformers",
            pipeline_tag="image-classification",
            tags=sorted({"layershuffle", "vision-transformer", *tags}),
            # The Hub refuses a base model that is not one of its own
            base_model=None if base_model is None or Path(base_model).exists() else base_model,
            eval_results=results or None,
        ),
        template_path=str(Path(__file__).with_name("model_card_template.md")),
        model_name=model_name,
        config=config,
        method=_describe_training(config),
        dataset=dataset,
        rows=[
            (label + (orders if "arbitrary" in name else ""), f"{metrics[name]:.4f}")
            for name, label in _ROWS.items()
            if name in metrics
        ],
        repo_id=repo_id or f"your-name/{model_name}",
        reversed_order=list(reversed(range(config.num_hidden_layers))),
        base_model=base_model,
        arguments=[(name, training_arguments[name]) for name in _ARGUMENTS if _is_set(name, training_arguments or {})],
        versions=", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers")),
        marker=CARD_MARKER,
    )
    partial = path.with_name(".README.md.partial")
    partial.write_text(str(card), encoding="utf-8")
    os.replace(partial, path)
    return True


def _describe_training(config) -> str:
    """Such as "with arbitrary execution orders and a depth embedding"."""
    if config.shuffle_mode == "window":
        method = f"with execution orders that move each layer by at most {config.shuffle_window} positions"
    else:
        method = {"none": "in sequential order", "arbitrary": "with arbitrary execution orders"}[config.shuffle_mode]
    extras = ["a depth embedding"] if config.depth_embedding else []
    extras += ["a position predictor"] if config.position_predictor else []
    extras += [f"LayerDrop {config.layerdrop}"] if config.layerdrop else []
    return " and ".join([method, *extras])


def _is_set(name: str, arguments: dict) -> bool:
    return name in arguments and not (name == "max_steps" and arguments[name] <= 0)
