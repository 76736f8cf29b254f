"""The built-in texts: there on any machine with Python, the same in every process, worth learning."""

import sysconfig
import zlib
from collections import Counter

import pytest
from conftest import run_python

from hf_layershuffle.data import python_docs
from hf_layershuffle.data.python_docs import MAX_WORDS, MIN_WORDS, SUBJECTS, load_python_docs


def test_the_passages_are_many_balanced_distinct_and_short():
    data = load_python_docs()
    assert data.features["label"].names == list(SUBJECTS)
    counts = Counter(data["label"])
    assert len(data) >= 2000 and min(counts.values()) >= 0.5 * max(counts.values())
    lengths = [len(text.split()) for text in data["text"]]
    assert MIN_WORDS <= min(lengths) and max(lengths) <= MAX_WORDS
    assert len(set(data["text"])) == len(data)


def test_another_process_reads_the_same():
    code = (
        "import zlib; from hf_layershuffle.data.python_docs import load_python_docs\n"
        "print(zlib.crc32(str(load_python_docs()['text'][:]).encode()))"
    )
    assert int(run_python(code, fresh=True).stdout) == zlib.crc32(str(load_python_docs()["text"][:]).encode())


def test_words_tell_the_subjects_apart_but_not_all_of_them():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    splits = load_python_docs().train_test_split(0.2, seed=0, stratify_by_column="label")
    classify = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10, max_iter=50))
    classify.fit(splits["train"]["text"][:], splits["train"]["label"][:])
    assert 0.7 < classify.score(splits["test"]["text"][:], splits["test"]["label"][:]) < 0.97


def test_a_python_without_sources_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    python_docs._passages_about.cache_clear()
    try:
        with pytest.raises(ValueError, match="'python-docs' is read from the sources of Python's standard library"):
            load_python_docs()
    finally:
        python_docs._passages_about.cache_clear()
