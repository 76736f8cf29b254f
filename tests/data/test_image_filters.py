import math

import numpy as np
import pytest
import torch
from support.filters import blur

from hf_layershuffle.data.draws import _GOLDEN, _mix
from hf_layershuffle.data.image_filters import _mixed, blurred, noisy
from hf_layershuffle.data.image_operations import apply_operations
from hf_layershuffle.data.operation_policies import OPERATIONS


GREY = torch.full((3, 2, 120, 100), 128.0)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_is_blurred_by_its_own_gaussian(channels):
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 26, channels), dtype=np.uint8)
    stds = torch.tensor([0.0, 0.6, 1.4])
    result = blurred(torch.from_numpy(images).permute(0, 3, 1, 2).float(), stds, 1.4).permute(0, 2, 3, 1).numpy()
    assert (result[0] == images[0]).all()
    for image, std, mine in zip(images[1:], stds[1:].tolist(), result[1:]):
        assert np.abs(mine - blur(image, std)).max() <= 1  # that one ends at three standard deviations of its own


def test_a_blurred_edge_is_continued_and_an_image_smaller_than_the_kernel_is_blurred():
    flat = torch.full((1, 1, 4, 5), 77.0)
    torch.testing.assert_close(blurred(flat, torch.tensor([3.0]), 3.0), flat, atol=1e-4, rtol=0)


def test_noise_is_normal_and_of_the_strength_of_its_image():
    noise = noisy(GREY, torch.tensor([5.0, 20.0, 0.0]), torch.tensor([7, 8, 9])) - 128
    assert (noise[2] == 0).all()
    for values, std in zip(noise, (5.0, 20.0)):
        values = values.flatten() / std
        count = values.numel()
        assert abs(values.mean()) < 4 / math.sqrt(count) and abs(values.std() - 1) < 4 / math.sqrt(2 * count)
        for limit, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):  # of a normal distribution
            assert (values.abs() < limit).float().mean() == pytest.approx(share, abs=0.01)
        neighbours = torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]
        assert abs(neighbours) < 4 / math.sqrt(count)


def test_noise_is_a_function_of_the_seed_and_is_cut_at_black_and_white():
    strong = torch.full((3,), 200.0)
    one = noisy(GREY, strong, torch.tensor([7, 8, 7]))
    assert one[0].equal(one[2]) and not one[0].equal(one[1])
    assert one.min() == 0 and one.max() == 255
    assert noisy(GREY[:1], strong[:1], torch.tensor([8]))[0].equal(one[1])
    assert not one[0, 0].equal(one[0, 1])  # channels differ


def test_bits_are_those_of_the_draws():
    values = np.arange(5, dtype=np.uint64) * _GOLDEN
    assert (
        _mixed(torch.from_numpy(values.astype(np.int64))).numpy().astype(np.uint64).tolist() == _mix(values).tolist()
    )


def test_noise_without_seeds_is_refused():
    code, strength = torch.tensor([[OPERATIONS.index("noise")]]), torch.tensor([[20.0]])
    with pytest.raises(ValueError, match="`noise_seeds` is None; pass a seed for each image"):
        apply_operations(GREY[:1].clone(), code, strength, torch.zeros(1, 2))
