"""A text classifier on the Hub and back, by its code files and as a plain model, and what is recorded of texts."""

import json
import shutil

import pytest
from conftest import run_python
from support.hub_server import HubServer
from support.texts import labelled_texts, save_with_tokenizer, text_classifier, tokenizer_of, trained_classifier

from hf_layershuffle.hub.card_examples import copy_examples, write_examples
from hf_layershuffle.hub.card_text import split_card, update_metadata
from hf_layershuffle.hub.folder_records import read_examples
from hf_layershuffle.hub.published_files import published_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_with_tokenizer(trained_classifier(), tmp_path_factory.mktemp("models") / "bert")


def test_it_comes_back_from_the_hub(folder, tmp_path):
    push = (
        "import sys; from hf_layershuffle.hub.plain_vit_folder import publish_with_plain_vit\n"
        "import hf_layershuffle as ls; from transformers import AutoTokenizer\n"
        "publish_with_plain_vit(sys.argv[1], 'org/bert', execution_order=[2, 0, 3, 1])\n"
        "model = ls.load_classifier(sys.argv[1])\n"
        "model.push_to_hub('org/memory', processing_class=AutoTokenizer.from_pretrained(sys.argv[1]))\n"
    )
    load = (
        "import sys; from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline\n"
        "tokenizer = AutoTokenizer.from_pretrained('org/bert')\n"
        "inputs = tokenizer('red and green', return_tensors='pt')\n"
        "def load(name, **kwargs):\n"
        "    return AutoModelForSequenceClassification.from_pretrained(name, **kwargs).eval()\n"
        "free = load('org/bert', trust_remote_code=True)(**inputs, execution_order=[2, 0, 3, 1]).logits\n"
        "plain = load('org/bert', revision='plain')\n"
        "assert type(plain).__name__ == 'BertForSequenceClassification', type(plain)\n"
        "assert free.allclose(plain(**inputs).logits, atol=1e-5)\n"
        "print(pipeline('text-classification', model='org/bert', revision='plain')('red and green')[0]['label'])\n"
        "classify = pipeline('text-classification', model='org/memory', trust_remote_code=True)\n"
        "print(classify('red and green')[0]['label'])\n"
        "assert 'hf_layershuffle' not in sys.modules\n"
    )
    with HubServer() as server:
        pushed = run_python(push, folder, environment=server.environment(tmp_path / "pusher"))
        assert pushed.returncode == 0, pushed.stderr
        environment = server.environment(tmp_path / "loader") | {"PYTHONPATH": ""}
        loaded = run_python(load, environment=environment)
        assert loaded.returncode == 0 and loaded.stdout.split()[-2:] == ["colours", "colours"], loaded.stderr
        for repository, branch in (("org/bert", "main"), ("org/bert", "plain"), ("org/memory", "main")):
            files = server.repositories[repository].files(branch)
            assert {"tokenizer.json", "tokenizer_config.json", "README.md"} <= files.keys()
        card = server.repositories["org/bert"].files("plain")["README.md"].decode()
        assert "plain `bert` text classifier" in card and "plain-model-export" in card


def test_examples_are_short_texts_that_the_model_knows(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    long = labelled_texts(24, seed=3).map(lambda row: {"text": f"{row['text']} " * 8})  # which it would cut off
    assert write_examples(tmp_path / "copy", long, tokenizer_of()) == []
    assert not (tmp_path / "copy" / "examples").exists()
    entries = write_examples(tmp_path / "copy", labelled_texts(24, seed=3), tokenizer_of(), num_examples=2, top_k=2)
    assert [set(entry) for entry in entries] == 2 * [{"text", "example_title", "output"}]
    assert [len(entry["output"]) for entry in entries] == [2, 2] and read_examples(tmp_path / "copy") == entries
    assert "examples/examples.json" in published_files(tmp_path / "copy")
    other = save_with_tokenizer(text_classifier(seed=4), tmp_path / "other")
    copy_examples(tmp_path / "copy", other, tokenizer_of())
    assert all(entry in read_examples(tmp_path / "copy") or entry["output"] for entry in read_examples(other))
    assert len(read_examples(other)) < 2  # of random weights, which gives one class to all


def test_a_persons_texts_stay_in_the_widget():
    ours = {"text": "red", "example_title": "Class colours", "output": [{"label": "colours", "score": 0.9}]}
    block = "widget:\n- text: of a person\n- text: old\n  example_title: Class numbers\n  output: []\n"
    renewed = update_metadata(block, {"widget": [ours]})
    assert split_card(f"---\n{renewed}\n---\n")[1]["widget"] == [{"text": "of a person"}, ours]


def test_an_entry_has_an_image_or_a_text(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "examples").mkdir()
    entry = {"example_title": "x", "output": []}
    (tmp_path / "copy" / "examples" / "examples.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match="an entry has either `src` or `text`"):
        read_examples(tmp_path / "copy")
