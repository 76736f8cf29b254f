"""Random merges in memory."""

import pytest
import torch
from support.merges import FLAGS, merged, save

from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.merging.plan import MergePlan
from hf_layershuffle.merging.random_merges import (
    MergePool,
    RandomMergeReport,
    evaluate_random_merges,
    random_merge_table,
)


@pytest.fixture
def sources(architecture, tmp_path) -> list[str]:
    """Two LayerShuffle models, `a` and `b`."""
    return [save(architecture.classifier(seed=seed, **FLAGS), tmp_path / name) for seed, name in enumerate("ab")]


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


def test_what_the_base_leaves_out_is_of_its_own_layers(sources, tmp_path, images):
    """As the merge on disk, which does not keep it either."""
    models = {name: load_classifier(source) for name, source in zip("ab", sources)}
    plain = evaluate_random_merges(models, images, num_merges=2, progress=False)
    for model in models.values():
        model.config.update({"skipped_mlps": [0, 1, 3], "exit_threshold": 0.1})
    report = evaluate_random_merges(models, images, num_merges=2, progress=False)
    assert [merge.loss for merge in report.merges] == [merge.loss for merge in plain.merges]
    assert report.source_scores["a"].loss != plain.source_scores["a"].loss  # as the model is
    assert models["a"].config.skipped_mlps == [0, 1, 3]
