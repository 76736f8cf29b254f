"""What nodes of a simulation draw: distributions, outages, and nothing that depends on what happens."""

from itertools import islice

import numpy as np
import pytest

from hf_layershuffle.swarm.simulated_nodes import SimulatedNodes, SimulationSettings


def drawn(**kwargs):
    settings = SimulationSettings(**{"num_layers": 4, "nodes": 10, "num_requests": 5000, **kwargs})
    nodes = SimulatedNodes(settings)
    return nodes, np.array([nodes.seconds(request, 1, 0, "node-3") for request in range(settings.num_requests)])


@pytest.mark.parametrize(
    ("service", "spread"), [("constant", 0.0), ("exponential", 0.02), ("lognormal", 0.02 * (np.exp(0.25) - 1) ** 0.5)]
)
def test_service_times_have_the_mean_and_spread_that_were_asked_for(service, spread):
    _, seconds = drawn(service=service, service_spread=0.5, latency_seconds=0)
    assert seconds.mean() == pytest.approx(0.02, rel=0.05)
    assert seconds.std() == pytest.approx(spread, rel=0.1, abs=1e-9)


def test_the_way_to_a_node_is_added():
    nodes, seconds = drawn(service="constant", latency_seconds=0.01)
    assert seconds.min() > 0.02 and seconds.mean() == pytest.approx(0.03, rel=0.03)
    assert nodes.expected_seconds("node-0") == pytest.approx(0.03)
    assert (drawn(service="constant", latency_seconds=0)[1] == 0.02).all()


def test_stragglers_are_as_many_and_as_slow_as_asked_for():
    nodes, _ = drawn(stragglers=0.3, straggler_factor=4, service="constant", latency_seconds=0)
    assert sorted(nodes.slowness.values()) == [1.0] * 7 + [4.0] * 3
    slow = next(name for name, factor in nodes.slowness.items() if factor == 4)
    assert nodes.seconds(0, 0, 0, slow) == nodes.expected_seconds(slow) == pytest.approx(0.08)


def test_a_draw_depends_on_what_it_is_of_alone():
    first, second, other = (SimulatedNodes(SimulationSettings(seed=seed)) for seed in (1, 1, 2))
    place = (17, 5, 0, "node-2")
    first.seconds(3, 1, 0, "node-1")  # what was drawn before does not matter
    assert first.seconds(*place) == second.seconds(*place) != other.seconds(*place)
    assert first.seconds(17, 5, 1, "node-2") != first.seconds(*place)  # a second try is another draw
    assert first.seconds(*place[:3], "node-7") == first.seconds(*place)  # all policies meet the same request


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_nodes_are_away_for_the_share_of_the_time_that_was_asked_for(rate):
    settings = SimulationSettings(nodes=200, failure_rate=rate, repair_seconds=2.0, hangs=0.25)
    nodes = SimulatedNodes(settings)
    horizon, away, outages, at_start = 400.0, 0.0, [], 0
    for number in range(settings.nodes):
        mine = []
        for outage in nodes.outages(number):
            if outage.start >= horizon:
                break
            assert outage.end > outage.start >= (mine[-1].end if mine else 0.0)
            mine.append(outage)
        away += sum(min(outage.end, horizon) - outage.start for outage in mine)
        at_start += bool(mine) and mine[0].start == 0
        outages += mine
    assert away / (horizon * settings.nodes) == pytest.approx(rate, rel=0.07)
    assert at_start / settings.nodes == pytest.approx(rate, abs=0.06)
    assert np.mean([outage.hangs for outage in outages]) == pytest.approx(0.25, abs=0.03)


def test_outages_are_those_of_the_seed_and_the_node():
    nodes, again = (SimulatedNodes(SimulationSettings(failure_rate=0.1)) for _ in range(2))
    first = list(islice(nodes.outages(3), 5))
    assert first == list(islice(again.outages(3), 5)) != list(islice(nodes.outages(4), 5))
    assert list(SimulatedNodes(SimulationSettings()).outages(0)) == []


def test_arrivals_come_at_the_rate_that_was_asked_for():
    nodes = SimulatedNodes(SimulationSettings(num_requests=5000, arrival_rate=50))
    gaps = np.diff(nodes.arrivals())
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05) and gaps.std() == pytest.approx(1 / 50, rel=0.08)
    with pytest.raises(ValueError, match="`arrival_rate` is None; the load is closed"):
        SimulatedNodes(SimulationSettings()).arrivals()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nodes": 0}, "`nodes` is 0; it must be an integer of at least 1"),
        ({"num_layers": True}, "`num_layers` is True; it must be an integer of at least 1"),
        ({"num_requests": 2.0}, "`num_requests` is 2.0; it must be an integer"),
        ({"seed": -1}, "`seed` is -1; it must be an integer of at least 0"),
        ({"failure_rate": 1.0}, "`failure_rate` is 1.0; it must be a fraction from 0 to below 1"),
        ({"failure_rate": -0.1}, "`failure_rate` is -0.1; it must be a fraction"),
        ({"failure_rate": float("nan")}, "`failure_rate` is nan; it must be a fraction"),
        ({"stragglers": 1}, "`stragglers` is 1; it must be a fraction from 0 to below 1"),
        ({"straggler_factor": 0.5}, "`straggler_factor` is 0.5; it must be a number of at least 1"),
        ({"hangs": 1.5}, "`hangs` is 1.5; it must be a fraction from 0 to 1"),
        ({"service": "gamma"}, "`service` is 'gamma'; it must be one of constant, exponential, lognormal"),
        ({"service_seconds": 0}, "`service_seconds` is 0; it must be a number above 0"),
        ({"repair_seconds": float("inf")}, "`repair_seconds` is inf; it must be a number above 0"),
        ({"latency_seconds": -1}, "`latency_seconds` is -1; it must be a number of at least 0"),
        ({"router_seconds": -1}, "`router_seconds` is -1; it must be a number of at least 0"),
        ({"arrival_rate": "fast"}, "`arrival_rate` is 'fast'; it must be a number above 0"),
        ({"in_flight": 0}, "`in_flight` is 0; it must be an integer of at least 1"),
        ({"in_flight": 4, "arrival_rate": 3.0}, "`in_flight` is 4 and `arrival_rate` is 3.0; give one of them"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SimulationSettings(**values)
