"""Heaps whose outdated entries do not pile up."""

import random

from hf_layershuffle.swarm.heap import FEW, Heap


def test_it_gives_the_least_that_is_current():
    gone = {1, 3}
    heap = Heap(lambda entry: entry[0] not in gone)
    for number in (5, 3, 1, 2, 4):
        heap.push((number,))
    given = []
    while (entry := heap.first()) is not None:
        heap.pop()
        given.append(entry[0])
        gone.add(4)
    assert given == [2, 5] and len(heap) == 0


def test_outdated_entries_that_nobody_asks_for_do_not_pile_up():
    gone, rng = set(), random.Random(0)
    heap = Heap(lambda entry: entry[0] not in gone)
    for number in range(10_000):
        heap.push((number,))
        if number >= 100:
            gone.add(number - 100)  # one hundred are current
    assert len(heap) <= max(FEW, 2 * 101)
    assert heap.first() == (9900,)
    for number in rng.sample(range(9900, 10_000), 99):
        gone.add(number)
    assert heap.first() == (min(set(range(9900, 10_000)) - gone),)
