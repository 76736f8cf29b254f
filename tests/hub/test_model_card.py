"""What a model's card says, without a network."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import Architecture, of_both_architectures
from huggingface_hub import EvalResult, ModelCard, metadata_load
from support.cards import PICTURES, describe, images, save_model
from support.timm_without_torchvision import use_timm
from transformers import (
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTImageProcessor,
)

import hf_layershuffle as ls
from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.hub.card_files import read_license
from hf_layershuffle.hub.card_text import SOURCE_NAME
from hf_layershuffle.hub.folder_records import record_baseline, record_training
from hf_layershuffle.hub.model_card import build_model_card, write_model_card
from hf_layershuffle.hub.plain_vit_folder import save_plain_vit
from hf_layershuffle.hub.published_files import check_folder
from hf_layershuffle_cli import main


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A folder with everything that a card can show."""
    return describe(tmp_path_factory.mktemp("models") / "vit-tiny")


@pytest.fixture
def folder(described, tmp_path):
    return shutil.copytree(described, tmp_path / "vit-tiny")


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


def test_a_report_of_a_model_that_ran_all_mlps_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"skipped_mlps": [1]}))
    with pytest.raises(ValueError, match=r"a report of other `skipped_mlps` than those of the config\.json beside it"):
        write_model_card(folder)
    (folder / "config.json").write_text(json.dumps(config | {"skipped_mlps": []}))
    assert write_model_card(folder)


def test_a_report_of_another_depth_is_refused(folder):
    (folder / "model.safetensors").unlink()  # as where a report joins a model on the Hub
    assert write_model_card(folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="a model with 4 layers, and 'vit-tiny' has 3"):
        write_model_card(folder)


def test_a_model_of_timm_as_transformers_saves_it_gets_a_card_too(tmp_path, monkeypatch):
    use_timm(monkeypatch)
    sizes = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4)
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes, num_labels=5)
    TimmWrapperForImageClassification(config).save_pretrained(tmp_path)
    assert "num_hidden_layers" not in json.loads((tmp_path / "config.json").read_text())
    text = build_model_card(tmp_path).text
    assert "A plain `timm_wrapper` image classifier with 2 layers" in text
    assert "a width of 32 and 4 attention heads, and reads images of 16 × 16 pixels in patches of 4" in text


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
    assert "Fine-tuned from a local checkpoint." in card.text
    assert "Distilled from a local model" in card.text
    assert "base_model_relation" not in card.data.to_dict()
    # Through a folder, a model descends from the Hub's
    (tmp_path / "plain").mkdir()
    record_training("plain", arguments={}, base_model="org/vit")
    record_training("model", arguments={}, dataset="org/letters", base_model="plain")
    assert build_model_card("model").data.base_model == "org/vit"
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


@pytest.mark.parametrize("license", ["other", "[mit, apache-2.0]"])
def test_a_persons_licence_stays_beside_a_recorded_one(folder, license):
    path = folder / "README.md"
    text = path.read_text().replace("license: mit\n", f"license: {license}\nlicense_name: mine\n")
    path.write_text(text)
    record = json.loads((folder / "training.json").read_text()) | {"license": "apache-2.0"}
    (folder / "training.json").write_text(json.dumps(record))
    write_model_card(folder, repo_id="org/vit-tiny")
    assert path.read_text() == text
    assert read_license(folder) is None  # of a model made of this one
    write_model_card(folder, license="mit")
    assert metadata_load(path)["license"] == "mit"


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
