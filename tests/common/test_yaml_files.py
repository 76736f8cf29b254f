import json
import os
import time

import pytest

from hf_layershuffle.common.yaml_files import MAX_DEPTH, _without_duplicates, parse_yaml, read_json, read_mapping
from hf_layershuffle.merging.plan import MergePlan


def laughs(levels: int) -> str:
    """A few hundred bytes whose aliases, written out, are 9 to the power of `levels` values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


def merged_laughs(levels: int) -> str:
    lines = ["a0: &a0 {x: 1}"]
    return "\n".join(lines + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, levels)])


HOSTILE_YAML = [
    (laughs(9), "with its aliases written out it has more than 200,000 values"),
    (merged_laughs(9), "with its aliases written out it has more than 200,000 values"),
    ("a: &a [*a]", "line 1: an alias stands inside of what it repeats"),
    ("a0: &a0 [1]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 99)), "more than 50 levels"),
    ("[" * 3000 + "]" * 3000, "line 1: it is nested more than 50 levels deep"),
    ("{a: " * 3000, "nested more than 50 levels deep"),
    ("- " * 3000, "nested more than 50 levels deep"),
    ("sources: {a: x}\nlayers: []\nsources: {b: y}", "line 3: the key 'sources' is there already, in line 1"),
    ("a:\n  b: {c: 1, c: 2}", "line 2: the key 'c' is there already"),
    ("a: 1\nb: .nan", r"line 2: \.nan is not a finite number"),
    ("a: -.inf", r"-\.inf is not a finite number"),
    ("a: 1.0e+999", "not a finite number"),
    ("a: " + "9" * 5000, "is not valid YAML"),
    ("a: 2001-13-45", "is not valid YAML"),
    ("? [a]\n: 1", "is not valid YAML in line 1"),
    ("a: !!python/object/apply:os.system [ls]", "is not valid YAML in line 1: could not determine a constructor"),
    ("a: *b", "is not valid YAML in line 1: found undefined alias"),
    ("a: 1\n---\nb: 2", "line 2: but found another document"),
    ("a: \x07", "is not valid YAML"),
    ("- 1", "must hold a mapping of names to values; it holds a list"),
    ("", "it holds nothing"),
    ("text", "it holds a text"),
    ("1: a", "has the key 1, which is a number; keys must be texts"),
]


@pytest.mark.parametrize(("text", "message"), HOSTILE_YAML, ids=[message for _, message in HOSTILE_YAML])
def test_hostile_yaml_is_one_short_line_at_once(tmp_path, text, message):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        read_mapping(path)
    assert str(error.value).startswith(f"'{path}' ") and "\n" not in str(error.value)
    assert len(str(error.value)) < 500 + len(str(path)) and time.monotonic() - start < 2
    with pytest.raises(ValueError, match=r"plan\.yaml") as error:  # as is said of a plan
        MergePlan.load(path)
    assert len(str(error.value)) < 500 + len(str(path))


HOSTILE_JSON = [
    ("[" * 100_000, "nested more than 50 levels deep|not valid JSON"),
    ('{"a":' * 200 + "1" + "}" * 200, "nested more than 50 levels deep"),
    ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there more than once"),
    ('{"a": NaN}', "NaN is not a finite number"),
    ('{"a": -Infinity}', "-Infinity is not a finite number"),
    ('{"a": 1e999}', "1e999 is not a finite number"),
    ('{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
    ('{"a": 1,\n "b" 2}', "is not valid JSON in line 2: Expecting ':' delimiter"),
    ("[1]", "must hold a mapping of names to values; it holds a list"),
    ("null", "it holds nothing"),
    ("", "is not valid JSON in line 1"),
]


@pytest.mark.parametrize(("text", "message"), HOSTILE_JSON, ids=[message for _, message in HOSTILE_JSON])
def test_hostile_json_is_one_short_line(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    for read in (read_mapping, lambda path: read_json(path, dict)):
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert str(path) in str(error.value) and len(str(error.value)) < 500 + len(str(path))


def test_ordinary_files_are_read(tmp_path):
    values = {"a": {"b": [1, 2.5, None, True, "x"]}, "c": "ü"}
    (tmp_path / "a.json").write_text(json.dumps(values), encoding="utf-8-sig")
    (tmp_path / "a.yaml").write_text("base: &b {b: [1, 2.5, null, true, x]}\na: *b\nc: ü\n", encoding="utf-8-sig")
    assert read_mapping(tmp_path / "a.json") == read_json(tmp_path / "a.json") == values
    assert read_mapping(tmp_path / "a.yaml") == {**values, "base": values["a"]}
    assert parse_yaml("<<: {a: 1, b: 2}\na: 3", "it") == {"a": 3, "b": 2}
    assert parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, "it") is not None
    assert read_json(tmp_path / "a.json", dict) == values


def test_what_is_no_text_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_layershuffle.common.yaml_files.MAX_YAML_BYTES", 100)
    (tmp_path / "large.yaml").write_text("a: " + "x" * 98)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, message in (
        ("large", "is larger than 100 bytes"),
        ("latin", "is not text in UTF-8"),
        ("folder", "is not a file"),
        ("pipe", "is not a file"),  # opening it would wait for a writer
    ):
        with pytest.raises(ValueError, match=message):
            read_mapping(tmp_path / f"{name}.yaml")
    with pytest.raises(FileNotFoundError):
        read_mapping(tmp_path / "missing.yaml")


def test_a_long_list_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [" + "x, " * 5_000 + "x]")
    assert len(read_mapping(tmp_path / "a.yaml")["a"]) == 5_001


def test_a_key_that_stands_twice_is_found_without_comparing_all_keys():
    num_compared = 0

    class Key(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            nonlocal num_compared
            num_compared += 1
            return str.__eq__(self, other)

    names = [f"key-{number}" for number in range(1000)]
    with pytest.raises(ValueError, match="the key 'key-999' is there more than once"):
        _without_duplicates([(Key(name), 0) for name in [*names, names[-1]]])
    assert num_compared < 5 * len(names)
