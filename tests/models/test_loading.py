import json
import re
import shutil
import sys

import pytest
import torch
import transformers
from conftest import TINY, Architecture, of_both_architectures, run_python
from safetensors.torch import load_file, save_file
from support.models import TRAVELLING_FILES
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    BertConfig,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    RobertaConfig,
    ViTImageProcessor,
)

import hf_layershuffle as ls


NEW_MODULES = ("depth_embedding", "depth_projection", "position_head")


@pytest.fixture
def plain_folder(architecture, tmp_path):
    """What transformers' own class saves: the tensor names of the checkpoints on the Hub."""
    folder = tmp_path / "plain"
    architecture.plain_classifier(seed=3).save_pretrained(folder)
    assert f"{architecture.name}.encoder.layer.0.attention.attention.query.weight" in load_file(
        folder / "model.safetensors"
    )
    return folder


def with_new_names(folder, architecture):
    """The same checkpoint with the names that the modules have in transformers 5."""
    shutil.copytree(folder, folder.with_name("new"))
    model = architecture.plain_classifier_class.from_pretrained(folder)
    save_file(model.state_dict(), folder.with_name("new") / "model.safetensors", metadata={"format": "pt"})
    return folder.with_name("new")


@of_both_architectures
@pytest.mark.parametrize("names", ["old", "new"])
@pytest.mark.parametrize(
    "flags", [{}, {"shuffle_mode": "arbitrary", "depth_embedding": True, "position_predictor": True}]
)
def test_a_plain_checkpoint_loads_completely(architecture, plain_folder, batch, names, flags):
    folder = plain_folder if names == "old" else with_new_names(plain_folder, architecture)
    plain = architecture.plain_classifier_class.from_pretrained(plain_folder).eval()
    model, info = architecture.classifier_class.from_pretrained(folder, output_loading_info=True, **flags)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(any(module in key for module in NEW_MODULES) for key in info["missing_keys"])
    assert bool(info["missing_keys"]) == bool(flags)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in plain.state_dict().items())
    # a fresh depth path changes no logit
    assert torch.equal(model.eval()(batch["pixel_values"]).logits, plain(batch["pixel_values"]).logits)
    assert model.config.shuffle_mode == flags.get("shuffle_mode", "none")
    assert model.config.model_type == f"layershuffle_{architecture.name}"


@of_both_architectures
def test_the_base_model_loads_from_a_plain_classifier(architecture, plain_folder, batch):
    plain = architecture.plain_model_class.from_pretrained(plain_folder, add_pooling_layer=False).eval()
    model = architecture.model_class.from_pretrained(plain_folder, add_pooling_layer=False).eval()
    expected = plain(batch["pixel_values"]).last_hidden_state
    assert torch.equal(model(batch["pixel_values"]).last_hidden_state, expected)


@pytest.fixture
def saved_folder(architecture, tmp_path):
    folder = tmp_path / "saved"
    model = architecture.classifier(seed=2, shuffle_mode="arbitrary", depth_embedding=True, position_predictor=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    torch.save(model.eval()(**example(), execution_order=[3, 0, 1]).logits, folder / "expected.pt")
    return folder


def example():
    return {"pixel_values": torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)}


def test_a_saved_folder_holds_safetensors_and_the_code_files_only(saved_folder):
    assert {path.name for path in saved_folder.iterdir()} == {
        *TRAVELLING_FILES,
        "config.json",
        "expected.pt",
        "model.safetensors",
        "preprocessor_config.json",
    }
    auto_map = json.loads((saved_folder / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}


@of_both_architectures
def test_auto_classes_give_what_was_saved(architecture, saved_folder):
    assert type(AutoConfig.from_pretrained(saved_folder)) is architecture.config_class
    assert type(AutoModel.from_pretrained(saved_folder)) is architecture.model_class
    model = AutoModelForImageClassification.from_pretrained(saved_folder).eval()
    assert type(model) is architecture.classifier_class
    stored = load_file(saved_folder / "model.safetensors")
    assert sorted(map(float, (t.sum() for t in stored.values()))) == sorted(
        float(tensor.sum()) for tensor in model.state_dict().values()
    )
    # Not bit for bit: weights at other addresses may take another path through the vector instructions
    expected = torch.load(saved_folder / "expected.pt")
    torch.testing.assert_close(model(**example(), execution_order=[3, 0, 1]).logits, expected)


@of_both_architectures
def test_saving_a_base_model_serves_both_auto_classes(architecture, tmp_path):
    model = architecture.model_class(architecture.config(depth_embedding=True))
    model.save_pretrained(tmp_path)
    assert "AutoModelForImageClassification" in json.loads((tmp_path / "config.json").read_text())["auto_map"]
    loaded = AutoModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


FRESH_PROCESS = """
import sys, torch
if sys.argv[2] == "package":
    import hf_layershuffle
    remote = {}
else:
    sys.modules["hf_layershuffle"] = None  # not installed
    remote = {"trust_remote_code": True}
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline

folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder, **remote)
assert config.shuffle_mode == "arbitrary", config
base, info = AutoModel.from_pretrained(folder, output_loading_info=True, **remote)
assert info["unexpected_keys"] == {"classifier.weight", "classifier.bias"}, info
assert all(key.startswith("pooler.") for key in info["missing_keys"]), info
model = AutoModelForImageClassification.from_pretrained(folder, **remote).eval()
images = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)
torch.testing.assert_close(model(images, execution_order=[3, 0, 1]).logits, torch.load(folder + "/expected.pt"))
classify = pipeline("image-classification", model=folder, **remote)
predictions = classify(Image.new("RGB", (20, 20), "red"), top_k=2)
assert len(predictions) == 2 and predictions[0]["label"].startswith("LABEL_"), predictions
model.save_pretrained(folder + "/again")  # a copy saved from there works as well
again = AutoModelForImageClassification.from_pretrained(folder + "/again", **remote).eval()
torch.testing.assert_close(again(images, execution_order=[3, 0, 1]).logits, torch.load(folder + "/expected.pt"))
assert AutoModel.from_pretrained(folder + "/again", **remote).layers
module = type(model).__module__
assert module.startswith("hf_layershuffle" if sys.argv[2] == "package" else "transformers_modules"), module
"""


@pytest.mark.parametrize("how", ["package", "remote code"])
def test_a_saved_folder_works_in_a_fresh_process(saved_folder, tmp_path, how):
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = run_python(FRESH_PROCESS, saved_folder, how, environment=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("fraction", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint_is_an_error(vit, saved_folder, fraction):
    path = saved_folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises((ValueError, OSError), match="truncated or corrupted"):
        AutoModelForImageClassification.from_pretrained(saved_folder)


def test_a_corrupted_header_is_an_error(vit, saved_folder):
    path = saved_folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"x" * 32
    path.write_bytes(content)
    with pytest.raises(OSError, match="truncated or corrupted"):
        vit.classifier_class.from_pretrained(saved_folder)


def test_a_folder_without_weights_is_an_error(vit, saved_folder):
    (saved_folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        vit.classifier_class.from_pretrained(saved_folder)


LOST = {
    "a layer": r"^\w+\.layers\.2\.",
    "one tensor": r"layers\.0\.layernorm_before\.bias$",
    "the embeddings": r"embeddings\.position_embeddings$",
    "the final norm": r"^\w+\.layernorm\.weight$",
    "the whole encoder": r"^(?!classifier)(?!.*(depth_|position_head))",
    "the depth path of one layer": r"layers\.1\.depth_projection\.dense",
    "half of a position head": r"layers\.3\.position_head\.norm\.bias",
    "half of the head": r"^classifier\.bias",
}


@pytest.mark.parametrize("pattern", LOST.values(), ids=LOST)
def test_a_checkpoint_that_lost_tensors_is_refused(vit, saved_folder, pattern):
    path = saved_folder / "model.safetensors"
    tensors = load_file(path)
    lost = [name for name in tensors if re.search(pattern, name)]
    assert lost
    save_file({name: tensor for name, tensor in tensors.items() if name not in lost}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks tensors of this model: .*{re.escape(min(lost))}"):
        AutoModelForImageClassification.from_pretrained(saved_folder)


@pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
def test_a_depth_that_was_edited_upwards_is_refused(vit, plain_folder, ignore_mismatched_sizes):
    config = json.loads((plain_folder / "config.json").read_text())
    (plain_folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    load = vit.classifier_class.from_pretrained
    with pytest.raises(
        ValueError, match=r"lacks tensors .*layers\.4\..* and 29 more.*`num_hidden_layers` \(6\) is more"
    ):
        load(plain_folder, ignore_mismatched_sizes=ignore_mismatched_sizes)
    assert len(load(plain_folder, num_hidden_layers=4).base_model.layers) == 4


def test_what_is_new_by_request_may_be_missing(vit, tmp_path):
    base = vit.model_class(vit.config(), add_pooling_layer=False)
    base.save_pretrained(tmp_path)
    flags = {"depth_embedding": True, "position_predictor": True, "num_labels": 3}
    model = vit.classifier_class.from_pretrained(tmp_path, **flags)  # a new head too
    assert torch.equal(model.base_model.layers[3].mlp.fc2.weight, base.layers[3].mlp.fc2.weight)
    masked = vit.model_class.from_pretrained(tmp_path, use_mask_token=True)  # and a pooler
    assert torch.equal(masked.layers[3].mlp.fc2.weight, base.layers[3].mlp.fc2.weight)
    model.save_pretrained(tmp_path / "head")
    again = vit.classifier_class.from_pretrained(tmp_path / "head", num_labels=7, ignore_mismatched_sizes=True)
    assert again.classifier.out_features == 7


def test_a_predictor_for_another_depth_is_refused(vit, saved_folder):
    with pytest.raises(ValueError, match=r"position_head.dense.weight is \(4, 32\) there and \(3, 32\) here"):
        vit.classifier_class.from_pretrained(saved_folder, num_hidden_layers=3)
    model = vit.classifier_class.from_pretrained(saved_folder, num_hidden_layers=3, ignore_mismatched_sizes=True)
    assert len(model.base_model.layers) == 3


def test_another_number_of_classes_is_refused_unless_asked_for(vit, plain_folder):
    with pytest.raises(ValueError, match=r"classifier.weight is \(5, 32\) there and \(7, 32\) here"):
        vit.classifier_class.from_pretrained(plain_folder, num_labels=7)
    model = vit.classifier_class.from_pretrained(plain_folder, num_labels=7, ignore_mismatched_sizes=True)
    assert model.classifier.out_features == 7


def test_the_wrong_architecture_is_refused_instead_of_a_random_encoder(tmp_path):
    Architecture("vit").plain_classifier().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="holds a model of type 'vit', whose weights LayerShuffleDeiTConfig cannot read"
    ):
        ls.LayerShuffleDeiTForImageClassification.from_pretrained(tmp_path)


def test_bad_flags_are_refused_when_loading(vit, plain_folder):
    with pytest.raises(ValueError, match="`shuffle_mode` is 'random'"):
        vit.classifier_class.from_pretrained(plain_folder, shuffle_mode="random")


@of_both_architectures
def test_importing_the_package_leaves_plain_models_alone(plain_folder, architecture):
    assert "hf_layershuffle" in sys.modules
    model = AutoModelForImageClassification.from_pretrained(plain_folder)
    assert type(model) is architecture.plain_classifier_class


TEXTS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 50,
}
IMAGES = {"image_size": 16, "patch_size": 4}
# Plain class: its configuration, and the Auto classes that take it beside those that every folder serves
OF_OTHER_TASKS = {
    "BertForMaskedLM": (BertConfig, TEXTS, ["AutoModelForMaskedLM"]),
    "RobertaForMaskedLM": (RobertaConfig, TEXTS, ["AutoModelForPreTraining", "AutoModelForMaskedLM"]),
    "BertForTokenClassification": (BertConfig, TEXTS, ["AutoModelForTokenClassification"]),
    "DeiTForImageClassificationWithTeacher": (DeiTConfig, TINY, ["AutoModelForImageClassification"]),
}


@pytest.mark.parametrize("name", OF_OTHER_TASKS)
def test_models_of_other_tasks_are_loaded_by_the_auto_classes_that_take_them(tmp_path, name):
    config_class, values, auto_classes = OF_OTHER_TASKS[name]
    model = ls.free_order(getattr(transformers, name)(config_class(**values)))
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    for auto_class in auto_classes:
        assert auto_map[auto_class] == f"modeling_layershuffle.LayerShuffle{name}"
        assert type(getattr(transformers, auto_class).from_pretrained(tmp_path)) is type(model)
    assert auto_map["AutoModel"].startswith("modeling_layershuffle.LayerShuffle") and name not in auto_map["AutoModel"]


@pytest.mark.parametrize(
    "name, encoder, config_class",
    [
        ("CLIPVisionModelWithProjection", "CLIPVisionModel", CLIPVisionConfig),
        ("Dinov2Backbone", "Dinov2Model", Dinov2Config),
    ],
)
def test_the_code_lies_beside_models_that_no_auto_class_takes(tmp_path, name, encoder, config_class):
    sizes = {key: value for key, value in TEXTS.items() if key != "vocab_size"} | IMAGES
    ls.free_order(getattr(transformers, name)(config_class(**sizes))).save_pretrained(tmp_path)
    assert TRAVELLING_FILES <= {path.name for path in tmp_path.iterdir()}
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == f"modeling_layershuffle.LayerShuffle{encoder}"
    assert ("AutoBackbone" in auto_map) == (name == "Dinov2Backbone")
