"""Every command on a folder that holds a text classifier and its tokenizer, and back by the Auto classes."""

import json

import pytest
import torch
from conftest import assert_all_refused, run_cli
from datasets import DatasetDict
from support.texts import labelled_texts, save_with_tokenizer, text_classifier, tokenizer_of, trained_classifier
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification, pipeline

import hf_layershuffle as ls


DATA = ["--max_samples", "40", "--batch_size", "16"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a trained model, an untrained one, and their data."""
    folder = tmp_path_factory.mktemp("work")
    save_with_tokenizer(trained_classifier(), folder / "model")
    save_with_tokenizer(text_classifier(seed=1), folder / "other")
    DatasetDict(train=labelled_texts(60), test=labelled_texts(48, seed=7)).save_to_disk(folder / "data")
    return folder


def done(*arguments, cwd):
    result = run_cli(*arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


def answers(folder, order=None):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(labelled_texts(9)["text"][:], padding=True, truncation=True)
    orders = {} if order is None else {"execution_order": order}
    with torch.no_grad():
        return model(**{name: torch.tensor(value) for name, value in inputs.items()}, **orders).logits


def test_evaluate_says_what_its_report_belongs_to(work, quick_pictures):
    command = ["evaluate", "model", "--dataset_name", "data", *DATA, "--num_orders", "3", "--num_subsets", "1"]
    result = done(*command, "--output_dir", "report", cwd=work)
    report = ls.RobustnessReport.load(work / "report")
    assert "(40 texts, 4 layers)" in result.stdout and report.num_images == 40 and "40 texts: accuracy" in repr(report)
    assert report.sequential.accuracy > 0.9
    assert report.config["inputs"] == "texts" and report.config["tokenizer"] and "image_processor" not in report.config
    again = ["--batch_size", "7", "--output_dir", "report"]  # the batches do not matter
    done(*command, *again, cwd=work)
    save_with_tokenizer(ls.load_classifier(str(work / "model")), work / "retokenized")
    tokenizer_of(vocab_size=70).save_pretrained(work / "retokenized")
    refused = run_cli("evaluate", "retokenized", *command[2:], "--output_dir", "report", cwd=work)
    assert refused.returncode == 2 and "it was made with another tokenizer" in refused.stderr


def test_the_numbers_are_those_of_the_forward(work):
    data = labelled_texts(48, seed=7)
    model, tokenizer = ls.load_classifier(str(work / "model")).eval(), tokenizer_of()
    by_name = ls.evaluate_robustness(
        model, data, processing_class=tokenizer, num_orders=3, batch_size=5, progress=False
    )
    by_old_name = ls.evaluate_robustness(model, data, image_processor=tokenizer, num_orders=3, progress=False)
    assert by_name.arbitrary.accuracy == by_old_name.arbitrary.accuracy
    assert by_name.config == by_old_name.config
    inputs = tokenizer(data["text"][:], padding=True, truncation=True, return_tensors="pt")
    for score in (by_name.reversed, *by_name.arbitrary.scores, by_name.leave_one_out[1]):
        with torch.no_grad():
            classes = model(**inputs, execution_order=score.execution_order).logits.argmax(-1)
        assert score.accuracy == pytest.approx((classes == torch.tensor(data["label"][:])).float().mean().item())


def test_analyze_leaves_padding_and_attention_maps_out(work, quick_pictures):
    done(
        "analyze", "model", "--dataset_name", "data", *DATA, "--num_orders", "4", "--output_dir", "analysis", cwd=work
    )
    report = ls.AnalysisReport.load(work / "analysis")
    assert report.attention is None and "40 texts" in repr(report)
    assert not (work / "analysis" / "attention_maps.png").exists()
    assert (work / "analysis" / "position_probe.png").exists()
    data = labelled_texts(24)
    measured = [
        ls.analyze(ls.load_classifier(str(work / "model")), data, processing_class=tokenizer_of(), num_orders=4,
                   batch_size=size, progress=False).contributions.sequential_mean["update_norm"]
        for size in (1, 24)
    ]  # fmt: skip
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)


@pytest.mark.parametrize("how", [["--keep", "2,0"], ["--search", "--num_layers", "2", "--dataset_name", "data"]])
def test_prune_keeps_the_tokenizer(work, how, tmp_path):
    out = tmp_path / "pruned"
    done("prune", "model", *how, "--output_dir", out, cwd=work)
    kept = json.loads((out / "config.json").read_text())["pruned_from"]["layers"]
    assert torch.allclose(answers(out), answers(work / "model", kept), atol=1e-5)


def test_merge_keeps_the_tokenizer_and_refuses_others(work, tmp_path):
    done("merge", "model", "other", "--random", "1", "--seed", "3", "--output_dir", tmp_path / "merged", cwd=work)
    assert answers(tmp_path / "merged").shape == (9, 3)
    assert "Classifies texts" in (tmp_path / "merged" / "README.md").read_text()
    evaluated = done("merge", "model", "other", "--random", "2", "--evaluate", "data", *DATA,
                     "--output_dir", tmp_path / "report", cwd=work)  # fmt: skip
    assert "(40 texts)" in evaluated.stdout
    report = ls.RandomMergeReport.load(tmp_path / "report")
    assert report.noun == "texts" and report.source_scores["model"].accuracy > 0.9
    other = save_with_tokenizer(text_classifier(seed=2), tmp_path / "tokens")
    stored = json.loads((other / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(stored))
    refused = run_cli("merge", "model", other, "--random", "1", "--output_dir", tmp_path / "no", cwd=work)
    assert refused.returncode == 2 and "have other tokens, so the models read other texts" in refused.stderr
    assert not (tmp_path / "no").exists()


def test_a_merge_names_the_tokenizer_of_a_checkpoint_that_does_not(work, tmp_path):
    source = save_with_tokenizer(text_classifier(), tmp_path / "source")
    (source / "tokenizer_config.json").unlink()  # as of early checkpoints of the Hub
    done("merge", source, source, "--average", "--output_dir", tmp_path / "merged", cwd=work)
    assert (
        json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())["tokenizer_class"] == "BertTokenizer"
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("cat")["input_ids"]


def test_publish_writes_a_card_with_texts_and_answers(work, tmp_path, quick_pictures):
    from shutil import copytree

    folder = copytree(work / "model", tmp_path / "model")
    sizes = ["--num_orders", "2", "--max_samples", "40", "--dataset_name", work / "data"]
    done("publish", folder, "--card_only", "--repo_id", "org/texts", *sizes, cwd=work)
    card = (folder / "README.md").read_text()
    assert "The example texts are the first ones" in card and "40 evaluation texts" in card and "image" not in card
    entries = json.loads((folder / "examples" / "examples.json").read_text())
    assert [entry["example_title"] for entry in entries] == ["Class animals", "Class colours", "Class numbers"]
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    for entry in entries:
        found = classify(entry["text"], top_k=1)[0]
        assert found["label"] == entry["output"][0]["label"] == entry["example_title"].removeprefix("Class ")
        assert found["score"] == pytest.approx(entry["output"][0]["score"], abs=1e-3)
    assert not list((folder / "examples").glob("*.png"))
    done("publish", folder, "--card_only", "--repo_id", "org/texts", *sizes, cwd=work)  # no entry twice
    assert (folder / "README.md").read_text().count("example_title") == 3
    plan = done("publish", folder, "--dry_run", "--plain", "--repo_id", "org/texts", cwd=work).stdout
    assert "tokenizer.json" in plan and "To org/texts, branch plain:" in plan
    tokenizer_of(vocab_size=70).save_pretrained(folder)
    refused = run_cli("publish", folder, "--card_only", cwd=work)
    assert refused.returncode == 2 and "made with another tokenizer than the one beside it" in refused.stderr


def test_the_plain_model_needs_no_package(work, tmp_path):
    from hf_layershuffle.hub.plain_vit_folder import save_plain_vit

    save_plain_vit(work / "model", tmp_path, source="org/texts", execution_order=[3, 1, 0, 2])
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(plain) is BertForSequenceClassification
    assert torch.allclose(answers(tmp_path), answers(work / "model", [3, 1, 0, 2]), atol=1e-5)


def test_bad_input_is_one_line(work, tmp_path):
    broken = save_with_tokenizer(text_classifier(vocab_size=50), tmp_path / "broken")
    bare = tmp_path / "bare"
    text_classifier().save_pretrained(bare)
    out = ["--output_dir", tmp_path / "out"]
    cases = {
        "'digits' has no text column that could be told": ["evaluate", "model", "--dataset_name", "digits", *out],
        "a vocabulary of 50 tokens": ["evaluate", broken, "--dataset_name", "data", *out],
        "holds no tokenizer ('tokenizer.json')": ["evaluate", bare, "--dataset_name", "data", *out],
        "`image_column` is 'text', and '": [
            "evaluate", "model", "--dataset_name", "data", "--image_column_name", "text", *out],
        "is a model of images; leave out --text_column_name": [
            "evaluate", ls.example_model(), "--dataset_name", "digits", "--text_column_name", "text", *out],
        "'python-docs' has no image column": [
            "evaluate", ls.example_model(), "--dataset_name", "python-docs", *out],
        "has the classes 'concurrency'": ["evaluate", "model", "--dataset_name", "python-docs", *out],
    }  # fmt: skip
    assert_all_refused(run_cli, "hf-layershuffle", cases, work)
    assert not (tmp_path / "out" / "robustness.json").exists()
