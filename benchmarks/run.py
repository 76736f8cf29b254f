"""Runs the benchmarks one after the other, prints all ratios in one table and renders README.md from the records.

make bench                                         # all that need no GPU, about twenty minutes on 2 cores
python benchmarks/run.py --only train_step startup
python benchmarks/run.py --resume                  # leaves out what was recorded at this commit already
python benchmarks/run.py --render                  # measures nothing
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from harness import HEADINGS, RESULTS, Row, cells, environment, print_rows


FOLDER = Path(__file__).parent
SCRIPTS = tuple("startup evaluation early_exit data_path augmentation merging train_step compile swarm".split())
HEADER = """# Speed

Each script here answers one question. Each ratio is to a peer measured in the same run: A and B in turn, A B B A ...
It is the median over the pairs, with the quartiles as spread. *CPU time* is the same ratio of the process's CPU time,
which other work on the machine disturbs less. Tests assert no time. Rendered by `python benchmarks/run.py --render`
from `results/*.json`, which also hold the absolute numbers.

```bash
make bench                       # all that need no GPU, about twenty minutes on 2 cores
python benchmarks/gpu.py         # on a GPU: plain transformers, timm and ours, eager and compiled
```
"""
NO_GPU = "## gpu\n\nNot recorded: no GPU was at hand. `python benchmarks/gpu.py` measures it.\n"


def load_results() -> dict[str, dict]:
    order = {name: index for index, name in enumerate(SCRIPTS)}
    paths = sorted(RESULTS.glob("*.json"), key=lambda path: order.get(path.stem, len(order)))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def rows_of(result: dict) -> list[Row]:
    return [Row(**{name: value for name, value in row.items() if name != "met"}) for row in result["rows"]]


def markdown_table(rows: list[Row]) -> str:
    headings = (*HEADINGS, "absolute numbers, for orientation")
    lines = [" | ".join(headings), " | ".join("---" for _ in headings)]
    lines += [" | ".join([*cells(row), row.notes]) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def render() -> Path:
    """Writes README.md from `results/*.json`."""
    sections = [HEADER]
    for name, result in load_results().items():
        machine = dict(result["environment"])
        where = f"{machine.pop('date')}, commit {machine.pop('commit')}, {machine.pop('machine')}"
        where += "".join(f", {key.replace('_', ' ')} {value}" for key, value in machine.items())
        parts = [f"## {name}", result["question"], f"`{result['command']}`", markdown_table(rows_of(result))]
        parts += [result["notes"]] if result["notes"] else []
        sections.append("\n\n".join([*parts, f"{where}."]) + "\n")
    if "gpu" not in load_results():
        sections.append(NO_GPU)
    path = FOLDER / "README.md"
    path.write_text("\n".join(sections), encoding="utf-8")
    return path


def is_recorded(name: str) -> bool:
    """At this commit, with the default settings."""
    result = load_results().get(name)
    if result is None or result["environment"]["commit"] != environment()["commit"]:
        return False
    return result["command"] == f"python benchmarks/{name}.py"


def run(names: list[str]) -> list[str]:
    """Runs the scripts; returns those that failed."""
    failed = []
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] benchmarks/{name}.py", flush=True)
        start = time.perf_counter()
        code = subprocess.run([sys.executable, FOLDER / f"{name}.py"]).returncode
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
        failed += [name] if code else []
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(SCRIPTS), choices=[*SCRIPTS, "gpu"])
    parser.add_argument("--resume", action="store_true", help="Leave out what was recorded at this commit.")
    parser.add_argument("--render", action="store_true", help="Only write README.md anew.")
    args = parser.parse_args()
    names = [] if args.render else [name for name in args.only if not (args.resume and is_recorded(name))]
    failed = run(names)
    path = render()
    rows = {name: rows_of(result) for name, result in load_results().items()}
    print_rows(rows, title="All ratios")
    missed = [f"{name}: {row.what} ({row.unit})" for name, each in rows.items() for row in each if row.met is False]
    print(f"Written to {path}." + (f" Targets missed: {'; '.join(missed)}." if missed else " All targets are met."))
    if failed:
        sys.exit(f"These failed: {', '.join(failed)}. Run `python benchmarks/run.py --only {' '.join(failed)}`.")


if __name__ == "__main__":
    main()
