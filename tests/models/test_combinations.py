"""What users of transformers combine the models with: checkpointing, half precision, compilation, adapters."""

import copy
import warnings

import peft
import pytest
import torch
from accelerate import disk_offload
from accelerate.utils import compile_regions
from conftest import record_layer_calls
from support.models import EXTRAS, randomize
from torch import nn
from torch.func import functional_call, grad, vmap

import hf_layershuffle as ls


# --- What users of transformers combine it with ---


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(vit, batch, use_reentrant):
    model = randomize(vit.classifier(shuffle_mode="arbitrary", **EXTRAS)).train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for each in (model, twin):
        each.base_model.seed_execution_order(5)
        calls = record_layer_calls(each)
        each(**batch).loss.backward()
        assert sorted(calls[:4]) == [0, 1, 2, 3]
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(other.grad, parameter.grad, msg=name)


def test_bf16_autocast(vit, batch):
    model = vit.classifier(shuffle_mode="arbitrary", **EXTRAS).train()
    expected = model(**batch, execution_order=[3, 2, 1, 0])
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch, execution_order=[3, 2, 1, 0])
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.logits.float(), expected.logits, atol=0.02, rtol=0.05)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_bf16_weights(vit, batch):
    model = vit.classifier(shuffle_mode="arbitrary", **EXTRAS).to(torch.bfloat16).train()
    output = model(**batch)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16


@pytest.mark.parametrize("flags", [{}, EXTRAS])
def test_compiling_layer_by_layer_needs_five_graphs_for_thirty_orders(vit, batch, flags):
    torch.compiler.reset()
    model = randomize(vit.classifier(shuffle_mode="arbitrary", **flags)).eval()
    graphs = []

    def count_graphs(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    counted = compile_regions(model, backend=count_graphs)
    orders = ls.arbitrary_execution_orders(4, 30)
    with torch.no_grad():
        for order in orders:
            expected = model(**batch, execution_order=order).logits
            assert torch.equal(counted(**batch, execution_order=order).logits, expected)
    assert 1 <= len(graphs) <= 5
    torch.compiler.reset()


def test_inductor_matches_eager(vit, batch):
    torch.compiler.reset()
    model = randomize(vit.classifier(shuffle_mode="arbitrary", **EXTRAS)).train()
    compiled = compile_regions(copy.deepcopy(model))
    for each in (model, compiled):
        each.base_model.seed_execution_order(3)
    for _ in range(3):
        expected, actual = model(**batch), compiled(**batch)
        # The compiled copy draws from the same stream
        assert torch.equal(actual.execution_order, expected.execution_order)
        torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


def test_a_stream_seeded_after_compilation_reaches_the_compiled_model(vit):
    model = vit.classifier(shuffle_mode="arbitrary").train()
    compiled = compile_regions(model, backend="eager")
    model.vit.seed_execution_order(11)
    first = [compiled.vit.resolve_execution_order() for _ in range(3)]
    model.vit.seed_execution_order(11)
    assert [compiled.vit.resolve_execution_order() for _ in range(3)] == first


def test_fsdp_and_device_maps_find_the_layer_class(vit):
    model = vit.classifier(**EXTRAS)
    names = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= names
    assert type(model.base_model.layers[0]).__name__ in model._no_split_modules


@pytest.mark.parametrize("flags", [{}, EXTRAS])
def test_gradients_of_single_images_by_torch_func(vit, batch, flags):
    model = randomize(vit.classifier(attn_implementation="eager", **flags)).train()
    parameters = dict(model.named_parameters())

    def loss(parameters, image, label):
        return functional_call(model, parameters, kwargs={"pixel_values": image[None], "labels": label[None]}).loss

    actual = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, batch["pixel_values"], batch["labels"])
    for i in (0, 5):
        model.zero_grad()
        loss(parameters, batch["pixel_values"][i], batch["labels"][i]).backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(actual[name][i], parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("target_modules", ["all-linear", ["dense"]])
def test_lora_takes_effect_before_it_is_merged(vit, batch, target_modules):
    lora = peft.get_peft_model(vit.classifier(**EXTRAS), peft.LoraConfig(target_modules=target_modules, r=2)).train()
    lora(**batch).loss.backward()
    trained = {name: parameter for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert sum("depth_projection" in name for name in trained) == 8
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    with torch.no_grad():
        for name, parameter in trained.items():
            if "depth_projection" in name:
                parameter.add_(torch.randn_like(parameter))
        lora.eval()
        whole, adapted = lora.get_base_model(), lora(**batch).logits
        with lora.disable_adapter():
            assert (whole(**batch).logits - adapted).abs().max() > 0.01
        torch.testing.assert_close(lora.merge_and_unload()(**batch).logits, adapted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_weights_offloaded_to_disk_give_the_same(vit, batch, tmp_path):
    model = randomize(vit.classifier(**EXTRAS)).eval()
    expected = model(**batch, execution_order=[3, 0, 2])
    disk_offload(model, tmp_path, execution_device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    actual = model(**batch, execution_order=[3, 0, 2])
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.position_logits, expected.position_logits)


@torch.no_grad()
def test_a_dynamically_quantized_model_is_near_the_model(vit, batch):
    model = randomize(vit.classifier(depth_embedding=True), seed=1).eval()
    expected = model(**batch).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that torchao will replace it
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    assert type(quantized.vit.layers[0].depth_projection.dense) is not nn.Linear
    actual = quantized(**batch).logits
    assert nn.functional.cosine_similarity(actual, expected).min() > 0.98 and not torch.equal(actual, expected)


# --- The whole model as one graph ---

FEW = {"num_hidden_layers": 3}  # each takes a second to be traced


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("flags", "order"),
    [({}, None), (EXTRAS, None), ({"shuffle_mode": "arbitrary"}, [2, 0]), ({"execution_order": [1, 2]}, None)],
)
def test_an_order_that_does_not_change_compiles_to_one_graph(vit, batch, training, flags, order):
    torch.compiler.reset()
    model = randomize(vit.classifier(**FEW, **flags)).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected, actual = (each(**batch, execution_order=order) for each in (model, compiled))
    assert torch.equal(actual.loss, expected.loss) and torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.execution_order, expected.execution_order)
    torch.compiler.reset()


def test_random_orders_still_run_in_a_compiled_model(vit, batch):
    torch.compiler.reset()
    model = vit.classifier(**FEW, shuffle_mode="arbitrary").train()
    compiled = torch.compile(model, backend="eager")
    model.vit.seed_execution_order(0)
    expected = [model(**batch).execution_order.tolist() for _ in range(3)]
    model.vit.seed_execution_order(0)
    assert [compiled(**batch).execution_order.tolist() for _ in range(3)] == expected
    assert compiled(**batch, execution_order=torch.tensor([2, 1])).execution_order.tolist() == [2, 1]
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("flags", "order", "training"),
    [({}, None, False), (EXTRAS, None, True), (EXTRAS, None, False), ({}, [2, 0], False)],
)
def test_strict_export_of_an_order_that_does_not_change(vit, batch, flags, order, training):
    model = randomize(vit.classifier(**FEW, **flags)).train(training)
    inputs = {"pixel_values": batch["pixel_values"]} | ({"execution_order": order} if order else {})
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=2)}} | (
        {"execution_order": [None] * 2} if order else {}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=True).module()
    inputs["pixel_values"] = batch["pixel_values"][:4]
    expected, actual = model(**inputs), exported(**inputs)
    torch.testing.assert_close(actual.logits, expected.logits)
    assert torch.equal(actual.execution_order, expected.execution_order)
