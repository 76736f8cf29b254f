"""Two processes that write into one folder: the second is refused while the first lives.

When the first was killed, the second cleans up after it.
"""

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Architecture
from datasets import Array2D, ClassLabel, Dataset, Features
from transformers import ViTImageProcessor

import hf_layershuffle
from hf_layershuffle.common import claims
from hf_layershuffle_cli import main


NAMES = ["a", "b", "c", "d", "e"]
DATA = ["--dataset_name", "letters"]
FEW = ["--num_orders", "2", "--device", "cpu", *DATA]
# A process that has begun to write, as a command does: into a folder that it claimed, or a new folder or file
WRITER = """
import sys, time
from contextlib import ExitStack
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from common.claims import claimed_folder
from common.files import replaced_file, replaced_folder
kind, target = sys.argv[2], Path(sys.argv[3])
with ExitStack() as stack:
    if kind == "claim":
        stack.enter_context(claimed_folder(target))
        target = target / "robustness.json"
    partial = stack.enter_context(replaced_folder(target) if kind == "folder" else replaced_file(target))
    (partial / "half" if kind == "folder" else partial).write_text("half")
    print("begun", flush=True)
    time.sleep(120)
"""
TRAIN = """
    train --dataset_name letters --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --max_steps 1
    --final_eval_orders 8 --eval_strategy no --use_cpu --num_threads 1 --output_dir out
""".split()
MERGES = "merge model --random 2 --evaluate letters --device cpu --output_dir out".split()
COMMANDS = {
    "evaluate": ("claim", "out", ["evaluate", "model", "--num_subsets", "1", *FEW, "--output_dir", "out"]),
    "evaluate-several": (
        "claim",
        "out/other",
        ["evaluate", "model", "other", "--num_subsets", "1", *FEW, "--output_dir", "out"],
    ),
    "analyze": ("claim", "out", ["analyze", "model", *FEW, "--output_dir", "out"]),
    "publish": ("claim", "model", ["publish", "model", "--card_only", *FEW]),
    "random merges": ("claim", "out", MERGES),
    "train": ("claim", "out", TRAIN),
    "prune": ("folder", "out", ["prune", "model", "--keep", "0,2", "--output_dir", "out"]),
    "merge": ("folder", "out", ["merge", "model", "other", "--average", "--output_dir", "out"]),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    for seed, name in enumerate(("model", "other")):
        Architecture("vit").classifier(seed=seed, shuffle_mode="arbitrary", **labels).save_pretrained(folder / name)
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / name)
    features = Features({"image": Array2D((8, 8), "uint8"), "label": ClassLabel(names=NAMES)})
    pixels = np.random.default_rng(0).integers(256, size=(120, 8, 8), dtype=np.uint8)
    images = Dataset.from_dict({"image": pixels, "label": [i % 5 for i in range(120)]}, features=features)
    images.save_to_disk(folder / "letters")
    return folder


@pytest.fixture
def work(saved, tmp_path, monkeypatch, quick_pictures) -> Path:
    """The current folder, with two models and a dataset."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def start_writer():
    processes = []

    def start(kind: str, target: str) -> subprocess.Popen:
        package = Path(hf_layershuffle.__file__).parent
        command = [sys.executable, "-c", WRITER, str(package), kind, target]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "begun\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command in this process: exit code and standard error."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["hf-layershuffle", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, capsys.readouterr().err

    return run


def leftovers(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if ".partial-" in path.name or path.name.startswith(".in_use")}


def listing(folder: Path) -> list[Path]:
    """Without what `datasets` keeps beside a dataset."""
    return sorted(path for path in folder.rglob("*") if not path.name.startswith("cache-"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_in_use_is_refused_and_what_its_killed_writer_left_is_removed(work, command, start_writer, name):
    kind, target, arguments = COMMANDS[name]
    start_writer("file", "elsewhere")
    if kind == "claim":
        start_writer("file", "letters/layershuffle-pixels-a.uint8")
    if name not in ("prune", "merge", "train"):
        start_writer("file", f"{target}/elsewhere")
    of_the_living = leftovers(work)
    if kind == "claim":  # decodes images, so what was killed in decoding is removed too
        start_writer("file", "letters/layershuffle-pixels-b.uint8").kill()
    writer = start_writer(kind, target)
    before = listing(work)
    code, error = command(*arguments)
    assert code == 2 and f"{target}' is in use by process {writer.pid} on " in error and "; wait for it, or " in error
    assert "Traceback" not in error and listing(work) == before
    writer.kill()
    writer.wait()
    assert leftovers(work) > of_the_living
    code, error = command(*arguments)
    assert code == 0, error
    assert leftovers(work) == of_the_living


@pytest.mark.parametrize("failing", ["write_text", "remove_leftovers"])
def test_a_claim_that_a_full_disk_ends_leaves_nothing(tmp_path, monkeypatch, failing):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "there").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(claims, failing, full)
        for folder in (tmp_path / "a" / "b", tmp_path / "there"):
            with pytest.raises(OSError, match=r"cannot be written into \(No space left on device\); choose another"):
                with claims.claimed_folder(folder):
                    pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with claims.claimed_folder(tmp_path / "there"):  # the lock was given back
        pass
