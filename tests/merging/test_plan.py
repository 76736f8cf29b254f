"""Plans of a merge."""

import json
import shutil

import pytest
import torch
from conftest import Architecture
from scipy.stats import chisquare
from support.merges import FLAGS, in_place, save

from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.checkpoints.locations import name_sources
from hf_layershuffle.checkpoints.stored_checkpoint import open_source
from hf_layershuffle.merging.plan import MergePlan, draw_layers


@pytest.fixture
def sources(architecture, tmp_path) -> list[str]:
    """Two LayerShuffle models, `a` and `b`."""
    return [save(architecture.classifier(seed=seed, **FLAGS), tmp_path / name) for seed, name in enumerate("ab")]


@pytest.fixture
def plain(tmp_path) -> list[str]:
    """Two plain ViTs, `p` and `q`, with the old tensor names, `q` in several files."""
    models = [Architecture("vit").plain_classifier(seed=seed) for seed in range(2)]
    return [save(models[0], tmp_path / "p"), save(models[1], tmp_path / "q", max_shard_size="20KB")]


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
