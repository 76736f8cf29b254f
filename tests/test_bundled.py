"""The model that comes with the package: in the wheel, small, and as good as its card says."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, run_python
from transformers import AutoModelForImageClassification

import hf_layershuffle as ls
from hf_layershuffle.checkpoints.image_processors import load_image_processor
from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.data.datasets import load_image_datasets
from hf_layershuffle.models.execution_order import arbitrary_execution_orders


FOLDER = Path(ls.example_model())
# As a stranger would, with the package as it was installed
FIRST_STEPS = """
import hf_layershuffle as ls
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

print(ls.__file__)
folder = ls.example_model()
model = AutoModelForImageClassification.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder)
for digit in range(10):
    image = Image.open(f"{folder}/examples/{digit}.png").convert("RGB")
    for order in ("sequential", [5, 4, 3, 2, 1, 0]):
        logits = model(**processor(images=image, return_tensors="pt"), execution_order=order).logits
        assert model.config.id2label[logits.argmax(-1).item()] == str(digit), (digit, order)
print(pipeline("image-classification", model=folder)(f"{folder}/examples/3.png", top_k=1)[0]["label"])
"""


def test_it_works_from_the_wheel_alone(tmp_path):
    for name in ("src", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, tmp_path / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "installed")
        packed = {name for name in files.namelist() if "bundled_model/" in name}
    there = {f"hf_layershuffle/bundled_model/{path.relative_to(FOLDER).as_posix()}" for path in FOLDER.rglob("*.*")}
    assert packed == there
    result = run_python(FIRST_STEPS, fresh=True, environment={"PYTHONPATH": str(tmp_path / "installed")})
    assert result.returncode == 0, result.stderr
    where, label = result.stdout.splitlines()
    assert where.startswith(str(tmp_path / "installed")) and label == "3"


def test_it_is_small_and_read_in_float32():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 1e6
    assert not list(FOLDER.rglob("*.py"))
    model = AutoModelForImageClassification.from_pretrained(FOLDER)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    source = load_classifier(str(REPOSITORY / "model_cards" / "vit-digits-layershuffle"))
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.half().float()), f"{name}: run `make model-cards`"


def test_it_is_as_good_as_its_card_says():
    told = re.findall(r"\d\.\d{4}", (FOLDER / "README.md").read_text())
    model, processor = load_classifier(str(FOLDER)).eval(), load_image_processor(FOLDER)
    orders = [list(range(6)), *arbitrary_execution_orders(6, 32, 0)]
    dataset = load_image_datasets("digits")["test"]
    scores = ls.score_execution_orders(model, dataset, orders, image_processor=processor, progress=False)
    sequential, *arbitrary = (score.accuracy for score in scores)
    arbitrary = torch.tensor(arbitrary)
    expected = [sequential, arbitrary.mean().item(), arbitrary.std(correction=0).item()]
    assert [float(number) for number in told] == pytest.approx(expected, abs=1.5 / len(dataset))
