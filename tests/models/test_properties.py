"""What holds for every configuration, order and plan: 300 random ones, the same in each run."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import torch
from conftest import Architecture
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file

from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.compression.pruning import prune_layers
from hf_layershuffle.deployment.plain_vit import to_plain_vit
from hf_layershuffle.hub.merged_folder import merge
from hf_layershuffle.merging.plan import PARTS, MergePlan


# derandomize: the examples follow from the test alone, so that each run has the same
EXAMPLES = settings(
    max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@dataclass(frozen=True)
class Drawn:
    """A model with random weights: nothing in it is zero, one, or the same twice."""

    architecture: str
    flags: tuple[tuple[str, object], ...]
    seed: int
    dtype: torch.dtype = torch.float32

    @property
    def values(self) -> dict:
        return dict(self.flags)

    @property
    def num_layers(self) -> int:
        return self.values["num_hidden_layers"]

    def build(self, plain: bool = False, **flags):
        architecture = Architecture(self.architecture)
        build = architecture.plain_classifier if plain else architecture.classifier
        return self.with_noise(build(seed=self.seed, **{**self.values, **flags})).to(self.dtype).eval()

    def with_noise(self, model):
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model

    def images(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(2, self.values["num_channels"], 8, 8, generator=generator)


@st.composite
def models(draw, **fixed) -> Drawn:
    heads = draw(st.sampled_from([1, 2, 4]))
    values = {
        "hidden_size": draw(st.sampled_from([8, 16])),
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(3, 24)),
        "patch_size": draw(st.sampled_from([2, 4, 8])),
        "num_channels": draw(st.sampled_from([1, 3])),
        "num_labels": draw(st.integers(2, 5)),
        "hidden_act": draw(st.sampled_from(["gelu", "relu", "gelu_new"])),
        "qkv_bias": draw(st.booleans()),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-3])),
        "shuffle_mode": draw(st.sampled_from(["none", "arbitrary"])),
        "depth_embedding": draw(st.booleans()),
        "depth_embedding_dim": draw(st.integers(1, 5)),
        "position_predictor": draw(st.booleans()),
        "layerdrop": draw(st.sampled_from([0.0, 0.5])),
    }
    architecture = draw(st.sampled_from(["vit", "deit"]))
    return Drawn(architecture, tuple({**values, **fixed}.items()), draw(st.integers(0, 2**20)))


def orders(num_layers: int, min_size: int = 1, max_size: int = 6):
    return st.lists(st.integers(0, num_layers - 1), min_size=min_size, max_size=max_size)


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal_tensors(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


LAYERSHUFFLE_FLAGS = ("shuffle_mode", "depth_embedding", "depth_embedding_dim", "position_predictor", "layerdrop")


@given(drawn=models())
@EXAMPLES
def test_the_identity_order_is_the_plain_model_bit_for_bit(drawn):
    """Also with a depth embedding and position heads as they are when a plain checkpoint is loaded."""
    plain_values = tuple((name, value) for name, value in drawn.flags if name not in LAYERSHUFFLE_FLAGS)
    plain = Drawn(drawn.architecture, plain_values, drawn.seed).build(plain=True)
    model = Architecture(drawn.architecture).classifier(**drawn.values).eval()
    loaded = model.load_state_dict(plain.state_dict(), strict=False)
    assert not loaded.unexpected_keys and all("depth" in key or "position_head" in key for key in loaded.missing_keys)
    images = drawn.images()
    with torch.no_grad():
        expected = plain(images).logits
        for order in (None, "sequential", list(range(drawn.num_layers))):
            assert torch.equal(model(images, execution_order=order).logits, expected), order


@given(data=st.data(), drawn=models())
@EXAMPLES
def test_a_pruned_model_is_the_order_bit_for_bit(data, drawn):
    keep = data.draw(st.permutations(range(drawn.num_layers)))[: data.draw(st.integers(1, drawn.num_layers))]
    model = drawn.build()
    pruned = prune_layers(model, list(keep))
    with torch.no_grad():
        whole, short = model(drawn.images(), execution_order=list(keep)), pruned(drawn.images())
    assert torch.equal(short.logits, whole.logits) and pruned.config.num_hidden_layers == len(keep)
    if drawn.values["position_predictor"]:  # of the positions that there are
        torch.testing.assert_close(short.position_logits, whole.position_logits[..., : len(keep)])


@given(drawn=models(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), data=st.data())
@EXAMPLES
def test_saving_and_loading_keep_weights_and_flags(drawn, dtype, data):
    order = data.draw(st.sampled_from(["sequential", "arbitrary"]) | orders(drawn.num_layers))
    model = drawn.build(execution_order=order).to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=data.draw(st.sampled_from(["2KB", "5GB"])))
        loaded = load_classifier(folder, dtype="auto")
    assert_equal_tensors(dict(model.state_dict()), dict(loaded.state_dict()))
    for name in drawn.values | {"execution_order": order}:
        assert getattr(loaded.config, name) == getattr(model.config, name), name
    assert loaded.dtype == dtype


@given(drawn=models(), data=st.data(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
@EXAMPLES
def test_a_model_merged_with_itself_is_itself_bit_for_bit(drawn, data, dtype):
    names = data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True))

    def parts(**layer) -> list[dict]:
        chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3))
        shares = [data.draw(st.integers(1, 9)) for _ in chosen]
        weights = [share / sum(shares) for share in shares]
        return [{"source": name, "weight": weight, **layer} for name, weight in zip(chosen, weights)]

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        drawn.build().to(dtype).save_pretrained(source)
        layers = [parts(layer=index) for index in range(drawn.num_layers)]
        there = [part for part in PARTS if part != "depth_embedding" or drawn.values["depth_embedding"]]
        others = {part: parts() for part in there if data.draw(st.booleans())}
        plan = MergePlan(sources=dict.fromkeys(names, str(source)), layers=layers, **others)
        result = merge(
            plan, Path(folder, "out"), progress=False, max_shard_size=data.draw(st.sampled_from([3000, "5GB"]))
        )
        assert_equal_tensors(tensors_of(source), tensors_of(result))


@given(drawn=models(depth_embedding=False), data=st.data())
@EXAMPLES
def test_a_plain_export_keeps_the_logits_bit_for_bit(drawn, data):
    order = data.draw(orders(drawn.num_layers))
    model = drawn.build()
    plain = to_plain_vit(model, order)
    assert type(plain) is Architecture(drawn.architecture).plain_classifier_class
    with torch.no_grad():
        expected = model(drawn.images(), execution_order=order).logits
        assert torch.equal(plain(drawn.images()).logits, expected)
        # and as a LayerShuffle model again
        with tempfile.TemporaryDirectory() as folder:
            plain.save_pretrained(folder)
            assert torch.equal(load_classifier(folder).eval()(drawn.images()).logits, expected)


def test_there_are_three_hundred_examples_and_always_the_same():
    properties = [function for name, function in globals().items() if getattr(function, "is_hypothesis_test", False)]
    used = [function._hypothesis_internal_use_settings for function in properties]
    assert sum(each.max_examples for each in used) == 300 and all(each.derandomize for each in used)
