import re
import sys

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from conftest import REPOSITORY, of_both_architectures, run_command


# In few launches: each takes as long as most checks
CHECKS = (
    ["ddp_gradients", "fsdp2_training", "fsdp2_refusal"],
    ["distillation", "losses_outside_forward", "layerdrop_and_stops"],
    ["averaged_weights", "sharded_averages"],
)


@pytest.mark.parametrize("checks", CHECKS, ids=["models", "trainer", "averages"])
def test_two_processes(checks):
    script = REPOSITORY / "tests" / "support" / "distributed_checks.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = run_command([*torchrun, script, *checks])
    assert result.returncode == 0, result.stderr
    assert {f"rank {rank}: {check} passed" for rank in (0, 1) for check in checks} == set(
        re.findall(r"rank \d: \w+ passed", result.stdout)
    )


@of_both_architectures
def test_accelerate_shards_layer_by_layer(architecture, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    model = architecture.classifier(depth_embedding=True)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    wrapped = {name for name, module in model.named_modules() if policy(module)}
    prefix = architecture.name
    assert wrapped == {f"{prefix}.embeddings"} | {f"{prefix}.layers.{index}" for index in range(4)}


@pytest.mark.parametrize("name", ["ddp.yaml", "ddp_cpu.yaml", "fsdp2.yaml"])
def test_launch_configurations_are_read_by_accelerate(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(REPOSITORY / "examples" / "accelerate" / name))
    assert config.num_processes == 2
    if name == "fsdp2.yaml":
        assert config.fsdp_config["fsdp_version"] == 2
