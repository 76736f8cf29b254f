import gc
import json
import shutil
import threading

import pytest
import torch
from conftest import Architecture
from safetensors.torch import load_file, save_file
from support.models import EXTRAS, randomize

from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.layerwise import LayerwiseClassifier
from hf_layershuffle.swarm.layer_worker import LayerWorker
from hf_layershuffle.swarm.split_model import SplitModel
from hf_layershuffle.swarm.transport import LayerCall, WorkerFaultError


STATES = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ViT of four layers that are told their positions and predict them."""
    folder = tmp_path_factory.mktemp("vit")
    randomize(Architecture("vit").classifier(**EXTRAS)).save_pretrained(folder)
    return folder


def call(layer: int = 0, position: int = 0, states: torch.Tensor = STATES, **kwargs) -> LayerCall:
    return LayerCall("request", layer, position, states, **kwargs)


@pytest.mark.parametrize("position", [0, 3, 9])
@torch.no_grad()
def test_a_layer_at_a_position_gives_what_it_gives_in_the_model(folder, position):
    worker = LayerWorker(folder, [2, 0])
    parts = LayerwiseClassifier(load_classifier(folder).eval())
    parts.embed(torch.randn(2, 3, 8, 8))
    for layer in (0, 2):
        result = worker.run(call(layer, position))
        assert torch.equal(result.hidden_states, parts.run_layer(STATES, layer, position)[0])
        assert (result.layer, result.position) == (layer, position) and result.seconds > 0


@torch.no_grad()
def test_mlps_are_left_out_where_the_configuration_says(vit, tmp_path):
    model = randomize(vit.classifier(skipped_mlps=[1, 3])).eval()
    model.save_pretrained(tmp_path)
    worker, parts = LayerWorker(tmp_path, [0]), LayerwiseClassifier(model)
    parts.embed(torch.randn(2, 3, 8, 8))
    for position in (0, 1, 3):
        result = worker.run(call(0, position)).hidden_states
        assert torch.equal(result, parts.run_layer(STATES, 0, position, with_mlp=position == 0)[0])


def test_a_worker_has_the_memory_of_its_layers_only(folder):
    sizes = {name: tensor.nbytes for name, tensor in load_file(folder / "model.safetensors").items()}

    def num_bytes(*parts: str) -> int:
        return sum(sizes[name] for name in sizes if name.startswith(parts) and "position_head" not in name)

    expected = {
        (1,): num_bytes("vit.layers.1.", "vit.depth_embedding"),
        (0, 2): num_bytes("vit.layers.0.", "vit.layers.2.", "vit.depth_embedding"),
    }
    assert expected[0, 2] < num_bytes("") * 0.6
    gc.collect()
    before = {id(each) for each in gc.get_objects() if isinstance(each, torch.Tensor)}

    def held() -> int:
        gc.collect()
        found = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and id(each) not in before]
        return sum({each.data_ptr(): each.untyped_storage().nbytes() for each in found if not each.is_meta}.values())

    worker = LayerWorker(folder, [1])
    assert held() == expected[1,]
    worker.load_layers([0, 2])
    assert held() == expected[0, 2]


def test_other_layers_can_be_loaded(folder):
    worker = LayerWorker(folder, [0, 1], name="first")
    before, kept = worker.info, worker.run(call(1)).hidden_states
    after = worker.load_layers([1, 3])
    assert (before.name, before.layers, after.layers, worker.info) == ("first", (0, 1), (1, 3), after)
    assert after.digests[1] == before.digests[1] and len({*after.digests.values(), *before.digests.values()}) == 4
    assert torch.equal(worker.run(call(1)).hidden_states, kept)
    with pytest.raises(WorkerFaultError, match=r"first holds the layers \[1, 3\], not layer 0"):
        worker.run(call(0))
    with pytest.raises(ValueError, match=r"`layers` is \[1, 4\]; it must name layers of '.*', from 0 to 3, each once"):
        worker.load_layers([1, 4])
    assert worker.info == after


@pytest.mark.parametrize("layers", [[], [4], [-1], [1, 1]])
def test_layers_that_the_model_does_not_have_are_refused(folder, layers):
    with pytest.raises(ValueError, match=r"`layers` is .* from 0 to 3, each once"):
        LayerWorker(folder, layers)


def test_digests_tell_checkpoints_apart(folder, tmp_path):
    digests = LayerWorker(folder, [0, 1, 2, 3]).info.digests
    assert digests.keys() == {0, 1, 2, 3, "depth_embedding"}
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())

    def changed(name: str) -> set:
        other = {key: value.clone() for key, value in tensors.items()}
        other[name].view(-1)[-1] += 1e-6
        save_file(other, tmp_path / "model.safetensors", metadata={"format": "pt"})
        found = LayerWorker(tmp_path, [0, 1, 2, 3]).info.digests
        return {part for part in digests if found[part] != digests[part]}

    assert changed("vit.layers.2.mlp.fc1.bias") == {2}
    assert changed("vit.depth_embedding.weight") == {"depth_embedding"}
    assert changed("classifier.bias") == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_weights_can_be_of_another_dtype(folder, dtype):
    worker = LayerWorker(folder, [0], dtype=dtype)
    assert worker.run(call(states=STATES.bfloat16())).hidden_states.dtype == torch.bfloat16
    assert worker.info.digests == LayerWorker(folder, [0]).info.digests  # of what is stored
    with pytest.raises(WorkerFaultError, match=r"torch.float32 .* must be torch.bfloat16 of shape"):
        worker.run(call())
    with pytest.raises(ValueError, match="`dtype` is 'int8'; it must be a float of torch"):
        LayerWorker(folder, [0], dtype="int8")


NOT_FINITE = STATES.clone()
NOT_FINITE[1, 2, 3] = float("nan")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(states=STATES[0]), r"float32 of shape \(5, 32\); .* \(batch_size, tokens, 32\)"),
        (dict(states=STATES[..., :16]), r"shape \(2, 5, 16\)"),
        (dict(states=STATES[:0]), r"shape \(0, 5, 32\)"),
        (dict(states=STATES.long()), "torch.int64 of shape"),
        (dict(states="none"), "hidden states are of type str; they must be torch.float32"),
        (dict(states=NOT_FINITE), "hidden states are not finite"),
        (dict(layer=3), r"worker holds the layers \[0\], not layer 3"),
        (dict(layer="0"), "not layer '0'"),
        (dict(position=-1), "the position is -1; it must be an integer of at least 0"),
        (dict(position=1.5), "the position is 1.5"),
        (dict(args=(torch.ones(3, 7),)), "layer 0 failed: RuntimeError"),
        (dict(kwargs={"unknown": 1, "attention_mask": torch.ones(9)}), "layer 0 failed"),
        (dict(states=STATES.sign() * 3e38), "layer 0 gave hidden states that are not finite"),
    ],
)
def test_a_call_that_cannot_be_right_is_refused(folder, change, message):
    worker = LayerWorker(folder, [0])
    with pytest.raises(WorkerFaultError, match=message):
        worker.run(call(**change))
    worker.run(call())  # and it goes on


def test_threads_run_layers_at_the_same_time_and_leave_torch_as_it_was(folder):
    threads = torch.get_num_threads()
    worker = LayerWorker(folder, [0, 1, 2, 3])
    expected = [worker.run(call(layer, 3 - layer)).hidden_states for layer in range(4)]
    wrong = []

    def run(layer: int) -> None:
        for _ in range(20):
            if not torch.equal(worker.run(call(layer, 3 - layer)).hidden_states, expected[layer]):
                wrong.append(layer)

    running = [threading.Thread(target=run, args=(layer,)) for layer in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    assert wrong == []
    assert torch.get_num_threads() == threads and torch.get_default_dtype() == torch.float32


def test_workers_are_made_at_the_same_time_in_several_dtypes(folder):
    made, dtypes = {}, [torch.float32, torch.bfloat16] * 4
    running = [
        threading.Thread(target=lambda i=i: made.update({i: LayerWorker(folder, [0], dtype=dtypes[i])}))
        for i in range(8)
    ]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    for index, dtype in enumerate(dtypes):
        assert made[index].run(call(states=STATES.to(dtype))).hidden_states.dtype == dtype
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu" and torch.get_default_dtype() == torch.float32


def test_broken_checkpoints_are_refused(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())

    def broken(layers: list[int], config: dict = config, **changes: torch.Tensor | None) -> None:
        kept = {name: value for name, value in (tensors | changes).items() if value is not None}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config))
        LayerWorker(tmp_path, layers)

    name = "vit.layers.1.mlp.fc1.bias"
    with pytest.raises(ValueError, match=f"its weights lack {name}"):
        broken([1], **{name: None})
    with pytest.raises(ValueError, match=f"holds NaN or infinite values in {name}"):
        broken([0, 1], **{name: torch.full_like(tensors[name], float("nan"))})
    with pytest.raises(ValueError, match=rf"holds '{name}' of shape \(3,\), and its config.json asks for \(64,\)"):
        broken([1], **{name: torch.zeros(3)})
    broken([0], **{name: None})  # of another worker
    with pytest.raises(ValueError, match="cannot run its layers in any order: it is a convolutional"):
        broken([0], config={"model_type": "resnet"})
    with pytest.raises(ValueError, match=r"there is no folder '\./none'"):
        LayerWorker("./none", [0])


def test_digests_are_of_the_configuration_too(vit, tmp_path):
    vit.classifier().save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["transformers_version"] = "0.0"  # says nothing of what is computed
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    expected = LayerWorker(tmp_path / "one", [0, 1]).info.digests
    assert LayerWorker(tmp_path / "other", [0, 1]).info.digests == expected
    assert SplitModel.from_pretrained(tmp_path / "other").digests.items() >= expected.items()
    config["layer_norm_eps"] = 0.5
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    found = LayerWorker(tmp_path / "other", [0, 1]).info.digests
    assert found.keys() == expected.keys() and not set(found.values()) & set(expected.values())


@pytest.mark.parametrize("device", ["tpu0", "cuda:7", "xla"])
def test_devices_that_are_not_there_are_refused(device, vit, tmp_path):
    vit.classifier().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`device` is '{device}', which cannot be used here"):
        LayerWorker(tmp_path, [0], device=device)
