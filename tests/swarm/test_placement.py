"""Which worker holds which layers."""

from collections import Counter

import pytest

from hf_layershuffle.swarm.placement import check_plan, layers_for_new_worker, place_evenly, rebalanced, unheld


@pytest.mark.parametrize("layers", [1, 3, 6, 12])
@pytest.mark.parametrize("workers", [1, 3, 4, 12])
@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_copies_stand_on_different_workers_and_all_hold_as_many(layers, workers, replicas):
    if replicas > workers or workers > layers * replicas:
        return
    held = place_evenly(range(layers), workers, replicas)
    assert len(held) == workers
    counts = Counter(layer for own in held.values() for layer in own)
    assert counts == dict.fromkeys(range(layers), replicas)
    assert all(len(set(own)) == len(own) for own in held.values())
    sizes = [len(own) for own in held.values()]
    assert max(sizes) - min(sizes) <= 1


def test_copies_go_in_a_ring():
    held = place_evenly(range(4), 4, 2)
    assert held == {"worker-0": (0, 3), "worker-1": (0, 1), "worker-2": (1, 2), "worker-3": (2, 3)}


@pytest.mark.parametrize(
    ("workers", "replicas", "message"),
    [
        (2, 3, "`replicas` is 3, more than the 2 `workers`.*Take at most 2 replicas"),
        (7, 1, "`workers` is 7, but there are 6 layers in 1 replica.*at most 6 workers"),
        (0, 1, "`workers` is 0; it must be an integer of at least 1"),
        (2, 0, "`replicas` is 0; it must be"),
        (2.5, 1, "`workers` is 2.5"),
    ],
)
def test_numbers_that_cannot_be_are_refused(workers, replicas, message):
    with pytest.raises(ValueError, match=message):
        place_evenly(range(6), workers, replicas)


def test_a_plan_names_workers_or_counts_them():
    assert check_plan({"big": [2, 0], "small": (1,)}, range(3)) == {"big": (0, 2), "small": (1,)}
    assert check_plan([[0, 1], [1, 2]], range(3)) == {"worker-0": (0, 1), "worker-1": (1, 2)}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([[0, 1]], r"gives layers \[2\] to no worker"),
        ([[0, 1, 2], []], r"`placement` of 'worker-1' is \[\]; it must be a list of at least one layer"),
        ([[0, 1, 2], [3]], r"holds 3; the layers that run are \[0, 1, 2\]"),
        ([[0, 1, 2], [-1]], "holds -1; the layers"),
        ([[0, 1, 2], [True]], "holds True; the layers"),
        ([[0, 1, 2], ["0"]], "holds '0'; the layers"),
        ([[0, 0, 1, 2]], "holds layer 0 2 times"),
        ({1: [0, 1, 2]}, "names a worker 1; names must be texts"),
        ("012", "`placement` is '012'; pass the layers of each worker"),
    ],
)
def test_plans_that_cannot_be_are_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        check_plan(plan, range(3))


def test_layers_of_nobody_go_to_those_who_hold_least_and_little_is_moved():
    held = {"a": (0, 1, 2), "b": (3,), "c": (4,)}
    assert unheld(held, range(7)) == [5, 6]
    assert rebalanced(held, range(7), even=False) == {"a": (0, 1, 2), "b": (3, 5), "c": (4, 6)}
    assert rebalanced({"a": (0, 1, 2, 3), "b": ()}, range(4)) == {"a": (0, 1), "b": (2, 3)}
    even = {"a": (0, 1), "b": (1, 2), "c": (0, 2)}
    assert rebalanced(even, range(3)) == even
    with pytest.raises(ValueError, match="no worker that could hold the layers; add one"):
        rebalanced({}, range(3))


@pytest.mark.parametrize("seed", range(20))
def test_after_rebalancing_each_layer_is_held_and_no_copy_is_lost(seed):
    import random

    rng = random.Random(seed)
    workers = rng.randint(1, 5)
    held = {f"w{i}": tuple(sorted(rng.sample(range(8), rng.randint(0, 8)))) for i in range(workers)}
    after = rebalanced(held, range(8))
    assert not unheld(after, range(8))
    before = Counter(layer for own in held.values() for layer in own)
    now = Counter(layer for own in after.values() for layer in own)
    assert all(now[layer] == max(1, before[layer]) for layer in range(8))
    sizes = [len(own) for own in after.values()]
    assert max(sizes) - min(sizes) <= 1


def test_a_new_worker_takes_what_is_missing_and_then_what_is_rarest():
    assert layers_for_new_worker({"a": (0, 1), "b": (2,)}, range(5)) == (3, 4)
    assert layers_for_new_worker({"a": (0, 1, 2, 3), "b": (2, 3)}, range(4)) == (0, 1)
    assert layers_for_new_worker({}, range(3)) == (0, 1, 2)
