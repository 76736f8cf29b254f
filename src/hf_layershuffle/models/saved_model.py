# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Loading and saving models with free layer order.

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .auto_classes import auto_map_of
from .configuration_layershuffle import num_layers_of
from .free_layers import FreeLayersMixin


# Parts of an encoder that a checkpoint may lack, since a model can be given them anew. A part is there whole or not
_MAY_BE_NEW = (
    ".depth_embedding.",
    ".depth_projection.",
    ".position_head.",
    ".halting_head.",
    ".layer_controller.",
    ".mask_token",
    ".pooler.",
    ".head.",
)
_HUB_ARGUMENTS = ("repo_id", "private", "revision", "token", "commit_message", "commit_description", "create_pr")


class SavedModelMixin(FreeLayersMixin):
    """Loading refuses what it cannot read; saved folders serve all Auto classes; pushing adds a card."""

    plain_class: ClassVar[type[PreTrainedModel]]
    # Gives the module that publishes models with their cards. The package sets it, and a model from the Hub has none
    publisher: ClassVar[Callable[[], ModuleType] | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads as transformers does: LayerShuffle checkpoints, and plain ones of the family with old or new tensor
        names.

        Raises:
            `ValueError`: if a tensor has another shape than in the checkpoint, a tensor of the encoder is missing
                there (the head, the depth path and the position heads may be new), or the configuration is not valid.
            `OSError`: if a file is missing, truncated or corrupted.
        """
        try:
            parent: Any = super()
            model, loading_info = parent.from_pretrained(
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
                f"'{pretrained_model_name_or_path}' holds tensors of other shapes than this model: {mismatches}. "
                "A classifier has `num_labels` outputs, a position predictor or layer controller `num_hidden_layers`. "
                "Pass `ignore_mismatched_sizes=True` (--ignore_mismatched_sizes) to start these tensors anew."
            )
        _check_nothing_lost(model, loading_info, pretrained_model_name_or_path)
        return (model, loading_info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        *args: Any,
        save_original_format: bool = False,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves as transformers does, but with the tensor names of the modules (`save_original_format=False`).

        The folder serves `AutoModel` and the Auto classes of classifiers and causal models, whichever class was saved,
        and those that take the class that was saved. They load it with this package or by `trust_remote_code=True`.

        Raises:
            `ValueError`: if the number of layers is not the configuration's, see [`prune_layers`], or fields of the
                configuration that were set do not go together, so that it could not be loaded.
        """
        self.check_depth()
        self.config.check_layershuffle()
        # transformers would note the saved class only, and `AutoModel` on a classifier's repository would then fail
        self.config.auto_map = auto_map_of(self.config, type(self).plain_class)
        publisher = type(self).publisher
        publishes = push_to_hub and publisher is not None
        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if publishes and name in kwargs}
        # With the old tensor names, which are its default for ViT, the Trainer of transformers 5.23 resumes and
        # reloads the best checkpoint by `load_state_dict(strict=False)`: it loads nothing and only warns
        parent: Any = super()
        with _called_as_before_sharding(type(self)):
            parent.save_pretrained(
                save_directory,
                is_main_process,
                *args,
                save_original_format=save_original_format,
                push_to_hub=push_to_hub and not publishes,
                **kwargs,
            )
            if is_main_process and not self.is_remote_code():  # a class that no Auto class takes
                custom_object_save(self, save_directory)
        if push_to_hub and publisher is not None and is_main_process:
            repo_id = hub.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            publisher().publish(save_directory, repo_id, **hub)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # type: ignore[override]  # transformers': `*args`
        """Pushes as transformers does. With this package, the model's card and an `image_processor` go with it (see
        [`push_model`]), and all files arrive in one commit."""
        publisher = type(self).publisher
        if publisher is None:
            parent: Any = super()
            return parent.push_to_hub(repo_id, **kwargs)
        return publisher().push_model(self, repo_id, **kwargs)


@contextmanager
def _called_as_before_sharding(model_class: Any) -> Iterator[None]:
    """Lends the class of a sharded model the name of the class that it was.

    FSDP2 puts a class of PyTorch's in its place. transformers would note that one's name, and save its code.
    """
    before = next(each for each in model_class.__mro__ if not each.__module__.startswith("torch."))
    names = model_class.__name__, model_class.__module__
    model_class.__name__, model_class.__module__ = before.__name__, before.__module__
    try:
        yield
    finally:
        model_class.__name__, model_class.__module__ = names


def _check_nothing_lost(model: PreTrainedModel, loading_info: dict, name: str | os.PathLike | None) -> None:
    """Raises a `ValueError` if tensors are missing in a checkpoint, of which transformers would only warn."""
    # The module that holds the layers, such as "vit"; all of a model that is an encoder alone
    is_alone = model.base_model is model and "Classification" not in type(model).__name__
    encoder = "" if is_alone else str(model.layers_path).partition(".")[0]
    part_of = {key: _new_part(key, encoder) for key, _ in model.named_parameters()}
    needed: set[str | None] = {None, *(part_of[key] for key in part_of.keys() - loading_info["missing_keys"])}
    lost = sorted(key for key in loading_info["missing_keys"] if part_of.get(key) in needed)
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise ValueError(
            f"'{name}' lacks tensors of this model: {', '.join(lost[:3])}{more}. Its weights are incomplete, or "
            f"`num_hidden_layers` ({num_layers_of(model.config)}) is more than it has layers. Copy or download it "
            "again, or correct its config.json."
        )


def _new_part(key: str, encoder: str) -> str | None:
    """The part that a tensor belongs to, of those that a checkpoint may lack; None for the rest of the encoder."""
    root = key.partition(".")[0]
    if encoder not in ("", root) and "_model" not in root:  # the classifier, and not another tower
        return root
    return next((part for part in _MAY_BE_NEW if part in f".{key}"), None)
