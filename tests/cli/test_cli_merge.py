import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import Architecture, run_python
from transformers import AutoModelForImageClassification, ViTImageProcessor

import hf_layershuffle_cli
from hf_layershuffle.merging.plan import MergePlan
from hf_layershuffle.merging.random_merges import RandomMergeReport


@pytest.fixture
def work(tmp_path, monkeypatch, quick_pictures) -> Path:
    """The current directory, with the models `a` and `b` for the digits."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        labels = {index: str(index) for index in range(10)}
        model = Architecture("vit").classifier(seed=seed, num_labels=10, id2label=labels, shuffle_mode="arbitrary")
        model.save_pretrained(name)
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(name)
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `hf-layershuffle merge` in this process: exit code, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-layershuffle", "merge", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            hf_layershuffle_cli.main()
        return (stop.value.code or 0, *capsys.readouterr())

    return run


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_a_plan_is_carried_out(work, command):
    plan = MergePlan(
        sources={"a": "a", "b": "b"}, layers=[{"source": "b", "layer": 3}, {"source": "a", "layer": 1}], base="b"
    )
    plan.save(work / "plan.yaml")
    code, output, error = command("plan.yaml", "--output_dir", "out/merged")
    assert code == 0, error
    assert "Saved to out/merged" in output
    model, info = AutoModelForImageClassification.from_pretrained("out/merged", output_loading_info=True)
    assert not any(info.values())
    b = AutoModelForImageClassification.from_pretrained("b").state_dict()
    name = "vit.layers.{}.mlp.fc1.weight"
    assert torch.equal(model.state_dict()[name.format(0)], b[name.format(3)])
    assert MergePlan.load("out/merged/merge_plan.yaml") == plan


def test_the_help_does_not_import_torch():
    code = """
import sys
from hf_layershuffle_cli import main
sys.argv[1:] = ["merge", "--help"]
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
    result = run_python(code, fresh=True)
    assert result.returncode == 0, result.stderr
    assert "--max_shard_size" in result.stdout


def test_a_dry_run_shows_the_plan_and_writes_nothing(work, command):
    before = listing(work)
    arguments = ["a", "b", "--random", "1", "--seed", "3", "--dry_run", "--max_shard_size", "60KB"]
    code, out, _ = command(*arguments, "--output_dir", "out")
    assert code == 0
    drawn = MergePlan.random(["a", "b"], seed=3).layers
    rows = [
        [cell.strip() for cell in line.split("│")] for line in out.splitlines() if "layer " in line and "│" in line
    ]
    assert [(row[2], int(row[3])) for row in rows] == [(parts[0].source, parts[0].layer) for parts in drawn]
    assert "72 tensors" in out and "files. Nothing was written" in out
    assert listing(work) == before
    Path("b/model.safetensors").write_bytes(Path("b/model.safetensors").read_bytes()[:-8])
    code, _, err = command("a", "b", "--average", "--dry_run")
    assert code == 2 and "truncated or corrupted" in err


def test_random_and_average_merges_are_written(work, command):
    assert command("a", "b", "--random", 1, "--seed", 7, "--base", 2, "--output_dir", "random")[0] == 0
    assert MergePlan.load("random/merge_plan.yaml") == MergePlan.random(["a", "b"], seed=7, base="b")
    assert command("a", "b", "--random", 1, "--any_layer", "--num_layers", 6, "--output_dir", "long")[0] == 0
    plan = MergePlan.random(["a", "b"], seed=0, any_layer=True, num_layers=6)
    assert MergePlan.load("long/merge_plan.yaml") == plan
    assert command("a", "b", "--average", "--output_dir", "soup", "--max_shard_size", "60000")[0] == 0
    assert MergePlan.load("soup/merge_plan.yaml") == MergePlan.average(["a", "b"])
    assert Path("soup/model.safetensors.index.json").exists()


def test_random_merges_are_evaluated_without_being_written(work, command):
    arguments = ["a", "b", "--random", 5, "--evaluate", "digits", "--max_samples", 50, "--device", "cpu"]
    code, out, err = command(*arguments, "--output_dir", "first")
    assert code == 0
    assert {path.name for path in Path("first").iterdir()} == {
        "random_merges.json",
        "random_merges.png",
        "random_merges.svg",
    }
    report = RandomMergeReport.load("first")
    assert report.sources == {name: {"path": name, "revision": None} for name in "ab"}
    assert (report.dataset, report.num_images, len(report.merges)) == ("digits", 50, 5)
    assert [[parts[0].source, parts[0].layer] for parts in MergePlan.random(["a", "b"], seed=4).layers] == (
        report.merges[4].layers
    )
    assert "Evaluating 5 merges" in err
    mean = sum(merge.accuracy for merge in report.merges) / 5
    assert f"{mean:.4f}" in next(line for line in out.splitlines() if "first: random merges" in line)
    code, out, _ = command(*arguments, "--output_dir", "second", "--any_layer", "--compare", "first")
    assert code == 0 and all(
        f"{name}: {kind}" in out for name in ("first", "second") for kind in ("sources", "random")
    )
    code, _, err = command(*arguments[:-2], "--max_samples", 20, "--output_dir", "third", "--compare", "first")
    assert code == 2 and "one and the same dataset" in err and not Path("third").exists()


def test_sources_of_other_images_are_not_evaluated(work, command):
    shutil.copytree("b", "darker")
    file = Path("darker/preprocessor_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.0, 0.0, 0.0]}))
    arguments = ["a", "darker", "--random", 2, "--evaluate", "digits", "--output_dir", "out"]
    code, _, err = command(*arguments, "--max_samples", 20)
    assert code == 2 and "The inputs of the source 'darker' are made in another way than those of 'a'" in err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "--output_dir", "out"], "give --random 1 or --average, or pass a plan's file instead"),
        (["a", "b", "--random", 1, "--average", "--output_dir", "out"], "give --random 1 or --average"),
        (["a", "--random", 0, "--output_dir", "out"], "--random is 0; it must be at least 1"),
        (["a", "b", "--random", 2, "--output_dir", "out"], "--random 2 needs --evaluate DATASET"),
        (["a", "b", "--average", "--evaluate", "digits", "--output_dir", "out"], "--evaluate needs --random"),
        (["a", "b", "--average", "--compare", "a", "--output_dir", "out"], "--compare is for --evaluate"),
        (["a", "--random", 2, "--evaluate", "digits", "--dry_run"], "--dry_run is for a merge that would be written"),
        (["plan.yaml", "--average", "--output_dir", "out"], "A plan says what to merge"),
        (["a", "b", "--average"], "--output_dir is missing"),
        (["a", "b", "--average", "--base", 2, "--any_layer", "--dry_run"], "--base, --any_layer would change nothing"),
        (["plan.yaml", "--num_layers", 3, "--dry_run"], "--num_layers would change nothing: for --random only"),
        (["a", "b", "--average", "--no_position_heads", "--dry_run"], "--no_position_heads would change nothing"),
        (["a", "b", "--random", 1, "--base", 3, "--output_dir", "out"], "--base is 3; it must be from 1 to 2"),
        (["a", "b", "--average", "--output_dir", "b"], "The output folder '.*b' is the source 'b'"),
        (["a", "b", "--average", "--output_dir", "."], "is not empty"),
        (["./none", "--average", "--output_dir", "out"], "Source 'none': there is no folder './none'"),
        (["org/none@v1", "--average", "--output_dir", "out"], "'org/none' at revision 'v1' is neither a folder here"),
        (
            ["plan.yaml", "--output_dir", "out"],
            r"There is no file 'plan.yaml'\. It must hold one mapping, "
            r"of a merge plan \(`sources`, `layers`, \.\.\.\)\.",
        ),
        (["a", "--random", 3, "--evaluate", "digits", "--output_dir", "b"], "holds no 'random_merges.json'"),
        (["a", "--random", 3, "--evaluate", "./none", "--output_dir", "out"], "There is no dataset folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(work, command, arguments, message):
    import re

    before = listing(work)
    code, out, err = command(*arguments)
    line = err.strip().splitlines()[-1]
    assert code == 2 and line.startswith("hf-layershuffle: error: ") and re.search(message, line), err
    assert "Traceback" not in err and out == ""
    assert listing(work) == before


def test_a_plan_of_somebody_else_needs_trust(work, command, monkeypatch):
    (work / "elsewhere").mkdir()
    MergePlan(sources={"a": "../a"}, layers=[{"source": "a", "layer": 0}]).save(work / "elsewhere" / "plan.json")
    monkeypatch.chdir(work / "elsewhere")
    code, _, err = command("plan.json", "--output_dir", "out")
    assert code == 2 and "outside of" in err and "--trust_paths" in err and not Path("out").exists()
    assert command("plan.json", "--output_dir", "out", "--trust_paths")[0] == 0
    assert json.loads(Path("out/config.json").read_text())["merge_plan"]["sources"] == {"a": {"path": "a"}}


def test_a_folder_is_looked_for_beside_the_plan_first(work, command):
    plans = work / "plans"
    plans.mkdir()
    (work / "a").rename(plans / "mine")
    MergePlan(sources={"m": "mine", "b": "b"}, layers=[{"source": "m", "layer": 0}, {"source": "b", "layer": 1}]).save(
        plans / "plan.yaml"
    )
    assert command("plans/plan.yaml", "--output_dir", "out")[0] == 0
    assert (work / "out" / "config.json").exists()
