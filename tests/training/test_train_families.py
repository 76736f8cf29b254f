"""`hf-layershuffle train` for each family of vision transformers: a few steps, and what its folder serves then."""

import json
import re

import pytest
import torch
import transformers
from conftest import run_cli, run_python
from safetensors.torch import load_file
from support.hub_server import HubServer
from support.images import random_images
from support.models import randomize
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

import hf_layershuffle as ls
from hf_layershuffle.checkpoints.image_processors import new_image_processor
from hf_layershuffle.deployment.plain_vit import to_plain_vit
from hf_layershuffle.training import session
from hf_layershuffle.training.argument_parser import parse_arguments
from hf_layershuffle.training.model_building import build_model
from hf_layershuffle.training.model_flags import layershuffle_flags


RUN = """
    --per_device_train_batch_size 8 --max_train_samples 32 --max_eval_samples 20 --max_steps 4 --save_steps 2
    --save_total_limit 9 --eval_strategy no --final_eval_orders 8 --use_cpu --disable_tqdm True --report_to none
""".split()
SMALL = ["--hidden_size", "16", "--num_hidden_layers", "3", "--num_attention_heads", "2"]
FAMILIES = ["dinov2", "dinov2_with_registers", "siglip", "clip", "beit", "data2vec-vision", "vit_msn", "ijepa"]
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
NAMES = [str(index) for index in range(10)]


def train(folder, *arguments) -> dict:
    session.run([*RUN, "--output_dir", str(folder), *map(str, arguments)])
    return json.loads((folder / "all_results.json").read_text())


def losses(folder) -> list[float]:
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("architecture", ["dinov2", "siglip", "clip", "beit"])
def test_a_family_from_scratch_by_the_preset_with_the_flags(architecture, tmp_path):
    folder = tmp_path / "run"
    flags = ["--depth_embedding", "--position_predictor", "--baseline"]
    train(folder, "--architecture", architecture, *SMALL, "--preset", "order-free", *flags)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert model.config.plain_model_type == architecture and model.config.shuffle_mode == "arbitrary"
    image = random_images(1, (9, 14))[0]
    pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt").pixel_values
    order = [2, 0, 1]
    assert model(pixels, execution_order=order).execution_order.tolist() == order
    answers = pipeline("image-classification", str(folder))(image)
    assert answers[0]["label"] in NAMES
    # Mean losses: a step of four micro-batches is as large as one of one
    assert all(loss < 6 for loss in losses(folder)) and all(loss < 4 for loss in losses(folder / "baseline"))
    card = (folder / "README.md").read_text()
    assert "8 × 8" in card and "pipeline_tag: image-classification" in card
    baseline = ls.load_classifier(str(folder / "baseline"))
    assert baseline.config.shuffle_mode == "none" and not baseline.config.depth_embedding


@pytest.mark.parametrize("architecture", ["dinov3_vit", "radio", "siglip_vision_model"])
def test_a_family_with_a_classifier_of_this_package_learns_and_teaches(architecture, tmp_path):
    train(tmp_path / "run", "--architecture", architecture, *SMALL)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run").eval()
    assert model.config.plain_model_type == architecture
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "run")(random_images(1, (9, 14))[0], return_tensors="pt")
    assert model(**pixels, execution_order=[1, 0]).logits.shape == (1, 10)
    train(tmp_path / "student", *SMALL, "--teacher_model_name_or_path", tmp_path / "run")
    assert json.loads((tmp_path / "student" / "training.json").read_text())["teacher"] == "run"


@pytest.mark.parametrize("architecture", ["siglip", "beit"])
def test_a_stopped_run_goes_on_and_another_size_is_refused(architecture, tmp_path):
    arguments = ["--architecture", architecture, *SMALL]
    train(tmp_path / "whole", *arguments)
    train(tmp_path / "run", *arguments)
    for path in ("checkpoint-4/model.safetensors", "model.safetensors", "all_results.json"):
        (tmp_path / "run" / path).unlink()
    train(tmp_path / "run", *arguments)
    ours, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in ours.items())
    with pytest.raises(ValueError, match="holds a run with `hidden_size` 16, and this one has 32"):
        train(tmp_path / "run", *arguments, "--hidden_size", "32")


def save_plain(architecture: str, folder, image_size: int = 16):
    """A plain checkpoint of the family with random weights, and its image processor."""
    sizes = [*SMALL, "--image_size", str(image_size), "--patch_size", "4"]
    args, _, _ = parse_arguments(["--architecture", architecture, *sizes, "--use_cpu"])
    model, processor = build_model(args, layershuffle_flags(args), NAMES, (8, 8), {})
    plain = to_plain_vit(randomize(model).eval())
    plain.save_pretrained(folder)
    processor.save_pretrained(folder)
    return plain


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_plain_checkpoint_is_fine_tuned_at_another_size(architecture, tmp_path):
    plain = save_plain(architecture, tmp_path / "plain")
    assert type(plain).__module__.startswith("transformers.")
    args, _, _ = parse_arguments(["--model_name_or_path", str(tmp_path / "plain"), "--image_size", "24", "--use_cpu"])
    model, processor = build_model(args, layershuffle_flags(args), NAMES, (8, 8), {})
    pixels = processor(random_images(2, (30, 20)), return_tensors="pt").pixel_values
    assert pixels.shape == (2, 3, 24, 24)
    assert model(pixels).logits.shape == (2, 10) and model.config.shuffle_mode == "arbitrary"
    with pytest.raises(ValueError, match="`image_size` is 25, which the patch of 4 pixels does not divide"):
        args.image_size = 25
        build_model(args, {}, NAMES, (8, 8), {})


def test_a_run_at_another_size_and_what_follows_it(tmp_path):
    save_plain("siglip", tmp_path / "plain")
    tuned = tmp_path / "tuned"
    train(tuned, "--model_name_or_path", tmp_path / "plain", "--image_size", "24")
    assert json.loads((tuned / "config.json").read_text())["vision_config"]["image_size"] == 24
    assert AutoImageProcessor.from_pretrained(tuned).size.height == 24
    assert len(pipeline("image-classification", str(tuned))(random_images(1, (33, 40))[0])) == 5
    data = ["--dataset_name", "digits", "--max_samples", "20", "--device", "cpu"]
    steps = (
        ["prune", tuned, "--keep", "0,2", "--output_dir", tmp_path / "pruned"],
        ["merge", tuned, tuned, "--random", "1", "--output_dir", tmp_path / "merged"],
        [
            "evaluate",
            tmp_path / "pruned",
            tmp_path / "merged",
            *data,
            "--num_orders",
            "8",
            "--output_dir",
            tmp_path / "r",
        ],
        ["publish", tmp_path / "pruned", "--repo_id", "org/tuned", "--dry_run"],
    )
    for arguments in steps:
        result = run_cli(*arguments)
        assert result.returncode == 0, result.stderr
    merged = ls.load_classifier(str(tmp_path / "merged"))
    assert merged.config.vision_config.image_size == 24 and len(merged.free_layers) == 3


def test_a_teacher_of_another_family_and_of_any_size_it_takes(tmp_path):
    save_plain("dinov2", tmp_path / "teacher")  # of 16 pixels, and interpolates by itself
    arguments = ["--architecture", "beit", *SMALL, "--teacher_model_name_or_path", tmp_path / "teacher"]
    train(tmp_path / "run", *arguments)
    save_plain("beit", tmp_path / "small", 8)
    train(tmp_path / "other", "--architecture", "dinov2", *SMALL, "--teacher_model_name_or_path", tmp_path / "small")
    save_plain("ijepa", tmp_path / "fixed")
    with pytest.raises(ValueError, match="`image_size` of the teacher is 16 and of the model 8"):
        train(
            tmp_path / "third", "--architecture", "siglip", *SMALL, "--teacher_model_name_or_path", tmp_path / "fixed"
        )
    assert not (tmp_path / "third").exists() or not list((tmp_path / "third").glob("*.json"))


def test_a_checkpoint_of_two_towers_is_fine_tuned_without_its_text_tower(tmp_path):
    vision = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    text = {**vision, "vocab_size": 50, "max_position_embeddings": 8, "projection_size": 16}
    config = transformers.SiglipConfig(vision_config={**vision, "image_size": 8, "patch_size": 4}, text_config=text)
    both = randomize(transformers.SiglipModel(config))
    both.save_pretrained(tmp_path)
    new_image_processor("siglip", 8, 3, **HALF).save_pretrained(tmp_path)
    args, _, _ = parse_arguments(["--model_name_or_path", str(tmp_path), "--use_cpu"])
    model, _ = build_model(args, {}, NAMES, (8, 8), {})
    stored = both.state_dict()
    kept = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("vision_model.")}
    assert kept and all(torch.equal(tensor, stored[name]) for name, tensor in kept.items())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num_hidden_layers", "2"], "`num_hidden_layers` is 2, and '.*' has 3, which fine-tuning keeps"),
        (["--intermediate_size", "99"], "`intermediate_size` is 99, and '.*' has 64"),
        (["--architecture", "vit"], "`architecture` is 'vit', and '.*' has '(siglip|dinov2)'"),
    ],
)
@pytest.mark.parametrize("architecture", ["siglip", "dinov2"])
def test_sizes_beside_a_checkpoint_are_compared_with_its_tower(architecture, arguments, message, tmp_path):
    save_plain(architecture, tmp_path)
    own = ["--hidden_size", "16", "--patch_size", "4", "--num_channels", "3", "--use_cpu"]
    args, _, _ = parse_arguments(["--model_name_or_path", str(tmp_path), *own, *arguments])
    with pytest.raises(ValueError, match=message):
        build_model(args, {}, NAMES, (8, 8), {})


def test_what_does_not_fit_is_one_line_and_leaves_nothing(tmp_path):
    save_plain("siglip", tmp_path / "plain")
    new_image_processor("clip", 24, 3, **HALF).save_pretrained(tmp_path / "plain")
    cases = (
        (
            ["--model_name_or_path", tmp_path / "plain"],
            r"\(CLIPImageProcessor.*\) gives pixels of shape \(3, 24, 24\)",
        ),
        (["--model_name_or_path", tmp_path / "plain", "--hidden_dropout_prob", "0.1"], "does not have; leave out"),
        (["--architecture", "resnet"], "`architecture` is 'resnet', which cannot run its layers in any order"),
        (["--architecture", "siglip2"], "such as siglip"),
        (["--architecture", "bart"], "'bart'"),
    )
    for arguments, message in cases:
        result = run_cli("train", *RUN, *arguments, "--output_dir", tmp_path / "out")
        lines = [line for line in result.stderr.splitlines() if "error:" in line]
        assert result.returncode == 2 and len(lines) == 1, result.stderr
        assert re.search(message, lines[0]), lines[0]
        assert not (tmp_path / "out").exists()


PUSH = """
import sys, torch
import hf_layershuffle as ls
from hf_layershuffle.hub.publishing import publish
publish(sys.argv[1], "org/dinov2-free")
model = ls.load_classifier(sys.argv[1]).eval()
torch.save(model(torch.ones(1, 3, 8, 8), execution_order=[2, 0, 1]).logits, sys.argv[2])
"""
PULL = """
import sys, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("org/dinov2-free", trust_remote_code=True).eval()
assert "hf_layershuffle" not in sys.modules
logits = model(torch.ones(1, 3, 8, 8), execution_order=[2, 0, 1]).logits
assert torch.equal(logits, torch.load(sys.argv[1]))
print(type(model).__name__, type(AutoImageProcessor.from_pretrained("org/dinov2-free")).__name__)
"""


def test_a_dinov2_from_scratch_goes_to_the_hub_and_back_without_the_package(tmp_path):
    train(tmp_path / "run", "--architecture", "dinov2", *SMALL)
    with HubServer() as hub:
        environment = hub.environment(tmp_path / "home")
        pushed = run_python(PUSH, tmp_path / "run", tmp_path / "logits.pt", environment=environment)
        assert pushed.returncode == 0, pushed.stderr
        environment = {**hub.environment(tmp_path / "other"), "PYTHONPATH": ""}
        pulled = run_python(PULL, tmp_path / "logits.pt", environment=environment, cwd=tmp_path)
        assert pulled.returncode == 0, pulled.stderr
    assert pulled.stdout.split() == ["LayerShuffleDinov2ForImageClassification", "BitImageProcessorPil"] or (
        pulled.stdout.split()[1] == "BitImageProcessor"
    )
