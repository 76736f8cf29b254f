"""Models on a CUDA device: the numbers of the CPU, without waiting for the device, compiled once for all orders."""

import copy

import numpy as np
import pytest
import torch
from accelerate.utils import compile_regions
from support.gpu import DEVICE, float32_numbers, no_waiting

import hf_layershuffle as ls
from hf_layershuffle.analysis import attention_rollout, collect_representations, layer_contributions
from hf_layershuffle.checkpoints.identity import describe_model
from hf_layershuffle.layerwise import LayerwiseClassifier


pytestmark = pytest.mark.gpu
ALL_FLAGS = {"shuffle_mode": "arbitrary", "depth_embedding": True, "position_predictor": True}
ORDERS = ([0, 1, 2, 3], [2, 0, 3, 1], [3, 1], [1, 1, 2, 0, 3, 2])


@pytest.fixture(autouse=True)
def comparable_numbers():
    with float32_numbers():
        yield


def lively(model):
    """Weights so large that orders give different predictions."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def both(vit, **flags):
    """A model on the CPU, and the same on the device."""
    model = lively(vit.classifier(**flags))
    return model, copy.deepcopy(model).to(DEVICE)


def items(count: int = 30) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": index % 5} for index in range(count)]


def on_device(batch: dict) -> dict:
    return {name: value.to(DEVICE) for name, value in batch.items()}


@pytest.mark.parametrize("flags", [{}, ALL_FLAGS], ids=["plain", "all flags"])
def test_outputs_and_gradients_are_those_of_the_cpu(vit, batch, flags):
    model, on_gpu = both(vit, **flags)
    for order in ORDERS:
        for each, inputs in ((model, batch), (on_gpu, on_device(batch))):
            each.train().zero_grad()
            each.outputs = each(**inputs, execution_order=order)
            each.outputs.loss.backward()
        assert on_gpu.outputs.execution_order.device.type == DEVICE.type
        assert on_gpu.outputs.execution_order.tolist() == order
        assert on_gpu.outputs.logits.device.type == DEVICE.type
        torch.testing.assert_close(on_gpu.outputs.logits.cpu(), model.outputs.logits, atol=1e-4, rtol=1e-4)
        for (name, ours), expected in zip(on_gpu.named_parameters(), model.parameters()):
            if expected.grad is not None:
                torch.testing.assert_close(ours.grad.cpu(), expected.grad, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    "flags",
    [
        {"shuffle_mode": "arbitrary"},
        {"shuffle_mode": "window", "shuffle_window": 1, "layerdrop": 0.3},
        ALL_FLAGS,
    ],
    ids=["arbitrary", "window and layerdrop", "all flags"],
)
def test_a_training_step_in_a_random_order_never_waits_for_the_device(vit, batch, flags):
    model = vit.classifier(**flags).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    inputs = on_device(batch)

    def step():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            outputs = model(**inputs)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return outputs.execution_order

    step()  # what is made at the first use may wait
    with no_waiting():
        ran = [step() for _ in range(8)]
    orders = {tuple(order.tolist()) for order in ran}
    assert len(orders) > 3


def test_evaluation_in_a_random_order_never_waits_for_the_device(vit, batch):
    model = vit.classifier(depth_embedding=True).to(DEVICE).eval()
    images = batch["pixel_values"].to(DEVICE)
    with torch.no_grad():
        model(images)
        with no_waiting():
            for order in (*ORDERS, "arbitrary", None):
                model(images, execution_order=order)


@pytest.mark.parametrize("flags", [{"shuffle_mode": "arbitrary"}, ALL_FLAGS], ids=["arbitrary", "all flags"])
def test_compiling_by_layer_makes_no_graph_for_another_order(vit, batch, flags):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = vit.classifier(**flags).to(DEVICE).train()
    compiled = compile_regions(copy.deepcopy(model))
    inputs = on_device(batch)
    graphs = []
    for order in ls.arbitrary_execution_orders(4, 12, seed=1):
        outputs = compiled(**inputs, execution_order=order)
        expected = model(**inputs, execution_order=order)
        torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-4, rtol=1e-4)
        outputs.loss.backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 1 <= graphs[-1] <= 6
    assert graphs[2] == graphs[-1], graphs
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_report_of_robustness(vit, dtype):
    model, on_gpu = both(vit, **ALL_FLAGS)
    settings = {"num_orders": 8, "num_subsets": 2, "batch_size": 7, "progress": False}
    expected = ls.evaluate_robustness(model, items(), **settings)
    report = ls.evaluate_robustness(on_gpu.to(dtype), items(), **settings)
    assert report.num_images == 30
    assert report.environment["device"].startswith(DEVICE.type)
    tolerance = 1e-6 if dtype == torch.float32 else 0.15
    assert report.sequential.accuracy == pytest.approx(expected.sequential.accuracy, abs=tolerance)
    assert report.arbitrary.accuracy.mean == pytest.approx(expected.arbitrary.accuracy.mean, abs=tolerance)
    assert report.sequential.loss == pytest.approx(expected.sequential.loss, rel=1e-3 if tolerance < 0.1 else 0.2)


def test_layers_one_by_one_and_the_analysis(vit):
    model, on_gpu = both(vit, depth_embedding=True)
    order = [2, 0, 3, 1]
    images = torch.stack([item["pixel_values"] for item in items(6)])
    with torch.no_grad():
        parts = LayerwiseClassifier(on_gpu)
        hidden_states = parts.embed(images.to(DEVICE))
        for position, layer in enumerate(order):
            hidden_states, _ = parts.run_layer(hidden_states, layer, position)
        logits = parts.classify(hidden_states)
        torch.testing.assert_close(logits.cpu(), model(images, execution_order=order).logits, atol=1e-4, rtol=1e-4)
    settings = {"batch_size": 4, "progress": False}
    found, expected = (layer_contributions(each, items(8), num_orders=4, **settings) for each in (on_gpu, model))
    np.testing.assert_allclose(found.by_layer("update_size"), expected.by_layer("update_size"), rtol=1e-3)
    found, expected = (collect_representations(each, items(20), **settings) for each in (on_gpu, model))
    np.testing.assert_allclose(found.cls, expected.cls, atol=1e-3, rtol=1e-3)
    found, expected = (attention_rollout(each, images, [order]) for each in (on_gpu, model))
    np.testing.assert_allclose(found.maps, expected.maps, atol=1e-4, rtol=1e-3)


def test_saving_and_loading_changes_nothing(vit, batch, tmp_path):
    model, on_gpu = both(vit, **ALL_FLAGS)
    assert describe_model(on_gpu)["weights"] == describe_model(model)["weights"]
    on_gpu.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved", device_map={"": str(DEVICE)})
    assert loaded.device.type == DEVICE.type
    for ours, expected in zip(loaded.eval().parameters(), model.parameters()):
        assert torch.equal(ours.cpu(), expected)
    logits = loaded(batch["pixel_values"].to(DEVICE), execution_order=[2, 0, 3, 1]).logits
    assert torch.equal(logits, on_gpu(batch["pixel_values"].to(DEVICE), execution_order=[2, 0, 3, 1]).logits)


def test_pruning_and_the_plain_model(vit, batch):
    model, on_gpu = both(vit)
    images = batch["pixel_values"]
    pruned = ls.prune_layers(on_gpu, [3, 1])
    plain = ls.to_plain_vit(on_gpu, [2, 0, 3, 1])
    with torch.no_grad():
        for each, order in ((pruned, [3, 1]), (plain, [2, 0, 3, 1])):
            expected = model(images, execution_order=order).logits
            found = each.to(DEVICE).eval()(images.to(DEVICE)).logits.cpu()
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
