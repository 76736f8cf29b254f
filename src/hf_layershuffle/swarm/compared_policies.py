# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The policies that a simulation compares, each on the same nodes with the same requests."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..common.checks import check_integers
from .policy import Policy
from .scheduling import Scheduler
from .simulated_nodes import SimulatedNodes, SimulationSettings
from .simulation import Decides, SimulatedSwarm, SimulationResult, place_on_nodes
from .skip_pipe import PathScheduler, skips_of


@dataclass(frozen=True)
class SkipPipe:
    """How SkipPipe's paths are chosen; see [`PathScheduler`].

    Args:
        skip_ratio: Fraction in [0, 1) of the layers that a path may leave out.
        max_swaps: Most neighbours that a path swaps.
    """

    skip_ratio: float = 0.25
    max_swaps: int = 2


@dataclass(frozen=True)
class ComparedPolicy:
    """A way to run requests, by its name.

    Args:
        name: For files, such as `"free_2_copies"`.
        label: For people.
        order_free: Whether it is for an order-free model. A plain one may neither skip nor reorder.
        policy: As of a real swarm.
        replicas: Nodes that hold each layer, at least.
        skip_pipe: For planned paths instead of the scheduler's choice.
    """

    name: str
    label: str
    order_free: bool
    policy: Policy
    replicas: int = 1
    skip_pipe: SkipPipe | None = None

    def run(self, settings: SimulationSettings) -> SimulationResult:
        """Runs the requests of a simulation."""
        nodes = SimulatedNodes(settings)
        placement = place_on_nodes(settings.num_layers, nodes.names, self.replicas)
        return SimulatedSwarm(self._scheduler(nodes), nodes, placement).run()

    def _scheduler(self, nodes: SimulatedNodes) -> Decides:
        layers = range(nodes.settings.num_layers)
        if self.skip_pipe is None:
            return Scheduler(layers, self.policy)
        seconds = {name: nodes.expected_seconds(name) for name in nodes.names}
        return PathScheduler(layers, seconds, self.skip_pipe.skip_ratio, self.skip_pipe.max_swaps, self.policy)


@dataclass(frozen=True)
class Comparison:
    """What a simulation compares.

    Args:
        rules: What all policies have in common: deadline, timeouts, hedging.
        skip_after: For policies with skips: seconds of waiting for busy nodes after which a layer is skipped.
        skips: Numbers of skips that are tried, each at least 1.
        replicas: Nodes that hold each layer, for the policies with copies.
        skip_pipe: SkipPipe's setting. None to leave it out.
    """

    rules: Policy = field(default_factory=lambda: Policy(deadline=1.0, call_timeout=1.0, max_wait=1.0))
    skip_after: float | None = None
    skips: Sequence[int] = (1, 2)
    replicas: int = 2
    skip_pipe: SkipPipe | None = field(default_factory=SkipPipe)

    def policies(self, num_layers: int, num_nodes: int) -> list[ComparedPolicy]:
        """The policies for a model on nodes: a plain model's first.

        Raises:
            `ValueError`: if a number of skips or of replicas does not go with them.
        """
        check_integers(replicas=(self.replicas, 2))
        if self.replicas > num_nodes:
            raise ValueError(
                f"`replicas` is {self.replicas}, and there are {num_nodes} nodes; a layer's copies stand on different "
                "nodes, so take fewer copies or more nodes."
            )
        if len(set(self.skips)) < len(self.skips):
            raise ValueError(f"`skips` is {list(self.skips)}; give each number once.")
        for number in self.skips:
            check_integers(skips=(number, 1))
            if number >= num_layers:
                raise ValueError(
                    f"`skips` is {number}, and the model has {num_layers} layers; at least one must run, so take at "
                    f"most {num_layers - 1}."
                )
        strict, free = replace(self.rules, name="strict"), replace(self.rules, name="free")
        copies = f"{self.replicas} copies"
        copied = f"{self.replicas}_copies"
        found = [
            ComparedPolicy("strict", "strict order", False, strict),
            ComparedPolicy(f"strict_{copied}", f"strict order, {copies}", False, strict, self.replicas),
        ]
        if self.skips:
            found.append(self._with_skips("strict", "strict order", False, strict, max(self.skips)))
        found.append(ComparedPolicy("free", "free order", True, free))
        found += [self._with_skips("free", "free order", True, free, number) for number in self.skips]
        found.append(ComparedPolicy(f"free_{copied}", f"free order, {copies}", True, free, self.replicas))
        if self.skip_pipe is not None:
            check_integers(max_swaps=(self.skip_pipe.max_swaps, 0))
            skipped = skips_of(num_layers, self.skip_pipe.skip_ratio)
            label = f"SkipPipe's paths, {skipped} of {num_layers} skipped"
            found.append(ComparedPolicy("skip_pipe", label, True, free, skip_pipe=self.skip_pipe))
        return found

    def _with_skips(self, name: str, label: str, order_free: bool, policy: Policy, number: int) -> ComparedPolicy:
        skipping = replace(policy, max_skips=number, skip_after=self.skip_after)
        skips = "1 skip" if number == 1 else f"{number} skips"
        return ComparedPolicy(f"{name}_{number}_skips", f"{label}, up to {skips}", order_free, skipping)
