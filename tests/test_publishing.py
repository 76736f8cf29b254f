"""Cards, examples and plain ViTs, without a network; `test_hub.py` pushes them."""

import json
import re
import shutil

import pytest
import torch
import yaml
from conftest import REPOSITORY, Architecture, of_both_architectures, run_cli
from datasets import Array2D, ClassLabel, Dataset, Features
from huggingface_hub import EvalResult, ModelCard, metadata_load
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessor, pipeline

import hf_layershuffle as ls
from hf_layershuffle.checkpoints.identity import weights_digest
from hf_layershuffle.checkpoints.image_processors import load_image_processor
from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.data.datasets import load_image_datasets
from hf_layershuffle.deployment.plain_vit import to_plain_vit
from hf_layershuffle.hub.card_examples import copy_examples, write_examples
from hf_layershuffle.hub.card_text import combine_cards, is_edited, mark_published, split_card, update_card_text
from hf_layershuffle.hub.folder_records import record_baseline, record_training
from hf_layershuffle.hub.model_card import SOURCE_NAME, build_model_card, write_model_card
from hf_layershuffle.hub.plain_vit_folder import save_plain_vit
from hf_layershuffle.hub.published_files import added_code, check_folder, package_code, published_files
from hf_layershuffle.plotting import save_report_pictures
from hf_layershuffle_cli import main


DIGITS = REPOSITORY / "model_cards" / "vit-digits-layershuffle"
PICTURES = ("order_distribution.png", "pruning_curves.png", "layer_ablation.png")


def save_model(folder, **flags):
    model = Architecture("vit").classifier(**{"shuffle_mode": "arbitrary", **flags}).eval()
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return model


def images(num_images: int = 10) -> Dataset:
    features = Features({"image": Array2D((8, 8), "uint8"), "label": ClassLabel(names=["a", "b", "c", "d", "e"])})
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (num_images, 8, 8), generator=generator, dtype=torch.uint8).numpy()
    return Dataset.from_dict({"image": pixels, "label": [i % 5 for i in range(num_images)]}, features=features)


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A folder with everything that a card can show."""
    folder = tmp_path_factory.mktemp("models") / "vit-tiny"
    model, processor = save_model(folder), ViTImageProcessor(size={"height": 8, "width": 8})
    arguments = {"learning_rate": 5e-4, "seed": 3, "max_steps": -1, "logging_dir": "/home/me"}
    metrics = {"eval_accuracy": 0.5, "eval_runtime": 3.0}
    record_training(folder, arguments=arguments, dataset="org/letters", base_model="google/vit-tiny", metrics=metrics)
    report = ls.evaluate_robustness(
        model,
        images(),
        image_processor=processor,
        num_orders=8,
        num_subsets=2,
        model_name="vit-tiny",
        dataset_name="org/letters",
        progress=False,
    )
    report.save(folder)
    save_report_pictures({report.model: report}, folder)
    write_examples(folder, images(), processor)
    assert write_model_card(folder, repo_id="org/vit-tiny", license="mit")
    return folder


@pytest.fixture
def folder(described, tmp_path):
    return shutil.copytree(described, tmp_path / "vit-tiny")


# --- What a card says ---


def test_the_metadata_is_what_the_hub_understands(described):
    data = metadata_load(described / "README.md")
    assert ModelCard.load(described / "README.md").data.to_dict() == data
    assert data["pipeline_tag"] == "image-classification" and data["library_name"] == "transformers"
    assert data["tags"] == ["layershuffle", "vision-transformer"]
    assert data["datasets"] == ["org/letters"] and data["license"] == "mit"
    assert data["base_model"] == "google/vit-tiny" and data["base_model_relation"] == "finetune"


def test_the_model_index_holds_the_reports_results(described):
    report = ls.RobustnessReport.load(described)
    results = ModelCard.load(described / "README.md").data.eval_results
    assert all(isinstance(result, EvalResult) and result.source_name == SOURCE_NAME for result in results)
    values = {result.metric_name: result for result in results}
    assert values["Accuracy, sequential order"].metric_value == round(report.sequential.accuracy, 4)
    arbitrary = values["Accuracy, arbitrary orders (mean)"]
    assert arbitrary.metric_value == round(report.arbitrary.accuracy.mean, 4)
    assert arbitrary.metric_args == {"num_orders": 8, "seed": 0, "std": round(report.arbitrary.accuracy.std, 4)}
    pruned = report.pruning["arbitrary"][1].accuracy
    assert values["Accuracy, 2 of 4 layers, arbitrary order (mean)"].metric_value == round(pruned.mean, 4)
    assert values["Accuracy, 2 of 4 layers, evenly spaced"].metric_value == round(
        report.pruning["evenly_spaced"][1].accuracy.mean, 4
    )


def test_the_text_shows_table_pictures_arguments_and_three_ways_to_load(described):
    text, report = (described / "README.md").read_text(), ls.RobustnessReport.load(described)
    for name, row in report.rows().items():
        accuracy = row.accuracy if isinstance(row.accuracy, float) else row.accuracy.mean
        assert any(line.startswith(f"| {name} | {accuracy:.4f} |") for line in text.splitlines()), name
    assert all(f"]({name})" in text and (described / name).exists() for name in PICTURES)
    assert "| `learning_rate` | `0.0005` |" in text
    assert "/home/me" not in text and "`max_steps`" not in text
    assert "import hf_layershuffle" in text and "trust_remote_code=True" in text and "pipeline(" in text
    assert f"torch {torch.__version__}" in text and "2407.04513" in text and "## Limits" in text


def test_widget_examples_are_files_with_this_models_answers(described):
    widget = metadata_load(described / "README.md")["widget"]
    classify = pipeline("image-classification", model=str(described))
    assert [entry["example_title"] for entry in widget] == ["Class a"]  # this untrained model knows no other class
    assert "first ones of their classes that this model classifies correctly" in (described / "README.md").read_text()
    for row, entry in enumerate(widget):
        image = Image.open(described / entry["src"])
        assert image.size == (96, 96)
        assert (torch.tensor(list(image.resize((8, 8), Image.Resampling.NEAREST).tobytes())).view(8, 8)
                == torch.tensor(images()[row]["image"])).all()  # fmt: skip
        answers = {answer["label"]: answer["score"] for answer in classify(str(described / entry["src"]), top_k=5)}
        assert [answer["label"] for answer in entry["output"]] == list(answers)
        for answer in entry["output"]:
            assert answer["score"] == pytest.approx(answers[answer["label"]], abs=1e-4)


def test_grey_models_answer_grey_images(tmp_path):
    save_model(tmp_path, num_channels=1)
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    (entry,) = write_examples(tmp_path, images(), processor, num_examples=2, top_k=3)
    assert len(entry["output"]) == 3
    with pytest.raises(ValueError, match="`num_examples` is 0"):
        write_examples(tmp_path, images(), processor, num_examples=0)


def test_examples_are_images_that_the_model_has_right(tmp_path):
    """The first of its class, unless the model errs there, or knows none of that class."""
    folder = shutil.copytree(DIGITS, tmp_path / "digits")
    model, processor = load_classifier(str(folder)).eval(), load_image_processor(folder)
    dataset = load_image_datasets("digits")["test"]
    scores = ls.score_execution_orders(
        model, dataset.select([0]), [list(range(6))], image_processor=processor, progress=False
    )
    assert scores[0].accuracy == 1  # it is a 3, and called a 5 here: another 5 must be shown
    dataset = dataset.select(range(40)).map(
        lambda row, index: {"label": 5 if index == 0 else row["label"]}, with_indices=True
    )
    dataset = dataset.filter(lambda row: row["label"] in (1, 5, 7)).map(
        lambda row: {"label": {1: 2}.get(row["label"], row["label"])}
    )
    entries = write_examples(folder, dataset, processor)
    assert [entry["example_title"] for entry in entries] == ["Class 5", "Class 7"]  # each 1 is called a 2
    assert all(entry["output"][0]["label"] == entry["example_title"][-1] for entry in entries)
    assert {path.name for path in (folder / "examples").iterdir()} == {"0.png", "1.png", "examples.json"}
    assert not write_examples(folder, dataset.filter(lambda row: row["label"] == 2), processor)
    assert not (folder / "examples").exists()


def test_a_bare_folder_gets_a_card_too(tmp_path):
    save_model(tmp_path, shuffle_mode="none")
    assert write_model_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Not evaluated." in text and "The training arguments are not recorded." in text
    assert "model-index" not in metadata_load(tmp_path / "README.md")
    assert "the results above" not in text


@of_both_architectures
@pytest.mark.parametrize("with_report", [False, True])
def test_a_plain_folders_card_promises_nothing_of_ours(architecture, tmp_path, with_report):
    model, processor = architecture.plain_classifier(), ViTImageProcessor(size={"height": 8, "width": 8})
    model.save_pretrained(tmp_path)
    if with_report:
        names = {"model_name": "plain", "dataset_name": "org/letters"}
        sizes = {"num_orders": 1, "num_subsets": 1, "progress": False}
        ls.evaluate_robustness(model, images(), image_processor=processor, **names, **sizes).save(tmp_path)
    check_folder(tmp_path)
    write_model_card(tmp_path, repo_id="org/plain", revision="old")
    text, tags = (tmp_path / "README.md").read_text(), metadata_load(tmp_path / "README.md")["tags"]
    assert f"A plain `{architecture.name}` image classifier with 4 layers" in text and tags == ["vision-transformer"]
    assert "takes no `execution_order=`: transformers ignores it" in text
    assert "trust_remote_code" not in text and "code files" not in text and "any order:" not in text
    assert 'pipeline("image-classification", model=repo_id, revision="old")' in text
    assert 'load_classifier("org/plain", revision="old")' in text and "git+https://" in text
    assert ("were run by the package hf-layershuffle" in text) == with_report
    # What it says of both ways is so
    plain = AutoModelForImageClassification.from_pretrained(tmp_path)
    pixels = torch.rand(1, 3, 8, 8)
    assert torch.equal(plain(pixels, execution_order=[3, 2, 1, 0]).logits, plain(pixels).logits)
    ours = load_classifier(str(tmp_path)).eval()
    assert not torch.equal(ours(pixels, execution_order=[3, 2, 1, 0]).logits, plain(pixels).logits)


@pytest.mark.parametrize("kind", ["classifier", "plain_classifier"])
def test_a_pruned_folder_says_what_it_is_of(vit, tmp_path, kind):
    whole = getattr(vit, kind)()
    whole.config._name_or_path = "org/whole"
    ls.prune_layers(whole, [3, 0]).save_pretrained(tmp_path)
    card = build_model_card(tmp_path)
    assert "Its layers are [3, 0] of the 4 of `org/whole`, in this order." in card.text
    assert "Pruned from `org/whole`, whose card tells how it was trained." in card.text
    assert "are not recorded" not in card.text and card.data.base_model == "org/whole"
    whole.config._name_or_path = ""
    ls.prune_layers(whole, [3, 0]).save_pretrained(tmp_path)
    card = build_model_card(tmp_path)
    assert "[3, 0] of the 4 of another model" in card.text and "are not recorded" in card.text


def test_a_merged_folder_is_described_by_its_plan(folder):
    (folder / "training.json").unlink()
    sources = {"a": {"path": "org/a", "revision": "c0ffee"}, "b": {"path": "/home/me/b", "revision": None}}
    (folder / "merge_plan.yaml").write_text(yaml.safe_dump({"sources": sources}))
    card = build_model_card(folder)
    assert card.data.base_model == "org/a"  # the other is no model of the Hub
    assert card.data.to_dict()["base_model_relation"] == "merge" and "merge" in card.data.tags
    assert "| a | `org/a` | c0ffee |" in card.text and "merged layer by layer from 2 models" in card.text
    assert "| b | not published |  |" in card.text and "/home/me" not in card.text
    assert "can run in any order" not in card.text and "depends on how the merged models were trained" in card.text
    assert "Fine-tuned" not in card.text and "## Training" not in card.text
    # The same from the configuration alone
    (folder / "merge_plan.yaml").unlink()
    config = json.loads((folder / "config.json").read_text()) | {"merge_plan": {"sources": sources}}
    (folder / "config.json").write_text(json.dumps(config))
    assert build_model_card(folder).data.base_model == "org/a"


def test_a_report_of_other_weights_is_refused(folder):
    before = (folder / "README.md").read_bytes()
    Architecture("vit").classifier(seed=9, shuffle_mode="arbitrary").save_pretrained(folder)
    with pytest.raises(ValueError, match="a report of other weights than those beside it"):
        write_model_card(folder)
    assert (folder / "README.md").read_bytes() == before


def test_a_report_of_another_depth_is_refused(folder):
    (folder / "model.safetensors").unlink()  # as where a report joins a model on the Hub
    assert write_model_card(folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="a model with 4 layers, and 'vit-tiny' has 3"):
        write_model_card(folder)


def test_a_base_model_gets_a_card_too(vit, tmp_path):
    vit.model_class(vit.config(shuffle_mode="arbitrary")).save_pretrained(tmp_path)
    check_folder(tmp_path)
    assert write_model_card(tmp_path, tags=["encoder"])
    assert "encoder" in metadata_load(tmp_path / "README.md")["tags"]


def test_a_card_says_how_large_the_model_is_and_how_it_was_trained(tmp_path):
    model = save_model(tmp_path, residual_init_scale=0.0, layerdrop=0.2, initializer_range=0.0561)
    arguments = {"num_train_epochs": 8.0, "orders_per_step": 4, "learning_rate": 1e-3}
    kwargs = {"dataset": "org/letters", "num_train_images": 60000, "metrics": {"eval_accuracy": 0.5}}
    record_training(tmp_path, arguments=arguments, **kwargs)
    card = build_model_card(tmp_path)
    size = f"It has {model.num_parameters():,} parameters, a width of {model.config.hidden_size} and "
    assert size in card.text and "reads images of 8 × 8 pixels in patches of 4" in card.text
    assert "Trained on 60,000 images of `org/letters`, 8 epochs." in card.text
    for name, value in {
        "orders_per_step": 4,
        "shuffle_mode": "arbitrary",
        "layerdrop": 0.2,
        "residual_init_scale": 0.0,
        "initializer_range": 0.0561,
    }.items():
        assert f"| `{name}` | `{value}` |" in card.text
    assert "`position_predictor`" not in card.text
    arguments = arguments | {"max_steps": 7}  # which the epochs then are not
    record_training(tmp_path, arguments=arguments, dataset="org/letters", num_train_images=60000)
    assert "Trained on 60,000 images of `org/letters`.\n" in build_model_card(tmp_path).text


@pytest.mark.parametrize("name", ["my-run", "outputs/my-run", "../my-run", "/home/me/my-run"])
def test_a_card_names_only_what_others_can_find(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "my-run").mkdir(parents=True)
    save_model(tmp_path / "model")
    record_training("model", arguments={}, dataset=name, base_model=name, teacher=name)
    card = build_model_card("model")
    assert card.data.base_model is None and card.data.datasets is None
    assert "Fine-tuned from a checkpoint that is not published." in card.text
    assert "Distilled from a model that is not published" in card.text
    assert "base_model_relation" not in card.data.to_dict()
    record_training("model", arguments={}, dataset="org/letters", base_model="org/vit", teacher="org/teacher")
    card = build_model_card("model")
    assert card.data.base_model == "org/vit" and card.data.datasets == ["org/letters"]
    assert "Fine-tuned from `org/vit`." in card.text and "Distilled from `org/teacher`" in card.text


def test_a_measured_baseline_stands_in_the_results(folder):
    report = ls.RobustnessReport.load(folder)
    record_baseline(folder, "plain ViT", report)
    numbers = report.arbitrary.accuracy
    text = build_model_card(folder).text
    assert f"| plain ViT: sequential | {report.sequential.accuracy:.4f} |  |" in text
    assert f"| plain ViT: arbitrary | {numbers.mean:.4f} | {numbers.std:.4f} | {numbers.min:.4f} |  |  |  |" in text
    assert "for comparison (plain ViT), on the same images and over 8 arbitrary orders." in text
    (folder / "robustness.json").unlink()
    record_baseline(folder, "plain ViT", {"eval_accuracy": 0.25, "eval_arbitrary_accuracy": 0.125, "num_orders": 16})
    text = build_model_card(folder).text
    assert "| plain ViT: as configured | 0.2500 |" in text
    assert "| plain ViT: arbitrary, mean (16 orders) | 0.1250 |" in text


def test_a_licence_is_stated_kept_and_inherited(folder, tmp_path):
    assert "licence" not in (folder / "README.md").read_text()
    write_model_card(folder)
    assert metadata_load(folder / "README.md")["license"] == "mit" and "licence" not in build_model_card(folder).text
    bare = tmp_path / "bare"
    save_model(bare)
    assert "No licence is stated" in build_model_card(bare).text
    record_training(bare, arguments={}, base_model=str(folder))
    assert build_model_card(bare).data.license == "mit" and "No licence" not in build_model_card(bare).text
    save_plain_vit(folder, tmp_path / "plain", source="org/vit-tiny", execution_order=[0, 2])
    assert build_model_card(tmp_path / "plain").data.license == "mit"


def test_merged_and_pruned_models_have_a_card_and_a_licence(folder, tmp_path, monkeypatch):
    other, unlicensed = shutil.copytree(folder, tmp_path / "other"), shutil.copytree(folder, tmp_path / "third")
    write_model_card(unlicensed, license="apache-2.0")
    for sources, license in (([folder, other], "mit"), ([folder, unlicensed], None)):
        merged = tmp_path / f"merged-{license}"
        ls.merge(ls.MergePlan.average(list(map(str, sources))), merged, progress=False)
        card = ModelCard.load(merged / "README.md")
        assert card.data.license == license and card.data.model_name == merged.name
        assert "merged layer by layer from 2 models and not trained after that" in card.text
        assert f'"your-name/{merged.name}"' in card.text and "partial" not in card.text
    pruned = tmp_path / "pruned"
    monkeypatch.setattr(
        "sys.argv", ["hf-layershuffle", "prune", str(folder), "--keep", "2,0", "--output_dir", str(pruned)]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    card = ModelCard.load(pruned / "README.md")
    assert card.data.license == "mit" and "Its layers are [2, 0] of the 4 of another model" in card.text
    assert '"your-name/pruned"' in card.text


def test_a_card_says_how_to_get_a_live_widget(tmp_path):
    save_model(tmp_path / "vit")
    text = build_model_card(tmp_path / "vit", repo_id="org/vit").text
    assert "--repo_id org/vit --plain_vit_repo_id org/vit-plain" in text
    save_model(tmp_path / "depth", depth_embedding=True)
    text = build_model_card(tmp_path / "depth", repo_id="org/vit").text
    assert "no code from it" in text and "plain_vit_repo_id" not in text  # which it cannot become


@pytest.mark.parametrize("name", ["training.json", "export.json", "robustness.json", "merge_plan.yaml"])
def test_a_broken_record_is_named(folder, name):
    (folder / name).write_text("{ no: ] valid")
    with pytest.raises(ValueError, match=f"{name}' is not"):
        write_model_card(folder)


# --- What a person wrote stays ---


def test_a_renewed_card_is_the_fresh_one(folder):
    fresh = (folder / "README.md").read_text()
    earlier = re.sub(r"value: \S+", "value: 0.9999", fresh)
    assert earlier != fresh
    (folder / "README.md").write_text(earlier)
    write_model_card(folder, repo_id="org/vit-tiny")
    assert (folder / "README.md").read_text() == fresh


def test_writing_a_card_again_changes_nothing(folder):
    before = (folder / "README.md").read_bytes()
    assert write_model_card(folder, repo_id="org/vit-tiny")
    assert (folder / "README.md").read_bytes() == before


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_only_our_sections_and_metadata_are_renewed(folder, line_break):
    path = folder / "README.md"
    text = path.read_text()
    text = text.replace("# vit-tiny\n", "# My model\n\nTrained on a *rainy* day.\n")
    text = text.replace("<!-- hf-layershuffle: limits -->", "").replace(
        "<!-- /hf-layershuffle: limits -->", "Mine now."
    )
    text = text.replace("library_name: transformers", "language: [en]  # a comment\nlibrary_name: transformers")
    text = text.replace("tags:\n", "tags:\n- mine\n").replace("license: mit", "license: openrail")
    text = text.replace("pipeline_tag: image-classification", "pipeline_tag: image-feature-extraction")
    text = text.replace("widget:\n", "widget:\n- src: mine.png\n")
    path.write_bytes(text.replace("\n", line_break).encode())
    record_training(folder, arguments={"learning_rate": 0.125}, dataset="org/letters", tags=["new"])
    assert write_model_card(folder, repo_id="org/renamed")

    content = path.read_bytes().decode()
    assert content.count("\n") == content.count(line_break) and ("\r" in content) == ("\r" in line_break)
    content = content.replace("\r\n", "\n")
    assert "# My model\n\nTrained on a *rainy* day.\n" in content and "Mine now." in content
    assert "language: [en]  # a comment\n" in content
    assert "| `learning_rate` | `0.125` |" in content and "0.0005" not in content
    assert 'repo_id = "org/renamed"' in content and 'repo_id = "org/vit-tiny"' not in content
    data = metadata_load(path)
    assert data["tags"] == ["mine", "layershuffle", "vision-transformer", "new"]
    assert data["license"] == "openrail" and data["pipeline_tag"] == "image-feature-extraction"
    assert [entry["src"] for entry in data["widget"]] == ["mine.png", "examples/0.png"]


def test_a_persons_results_stay_beside_ours(folder):
    path = folder / "README.md"
    card = ModelCard.load(path)
    theirs = EvalResult("image-classification", "org/other", "Other", "f1", 0.125)
    card.data.eval_results = [theirs, *card.data.eval_results]
    card.save(path)
    (folder / "robustness.json").unlink()
    write_model_card(folder)
    results = ModelCard.load(path).data.eval_results
    assert [result.metric_value for result in results] == [0.125, 0.5]


@pytest.mark.parametrize("head", ["", "---\nlicense: mit # free\ntags: [one, two]\nwidget:\n- src: mine.png\n---\n"])
def test_a_card_without_our_sections_keeps_its_text(folder, head, caplog):
    path = folder / "README.md"
    path.write_text(f"{head}# Mine\n\nOnly my words.\n")
    assert not write_model_card(folder)
    assert "none of our sections" in caplog.text
    assert path.read_text().split("---\n")[-1] == "# Mine\n\nOnly my words.\n"
    data = metadata_load(path)
    assert data["pipeline_tag"] == "image-classification" and "layershuffle" in data["tags"]
    if head:
        assert data["license"] == "mit" and data["tags"][:2] == ["one", "two"]
        assert "license: mit # free\n" in path.read_text()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"---\ntags: [a\n---\n# x\n", "not valid YAML.*Mend or remove"),
        (b"---\n- a\n---\n# x\n", "not a mapping"),
        (b"\xff\xfe# x", "not text in UTF-8"),
    ],
)
def test_a_card_that_cannot_be_read_is_left_alone(folder, content, message):
    (folder / "README.md").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        write_model_card(folder)
    assert (folder / "README.md").read_bytes() == content


def test_metadata_written_in_unusual_ways_survives():
    fresh = "---\ntags:\n- ours\n---\n"
    for block in (
        "{license: mit, tags: [mine]}",
        '"license": mit\n"tags":\n  - mine',
        "license: mit\ntags: [\n  mine]",
    ):
        text, _ = update_card_text(f"---\n{block}\n---\nText", fresh)
        assert split_card(text)[1] == {"license": "mit", "tags": ["mine", "ours"]}
        assert text.endswith("\n---\nText")


def test_it_is_known_which_card_a_person_edited(folder):
    ours = (folder / "README.md").read_text()
    assert not is_edited(ours)
    edited = ours.replace("# vit-tiny", "# vit-tiny\n\nMine.")
    assert is_edited(edited) and not is_edited(mark_published(edited))
    assert is_edited("# A person's") and not is_edited("---\nlicense: mit\n---\n")
    other = mark_published(ours.replace("# vit-tiny", "# vit-tiny\n\nOther."))
    assert combine_cards(ours, edited, "the Hub") == edited
    assert combine_cards(edited, ours, "the Hub") == edited
    assert combine_cards(edited, other, "the Hub") == edited
    assert combine_cards(other, edited, "the Hub") == edited
    with pytest.raises(ValueError, match="edited both here and on the Hub"):
        combine_cards(edited, other + "\nMore.", "the Hub")
    # metadata that only the other has is taken over
    assert split_card(combine_cards("# Mine\n", "---\nlanguage: da\n---\n", "the Hub"))[1] == {"language": "da"}


# --- What is pushed ---


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
    images(50).save_to_disk(folder.parent / "letters")
    with_data = dry_run("--repo_id", "org/vit", "--dataset_name", str(folder.parent / "letters"))
    assert all(f"        made {name}" in with_data for name in ("robustness.json", "README.md", *PICTURES))
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


# --- Plain ViT ---


@of_both_architectures
@pytest.mark.parametrize("order", [None, "sequential", [3, 1, 0, 2], [2, 0], [1, 1, 3, 0, 2, 2]])
@pytest.mark.parametrize("position_predictor", [False, True])
def test_a_plain_vit_gives_the_same_logits(architecture, batch, order, position_predictor):
    model = architecture.classifier(
        shuffle_mode="arbitrary", position_predictor=position_predictor, layerdrop=0.5
    ).eval()
    model.config.execution_order = [1, 2, 3]
    plain = to_plain_vit(model, order)
    assert type(plain) is architecture.plain_classifier_class and not plain.training
    expected = model(batch["pixel_values"], execution_order=order).logits
    assert torch.equal(plain(batch["pixel_values"]).logits, expected)
    assert not any("position_head" in name for name in plain.state_dict())
    # copies: training one leaves the other
    with torch.no_grad():
        plain.base_model.layers[0].layernorm_before.weight.add_(1)
    assert torch.equal(model(batch["pixel_values"], execution_order=order).logits, expected)


def test_a_model_with_depth_embedding_is_no_plain_vit(vit):
    with pytest.raises(ValueError, match=r"`depth_embedding=True` cannot become a plain ViT.*trust_remote_code"):
        to_plain_vit(vit.classifier(depth_embedding=True))


def test_a_plain_vit_needs_one_fixed_order(vit):
    model = vit.classifier(execution_order="arbitrary")
    with pytest.raises(ValueError, match="'arbitrary', another one in each forward"):
        to_plain_vit(model)
    with pytest.raises(ValueError, match="holds 7 at position 0"):
        to_plain_vit(model, [7])
    assert to_plain_vit(model, [0]).config.num_hidden_layers == 1


def test_a_saved_plain_vit_is_an_ordinary_model(folder, tmp_path, batch):
    target = tmp_path / "plain"
    save_plain_vit(folder, target, source="org/vit-tiny", execution_order=[2, 0])
    write_model_card(target, repo_id="org/vit-tiny", revision="plain-vit")
    check_folder(target)
    files = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "export.json"}
    assert {name for name in published_files(target) if "/" not in name} == files
    assert "auto_map" not in json.loads((target / "config.json").read_text())
    model = ls.LayerShuffleViTForImageClassification.from_pretrained(folder).eval()
    plain = AutoModelForImageClassification.from_pretrained(target).eval()
    expected = model(batch["pixel_values"], execution_order=[2, 0]).logits
    torch.testing.assert_close(plain(batch["pixel_values"]).logits, expected)
    # its examples hold its own answers
    entry = metadata_load(target / "README.md")["widget"][0]
    (answer,) = pipeline("image-classification", model=str(target))(str(target / entry["src"]), top_k=1)
    assert entry["output"][0]["label"] == answer["label"]
    assert entry["output"][0]["score"] == pytest.approx(answer["score"], abs=1e-4)


def test_a_folder_without_examples_has_none_to_copy(tmp_path):
    copy_examples(tmp_path, tmp_path / "target", None)
    assert not (tmp_path / "target").exists()


def test_the_digest_of_weights_does_not_depend_on_how_they_are_read(vit):
    model = vit.classifier(hidden_size=256, intermediate_size=1024)  # large enough for several threads
    digests, threads = set(), torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            digests.add(weights_digest(model))
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1
    with torch.no_grad():  # which a sum would not tell
        weight = model.classifier.weight
        weight[0], weight[1] = weight[1].clone(), weight[0].clone()
    assert weights_digest(model) not in digests
