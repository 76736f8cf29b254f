"""`hf-layershuffle swarm simulate`, as a user runs it."""

import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, run_cli


SHORT = ("--num_requests", "60", "--failure_rates", "0,0.2")


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_prints_a_table_and_writes_report_and_picture(tmp_path):
    result = run_cli("swarm", "simulate", "--output_dir", "out", *SHORT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "free order, up to 2 skips" in result.stdout and "SkipPipe's paths, 1 of 6 skipped" in result.stdout
    assert "Saved to out" in result.stdout
    assert files_of(tmp_path / "out") == ["simulation.json", "simulation.png", "simulation.svg"]
    first = (tmp_path / "out" / "simulation.json").read_bytes()
    assert json.loads(first)["models"]["plain"]["model"] == "vit-digits-plain"
    # The same again takes what is there; another one is refused, unless it may replace it
    again = run_cli("swarm", "simulate", "--output_dir", "out", *SHORT, cwd=tmp_path)
    assert again.returncode == 0 and (tmp_path / "out" / "simulation.json").read_bytes() == first
    other = ("swarm", "simulate", "--output_dir", "out", *SHORT, "--seed", "1")
    refused = run_cli(*other, cwd=tmp_path)
    assert refused.returncode == 2 and "'out' holds the report of another simulation" in refused.stderr
    assert (tmp_path / "out" / "simulation.json").read_bytes() == first
    assert run_cli(*other, "--overwrite", cwd=tmp_path).returncode == 0
    assert (tmp_path / "out" / "simulation.json").read_bytes() != first


def test_reports_and_sizes_are_the_users_own(tmp_path):
    card = REPOSITORY / "model_cards" / "vit-cifar10-layershuffle"
    arguments = ("--report", str(card), "--nodes", "24", "--replicas", "3", "--skips", "3", "--num_requests", "60")
    rest = ("--failure_rates", "0.1", "--service", "lognormal", "--stragglers", "0.1", "--arrival_rate", "50")
    result = run_cli("swarm", "simulate", "--output_dir", "out", *arguments, *rest, "--hangs", "0.5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "simulation.json").read_text())
    assert list(report["models"]) == ["free"]
    assert "free order, 3 copies" in result.stdout and "free order, up to 3 skips" in result.stdout
    assert (
        report["settings"]["nodes"] | {"num_layers": 12, "nodes": 24, "hangs": 0.5, "arrival_rate": 50.0}
        == (report["settings"]["nodes"])
    )
    assert all(0.5 < point["accuracy"]["free"] < 0.7 for point in report["points"])


def test_without_a_report_of_that_depth_there_are_no_accuracies(tmp_path):
    result = run_cli("swarm", "simulate", "--output_dir", "out", *SHORT, "--num_layers", "4", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "No accuracies: the reports that come along are of 6 layers, not of 4. Give --report." in result.stdout
    assert json.loads((tmp_path / "out" / "simulation.json").read_text())["models"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "`nodes` is 0; it must be an integer of at least 1"),
        (["--replicas", "7"], "`replicas` is 7, and there are 6 nodes"),
        (["--failure_rates", "0,1"], "`failure_rate` is 1.0; it must be a fraction from 0 to below 1"),
        (["--failure_rates", "0,a"], "--failure_rates is '0,a'; give numbers from 0 to below 1, separated by commas"),
        (["--skips", "6"], "`skips` is 6, and the model has 6 layers"),
        (["--deadline", "0"], "`deadline` is 0.0; it must be a number of seconds above 0"),
        (["--service", "gamma"], "`service` is 'gamma'; it must be one of constant, exponential, lognormal"),
        (["--skip_ratio", "1"], "`skip_ratio` is 1.0; it must be a fraction"),
        (["--report", "nowhere.json"], "nowhere.json"),
        (["--report", "wrong.json"], "'wrong.json' is not a robustness report"),
        (["--num_layers", "12", "--report", "CARD"], "is of 6 layers, and `num_layers` is 12; they must be equal"),
        (["--report", "CARD", "--report", "CARD"], "are both of order-free models"),
    ],
)
def test_bad_values_are_one_line_and_leave_nothing(tmp_path, arguments, message):
    (tmp_path / "wrong.json").write_text("{}")
    card = str(REPOSITORY / "model_cards" / "vit-digits-layershuffle")
    arguments = [card if each == "CARD" else each for each in arguments]
    result = run_cli("swarm", "simulate", "--output_dir", "out", *SHORT, *arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stdout
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert files_of(tmp_path) == ["wrong.json"]


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    result = run_cli("swarm", "simulate", "--output_dir", "out", *SHORT, cwd=tmp_path)
    assert result.returncode == 2 and "is not empty and holds no 'simulation.json'" in result.stderr
    assert files_of(tmp_path / "out") == ["thesis.tex"]


def test_one_that_is_stopped_says_how_to_go_on_and_does(tmp_path):
    command = [sys.executable, "-m", "hf_layershuffle", "swarm", "simulate", "--output_dir", "out"]
    process = subprocess.Popen(
        [*command, "--num_requests", "150"], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    progress = tmp_path / "out" / ".simulation.progress.json"
    give_up = time.monotonic() + 120
    while not progress.exists() and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "stopped; run the same command again to go on" in said
    assert files_of(tmp_path / "out") == [".simulation.progress.json"]
    done = json.loads(progress.read_text())["points"]
    assert done
    result = run_cli("swarm", "simulate", "--output_dir", "out", "--num_requests", "150", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert files_of(tmp_path / "out") == ["simulation.json", "simulation.png", "simulation.svg"]
    points = json.loads((tmp_path / "out" / "simulation.json").read_text())["points"]
    assert len(points) == 56 and all(point in points for point in done)
