# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""`hf-layershuffle swarm simulate`: policies against failure rates, in simulated time."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options, outputs


if TYPE_CHECKING:
    from hf_layershuffle import RobustnessReport
    from hf_layershuffle.swarm.compared_policies import ComparedPolicy, Comparison
    from hf_layershuffle.swarm.simulated_nodes import SimulationSettings


Reports = Annotated[
    list[Path] | None,
    typer.Option(
        "--report",
        help="A robustness.json of `hf-layershuffle evaluate`, or its folder: of an order-free model, and of a plain "
        "one of as many layers. Repeatable. Defaults to the reports of two models of digits that come along.",
    ),
]
NumLayers = Annotated[int | None, typer.Option("--num_layers", help="Layers of the model. Defaults to the reports'.")]
Nodes = Annotated[
    int | None, typer.Option("--nodes", help="Number of nodes. Defaults to as many as the model has layers.")
]
FailureRates = Annotated[
    str,
    typer.Option(
        "--failure_rates", help="Shares of the time for which a node is away, from 0 to below 1, separated by commas."
    ),
]
Skips = Annotated[
    list[int] | None,
    typer.Option("--skips", help="Most layers that a policy with skips may skip. Repeatable. Defaults to 1 and 2."),
]


def simulate(
    context: typer.Context,
    output_dir: Annotated[Path, typer.Option("--output_dir", help="For the report and the picture.")],
    reports: Reports = None,
    num_layers: NumLayers = None,
    nodes: Nodes = None,
    replicas: Annotated[
        int, typer.Option("--replicas", help="Nodes that hold each layer, for the policies with copies; from 2.")
    ] = 2,
    failure_rates: FailureRates = "0,0.02,0.05,0.1,0.15,0.2,0.3",
    skips: Skips = None,
    num_requests: Annotated[int, typer.Option("--num_requests", help="Requests that are sent.")] = 5000,
    in_flight: Annotated[
        int | None, typer.Option("--in_flight", help="Requests under way at any time. Defaults to --nodes.")
    ] = None,
    arrival_rate: Annotated[
        float | None,
        typer.Option("--arrival_rate", help="Requests a second that come at random, instead of --in_flight."),
    ] = None,
    max_queue: Annotated[
        int, typer.Option("--max_queue", help="For --arrival_rate: beyond so many, requests are refused.")
    ] = 256,
    service: Annotated[
        str, typer.Option("--service", help="Times that layers take: constant, exponential or lognormal.")
    ] = "exponential",
    service_seconds: Annotated[float, typer.Option("--service_seconds", help="Their mean.")] = 0.02,
    service_spread: Annotated[
        float, typer.Option("--service_spread", help="For lognormal: standard deviation of their logarithm.")
    ] = 1.0,
    stragglers: Annotated[
        float, typer.Option("--stragglers", help="Share of nodes that are slow, from 0 to below 1.")
    ] = 0.0,
    straggler_factor: Annotated[
        float, typer.Option("--straggler_factor", help="Times as slow as others, at least 1.")
    ] = 5.0,
    latency_seconds: Annotated[
        float, typer.Option("--latency_seconds", help="Mean time to a node and back, lognormal.")
    ] = 0.002,
    latency_spread: Annotated[
        float, typer.Option("--latency_spread", help="Standard deviation of its logarithm.")
    ] = 0.5,
    repair_seconds: Annotated[
        float, typer.Option("--repair_seconds", help="Mean time for which a node is away.")
    ] = 1.0,
    hangs: Annotated[
        float, typer.Option("--hangs", help="Share of failures in which a node stands still instead of dying.")
    ] = 0.0,
    detection_seconds: Annotated[
        float, typer.Option("--detection_seconds", help="Until the router knows that a node died.")
    ] = 0.03,
    router_seconds: Annotated[
        float, typer.Option("--router_seconds", help="Time that the router, one thing at a time, takes for each hop.")
    ] = 0.0,
    deadline: Annotated[
        float, typer.Option("--deadline", help="Seconds for a request, after which it gets what ran, or fails.")
    ] = 1.0,
    skip_after: Annotated[
        float,
        typer.Option("--skip_after", help="Seconds of waiting for busy nodes after which a layer may be skipped."),
    ] = 0.2,
    call_timeout: Annotated[
        float, typer.Option("--call_timeout", help="Seconds for a layer, after which its node is suspected.")
    ] = 1.0,
    hedge: Annotated[
        float | None, typer.Option("--hedge", help="Seconds after which a second node is asked for the same layer.")
    ] = None,
    skip_ratio: Annotated[
        float, typer.Option("--skip_ratio", help="For SkipPipe's paths: share of the layers left out.")
    ] = 0.25,
    max_swaps: Annotated[
        int, typer.Option("--max_swaps", help="For SkipPipe's paths: neighbours that are swapped, at most.")
    ] = 2,
    seed: options.Seed = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the report of another simulation in --output_dir.")
    ] = False,
) -> None:
    """Compares policies on nodes that fail and come back, in simulated time.

    Requests take layers in strict order, in free order, with skips, with copies of the layers, and on paths that are
    planned ahead as SkipPipe does. Prints a table, and writes simulation.json and a picture of throughput, latency and
    expected accuracy against the time that nodes are away. A simulation that was stopped goes on where it was.
    """
    from hf_layershuffle.swarm.compared_policies import Comparison, SkipPipe
    from hf_layershuffle.swarm.policy import Policy
    from hf_layershuffle.swarm.simulated_nodes import SimulationSettings

    loaded = load_reports(reports or [], num_layers)
    depth = num_layers if num_layers is not None else loaded[0].num_layers
    settings = SimulationSettings(
        num_layers=depth, nodes=depth if nodes is None else nodes, num_requests=num_requests, in_flight=in_flight,
        arrival_rate=arrival_rate, max_queue=max_queue, service=service, service_seconds=service_seconds,
        service_spread=service_spread, stragglers=stragglers, straggler_factor=straggler_factor,
        latency_seconds=latency_seconds, latency_spread=latency_spread, repair_seconds=repair_seconds, hangs=hangs,
        detection_seconds=detection_seconds, router_seconds=router_seconds, seed=seed,
    )  # fmt: skip
    rules = Policy(deadline=deadline, call_timeout=call_timeout, hedge=hedge)
    comparison = Comparison(
        rules=rules, skip_after=skip_after, skips=tuple(skips or (1, 2)), replicas=replicas,
        skip_pipe=SkipPipe(skip_ratio, max_swaps),
    )  # fmt: skip
    run(context, output_dir, settings, parse_rates(failure_rates), comparison, loaded, overwrite)


def run(
    context: typer.Context,
    output_dir: Path,
    settings: "SimulationSettings",
    rates: list[float],
    comparison: "Comparison",
    reports: "list[RobustnessReport]",
    overwrite: bool,
) -> None:
    """Simulates, or takes the report of the same simulation that is there, prints it and draws it."""
    from hf_layershuffle.swarm.simulation_picture import plot_simulation
    from hf_layershuffle.swarm.simulation_report import (
        PROGRESS_FILE,
        REPORT_FILE,
        SimulationReport,
        check_comparison,
        compare_policies,
    )

    expected = check_comparison(settings, rates, comparison, reports)
    outputs.check_output_dir(output_dir, REPORT_FILE)
    outputs.claim(context, output_dir)
    report = None
    if (output_dir / REPORT_FILE).exists() and not overwrite:
        report = SimulationReport.load(output_dir)
        if not report.is_of(expected):
            raise ValueError(
                f"'{output_dir}' holds the report of another simulation, or of another version; choose another "
                "--output_dir, or add --overwrite to replace it."
            )
    progress_file = output_dir / PROGRESS_FILE
    if report is None:
        report = compare_policies(
            settings, rates, comparison, reports, progress_file=progress_file, on_point=show_progress
        )
    with outputs.shown_before(report.table(), output_dir):
        report.save(output_dir)
        plot_simulation(report).save(output_dir)
        progress_file.unlink(missing_ok=True)


def load_reports(paths: list[Path], num_layers: int | None) -> "list[RobustnessReport]":
    """The reports; without any, those of the two models of digits, if the number of layers is theirs."""
    from hf_layershuffle import RobustnessReport
    from hf_layershuffle.swarm.expected_accuracy import digits_reports

    if paths:
        return [RobustnessReport.load(path) for path in paths]
    found = digits_reports()
    if num_layers is None or num_layers == found[0].num_layers:
        return found
    print(
        f"No accuracies: the reports that come along are of {found[0].num_layers} layers, not of {num_layers}. Give "
        "--report."
    )
    return []


def parse_rates(text: str) -> list[float]:
    """Failure rates as numbers.

    Raises:
        `ValueError`: if one is no number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--failure_rates is '{text}'; give numbers from 0 to below 1, separated by commas, such as 0,0.05,0.1."
        ) from None


def show_progress(number: int, total: int, policy: "ComparedPolicy", failure_rate: float) -> None:
    """One line on a terminal, which the next one takes the place of; nothing elsewhere."""
    if sys.stderr.isatty():
        end = "\r" if number < total else "\n"
        print(
            f"\x1b[2K[{number}/{total}] {policy.label}, away {failure_rate:.1%}", end=end, file=sys.stderr, flush=True
        )
