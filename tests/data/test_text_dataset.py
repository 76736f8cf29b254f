"""Tokens for the Trainer: padded a batch at a time, cut off, and rows without a text."""

import logging

import pytest
import torch
from datasets import Dataset
from support.texts import labelled_texts, tokenizer_of

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
