import pytest
import torch
from support.models import randomize

import hf_layershuffle as ls
from hf_layershuffle.adaptive.controller_policies import (
    ControlledForAll,
    ControlledLayers,
    RandomLayers,
    mean_scores,
)
from hf_layershuffle.adaptive.policies import Calibration


@pytest.fixture
def calibration():
    torch.manual_seed(0)
    config = ls.LayerShuffleViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        num_labels=5, layer_controller=True, execution_order=[3, 0, 2, 1],
    )  # fmt: skip
    model = randomize(ls.LayerShuffleViTForImageClassification(config)).eval()
    images = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    batches = [{"pixel_values": part, "labels": torch.zeros(len(part), dtype=torch.int64)} for part in images.split(4)]
    return Calibration(model, batches, batches, [1, 2, 4])


@torch.inference_mode()
def test_each_example_runs_its_layers(calibration):
    inputs = {"pixel_values": calibration.loader[0]["pixel_values"]}
    for count, setting in zip((1, 2, 4), ControlledLayers(calibration).settings()):
        outputs = setting.run(inputs)
        assert outputs.num_layers_run.tolist() == [count] * 4 and setting.chosen == {"layer_budget": count}
        assert torch.equal(outputs.logits, calibration.model(**inputs, layer_budget=count).logits)
    assert setting.label == "4 layers"


@torch.inference_mode()
def test_all_examples_run_the_layers_with_the_best_mean(calibration):
    model = calibration.model
    images = torch.cat([batch["pixel_values"] for batch in calibration.loader])
    expected = model.layer_controller(model.vit.embeddings(images)).mean(0)
    torch.testing.assert_close(mean_scores(model, calibration), expected)
    for count, setting in zip((1, 2, 4), ControlledForAll(calibration).settings()):
        order = setting.chosen["execution_order"]
        assert set(order) == set(expected.topk(count).indices.tolist())
        assert order == [layer for layer in [3, 0, 2, 1] if layer in order]  # in the model's sequence
        assert setting.run({"pixel_values": images}).execution_order.tolist() == order


@torch.inference_mode()
def test_random_layers_stay_in_sequence(calibration):
    setting = RandomLayers(calibration).settings()[1]
    assert setting.is_random
    orders = [setting.run(calibration.loader[0]).execution_order.tolist() for _ in range(20)]
    assert len(set(map(tuple, orders))) > 2
    assert all(order == [layer for layer in [3, 0, 2, 1] if layer in order] and len(order) == 2 for order in orders)


def test_only_a_model_with_a_controller_has_them(calibration):
    assert ControlledLayers.applies_to(calibration.model) and ControlledForAll.applies_to(calibration.model)
    plain = ls.LayerShuffleViTForImageClassification(ls.LayerShuffleViTConfig(num_hidden_layers=1, hidden_size=12))
    assert not ControlledLayers.applies_to(plain) and RandomLayers.applies_to(plain)
