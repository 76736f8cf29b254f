"""The schedule of experiments/gpu_runs.py, with runs that only sleep, and one that trains."""

import json
import signal
import tarfile
import time

import pytest
from conftest import REPOSITORY, run_here, script
from safetensors.torch import load_file

from hf_layershuffle.checkpoints.loading import load_classifier


EXPERIMENTS = REPOSITORY / "experiments"
SMALL = "--image_size 8 --patch_size 4 --hidden_size 16 --num_attention_heads 2 --num_hidden_layers 3 --max_steps 2"


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))  # the modules of experiments/, as the script finds them


@pytest.fixture
def gpu_runs():
    return script(EXPERIMENTS / "gpu_runs.py")


def arguments_of(gpu_runs, folder, *specifications):
    return gpu_runs.Arguments(
        seconds=60,
        datasets=["digits=digits", "fashion-mnist=data/fashion-mnist", "fashion-mnist-strong=data/strong"],
        runs=list(specifications),
        output_dir=str(folder / "out"),
        work_dir=str(folder / "work"),
    )


def runs_of(gpu_runs, folder, *specifications):
    args = arguments_of(gpu_runs, folder, *specifications)
    return gpu_runs.with_needed(gpu_runs.parse_runs(args.runs, args))


def fake(gpu_runs, monkeypatch, folder, code="pass"):
    """Runs that do `code` and leave a record."""
    record = {"train_seconds": 1, "images_per_second": 2, "report": {"sequential": {"accuracy": 0.5}}}
    record["report"]["arbitrary"] = {"accuracy": {"mean": 0.4, "min": 0.3}}
    (folder / "out").mkdir()
    fake_run = folder / "fake_run.py"
    fake_run.write_text(
        "import json, pathlib, sys, time\n"
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
        f"args, method, seed = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]\n{code}\n"
        "folder = pathlib.Path(args['work_dir'], f\"{args['preset']}-{method}-{seed}\")\n"
        f"folder.mkdir(); (folder / 'record.json').write_text('{json.dumps(record)}')\n"
    )
    monkeypatch.setattr(gpu_runs, "ONE_RUN", fake_run)


def test_runs_are_named_in_order_each_after_the_one_it_needs(gpu_runs, tmp_path):
    runs = runs_of(gpu_runs, tmp_path, "fashion-mnist:plain,plain-init-distilled:1,0", "digits:order-free:2:--bf16")
    assert [run.key for run in runs] == [
        ("fashion-mnist", "plain", 1, ""),
        ("fashion-mnist", "plain-init", 1, ""),
        ("fashion-mnist", "plain-init-distilled", 1, ""),
        ("fashion-mnist", "plain", 0, ""),
        ("fashion-mnist", "plain-init", 0, ""),
        ("fashion-mnist", "plain-init-distilled", 0, ""),
        ("digits", "order-free", 2, "--bf16"),
    ]
    again = runs_of(gpu_runs, tmp_path, "digits:order-free-again:3")
    assert [run.method for run in again] == ["plain-init", "order-free-finetuned-distilled", "order-free-again"]
    (strong,) = runs_of(gpu_runs, tmp_path, "fashion-mnist-strong:plain:0")
    assert strong.args.dataset_name == "data/strong"


@pytest.mark.parametrize("wrong", ["digits:plain", "digits:plain:one", "unknown:plain:0", "cifar10:plain:0"])
def test_what_is_no_run_is_refused(gpu_runs, tmp_path, wrong):
    with pytest.raises(ValueError, match="write preset:methods:seeds, with a preset of digits"):
        runs_of(gpu_runs, tmp_path, wrong)
    with pytest.raises(ValueError, match="`methods` holds 'nothing'"):
        runs_of(gpu_runs, tmp_path, "digits:nothing:0")


def test_runs_wait_for_what_they_need_and_share_the_places(gpu_runs, tmp_path, monkeypatch, capsys):
    fake(gpu_runs, monkeypatch, tmp_path, "time.sleep(0.3)")
    runs = runs_of(gpu_runs, tmp_path, "digits:plain-init-distilled,plain,order-free:0")
    gpu_runs.Schedule(runs, 2, time.monotonic() + 60).run()
    assert [run.status for run in runs] == ["done"] * 4
    by_method = {run.method: run for run in runs}
    assert by_method["plain-init-distilled"].started > by_method["plain-init"].started + 0.3
    assert by_method["plain"].started < by_method["plain-init"].started + 0.3  # did not wait
    assert by_method["order-free"].started > by_method["plain-init"].started + 0.3  # no place for a third
    assert len((tmp_path / "out" / "records.jsonl").read_text().splitlines()) == 4
    assert "digits, plain, seed 0: sequential 0.5000, arbitrary 0.4000, worst 0.3000" in capsys.readouterr().out


def test_a_run_that_fails_is_told_and_what_needs_it_is_not_started(gpu_runs, tmp_path, monkeypatch, capsys):
    fake(gpu_runs, monkeypatch, tmp_path, "print('out of luck'); sys.exit(3)")
    runs = runs_of(gpu_runs, tmp_path, "digits:plain-init-distilled:0")
    gpu_runs.Schedule(runs, 2, time.monotonic() + 60).run()
    assert [run.status for run in runs] == ["failed (3)", "not started"]
    assert "plain-init, seed 0: failed (3)" in capsys.readouterr().out
    assert not (tmp_path / "out" / "records.jsonl").exists()


def test_a_compiled_run_that_fails_runs_again_without(gpu_runs, tmp_path, monkeypatch):
    fake(gpu_runs, monkeypatch, tmp_path, "if sys.argv[4:] == ['--torch_compile']: sys.exit(2)")
    runs = runs_of(gpu_runs, tmp_path, "digits:plain,order-free:0")
    gpu_runs.Schedule(runs, 1, time.monotonic() + 60, True).run()
    assert [(run.status, run.is_compiled) for run in runs] == [("done", False)] * 2


def test_what_does_not_fit_in_the_time_is_not_started_and_what_runs_is_stopped(gpu_runs, tmp_path, monkeypatch):
    fake(gpu_runs, monkeypatch, tmp_path, "time.sleep(0.5 if seed == '0' else 60)")
    runs = runs_of(gpu_runs, tmp_path, "digits:plain:0,1,2")
    schedule = gpu_runs.Schedule(runs, 1, time.monotonic() + 60)
    runs[0].start(False)
    runs[0].process.wait()
    assert runs[0].is_over()
    schedule.deadline = time.monotonic() + 2 * runs[0].seconds
    schedule.run()
    assert time.monotonic() >= schedule.deadline
    schedule.stop()
    assert [run.status for run in runs] == ["done", "stopped: the time was up", "not started"]
    assert runs[1].process.returncode == -signal.SIGTERM


@pytest.mark.slow
def test_runs_train_and_are_packed(gpu_runs, tmp_path):
    result = run_here(
        gpu_runs.main, "gpu_runs.py", "--seconds", 300, "--jobs", 2, "--num_orders", 3, "--num_subsets", 1,
        "--datasets", "digits=digits", "--output_dir", tmp_path / "out", "--work_dir", tmp_path / "work",
        "--runs", f"digits:order-free-finetuned-distilled:0:{SMALL}",
        "--export", f"digits:order-free-finetuned-distilled:0:{SMALL}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "models-0.tar",
        "records.jsonl",
        "results.tar.gz",
    ]
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert [record["method"] for record in records] == ["plain-init", "order-free-finetuned-distilled"]
    assert str(tmp_path) not in records[1]["command"]
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert sum(name.endswith(".log") for name in archive.getnames()) == 2
    with tarfile.open(tmp_path / "out" / "models-0.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.glob("*-float16")
    stored = load_file(folder / "model.safetensors")
    assert {str(each.dtype) for each in stored.values()} == {"torch.float16"}
    assert load_classifier(folder).config.num_hidden_layers == 3 and not (folder / "record.json").exists()
