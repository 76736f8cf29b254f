"""Runs experiments/lost_workers.py as a user does, on few digits and with workers in threads."""

import json

import pytest
from conftest import REPOSITORY, run_here, script


PROGRAM = REPOSITORY / "experiments" / "lost_workers.py"
CARDS = REPOSITORY / "model_cards"
MODELS = (CARDS / "vit-digits-plain", CARDS / "vit-digits-layershuffle")
MARKERS = [f"<!-- {word} lost-workers: rendered by experiments/lost_workers.py -->" for word in ("begin", "end")]


def lost_workers(folder, *arguments):
    paths = ("--records", folder / "records.json", "--pages", folder / "page.md")
    return run_here(script(PROGRAM).main, "lost_workers.py", *arguments, *paths)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lost-workers")
    (folder / "page.md").write_text("before\n\n" + "\n".join(MARKERS) + "\n\nafter\n")
    arguments = ("digits", *MODELS, "--transport", "local", "--max_samples", 60, "--batch_size", 10)
    result = lost_workers(folder, *arguments, "--draws", 1)
    assert result.returncode == 0, result.stderr
    return folder, arguments, json.loads((folder / "records.json").read_text())["digits"]


def test_accuracies_are_of_the_workers_lost(measured):
    _, _, record = measured
    found = {curve: draws[0] for curve, draws in record["accuracies"].items()}
    assert {len(accuracies) for accuracies in found.values()} == {6}  # 0 to 5 of 6 workers
    assert found["order-free"][0] > 0.9 and found["plain, in its order"][0] > 0.9
    assert found["fixed pipeline"][1:] == [0.0] * 5  # no answer
    assert found["order-free"][2] > found["plain, in its order"][2] > 0  # an answer, and not as good
    assert found["order-free"][2] > found["plain, any order"][2]


def test_a_further_draw_keeps_the_earlier_ones(measured):
    folder, arguments, before = measured
    assert lost_workers(folder, *arguments, "--draws", 2).returncode == 0
    after = json.loads((folder / "records.json").read_text())["digits"]
    for curve, draws in after["accuracies"].items():
        assert len(draws) == 2 and draws[:1] == before["accuracies"][curve]
    page = (folder / "page.md").read_text()
    assert page.startswith("before") and page.endswith("after\n")
    assert "Mean over 2 draws" in page and "| 0.000 |" in page
    assert (folder / "lost-workers.png").is_file()


def test_models_of_other_depths_are_refused(tmp_path):
    shipped = CARDS / "vit-fashion-mnist-layershuffle"
    result = lost_workers(tmp_path, "digits", MODELS[0], shipped, "--transport", "local")
    assert result.returncode == 2 and "compare models of the same depth" in result.stderr
    assert not (tmp_path / "records.json").exists()
