"""The families whose layers run in any order: runs the checks of tests/support/encoder_checks.py on each of them and
writes docs/encoders.md.

    python experiments/encoder_table.py                        # or `make encoders`: all, ten minutes on one core
    python experiments/encoder_table.py --only checks refused  # or fsdp2, sweep
    python experiments/encoder_table.py --resume               # goes on after an interruption
    python experiments/encoder_table.py --render               # the page alone, from what is recorded

Records what came out in experiments/records/encoders.json. Prints a line for each model.
"""

import argparse
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_layershuffle.common.files import write_text


REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from encoder_page import page  # noqa: E402
from support.encoder_checks import FAST_CHECKS, SLOW_CHECKS, check_refused, outcome  # noqa: E402
from support.encoder_sweep import classification_classes, sweep  # noqa: E402
from support.encoders import ENCODERS, REFUSED  # noqa: E402


RECORDS = REPOSITORY / "experiments" / "records" / "encoders.json"
PAGE = REPOSITORY / "docs" / "encoders.md"
WORK = REPOSITORY / "outputs" / "encoders"


# --- What a part finds out: {name: result}, given what is found already ---


def checks(found: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """What went wrong in each check but that of FSDP2; None where nothing did."""
    for name in (name for name in ENCODERS if name not in found):
        yield name, {check: outcome(run, ENCODERS[name]) for check, run in (FAST_CHECKS | SLOW_CHECKS).items()}


def fsdp2(found: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """What went wrong under FSDP2, in two processes."""
    names = [name for name in ENCODERS if name not in found]
    if names:
        results = WORK / "fsdp2-of-two-processes.json"
        script = REPOSITORY / "tests" / "support" / "encoder_sharding.py"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        subprocess.run([*torchrun, script, results, *names], check=True, stderr=subprocess.DEVNULL)
        yield from json.loads(results.read_text()).items()


def refused(found: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """The message with which a family is refused; None if it was not."""
    yield from ((encoder.name, outcome(check_refused, encoder)) for encoder in REFUSED)


def swept(found: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """Results of the sweep over transformers' classification classes."""
    yield from ((name, sweep(name)) for name in classification_classes() if name not in found)


PARTS: dict[str, Callable[[dict[str, Any]], Iterable[tuple[str, Any]]]] = {
    "checks": checks,
    "refused": refused,
    "fsdp2": fsdp2,
    "sweep": swept,
}


def run_part(part: str, resume: bool) -> dict[str, Any]:
    """Runs a part, with a file of what was found so far; returns its record."""
    so_far = WORK / f"{part}.json"
    found = json.loads(so_far.read_text()) if resume and so_far.exists() else {}
    for name, result in PARTS[part](found):
        found[name] = result
        write_text(so_far, json.dumps(found))
        wrong = [check for check, reason in result.items() if reason] if part == "checks" else result
        print(f"{part}: {name}: {wrong or 'passed'}", flush=True)
    versions = {name: version(name) for name in ("transformers", "torch", "accelerate")}
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {"date": date, "versions": versions, "found": dict(sorted(found.items()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="Parts to run.")
    parser.add_argument("--resume", action="store_true", help="Keep what an interrupted run found.")
    parser.add_argument("--render", action="store_true", help="Run nothing; write the page.")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    torch._logging.set_logs(dynamo=logging.ERROR)
    torch.set_num_threads(1)
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    for part in () if args.render else args.only:
        records[part] = run_part(part, args.resume)
        write_text(RECORDS, json.dumps(records, indent=1) + "\n")
    write_text(PAGE, page(records))


if __name__ == "__main__":
    main()
