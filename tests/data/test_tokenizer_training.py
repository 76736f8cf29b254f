"""The tokenizer of a model from scratch: small, the same in every process, and one that AutoTokenizer loads."""

import zlib

from conftest import run_python
from support.texts import labelled_texts
from transformers import AutoTokenizer

from hf_layershuffle.checkpoints.tokenizers import tokenizer_digest
from hf_layershuffle.data.tokenizer_training import SPECIAL_TOKENS, train_tokenizer


def test_what_it_makes_of_texts():
    tokenizer = train_tokenizer(labelled_texts()["text"], 90, 16)
    assert len(tokenizer) <= 90 and tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    ids = tokenizer("The CAT and häts")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("the cat and ")
    assert ids[0] == 2 and ids[-1] == 3 and tokenizer.unk_token_id not in tokenizer("the cat")["input_ids"]
    assert tokenizer("☃")["input_ids"] == [2, 1, 3]
    assert set(tokenizer("a", "b")) == {"input_ids", "attention_mask"}
    assert len(tokenizer("cat " * 50, truncation=True)["input_ids"]) == 16


def test_segments_where_the_model_takes_them():
    tokenizer = train_tokenizer(labelled_texts()["text"], 90, 16, has_segments=True)
    assert tokenizer("a", "the cat")["token_type_ids"] == [0, 0, 0, 1, 1, 1]


def test_every_process_trains_the_same_one(tmp_path):
    # The trainer of the library breaks ties as a hash table gives them, in another way in each process
    code = (
        "import sys, zlib; sys.path.insert(0, 'tests')\n"
        "from support.texts import labelled_texts\n"
        "from hf_layershuffle.data.tokenizer_training import train_tokenizer\n"
        "tokenizer = train_tokenizer(labelled_texts(200)['text'], 120, 16)\n"
        "print(zlib.crc32(tokenizer.backend_tokenizer.to_str().encode()))"
    )
    ours = zlib.crc32(train_tokenizer(labelled_texts(200)["text"], 120, 16).backend_tokenizer.to_str().encode())
    assert int(run_python(code, fresh=True).stdout.splitlines()[-1]) == ours


def test_it_comes_back_by_auto_tokenizer(tmp_path):
    tokenizer = train_tokenizer(labelled_texts()["text"], 90, 16)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.model_max_length == 16 and tokenizer_digest(again) == tokenizer_digest(tokenizer)
    texts = labelled_texts(seed=5)["text"][:]
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
