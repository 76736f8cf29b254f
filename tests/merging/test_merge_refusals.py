"""What cannot be merged is refused before anything is written."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import Architecture
from safetensors.torch import load_file, save_file
from support.merges import FLAGS, assert_refused, in_place, merged, save, stored_tensors

from hf_layershuffle.checkpoints import tensor_files
from hf_layershuffle.common.file_ranges import copy_range
from hf_layershuffle.hub.merged_folder import merge
from hf_layershuffle.merging import merged_weights
from hf_layershuffle.merging.merged_model import MergedTensor, prepare_merge, split_into_shards
from hf_layershuffle.merging.merged_weights import write_weights
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
    of_timm = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"input_size": [3, 16, 16]}}
    for values in (of_timm, of_timm | {"model_type": "timm_wrapper"}):
        (source / "config.json").write_text(json.dumps(values))
        assert_refused(in_place(str(source)), tmp_path, "it is timm's, which does not say how many layers there are")
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


def test_a_computation_that_fails_leaves_nothing(sources, tmp_path, monkeypatch):
    compute, written = MergedTensor.compute, []

    def compute_until_the_disk_is_full(self):
        written.append(self.name)
        if len(written) > 20:
            raise OSError("No space left on device")
        return compute(self)

    monkeypatch.setattr(MergedTensor, "compute", compute_until_the_disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        merge(MergePlan.average(sources), tmp_path / "results" / "out", progress=False)
    assert 21 <= len(written) <= 24  # four threads at most, of which none begins another tensor
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"])
def test_a_copy_that_fails_leaves_nothing(sources, tmp_path, monkeypatch, error):
    copied = []

    def copy_until_it_fails(source, start, num_bytes, target, advance):
        copied.append(num_bytes)
        copy_range(source, start, num_bytes, target, advance)
        if len(copied) > 2:
            raise error

    monkeypatch.setattr(tensor_files, "copy_range", copy_until_it_fails)
    with pytest.raises(type(error)):
        merge(MergePlan.random(sources, seed=0), tmp_path / "results" / "out", progress=False)
    assert len(copied) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    ours = ("checks-tensors", "writes-tensors", "writes-the-rest")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(ours)]


def test_a_number_that_is_not_finite_ends_the_copying_early(sources, tmp_path, monkeypatch):
    """The check runs beside the copying, which looks at it after each part."""
    copied, refused = [], threading.Event()

    def refuse(stored):
        refused.set()
        raise ValueError(f"'{stored.name}' holds NaN or infinite values.")

    def copy_after_the_check(source, start, num_bytes, target, advance):
        copied.append(num_bytes)
        copy_range(source, start, num_bytes, target)
        refused.wait()
        time.sleep(0.2)  # until the error is there to be seen
        advance(num_bytes)

    monkeypatch.setattr(merged_weights, "refuse_nonfinite", refuse)
    monkeypatch.setattr(tensor_files, "copy_range", copy_after_the_check)
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        merge(MergePlan.random(sources, seed=0), tmp_path / "out", progress=False)
    assert len(copied) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("how", ["average", "copy"])
def test_a_source_that_becomes_shorter_is_an_error(sources, tmp_path, how):
    plan = MergePlan.average(sources) if how == "average" else MergePlan.random(sources, seed=0)
    prepared = prepare_merge(plan)
    file = Path(sources[0], "model.safetensors")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(OSError, match="became shorter while it was read"):
        write_weights(prepared.tensors, split_into_shards(prepared, "5GB"), tmp_path, progress=False)


def test_an_average_names_the_tensor_that_is_not_finite(sources, tmp_path):
    model = load_file(Path(sources[1], "model.safetensors"))
    model["vit.layers.1.mlp.fc1.weight"][3, 2] = float("-inf")
    save_file(model, Path(sources[1], "model.safetensors"), metadata={"format": "pt"})
    match = r"Source 'b': the tensor 'vit.layers.1.mlp.fc1.weight' in '.*' holds NaN or infinite values"
    assert_refused(MergePlan.average(sources), tmp_path, match)
