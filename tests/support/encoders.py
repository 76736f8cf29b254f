"""Tiny configurations of the families whose layers run in any order, for the tests and for docs/encoders.md.

A further family is one more entry of `ENCODERS`. All tests of tests/models/test_encoders.py then run on it, and
`make encoders` adds its row to the page.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import transformers as t

from hf_layershuffle.models.classification_heads import plain_class_of


NUM_LAYERS = 4
SIZES = dict(hidden_size=32, num_hidden_layers=NUM_LAYERS, num_attention_heads=4, intermediate_size=64)
IMAGE = dict(image_size=16, patch_size=4)
VIT = dict(**SIZES, **IMAGE)
TEXT = dict(vocab_size=100, max_position_embeddings=64)
BERT = dict(**SIZES, **TEXT)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
DINOV2 = dict(hidden_size=32, num_hidden_layers=NUM_LAYERS, num_attention_heads=4, mlp_ratio=2, **IMAGE)
WAV2VEC2 = dict(
    **SIZES, conv_dim=(32, 32), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, vocab_size=32,
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, apply_spec_augment=False, mask_time_prob=0.0,
    layerdrop=0.0,
)  # fmt: skip
WHISPER = dict(
    d_model=32, encoder_layers=NUM_LAYERS, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=100, max_source_positions=20, max_target_positions=20,
    num_mel_bins=8, classifier_proj_size=16, decoder_start_token_id=3, **SPECIAL,
)  # fmt: skip
VJEPA2 = dict(
    crop_size=16, patch_size=4, frames_per_clip=4, tubelet_size=2, hidden_size=24, num_hidden_layers=NUM_LAYERS,
    num_attention_heads=2, mlp_ratio=2, pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=2,
    num_pooler_layers=1,
)  # fmt: skip


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def images() -> dict[str, Any]:
    return {"pixel_values": randn(2, 3, 16, 16)}


def patches() -> dict[str, Any]:
    """Images as SigLIP 2 takes them: patches of its own number for each image."""
    mask = torch.ones(2, 16, dtype=torch.long)
    return {"pixel_values": randn(2, 16, 48), "pixel_attention_mask": mask, "spatial_shapes": torch.full((2, 2), 4)}


def texts() -> dict[str, Any]:
    words = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": words, "attention_mask": torch.tensor([[1] * 12, [1] * 9 + [0] * 3])}


def words() -> dict[str, Any]:
    """Texts of one length, for decoders."""
    return {"input_ids": texts()["input_ids"], "use_cache": False}


def sounds() -> dict[str, Any]:
    return {"input_values": randn(2, 800)}


def videos() -> dict[str, Any]:
    return {"pixel_values": randn(2, 4, 3, 16, 16)}


class Limit(NamedTuple):
    """What does not pass: words of the message that then comes (a regular expression), and why, for the page."""

    message: str
    why: str


@dataclass(frozen=True, eq=False)
class Encoder:
    """One row of the table.

    Args:
        name: Of the row.
        model_class: Name of a class of transformers, or of a classifier that transformers lacks.
        config: Makes a tiny configuration of it with `NUM_LAYERS` layers.
        inputs: Makes a batch of two examples.
        checkpoint: One of the Hub that many use.
        is_post_norm: Whether a layer ends in a norm. Layers that add nothing are then not the identity.
        limits: What does not pass, by the name of the check.
    """

    name: str
    model_class: str
    config: Callable[[], t.PreTrainedConfig]
    inputs: Callable[[], dict[str, Any]]
    checkpoint: str
    is_post_norm: bool = False
    limits: dict[str, Limit] = field(default_factory=dict)

    @property
    def is_classifier(self) -> bool:
        return "Classification" in self.model_class

    @property
    def model_type(self) -> str:
        return self.plain_class.config_class.model_type

    @property
    def plain_class(self) -> Any:
        """Of transformers, or one of our classifiers on an encoder of transformers."""
        return plain_class_of(self.model_class)


def _towers(config_class: Any, vision: dict, **text: Any) -> Callable[[], t.PreTrainedConfig]:
    """A configuration of two towers, of images and texts."""
    return lambda: config_class(vision_config=vision, text_config={**BERT, **text}, num_labels=5)


NO_CHECKPOINTING = {
    "checkpointing": Limit("does not support activation checkpointing", "transformers has none for this family."),
}
_NOT_BY_ACCELERATE = "accelerate cannot compile the plain model in this way; compile the layers by `layer.compile()`."
NO_REGIONS = {"compile regions": Limit(r"Module \[ModuleList\] is missing", _NOT_BY_ACCELERATE)}
POST = dict(is_post_norm=True)

IMAGE_ENCODERS = (
    Encoder("ViT", "ViTForImageClassification", lambda: t.ViTConfig(**VIT, num_labels=5), images,
            "google/vit-base-patch16-224"),
    Encoder("ViT, encoder", "ViTModel", lambda: t.ViTConfig(**VIT), images, "google/vit-base-patch16-224-in21k"),
    Encoder("DeiT", "DeiTForImageClassification", lambda: t.DeiTConfig(**VIT, num_labels=5), images,
            "facebook/deit-base-patch16-224"),
    Encoder("DeiT, distilled", "DeiTForImageClassificationWithTeacher", lambda: t.DeiTConfig(**VIT, num_labels=5),
            images, "facebook/deit-base-distilled-patch16-224"),
    Encoder("DINOv2", "Dinov2ForImageClassification",
            lambda: t.Dinov2Config(**DINOV2, layerscale_value=0.7, num_labels=5), images, "facebook/dinov2-base"),
    Encoder("DINOv2, drop path", "Dinov2ForImageClassification",
            lambda: t.Dinov2Config(**DINOV2, layerscale_value=0.7, drop_path_rate=0.2, num_labels=5), images,
            "facebook/dinov2-base"),
    Encoder("DINOv2, encoder", "Dinov2Model", lambda: t.Dinov2Config(**DINOV2), images, "facebook/dinov2-base"),
    Encoder("DINOv2 with registers", "Dinov2WithRegistersForImageClassification",
            lambda: t.Dinov2WithRegistersConfig(**DINOV2, num_labels=5), images,
            "facebook/dinov2-with-registers-base"),
    Encoder("DINOv3", "DINOv3ViTModel",
            lambda: t.DINOv3ViTConfig(**VIT, layerscale_value=0.7, num_register_tokens=4), images,
            "facebook/dinov3-vitb16-pretrain-lvd1689m"),
    Encoder("DINOv3, classifier", "DINOv3ViTForImageClassification",
            lambda: t.DINOv3ViTConfig(**VIT, num_register_tokens=4, num_labels=5), images,
            "facebook/dinov3-vitb16-pretrain-lvd1689m"),
    Encoder("CLIP", "CLIPForImageClassification", _towers(t.CLIPConfig, VIT), images, "openai/clip-vit-base-patch32"),
    Encoder("CLIP, vision tower", "CLIPVisionModel", lambda: t.CLIPVisionConfig(**VIT), images,
            "openai/clip-vit-base-patch32"),
    Encoder("CLIP, vision tower, classifier", "CLIPVisionForImageClassification",
            lambda: t.CLIPVisionConfig(**VIT, num_labels=5), images,
            "openai/clip-vit-base-patch32"),
    Encoder("MetaCLIP 2", "MetaClip2ForImageClassification", _towers(t.MetaClip2Config, VIT), images,
            "facebook/metaclip-2-worldwide-huge-quickgelu"),
    Encoder("SigLIP", "SiglipForImageClassification", _towers(t.SiglipConfig, VIT), images,
            "google/siglip-base-patch16-224"),
    Encoder("SigLIP, vision tower", "SiglipVisionModel", lambda: t.SiglipVisionConfig(**VIT), images,
            "google/siglip-base-patch16-224"),
    Encoder("SigLIP, vision tower, classifier", "SiglipVisionForImageClassification",
            lambda: t.SiglipVisionConfig(**VIT, num_labels=5), images,
            "google/siglip-base-patch16-224"),
    Encoder("SigLIP 2", "Siglip2ForImageClassification",
            _towers(t.Siglip2Config, dict(**SIZES, patch_size=4, num_patches=16)), patches,
            "google/siglip2-base-patch16-naflex"),
    Encoder("SigLIP 2, vision tower", "Siglip2VisionModel",
            lambda: t.Siglip2VisionConfig(**SIZES, patch_size=4, num_patches=16), patches,
            "google/siglip2-base-patch16-naflex"),
    Encoder("SigLIP 2, vision tower, classifier", "Siglip2VisionForImageClassification",
            lambda: t.Siglip2VisionConfig(**SIZES, patch_size=4, num_patches=16, num_labels=5), patches,
            "google/siglip2-base-patch16-naflex"),
    Encoder("BEiT, absolute positions", "BeitForImageClassification",
            lambda: t.BeitConfig(**VIT, num_labels=5, vocab_size=16, use_absolute_position_embeddings=True), images,
            "microsoft/beit-base-patch16-224"),
    Encoder("BEiT, relative bias", "BeitForImageClassification",
            lambda: t.BeitConfig(**VIT, num_labels=5, vocab_size=16, use_relative_position_bias=True), images,
            "microsoft/beit-base-patch16-224-pt22k-ft22k"),
    Encoder("BEiT, shared bias", "BeitForImageClassification",
            lambda: t.BeitConfig(**VIT, num_labels=5, vocab_size=16, use_shared_relative_position_bias=True), images,
            "microsoft/beit-base-patch16-224-pt22k"),
    Encoder("data2vec vision", "Data2VecVisionForImageClassification",
            lambda: t.Data2VecVisionConfig(**VIT, num_labels=5, use_relative_position_bias=True), images,
            "facebook/data2vec-vision-base-ft1k"),
    Encoder("ViT-MSN", "ViTMSNForImageClassification", lambda: t.ViTMSNConfig(**VIT, num_labels=5), images,
            "facebook/vit-msn-base"),
    Encoder("I-JEPA", "IJepaForImageClassification", lambda: t.IJepaConfig(**VIT, num_labels=5), images,
            "facebook/ijepa_vith14_1k"),
    Encoder("ViT-MAE", "ViTMAEModel", lambda: t.ViTMAEConfig(**VIT, mask_ratio=0.5),
            lambda: {**images(), "noise": randn(2, 16)}, "facebook/vit-mae-base"),
    Encoder("ViT-MAE, classifier", "ViTMAEForImageClassification",
            lambda: t.ViTMAEConfig(**VIT, num_labels=5), images,
            "facebook/vit-mae-base"),
    Encoder("AIMv2, vision tower", "Aimv2VisionModel", lambda: t.Aimv2VisionConfig(**VIT), images,
            "apple/aimv2-large-patch14-224"),
    Encoder("AIMv2, vision tower, classifier", "Aimv2VisionForImageClassification",
            lambda: t.Aimv2VisionConfig(**VIT, num_labels=5), images,
            "apple/aimv2-large-patch14-224"),
    Encoder("RADIO", "RadioModel", lambda: t.RadioConfig(**VIT), images, "nvidia/C-RADIOv4-H"),
    Encoder("RADIO, classifier", "RadioForImageClassification", lambda: t.RadioConfig(**VIT, num_labels=5), images,
            "nvidia/C-RADIOv4-H"),
    Encoder("MLCD, vision tower", "MLCDVisionModel", lambda: t.MLCDVisionConfig(**VIT), images,
            "DeepGlint-AI/mlcd-vit-bigG-patch14-448"),
    Encoder("MLCD, vision tower, classifier", "MLCDVisionForImageClassification",
            lambda: t.MLCDVisionConfig(**VIT, num_labels=5), images,
            "DeepGlint-AI/mlcd-vit-bigG-patch14-448"),
    Encoder("Pixtral, vision tower", "PixtralVisionModel", lambda: t.PixtralVisionConfig(**VIT),
            lambda: {**images(), "image_sizes": torch.tensor([[16, 16], [16, 16]])}, "mistral-community/pixtral-12b"),
    Encoder("InternVL, vision tower", "InternVLVisionModel",
            lambda: t.InternVLVisionConfig(**SIZES, image_size=(16, 16), patch_size=(4, 4)), images,
            "OpenGVLab/InternVL3-1B-hf"),
    Encoder("Pixio", "PixioModel", lambda: t.PixioConfig(**DINOV2), images, "facebook/pixio-vith16"),
    Encoder("TIPSv2, vision tower", "Tipsv2VisionModel", lambda: t.Tipsv2VisionConfig(**DINOV2), images,
            "google/tipsv2-b14"),
)  # fmt: skip
TEXT_ENCODERS = (
    Encoder("BERT", "BertForSequenceClassification", lambda: t.BertConfig(**BERT, num_labels=5), texts,
            "google-bert/bert-base-uncased", **POST),
    Encoder("BERT, encoder", "BertModel", lambda: t.BertConfig(**BERT), texts, "google-bert/bert-base-uncased",
            **POST),
    Encoder("RoBERTa", "RobertaForSequenceClassification", lambda: t.RobertaConfig(**BERT, num_labels=5), texts,
            "FacebookAI/roberta-base", **POST),
    Encoder("XLM-RoBERTa", "XLMRobertaForSequenceClassification", lambda: t.XLMRobertaConfig(**BERT, num_labels=5),
            texts, "FacebookAI/xlm-roberta-base", **POST),
    Encoder("DistilBERT", "DistilBertForSequenceClassification",
            lambda: t.DistilBertConfig(**TEXT, dim=32, n_layers=NUM_LAYERS, n_heads=4, hidden_dim=64, num_labels=5),
            texts, "distilbert/distilbert-base-uncased", **POST),
    Encoder("ModernBERT", "ModernBertForSequenceClassification",
            lambda: t.ModernBertConfig(**BERT, **SPECIAL, cls_token_id=1, sep_token_id=2, local_attention=4,
                                       global_attn_every_n_layers=2, num_labels=5),
            texts, "answerdotai/ModernBERT-base"),
    Encoder("ELECTRA", "ElectraForSequenceClassification",
            lambda: t.ElectraConfig(**BERT, embedding_size=16, num_labels=5), texts,
            "google/electra-base-discriminator", **POST),
    Encoder("MPNet", "MPNetForSequenceClassification", lambda: t.MPNetConfig(**BERT, num_labels=5), texts,
            "microsoft/mpnet-base", limits=NO_CHECKPOINTING, **POST),
    Encoder("DeBERTa", "DebertaForSequenceClassification",
            lambda: t.DebertaConfig(**BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], pad_token_id=0,
                                    num_labels=5),
            texts, "microsoft/deberta-base", **POST),
    Encoder("DeBERTa-v2", "DebertaV2ForSequenceClassification",
            lambda: t.DebertaV2Config(**BERT, relative_attention=True, position_buckets=8, share_att_key=True,
                                      pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", conv_kernel_size=3,
                                      position_biased_input=False, pad_token_id=0, num_labels=5),
            texts, "microsoft/deberta-v3-base", **POST),
    Encoder("ESM-2", "EsmForSequenceClassification",
            lambda: t.EsmConfig(**BERT, pad_token_id=1, mask_token_id=2, position_embedding_type="rotary",
                                num_labels=5),
            texts, "facebook/esm2_t12_35M_UR50D",
            limits={"compile regions": Limit("LayerNorm does not support len", _NOT_BY_ACCELERATE)}),
    Encoder("NomicBERT", "NomicBertForSequenceClassification", lambda: t.NomicBertConfig(**BERT, num_labels=5), texts,
            "nomic-ai/nomic-embed-text-v1.5", **POST),
    Encoder("EuroBERT", "EuroBertForSequenceClassification",
            lambda: t.EuroBertConfig(**BERT, **SPECIAL, num_labels=5), texts, "EuroBERT/EuroBERT-210m"),
    Encoder("CamemBERT", "CamembertForSequenceClassification", lambda: t.CamembertConfig(**BERT, num_labels=5),
            texts, "almanach/camembert-base", **POST),
    Encoder("RemBERT", "RemBertForSequenceClassification",
            lambda: t.RemBertConfig(**BERT, **SPECIAL, input_embedding_size=16, num_labels=5), texts,
            "google/rembert", **POST),
    Encoder("RoFormer", "RoFormerForSequenceClassification",
            lambda: t.RoFormerConfig(**BERT, embedding_size=16, num_labels=5), texts,
            "junnyu/roformer_chinese_base", **POST),
    Encoder("LayoutLMv3, images", "LayoutLMv3Model",
            lambda: t.LayoutLMv3Config(**BERT, input_size=16, patch_size=4, has_spatial_attention_bias=False,
                                       coordinate_size=4, shape_size=8, max_2d_position_embeddings=64),
            images, "microsoft/layoutlmv3-base", limits=NO_CHECKPOINTING, **POST),
)  # fmt: skip
AUDIO_ENCODERS = (
    Encoder("AST", "ASTForAudioClassification",
            lambda: t.ASTConfig(**SIZES, patch_size=4, max_length=32, num_mel_bins=16, frequency_stride=4,
                                time_stride=4, num_labels=5),
            lambda: {"input_values": randn(2, 32, 16)}, "MIT/ast-finetuned-audioset-10-10-0.4593"),
    Encoder("Wav2Vec2, post-norm", "Wav2Vec2ForSequenceClassification",
            lambda: t.Wav2Vec2Config(**WAV2VEC2, num_labels=5), sounds, "facebook/wav2vec2-base",
            limits=NO_REGIONS, **POST),
    Encoder("Wav2Vec2, pre-norm", "Wav2Vec2ForSequenceClassification",
            lambda: t.Wav2Vec2Config(**WAV2VEC2, do_stable_layer_norm=True, feat_extract_norm="layer", num_labels=5),
            sounds, "facebook/wav2vec2-large-lv60", limits=NO_REGIONS),
    Encoder("HuBERT", "HubertForSequenceClassification", lambda: t.HubertConfig(**WAV2VEC2, num_labels=5), sounds,
            "facebook/hubert-base-ls960", limits=NO_REGIONS, **POST),
    Encoder("Data2Vec audio", "Data2VecAudioForSequenceClassification",
            lambda: t.Data2VecAudioConfig(**WAV2VEC2, num_labels=5), sounds, "facebook/data2vec-audio-base", **POST),
    Encoder("Wav2Vec2-BERT", "Wav2Vec2BertForSequenceClassification",
            lambda: t.Wav2Vec2BertConfig(**SIZES, feature_projection_input_dim=16, layerdrop=0.0, add_adapter=False,
                                         conv_depthwise_kernel_size=3, apply_spec_augment=False, num_labels=5),
            lambda: {"input_features": randn(2, 20, 16)}, "facebook/w2v-bert-2.0",
            **POST),
    Encoder("Whisper, encoder", "WhisperForAudioClassification", lambda: t.WhisperConfig(**WHISPER, num_labels=5),
            lambda: {"input_features": randn(2, 8, 40)}, "openai/whisper-base"),
)  # fmt: skip
VIDEO_ENCODERS = (
    Encoder("VideoMAE", "VideoMAEForVideoClassification",
            lambda: t.VideoMAEConfig(**VIT, num_frames=4, tubelet_size=2, num_labels=5), videos,
            "MCG-NJU/videomae-base-finetuned-kinetics"),
    Encoder("ViViT", "VivitForVideoClassification",
            lambda: t.VivitConfig(**SIZES, image_size=16, num_frames=4, tubelet_size=[2, 4, 4], num_labels=5), videos,
            "google/vivit-b-16x2-kinetics400"),
    Encoder("TimeSformer", "TimesformerForVideoClassification",
            lambda: t.TimesformerConfig(**VIT, num_frames=4, num_labels=5), videos,
            "facebook/timesformer-base-finetuned-k400"),
    Encoder("V-JEPA 2", "VJEPA2ForVideoClassification", lambda: t.VJEPA2Config(**VJEPA2, num_labels=5),
            lambda: {"pixel_values_videos": randn(2, 4, 3, 16, 16)}, "facebook/vjepa2-vitl-fpc16-256-ssv2"),
    Encoder("V-JEPA 2, encoder", "VJEPA2Model", lambda: t.VJEPA2Config(**VJEPA2),
            lambda: {"pixel_values_videos": randn(2, 4, 3, 16, 16), "skip_predictor": True},
            "facebook/vjepa2-vitl-fpc64-256"),
)  # fmt: skip
DECODERS = (
    Encoder("GPT-2, classifier", "GPT2ForSequenceClassification",
            lambda: t.GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=NUM_LAYERS, n_head=4,
                                 pad_token_id=0, num_labels=5),
            words, "openai-community/gpt2"),
    Encoder("Llama, classifier", "LlamaForSequenceClassification",
            lambda: t.LlamaConfig(**BERT, **SPECIAL, num_key_value_heads=2, num_labels=5), words,
            "meta-llama/Llama-3.2-1B"),
    Encoder("Qwen3, classifier", "Qwen3ForSequenceClassification",
            lambda: t.Qwen3Config(**BERT, **SPECIAL, num_key_value_heads=2, head_dim=8, num_labels=5), words,
            "Qwen/Qwen3-0.6B"),
    Encoder("Qwen3 with sliding attention, classifier", "Qwen3ForSequenceClassification",
            lambda: t.Qwen3Config(**BERT, **SPECIAL, num_key_value_heads=2, head_dim=8, use_sliding_window=True,
                                  sliding_window=4, max_window_layers=2, num_labels=5),
            words, "Qwen/Qwen3-0.6B"),
)  # fmt: skip
GROUPS = {
    "Images": IMAGE_ENCODERS,
    "Texts": TEXT_ENCODERS,
    "Audio": AUDIO_ENCODERS,
    "Video": VIDEO_ENCODERS,
    "Decoders as classifiers": DECODERS,
}
ENCODERS = {encoder.name: encoder for encoders in GROUPS.values() for encoder in encoders}


def _swin(config_class: Any) -> Callable[[], t.PreTrainedConfig]:
    sizes = dict(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4)
    return lambda: config_class(**sizes)


def _refused(message: str) -> dict[str, Limit]:
    return {"refused": Limit(message, "")}


# Families that cannot have free order: what the refusal says of it
REFUSED = (
    Encoder("WavLM", "WavLMForSequenceClassification", lambda: t.WavLMConfig(**WAV2VEC2), sounds,
            "microsoft/wavlm-base", limits=_refused("its first layer computes position biases")),
    Encoder("YOLOS", "YolosModel", lambda: t.YolosConfig(**SIZES, image_size=[16, 16], patch_size=4), images,
            "hustvl/yolos-tiny", limits=_refused("it adds position embeddings between its layers")),
    Encoder("ALBERT", "AlbertForSequenceClassification", lambda: t.AlbertConfig(**BERT, embedding_size=16), texts,
            "albert/albert-base-v2", limits=_refused("all its layers are one and the same")),
    Encoder("Swin", "SwinForImageClassification", _swin(t.SwinConfig),
            lambda: {"pixel_values": randn(2, 3, 32, 32)}, "microsoft/swin-tiny-patch4-window7-224",
            limits=_refused("its layers stand in stages")),
    Encoder("ConvNeXT", "ConvNextForImageClassification", lambda: t.ConvNextConfig(hidden_sizes=[8, 8, 16, 16]),
            lambda: {"pixel_values": randn(2, 3, 64, 64)}, "facebook/convnext-tiny-224",
            limits=_refused("it is a convolutional network")),
    Encoder("ResNet", "ResNetForImageClassification", t.ResNetConfig, images, "microsoft/resnet-50",
            limits=_refused("it is a convolutional network")),
    Encoder("XLM", "XLMForSequenceClassification",
            lambda: t.XLMConfig(vocab_size=100, emb_dim=32, n_layers=NUM_LAYERS, n_heads=4,
                                max_position_embeddings=64),
            texts, "FacebookAI/xlm-mlm-en-2048", limits=_refused("asks for its layers by their index")),
    Encoder("FlauBERT", "FlaubertForSequenceClassification",
            lambda: t.FlaubertConfig(vocab_size=100, emb_dim=32, n_layers=NUM_LAYERS, n_heads=4,
                                     max_position_embeddings=64),
            texts, "flaubert/flaubert_base_cased", limits=_refused("asks for its layers by their index")),
)  # fmt: skip
