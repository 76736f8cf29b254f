"""What an import brings along, and what it does not. Times are measured by benchmarks/startup.py, not here."""

import pytest
from conftest import run_python

import hf_layershuffle as ls


# Each takes tenths of a second or more to import, and loading a model needs none of them
HEAVY = ("accelerate", "datasets", "evaluate", "matplotlib", "pandas", "pydantic", "ray", "scipy", "sklearn", "umap")


def modules_after(code: str) -> set[str]:
    result = run_python(f"{code}\nimport sys\nprint(' '.join(sys.modules))", fresh=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split())


def test_importing_the_package_imports_nothing_heavy_that_transformers_does_not():
    plain = modules_after("from transformers import AutoModelForImageClassification, DeiTModel, ViTModel")
    ours = modules_after("import hf_layershuffle")
    assert "hf_layershuffle.models.modeling_layershuffle" in ours
    assert not (ours - plain) & set(HEAVY)
    assert not any(name.startswith("transformers.trainer") for name in ours - plain)


def test_the_auto_classes_know_the_models_after_the_import_alone():
    code = """
import hf_layershuffle
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
for name in ("layershuffle_vit", "layershuffle_deit"):
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    config = AutoConfig.for_model(name, **sizes, image_size=8, patch_size=4)
    for auto in (AutoModel, AutoModelForImageClassification):
        print(type(auto.from_config(config)).__name__)
"""
    result = run_python(code)
    assert result.stdout.split() == [
        "LayerShuffleViTModel",
        "LayerShuffleViTForImageClassification",
        "LayerShuffleDeiTModel",
        "LayerShuffleDeiTForImageClassification",
    ], result.stderr


def test_help_imports_neither_torch_nor_the_package():
    code = """
import sys
import hf_layershuffle_cli
sys.argv = ["hf-layershuffle", "--help"]
try:
    hf_layershuffle_cli.main()
except SystemExit as stop:
    assert not stop.code
"""
    modules = modules_after(code)
    assert "typer" in modules
    assert not modules & {"torch", "transformers", "numpy", "hf_layershuffle", *HEAVY}


def test_every_public_name_is_there_and_listed():
    assert sorted(ls.__all__) == ls.__all__
    assert set(ls.__all__) <= set(dir(ls))
    assert all(getattr(ls, name) is not None for name in ls.__all__)
    with pytest.raises(AttributeError, match="module 'hf_layershuffle' has no attribute 'no_such_name'"):
        _ = ls.no_such_name


def test_a_class_of_no_family_is_no_attribute():
    with pytest.raises(AttributeError, match="`LayerShuffle<Class>` is made of the class <Class> of transformers"):
        _ = ls.LayerShuffleNoSuchModel
