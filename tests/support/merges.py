"""Small models to merge, and what came of it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTImageProcessor

from hf_layershuffle.hub.merged_folder import merge
from hf_layershuffle.merging.plan import MergePlan


FLAGS = {"shuffle_mode": "arbitrary", "depth_embedding": True, "position_predictor": True}


def save(model, folder: Path, **kwargs) -> str:
    """With noise on everything, so that no tensor is a constant that two models share."""
    generator = torch.Generator().manual_seed(len(folder.name) + ord(folder.name[-1]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    model.save_pretrained(folder, **kwargs)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


def stored_tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def merged(plan: MergePlan, folder, **kwargs):
    """Merges, and loads as a user does: nothing may be missing or left over."""
    merge(plan, folder, progress=False, **kwargs)
    model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def in_place(source: str, num_layers: int = 4, **kwargs) -> MergePlan:
    layers = [{"source": "a", "layer": index} for index in range(num_layers)]
    return MergePlan(**{"sources": {"a": source}, "layers": layers, **kwargs})


def assert_refused(plan, tmp_path, match, error=ValueError, **kwargs):
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(error, match=match):
        merge(plan, tmp_path / "results" / "out", progress=False, **kwargs)
    assert sorted(path for path in tmp_path.rglob("*")) == before
