"""`hf-layershuffle train` with averaged weights, stochastic depth and a learning rate for each layer."""

import json
import shutil

import pytest
import torch
from conftest import assert_all_refused, run_cli
from safetensors.torch import load_file

import hf_layershuffle as ls
from hf_layershuffle.training import runs, session


RUN = """
    --hidden_size 16 --num_hidden_layers 3 --num_attention_heads 2 --per_device_train_batch_size 8
    --max_train_samples 64 --max_eval_samples 40 --max_steps 7 --save_steps 2 --save_total_limit 9 --eval_strategy no
    --final_eval_orders 8 --drop_path_rate 0.2 --layer_lr_decay 0.8 --orders_per_step 2 --max_grad_norm 0.5
    --use_cpu --disable_tqdm True --report_to none
""".split()
EMA = ["--ema_decay", "0.6"]
SCHEDULE_FREE = ["--optim", "schedule_free_adamw", "--lr_scheduler_type", "constant"]


def train(folder, *arguments) -> dict:
    session.run([*RUN, "--output_dir", str(folder), *arguments])
    return json.loads((folder / "all_results.json").read_text())


def assert_same_weights(folder, other) -> None:
    ours, expected = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    "options",
    [EMA, SCHEDULE_FREE, [*EMA, "--augmentation", "deit", "--depth_embedding", "--layerdrop", "0.2"]],
    ids=["ema", "schedule-free", "all"],
)
def test_a_stopped_run_ends_with_the_same_weights(tmp_path, options, caplog):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    results = train(whole, *options)
    stopped.mkdir()
    for step in (2, 4, 6):
        shutil.copytree(whole / f"checkpoint-{step}", stopped / f"checkpoint-{step}")
    shutil.copy(whole / runs.RUN_FILE, stopped)
    torn = stopped / "checkpoint-6" / "training_weights.pt"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    assert train(stopped, *options)["eval_arbitrary_accuracy"] == results["eval_arbitrary_accuracy"]
    assert "checkpoint-6: its training_weights.pt is not whole" in caplog.text
    assert f"Going on from {stopped / 'checkpoint-4'}" in caplog.text
    assert_same_weights(stopped, whole)
    assert_same_weights(whole, whole / "checkpoint-7")
    model = ls.load_classifier(whole / "checkpoint-4")  # a model like any other
    assert model.config.drop_path_rate == 0.2

    # Stopped after the last step and before the model was saved: nothing is trained any more
    for name in ("model.safetensors", "all_results.json"):
        (whole / name).unlink()
    train(whole, *options)
    assert_same_weights(stopped, whole)


def test_the_baseline_has_the_same_options(tmp_path):
    train(tmp_path, *EMA, "--baseline", "--depth_embedding", "--layerdrop", "0.2")
    config = json.loads((tmp_path / "baseline" / "config.json").read_text())
    assert config["drop_path_rate"] == 0.2 and config.get("shuffle_mode", "none") == "none"
    assert (tmp_path / "baseline" / "checkpoint-6" / "training_weights.pt").exists()
    for card in (tmp_path / "README.md", tmp_path / "baseline" / "README.md"):
        text = card.read_text()
        for name, value in {"ema_decay": 0.6, "layer_lr_decay": 0.8, "drop_path_rate": 0.2}.items():
            assert f"| `{name}` | `{value}` |" in text


def test_another_run_is_refused(tmp_path):
    train(tmp_path, *EMA, "--max_steps", "2")
    for name, value in (("ema_decay", 0.5), ("layer_lr_decay", 0.7), ("drop_path_rate", 0.1)):
        with pytest.raises(ValueError, match=f"holds a run with `{name}` .*, and this one has {value}"):
            train(tmp_path, *EMA, "--max_steps", "2", f"--{name}", str(value))


def test_what_cannot_be_meant_is_refused(tmp_path):
    cases = {
        "`ema_decay` is 1.0; it must be a fraction in [0, 1)": ["--ema_decay", "1"],
        "`layer_lr_decay` is 0.0; it must be a fraction in (0, 1]": ["--layer_lr_decay", "0"],
        "`drop_path_rate` is 1.0; it must be a fraction in [0, 1)": ["--drop_path_rate", "1"],
        "add --lr_scheduler_type constant": ["--optim", "schedule_free_adamw"],
        "averages the weights by itself": [*EMA, *SCHEDULE_FREE],
    }
    arguments = {message: ["train", *RUN, "--output_dir", "run", *given] for message, given in cases.items()}
    assert_all_refused(run_cli, "hf-layershuffle", arguments, tmp_path)
