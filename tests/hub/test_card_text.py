"""What a person wrote into a card stays."""

import re
import shutil

import pytest
from huggingface_hub import EvalResult, ModelCard, metadata_load
from support.cards import describe

from hf_layershuffle.hub.card_text import combine_cards, is_edited, mark_published, split_card, update_card_text
from hf_layershuffle.hub.folder_records import record_training
from hf_layershuffle.hub.model_card import write_model_card


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A folder with everything that a card can show."""
    return describe(tmp_path_factory.mktemp("models") / "vit-tiny")


@pytest.fixture
def folder(described, tmp_path):
    return shutil.copytree(described, tmp_path / "vit-tiny")


def test_a_renewed_card_is_the_fresh_one(folder):
    fresh = (folder / "README.md").read_text()
    earlier = re.sub(r"value: \S+", "value: 0.9999", fresh)
    assert earlier != fresh
    (folder / "README.md").write_text(earlier)
    write_model_card(folder, repo_id="org/vit-tiny")
    assert (folder / "README.md").read_text() == fresh


def test_writing_a_card_again_changes_nothing(folder):
    before = (folder / "README.md").read_bytes()
    assert write_model_card(folder, repo_id="org/vit-tiny")
    assert (folder / "README.md").read_bytes() == before


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_only_our_sections_and_metadata_are_renewed(folder, line_break):
    path = folder / "README.md"
    text = path.read_text()
    text = text.replace("# vit-tiny\n", "# My model\n\nTrained on a *rainy* day.\n")
    text = text.replace("<!-- hf-layershuffle: limits -->", "").replace(
        "<!-- /hf-layershuffle: limits -->", "Mine now."
    )
    text = text.replace("library_name: transformers", "language: [en]  # a comment\nlibrary_name: transformers")
    text = text.replace("tags:\n", "tags:\n- mine\n").replace("license: mit", "license: openrail")
    text = text.replace("pipeline_tag: image-classification", "pipeline_tag: image-feature-extraction")
    text = text.replace("widget:\n", "widget:\n- src: mine.png\n")
    path.write_bytes(text.replace("\n", line_break).encode())
    record_training(folder, arguments={"learning_rate": 0.125}, dataset="org/letters", tags=["new"])
    assert write_model_card(folder, repo_id="org/renamed")

    content = path.read_bytes().decode()
    assert content.count("\n") == content.count(line_break) and ("\r" in content) == ("\r" in line_break)
    content = content.replace("\r\n", "\n")
    assert "# My model\n\nTrained on a *rainy* day.\n" in content and "Mine now." in content
    assert "language: [en]  # a comment\n" in content
    assert "| `learning_rate` | `0.125` |" in content and "0.0005" not in content
    assert 'repo_id = "org/renamed"' in content and 'repo_id = "org/vit-tiny"' not in content
    data = metadata_load(path)
    assert data["tags"] == ["mine", "layershuffle", "vision-transformer", "new"]
    assert data["license"] == "openrail" and data["pipeline_tag"] == "image-feature-extraction"
    assert [entry["src"] for entry in data["widget"]] == ["mine.png", "examples/0.png"]


def test_a_persons_results_stay_beside_ours(folder):
    path = folder / "README.md"
    card = ModelCard.load(path)
    theirs = EvalResult("image-classification", "org/other", "Other", "f1", 0.125)
    card.data.eval_results = [theirs, *card.data.eval_results]
    card.save(path)
    (folder / "robustness.json").unlink()
    write_model_card(folder)
    results = ModelCard.load(path).data.eval_results
    assert [result.metric_value for result in results] == [0.125, 0.5]


def test_results_and_examples_that_are_gone_leave_the_metadata(folder):
    path = folder / "README.md"
    ours = path.read_text()
    card = ModelCard.load(path)
    theirs = EvalResult("image-classification", "org/other", "Other", "f1", 0.125)
    card.data.eval_results = [theirs, *card.data.eval_results]
    card.data.widget = [{"src": "examples/mine.png"}, *card.data.widget]
    for name in ("robustness.json", "training.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "examples")
    card.save(path)
    write_model_card(folder)
    assert [result.metric_value for result in ModelCard.load(path).data.eval_results] == [0.125]
    assert metadata_load(path)["widget"] == [{"src": "examples/mine.png"}]
    path.write_text(ours)
    write_model_card(folder)
    assert not {"model-index", "widget"} & set(metadata_load(path))
    assert "Not evaluated" in path.read_text()
    # Nor do ours come back from the Hub
    combined = split_card(combine_cards(path.read_text(), ours, "the Hub"))[1]
    assert not {"model-index", "widget", "base_model", "base_model_relation"} & set(combined)


def test_origins_that_are_no_longer_so_leave_the_metadata(folder):
    path = folder / "README.md"
    path.write_text(path.read_text().replace("datasets:\n", "datasets:\n- org/mine\n"))
    (folder / "robustness.json").unlink()
    record_training(folder, arguments={}, dataset="org/digits", num_train_images=5, base_model="org/new")
    write_model_card(folder)
    data = metadata_load(path)
    assert data["base_model"] == "org/new" and data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["org/mine", "org/digits"]
    record_training(folder, arguments={}, dataset="org/letters", num_train_images=5)
    write_model_card(folder)
    data = metadata_load(path)
    assert data["datasets"] == ["org/mine", "org/letters"]
    assert not {"base_model", "base_model_relation"} & set(data)


@pytest.mark.parametrize("head", ["", "---\nlicense: mit # free\ntags: [one, two]\nwidget:\n- src: mine.png\n---\n"])
def test_a_card_without_our_sections_keeps_its_text(folder, head, caplog):
    path = folder / "README.md"
    path.write_text(f"{head}# Mine\n\nOnly my words.\n")
    assert not write_model_card(folder)
    assert "none of our sections" in caplog.text
    assert path.read_text().split("---\n")[-1] == "# Mine\n\nOnly my words.\n"
    data = metadata_load(path)
    assert data["pipeline_tag"] == "image-classification" and "layershuffle" in data["tags"]
    if head:
        assert data["license"] == "mit" and data["tags"][:2] == ["one", "two"]
        assert "license: mit # free\n" in path.read_text()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"---\ntags: [a\n---\n# x\n", "not valid YAML.*Mend or remove"),
        (b"---\n- a\n---\n# x\n", "not a mapping"),
        (b"\xff\xfe# x", "not text in UTF-8"),
    ],
)
def test_a_card_that_cannot_be_read_is_left_alone(folder, content, message):
    (folder / "README.md").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        write_model_card(folder)
    assert (folder / "README.md").read_bytes() == content


def test_metadata_written_in_unusual_ways_survives():
    fresh = "---\ntags:\n- ours\n---\n"
    for block in (
        "{license: mit, tags: [mine]}",
        '"license": mit\n"tags":\n  - mine',
        "license: mit\ntags: [\n  mine]",
    ):
        text, _ = update_card_text(f"---\n{block}\n---\nText", fresh)
        assert split_card(text)[1] == {"license": "mit", "tags": ["mine", "ours"]}
        assert text.endswith("\n---\nText")


def test_it_is_known_which_card_a_person_edited(folder):
    ours = (folder / "README.md").read_text()
    assert not is_edited(ours)
    edited = ours.replace("# vit-tiny", "# vit-tiny\n\nMine.")
    assert is_edited(edited) and not is_edited(mark_published(edited))
    assert is_edited("# A person's") and not is_edited("---\nlicense: mit\n---\n")
    other = mark_published(ours.replace("# vit-tiny", "# vit-tiny\n\nOther."))
    assert combine_cards(ours, edited, "the Hub") == edited
    assert combine_cards(edited, ours, "the Hub") == edited
    assert combine_cards(edited, other, "the Hub") == edited
    assert combine_cards(other, edited, "the Hub") == edited
    with pytest.raises(ValueError, match="edited both here and on the Hub"):
        combine_cards(edited, other + "\nMore.", "the Hub")
    # metadata that only the other has is taken over
    assert split_card(combine_cards("# Mine\n", "---\nlanguage: da\n---\n", "the Hub"))[1] == {"language": "da"}
