"""Runs examples/train_text.py as a user does, most of it in this process."""

import json
import sys

import pytest
import torch
from conftest import REPOSITORY, assert_all_refused, run_cli, run_here, run_python, script
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from support.texts import SMALL, labelled_texts, save_with_tokenizer, text_classifier
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import hf_layershuffle as ls
from hf_layershuffle.checkpoints.tokenizers import load_tokenizer, tokenizer_digest
from hf_layershuffle.training.session import one_line_errors


TRAIN_TEXT = REPOSITORY / "examples" / "train_text.py"


def run_train_text(*arguments, cwd=None):
    """Runs the example on the CPU, in this process."""

    def main() -> None:
        with one_line_errors("train_text.py"):
            script(TRAIN_TEXT).main(sys.argv[1:])

    return run_here(main, "train_text.py", *arguments, "--use_cpu", "True", cwd=cwd)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A CSV file of texts."""
    path = tmp_path_factory.mktemp("data") / "texts.csv"
    rows = labelled_texts(120)
    names = rows.features["label"].names
    rows.map(lambda row: {"kind": names[row["label"]]}).remove_columns("label").rename_column("kind", "label").to_csv(
        path
    )
    return path


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The run of the example with its baseline."""
    folder = tmp_path_factory.mktemp("run")
    result = run_train_text(*SMALL, "--dataset_name", data, "--baseline", "--output_dir", "out", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "out", result.stdout


def test_it_prints_a_table_and_what_to_do_next(trained, data):
    _, printed = trained
    assert "Fraction of the evaluation texts classified correctly" in printed
    assert "layershuffle" in printed and "plain" in printed
    assert (
        f"Next: hf-layershuffle evaluate out out/baseline --dataset_name {data} --output_dir out-robustness" in printed
    )


def test_the_folder_holds_a_model_that_a_pipeline_takes(trained):
    folder, _ = trained
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model) is ls.LayerShuffleBertForSequenceClassification and tokenizer.model_max_length == 16
    assert model.config.id2label == {0: "animals", 1: "colours", 2: "numbers"}
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    logits = model.eval()(**tokenizer("red and green", return_tensors="pt")).logits
    assert classify("red and green")[0]["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)


def test_it_loads_without_the_package(trained):
    folder, _ = trained
    code = (
        "import sys\n"
        "from transformers import pipeline\n"
        f"classify = pipeline('text-classification', model={str(folder)!r}, trust_remote_code=True)\n"
        "print(classify('red', top_k=None)[0]['label'], 'hf_layershuffle' in sys.modules)"
    )
    result = run_python(code, environment={"PYTHONPATH": "", "HF_MODULES_CACHE": str(folder.parent / "modules")})
    assert result.stdout.split()[1:] == ["False"], result.stderr


def test_the_card_speaks_of_texts(trained):
    folder, _ = trained
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-classification" and card.data.tags == ["layershuffle"]
    assert "Trained on 64 texts" in card.text and "Fraction of texts classified correctly" in card.text
    assert "image" not in card.text
    record = json.loads((folder / "training.json").read_text())
    assert record["num_train_texts"] == 64 and "num_train_images" not in record
    assert record["baseline"]["name"] == "baseline: trained the plain way"


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(trained, data, tmp_path):
    folder, _ = trained
    arguments = [*SMALL, "--dataset_name", data, "--output_dir", tmp_path / "out"]
    stopped = run_python(
        "import sys; from transformers import TrainerCallback\n"
        "from hf_layershuffle.training.trainer import LayerShuffleTrainer as T\n"
        "class Stop(TrainerCallback):\n"
        "    def on_save(self, args, state, control, **kwargs):\n"
        "        raise KeyboardInterrupt\n"
        "init = T.__init__\n"
        "def with_stop(self, *args, **kwargs):\n"
        "    init(self, *args, **kwargs); self.add_callback(Stop())\n"
        "T.__init__ = with_stop\n"
        "from hf_layershuffle.training.session import one_line_errors, run\n"
        "with one_line_errors('train'): run(sys.argv[1:] + ['--task', 'text-classification'])",
        *arguments, "--use_cpu", "True",
    )  # fmt: skip
    assert stopped.returncode == 130 and not (tmp_path / "out" / "model.safetensors").exists(), stopped.stderr
    result = run_train_text(*arguments)
    assert result.returncode == 0 and "Going on from" in result.stderr, result.stderr
    ours, whole = (load_file(each / "model.safetensors") for each in (tmp_path / "out", folder))
    assert all(tensor.equal(whole[name]) for name, tensor in ours.items())
    other = run_train_text(*arguments, "--max_length", "12")
    assert (
        other.returncode == 2 and "holds a run with `max_position_embeddings` 16, and this one has 12" in other.stderr
    )


def test_it_fine_tunes_from_a_teacher_of_texts(trained, data, tmp_path):
    folder, _ = trained
    arguments = [*SMALL[10:], "--dataset_name", data, "--model_name_or_path", folder]
    arguments += ["--teacher_model_name_or_path", folder / "baseline", "--preset", "order-free"]
    result = run_train_text(*arguments, "--max_steps", "2", "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out" / "training.json").read_text())["teacher"] == "baseline"
    # tokenizer.json also holds how the last call cut texts off
    digests = [tokenizer_digest(load_tokenizer(each)) for each in (folder, tmp_path / "out")]
    assert digests[0] == digests[1]
    tensors = [load_file(each / "model.safetensors")["classifier.weight"] for each in (folder, tmp_path / "out")]
    assert not torch.equal(*tensors)


def test_bad_input_is_one_line(trained, data, tmp_path):
    folder, _ = trained
    broken = save_with_tokenizer(text_classifier(vocab_size=50), tmp_path / "broken")
    ls.LayerShuffleViTForImageClassification(
        ls.LayerShuffleViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
    ).save_pretrained(tmp_path / "vit")
    out = ["--output_dir", tmp_path / "out"]
    cases = {
        "'digits' has no text column that could be told by its name": ["--dataset_name", "digits"],
        "has no column 'body'; it has 'text', 'label'": ["--dataset_name", data, "--text_column_name", "body"],
        "has a vocabulary of 50 tokens (`vocab_size`), and its tokenizer gives ids up to": [
            "--dataset_name", data, "--model_name_or_path", broken],
        "takes images; train it with --task image-classification, or choose a model of texts": [
            "--dataset_name", data, "--model_name_or_path", tmp_path / "vit"],
        "There is no option --image_size": ["--image_size", "8"],
        "`architecture` is 'vit', which is no model of texts": ["--dataset_name", data, "--architecture", "vit"],
        "`teacher_model` is|no tokenizer|no text classifier|holds no image processor|takes images": [
            "--dataset_name", data, "--teacher_model_name_or_path", tmp_path / "vit"],
    }  # fmt: skip
    assert_all_refused(
        run_train_text, "train_text.py", {name: [*case, *out] for name, case in cases.items()}, tmp_path
    )
    assert not (tmp_path / "out").exists()
    images = run_cli("train", "--model_name_or_path", folder, "--dataset_name", "digits", *out)
    assert images.returncode == 2 and "takes texts; train it with --task text-classification" in images.stderr
    texts = run_cli("train", "--dataset_name", "python-docs", *out)
    assert texts.returncode == 2 and "'python-docs' has no image column" in texts.stderr
