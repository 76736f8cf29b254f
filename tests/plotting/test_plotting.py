"""Pictures: what is drawn is what was measured, the files are complete and repeatable, nothing else is touched."""

import base64
import dataclasses
import io
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor

import matplotlib as mpl
import numpy as np
import pytest
import torch
from conftest import Architecture
from matplotlib.figure import Figure
from PIL import Image
from support.analysis import make_items, randomize

import hf_layershuffle as ls
from hf_layershuffle import plotting
from hf_layershuffle.adaptive.budget_report import BudgetPoint, BudgetReport, with_fronts
from hf_layershuffle.analysis import analyze
from hf_layershuffle.evaluation.report import RobustnessReport
from hf_layershuffle.evaluation.statistics import OrderGroup, OrderScore
from hf_layershuffle.merging.random_merges import MergeScore, RandomMergeReport
from hf_layershuffle.plotting.merges import plot_random_merges
from hf_layershuffle.plotting.style import COLUMN_WIDTH, PAGE_WIDTH, series_style


def make_report(num_layers: int = 4, num_classes: int = 5, seed: int = 0) -> RobustnessReport:
    """Numbers as an evaluation gives them, without a model."""
    rng = np.random.default_rng(seed)

    def score(order) -> OrderScore:
        return OrderScore(list(order), float(rng.uniform(0.3, 0.9)), 1.0)

    def group(k: int, number: int) -> OrderGroup:
        return OrderGroup.of([score(range(k)) for _ in range(number)])

    sequential = range(num_layers)
    sizes = range(1, num_layers + 1)
    return RobustnessReport(
        model="m",
        dataset="d",
        num_images=50,
        num_classes=num_classes,
        num_layers=num_layers,
        num_orders=6,
        num_subsets=3,
        seed=seed,
        sequential=score(sequential),
        reversed=score(sequential[::-1]),
        arbitrary=group(num_layers, 6),
        pruning={
            "arbitrary": [group(k, 6) for k in sizes],
            "random": [group(k, 3) for k in sizes],
            "evenly_spaced": [group(k, 1) for k in sizes],
        },
        leave_one_out=[score(sequential) for _ in sequential if num_layers > 1],
        neighbour_swaps=[score(sequential) for _ in sequential[1:]],
    )


REPORTS = {"LayerShuffle": make_report(seed=1), "org/a-model-with-a-very-long-name-indeed": make_report(6, 3, seed=2)}


@pytest.fixture(scope="module")
def analysis():
    model = randomize(Architecture("vit").classifier(depth_embedding=True, shuffle_mode="arbitrary"))
    return analyze(model, make_items(25), num_orders=4, model_name="tiny", dataset_name="noise", progress=False)


def draw_all(analysis) -> dict[str, Figure]:
    return {
        "distribution": plotting.plot_accuracy_distribution({"a": [0.5, 0.75], "b": [0.9]}, title="Merges"),
        "orders": plotting.plot_order_distribution(REPORTS),
        "pruning": plotting.plot_pruning_curves(REPORTS),
        "ablation": plotting.plot_layer_ablation(REPORTS),
        "maps": plotting.plot_layer_position_maps(analysis),
        "updates": plotting.plot_updates_by_position(analysis),
        "probe": plotting.plot_position_probe({"a": analysis, "b": analysis}),
        "similarity": plotting.plot_output_similarity(analysis),
        "embedding": plotting.plot_embedding(analysis),
        "attention": plotting.plot_attention_maps(analysis.attention),
        "budget": plotting.plot_budget(make_budget()),
    }


def make_budget(num_policies: int = 12, with_time: bool = True) -> BudgetReport:
    """A budget of many policies, each with three settings; later ones are dearer and better."""
    rng = np.random.default_rng(0)

    def point(policy: str, label: str, accuracy: float, cost: float) -> BudgetPoint:
        times = {"1": cost, "64": cost * 0.9} if with_time else {}
        return BudgetPoint(policy, label, accuracy, (0.0, 1.0), 0.0, (0.0, 0.0), 3.0, 1e6 * cost, times, times)

    points = [
        point(f"policy-{number}", f"{k} layers", float(0.9 - 0.1 / k - rng.uniform(0, 0.1)), k / 4)
        for number in range(num_policies)
        for k in (1, 2, 3)
    ]
    whole = point("all layers", "in its own order", 0.9, 1.0)
    costs = ["multiply_adds", *(["time_at_batch_1", "time_at_batch_64"] if with_time else [])]
    whole, *points = with_fronts([whole, *points], costs)
    return BudgetReport("m", "d", 50, 20, 5, 4, 0, whole, points)


@pytest.mark.parametrize("with_time", [True, False])
def test_a_budget_is_drawn_as_measured(with_time):
    report = make_budget(with_time=with_time)
    figure = plotting.plot_budget(report)
    assert len(figure.axes) == (3 if with_time else 1)
    for axes, cost in zip(figure.axes, report.costs):
        scale = 1e-6 if cost == "multiply_adds" else 1.0
        for name, points in report.by_policy().items():
            costs, accuracies = line_of(axes, name)
            np.testing.assert_allclose(costs, [scale * point.cost(cost) for point in points])
            np.testing.assert_allclose(accuracies, [point.accuracy for point in points])
        np.testing.assert_allclose(line_of(axes, "Pareto front")[1], [each.accuracy for each in report.front(cost)])
        assert line_of(axes, "all layers")[1].tolist() == [0.9]
    looks = {(line.get_marker(), line.get_linestyle(), line.get_color()) for line in figure.axes[0].lines}
    assert len(looks) == 14  # each line looks different
    assert len(figure.legends[0].get_texts()) == 14


def test_controls_are_grey_and_other_models_stand_alone():
    report = make_budget(3)
    names = {"policy-0": "random-mlps", "policy-1": "other models", "policy-2": "skipped-mlps"}
    points = [dataclasses.replace(point, policy=names[point.policy]) for point in report.points]
    axes = plotting.plot_budget(dataclasses.replace(report, points=points)).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["random-mlps"].get_color() == "0.55" != lines["skipped-mlps"].get_color()
    assert lines["other models"].get_linestyle() == "None" != lines["skipped-mlps"].get_linestyle()


def line_of(axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    line = next(line for line in axes.lines if line.get_label() == label)
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def test_every_picture_fits_a_page_and_names_its_axes(analysis):
    for name, figure in draw_all(analysis).items():
        assert figure.get_figwidth() in (COLUMN_WIDTH, PAGE_WIDTH) and figure.get_figheight() < 9, name
        figure.draw_without_rendering()  # as saving it does
        drawn = figure.get_tightbbox()  # in inches
        width, height = figure.get_size_inches()
        assert drawn.x0 > -0.01 and drawn.y0 > -0.01 and drawn.x1 < width + 0.01 and drawn.y1 < height + 0.01, name
        if name != "attention":
            assert all(axes.get_xlabel() for axes in figure.axes if axes.get_label() != "<colorbar>"), name


def test_orders_are_drawn_as_measured():
    axes = plotting.plot_order_distribution(REPORTS).axes[0]
    reports = list(REPORTS.values())
    for report in reports:
        measured = sorted(score.accuracy for score in report.arbitrary.scores)
        assert any(sorted(line.get_xdata()) == measured for line in axes.lines)
    np.testing.assert_allclose(line_of(axes, "mean")[0], [report.arbitrary.accuracy.mean for report in reports])
    np.testing.assert_allclose(line_of(axes, "sequential order")[0], [each.sequential.accuracy for each in reports])
    chance = [
        line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2 and len(set(line.get_xdata())) == 1
    ]
    assert 1 / 3 in chance and 1 / 5 not in chance
    (legend,) = axes.figure.legends
    assert {"chance (1/3)", "chance (1/5): left of the scale"} <= {text.get_text() for text in legend.get_texts()}
    assert axes.get_xlabel() == "accuracy (fraction of images)"
    labels = [label.get_text().replace("\n", "") for label in axes.get_yticklabels()]
    assert labels == [name.replace("\n", "") for name in REPORTS]


@pytest.mark.parametrize("num_models", [1, 2, 3, 4, 6])
def test_a_legend_lies_within_its_figure(num_models):
    figure = plotting.plot_pruning_curves({f"{i}: order-free, from scratch": make_report() for i in range(num_models)})
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert 0 <= legend.x0 and legend.x1 <= figure.bbox.width
    assert len(figure.legends) == 1


def test_pruning_curves_are_drawn_as_measured():
    figure = plotting.plot_pruning_curves(REPORTS)
    panels = figure.axes
    legend = [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()]
    assert "band: ± one standard deviation over orders" in legend
    for axes, method in zip(panels, ("arbitrary", "random", "evenly_spaced")):
        for name, report in REPORTS.items():
            kept, accuracy = line_of(axes, name)
            assert kept.tolist() == list(range(1, report.num_layers + 1))
            np.testing.assert_allclose(accuracy, [group.accuracy.mean for group in report.pruning[method]])
        band = axes.collections[0].get_paths()[0].vertices
        summary = next(iter(REPORTS.values())).pruning[method][0].accuracy
        at_one = band[band[:, 0] == 1][:, 1]
        low, high = max(0, summary.mean - summary.std), min(1, summary.mean + summary.std)
        np.testing.assert_allclose([at_one.min(), at_one.max()], [low, high])


def wide_report() -> RobustnessReport:
    """Half of the orders right about everything, half about nothing: one standard deviation reaches over both ends."""
    values = make_report().to_dict()
    for method, groups in values["pruning"].items():
        for group in groups:
            for index, score in enumerate(group["scores"]):
                score["accuracy"] = (index % 3 == 0) * 1.0 if method == "arbitrary" else (index % 3 != 0) * 1.0
    report = RobustnessReport.from_dict(values)
    pruning = {name: [OrderGroup.of(group.scores) for group in groups] for name, groups in report.pruning.items()}
    return dataclasses.replace(report, pruning=pruning)


def test_bands_and_bars_stay_within_what_there_can_be(analysis):
    for axes in plotting.plot_pruning_curves({"m": wide_report()}).axes[:2]:
        band = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert band.min() >= 0 and band.max() <= 1 and band.max() - band.min() > 0.5
    wide = dataclasses.replace(analysis.probe, accuracy=np.full(4, 0.9), std=np.full(4, 0.3))
    (bars,) = plotting.plot_position_probe({"m": dataclasses.replace(analysis, probe=wide)}).axes[0].containers
    segments = bars.lines[2][0].get_segments()
    assert all(segment[:, 1].tolist() == pytest.approx([0.6, 1.0]) for segment in segments)
    for quantity in ("update_norm", "update_size"):
        analysis.contributions.mean[quantity][0] *= 50  # one layer far above the others, until the test ends
    try:
        for axes in plotting.plot_updates_by_position(analysis).axes:
            assert all(band.get_paths()[0].vertices[:, 1].min() >= 0 for band in axes.collections if band.get_paths())
    finally:
        for quantity in ("update_norm", "update_size"):
            analysis.contributions.mean[quantity][0] /= 50


def test_titles_name_model_and_dataset(analysis):
    one = {"org/vit": make_report()}
    for draw in (plotting.plot_order_distribution, plotting.plot_pruning_curves, plotting.plot_layer_ablation):
        assert title_of(draw(one)).endswith(": org/vit on d (50 images)")
        assert title_of(draw(REPORTS)).endswith(": 2 models on d (50 images)")
    for name, figure in analysis.plot().items():
        assert title_of(figure).endswith(": tiny on noise (25 images)"), name


def title_of(figure: Figure) -> str:
    return figure.get_suptitle().replace("\n", " ")


def test_pictures_of_a_model_of_texts_say_texts():
    report = dataclasses.replace(make_report(), config={"inputs": "texts"})
    budget = dataclasses.replace(make_budget(), config={"inputs": "texts"})
    merges = RandomMergeReport("pool", "d", 50, 4, 0, False, "a", {"a": {}}, {"a": OrderScore([0], 0.5, 1.0)},
                               [MergeScore(0, [["a", 0]], 0.25, 1.0)], inputs="texts")  # fmt: skip
    for each, num_labels in ((report, 3), (budget, 1), (merges, 0)):
        said = [words_of(figure) for figure in each.plot().values()]
        assert all("(50 texts)" in words for words in said) and "images" not in " ".join(said)
        assert sum("accuracy (fraction of texts)" in words for words in said) == num_labels
    both = plotting.plot_order_distribution({"a": make_report(), "b": report})
    assert both.axes[0].get_xlabel() == "accuracy (fraction of images and texts)"


def words_of(figure: Figure) -> str:
    axes = [word for each in figure.axes for word in (each.get_title("left"), each.get_xlabel(), each.get_ylabel())]
    return " ".join([title_of(figure), *axes])


def test_random_merges_of_reports_of_one_name_have_rows_of_their_own():
    reports = [
        RandomMergeReport("pool", "d", 50, 4, 0, False, "a", {"a": {}}, {"a": OrderScore([0], accuracy, 1.0)},
                          [MergeScore(0, [["a", 0]], accuracy / 2, 1.0)])
        for accuracy in (0.5, 0.75)
    ]  # fmt: skip
    axes = plot_random_merges(reports)["random_merges"].axes[0]
    rows = ["pool: sources", "pool: random merges", "pool: sources (2)", "pool: random merges (2)"]
    assert [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()] == rows
    assert line_of(axes, "mean")[0].tolist() == [0.5, 0.25, 0.75, 0.375]


def test_the_legend_names_every_line(analysis):
    one = {"m": make_report()}
    expected = {
        plotting.plot_order_distribution(one): ["median, quartiles, extremes", "one arbitrary order", "mean",
                                                "sequential order", "chance (1/5): left of the scale"],
        plotting.plot_pruning_curves(one): ["m", "band: ± one standard deviation over orders", "chance (1/5)"],
        plotting.plot_layer_ablation(one): ["m", "thin line: all layers, in sequential order"],
        plotting.plot_updates_by_position(analysis): [
            "whole layer", "attention", "MLP", "depth projection",
            "in sequential order", "band: ± one standard deviation over layers",
        ],
        plotting.plot_position_probe({"m": analysis}): [
            "chance (0.25)", "bars: ± one standard deviation over folds", "m",
        ],
    }  # fmt: skip
    for figure, labels in expected.items():
        (legend,) = figure.legends
        assert sorted(text.get_text().replace("\n", " ") for text in legend.get_texts()) == sorted(labels)


def test_one_good_model_fills_its_picture():
    """Its orders lie far from chance, and close together."""
    report = make_report()
    scores = [OrderScore([0, 1, 2, 3], 0.97 + 0.001 * index, 1.0) for index in range(6)]
    report = dataclasses.replace(report, arbitrary=OrderGroup.of(scores), sequential=scores[-1])
    axes = plotting.plot_order_distribution({"m": report}).axes[0]
    low, high = axes.get_xlim()
    assert (0.975 - 0.97) / (high - low) > 0.7


@pytest.mark.parametrize("kind", ["robustness", "analysis", "random merges"])
def test_a_notebook_shows_a_table_and_pictures(analysis, tmp_path, kind, request):
    merges = RandomMergeReport("pool", "d", 50, 4, 0, False, "a", {"a": {}}, {"a": OrderScore([0], 0.5, 1.0)},
                               [MergeScore(0, [["a", 0]], 0.25, 1.0)])  # fmt: skip
    report = {"robustness": make_report(), "analysis": analysis, "random merges": merges}[kind]
    html = report._repr_html_()
    tree = ElementTree.fromstring(f"<div>{html}</div>")  # well formed
    rows = [[cell.text or "" for cell in row] for row in tree.iter("tr")]
    assert rows[0] == [str(column.header).replace("\n", " ") for column in report.table().columns]
    assert rows[1] == [str(next(iter(column.cells))) for column in report.table().columns]
    pictures = report.plot()
    sources = [image.get("src") for image in tree.iter("img")]
    assert [image.get("alt") for image in tree.iter("img")] == list(pictures)
    for source in sources:
        kind_of_data, data = source.split(",")
        assert kind_of_data == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.width > 300
    assert len(repr(report)) < 300 and report.dataset in repr(report) and "0x" not in repr(report)
    assert len(repr(pictures)) < 200
    request.getfixturevalue("quick_pictures")  # they were drawn above
    pictures.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{suffix}" for name in pictures for suffix in ("png", "svg")
    }


def test_a_name_with_signs_is_shown_as_it_is():
    report = dataclasses.replace(make_report(), model="<b>a & b</b>")
    caption = ElementTree.fromstring(f"<div>{report._repr_html_()}</div>").find("table/caption").text
    assert caption.startswith("<b>a & b</b> on d")


def test_series_are_told_apart_without_colour():
    axes = plotting.plot_pruning_curves({str(i): make_report(seed=i) for i in range(5)}).axes[0]
    lines = [line_ for line_ in axes.lines if line_.get_label() in "01234"]
    assert len({line.get_marker() for line in lines}) == 5
    assert len({str(series_style(i, 5)["linestyle"]) for i in range(5)}) == 5
    luminance = [np.dot(mpl.colors.to_rgb(line.get_color()), (0.2126, 0.7152, 0.0722)) for line in lines]
    assert (np.diff(luminance) > 0.05).all() and luminance[-1] < 0.75


def test_ablation_is_drawn_as_measured():
    left_out, swapped = plotting.plot_layer_ablation(REPORTS).axes
    report = REPORTS["LayerShuffle"]
    layers, accuracy = line_of(left_out, "LayerShuffle")
    assert layers.tolist() == [0, 1, 2, 3] and accuracy.tolist() == [each.accuracy for each in report.leave_one_out]
    between, accuracy = line_of(swapped, "LayerShuffle")
    assert between.tolist() == [0.5, 1.5, 2.5] and accuracy.tolist() == [
        each.accuracy for each in report.neighbour_swaps
    ]


def test_analysis_is_drawn_as_measured(analysis):
    maps = [axes for axes in plotting.plot_layer_position_maps(analysis).axes if axes.images]
    found = analysis.contributions.mean
    for axes, name in zip(maps, ("update_norm", "update_size", "cosine", "logit_change")):
        np.testing.assert_allclose(axes.images[0].get_array(), found[name])
        marked = {(int(line.get_ydata()[0]), int(line.get_xdata()[0])) for line in axes.lines}
        assert marked == set(map(tuple, np.argwhere(found[name] < 0)))
    relative = plotting.plot_updates_by_position(analysis).axes[0]
    np.testing.assert_allclose(line_of(relative, "MLP")[1], analysis.contributions.by_position("mlp_norm"))
    by_layer, by_position = plotting.plot_output_similarity(analysis).axes[:2]
    matrix = analysis.similarity.matrix
    np.testing.assert_allclose(by_layer.images[0].get_array(), matrix)
    # (layer 1, position 2) and (layer 3, position 0), with four layers
    assert by_position.images[0].get_array()[2 * 4 + 1, 0 * 4 + 3] == matrix[1 * 4 + 2, 3 * 4 + 0]
    by_layer, by_position = plotting.plot_embedding(analysis).axes[:2]
    drawn = {
        tuple(row)
        for row in np.column_stack(
            [
                by_layer.collections[0].get_offsets(),
                by_layer.collections[0].get_array(),
                by_position.collections[0].get_array(),
            ]
        )
    }
    embedding = analysis.embedding
    assert drawn == {tuple(row) for row in np.column_stack([embedding.points, embedding.layer, embedding.position])}


def test_attention_is_drawn_over_the_image(analysis):
    attention = analysis.attention
    panels = [axes for axes in plotting.plot_attention_maps(attention, list("abcde")).axes if axes.images]
    assert len(panels) == 3 * 5  # the image and four orders
    np.testing.assert_allclose(panels[5].images[0].get_array(), attention.images[1])
    labels = [axes.get_xlabel() for axes in panels]
    assert labels[5] == "class b"
    predicted, wrong = "abcde"[attention.predicted[1, 0]], attention.predicted[1, 0] != 1
    assert labels[6] == f"predicted {predicted}" + (" (wrong)" if wrong else "")
    assert [axes.get_title(loc="left") for axes in panels[:3]] == ["image", "sequential order", "reversed order"]
    loaded = type(analysis).from_dict(analysis.to_dict())
    panels = [axes for axes in plotting.plot_attention_maps(loaded.attention).axes if axes.images]
    assert len(panels) == 3 * 4 and panels[0].images[0].get_array().shape == (2, 2, 3)
    # More attention, more yellow than blue
    yellow = panels[0].images[0].get_array()[..., 0] - panels[0].images[0].get_array()[..., 2]
    assert (np.argsort(yellow.ravel()) == np.argsort(loaded.attention.maps[0, 0].ravel())).all()


def test_files_are_complete_and_repeatable(analysis, tmp_path):
    for name, figure in draw_all(analysis).items():
        png, svg = plotting.save_figure(figure, tmp_path / "first" / f"{name}-0.2")
        assert (png.name, svg.name) == (f"{name}-0.2.png", f"{name}-0.2.svg")
        with Image.open(png) as image:
            image.load()
            assert image.width == round(figure.get_figwidth() * 200) and np.ptp(np.asarray(image.convert("L"))) > 100
        assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    for name, figure in draw_all(analysis).items():
        if name not in ("orders", "updates", "embedding"):
            continue  # these have what could differ: jitter, clipping, a random order of points
        for path in plotting.save_figure(figure, tmp_path / "second" / f"{name}-0.2"):
            assert path.read_bytes() == (tmp_path / "first" / path.name).read_bytes(), path.name
    assert len(list((tmp_path / "first").iterdir())) == 2 * 11


def test_a_long_title_is_not_cut_off():
    title = "Accuracy in arbitrary order on a dataset of a long name" + ", with further arguments of training" * 3
    figure = plotting.plot_accuracy_distribution({"a": [0.5]}, title=title)
    assert title_of(figure) == title
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_nothing_is_left_of_a_picture_that_could_not_be_written(tmp_path, monkeypatch):
    figure = plotting.plot_accuracy_distribution({"a": [0.5]})
    monkeypatch.setattr(mpl.backends.backend_svg.FigureCanvasSVG, "print_svg", broken_print)
    with pytest.raises(OSError, match="disk is full"):
        plotting.save_figure(figure, tmp_path / "picture")
    assert list(tmp_path.iterdir()) == []


def broken_print(self, *args, **kwargs):
    raise OSError("disk is full")


def test_settings_of_others_are_left_alone_and_do_not_matter(analysis, tmp_path):
    plain = plotting.save_figure(plotting.plot_pruning_curves(REPORTS), tmp_path / "plain")
    with mpl.rc_context({"lines.linewidth": 9, "axes.facecolor": "red", "svg.hashsalt": "other", "font.size": 20}):
        before = dict(mpl.rcParams)
        other = plotting.save_figure(plotting.plot_pruning_curves(REPORTS), tmp_path / "other")
        assert dict(mpl.rcParams) == before
    assert [path.read_bytes() for path in plain] == [path.read_bytes() for path in other]


def test_pictures_are_drawn_in_threads(tmp_path):
    with ThreadPoolExecutor(4) as threads:
        names = [tmp_path / str(i) for i in range(8)]
        saved = threads.map(lambda name: plotting.save_figure(plotting.plot_order_distribution(REPORTS), name), names)
        assert len({png.read_bytes() for png, _ in saved}) == 1


def test_extremes_are_drawn(tmp_path):
    for reports in (
        {"one layer": make_report(1)},
        {"a $name$ with_signs & <tags> ^": make_report()},
        {f"model {i}": make_report(seed=i) for i in range(12)},
    ):
        for draw in (plotting.plot_order_distribution, plotting.plot_pruning_curves, plotting.plot_layer_ablation):
            paths = plotting.save_figure(draw(reports), tmp_path / "picture")
            assert all(path.stat().st_size > 1000 for path in paths)


def test_bad_input_is_refused():
    for draw in (plotting.plot_order_distribution, plotting.plot_pruning_curves, plotting.plot_position_probe):
        with pytest.raises(ValueError, match="`reports` is empty; pass at least one model"):
            draw({})
    for values in ([], [0.5, float("nan")], [[0.5]]):
        with pytest.raises(ValueError, match=r"The accuracies of 'a' are .*; pass a non-empty list of finite numbers"):
            plotting.plot_accuracy_distribution({"a": values})


def test_deep_models_are_drawn(tmp_path):
    torch.manual_seed(0)
    model = randomize(
        ls.LayerShuffleViTForImageClassification(
            ls.LayerShuffleViTConfig(
                hidden_size=8,
                num_hidden_layers=13,
                num_attention_heads=1,
                intermediate_size=8,
                image_size=8,
                patch_size=4,
            )
        )
    )
    report = analyze(model, make_items(20, num_labels=2), num_orders=1, progress=False)
    for draw in (plotting.plot_layer_position_maps, plotting.plot_output_similarity, plotting.plot_embedding):
        assert len(draw(report).axes[0].get_xticks()) <= 12
