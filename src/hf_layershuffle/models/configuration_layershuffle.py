# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""LayerShuffle configurations: a family's configuration plus what concerns the execution order, made on demand.

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from transformers import PreTrainedConfig

from .auto_classes import MODEL_TYPE_PREFIX
from .execution_order import EXECUTION_ORDERS, SHUFFLE_MODES, check_execution_order
from .exit_rule import EXIT_FIELDS, ExitRule, without_parts
from .layer_lists import TOWERS
from .mlp_skipping import check_against_order, check_positions


# Fields that list something of each layer, and move with the layers
BY_LAYER = """
    layer_types mlp_layer_types layers_block_type indexer_types attention_layers attention_window no_rope_layers
    layer_rope_theta""".split()
# A configuration's class is made of the mixin and the family's, which is the one that comes from transformers
if TYPE_CHECKING:
    _FamilyConfig = PreTrainedConfig
else:
    _FamilyConfig = object


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# For each field: whether a value is valid by itself, and what is allowed. What depends on several fields at once is in
# `LayerShuffleConfigMixin.check_layershuffle`.
_FIELD_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "shuffle_mode": (
        lambda v: isinstance(v, str) and v in SHUFFLE_MODES,
        f"one of {', '.join(map(repr, SHUFFLE_MODES))}",
    ),
    "shuffle_window": (lambda v: v is None or (_is_integer(v) and v >= 1), "None or an integer of at least 1"),
    "depth_embedding": (lambda v: isinstance(v, bool), "True or False"),
    "depth_embedding_dim": (lambda v: _is_integer(v) and v >= 1, "an integer of at least 1"),
    "position_predictor": (lambda v: isinstance(v, bool), "True or False"),
    "position_loss_weight": (lambda v: _is_number(v) and 0 <= v < float("inf"), "a finite number of at least 0"),
    "layerdrop": (lambda v: _is_number(v) and 0 <= v < 1, "a fraction in [0, 1)"),
    "drop_path_rate": (lambda v: _is_number(v) and 0 <= v < 1, "a fraction in [0, 1)"),
    "residual_init_scale": (lambda v: _is_number(v) and 0 <= v < float("inf"), "a finite number of at least 0"),
    "tower": (lambda v: v is None or v in TOWERS, f"None or one of {', '.join(map(repr, TOWERS))}"),
    "execution_order": (
        lambda v: v in EXECUTION_ORDERS if isinstance(v, str) else isinstance(v, (list, tuple)),
        f"{', '.join(map(repr, EXECUTION_ORDERS))} or a list of layer indices",
    ),
    "skipped_mlps": (check_positions, "None or a list of distinct positions, integers of at least 0"),
    **EXIT_FIELDS,
    "layer_controller": (lambda v: isinstance(v, bool), "True or False"),
    "layer_budget": (lambda v: v is None or (_is_integer(v) and v >= 1), "None or an integer of at least 1"),
    "halting_head": (lambda v: isinstance(v, bool), "True or False"),
    "halting_prior": (lambda v: _is_number(v) and 0 < v < 1, "a fraction in (0, 1)"),
    "halting_loss_weight": (lambda v: _is_number(v) and 0 <= v < float("inf"), "a finite number of at least 0"),
}


def encoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration that says how many layers run in free order: `config` itself, or that of its tower."""
    if hasattr(config, "num_hidden_layers"):
        return config
    return getattr(config, f"{getattr(config, 'tower', None) or 'vision'}_config", config)


def num_layers_of(config: PreTrainedConfig) -> int:
    """How many layers run in free order, as the configuration says."""
    return encoder_config(config).num_hidden_layers


def num_channels_of(config: PreTrainedConfig) -> int | None:
    """How many channels a model's images have, by the configuration; None of a model for texts."""
    return getattr(encoder_config(config), "num_channels", None)


def lists_by_layer(config: PreTrainedConfig) -> dict[str, list]:
    """What the configuration lists of each layer, such as the kind of its attention, by the name of the field."""
    values = vars(encoder_config(config))  # without what is computed from the index
    return {name: list(values[name]) for name in BY_LAYER if isinstance(values.get(name), (list, tuple))}


def set_num_layers(config: Any, num_layers: int, lists: dict[str, list] | None = None) -> None:
    """Sets how many layers the configuration says, what it lists of each, and a backbone's stages, which follow."""
    encoder: Any = encoder_config(config)
    encoder.num_hidden_layers = num_layers
    for name, of_layers in (lists or {}).items():
        setattr(encoder, name, of_layers)
        if name == "attention_layers":  # which GPT-Neo makes of a shorter form
            encoder.attention_types = [[[kind], 1] for kind in of_layers]
    if hasattr(config, "model_args"):  # of a model of timm
        config.model_args = {**(config.model_args or {}), "depth": num_layers}
    if getattr(encoder, "stage_names", None) is not None:
        encoder.stage_names = ["stem", *(f"stage{stage}" for stage in range(1, num_layers + 1))]
        encoder.set_output_features_output_indices(out_features=None, out_indices=None)


@dataclass(kw_only=True, repr=False, eq=False)
class LayerShuffleConfigMixin(_FamilyConfig):
    r"""The fields that a LayerShuffle model adds to its architecture's configuration.

    Args:
        shuffle_mode: Order of the layers in training. `"none"`: sequential. `"arbitrary"`: a random permutation for
            each forward pass (LayerShuffle, arXiv 2407.04513). `"window"`: a random permutation that moves no layer by
            more than `shuffle_window` positions.
        shuffle_window: For `shuffle_mode="window"`: by how many positions a layer may move, from 1 to
            `num_hidden_layers`.
        depth_embedding: Whether each layer is told the position it runs at, by a learned vector joined to every token
            (LayerShuffle-position).
        depth_embedding_dim: Size of that vector.
        position_predictor: Whether each layer has a head that predicts the position it ran at (LayerShuffle-predict).
        position_loss_weight: Weight of the position loss in the training loss, at least 0.
        layerdrop: Probability in `[0, 1)` with which each layer is left out of a training forward (arXiv 1909.11556).
        drop_path_rate: Probability in `[0, 1)` with which an example skips a layer in training (stochastic depth,
            arXiv 1603.09382). What the layer changes in the others is scaled up by `1 / (1 - drop_path_rate)`. The
            rate is the same for all layers, since in an arbitrary order none is deeper. Families with a field of this
            name, such as DINOv2 and BEiT, do it in their own way.
        residual_init_scale: Factor, at least 0, of the initial weights that write into the residual stream (in most
            families the output projections of attention and MLP). Below 1, a fresh layer changes the tokens little, so
            that the order of the layers matters little when training begins; GPT-2 starts with `1 / sqrt(2 *
            num_hidden_layers)`.
        execution_order: Order of the layers in evaluation: `"sequential"`, `"arbitrary"` (a random permutation for
            each forward) or a list of layer indices, with repeats and omissions allowed.
        exit_threshold: How sure an answer must be for an example to leave the model early, in [0, 1], in evaluation of
            a classifier; None for all layers. See `early_exit.ExitRule`.
        exit_criterion: What sure means: `"probability"`, `"entropy"` or `"margin"`; or `"halting"`, by which an
            example leaves where the halting head says so (Q-exit, arXiv 2204.03276, with a threshold of 0.5).
        exit_patience: Instead of a threshold: after how many layers in a row with the same answer an example leaves.
        halting_head: Whether a classifier of one class of several has a head that says after each layer how likely an
            example leaves there (PonderNet, arXiv 2107.05407). It learns in training by an expected loss over all
            layers, see `halting_head.py`; an encoder without a classifier has none.
        halting_prior: Probability in (0, 1) with which examples leave after each layer by the prior (λ_p). A fresh
            head says this.
        halting_loss_weight: Weight, at least 0, of the divergence from the prior in the training loss (β).
        layer_controller: Whether a classifier has a controller that sees an example before the first layer and scores
            the layers for it (ADMN). In training it alone is to learn, see `layer_budget.py`; an encoder without a
            classifier has none.
        layer_budget: How many layers each example runs in evaluation, those with the best scores, from 1 to
            the length of the execution order; None for all layers.
        skipped_mlps: Positions in the execution order, from 0, at which a layer runs without its MLP in evaluation;
            None for none. See `choose_skipped_mlps`.
        tower: Of a model with several towers, such as `CLIPModel`, the one whose layers run in free order: `"vision"`,
            `"text"` or `"audio"`.

    Raises:
        `ValueError`: for a value outside what is said above, naming the field, the value and what is allowed.
    """

    shuffle_mode: str = "none"
    shuffle_window: int | None = None
    depth_embedding: bool = False
    depth_embedding_dim: int = 32
    position_predictor: bool = False
    position_loss_weight: float = 1.0
    layerdrop: float = 0.0
    drop_path_rate: float = 0.0
    residual_init_scale: float = 1.0
    execution_order: str | list[int] = "sequential"
    exit_threshold: float | None = None
    exit_criterion: str = "probability"
    exit_patience: int | None = None
    halting_head: bool = False
    halting_prior: float = 0.1
    halting_loss_weight: float = 0.5
    layer_controller: bool = False
    layer_budget: int | None = None
    skipped_mlps: list[int] | None = None
    tower: str | None = None

    # Trainer.evaluate would otherwise take these outputs for predictions.
    keys_to_ignore_at_inference = [
        "execution_order",
        "position_logits",
        "num_layers_run",
        "layer_logits",
        "halting_log_probabilities",
    ]
    # The model type whose checkpoints these configurations read as their own; set by each architecture.
    plain_model_type: ClassVar[str | None] = None
    # Whether the field of this name is the family's, whose own layers follow it
    has_own_drop_path: ClassVar[bool] = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.architectures = self.architectures or []  # with None, Auto classes that know several models fail
        self.check_layershuffle()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIELD_RULES and not (name == "drop_path_rate" and self.has_own_drop_path):
            is_valid, allowed = _FIELD_RULES[name]
            if not is_valid(value):
                raise ValueError(f"`{name}` is {value!r}; it must be {allowed}.")
        super().__setattr__(name, value)

    def check_layershuffle(self) -> None:
        """Checks the fields against each other; called on creation and by the models."""
        if self.exit_threshold is not None and self.exit_patience is not None:
            ExitRule(self.exit_threshold, self.exit_criterion, self.exit_patience)  # refuses them together
        if self.tower is not None and not hasattr(self, f"{self.tower}_config"):
            raise ValueError(
                f"`tower` is '{self.tower}', and {type(self).__name__} has no `{self.tower}_config`; "
                "leave it None, or name a tower that the model has."
            )
        self._check_drop_path()
        self._check_budget()
        if not hasattr(encoder_config(self), "num_hidden_layers"):
            return  # of a model of timm, which says it when it is built
        num_layers = num_layers_of(self)
        if self.shuffle_mode == "window" and self.shuffle_window is None:
            raise ValueError(
                "`shuffle_mode='window'` needs `shuffle_window`, the number of positions by which a layer may move: "
                f"an integer from 1 to {num_layers} (`num_hidden_layers`)."
            )
        if self.shuffle_window is not None and self.shuffle_window > num_layers:
            raise ValueError(
                f"`shuffle_window` is {self.shuffle_window}, larger than the depth; it must be from 1 to "
                f"{num_layers} (`num_hidden_layers`)."
            )
        if not isinstance(self.execution_order, str):
            self.execution_order = check_execution_order(self.execution_order, num_layers)
        is_list = not isinstance(self.execution_order, str)
        check_against_order(self.skipped_mlps, len(self.execution_order) if is_list else num_layers)

    def _check_budget(self) -> None:
        budget = self.layer_budget
        if budget is None:
            return
        if not self.layer_controller:
            raise ValueError(
                f"`layer_budget` is {budget}, and there is no layer controller to choose layers by; set "
                "`layer_controller` to True, or leave `layer_budget` out."
            )
        for name in ("exit_threshold", "exit_patience"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"`layer_budget` is {budget} and `{name}` is {getattr(self, name)}; an example runs fewer layers "
                    "by one of them: set the other to None."
                )
        if not isinstance(self.execution_order, str):
            num_layers, of = len(self.execution_order), "the length of `execution_order`"
        else:
            num_layers, of = getattr(encoder_config(self), "num_hidden_layers", budget), "`num_hidden_layers`"
        if budget > num_layers:  # of a model of timm, it is not known yet how many layers there are
            raise ValueError(
                f"`layer_budget` is {budget}, and {num_layers} layers run; it must be from 1 to {num_layers} ({of})."
            )

    def _check_drop_path(self) -> None:
        """Refuses to drop paths twice: by the layer program, and by the layers of the tower or of timm themselves."""
        encoder = encoder_config(self)
        of_tower = getattr(encoder, "drop_path_rate", 0.0) if encoder is not self else 0.0
        own = of_tower or (getattr(self, "model_args", None) or {}).get("drop_path_rate", 0.0)
        if own and self.drop_path_rate:
            raise ValueError(
                f"`drop_path_rate` is {self.drop_path_rate}, and the layers of {type(self).__name__} have one of "
                f"their own, which is {own}. Set one of them to 0."
            )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type", cls.model_type) not in (cls.model_type, cls.plain_model_type):
            # That of a model with several towers holds the configuration of this one
            tower = config_dict.get(cls.base_config_key)
            if isinstance(tower, dict) and tower.get("model_type", cls.plain_model_type) == cls.plain_model_type:
                return {**config_dict, cls.base_config_key: {**tower, "model_type": cls.model_type}}, kwargs
            plain = cls.__name__.removeprefix("LayerShuffle").removesuffix("Config")
            raise ValueError(
                f"'{pretrained_model_name_or_path}' holds a model of type '{config_dict['model_type']}', whose "
                f"weights {cls.__name__} cannot read; it reads '{cls.plain_model_type}' and '{cls.model_type}'. "
                f"LayerShuffle{plain}* reads {plain} checkpoints, and so on for each family."
            )
        return {**config_dict, "model_type": cls.model_type}, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # Only the arguments are checked: a stored window goes with any mode, as when a model is trained on without it
        mode = kwargs.get("shuffle_mode", config_dict.get("shuffle_mode", cls.shuffle_mode))
        if kwargs.get("shuffle_window") is not None and mode != "window":
            raise ValueError(
                f"`shuffle_window` is {kwargs['shuffle_window']!r}, which `shuffle_mode={mode!r}` does not use; pass "
                "`shuffle_mode='window'` with it, or leave it out."
            )
        if isinstance(config_dict.get("model_args"), dict):
            # timm records the number of classes there too, and transformers passes its own
            model_args = {name: value for name, value in config_dict["model_args"].items() if name != "num_classes"}
            config_dict = {**config_dict, "model_args": model_args}
        return super().from_dict(without_parts(config_dict, kwargs), **kwargs)


# By the class itself, since another one may have the same name
_MADE: dict[type[PreTrainedConfig], type[LayerShuffleConfigMixin]] = {}


def layershuffle_config_class(plain_class: type[PreTrainedConfig]) -> type[LayerShuffleConfigMixin]:
    """A family's configuration with the flags: `LayerShuffleViTConfig` of `ViTConfig`.

    Its model type is `layershuffle_vit`, so that no plain class loads such a checkpoint by accident.
    """
    name = f"LayerShuffle{plain_class.__name__}"
    if plain_class not in _MADE:
        fields_of_the_family = f"""
    The remaining fields are those of [`{plain_class.__name__}`].

    Example:

    ```python
    >>> from hf_layershuffle import {name}

    >>> config = {name}(shuffle_mode="arbitrary", num_hidden_layers=4)
    ```
    """
        body: dict[str, Any] = {
            "__module__": __name__,
            "__doc__": f"{LayerShuffleConfigMixin.__doc__}{fields_of_the_family}",
            "model_type": f"{MODEL_TYPE_PREFIX}{plain_class.model_type}",
            "plain_model_type": plain_class.model_type,
        }
        if hasattr(plain_class, "drop_path_rate"):
            # The family's default, in the place of the mixin's
            body["drop_path_rate"] = plain_class.drop_path_rate
            body["__annotations__"] = {"drop_path_rate": Any}
            body["has_own_drop_path"] = True
        made: Any = type(name, (LayerShuffleConfigMixin, plain_class), body)
        _MADE[plain_class] = made
        made.register_for_auto_class()  # `save_pretrained` then puts the code beside the configuration
    return _MADE[plain_class]


def __getattr__(name: str) -> type[LayerShuffleConfigMixin]:
    """`LayerShuffleViTConfig` and the like, also where `auto_map` of a Hub repository names them."""
    plain_class = (
        getattr(transformers, name.removeprefix("LayerShuffle"), None) if name.startswith("LayerShuffle") else None
    )
    if isinstance(plain_class, type) and issubclass(plain_class, PreTrainedConfig):
        return layershuffle_config_class(plain_class)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
