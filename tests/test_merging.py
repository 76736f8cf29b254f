import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Architecture, of_both_architectures, run_python
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare
from transformers import AutoModelForImageClassification, ViTImageProcessor

from hf_layershuffle.checkpoints.image_processors import load_image_processor
from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.checkpoints.locations import name_sources
from hf_layershuffle.checkpoints.stored_checkpoint import open_source
from hf_layershuffle.compression.pruning import prune_layers
from hf_layershuffle.hub.merged_folder import merge
from hf_layershuffle.merging.merged_model import MergedTensor
from hf_layershuffle.merging.plan import MergePlan, draw_layers
from hf_layershuffle.merging.random_merges import (
    MergePool,
    RandomMergeReport,
    evaluate_random_merges,
    random_merge_table,
)


FLAGS = {"shuffle_mode": "arbitrary", "depth_embedding": True, "position_predictor": True}


def save(model, folder: Path, **kwargs) -> str:
    """With noise on everything, so that no tensor is a constant that two models share."""
    generator = torch.Generator().manual_seed(len(folder.name) + ord(folder.name[-1]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    model.save_pretrained(folder, **kwargs)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def sources(architecture, tmp_path) -> list[str]:
    """Two LayerShuffle models, `a` and `b`."""
    return [save(architecture.classifier(seed=seed, **FLAGS), tmp_path / name) for seed, name in enumerate("ab")]


@pytest.fixture
def plain(tmp_path) -> list[str]:
    """Two plain ViTs, `p` and `q`, with the old tensor names, `q` in several files."""
    models = [Architecture("vit").plain_classifier(seed=seed) for seed in range(2)]
    return [save(models[0], tmp_path / "p"), save(models[1], tmp_path / "q", max_shard_size="20KB")]


def stored_tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def merged(plan: MergePlan, folder, **kwargs):
    """Merges, and loads as a user does: nothing may be missing or left over."""
    merge(plan, folder, progress=False, **kwargs)
    model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def in_place(source: str, num_layers: int = 4, **kwargs) -> MergePlan:
    layers = [{"source": "a", "layer": index} for index in range(num_layers)]
    return MergePlan(**{"sources": {"a": source}, "layers": layers, **kwargs})


# --- Merging ---


def test_a_model_merged_with_itself_is_itself_bit_for_bit(sources, tmp_path):
    folder = merge(in_place(sources[0]), tmp_path / "out", progress=False)
    before, after = stored_tensors(sources[0]), stored_tensors(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((Path(path) / "config.json").read_text()) for path in (sources[0], folder)]
    assert configs[1].pop("merge_plan")["sources"] == {"a": {"path": "a"}}
    assert configs[0] == configs[1]


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
        "README.md",
        "config.json",
        "configuration_layershuffle.py",
        "execution_order.py",
        "auto_classes.py",
        "free_forward.py",
        "free_layers.py",
        "layer_program.py",
        "position_modules.py",
        "saved_model.py",
        "merge_plan.yaml",
        "model.safetensors",
        "modeling_layershuffle.py",
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
    result = run_python(PEAK_MEMORY, how, *(tmp_path / name for name in "abcd"))
    assert result.returncode == 0, result.stderr
    largest, whole, growth = map(float, result.stdout.split())
    assert whole > 200 and largest == 8
    # Promised are 4 * largest + 300 MB, which would not tell it from holding all of this result
    assert growth < 4 * largest + 50


# --- What is refused, before anything is written ---


def assert_refused(plan, tmp_path, match, error=ValueError, **kwargs):
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(error, match=match):
        merge(plan, tmp_path / "results" / "out", progress=False, **kwargs)
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("hidden_size", (32, 64)),
        ("num_attention_heads", (2, 4)),
        ("intermediate_size", (64, 128)),
        ("patch_size", (4, 2)),
        ("image_size", (8, 16)),
        ("num_channels", (3, 1)),
        ("depth_embedding", (False, True)),
        ("position_predictor", (False, True)),
        ("num_labels", (5, 6)),
    ],
)
def test_sources_that_differ_are_refused(vit, tmp_path, field, values):
    sources = [save(vit.classifier(**{field: value}), tmp_path / name) for name, value in zip("ab", values)]
    assert_refused(
        MergePlan.random(sources, seed=0), tmp_path, f"`{field}` is {values[0]} in 'a' and {values[1]} in 'b'"
    )


def test_other_labels_and_architectures_are_refused(vit, tmp_path):
    names = {0: "cat", 1: "dog"}, {0: "dog", 1: "cat"}
    sources = [save(vit.classifier(num_labels=2, id2label=each), tmp_path / name) for name, each in zip("ab", names)]
    sources.append(save(Architecture("deit").classifier(num_labels=2), tmp_path / "c"))
    assert_refused(
        MergePlan.random(sources[:2], seed=0), tmp_path, r"`id2label` is \{0: 'cat', 1: 'dog'\} in 'a' and \{0: 'dog'"
    )
    assert_refused(MergePlan.random(sources[1:], seed=0), tmp_path, "`model_type` is 'layershuffle_vit' in 'b' and")


def test_layers_and_sources_that_do_not_exist_are_refused(sources, tmp_path):
    plan = in_place(sources[0], layers=[{"source": "a", "layer": 0}, {"source": "a", "layer": 4}])
    assert_refused(plan, tmp_path, r"`layers\[1\]` is layer 4 of source 'a', which has 4 layers, numbered from 0 to 3")
    with pytest.raises(ValueError, match=r"`layers\[0\]` names the source 'c', which does not exist; there are 'a'"):
        in_place(sources[0], layers=[{"source": "c", "layer": 0}])
    for part in ("base", "embeddings", "layernorm", "classifier", "depth_embedding"):
        with pytest.raises(ValueError, match=f"`{part}` names the source 'c'"):
            in_place(sources[0], **{part: "c"})
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        in_place(sources[0], layers=[{"source": "a", "layer": -1}])
    assert_refused(in_place(str(tmp_path / "none")), tmp_path, "Source 'a': there is no folder '.*none'")
    plan = in_place({"path": sources[0], "revision": "main"})
    assert_refused(plan, tmp_path, r"`revision` \('main'\) is for Hub ids only")


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ([0.5, 0.4], r"the weights \[0.5, 0.4\] sum to 0.9; they must sum to 1"),
        ([1.0, 1.0], "sum to 2"),
        ([0.5, None], "some have a weight and some have none"),
        ([1.5, -0.5], "less than or equal to 1"),
        ([float("nan"), 1.0], "should be a finite number"),
    ],
)
@pytest.mark.parametrize("where", ["layers", "classifier"])
def test_weights_that_are_no_average_are_refused(where, weights, match):
    layer = {"layer": 0} if where == "layers" else {}
    parts = [{"source": source, **layer, "weight": weight} for source, weight in zip("ab", weights)]
    values = {"layers": [{"source": "a", "layer": 0}], "sources": {"a": "a", "b": "b"}}
    with pytest.raises(ValueError, match=match):
        MergePlan(**{**values, where: [parts] if where == "layers" else parts})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_refused(vit, tmp_path, value, dtype):
    source = save(vit.classifier().to(dtype), tmp_path / "a")
    tensors = stored_tensors(source)
    tensors["vit.layers.2.mlp.fc2.bias"][7] = value
    save_file(tensors, Path(source, "model.safetensors"), metadata={"format": "pt"})
    assert_refused(in_place(source), tmp_path, r"'vit.layers.2.mlp.fc2.bias' in '.*' holds NaN or infinite values")
    layers = [{"source": "a", "layer": index} for index in (0, 1, 3)]
    merged(in_place(source, layers=layers), tmp_path / "out")  # what is not taken does not matter


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(sources, tmp_path, fraction):
    path = Path(sources[1], "model.safetensors")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    assert_refused(
        MergePlan.random(sources, seed=0), tmp_path, "Source 'b': .* is truncated or corrupted", error=OSError
    )


def test_pickles_are_refused(vit, tmp_path):
    source = save(vit.classifier(), tmp_path / "a")
    torch.save(stored_tensors(source), Path(source, "pytorch_model.bin"))
    Path(source, "model.safetensors").unlink()
    assert_refused(
        in_place(source),
        tmp_path,
        "holds no 'model.safetensors'. It holds pytorch_model.bin: pickles.* Only safetensors",
    )
    Path(source, "pytorch_model.bin").unlink()
    assert_refused(in_place(source), tmp_path, "holds no 'model.safetensors'. Only safetensors")


def test_output_folders_in_use_are_refused(sources, tmp_path):
    plan = in_place(sources[0])
    link = tmp_path / "link"
    link.symlink_to(sources[0])
    for folder in (sources[0], link):
        with pytest.raises(ValueError, match=r"The output folder '.*' is the source 'a'"):
            merge(plan, folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"The output folder '.*full' is not empty"):
        merge(plan, tmp_path / "full")
    with pytest.raises(ValueError, match=r"The output folder '.*notes\.txt' is a file"):
        merge(plan, tmp_path / "full" / "notes.txt")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    merged(plan, tmp_path / "empty")


@pytest.mark.parametrize("size", [0, -5, "many", "5 apples"])
def test_shard_sizes_that_are_none_are_refused(sources, tmp_path, size):
    assert_refused(in_place(sources[0]), tmp_path, f"`max_shard_size` is {size!r}; pass bytes", max_shard_size=size)


def test_incomplete_sources_are_refused(vit, tmp_path):
    source = Path(save(vit.classifier(), tmp_path / "a"))
    complete = stored_tensors(source)
    assert_other = [
        (lambda t: t.pop("classifier.weight"), "lacks the tensor 'classifier.weight'"),
        (lambda t: t.pop("vit.layers.1.mlp.fc1.bias"), "lacks the tensor 'vit.layers.1.mlp.fc1.bias'"),
        (
            lambda t: t.update({"classifier.weight": torch.zeros(7, 32)}),
            r"'classifier.weight' has shape \(7, 32\); with this configuration it must be \(5, 32\)",
        ),
        (
            lambda t: t.update({"classifier.weight": torch.zeros(5, 32, dtype=torch.int8)}),
            "'classifier.weight' is not of floats of 16 to 64 bits; quantized models cannot be merged",
        ),
    ]
    for change, match in assert_other:
        tensors = dict(complete)
        change(tensors)
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        assert_refused(in_place(str(source)), tmp_path, match)
    (source / "config.json").write_text('{"model_type": "blip_text_model"}')
    assert_refused(
        in_place(str(source)),
        tmp_path,
        "Source 'a' is a model of type 'blip_text_model', of which transformers has no",
    )
    (source / "config.json").write_text("[]")
    assert_refused(in_place(str(source)), tmp_path, r"'.*config.json' is not a model's configuration")
    (source / "config.json").unlink()
    assert_refused(in_place(str(source)), tmp_path, "holds no config.json")


def test_an_index_cannot_lead_out_of_its_folder(plain, tmp_path):
    index = Path(plain[1], "model.safetensors.index.json")
    values = json.loads(index.read_text())
    name = next(iter(values["weight_map"]))
    for file, match, error in (
        ("../p/model.safetensors", "which is not a safetensors file of its folder", ValueError),
        ("model.bin", "which is not a safetensors file of its folder", ValueError),
        ("model-9.safetensors", "lacks the file 'model-9.safetensors' that '.*' names", OSError),
    ):
        values["weight_map"][name] = file
        index.write_text(json.dumps(values))
        assert_refused(in_place(plain[1]), tmp_path, match, error=error)
    index.write_text("{")
    assert_refused(in_place(plain[1]), tmp_path, "is not an index of safetensors files")


def test_more_layers_than_the_position_heads_know_are_refused(sources, tmp_path):
    plan = in_place(sources[0], layers=[{"source": "a", "layer": 0}] * 5)
    assert_refused(plan, tmp_path, "know 4 positions, but the result has 5 layers. Set `position_heads: false`")


def test_a_write_that_fails_leaves_nothing(sources, tmp_path, monkeypatch):
    compute, written = MergedTensor.compute, []

    def compute_until_the_disk_is_full(self):
        written.append(self.name)
        if len(written) > 20:
            raise OSError("No space left on device")
        return compute(self)

    monkeypatch.setattr(MergedTensor, "compute", compute_until_the_disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        merge(in_place(sources[0]), tmp_path / "out", progress=False)
    assert len(written) == 21
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


# --- Plans ---


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_a_plan_survives_its_file(sources, tmp_path, suffix):
    for plan in (
        MergePlan.random(sources, seed=4, any_layer=True, base="b"),
        MergePlan.average(sources, weights=[0.1, 0.9]),
    ):
        path = plan.save(tmp_path / f"plan{suffix}")
        assert MergePlan.load(path) == plan
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("sources: {a: x}\nlayers: [{source: a, layer: 0}]\nlayer: 3", r"`layer`: Extra inputs.*a plan has `sources`"),
        ("sources: {a: {path: x, sha: y}}\nlayers: [{source: a, layer: 0}]", r"`sources\.a\.sha`: Extra inputs"),
        ("sources: {a: x}\nlayers: [{source: a, layer: 0, scale: 2}]", r"`layers\[0\]\[0\]\.scale`: Extra inputs"),
        ("sources: {a: x}\nlayers: [{source: a, layer: 1.5}]", r"`layers\[0\]\[0\]\.layer`: .* it is 1\.5"),
        ("sources: {a: x}\nlayers: []", "`layers`: List should have at least 1 item"),
        ("sources: {}\nlayers: [{source: a, layer: 0}]", "`sources`: Dictionary should have at least 1 item"),
        ("sources: {a: x}", "`layers`: Field required"),
        ("sources: {a: x}\nlayers: [{source: b, layer: 0}]", "names the source 'b', which does not exist"),
        ("- 1", "must hold one mapping"),
        ("a: [", "is not valid YAML in line 1"),
    ],
)
def test_a_plan_file_that_is_none_is_refused(tmp_path, text, match):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ValueError, match=match) as error:
        MergePlan.load(tmp_path / "plan.yaml")
    assert "plan.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_plan_may_not_lead_out_of_its_folders(sources, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "plans").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    path = in_place(sources[0]).save(tmp_path / "plans" / "plan.yaml")
    assert MergePlan.load(path, trust_paths=True).sources["a"].path == sources[0]
    (tmp_path / "work" / "link").symlink_to(sources[0])
    for source in (sources[0], "../a", "link", "../plans/../a", "/etc"):
        in_place(source).save(path)
        with pytest.raises(ValueError, match=r"Source 'a' of the plan is the folder '.*', outside of .*--trust_paths"):
            MergePlan.load(path)
    shutil.copytree(sources[0], tmp_path / "work" / "inside")
    shutil.copytree(sources[0], tmp_path / "plans" / "beside")
    for source in ("inside", "./inside", str(tmp_path / "plans" / "beside"), "org/model"):
        in_place(source).save(path)
        assert MergePlan.load(path).sources["a"].path == source


def test_random_plans_put_layer_i_of_some_source_at_i(sources):
    plans = [MergePlan.random(sources, seed=seed) for seed in range(8)]
    assert all([parts[0].layer for parts in plan.layers] == [0, 1, 2, 3] for plan in plans)
    assert plans[3] == MergePlan.random(sources, seed=3)
    assert len({str(plan.to_dict()) for plan in plans}) > 4
    assert all(plan.base == "a" and plan.classifier[0].source == "a" for plan in plans)
    assert MergePlan.random(sources, seed=0, base="b").embeddings[0].source == "b"


def test_random_draws_are_uniform():
    depths = {"a": 4, "b": 4, "c": 4}
    draws = [draw_layers(depths, seed, 4) for seed in range(900)]
    for position in range(4):
        counts = [sum(draw[position][0] == name for draw in draws) for name in depths]
        assert chisquare(counts).pvalue > 0.001
    draws = [layer for seed in range(400) for layer in draw_layers({"a": 2, "b": 4}, seed, 3, any_layer=True)]
    assert chisquare([draws.count(item) for item in sorted(set(draws))]).pvalue > 0.001
    assert len(set(draws)) == 6


def test_draws_that_cannot_be_are_refused(sources, vit, tmp_path):
    short = save(vit.classifier(num_hidden_layers=2, **FLAGS), tmp_path / "short")
    with pytest.raises(ValueError, match="Source 'short' has 2 layers, fewer than the 4 of the result"):
        draw_layers({"long": 4, "short": 2}, 0, 4)
    with pytest.raises(ValueError, match="`num_hidden_layers` is 4 in 'a' and 2 in 'short'; an average needs"):
        MergePlan.average([sources[0], short])
    assert len(MergePlan.random([sources[0], short], seed=0, num_layers=2).layers) == 2
    with pytest.raises(ValueError, match="`seed` is -1; it must be an integer of at least 0"):
        MergePlan.random(sources, seed=-1)
    with pytest.raises(ValueError, match="`num_layers` is 0; it must be an integer of at least 1"):
        MergePlan.random(sources, seed=0, num_layers=0)
    with pytest.raises(ValueError, match="`base` is 'z'; it must be one of 'a', 'b'"):
        MergePlan.random(sources, seed=0, base="z")
    with pytest.raises(ValueError, match="There are no sources"):
        MergePlan.random([], seed=0)
    with pytest.raises(ValueError, match="There are 1 weights for 2 sources"):
        MergePlan.average(sources, weights=[1.0])


def test_sources_are_named_by_their_last_part(tmp_path):
    assert name_sources(["org/model", "other/model", "/x/model/", "gpt"]) == {
        "model": "org/model",
        "model-2": "other/model",
        "model-3": "/x/model/",
        "gpt": "gpt",
    }


def test_a_source_lists_its_tensors_by_the_modules_names(plain):
    source = open_source("p", plain[0])
    assert set(source.tensors) == set(Architecture("vit").classifier().state_dict())
    stored = source.tensors["vit.layers.3.attention.o_proj.weight"]
    assert stored.shape == (32, 32) and stored.dtype == torch.float32
    assert torch.equal(stored.read(), load_classifier(plain[0]).state_dict()["vit.layers.3.attention.o_proj.weight"])


# --- Random merges in memory ---


@pytest.fixture
def images() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": index % 5} for index in range(40)]


@pytest.mark.parametrize("any_layer", [False, True])
def test_a_merge_in_the_pool_equals_the_saved_one(sources, tmp_path, images, any_layer):
    models = {name: load_classifier(source) for name, source in zip("ab", sources)}
    report = evaluate_random_merges(
        models, images, num_merges=3, seed=5, any_layer=any_layer, base="b", batch_size=16, progress=False
    )
    pool = MergePool(models, "b")
    pixels = torch.stack([image["pixel_values"] for image in images])
    labels = torch.tensor([image["labels"] for image in images])
    for index, score in enumerate(report.merges):
        plan = MergePlan.random(dict(zip("ab", sources)), seed=5 + index, any_layer=any_layer, base="b")
        assert [[parts[0].source, parts[0].layer] for parts in plan.layers] == score.layers
        model = merged(plan, tmp_path / f"out{index}")
        with torch.no_grad(), pool.evaluation_mode():
            expected = model(pixels, labels=labels)
            hidden_states = pool.embed(pixels)
            for position, layer in enumerate(pool.execution_order(score.layers)):
                hidden_states, _ = pool.run_layer(hidden_states, layer, position)
        torch.testing.assert_close(pool.classify(hidden_states), expected.logits)
        assert score.accuracy == (expected.logits.argmax(-1) == labels).double().mean().item()
        assert score.loss == pytest.approx(expected.loss.item(), rel=1e-5)
    for name, score in report.source_scores.items():
        with torch.no_grad():
            logits = models[name].eval()(pixels).logits
        assert score.accuracy == (logits.argmax(-1) == labels).double().mean().item()


def test_a_report_of_random_merges_survives_its_file(sources, tmp_path, images):
    models = {name: load_classifier(source) for name, source in zip("ab", sources)}
    origin = {name: {"path": source, "revision": None} for name, source in zip("ab", sources)}
    report = evaluate_random_merges(models, images, num_merges=4, sources=origin, progress=False)
    assert RandomMergeReport.load(report.save(tmp_path / "report").parent) == report
    named = {name: {"path": name, "revision": None} for name in "ab"}  # not where on this machine they lie
    assert report.sources == named and report.num_images == 40 and report.environment["versions"]["torch"]
    assert [merge.seed for merge in report.merges] == [0, 1, 2, 3]
    rows = random_merge_table([report, report]).row_count
    assert rows == 4
    (tmp_path / "report" / "random_merges.json").write_text('{"sources": 1}')
    with pytest.raises(ValueError, match="is not a report of random merges"):
        RandomMergeReport.load(tmp_path / "report")


def test_pools_that_cannot_be_are_refused(vit, images):
    models = {"a": vit.classifier(), "b": vit.classifier(hidden_size=64)}
    with pytest.raises(ValueError, match="`hidden_size` is 32 in 'a' and 64 in 'b'"):
        MergePool(models)
    with pytest.raises(ValueError, match="There are no models"):
        MergePool({})
    with pytest.raises(ValueError, match="`base` is 'c'; it must be one of 'a'"):
        MergePool({"a": models["a"]}, "c")
    with pytest.raises(ValueError, match="`num_merges` is 0; it must be an integer of at least 1"):
        evaluate_random_merges({"a": models["a"]}, images, num_merges=0)
