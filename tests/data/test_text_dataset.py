"""Tokens for the Trainer: padded a batch at a time, cut off, and rows without a text."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from support.texts import WORDS, labelled_texts, text_classifier, tokenizer_of

import hf_layershuffle as ls
from hf_layershuffle.data.dataloading import as_dataloader
from hf_layershuffle.evaluation.fingerprint import data_digest


def test_items_are_what_the_tokenizer_gives():
    data = labelled_texts(7)
    dataset = ls.TextClassificationDataset(data, tokenizer_of())
    assert len(dataset) == 7
    for index in range(7):
        assert dataset[index]["input_ids"] == tokenizer_of()(data[index]["text"], truncation=True)["input_ids"]
        assert dataset[index]["labels"] == data[index]["label"]
    with pytest.raises(IndexError, match=r"There is no text 7; there are 7"):
        dataset[7]


@pytest.mark.parametrize("format", ["numpy", "torch", "pandas", "arrow"])
def test_a_format_of_another_library_changes_nothing(format):
    data = labelled_texts(7)
    expected, dataset = (
        ls.TextClassificationDataset(each, tokenizer_of()) for each in (data, data.with_format(format))
    )
    assert [dataset[index] for index in range(7)] == [expected[index] for index in range(7)]
    assert dataset.labels == data["label"][:]


def test_a_batch_is_padded_to_its_longest_text_only():
    dataset = ls.TextClassificationDataset(labelled_texts(24), tokenizer_of())
    lengths = [len(dataset[index]["input_ids"]) for index in range(24)]
    for start in (0, 6, 12):
        batch = dataset.collate([dataset[index] for index in range(start, start + 6)])
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (6, max(lengths[start : start + 6]))
        assert batch["attention_mask"].sum(1).tolist() == lengths[start : start + 6]
        assert batch["labels"].tolist() == [0, 1, 2] * 2


def test_long_texts_are_cut_off():
    data = Dataset.from_dict({"text": ["cat " * 40, "cat"], "label": [0, 1]})
    for given, expected in ((None, 16), (8, 8)):
        dataset = ls.TextClassificationDataset(data, tokenizer_of(), max_length=given)
        assert [len(dataset[index]["input_ids"]) for index in range(2)] == [expected, 3]


def test_pairs_are_one_input():
    data = Dataset.from_dict({"text": ["the cat"], "text_pair": ["red"], "label": [0]})
    dataset = ls.TextClassificationDataset(data, tokenizer_of())
    assert dataset[0]["input_ids"] == tokenizer_of()("the cat", "red")["input_ids"]


def test_rows_without_a_text_are_named_or_left_out(caplog):
    data = Dataset.from_dict({"text": ["cat", None, "red", None], "label": [0, 1, 2, 0]})
    with pytest.raises(ValueError, match=r"2 of 4 rows have no text, first row 1\. .*--skip_damaged"):
        ls.TextClassificationDataset(data, tokenizer_of())
    with caplog.at_level(logging.WARNING):
        dataset = ls.TextClassificationDataset(data, tokenizer_of(), skip_damaged=True)
    assert dataset.labels == [0, 2] and "first row 1. They are left out" in caplog.text
    empty = Dataset.from_dict({"text": [None, None], "label": [0, 1]})
    with pytest.raises(ValueError, match=r"No row of the dataset has a text in 'text'"):
        ls.TextClassificationDataset(empty, tokenizer_of(), skip_damaged=True)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"pass at least one text"):
        ls.TextClassificationDataset(labelled_texts(3).select([]), tokenizer_of())
    with pytest.raises(ValueError, match=r"`max_length` is 0; it must be a number of tokens of at least 1"):
        ls.TextClassificationDataset(labelled_texts(3), tokenizer_of(), max_length=0)
    with pytest.raises(ValueError, match=r"A streaming dataset has no length"):
        ls.TextClassificationDataset(labelled_texts(3).to_iterable_dataset(), tokenizer_of())


def test_batches_to_evaluate_on():
    data = labelled_texts(10)
    loader = as_dataloader(data, tokenizer_of(), batch_size=4)
    assert torch.cat([batch["labels"] for batch in loader]).tolist() == data["label"][:]
    assert len(as_dataloader(data, tokenizer_of(), max_samples=3).dataset) == 3
    tokenized = data.map(lambda rows: tokenizer_of()(rows["text"], truncation=True), batched=True)
    for expected, batch in zip(loader, as_dataloader(tokenized, tokenizer_of(), batch_size=4)):
        assert expected["input_ids"].equal(batch["input_ids"]) and expected["labels"].equal(batch["labels"])
    with pytest.raises(ValueError, match=r"of texts needs a `processing_class`, the model's own tokenizer"):
        as_dataloader(data)
    with pytest.raises(ValueError, match=r"`data` holds images, and a TokenizersBackend is for texts"):
        as_dataloader(ls.load_image_datasets("digits")["test"], tokenizer_of())


def test_the_digest_is_of_the_tokens_whatever_the_batches():
    data = labelled_texts(10)
    digests = {data_digest(as_dataloader(data, tokenizer_of(), batch_size=size)) for size in (1, 3, 10)}
    assert len(digests) == 1
    other = data.map(lambda row, index: {"text": ("cat " if index == 9 else "") + row["text"]}, with_indices=True)
    swapped = data.select([1, 0, *range(2, 10)])
    for different in (other, swapped, data.select(range(9))):
        assert data_digest(as_dataloader(different, tokenizer_of())) not in digests
    assert data_digest(as_dataloader(data, tokenizer_of(vocab_size=70))) not in digests


@torch.no_grad()
def test_a_tokenizer_that_pads_on_the_left_changes_no_answer():
    model, tokenizer, texts = text_classifier(), copy.deepcopy(tokenizer_of()), labelled_texts(12)
    tokenizer.padding_side = "left"
    orders = [[0, 1, 2, 3], [3, 1]]
    prepared = texts.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    for data in (texts, prepared):
        scores = [
            ls.score_execution_orders(model, data, orders, processing_class=tokenizer, batch_size=size, progress=False)
            for size in (1, 12)
        ]
        for alone, together in zip(*scores):
            assert alone.loss == pytest.approx(together.loss, abs=1e-5)
    assert tokenizer.padding_side == "left"


@torch.no_grad()
def test_tokens_with_names_of_classes_are_matched_with_the_models():
    tokenizer, texts = tokenizer_of(), labelled_texts(12)
    names = list(WORDS)[::-1]  # the model counts them the other way round
    model = text_classifier(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    prepared = texts.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    losses = [
        ls.score_execution_orders(model, data, [[0, 1, 2, 3]], processing_class=tokenizer, progress=False)[0].loss
        for data in (texts, prepared, prepared.rename_column("label", "labels"))
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)
