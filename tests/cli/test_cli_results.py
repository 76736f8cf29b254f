"""What the commands say of whose data: which dataset is taken, and which earlier result is shown again."""

import json
import resource
import shutil

import numpy as np
import pytest
import torch
from conftest import Architecture
from datasets import Array2D, ClassLabel, Dataset, Features
from PIL import Image
from transformers import ViTImageProcessor

import hf_layershuffle as ls
from hf_layershuffle.common.tables import render
from hf_layershuffle.data.datasets import as_dataloader
from hf_layershuffle.evaluation import order_tree
from hf_layershuffle.evaluation.fingerprint import data_digest, processor_digest
from hf_layershuffle.evaluation.report import RobustnessReport, compare_reports
from hf_layershuffle.evaluation.statistics import OrderScore
from hf_layershuffle.hub.folder_records import record_training
from hf_layershuffle.merging.plan import MergePlan
from hf_layershuffle.merging.random_merges import MergeScore, RandomMergeReport, random_merge_table
from hf_layershuffle_cli import inputs, main, outputs


NAMES = ["a", "b", "c", "d", "e"]
FEW = ["--num_orders", "2", "--num_subsets", "1", "--device", "cpu"]


def images(num_images: int = 30, seed: int = 0) -> Dataset:
    features = Features({"image": Array2D((8, 8), "uint8"), "label": ClassLabel(names=NAMES)})
    pixels = np.random.default_rng(seed).integers(256, size=(num_images, 8, 8), dtype=np.uint8)
    return Dataset.from_dict({"image": pixels, "label": [i % 5 for i in range(num_images)]}, features=features)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    Architecture("vit").classifier(shuffle_mode="arbitrary", **labels).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture
def work(saved, tmp_path, monkeypatch, quick_pictures):
    """The current folder, with a model and two datasets of the same name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, "model")
    for seed, where in enumerate(("one", "two")):
        images(120, seed=seed).save_to_disk(tmp_path / where / "letters")
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command in this process: exit code, standard output, last line of the standard error."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["hf-layershuffle", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        return stop.value.code or 0, output.out, (output.err.strip().splitlines() or [""])[-1]

    return run


# --- Which dataset ---


@pytest.mark.parametrize(
    "arguments",
    [["evaluate", "model"], ["analyze", "model"], ["prune", "model", "--search", "--num_layers", "2"]],
    ids=lambda arguments: arguments[0],
)
def test_without_a_name_the_dataset_is_that_of_the_training_or_must_be_said(work, command, arguments):
    out = ["--output_dir", "out"]
    code, _, error = command(*arguments, *out)
    assert code == 2 and "'model' has no training.json that names the dataset" in error and "--dataset_name" in error
    record_training("model", arguments={}, dataset="cifar10")
    code, _, error = command(*arguments, *out)
    assert code == 2 and "was trained on 'cifar10' (training.json), which is neither a folder here nor a Hub" in error
    assert not (work / "out").exists()
    record_training("model", arguments={}, dataset="org/letters")
    code, _, error = command(*arguments, *out)
    assert code == 2 and "Dataset 'org/letters' cannot be loaded" in error  # it was tried: there is no Hub here
    record_training("model", arguments={}, dataset="one/letters")
    few = ["--num_orders", "2", "--device", "cpu"] if arguments[0] != "prune" else ["--device", "cpu"]
    code, output, error = command(*arguments, *few, *out)
    assert code == 0, error
    if arguments[0] != "prune":
        assert "letters" in output and "digits" not in output


def test_the_digits_are_taken_where_they_were_trained_on(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, "a")
    shutil.copytree(saved, "b")
    for name in "ab":
        record_training(name, arguments={}, dataset="digits")
    assert inputs.dataset_of(["a", "b"], None) == "digits"
    assert inputs.dataset_of(["a", "b"], "other") == "other"
    record_training("b", arguments={}, dataset="org/letters")
    assert inputs.dataset_of(["b"], None) == "org/letters"
    with pytest.raises(ValueError, match=r"do not name one and the same dataset \('a': digits, 'b': org/letters\)"):
        inputs.dataset_of(["a", "b"], None)
    with pytest.raises(ValueError, match="neither a folder here"):
        record_training("b", arguments={}, dataset="/data/letters")
        inputs.dataset_of(["b"], None)


# --- Whose result ---


def test_a_digest_tells_images_labels_and_settings_apart():
    def digest(data, batch_size=64, **settings):
        processor = ViTImageProcessor(**{"size": {"height": 8, "width": 8}} | settings)
        return data_digest(as_dataloader(data, processor, batch_size=batch_size)) + processor_digest(processor)

    first = digest(images())
    assert digest(images()) == digest(images(), batch_size=7) == first
    changed = [
        digest(images(seed=1)),
        digest(images(29)),
        digest(images().select([1, 0, *range(2, 30)])),
        digest(images().map(lambda row: {"label": (row["label"] + 1) % 5})),
        digest(images(), image_mean=[0.4] * 3),
        digest(images(), size={"height": 4, "width": 4}),
        digest(images(), rescale_factor=1 / 128),
    ]
    assert len({first, *changed}) == 8
    items = [{"pixel_values": torch.full((3, 8, 8), float(i), dtype=torch.bfloat16), "labels": i} for i in range(5)]
    one, two = (torch.utils.data.DataLoader(items, batch_size=size) for size in (2, 5))
    assert data_digest(one) == data_digest(two)
    items[3]["labels"] = 0
    assert data_digest(one) != data_digest(torch.utils.data.DataLoader(items[:4]))


def test_another_datasets_report_is_not_shown_as_this_ones(work, command):
    arguments = ["evaluate", "model", *FEW, "--output_dir", "out", "--dataset_name"]
    code, table, _ = command(*arguments, "one/letters")
    assert code == 0
    evaluated = json.loads((work / "out" / "robustness.json").read_text())
    assert command(*arguments, "one/letters", "--batch_size", "7")[:2] == (0, table)
    assert json.loads((work / "out" / "robustness.json").read_text()) == evaluated  # not evaluated again

    code, _, error = command(*arguments, "two/letters")
    assert code == 2 and "holds a report of another evaluation (it is of other images or labels" in error
    processor = ViTImageProcessor.from_pretrained("model")
    processor.image_mean = [0.4, 0.5, 0.5]
    processor.save_pretrained("model")
    code, _, error = command(*arguments, "one/letters")
    assert code == 2 and "(the image processor had other settings)" in error
    assert command(*arguments, "one/letters", "--overwrite")[0] == 0
    assert command(*arguments, "one/letters")[0] == 0

    report = json.loads((work / "out" / "robustness.json").read_text())
    del report["config"]["data"]
    (work / "out" / "robustness.json").write_text(json.dumps(report))
    code, _, error = command(*arguments, "one/letters")
    assert code == 2 and "made by an earlier version, which did not record of which images" in error


def test_a_card_does_not_show_a_report_of_other_pixels(work, command):
    publish = ["publish", "model", "--card_only"]
    assert command(*publish, "--dataset_name", "one/letters", "--num_orders", "2")[0] == 0
    assert command(*publish)[0] == 0
    processor = ViTImageProcessor.from_pretrained("model")
    processor.image_std = [0.4, 0.5, 0.5]
    processor.save_pretrained("model")
    code, _, error = command(*publish)
    assert code == 2 and "made with other settings of the image processor" in error


@pytest.mark.parametrize("change", ["none", "images", "processor", "torn"])
def test_sums_of_other_images_are_not_gone_on_with(vit, tmp_path, monkeypatch, change, caplog):
    monkeypatch.setattr(order_tree, "SAVE_EVERY_BATCHES", 1)
    model, file = vit.classifier(), tmp_path / "sums.npz"
    settings = {"num_orders": 2, "num_subsets": 1, "batch_size": 10, "progress": False, "model_name": "m"}
    score_batch, batches = order_tree._score_batch, []

    def counted(*args):
        batches.append(1)
        if len(batches) == 2:
            raise MemoryError
        return score_batch(*args)

    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    monkeypatch.setattr(order_tree, "_score_batch", counted)
    with pytest.raises(MemoryError):
        ls.evaluate_robustness(model, images(), image_processor=processor, progress_file=file, **settings)
    data = images(seed=1) if change == "images" else images()
    if change == "processor":
        processor.image_mean = [0.1, 0.2, 0.3]
    if change == "torn":
        file.write_bytes(file.read_bytes()[:-30])
    batches[:] = [1, 1]
    report = ls.evaluate_robustness(model, data, image_processor=processor, progress_file=file, **settings)
    assert len(batches) - 2 == (2 if change == "none" else 3)
    assert ("The evaluation begins anew" in caplog.text) == (change == "torn") and not file.exists()
    whole = ls.evaluate_robustness(model, data, image_processor=processor, **settings)
    assert report.to_dict() | {"environment": 0} == whole.to_dict() | {"environment": 0}


# --- Numbers that are none ---


def test_outputs_that_are_not_finite_count_as_wrong_and_the_report_stays_readable(vit, tmp_path, caplog):
    model = vit.classifier(num_labels=7).eval()

    class Broken(type(model.classifier)):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * float("nan")

    model.classifier.__class__ = Broken
    items = [{"pixel_values": torch.randn(3, 8, 8), "labels": 0} for _ in range(4)]
    report = ls.evaluate_robustness(model, items, num_orders=2, num_subsets=1, progress=False, model_name="m")
    assert report.sequential.accuracy == 0 and report.arbitrary.top5_accuracy.mean == 0
    assert "not finite in" in caplog.text
    report.save(tmp_path)
    loaded = RobustnessReport.load(tmp_path)
    assert str(loaded) == str(report) and np.isnan(loaded.sequential.loss)
    assert loaded.to_dict() == report.to_dict() and "NaN" not in (tmp_path / "robustness.json").read_text()
    assert "nan" in render(compare_reports({"m": loaded})) or loaded.arbitrary.accuracy.mean == 0

    score = OrderScore([0, 1], 0.5, float("nan"))
    merges = RandomMergeReport(
        "r", "d", 4, 2, 0, False, "a", {"a": {}}, {"a": score}, [MergeScore(0, [], 0.5, float("inf"))]
    )
    merges.save(tmp_path)
    loaded = RandomMergeReport.load(tmp_path)
    assert np.isnan(loaded.source_scores["a"].loss) and loaded.merges[0].accuracy == 0.5


def test_the_search_drops_the_layer_that_gives_no_number(vit):
    model = vit.classifier().eval()
    layer = model.base_model.layers[1]
    layer.register_forward_hook(lambda module, args, output: output * float("nan"))
    data = [{"pixel_values": torch.randn(3, 8, 8), "labels": 0} for _ in range(4)]
    assert 1 not in ls.search_layers(model, data, 3, progress=False)


def test_models_without_one_class_of_several_are_refused(saved, work, command):
    out, data = ["--output_dir", "out"], ["--dataset_name", "one/letters"]
    config = json.loads((work / "model" / "config.json").read_text())
    for problem in ("multi_label_classification", "regression"):
        (work / "model" / "config.json").write_text(json.dumps(config | {"problem_type": problem}))
        for arguments in (
            ["evaluate", "model", *data],
            ["analyze", "model", *data],
            ["prune", "model", "--search", "--num_layers", "2", *data],
            ["merge", "model", "--random", "2", "--evaluate", "one/letters"],
        ):
            code, _, error = command(*arguments, *out)
            assert code == 2 and f"The model is for '{problem}'" in error, error
    assert not (work / "out").exists()


@pytest.mark.parametrize(("channels", "numbers", "kind"), [(1, 3, "grey"), (3, 1, "RGB")])
def test_an_image_processor_for_other_channels_is_refused(work, command, vit, channels, numbers, kind):
    labels = {"id2label": dict(enumerate(NAMES))}
    vit.classifier(num_channels=channels, **labels).save_pretrained("other")
    ViTImageProcessor(
        size={"height": 8, "width": 8}, image_mean=[0.5] * numbers, image_std=[0.5] * numbers
    ).save_pretrained("other")
    code, _, error = command("evaluate", "other", "--dataset_name", "one/letters", "--output_dir", "out")
    assert code == 2 and f"The model takes {kind} images" in error and f"has {numbers} numbers" in error


# --- Where results go ---


def test_a_folder_that_cannot_be_written_is_found_before_any_work(work, command, monkeypatch):
    def must_not_run(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(inputs, "load_model", must_not_run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))  # as a disk with little room
    try:
        for arguments in (
            ["evaluate", "model"],
            ["analyze", "model"],
            ["prune", "model", "--keep", "0"],
            ["merge", "model", "--random", "2", "--evaluate", "digits"],
            ["merge", "model", "--average"],
        ):
            code, _, error = command(*arguments, "--output_dir", "new/out")
            assert code == 2 and "The output folder 'new/out' cannot be written (File too large)" in error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in work.iterdir()) == ["model", "one", "two"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "model", *FEW, "--dataset_name", "one/letters"],
        ["analyze", "model", "--num_orders", "2", "--device", "cpu", "--dataset_name", "one/letters"],
        ["merge", "model", "--random", "2", "--evaluate", "one/letters", "--device", "cpu"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_was_computed_is_shown_even_where_it_cannot_be_saved(work, command, monkeypatch, arguments):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_layershuffle.common.reports.write_text", full)
    code, output, error = command(*arguments, "--output_dir", "out")
    assert code == 2 and "letters" in output and "│" in output and "Saved" not in output
    assert "could not be saved in 'out'" in error and "No space left on device" in error


def test_an_evaluation_goes_on_where_its_progress_cannot_be_saved(vit, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(order_tree, "SAVE_EVERY_BATCHES", 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(order_tree.np, "savez", full)
    items = [{"pixel_values": torch.randn(3, 8, 8), "labels": 0} for _ in range(4)]
    settings = {"num_orders": 1, "num_subsets": 1, "batch_size": 2, "progress": False, "model_name": "m"}
    report = ls.evaluate_robustness(vit.classifier(), items, progress_file=tmp_path / "sums", **settings)
    assert report.num_images == 4 and "cannot be written" in caplog.text


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "model", *FEW, "--dataset_name", "photos", "--output_dir", "out"],
        ["analyze", "model", *FEW[:2], "--device", "cpu", "--dataset_name", "photos", "--output_dir", "out"],
        ["prune", "model", "--search", "--num_layers", "3", "--dataset_name", "photos", "--output_dir", "out"],
        ["merge", "model", "--random", "2", "--evaluate", "photos", "--device", "cpu", "--output_dir", "out"],
        ["publish", "model", "--card_only", "--num_orders", "2", "--dataset_name", "photos"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_damaged_images_are_left_out_by_request(work, command, arguments, caplog):
    for split in ("train", "test"):
        for i, pixels in enumerate(images()["image"]):
            path = work / "photos" / split / NAMES[i % 5] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
            if i in (7, 23):
                path.write_bytes(path.read_bytes()[:60])
    before = sorted(work.glob("model/*"))
    code, _, error = command(*arguments)
    assert code == 2 and "2 of 30 images cannot be read: row" in error and "(--skip_damaged)" in error
    assert not (work / "out").exists() and sorted(work.glob("model/*")) == before
    code, _, error = command(*arguments, "--skip_damaged")
    assert code == 0, error
    assert "7.png" in caplog.text and "They are left out." in caplog.text
    if arguments[0] != "prune":
        (report,) = (
            path
            for name in ("out", "model")
            for path in work.glob(f"{name}/*.json")
            if "num_images" in path.read_text()
        )
        assert json.loads(report.read_text())["num_images"] == 28


# --- Names ---


@pytest.mark.parametrize("name", ["run[lr=0.1]", "[/v2]", "[bold]x[/bold]"])
def test_brackets_in_names_are_shown_as_they_are(vit, name, capsys):
    items = [{"pixel_values": torch.randn(3, 8, 8), "labels": 0} for _ in range(4)]
    names = {"model_name": name, "dataset_name": f"data{name}"}
    report = ls.evaluate_robustness(vit.classifier(), items, num_orders=1, num_subsets=1, progress=False, **names)
    score = OrderScore([0], 0.5, 1.0)
    merges = RandomMergeReport(
        name, f"data{name}", 4, 2, 0, False, "a", {}, {"a": score}, [MergeScore(0, [], 0.5, 1.0)]
    )
    plan = MergePlan(sources={name: "a"}, layers=[{"source": name, "layer": 0}])
    for table in (report.table(), compare_reports({name: report}), random_merge_table([merges]), plan.table()):
        outputs.print_table(table)
        from rich.console import Console

        Console(width=160).print(table)  # as a user does, with markup
        shown = capsys.readouterr().out
        assert shown.count(name) >= 2 and render(table).count(name) >= 1, shown


# --- Publishing ---


def test_the_hub_is_asked_before_anything_is_evaluated(work, command, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_offline")
    code, _, error = command("publish", "model", "--repo_id", "org/model", "--dataset_name", "one/letters")
    assert code == 2 and "'org/model' was not published: the connection to the Hub failed" in error
    assert not (work / "model" / "robustness.json").exists() and not (work / "model" / "README.md").exists()


def test_publishing_again_does_not_evaluate_again(work, command, monkeypatch):
    arguments = ["publish", "model", "--card_only", "--num_orders", "2", "--dataset_name"]
    assert command(*arguments, "one/letters")[0] == 0
    first = (work / "model" / "robustness.json").read_bytes()
    calls, evaluate = [], ls.evaluate_robustness
    monkeypatch.setattr("hf_layershuffle.evaluate_robustness", lambda *a, **k: calls.append(1) or evaluate(*a, **k))
    assert command(*arguments, "one/letters")[0] == 0 and not calls
    assert (work / "model" / "robustness.json").read_bytes() == first
    assert command(*arguments, "two/letters")[0] == 0 and len(calls) == 1
    assert command(*arguments, "two/letters", "--seed", "1")[0] == 0 and len(calls) == 2
    (work / "model" / "robustness.json").write_text("{")
    assert command(*arguments, "two/letters")[0] == 0 and len(calls) == 3
