"""The harness of the benchmarks, and that a script runs as its docstring says. No time is asserted."""

import argparse
import json
import sys

import pytest
import torch
from conftest import REPOSITORY, run_python


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import harness

    return harness


def test_both_sides_run_in_turn_and_alternate_who_is_first(harness):
    calls = []
    pairs = harness.measure_pairs(lambda: calls.append("A"), lambda: calls.append("B"), pairs=3, warm_up=1)
    assert "".join(calls) == "AB" + "ABBAAB"
    assert len(pairs.first) == len(pairs.second) == len(pairs.ratios()) == 3
    with pytest.raises(ValueError, match="`pairs` is 0; it must be at least 1"):
        harness.measure_pairs(calls.clear, calls.clear, pairs=0)


def test_a_row_is_the_median_of_the_ratios_of_pairs(harness):
    pairs = harness.Pairs([1.0, 2.0, 4.0], [1.5, 2.0, 5.0], [1.0, 1.0, 1.0], [2.0, 3.0, 4.0])
    row = pairs.row("ours", "plain", "<= 1.2")
    assert (row.ratio, row.quartiles, row.cpu_ratio, row.pairs) == (1.25, (1.125, 1.375), 3.0, 3)
    assert row.met is False
    assert harness.Row("a", "b", 6.0, target=">= 5").met is True
    assert harness.Row("a", "b", 6.0).met is None


@pytest.mark.parametrize("text", ["0", "-2", "1.5", "many", ""])
def test_counts_that_are_none_are_refused(harness, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is no positive whole number"):
        harness.positive(text)
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is no positive whole number"):
        harness.width(text)


def test_widths_that_the_heads_cannot_share_are_refused(harness):
    assert [harness.width(text) for text in ("1", "32", "100", "128", "384")] == [1, 32, 100, 128, 384]
    with pytest.raises(argparse.ArgumentTypeError, match="'200' is not a width that 3 heads share"):
        harness.width("200")


def test_peak_bytes_are_those_held_at_once(harness):
    def two_at_once_then_one_more():
        first, second = torch.empty(1000), torch.empty(1000)
        del first
        third = torch.empty(500)
        return second, third

    assert harness.peak_bytes(two_at_once_then_one_more) == pytest.approx(8000, abs=256)  # rounded up by the allocator
    assert harness.peak_bytes(lambda: None) == 0


def test_a_script_prints_its_table_and_a_trial_leaves_the_record_alone(tmp_path):
    recorded = REPOSITORY / "benchmarks" / "results" / "train_step.json"
    before = recorded.read_bytes() if recorded.exists() else None
    arguments = ("--sizes", "tiny", "--modes", "arbitrary", "depth", "--pairs", "2", "--threads", "1")
    script = REPOSITORY / "benchmarks" / "train_step.py"
    result = run_python(script, *arguments, fresh=True, environment={"TMPDIR": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert "tiny: arbitrary" in result.stdout and "tiny: depth" in result.stdout
    written = json.loads((tmp_path / "layershuffle-benchmarks" / "train_step.json").read_text())
    assert [row["unit"] for row in written["rows"]] == ["time", "peak memory"] * 2
    # The same tensors, whatever the order
    assert written["rows"][1]["ratio"] == pytest.approx(1, abs=0.001)
    assert written["environment"]["torch"] == torch.__version__
    assert (recorded.read_bytes() if recorded.exists() else None) == before


def test_the_readme_is_rendered_from_the_results(harness, monkeypatch, tmp_path):
    import run as runner

    monkeypatch.setattr(sys, "argv", ["startup.py"])
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    rows = [harness.Row("import", "transformers", 0.01, (0.0, 0.02), 4, unit="seconds added", target="<= 0.15")]
    harness.record("What does an import cost?", rows, notes="A note.")
    text = runner.render().read_text()
    assert "| import | transformers | seconds added | 0.010 | 0.000–0.020 |  | 4 | <= 0.15 | yes |  |" in text
    assert "What does an import cost?" in text and "A note." in text
    assert "Not recorded: no GPU was at hand" in text
    assert runner.rows_of(runner.load_results()["startup"]) == [
        harness.Row("import", "transformers", 0.01, [0.0, 0.02], 4, unit="seconds added", target="<= 0.15")
    ]
    assert runner.is_recorded("startup") and not runner.is_recorded("compile")


def test_the_cost_of_fine_tuning_is_measured_of_the_command_that_the_page_shows(
    harness, monkeypatch, tmp_path, capsys
):
    import fine_tune

    page = (REPOSITORY / "README.md").read_text()
    shown = next(block for block in page.split("```") if "--preset order-free --per_device_train_batch_size" in block)
    words = shown.replace("\\\n", " ").split()
    measured = fine_tune.OPTIONS.split()
    given = ["--model_name_or_path", "--dataset_name", "--output_dir", "--torch_compile", "--dataloader_num_workers"]
    left = [word for index, word in enumerate(words) if not {word, words[index - 1]} & set(given)]
    assert sorted(left) == sorted(["text", "hf-layershuffle", "train", *measured])

    options = ["--tiny", "--device", "cpu", "--batch_size", "8", "--steps", "2", "--warm_up", "1"]
    monkeypatch.setattr(sys, "argv", ["fine_tune.py", *options])
    monkeypatch.setattr(fine_tune.tempfile, "gettempdir", lambda: str(tmp_path))
    fine_tune.main()
    written = json.loads((tmp_path / "layershuffle-benchmarks" / "fine_tune.json").read_text())
    with pytest.raises(SystemExit, match="second pass"):
        monkeypatch.setattr(sys, "argv", ["fine_tune.py", *options, "--options", "--gradient_accumulation_steps 2"])
        fine_tune.main()
    seconds, speed, hours, _ = (row["ratio"] for row in written["rows"])
    assert speed == pytest.approx(8 / seconds)
    assert hours == pytest.approx(10 * 100_000 / speed / 3600)
