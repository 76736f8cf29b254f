import json

import pytest
import torch
from conftest import REPOSITORY, run_python


@pytest.fixture
def early_exit(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import early_exit

    return early_exit


def test_each_policy_is_held_against_all_layers(tmp_path):
    script = REPOSITORY / "benchmarks" / "early_exit.py"
    options = ["--hidden_size", "32", "--batch_size", "4", "--pairs", "1", "--threads", "1"]
    result = run_python(script, *options, fresh=True, environment={"TMPDIR": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.rglob("early_exit.json")
    rows = json.loads(path.read_text())["rows"]
    parts = ("early exit at 25%", "early exit at 50%", "early exit at 75%", "controller, 50%")
    assert [row["what"] for row in rows] == [f"{part} of the layers, batch 4" for part in parts]
    assert [row["target"] for row in rows] == ["", "<= 0.6", "", ""]


def test_the_threshold_is_that_whose_mean_depth_comes_closest(early_exit):
    confidence = torch.tensor([[0.2, 0.9], [0.6, 0.3], [0.4, 0.4]])  # three layers, two images
    # At 0.9 the depths are 3 and 1; from above 0.2 to 0.6 they are 2 and 1; at 0.2 both are 1
    assert early_exit.choose_threshold(confidence, 3) == pytest.approx(0.9)
    assert 0.25 < early_exit.choose_threshold(confidence, 1.4) < 0.65
    assert early_exit.choose_threshold(confidence, 1) == pytest.approx(0.2)


def test_logits_that_are_not_those_of_the_depth_are_noticed(early_exit, monkeypatch):
    model = early_exit.build_model(32, "cpu")
    images = torch.randn(4, 3, 224, 224)
    confidence = early_exit.confidence_after_each_layer(model, images)
    threshold = early_exit.choose_threshold(confidence, 6)
    lengths = early_exit.check_logits(model, images, threshold)
    sure = confidence >= threshold
    assert lengths == [int(column.nonzero()[0]) + 1 if column.any() else 12 for column in sure.T]
    monkeypatch.setattr(early_exit, "TOLERANCE", -1)
    with pytest.raises(AssertionError, match="the logits differ"):
        early_exit.check_logits(model, images, threshold)
