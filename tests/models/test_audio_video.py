"""Classifiers of sounds and videos: trained in arbitrary order, saved, loaded, measured, pruned, exported, carded."""

import json
import os
import re
import sys

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import run_python
from torch import nn
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForAudioClassification,
    AutoModelForVideoClassification,
    pipeline,
)

import hf_layershuffle as ls
from hf_layershuffle.checkpoints.image_processors import load_image_processor
from hf_layershuffle.hub.model_card import build_model_card


SIZES = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
NAMES = ["low", "high"]  # tones, and the half of a video that is bright
LABELS = dict(id2label=dict(enumerate(NAMES)), label2id={name: number for number, name in enumerate(NAMES)})
WAVES = dict(
    **SIZES, conv_dim=(32, 32), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, vocab_size=32,
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, layerdrop=0.0, apply_spec_augment=False, **LABELS,
)  # fmt: skip
FRAMES = dict(**SIZES, image_size=16, num_frames=4, **LABELS)
FRAME_SIZE = dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def whisper_config() -> transformers.WhisperConfig:
    return transformers.WhisperConfig(
        d_model=32, encoder_layers=4, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=100, num_mel_bins=16, max_source_positions=50,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, init_std=0.05, **LABELS,
    )  # fmt: skip


def ast_config() -> transformers.ASTConfig:
    return transformers.ASTConfig(
        **SIZES, patch_size=4, max_length=8, num_mel_bins=16, frequency_stride=4, time_stride=4, **LABELS
    )


# Name: class, configuration, what makes inputs of a clip
SOUND_MODELS = {
    "ast": (
        "ASTForAudioClassification",
        ast_config,
        lambda: transformers.ASTFeatureExtractor(max_length=8, num_mel_bins=16, mean=0.0, std=5.0),
    ),
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification",
        lambda: transformers.Wav2Vec2Config(**WAVES),
        transformers.Wav2Vec2FeatureExtractor,
    ),
    "hubert": (
        "HubertForSequenceClassification",
        lambda: transformers.HubertConfig(**WAVES),
        transformers.Wav2Vec2FeatureExtractor,
    ),
    "whisper": (
        "WhisperForAudioClassification",
        whisper_config,
        lambda: transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1),
    ),
}
VIDEO_MODELS = {
    "videomae": (
        "VideoMAEForVideoClassification",
        lambda: transformers.VideoMAEConfig(**FRAMES, patch_size=8, tubelet_size=2),
        lambda: transformers.VideoMAEImageProcessor(**FRAME_SIZE),
    ),
    "vivit": (
        "VivitForVideoClassification",
        lambda: transformers.VivitConfig(**FRAMES, tubelet_size=[2, 8, 8]),
        lambda: transformers.VivitImageProcessor(**FRAME_SIZE),
    ),
    "timesformer": (
        "TimesformerForVideoClassification",
        lambda: transformers.TimesformerConfig(**FRAMES, patch_size=8, initializer_range=0.05),
        lambda: transformers.VideoMAEImageProcessor(**FRAME_SIZE),
    ),
}
MODELS = SOUND_MODELS | VIDEO_MODELS
STEPS = {"whisper": 50, "timesformer": 80}  # of training, where fewer are too few
RATE = 16_000
LENGTHS = {"whisper": RATE}  # it reads whole seconds


def clip(number: int, length: int = 1600) -> np.ndarray:
    """A tone with noise, of shape `(length,)`: 300 Hz of even numbers, 4 kHz of odd ones."""
    noise = np.random.default_rng(number).standard_normal(length)
    tone = np.sin(2 * np.pi * (4000 if number % 2 else 300) * np.arange(length) / RATE)
    return (tone + 0.05 * noise).astype(np.float32)


def video(number: int) -> list[np.ndarray]:
    """Four frames of 16 x 16 pixels: the lower half is bright of even numbers, the upper one of odd ones."""
    frames = np.random.default_rng(number).integers(0, 60, (4, 16, 16, 3))
    frames[:, 8 * (1 - number % 2) :][:, :8] += 190
    return list(frames.astype(np.uint8))


def inputs_of(name: str, number: int) -> dict:
    """What the processor of a model makes of a clip or a video, with a batch dimension of one."""
    processor = MODELS[name][2]()
    if name in VIDEO_MODELS:
        return dict(processor(video(number), return_tensors="pt"))
    features = processor(clip(number, LENGTHS.get(name, 1600)), sampling_rate=RATE, return_tensors="pt")
    return {key: value for key, value in features.items() if key != "attention_mask"}


def items(name: str, count: int = 16) -> list[dict]:
    return [
        {**{key: value[0] for key, value in inputs_of(name, number).items()}, "labels": number % 2}
        for number in range(count)
    ]


def plain_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, MODELS[name][0])(MODELS[name][1]())


def trained(name: str, folder, data=None, **arguments) -> ls.LayerShuffleTrainer:
    data = items(name) if data is None else data
    arguments = ls.LayerShuffleTrainingArguments(
        str(folder), max_steps=STEPS.get(name, 30), learning_rate=1.5e-3, warmup_steps=0, seed=1,
        per_device_train_batch_size=8, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
        eval_orders=3, **arguments,
    )  # fmt: skip
    trainer = ls.LayerShuffleTrainer(
        ls.free_order(plain_model(name), shuffle_mode="arbitrary"),
        arguments,
        train_dataset=data,
        eval_dataset=data,
        processing_class=MODELS[name][2](),
        compute_metrics=ls.compute_metrics,
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One trained model of each family, made when it is first asked for, with its losses and its evaluation."""
    made = {}

    def folder_of(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            trainer = trained(name, folder)
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            made[name] = folder, losses, trainer.evaluate()
            trainer.save_model()
        return made[name]

    return folder_of


@pytest.mark.parametrize("name", MODELS)
def test_training_in_arbitrary_order_learns(folders, name):
    _, losses, metrics = folders(name)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert metrics["eval_accuracy"] == metrics["eval_arbitrary_accuracy"] == 1.0


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_folder_serves_its_auto_class(folders, name):
    folder, _, _ = folders(name)
    auto_class = AutoModelForVideoClassification if name in VIDEO_MODELS else AutoModelForAudioClassification
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map[auto_class.__name__] == f"modeling_layershuffle.LayerShuffle{MODELS[name][0]}"
    model = auto_class.from_pretrained(folder).eval()
    assert type(model).__name__ == f"LayerShuffle{MODELS[name][0]}"
    processor = (AutoImageProcessor if name in VIDEO_MODELS else AutoFeatureExtractor).from_pretrained(folder)
    assert type(processor).__name__.removesuffix("Pil") == type(MODELS[name][2]()).__name__.removesuffix("Pil")
    with torch.no_grad():
        for number in range(2):
            logits = model(**inputs_of(name, number), execution_order=[3, 1, 0, 2]).logits
            assert model.config.id2label[logits.argmax().item()] == NAMES[number]


@pytest.mark.parametrize("name", SOUND_MODELS)
def test_the_pipeline_hears_a_clip(folders, name):
    folder, _, _ = folders(name)
    classify = pipeline("audio-classification", model=str(folder))
    for number in range(2):
        sound = clip(number, LENGTHS.get(name, 1600))
        (best, *_), (same, *_) = classify({"raw": sound, "sampling_rate": RATE}), classify(sound)
        assert best == same and best["label"] == NAMES[number] and best["score"] > 0.5


# In the place of PyAV, which decodes files and need not be installed: its files are arrays
DECODER = """
import numpy as np
__version__ = "14.0.0"
class Frame:
    def __init__(self, pixels): self.pixels = pixels
    def to_ndarray(self, format): return self.pixels
class Container:
    def __init__(self, path): self.frames = np.load(path)
    def seek(self, offset): pass
    def decode(self, video): return map(Frame, self.frames)
open = Container
"""
SEE_VIDEOS = """
import json, sys
import hf_layershuffle
from transformers import pipeline
folders, files = json.loads(sys.argv[1])
for folder in folders:
    see = pipeline("video-classification", model=folder)
    for name, file in files.items():
        best, _ = see(file)
        assert best["label"] == name and best["score"] > 0.5, (folder, name, best)
"""


def test_the_pipeline_sees_a_video(folders, tmp_path):
    (tmp_path / "av.py").write_text(DECODER)
    files = {name: str(tmp_path / f"{name}.npy") for name in NAMES}
    for number, file in enumerate(files.values()):
        np.save(file, np.stack(video(number)))
    models = [str(folders(name)[0]) for name in VIDEO_MODELS]
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    result = run_python(SEE_VIDEOS, json.dumps([models, files]), environment=environment)
    assert result.returncode == 0, result.stderr
    assert "is not supported" not in result.stderr


@pytest.mark.parametrize("name", MODELS)
def test_measuring_pruning_and_plain_export(folders, name, tmp_path):
    folder, _, _ = folders(name)
    model, data, order = ls.load_classifier(folder).eval(), items(name), [2, 0, 3]
    scores = ls.score_execution_orders(model, data, [[0, 1, 2, 3], order, order[::-1]], progress=False)
    batch = {key: torch.stack([torch.as_tensor(item[key]) for item in data]) for key in data[0]}
    with torch.no_grad():
        for score in scores:
            outputs = model(**batch, execution_order=score.execution_order)
            hits = (outputs.logits.argmax(-1) == batch["labels"]).float().mean().item()
            assert score.accuracy == pytest.approx(hits) and score.loss == pytest.approx(outputs.loss.item(), abs=1e-4)
        inputs = inputs_of(name, 0)
        expected = model(**inputs, execution_order=order).logits
        for shorter in (ls.prune_layers(model, order), ls.to_plain_vit(model, order)):
            assert torch.equal(shorter(**inputs).logits, expected)
            shorter.save_pretrained(tmp_path)
            torch.testing.assert_close(type(shorter).from_pretrained(tmp_path).eval()(**inputs).logits, expected)
    assert type(shorter) is getattr(transformers, MODELS[name][0])


@pytest.mark.parametrize("name", ["wav2vec2", "videomae"])
def test_robustness_search_and_merging(folders, name, tmp_path):
    folder, _, _ = folders(name)
    data = items(name)
    report = ls.evaluate_robustness(ls.load_classifier(folder), data, num_orders=3, num_subsets=1, progress=False)
    assert report.sequential.accuracy == 1.0
    kept = ls.search_layers(ls.load_classifier(folder), data, 2, progress=False)
    assert len(kept) == 2
    plan = ls.MergePlan.random([str(folder), str(folder)], seed=0)
    ls.merge(plan, tmp_path / "merged")
    merged, model = (ls.load_classifier(each).eval() for each in (tmp_path / "merged", folder))
    assert all(torch.equal(tensor, merged.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert (tmp_path / "merged" / "preprocessor_config.json").exists()


@pytest.mark.parametrize(("name", "kind"), [("wav2vec2", "audio"), ("ast", "audio"), ("videomae", "video")])
def test_the_card_speaks_of_sounds_or_videos(folders, name, kind, tmp_path):
    folder, _, _ = folders(name)
    card = build_model_card(folder, repo_id="org/model")
    text = str(card)
    prose = re.sub(r"```.*?```", "", text.split("## Citation")[0], flags=re.DOTALL)
    assert "image" not in prose.lower()
    assert card.data.pipeline_tag == f"{kind}-classification" and "vision-transformer" not in card.data.tags
    assert f"{'An audio' if kind == 'audio' else 'A video'} classifier of type `layershuffle_" in text
    many = "clips" if kind == "audio" else "videos"
    assert f"- Classifies {many} as one of its 2 classes" in text and "method" not in prose
    code = re.search(r"```python\n(import hf_layershuffle.*?)```", text, re.DOTALL)[1]
    compile(code, "<card>", "exec")
    auto_class = f"AutoModelFor{kind.capitalize()}Classification"
    assert f"model = {auto_class}.from_pretrained(repo_id)" in code
    assert ("AutoFeatureExtractor" if kind == "audio" else "AutoImageProcessor") in code


def test_clips_of_several_lengths_are_padded_in_training(tmp_path):
    data = [
        {**item, "input_values": item["input_values"][: 1600 - 100 * number]}
        for number, item in enumerate(items("wav2vec2", 8))
    ]
    trainer = trained("wav2vec2", tmp_path, data)
    assert trainer.evaluate()["eval_arbitrary_accuracy"] == 1.0


@pytest.mark.parametrize("name", ["wav2vec2", "whisper"])
def test_a_dataset_of_features_trains_and_is_measured(name, tmp_path):
    rows = items(name, 8)
    data = datasets.Dataset.from_list(
        [{key: np.asarray(value).tolist() for key, value in row.items()} for row in rows]
    )
    trainer = trained(name, tmp_path, data)
    assert trainer.state.log_history[-1]["train_loss"] < 0.7
    [expected], [score] = (
        ls.score_execution_orders(trainer.model, each, [[3, 0, 1, 2]], progress=False) for each in (rows, data)
    )
    assert score == expected


@pytest.mark.parametrize("name", ["ast", "videomae"])
def test_analyses_are_of_image_classifiers(folders, name):
    with pytest.raises(ValueError, match="takes neither images nor texts; analyses are of classifiers of these"):
        ls.analyze(ls.load_classifier(folders(name)[0]), items(name))


def test_a_feature_extractor_is_no_image_processor(folders):
    folder, _, _ = folders("ast")
    with pytest.raises(
        ValueError, match=r"holds a feature extractor \(ASTFeatureExtractor\), .*score_execution_orders"
    ):
        load_image_processor(folder)
