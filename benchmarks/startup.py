"""What does importing the package add to importing transformers, and how long does `hf-layershuffle --help` take?

    python benchmarks/startup.py             # a minute on 2 cores
    python benchmarks/startup.py --pairs 3

Each of the pairs is a fresh process, which imports the peer (A) and then the package (B). The peer is what registering
models with the Auto classes and subclassing ViT and DeiT cannot do without, and what anybody who uses these classes
imports:

    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
    from transformers import ViTForImageClassification, DeiTForImageClassification

The bare `import transformers`, which imports nothing before a name is used (not even torch), is shown beside it.
"""

import argparse
import json
import statistics
import subprocess
import sys

from harness import Row, positive, quartiles, record


PEER = (
    "from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, "
    "ViTForImageClassification, DeiTForImageClassification"
)
PACKAGE = "import hf_layershuffle"
HELP = """
import sys
sys.argv = ["hf-layershuffle", "--help"]
from hf_layershuffle_cli import main
try:
    main()
except SystemExit:
    pass
"""
PROBE = """
import json, resource, sys, time

def measure(code):
    wall, cpu = time.perf_counter(), time.process_time()
    exec(code)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss: bytes there, KiB on Linux
    return dict(wall=wall, cpu=cpu, megabytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)

results = [measure(code) for code in {codes!r}]
print(json.dumps(dict(results=results, torch="torch" in sys.modules)))
"""


def probe(*codes: str) -> dict:
    """Seconds and CPU seconds that each of these takes, and MiB after it.

    They run one after the other in one fresh process.
    """
    command = [sys.executable, "-c", PROBE.format(codes=codes)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def added_row(values: list[float], peers: list[float], against: str, target: str, unit: str) -> Row:
    notes = f"on top of {statistics.median(peers):.3g}"
    return Row(
        PACKAGE,
        against,
        statistics.median(values),
        quartiles(values),
        len(values),
        unit=unit,
        target=target,
        notes=notes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=positive, default=10)
    args = parser.parse_args()
    probe(PEER, PACKAGE)  # compiled files and the page cache
    peers, ours = zip(*(probe(PEER, PACKAGE)["results"] for _ in range(args.pairs)))
    bare, after_bare = zip(*(probe("import transformers", PACKAGE)["results"] for _ in range(3)))
    helps = [probe(HELP) for _ in range(args.pairs)]
    if any(result["torch"] for result in helps):
        raise RuntimeError("`hf-layershuffle --help` imported torch.")
    help_seconds = [result["results"][0]["wall"] for result in helps]

    def values(results, key: str) -> list[float]:
        return [result[key] for result in results]

    against = "transformers' ViT and Auto classes"
    megabytes = [b - a for a, b in zip(values(peers, "megabytes"), values(ours, "megabytes"))]
    rows = [
        added_row(values(ours, "wall"), values(peers, "wall"), against, "<= 0.15", "seconds added"),
        added_row(values(ours, "cpu"), values(peers, "cpu"), against, "<= 0.15", "CPU seconds added"),
        added_row(megabytes, values(peers, "megabytes"), against, "<= 20", "MiB added"),
        added_row(
            values(after_bare, "cpu"), values(bare, "cpu"), "the bare `import transformers`", "", "CPU seconds added"
        ),
        Row(
            "hf-layershuffle --help",
            "",
            statistics.median(help_seconds),
            quartiles(help_seconds),
            len(helps),
            unit="seconds",
            target="<= 0.5",
            notes="torch is not imported",
        ),
    ]
    record("What does importing the package add to importing transformers?", rows, vars(args))


if __name__ == "__main__":
    main()
