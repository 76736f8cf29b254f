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


def test_each_image_is_held_against_the_layers_that_it_ran(early_exit):
    model = early_exit.build_model(32)
    images = early_exit.draw_images(6)
    confidence = early_exit.confidence_after_each_layer(model, images)
    threshold = early_exit.choose_threshold(confidence, 6)
    layers = early_exit.layers_by_threshold(model, images, threshold)
    sure = confidence >= threshold
    assert list(map(len, layers)) == [int(column.nonzero()[0]) + 1 if column.any() else 12 for column in sure.T]
    chosen = early_exit.layers_by_controller(model, images, 5)
    assert all(len(set(each)) == 5 for each in chosen) and len(set(chosen)) > 1
    for each, options in ((layers, {"exit_threshold": threshold}), (chosen, {"layer_budget": 5})):
        early_exit.check_logits(model, images, each, **options)
        wrong = [*each[:-1], each[-1][:-1] if len(each[-1]) > 1 else (0, 1)]
        with pytest.raises(AssertionError, match="the logits differ"):
            early_exit.check_logits(model, images, wrong, **options)
