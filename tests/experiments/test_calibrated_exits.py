import re
import shutil

import pytest
from conftest import REPOSITORY, run_here, script

import hf_layershuffle as ls


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The example model as two seeds' free models, and with an untrained head as those with trained exits."""
    root = tmp_path_factory.mktemp("models")
    exits = ls.load_classifier(ls.example_model(), halting_head=True)
    for seed in (0, 1):
        free = root / f"fashion-mnist-order-free-finetuned-distilled-{seed}-held_out"
        shutil.copytree(ls.example_model(), free)
        shutil.copytree(free, root / f"fashion-mnist-exits-{seed}-held_out")
        exits.save_pretrained(root / f"fashion-mnist-exits-{seed}-held_out")
    return root


def test_the_table_says_what_calibration_finds(folders, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "experiments")
    arguments = ("--dataset_name", "digits", "--folders", folders, "--seeds", 0, 1)
    main = script(REPOSITORY / "experiments" / "calibrated_exits.py").main
    header, _, *lines = run_here(main, "calibrated_exits.py", *arguments).stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [row[2] for row in rows] == ["probability", "entropy", "margin", "patience"] * 2 + ["halting"]
    assert all(len(row) == header.count("|") - 1 for row in rows)
    # Two seeds of the same weights do not differ; few layers suffice for the digits, at little loss
    assert all(row[1].endswith("± 0.0000") and float(row[1].split()[0]) > 0.9 for row in rows)
    assert all(1 <= float(row[5]) <= 6 for row in rows)
    assert [float(row[4].split()[0]) <= 0.03 for row in rows[:4]] == [True] * 4
    drawn = [re.fullmatch(r"Q-exit: (\S+) after (\S+) layers; by a coin, 20 draws: .* ± (\S+) after .*", line)
             for line in lines if line.startswith("Q-exit")]  # fmt: skip
    # A fresh head leaves nobody by Q-exit: 1 - 0.9 ** 5 is below 0.5; by a coin some leave
    assert [found[2] for found in drawn] == ["6.00"] * 2 and all(float(found[3]) > 0 for found in drawn)
