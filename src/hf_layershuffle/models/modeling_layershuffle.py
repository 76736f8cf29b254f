# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Models of transformers whose layers run in any order (LayerShuffle, arXiv 2407.04513): classes made on demand.

`LayerShuffleViTModel` is `ViTModel` with the flags of its configuration, and so on for each class of transformers. Its
forward is transformers' own; which layer runs next is said by the [`LayerProgram`]. This file travels to the Hub
beside the weights: it may import `from .x import y` only.
"""

import copy
import inspect
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .auto_classes import auto_class_of, register_conversion
from .classification_heads import plain_class_of
from .configuration_layershuffle import (
    LayerShuffleConfigMixin,
    encoder_config,
    layershuffle_config_class,
)
from .execution_order import ExecutionOrderStream
from .families import CHANNELS_FIRST, check_family
from .free_features import feature_methods
from .free_forward import averages_loss_itself, free_forward
from .free_generation import generation_methods
from .halting_head import HaltingHead, halting_loss
from .initial_weights import InitialWeightsMixin
from .layer_controller import LayerController
from .layer_lists import find_layers
from .layer_program import LayerProgram, Run, mark_kinds
from .order_check import check_untested_family
from .position_modules import (
    DepthProjection,
    PositionedLayerMixin,
    PositionHead,
    change_class,
    check_changeable,
    mark,
    position_loss,
    positioned_layer_class,
)
from .saved_model import SavedModelMixin
from .timm_layers import TIMM_MODEL_TYPE, TimmLayersMixin


class LayerShuffleMixin(InitialWeightsMixin, SavedModelMixin):
    """What every model with free layer order has beside its transformers class.

    New modules start as no-ops, random orders come from one stream, and loading refuses what it cannot read.
    """

    plain_class: ClassVar[type[PreTrainedModel]]
    depth_embedding: nn.Embedding  # only with the flag of this name

    # --- Building ---

    def post_init(self) -> None:
        self._make_free()
        check_untested_family(self.plain_class, self.config)
        super().post_init()

    def _make_free(self, are_weights_new: bool = True) -> None:
        """Marks the list of layers and adds what the flags ask for. The plain model's modules are there already."""
        check_family(getattr(self.config_class, "model_type", None), type(self).__name__)
        if not hasattr(self.config, "check_layershuffle"):
            wanted = self.config_class.__name__ if self.config_class else ""
            raise ValueError(
                f"{type(self).__name__} needs a {wanted}, not a {type(self.config).__name__}; make one by "
                f"`{wanted}.from_dict(config.to_dict())`."
            )
        _check_flags(self.plain_class, self.config)
        self.layers_path = find_layers(self)
        encoder: Any = self.base_model
        if self._is_around_encoder(encoder):
            # The classifier made a plain encoder, or by an Auto class a free one. Both follow one stream of orders
            if not isinstance(encoder, LayerShuffleMixin):
                _make_model(encoder, layershuffle_class(type(encoder)))
                encoder._make_free(are_weights_new)
            self.execution_order_stream = encoder.execution_order_stream
        else:
            LayerProgram.mark(self.free_layers)
            mark_kinds(self)
            # One object, so that a copy of this module made by `compile_regions` reads the same stream
            self.execution_order_stream = ExecutionOrderStream()
            if self.config.depth_embedding or self.config.position_predictor:
                self._add_position_modules()
            if self.config.residual_init_scale != 1.0 and are_weights_new:
                self._mark_residual_writers()
        if self.config.halting_head and "Classification" in self.plain_class.__name__:
            self.halting_head = HaltingHead.of(encoder_config(self.config), self.config.halting_prior)
        if self.config.layer_controller and "Classification" in self.plain_class.__name__:
            self.layer_controller = LayerController.of(encoder_config(self.config), len(self.free_layers))
        layer_class: Any = type(self.free_layers[0])
        if issubclass(layer_class, PositionedLayerMixin):
            names = {layer_class.plain_class.__name__: layer_class.__name__}
            self._no_split_modules = {names.get(name, name) for name in self._no_split_modules or ()}

    def _is_around_encoder(self, encoder: Any) -> bool:
        """Whether the layers are in a model inside this one that takes the same inputs."""
        is_inside = self.layers_path.startswith(f"{self.base_model_prefix}.")
        if encoder is self or not is_inside or getattr(encoder, "config", None) is not self.config:
            return False
        # DINOv3's is of its own class too, but takes hidden states
        return encoder.main_input_name in inspect.signature(encoder.forward).parameters

    def _add_position_modules(self) -> None:
        config = self.config
        encoder = encoder_config(config)
        layers: Any = self.free_layers
        eps = getattr(encoder, "layer_norm_eps", 1e-6)
        for layer in layers:
            change_class(layer, positioned_layer_class(type(layer)))
            layer.depth_projection = (
                DepthProjection(encoder.hidden_size, config.depth_embedding_dim, eps)
                if config.depth_embedding
                else None
            )
            layer.position_head = (
                PositionHead(encoder.hidden_size, len(layers), eps) if config.position_predictor else None
            )
        if config.depth_embedding:
            owner: Any = self.base_model
            others = dict(owner._modules)
            owner._modules.clear()
            # First of all: optimizers' states of runs of earlier versions go by the order of the parameters
            owner.depth_embedding = nn.Embedding(len(layers), config.depth_embedding_dim)
            mark(owner.depth_embedding, "starts_at_zero")
            owner._modules.update(others)

    def _finish(
        self, outputs: Any, run: Run, labels: torch.Tensor | None = None, num_items_in_batch: Any = None
    ) -> Any:
        """The plain model's outputs with the order that ran, the position logits and, in training, their loss."""
        if not isinstance(outputs, ModelOutput):
            return outputs
        position_logits = torch.stack(run.position_logits, dim=1) if run.position_logits else None
        values = dict(outputs.items())
        log_probabilities: Any = getattr(run, "halting_log_probabilities", None)
        layer_logits = getattr(run, "layer_logits", None)
        if layer_logits is not None and labels is not None:
            values["loss"] = halting_loss(layer_logits, log_probabilities, labels, self.config, num_items_in_batch)
        if self.training and position_logits is not None and values.get("loss") is not None:
            loss = position_loss(position_logits, labels, num_items_in_batch)
            values["loss"] = values["loss"] + self.config.position_loss_weight * loss
        tensor = next((value for value in values.values() if isinstance(value, torch.Tensor)), None)
        device = self.device if tensor is None else tensor.device  # a backbone gives a tuple of feature maps
        return layershuffle_output_class(type(outputs))(
            **values,
            # non_blocking: a copy to the device that does not make the host wait for it
            execution_order=torch.tensor(run.order).to(device, non_blocking=True),
            position_logits=position_logits,
            num_layers_run=getattr(run, "num_layers_run", None),
            layer_logits=layer_logits,
            halting_log_probabilities=log_probabilities,
        )


# --- Classes made on demand ---


def layershuffle_class(plain_class: type[PreTrainedModel]) -> type[LayerShuffleMixin]:
    """A class of transformers with free layer order, such as `LayerShuffleViTModel` of `ViTModel`.

    The flags are in its `config`.

    Raises:
        `ValueError`: if the class has no configuration class.
    """
    if plain_class not in _MADE:
        if plain_class.config_class is None:
            raise ValueError(f"{plain_class.__name__} has no configuration class; pass a model class of transformers.")
        body = {
            "__module__": __name__,
            "__doc__": f"[`{plain_class.__name__}`] whose layers run in any execution order.",
            "config_class": layershuffle_config_class(plain_class.config_class),
            "plain_class": plain_class,
            "forward": free_forward(plain_class),
            **generation_methods(plain_class),
            **feature_methods(plain_class),
        }
        if not averages_loss_itself(plain_class):
            body["accepts_loss_kwargs"] = False
        bases: tuple[type, ...] = (LayerShuffleMixin, plain_class)
        is_of_timm = plain_class.config_class.model_type == TIMM_MODEL_TYPE
        if is_of_timm:
            bases = (TimmLayersMixin, *bases)
        made: Any = type(f"LayerShuffle{plain_class.__name__}", bases, body)
        _MADE[plain_class] = made
        register_conversion(made, is_of_timm)
        auto_class = auto_class_of(plain_class)
        if auto_class is not None:
            made.register_for_auto_class(auto_class)  # `save_pretrained` then puts the code beside the weights
    return _MADE[plain_class]


def layershuffle_output_class(plain_class: type[ModelOutput]) -> type[ModelOutput]:
    """A class of outputs with five more fields. Its `hidden_states` and `attentions` are in execution order.

    `execution_order` (`torch.LongTensor` of shape `(positions,)`) is the index of the layer that ran at each position.
    `position_logits` (of shape `(batch_size, positions, num_layers)`, with `config.position_predictor`) is what the
    layer at each position predicts its own position to be. `num_layers_run` (`torch.LongTensor` of shape
    `(batch_size,)`) is, where examples may leave early or choose layers, how many layers each ran through. In training
    with `config.halting_head` there are `layer_logits`, the class logits after each layer (of shape `(batch_size,
    positions, num_labels)`), and `halting_log_probabilities`, the logarithm of the probability of leaving there (of
    shape `(batch_size, positions)`); `loss` is then the expected loss over all layers ([`halting_loss`]). In training
    `loss` includes the position loss; in evaluation it is the class loss alone.
    """
    if plain_class not in _OUTPUTS_MADE:
        optional = torch.Tensor | None
        body = {
            "__module__": __name__,
            "__doc__": layershuffle_output_class.__doc__,
            "__annotations__": dict.fromkeys(_FURTHER_OUTPUTS, optional),
            **dict.fromkeys(_FURTHER_OUTPUTS),
        }
        _OUTPUTS_MADE[plain_class] = dataclass(type(f"LayerShuffle{plain_class.__name__}", (plain_class,), body))
    return _OUTPUTS_MADE[plain_class]


def free_order(model: PreTrainedModel, **flags: Any) -> LayerShuffleMixin:
    """Gives a model of transformers free layer order, in place, and returns it.

    It computes what it did. It now takes an `execution_order`, and trains by the flags of [`LayerShuffleConfigMixin`].

    Args:
        model: A model of any class of transformers with one list of layers.
        flags: Fields of the configuration, such as `shuffle_mode="arbitrary"`.

    Raises:
        `ValueError`: if the model has no such list, or a flag is not known or not valid.

    ```python
    >>> from transformers import AutoModelForImageClassification
    >>> import hf_layershuffle as ls

    >>> model = ls.free_order(AutoModelForImageClassification.from_pretrained("facebook/dinov2-base"))
    >>> model(pixel_values, execution_order=[2, 0, 1])
    ```
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"`model` is a {type(model).__name__}; pass a model of transformers.")
    if isinstance(model, LayerShuffleMixin):
        raise ValueError(f"This {type(model).__name__} has free layer order already; set the flags on its `config`.")
    layers = model.get_submodule(find_layers(model, tower=flags.get("tower")))  # refuses before anything is changed
    made: Any = layershuffle_class(type(model))
    configs: dict[int, PreTrainedConfig] = {}  # new ones by the id of the old: another model may share these
    config: Any = copy.deepcopy(model.config, configs)
    config.__class__ = made.config_class
    known = {each.name: each.default for each in fields(LayerShuffleConfigMixin)}
    known["drop_path_rate"] = getattr(model.config, "drop_path_rate", 0.0)  # that of the family
    for name, value in (known | flags).items():
        if name not in known:
            raise ValueError(f"`{name}` is not a flag of free layer order; these are {', '.join(known)}.")
        setattr(config, name, value)
    if config.residual_init_scale != 1.0:
        raise ValueError(
            f"`residual_init_scale` is {config.residual_init_scale}, which is of initial weights, and this model "
            f"has its weights. Make a new model by `{made.__name__}({made.config_class.__name__}(...))`."
        )
    _check_flags(made.plain_class, config)
    check_untested_family(made.plain_class, config)
    check_changeable(model, list(layers.children()), [name for name in _PARTS if getattr(config, name)])
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = configs.get(id(module.config), module.config)
    _make_model(model, made)
    free: Any = model
    free._make_free(are_weights_new=False)
    _initialize_position_modules(free)
    return free


def _make_model(model: PreTrainedModel, made: type[PreTrainedModel]) -> None:
    change_class(model, made)
    # transformers looks up by the class which outputs it captures, and notes that when a model is created
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(made), made._can_record_outputs)


def _check_flags(plain_class: type[PreTrainedModel], config: Any) -> None:
    """Refuses flags that do not go together, or not with this family."""
    config.check_layershuffle()
    # Two ways of leaving layers out at once: a family's own does not say which layers ran
    drops = {"encoder_layerdrop": getattr(encoder_config(config), "encoder_layerdrop", 0.0)}
    if hasattr(plain_class.config_class, "layerdrop"):
        drops["layerdrop"] = config.layerdrop
    for name, drop in drops.items():
        if drop > 0.0:
            raise ValueError(
                f"`{name}` is {drop}, and {plain_class.__name__} leaves layers out by itself, without saying which. "
                f"Set `{name}` to 0."
            )
    if config.plain_model_type in CHANNELS_FIRST and any(getattr(config, flag) for flag in _PARTS):
        raise ValueError(
            f"{plain_class.__name__} has hidden states of shape `(batch_size, channels, tokens)`, for which there is "
            "no depth embedding, position predictor, halting head or layer controller; set these flags to False."
        )


@torch.no_grad()
def _initialize_position_modules(model: LayerShuffleMixin) -> None:
    """Gives them their first weights, in the type and place of the layers'."""
    layers = list(model.free_layers.children())
    names = ("depth_projection", "position_head")
    new = [(layers[0], model._depth_embedding), *((layer, getattr(layer, n, None)) for layer in layers for n in names)]
    new += [(layers[0], getattr(model, name, None)) for name in ("halting_head", "layer_controller")]
    for layer, root in new:
        parameters = list(layer.parameters())
        # Of quantized layers, the type in which they compute is that of the others
        dtypes = [each.dtype for each in parameters if each.is_floating_point() and each.itemsize > 1]
        for module in root.modules() if root is not None else ():
            module.to(parameters[0].device, dtypes[0] if dtypes else model.dtype)
            model._init_weights(module)


# By the class itself, since another one may have the same name
_MADE: dict[type[PreTrainedModel], type[LayerShuffleMixin]] = {}
_PARTS = ("depth_embedding", "position_predictor", "halting_head", "layer_controller")  # flags that add modules
_FURTHER_OUTPUTS = tuple(LayerShuffleConfigMixin.keys_to_ignore_at_inference)
_OUTPUTS_MADE: dict[type[ModelOutput], type[ModelOutput]] = {}


def __getattr__(name: str) -> type:
    """`LayerShuffleViTModel` and the like, also where `auto_map` of a Hub repository names them."""
    plain_name = name.removeprefix("LayerShuffle")
    if plain_name != name:
        model_class = plain_class_of(plain_name)
        if model_class is not None:
            return layershuffle_class(model_class)
        plain_class = getattr(transformers.modeling_outputs, plain_name, None)
        if isinstance(plain_class, type) and issubclass(plain_class, ModelOutput):
            return layershuffle_output_class(plain_class)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
