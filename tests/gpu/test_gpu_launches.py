"""Programs on one CUDA device, each in a process of its own: NCCL under DDP and FSDP2, and the commands."""

import json
import re
import sys

import pytest
from conftest import REPOSITORY, TRAIN, run_command, run_python
from support.gpu import ENVIRONMENT


pytestmark = pytest.mark.gpu
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--main_process_port", "0"]
CONFIGS = {"MULTI_GPU": "ddp.yaml", "FSDP": "fsdp2.yaml"}
SMALL = """
    --hidden_size 32 --num_hidden_layers 4 --num_attention_heads 2 --max_steps 6 --save_steps 3 --eval_orders 2
    --per_device_train_batch_size 8 --max_train_samples 64 --max_eval_samples 40
""".split()


def launched(kind: str, precision: str, *command):
    config = REPOSITORY / "examples" / "accelerate" / CONFIGS[kind]
    launch = [*LAUNCH, "--config_file", config, "--mixed_precision", precision]
    return run_command([*launch, *command], environment=ENVIRONMENT)


@pytest.mark.parametrize(("check", "precision"), [("steps", "no"), ("runs", "bf16"), ("averages", "no")])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_trainer_over_nccl(kind, check, precision):
    result = launched(kind, precision, REPOSITORY / "tests" / "support" / "gpu_checks.py", kind, check)
    assert result.returncode == 0, result.stderr[-6000:]
    assert f"{kind}: {check} passed" in result.stdout


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_training_program_over_nccl(kind, tmp_path):
    folder = tmp_path / "run"
    result = launched(kind, "bf16", TRAIN, *SMALL, "--output_dir", folder)
    assert result.returncode == 0, result.stderr[-6000:]
    results = json.loads((folder / "all_results.json").read_text())
    assert 0 <= results["eval_accuracy"] <= 1 and results["train_samples"] == 64
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert {name.split(".")[0] for name in auto_map.values()} == {
        "configuration_layershuffle",
        "modeling_layershuffle",
    }
    assert (folder / "modeling_layershuffle.py").exists()
    assert (folder / "model.safetensors").stat().st_size > 10_000


def test_the_training_program_and_the_evaluation_on_one_device(tmp_path):
    folder = tmp_path / "run"
    options = ["--bf16", "True", "--dataloader_num_workers", "2", "--orders_per_step", "2"]
    result = run_python(TRAIN, *SMALL, *options, "--output_dir", folder, fresh=True, environment=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-6000:]
    command = [
        sys.executable,
        "-m",
        "hf_layershuffle_cli",
        "evaluate",
        folder,
        "--num_orders",
        "2",
        "--dtype",
        "bfloat16",
    ]
    result = run_command([*command, "--output_dir", tmp_path / "report"], environment=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-6000:]
    report = json.loads(next((tmp_path / "report").glob("*.json")).read_text())
    assert re.match("cuda", report["environment"]["device"])
