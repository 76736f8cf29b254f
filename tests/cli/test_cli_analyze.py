"""Runs `hf-layershuffle analyze` as a user does."""

import pytest
from conftest import Architecture, assert_all_refused, run_cli
from PIL import Image
from transformers import ViTImageProcessor

from hf_layershuffle.analysis import AnalysisReport
from hf_layershuffle.hub.folder_records import record_training


PICTURES = {
    f"{name}.{kind}"
    for name in (
        "attention_maps",
        "embedding",
        "layer_position_maps",
        "output_similarity",
        "position_probe",
        "updates_by_position",
    )
    for kind in ("png", "svg")
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A LayerShuffle model and a plain DeiT for the digits."""
    root = tmp_path_factory.mktemp("models")
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    labels = {"id2label": {i: str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)}}
    models = {
        "ours": Architecture("vit").classifier(
            **labels, num_labels=10, shuffle_mode="arbitrary", depth_embedding=True
        ),
        "plain": Architecture("deit").plain_classifier(**labels, num_labels=10),
        "shallow": Architecture("vit").classifier(**labels, num_labels=10, num_hidden_layers=1),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
        record_training(root / name, arguments={}, dataset="digits")  # which the command then takes
    return root


@pytest.mark.parametrize("name, dtype", [("ours", "float32"), ("plain", "bfloat16")])
def test_numbers_and_pictures(folders, tmp_path, name, dtype):
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")  # as an evaluation's files, left where they are
    (output / "analysis.json").write_text("{}")  # an earlier analysis, replaced
    arguments = ["analyze", folders / name, "--dataset_name", "digits", "--output_dir", output, "--max_samples", "40"]
    arguments += ["--num_orders", "5", "--batch_size", "16", "--seed", "3", "--dtype", dtype, "--device", "cpu"]
    result = run_cli(*arguments, "--num_attention_images", "2")
    assert result.returncode == 0, result.stderr
    assert "Measuring layers' updates: 100%" in result.stderr and "Probing positions: 100%" in result.stderr
    assert {path.name for path in output.iterdir()} == {"analysis.json", "notes.txt"} | PICTURES
    assert min(Image.open(output / "updates_by_position.png").size) > 400
    report = AnalysisReport.load(output)
    assert (report.model, report.dataset, report.num_images, report.seed) == (name, "digits", 40, 3)
    assert len(report.contributions.execution_orders) == 8  # 5 rounded up to two Latin squares of 4
    assert len(report.attention.maps) == 2 and report.embedding.method == "pca"
    assert report.environment["dtype"] == dtype and report.environment["device"] == "cpu"
    assert f"{name} on digits (40 images, 8 orders)" in result.stdout
    row = next(line for line in result.stdout.splitlines() if line.startswith("│     1 │"))
    assert row.split("│")[2].strip() == f"{report.contributions.sequential_mean['update_norm'][1]:.3f}"
    assert f"Saved to {output}" in result.stdout


def test_bad_input(folders, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    ours, out = str(folders / "ours"), ["--output_dir", str(tmp_path / "out")]
    assert_all_refused(
        run_cli,
        "hf-layershuffle",
        {
            "There is no model folder": ["analyze", str(tmp_path / "nothing"), *out],
            "no dataset folder './nothing'": ["analyze", ours, "--dataset_name", "./nothing", *out],
            "has no split 'dev'": ["analyze", ours, "--eval_split", "dev", *out],
            "`num_orders` is 0": ["analyze", ours, "--num_orders", "0", *out],
            "`max_samples` is 0": ["analyze", ours, "--max_samples", "0", *out],
            "There are 19 images": ["analyze", ours, "--max_samples", "19", *out],
            "`batch_size` is -1": ["analyze", ours, "--batch_size", "-1", *out],
            "`seed` is -1": ["analyze", ours, "--seed", "-1", *out],
            "`dtype` is 'float8'": ["analyze", ours, "--dtype", "float8", *out],
            "`device` is 'abacus'": ["analyze", ours, "--device", "abacus", *out],
            "it must be one of pca, umap": ["analyze", ours, "--embedding", "tsne", *out],
            "The model has one layer": ["analyze", str(folders / "shallow"), *out],
            "cannot be made: '": ["analyze", ours, "--output_dir", str(tmp_path / "file")],
            "No such option": ["analyze", ours, "--orders", "3", *out],
        },
        cwd=tmp_path,
    )
    assert {path.name for path in tmp_path.iterdir()} == {"file", "empty"}
