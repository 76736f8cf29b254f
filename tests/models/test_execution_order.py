import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from hf_layershuffle.models.execution_order import (
    ExecutionOrderStream,
    arbitrary_execution_orders,
    check_execution_order,
    draw_execution_order,
)


@pytest.mark.parametrize(
    "order", [[2, 0, 1], (2, 0, 1), torch.tensor([2, 0, 1]), np.array([2, 0, 1]), [np.int64(2), torch.tensor(0), 1]]
)
def test_valid_orders_become_integers(order):
    checked = check_execution_order(order, 3)
    assert checked == [2, 0, 1]
    assert all(type(index) is int for index in checked)


@pytest.mark.parametrize("order", [[0], [1, 1, 1], [0, 1, 2, 2, 1, 0, 0]])
def test_repeats_and_subsets_are_valid(order):
    assert check_execution_order(order, 3) == order


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([], "is empty; pass a non-empty list of integers from 0 to 2"),
        (torch.tensor([], dtype=torch.long), "is empty"),
        ([0, 3], "holds 3 at position 1; layer indices are integers from 0 to 2"),
        ([-1], "holds -1 at position 0"),
        ([0, 1.0], r"holds 1.0 \(float\) at position 1"),
        ([True, 0], r"holds True \(bool\) at position 0"),
        ([np.bool_(True)], "at position 0"),
        ([torch.tensor(True)], "at position 0"),
        (torch.tensor([True, False]), "holds True"),
        (torch.tensor([0.0, 1.0]), "holds 0.0"),
        ([None], "holds None"),
        (["0"], "holds '0'"),
        ([[0, 1]], r"holds \[0, 1\]"),
        (torch.tensor([[0, 1]]), r"has shape \(1, 2\)"),
        (torch.tensor(1), r"has shape \(\)"),
        (np.zeros((2, 2), int), r"has shape \(2, 2\)"),
        (1, r"is 1 \(int\)"),
        ("forwards", "is 'forwards'.*'sequential', 'arbitrary'"),
        ({0, 1}, "set"),
    ],
)
def test_invalid_orders_say_what_is_wrong(order, message):
    with pytest.raises(ValueError, match=message):
        check_execution_order(order, 3)


def draw_many(count, num_layers, **kwargs):
    rng = np.random.default_rng(0)
    return [tuple(draw_execution_order(num_layers, rng, **kwargs)) for _ in range(count)]


def test_arbitrary_orders_are_uniform():
    counts = Counter(draw_many(10_000, 4))
    observed = [counts[order] for order in itertools.permutations(range(4))]
    assert chisquare(observed).pvalue > 0.01


@pytest.mark.parametrize(("num_layers", "window"), [(5, 1), (5, 2), (6, 3)])
def test_window_orders_are_uniform_among_those_that_stay_in_the_window(num_layers, window):
    allowed = [
        order
        for order in itertools.permutations(range(num_layers))
        if all(abs(position - index) <= window for position, index in enumerate(order))
    ]
    counts = Counter(draw_many(10_000, num_layers, shuffle_mode="window", shuffle_window=window))
    assert set(counts) <= set(allowed)
    assert chisquare([counts[order] for order in allowed]).pvalue > 0.01


@pytest.mark.parametrize("window", [3, 4])
def test_a_window_over_the_whole_depth_is_arbitrary(window):
    counts = Counter(draw_many(10_000, 4, shuffle_mode="window", shuffle_window=window))
    assert chisquare([counts[order] for order in itertools.permutations(range(4))]).pvalue > 0.01


def test_no_shuffling_is_sequential():
    assert set(draw_many(10, 4, shuffle_mode="none")) == {(0, 1, 2, 3)}


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="is 'random'; choose one of 'none', 'arbitrary', 'window'"):
        draw_many(1, 4, shuffle_mode="random")


@pytest.mark.parametrize("shuffle_mode", ["none", "arbitrary"])
def test_layerdrop_leaves_out_the_given_fraction(shuffle_mode):
    orders = draw_many(4_000, 10, shuffle_mode=shuffle_mode, layerdrop=0.2)
    kept = np.array([[index in order for index in range(10)] for order in orders])
    # 4,000 draws: five standard errors of a frequency are 0.032
    assert np.abs(kept.mean(0) - 0.8).max() < 0.032
    assert all(len(set(order)) == len(order) for order in orders)
    if shuffle_mode == "none":
        assert all(list(order) == sorted(order) for order in orders)


@pytest.mark.parametrize("shuffle_mode", ["none", "arbitrary"])
def test_where_layerdrop_would_leave_out_all_layers_any_of_them_stays(shuffle_mode):
    # So near 1 that not one of the 9,000 draws keeps a layer
    counts = Counter(draw_many(3_000, 3, shuffle_mode=shuffle_mode, layerdrop=1 - 1e-12))
    assert set(counts) == {(0,), (1,), (2,)}
    assert chisquare(list(counts.values())).pvalue > 0.01


def test_seeded_orders_are_reproducible_distinct_and_extend_each_other():
    orders = arbitrary_execution_orders(12, 32, seed=3)
    assert orders[:8] == arbitrary_execution_orders(12, 8, seed=3)
    assert len(set(map(tuple, orders))) == 32
    assert orders != arbitrary_execution_orders(12, 32, seed=4)
    assert all(sorted(order) == list(range(12)) for order in orders)


def orders_from(stream, count, training=True):
    return [draw_execution_order(8, stream.next_generator(training)) for _ in range(count)]


def test_a_seeded_stream_depends_on_seed_step_and_forward_only():
    first, second = ExecutionOrderStream(), ExecutionOrderStream()
    first.seek(seed=7, step=3)
    expected = orders_from(first, 4)
    torch.rand(100)  # what else uses random numbers does not matter
    second.seek(seed=7, step=2)
    orders_from(second, 5)
    second.seek(seed=7, step=3)
    orders_from(second, 9, training=False)  # nor do evaluations
    assert orders_from(second, 4) == expected
    assert len(set(map(tuple, expected))) == 4
    for seed, step in ((8, 3), (7, 4)):
        second.seek(seed, step)
        assert orders_from(second, 4) != expected


def test_evaluation_draws_other_orders_than_training():
    stream = ExecutionOrderStream()
    drawn = []
    for training in (True, False):
        stream.seek(seed=7, step=3)
        drawn += orders_from(stream, 10, training)
    assert len(set(map(tuple, drawn))) == 20
    stream.seek(seed=7, step=3)
    assert [orders_from(stream, 1, training)[0] for training in (True, False) * 10] == [
        order for pair in zip(drawn[:10], drawn[10:]) for order in pair
    ]


def test_an_unseeded_stream_follows_torch_manual_seed():
    stream = ExecutionOrderStream()
    torch.manual_seed(0)
    expected = orders_from(stream, 3)
    torch.manual_seed(0)
    assert orders_from(stream, 3) == expected
    assert orders_from(stream, 3) != expected


@pytest.mark.parametrize(("seed", "step"), [(-1, 0), (0, -1), (1.0, 0), (True, 0), (None, 0)])
def test_a_stream_refuses_other_seeds(seed, step):
    with pytest.raises(ValueError, match="pass an integer of at least 0"):
        ExecutionOrderStream().seek(seed, step)
