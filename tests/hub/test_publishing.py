"""What would be pushed, and what is refused, without a network; `test_hub.py` pushes it."""

import json
import re
import shutil

import pytest
import transformers
from conftest import REPOSITORY, run_cli
from huggingface_hub import metadata_load
from safetensors.torch import load_file, save_file
from support.cards import PICTURES, describe, images, save_model
from transformers import BertConfig, CLIPVisionConfig, DeiTConfig, Dinov2Config, LlamaConfig, RobertaConfig

import hf_layershuffle as ls
from hf_layershuffle.common.claims import claimed_folder
from hf_layershuffle.hub.model_card import write_model_card
from hf_layershuffle.hub.plain_vit_folder import check_plain_target, publish_with_plain_vit
from hf_layershuffle.hub.publish_plan import check_access
from hf_layershuffle.hub.published_files import added_code, check_folder, package_code, published_files
from hf_layershuffle_cli import main


DIGITS = REPOSITORY / "model_cards" / "vit-digits-layershuffle"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IMAGES = {"image_size": 16, "patch_size": 4}


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A folder with everything that a card can show."""
    return describe(tmp_path_factory.mktemp("models") / "vit-tiny")


@pytest.fixture
def folder(described, tmp_path):
    return shutil.copytree(described, tmp_path / "vit-tiny")


def test_checkpoints_logs_and_pickles_are_not_pushed(folder):
    for name in ("checkpoint-1/model.safetensors", "runs/events.json", "training_args.bin", "optimizer.pt", ".env"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    for name in (".train_run.json", "examples/.hidden.png", ".cache/config.json", "trainer_state.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    code = [path.name for path in package_code()]
    examples = ["examples/0.png", "examples/examples.json"]
    records = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json", "robustness.json"]
    assert published_files(folder) == sorted([*code, *examples, *records, "training.json", *PICTURES])


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_folder_is_refused(folder, fraction):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(OSError, match=r"model\.safetensors' is truncated or corrupted"):
        check_folder(folder)


def test_other_kinds_of_models_are_refused(folder):
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "blip_text_model"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="is a model of type 'blip_text_model', of which transformers has no classifier"
    ):
        check_folder(folder)


def test_a_dry_run_lists_both_targets_and_what_would_be_made(folder, monkeypatch, capsys):
    def dry_run(*arguments):
        monkeypatch.setattr("sys.argv", ["hf-layershuffle", "publish", str(folder), "--dry_run", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        return output.out if not stop.value.code else output.err

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in (*PICTURES, "robustness.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "examples")
    output = dry_run("--repo_id", "org/vit", "--plain_vit", "--execution_order", "2,0")
    ours, plain = (part.splitlines() for part in output.split("To org/vit, branch plain-vit:\n"))
    assert ours[0] == "To org/vit, branch main:"
    assert [line.split()[-1] for line in ours[1:]] == published_files(folder)
    assert [line.split()[-1] for line in plain[:-1]] == [
        *("README.md", "config.json", "export.json", "model.safetensors", "preprocessor_config.json")
    ]
    (folder / "examples").mkdir()
    (folder / "examples" / "mine.png").write_bytes(b"mine")
    images(50).save_to_disk(folder.parent / "letters")
    with_data = dry_run("--repo_id", "org/vit", "--dataset_name", str(folder.parent / "letters"))
    assert all(f"        made {name}" in with_data for name in ("robustness.json", "README.md", *PICTURES))
    assert "4 examples/mine.png" in with_data
    shutil.rmtree(folder / "examples")
    assert "To org/own, branch main:" in dry_run("--repo_id", "org/vit", "--plain_vit_repo_id", "org/own")

    assert "Repo id must" in dry_run("--repo_id", "a b/c")
    assert "holds 9 at position 1" in dry_run("--plain_vit", "--execution_order", "0,9")
    assert "There is no dataset folder './missing'" in dry_run("--dataset_name", "./missing")
    save_model(folder, depth_embedding=True)
    assert "`depth_embedding=True` cannot become a plain ViT" in dry_run("--plain_vit")
    for path, content in before.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert "To the repository" in dry_run()
    save_model(folder, num_labels=6)
    assert "a report of other weights" in dry_run()
    assert set(before) == {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "target",
    [
        {"plain_repo_id": "org/vit"},
        {"plain_repo_id": "Org/ViT", "revision": "main"},
        {"revision": "plain-vit"},
    ],
)
def test_a_plain_vit_does_not_go_where_its_model_goes(folder, target, monkeypatch):
    def not_reached(*args, **kwargs):
        raise AssertionError("something is pushed")

    monkeypatch.setattr("hf_layershuffle.hub.plain_vit_folder.publish", not_reached)
    options = {"plain_repo_id": "--plain_vit_repo_id", "revision": "--revision"}
    arguments = [text for name, value in target.items() for text in (options[name], value)]
    said = "would both go to the branch '(main|plain-vit)' of 'org/vit'"
    with pytest.raises(ValueError, match=said):
        publish_with_plain_vit(folder, "org/vit", **target)
    result = run_cli("publish", folder, "--repo_id", "org/vit", "--plain_vit", "--dry_run", *arguments)
    assert result.returncode == 2 and re.search(said, result.stderr) and "Traceback" not in result.stderr
    check_plain_target(folder, "org/vit", "dev", "org/vit")
    check_plain_target(folder, "org/vit", "main", None)


def test_a_folder_in_use_is_not_published(folder):
    before = (folder / "README.md").read_bytes()
    (folder / "README.md").write_bytes(before + b"Mine.")
    with claimed_folder(folder):
        refused, dry = (run_cli("publish", folder, *flags) for flags in (["--card_only"], ["--dry_run"]))
    assert refused.returncode == 2 and f"'{folder}' is in use by process" in refused.stderr
    assert dry.returncode == 0, dry.stderr
    assert (folder / "README.md").read_bytes() == before + b"Mine."


@pytest.mark.parametrize(
    "entity, said", [({}, "no permission"), ({"entity": None}, "no permission"), ({"entity": {"name": "org"}}, None)]
)
def test_rights_of_a_token_that_are_incomplete_give_none(monkeypatch, entity, said):
    scopes = [{**entity, "permissions": ["repo.write"]}]
    token = {"role": "fineGrained", "fineGrained": {"scoped": scopes}}
    me = {"name": "me", "orgs": [{"name": "org"}], "auth": {"accessToken": token}}
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: me)
    if said is None:
        check_access("org/vit", go_on="Go on")
    else:
        with pytest.raises(OSError, match=said):
            check_access("org/vit", go_on="Go on")


@pytest.mark.parametrize(
    "missing, message",
    [
        ("config.json", "'config.json' is missing"),
        ("model.safetensors", "no safetensors weights"),
        ("execution_order.py", "not complete: execution_order.py is missing"),
    ],
)
def test_an_incomplete_folder_is_refused(folder, missing, message):
    check_folder(folder)
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=message):
        check_folder(folder)


def test_a_folder_that_serves_one_auto_class_only_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]["AutoModel"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot be loaded by AutoModel: 'auto_map' lacks it"):
        check_folder(folder)


OF_OTHER_TASKS = {
    "LlamaForCausalLM": (LlamaConfig, SIZES | {"vocab_size": 50, "tie_word_embeddings": True}),
    "BertForMaskedLM": (BertConfig, SIZES | {"vocab_size": 50}),
    "RobertaForTokenClassification": (RobertaConfig, SIZES | {"vocab_size": 50}),
    "DeiTForImageClassificationWithTeacher": (DeiTConfig, SIZES | IMAGES),
    "CLIPVisionModelWithProjection": (CLIPVisionConfig, SIZES | IMAGES),
    "Dinov2Backbone": (Dinov2Config, SIZES | IMAGES),
    "CLIPVisionModel": (CLIPVisionConfig, SIZES | IMAGES),
}


@pytest.mark.parametrize("name", OF_OTHER_TASKS)
def test_models_of_other_tasks_and_classes_are_published_as_what_they_are(tmp_path, name):
    config_class, values = OF_OTHER_TASKS[name]
    model = ls.free_order(getattr(transformers, name)(config_class(**values)))
    model.save_pretrained(tmp_path)
    check_folder(tmp_path)
    write_model_card(tmp_path, repo_id="org/other")
    text, metadata = (tmp_path / "README.md").read_text(), metadata_load(tmp_path / "README.md")
    assert f"It has {model.num_parameters():,} parameters" in text
    is_classifier = name == "DeiTForImageClassificationWithTeacher"
    assert ("pipeline_tag" in metadata) == ("classifier" in text) == ("pipeline(" in text) == is_classifier
    assert (f'ls.LayerShuffle{name}.from_pretrained("org/other")' in text) != is_classifier
    tensors = load_file(tmp_path / "model.safetensors")
    lost = tensors.popitem()[0]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    what = "trained image classifier" if is_classifier else "complete model"
    with pytest.raises(ValueError, match=f"is no {what}: its weights lack {re.escape(lost)}"):
        check_folder(tmp_path)


def test_all_files_of_a_tokenizer_are_published(folder):
    names = ["additional_chat_templates/tools.jinja", "bpe.codes", "chat_template.jinja", "dict.txt"]
    names += ["sentencepiece.model"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert set(names) <= set(published_files(folder))


def test_the_command_evaluates_and_writes_a_card_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_offline")
    folder = tmp_path / "vit-tiny"
    shutil.copytree(DIGITS, folder, ignore=shutil.ignore_patterns("*.png", "examples", "README.md", "robustness.json"))
    files = [*published_files(folder), *(path.name for path in added_code(folder))]
    evaluation = ["--dataset_name", "digits", "--max_samples", "20", "--num_orders", "8"]
    dry, written, *refused = (
        run_cli("publish", folder, *arguments)
        for arguments in (
            ["--dry_run"],
            ["--card_only", "--repo_id", "org/offline", *evaluation],
            ["--card_only", "--execution_order", "first"],
            ["--repo_id", "org/offline"],
            ["--repo_id", "org/offline", "--plain_vit", "--execution_order", "first"],
        )
    )
    lines = dry.stdout.splitlines()
    assert dry.returncode == 0 and lines[0] == "To the repository (--repo_id), branch main:", dry.stderr
    assert {line.split()[-1] for line in lines[1 : len(files) + 2]} == {*files, "README.md"}
    assert written.returncode == 0, written.stderr
    assert f"Wrote {folder / 'README.md'}" in written.stdout.splitlines()
    assert ls.RobustnessReport.load(folder).num_images == 20
    text = (folder / "README.md").read_text()
    assert 'repo_id = "org/offline"' in text and all(f"]({name})" in text for name in PICTURES)
    assert len(metadata_load(folder / "README.md")["widget"]) == 4
    errors = []
    for result in refused:
        assert result.returncode == 2 and "Traceback" not in result.stderr
        errors += [line for line in result.stderr.splitlines() if line.startswith("hf-layershuffle: error: ")]
    assert len(errors) == 3
    assert "add --plain_vit" in errors[0]
    assert "'org/offline' was not published: the connection to the Hub failed" in errors[1]
    assert "HF_HUB_OFFLINE" in errors[1] and f"'{folder}' is complete" in errors[1]
    assert "`execution_order` is 'first'" in errors[2]
