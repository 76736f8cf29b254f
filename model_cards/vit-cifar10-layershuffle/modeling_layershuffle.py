# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""ViT and DeiT models whose layers run in any order (LayerShuffle, arXiv 2407.04513).

The shuffling is written once, in the mixins; an architecture joins by the classes at the end of this file. This file
travels to the Hub beside the weights: it may import `from .x import y` only.
"""

import os
from dataclasses import dataclass
from importlib import import_module

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import DeiTForImageClassification, DeiTModel, ViTForImageClassification, ViTModel
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.deit.modeling_deit import DeiTEmbeddings, DeiTLayer, DeiTPooler, DeiTPreTrainedModel
from transformers.models.vit.modeling_vit import ViTEmbeddings, ViTLayer, ViTPooler, ViTPreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_layershuffle import LayerShuffleDeiTConfig, LayerShuffleViTConfig
from .execution_order import ExecutionOrderStream, check_execution_order, draw_execution_order


@dataclass
class LayerShuffleModelOutput(BaseModelOutputWithPooling):
    r"""
    [`BaseModelOutputWithPooling`] with two more fields. `hidden_states` and `attentions` are in execution order.

    Args:
        execution_order (`torch.LongTensor` of shape `(positions,)`):
            Index of the layer that ran at each position.
        position_logits (`torch.FloatTensor` of shape `(batch_size, positions, num_layers)`, *optional*):
            For `config.position_predictor`: what the layer at each position predicts its own position to be.
    """

    execution_order: torch.LongTensor | None = None
    position_logits: torch.FloatTensor | None = None


@dataclass
class LayerShuffleImageClassifierOutput(ImageClassifierOutput):
    r"""
    [`ImageClassifierOutput`] with the two more fields of [`LayerShuffleModelOutput`]. In training, `loss` includes the
    position loss where `config.position_predictor` is set; in evaluation it is the class loss alone.
    """

    execution_order: torch.LongTensor | None = None
    position_logits: torch.FloatTensor | None = None


class DepthProjection(nn.Module):
    """Tells a layer the position it runs at: `LayerNorm -> Linear -> GELU` of the tokens joined with a depth vector.

    The linear map starts at zero and GELU(0) = 0, so a fresh projection adds exactly nothing; GELU'(0) = 0.5 lets it learn.
    """

    def __init__(self, config):
        super().__init__()
        joint_size = config.hidden_size + config.depth_embedding_dim
        self.norm = nn.LayerNorm(joint_size, eps=config.layer_norm_eps)
        self.dense = nn.Linear(joint_size, config.hidden_size)
        # Marked on the module that holds the weight: transformers passes over custom modules without weights of their own
        self.dense.starts_at_zero = True
        self.activation = nn.GELU()

    def forward(self, hidden_states: torch.Tensor, depth_vector: torch.Tensor) -> torch.Tensor:
        # (batch_size, tokens, hidden_size) and (depth_embedding_dim,) -> (batch_size, tokens, hidden_size)
        vectors = depth_vector.expand(*hidden_states.shape[:-1], -1)
        return self.activation(self.dense(self.norm(torch.cat((hidden_states, vectors), dim=-1))))


class PositionHead(nn.Module):
    """Predicts from the mean of a layer's output tokens the position at which the layer ran."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dense = nn.Linear(config.hidden_size, config.num_hidden_layers)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # (batch_size, tokens, hidden_size) -> (batch_size, num_layers)
        return self.dense(self.norm(hidden_states.mean(dim=1)))


class LayerShuffleLayerMixin:
    """A transformer layer that also owns its depth projection and its position head, so that it can be moved, merged,
    sharded and compiled as one thing. Without them it computes what the plain layer does."""

    def __init__(self, config):
        super().__init__(config)
        self.depth_projection = DepthProjection(config) if config.depth_embedding else None
        self.position_head = PositionHead(config) if config.position_predictor else None
        self.attention.o_proj.writes_to_residual = self.mlp.fc2.writes_to_residual = True

    def forward(self, hidden_states, attention_mask=None, depth_vector=None, **kwargs):
        """Returns hidden states of shape `(batch_size, tokens, hidden_size)`; with a position head, a tuple of them and
        the position logits of shape `(batch_size, num_layers)`."""
        if self.depth_projection is not None:
            hidden_states = hidden_states + self.depth_projection(hidden_states, depth_vector)
        hidden_states = super().forward(hidden_states, attention_mask, **kwargs)
        return hidden_states if self.position_head is None else (hidden_states, self.position_head(hidden_states))


_HUB_ARGUMENTS = ("repo_id", "private", "revision", "token", "commit_message", "commit_description", "create_pr")


def _is_package() -> bool:
    """Whether this is the package's file, not one loaded from the Hub. The package's other modules are then imported by
    name: `from .x import` would make them travel to the Hub too."""
    return __package__ == "hf_layershuffle"


# What a checkpoint may lack, each as a whole, since a model can be given it anew; anything else makes the encoder
_MAY_BE_NEW = (".depth_embedding.", ".depth_projection.", ".position_head.", ".mask_token", ".pooler.", ".classifier.")


def _check_nothing_lost(model: nn.Module, loading_info: dict, name) -> None:
    """Raises a `ValueError` if tensors are missing in a checkpoint, of which transformers would only warn."""
    new = {key: next((part for part in _MAY_BE_NEW if part in f".{key}"), None) for key, _ in model.named_parameters()}
    incomplete = {None, *(new[key] for key in new.keys() - loading_info["missing_keys"])}
    lost = sorted(key for key in loading_info["missing_keys"] if new.get(key) in incomplete)
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise ValueError(
            f"'{name}' lacks tensors of this model: {', '.join(lost[:3])}{more}. Its weights are incomplete, or "
            f"`num_hidden_layers` ({model.config.num_hidden_layers}) is more than it has layers. Copy or download it "
            "again, or correct its config.json."
        )


class LayerShufflePreTrainedMixin:
    """What base models and classifiers share: new modules start as no-ops, and loading refuses what it cannot read."""

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
        if getattr(module, "writes_to_residual", False) and self.config.residual_init_scale != 1.0:
            std = self.config.initializer_range * self.config.residual_init_scale
            init.normal_(module.weight, mean=0.0, std=std)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, ignore_mismatched_sizes=False, output_loading_info=False, **kwargs
    ):
        """As in transformers, for LayerShuffle checkpoints and for plain ViT or DeiT ones with old or new tensor names.

        Raises:
            `ValueError`: if a tensor has another shape than in the checkpoint, a tensor of the encoder is missing there (the
                classifier, the depth path and the position heads may be new), or the configuration is not valid.
            `OSError`: if a file is missing, truncated or corrupted.
        """
        try:
            model, loading_info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **kwargs,
            )
        except SafetensorError as error:
            raise OSError(
                f"The weights of '{pretrained_model_name_or_path}' cannot be read ({error}); the safetensors file is "
                "truncated or corrupted. Copy or download it again."
            ) from error
        if loading_info["mismatched_keys"] and not ignore_mismatched_sizes:
            mismatches = "; ".join(
                f"{name} is {tuple(stored)} there and {tuple(wanted)} here"
                for name, stored, wanted in sorted(loading_info["mismatched_keys"])
            )
            raise ValueError(
                f"'{pretrained_model_name_or_path}' holds tensors of other shapes than this model: {mismatches}. A "
                "classifier has `num_labels` outputs, a position predictor `num_hidden_layers`. Pass "
                "`ignore_mismatched_sizes=True` (--ignore_mismatched_sizes) to start these tensors anew."
            )
        _check_nothing_lost(model, loading_info, pretrained_model_name_or_path)
        return (model, loading_info) if output_loading_info else model

    def save_pretrained(
        self, save_directory, *args, save_original_format: bool = False, push_to_hub: bool = False, **kwargs
    ):
        """As in transformers, but with the tensor names of the modules (`save_original_format=False`). The folder also
        serves `AutoModel` and `AutoModelForImageClassification`, whichever class was saved, with this package or by
        `trust_remote_code=True`.

        Raises:
            `ValueError`: if the number of layers is not the configuration's, see [`prune_layers`].
        """
        self.base_model.check_depth()
        # transformers would note the saved class only, and `AutoModel` on a classifier's repository would then fail
        self.config.auto_map = dict(_AUTO_MAPS[self.config.model_type])
        publishes = push_to_hub and _is_package()
        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if publishes and name in kwargs}
        # With the old tensor names, which are its default for ViT, the Trainer of transformers 5.23 resumes and reloads
        # the best checkpoint by `load_state_dict(strict=False)`: it loads nothing and only warns
        super().save_pretrained(
            save_directory,
            *args,
            save_original_format=save_original_format,
            push_to_hub=push_to_hub and not publishes,
            **kwargs,
        )
        if publishes and kwargs.get("is_main_process", True):
            repo_id = hub.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            import_module("hf_layershuffle.publishing").publish(save_directory, repo_id, **hub)

    def push_to_hub(self, repo_id: str, **kwargs):
        """As in transformers; with this package also with its card, and with an `image_processor` if one is given (see
        [`push_model`]). All files arrive in one commit."""
        if not _is_package():
            return super().push_to_hub(repo_id, **kwargs)
        return import_module("hf_layershuffle.publishing").push_model(self, repo_id, **kwargs)


class LayerShuffleModelMixin(LayerShufflePreTrainedMixin):
    """The encoder: embeddings, layers in execution order, final LayerNorm."""

    def _init_layershuffle(self, config) -> None:
        config.check_layershuffle()
        self.depth_embedding = (
            nn.Embedding(config.num_hidden_layers, config.depth_embedding_dim) if config.depth_embedding else None
        )
        if self.depth_embedding is not None:
            self.depth_embedding.starts_at_zero = True
        # One object, so that a copy of this module made by `compile_regions` reads the same stream
        self.execution_order_stream = ExecutionOrderStream()

    def seed_execution_order(self, seed: int, step: int = 0) -> None:
        """Makes the random orders from here on a function of `seed`, `step` and the number of forwards since this call.

        [`LayerShuffleCallback`] calls it before each optimizer step of a `Trainer`. In a training loop of your own under
        FSDP, DeepSpeed ZeRO-3 or tensor parallelism call it on every process, and again with the step on a resume.
        """
        self.execution_order_stream.seek(seed, step)

    def check_depth(self) -> None:
        """Whether `layers` is as long as the configuration says; depth vectors and position heads depend on it too.

        Raises:
            `ValueError`: if it is not, as after cutting layers by hand.
        """
        num_layers, depths = len(self.layers), {"`config.num_hidden_layers`": self.config.num_hidden_layers}
        if self.depth_embedding is not None:
            depths["the number of depth vectors"] = getattr(self.depth_embedding, "num_embeddings", num_layers)
        for layer in self.layers:
            if getattr(layer, "position_head", None) is not None:
                depths["the number of outputs of a position head"] = layer.position_head.dense.out_features
        for what, depth in depths.items():
            if depth != num_layers:
                raise ValueError(
                    f"This model has {num_layers} layers, but {what} is {depth}. Layers cut by hand leave the "
                    "configuration, the depth vectors and the position heads as they were. Shorten them all by "
                    f"`hf_layershuffle.prune_layers(model, {list(range(num_layers))})`, of the whole model or of this one."
                )

    def resolve_execution_order(self, execution_order=None) -> list[int]:
        """The order of the next forward pass: `execution_order` if given; else in training one drawn by
        `config.shuffle_mode` and `config.layerdrop`, in evaluation `config.execution_order`."""
        self.check_depth()
        num_layers, config = len(self.layers), self.config
        if execution_order is None and self.training:
            if config.shuffle_mode == "none" and config.layerdrop == 0.0:
                return list(range(num_layers))
            return self._draw_execution_order(config.shuffle_mode, config.shuffle_window, config.layerdrop)
        if execution_order is None:
            execution_order = config.execution_order
        if isinstance(execution_order, str) and execution_order == "sequential":
            return list(range(num_layers))
        if isinstance(execution_order, str) and execution_order == "arbitrary":
            return self._draw_execution_order("arbitrary")
        return check_execution_order(execution_order, num_layers)

    # Orders that do not change can stand in one graph of the whole model; a graph for each random one would be one too many
    @torch.compiler.disable
    def _draw_execution_order(self, *how) -> list[int]:
        return draw_execution_order(len(self.layers), self._next_generator(), *how)

    def _next_generator(self):
        stream = self.execution_order_stream
        if stream.seed is None and _is_sharded(self):
            raise ValueError(
                "This model's parameters are sharded over several processes, and a random execution order that is not "
                "the same on each of them would silently mix different layers' weights. Add `LayerShuffleCallback()` "
                "to the Trainer's callbacks, or call `seed_execution_order(seed, step)` on the model on every process."
            )
        return stream.next_generator(self.training)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        execution_order=None,
        **kwargs,
    ) -> LayerShuffleModelOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`)
            bool_masked_pos (`torch.BoolTensor` of shape `(batch_size, num_patches)`, *optional*)
            interpolate_pos_encoding (`bool`, *optional*): To accept another image size than the configured one.
            attention_mask (`torch.Tensor`, *optional*)
            execution_order (`str`, `list[int]` or `torch.LongTensor` of shape `(positions,)`, *optional*):
                Overrides the order for this call, in training too: `"sequential"`, `"arbitrary"` or layer indices.

        Raises:
            `ValueError`: if the order is not valid, or the images have another size or channel count.
        """
        if pixel_values is None:
            raise ValueError(
                "`pixel_values` is None; pass images of shape `(batch_size, num_channels, height, width)`."
            )
        order = self.resolve_execution_order(execution_order)
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states = self.embeddings(
            pixel_values, bool_masked_pos=bool_masked_pos, interpolate_pos_encoding=interpolate_pos_encoding
        )
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        depth_vectors = self._depth_vectors(len(order), hidden_states.device)
        position_logits = []
        for position, index in enumerate(order):
            hidden_states = self.layers[index](hidden_states, attention_mask, depth_vectors[position], **kwargs)
            if self.config.position_predictor:
                hidden_states, layer_position_logits = hidden_states
                position_logits.append(layer_position_logits)

        sequence_output = self.layernorm(hidden_states)
        pooled_output = self.pooler(sequence_output) if self.pooler is not None else None
        return LayerShuffleModelOutput(
            last_hidden_state=sequence_output,
            pooler_output=pooled_output,
            # non_blocking: a copy to the device that does not make the host wait for it
            execution_order=torch.tensor(order).to(hidden_states.device, non_blocking=True),
            position_logits=torch.stack(position_logits, dim=1) if position_logits else None,
        )

    def _depth_vectors(self, num_positions: int, device) -> list[torch.Tensor | None]:
        """One vector of shape `(depth_embedding_dim,)` a position; positions beyond the depth reuse the last one."""
        if self.depth_embedding is None:
            return [None] * num_positions
        vectors = self.depth_embedding(torch.arange(len(self.layers), device=device)).unbind(0)
        return [vectors[min(position, len(vectors) - 1)] for position in range(num_positions)]


class LayerShuffleForImageClassificationMixin(LayerShufflePreTrainedMixin):
    """The encoder and a linear classifier on its CLS token."""

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        execution_order=None,
        **kwargs,
    ) -> LayerShuffleImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`)
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Classes in `[0, num_labels)`, or -100 to
                leave an image out of the loss. For several classes an image, a `torch.FloatTensor` of shape
                `(batch_size, num_labels)` of numbers in `[0, 1]`.
            interpolate_pos_encoding (`bool`, *optional*): To accept another image size than the configured one.
            attention_mask (`torch.Tensor`, *optional*)
            execution_order (`str`, `list[int]` or `torch.LongTensor` of shape `(positions,)`, *optional*):
                Overrides the order for this call, in training too: `"sequential"`, `"arbitrary"` or layer indices.

        Raises:
            `ValueError`: if the order is not valid, the images have another size or channel count, the layers were cut by
                hand, or (where the labels are on the CPU) a label is outside the classes.
        """
        outputs = self.base_model(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            execution_order=execution_order,
            **kwargs,
        )
        logits = self.classifier(outputs.last_hidden_state[:, 0, :])

        loss = None
        if labels is not None:
            self._check_labels(labels)
            loss = self.loss_function(labels, logits, self.config, **kwargs)
            if self.training and outputs.position_logits is not None:
                loss = loss + self.config.position_loss_weight * position_loss(
                    outputs.position_logits, labels, kwargs.get("num_items_in_batch")
                )

        return LayerShuffleImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            execution_order=outputs.execution_order,
            position_logits=outputs.position_logits,
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


def position_loss(position_logits: torch.Tensor, labels: torch.Tensor | None = None, num_items_in_batch=None):
    """Cross-entropy of the predicted positions, mean over positions and over the images that count (arXiv 2407.04513).

    Args:
        position_logits (`torch.FloatTensor` of shape `(batch_size, positions, num_layers)`): Positions beyond the depth
            (orders with repeats) have no class and are left out.
        labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, labels_per_image)`, *optional*): An image whose
            labels are all -100 is left out, as of the class loss.
        num_items_in_batch (`int` or `torch.LongTensor`, *optional*): The Trainer's count of labels that are not -100 in all
            micro-batches of a step, by which the class loss is divided. The losses of the micro-batches then add up to
            that of the whole batch.

    Returns:
        `torch.FloatTensor` of shape `()` in float32, without `position_loss_weight`; 0 if no image counts.
    """
    batch_size, positions, num_layers = position_logits.shape
    positions = min(positions, num_layers)
    targets = torch.arange(positions, device=position_logits.device).expand(batch_size, -1)
    num_images = num_labels = batch_size
    if labels is not None:
        is_label = labels.to(targets.device).reshape(batch_size, labels.numel() // max(batch_size, 1)) != -100
        is_counted = is_label.any(dim=1)
        targets = targets.masked_fill(~is_counted[:, None], -100)
        num_images, num_labels = is_counted.sum().clamp(min=1), is_label.sum()
    logits = position_logits[:, :positions].flatten(0, 1).float()
    loss = nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum") / (positions * num_images)
    if num_items_in_batch is None:
        return loss
    # The part of the step's labels that this micro-batch has, by which its mean counts
    num_items_in_batch = torch.as_tensor(num_items_in_batch, device=loss.device)
    return loss * num_labels / (num_items_in_batch + (num_items_in_batch == 0))


def _is_sharded(model: nn.Module) -> bool:
    """Whether layers' weights are gathered from several processes when they run (FSDP, FSDP2, ZeRO-3, tensor parallel)."""
    return any(
        isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") or hasattr(parameter, "_is_flat_param")
        for parameter in model.parameters()
    ) or any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules())


# --- ViT ---


class LayerShuffleViTLayer(LayerShuffleLayerMixin, ViTLayer):
    pass


class LayerShuffleViTModel(LayerShuffleModelMixin, ViTModel):
    """[`ViTModel`] whose layers run in any execution order."""

    config: LayerShuffleViTConfig
    _no_split_modules = ["ViTEmbeddings", "LayerShuffleViTLayer"]

    def __init__(self, config: LayerShuffleViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        # Not ViTModel.__init__, which would first build and initialise the same number of plain layers
        ViTPreTrainedModel.__init__(self, config)
        self._init_layershuffle(config)
        self.embeddings = ViTEmbeddings(config, use_mask_token=use_mask_token)
        self.layers = nn.ModuleList([LayerShuffleViTLayer(config) for _ in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.post_init()


class LayerShuffleViTForImageClassification(LayerShuffleForImageClassificationMixin, ViTForImageClassification):
    """[`ViTForImageClassification`] whose layers run in any execution order."""

    config: LayerShuffleViTConfig
    _no_split_modules = LayerShuffleViTModel._no_split_modules

    def __init__(self, config: LayerShuffleViTConfig):
        ViTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.vit = LayerShuffleViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()


# --- DeiT ---


class LayerShuffleDeiTLayer(LayerShuffleLayerMixin, DeiTLayer):
    pass


class LayerShuffleDeiTModel(LayerShuffleModelMixin, DeiTModel):
    """[`DeiTModel`] whose layers run in any execution order."""

    config: LayerShuffleDeiTConfig
    _no_split_modules = ["DeiTEmbeddings", "LayerShuffleDeiTLayer"]

    def __init__(self, config: LayerShuffleDeiTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        DeiTPreTrainedModel.__init__(self, config)
        self._init_layershuffle(config)
        self.embeddings = DeiTEmbeddings(config, use_mask_token=use_mask_token)
        self.layers = nn.ModuleList([LayerShuffleDeiTLayer(config) for _ in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = DeiTPooler(config) if add_pooling_layer else None
        self.post_init()


class LayerShuffleDeiTForImageClassification(LayerShuffleForImageClassificationMixin, DeiTForImageClassification):
    """[`DeiTForImageClassification`] whose layers run in any execution order."""

    config: LayerShuffleDeiTConfig
    _no_split_modules = LayerShuffleDeiTModel._no_split_modules

    def __init__(self, config: LayerShuffleDeiTConfig):
        DeiTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.deit = LayerShuffleDeiTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()


_AUTO_MAPS = {}
for _config, _model, _classifier, _plain_name in (
    (LayerShuffleViTConfig, LayerShuffleViTModel, LayerShuffleViTForImageClassification, "ViTModel"),
    (LayerShuffleDeiTConfig, LayerShuffleDeiTModel, LayerShuffleDeiTForImageClassification, "DeiTModel"),
):
    # transformers renames the tensors of old checkpoints by class name; without this a ViT checkpoint loads with a
    # random encoder and a mere warning
    register_checkpoint_conversion_mapping(
        _model.__name__, get_checkpoint_conversion_mapping(_plain_name), overwrite=True
    )
    # These three make `save_pretrained` put the code beside the weights
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _classifier.register_for_auto_class("AutoModelForImageClassification")
    _AUTO_MAPS[_config.model_type] = {
        "AutoConfig": f"configuration_layershuffle.{_config.__name__}",
        "AutoModel": f"modeling_layershuffle.{_model.__name__}",
        "AutoModelForImageClassification": f"modeling_layershuffle.{_classifier.__name__}",
    }


__all__ = [
    "LayerShuffleDeiTForImageClassification",
    "LayerShuffleDeiTModel",
    "LayerShuffleImageClassifierOutput",
    "LayerShuffleModelOutput",
    "LayerShuffleViTForImageClassification",
    "LayerShuffleViTModel",
]
