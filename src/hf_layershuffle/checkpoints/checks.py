# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint must be before anything is done with it: whole, trained, finite, and safe to read."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .locations import checkpoints_of, has_weights


ADAPTER_FILE = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# GPT-2's and timm's layers are told by their weights, since earlier checkpoints of such families hold masks, too
_OF_A_LAYER = re.compile(r"\blayers?\.\d+\.|\b(h|blocks?)\.\d+\..*weight$")
# Tensors that a flag of ours adds, which a checkpoint need not hold where the flag is asked for
_NEW_BY_REQUEST = {
    "depth_embedding": ("depth_embedding", "depth_projection"),
    "position_predictor": ("position_head",),
    "halting_head": ("halting_head",),
    "layer_controller": ("layer_controller",),
}


@contextmanager
def explained_reading(what: str) -> Iterator[None]:
    """Turns whatever goes wrong in reading files of others into an error of one line that names `what`.

    The readers' errors have no base class in common: `KeyError`, `RecursionError`, `BadZipFile`, a configuration's
    validation, a division by the zero that a file holds.

    Raises:
        `ValueError`, `OSError`: those of the readers as they are; all others as `OSError`.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if "use_safetensors" in str(error):  # of transformers, for weights on the Hub
            raise ValueError(
                f"{what} holds no safetensors weights; pickles, which may run code when they are read, are not opened."
            ) from error
        text, _, all_types = str(error).partition(", or one of the following")
        if all_types:  # hundreds of transformers' model types
            raise type(error)(f"{text}.") from error
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{what} comes with code of its own, which is not run. If you have read and trust that code, add "
            "--trust_remote_code (`trust_remote_code=True`)."
        ) from error
    except SafetensorError as error:  # of transformers' own classes; ours say it themselves
        raise OSError(
            f"The weights of {what} cannot be read ({error}); the safetensors file is truncated or corrupted. Copy or "
            "download it again."
        ) from error
    except (ImportError, MemoryError, torch.OutOfMemoryError):  # not the files' fault
        raise
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise _unreadable(what, error) from error
        raise ValueError(f"{what} cannot be loaded so: {error}. Correct the argument, or leave it out.") from error
    except Exception as error:
        raise _unreadable(what, error) from error


def _unreadable(what: str, error: Exception) -> OSError:
    reason = " ".join(str(error).split())
    return OSError(
        f"{what} cannot be read ({type(error).__name__}: {reason[:300]}). A file is damaged, or not what its name "
        "says; copy, download or save it again."
    )


def check_model_files(folder: str | os.PathLike) -> None:
    """Refuses a folder that holds an adapter or a run's checkpoints instead of a model, or weights in pickles only.

    Raises:
        `ValueError`: if it does.
    """
    check_no_adapter(folder)
    folder = Path(folder)
    _refuse_folder_of_checkpoints(folder)
    pickles = [
        path.name for path in sorted(folder.glob("*")) if path.suffix in _PICKLES and path.name != "training_args.bin"
    ]
    if pickles and not has_weights(folder):
        raise ValueError(
            f"'{folder}' holds {', '.join(pickles)}: pickles, which may run code when they are read and are not "
            "opened. Take a checkpoint with safetensors weights."
        )


def _refuse_folder_of_checkpoints(folder: Path) -> None:
    """Refuses the output folder of a training that holds its checkpoints only."""
    if (folder / "config.json").exists() or has_weights(folder):
        return
    for checkpoint in checkpoints_of(folder):
        check_no_adapter(checkpoint)
        if (checkpoint / "config.json").exists() and has_weights(checkpoint):
            raise ValueError(
                f"'{folder}' holds checkpoints of a training, and no model beside them. Take a checkpoint: "
                f"'{checkpoint}'. If the training was stopped, the same command goes on with it."
            )


def check_no_adapter(folder: str | os.PathLike) -> None:
    """Refuses a folder that holds a PEFT adapter instead of a model.

    Raises:
        `ValueError`: if it does.
    """
    if Path(folder, ADAPTER_FILE).exists():
        raise ValueError(
            f"'{folder}' holds a PEFT adapter ('{ADAPTER_FILE}'), such as LoRA, and not a whole model. Load it with "
            "peft, put it into the model's weights by `model.merge_and_unload()`, and save the result with "
            "`save_pretrained`."
        )


def check_complete(
    what: str,
    missing: Iterable[str],
    unexpected: Iterable[str] = (),
    requested: Iterable[str] = (),
    input_kind: str = "image",
) -> None:
    """Refuses a checkpoint that lacks tensors of its model, which would be random, or that has too many layers.

    Args:
        what: The model, as the message names it.
        missing: Names of tensors that the model has and the checkpoint lacks.
        unexpected: Names of tensors that the checkpoint has and the model lacks.
        requested: Arguments of `from_pretrained`, such as `depth_embedding`, which may ask for new tensors.
        input_kind: What the model classifies, such as "image" or "text"; nothing if it is no classifier.

    Raises:
        `ValueError`: naming the tensors and the remedy.
    """
    by_request = [part for flag in requested for part in _NEW_BY_REQUEST.get(flag, ())]
    missing = sorted(name for name in missing if not any(part in name for part in by_request))
    if missing:
        kind = f"trained {input_kind} classifier" if input_kind else "complete model"
        raise ValueError(f"{what} is no {kind}: its weights lack {_some(missing)}. {_remedy(missing, unexpected)}")
    surplus = sorted(name for name in unexpected if _OF_A_LAYER.search(name) and "position_head" not in name)
    if surplus and not {"num_hidden_layers", *_NEW_BY_REQUEST} & set(requested):
        raise ValueError(
            f"{what} holds weights of layers for which its config.json has no place: {_some(surplus)}. See that "
            "`num_hidden_layers` and `depth_embedding` are those of the model that was saved; to leave layers out, "
            "prune it."
        )


def _remedy(missing: list[str], unexpected: Iterable[str]) -> str:
    if any(name.startswith("distillation_classifier") for name in unexpected):
        return (
            "It is a distilled DeiT, whose two heads read two tokens; a classifier here has one. Take a DeiT with one "
            "head, such as facebook/deit-base-patch16-224, or fine-tune this one first."
        )
    if all("classifier" in name for name in missing):
        return "It is a model without a trained head; fine-tune it first (--model_name_or_path of a training)."
    return "The checkpoint is not complete, or its config.json is of another model; copy, download or save it again."


def check_finite(what: str, tensors: Iterable[tuple[str, Any]]) -> None:
    """Refuses a model whose tensors hold NaN or infinite values, as a training that diverged leaves them.

    Args:
        what: The model, as the message names it.
        tensors: Names, and tensors or objects with `is_finite()`.

    Raises:
        `ValueError`: naming the tensors.
    """
    broken = [name for name, tensor in tensors if not _is_finite(tensor)]
    if broken:
        raise ValueError(
            f"{what} holds NaN or infinite values in {_some(broken)}. Its training diverged; take an earlier "
            "checkpoint."
        )


def _is_finite(tensor: Any) -> bool:
    if not isinstance(tensor, torch.Tensor):
        return tensor.is_finite()
    # One on the meta device has its values in a file, as of a model that is offloaded to disk
    if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # The least and the largest number tell, without a mask of the tensor's size
    return all(bound.isfinite() for bound in tensor.detach().aminmax())


def _some(names: list[str]) -> str:
    """The first of them by name, and how many more there are."""
    more = f" and {len(names) - 4} more tensors" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
