"""The README and the pages of docs/: what they say runs as it stands, one after the other; links lead somewhere."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_layershuffle_cli


REPOSITORY = Path(__file__).resolve().parents[1]
NAMES = ("train", "augment", "data", "fine-tune", "adaptive", "measure", "merge", "publish", "text", "causal", "swarm")
PAGES = ["README.md", *(f"docs/{name}.md" for name in NAMES)]
# The same on less: the pages show the sizes that are worth it
LESS = {
    "train": "--max_steps 4 --max_eval_samples 40 --final_eval_orders 8 --eval_strategy no",
    "evaluate": "--num_orders 2 --num_subsets 1 --max_samples 40 --overwrite",
    "analyze": "--max_samples 40",
    "budget": "--max_eval_samples 40 --max_calibration_samples 40 --num_search_samples 20 --no_time --layers 2",
    "prune --search": "--max_samples 40",
    "merge --evaluate": "--max_samples 40",
}


def blocks(page: str) -> list[tuple[str, str]]:
    """The language and the text of what a page shows; placeholders and outputs are `text` there."""
    text = (REPOSITORY / page).read_text()
    return re.findall(r"^```(bash|python|yaml)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run_command(line: str, monkeypatch) -> None:
    words = shlex.split(line, comments=True)
    assert words[0] == "hf-layershuffle", line
    less = [more for command, more in LESS.items() if all(word in words for word in command.split())]
    monkeypatch.setattr(sys, "argv", [*words, *" ".join(less).split()])
    with pytest.raises(SystemExit) as end:
        hf_layershuffle_cli.main()
    assert end.value.code in (None, 0), line


def run_python(code: str) -> None:
    code = code.replace("num_train_epochs=5", "max_steps=2").replace("num_orders=8", "num_orders=1")
    exec(compile(code, "<page>", "exec"), {"__name__": "__main__"})


def test_what_the_pages_say_runs_one_after_the_other(tmp_path, monkeypatch, quick_pictures):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REPOSITORY / "model_cards", "model_cards")  # as in a clone
    commands = 0
    for page in PAGES:
        for language, text in blocks(page):
            if language == "python":
                run_python(text)
            elif language == "yaml":
                Path("outputs/plan.yaml").write_text(text)
            else:
                for line in text.replace("\\\n", " ").splitlines():
                    if line.strip() and not line.startswith("#"):
                        run_command(line, monkeypatch)
                        commands += 1
    assert commands >= 17
    for folder in ("digits", "robustness", "merged", "soup", "planned", "mine", "mine-robustness", "merged-in-python"):
        assert any(Path("outputs", folder).iterdir())


def test_the_first_example_prints_what_the_readme_says():
    page = (REPOSITORY / "README.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", page, re.DOTALL).groups()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == printed


LINKED = [*PAGES, "docs/results.md", "docs/reliability.md", "docs/encoders.md", "CONTRIBUTING.md", "CHANGELOG.md"]


@pytest.mark.parametrize("path", LINKED)
def test_links_lead_to_files(path):
    page = REPOSITORY / path
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{path} links to {target}"


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 120


def test_each_of_the_25_faults_names_tests_that_exist():
    page, numbers = (REPOSITORY / "docs/reliability.md").read_text(), []
    for row in re.findall(r"^\|(.*)\|$", page, re.MULTILINE):
        *cells, tests = (cell.strip() for cell in row.split(" | "))
        if tests == "test" or set(row) <= set("-| "):
            continue
        numbers += [int(cells[0])] if len(cells) == 3 else []
        file = None
        for name in re.findall(r"`([^`]*)`", tests):
            if name.endswith(".py"):
                (path,) = (REPOSITORY / "tests").rglob(name)
                file = path.read_text()
            else:
                assert f"\ndef {name}(" in file, f"{cells}: {name}"
        assert file is not None, row
    assert numbers == list(range(1, 26))
