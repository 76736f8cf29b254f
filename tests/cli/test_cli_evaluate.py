"""Runs `hf-layershuffle evaluate` and `prune` as a user does, most of it in this process."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, Architecture, assert_all_refused, run_cli, run_command, run_python
from PIL import Image
from transformers import AutoModelForImageClassification, BlipTextConfig, BlipTextModel, ViTImageProcessor
from typer.testing import CliRunner

import hf_layershuffle as ls
import hf_layershuffle_cli
from hf_layershuffle.evaluation.robustness import score_execution_orders
from hf_layershuffle.hub.folder_records import record_training
from hf_layershuffle_cli.outputs import distinct_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A LayerShuffle model with everything and a plain ViT, for the digits."""
    root = tmp_path_factory.mktemp("models")
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    labels = {"id2label": {i: str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)}}
    vit = Architecture("vit")
    flags = {"shuffle_mode": "arbitrary", "depth_embedding": True, "position_predictor": True}
    models = {
        "ours": vit.classifier(**labels, **flags, num_labels=10),
        "plain": vit.plain_classifier(**labels, num_labels=10),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
        record_training(root / name, arguments={}, dataset="digits")  # which the commands then take
    return root


def test_several_models_in_one_table_with_reports_and_pictures(folders, tmp_path, request):
    arguments = ["evaluate", folders / "ours", folders / "plain", "--max_samples", "60", "--num_orders", "4"]
    arguments += ["--num_subsets", "2", "--output_dir", tmp_path / "out"]
    result = run_cli(*arguments)
    assert result.returncode == 0, result.stderr
    assert "Evaluating ours: 100%" in result.stderr
    for name in ("ours", "plain"):
        report = ls.RobustnessReport.load(tmp_path / "out" / name)
        assert (report.model, report.dataset, report.num_images, report.num_orders) == (name, "digits", 60, 4)
    row = next(line for line in result.stdout.splitlines() if line.startswith("│ arbitrary: worst"))
    assert row.split("│")[3].strip() == f"{report.arbitrary.accuracy.min:.4f}"
    pictures = {
        f"{name}.{kind}"
        for name in ("order_distribution", "pruning_curves", "layer_ablation")
        for kind in ("png", "svg")
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ours", "plain"} | pictures
    assert {path.name for path in (tmp_path / "out" / "ours").iterdir()} == {"robustness.json"} | pictures
    assert min(Image.open(tmp_path / "out" / "pruning_curves.png").size) > 400

    request.getfixturevalue("quick_pictures")  # which have been looked at
    again = run_cli(*arguments)  # nothing is evaluated twice
    assert "Evaluating" not in again.stderr and again.stdout == result.stdout
    other = run_cli(*arguments, "--seed", "1")
    assert other.returncode == 2
    assert "holds a report of another evaluation (`seed` is 0 there and 1 here)" in other.stderr
    assert run_cli(*arguments, "--seed", "1", "--overwrite").returncode == 0
    assert ls.RobustnessReport.load(tmp_path / "out" / "ours").seed == 1


def test_one_model_has_its_report_in_the_output_folder(folders, tmp_path):
    arguments = ["--max_samples", "20", "--num_orders", "1", "--num_subsets", "1", "--dtype", "bfloat16"]
    result = run_cli("evaluate", folders / "ours", *arguments, "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert ls.RobustnessReport.load(tmp_path).environment["dtype"] == "bfloat16"
    assert "layers know their position" in result.stdout
    assert f"Saved to {tmp_path}" in result.stdout


def test_models_of_one_name_have_a_folder_each(folders, tmp_path, quick_pictures):
    shutil.copytree(folders / "ours", tmp_path / "a" / "m")
    shutil.copytree(folders / "plain", tmp_path / "here" / "a" / "m")
    few = ["--max_samples", "10", "--num_orders", "1", "--num_subsets", "1", "--output_dir", "out"]
    result = run_cli("evaluate", "./a/m", "../a/m", *few, cwd=tmp_path / "here")
    assert result.returncode == 0, result.stderr
    reports = {
        path.name: ls.RobustnessReport.load(path) for path in (tmp_path / "here" / "out").iterdir() if path.is_dir()
    }
    assert {name: report.model for name, report in reports.items()} == {"a--m": "./a/m", "a--m-2": "../a/m"}
    assert reports["a--m"].config["weights"] != reports["a--m-2"].config["weights"]


def test_folders_of_names():
    names = ["org/m", "../org/m", "./org--m", "/org/m-2", "."]
    found = [folder.name for folder in distinct_folders(Path("out"), names)]
    assert found == ["org--m", "org--m-2", "org--m-3", "org--m-2-2", Path.cwd().name]


def test_prune_saves_a_shorter_model(folders, tmp_path):
    result = run_cli("prune", folders / "ours", "--keep", "3,0", "--output_dir", tmp_path / "short")
    assert result.returncode == 0, result.stderr
    assert "Kept layers 3,0: 2 of 4, " in result.stdout
    whole, pruned = (
        AutoModelForImageClassification.from_pretrained(folder).eval()
        for folder in (folders / "ours", tmp_path / "short")
    )
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        expected = whole(images, execution_order=[3, 0]).logits
        torch.testing.assert_close(pruned(images).logits, expected)
    assert f"{pruned.num_parameters():,} of {whole.num_parameters():,} parameters" in result.stdout
    assert ViTImageProcessor.from_pretrained(tmp_path / "short").size["height"] == 8

    result = run_cli("prune", folders / "plain", "--speedup", "2", "--output_dir", tmp_path / "half")
    assert result.returncode == 0, result.stderr
    assert "Kept layers 0,3: 2 of 4" in result.stdout
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("vit", 2)


def test_prune_searches_on_training_images(folders, tmp_path):
    from hf_layershuffle.data.datasets import load_image_datasets

    options = ["--search", "--num_layers", "3", "--max_samples", "40", "--output_dir", tmp_path / "short"]
    result = run_cli("prune", folders / "ours", *options)
    assert result.returncode == 0, result.stderr
    model = AutoModelForImageClassification.from_pretrained(folders / "ours")
    data = load_image_datasets("digits")["train"].shuffle(seed=0).select(range(40))
    orders = [[j for j in range(4) if j != i] for i in range(4)]
    processor = ViTImageProcessor.from_pretrained(folders / "ours")
    scores = score_execution_orders(model, data, orders, image_processor=processor, progress=False)
    best = min(scores, key=lambda score: score.loss).execution_order
    assert f"Kept layers {','.join(map(str, best))}: 3 of 4" in result.stdout


def test_bad_input_is_one_line_with_exit_code_2_and_leaves_nothing_behind(folders, tmp_path):
    blip = BlipTextConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    BlipTextModel(blip).save_pretrained(tmp_path / "blip")
    for label in ("cat", "dog"):
        (tmp_path / "animals" / "train" / label).mkdir(parents=True)
        for index in range(5):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "animals" / "train" / label / f"{index}.png")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").write_text("mine")
    (tmp_path / "mine.txt").write_text("mine")
    for name, broken in (("ours", "broken"), ("plain", "broken-plain")):
        shutil.copytree(folders / name, tmp_path / broken)
        weights = tmp_path / broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    ours, out = str(folders / "ours"), ["--output_dir", str(tmp_path / "out")]
    few = ["--max_samples", "10", "--num_orders", "1", *out]
    assert_all_refused(
        run_cli,
        "hf-layershuffle",
        {
            "There is no model folder './missing'": ["evaluate", "./missing", *few],
            "is a model of type 'blip_text_model', of which transformers has no classifier": [
                "evaluate",
                str(tmp_path / "blip"),
                *few,
            ],
            "There is no dataset folder './missing'": ["evaluate", ours, "--dataset_name", "./missing", *few],
            "has the classes 'cat', 'dog', which the model does not know": [
                *("evaluate", ours, "--dataset_name", str(tmp_path / "animals"), *few)
            ],
            "`num_orders` is 0": ["evaluate", ours, *few, "--num_orders", "0"],
            "`batch_size` is 0": ["evaluate", ours, *few, "--batch_size", "0"],
            "`max_samples` is 0": ["evaluate", ours, *out, "--max_samples", "0"],
            "`dtype` is 'int3'": ["evaluate", ours, *few, "--dtype", "int3"],
            "`device` is 'tpu9'": ["evaluate", ours, *few, "--device", "tpu9"],
            "A model is given twice": ["evaluate", ours, ours, *few],
            "A model is given twice: ": ["evaluate", ours, f"{ours}/../ours", *few],
            "Missing argument": ["evaluate"],
            "--orders (Possible options: --num_orders). See --help.": ["evaluate", ours, "--orders", "3"],
            "Say which layers stay": ["prune", ours, *out],
            "Say which layers stay: give": ["prune", ours, "--keep", "0", "--speedup", "2", *out],
            "--num_layers needs --search": ["prune", ours, "--num_layers", "2", *out],
            "`keep` is '1;2'": ["prune", ours, "--keep", "1;2", *out],
            "`keep` holds layer 9": ["prune", ours, "--keep", "0,9", *out],
            "holds layer 1 more than once": ["prune", ours, "--keep", "1,1", *out],
            "`speedup` is 0.5": ["prune", ours, "--speedup", "0.5", *out],
            "`num_layers` is 7": ["prune", ours, "--search", "--num_layers", "7", *out],
            "is there already and not empty": [
                *("prune", ours, "--keep", "0", "--output_dir", str(tmp_path / "occupied"))
            ],
            "There is no model folder": ["prune", "./missing/model", "--keep", "0", *out],
            "'nowhere' is neither a folder here nor a model": ["prune", "nowhere", "--keep", "0", *out],
            "'no/where' at revision 'v2' is neither": ["evaluate", "no/where", "--revision", "v2", *few],
            "'nowhere-else' is neither a folder here": ["analyze", "nowhere-else", *out],
            "The output folder 'mine.txt' cannot be made": ["evaluate", ours, "--output_dir", "mine.txt"],
            "The output folder 'mine.txt/out' cannot": ["prune", ours, "--keep", "0", "--output_dir", "mine.txt/out"],
            "'mine.txt/ours' cannot be made": ["evaluate", ours, str(folders / "plain"), "--output_dir", "./mine.txt"],
            "'mine.txt/analysis' cannot": ["analyze", ours, "--output_dir", "mine.txt/analysis"],
            "'mine.txt/merged' cannot": ["merge", ours, "--average", "--output_dir", "mine.txt/merged"],
            "'mine.txt/merges' cannot": [
                *("merge", ours, "--random", "1", "--evaluate", "digits", "--output_dir", "mine.txt/merges")
            ],
            "'broken' cannot be read": ["evaluate", "broken", *few],
            "plain' cannot be read": ["prune", "broken-plain", "--keep", "0,1", *out],
            "broken' cannot be read": ["prune", "./broken", "--keep", "0,1", *out],
        },
        tmp_path,
    )
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def deep(folders):
    """A model that takes its time: each of 6 batches of the digits, 100 orders of 8 layers."""
    labels = {"id2label": {i: str(i) for i in range(10)}, "num_labels": 10, "num_hidden_layers": 8}
    Architecture("vit").classifier(**labels, shuffle_mode="arbitrary").save_pretrained(folders / "deep")
    record_training(folders / "deep", arguments={}, dataset="digits")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folders / "deep")
    return folders / "deep"


def assert_stopped(code: int, errors: str, message: str) -> None:
    assert code == 130, errors
    assert re.findall("hf-layershuffle:.*", errors) == [message]
    assert "Traceback" not in errors, errors


def test_an_evaluation_stopped_by_ctrl_c_goes_on(deep, tmp_path):
    arguments = ["evaluate", deep, "--batch_size", "60", "--num_orders", "100", "--num_subsets", "1"]
    arguments += ["--output_dir", tmp_path]
    command = [sys.executable, "-m", "hf_layershuffle_cli", *map(str, arguments)]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, env=ENVIRONMENT, **pipes)
    try:
        seen = ""
        while "| 2/6" not in seen:
            character = process.stderr.read(1)
            assert character, seen
            seen += character
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=100)
    finally:
        process.kill()
        process.communicate()
    assert_stopped(process.returncode, rest, "hf-layershuffle: stopped; run the same command again to go on")
    assert [path.name for path in tmp_path.iterdir()] == [".evaluation.npz"]
    result = run_cli(*arguments)
    assert result.returncode == 0, result.stderr
    assert "| 2/6" in result.stderr and "| 1/6" not in result.stderr and "| 0/6" not in result.stderr
    assert ls.RobustnessReport.load(tmp_path).num_images == 360


class CtrlC(io.StringIO):
    """Sends this process a Ctrl-C as soon as a text is written."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text

    def write(self, written: str) -> int:
        length = super().write(written)
        if self.text and self.text in self.getvalue():
            self.text = None
            signal.raise_signal(signal.SIGINT)
        return length


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("Measuring layers' updates:   0%", ["analyze", "--max_samples", "40"]),
        ("Dropping layers:   0%", ["prune", "--search", "--num_layers", "1", "--max_samples", "40"]),
        ("Evaluating", ["merge", "--random", "2", "--evaluate", "digits", "--max_samples", "40"]),
    ],
    ids=["analyze", "prune", "merge"],
)
def test_other_commands_stopped_by_ctrl_c_have_written_nothing(folders, tmp_path, text, arguments):
    command, *options = arguments
    out = ["--output_dir", tmp_path / "out"]
    result = run_cli(command, folders / "ours", *options, *out, errors=CtrlC(text))
    assert text in result.stderr
    assert_stopped(result.returncode, result.stderr, "hf-layershuffle: stopped; nothing was written")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["hf_layershuffle", "hf_layershuffle_cli"])
def test_both_modules_say_the_version(module):
    result = run_command([sys.executable, "-m", module, "--version"])
    assert (result.returncode, result.stdout) == (0, f"hf-layershuffle {ls.__version__}\n"), result.stderr


def test_a_command_leaves_no_work_for_the_end_of_python():
    """Looking through all objects of torch there would take more than a second."""
    code = (
        "import atexit, gc, sys; sys.argv = ['', '--version']; import hf_layershuffle_cli as cli; "
        "atexit.register(lambda: print('frozen' if gc.get_freeze_count() else 'not')); cli.main()"
    )
    assert run_command([sys.executable, "-c", code]).stdout.split()[-1] == "frozen"


def test_arguments_are_named_alike():
    names = {"evaluate": "{MODEL}...", "analyze": "{MODEL}", "prune": "{MODEL}", "publish": "{FOLDER}"}
    for command, name in names.items():
        usage = CliRunner().invoke(hf_layershuffle_cli.app, [command, "--help"]).stdout
        assert f"{command} [OPTIONS] {name}\n" in usage


def test_help_imports_no_torch():
    code = """
import sys
import hf_layershuffle_cli
try:
    hf_layershuffle_cli.main()
except SystemExit as stop:
    assert not stop.code
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    for arguments in ([], ["--help"], ["evaluate", "--help"]):
        result = run_python(code, *arguments, fresh=True)
        assert result.returncode == 0, result.stderr
        assert "Usage: " in result.stdout
