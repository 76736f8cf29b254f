"""Nothing from outside a model's folder gets into a result, and no path of this machine is written into one."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import Architecture
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers import ViTImageProcessor

from hf_layershuffle.checkpoints.image_processors import load_image_processor
from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.common.paths import inside, public_name, public_path
from hf_layershuffle.hub.card_examples import copy_examples, write_examples
from hf_layershuffle.hub.folder_records import record_training
from hf_layershuffle.hub.merged_folder import merge
from hf_layershuffle.hub.model_card import write_model_card
from hf_layershuffle.hub.plain_vit_folder import save_plain_vit
from hf_layershuffle.hub.published_files import check_folder, published_files
from hf_layershuffle.merging.plan import MergePlan
from hf_layershuffle_cli import main


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def save_model(folder: Path, seed: int = 0, **processor) -> Path:
    Architecture("vit").classifier(seed=seed, shuffle_mode="arbitrary").save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}, **processor).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_model(tmp_path / "a")


@pytest.fixture
def secret(tmp_path) -> Path:
    """A file outside of the models' folders."""
    path = tmp_path / "secret.json"
    path.write_text(json.dumps({"token": "hf_secret", "sources": {}}))
    return path


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def as_cache(folder: Path, cache: Path) -> Path:
    """The folder as the Hub's cache holds it: links to blobs beside the snapshot."""
    repository = cache / "models--org--model"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        shutil.copyfile(path, blobs / str(number))
        target = snapshot / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.path.relpath(blobs / str(number), target.parent))
    return snapshot


def merged(folder: Path, output: Path, **kwargs) -> Path:
    return merge(MergePlan.random([str(folder)], seed=0, **kwargs), output, progress=False)


# --- The helper ---


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/passwd", "C:\\x", "..\\x", "\\\\server\\x", "", "a\0b", None, 3, ["a"]]
)
def test_a_name_that_leads_outside_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is not the name of a file inside"):
        inside(tmp_path, name)


def test_links_may_stay_inside_and_lead_to_blobs_of_the_same_repository(tmp_path, folder, secret):
    assert (
        inside(folder, "config.json") == folder / "config.json" and inside(folder, "new/file") == folder / "new/file"
    )
    (folder / "copy.json").symlink_to("config.json")
    assert inside(folder, "copy.json").exists()
    (tmp_path / "other").symlink_to(folder)
    assert inside(tmp_path / "other", "config.json").exists()  # the folder itself may be a link
    snapshot = as_cache(folder, tmp_path / "cache")
    assert json.loads(inside(snapshot, "config.json").read_text())["num_hidden_layers"] == 4
    (snapshot / "evil.json").symlink_to(secret)
    (snapshot / "other.json").symlink_to(tmp_path / "cache" / "models--org--other" / "blobs" / "0")
    (folder / "circle").symlink_to("circle")
    for where, name in ((snapshot, "evil.json"), (snapshot, "other.json"), (folder, "circle")):
        with pytest.raises(ValueError, match="is a link"):
            inside(where, name)
    # a folder that only looks like a cache, with blobs that lead elsewhere
    fake = tmp_path / "models--x" / "snapshots" / "1"
    fake.mkdir(parents=True)
    (fake.parent.parent / "blobs").symlink_to(tmp_path)
    (fake / "x.json").symlink_to("../../blobs/secret.json")
    with pytest.raises(ValueError, match=r"is a link to '.*secret\.json', which is outside of the folder.*put a copy"):
        inside(fake, "x.json")


def test_blobs_that_repositories_share_are_inside(tmp_path, folder):
    snapshot = as_cache(folder, tmp_path / "cache")
    blob = (snapshot / "config.json").resolve()
    shared = tmp_path / "cache" / "blobs" / "ab" / "abc"
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(shared)
    assert inside(snapshot, "config.json").exists()


def test_public_names_tell_nothing_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "a").mkdir(parents=True)
    for given, public in (
        ("outputs/a", "a"),
        (str(tmp_path / "outputs" / "a"), "a"),
        ("/no/such/folder", "folder"),
        ("~/models/b", "b"),
        ("../elsewhere/c/", "c"),
        ("C:\\Users\\me\\d", "d"),
        ("org/model", "org/model"),
        ("digits", "digits"),
        (None, None),
    ):
        assert public_name(given) == public
    assert public_path(tmp_path / "outputs" / "a") == public_path("outputs/a") == "outputs/a"
    assert public_path("/home/me/models/b") == "b" and public_path(".") == tmp_path.name


# --- Results ---


LINKED = ["preprocessor_config.json", "processor_config.json", "config.json", "model.safetensors"]


@pytest.mark.parametrize("name", LINKED)
def test_a_merge_takes_nothing_from_outside_a_source(tmp_path, folder, secret, name):
    outside = secret
    if (folder / name).exists():  # a link to a file that would do
        outside = tmp_path / "outside" / name
        outside.parent.mkdir()
        shutil.copyfile(folder / name, outside)
    link(folder / name, outside)
    with pytest.raises(ValueError, match=f"Source 'a': .*{name}' is a link to|{name}' is a link to"):
        merged(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["notes.json", "examples/examples.json", "picture.png", "LICENSE", "training.json"])
def test_nothing_linked_from_outside_is_published(tmp_path, folder, secret, name):
    (folder / "copy.json").symlink_to("config.json")
    assert "copy.json" in published_files(folder)
    link(folder / name, secret)
    for function in (published_files, check_folder):
        with pytest.raises(ValueError, match="which is outside of the folder"):
            function(folder)


@pytest.mark.parametrize("name", ["training.json", "robustness.json", "merge_plan.yaml", "export.json"])
def test_no_card_is_made_of_a_record_from_outside(folder, secret, name):
    link(folder / name, secret)
    with pytest.raises(ValueError, match="which is outside of the folder"):
        write_model_card(folder)
    assert not (folder / "README.md").exists()


def test_no_card_is_made_of_a_text_from_outside(folder, tmp_path):
    (tmp_path / "outside.md").write_text("secret")
    (folder / "README.md").symlink_to(tmp_path / "outside.md")
    with pytest.raises(ValueError, match="which is outside of the folder"):
        write_model_card(folder)


def images(count: int = 10) -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=[f"LABEL_{i}" for i in range(5)])})
    rows = [{"image": PILImage.new("RGB", (8, 8), (i * 20, 0, 0)), "label": i % 5} for i in range(count)]
    return Dataset.from_list(rows, features=features)


@pytest.mark.parametrize("src", ["../x.png", "/tmp/x.png", "examples/link.png", 3, {"a": 1}])
def test_examples_copy_no_file_from_outside(tmp_path, folder, src):
    processor = load_image_processor(folder)
    (folder / "examples").mkdir()
    for image in (folder / "examples" / "0.png", folder / "examples" / "1.png", tmp_path / "x.png"):
        PILImage.new("RGB", (96, 96)).save(image)
    (folder / "examples" / "link.png").symlink_to(tmp_path / "x.png")
    path = folder / "examples" / "examples.json"
    output = [{"label": "LABEL_0", "score": 1.0}]
    entries = [{"src": each, "example_title": "Class 0", "output": output} for each in ("examples/0.png", src)]
    path.write_text(json.dumps(entries))
    target = save_model(tmp_path / "target")
    for function in (lambda: copy_examples(folder, target, processor), lambda: write_model_card(folder)):
        with pytest.raises(
            ValueError, match=r"not the name of a file inside|outside of the folder|src`: Input should be"
        ):
            function()
    assert not (target / "examples").exists()


def test_an_image_processor_from_outside_is_not_read(tmp_path, folder, monkeypatch, capsys):
    outside = tmp_path / "outside.json"
    shutil.copyfile(folder / "preprocessor_config.json", outside)
    link(folder / "preprocessor_config.json", outside)
    for function in (load_image_processor, lambda folder: save_plain_vit(folder, tmp_path / "plain", source="org/a")):
        with pytest.raises(ValueError, match="which is outside of the folder"):
            function(folder)
    monkeypatch.setattr("sys.argv", ["x", "prune", str(folder), "--keep", "0", "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        main()
    assert "which is outside of the folder" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_pruning_reads_no_configuration_from_outside(tmp_path, folder, monkeypatch, capsys):
    outside = tmp_path / "outside.json"
    shutil.copyfile(folder / "config.json", outside)
    link(folder / "config.json", outside)
    monkeypatch.setattr("sys.argv", ["x", "prune", str(folder), "--keep", "0", "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        main()
    assert "which is outside of the folder" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_snapshot_of_the_hub_is_merged_pruned_and_exported(tmp_path, folder, monkeypatch):
    write_examples(folder, images(), load_image_processor(folder))
    snapshot = as_cache(folder, tmp_path / "cache")
    out = merged(snapshot, tmp_path / "out")
    assert (out / "preprocessor_config.json").read_bytes() == (folder / "preprocessor_config.json").read_bytes()
    assert not any(path.is_symlink() for path in out.rglob("*"))
    save_plain_vit(snapshot, tmp_path / "plain", source="org/a")
    assert (tmp_path / "plain" / "examples" / "0.png").exists()
    monkeypatch.setattr(
        "sys.argv", ["x", "prune", str(snapshot), "--keep", "0", "--output_dir", str(tmp_path / "short")]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code


def test_no_result_names_a_path_of_this_machine(tmp_path, folder, monkeypatch):
    """Merged, pruned, exported, recorded as trained from a folder, and written as a card."""
    other = save_model(tmp_path / "b", seed=1)
    out = merge(MergePlan.average([str(folder), str(other)]), tmp_path / "out", progress=False)
    monkeypatch.setattr("sys.argv", ["x", "prune", str(out), "--keep", "2,0", "--output_dir", str(tmp_path / "short")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    data = {"dataset": "/data/private/images", "base_model": "/home/me/base", "teacher": str(folder)}
    record_training(tmp_path / "short", arguments={"learning_rate": 0.1}, **data)
    save_plain_vit(out, tmp_path / "plain", source=str(out))
    load_classifier(str(out)).save_pretrained(tmp_path / "again")  # whose configuration knows where it came from
    results = [tmp_path / name for name in ("out", "short", "plain", "again")]
    for result in results:
        write_model_card(result)
        for path in result.iterdir():
            if path.suffix in (".json", ".yaml", ".md"):
                text = path.read_text()
                assert not [word for word in (str(tmp_path), "/data", "/home") if word in text], (path, text)
    record = json.loads((tmp_path / "short" / "training.json").read_text())
    assert (record["dataset"], record["base_model"], record["teacher"]) == ("images", "base", "a")


# --- Image processors of a merge's sources ---


def test_different_image_processors_are_refused_or_chosen(tmp_path, folder, caplog):
    other = save_model(tmp_path / "b", seed=1, image_mean=[0.1, 0.2, 0.3])
    plan = MergePlan.random([str(folder), str(other)], seed=0)
    with pytest.raises(
        ValueError,
        match=r"`image_mean` .* \[0\.5, 0\.5, 0\.5\] in 'a' and \[0\.1.*in 'b'.*`image_processor: <source>`",
    ):
        merge(plan, tmp_path / "out", progress=False)
    plan = MergePlan(**{**plan.to_dict(), "image_processor": "b"})
    plan.save(tmp_path / "plan.yaml")
    assert MergePlan.load(tmp_path / "plan.yaml", trust_paths=True) == plan
    out = merge(plan, tmp_path / "out", progress=False)
    assert (out / "preprocessor_config.json").read_bytes() == (other / "preprocessor_config.json").read_bytes()
    assert MergePlan.load(out / "merge_plan.yaml", trust_paths=True).image_processor == "b"
    with pytest.raises(ValueError, match="`image_processor` names the source 'c', which does not exist"):
        MergePlan(**{**plan.to_dict(), "image_processor": "c"})


@pytest.mark.parametrize(
    "change", [{"image_processor_type": "ViTImageProcessorFast"}, {"size": 8}, {"do_rescale": None}]
)
def test_the_same_image_processor_written_in_another_way_is_the_same(tmp_path, folder, change):
    other = save_model(tmp_path / "b", seed=1)
    path = other / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    merge(MergePlan.random([str(folder), str(other)], seed=0), tmp_path / "out", progress=False)
