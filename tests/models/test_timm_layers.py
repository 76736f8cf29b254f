"""timm's vision transformers in free order: the same model with its blocks physically rebuilt, bit for bit."""

import copy
import json

import pytest
import torch
from support.images import random_images
from support.models import randomize
from support.timm_without_torchvision import use_timm
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    pipeline,
)

import hf_layershuffle as ls
from hf_layershuffle.checkpoints.image_processors import timm_image_processor
from hf_layershuffle.checkpoints.image_size import image_size_of, with_image_size
from hf_layershuffle.deployment.plain_vit import to_plain_vit
from hf_layershuffle.layerwise import LayerwiseClassifier
from hf_layershuffle.training import session


SIZES = dict(img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=4)
# Blocks in a Sequential, but for BEiT and EVA-02, whose list is a ModuleList
ARCHITECTURES = {
    "vit": "vit_tiny_patch16_224",
    "deit": "deit_tiny_distilled_patch16_224",
    "dinov2": "vit_small_patch14_reg4_dinov2",
    "siglip": "vit_base_patch16_siglip_224",
    "beit": "beit_base_patch16_224",
    "eva02": "eva02_tiny_patch14_224",
}
EXTRAS = {"depth_embedding": True, "position_predictor": True}
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 3, 1])
of_all = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture(autouse=True)
def timm(monkeypatch):
    return use_timm(monkeypatch)


def plain(name: str, **kwargs) -> TimmWrapperForImageClassification:
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=ARCHITECTURES[name], model_args={**SIZES, **kwargs}, num_labels=5)
    return randomize(TimmWrapperForImageClassification(config)).eval()


def free(name: str, **flags):
    return ls.free_order(plain(name), **flags).eval()


def rebuilt(name: str, order: list[int]):
    model = plain(name)
    blocks = list(model.timm_model.blocks.children())
    blocks = [blocks[index] for index in order]
    is_sequential = isinstance(model.timm_model.blocks, nn.Sequential)
    model.timm_model.blocks = nn.Sequential(*blocks) if is_sequential else nn.ModuleList(blocks)
    return model


def gradients(model, order=None, reentrant: bool | None = None) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(IMAGES, labels=LABELS, **({} if order is None else {"execution_order": order})).loss.backward()
    if reentrant is not None:
        model.gradient_checkpointing_disable()
    model.eval()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@of_all
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1], [3, 1], [0, 1, 1, 2, 3, 3]])
def test_an_order_is_the_rebuilt_model_with_its_hidden_states(name, order):
    model, expected = free(name), rebuilt(name, order)
    with torch.no_grad():
        outputs = model(IMAGES, execution_order=order)
        assert torch.equal(outputs.logits, expected(IMAGES).logits) and outputs.execution_order.tolist() == order
        outputs, wanted = (
            each(IMAGES, output_hidden_states=True, **kwargs)
            for each, kwargs in (
                (model, {"execution_order": order}),
                (expected, {}),
            )
        )
        assert torch.equal(outputs.logits, wanted.logits) and len(outputs.hidden_states) == len(order)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs.hidden_states, wanted.hidden_states))
        assert torch.equal(model(IMAGES).logits, plain(name)(IMAGES).logits)  # and plain again afterwards


@of_all
def test_gradients_are_the_rebuilt_models_and_checkpointing_changes_none(name):
    order = [2, 0, 3, 1]
    ours, expected = gradients(free(name), order), gradients(rebuilt(name, order))
    assert len(ours) == len(expected)
    for key, gradient in expected.items():
        if ".blocks." in key:
            position = key.split(".")[2]
            key = key.replace(f"blocks.{position}.", f"blocks.{order[int(position)]}.", 1)
        assert torch.equal(ours[key], gradient), key


@of_all
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_the_gradients_of_positions_too(name, reentrant):
    model = free(name, **EXTRAS)
    order = [3, 1, 0, 2]
    expected, found = gradients(model, order), gradients(model, order, reentrant)
    assert found.keys() == expected.keys() and any("position_head" in key for key in found)
    for key, gradient in expected.items():
        # Recomputed, BEiT's attention with a bias that learns is another kernel of PyTorch
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5)
    assert found["timm_model.depth_embedding.weight"].abs().sum() >= 0
    assert all(found[f"timm_model.blocks.{layer}.position_head.dense.weight"].abs().sum() > 0 for layer in order)


def test_timms_own_checkpointing_is_refused_since_it_passes_the_program_by():
    model = free("vit").train()
    model.timm_model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="took no layer by iterating its list of layers"):
        model(IMAGES, execution_order=[1, 0])


def test_checkpointing_that_was_enabled_before_the_layers_were_free_goes_on():
    expected = gradients(free("vit"), [3, 1])
    model = plain("vit")
    model.gradient_checkpointing_enable()
    model = ls.free_order(model)
    assert model.free_layers.checkpoint is not None
    found = gradients(model, [3, 1])
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@of_all
@torch.no_grad()
def test_saved_pruned_and_plain_again(name, tmp_path):
    model = free(name, shuffle_mode="arbitrary", **EXTRAS)
    model.save_pretrained(tmp_path / "own")
    order = [1, 3, 0]
    expected = model(IMAGES, execution_order=order)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "own").eval()
    outputs = loaded(IMAGES, execution_order=order)
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.position_logits, expected.position_logits)
    assert type(AutoModel.from_pretrained(tmp_path / "own")).__name__ == "LayerShuffleTimmWrapperModel"
    ls.prune_layers(free(name), [2, 0]).save_pretrained(tmp_path / "pruned")
    pruned = ls.load_classifier(str(tmp_path / "pruned")).eval()
    assert pruned.config.num_hidden_layers == pruned.config.model_args["depth"] == 2
    assert torch.equal(pruned(IMAGES).logits, free(name)(IMAGES, execution_order=[2, 0]).logits)
    to_plain_vit(free(name), [1, 1, 3]).save_pretrained(tmp_path / "plain")
    again = TimmWrapperForImageClassification.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(again(IMAGES).logits, rebuilt(name, [1, 1, 3])(IMAGES).logits)
    parts = LayerwiseClassifier(free(name))
    hidden_states = parts.embed(IMAGES)
    for position, index in enumerate(order):
        hidden_states, _ = parts.run_layer(hidden_states, index, position)
    assert torch.equal(parts.classify(hidden_states), free(name)(IMAGES, execution_order=order).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "dinov2", "beit", "eva02"])
def test_another_image_size_is_timms_own_resizing(name):
    resized = with_image_size(free(name), 24)
    expected = plain(name)
    expected.timm_model.set_input_size(img_size=(24, 24))
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(resized(images).logits, expected(images).logits)
    assert image_size_of(resized.config) == resized.config.model_args["img_size"] == 24


@pytest.mark.parametrize(
    "architecture, found",
    [
        ("swin_tiny_patch4_window7_224", "4 lists of layers"),
        ("resnet10t", "4 lists of layers"),
        ("convnext_atto", "4 lists of layers"),
        ("efficientnet_b0", "2 lists of layers"),
    ],
)
def test_families_of_stages_are_refused_by_name(architecture, found):
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=architecture, num_labels=2))
    message = (
        rf"TimmWrapperForImageClassification \('{architecture}'\) has {found}.*Take another encoder, such as a ViT"
    )
    with pytest.raises(ValueError, match=message):
        ls.free_order(model)
    assert type(model) is TimmWrapperForImageClassification


# --- timm's checkpoints, and training ---


RUN = """
    --per_device_train_batch_size 8 --max_train_samples 32 --max_eval_samples 20 --max_steps 2 --eval_strategy no
    --save_strategy no --final_eval_orders 8 --use_cpu --disable_tqdm True --report_to none
""".split()


@pytest.fixture
def checkpoint(timm, tmp_path):
    """As timm publishes its models: no transformers model type, tensors by timm's names."""
    model = randomize(timm.create_model(ARCHITECTURES["vit"], num_classes=10, **SIZES)).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 16, 16), "crop_pct": 0.8}
    timm.models.save_for_hf(model, tmp_path / "timm", model_args=SIZES, safe_serialization=True)
    return tmp_path / "timm", model


@torch.no_grad()
def test_a_checkpoint_of_timm_loads_and_is_fine_tuned(checkpoint, tmp_path):
    folder, model = checkpoint
    assert torch.equal(ls.load_classifier(str(folder)).eval()(IMAGES).logits, model(IMAGES))
    with torch.enable_grad():
        arguments = ["--ignore_mismatched_sizes", "--image_size", "24", "--preset", "order-free"]
        session.run([*RUN, "--model_name_or_path", str(folder), *arguments, "--output_dir", str(tmp_path / "run")])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model_type"] == "layershuffle_timm_wrapper" and config["image_size"] == 24
    assert "pretrained_cfg" not in config and config["model_args"]["depth"] == 4
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")  # without timm's, which needs torchvision
    assert type(processor).__name__.startswith("BitImageProcessor")
    assert (processor.size.shortest_edge, processor.crop_size.height) == (30, 24)
    assert len(pipeline("image-classification", str(tmp_path / "run"))(random_images(1, (40, 30))[0])) == 5


def test_one_of_timms_models_from_scratch_and_the_commands_after_it(tmp_path):
    from conftest import run_cli

    run = tmp_path / "run"
    sizes = ["--hidden_size", "16", "--num_hidden_layers", "3", "--num_attention_heads", "2", "--depth_embedding"]
    session.run(
        [
            *RUN,
            "--architecture",
            "timm/vit_tiny_patch16_224",
            *sizes,
            "--preset",
            "order-free",
            "--output_dir",
            str(run),
        ]
    )
    model = ls.load_classifier(str(run)).eval()
    with torch.no_grad():
        assert model(torch.ones(1, 3, 8, 8), execution_order=[2, 0, 1]).execution_order.tolist() == [2, 0, 1]
    data = ["--dataset_name", "digits", "--max_samples", "20", "--device", "cpu", "--num_orders", "8"]
    for arguments in (
        ["prune", run, "--keep", "0,2", "--output_dir", tmp_path / "pruned"],
        ["merge", run, run, "--random", "1", "--output_dir", tmp_path / "merged"],
        ["evaluate", tmp_path / "pruned", tmp_path / "merged", *data, "--output_dir", tmp_path / "robustness"],
        ["publish", run, "--repo_id", "org/timm", "--dry_run"],
    ):
        result = run_cli(*arguments)
        assert result.returncode == 0, result.stderr
    assert len(ls.load_classifier(str(tmp_path / "pruned")).free_layers) == 2


def test_without_timm_the_command_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_layershuffle.training.model_building.is_timm_available", lambda: False)
    with pytest.raises(ImportError, match="`architecture` is 'timm/resnet18', which needs timm and torchvision"):
        session.run([*RUN, "--architecture", "timm/resnet18", "--output_dir", str(tmp_path / "run")])


def test_a_fresh_model_begins_as_the_recipe_says():
    config = ls.LayerShuffleTimmWrapperConfig(
        architecture=ARCHITECTURES["vit"], model_args=SIZES, residual_init_scale=0.0, **EXTRAS
    )
    model = ls.LayerShuffleTimmWrapperForImageClassification(config).eval()
    with torch.no_grad():
        logits = [model(IMAGES, execution_order=order).logits for order in ([0, 1, 2, 3], [3, 0])]
    assert torch.equal(*logits) and logits[0].abs().sum() > 0
    assert copy.deepcopy(model.config).hidden_size == 32
    assert timm_image_processor({}).crop_size.height == 224
