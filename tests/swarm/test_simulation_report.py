"""Policies against failure rates: what is compared, what is refused, and runs that go on where they stopped."""

import json
from dataclasses import replace

import pytest
from matplotlib.image import imread

from hf_layershuffle.swarm.compared_policies import Comparison, SkipPipe
from hf_layershuffle.swarm.expected_accuracy import ExpectedAccuracy, digits_reports
from hf_layershuffle.swarm.policy import Policy
from hf_layershuffle.swarm.simulated_nodes import SimulationSettings
from hf_layershuffle.swarm.simulation_picture import plot_simulation
from hf_layershuffle.swarm.simulation_report import PROGRESS_FILE, SimulationReport, compare_policies, models_of


SMALL = SimulationSettings(num_layers=6, nodes=6, num_requests=120)
RATES = (0.0, 0.2)
NAMES = [
    "strict",
    "strict_2_copies",
    "strict_2_skips",
    "free",
    "free_1_skips",
    "free_2_skips",
    "free_2_copies",
    "skip_pipe",
]


@pytest.fixture(scope="module")
def report():
    return compare_policies(SMALL, RATES, reports=digits_reports())


def test_each_policy_is_simulated_at_each_rate(report):
    assert list(report.labels) == NAMES
    assert {(point.policy, point.failure_rate) for point in report.points} == {(n, r) for n in NAMES for r in RATES}
    healthy, failing = report.curve("free_1_skips")
    assert (healthy.failure_rate, failing.failure_rate) == RATES
    assert healthy.fraction_answered == 1 > failing.fraction_answered or failing.mean_layers < 6
    assert 0 < healthy.latency["50"] < healthy.latency["95"] <= healthy.latency["99"]
    assert report.curve("skip_pipe")[0].mean_layers == 5 < report.curve("free")[0].mean_layers == 6
    alone = {policy.name: policy for policy in Comparison().policies(6, 6)}["free"]
    assert report.curve("free")[1].throughput == alone.run(replace(SMALL, failure_rate=0.2)).throughput


def test_accuracies_are_those_of_the_orders_that_ran(report):
    free, plain = digits_reports()
    in_sequence = {"free": free.sequential.accuracy, "plain": plain.sequential.accuracy}
    assert report.curve("strict")[0].accuracy == pytest.approx(in_sequence)
    policy = {policy.name: policy for policy in Comparison().policies(6, 6)}["free_2_skips"]
    orders = policy.run(replace(SMALL, failure_rate=0.2)).orders
    point = report.curve("free_2_skips")[1]
    assert point.accuracy["free"] == pytest.approx(ExpectedAccuracy(free).mean(orders))
    # What the same orders would do to a plain model
    assert point.accuracy["plain"] < 0.5 < 0.9 < point.accuracy["free"]
    assert point.accuracy_of_requests("free") == pytest.approx(point.accuracy["free"] * point.fraction_answered)
    assert report.kind_of("strict_2_skips") == "plain" and report.kind_of("free") == "free"
    assert 0 < point.interpolated["free"] == point.interpolated["plain"] < 0.3  # orders that are nearly in sequence
    assert 0 <= report.curve("skip_pipe")[0].interpolated["free"] <= 1


def test_a_plain_models_report_says_nothing_of_free_order():
    settings = replace(SMALL, num_requests=30)
    alone = compare_policies(settings, (0.0,), reports=digits_reports()[1:])
    assert alone.kind_of("strict") == "plain" and alone.kind_of("free") is None
    none = compare_policies(settings, (0.0,))
    assert none.kind_of("strict") is None and none.points[0].accuracy == {}
    assert len(plot_simulation(none)["simulation"].axes) == 4
    only_free = compare_policies(settings, (0.0,), reports=digits_reports()[:1])
    assert only_free.kind_of("strict") == "free"  # it can do what a plain one does


def test_nothing_answered_counts_as_wrong():
    hopeless = Comparison(rules=Policy(deadline=0.001, call_timeout=1.0, max_wait=1.0))
    report = compare_policies(replace(SMALL, num_requests=20), (0.0,), hopeless, digits_reports())
    point = report.curve("strict")[0]
    assert point.latency == {"50": None, "95": None, "99": None} and point.accuracy == {}
    assert point.accuracy_of_requests("plain") == 0
    assert "-" in report._cells(point)
    assert "simulation" in plot_simulation(report)


def test_a_run_that_was_stopped_goes_on_and_ends_as_if_it_had_not(report, tmp_path):
    progress_file = tmp_path / PROGRESS_FILE

    def stop_at_the_fifth(number, total, policy, rate):
        assert total == 16
        if number == 5:
            raise KeyboardInterrupt

    arguments = (SMALL, RATES, Comparison(), digits_reports())
    with pytest.raises(KeyboardInterrupt):
        compare_policies(*arguments, progress_file=progress_file, on_point=stop_at_the_fifth)
    assert len(SimulationReport.load(progress_file).points) == 4
    begun = []
    resumed = compare_policies(
        *arguments, progress_file=progress_file, on_point=lambda number, *_: begun.append(number)
    )
    assert begun == list(range(5, 17))
    assert resumed.points == report.points and resumed.is_of(report)
    # With other settings, nothing of it counts; nor does a file that is damaged
    begun.clear()
    compare_policies(
        replace(SMALL, num_requests=20), RATES, progress_file=progress_file, on_point=lambda n, *_: begun.append(n)
    )
    progress_file.write_text("{}")
    compare_policies(
        replace(SMALL, num_requests=20), RATES, progress_file=progress_file, on_point=lambda n, *_: begun.append(n)
    )
    assert begun == [*range(1, 17), *range(1, 17)]


def test_a_report_of_another_version_is_not_of_this_one(report, tmp_path):
    for name in ("hf-layershuffle", "numpy"):
        versions = report.environment["versions"] | {name: "0.0.1"}
        assert not replace(report, environment={"versions": versions}).is_of(report)
    assert replace(report, environment=report.environment | {"date": "another"}).is_of(report)
    assert not replace(report, environment={}).is_of(report)


def test_models_of_one_name_must_be_of_one_dataset():
    free, plain = (replace(each, model="final") for each in digits_reports())
    texts = replace(plain, config=plain.config | {"inputs": "texts"})
    for other in (replace(plain, dataset="cifar10"), texts):
        said = f"'final' on {other.dataset} \\(360 {other.noun}\\)"
        with pytest.raises(ValueError, match=rf"'final' on digits \(360 images\), {said}"):
            models_of([free, other])


def test_a_report_survives_saving(report, tmp_path):
    assert SimulationReport.load(report.save(tmp_path).parent) == report
    assert json.loads((tmp_path / "simulation.json").read_text())["settings"]["failure_rates"] == list(RATES)
    values = json.loads((tmp_path / "simulation.json").read_text())
    for damaged in ({"points": 3}, values | {"environment": 3}, values | {"environment": {"versions": [3]}}):
        (tmp_path / "simulation.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="is not a report of a simulation"):
            SimulationReport.load(tmp_path)


def test_the_table_and_the_picture_show_all_policies(report, tmp_path):
    table = report.table()
    assert len(table.rows) == len(NAMES) * len(RATES)
    pictures = plot_simulation(report)
    figure = pictures["simulation"]
    assert [len(axes.get_lines()) for axes in figure.axes] == [len(NAMES)] * 4
    drawn = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert drawn["order-free: free order"].get_ydata()[1] == report.curve("free")[1].throughput
    assert drawn["plain: strict order"].get_linestyle() != drawn["order-free: free order"].get_linestyle()
    assert len({(line.get_color(), line.get_marker()) for line in drawn.values()}) == len(NAMES)
    right = {policy: report.curve(policy)[1].accuracy_of_requests(report.kind_of(policy)) for policy in NAMES}
    assert f"correctly: strict order {right['strict']:.0%}; " in figure._suptitle.get_text()
    assert f"free order, up to 2 skips {right['free_2_skips']:.0%}\nSimulated: 6 nodes" in figure._suptitle.get_text()
    pictures.save(tmp_path)
    assert imread(tmp_path / "simulation.png").shape[1] == 1360
    figure.set_dpi(200)  # as it is saved; letters are wider than at 100
    assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in [*figure.texts, figure._suptitle])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"failure_rates": (0.0, 1.0)}, "`failure_rate` is 1.0; it must be a fraction from 0 to below 1"),
        ({"failure_rates": ()}, r"`failure_rates` is \[\]; give at least one, each once"),
        ({"failure_rates": (0.1, 0.1)}, r"`failure_rates` is \[0.1, 0.1\]; give at least one, each once"),
        ({"comparison": Comparison(replicas=7)}, "`replicas` is 7, and there are 6 nodes; a layer's copies stand on"),
        ({"comparison": Comparison(replicas=1)}, "`replicas` is 1; it must be an integer of at least 2"),
        ({"comparison": Comparison(skips=(6,))}, "`skips` is 6, and the model has 6 layers; at least one must run"),
        ({"comparison": Comparison(skips=(0,))}, "`skips` is 0; it must be an integer of at least 1"),
        ({"comparison": Comparison(skips=(2, 1, 2))}, r"`skips` is \[2, 1, 2\]; give each number once"),
        ({"comparison": Comparison(skip_pipe=SkipPipe(1.5))}, "`skip_ratio` is 1.5; it must be a fraction"),
        ({"comparison": Comparison(skip_pipe=SkipPipe(max_swaps=-1))}, "`max_swaps` is -1; it must be an integer"),
        ({"comparison": Comparison(skip_after=0.0)}, "`skip_after` is 0.0; it must be a number of seconds above 0"),
        ({"settings": replace(SMALL, num_layers=12)}, "is of 6 layers, and `num_layers` is 12; they must be equal"),
        ({"reports": digits_reports()[:1] * 2}, "are both of order-free models; give one of an order-free"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(changes, message):
    arguments = {"settings": SMALL, "failure_rates": RATES, "reports": digits_reports()} | changes

    def never(*_):
        raise AssertionError("a simulation began")

    with pytest.raises(ValueError, match=message):
        compare_policies(**arguments, on_point=never)


def test_reports_of_another_depth_or_dataset_are_refused():
    free, plain = digits_reports()
    with pytest.raises(ValueError, match="must be of one and the same dataset: 'vit-digits-layershuffle' on other"):
        compare_policies(SMALL, RATES, reports=[replace(free, dataset="other"), plain])
    shorter = {method: groups[:5] for method, groups in plain.pruning.items()}
    with pytest.raises(ValueError, match="'vit-digits-layershuffle' has 6 layers, 'vit-digits-plain' has 5 layers"):
        compare_policies(SMALL, RATES, reports=[free, replace(plain, num_layers=5, pruning=shorter)])
