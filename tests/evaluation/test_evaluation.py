import copy
import itertools
import weakref
from dataclasses import replace

import evaluate
import numpy as np
import pytest
import torch
from conftest import of_both_architectures
from datasets import ClassLabel, DatasetDict
from scipy import stats
from support.texts import labelled_texts, tokenizer_of

import hf_layershuffle as ls
from hf_layershuffle.checkpoints.identity import FAMILY_SETTINGS
from hf_layershuffle.common.tables import render
from hf_layershuffle.data.dataloading import as_dataloader
from hf_layershuffle.evaluation import order_tree
from hf_layershuffle.evaluation.fingerprint import data_digest, expected_report, other_than
from hf_layershuffle.evaluation.order_plans import evenly_spaced_layers, plan_orders
from hf_layershuffle.evaluation.order_tree import OrderTree
from hf_layershuffle.evaluation.report import RobustnessReport, compare_reports
from hf_layershuffle.evaluation.robustness import evaluate_robustness, score_execution_orders
from hf_layershuffle.evaluation.statistics import OrderGroup, OrderScore, PositionPrediction, summarize
from hf_layershuffle.layerwise import LayerwiseClassifier


FLAGS = [{}, {"depth_embedding": True, "position_predictor": True}]


def lively(model):
    """Weights so large that orders give different predictions."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def items(num_images=30, num_labels=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": index % num_labels}
        for index in range(num_images)
    ]


@torch.no_grad()
def naive_scores(model, data, order):
    """Accuracy, top-5 accuracy and loss of one order by the model's own forward."""
    pixel_values = torch.stack([item["pixel_values"] for item in data])
    labels = torch.tensor([item["labels"] for item in data])
    logits = model(pixel_values, execution_order=list(order)).logits
    top5 = (logits.topk(5).indices == labels[:, None]).any(-1).float().mean().item()
    return (
        logits.argmax(-1),
        (logits.argmax(-1) == labels).float().mean().item(),
        top5,
        (torch.nn.functional.cross_entropy(logits, labels).item()),
    )


@pytest.mark.parametrize("flags", FLAGS)
def test_the_report_is_that_of_the_naive_loop(vit, flags):
    model, data = lively(vit.classifier(num_labels=7, **flags)), items(num_labels=7)
    report = evaluate_robustness(model, data, num_orders=6, num_subsets=3, seed=1, batch_size=8, progress=False)
    checked = [report.sequential, report.reversed, *report.arbitrary.scores, *report.leave_one_out]
    checked += report.neighbour_swaps
    checked += [score for groups in report.pruning.values() for group in groups for score in group.scores]
    assert len({tuple(score.execution_order) for score in checked}) > 25
    for score in checked:
        _, accuracy, top5, loss = naive_scores(model, data, score.execution_order)
        assert score.accuracy == pytest.approx(accuracy, abs=1e-6)
        assert score.top5_accuracy == pytest.approx(top5, abs=1e-6)
        assert score.loss == pytest.approx(loss, rel=1e-4)
    accuracies = [score.accuracy for score in report.arbitrary.scores]
    assert len(set(accuracies)) > 1
    assert report.arbitrary.accuracy.mean == pytest.approx(np.mean(accuracies))


@pytest.mark.parametrize("flags", FLAGS)
def test_predictions_of_all_prefixes_equal_the_naive_ones_one_by_one(vit, monkeypatch, flags):
    model, data = lively(vit.classifier(**flags)), items()
    prefixes = [order[:k] for order in ls.arbitrary_execution_orders(4, 5) for k in range(1, 5)]
    predictions = []
    score_logits = order_tree._score_logits
    monkeypatch.setattr(
        order_tree,
        "_score_logits",
        lambda logits, labels: predictions.append(logits.argmax(-1)) or score_logits(logits, labels),
    )
    scores = score_execution_orders(model, data, prefixes, batch_size=30, progress=False)
    assert [score.execution_order for score in scores] == prefixes
    tree_order = []

    def collect(node, path):
        if node.order_index is not None:
            tree_order.append(path)
        for layer, child in node.children.items():
            collect(child, (*path, layer))

    collect(OrderTree.of(dict.fromkeys(map(tuple, prefixes))), ())
    assert len(predictions) == len(tree_order) == len(set(map(tuple, prefixes)))
    for path, prediction in zip(tree_order, predictions):
        assert torch.equal(prediction, naive_scores(model, data, path)[0]), path


def test_shared_beginnings_are_computed_once_and_images_embedded_once(vit):
    model = vit.classifier()
    parts = LayerwiseClassifier(model)
    runs, embeddings = [], []
    model.vit.embeddings.register_forward_hook(lambda module, args, output: embeddings.append(len(output)))
    for layer in model.vit.layers:
        layer.register_forward_hook(lambda *args: runs.append(1))
    orders = list(itertools.permutations(range(4)))
    score_execution_orders(parts, items(8), orders, batch_size=4, progress=False)
    # Each batch once, and once more to learn that one image is enough for what follows the layers
    assert embeddings.count(4) == 3
    # Nodes of the tree, for two batches, and once to learn what a layer gives; 2 * 96 without sharing
    assert len(runs) == 2 * (4 + 12 + 24 + 24) + 1


def test_memory_does_not_grow_with_the_number_of_orders(vit):
    model = vit.classifier(num_hidden_layers=6)
    alive, most = set(), []

    class Recorder(LayerwiseClassifier):
        def run_layer(self, hidden_states, index, position):
            output = super().run_layer(hidden_states, index, position)
            key = id(output[0].untyped_storage())
            alive.add(key)
            weakref.finalize(output[0], alive.discard, key)
            most.append(len(alive))
            return output

    counts = []
    for num_orders in (16, 64):
        most.clear()
        score_execution_orders(Recorder(model), items(4), ls.arbitrary_execution_orders(6, num_orders), progress=False)
        counts.append(max(most))
    # One a level, and those that wait to be classified with another
    assert counts[0] == counts[1] == 6 + order_tree.MOST_WAITING - 1


def test_orders_repeats_and_subsets_are_scored_in_the_given_order(vit):
    model, data = lively(vit.classifier()), items()
    orders = [[0, 0, 1], [3], [0, 0, 1], [2, 1, 3, 0]]
    scores = score_execution_orders(model, data, orders, progress=False)
    assert [score.execution_order for score in scores] == orders
    assert scores[0] == scores[2]
    for score in scores:
        assert score.accuracy == pytest.approx(naive_scores(model, data, score.execution_order)[1])
        assert score.top5_accuracy is None  # five classes


def test_position_prediction_counts_are_those_of_the_models_forward(vit):
    model, data = lively(vit.classifier(position_predictor=True)), items()
    report = evaluate_robustness(model, data, num_orders=5, seed=2, batch_size=7, progress=False)
    correct, total = np.zeros((4, 4), int), np.zeros((4, 4), int)
    pixel_values = torch.stack([item["pixel_values"] for item in data])
    # orders that begin alike run a layer at a position once, and it is counted once
    beginnings = {tuple(o[: k + 1]) for o in ls.arbitrary_execution_orders(4, 5, 2) for k in range(4)}
    for order in beginnings:
        with torch.no_grad():
            logits = model(pixel_values, execution_order=list(order)).position_logits
        position = len(order) - 1
        correct[order[-1], position] += (logits[:, position].argmax(-1) == position).sum().item()
        total[order[-1], position] += 30
    found = report.position_prediction
    assert found.correct == correct.tolist() and found.total == total.tolist()
    assert found.accuracy == pytest.approx(correct.sum() / total.sum())
    assert evaluate_robustness(vit.classifier(), data, num_orders=2, progress=False).position_prediction is None


def test_data_may_be_a_dataset_items_or_a_dataloader(vit):
    from torch.utils.data import DataLoader
    from transformers import ViTImageProcessor, default_data_collator

    from hf_layershuffle.data.datasets import ImageClassificationDataset, load_image_datasets
    from hf_layershuffle.data.image_reading import draw_rows

    model = lively(vit.classifier(num_labels=10))
    digits = load_image_datasets("digits")["test"]
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    options = {"num_orders": 2, "num_subsets": 1, "progress": False}
    report = evaluate_robustness(model, digits, image_processor=processor, max_samples=40, **options)
    dataset = ImageClassificationDataset(digits.select(draw_rows(len(digits), 40, seed=0)), processor)
    for data in (dataset, [dataset[i] for i in range(40)], DataLoader(dataset, 16, collate_fn=default_data_collator)):
        other = evaluate_robustness(model, data, **options)
        assert other.num_images == 40
        assert other.arbitrary.accuracy == report.arbitrary.accuracy


@of_both_architectures
def test_a_plain_model_is_accepted_and_left_as_it_was(architecture):
    plain, data = architecture.plain_classifier().train(), items()
    before = copy.deepcopy(plain.state_dict())
    report = evaluate_robustness(plain, data, num_orders=2, progress=False)
    assert plain.training and report.config["shuffle_mode"] == "none"
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    with torch.no_grad():
        logits = plain.eval()(torch.stack([item["pixel_values"] for item in data])).logits
    accuracy = (logits.argmax(-1) == torch.tensor([item["labels"] for item in data])).float().mean().item()
    assert report.sequential.accuracy == pytest.approx(accuracy)


def test_dropout_is_off_and_the_mode_restored(vit):
    model = vit.classifier(hidden_dropout_prob=0.5).train()
    scores = score_execution_orders(model, items(), [[0, 1, 2, 3]] * 2, progress=False)
    assert scores[0].loss == pytest.approx(naive_scores(model.eval(), items(), [0, 1, 2, 3])[3], rel=1e-4)
    model.train()
    score_execution_orders(model, items(), [[0]], progress=False)
    assert model.training


def test_a_model_of_one_layer(vit):
    report = evaluate_robustness(vit.classifier(num_hidden_layers=1), items(), num_orders=3, progress=False)
    assert report.leave_one_out == [] and report.neighbour_swaps == []
    assert report.sequential.accuracy == pytest.approx(report.arbitrary.accuracy.mean)
    assert "arbitrary" in str(report)


def test_evenly_spaced_layers():
    assert evenly_spaced_layers(12, 3) == [0, 6, 11]
    assert evenly_spaced_layers(12, 1) == [0]
    for depth in range(1, 30):
        for k in range(1, depth + 1):
            kept = evenly_spaced_layers(depth, k)
            assert len(set(kept)) == k and kept == sorted(kept) and kept[0] == 0
            assert k == 1 or kept[-1] == depth - 1
            assert k == 1 or max(np.diff(kept)) - min(np.diff(kept)) <= 1


def test_random_subsets_run_in_sequential_order():
    plan = plan_orders(6, 3, 8, seed=0)
    for k in range(1, 7):
        subsets = plan[f"random {k}"]
        assert len(subsets) == (8 if k < 6 else 1)
        assert all(layers == sorted(set(layers)) and len(layers) == k for layers in subsets)
    assert len({tuple(layers) for layers in plan["random 3"]}) > 3


def test_sequential_is_sequential_whatever_the_model_is_set_to_run(vit):
    model, data = lively(vit.classifier()), items()
    sizes = {"num_orders": 1, "num_subsets": 1, "progress": False}
    expected = evaluate_robustness(model, data, **sizes)
    model.config.execution_order = [3, 1]
    report = evaluate_robustness(model, data, **sizes)
    assert report.sequential == expected.sequential and report.sequential.execution_order == [0, 1, 2, 3]
    assert report.rows()["sequential"] != naive_scores(model, data, [3, 1])[1]


@pytest.mark.parametrize("stop, num_resumed", [(KeyboardInterrupt, 3), (MemoryError, 4)])
def test_a_stopped_evaluation_goes_on(vit, tmp_path, monkeypatch, stop, num_resumed):
    monkeypatch.setattr(order_tree, "SAVE_EVERY_BATCHES", 2)
    model, data, file = lively(vit.classifier(position_predictor=True)), items(), tmp_path / "sums.npz"
    options = {"num_orders": 3, "num_subsets": 1, "batch_size": 4, "progress": False, "model_name": "m"}
    whole = evaluate_robustness(model, data, **options)

    score_batch, batches = order_tree._score_batch, []

    def stop_at_the_sixth(parts, batch, tree, tallies):
        if len(batches) == 5:
            tallies.correct += 1  # in the midst of counting a batch
            raise stop
        batches.append(1)
        return score_batch(parts, batch, tree, tallies)

    monkeypatch.setattr(order_tree, "_score_batch", stop_at_the_sixth)
    with pytest.raises(stop):
        evaluate_robustness(model, data, **options, progress_file=file)
    assert file.exists()

    resumed = []
    monkeypatch.setattr(order_tree, "_score_batch", lambda *args: resumed.append(1) or score_batch(*args))
    report = evaluate_robustness(model, data, **options, progress_file=file)
    assert len(resumed) == num_resumed  # of eight; a stop keeps five, an error the first four
    assert not file.exists()
    ignored = {"environment": None}
    assert report.to_dict() | ignored == whole.to_dict() | ignored

    # sums of other weights, or without other MLPs, are not gone on with
    changes = (lambda: model.classifier.weight.data.mul_(2), lambda: setattr(model.config, "skipped_mlps", [1]))
    for change in changes:
        batches.clear()
        monkeypatch.setattr(order_tree, "_score_batch", stop_at_the_sixth)
        with pytest.raises(stop):
            evaluate_robustness(model, data, **options, progress_file=file)
        change()
        resumed.clear()
        monkeypatch.setattr(order_tree, "_score_batch", lambda *args: resumed.append(1) or score_batch(*args))
        evaluate_robustness(model, data, **options, progress_file=file)
        assert len(resumed) == 8


def test_a_report_is_of_the_mlps_that_ran_and_of_the_familys_settings(vit):
    model, data = lively(vit.classifier()), items(8)
    settings = {"num_orders": 1, "num_subsets": 1, "seed": 0}

    def why_not(report):
        return other_than(report, expected_report(model, as_dataloader(data), None, **settings))

    report = evaluate_robustness(model, data, **settings, progress=False)
    recorded = report.config.items()
    earlier = replace(report, config={k: v for k, v in recorded if k not in (*FAMILY_SETTINGS, "skipped_mlps")})
    assert why_not(report) is why_not(earlier) is None
    model.config.skipped_mlps = []
    assert why_not(report) is None
    model.config.skipped_mlps = [2, 1]
    assert why_not(report) == why_not(earlier) == "`skipped_mlps` is None there and [1, 2] here"
    without = evaluate_robustness(model, data, **settings, progress=False)
    assert without.sequential.loss != report.sequential.loss and why_not(without) is None
    assert "Without the MLPs at the positions 1, 2" in render(without.table())
    model.config.skipped_mlps, model.config.num_attention_heads = None, 1
    assert why_not(report) == "`num_attention_heads` is 2 there and 1 here"


def test_the_digest_of_texts_is_of_the_rows_that_are_read():
    texts = as_dataloader(labelled_texts(12), tokenizer_of(), batch_size=4)
    part, same, whole = (
        data_digest(torch.utils.data.DataLoader(texts.dataset, 4, sampler=rows, collate_fn=texts.collate_fn))
        for rows in (range(6), [5, 4, 3, 2, 1, 0], range(12))
    )
    assert part == same != whole == data_digest(texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_orders": 0}, "`num_orders` is 0; it must be an integer of at least 1"),
        ({"num_orders": 2.0}, "`num_orders` is 2.0"),
        ({"num_subsets": 0}, "`num_subsets` is 0"),
        ({"seed": -1}, "`seed` is -1; it must be an integer of at least 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"max_samples": 0}, "`max_samples` is 0"),
    ],
)
def test_bad_settings_are_refused(vit, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(vit.classifier(), items(), progress=False, **options)


def test_bad_data_and_orders_are_refused(vit):
    model = vit.classifier()
    with pytest.raises(ValueError, match="The evaluation set is empty"):
        evaluate_robustness(model, [], progress=False)
    with pytest.raises(ValueError, match="holds the label 5, but the model has 5 classes"):
        evaluate_robustness(model, items(num_labels=7), progress=False)
    with pytest.raises(ValueError, match="holds 4 at position 1"):
        score_execution_orders(model, items(), [[0, 4]], progress=False)
    with pytest.raises(ValueError, match="`execution_order` is empty"):
        score_execution_orders(model, items(), [[]], progress=False)


def test_what_is_no_data_or_no_model_is_refused_up_front(vit, tmp_path):
    from transformers import ViTImageProcessor

    from hf_layershuffle.data.datasets import load_image_datasets

    model, digits = vit.classifier(num_labels=10), load_image_datasets("digits")["test"].select(range(8))
    for data, message in (
        (DatasetDict({"train": digits, "test": digits}), "DatasetDict of the splits train, test; pass one of them"),
        (["a.png", "b.png"], "`data` holds items of type str"),
        ([{"image": 1}], "`data` holds items of type dict, or without these keys"),
        (tmp_path, "load it by `load_image_datasets`"),
        ("digits", "`data` is the name 'digits'"),
        (iter(()), "pass a `datasets.Dataset` with the columns `image` and `label`"),
    ):
        with pytest.raises(TypeError, match=message):
            evaluate_robustness(model, data, progress=False)
    with pytest.raises(ValueError, match="`data` has the columns image, target"):
        evaluate_robustness(model, digits.rename_column("label", "target"), progress=False)
    for no_model, message in (
        (torch.nn.Linear(2, 2), "is a Linear, which lacks num_layers"),
        ("a/b", r"is 'a/b' \(str\)"),
    ):
        with pytest.raises(TypeError, match=message):
            evaluate_robustness(no_model, digits, progress=False)

    names = {index: f"digit {index}" for index in range(10)}
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    named = digits.cast_column("label", ClassLabel(names=[*map("digit {}".format, range(10))]))
    options = {"image_processor": processor, "num_orders": 1, "num_subsets": 1, "progress": False}
    report = evaluate_robustness(vit.classifier(num_labels=10, id2label=names), named, **options)
    # The same classes under the same names, numbered otherwise
    other = digits.remove_columns("label").add_column("label", [9 - label for label in digits["label"]])
    other = other.cast_column("label", ClassLabel(names=[f"digit {9 - index}" for index in range(10)]))
    again = evaluate_robustness(vit.classifier(num_labels=10, id2label=names), other, **options)
    assert again.sequential == report.sequential
    animals = digits.cast_column("label", ClassLabel(names=[*"abcdefghij"]))
    with pytest.raises(
        ValueError, match=r"has the classes '[a-j]', .* which the model does not know; it knows 10: 'digit 0'"
    ):
        evaluate_robustness(vit.classifier(num_labels=10, id2label=names), animals, **options)


# --- Reports ---


@pytest.fixture(scope="module")
def report():
    from conftest import Architecture

    model = lively(Architecture("vit").classifier(position_predictor=True, num_labels=7))
    return evaluate_robustness(
        model, items(num_labels=7), num_orders=4, progress=False, model_name="tiny", dataset_name="noise"
    )


def test_a_report_survives_saving(report, tmp_path):
    path = report.save(tmp_path / "new" / "folder")
    assert [each.name for each in path.parent.iterdir()] == ["robustness.json"]
    for source in (path, path.parent):
        loaded = RobustnessReport.load(source)
        assert loaded.to_dict() == report.to_dict()
        assert loaded.arbitrary == report.arbitrary and loaded.pruning == report.pruning
    assert report.environment["dtype"] == "float32" and "torch" in report.environment["versions"]


def test_what_is_no_report_is_refused(tmp_path):
    with pytest.raises(OSError, match=r"robustness\.json"):
        RobustnessReport.load(tmp_path)
    for text in ("{", "[]", '{"model": "x"}'):
        (tmp_path / "robustness.json").write_text(text)
        with pytest.raises(ValueError, match="is not a robustness report"):
            RobustnessReport.load(tmp_path)


def test_the_table_shows_the_numbers(report):
    text = str(report)
    assert "tiny on noise (30 images, 4 layers)" in text
    row = next(line for line in text.splitlines() if line.startswith("│ arbitrary"))
    shown = [float(cell) for cell in row.replace("–", "│").split("│")[2:-1]]
    numbers = report.arbitrary.accuracy
    expected = (numbers.mean, numbers.std, numbers.min, numbers.max, numbers.ci_low, numbers.ci_high)
    assert shown == pytest.approx([*expected, report.arbitrary.loss.mean], abs=5e-5)
    assert "3 of 4 layers, evenly spaced" in text and "layers know their position" in text


def test_reports_to_compare_have_names(report):
    with pytest.raises(ValueError, match="`reports` is a list; pass a dictionary of reports"):
        compare_reports([report])


def test_models_are_compared_in_one_table(report):
    text = render(compare_reports({"first": report, "second": report}))
    row = next(line for line in text.splitlines() if line.startswith("│ sequential"))
    assert row.split("│")[2].strip() == row.split("│")[3].strip() == f"{report.sequential.accuracy:.4f}"
    other = RobustnessReport.from_dict(report.to_dict() | {"dataset": "other"})
    with pytest.raises(ValueError, match=r"one and the same dataset; they are of: noise \(30 images\), other"):
        compare_reports({"first": report, "second": other})
    with pytest.raises(ValueError, match="they are of: none"):
        compare_reports({})


def test_summaries_are_those_of_numpy_and_scipy():
    values = np.random.default_rng(0).random(20)
    summary = summarize(values, seed=4)
    assert (summary.mean, summary.std) == pytest.approx((values.mean(), values.std()))
    assert (summary.min, summary.max) == (values.min(), values.max())
    interval = stats.bootstrap((values,), np.mean, rng=np.random.default_rng(4)).confidence_interval
    assert (summary.ci_low, summary.ci_high) == (interval.low, interval.high)
    assert summary.ci_low < summary.mean < summary.ci_high
    constant = summarize([0.5, 0.5])
    assert (constant.ci_low, constant.ci_high, constant.std) == (0.5, 0.5, 0.0)
    assert summarize([0.25]).ci_high == 0.25


def test_groups_without_top5(report):
    scores = [OrderScore([0], 0.5, 1.0), OrderScore([1], 1.0, 0.0)]
    assert OrderGroup.of(scores).top5_accuracy is None
    assert report.arbitrary.top5_accuracy.mean >= report.arbitrary.accuracy.mean


def test_position_prediction_of_counts():
    found = PositionPrediction.of([[1, 0], [0, 0]], [[2, 0], [0, 0]])
    assert found.accuracy == 0.5 and found.by_layer[0] == 0.5 and np.isnan(found.by_layer[1])


# --- Metrics ---


def test_order_accuracy_is_an_offline_evaluate_metric():
    predictions = [[0, 0, 1], [1, 1, 1], [2, 0, 1]]
    result = ls.OrderAccuracy(keep_in_memory=True).compute(predictions=predictions, references=[0, 1, 2])
    accuracies = [1.0, 2 / 3, 1 / 3]
    assert result["arbitrary_accuracy"] == pytest.approx(np.mean(accuracies))
    assert result["arbitrary_accuracy_std"] == pytest.approx(np.std(accuracies))
    assert result["arbitrary_accuracy_min"] == pytest.approx(1 / 3)
    assert result["arbitrary_accuracy_max"] == 1.0
    assert result["order_agreement"] == pytest.approx((1 / 3 + 1 + 0) / 3)  # pairs of equal predictions, of three
    assert ls.OrderAccuracy(keep_in_memory=True).compute(predictions=[[3]], references=[3])["order_agreement"] == 1.0


def test_metrics_can_be_combined():
    combined = evaluate.combine({"first": ls.Accuracy(), "second": ls.Accuracy()})
    assert set(combined.compute(predictions=[0, 1], references=[0, 0])) == {"first_accuracy", "second_accuracy"}
    orders = evaluate.combine([ls.OrderAccuracy()])
    assert orders.compute(predictions=[[0, 1]], references=[0])["arbitrary_accuracy"] == 0.5
