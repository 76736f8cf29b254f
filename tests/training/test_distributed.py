import re
import sys
from types import SimpleNamespace

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from conftest import REPOSITORY, of_both_architectures, run_command

from hf_layershuffle.training.sharding import shard_embeddings_once


# In one launch, since that takes longer than most checks
CHECKS = (
    ["ddp_gradients", "fsdp2_training", "fsdp2_refusal", "fsdp2_by_accelerate"],
    ["distillation", "layer_controller", "losses_outside_forward", "layerdrop_and_stops", "halting"],
    ["averaged_weights", "sharded_averages"],
)


def test_two_processes():
    checks = [check for group in CHECKS for check in group]
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


@of_both_architectures
def test_what_holds_the_input_embeddings_is_not_sharded_twice(architecture):
    model = architecture.classifier()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    before = list(model._no_split_modules)
    shard_embeddings_once(accelerator, model)
    name = {"vit": "ViT", "deit": "DeiT"}[architecture.name]
    assert plugin.transformer_cls_names_to_wrap == [f"{name}Layer"]
    assert sorted(model._no_split_modules) == sorted(before) == [f"{name}Embeddings", f"{name}Layer"]
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    wrapped = {name for name, module in model.named_modules() if policy(module)}
    assert wrapped == {f"{architecture.name}.layers.{index}" for index in range(4)}


def test_classes_that_the_user_named_and_runs_without_fsdp2_stay_as_they_are(vit):
    named = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["ViTEmbeddings"]
    )
    shard_embeddings_once(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=named)), vit.classifier())
    assert named.transformer_cls_names_to_wrap == ["ViTEmbeddings"]
    shard_embeddings_once(SimpleNamespace(state=SimpleNamespace()), vit.classifier())


@pytest.mark.parametrize("name", ["ddp.yaml", "ddp_cpu.yaml", "fsdp2.yaml"])
def test_launch_configurations_are_read_by_accelerate(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(REPOSITORY / "examples" / "accelerate" / name))
    assert config.num_processes == 2
    if name == "fsdp2.yaml":
        assert config.fsdp_config["fsdp_version"] == 2
