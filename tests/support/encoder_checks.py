"""What a family must do to count as one whose layers run in any order: a function for each column of
docs/encoders.md.

A check returns nothing, or raises. tests/models/test_encoders.py runs the fast ones, experiments/encoder_table.py all.
"""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
import transformers
from accelerate.utils import compile_regions
from torch import nn

import hf_layershuffle as ls
from hf_layershuffle.models.auto_classes import AUTO_CLASSES, plain_class_name
from hf_layershuffle.models.layer_lists import find_layers
from support.encoders import NUM_LAYERS, Encoder
from support.models import EXTRAS


SEQUENTIAL = list(range(NUM_LAYERS))
PERMUTATION, SUBSET, REPEAT = [2, 0, 3, 1], [3, 1], [0, 1, 1, 2, 3, 3]
SHORT_REPEAT = [2, 0, 0, 3]  # as long as the model
LABELS = torch.tensor([0, 4])
# As configurations call their number of layers
DEPTHS = ("num_hidden_layers", "n_layers", "n_layer", "encoder_layers", "num_layers")


# --- Models and what they give ---


@lru_cache(maxsize=4)
def plain_model(encoder: Encoder, attn_implementation: str | None = None, seed: int = 0) -> Any:
    """The plain model with large random weights, so that every layer matters. Not to be changed."""
    torch.manual_seed(seed)
    model = encoder.plain_class._from_config(encoder.config(), attn_implementation=attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1))
    return model.eval()


def free_model(encoder: Encoder, **flags: Any) -> Any:
    """The same model with free order."""
    return ls.free_order(copy.deepcopy(plain_model(encoder)), **flags)


def fresh_model(encoder: Encoder, **flags: Any) -> Any:
    """A model with free order as made from its configuration, with initial weights."""
    made = getattr(ls, f"LayerShuffle{encoder.model_class}")
    config = encoder.config().to_dict() | {"model_type": made.config_class.model_type} | flags
    torch.manual_seed(0)
    return made(made.config_class.from_dict(config)).eval()


def rebuilt(model: nn.Module, order: list[int]) -> Any:
    """The plain model whose list of layers is really another one: what an order means."""
    model = copy.deepcopy(model)
    path = find_layers(model)
    layers = model.get_submodule(path)
    model.set_submodule(path, nn.ModuleList([layers[index] for index in order]))
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        for name in DEPTHS:
            if getattr(config, name, None) == NUM_LAYERS:
                setattr(config, name, len(order))
        kinds = vars(config).get("layer_types")  # such as full or sliding attention; some families compute them
        if kinds:
            config.layer_types = [kinds[index] for index in order]
    return model


def tensors(output: Any) -> list[torch.Tensor]:
    """All tensors of an output, without the order that ours holds."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = [value for name, value in output.items() if name not in ("execution_order", "past_key_values")]
    return [tensor for each in output or () for tensor in tensors(each)] if not isinstance(output, (int, str)) else []


def same(left: Any, right: Any) -> bool:
    left, right = tensors(left), tensors(right)
    return len(left) == len(right) > 0 and all(map(torch.equal, left, right))


def assert_same(actual: Any, expected: Any) -> None:
    actual, expected = tensors(actual), tensors(expected)
    assert len(actual) == len(expected) > 0, f"{len(actual)} tensors, not {len(expected)}"
    for number, (left, right) in enumerate(zip(actual, expected)):
        assert left.shape == right.shape, f"tensor {number} is {tuple(left.shape)}, not {tuple(right.shape)}"
        assert torch.equal(left, right), f"tensor {number} differs by {(left - right).abs().max():.1e}"


def loss_of(output: Any) -> torch.Tensor:
    """The model's own loss if it was given labels, else one to which every output counts, averaged over examples."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    # Not the square alone, whose gradient is 0 where a fresh model gives zeros
    return sum((each - 1).square().mean() for each in tensors(output) if each.requires_grad)


def gradients_of(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(2)  # dropout and drop path
    loss = loss_of(model(**inputs))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def labelled(encoder: Encoder) -> dict[str, Any]:
    return encoder.inputs() | ({"labels": LABELS} if encoder.is_classifier else {})


@contextlib.contextmanager
def recorded_calls(model: Any) -> Iterator[list[int]]:
    """The list grows by a layer's index whenever that layer runs."""
    calls: list[int] = []
    layers = list(model.free_layers.children())

    def recorded(index: int, forward: Callable) -> Callable:
        def record(*args: Any, **kwargs: Any) -> Any:
            calls.append(index)
            return forward(*args, **kwargs)

        return record

    for index, layer in enumerate(layers):  # no hooks, which a loop that calls `layer.forward` passes by
        layer.forward = recorded(index, layer.forward)
    yield calls
    for layer in layers:
        del layer.forward


# --- The checks ---


@torch.no_grad()
def check_plain(encoder: Encoder) -> None:
    """Without flags and without an order it is the plain model bit for bit, before and after another order ran; the
    same seed gives it the plain model's initial weights."""
    inputs, plain, free = encoder.inputs(), plain_model(encoder), free_model(encoder)
    expected = plain(**inputs)
    assert_same(free(**inputs), expected)
    assert_same(free(**inputs, execution_order=SEQUENTIAL), expected)
    assert not same(free(**inputs, execution_order=PERMUTATION), expected)
    assert_same(free(**inputs), expected)
    torch.manual_seed(0)
    weights = encoder.plain_class(encoder.config()).state_dict()
    fresh = fresh_model(encoder).state_dict()
    assert list(fresh) == list(weights)
    assert all(torch.equal(fresh[name], tensor) for name, tensor in weights.items())


@torch.no_grad()
def _check_order(encoder: Encoder, order: list[int]) -> None:
    inputs, model = encoder.inputs(), free_model(encoder)
    with recorded_calls(model) as calls:
        actual = model(**inputs, execution_order=order)
    assert calls == order == actual.execution_order.tolist(), f"{calls} ran, not {order}"
    expected = rebuilt(plain_model(encoder), order)(**inputs)
    assert_same(actual, expected)
    assert not same(expected, plain_model(encoder)(**inputs)), "the order changes nothing"


def check_order(encoder: Encoder) -> None:
    """A permutation is bit for bit the plain model whose list of layers was rebuilt in that order."""
    _check_order(encoder, PERMUTATION)


def check_subset(encoder: Encoder) -> None:
    """Some of the layers are the plain model that has these layers only."""
    _check_order(encoder, SUBSET)


def check_repeat(encoder: Encoder) -> None:
    """Layers that run several times are the plain model that has them several times."""
    _check_order(encoder, REPEAT)


@torch.no_grad()
def check_hidden_states(encoder: Encoder) -> None:
    """`output_hidden_states` gives those of the rebuilt model, in execution order."""
    inputs = encoder.inputs()
    for order in (SEQUENTIAL, PERMUTATION, SUBSET):
        expected = rebuilt(plain_model(encoder), order)(**inputs, output_hidden_states=True)
        actual = free_model(encoder)(**inputs, output_hidden_states=True, execution_order=order)
        assert len(actual.hidden_states) == len(expected.hidden_states) == len(order) + 1
        assert_same(actual.hidden_states, expected.hidden_states)
        assert_same(actual, expected)


@torch.no_grad()
def check_attentions(encoder: Encoder) -> None:
    """`output_attentions` gives those of the rebuilt model, in execution order, with `"eager"` attention."""
    inputs, plain = encoder.inputs(), plain_model(encoder, "eager")
    for order in (SEQUENTIAL, PERMUTATION, SUBSET):
        expected = rebuilt(plain, order)(**inputs, output_attentions=True)
        actual = ls.free_order(copy.deepcopy(plain))(**inputs, output_attentions=True, execution_order=order)
        assert len(actual.attentions) == len(expected.attentions) == len(order)
        assert_same(actual.attentions, expected.attentions)
        assert_same(actual, expected)


def check_gradients(encoder: Encoder) -> None:
    """In training, with dropout, loss and gradients are bit for bit those of the plain model, and of the rebuilt one
    in another order."""
    inputs = labelled(encoder)
    path = find_layers(plain_model(encoder))
    for order in (None, PERMUTATION):
        plain = rebuilt(plain_model(encoder), order or SEQUENTIAL).train()
        expected_loss, expected = gradients_of(plain, inputs)
        if order is not None:  # by the names they have in the list that was not rebuilt
            names = {f"{path}.{position}.": f"{path}.{index}." for position, index in enumerate(order)}
            expected = {_renamed(name, names): gradient for name, gradient in expected.items()}
        loss, gradients = gradients_of(free_model(encoder).train(), inputs | {"execution_order": order})
        assert_same(loss, expected_loss)
        assert gradients.keys() == expected.keys()
        assert any(name.startswith(f"{path}.") for name in gradients)
        assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    found = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes.get(found, "") + name.removeprefix(found)


def check_checkpointing(encoder: Encoder) -> None:
    """With gradient checkpointing, gradients are the same, also those of depth vectors and position heads."""
    inputs = labelled(encoder) | {"execution_order": PERMUTATION}
    model = tell_positions(free_model(encoder, **EXTRAS)).train()
    loss, expected = gradients_of(copy.deepcopy(model), inputs)
    for use_reentrant in (False, True) if _can_be_reentrant(encoder) else (False,):
        twin = copy.deepcopy(model)
        twin.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        runs = count_runs(twin)
        actual_loss, gradients = gradients_of(twin, inputs)
        assert runs == [2] * NUM_LAYERS, f"each layer ran {runs} times, and not once more for its gradients"
        torch.testing.assert_close(actual_loss, loss)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def _can_be_reentrant(encoder: Encoder) -> bool:
    """Whether the plain model can: not where all layers take one tensor that has a gradient, such as a shared bias."""
    plain = copy.deepcopy(plain_model(encoder)).train()
    plain.gradient_checkpointing_enable({"use_reentrant": True})
    try:
        gradients_of(plain, labelled(encoder))
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        return False
    return True


def count_runs(model: Any) -> list[int]:
    """How often each layer will have run, counted inside it: a layer's own hooks do not run again with it."""
    runs = [0] * NUM_LAYERS

    def count(index: int) -> None:
        runs[index] += 1

    for index, layer in enumerate(model.free_layers.children()):
        layer.depth_projection.register_forward_pre_hook(lambda module, args, index=index: count(index))
    return runs


def tell_positions(model: Any) -> Any:
    """Gives the depth path large weights, since a fresh one adds nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model._depth_embedding.weight.normal_(generator=generator)
        for layer in model.free_layers.children():
            layer.depth_projection.dense.weight.normal_(std=0.3, generator=generator)
    return model


@torch.no_grad()
def check_save_load(encoder: Encoder) -> None:
    """A saved folder holds the same model, with and without flags, for the Auto class that knows the family."""
    inputs = encoder.inputs() | {"execution_order": PERMUTATION}
    for flags in ({}, EXTRAS):
        model = free_model(encoder, **flags)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded, info = _loader(encoder).from_pretrained(folder, output_loading_info=True)
            assert not any(info.values()), f"loading told {info}"
            assert type(loaded) is type(model) and type(loaded.config) is type(model.config)
            assert {name: getattr(loaded.config, name) for name in EXTRAS} == dict.fromkeys(EXTRAS, bool(flags))
            assert_same(loaded.eval()(**inputs), model(**inputs))


def _loader(encoder: Encoder) -> Any:
    """The Auto class that makes a model of this class, or the class itself where none does."""
    for name in AUTO_CLASSES:
        if plain_class_name(name, encoder.model_type) == encoder.model_class:
            return getattr(transformers, name)
    return getattr(ls, f"LayerShuffle{encoder.model_class}")


@torch.no_grad()
def check_old_names(encoder: Encoder) -> None:
    """A plain checkpoint is loaded, as transformers saves it: with the names its tensors had in earlier versions."""
    plain, inputs = plain_model(encoder), encoder.inputs()
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        made = getattr(ls, f"LayerShuffle{encoder.model_class}")
        loaded, info = made.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"], f"loading told {info}"
        assert_same(loaded.eval()(**inputs), plain(**inputs))
        assert_same(loaded(**inputs, execution_order=PERMUTATION), rebuilt(plain, PERMUTATION)(**inputs))


def check_depth_embedding(encoder: Encoder) -> None:
    """Fresh depth vectors change nothing; each layer is told its own, and they learn."""
    inputs, model = encoder.inputs(), free_model(encoder, depth_embedding=True)
    with torch.no_grad():
        assert_same(model(**inputs), plain_model(encoder)(**inputs))
    tell_positions(model)
    told: list[torch.Tensor] = []
    for layer in model.free_layers.children():
        layer.depth_projection.register_forward_hook(lambda module, args, output: told.append(args[1]))
    output = model(**inputs, execution_order=SHORT_REPEAT)
    assert_same(told, model._depth_embedding.weight.unbind())
    loss_of(output).backward()
    gradients = model._depth_embedding.weight.grad
    assert gradients.isfinite().all() and gradients.any(dim=1).all()
    assert all(model.free_layers[index].depth_projection.dense.weight.grad.any() for index in SHORT_REPEAT)


def check_position_predictor(encoder: Encoder) -> None:
    """Each layer predicts its position; nothing else changes, and in training the loss reaches the heads."""
    inputs, model = labelled(encoder), free_model(encoder, position_predictor=True)
    with torch.no_grad():
        outputs = dict(model(**inputs, execution_order=PERMUTATION))
        logits = outputs.pop("position_logits")
        expected = rebuilt(plain_model(encoder), PERMUTATION)(**inputs)
        batch_size = len(expected.last_hidden_state) if "last_hidden_state" in expected else 2  # 1 of packed images
        assert logits.shape == (batch_size, NUM_LAYERS, NUM_LAYERS) and logits.isfinite().all()
        assert_same(outputs, expected)
    loss, gradients = gradients_of(model.train(), inputs | {"execution_order": PERMUTATION})
    heads = [gradient for name, gradient in gradients.items() if ".position_head.dense.weight" in name]
    assert loss.isfinite() and len(heads) == NUM_LAYERS and all(gradient.any() for gradient in heads)
    if encoder.is_classifier:
        plain_loss, _ = gradients_of(rebuilt(plain_model(encoder), PERMUTATION).train(), inputs)
        assert loss > plain_loss


def check_recipe(encoder: Encoder) -> None:
    """With `residual_init_scale=0` all orders give the same function at first, and all layers learn.

    A layer of a pre-norm family is then the identity. In a post-norm family it is its norm: permutations agree bit for
    bit, and other orders up to the epsilon of the norms.
    """
    inputs = labelled(encoder)
    model = fresh_model(encoder, residual_init_scale=0.0)
    with torch.no_grad():
        expected = model(**inputs)
        assert_same(model(**inputs, execution_order=PERMUTATION), expected)
        for order in (SUBSET, SHORT_REPEAT):
            actual = model(**inputs, execution_order=order)
            if encoder.is_post_norm:
                for left, right in zip(tensors(actual), tensors(expected)):
                    torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)
            else:
                assert_same(actual, expected)
        assert not same(fresh_model(encoder)(**inputs, execution_order=PERMUTATION), expected)
    loss_of(model.train()(**inputs, execution_order=PERMUTATION)).backward()
    for index, layer in enumerate(model.free_layers.children()):
        assert any(p.grad is not None and p.grad.any() for p in layer.parameters()), f"layer {index} does not learn"


def _check_compiled(encoder: Encoder, compiled_by: Callable[[Any, Any], Any]) -> None:
    torch._dynamo.reset()
    graphs: list[int] = []

    def count_graphs(graph: torch.fx.GraphModule, example_inputs: list) -> Any:
        graphs.append(1)
        return graph.forward

    inputs, model = encoder.inputs(), free_model(encoder)
    compiled = compiled_by(copy.deepcopy(model), count_graphs)
    counts = []
    with torch.no_grad():
        for order in (SEQUENTIAL, PERMUTATION, SUBSET, SHORT_REPEAT, [1, 3, 0, 2]):
            actual = compiled(**inputs, execution_order=order)
            for left, right in zip(tensors(actual), tensors(model(**inputs, execution_order=order))):
                torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)
            counts.append(len(graphs))
    assert counts[0] > 0, "no graph was compiled"
    assert len(set(counts)) == 1, f"graphs after each order: {counts}"


def check_compile(encoder: Encoder) -> None:
    """With layers compiled (`layer.compile()`), further orders make no further graphs, and results agree."""

    def compiled_by(model: Any, backend: Any) -> Any:
        for layer in model.free_layers.children():
            layer.compile(backend=backend)
        return model

    _check_compiled(encoder, compiled_by)


def check_compile_regions(encoder: Encoder) -> None:
    """The same by accelerate's `compile_regions`."""
    _check_compiled(encoder, lambda model, backend: compile_regions(model, backend=backend))


def check_refused(encoder: Encoder) -> None:
    """Raises the refusal of a family that cannot have free order. It comes at the latest with an order."""
    model = ls.free_order(copy.deepcopy(plain_model(encoder)))
    with torch.no_grad():
        model(**encoder.inputs(), execution_order=PERMUTATION)


FAST_CHECKS = {
    "plain": check_plain,
    "order": check_order,
    "subset": check_subset,
    "repeat": check_repeat,
    "hidden states": check_hidden_states,
    "attentions": check_attentions,
    "gradients": check_gradients,
    "checkpointing": check_checkpointing,
    "save and load": check_save_load,
    "old names": check_old_names,
    "depth embedding": check_depth_embedding,
    "position predictor": check_position_predictor,
    "recipe": check_recipe,
}
SLOW_CHECKS = {"compile": check_compile, "compile regions": check_compile_regions}
SHARDING = "FSDP2"  # of encoder_sharding.py
CHECKS = (*FAST_CHECKS, *SLOW_CHECKS, SHARDING)


def one_line(error: BaseException) -> str:
    """An exception as a line: ours as they are, others with their kind."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:297]}..."
    return text if type(error) in (ValueError, AssertionError) and text else f"{type(error).__name__}: {text}"


def outcome(check: Callable[[Encoder], None], encoder: Encoder) -> str | None:
    """None if an encoder passes a check, else the reason in one line."""
    try:
        check(encoder)
    except Exception as error:
        return one_line(error)
    return None
