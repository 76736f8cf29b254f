"""`hf-layershuffle train`: its options, and runs that were stopped, torn or started twice, most in this process."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, Architecture, run_cli
from datasets import ClassLabel, Dataset, DatasetDict, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file, save_file
from support.images import image_dataset
from transformers import Trainer, ViTConfig, ViTForImageClassification, ViTImageProcessor

import hf_layershuffle as ls
from hf_layershuffle.data.datasets import typical_image_size
from hf_layershuffle.hub.folder_records import record_training
from hf_layershuffle.training import checkpointing, runs, session
from hf_layershuffle.training.argument_parser import ArgumentParser, parse_arguments
from hf_layershuffle.training.model_sizes import scratch_sizes
from hf_layershuffle.training.outcome import ARBITRARY_METRICS, next_command, print_table
from hf_layershuffle.training.recorded_arguments import recorded_arguments
from hf_layershuffle.training.script_arguments import ModelArguments, ScriptTrainingArguments
from hf_layershuffle_cli import main


# 8 steps within one pass, a checkpoint after every second of them
RUN = """
    --per_device_train_batch_size 8 --max_train_samples 64 --max_eval_samples 40 --max_steps 7 --save_steps 2
    --save_total_limit 9 --eval_strategy no --final_eval_orders 8 --layerdrop 0.2 --hidden_dropout_prob 0.1
    --use_cpu --disable_tqdm True --report_to none
""".split()
SMALL = ["--hidden_size", "16", "--num_hidden_layers", "3", "--num_attention_heads", "2", *RUN]


def train(folder, *arguments) -> dict:
    """Runs the command in this process; returns all metrics."""
    session.run([*SMALL, "--output_dir", str(folder), *map(str, arguments)])
    return json.loads((folder / "all_results.json").read_text())


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder, other) -> None:
    ours, expected = weights(folder), weights(other)
    assert list(ours) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    return folder


@pytest.fixture
def stopped(whole, tmp_path):
    """The same run as if it had been stopped right after its checkpoint at step 6."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("checkpoint-7", "*.safetensors", "*.json"))
    for step in (2, 4, 6):
        shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}", dirs_exist_ok=True)
    shutil.copy(whole / runs.RUN_FILE, folder)
    return folder


# --- Torn checkpoints ---


def remove_state(checkpoint):
    (checkpoint / "trainer_state.json").unlink()


def halve(name):
    def tear(checkpoint):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])

    return tear


def remove_random_state(checkpoint):
    (checkpoint / "rng_state.pth").unlink()


def remove_all(checkpoint):
    for path in checkpoint.iterdir():
        path.unlink()


def write(name, text):
    def tear(checkpoint):
        (checkpoint / name).write_text(text)

    return tear


TEARS = [remove_state, remove_random_state, remove_all, write("config.json", "null")]
TEARS += [write("trainer_state.json", text) for text in ("{}", "[" * 100_000)]
TEARS += [
    halve(name) for name in ("config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
]


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_skipped_and_the_run_ends_with_the_same_weights(whole, stopped, tear, caplog):
    tear(stopped / "checkpoint-6")
    train(stopped)
    assert f"Skipped {stopped / 'checkpoint-6'}: its " in caplog.text or "checkpoint-6: it holds no" in caplog.text
    assert f"Going on from {stopped / 'checkpoint-4'}" in caplog.text
    assert_same_weights(stopped, whole)


def test_torn_checkpoints_alone_do_not_block_a_run(whole, stopped):
    for step in (2, 4, 6):
        remove_state(stopped / f"checkpoint-{step}")
    train(stopped)
    assert_same_weights(stopped, whole)


def test_a_stop_in_the_middle_of_a_save_does_not_block_the_run(whole, tmp_path, monkeypatch):
    def stop(self, output_dir):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return save(self, output_dir)

    save = Trainer._save_rng_state
    monkeypatch.setattr(Trainer, "_save_rng_state", stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-4" / "model.safetensors").exists()
    monkeypatch.undo()
    train(tmp_path / "run")
    assert_same_weights(tmp_path / "run", whole)


def test_a_full_disk_in_the_middle_of_a_save_is_one_line(whole, tmp_path, monkeypatch):
    def fill(self, output_dir):
        output = Path(output_dir, "optimizer.pt")
        output.write_bytes(b"PK")
        raise RuntimeError(f"[enforce fail] PytorchStreamWriter failed writing file {output}: file write failed")

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", fill)
    with pytest.raises(OSError, match=r"could not be written into .* run the same command again"):
        train(tmp_path / "run")
    monkeypatch.undo()
    train(tmp_path / "run")
    assert_same_weights(tmp_path / "run", whole)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_training_does_not_go_on_without_the_optimizers_state(whole, stopped, name):
    """As with `--save_only_model`."""
    for step in (2, 4, 6):
        (stopped / f"checkpoint-{step}" / name).unlink()
    with pytest.raises(ValueError, match=rf"cannot go on exactly from .*checkpoint-6': it holds no {name}"):
        train(stopped)
    with pytest.raises(ValueError, match=f"checkpoint-4' cannot be resumed from: it holds no {name}"):
        train(stopped, "--resume_from_checkpoint", stopped / "checkpoint-4")
    assert not (stopped / "model.safetensors").exists()
    shutil.copy(whole / "checkpoint-4" / name, stopped / "checkpoint-4")
    train(stopped)  # from the older one, which is whole
    assert_same_weights(stopped, whole)


def test_a_run_stopped_before_the_final_save_takes_no_further_step(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for name in ("model.safetensors", "config.json", "all_results.json", "train_results.json", "trainer_state.json"):
        (folder / name).unlink()
    results = train(folder)
    assert_same_weights(folder, whole)
    assert results["epoch"] == pytest.approx(7 / 8) and results["train_samples"] == 64
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 7


def test_a_finished_run_is_evaluated_with_its_epoch(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    expected = json.loads((whole / "all_results.json").read_text())
    results = train(tmp_path / "run", "--do_train", "False")
    for name in ("epoch", "eval_accuracy", "eval_arbitrary_accuracy", "train_loss"):
        assert results[name] == expected[name], name
    with pytest.raises(ValueError, match=r"`do_train` is False, and '.*new' holds no finished run"):
        train(tmp_path / "new", "--do_train", "False")
    assert not (tmp_path / "new").exists()


def test_a_finished_run_without_checkpoints_is_evaluated_and_torn_results_do_not_matter(whole, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    train(folder)
    assert "Already trained" in caplog.text
    assert_same_weights(folder, whole)
    shutil.copytree(whole / "checkpoint-7", folder / "checkpoint-7")
    for tear in (halve("all_results.json"), write("all_results.json", "null"), write("config.json", "[" * 100_000)):
        tear(folder)
        assert train(folder)["train_samples"] == 64
        assert_same_weights(folder, whole)


def test_a_run_on_other_images_of_a_folder_with_the_same_name_is_refused(tmp_path):
    """Of other labels, or of other pixels; the same ones in a folder elsewhere go on."""
    images = image_dataset(40)
    labels = images.remove_columns("label")
    labels = labels.add_column("label", images["label"][::-1], feature=images.features["label"])
    pixels = image_dataset(40, seed=1)
    for name, dataset in {"first": images, "moved": images, "labels": labels, "pixels": pixels}.items():
        (tmp_path / name / "data").mkdir(parents=True)
        for split in ("train", "test"):
            dataset.to_parquet(tmp_path / name / "data" / f"{split}.parquet")

    def run(name):
        session.run([*SMALL, "--output_dir", str(tmp_path / "run"), "--dataset_name", str(tmp_path / name / "data")])

    run("first")
    (tmp_path / "run" / "all_results.json").unlink()
    run("moved")
    for name in ("labels", "pixels"):
        with pytest.raises(ValueError, match="holds a run with other examples to train on: `training_data` '"):
            run(name)


def test_a_run_from_other_weights_of_a_folder_with_the_same_name_is_refused(tmp_path, whole):
    for name in ("first", "moved", "other"):
        shutil.copytree(whole, tmp_path / name / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
        record_training(tmp_path / name / "model", arguments={}, base_model="org/vit")
    changed = {name: tensor + 1 for name, tensor in weights(whole).items()}
    save_file(changed, tmp_path / "other" / "model" / "model.safetensors", metadata={"format": "pt"})

    def run(name):
        start = ["--model_name_or_path", str(tmp_path / name / "model"), "--output_dir", str(tmp_path / "run")]
        session.run([*RUN, *start])

    run("first")
    assert json.loads((tmp_path / "run" / "training.json").read_text())["base_model"] == "org/vit"
    run("moved")
    with pytest.raises(ValueError, match="holds a run with another model to start from: `model_weights` '"):
        run("other")


def test_a_model_from_scratch_numbers_the_classes_as_its_teacher_does(tmp_path):
    """The same images in another order of the classes: the teacher's answers are to the classes of its own numbers."""
    names = ("dog", "emu", "cat")
    images = image_dataset(12, names=sorted(names))
    for split in ("train", "test"):
        images.to_parquet(tmp_path / f"{split}.parquet")
    id2label = dict(enumerate(names))
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    config = ViTConfig(**sizes, image_size=8, patch_size=4, id2label=id2label, label2id={})
    ViTForImageClassification(config).save_pretrained(tmp_path / "teacher")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "teacher")
    options = ["--dataset_name", tmp_path, "--teacher_model_name_or_path", tmp_path / "teacher"]
    with session.TrainingSession([*SMALL, *map(str, options), "--output_dir", str(tmp_path / "run")]) as training:
        assert training.runs[0].model.config.id2label == id2label
        ours = {row["image"].tobytes(): names[row["label"]] for row in training.train_dataset.dataset}
    assert ours == {row["image"].tobytes(): sorted(names)[row["label"]] for row in images}


def test_fine_tuning_takes_the_dataset_of_the_checkpoint_and_tells_of_new_classes(tmp_path, whole, caplog):
    """As its training.json says; without one the default, by name. Other classes, and other numbers of them, show."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        image_dataset(30, names="klmnopqrst").to_parquet(data / f"{split}.parquet")
    shutil.copytree(whole, tmp_path / "letters", ignore=shutil.ignore_patterns("checkpoint-*"))
    record_training(tmp_path / "letters", arguments={}, dataset=str(data))
    record = json.loads((tmp_path / "letters" / "training.json").read_text())
    record["dataset_arguments"] = {"label_column": "label", "eval_split": "train", "eval_fraction": 0.4}
    record["dataset"] = str(data)  # a folder elsewhere is recorded by its name alone
    (tmp_path / "letters" / "training.json").write_text(json.dumps(record))
    shutil.copytree(tmp_path / "letters", tmp_path / "bare")
    (tmp_path / "bare" / "training.json").unlink()

    def prepare(start, *options):
        caplog.clear()
        argv = [*RUN, "--model_name_or_path", str(tmp_path / start), "--output_dir", str(tmp_path / "run"), *options]
        with session.TrainingSession(argv) as training:
            assert (training.data_args.eval_fraction == 0.4) == (start == "letters" and not options)
            return training.task.class_names

    assert prepare("letters") == list("klmnopqrst")
    assert f"fine-tunes '{tmp_path / 'letters'}' on '{data}'" in caplog.text
    assert f"The classes of '{data}' ('k', 'l', 'm', 'n', 'o', ...) replace those of" in caplog.text
    shutil.copytree(whole / "checkpoint-7", tmp_path / "letters" / "checkpoint-7")  # it is of the same run
    start = ["--model_name_or_path", str(tmp_path / "letters" / "checkpoint-7"), "--output_dir", str(tmp_path / "run")]
    assert parse_arguments([*RUN, *start])[1].dataset_name == str(data)
    assert prepare("bare") == list("0123456789")
    assert "No --dataset_name: fine-tunes" in caplog.text and "replace those of" not in caplog.text
    assert prepare("letters", "--dataset-name=digits") == list("0123456789")
    assert "No --dataset_name" not in caplog.text
    for split in ("train", "test"):
        image_dataset(12, names="kl").to_parquet(data / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"has 10 classes and dataset '.*' has 2; choose another dataset"):
        prepare("letters")
    record["dataset"] = "letters-of-1900"  # of a folder elsewhere
    (tmp_path / "letters" / "training.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"was trained on 'letters-of-1900' \(training.json\), which is neither"):
        prepare("letters")
    # An encoder alone has no classifier to keep
    ls.load_classifier(whole).base_model.save_pretrained(tmp_path / "encoder")
    shutil.copy(whole / "preprocessor_config.json", tmp_path / "encoder")
    assert prepare("encoder", "--dataset_name", str(data)) == ["k", "l"]


def test_a_run_of_another_number_of_processes_is_refused(stopped):
    path = stopped / runs.RUN_FILE
    record = json.loads(path.read_text())
    assert record["num_processes"] == 1
    path.write_text(json.dumps(record | {"num_processes": 2}))
    with pytest.raises(ValueError, match="holds a run with `num_processes` 2, and this one has 1"):
        train(stopped)
    del record["num_processes"]  # of an earlier version: told by the checkpoint's files
    path.write_text(json.dumps(record))
    for step in (2, 4, 6):
        checkpoint = stopped / f"checkpoint-{step}"
        (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    with pytest.raises(ValueError, match="checkpoint-6' is of a run with another number of processes than 1"):
        train(stopped)


def test_a_checkpoint_of_another_folder_does_not_go_on_in_a_run(whole, stopped, tmp_path):
    other, elsewhere = tmp_path / "other", ["--resume_from_checkpoint", stopped / "checkpoint-6"]
    shutil.copytree(whole, other)
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"other' is not empty, and --resume_from_checkpoint '.*checkpoint-6' is not"):
        train(other, *elsewhere)
    assert before == {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    for folder, options in ((tmp_path / "new", []), (other, ["--overwrite_output_dir"])):
        train(folder, *elsewhere, *options)
        assert_same_weights(folder, whole)
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-7"]
    train(stopped, *elsewhere)
    assert_same_weights(stopped, whole)


# The first checkpoint is the best one: its loss is the largest
FIRST_IS_BEST = """
    --load_best_model_at_end True --metric_for_best_model loss --greater_is_better True --eval_strategy steps
    --eval_steps 2
""".split()


@pytest.mark.parametrize("saving", ["--save_total_limit 1", "--save_strategy best"])
def test_a_finished_run_of_which_the_best_checkpoint_is_left_is_not_trained_again(tmp_path, monkeypatch, saving):
    folder, options = tmp_path / "run", [*FIRST_IS_BEST, *saving.split()]
    train(folder, *options)
    assert [path.name for path in folder.glob("checkpoint-*")][:1] in (["checkpoint-2"], ["checkpoint-7"])
    shutil.rmtree(folder / "checkpoint-7", ignore_errors=True)
    before = weights(folder)
    monkeypatch.setattr(Trainer, "train", None)
    train(folder, *options)
    train(folder, *options, "--do_train", "False")
    assert all(torch.equal(tensor, weights(folder)[name]) for name, tensor in before.items())


def test_a_run_that_was_moved_ends_with_the_best_weights(tmp_path, monkeypatch, caplog):
    for name in ("then", "now"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "then")
    train(Path("run"), *FIRST_IS_BEST)
    moved = tmp_path / "now" / "moved"
    Path("run").rename(moved)
    monkeypatch.chdir(tmp_path / "now")
    assert json.loads((moved / "trainer_state.json").read_text())["best_model_checkpoint"] == "run/checkpoint-2"
    shutil.copytree(moved / "checkpoint-6", Path("run") / "checkpoint-2")  # of another run
    (moved / "all_results.json").unlink()
    train(Path("moved"), *FIRST_IS_BEST)
    assert_same_weights(moved, moved / "checkpoint-2")
    assert not torch.equal(weights(moved)["classifier.bias"], weights(moved / "checkpoint-7")["classifier.bias"])

    shutil.rmtree("run")
    shutil.rmtree(moved / "checkpoint-2")
    (moved / "all_results.json").unlink()
    train(Path("moved"), *FIRST_IS_BEST)
    assert "The best checkpoint of the run, 'run/checkpoint-2', is not there any more" in caplog.text
    assert_same_weights(moved, moved / "checkpoint-7")


@pytest.mark.parametrize(
    ("name", "other", "only_of_best"),
    [
        ("max_eval_samples", "20", True),
        ("eval_strategy", "epoch", True),
        ("eval_steps", "1", True),
        ("eval_delay", "3", True),
        ("eval_orders", "2", True),
        ("eval_orders_seed", "1", True),
        ("greater_is_better", "False", True),
        ("save_steps", "4", True),
        ("train_sampling_strategy", "sequential", False),
        ("neftune_noise_alpha", "0.5", False),
    ],
)
def test_what_decides_the_weights_at_the_end_is_compared(tmp_path, name, other, only_of_best):
    def recorded(*options):
        given = parse_arguments([*SMALL, "--eval_strategy", "steps", *options])
        return json.loads(json.dumps(recorded_arguments(*given)))

    best = FIRST_IS_BEST if only_of_best else []
    options = ["--save_strategy", "epoch"] if other == "epoch" else []
    ours = recorded(*best, f"--{name}", other, *options)
    with pytest.raises(ValueError, match=f"holds a run with `{name}` .*, and this one has {ours[name]!r}"):
        runs.refuse_another_run(tmp_path, recorded(*best), ours)
    runs.refuse_another_run(tmp_path, recorded(*best), recorded(*best))
    without = recorded()
    assert (name in without) == (not only_of_best)
    runs.refuse_another_run(tmp_path, {key: without[key] for key in without if key != name}, recorded())


def test_a_run_that_an_earlier_version_started_goes_on(whole, stopped):
    path = stopped / runs.RUN_FILE
    record = json.loads(path.read_text())
    for name in ("dtype", "skip_damaged", "dataloader_drop_last", "num_processes"):
        del record[name]
    path.write_text(json.dumps(record | {"of_earlier_versions": True}))
    train(stopped)
    assert_same_weights(stopped, whole)


# --- One process, one folder ---


def test_a_refused_run_leaves_no_folder(tmp_path):
    for arguments in (["--num_channels", "2"], ["--lr_scheduler_type", "cosine_with_min_lr"]):
        with pytest.raises(ValueError):
            train(tmp_path / "new" / "run", *arguments)
        assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(session.TrainingSession, "train_and_evaluate", None)
    with pytest.raises(OSError, match=r"'/proc/run' cannot be written into .*; choose another --output_dir"):
        session.run([*SMALL, "--output_dir", "/proc/run"])
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**19))
    with pytest.raises(OSError, match=r"has 0 MiB left, and the run needs at least 1; make room"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "num_values"),
    [
        ({"save_strategy": "no"}, 1),
        ({"save_only_model": True, "ema_decay": 0.9}, 2),
        ({}, 4),
        ({"ema_decay": 0.9}, 5),
        ({"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}, 5),
    ],
)
def test_the_disk_must_hold_all_that_a_checkpoint_keeps_of_each_weight(tmp_path, monkeypatch, options, num_values):
    args = ScriptTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
    needed = 4 * num_values * 10**6 + 2**20
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    runs.check_space(tmp_path, 10**6, args)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(OSError, match="make room"):
        runs.check_space(tmp_path, 10**6, args)


def test_a_request_to_terminate_ends_as_ctrl_c_does(whole, tmp_path):
    arguments = [*SMALL, "--max_steps", "240", "--save_steps", "20", "--output_dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "hf_layershuffle_cli", "train", *arguments]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=ENVIRONMENT, **pipes)
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob("run/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    stopped = "stopped; the same command goes on from the last checkpoint, or starts anew if there is none"
    assert errors.endswith(f"hf-layershuffle: {stopped}\n")
    assert "Traceback" not in errors and not (tmp_path / "run" / "model.safetensors").exists()


def test_a_failed_push_is_told_by_the_exit_code_after_the_table(whole, tmp_path, monkeypatch, capsys, caplog):
    def refuse(self, **kwargs):
        raise ConnectionError("the Hub cannot be reached")

    monkeypatch.setattr("hf_layershuffle.training.trainer.LayerShuffleTrainer.push_to_hub", refuse)
    monkeypatch.setattr("hf_layershuffle.training.trainer.LayerShuffleTrainer.init_hf_repo", lambda *a, **k: None)
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", "--push_to_hub")
    assert stop.value.code == 1
    assert "│ layershuffle" in capsys.readouterr().out
    assert f"is saved in '{tmp_path / 'run'}', but not pushed to the Hub: the Hub cannot be reached" in caplog.text


# --- The same numbers everywhere ---


def test_the_table_does_not_depend_on_the_number_of_threads(tmp_path):
    """One command with one and with three threads; the weights are compared too, which is more than the table."""
    arguments = ["--num_hidden_layers", "3", "--max_steps", "12", "--eval_strategy", "no", "--use_cpu", "--output_dir"]
    outputs = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            result = run_cli("train", *arguments, tmp_path / str(threads))
        finally:
            torch.set_num_threads(1)
        assert result.returncode == 0, result.stderr
        outputs.append([line for line in result.stdout.splitlines() if line.startswith("│")])
        assert ("with one thread" in result.stderr) == (threads == 3)
        assert "360 of the 1797 images of split 'train' are held out for evaluation." in result.stderr
    assert outputs[0] == outputs[1] and len(outputs[0]) == 1
    assert_same_weights(tmp_path / "1", tmp_path / "3")


@pytest.mark.parametrize(
    "num_parameters, given, expected", [(10**6, None, 1), (10**6 + 1, None, 2), (10**6, 2, 2), (10**7, 1, 1)]
)
def test_small_models_take_one_thread_unless_told_otherwise(monkeypatch, num_parameters, given, expected):
    set_to = [2]
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    args = SimpleNamespace(num_threads=given, device=torch.device("cpu"))
    model = SimpleNamespace(num_parameters=lambda: num_parameters)
    session.TrainingSession._choose_threads(SimpleNamespace(args=args), model)
    assert set_to[-1] == expected


def test_weights_stored_in_half_precision_are_trained_in_float32(tmp_path):
    model = Architecture("vit").plain_classifier(num_labels=10, num_hidden_layers=3).half()
    for name, dtype in (("half", torch.float16), ("float", torch.float32)):
        model.to(dtype).save_pretrained(tmp_path / name)
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / name)
    for name in ("half", "float"):
        output = ["--output_dir", str(tmp_path / f"trained-{name}"), "--num_threads", "1"]
        session.run([*RUN, "--model_name_or_path", str(tmp_path / name), *output])
    trained = weights(tmp_path / "trained-half")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert_same_weights(tmp_path / "trained-half", tmp_path / "trained-float")
    output = ["--output_dir", str(tmp_path / "brain"), "--dtype", "bfloat16"]
    session.run([*RUN, "--model_name_or_path", str(tmp_path / "half"), *output])
    assert {tensor.dtype for tensor in weights(tmp_path / "brain").values()} == {torch.bfloat16}


@pytest.mark.parametrize(("damage", "message"), [("shallower", "layers for which its config"), ("nan", "NaN")])
def test_a_damaged_checkpoint_is_not_fine_tuned(tmp_path, damage, message):
    model = Architecture("vit").classifier(num_labels=10, id2label={index: str(index) for index in range(10)})
    if damage == "nan":
        model.classifier.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    if damage == "shallower":
        config = tmp_path / "model" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=message):
        session.run(
            ["--model_name_or_path", str(tmp_path / "model"), "--use_cpu", "--output_dir", str(tmp_path / "out")]
        )
    assert not (tmp_path / "out").exists()


def test_fine_tuning_keeps_the_classes_as_the_checkpoint_numbers_them(tmp_path):
    names = ["ant", "bee", "cat"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    Architecture("vit").classifier(num_labels=3, **labels).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    images = [Image.fromarray(np.full((8, 8, 3), 10 * row, dtype=np.uint8)) for row in range(24)]
    for kind, feature in (("other order", ClassLabel(names=["cat", "ant", "bee"])), ("integers", Value("int64"))):
        dataset = Dataset.from_dict({"image": images, "label": [row % 3 for row in range(24)]})
        dataset = dataset.cast_column("image", ImageFeature()).cast_column("label", feature)
        DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / kind)
        options = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / kind)]
        options += ["--use_cpu", "--output_dir", str(tmp_path / "out")]
        for further in ([], ["--ignore_mismatched_sizes"]):
            with session.TrainingSession([*options, *further]) as prepared:
                config = prepared.runs[0].model.config
                first = [int(prepared.eval_dataset[row]["labels"]) for row in range(3)]
            are_others = further and kind == "integers"
            assert [config.id2label[index] for index in range(3)] == (["0", "1", "2"] if are_others else names)
            assert first == ([2, 0, 1] if kind == "other order" else [0, 1, 2])


def test_the_baseline_of_a_layer_controller_is_chosen_by_what_it_has(tmp_path):
    Architecture("vit").classifier(num_labels=10).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    options = ["--model_name_or_path", str(tmp_path / "model"), "--layer_controller", "True", "--baseline"]
    options += [
        "--load_best_model_at_end",
        "True",
        "--eval_strategy",
        "epoch",
        "--save_strategy",
        "epoch",
        "--use_cpu",
    ]
    options += ["--metric_for_best_model", "half_budget_accuracy", "--output_dir", str(tmp_path / "out")]
    with session.TrainingSession(options) as prepared:
        found = [run.args.metric_for_best_model for run in prepared.runs]
    assert found == ["half_budget_accuracy", "eval_accuracy"] and prepared.runs[1].args.greater_is_better


# --- Options ---


def test_every_image_size_from_16_to_224_gets_a_patch_that_divides_it():
    for size in range(16, 225):
        sizes = scratch_sizes(ModelArguments(), (size, size + 3))
        image, patch = sizes["image_size"], sizes["patch_size"]
        assert image % patch == 0 and 1 <= patch <= 16 and abs(image - size) <= patch / 2, size
        assert 4 <= image // patch <= (8 if size < 128 else 14), size
    as_before = {8: 2, 28: 7, 32: 4, 64: 8, 96: 12, 128: 16, 224: 16, 500: 16}
    assert {size: scratch_sizes(ModelArguments(), (size, size))["patch_size"] for size in as_before} == as_before
    assert scratch_sizes(ModelArguments(patch_size=16), (150, 150))["image_size"] == 144
    sizes = scratch_sizes(ModelArguments(image_size=150), (28, 28))
    assert (sizes["image_size"], sizes["patch_size"]) == (150, 15)
    for arguments, message in (
        (ModelArguments(image_size=151), "`image_size` is 151, which no patch .* choose 144 or 160"),
        (ModelArguments(image_size=0), "`image_size` is 0; it must be at least 1"),
        (ModelArguments(patch_size=32), "`patch_size` is 32, and the dataset's images have 28 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            scratch_sizes(arguments, (28, 28))


def test_the_first_image_alone_does_not_decide_the_size():
    images = [Image.fromarray(np.zeros(size, dtype=np.uint8)) for size in [(5, 400), *[(40, 50)] * 9]]
    assert typical_image_size(Dataset.from_dict({"image": images}).cast_column("image", ImageFeature())) == (40, 50)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--image_size", "18"], "`image_size` is 18, which the patch of 4 pixels does not divide; choose 16 or 20"),
        (["--patch_size", "2"], "`patch_size` is 2, and '.*' has 4, which fine-tuning keeps; leave out --patch_size"),
        (["--num_hidden_layers", "2"], "`num_hidden_layers` is 2, and '.*' has 4"),
        (["--num_channels", "1"], "`num_channels` is 1, and '.*' has 3"),
        (["--architecture", "deit"], "`architecture` is 'deit', and '.*' has 'vit'"),
        (["--hidden_size", "64"], "`hidden_size` is 64"),
        (["--residual_init_scale", "0"], "`residual_init_scale` is 0.0"),
        (["--position_loss_weight", "2"], "`position_loss_weight` is 2.0 without `position_predictor`"),
    ],
)
def test_sizes_beside_a_checkpoint_are_refused_unless_they_are_its_own(tmp_path, arguments, message):
    from hf_layershuffle.training.model_building import build_model
    from hf_layershuffle.training.model_flags import layershuffle_flags

    Architecture("vit").plain_classifier().save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    own = ["--image_size", "8", "--patch_size", "4", "--architecture", "vit", "--hidden_dropout_prob", "0.3"]
    names = [f"LABEL_{index}" for index in range(5)]

    def build(*given):
        args, _, _ = parse_arguments(["--model_name_or_path", str(tmp_path), *own, *given, "--use_cpu"])
        return build_model(args, layershuffle_flags(args), names, (8, 8), {})[0]

    assert build("--preset", "order-free").config.hidden_dropout_prob == 0.3
    with pytest.raises(ValueError, match=message):
        build(*arguments)


def test_training_arguments_that_ended_in_tracebacks_work_or_are_one_line(tmp_path, capsys):
    for arguments in (["--dataloader_drop_last"], ["--prediction_loss_only", "--eval_strategy", "steps"]):
        folder = tmp_path / arguments[0].strip("-")
        assert train(folder, *arguments)["eval_runtime"] > 0
        assert json.loads((folder / "eval_results.json").read_text())["eval_arbitrary_accuracy"] >= 0
    assert "eval_loss" not in train(tmp_path / "no_eval", "--do_eval", "False")
    refused = {
        "`eval_do_concat_batches` is False; it must be True": ["--eval_do_concat_batches", "False"],
        "`batch_eval_metrics` is True; it must be False": ["--batch_eval_metrics", "True"],
        "`label_names` is .*; it must be None": ["--label_names", "x"],
        "`do_predict` is True": ["--do_predict"],
        "`enable_jit_checkpoint` is True; it must be False: SIGTERM stops": ["--enable_jit_checkpoint"],
        "`label_smoothing_factor` is 2.0; it must lie in": ["--label_smoothing_factor", "2"],
        "is measured of models with a layer controller": ["--metric_for_best_model", "half_budget_accuracy"],
        "`report_to` is 'wandb', which is not installed .*pip install tensorboard": ["--report_to", "wandb"],
        "must be one of loss.$": ["--prediction_loss_only", "--metric_for_best_model", "accuracy"],
        "`learning_rate` is inf": ["--learning_rate", "inf"],
        "`num_threads` is 0; it must be at least 1": ["--num_threads", "0"],
        "`dtype` is 'float16', in which training loses small steps; use float32 with --fp16": ["--dtype", "float16"],
        "`dtype` is 'int8'": ["--dtype", "int8"],
        "`model_revision` is 'v2' without a model": ["--model_revision", "v2"],
        "`depth_embedding_dim` is 4 without `depth_embedding`": ["--depth_embedding_dim", "4"],
    }
    for message, arguments in refused.items():
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "refused", *arguments)
    assert not (tmp_path / "refused").exists()


def test_every_image_is_evaluated_where_training_drops_its_last_batch(tmp_path, monkeypatch):
    def count(prediction):
        counts.append(len(prediction.label_ids))
        return compute_metrics(prediction)

    counts, compute_metrics = [], ls.compute_metrics
    monkeypatch.setattr(ls, "compute_metrics", count)
    train(tmp_path / "run", "--dataloader_drop_last", "--per_device_eval_batch_size", "16")
    assert counts == [40]


def test_a_misspelt_option_gets_a_suggestion(capsys, monkeypatch):
    cases = {
        "There is no option --learning_rat; did you mean --learning_rate": ["train", "--learning_rat", "1"],
        "There is no option --sufle-mode=none; did you mean --shuffle_mode": ["train", "--sufle-mode=none"],
        "There is no option xyzzy (--help lists": ["train", "xyzzy"],
        "No such option: --nm_orders (Possible options: --num_orders). See --help.": [
            "evaluate",
            "x",
            "--nm_orders",
            "3",
        ],
        "No such command 'evalute'. Did you mean 'evaluate'? See --help.": ["evalute"],
    }
    for message, arguments in cases.items():
        monkeypatch.setattr(sys, "argv", ["hf-layershuffle", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith(f"hf-layershuffle: error: {message}"), error
        assert len(error.splitlines()) == 1


def test_help_shows_own_options_first_and_each_once(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf-layershuffle", "train", "--help"])
    with pytest.raises(SystemExit) as stop:
        main()
    text = capsys.readouterr().out
    assert not stop.value.code and text.startswith(
        "usage: hf-layershuffle train [arguments.yaml] [--option value ...]"
    )
    groups = re.findall(r"^([a-z].*):$", text, re.MULTILINE)
    assert groups == ["options", "model", "data", "training", "of transformers' TrainingArguments"]
    order = [text.index(f"\n  {name} ") for name in ("--preset", "--dataset_name", "--num_threads", "--adam_beta1")]
    assert order == sorted(order)
    options = re.findall(r"^  (--\w+)", text, re.MULTILINE)
    assert len(options) == len(set(options)) and "--model-name-or-path" not in text
    every = {action.dest for action in ArgumentParser()._actions}
    assert every <= {option.removeprefix("--").removeprefix("no_") for option in options}


def test_two_presets_do_not_share_a_default_folder(tmp_path, monkeypatch):
    from hf_layershuffle.training.recipes import default_output_dir

    assert default_output_dir("digits", "layershuffle", None) == "outputs/digits-layershuffle"
    assert default_output_dir("digits", "layershuffle", "order-free") == "outputs/digits-layershuffle-order-free"
    assert default_output_dir("org/name", "plain", None) == "outputs/name-plain"
    monkeypatch.chdir(tmp_path)
    assert default_output_dir(".", "plain", None) == f"outputs/{tmp_path.name}-plain"


def test_a_column_is_called_sequential_only_if_it_is(tmp_path, capsys):
    train(tmp_path / "run", "--execution_order", "2,0,1")
    printed = capsys.readouterr().out
    assert "configured" in printed and "sequential" not in printed


def test_names_with_brackets_are_printed_as_they_are(capsys):
    metrics = dict.fromkeys(["eval_accuracy", *map("eval_{}".format, ARBITRARY_METRICS)], 0.5)
    print_table({"run[lr=0.1]": (metrics, 16), "[/v2]": (metrics, 16)})
    text = capsys.readouterr().out
    assert "run[lr=0.1]" in text and "[/v2]" in text


def test_the_next_command_is_one_that_can_be_pasted():
    _, data_args, args = parse_arguments(
        ["--dataset_name", "my data", "--eval_split", "test", "--output_dir", "o u", "--baseline", "--use_cpu"]
    )
    command = "hf-layershuffle evaluate 'o u' 'o u/baseline' --dataset_name 'my data' --eval_split test --output_dir"
    assert next_command(data_args, args) == f"{command} 'o u-robustness'"
    command = (
        "hf-layershuffle budget 'o u' --rivals 'baseline=o u/baseline' --dataset_name 'my data' --eval_split test"
    )
    assert (
        next_command(data_args, args, ls.LayerShuffleViTConfig(halting_head=True))
        == f"{command} --output_dir 'o u-budget'"
    )


def test_a_missing_shard_makes_a_checkpoint_incomplete(whole, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(whole / "checkpoint-2", checkpoint)
    tensors = weights(checkpoint)
    save_file(tensors, checkpoint / "model-00001-of-00002.safetensors")
    (checkpoint / "model.safetensors").unlink()
    index = {
        "weight_map": {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    }
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(checkpointing.IncompleteCheckpoint, match=r"its model.safetensors.index.json is not whole"):
        checkpointing.check_weights(checkpoint)
