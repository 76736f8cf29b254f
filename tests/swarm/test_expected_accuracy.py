"""What a report lets expect of an execution order: its own numbers where it has them, and nothing made up."""

import json
from dataclasses import replace

import pytest
from conftest import REPOSITORY

from hf_layershuffle import RobustnessReport
from hf_layershuffle.swarm.expected_accuracy import ExpectedAccuracy, digits_reports


@pytest.fixture(scope="module")
def reports():
    return dict(zip(("free", "plain"), digits_reports()))


def test_the_reports_that_come_along_are_those_of_the_model_cards(reports):
    for kind, name in (("free", "vit-digits-layershuffle"), ("plain", "vit-digits-plain")):
        path = REPOSITORY / "model_cards" / name / "robustness.json"
        assert reports[kind].to_dict() == json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["free", "plain"])
def test_orders_of_the_report_have_their_own_number(reports, kind):
    report, accuracy = reports[kind], ExpectedAccuracy(reports[kind])
    assert accuracy.of(range(6)) == report.sequential.accuracy
    assert accuracy.of([5, 4, 3, 2, 1, 0]) == report.reversed.accuracy
    assert accuracy.of([0, 1, 3, 4, 5]) == report.leave_one_out[2].accuracy
    assert accuracy.of([0, 2, 1, 3, 4, 5]) == report.neighbour_swaps[1].accuracy
    drawn = report.arbitrary.scores[3]
    assert accuracy.of(drawn.execution_order) == drawn.accuracy


def test_other_orders_have_the_mean_of_their_kind_with_as_many_layers(reports):
    report, accuracy = reports["plain"], ExpectedAccuracy(reports["plain"])
    known = {tuple(score.execution_order) for groups in report.pruning.values() for g in groups for score in g.scores}
    in_order = next(order for order in ((0, 1, 4, 5), (0, 3, 4, 5), (1, 2, 3, 5)) if order not in known)
    assert accuracy.of(in_order) == report.pruning["random"][3].accuracy.mean
    assert (4, 0, 2, 1) not in known
    assert accuracy.of((4, 0, 2, 1)) == report.pruning["arbitrary"][3].accuracy.mean
    assert accuracy.share_interpolated({in_order: 1, (4, 0, 2, 1): 3}) == 0


def test_swapped_neighbours_lie_between_the_two_and_are_counted(reports):
    report, accuracy = reports["plain"], ExpectedAccuracy(reports["plain"])
    one, two = accuracy.of((0, 2, 1, 4, 5)), accuracy.of((0, 2, 1, 5, 4))
    in_order, arbitrary = (report.pruning[method][4].accuracy.mean for method in ("random", "arbitrary"))
    # One of the ten pairs is out of order, of five that are in an arbitrary order on average
    assert one == pytest.approx(in_order + (arbitrary - in_order) / 5)
    assert two == pytest.approx(in_order + (arbitrary - in_order) * 2 / 5)
    assert accuracy.of((2, 0, 1, 4, 5)) == arbitrary  # two places from its own
    orders = {(0, 2, 1, 4, 5): 1, tuple(range(6)): 3}
    assert accuracy.share_interpolated(orders) == 0.25
    assert accuracy.mean(orders) == pytest.approx((one + 3 * report.sequential.accuracy) / 4)


@pytest.mark.parametrize("order", [[], [0, 0], [6], [-1, 2]])
def test_what_is_no_order_of_the_model_is_refused(reports, order):
    with pytest.raises(ValueError, match=r"must name layers from 0 to 5, at least one, each at most once"):
        ExpectedAccuracy(reports["free"]).of(order)


def test_a_report_that_lacks_numbers_is_refused(reports):
    pruning = {**reports["free"].pruning, "random": reports["free"].pruning["random"][:4]}
    with pytest.raises(ValueError, match="has the accuracy with 4 numbers of layers \\('random'\\), not with all 6"):
        ExpectedAccuracy(replace(reports["free"], pruning=pruning))


def test_a_digest_tells_reports_apart(reports):
    assert isinstance(reports["free"], RobustnessReport)
    digests = {ExpectedAccuracy(report).digest for report in (*reports.values(), *digits_reports())}
    assert len(digests) == 2
