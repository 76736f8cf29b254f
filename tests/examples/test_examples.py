"""Runs examples/train.py as a user does, most of it in this process."""

import functools
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import (
    ENVIRONMENT,
    REPOSITORY,
    TINY,
    TRAIN,
    Architecture,
    assert_all_refused,
    run_command,
    run_python,
    run_train,
)
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, BertConfig, ViTImageProcessor, pipeline

import hf_layershuffle as ls
from hf_layershuffle.training.outcome import ARBITRARY_METRICS, print_table


# A model and a run so small that a test takes seconds
SHORT = """
    --per_device_train_batch_size 8 --max_train_samples 64 --max_eval_samples 40 --max_steps 8 --save_steps 2
    --eval_orders 2
""".split()
SMALL = ["--hidden_size", "16", "--num_hidden_layers", "3", "--num_attention_heads", "2", *SHORT]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder, other) -> None:
    expected = weights(other)
    assert list(weights(folder)) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder).items())


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """One run with a baseline, in a process of its own; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "digits-small"
    arguments = [*SMALL, "--baseline", "--output_dir", folder, "--report_to", "tensorboard", "--use_cpu", "True"]
    result = run_python(TRAIN, *arguments)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_the_run_ends_with_a_table_of_both_models(finished_run):
    folder, result = finished_run
    rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["layershuffle", "plain"]
    for row, results in zip(rows, (folder, folder / "baseline")):
        metrics = json.loads((results / "all_results.json").read_text())
        shown = [float(cell) for cell in row.split("│")[2:6]]
        names = ("accuracy", "arbitrary_accuracy", "arbitrary_accuracy_std", "arbitrary_accuracy_min")
        assert shown == [pytest.approx(metrics[f"eval_{name}"], abs=1e-4) for name in names]
        assert row.split("│")[6].strip() == "16"
        if results != folder:  # which the card of the other model shows
            card = (folder / "README.md").read_text()
            assert f"| baseline: trained the plain way: as configured | {metrics['eval_accuracy']:.4f} |" in card
    assert "it/s" in result.stderr  # progress bars
    assert "torchvision" not in result.stderr
    command = f"hf-layershuffle evaluate {folder} {folder}/baseline --dataset_name digits"
    assert f"Next: {command} --output_dir {folder}-robustness" in result.stdout
    assert f"Saved to {folder}" in result.stdout


def test_the_numbers_are_those_of_the_saved_model(finished_run):
    from hf_layershuffle.data.datasets import ImageClassificationDataset, load_image_datasets

    folder, _ = finished_run
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    test = load_image_datasets("digits")["test"].shuffle(seed=42).select(range(40))
    dataset = ImageClassificationDataset(test, ViTImageProcessor.from_pretrained(folder))
    images = torch.stack([item["pixel_values"] for item in dataset])
    with torch.no_grad():
        accuracies = [
            (model(images, execution_order=order).logits.argmax(-1) == dataset.labels).float().mean().item()
            for order in ls.arbitrary_execution_orders(3, 16, seed=0)
        ]
    metrics = json.loads((folder / "eval_results.json").read_text())
    assert metrics["eval_arbitrary_accuracy"] == pytest.approx(np.mean(accuracies))
    assert metrics["eval_arbitrary_accuracy_std"] == pytest.approx(np.std(accuracies))
    assert metrics["eval_arbitrary_accuracy_min"] == pytest.approx(min(accuracies))


def test_the_folder_can_be_used_and_published(finished_run):
    folder, _ = finished_run
    names = {path.name for path in folder.iterdir()}
    assert {
        "README.md",
        "all_results.json",
        "config.json",
        "configuration_layershuffle.py",
        "execution_order.py",
        "model.safetensors",
        "modeling_layershuffle.py",
        "preprocessor_config.json",
        "trainer_state.json",
        "training.json",
    } <= names
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in names - {"training_args.bin"})
    assert ModelCard.load(folder / "README.md").data.pipeline_tag == "image-classification"
    classify = pipeline("image-classification", model=str(folder))
    labels = {prediction["label"] for prediction in classify(Image.new("L", (8, 8), 128))}
    assert labels <= set("0123456789")
    assert any((folder / "runs").rglob("events.*")) or any(folder.rglob("events.*"))  # report_to


def test_a_card_that_cannot_be_written_loses_nothing(finished_run):
    folder, first = finished_run
    card, mine = folder / "README.md", b"---\nlicense: [mit\n---\n# Mine\n"
    ours = card.read_bytes()
    card.write_bytes(mine)
    try:
        result = run_train(*SMALL, "--output_dir", folder)
        assert card.read_bytes() == mine
    finally:
        card.write_bytes(ours)
    assert result.returncode == 0, result.stderr
    assert f"The model is saved in '{folder}', but not its card: The metadata at the top of README.md" in result.stderr
    assert result.stdout.splitlines()[-4] == first.stdout.splitlines()[-5]  # the same row of the table


def test_both_models_started_from_the_same_weights_and_differ_in_shuffling_only(finished_run):
    folder, _ = finished_run
    ours, plain = (json.loads((path / "config.json").read_text()) for path in (folder, folder / "baseline"))
    assert (ours.pop("shuffle_mode"), plain.pop("shuffle_mode")) == ("arbitrary", "none")
    assert ours == plain


def test_a_finished_run_is_evaluated_again_and_not_trained_again(finished_run):
    folder, first = finished_run
    before = weights(folder)
    result = run_train(*SMALL, "--output_dir", folder)
    assert result.returncode == 0, result.stderr
    assert f"Already trained, so only evaluated: {folder}" in result.stderr
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(folder).items())
    assert not (folder / "checkpoint-9").exists()
    assert result.stdout.splitlines()[-4] == first.stdout.splitlines()[-5]  # the same row of the table


def test_a_run_that_finished_within_an_epoch_is_not_trained_again(tmp_path):
    arguments = [*SMALL, "--max_steps", 3, "--lr_scheduler_type", "constant", "--output_dir", tmp_path / "run"]
    assert run_train(*arguments).returncode == 0
    before, trained = weights(tmp_path / "run"), (tmp_path / "run" / "train_results.json").read_text()
    result = run_train(*arguments)
    assert result.returncode == 0, result.stderr
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "run").items())
    assert (tmp_path / "run" / "train_results.json").read_text() == trained


def test_another_model_in_the_same_folder_is_refused(finished_run):
    folder, _ = finished_run
    before = weights(folder)
    result = run_train(*SMALL, "--shuffle_mode", "none", "--output_dir", folder)
    assert_refused(result, "holds a run with `shuffle_mode` 'arbitrary', and this one has 'none'")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(folder).items())


def test_a_run_with_other_arguments_in_the_same_folder_is_refused(finished_run, tmp_path):
    folder, _ = finished_run
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    arguments = [*map(str, SMALL), "--output_dir", str(folder)]
    other = {
        "`learning_rate` 0.0005, and this one has 0.001": ["--learning_rate", "0.001"],
        "`seed` 42, and this one has 1": ["--seed", "1"],
        "`per_device_train_batch_size` 8, and this one has 16": ["--per_device_train_batch_size", "16"],
        "`weight_decay` 0.05, and this one has 0.0": ["--weight_decay", "0"],
        "`max_steps` 8, and this one has 9": ["--max_steps", "9"],
        "`lr_scheduler_type` 'cosine', and this one has 'linear'": ["--lr_scheduler_type", "linear"],
        "`max_train_samples` 64, and this one has 32": ["--max_train_samples", "32"],
        "`hidden_dropout_prob` 0.0, and this one has 0.1": ["--hidden_dropout_prob", "0.1"],
        "`eval_fraction` 0.2, and this one has 0.3; choose another --output_dir": ["--eval_fraction", "0.3"],
        "holds a run with `crop_padding` None": [
            "--resume_from_checkpoint",
            f"{folder}/checkpoint-8",
            "--crop_padding",
            "1",
        ],
    }
    cases = {message: [*arguments, *changed] for message, changed in other.items()}
    assert_all_refused(run_train, "train.py", cases, tmp_path)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_stopped_before_its_first_checkpoint_starts_anew_unless_its_arguments_changed(finished_run, tmp_path):
    folder, _ = finished_run
    (tmp_path / "parts").mkdir()
    shutil.copy(folder / ".train_run.json", tmp_path / "parts")
    result = run_train(*SMALL, "--learning_rate", "1e-3", "--output_dir", tmp_path / "parts")
    assert_refused(result, "holds a run with `learning_rate` 0.0005, and this one has 0.001")
    result = run_train(*SMALL, "--output_dir", tmp_path / "parts")
    assert result.returncode == 0, result.stderr
    assert_same_weights(tmp_path / "parts", folder)


def test_a_stopped_run_goes_on_to_the_weights_of_the_uninterrupted_one(tmp_path):
    arguments = [*SMALL, "--max_steps", 240, "--save_steps", 20, "--save_total_limit", 1, "--eval_strategy", "no"]
    arguments += ["--layerdrop", 0.2, "--depth_embedding", "True", "--crop_padding", 1, "--hidden_dropout_prob", 0.1]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_train(*arguments, "--output_dir", whole).returncode == 0

    command = [sys.executable, TRAIN, *arguments, "--output_dir", parts, "--use_cpu", "True"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, **pipes)
    deadline = time.monotonic() + 120
    while not any(parts.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert (
        "train.py: stopped; the same command goes on from the last checkpoint, or starts anew if there is none."
        in errors
    )
    assert "Traceback" not in errors
    assert not (parts / "model.safetensors").exists()

    result = run_train(*arguments, "--output_dir", parts)
    assert result.returncode == 0, result.stderr
    assert "Going on from" in result.stderr
    assert_same_weights(parts, whole)


@pytest.mark.parametrize("file_format", ["json", "yaml"])
def test_arguments_from_one_file(tmp_path, file_format):
    arguments = {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_steps": 2,
        "max_train_samples": 32,
        "max_eval_samples": 20,
        "shuffle_mode": "window",
        "shuffle_window": 1,
        "position_predictor": True,
        "execution_order": [2, 0, 1],
        "token": None,
    }
    path = tmp_path / f"arguments.{file_format}"
    text = json.dumps(arguments)
    if file_format == "yaml":
        text = "learning_rate: 1e-4\n" + "\n".join(f"{k}: {json.dumps(v)}" for k, v in arguments.items())
    path.write_text(text)
    # The warnings of a process of its own are seen; here pytest takes them
    run = functools.partial(run_python, TRAIN) if file_format == "yaml" else run_train
    result = run(path, "--max_steps", "3")
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["shuffle_mode"] == "window" and config["shuffle_window"] == 1
    assert config["position_predictor"] is True
    assert config["execution_order"] == [2, 0, 1]
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["max_steps"] == 3  # what comes after the file wins
    assert "window1-predict" in result.stdout
    assert "pin_memory" not in result.stderr


def test_the_preset_averages_each_step_over_four_orders_and_starts_with_layers_that_do_nothing(tmp_path):
    arguments = [*SMALL, "--preset", "order-free", "--learning_rate", 0, "--max_grad_norm", 0]
    result = run_train(*arguments, "--baseline", "--output_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    run = json.loads((tmp_path / "run" / ".train_run.json").read_text())
    assert (run["per_device_train_batch_size"], run["gradient_accumulation_steps"]) == (2, 4)  # 8 images a step
    told = json.loads((tmp_path / "run" / "training.json").read_text())["arguments"]
    asked_for = ("per_device_train_batch_size", "gradient_accumulation_steps", "orders_per_step")
    assert [told[name] for name in asked_for] == [8, 1, 4]
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["epoch"] == 1  # 8 steps of 8 images are the 64 images
    # With a learning rate of 0 the weights are the initial ones
    initial = weights(tmp_path / "run")
    for name in ("attention.o_proj", "mlp.fc2"):
        assert not initial[f"vit.layers.0.{name}.weight"].any()
    assert_same_weights(tmp_path / "run" / "baseline", tmp_path / "run")
    std = initial["vit.layers.0.mlp.fc1.weight"].std().item()
    assert std == pytest.approx(0.55 / 16**0.5, rel=0.1)

    # A plain model, whose configuration says that it is not shuffled, is then shuffled
    plain = tmp_path / "run" / "baseline"
    assert json.loads((plain / "config.json").read_text())["shuffle_mode"] == "none"
    result = run_train(*arguments, "--model_name_or_path", plain, "--output_dir", tmp_path / "tuned")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["shuffle_mode"] == "arbitrary"
    assert_same_weights(tmp_path / "tuned", plain)  # which a preset does not start anew

    # What is given beside the preset wins
    result = run_train(
        *arguments, "--orders_per_step", 2, "--initializer_range", 0.01, "--output_dir", tmp_path / "own"
    )
    assert result.returncode == 0, result.stderr
    run = json.loads((tmp_path / "own" / ".train_run.json").read_text())
    assert (run["per_device_train_batch_size"], run["gradient_accumulation_steps"]) == (4, 2)
    assert weights(tmp_path / "own")["vit.layers.0.mlp.fc1.weight"].std().item() == pytest.approx(0.01, rel=0.1)


def test_a_plain_model_teaches(tmp_path):
    architecture, names = Architecture("vit"), dict(enumerate("0123456789"))
    teacher = tmp_path / "teacher"
    architecture.plain_classifier(num_labels=10, id2label=names).save_pretrained(teacher)
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.4] * 3, image_std=[0.2] * 3)
    processor.save_pretrained(teacher)
    arguments = [*SMALL, "--patch_size", 4, "--teacher_model_name_or_path", teacher, "--output_dir", tmp_path / "run"]
    result = run_train(*arguments, "--baseline", "--distillation_weight", 0.8)
    assert result.returncode == 0, result.stderr
    # The model sees the teacher's images
    assert json.loads((tmp_path / "run" / "preprocessor_config.json").read_text())["image_mean"] == [0.4] * 3
    run = json.loads((tmp_path / "run" / ".train_run.json").read_text())
    assert (run["teacher_model_name_or_path"], run["distillation_weight"]) == ("teacher", 0.8)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "│ layershuffle-dist" in result.stdout and "│ plain " in result.stdout
    assert "Distilled from a local model" in card and "`distillation_weight` | `0.8`" in card
    # The baseline is the plain way, without it
    assert json.loads((tmp_path / "run" / "baseline" / "training.json").read_text())["teacher"] is None
    losses = [
        json.loads((folder / "all_results.json").read_text())["train_loss"]
        for folder in (tmp_path / "run", tmp_path / "run" / "baseline")
    ]
    assert losses[0] != pytest.approx(losses[1], rel=0.1)
    assert_refused(run_train(*arguments), "holds a run with `distillation_weight` 0.8, and this one has 0.9")

    # One that sees other images than the checkpoint to fine-tune does, or other sizes or classes
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "other")
    architecture.plain_classifier(num_labels=10, id2label=names).save_pretrained(tmp_path / "other")
    arguments[-1] = tmp_path / "new"
    tuning = [*SHORT, "--teacher_model_name_or_path", teacher, "--model_name_or_path", tmp_path / "other"]
    refused = run_train(*tuning, "--output_dir", tmp_path / "new")
    assert_refused(refused, f"is [0.4, 0.4, 0.4] in '{teacher}' and [0.5, 0.5, 0.5] in '{tmp_path / 'other'}'")
    assert_refused(run_train(*arguments, "--image_size", 16), "`image_size` of the teacher is 8 and of the model 16")
    again = [*arguments[:-1], tmp_path / "run", "--distillation_weight", 0.8]
    architecture.plain_classifier(seed=1, num_labels=10, id2label=names).save_pretrained(teacher)
    assert_refused(run_train(*again), "holds a run with another teacher: `teacher_weights` '")
    assert_refused(run_train(*arguments[:-1], teacher, "--overwrite_output_dir"), "is the teacher's; choose another")
    architecture.plain_classifier(num_labels=5).save_pretrained(teacher)
    assert_refused(run_train(*arguments), "`num_labels` of the teacher is 5 and of the model 10")
    architecture.plain_model_class(architecture.plain_config_class(**TINY)).save_pretrained(teacher)
    assert_refused(run_train(*arguments), "holds no classifier.bias, classifier.weight; only a trained classifier")
    BertConfig().save_pretrained(teacher)
    assert_refused(
        run_train(*arguments), f"The teacher '{teacher}' is a model of type 'bert', which is no image classifier"
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_fine_tuning_a_plain_checkpoint_for_other_classes(tmp_path, name):
    architecture = Architecture(name)
    architecture.plain_classifier(num_hidden_layers=3).save_pretrained(tmp_path / "plain")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "plain")
    arguments = [*SHORT, "--model_name_or_path", tmp_path / "plain", "--output_dir", tmp_path / "run"]
    refused = run_train(*arguments)
    assert_refused(refused, "classifier.weight is (5, 32) there and (10, 32) here")
    assert_refused(refused, "(--ignore_mismatched_sizes)")
    assert not (tmp_path / "run").exists()

    result = run_train(*arguments, "--ignore_mismatched_sizes", "--depth_embedding", "--learning_rate", "1e-12")
    assert result.returncode == 0, result.stderr
    tuned = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert tuned.config.shuffle_mode == "arbitrary" and tuned.config.depth_embedding
    assert tuned.config.model_type == f"layershuffle_{name}"
    # with next to no learning rate the encoder is still the pretrained one
    plain = architecture.plain_classifier_class.from_pretrained(tmp_path / "plain").state_dict()
    for key, tensor in tuned.state_dict().items():
        if key in plain and not key.startswith("classifier"):
            torch.testing.assert_close(tensor, plain[key], atol=1e-6, rtol=0)


def test_fine_tuning_keeps_the_flags_of_a_layershuffle_checkpoint(finished_run, tmp_path):
    folder, _ = finished_run
    result = run_train(*SMALL, "--model_name_or_path", folder / "baseline", "--output_dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["shuffle_mode"] == "none"


def test_two_processes_resume_to_the_weights_of_the_uninterrupted_run(tmp_path):
    launch = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"),
        *("--config_file", REPOSITORY / "examples" / "accelerate" / "ddp_cpu.yaml"),
        *(TRAIN, *SMALL, "--layerdrop", 0.2, "--hidden_dropout_prob", 0.1, "--use_cpu"),
        *("--crop_padding", 1, "--gradient_accumulation_steps", 2, "--eval_strategy", "no", "--save_total_limit", 9),
        *("--save_steps", 3),
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = run_command([*launch, "--output_dir", whole])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Saved to") == 1
    # As after a stop in the middle of the second pass; a pass is two steps of 2 processes x 2 x 8 images
    result = run_command([*launch, "--output_dir", parts, "--resume_from_checkpoint", whole / "checkpoint-3"])
    assert result.returncode == 0, result.stderr
    assert_same_weights(parts, whole)
    state = json.loads((whole / "checkpoint-3" / "trainer_state.json").read_text())
    assert 1 < state["epoch"] < 2


# One launch takes 15 seconds, and both are refused at the same place
@pytest.mark.parametrize("name", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_processes_that_are_not_joined_are_refused(tmp_path, name):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    launch += [REPOSITORY / "examples" / "accelerate" / f"{name}.yaml", TRAIN, *SMALL]
    result = run_command([*launch, "--output_dir", tmp_path / "run"])
    assert result.returncode != 0
    message = "train.py: error: The 2 processes were started for GPUs, of which there are none"
    assert message in result.stderr and "exitcode  : 2 " in result.stderr, result.stderr
    assert "--config_file examples/accelerate/ddp_cpu.yaml" in result.stderr
    assert not any(tmp_path.iterdir())


# --- Bad input ---


def assert_refused(result, message: str) -> None:
    assert result.returncode == 2, (result.returncode, result.stderr)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: error: ") and message in last, result.stderr
    assert "Traceback" not in result.stderr


def test_bad_input_is_one_line_with_exit_code_2_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").write_text("mine")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "broken.yaml").write_text("max_steps: 2\nseed: 1: 2\n")
    cases = {
        "There is no option --no_such_argument": ["--no_such_argument", "1"],
        "is 'random'; it must be one of": ["--shuffle_mode", "random"],
        "`shuffle_window` is 2, which `shuffle_mode='arbitrary'` does not use": ["--shuffle_window", "2"],
        "needs `shuffle_window`": ["--shuffle_mode", "window"],
        "larger than the depth": ["--shuffle_mode", "window", "--shuffle_window", "9"],
        "`layerdrop` is 1.5": ["--layerdrop", "1.5"],
        "invalid float value": ["--layerdrop", "much"],
        "holds 7 at position 1": ["--execution_order", "0,7"],
        "must be sequential, arbitrary or layer indices": ["--execution_order", "backwards"],
        "`patch_size` is 3; it must divide the image size 8": ["--patch_size", "3", "--image_size", "8"],
        "must divide the width 64": ["--num_attention_heads", "7"],
        "`architecture` is 'nope', which": ["--architecture", "nope"],
        "'resnet', which cannot run its layers in any order": ["--architecture", "resnet"],
        "no dataset folder": ["--dataset_name", "./missing"],
        "has no column 'pixels'": ["--image_column_name", "pixels"],
        "`max_train_samples` is 0; it must be at least 1": ["--max_train_samples", "0"],
        "`final_eval_orders` is 3; it must be at least 8": ["--final_eval_orders", "3"],
        "`eval_orders` is -1": ["--eval_orders", "-1"],
        "no checkpoint folder": ["--resume_from_checkpoint", "./missing"],
        "There is no checkpoint in": ["--resume_from_checkpoint", "True"],
        "`per_device_train_batch_size` is 0; it must be at least 1": ["--per_device_train_batch_size", "0"],
        "`per_device_eval_batch_size` is -1": ["--per_device_eval_batch_size", "-1"],
        "`gradient_accumulation_steps` is 0": ["--gradient_accumulation_steps", "0"],
        "`learning_rate` is -1.0; it must be at least 0": ["--learning_rate", "-1"],
        "`learning_rate` is nan": ["--learning_rate", "nan"],
        "`weight_decay` is -0.1": ["--weight_decay", "-0.1"],
        "`num_train_epochs` is -1": ["--num_train_epochs", "-1"],
        "`dataloader_num_workers` is -1": ["--dataloader_num_workers", "-1"],
        "`seed` is -1": ["--seed", "-1"],
        "`distillation_weight` is 2.0; it must lie in [0, 1]": ["--distillation_weight", "2"],
        "`distillation_weight` is 0.5 without a teacher; add --teacher_model_name_or_path": [
            "--distillation_weight",
            "0.5",
        ],
        "`teacher_model_name_or_path` is './missing', where there is no folder": [
            "--teacher_model_name_or_path",
            "./missing",
        ],
        "`model_name_or_path` is '/no/such/folder', where there is no folder": [
            "--model_name_or_path",
            "/no/such/folder",
        ],
        "`preset` is 'best'; choose from order-free": ["--preset", "best"],
        "`orders_per_step` is 0; it must be at least 1": ["--orders_per_step", "0"],
        "`orders_per_step` is 5; it must divide `per_device_train_batch_size`, which is 32": [
            "--orders_per_step",
            "5",
        ],
        "`residual_init_scale` is -1.0": ["--residual_init_scale", "-1"],
        "`initializer_range` is 0.0; it must be a finite number above 0": ["--initializer_range", "0"],
        "`metric_for_best_model` is 'foo'; it must be one of loss, accuracy": [
            "--metric_for_best_model",
            "foo",
            "--load_best_model_at_end",
            "True",
            "--max_steps",
            "6",
        ],
        "must be one of loss, accuracy.": ["--metric_for_best_model", "arbitrary_accuracy", "--eval_orders", "0"],
        "deepspeed": ["--deepspeed", "nope.json"],
        "is not empty and holds no checkpoint": ["--output_dir", str(tmp_path / "occupied")],
        "must hold one mapping": [str(tmp_path / "list.yaml")],
        "is not valid YAML in line 2: ": [str(tmp_path / "broken.yaml")],
        "is not valid JSON in line 1: ": [str(tmp_path / "broken.json")],
        "missing.yaml": [str(tmp_path / "missing.yaml")],
        "images are read with 1 (grey) or 3 (RGB) channels": ["--num_channels", "2"],
    }

    def run(*arguments, cwd):
        output = [] if "--output_dir" in arguments else ["--output_dir", tmp_path / "run"]
        return run_train(*arguments, *output, cwd=cwd)

    assert_all_refused(run, "train.py", cases, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"broken.json", "broken.yaml", "list.yaml", "occupied"}
    assert [path.name for path in (tmp_path / "occupied").iterdir()] == ["thesis.txt"]


def test_the_table_keeps_the_names_of_the_command_whole_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    metrics = dict.fromkeys(["eval_accuracy", *map("eval_{}".format, ARBITRARY_METRICS)], 0.5)
    for is_sequential in (True, False):
        print_table({"layershuffle-distilled": (metrics, 16)}, is_sequential)
        assert "│ layershuffle-distilled " in capsys.readouterr().out


def test_the_table_folds_long_names(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    name = "layershuffle-layerdrop-depth-predict"
    print_table({name: (dict.fromkeys(["eval_accuracy", *map("eval_{}".format, ARBITRARY_METRICS)], 0.5), 16)})
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(rows) > 1 and "".join(row[1].strip() for row in rows) == name


def test_help_is_printed():
    result = run_train("--help")
    assert result.returncode == 0
    assert "--shuffle_mode" in result.stdout and "--eval_orders" in result.stdout
