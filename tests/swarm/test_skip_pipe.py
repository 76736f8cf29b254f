"""Paths that are planned ahead: the best there are, never two on a worker, and within SkipPipe's bounds."""

from itertools import combinations, pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.scheduling import CheckedScheduler

from hf_layershuffle.swarm.planned_paths import Bookings, Step, earliest_path
from hf_layershuffle.swarm.policy import Policy
from hf_layershuffle.swarm.simulated_nodes import SimulatedNodes, SimulationSettings
from hf_layershuffle.swarm.simulation import SimulatedSwarm, place_on_nodes, simulate
from hf_layershuffle.swarm.skip_pipe import PathScheduler


def allowed_orders(num_layers, skips, swaps):
    """All orders with so many skips and swaps of neighbours at most, with the first layer first."""
    orders = set()
    for number in range(skips + 1):
        for skipped in combinations(range(1, num_layers), number):
            kept = [layer for layer in range(num_layers) if layer not in skipped]
            pairs = [(i, i + 1) for i in range(1, len(kept) - 1) if kept[i + 1] == kept[i] + 1]
            for how_many in range(swaps + 1):
                for chosen in combinations(pairs, how_many):
                    if len({place for pair in chosen for place in pair}) == 2 * how_many:
                        order = list(kept)
                        for first, second in chosen:
                            order[first], order[second] = order[second], order[first]
                        orders.add(tuple(order))
    return orders


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_no_allowed_path_ends_earlier(data):
    num_layers, skips, swaps = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    booked = []
    for _ in range(num_layers):
        bookings, moment = Bookings(), 0.0
        for gap in data.draw(st.lists(st.integers(0, 4), max_size=5)):
            bookings.book(Step(0, "", moment + gap, moment + gap + 2))
            moment += gap + 2
        booked.append(bookings)

    def earliest_step(layer, moment):
        start = booked[layer].first_gap(moment, 1.5)
        return Step(layer, f"worker-{layer}", start, start + 1.5)

    def end_of(order):
        moment = 0.0
        for layer in order:
            moment = earliest_step(layer, moment).end
        return moment

    skips = min(skips, num_layers - 1)
    path = earliest_path(range(num_layers), 0.0, earliest_step, skips, swaps, first_layer=0)
    orders = allowed_orders(num_layers, skips, swaps)
    assert tuple(step.layer for step in path) in orders
    assert path[-1].end == min(end_of(order) for order in orders)
    assert all(first.end <= second.start for first, second in pairwise(path))


def test_there_is_no_path_over_a_layer_that_nobody_holds_without_a_skip():
    def only_some(layer, moment):
        return None if layer == 2 else Step(layer, "w", moment, moment + 1)

    assert earliest_path([0, 1, 2, 3], 0.0, only_some, 0, 2, 0) is None
    assert [step.layer for step in earliest_path([0, 1, 2, 3], 0.0, only_some, 1, 2, 0)] == [0, 1, 3]


def test_bookings_do_not_overlap_and_gaps_are_found():
    bookings = Bookings()
    for start in (2.0, 10.0, 5.0):
        bookings.book(Step(0, "w", start, start + 2))
    assert bookings.first_gap(0, 2) == 0
    assert bookings.first_gap(0, 2.5) == 7
    assert bookings.first_gap(3, 1) == 4
    assert bookings.first_gap(0, 4) == 12
    bookings.release(Step(0, "w", 5.0, 7.0))
    assert bookings.first_gap(0, 4) == 4
    bookings.forget(4.0)
    bookings.release(Step(0, "w", 2.0, 4.0))  # forgotten already
    assert bookings.first_gap(0, 4) == 0


def run_paths(simulation, replicas=1, skip_ratio=0.25, max_swaps=2, **policy):
    policy = Policy("free", **{"deadline": 1.0, "call_timeout": 0.5, "max_wait": 1.0, **policy})
    nodes = SimulatedNodes(simulation)
    layers = range(simulation.num_layers)
    seconds = {name: nodes.expected_seconds(name) for name in nodes.names}
    paths = PathScheduler(layers, seconds, skip_ratio, max_swaps, policy)
    checked = CheckedScheduler(paths, layers, paths.max_skips, policy, is_work_conserving=False)
    placement = place_on_nodes(simulation.num_layers, nodes.names, replicas)
    result = SimulatedSwarm(checked, nodes, placement).run()
    assert set(checked.ended) == set(checked.ran)
    return result, paths


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 7), st.integers(1, 6), st.sampled_from([0.0, 0.1, 0.5]), st.sampled_from([0.0, 0.5]),
    st.sampled_from([0.0, 0.25, 0.5]), st.integers(0, 2), st.integers(0, 100),
)  # fmt: skip
def test_paths_keep_to_their_bounds_whatever_happens(nodes, num_layers, rate, hangs, skip_ratio, max_swaps, seed):
    simulation = SimulationSettings(
        num_layers=num_layers,
        nodes=nodes,
        num_requests=40,
        failure_rate=rate,
        hangs=hangs,
        repair_seconds=0.3,
        seed=seed,
    )
    result, paths = run_paths(simulation, min(nodes, 2), skip_ratio, max_swaps)
    for order in result.orders:
        in_sequence = sorted(order)
        swaps = [layer for place, layer in enumerate(order) if layer < in_sequence[place]]
        assert len(swaps) <= max_swaps and all(abs(order.index(e) - in_sequence.index(e)) <= 1 for e in order)
        assert order[0] == 0, "the first layer always runs, first"
    assert paths.next_check() is None  # nothing is left behind
    assert not any(worker.waiting or worker.visit for worker in paths._workers.values() if not worker.is_suspected)


def test_with_known_times_no_request_waits_at_a_worker_and_the_share_of_layers_is_skipped():
    known = SimulationSettings(num_requests=300, service="constant", latency_seconds=0.0, in_flight=6)
    result, _ = run_paths(known)
    assert {len(order) for order in result.orders} == {9}
    assert max(result.latencies) == pytest.approx(9 * 0.02, rel=0.3)
    full, _ = run_paths(known, skip_ratio=0.0, max_swaps=0)
    assert full.orders == {tuple(range(12)): full.answered}
    assert full.latency(99) == pytest.approx(12 * 0.02, rel=0.01)
    assert full.throughput == pytest.approx(simulate(known, Policy("strict")).throughput, rel=0.02)


def test_a_path_leads_around_nodes_that_are_away():
    failing = SimulationSettings(num_layers=8, nodes=8, num_requests=400, failure_rate=0.1)
    rigid, _ = run_paths(failing, skip_ratio=0.0, max_swaps=0)
    skipping, _ = run_paths(failing, skip_ratio=0.25)
    copied, _ = run_paths(failing, replicas=2, skip_ratio=0.0)
    assert rigid.fraction_answered < skipping.fraction_answered
    assert rigid.fraction_answered < copied.fraction_answered and copied.mean_layers == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"skip_ratio": 1.0}, "`skip_ratio` is 1.0; it must be a fraction from 0 to below 1"),
        ({"skip_ratio": -0.1}, "`skip_ratio` is -0.1"),
        ({"max_swaps": -1}, "`max_swaps` is -1; it must be an integer of at least 0"),
    ],
)
def test_bounds_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        PathScheduler(range(4), {}, **values)
