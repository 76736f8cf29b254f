"""docs/encoders.md: its rows are those of the configurations, and it says what the checks say."""

import json
import re

import pytest
from conftest import REPOSITORY, run_here, script
from support.encoder_checks import CHECKS, SHARDING
from support.encoder_sweep import RESULTS, classification_classes
from support.encoders import ENCODERS, GROUPS, REFUSED

from hf_layershuffle.common.files import write_text
from hf_layershuffle.models.families import TESTED_FAMILIES


EXPERIMENTS = REPOSITORY / "experiments"
RECORDS = json.loads((EXPERIMENTS / "records" / "encoders.json").read_text())
PAGE = (REPOSITORY / "docs" / "encoders.md").read_text()


@pytest.fixture
def table(monkeypatch, tmp_path):
    """The command, writing to a folder of the test."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    module = script(EXPERIMENTS / "encoder_table.py")
    write_text(tmp_path / "records.json", json.dumps(RECORDS))
    monkeypatch.setattr(module, "RECORDS", tmp_path / "records.json")
    monkeypatch.setattr(module, "PAGE", tmp_path / "encoders.md")
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    return module


def cells(name: str) -> list[str]:
    """Those of an encoder's row on the page."""
    (row,) = re.findall(rf"^\| {re.escape(name)}<br>.*$", PAGE, re.MULTILINE)
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_the_page_is_what_is_recorded(table):
    run_here(table.main, "encoder_table.py", "--render")
    assert table.PAGE.read_text() == PAGE


def test_rows_and_groups_are_those_of_the_configurations():
    assert re.findall(r"^\| (.*?)<br>", PAGE, re.MULTILINE) == list(ENCODERS)
    assert re.findall(r"^## (.*)$", PAGE, re.MULTILINE)[: len(GROUPS)] == list(GROUPS)
    assert len(ENCODERS) == sum(map(len, GROUPS.values())) >= 30  # no name twice
    assert all(encoder.config().num_labels == 5 for encoder in ENCODERS.values() if encoder.is_classifier)


@pytest.mark.parametrize("name", ENCODERS)
def test_no_cell_says_other_than_the_tests(name):
    encoder, recorded = ENCODERS[name], RECORDS["checks"]["found"][name]
    recorded = {**recorded, SHARDING: RECORDS["fsdp2"]["found"][name]}
    assert list(recorded) == list(CHECKS)
    for check, cell in zip(CHECKS, cells(name), strict=True):
        assert (cell == "✓") == (check not in encoder.limits) == (recorded[check] is None), check
        if check in encoder.limits:
            assert re.search(encoder.limits[check].message, recorded[check]), check
            assert encoder.limits[check].why in PAGE


def test_families_that_are_tried_at_load_are_those_without_a_row():
    rows = {encoder.model_type for encoder in ENCODERS.values()}
    # These have tests of their own
    assert rows == TESTED_FAMILIES - {"timm_wrapper", "mistral", "gemma3_text"}


def test_refusals_are_in_the_words_of_the_code():
    recorded = RECORDS["refused"]["found"]
    assert list(recorded) == sorted(encoder.name for encoder in REFUSED)
    for encoder in REFUSED:
        assert re.search(encoder.limits["refused"].message, recorded[encoder.name])
        assert f"| `{encoder.model_class}` | {recorded[encoder.name]} |" in PAGE


def test_the_sweep_is_told_whole():
    found = RECORDS["sweep"]["found"]
    if RECORDS["sweep"]["versions"]["transformers"] == transformers_version():
        assert found.keys() == classification_classes().keys()
    assert {each["result"] for each in found.values()} <= set(RESULTS)
    assert sum(each["result"] == "passed" for each in found.values()) > 100
    for name in found:
        assert f"`{name}`" in PAGE, f"{name} is not on the page"


def transformers_version() -> str:
    import transformers

    return transformers.__version__


def test_a_part_is_run_and_goes_on_where_it_stopped(table, monkeypatch, capsys):
    class Stop(Exception):
        pass

    ran = []

    def outcome(check, encoder):
        ran.append(encoder.name)
        if len(set(ran)) == 3 and "stopped" not in ran:
            ran.append("stopped")
            raise Stop
        return None if encoder.name != "DeiT" else "a reason"

    monkeypatch.setattr(table, "outcome", outcome)
    before = table.RECORDS.read_text()
    with pytest.raises(Stop):
        run_here(table.main, "encoder_table.py", "--only", "checks")
    assert table.RECORDS.read_text() == before and not table.PAGE.exists()
    assert list(dict.fromkeys(ran)) == ["ViT", "ViT, encoder", "DeiT", "stopped"]
    result = run_here(table.main, "encoder_table.py", "--only", "checks", "--resume")
    assert result.stdout.count("\n") == len(ENCODERS) - 2 and ran.count("ViT") == len(CHECKS) - 1
    assert json.loads(table.RECORDS.read_text())["checks"]["found"]["DeiT"] == dict.fromkeys(CHECKS[:-1], "a reason")
    assert "plain: `a reason`" in table.PAGE.read_text()
