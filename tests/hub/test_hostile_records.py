"""Texts of others in cards are shown and never read as markup; records of the wrong kind are one line."""

import json
import re

import pytest
import yaml
from conftest import Architecture
from huggingface_hub.repocard import metadata_load

from hf_layershuffle.common.markdown import escape, in_code, in_code_deep
from hf_layershuffle.hub.card_text import split_card
from hf_layershuffle.hub.model_card import build_model_card, write_model_card


EVIL = "x`|<script>alert(1)</script>[a](javascript:b)\n\n# Heading\n<!-- /hf-layershuffle: training -->\n---\n![p](http://e)"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("vit-tiny_model 2.0", "vit-tiny_model 2.0"),
        ("a*b*_c_ ~~d~~ `e`", r"a\*b\*\_c\_ \~\~d\~\~ \`e\`"),
        ("[a](b) ![c](d)", r"\[a\](b) !\[c\](d)"),
        ("<b>&amp;|$x$\\", r"&lt;b&gt;&amp;amp;\|\$x\$" + "\\\\"),
        (" a\n\r\n# b\t\x00\x1b[31m\u202e", r"a # b \[31m"),
        (None, "None"),
        (3, "3"),
    ],
)
def test_text_is_shown_as_it_is(text, escaped):
    assert escape(text) == escaped


def test_between_backticks_nothing_ends_the_code_or_the_cell():
    assert in_code("org/my_model-2.0 [x]*") == "org/my_model-2.0 [x]*"
    assert in_code("a`b|c\nd <!-- e -->") == "a'b¦c d <! -- e -- >"
    assert in_code_deep({"a`": ["|", 1, None, {"b": "\n`"}]}) == {"a'": ["¦", 1, None, {"b": "'"}]}


@pytest.fixture
def folder(tmp_path):
    Architecture("vit").classifier().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def write(folder, name: str, **values) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(values))


def config_with(folder, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    write(folder, "config.json", **config, **values)


def check_card(folder) -> str:
    """Writes the card; nothing of `EVIL` is markup in it, and its sections are ours."""
    write_model_card(folder)
    text = (folder / "README.md").read_text()
    _, metadata, body = split_card(text)
    assert metadata["library_name"] == "transformers"
    assert body.count("<!-- hf-layershuffle:") == body.count("<!-- /hf-layershuffle:") == 6
    text_alone = re.sub("```.*?```", "", body, flags=re.DOTALL)
    text_alone = re.sub(r"\\[^\w]", "", text_alone)  # without what is escaped
    for line in text_alone.splitlines():
        assert line.count("`") % 2 == 0, line
        if "x" in line and line.startswith("| "):  # a cell more would shift the row
            assert line.count("|") in (3, 4), line
    text_alone = re.sub("`[^`\n]*`", "", text_alone)
    for markup in ("<script>", "\n# Heading", "\n---\n", "[a](", "![p]", "alert(1)</"):
        assert markup not in text_alone, markup
    write_model_card(folder)  # and again: what stands there is recognised as ours
    assert (folder / "README.md").read_text() == text
    return text


def test_texts_of_a_training_record_are_no_markup(folder):
    strings = {"dataset": EVIL, "base_model": EVIL, "teacher": EVIL, "tags": [EVIL]}
    write(
        folder,
        "training.json",
        **strings,
        arguments={EVIL: EVIL, "list": [EVIL]},
        versions={"torch": EVIL},
        metrics={"eval_accuracy": 0.5},
    )
    check_card(folder)
    assert EVIL in metadata_load(folder / "README.md")["tags"]


def test_texts_of_pruning_export_and_merge_records_are_no_markup(folder):
    config_with(folder, pruned_from={"model": EVIL, "num_layers": 5, "layers": [0, 1, 2, 3]})
    check_card(folder)
    write(folder, "export.json", source=EVIL, execution_order=[0])
    check_card(folder)
    (folder / "export.json").unlink()
    sources = {EVIL: {"path": EVIL, "revision": EVIL}, "b": "x|y"}
    (folder / "merge_plan.yaml").write_text(yaml.safe_dump({"sources": sources}))
    check_card(folder)


def test_names_of_folders_files_and_repositories_are_no_markup(folder, tmp_path):
    name = 'x"`|<b>\n[a](b)'
    evil = tmp_path / name
    folder.rename(evil)
    (evil / "a b](c).png").write_bytes(b"")
    text = str(build_model_card(evil, revision='v1", trust_remote_code=True, x="'))
    assert '# x"\\`\\|&lt;b&gt; \\[a\\](b)\n' in text
    assert "(a%20b%5D%28c%29.png)" in text
    blocks = text.split("```python\n")[1:]
    assert blocks
    for block in blocks:
        code = block.split("```")[0]
        compile(code, "card", "exec")
        assert r'revision="v1\", trust_remote_code=True, x=\""' in code


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("training.json", "[]", "must hold a mapping"),
        ("training.json", '{"metrics": [1]}', "`metrics`: .*dictionary; it is"),
        ("training.json", '{"metrics": {"eval_accuracy": "high"}}', r"`metrics\.eval_accuracy`: .*number.*'high'"),
        ("training.json", '{"metrics": {"eval_accuracy": NaN}}', "NaN is not a finite number"),
        ("training.json", '{"tags": "one"}', "`tags`: .*list.*'one'"),
        ("training.json", '{"dataset": {"a": 1}}', r"`dataset`: .*string.*\{'a': 1\}"),
        ("training.json", '{"versions": 3}', "`versions`: "),
        ("training.json", '{"base_model": 3}', "`base_model`: "),
        ("training.json", '{"tags": [], "tags": []}', "the key 'tags' is there more than once"),
        ("export.json", "{}", "`source`: Field required"),
        ("export.json", '{"source": "a", "execution_order": "012"}', "`execution_order`: .*list"),
        ("examples/examples.json", "{}", "must hold a list"),
        ("examples/examples.json", "[1]", r"`\[0\]`: "),
        (
            "examples/examples.json",
            '[{"src": "a.png", "example_title": "a", "output": 3}]',
            r"`\[0\]\.output`: .*list",
        ),
        ("merge_plan.yaml", "- 1", "must hold a merge plan"),
        ("merge_plan.yaml", "sources: {a: {path: [1]}}", "`path`: .*string"),
        ("robustness.json", '{"sequential": {"accuracy": "high"}}', r"`sequential\.accuracy`: .*number.*'high'"),
        ("robustness.json", '{"config": {"shuffle_mode": "evil"}}', r"`config\.shuffle_mode`: "),
        ("robustness.json", '{"environment": {"versions": [1]}}', r"`environment\.versions`: "),
        ("robustness.json", "[]", "is not a robustness report"),
        ("robustness.json", "[" * 5000, "is not a robustness report"),
    ],
)
def test_a_record_of_the_wrong_kind_is_one_line(folder, name, text, message):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        write_model_card(folder)
    assert name in str(error.value) and "\n" not in str(error.value) and not (folder / "README.md").exists()


@pytest.mark.parametrize("value", ["text", {"model": 3}, {"model": "a", "num_layers": "many", "layers": []}, [1]])
def test_a_pruned_origin_of_the_wrong_kind_is_one_line(folder, value):
    config_with(folder, pruned_from=value)
    with pytest.raises(ValueError, match=r"`pruned_from` of '.*config\.json' is not what its name says"):
        write_model_card(folder)
