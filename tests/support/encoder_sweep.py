"""The sweep over all classification classes of transformers: configurations made tiny by rules, and what they pass.

    python experiments/encoder_table.py --only sweep      # or `make encoders`, which does all

A class has one of these results: it "passed" all checks; it is "refused" by a `ValueError` of ours; it "failed" a
check; or it was "not built", since no rule makes a tiny one of it or finds an input for it.
"""

import contextlib
import inspect
import signal
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from support.encoder_checks import FAST_CHECKS, one_line, plain_model
from support.encoders import ENCODERS, NUM_LAYERS, SPECIAL, Encoder, randn


KINDS = {
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "video": modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
    "audio": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "text": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
CHECKS = ("plain", "order", "subset", "repeat", "gradients", "save and load", "old names")
RESULTS = ("not built", "failed", "refused", "passed")  # from the worst to the best
SECONDS, MOST_PARAMETERS = 60, 30e6
VOCABULARY = 128
# Fields of configurations by what they hold, and the value of a tiny model
SIZES: dict[tuple[str, ...], Any] = {
    ("hidden_size", "d_model", "dim", "n_embd", "embed_dim", "embedding_size", "emb_dim"): 32,
    ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers",
     "num_decoder_layers", "depth"): NUM_LAYERS,
    ("num_attention_heads", "n_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads",
     "num_key_value_heads", "num_heads", "num_experts", "num_local_experts", "n_routed_experts", "num_frames"): 4,
    ("intermediate_size", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_dim", "n_inner",
     "moe_intermediate_size", "ffn_hidden_size"): 64,
    ("vocab_size",): VOCABULARY,
    ("image_size",): 32,
    ("patch_size", "head_dim", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "coordinate_size",
     "shape_size", "rotary_dim", "attention_window"): 8,
    ("max_position_embeddings", "n_positions", "max_source_positions", "max_2d_position_embeddings"): 64,
    ("num_mel_bins", "feature_projection_input_dim", "q_lora_rank", "kv_lora_rank"): 16,
    ("sliding_window", "local_attention"): 4,
    ("num_experts_per_tok", "num_conv_pos_embedding_groups", "n_group", "topk_group"): 2,
    ("num_conv_pos_embeddings",): 16,
    ("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "mask_time_prob", "drop_path_rate"): 0.0,
    ("apply_spec_augment", "add_adapter", "has_spatial_attention_bias"): False,
}  # fmt: skip
TINY = {name: value for names, value in SIZES.items() for name in names}
# Fields of a model type, where the rules do not make a configuration that fits together
OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": 32},
    "luke": {"entity_vocab_size": 100, "entity_emb_size": 32},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "swin": {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2},
    "swinv2": {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2},
    "donut-swin": {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2},
    "t5": {"decoder_start_token_id": 0},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}
# Convolutions before the layers of encoders of sounds
CONVOLUTIONS = dict(conv_dim=(32, 32), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2)


@lru_cache
def classification_classes() -> dict[str, tuple[str, str]]:
    """Kind and model type of each class, by its name."""
    found: dict[str, tuple[str, str]] = {}
    for kind, names in KINDS.items():
        for model_type, name in names.items():
            found.setdefault(name[0] if isinstance(name, tuple) else name, (kind, model_type))
    return found


# --- Tiny configurations ---


def tiny_config(config_class: Any, kind: str = "text") -> transformers.PreTrainedConfig:
    """A configuration with `NUM_LAYERS` layers and a width of 32.

    Raises:
        `Exception`: that of the configuration, if it takes none of the values that are tried.
    """
    default = config_class()
    wanted = {}
    for name, value in default.to_dict().items():
        if name in TINY and type(value) is type(TINY[name]):
            wanted[name] = TINY[name]
        elif name == "layer_types" and isinstance(value, list):
            wanted[name] = value[:NUM_LAYERS]
        elif name.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
            wanted[name] = SPECIAL.get(name, 3)
        elif name in CONVOLUTIONS:
            wanted[name] = CONVOLUTIONS[name]
    for name, sub_class in getattr(config_class, "sub_configs", {}).items():
        if isinstance(getattr(default, name, None), transformers.PreTrainedConfig):
            sub_class = type(getattr(default, name))
            wanted[name] = tiny_config(sub_class).to_dict()
    if kind == "text":
        wanted.setdefault("pad_token_id", 0)
        if getattr(default, "eos_token_id", None) is None and hasattr(default, "eos_token_id"):
            wanted["eos_token_id"] = 2
    wanted |= {"num_labels": 5, **OVERRIDES.get(config_class.model_type, {})}
    error: Exception | None = None
    for left_out in ((), ("head_dim",), ("layer_types",), ("head_dim", "layer_types")):
        try:
            return config_class(**{name: value for name, value in wanted.items() if name not in left_out})
        except Exception as caught:  # of any kind: configurations check themselves in many ways
            error = caught
    raise error if error is not None else AssertionError


def _inputs(kind: str, config: Any) -> Iterator[dict[str, Any]]:
    """Batches of two examples, one of which the class may take."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 32)
    size = size if isinstance(size, int) else 32
    words = torch.randint(5, 90, (2, 10), generator=torch.Generator().manual_seed(1))
    if isinstance(getattr(config, "eos_token_id", None), int):
        words[:, -1] = config.eos_token_id
    if kind == "image":
        yield {"pixel_values": randn(2, 3, size, size)}
        yield {"pixel_values": randn(2, 3, 64, 64)}
        yield {"pixel_values": randn(2, 3, 224, 224)}
        mask = torch.ones(2, 16, dtype=torch.long)
        patches = randn(2, 16, 3 * getattr(vision, "patch_size", 8) ** 2)
        yield {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.full((2, 2), 4)}
        yield {"input_ids": words}
    elif kind == "video":
        for frames in (4, 2, 16):
            yield {"pixel_values": randn(2, frames, 3, size, size)}
            yield {"pixel_values_videos": randn(2, frames, 3, size, size)}
    elif kind == "audio":
        yield {"input_values": randn(2, 1600)}
        yield {"input_values": randn(2, getattr(config, "max_length", 32), getattr(config, "num_mel_bins", 16))}
        yield {"input_features": randn(2, 20, 16)}
        yield {"input_features": randn(2, getattr(config, "num_mel_bins", 16), 128)}
    else:
        yield {"input_ids": words}
        yield {"input_ids": words, "bbox": torch.zeros(2, 10, 4, dtype=torch.long)}
        yield {"input_ids": words, "pixel_values": randn(2, 3, 32, 32)}


@contextlib.contextmanager
def within_seconds(seconds: int) -> Iterator[None]:
    """Raises a `TimeoutError` in what takes longer. In the main thread only."""

    def raise_timeout(*args: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, raise_timeout)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@torch.no_grad()
def tiny_encoder(name: str) -> Encoder:
    """A class with a tiny configuration and an input it takes.

    Raises:
        `Exception`: if no rule makes one.
    """
    kind, model_type = classification_classes()[name]
    for known in ENCODERS.values():
        if known.model_class == name and not known.limits.keys() & set(CHECKS):
            return known
    config_class = transformers.CONFIG_MAPPING[model_type]
    model_class = getattr(transformers, name)

    def config() -> transformers.PreTrainedConfig:
        made = tiny_config(config_class, kind)
        if hasattr(made, "use_cache"):
            made.use_cache = False
        return made

    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in model_class(config()).parameters())
    if num_parameters > MOST_PARAMETERS:
        raise ValueError(f"its tiny configuration has {num_parameters / 1e6:.0f} million parameters")
    errors = []
    for inputs in _inputs(kind, config()):
        if not inputs.keys() <= inspect.signature(model_class.forward).parameters.keys():
            continue
        encoder = Encoder(name, name, config, lambda inputs=inputs: inputs, model_type)
        try:
            plain_model(encoder)(**inputs)
            return encoder
        except TimeoutError:
            raise
        except Exception as error:
            errors.append(error)
    raise errors[0] if errors else ValueError("no input of the sweep is one of its arguments")


def sweep(name: str) -> dict[str, str]:
    """`{"result": one of RESULTS, "reason": of the first check that did not pass}` of a class."""
    try:
        with within_seconds(SECONDS):
            try:
                encoder = tiny_encoder(name)
            except TimeoutError:
                raise
            except Exception as error:
                return {"result": "not built", "reason": one_line(error)}
            for check in CHECKS:
                try:
                    FAST_CHECKS[check](encoder)
                except TimeoutError:
                    raise
                except Exception as error:
                    is_refused = type(error) is ValueError and " order" in str(error)
                    result = "refused" if is_refused else "failed"
                    return {"result": result, "reason": f"{check}: {one_line(error)}"}
    except TimeoutError as error:
        return {"result": "failed", "reason": one_line(error)}
    return {"result": "passed", "reason": ""}
