"""Merges that are written: what they hold."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Architecture, of_both_architectures, run_python
from safetensors import safe_open
from safetensors.torch import save_file
from support.merges import FLAGS, in_place, merged, save, stored_tensors
from support.models import TRAVELLING_FILES

from hf_layershuffle.checkpoints import tensor_files
from hf_layershuffle.checkpoints.image_processors import load_image_processor
from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.common.file_ranges import copy_range
from hf_layershuffle.compression.pruning import prune_layers
from hf_layershuffle.hub.merged_folder import merge
from hf_layershuffle.merging.merged_tensors import MergedTensor
from hf_layershuffle.merging.plan import MergePlan


@pytest.fixture
def sources(architecture, tmp_path) -> list[str]:
    """Two LayerShuffle models, `a` and `b`."""
    return [save(architecture.classifier(seed=seed, **FLAGS), tmp_path / name) for seed, name in enumerate("ab")]


@pytest.fixture
def plain(tmp_path) -> list[str]:
    """Two plain ViTs, `p` and `q`, with the old tensor names, `q` in several files."""
    models = [Architecture("vit").plain_classifier(seed=seed) for seed in range(2)]
    return [save(models[0], tmp_path / "p"), save(models[1], tmp_path / "q", max_shard_size="20KB")]


def test_a_model_merged_with_itself_is_itself_bit_for_bit(sources, tmp_path):
    folder = merge(in_place(sources[0]), tmp_path / "out", progress=False)
    before, after = stored_tensors(sources[0]), stored_tensors(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((Path(path) / "config.json").read_text()) for path in (sources[0], folder)]
    assert configs[1].pop("merge_plan")["sources"] == {"a": {"path": "a"}}
    assert configs[0] == configs[1]


def test_neighbours_are_copied_in_one_go_into_a_file_as_safetensors_writes_it(sources, tmp_path, monkeypatch):
    copied = []

    def copy(source, start, num_bytes, target, advance):
        copied.append((Path(source.name), num_bytes))
        copy_range(source, start, num_bytes, target, advance)

    monkeypatch.setattr(tensor_files, "copy_range", copy)
    folder = merge(in_place(sources[0]), tmp_path / "same", progress=False)
    file = Path(sources[0], "model.safetensors")
    assert len(copied) == 1 and copied[0][0] == file  # all tensors are neighbours
    assert (folder / "model.safetensors").read_bytes()[-copied[0][1] :] == file.read_bytes()[-copied[0][1] :]
    save_file(stored_tensors(folder), tmp_path / "written", metadata={"format": "pt"})
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "written").read_bytes()
    copied.clear()
    plan = in_place(sources[0], layers=[{"source": "a", "layer": index} for index in (2, 0, 3, 1)])
    folder = merge(plan, tmp_path / "mixed", progress=False)
    assert len(copied) == 5  # what is before the layers by its name, and each layer
    before, after = stored_tensors(sources[0]), stored_tensors(folder)
    for position, index in enumerate((2, 0, 3, 1)):
        for name in before:
            if f"layers.{index}." in name:
                assert torch.equal(after[name.replace(f"layers.{index}.", f"layers.{position}.")], before[name])


def test_a_merge_from_one_file_system_to_another(sources, tmp_path):
    other = Path("/dev/shm")
    if not other.is_dir() or os.stat(other).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no second file system here")
    folder = other / f"layershuffle-merge-{os.getpid()}"
    try:
        merge(MergePlan.random(sources, seed=0), folder, progress=False)
        expected = merge(MergePlan.random(sources, seed=0), tmp_path / "here", progress=False)
        assert (folder / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("copies", [2, 3, 7])
def test_the_average_of_copies_is_the_model_bit_for_bit(sources, tmp_path, copies):
    plan = MergePlan.average([sources[0]] * copies)
    assert list(plan.sources) == ["a", *(f"a-{number}" for number in range(2, copies + 1))]
    before, after = stored_tensors(sources[0]), stored_tensors(merge(plan, tmp_path / "out", progress=False))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_rounded_by_a_person_still_give_the_model_itself(sources, tmp_path):
    parts = [{"source": "a", "layer": 0, "weight": weight} for weight in (0.3333333, 0.3333333, 0.3333333)]
    plan = in_place(sources[0], layers=[parts])
    before, after = stored_tensors(sources[0]), stored_tensors(merge(plan, tmp_path / "out", progress=False))
    name = next(name for name in before if ".layers.0.mlp.fc1.weight" in name)
    assert torch.equal(before[name], after[name])


def test_a_weighted_average_is_one(sources, tmp_path):
    folder = merge(MergePlan.average(sources, weights=[0.25, 0.75]), tmp_path / "out", progress=False)
    (a, b), result = map(stored_tensors, sources), stored_tensors(folder)
    for name in result:
        torch.testing.assert_close(result[name], 0.25 * a[name] + 0.75 * b[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_average_is_as_exact_as_its_dtype(vit, tmp_path, dtype):
    """Against sums of float64: an error of at most one spacing of the numbers for each model."""
    models = [vit.classifier(seed=seed).to(dtype) for seed in range(5)]
    sources = [save(model, tmp_path / str(seed)) for seed, model in enumerate(models)]
    result = stored_tensors(merge(MergePlan.average(sources), tmp_path / "out", progress=False))
    states = [stored_tensors(source) for source in sources]
    for name, values in result.items():
        stacked = torch.stack([state[name].double() for state in states])
        bound = len(states) * torch.finfo(dtype).eps * stacked.abs().amax(0)
        assert values.dtype == dtype
        assert ((values.double() - stacked.mean(0)).abs() <= bound).all(), name


def test_the_average_of_numbers_whose_difference_overflows(sources, tmp_path):
    for source, number in zip(sources, (3e38, -3e38)):
        file = Path(source, "model.safetensors")
        stored = stored_tensors(source)
        stored["classifier.bias"][0] = number
        save_file(stored, file, metadata={"format": "pt"})
    result = stored_tensors(merge(MergePlan.average(sources, weights=[0.75, 0.25]), tmp_path / "out", progress=False))
    torch.testing.assert_close(result["classifier.bias"][0].item(), 1.5e38, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_average_of_the_largest_numbers(dtype, tmp_path):
    largest = torch.finfo(dtype).max
    rows = torch.tensor([[largest, largest], [-largest, largest], [largest, largest]], dtype=dtype)
    for number, row in enumerate(rows):
        save_file({"x": row}, tmp_path / f"{number}")
    stored = [tensor_files.list_tensors("source", tmp_path / f"{number}")[0] for number in range(3)]
    for count, expected in ((2, 0.0), (3, largest / 3)):
        tensor = MergedTensor("x", (2,), dtype, [(each, 1 / count) for each in stored[:count]])
        first, second = torch.cat([piece.clone() for piece in tensor.compute()]).tolist()
        assert first == pytest.approx(expected, rel=4 * torch.finfo(dtype).eps) and second == largest


def test_what_is_computed_and_what_is_copied_lie_in_their_places(sources, tmp_path):
    """Averages of some layers beside copies of others, in one file, as safetensors writes it."""
    mixed = [{"source": name, "layer": 1} for name in "ab"]
    layers = [{"source": "b", "layer": 3}, mixed, {"source": "a", "layer": 2}, mixed]
    plan = MergePlan(sources=dict(zip("ab", sources)), base="a", layers=layers)
    folder = merge(plan, tmp_path / "out", progress=False)
    (a, b), result = map(stored_tensors, sources), stored_tensors(folder)
    save_file(result, tmp_path / "written", metadata={"format": "pt"})
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "written").read_bytes()
    weight = "vit.layers.{}.mlp.fc1.weight".format
    assert torch.equal(result[weight(0)], b[weight(3)]) and torch.equal(result[weight(2)], a[weight(2)])
    for index in (1, 3):
        torch.testing.assert_close(result[weight(index)], (a[weight(1)] + b[weight(1)]) / 2)


@pytest.mark.parametrize("order", [[2, 0], [3, 2, 1, 0], [1, 1, 1, 3], [0, 1, 2, 3, 0, 1, 3]])
def test_a_merge_of_one_source_equals_the_same_execution_order(sources, tmp_path, batch, order):
    source = load_classifier(sources[0]).eval()
    layers = [{"source": "a", "layer": index} for index in order]
    model = merged(in_place(sources[0], layers=layers, position_heads=len(order) <= 4), tmp_path / "out")
    expected, output = source(batch["pixel_values"], execution_order=order), model(batch["pixel_values"])
    torch.testing.assert_close(output.logits, expected.logits)
    if len(order) <= 4:  # the heads keep the positions that there are
        torch.testing.assert_close(output.position_logits, expected.position_logits[..., : len(order)])


@of_both_architectures
def test_a_merge_by_plan_equals_the_one_built_in_memory(architecture, sources, tmp_path, batch):
    plan = MergePlan(
        sources=dict(zip("ab", sources)),
        layers=[{"source": source, "layer": layer} for source, layer in [("b", 3), ("a", 0), ("b", 0), ("a", 3)]],
        classifier="b",
        depth_embedding="b",
    )
    a, b = (load_classifier(source).eval() for source in sources)
    expected = architecture.classifier(**FLAGS).eval()
    encoder = expected.base_model
    encoder.embeddings, encoder.layernorm, encoder.depth_embedding = (
        a.base_model.embeddings,
        a.base_model.layernorm,
        b.base_model.depth_embedding,
    )
    expected.classifier = b.classifier
    for position, (source, layer) in enumerate([(b, 3), (a, 0), (b, 0), (a, 3)]):
        encoder.layers[position] = source.base_model.layers[layer]
    model = merged(plan, tmp_path / "out")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.state_dict().items())
    torch.testing.assert_close(model(**batch).logits, expected(**batch).logits)


def test_old_and_new_names_and_several_files_mix(plain, tmp_path):
    p, q = (load_classifier(source) for source in plain)
    assert (tmp_path / "q" / "model.safetensors.index.json").exists()
    new = tmp_path / "new"  # p with the names of the modules
    p.save_pretrained(new)
    assert "vit.layers.0.attention.q_proj.weight" in stored_tensors(new)
    assert "vit.encoder.layer.0.attention.attention.query.weight" in stored_tensors(plain[0])
    plan = MergePlan(
        sources={"old": plain[0], "new": str(new), "sharded": plain[1]},
        layers=[{"source": source, "layer": index} for index, source in enumerate(["old", "new", "sharded", "old"])],
    )
    model = merged(plan, tmp_path / "out").state_dict()
    for name, tensor in p.state_dict().items():
        source = q.state_dict()[name] if ".layers.2." in name else tensor
        assert torch.equal(model[name], source), name


@pytest.mark.parametrize("size", [12_000, "30KB", "5GB"])
def test_files_stay_below_the_size_asked_for(sources, tmp_path, size):
    whole = merged(in_place(sources[0]), tmp_path / "whole")
    model = merged(in_place(sources[0]), tmp_path / "out", max_shard_size=size)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in model.state_dict().items())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    limit = {"30KB": 30_000, "5GB": 5e9}.get(size, size)
    for file in files:
        with safe_open(file, "pt") as handle:
            tensors = [handle.get_tensor(name) for name in handle.keys()]
            assert handle.metadata() == {"format": "pt"}
        assert sum(tensor.nbytes for tensor in tensors) <= limit
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1) == (size != "5GB")
    if index.exists():
        index = json.loads(index.read_text())
        assert set(index["weight_map"].values()) == {file.name for file in files}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored_tensors(tmp_path / "out").values())


def test_a_tensor_keeps_its_dtype_and_mixed_ones_become_the_widest(vit, tmp_path):
    half = save(vit.classifier(seed=1).to(torch.bfloat16), tmp_path / "half")
    other = save(vit.classifier(seed=2).to(torch.float16), tmp_path / "other")
    for sources, dtype in (([half], torch.bfloat16), ([half, other], torch.float32)):
        folder = merge(MergePlan.random(sources, seed=3), tmp_path / f"out{len(sources)}", progress=False)
        layers = {name: t for name, t in stored_tensors(folder).items() if ".layers." in name}
        assert {tensor.dtype for tensor in layers.values()} == {dtype}
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    before = stored_tensors(half)
    assert all(torch.equal(before[name], tensor) for name, tensor in stored_tensors(tmp_path / "out1").items())


def test_position_heads_can_be_left_out(sources, tmp_path):
    model = merged(MergePlan.random(sources, seed=0, position_heads=False), tmp_path / "out")
    assert not model.config.position_predictor and not any("position_head" in name for name in model.state_dict())


@pytest.mark.parametrize(("order", "kept"), [([0, 1, 2, 3], [3, 1]), ([0, 1], "sequential")])
def test_an_evaluation_order_of_the_base_is_kept_where_it_fits(vit, tmp_path, order, kept):
    source = save(vit.classifier(execution_order=[3, 1], shuffle_mode="window", shuffle_window=3), tmp_path / "a")
    layers = [{"source": "a", "layer": layer} for layer in order]
    config = merged(in_place(source, layers=layers), tmp_path / "out").config
    assert config.execution_order == kept
    assert config.shuffle_window == min(3, len(order))


FRESH_PROCESS = """
import sys, torch
if sys.argv[2] == "package":
    import hf_layershuffle
    remote = {}
else:
    sys.modules["hf_layershuffle"] = None  # not installed
    remote = {"trust_remote_code": True}
from PIL import Image
from transformers import AutoModel, AutoModelForImageClassification, pipeline

folder = sys.argv[1]
base, info = AutoModel.from_pretrained(folder, output_loading_info=True, **remote)
assert info["unexpected_keys"] == {"classifier.weight", "classifier.bias"}, info
assert all(key.startswith("pooler.") for key in info["missing_keys"]), info
model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True, **remote)
assert not any(info.values()), info
images = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)
logits = model.eval()(images, execution_order=[3, 0, 1]).logits
torch.testing.assert_close(logits, torch.load(folder + "/expected.pt"))
assert len(pipeline("image-classification", model=folder, **remote)(Image.new("RGB", (20, 20)), top_k=2)) == 2
assert model.config.merge_plan["layers"][0]["layer"] == 0
model.save_pretrained(folder + "/again")
again = AutoModelForImageClassification.from_pretrained(folder + "/again", **remote)
assert again.config.merge_plan == model.config.merge_plan
"""


@pytest.mark.parametrize("how", ["package", "remote code"])
def test_a_merge_works_in_a_fresh_process(sources, tmp_path, how):
    model = merged(MergePlan.random(sources, seed=1), tmp_path / "out", max_shard_size="50KB")
    images = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)
    torch.save(model(images, execution_order=[3, 0, 1]).logits, tmp_path / "out" / "expected.pt")
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = run_python(FRESH_PROCESS, tmp_path / "out", how, environment=environment)
    assert result.returncode == 0, result.stderr


def test_a_merge_says_what_it_is_made_of(sources, tmp_path):
    plan = MergePlan.random(sources, seed=1)
    folder = merge(plan, tmp_path / "out", progress=False)
    recorded = MergePlan.load(folder / "merge_plan.yaml", trust_paths=True)
    assert recorded.layers == plan.layers and list(recorded.sources) == list(plan.sources)
    assert [source.path for source in recorded.sources.values()] == ["a", "b"]  # where they lie is nobody's business
    assert {path.name for path in folder.iterdir()} == {
        *TRAVELLING_FILES,
        "README.md",
        "config.json",
        "merge_plan.yaml",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert (folder / "preprocessor_config.json").read_bytes() == Path(
        sources[0], "preprocessor_config.json"
    ).read_bytes()


def test_a_merge_does_not_claim_its_base_was_all_it_came_from(vit, tmp_path):
    save(prune_layers(vit.classifier(), [2, 0]), tmp_path / "short")
    assert not hasattr(merged(in_place(str(tmp_path / "short"), 2), tmp_path / "out").config, "pruned_from")


@of_both_architectures
@pytest.mark.parametrize("kind", ["classifier", "plain_classifier"])
def test_an_image_processor_without_a_type_stays_readable(architecture, tmp_path, kind):
    source = save(getattr(architecture, kind)(), tmp_path / "a")
    settings = {"do_normalize": True, "do_resize": True, "size": 12, "image_mean": [0.25] * 3, "image_std": [0.5] * 3}
    Path(source, "preprocessor_config.json").write_text(json.dumps(settings))  # as transformers 4.0 wrote it
    merge(in_place(source), tmp_path / "out", progress=False)
    processor = load_image_processor(str(tmp_path / "out"))
    assert type(processor).__name__.startswith({"vit": "ViT", "deit": "DeiT"}[architecture.name])
    assert list(processor.image_mean) == [0.25] * 3 and processor.size["height"] == 12


def test_a_base_without_image_processor_is_said(sources, tmp_path, caplog):
    Path(sources[0], "preprocessor_config.json").unlink()
    merge(in_place(sources[0]), tmp_path / "out", progress=False)
    assert "The base 'a' has no image processor, so the merged model has none." in caplog.text
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()


@pytest.fixture
def hub_cache(plain, tmp_path, monkeypatch) -> str:
    """A Hub cache that holds the first plain model as `org/model`, so that it "downloads" offline; its commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "cache" / "models--org--model"
    shutil.copytree(plain[0], cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    (cache / "refs" / "v1").write_text(commit)
    monkeypatch.setattr("hf_layershuffle.checkpoints.locations.snapshot_download", _download_from(cache.parent))
    return commit


def _download_from(cache):
    from huggingface_hub import snapshot_download

    return lambda *args, **kwargs: snapshot_download(*args, cache_dir=cache, local_files_only=True, **kwargs)


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_hub_source_is_noted_with_its_commit(hub_cache, plain, tmp_path, revision):
    plan = in_place({"path": "org/model", "revision": revision})
    model = merged(plan, tmp_path / "out")
    assert model.config.merge_plan["sources"] == {"a": {"path": "org/model", "revision": hub_cache}}
    assert yaml.safe_load((tmp_path / "out/merge_plan.yaml").read_text())["sources"]["a"]["revision"] == hub_cache
    assert plan.sources["a"].revision == revision  # the plan that was passed is as it was
    expected = load_classifier(plain[0]).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_missing_hub_source_is_an_error(hub_cache, tmp_path):
    with pytest.raises(OSError, match=r"Source 'a': 'org/nothing' at revision 'v2' is neither a folder here nor"):
        merge(in_place({"path": "org/nothing", "revision": "v2"}), tmp_path / "out")


PEAK_MEMORY = """
import sys
from pathlib import Path
from hf_layershuffle.merging.plan import MergePlan
from hf_layershuffle.hub.merged_folder import merge
from hf_layershuffle.merging.merged_model import prepare_merge

def peak():  # of this process since it began or since the last reset; `ru_maxrss` would include the parent's
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

plan = MergePlan.average(sys.argv[2:]) if sys.argv[1] == "average" else MergePlan.random(sys.argv[2:], seed=0)
prepared = prepare_merge(plan)  # loads what libraries load at first use
largest = max(tensor.dtype.itemsize * __import__("math").prod(tensor.shape) for tensor in prepared.tensors) / 2**20
Path("/proc/self/clear_refs").write_text("5")
before = peak()
merge(plan, Path(sys.argv[2]).parent / "out", progress=False)
print(largest, prepared.num_bytes / 2**20, peak() - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("how", ["random", "average"])
def test_memory_is_bounded_by_the_largest_tensor(vit, tmp_path, how):
    model = vit.classifier(hidden_size=512, num_attention_heads=8, intermediate_size=4096, num_hidden_layers=10)
    model.save_pretrained(tmp_path / "a")
    for name in "bcd":  # other files to whoever reads them
        shutil.copytree(tmp_path / "a", tmp_path / name, copy_function=os.link)
    result = run_python(PEAK_MEMORY, how, *(tmp_path / name for name in "abcd"), fresh=True)
    assert result.returncode == 0, result.stderr
    largest, whole, growth = map(float, result.stdout.split())
    assert whole > 200 and largest == 8
    # Promised are 4 * largest + 300 MB, which would not tell it from holding all of this result
    assert growth < 4 * largest + 50
