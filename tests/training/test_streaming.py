"""Training on a stream: the same for any number of workers, and after a stop anywhere in it."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY, run_cli, run_command
from datasets import load_dataset
from safetensors.torch import load_file
from support.images import AUGMENTATIONS, augmentation_named, processor
from support.streams import write_parquet, write_tars
from support.trainers import Stop, arguments

import hf_layershuffle as ls
from hf_layershuffle.data.image_stream import ImageStream
from hf_layershuffle.training.argument_parser import parse_arguments


TOTAL = 26
SMALL = """
    --hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --image_size 16 --patch_size 8 --use_cpu
    --per_device_train_batch_size 4 --eval_strategy no --eval_orders 0 --final_eval_orders 8 --report_to none
    --streaming --shuffle_buffer_size 6
""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("stream") / "images")


def trainer_of(folder, output, vit, *, num_samples: int | None = TOTAL, preset: str = "imagenet", **kwargs):
    paths = f"{folder}/data/train-*.parquet"
    stream = ImageStream(
        load_dataset("parquet", data_files=paths, split="train", streaming=True),
        processor(),
        num_samples=num_samples,
        augmentation=augmentation_named(preset),
        shuffle_buffer_size=6,
    )
    model = vit.classifier(num_labels=2, shuffle_mode="arbitrary", layerdrop=0.2)
    callbacks = kwargs.pop("callbacks", [])
    args = arguments(output, per_device_train_batch_size=4, max_steps=10, **kwargs)
    return ls.LayerShuffleTrainer(model, args, train_dataset=stream, callbacks=callbacks)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# An epoch is seven steps
@pytest.mark.parametrize(("preset", "step"), [*((preset, 9) for preset in AUGMENTATIONS), ("none", 7), ("none", 3)])
def test_a_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(folder, tmp_path, vit, preset, step):
    whole = trainer_of(folder, tmp_path / "whole", vit, preset=preset)
    whole.train()
    trainer_of(folder, tmp_path / "cut", vit, preset=preset, callbacks=[Stop(step)]).train()
    resumed = trainer_of(folder, tmp_path / "cut", vit, preset=preset)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 10
    assert_equal(weights(resumed), weights(whole))


def test_a_stream_of_less_than_a_batch_is_refused(folder, tmp_path, vit):
    trainer = trainer_of(folder, tmp_path, vit, num_samples=3, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="no batch to train on: 3 images, batches of 4 and `dataloader_drop_last`"):
        trainer.train()


@pytest.mark.parametrize("options", [{"num_samples": None}, {"num_samples": 10}, {"dataloader_drop_last": True}])
def test_resume_where_an_epoch_is_no_pass(folder, tmp_path, vit, options):
    whole = trainer_of(folder, tmp_path / "whole", vit, preset="light", **options)
    whole.train()
    trainer_of(folder, tmp_path / "cut", vit, preset="light", callbacks=[Stop(8)], **options).train()
    resumed = trainer_of(folder, tmp_path / "cut", vit, preset="light", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing(folder, tmp_path, vit, persistent):
    alone = trainer_of(folder, tmp_path / "alone", vit, preset="light")
    alone.train()
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent}
    helped = trainer_of(folder, tmp_path / "helped", vit, preset="light", **workers)
    helped.train()
    assert_equal(weights(helped), weights(alone))


def test_a_stream_that_is_not_prepared_is_refused(folder, tmp_path, vit):
    stream = load_dataset("parquet", data_files=f"{folder}/data/train-*.parquet", split="train", streaming=True)
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match=r"`train_dataset` .* no `pixel_values`.*ImageStream"):
        ls.LayerShuffleTrainer(vit.classifier(), args, train_dataset=stream, processing_class=processor())


# --- The command ---


@pytest.mark.slow
def test_the_command_trains_on_parquet_and_goes_on_in_the_middle(folder, tmp_path):
    options = ["train", "--dataset_name", folder, *SMALL, "--num_train_epochs", "2", "--save_steps", "5"]
    whole = run_cli(*options, "--output_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_layershuffle_cli", *options, "--output_dir", str(tmp_path / "cut")],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not (tmp_path / "cut" / "checkpoint-10").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    again = run_cli(*options, "--output_dir", tmp_path / "cut")
    assert again.returncode == 0 and "Going on from" in again.stderr
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    assert_equal(*files)


def test_the_command_trains_on_tar_files_and_evaluates(tmp_path, quick_pictures):
    folder = write_tars(tmp_path / "tars")
    options = ["train", "--dataset_name", folder, *SMALL, "--output_dir", tmp_path / "run"]
    refused = run_cli(*options)
    assert refused.returncode == 2 and "--num_train_samples, or the steps of the training by --max_steps" in (
        refused.stderr
    )
    result = run_cli(*options, "--max_steps", "8")
    assert result.returncode == 0, result.stderr
    assert "not its card" not in result.stderr and (tmp_path / "run" / "README.md").exists()
    (command,) = [line for line in result.stdout.splitlines() if line.startswith("Next: ")]
    assert "--streaming" in command
    evaluated = run_cli(*shlex.split(command)[2:], "--num_orders", "8", "--num_subsets", "1")
    assert evaluated.returncode == 0, evaluated.stderr
    other = run_cli(*options, "--max_steps", "8", "--shuffle_buffer_size", "7")
    assert other.returncode == 2 and "`shuffle_buffer_size` 6, and this one has 7" in other.stderr


def test_options_that_would_do_nothing_are_refused(folder):
    alone = run_cli("train", "--dataset_name", folder, "--num_train_samples", "5")
    assert alone.returncode == 2 and "`num_train_samples` is 5 without a stream; add --streaming" in alone.stderr
    with pytest.raises(ValueError, match="`shuffle_buffer_size` is 5 without a stream; add --streaming"):
        parse_arguments(["--dataset_name", str(folder), "--shuffle_buffer_size", "5"])
    both = run_cli("train", "--dataset_name", folder, *SMALL, "--max_train_samples", "5")
    assert both.returncode == 2 and "of a stream no rows can be drawn; use --num_train_samples" in both.stderr


@pytest.mark.slow
def test_two_processes_share_the_stream(tmp_path):
    folders = [
        write_parquet(tmp_path / name, shards=shards)
        for name, shards in {"pieces": (7, 7, 6, 6), "rows": (9, 9, 8)}.items()
    ]
    script = REPOSITORY / "tests" / "support" / "stream_shares.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
    result = run_command([*torchrun, script, tmp_path / "run", *folders], environment={"PYTHONPATH": paths})
    assert result.returncode == 0, result.stderr
    for folder in folders:
        files = [tmp_path / "run" / f"{Path(folder).name}-{rank}.txt" for rank in (0, 1)]
        seen = [set(file.read_text().split()) for file in files]
        assert not seen[0] & seen[1]
        assert len(seen[0] | seen[1]) == TOTAL
