"""What a training command prints at its end, or why it ended."""

import shlex
from pathlib import Path

import pytest
from conftest import run_cli
from datasets import ClassLabel, Dataset, Image
from support.images import image_dataset

import hf_layershuffle as ls
from hf_layershuffle.evaluation.fingerprint import data_digest
from hf_layershuffle.hub.folder_records import record_training
from hf_layershuffle.layerwise import as_layerwise, batches_for
from hf_layershuffle.training import session
from hf_layershuffle_cli import inputs


@pytest.mark.parametrize("mode", ["--streaming", "--augmentation=imagenet"])
def test_an_image_that_a_worker_cannot_read_is_named_in_one_line(tmp_path, mode):
    rows = image_dataset(8).cast_column("image", Image(decode=False)).to_list()
    for split in ("test", "train"):
        Dataset.from_list(rows, features=image_dataset(1).features).to_parquet(tmp_path / f"{split}-0.parquet")
        rows[5]["image"] = {"bytes": b"no image", "path": "5.png"}
    options = """
        --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --per_device_train_batch_size 8 --max_steps 1
        --eval_strategy no --save_strategy no --use_cpu --disable_tqdm True --report_to none --dataloader_num_workers 1
    """.split()
    with pytest.raises(ValueError, match=r"^(The i|I)mage .*\('5.png'\) cannot be read: .*skip_damaged.*") as caught:
        session.run([*options, mode, "--dataset_name", str(tmp_path), "--output_dir", str(tmp_path / "run")])
    assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


TINY = """
    --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --per_device_train_batch_size 8 --max_steps 1
    --final_eval_orders 8 --eval_strategy no --save_strategy no --use_cpu --disable_tqdm True --report_to none
""".split()


@pytest.fixture(scope="module")
def three_splits(tmp_path_factory):
    """A folder of a dataset with the splits train, test and validation, and two columns of labels."""
    folder = tmp_path_factory.mktemp("splits")
    images = image_dataset(62)
    images = images.add_column("kind", [row // 2 % 2 for row in range(62)], feature=ClassLabel(names=["c", "d"]))
    for name, rows in {"train": range(20), "test": range(20, 50), "validation": range(50, 62)}.items():
        images.select(rows).to_parquet(folder / f"{name}.parquet")
    return str(folder)


@pytest.mark.parametrize(
    ("options", "loading", "count"),
    [
        (["--eval_fraction", "0.25", "--eval_split", "train"], {"eval_fraction": 0.25, "eval_split": "train"}, 5),
        (["--train_split", "validation"], {"train_split": "validation"}, 3),
        (
            ["--train_split", "validation", "--eval_split", "train"],
            {"train_split": "validation", "eval_split": "train"},
            20,
        ),
        (["--label_column_name", "kind"], {"label_column": "kind"}, 12),
    ],
)
def test_commands_evaluate_on_what_training_held_out(three_splits, tmp_path, capsys, options, loading, count):
    folder = str(tmp_path / "run")
    session.run([*TINY, *options, "--dataset_name", three_splits, "--output_dir", folder])
    next_line = capsys.readouterr().out.splitlines()[-1]
    held_out = ls.load_image_datasets(three_splits, **loading)["test"]
    model = ls.load_classifier(folder)
    loader = batches_for(as_layerwise(model), held_out, ls.load_image_processor(folder))
    small = ["--num_orders", "8", "--num_subsets", "1", "--device", "cpu"]
    without_name = ["evaluate", folder, "--output_dir", f"{folder}-robustness"]
    for command in (shlex.split(next_line.removeprefix("Next: hf-layershuffle ")), without_name):
        result = run_cli(*command, *small, "--overwrite", cwd=Path(three_splits).parent)
        assert result.returncode == 0, result.stderr
        report = ls.RobustnessReport.load(f"{folder}-robustness")
        assert report.num_images == count and report.config["data"] == data_digest(loader)
    # An option wins, and of another dataset training says nothing; it needs no split to train on
    other = image_dataset(4, names=model.config.id2label.values())
    (tmp_path / "data").mkdir()
    other.to_parquet(tmp_path / "data" / "test.parquet")
    for dataset, options, expected in ((three_splits, ["--eval_split", "test"], 30), (tmp_path / "data", [], 4)):
        data = ["--dataset_name", dataset, "--output_dir", tmp_path / str(expected), *options]
        result = run_cli("evaluate", folder, *data, *small)
        assert result.returncode == 0, result.stderr
        assert ls.RobustnessReport.load(tmp_path / str(expected)).num_images == expected


def test_models_whose_trainings_held_other_parts_out_are_compared_only_on_a_part_for_all(three_splits, tmp_path):
    for name, options in (("first", []), ("second", ["--eval_split", "test"])):
        session.run([*TINY, *options, "--dataset_name", three_splits, "--output_dir", str(tmp_path / name)])
    models = ["evaluate", tmp_path / "first", tmp_path / "second", "--dataset_name", three_splits]
    small = ["--num_orders", "8", "--num_subsets", "1", "--device", "cpu", "--output_dir", tmp_path / "out"]
    result = run_cli(*models, *small)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert "with `eval_split` None and 'test' (None: the default), so they cannot be compared" in result.stderr
    result = run_cli(*models, *small, "--eval_split", "test")
    assert result.returncode == 0, result.stderr
    assert "(30 images)" in result.stdout


def test_a_checkpoint_of_a_run_has_the_runs_dataset(tmp_path):
    record_training(tmp_path, arguments={}, dataset="org/letters")
    for name in ("checkpoint-7", "other"):
        (tmp_path / name).mkdir()
    assert inputs.trained_on(str(tmp_path / "checkpoint-7")) == "org/letters"
    assert inputs.trained_on(str(tmp_path / "other")) is None and inputs.trained_on("") is None
    record_training(tmp_path / "checkpoint-7", arguments={}, dataset="org/digits")
    assert inputs.trained_on(str(tmp_path / "checkpoint-7")) == "org/digits"
