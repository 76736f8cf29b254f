"""The README and the pages of docs/: their commands run as they stand, one after the other; links lead somewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "docs/train.md", "docs/measure.md", "docs/merge.md", "docs/publish.md"]
# Each command does what it says, on less: the pages show the sizes that are worth it
LESS = {
    "train": "--max_steps 4 --final_eval_orders 8 --eval_strategy no",
    "evaluate": "--num_orders 2 --num_subsets 1 --max_samples 40 --overwrite",
    "analyze": "--max_samples 40",
    "prune": "",
    "merge": "",
    "publish": "",
}
SCRIPT = f"""set -euo pipefail
hf-layershuffle() {{
    local less=""
    case "$1" in {" ".join(f'{name}) less="{more}";;' for name, more in LESS.items())} esac
    "{sys.executable}" -m hf_layershuffle_cli "$@" $less
}}
"""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (REPOSITORY / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with what a clone of the repository has and the pages name."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(REPOSITORY / "model_cards", folder / "model_cards")
    return folder


def run(clone, script: str) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(["bash", "-c", script], cwd=clone, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{script}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def test_the_commands_of_all_pages_run_one_after_the_other(clone):
    commands = [block for page in PAGES for block in blocks(page, "bash")]
    assert len(commands) > 8
    output = run(clone, SCRIPT + "\n".join(commands))
    for line in ("Saved to outputs/digits", "Saved to outputs/robustness", "Saved to outputs/soup"):
        assert line in output


def test_the_first_example_prints_what_the_readme_says():
    page = (REPOSITORY / "README.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", page, re.DOTALL).groups()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == printed


@pytest.mark.parametrize("page", PAGES[1:])
def test_the_python_of_a_page_runs(clone, page):
    for code in blocks(page, "python"):
        code = code.replace("num_train_epochs=5", "max_steps=2").replace("num_orders=8", "num_orders=1")
        run(clone, f"exec '{sys.executable}' - <<'END_OF_PYTHON'\n{code}\nEND_OF_PYTHON")


@pytest.mark.parametrize("path", [*PAGES, "docs/results.md", "docs/reliability.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(path):
    page = REPOSITORY / path
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{path} links to {target}"


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 120
