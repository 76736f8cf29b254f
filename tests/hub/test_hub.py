"""Pushes to and loads from a small Hub on the loopback, by the real `huggingface_hub` client in fresh processes."""

import json
import re

import pytest
import yaml
from conftest import Architecture, run_python
from PIL import Image
from support.cards import PICTURES, describe
from support.hub_server import WRITE_TOKEN, HubServer
from transformers import ViTImageProcessor

from hf_layershuffle.hub.card_text import split_card
from hf_layershuffle.hub.published_files import package_code


CODE_FILES = [path.name for path in package_code()]


REPOSITORY = "org/vit-layershuffle"
# What every program of a fresh process starts with
PREPARE = """
import json, sys, urllib.request
from pathlib import Path
import torch
torch.set_num_threads(1)

def images():
    return torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def no_faults(hub):
    """How often a client tries again, and so whether it meets all faults of a test, depends on its version."""
    hub.faults.clear()


def save_model(folder, **flags):
    model = Architecture("vit").classifier(seed=1, **flags)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("models") / "vit-layershuffle", shuffle_mode="arbitrary")
    for name in ("training_args.bin", "trainer_state.json", ".env", "optimizer.pt", "notes.txt"):
        (folder / name).write_text("{}")
    for name in ("checkpoint-2/model.safetensors", "runs/events.json", "baseline/config.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    return folder


PUSH = (
    PREPARE
    + """
import hf_layershuffle as ls
from hf_layershuffle.hub.publishing import publish
from hf_layershuffle.hub.plain_vit_folder import publish_with_plain_vit
from transformers import ViTImageProcessor

folder, second, sources, token = map(str, sys.argv[1:])
commit = publish(folder, "org/vit-layershuffle", private=True, commit_message="First version", token=token)
model = ls.LayerShuffleViTForImageClassification.from_pretrained(folder).eval()
report = ls.evaluate_robustness(
    model, [{"pixel_values": image, "labels": i % 5} for i, image in enumerate(torch.randn(8, 3, 8, 8))],
    num_orders=8, num_subsets=2, progress=False, model_name="tiny", dataset_name="noise",
)
report.push_to_hub("org/vit-layershuffle")
report.push_to_hub("org/report-alone")
publish_with_plain_vit(folder, "org/vit-layershuffle", execution_order=[3, 0, 1])
publish_with_plain_vit(folder, "org/other", plain_repo_id="org/other-plain", revision="v1")
model.push_to_hub("org/from-memory", revision="dev", tags=["tiny"],
                  image_processor=ViTImageProcessor.from_pretrained(folder), commit_message="From memory")
model.save_pretrained(folder + "/../saved", push_to_hub=True, repo_id="org/saved", commit_message="Saved")
publish(sources, "org/merged")

arguments = ls.LayerShuffleTrainingArguments(
    folder + "/../trained", max_steps=1, use_cpu=True, report_to="none", save_steps=1, hub_model_id="org/trained"
)
items = [{"pixel_values": image, "labels": i % 5} for i, image in enumerate(torch.randn(8, 3, 8, 8))]
trainer = ls.LayerShuffleTrainer(
    ls.LayerShuffleViTForImageClassification.from_pretrained(folder), arguments, train_dataset=items,
    processing_class=ViTImageProcessor.from_pretrained(folder),
)
trainer.train()
trainer.push_to_hub(dataset="noise", tags=["trained"])
torch.save(model(images(), execution_order=[3, 0, 1]).logits, second)
print(commit.oid)
"""
)


@pytest.fixture(scope="module")
def pushed(hub, model_folder, tmp_path_factory):
    """Everything that can be pushed, once; the server then holds it. Returns the file with the expected logits."""
    home = tmp_path_factory.mktemp("home")
    merged = save_model(home / "merged", shuffle_mode="arbitrary")
    sources = {"a": {"path": "org/a", "revision": "0" * 40}, "b": {"path": "org/b", "revision": "1" * 40}}
    (merged / "merge_plan.yaml").write_text(yaml.safe_dump({"sources": sources, "layers": []}))
    result = run_python(PUSH, model_folder, home / "logits.pt", merged, WRITE_TOKEN, environment=hub.environment(home))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1:] == [list(hub.repositories[REPOSITORY].commits)[1]]
    return home / "logits.pt"


def card_of(repository, branch="main") -> tuple[dict, str]:
    _, metadata, body = split_card(repository.files(branch)["README.md"].decode())
    return metadata, body


def test_a_folder_arrives_whole_and_in_one_commit(hub, pushed, model_folder):
    repository = hub.repositories[REPOSITORY]
    assert repository.private
    initial, first, *_ = repository.history()
    assert (initial.message, first.message) == ("initial commit", "First version")
    expected = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", *CODE_FILES}
    assert set(first.files) == {".gitattributes", *expected}
    for name in expected - {"README.md"}:
        assert first.files[name] == (model_folder / name).read_bytes()
    auto_map = json.loads(first.files["config.json"])["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}


def test_a_report_joins_its_model_in_one_commit(hub, pushed):
    first, second = hub.repositories[REPOSITORY].history()[1:3]
    assert second.message == "Upload robustness report"
    pictures = {"order_distribution.png", "pruning_curves.png", "layer_ablation.png"}
    assert set(second.files) - set(first.files) == {"robustness.json", *pictures}
    report = json.loads(second.files["robustness.json"])
    metadata, body = card_of(hub.repositories[REPOSITORY])
    metrics = metadata["model-index"][0]["results"][0]["metrics"]
    assert metrics[0]["value"] == round(report["sequential"]["accuracy"], 4)
    assert all(f"]({name})" in body for name in pictures)
    assert "Not evaluated" in first.files["README.md"].decode() and "Not evaluated" not in body


def test_a_report_without_a_model_makes_its_repository(hub, pushed):
    assert "robustness.json" in hub.repositories["org/report-alone"].files()
    assert (
        "on `noise`" in card_of(hub.repositories["org/report-alone"])[1]
        or "of `noise`" in card_of(hub.repositories["org/report-alone"])[1]
    )


def test_a_model_in_memory_arrives_with_code_processor_and_card_in_one_commit(hub, pushed):
    repository = hub.repositories["org/from-memory"]
    assert [commit.message for commit in repository.history("dev")] == ["initial commit", "From memory"]
    assert set(repository.files("main")) == {".gitattributes"}
    files = repository.files("dev")
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", *CODE_FILES} <= set(files)
    metadata, body = card_of(repository, "dev")
    assert "tiny" in metadata["tags"]
    assert 'repo_id = "org/from-memory"' in body and 'from_pretrained(repo_id, revision="dev")' in body


def test_saving_can_push_in_one_commit(hub, pushed):
    history = hub.repositories["org/saved"].history()
    assert [commit.message for commit in history] == ["initial commit", "Saved"]
    assert {"config.json", "model.safetensors", *CODE_FILES} <= set(history[-1].files)
    assert "layershuffle" in card_of(hub.repositories["org/saved"])[0]["tags"]


def test_a_trainer_pushes_in_one_commit_and_no_pickle(hub, pushed):
    history = hub.repositories["org/trained"].history()
    assert [commit.message for commit in history] == ["initial commit", "End of training"]
    expected = {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "training.json",
        *CODE_FILES,
    }
    assert set(history[-1].files) == {".gitattributes", *expected}
    metadata, body = card_of(hub.repositories["org/trained"])
    assert "datasets" not in metadata and "trained" in metadata["tags"]  # it is no dataset of the Hub
    assert "Trained on 8 images of `noise`." in body
    assert "| `max_steps` | `1` |" in body


def test_a_merged_folder_names_its_sources(hub, pushed):
    repository = hub.repositories["org/merged"]
    assert "merge_plan.yaml" in repository.files()
    metadata, body = card_of(repository)
    assert metadata["base_model"] == ["org/a", "org/b"]
    assert metadata["base_model_relation"] == "merge"
    assert "| a | `org/a` | 0000000" in body


def test_a_plain_vit_lies_beside_its_model(hub, pushed):
    repository = hub.repositories[REPOSITORY]
    plain = {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "export.json",
    }
    assert set(repository.files("plain-vit")) == plain  # neither the code nor the report of the other model
    assert len(repository.history("plain-vit")) == len(repository.history()) + 1
    assert set(hub.repositories["org/other-plain"].files()) == plain
    assert "model.safetensors" not in hub.repositories["org/other"].files()
    assert "model.safetensors" in hub.repositories["org/other"].files("v1")
    metadata, body = card_of(repository, "plain-vit")
    assert metadata["base_model"] == REPOSITORY and "trust_remote_code" not in body
    assert "fixed order [3, 0, 1]" in body


LOAD = (
    PREPARE
    + """
how, expected, image = sys.argv[1:]
if how == "package":
    import hf_layershuffle
    remote = {}
else:
    sys.modules["hf_layershuffle"] = None  # not installed
    remote = {"trust_remote_code": True}
from transformers import AutoModel, AutoModelForImageClassification, pipeline

expected = torch.load(expected)
base, info = AutoModel.from_pretrained("org/vit-layershuffle", output_loading_info=True, **remote)
assert all(key.startswith("pooler.") for key in info["missing_keys"]), info
model = AutoModelForImageClassification.from_pretrained("org/vit-layershuffle", **remote).eval()
torch.testing.assert_close(model(images(), execution_order=[3, 0, 1]).logits, expected)
assert type(model).__module__.startswith("hf_layershuffle" if how == "package" else "transformers_modules")
assert len(pipeline("image-classification", model="org/vit-layershuffle", **remote)(image)) == 5
memory = AutoModelForImageClassification.from_pretrained("org/from-memory", revision="dev", **remote).eval()
torch.testing.assert_close(memory(images(), execution_order=[3, 0, 1]).logits, expected)

for where in ({"revision": "plain-vit"}, {"repository": "org/other-plain"}):
    repository = where.pop("repository", "org/vit-layershuffle")
    plain = AutoModelForImageClassification.from_pretrained(repository, **where).eval()
    assert type(plain).__module__ == "transformers.models.vit.modeling_vit", type(plain)
    if where:
        assert len(plain.vit.layers) == 3
        torch.testing.assert_close(plain(images()).logits, expected)

# The card's own examples
import os, re
from huggingface_hub import hf_hub_download
os.chdir(os.path.dirname(image))
card = Path(hf_hub_download("org/vit-layershuffle", "README.md")).read_text()
blocks = re.findall("```python\\n(.*?)```", card, re.DOTALL)
assert len(blocks) == 3
for block in blocks:
    if ("import hf_layershuffle" in block) == (how == "package"):
        exec(block, {})
plain_card = Path(hf_hub_download("org/vit-layershuffle", "README.md", revision="plain-vit")).read_text()
(block,) = re.findall("```python\\n(.*?)```", plain_card, re.DOTALL)
exec(block, {})
"""
)


@pytest.mark.parametrize("how", ["package", "remote code"])
def test_what_was_pushed_loads_in_a_fresh_process(hub, pushed, tmp_path, how):
    Image.new("L", (20, 30), 77).save(tmp_path / "image.png")
    environment = hub.environment(tmp_path / "home") | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = run_python(LOAD, how, pushed, tmp_path / "image.png", environment=environment)
    assert result.returncode == 0, result.stderr


UPDATE = (
    PREPARE
    + """
import hf_layershuffle as ls
from huggingface_hub import HfApi
from hf_layershuffle.hub.publishing import publish

folder, second, repo_id = sys.argv[1], Path(sys.argv[2]), "org/updated"
publish(folder, repo_id)
messages = []

def attempt(report, to=repo_id, **kwargs):
    try:
        report.push_to_hub(to, **kwargs)
    except ValueError as error:
        messages.append(str(error))

model = ls.LayerShuffleViTForImageClassification.from_pretrained(folder).eval()
other = ls.LayerShuffleViTForImageClassification.from_pretrained(folder).eval()
torch.nn.init.normal_(other.classifier.weight)
items = [{"pixel_values": image, "labels": i % 5} for i, image in enumerate(torch.randn(8, 3, 8, 8))]
of_other = ls.evaluate_robustness(other, items, num_orders=1, num_subsets=1, progress=False, model_name="other")
attempt(of_other)
attempt(of_other, revision="refused")
HfApi().create_repo("org/adapter")
for name in ("adapter_config.json", "adapter_model.safetensors"):
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id="org/adapter")
attempt(of_other, "org/adapter", revision="new")
HfApi().upload_file(path_or_fileobj=f"{folder}/config.json", path_in_repo="config.json", repo_id="org/adapter")
attempt(of_other, "org/adapter")
merges = ls.evaluate_random_merges({"a": model, "b": other}, items, num_merges=2, progress=False)
attempt(merges)
# Other weights than those that the Hub has results and examples of
HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="examples/mine.png", repo_id=repo_id)
other.save_pretrained(second)
(second / "training.json").write_text('{"license": "apache-2.0"}')
publish(second, repo_id)
# A person changes the licence on the Hub, and nothing else
(second / "training.json").write_text('{"license": "other"}')
card = (second / "README.md").read_text()
assert "license: other" in card
HfApi().upload_file(
    path_or_fileobj=card.replace("\\nlicense: other", "\\nlicense: cc-by-4.0").encode(), path_in_repo="README.md",
    repo_id=repo_id,
)
publish(second, repo_id)
# Then here
card = (second / "README.md").read_text()
assert "license: cc-by-4.0" in card
(second / "README.md").write_text(card.replace("\\nlicense: cc-by-4.0", "\\nlicense: openrail"))
publish(second, repo_id)
print(json.dumps(messages))
"""
)


def test_reports_are_of_the_model_on_the_hub_and_go_with_it(hub, tmp_path):
    folder = describe(tmp_path / "vit-tiny")
    path = folder / "README.md"
    path.write_text(path.read_text().replace("license: mit", "license: other"))
    result = run_python(UPDATE, folder, tmp_path / "second", environment=hub.environment(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    message, again = json.loads(result.stdout)
    assert re.match("'robustness.json' is a report of other weights than those of 'org/updated'. Push it to", message)
    assert again == message and set(hub.repositories["org/updated"].branches) == {"main"}
    adapter = hub.repositories["org/adapter"]
    assert "robustness.json" in adapter.commits[adapter.branches["new"]].files
    history = hub.repositories["org/updated"].history()
    first, merges, mine, last, _, relicensed, again = history[1:]
    for commit, license in ((relicensed, "cc-by-4.0"), (again, "openrail")):
        assert split_card(commit.files["README.md"].decode())[1]["license"] == license
    assert set(merges.files) - set(first.files) == {"random_merges.json", "random_merges.png"}
    before, after = (split_card(commit.files["README.md"].decode()) for commit in (merges, last))
    assert "](random_merges.png)" in before[2] and {"model-index", "widget", "base_model"} <= set(before[1])
    assert not {"model-index", "widget", "base_model", "base_model_relation"} & set(after[1])
    assert "Not evaluated" in after[2] and after[1]["license"] == "other"
    removed = {"robustness.json", "random_merges.json", *PICTURES, "random_merges.png"}
    assert set(mine.files) - set(last.files) >= removed and "examples/mine.png" in last.files
    assert not {"examples/0.png", "examples/examples.json"} & set(last.files)


FAIL = (
    PREPARE
    + """
import os, urllib.request
from hf_layershuffle.checkpoints import hub_connection
from hf_layershuffle.hub.publishing import publish

hub_connection.WAITS = (0, 0)

def attempt(fault, **kwargs):
    request = urllib.request.Request(os.environ["HF_ENDPOINT"] + "/_faults", json.dumps(fault).encode(), method="POST")
    urllib.request.urlopen(request).read()
    try:
        return ["published", publish(sys.argv[1], "org/unlucky", **kwargs).commit_message]
    except OSError as error:
        return ["OSError", str(error)]

commit, create = {"method": "POST", "path": "/commit/"}, {"method": "POST", "path": "/api/repos/create"}
print(json.dumps({
    "dropped at the start": attempt([create | {"status": "drop", "times": 9}]),
    "no token": attempt([], token=False),
    "unknown token": attempt([], token="hf_unknown"),
    "read token": attempt([], token="hf_read"),
    "no such owner": attempt([create | {"status": 404, "message": "Organization not found"}]),
    "dropped at the end": attempt([commit | {"status": "drop", "times": 9}]),
    "conflict": attempt([commit | {"status": 409, "message": "A commit has happened since"}]),
    "race": attempt([commit | {"status": "race"}]),
    "server error": attempt([commit | {"status": 500, "times": 9}]),
    "bad gateway": attempt([create | {"status": 502, "times": 9}]),
    "upload dropped once": attempt([{"method": "PUT", "path": "/lfs/", "status": "drop"}]),
}))
"""
)


def test_a_failed_upload_says_what_to_do_and_leaves_the_folder_complete(hub, tmp_path):
    folder = save_model(tmp_path / "unlucky", shuffle_mode="arbitrary", hidden_size=48)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = run_python(FAIL, folder, environment=hub.environment(tmp_path))
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout)
    expected = {
        "dropped at the start": "the connection to the Hub failed",
        "no token": r"the token, or there is none \(401\).*hf auth login",
        "unknown token": r"does not know the token, or there is none \(401\).*hf auth login",
        "read token": r"may not do this \(403\).*write access to 'org'",
        "no such owner": r"does not find it \(404\).*Organization not found.*'org' exists",
        "dropped at the end": "the connection to the Hub failed",
        "conflict": r"changed by somebody else at the same time \(409\).*A commit has happened since",
        "race": r"changed by somebody else at the same time \(412\).*Please refresh",
        "server error": r"problem of its own \(500\).*try later",
        "bad gateway": r"problem of its own \(502\)",
    }
    for name, message in expected.items():
        kind, text = outcomes[name]
        assert kind == "OSError" and re.search(message, text), (name, text)
        assert text.endswith(f"'{folder}' is complete: publish it again when that is mended."), text
    assert outcomes["upload dropped once"] == ["published", "Upload model"]
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    messages = [commit.message for commit in hub.repositories["org/unlucky"].history()]
    assert messages == ["initial commit", "Somebody else's", "Upload model"]


COMMANDS = (
    PREPARE
    + """
import contextlib, io, os
from huggingface_hub import HfApi, hf_hub_download
from hf_layershuffle_cli import main

folder, with_depth = map(Path, sys.argv[1:])
repo_id = "org/vit-command"

def command(*arguments):
    sys.argv = ["hf-layershuffle", "publish", *map(str, arguments)]
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main()
        except SystemExit as error:
            code = error.code
    return {"code": code or 0, "output": output.getvalue(), "errors": errors.getvalue()}

def edit_on_the_hub(old, new):
    text = Path(hf_hub_download(repo_id, "README.md")).read_text()
    assert old in text
    HfApi().upload_file(path_or_fileobj=text.replace(old, new).encode(), path_in_repo="README.md", repo_id=repo_id)

results = {"first": command(folder, "--repo_id", repo_id, "--license", "mit")}
# A person edits the card on the Hub; pushing again keeps that, here and there
edit_on_the_hub("# vit-command", "# vit-command\\n\\nMind the gap.")
edit_on_the_hub("\\nlicense: mit", "\\nlicense: cc-by-nc-4.0")
results["again"] = command(folder, "--repo_id", repo_id, "--plain_vit")
results["card here"] = (folder / "README.md").read_text()
results["card there"] = Path(hf_hub_download(repo_id, "README.md")).read_text()
# Then in both places
edit_on_the_hub("Mind the gap.", "Mind the step.")
(folder / "README.md").write_text(results["card here"].replace("Mind the gap.", "Mind the stairs."))
results["both"] = command(folder, "--repo_id", repo_id)
results["kept here"] = (folder / "README.md").read_text()
results["kept there"] = Path(hf_hub_download(repo_id, "README.md")).read_text()
results["overwrite"] = command(folder, "--repo_id", repo_id, "--overwrite_card", "--commit_message", "Mine")
results["mine"] = Path(hf_hub_download(repo_id, "README.md")).read_text()
results["read token"] = command(folder, "--repo_id", "org/refused", "--token", "hf_read")
results["not a member"] = command(folder, "--repo_id", "others/refused")
results["only a reader"] = command(folder, "--repo_id", "readers/refused")
results["depth"] = command(with_depth, "--repo_id", "org/refused", "--plain_vit")
results["no repo_id"] = command(folder)
results["no folder"] = command(folder / "missing", "--repo_id", repo_id)
results["bad name"] = command(folder, "--repo_id", "a/b/c")
print(json.dumps(results))
"""
)


def test_the_command_publishes_and_keeps_what_persons_wrote(hub, tmp_path):
    folder = save_model(tmp_path / "vit-command", shuffle_mode="arbitrary", hidden_size=64)
    with_depth = save_model(tmp_path / "vit-depth", shuffle_mode="arbitrary", depth_embedding=True)
    result = run_python(COMMANDS, folder, with_depth, environment=hub.environment(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    results, repository = json.loads(result.stdout), hub.repositories["org/vit-command"]
    first = next(sha for sha, commit in repository.commits.items() if commit.message == "Upload model")
    assert results["first"]["output"] == f"Published {hub.endpoint}/org/vit-command/commit/{first}\n"
    assert split_card(results["card there"])[1]["license"] == "cc-by-nc-4.0"
    for name in ("first", "again", "overwrite"):
        assert results[name]["code"] == 0, results[name]

    assert "Mind the gap." in results["card here"] and "Mind the gap." in results["card there"]
    assert "plain-vit" in repository.branches
    assert_refused(results["both"], r"edited both here and on the Hub \(org/vit-command\).*--overwrite_card")
    assert "Mind the stairs." in results["kept here"] and "Mind the step." in results["kept there"]
    assert "Mind the stairs." in results["mine"] and repository.history()[-1].message == "Mine"

    assert_refused(results["read token"], "'org/refused' was not published: the token may only read; .*'org'")
    assert_refused(results["not a member"], "'others' is neither the token's account nor one of .* me, org, readers")
    assert_refused(results["only a reader"], "the token may only read; .*'readers'")
    assert_refused(results["depth"], "`depth_embedding=True` cannot become a plain ViT")
    assert_refused(results["no repo_id"], "`repo_id` is missing.*--card_only")
    assert_refused(results["no folder"], "There is no folder")
    assert_refused(results["bad name"], "a/b/c")
    assert not any("refused" in name for name in hub.repositories)


def assert_refused(result: dict, message: str) -> None:
    assert result["code"] == 2, result
    lines = [line for line in result["errors"].splitlines() if line.startswith("hf-layershuffle: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), result["errors"]
    assert "Traceback" not in result["errors"]
