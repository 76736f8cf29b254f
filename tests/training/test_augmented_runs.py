"""Runs with each augmentation preset: exact resume, the same for any number of workers and processes, arguments."""

import json
import sys

import pytest
import torch
from conftest import REPOSITORY, run_command
from safetensors.torch import load_file
from support.images import AUGMENTATIONS, augmentation_named, image_dataset, processor
from support.trainers import Stop, arguments

import hf_layershuffle as ls
from hf_layershuffle.data import Augmentation, ImageClassificationDataset
from hf_layershuffle.data.augmentation_settings import AUGMENTATION_PRESETS
from hf_layershuffle.training import session
from hf_layershuffle.training.argument_parser import parse_arguments
from hf_layershuffle.training.augmentation_arguments import (
    AUGMENTATION_ARGUMENTS,
    AugmentationArguments,
    augmentation_of,
)


def images(preset: str) -> ImageClassificationDataset:
    return ImageClassificationDataset(image_dataset(24), processor(), augmentation=augmentation_named(preset), seed=2)


def train(vit, folder, preset, callbacks=(), resume=None, seed=0, **options):
    torch.manual_seed(seed)
    model = vit.classifier(num_labels=2, shuffle_mode="arbitrary", hidden_dropout_prob=0.1)
    settings = {"max_steps": 9, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    args = arguments(folder, **{**settings, **options})
    trainer = ls.LayerShuffleTrainer(model, args, train_dataset=images(preset), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return model


def assert_same_weights(model, other):
    for (name, parameter), expected in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("preset", AUGMENTATIONS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(vit, tmp_path, preset):
    """Stopped within the second of three passes, and gone on with other workers."""
    whole = train(vit, tmp_path / "whole", preset)
    train(vit, tmp_path / "parts", preset, callbacks=[Stop(5)])
    checkpoint = str(tmp_path / "parts" / "checkpoint-5")
    resumed = train(vit, tmp_path / "parts", preset, resume=checkpoint, seed=9, dataloader_num_workers=2)
    assert_same_weights(resumed, whole)


def test_presets_train_differently(vit, tmp_path):
    weights = {name: next(train(vit, tmp_path, name, max_steps=3).parameters()) for name in AUGMENTATION_PRESETS}
    names = list(weights)
    for index, name in enumerate(names):
        assert not any(weights[name].equal(weights[other]) for other in names[:index]), name


@pytest.mark.slow
def test_two_processes_see_the_images_of_one(tmp_path):
    script = REPOSITORY / "tests" / "support" / "augmentation_checks.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = run_command([*torchrun, script])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("passed") == 2


# --- Arguments ---


def augmentation(*argv) -> Augmentation:
    return augmentation_of(parse_arguments(list(argv))[1])


def test_the_default_is_light_and_single_options_win_over_a_preset():
    assert augmentation() == Augmentation.from_preset("light") == Augmentation()
    for name in AUGMENTATION_PRESETS:
        assert augmentation("--augmentation", name) == Augmentation.from_preset(name)
    given = augmentation(
        *("--augmentation", "cifar", "--crop_padding", "2", "--horizontal_flip", "False", "--random_erasing", "0"),
        *("--augmentation_policy", "none", "--mixup_alpha", "0", "--cutmix_alpha", "0.5"),
    )
    assert given == Augmentation.from_preset(
        "cifar", crop_padding=2, horizontal_flip=False, random_erasing=0.0, policy=None, mixup_alpha=0.0,
        cutmix_alpha=0.5,
    )  # fmt: skip
    given = augmentation(
        *("--resized_crop_scale", "0.3", "1", "--augmentation_policy", "randaugment"),
        *("--augmentation_operations", "3", "--augmentation_magnitude", "5", "--mixing_probability", "0.5"),
    )
    assert given.resolved((32, 32), is_colour=True) == Augmentation(
        crop_padding=0, horizontal_flip=True, resized_crop_scale=(0.3, 1.0), policy="randaugment", num_operations=3,
        magnitude=5.0, mixing_probability=0.5,
    )  # fmt: skip


def test_a_preset_brings_label_smoothing_unless_it_is_given():
    def smoothing(*argv):
        return parse_arguments(list(argv))[2].label_smoothing_factor

    assert smoothing() == smoothing("--augmentation", "imagenet") == 0
    assert smoothing("--augmentation", "cifar") == smoothing("--augmentation", "deit") == 0.1
    assert smoothing("--augmentation", "cifar", "--label_smoothing_factor", "0") == 0
    assert smoothing("--augmentation", "deit", "--preset", "order-free") == 0.1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--augmentation strong", "`augmentation` is 'strong'; choose from none, light, cifar, imagenet, deit"),
        (
            "--augmentation_policy auto",
            "`augmentation_policy` is 'auto'; choose from none, randaugment, randaugment_plain_vit, trivialaugment",
        ),
        ("--augmentation_magnitude 5", "`augmentation_magnitude` is 5.0 without a policy; leave it out, or add"),
        (
            "--augmentation deit --augmentation_policy trivialaugment --augmentation_operations 2",
            "`augmentation_operations` is 2 with trivialaugment, which says itself how many operations",
        ),
        (
            "--augmentation_policy corruptions --augmentation_magnitude 2",
            "`augmentation_magnitude` is 2.0 with corruptions, which says itself how many operations",
        ),
        (
            "--augmentation cifar --augmentation_magnitude 11",
            "`augmentation_magnitude` is 11.0; it must be at most 10",
        ),
        ("--random_erasing 2", "`random_erasing` is 2.0; it must be at most 1"),
        ("--resized_crop_scale 0.5", r"`resized_crop_scale` is \(0.5,\); it must be two numbers"),
        ("--task text-classification --mixup_alpha 0.2", "There is no option --mixup_alpha"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_before_anything_is_read(argv, message):
    with pytest.raises(ValueError, match=message):
        session.run(argv.split())


SMALL = """
    --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --per_device_train_batch_size 8
    --max_train_samples 32 --max_eval_samples 40 --max_steps 6 --save_steps 3 --eval_strategy no --final_eval_orders 8
    --use_cpu --disable_tqdm True --report_to none
""".split()


def test_the_command_trains_with_a_preset_goes_on_and_refuses_another_one(tmp_path):
    command = [*SMALL, "--augmentation", "deit", "--output_dir"]
    session.run([*command, str(tmp_path / "whole")])
    session.run([*command, str(tmp_path / "again"), "--resume_from_checkpoint", str(tmp_path / "whole/checkpoint-3")])
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(tensor.equal(again[name]) for name, tensor in whole.items())
    recorded = json.loads((tmp_path / "whole" / ".train_run.json").read_text())
    assert recorded["augmentation"] == "deit" and recorded["label_smoothing_factor"] == 0.1
    assert set(AUGMENTATION_ARGUMENTS) <= set(recorded)
    assert json.loads((tmp_path / "whole" / "training.json").read_text())["arguments"]["augmentation"] == "deit"
    for changed, message in (
        (["--augmentation", "light"], "`augmentation` 'deit', and this one has 'light'"),
        (["--augmentation", "deit", "--mixup_alpha", "0.1"], "`mixup_alpha` None, and this one has 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            session.run([*SMALL, *changed, "--output_dir", str(tmp_path / "whole")])


def test_every_argument_is_a_field_of_the_dataclass():
    assert set(AUGMENTATION_ARGUMENTS) == set(vars(AugmentationArguments()))
