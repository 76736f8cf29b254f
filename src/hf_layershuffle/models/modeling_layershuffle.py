# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Models of transformers whose layers run in any order (LayerShuffle, arXiv 2407.04513): classes made on demand.

`LayerShuffleViTModel` is `ViTModel` with the flags of its configuration, and so on for each class of transformers. Its
forward is transformers' own; which layer runs next is said by the [`LayerProgram`]. This file travels to the Hub beside
the weights: it may import `from .x import y` only.
"""

import copy
import inspect
from dataclasses import dataclass, fields
from functools import wraps

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .auto_classes import auto_class_of, plain_class_name
from .configuration_layershuffle import (
    LayerShuffleConfigMixin,
    encoder_config,
    layershuffle_config_class,
)
from .execution_order import ExecutionOrderStream
from .free_layers import FreeLayersMixin
from .layer_program import LayerProgram, Run, find_layers, residual_writers, run_program, running_program
from .position_modules import (
    DepthProjection,
    PositionedLayerMixin,
    PositionHead,
    position_loss,
    positioned_layer_class,
)
from .saved_model import SavedModelMixin


class LayerShuffleMixin(SavedModelMixin, FreeLayersMixin):
    """What every model with free layer order has beside its transformers class.

    New modules start as no-ops, random orders come from one stream, and loading refuses what it cannot read.
    """

    # --- Building ---

    def post_init(self):
        self._make_free()
        super().post_init()

    def _make_free(self, are_weights_new: bool = True) -> None:
        """Marks the list of layers and adds what the flags ask for. The modules of the plain model are there already."""
        if not hasattr(self.config, "check_layershuffle"):
            raise ValueError(
                f"{type(self).__name__} needs a {self.config_class.__name__}, not a {type(self.config).__name__}; make one by "
                f"`{self.config_class.__name__}.from_dict(config.to_dict())`."
            )
        self.config.check_layershuffle()
        self.layers_path = find_layers(self)
        encoder = self.base_model
        is_inside = self.layers_path.startswith(f"{self.base_model_prefix}.")
        if encoder is not self and is_inside and encoder.config is self.config:
            # The classifier made a plain encoder. Both follow one stream of orders
            _change_class(encoder, layershuffle_class(type(encoder)))
            encoder._make_free(are_weights_new)
            self.execution_order_stream = encoder.execution_order_stream
        else:
            LayerProgram.mark(self.free_layers)
            # One object, so that a copy of this module made by `compile_regions` reads the same stream
            self.execution_order_stream = ExecutionOrderStream()
            if self.config.depth_embedding or self.config.position_predictor:
                self._add_position_modules()
            if self.config.residual_init_scale != 1.0 and are_weights_new:
                self._mark_residual_writers()
        layer_class = type(self.free_layers[0])
        if issubclass(layer_class, PositionedLayerMixin):
            names = {layer_class.plain_class.__name__: layer_class.__name__}
            self._no_split_modules = {names.get(name, name) for name in self._no_split_modules or ()}

    def _add_position_modules(self) -> None:
        config, encoder, layers = self.config, encoder_config(self.config), self.free_layers
        eps = getattr(encoder, "layer_norm_eps", 1e-6)
        for layer in layers:
            layer.__class__ = positioned_layer_class(type(layer))
            layer.depth_projection = (
                DepthProjection(encoder.hidden_size, config.depth_embedding_dim, eps)
                if config.depth_embedding
                else None
            )
            layer.position_head = (
                PositionHead(encoder.hidden_size, len(layers), eps) if config.position_predictor else None
            )
        if config.depth_embedding:
            others = dict(self._modules)
            self._modules.clear()
            # First of all: optimizers' states of runs of earlier versions go by the order of the parameters
            self.depth_embedding = nn.Embedding(len(layers), config.depth_embedding_dim)
            self.depth_embedding.starts_at_zero = True
            self._modules.update(others)

    def _mark_residual_writers(self) -> None:
        for layer in self.free_layers:
            for module in residual_writers(layer, encoder_config(self.config).hidden_size):
                module.writes_to_residual = True
                if getattr(module, "_is_hf_initialized", False):  # by the plain encoder of a classifier
                    self._scale_residual_weight(module)

    @torch.no_grad()
    def _scale_residual_weight(self, module: nn.Linear) -> None:
        for parameter in module.parameters():
            parameter.mul_(self.config.residual_init_scale)

    @classmethod
    def is_custom_code(cls) -> bool:
        """transformers passes over modules of custom code that have no weights of their own, by which some families
        initialise the weights of their children. Ours are initialised as the family's."""
        return False

    @torch.no_grad()
    def _init_weights(self, module):
        is_new = not getattr(getattr(module, "weight", None), "_is_hf_initialized", False)
        super()._init_weights(module)
        if getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
        if getattr(module, "writes_to_residual", False) and is_new:
            self._scale_residual_weight(module)

    def _finish(self, outputs, run: Run, labels: torch.Tensor | None = None, num_items_in_batch=None):
        """The plain model's outputs with the order that ran, the position logits and, in training, the position loss."""
        if not isinstance(outputs, ModelOutput):
            return outputs
        position_logits = torch.stack(run.position_logits, dim=1) if run.position_logits else None
        values = dict(outputs.items())
        if self.training and position_logits is not None and values.get("loss") is not None:
            loss = position_loss(position_logits, labels, num_items_in_batch)
            values["loss"] = values["loss"] + self.config.position_loss_weight * loss
        device = next(value.device for value in values.values() if isinstance(value, torch.Tensor))
        return layershuffle_output_class(type(outputs))(
            **values,
            # non_blocking: a copy to the device that does not make the host wait for it
            execution_order=torch.tensor(run.order).to(device, non_blocking=True),
            position_logits=position_logits,
        )

    def _check_labels(self, labels: torch.Tensor) -> None:
        # On an accelerator, reading the labels would make every step wait; in a graph or under torch.func it cannot be done
        if labels.device.type != "cpu" or self.num_labels < 2 or labels.numel() == 0 or torch.compiler.is_compiling():
            return
        if torch._C._functorch.is_functorch_wrapped_tensor(labels):
            return
        kinds = {True: "multi_label_classification", False: "single_label_classification"}
        kind = self.config.problem_type or kinds[labels.is_floating_point()]  # as transformers takes them
        if kind == "multi_label_classification" and (labels == -100).any():
            raise ValueError(
                "`labels` of several classes an image hold -100, which would count as a target like any other; each is a "
                "number from 0 to 1. Leave images without labels out of the dataset."
            )
        if kind != "single_label_classification":
            return
        outside = labels[((labels < 0) | (labels >= self.num_labels)) & (labels != -100)]
        if len(outside) > 0:
            raise ValueError(
                f"`labels` holds {outside[0].item()}, but this model has {self.num_labels} classes; labels are integers "
                f"from 0 to {self.num_labels - 1}, or -100 to be ignored. Set `num_labels` to the dataset's."
            )


# --- Classes made on demand ---


def layershuffle_class(plain_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A class of transformers with free layer order: `LayerShuffleViTModel` of `ViTModel`. Its `config` holds the flags.

    Raises:
        `ValueError`: if the class has no configuration class.
    """
    name = f"LayerShuffle{plain_class.__name__}"
    if name not in _MADE:
        if plain_class.config_class is None:
            raise ValueError(f"{plain_class.__name__} has no configuration class; pass a model class of transformers.")
        body = {
            "__module__": __name__,
            "__doc__": f"[`{plain_class.__name__}`] whose layers run in any execution order.",
            "config_class": layershuffle_config_class(plain_class.config_class),
            "plain_class": plain_class,
            "forward": _free_forward(plain_class),
        }
        made = _MADE[name] = type(name, (LayerShuffleMixin, plain_class), body)
        _register_conversion(made)
        auto_class = auto_class_of(plain_class)
        if auto_class is not None:
            made.register_for_auto_class(auto_class)  # `save_pretrained` then puts the code beside the weights
    return _MADE[name]


def _free_forward(plain_class: type[PreTrainedModel]):
    """The plain forward, run in an execution order."""
    plain_forward = plain_class.forward
    signature = inspect.signature(plain_forward)
    names = list(signature.parameters)[1:]
    is_classifier = "labels" in names and "Classification" in plain_class.__name__

    def argument(name: str, args: tuple, kwargs: dict):
        if name not in names:
            return kwargs.get(name)
        index = names.index(name)
        return args[index] if index < len(args) else kwargs.get(name)

    @wraps(plain_forward)
    def forward(self, *args, execution_order=None, **kwargs):
        layers = LayerProgram.mark(self.free_layers)  # accelerate's `compile_regions` makes a new, plain list
        running = None if execution_order is not None else running_program(layers)
        if running is not None:  # the encoder of a classifier, or a model that is taken apart
            outputs = plain_forward(self, *args, **kwargs)
            return self._finish(outputs, running) if isinstance(running, Run) else outputs
        order = self.resolve_execution_order(execution_order)
        if self.main_input_name == "pixel_values" and argument("pixel_values", args, kwargs) is None:
            raise ValueError(
                "`pixel_values` is None; pass images of shape `(batch_size, num_channels, height, width)`."
            )
        labels = argument("labels", args, kwargs)
        if is_classifier and labels is not None:
            self._check_labels(labels)
        return_dict = kwargs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        run = Run(layers, order, self._depth_embedding)
        with run_program(layers, run):
            outputs = plain_forward(self, *args, **kwargs, return_dict=True)
        outputs = self._finish(outputs, run, labels, kwargs.get("num_items_in_batch"))
        return outputs if return_dict or not isinstance(outputs, ModelOutput) else outputs.to_tuple()

    forward.__doc__ = (plain_forward.__doc__ or "") + _EXECUTION_ORDER_DOC
    forward.__signature__ = _with_execution_order(signature)
    return forward


_EXECUTION_ORDER_DOC = """
        execution_order (`str`, `list[int]` or `torch.LongTensor` of shape `(positions,)`, *optional*):
            Overrides the order for this call, in training too: `"sequential"`, `"arbitrary"` or layer indices. The outputs hold
            the order that ran.

        Raises:
            `ValueError`: if the order is not valid, the layers were cut by hand, or (where the labels are on the CPU) a label is
                outside the classes.
"""


def _with_execution_order(signature: inspect.Signature) -> inspect.Signature:
    """The Trainer keeps the columns of a dataset that a forward's signature names."""
    parameters = list(signature.parameters.values())
    added = inspect.Parameter("execution_order", inspect.Parameter.KEYWORD_ONLY, default=None)
    has_kwargs = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    at = len(parameters) - has_kwargs
    return signature.replace(parameters=[*parameters[:at], added, *parameters[at:]])


def layershuffle_output_class(plain_class: type[ModelOutput]) -> type[ModelOutput]:
    """A class of outputs with two more fields. Its `hidden_states` and `attentions` are in execution order.

    `execution_order` (`torch.LongTensor` of shape `(positions,)`) is the index of the layer that ran at each position.
    `position_logits` (of shape `(batch_size, positions, num_layers)`, with `config.position_predictor`) is what the layer at
    each position predicts its own position to be. In training `loss` includes the position loss; in evaluation it is the
    class loss alone.
    """
    name = f"LayerShuffle{plain_class.__name__}"
    if name not in _MADE:
        optional = torch.Tensor | None
        body = {
            "__module__": __name__,
            "__doc__": layershuffle_output_class.__doc__,
            "__annotations__": {"execution_order": optional, "position_logits": optional},
            "execution_order": None,
            "position_logits": None,
        }
        _MADE[name] = dataclass(type(name, (plain_class,), body))
    return _MADE[name]


def _register_conversion(made: type[PreTrainedModel]) -> None:
    """transformers renames the tensors of old checkpoints by class name or model type; without this a checkpoint loads with a
    random encoder and a mere warning. A class with a head needs nothing of its own: its encoder is renamed by itself."""
    plain = made.plain_class
    mapping = get_checkpoint_conversion_mapping(plain.__name__)
    if mapping is None and plain.__name__ == plain_class_name("AutoModel", plain.config_class.model_type):
        mapping = get_checkpoint_conversion_mapping(plain.config_class.model_type)
    if mapping is not None:
        register_checkpoint_conversion_mapping(made.__name__, mapping, overwrite=True)


def free_order(model: PreTrainedModel, **flags) -> PreTrainedModel:
    """Gives a model of transformers free layer order, in place, and returns it.

    It computes what it did. It now takes an `execution_order`, and trains by the flags of [`LayerShuffleConfigMixin`].

    Args:
        model: Of any class of transformers with one list of layers.
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
    find_layers(model)  # refuses before anything is changed
    made = layershuffle_class(type(model))
    configs: dict[int, PreTrainedConfig] = {}  # new ones by the id of the old: another model may share these
    config = copy.deepcopy(model.config, configs)
    config.__class__ = made.config_class
    known = {each.name: each.default for each in fields(LayerShuffleConfigMixin)}
    for name, value in (known | flags).items():
        if name not in known:
            raise ValueError(f"`{name}` is not a flag of free layer order; these are {', '.join(known)}.")
        setattr(config, name, value)
    config.check_layershuffle()
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = configs.get(id(module.config), module.config)
    _change_class(model, made)
    model._make_free(are_weights_new=False)
    _initialize_position_modules(model)
    return model


def _change_class(model: PreTrainedModel, made: type[PreTrainedModel]) -> None:
    model.__class__ = made
    # By the class, transformers looks up which outputs it captures; it notes that when a model is created
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(made), made._can_record_outputs)


@torch.no_grad()
def _initialize_position_modules(model: PreTrainedModel) -> None:
    """Their first weights, in the type and place of the layers'."""
    for layer in model.free_layers._modules.values():
        like = next(layer.parameters())
        new = [getattr(layer, name, None) for name in ("depth_projection", "position_head")]
        for module in (each for root in (*new, model._depth_embedding) if root is not None for each in root.modules()):
            module.to(like.device, like.dtype)
            model._init_weights(module)


_MADE: dict[str, type] = {}


def __getattr__(name: str):
    """`LayerShuffleViTModel` and the like, also where `auto_map` of a Hub repository names them."""
    plain_name = name.removeprefix("LayerShuffle")
    if plain_name != name:
        plain_class = getattr(transformers, plain_name, None)
        if isinstance(plain_class, type) and issubclass(plain_class, PreTrainedModel):
            return layershuffle_class(plain_class)
        plain_class = getattr(transformers.modeling_outputs, plain_name, None)
        if isinstance(plain_class, type) and issubclass(plain_class, ModelOutput):
            return layershuffle_output_class(plain_class)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
