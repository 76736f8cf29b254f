"""What is drawn for images, and the values that are allowed."""

import numpy as np
import pytest
import torch

from hf_layershuffle.data import Augmentation
from hf_layershuffle.data.augmentation_settings import AUGMENTATION_PRESETS, ImageDraws
from hf_layershuffle.data.operation_policies import OPERATIONS, POLICIES, chosen_operations
from hf_layershuffle.data.random_boxes import beta, mixing_draws


MANY = np.arange(20000)
SHAPE = (3, 32, 32)


def draw(seed=0, epoch=0, indices=MANY, shape=SHAPE, **settings) -> dict[str, torch.Tensor]:
    return Augmentation(**settings).draw(seed, epoch, np.asarray(indices), shape)


# --- The same numbers for an image, in whatever batch ---


@pytest.mark.parametrize("preset", AUGMENTATION_PRESETS)
def test_draws_are_a_function_of_seed_epoch_and_index(preset):
    augmentation = Augmentation.from_preset(preset)
    whole = augmentation.draw(3, 2, np.arange(40), SHAPE)
    part = augmentation.draw(3, 2, np.array([31, 7]), SHAPE)
    assert part.keys() == whole.keys()
    for name, values in part.items():
        assert values.equal(whole[name][[31, 7]]), name
    for seed, epoch in ((4, 2), (3, 3)):
        other = augmentation.draw(seed, epoch, np.arange(40), SHAPE)
        for name in whole.keys() & {"crop_columns", "operations", "magnitudes", "erased", "mixing"}:
            assert not whole[name].equal(other[name]), name


def test_a_preset_draws_only_what_it_does():
    keys = {name: set(Augmentation.from_preset(name).draw(0, 0, np.arange(4), SHAPE)) for name in AUGMENTATION_PRESETS}
    crop, policy, mixing = {"crop_rows", "crop_columns"}, {"operations", "magnitudes"}, {"mixing", "mixing_boxes"}
    assert keys == {
        "none": set(),
        "light": crop,
        "cifar": crop | policy | mixing | {"erased"},
        "imagenet": crop | policy | mixing,
        "deit": crop | policy | mixing | {"erased"},
    }


@pytest.mark.parametrize("preset", AUGMENTATION_PRESETS)
def test_settings_are_described_by_the_nearest_preset(preset):
    assert Augmentation.from_preset(preset).resolved((32, 32), is_colour=True).describe() == preset


def test_what_differs_from_a_preset_is_described():
    assert Augmentation.from_preset("cifar", random_erasing=0.1).describe() == "cifar, random_erasing=0.1"
    described = Augmentation(policy="trivialaugment", num_operations=1).describe()
    assert described == "light, num_operations=1, policy=trivialaugment"


# --- Crops ---


def test_what_is_not_said_of_crops_and_mirrors_is_told_by_the_images():
    settings = Augmentation()
    assert settings.resolved((32, 40), is_colour=True) == Augmentation(crop_padding=4, horizontal_flip=True)
    assert settings.resolved((15, 15), is_colour=False) == Augmentation(crop_padding=0, horizontal_flip=False)
    given = Augmentation(crop_padding=3, horizontal_flip=False)
    assert given.resolved((32, 32), is_colour=True) == given
    resized = Augmentation(resized_crop_scale=(0.5, 1.0))  # a random crop already
    assert resized.resolved((32, 32), is_colour=True).crop_padding == 0
    both = Augmentation(resized_crop_scale=(0.5, 1.0), crop_padding=3)
    assert both.resolved((32, 32), is_colour=True).crop_padding == 3


def test_crops_lie_anywhere_within_the_padding_and_half_are_mirrored():
    batch = draw(crop_padding=2, horizontal_flip=True)
    is_mirrored = batch["crop_columns"][:, 0] > batch["crop_columns"][:, 1]
    assert is_mirrored.float().mean() == pytest.approx(0.5, abs=0.02)
    shares = batch["crop_rows"][:, 0].unique(return_counts=True)
    assert shares[0].tolist() == [-2, -1, 0, 1, 2]
    assert shares[1].div(len(MANY)).tolist() == pytest.approx([0.2] * 5, abs=0.02)


def test_resized_crops_have_the_areas_and_shapes_that_were_asked_for_and_lie_inside():
    settings = Augmentation(resized_crop_scale=(0.08, 1.0))
    sizes = np.broadcast_to([375, 500], (len(MANY), 2))
    top, left, height, width = settings.crop_boxes(0, 0, MANY, sizes).T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 375).all() and (left + width <= 500).all()
    area, ratio = height * width / (375 * 500), width / height
    assert area.min() == pytest.approx(0.08, abs=0.01) and area.max() > 0.97 and 0.4 < area.mean() < 0.54
    assert ratio.min() > 0.74 and ratio.max() < 1.35  # sides are rounded to whole pixels
    assert np.log(ratio[area < 0.3]).mean() == pytest.approx(0, abs=0.02)  # larger ones fit a wide image if wide


def test_an_image_that_no_crop_fits_gives_its_middle():
    settings = Augmentation(resized_crop_scale=(0.9, 1.0))
    boxes = settings.crop_boxes(0, 0, np.arange(3), np.array([[10, 1000], [1000, 10], [10, 10]]))
    assert boxes[0].tolist() == [0, 493, 10, 13]  # 4 to 3
    assert boxes[1].tolist() == [493, 0, 13, 10]
    assert (boxes[2, 2:] >= 9).all()


def test_without_a_resized_crop_the_whole_image_is_taken():
    boxes = Augmentation().crop_boxes(0, 0, np.arange(2), np.array([[5, 6], [7, 8]]))
    assert boxes.tolist() == [[0, 0, 5, 6], [0, 0, 7, 8]]


# --- Operations ---


def test_operations_of_a_policy_are_equally_frequent_and_as_strong_as_it_says():
    batch = draw(policy="randaugment", num_operations=1, magnitude=9)
    codes, magnitudes = batch["operations"][:, 0], batch["magnitudes"][:, 0]
    expected = {  # magnitude 9 of 10
        "rotate": 27, "posterize": 1, "solarize": 26, "solarize_add": 99, "color": 0.81, "contrast": 0.81,
        "brightness": 0.81, "sharpness": 0.81, "shear_x": 0.27, "shear_y": 0.27, "translate_x": 0.405 * 32,
        "translate_y": 0.405 * 32, "auto_contrast": 0, "equalize": 0, "invert": 0,
    }  # fmt: skip
    assert set(expected) == set(POLICIES["randaugment"])
    for name, value in expected.items():
        of_name = magnitudes[codes == OPERATIONS.index(name)]
        assert len(of_name) / len(MANY) == pytest.approx(1 / 15, abs=0.01), name
        assert of_name.abs().numpy() == pytest.approx(value, rel=1e-5), name
        if POLICIES["randaugment"][name].has_sign:
            assert (of_name < 0).float().mean() == pytest.approx(0.5, abs=0.06), name
        else:
            assert (of_name >= 0).all(), name


def test_the_preset_of_plain_vits_leaves_images_bright_and_upright():
    """The highest level of its source is 4 bits, no solarisation, and factors of 1.9 only. Lower ones are weaker."""
    preset = Augmentation.from_preset("imagenet")
    assert preset.resized_crop_scale == (0.05, 1.0) and preset.mixup_alpha == 0.2 and preset.num_operations == 2
    expected = {
        "rotate": 30, "posterize": 4, "solarize": 256, "solarize_add": 110, "color": 0.9, "contrast": 0.9,
        "brightness": 0.9, "sharpness": 0.9, "shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.45 * 32,
        "translate_y": 0.45 * 32, "auto_contrast": 0, "equalize": 0, "invert": 0,
    }  # fmt: skip
    signed = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
    for magnitude in (10, 5, 0):
        batch = Augmentation.from_preset("imagenet", magnitude=magnitude).draw(0, 0, MANY, SHAPE)
        codes, magnitudes = batch["operations"].flatten(), batch["magnitudes"].flatten()
        assert {OPERATIONS[code] for code in codes.unique()} == set(expected)
        for name, strongest in expected.items():
            weakest = {"posterize": 8, "solarize": 256}.get(name, 0)
            value = weakest + (strongest - weakest) * magnitude / 10
            of_name = magnitudes[codes == OPERATIONS.index(name)]
            assert of_name.abs().numpy() == pytest.approx(value, rel=1e-5), name
            assert (of_name < 0).any() == (name in signed and magnitude > 0), name


@pytest.mark.parametrize("preset", AUGMENTATION_PRESETS)
def test_trivialaugment_is_one_operation_always(preset):
    """Whatever RandAugment would do in its place."""
    settings = Augmentation.from_preset(preset, policy="trivialaugment")
    batch = settings.draw(0, 0, MANY, SHAPE)
    assert batch["operations"].shape == batch["magnitudes"].shape == (len(MANY), 1)
    shares = batch["operations"].flatten().bincount(minlength=len(OPERATIONS)) / len(MANY)
    for name, share in zip(OPERATIONS, shares):
        assert share == pytest.approx((name in POLICIES["trivialaugment"]) / 14, abs=0.01), name


def test_trivialaugment_draws_strengths_over_the_whole_range():
    batch = draw(policy="trivialaugment")
    codes, magnitudes = batch["operations"][:, 0], batch["magnitudes"][:, 0]
    assert {OPERATIONS[code] for code in codes.unique()} == set(POLICIES["trivialaugment"])
    angles = magnitudes[codes == OPERATIONS.index("rotate")]
    assert angles.unique().tolist() == pytest.approx([135 / 30 * level for level in range(-30, 31)], abs=1e-4)
    bits = magnitudes[codes == OPERATIONS.index("posterize")]
    assert set(bits.tolist()) == {2, 3, 4, 5, 6, 7, 8}


def test_translations_go_by_the_side_along_which_they_move():
    places = np.array([names.index("translate_x") + 0.5 for names in [list(POLICIES["randaugment"])]]) / 15
    for place, expected in ((places, 0.45 * 80), (places + 1 / 15, 0.45 * 40)):
        _, magnitudes = chosen_operations("randaugment", place, np.ones(1), np.ones(1), (3, 40, 80))
        assert magnitudes == pytest.approx(expected)


def test_grey_images_get_no_operation_on_colours():
    codes = draw(policy="randaugment", shape=(1, 28, 28))["operations"]
    assert OPERATIONS.index("color") not in codes and len(codes.unique()) == 14


def test_the_magnitude_spreads_and_operations_are_left_out_as_often_as_asked():
    batch = draw(policy="randaugment", magnitude=5, magnitude_std=0.5, operation_probability=0.25)
    assert (batch["operations"] != 0).float().mean() == pytest.approx(0.25, abs=0.01)
    angles = batch["magnitudes"][batch["operations"] == OPERATIONS.index("rotate")].abs() / 3
    assert angles.mean() == pytest.approx(5, abs=0.1) and angles.std() == pytest.approx(0.5, abs=0.05)


# --- Erasing and mixing ---


def test_boxes_are_erased_as_often_and_as_large_as_published():
    boxes = draw(random_erasing=0.25, shape=(3, 64, 64))["erased"]
    is_erased = boxes[:, 2] > 0
    assert is_erased.float().mean() == pytest.approx(0.25, abs=0.02)
    top, left, height, width = boxes[is_erased].T
    assert (top + height).max() <= 64 and (left + width).max() <= 64
    area = height * width / 64**2
    assert 0.015 < area.min() < 0.03 and 0.3 < area.max() < 0.36


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.8, 1.0, 5.0, 1000.0])
def test_weights_follow_the_beta_distribution(alpha):
    weights = beta(ImageDraws(0, 0, np.arange(50000)), "mixup", alpha)
    variance = 1 / (4 * (2 * alpha + 1))
    assert weights.min() >= 0 and weights.max() <= 1
    assert weights.mean() == pytest.approx(0.5, abs=4 * (variance / 50000) ** 0.5)
    assert weights.var() == pytest.approx(variance, rel=0.03)


def test_half_of_the_mixtures_are_boxes_and_their_weight_is_what_is_left_of_the_image():
    batch = draw(mixup_alpha=0.8, cutmix_alpha=1.0, mixing_probability=0.5)
    weights, boxes = batch["mixing"], batch["mixing_boxes"]
    is_cut = boxes[:, 2] > 0
    assert is_cut.float().mean() == pytest.approx(0.25, abs=0.02)
    assert (weights == 1).float().mean() == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(weights[is_cut], 1 - (boxes[:, 2] * boxes[:, 3])[is_cut].float() / 32**2)
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 32 and boxes.min() >= 0


def test_one_kind_of_mixture_is_all_there_is_of_one():
    def draws(purpose, count):
        return ImageDraws(0, 0, MANY)(purpose, count)

    weights, boxes = mixing_draws(draws, 0.8, 0, 0.5, 1, (32, 32))
    assert not boxes.any() and (weights < 1).all()
    weights, boxes = mixing_draws(draws, 0, 1.0, 0.5, 1, (32, 32))
    assert ((boxes[:, 2] > 0) == (weights < 1)).all() and (weights < 1).mean() > 0.95


# --- Values ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_padding": -1}, "`crop_padding` is -1; it must be an integer of at least 0"),
        ({"horizontal_flip": "yes"}, "`horizontal_flip` is 'yes'; it must be True, False or None"),
        ({"resized_crop_scale": (0, 1)}, r"`resized_crop_scale` is \(0, 1\); it must be two rising numbers above 0"),
        ({"resized_crop_scale": 0.5}, "`resized_crop_scale` is 0.5; it must be two numbers"),
        ({"resized_crop_ratio": (2, 1)}, "two rising numbers above 0, and at most 100"),
        ({"policy": ["randaugment"]}, r"`policy` is \['randaugment'\]; choose from randaugment, "),
        (
            {"policy": "autoaugment"},
            "`policy` is 'autoaugment'; choose from .*, corruptions, .*, or None",
        ),
        ({"num_operations": 0}, "`num_operations` is 0; it must be an integer of at least 1"),
        ({"num_operations": 9}, "`num_operations` is 9; it must be a number from 1 to 8"),
        ({"magnitude": 11}, "`magnitude` is 11; it must be a number from 0 to 10"),
        ({"random_erasing": 1.5}, "`random_erasing` is 1.5; it must be a number from 0 to 1"),
        ({"mixup_alpha": -0.1}, "`mixup_alpha` is -0.1; it must be a number from 0 to 1000"),
        ({"cutmix_alpha": float("nan")}, "`cutmix_alpha` is nan"),
        ({"mixing_probability": True}, "`mixing_probability` is True"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="`erasing` is no field of an augmentation; choose from crop_padding, "):
        Augmentation.from_preset("deit", erasing=0.1)
    with pytest.raises(ValueError, match="`augmentation` is 'strong'; choose from none, light, cifar, imagenet, deit"):
        Augmentation.from_preset("strong")


# --- Corruptions ---


def test_corruptions_leave_a_quarter_of_the_images_alone_and_draw_strengths_up_to_the_strongest():
    batch = draw(policy="corruptions", shape=(3, 112, 140))
    codes, magnitudes = batch["operations"][:, 0], batch["magnitudes"][:, 0]
    strongest = {"identity": 0, "blur": 2, "noise": 51, "contrast": -0.7}
    for name, value in strongest.items():
        of_name = magnitudes[codes == OPERATIONS.index(name)]
        assert len(of_name) / len(MANY) == pytest.approx(0.25, abs=0.01), name
        assert of_name.mean() == pytest.approx(value / 2, rel=0.03), name
        assert of_name.abs().max() == pytest.approx(abs(value), rel=1e-5), name
    seeds = batch["noise_seeds"]
    assert len(seeds.unique()) == len(MANY) and seeds.dtype == torch.int64
    again = draw(policy="corruptions", indices=[5, 3])["noise_seeds"]
    assert again.equal(seeds[[5, 3]]) and not draw(policy="corruptions", epoch=1)["noise_seeds"].equal(seeds)


@pytest.mark.parametrize(
    ("name", "shape", "operation", "magnitude"),
    [
        ("blur", (1, 8, 8), "blur", 1),  # pixels
        ("blur", (3, 224, 300), "blur", 4),
        ("noise", SHAPE, "noise", 51),
        ("low_contrast", SHAPE, "contrast", -0.7),
    ],
)
def test_each_corruption_in_full_strength(name, shape, operation, magnitude):
    batch = draw(policy=name, shape=shape, indices=range(50))
    assert (batch["operations"] == OPERATIONS.index(operation)).all()
    assert batch["magnitudes"].numpy() == pytest.approx(magnitude)


def test_only_policies_with_noise_draw_seeds():
    assert "noise_seeds" not in draw(policy="trivialaugment", indices=[0])
