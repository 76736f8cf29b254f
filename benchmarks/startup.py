"""What does importing the package add to importing transformers, and how long does `hf-layershuffle --help` take?

    python benchmarks/startup.py             # two minutes on 2 cores
    python benchmarks/startup.py --pairs 3

Each import runs in a fresh process; A and B in turn. The peer is what registering models with the Auto classes and subclassing ViT and
DeiT cannot do without, and what anybody who uses these classes imports:

    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, ViTForImageClassification, DeiTForImageClassification

The bare `import transformers`, which imports nothing before a name is used (not even torch), is shown beside it.
"""

import argparse
import json
import statistics
import subprocess
import sys

from harness import Row, quartiles, record


PEER = (
    "from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, "
    "ViTForImageClassification, DeiTForImageClassification"
)
PACKAGE = "import hf_layershuffle"
HELP = "import sys; sys.argv = ['hf-layershuffle', '--help']; from hf_layershuffle_cli import main\ntry: main()\nexcept SystemExit: pass"
PROBE = """
import json, resource, sys, time
wall, cpu = time.perf_counter(), time.process_time()
exec({code!r})
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss: bytes there, KiB on Linux
megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
print(json.dumps(dict(wall=wall, cpu=cpu, megabytes=megabytes, torch="torch" in sys.modules)))
"""


def probe(code: str) -> dict:
    """Seconds, CPU seconds and MiB that a fresh process takes to run `code`."""
    command = [sys.executable, "-c", PROBE.format(code=code)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def difference_row(what, against, first, second, key, target: str, unit: str) -> Row:
    differences = [b[key] - a[key] for a, b in zip(first, second)]
    medians = [statistics.median(each[key] for each in side) for side in (first, second)]
    notes = f"{medians[0]:.3g} against {medians[1]:.3g}"
    return Row(
        what, against, statistics.median(differences), quartiles(differences), len(differences),
        unit=unit, target=target, notes=notes,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    args = parser.parse_args()
    for code in (PEER, PACKAGE):
        probe(code)  # compiled files and the page cache
    first, second = [], []
    for pair in range(args.pairs):
        sides = [(first, PEER), (second, PACKAGE)]
        for results, code in sides if pair % 2 == 0 else reversed(sides):
            results.append(probe(code))
    bare = [probe("import transformers") for _ in range(3)]
    helps = [probe(HELP) for _ in range(args.pairs)]
    if any(result["torch"] for result in helps):
        raise RuntimeError("`hf-layershuffle --help` imported torch.")
    what, peer = PACKAGE, "transformers' ViT and Auto classes"
    seconds = statistics.median(result["wall"] for result in helps)
    rows = [
        difference_row(what, peer, first, second, "wall", "<= 0.15", "seconds added"),
        difference_row(what, peer, first, second, "cpu", "<= 0.15", "CPU seconds added"),
        difference_row(what, peer, first, second, "megabytes", "<= 20", "MiB added"),
        difference_row(what, "the bare, empty `import transformers`", bare, second, "cpu", "", "CPU seconds added"),
        Row("hf-layershuffle --help", "", seconds, quartiles([result["wall"] for result in helps]), len(helps),
            unit="seconds", target="<= 0.5", notes="torch is not imported"),
    ]  # fmt: skip
    record("What does importing the package add to importing transformers?", rows, vars(args))


if __name__ == "__main__":
    main()
