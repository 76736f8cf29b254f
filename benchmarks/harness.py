"""Measures things in turn, A B A B ..., and records what came out. The other scripts of this folder use it.

No absolute time is ever claimed: each row is a ratio to a peer measured in the same run, the median over the pairs,
with the quartiles as its spread.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path


RESULTS = Path(__file__).with_name("results")
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy")


def positive(text: str) -> int:
    """The type of an argument that counts something, for `argparse`."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no positive whole number")
    return int(text)


def width(text: str) -> int:
    """The type of an argument that is a model's width, which its heads share; each has 64 numbers or a few more."""
    number = positive(text)
    if number % max(1, number // 64):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a width that {number // 64} heads share; take a multiple of 64"
        )
    return number


@dataclass
class Row:
    """One measured ratio.

    Args:
        what: What was measured, such as "depth embedding".
        against: The peer.
        ratio: Median over the pairs.
        quartiles: First and third quartile of the ratio.
        pairs: Number of pairs.
        cpu_ratio: The same of the process's CPU time, which other work on the machine disturbs less.
        unit: What the ratio is of: "time", "peak memory", "speed", or a count without a peer.
        target: Such as "<= 1.02"; empty without one.
        notes: Absolute numbers, for orientation only.
    """

    what: str
    against: str
    ratio: float
    quartiles: tuple[float, float] | None = None
    pairs: int = 1
    cpu_ratio: float | None = None
    unit: str = "time"
    target: str = ""
    notes: str = ""

    @property
    def met(self) -> bool | None:
        if not self.target:
            return None
        relation, limit = self.target.split()
        return self.ratio <= float(limit) if relation == "<=" else self.ratio >= float(limit)


@dataclass
class Pairs:
    """Wall and process CPU seconds of A and B, one value a pair."""

    first: list[float]
    second: list[float]
    first_cpu: list[float]
    second_cpu: list[float]

    def ratios(self, cpu: bool = False) -> list[float]:
        """B divided by A."""
        first, second = (self.first_cpu, self.second_cpu) if cpu else (self.first, self.second)
        return [b / a for a, b in zip(first, second)]

    def row(self, what: str, against: str, target: str = "", notes: str = "") -> Row:
        ratios = self.ratios()
        cpu_ratios = self.ratios(cpu=True) if all(self.first_cpu) else []
        seconds = f"{statistics.median(self.first):.3g} s against {statistics.median(self.second):.3g} s"
        return Row(
            what,
            against,
            statistics.median(ratios),
            quartiles(ratios),
            len(ratios),
            statistics.median(cpu_ratios) if cpu_ratios else None,
            target=target,
            notes="; ".join(filter(None, (seconds, notes))),
        )


def quartiles(values: list[float]) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def measure_pairs(
    first: Callable, second: Callable, pairs: int, warm_up: int = 1, synchronize: Callable | None = None
) -> Pairs:
    """Runs A B, B A, A B ... The order changes from pair to pair, so that neither always runs on the other's heels.

    Args:
        first, second: Functions without arguments: A and B.
        pairs: Number of pairs, at least 1.
        warm_up: Runs of each that are not measured.
        synchronize: Waits for the accelerator.
    """
    if pairs < 1:
        raise ValueError(f"`pairs` is {pairs}; it must be at least 1.")
    for _ in range(warm_up):
        first(), second()
    seconds, cpu_seconds = ([], []), ([], [])
    was_enabled = gc.isenabled()
    gc.disable()  # a collection would be counted against whoever happens to run
    try:
        for pair in range(pairs):
            for side in (0, 1) if pair % 2 == 0 else (1, 0):
                wall, cpu = timed((first, second)[side], synchronize)
                seconds[side].append(wall)
                cpu_seconds[side].append(cpu)
            gc.collect()
    finally:
        if was_enabled:
            gc.enable()
    return Pairs(*seconds, *cpu_seconds)


def timed(function: Callable, synchronize: Callable | None = None) -> tuple[float, float]:
    """Wall and process CPU seconds of one call."""
    synchronize = synchronize or (lambda: None)
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_bytes(function: Callable, device: str = "cpu") -> int:
    """The most bytes of tensors that `function` holds at once beyond those that are there before it.

    Counted from the allocator's own events, so that it does not depend on what else the machine does.
    """
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    function()  # what an earlier call left behind would be freed, and counted, in this one
    gc.collect()
    with _silent_standard_error():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _silent_standard_error():
    """The profiler of torch 2.13 announces its start and stop there, whatever the log level is."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def environment() -> dict:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "machine": gpu or _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name))},
    }


def _commit() -> str | None:
    """The commit of the folder; None in a copy without git."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def record(
    question: str,
    rows: list[Row],
    settings: dict | None = None,
    notes: str = "",
    measurements: list[dict] | None = None,
    folder: str | os.PathLike | None = None,
) -> Path:
    """Prints the table and writes `results/<script>.json`.

    A run with arguments is a trial. It is written to the temporary folder, unless a folder is given.

    Args:
        measurements: Absolute numbers for the file alone.
    """
    script = Path(sys.argv[0])
    print_rows({script.stem: rows})
    if notes:
        print(notes)
    default = RESULTS if len(sys.argv) == 1 else Path(tempfile.gettempdir(), "layershuffle-benchmarks")
    folder = Path(folder or default)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{script.stem}.json"
    content = {
        "benchmark": script.stem,
        "command": " ".join(["python", f"benchmarks/{script.name}", *sys.argv[1:]]),
        "question": question,
        "settings": settings or {},
        "environment": environment(),
        "rows": [asdict(row) | {"met": row.met} for row in rows],
        "notes": notes,
        **({"measurements": measurements} if measurements else {}),
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    print(f"Written to {path}.")
    return path


def cells(row: Row) -> list[str]:
    """A row as text, for the terminal and for Markdown."""
    digits = 2 if row.ratio >= 10 else 3
    spread = "" if row.quartiles is None else "–".join(f"{value:.{digits}f}" for value in row.quartiles)
    met = {True: "yes", False: "no", None: ""}[row.met]
    ratio = f"{row.ratio:.{digits}f}".rstrip("0").rstrip(".") if row.unit == "count" else f"{row.ratio:.{digits}f}"
    cpu_ratio = "" if row.cpu_ratio is None else f"{row.cpu_ratio:.{digits}f}"
    return [row.what, row.against, row.unit, ratio, spread, cpu_ratio, str(row.pairs), row.target, met]


HEADINGS = ("what", "against", "of", "ratio", "quartiles", "CPU time", "pairs", "target", "met")


def print_rows(rows_by_benchmark: dict[str, list[Row]], title: str = "") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None)
    table.add_column("benchmark")
    for heading in HEADINGS:
        table.add_column(
            heading, justify="right" if heading in ("ratio", "quartiles", "CPU time", "pairs") else "left"
        )
    for benchmark, rows in rows_by_benchmark.items():
        for row in rows:
            table.add_row(benchmark, *cells(row))
        table.add_section()
    width = None if sys.stdout.isatty() else 170
    Console(width=width).print(table)
