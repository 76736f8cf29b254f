"""The router's scheduler in simulated time: its rules hold whatever happens, and free order is worth what we say."""

import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.scheduling import CheckedScheduler

from hf_layershuffle.swarm.policy import Policy
from hf_layershuffle.swarm.scheduling import Scheduler
from hf_layershuffle.swarm.simulated_nodes import SERVICE_TIMES, Outage, SimulatedNodes, SimulationSettings
from hf_layershuffle.swarm.simulation import SimulatedSwarm, place_on_nodes, simulate


class CountedScheduler(CheckedScheduler):
    """Counts also the visits of each request."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.num_visits = Counter()

    def _check_start(self, visit):
        super()._check_start(visit)
        self.num_visits[visit.request] += 1


def checked_run(simulation, policy, replicas=1):
    """The result of a simulation all of whose decisions were checked, and what its requests came to."""
    nodes = SimulatedNodes(simulation)
    layers = range(simulation.num_layers)
    scheduler = CountedScheduler(Scheduler(layers, policy), layers, policy.max_skips, policy)
    placement = place_on_nodes(simulation.num_layers, nodes.names, replicas)
    result = SimulatedSwarm(scheduler, nodes, placement).run()
    assert set(scheduler.ended) == set(scheduler.ran), "an accepted request has not ended"
    assert len(scheduler.ended) == result.accepted == simulation.num_requests - result.refused
    return result, scheduler


@st.composite
def simulations(draw):
    """Settings, policy and copies."""
    choose = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    nodes = draw(st.integers(1, 8))
    num_layers = draw(st.integers(1, 6))
    simulation = SimulationSettings(
        num_layers=num_layers,
        nodes=nodes,
        num_requests=50,
        service=choose(*SERVICE_TIMES),
        stragglers=choose(0.0, 0.3),
        failure_rate=choose(0.0, 0.1, 0.5),
        repair_seconds=choose(0.1, 1.0),
        hangs=choose(0.0, 0.5, 1.0),
        seed=draw(st.integers(0, 1000)),
        **choose({}, {"in_flight": 1}, {"in_flight": 20}, {"arrival_rate": 30.0, "max_queue": 5}),
    )
    policy = Policy(
        choose("free", "strict"),
        max_skips=draw(st.integers(0, num_layers - 1)),
        skip_after=choose(None, 0.05),
        deadline=choose(None, 0.3),
        call_timeout=choose(0.05, 0.5),
        hedge=choose(None, 0.02),
        max_attempts=choose(1, 3),
        max_wait=choose(0.05, 1.0),
    )
    return simulation, policy, draw(st.integers(1, min(3, nodes)))


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(simulations())
def test_the_scheduler_keeps_its_rules_whatever_happens(drawn):
    checked_run(*drawn)


# The table of the trials: 12 workers of 20 ms, 12 requests in flight
TWELVE = SimulationSettings(num_requests=1000, latency_seconds=0.0)


def throughput(simulation, policy, replicas=1):
    result = simulate(simulation, policy, replicas)
    assert result.fraction_answered == 1
    return result.throughput, result


def test_free_order_is_worth_1_4_under_exponential_service_times():
    strict, _ = throughput(TWELVE, Policy("strict"))
    free, _ = throughput(TWELVE, Policy("free"))
    assert free >= 1.4 * strict


def test_one_skip_is_worth_2_5_with_a_slow_worker_and_a_replica_keeps_all_layers():
    slow = replace(TWELVE, service="constant", stragglers=1 / 12)
    strict, _ = throughput(slow, Policy("strict"))
    free, _ = throughput(slow, Policy("free"))
    skipping, with_skips = throughput(slow, Policy("free", max_skips=1, skip_after=0.05))
    copied, with_copies = throughput(slow, Policy("free"), replicas=2)
    assert strict == pytest.approx(10, rel=0.05)  # every request needs the slow one, in any order
    assert free == pytest.approx(10, rel=0.05)
    assert skipping >= 2.5 * strict and copied >= 2.5 * strict
    assert {len(order) for order in with_skips.orders} == {11, 12}
    assert {len(order) for order in with_copies.orders} == {12}


def test_equal_workers_come_near_to_the_bound():
    result = simulate(replace(TWELVE, service="constant"), Policy("strict"))
    assert result.throughput == pytest.approx(12 / (12 * 0.02), rel=0.02)
    assert result.latency(50) == pytest.approx(12 * 0.02, rel=0.02)
    assert result.busy == pytest.approx(1, rel=0.03)
    assert result.orders == {tuple(range(12)): result.answered}


def test_one_request_in_flight_takes_what_its_layers_take():
    alone = SimulationSettings(num_layers=3, nodes=3, num_requests=20, in_flight=1, service="exponential")
    nodes = SimulatedNodes(alone)
    result = simulate(alone, Policy("strict"))
    expected = [sum(nodes.seconds(request, layer, 0, "node-0") for layer in range(3)) for request in range(2, 20)]
    assert result.latencies == pytest.approx(expected)


def test_the_same_seed_gives_the_same_result_and_another_one_does_not():
    failing = SimulationSettings(num_requests=200, failure_rate=0.1, hangs=0.3, stragglers=0.2)
    policy = Policy(max_skips=2, deadline=1.0, call_timeout=0.3)
    assert simulate(failing, policy) == simulate(failing, policy)
    assert simulate(failing, policy) != simulate(replace(failing, seed=1), policy)


def test_failures_cost_a_strict_order_answers_and_a_free_one_with_skips_layers():
    failing = SimulationSettings(num_layers=6, nodes=6, num_requests=1000, failure_rate=0.1)
    rules = {"deadline": 1.0, "call_timeout": 1.0, "max_wait": 1.0}
    strict = simulate(failing, Policy("strict", **rules))
    skipping = simulate(failing, Policy("free", max_skips=2, **rules))
    assert strict.fraction_answered < 0.95 and strict.mean_layers == 6
    assert skipping.fraction_answered > 0.99 and 5 < skipping.mean_layers < 6
    assert skipping.throughput > 1.5 * strict.throughput
    assert strict.lost_hops > 0 and skipping.lost_hops > 0


def test_a_router_that_does_one_thing_at_a_time_bounds_the_throughput():
    even = replace(TWELVE, service="constant", nodes=12)
    unbound, bound = (simulate(replace(even, router_seconds=each), Policy("strict")) for each in (0.0001, 0.005))
    assert unbound.throughput == pytest.approx(50, rel=0.05)
    assert bound.throughput == pytest.approx(1 / (12 * 0.005), rel=0.02)
    assert bound.mean_layers == 12 and bound.lost_hops == 0


def test_a_node_that_hangs_is_left_after_the_timeout_and_used_again_afterwards():
    hanging = SimulationSettings(num_requests=400, nodes=24, failure_rate=0.1, hangs=1.0, repair_seconds=2.0)
    result, scheduler = checked_run(hanging, Policy("free", call_timeout=0.2, max_wait=30.0))
    assert result.fraction_answered == 1 and result.mean_layers == 12
    assert sum(scheduler.lost.values()) > 0  # timeouts
    assert result.latency(99) < 2.0  # nobody waits for the end of an outage


def run_of_one_away(hangs: bool, policy: Policy | None = None):
    """One request to one node, which works on it for a second, and from 0.5 to 3.5 s hangs or is gone."""

    class AwayOnce(SimulatedNodes):
        def outages(self, number):
            yield Outage(0.5, 3.5, hangs)

    alone = SimulationSettings(
        num_layers=1, nodes=1, num_requests=1, service="constant", service_seconds=1.0, latency_seconds=0.0,
        failure_rate=0.1,
    )  # fmt: skip
    nodes = AwayOnce(alone)
    return SimulatedSwarm(Scheduler(range(1), policy or Policy()), nodes, place_on_nodes(1, nodes.names)).run()


@pytest.mark.parametrize(("hangs", "seconds"), [(True, 4.0), (False, 4.5)])
def test_what_a_node_is_at_goes_on_after_it_hung_and_is_lost_if_it_died(hangs, seconds):
    result = run_of_one_away(hangs)
    assert result.latencies == pytest.approx([seconds]) and result.lost_hops == (not hangs)


def test_hops_are_counted_after_the_warm_up():
    result = simulate(SimulationSettings(num_layers=6, nodes=6, num_requests=1000))
    assert (result.counted, result.hops, result.lost_hops) == (900, 5400, 0)


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({"hangs": 1.0}, {"call_timeout": 1.0, "max_skips": 1}),
        ({"hangs": 0.5}, {"call_timeout": 0.05, "deadline": 0.2, "max_skips": 1}),
        ({"hangs": 0.3, "nodes": 6}, {"hedge": 0.03, "max_attempts": 1}),
    ],
)
def test_each_visit_is_a_hop_or_a_lost_one(changes, rules):
    failing = SimulationSettings(
        **{"num_layers": 2, "nodes": 2, "num_requests": 400, "failure_rate": 0.3, "repair_seconds": 3.0, **changes}
    )
    result, scheduler = checked_run(failing, Policy(**rules), replicas=failing.nodes // 2)
    ran = sum(len(order) for request, order in scheduler.ran.items() if request >= 40)
    visits = sum(number for request, number in scheduler.num_visits.items() if request >= 40)
    assert result.hops == ran and result.lost_hops == visits - ran > 0


def test_a_visit_that_took_too_long_is_lost_once():
    result = run_of_one_away(True, Policy(call_timeout=2.0))
    # From 0 to 4, of which it hung for 3; then again
    assert (result.hops, result.lost_hops) == (1, 1) and result.latencies == pytest.approx([5.0])
    assert result.busy == pytest.approx(1.0)


def test_nodes_are_busy_after_the_warm_up_only():
    class LongPause(SimulatedNodes):
        def arrivals(self):
            return [0.0, *range(100, 109)]

    steady = SimulationSettings(
        num_layers=1, nodes=1, num_requests=10, service="constant", service_seconds=1.0, latency_seconds=0.0,
        arrival_rate=1.0,
    )  # fmt: skip
    nodes = LongPause(steady)
    result = SimulatedSwarm(Scheduler(range(1), Policy()), nodes, place_on_nodes(1, nodes.names)).run()
    assert result.busy == pytest.approx(1.0) and result.hops == 9


def test_a_call_that_a_failure_ends_is_busy_until_then():
    result = run_of_one_away(False)
    assert result.busy == pytest.approx(1.5 / 4.5)


def test_a_hedge_asks_a_second_node_and_takes_the_first_result():
    uneven = SimulationSettings(num_layers=4, nodes=8, num_requests=400, in_flight=2, stragglers=0.25)
    plain, hedged = (checked_run(uneven, Policy("free", hedge=hedge))[0] for hedge in (None, 0.03))
    assert hedged.lost_hops > 0 == plain.lost_hops
    assert hedged.latency(95) < plain.latency(95)


def test_a_full_queue_refuses_requests():
    # Twice what three nodes can do
    open_load = SimulationSettings(num_layers=3, nodes=3, num_requests=600, arrival_rate=100.0, max_queue=10)
    result, _ = checked_run(open_load, Policy("free"))
    assert result.refused > 150 and result.accepted == 600 - result.refused
    assert result.fraction_answered == pytest.approx(result.answered / 540)
    assert result.fraction_answered < 0.75
    assert max(result.latencies) < 1.0
    relaxed = simulate(replace(open_load, arrival_rate=10.0), Policy("free"))
    assert relaxed.refused == 0 and relaxed.fraction_answered == 1
    assert relaxed.throughput == pytest.approx(10, rel=0.15)


def test_no_answer_at_all_has_no_latency():
    hopeless = SimulationSettings(num_layers=4, nodes=4, num_requests=20, service="constant")
    result = simulate(hopeless, Policy("strict", deadline=0.01))
    assert (result.answered, result.fraction_answered, result.throughput) == (0, 0.0, 0.0)
    assert result.latency(50) is None and result.mean_layers == 0


def test_a_thousand_nodes_are_as_even_as_twelve():
    placement = place_on_nodes(12, [f"node-{number}" for number in range(1000)])
    copies = [sum(layer in held for held in placement.values()) for layer in range(12)]
    assert min(copies) >= 83 and max(copies) <= 85
    assert {len(held) for held in placement.values()} <= {1, 2}
    many = SimulationSettings(nodes=1000, num_requests=1500, failure_rate=0.05)
    result = simulate(many, Policy("free", max_skips=1))
    assert result.fraction_answered == 1 and result.mean_layers == 12


def test_copies_stand_on_different_nodes():
    with pytest.raises(ValueError, match="`replicas` is 5, more than the 4"):
        simulate(SimulationSettings(nodes=4), replicas=5)


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "simpy", None)
    with pytest.raises(
        ImportError, match=r'needs the package simpy; install it with `pip install "hf-layershuffle\[swarm\]"`'
    ):
        simulate(SimulationSettings())
