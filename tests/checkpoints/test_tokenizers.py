"""Tokenizers beside models: whether they fit, how long a text may be, and what tells them apart."""

import json
from types import SimpleNamespace

import pytest
import torch
from support.texts import labelled_texts, save_with_tokenizer, text_classifier, tokenizer_of
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTImageProcessor,
)

import hf_layershuffle as ls
from hf_layershuffle.checkpoints.processing_classes import chosen_processing_class, load_processing_class
from hf_layershuffle.checkpoints.stored_checkpoint import check_tokenizers, open_source
from hf_layershuffle.checkpoints.tokenizers import (
    check_tokenizer,
    load_tokenizer,
    longest_text,
    takes_texts,
    tokenizer_digest,
)


def test_models_of_texts_are_told_by_their_type():
    assert takes_texts(BertConfig()) and takes_texts(text_classifier().config) and takes_texts(RobertaConfig())
    assert not takes_texts(ViTConfig()) and not takes_texts(ls.LayerShuffleViTConfig())
    assert not takes_texts(SimpleNamespace(model_type="wav2vec2", vocab_size=32))
    assert not takes_texts(SimpleNamespace())


def test_the_tokenizer_or_the_image_processor_of_a_folder(tmp_path):
    save_with_tokenizer(text_classifier(), tmp_path / "text")
    ViTImageProcessor().save_pretrained(tmp_path / "image")
    assert isinstance(load_processing_class(tmp_path / "text", text_classifier().config), PreTrainedTokenizerFast)
    assert load_processing_class(tmp_path / "image", ls.LayerShuffleViTConfig()).image_mean[0] == 0.5
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"holds no tokenizer .*Save the one that the model was trained with there"):
        load_tokenizer(tmp_path / "empty")


def test_one_argument_has_two_names():
    processor = ViTImageProcessor()
    assert chosen_processing_class(processor, None) is chosen_processing_class(None, processor) is processor
    assert chosen_processing_class(None, None) is None
    with pytest.raises(ValueError, match=r"are two names of one argument; give one of them"):
        chosen_processing_class(processor, processor)


def test_a_link_out_of_the_folder_is_not_read(tmp_path):
    (tmp_path / "elsewhere.json").write_text("{}")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match=r"link"):
        load_tokenizer(folder)


def test_a_tokenizer_that_does_not_fit_is_refused():
    tokenizer = tokenizer_of()
    check_tokenizer(tokenizer, text_classifier(vocab_size=len(tokenizer)).config)
    with pytest.raises(ValueError, match=f"ids up to {len(tokenizer) - 1}, which it does not have"):
        check_tokenizer(tokenizer, text_classifier(vocab_size=len(tokenizer) - 1).config)
    few = text_classifier(vocab_size=50)
    with pytest.raises(
        ValueError, match=f"a vocabulary of 50 tokens .* ids up to {len(tokenizer) - 1}, which it does"
    ):
        check_tokenizer(tokenizer, few.config)
    with pytest.raises(ValueError, match=r"'x' pads with the id 3 \(`pad_token_id`\), and its tokenizer with 0"):
        check_tokenizer(tokenizer, text_classifier(pad_token_id=3).config, "'x'")
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="[UNK]")
    with pytest.raises(ValueError, match=r"the model has no padding token.*tokenizer.pad_token = tokenizer.eos_token"):
        check_tokenizer(without, text_classifier().config)


@pytest.mark.parametrize(("given", "expected"), [(16, 16), (10, 10), (10**30, 16)])
def test_the_longest_text_is_the_shorter_limit(given, expected):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of().backend_tokenizer, model_max_length=given)
    assert longest_text(tokenizer, text_classifier()) == expected
    assert longest_text(None, text_classifier()) == 16


def test_roberta_counts_positions_from_behind_the_padding():
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=80)
    model = RobertaForSequenceClassification(RobertaConfig(**sizes, max_position_embeddings=14, pad_token_id=1)).eval()
    assert longest_text(None, model) == 12
    model(input_ids=torch.full((1, 12), 5))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(input_ids=torch.full((1, 13), 5))


def test_the_digest_is_of_what_changes_ids(tmp_path):
    tokenizer = tokenizer_of()
    digest = tokenizer_digest(tokenizer)
    tokenizer(labelled_texts(3)["text"][:], padding=True, truncation=True, max_length=5)  # which it keeps as settings
    assert tokenizer_digest(tokenizer) == digest != tokenizer_digest(tokenizer_of(vocab_size=70))
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(load_tokenizer(tmp_path)) == digest
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["normalizer"]["lowercase"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    assert tokenizer_digest(load_tokenizer(tmp_path)) != digest


def test_all_files_of_a_tokenizer_belong_to_a_source(tmp_path):
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=5)
    for name in ("a", "b"):
        BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(tmp_path / name)
        for file in ("vocab.txt", "bpe.codes", "dict.txt", "sentencepiece.model"):
            (tmp_path / name / file).write_text("x")
        (tmp_path / name / "chat_template.jinja").write_text(name)  # it changes no id
    sources = {name: open_source(name, str(tmp_path / name)) for name in ("a", "b")}
    assert {"bpe.codes", "dict.txt", "sentencepiece.model", "chat_template.jinja"} <= set(sources["a"].tokenizer)
    check_tokenizers(sources)
    (tmp_path / "b" / "bpe.codes").write_text("y")
    with pytest.raises(ValueError, match="The tokenizers of 'a' and 'b' have other tokens"):
        check_tokenizers(sources)
