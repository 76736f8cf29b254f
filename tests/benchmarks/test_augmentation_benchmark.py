import json

import pytest
from conftest import REPOSITORY, run_python


@pytest.mark.slow
def test_each_preset_is_held_against_a_training_step(tmp_path):
    script = REPOSITORY / "benchmarks" / "augmentation.py"
    options = ["--sizes", "tiny", "--presets", "light", "cifar", "--pairs", "1"]
    result = run_python(script, *options, fresh=True, environment={"TMPDIR": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.rglob("augmentation.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["what"] for row in rows] == ["preset light", "preset cifar"]
    assert all(row["ratio"] > 0 and row["against"] == "training step of tiny" for row in rows)
