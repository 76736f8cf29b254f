# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What is known of transformers' families: which were tested, and which cannot run their layers in any order.

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

from .auto_classes import plain_type_of


# By model type: those of `docs/encoders.md`, on whose classes the tests of every release run
TESTED_FAMILIES = frozenset(
    """
    vit deit vit_mae vit_msn ijepa dinov2 dinov2_with_registers dinov3_vit beit data2vec-vision timm_wrapper
    clip clip_vision_model siglip siglip_vision_model siglip2 siglip2_vision_model metaclip_2 aimv2_vision_model radio
    mlcd_vision_model pixtral bert roberta xlm-roberta distilbert electra mpnet deberta-v2 esm nomic_bert modernbert
    eurobert layoutlmv3 audio-spectrogram-transformer hubert wav2vec2 wav2vec2-bert whisper videomae vivit timesformer
    vjepa2 llama qwen3 gpt2 mistral gemma3_text internvl_vision pixio tipsv2_vision_model deberta camembert rembert
    roformer data2vec-audio
    """.split()
)

_STAGES = "its layers stand in stages of different sizes, so they cannot change places"
_CONVOLUTIONS = "it is a convolutional network, whose blocks differ in size, so they cannot change places"
_BY_INDEX = "its forward asks for its layers by their index, so it follows no execution order"
_FIRST_LAYER = "its first layer computes position biases for all others, so it has to run first"
_TWO_STACKS = "it has an encoder and a decoder, and a decoder's layers need the encoder's whole output"
_VISION = "dinov2, vit or another encoder whose layers are all alike"

_STAGED = """
    swin swinv2 donut-swin maskformer-swin focalnet hiera levit mobilevit mobilevitv2 poolformer pvt pvt_v2 cvt dinat
    segformer swiftformer glpn
    """.split()
_CONVOLUTIONAL = """
    bit convnext convnextv2 dinov3_convnext efficientnet hgnet_v2 mobilenet_v1 mobilenet_v2 pp_lcnet regnet resnet
    textnet
    """.split()
_ENCODER_DECODERS = """
    bart mbart plbart mvp bigbird_pegasus pegasus marian blenderbot m2m_100 t5gemma t5gemma2 led
    """.split()
# Families whose hidden states are of shape `(batch_size, channels, tokens)`
CHANNELS_FIRST = frozenset({"squeezebert"})
# Why a family is refused, and what to take instead
REFUSED_FAMILIES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(_STAGED, (_STAGES, _VISION)),
    **dict.fromkeys(_CONVOLUTIONAL, (_CONVOLUTIONS, _VISION)),
    **dict.fromkeys(_ENCODER_DECODERS, (_TWO_STACKS, "an encoder such as roberta or modernbert")),
    **dict.fromkeys(("t5", "mt5", "umt5"), (_FIRST_LAYER, "bert or modernbert")),
    **dict.fromkeys(("xlm", "flaubert"), (_BY_INDEX, "xlm-roberta or camembert")),
    "wavlm": (_FIRST_LAYER, "hubert or wav2vec2"),
    "yolos": (
        "it adds position embeddings between its layers, one for each index, so the layers cannot change places",
        "vit or dinov2",
    ),
    "albert": ("all its layers are one and the same, so there is no order to choose", "bert or roberta"),
    "perceiver": ("all its blocks are one and the same, run several times", "vit or bert"),
    "funnel": ("it pools its tokens between blocks of layers, so they cannot change places", "electra"),
    "canine": ("its layers stand in three encoders, of characters, of their summary and of characters again", "bert"),
    "reformer": ("its layers are reversible and run by a loop of their own", "longformer or big_bird"),
    **dict.fromkeys(("zamba", "zamba2"), ("its layers are of several kinds, and one of them is shared", "llama")),
}


def check_family(model_type: str | None, what: str) -> None:
    """Refuses a family whose layers cannot run in any order, with the reason and what to take instead.

    Args:
        model_type: Of transformers or of ours.
        what: The model or class, as the message names it.

    Raises:
        `ValueError`: if the family is in `REFUSED_FAMILIES`.
    """
    plain_type = plain_type_of(model_type or "")
    if plain_type in REFUSED_FAMILIES:
        reason, instead = REFUSED_FAMILIES[plain_type]
        named = what if f"'{plain_type}'" in what else f"{what} ('{plain_type}')"
        raise ValueError(f"{named} cannot run its layers in any order: {reason}. Take {instead}.")
