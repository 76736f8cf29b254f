"""A disk that gets full while a command writes: one line, nothing half-written, and the same command goes on later.

The limit is real: the system refuses each byte of a file beyond it.
"""

import os
import resource
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import Architecture
from safetensors.torch import load_file
from transformers import ViTImageProcessor

from hf_layershuffle_cli import main, outputs


FEW = ["--num_orders", "2", "--device", "cpu", "--max_samples", "50", "--dataset_name", "digits"]
TRAIN = [
    *("train", "--hidden_size", "16", "--num_hidden_layers", "2", "--num_attention_heads", "2", "--max_train_samples"),
    *("64", "--max_eval_samples", "40", "--max_steps", "3", "--eval_strategy", "no", "--final_eval_orders", "8"),
    *("--use_cpu", "--num_threads", "1", "--disable_tqdm", "True", "--report_to", "none"),
]
# The bytes that a file may have, so that one of the command's is not written to its end
COMMANDS = {
    "evaluate, the report": (2_000, ["evaluate", "a", "--num_subsets", "1", *FEW]),
    "evaluate, a picture": (20_000, ["evaluate", "a", "--num_subsets", "1", *FEW]),
    "analyze": (30_000, ["analyze", "a", *FEW]),
    "random merges": (1_000, ["merge", "a", "b", "--random", "2", "--evaluate", "digits", "--max_samples", "50"]),
    "prune, the weights": (60_000, ["prune", "a", "--keep", "0,1"]),
    "prune, the code": (2_500, ["prune", "a", "--keep", "0,1"]),
    "merge, the weights": (60_000, ["merge", "a", "b", "--average"]),
    "publish, the report": (2_000, ["publish", "a", "--card_only", *FEW]),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    labels = {"id2label": {i: str(i) for i in range(10)}}
    for seed, name in enumerate("ab"):
        model = Architecture("vit").classifier(seed=seed, num_labels=10, shuffle_mode="arbitrary", **labels)
        model.save_pretrained(folder / name)
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / name)
    return folder


@pytest.fixture
def work(saved, tmp_path, monkeypatch) -> Path:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(outputs, "SPACE_NEEDED", 100)  # or the limit would be found before any work
    return tmp_path


@contextmanager
def files_limited_to(num_bytes: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command in this process: exit code, standard output and error."""

    def run(arguments, limit: int | None = None):
        monkeypatch.setattr(sys, "argv", ["hf-layershuffle", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop, files_limited_to(limit) if limit else open(os.devnull):
            main()
        output = capsys.readouterr()
        return stop.value.code or 0, output.out, output.err

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(work, command, name, request):
    limit, arguments = COMMANDS[name]
    if name not in ("evaluate, a picture", "analyze"):  # in which pictures fill the disk
        request.getfixturevalue("quick_pictures")
    if arguments[0] != "publish":
        arguments = [*arguments, "--output_dir", "out"]
    before = contents(work)
    code, output, error = command(arguments, limit)
    lines = [line for line in error.splitlines() if line.startswith("hf-layershuffle: ")]
    assert code == 2 and "Traceback" not in error and len(lines) == 1, error
    assert "File too large" in lines[0]
    if arguments[0] in ("evaluate", "analyze") or "--random" in arguments:
        assert "│" in output and "could not be saved in 'out'" in lines[0]
    else:
        assert lines[0].endswith("Make room on the disk, or write to another one")
    left = {path: content for path, content in contents(work).items() if before.get(path) != content}
    code, _, error = command(arguments)
    assert code == 0, error
    written = contents(work)
    assert all(written[path] == content for path, content in left.items())  # whole files only
    assert not [path for path in written if ".partial-" in path]


@pytest.mark.parametrize(
    ("limit", "saving"),
    [
        (16_000, ["--save_strategy", "no"]),  # in the code file
        (31_000, ["--save_strategy", "no"]),  # in the weights
        (31_000, ["--save_steps", "2"]),
        (60_000, ["--save_steps", "2"]),  # in the optimizer's state
    ],
)
def test_training_goes_on_after_a_full_disk(work, command, limit, saving):
    arguments = [*TRAIN, *saving, "--output_dir"]
    code, _, error = command([*arguments, "out"], limit)
    lines = [line for line in error.splitlines() if line.startswith("hf-layershuffle: ")]
    assert code == 2 and "Traceback" not in error and len(lines) == 1, error
    assert "'out' could not be written into (" in lines[0] and "run the same command again" in lines[0]
    for folder in ("out", "whole"):
        code, _, error = command([*arguments, folder])
        assert code == 0, error
    found, expected = (load_file(f"{folder}/model.safetensors") for folder in ("out", "whole"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
