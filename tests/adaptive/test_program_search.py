import itertools

import pytest
from conftest import Architecture
from support.analysis import digits_batches, make_items, randomize

import hf_layershuffle as ls
from hf_layershuffle.adaptive import program_search
from hf_layershuffle.adaptive.program_search import _neighbours, search_program
from hf_layershuffle.evaluation.order_plans import evenly_spaced_layers


@pytest.fixture(scope="module")
def model():
    return ls.load_classifier(ls.example_model())


@pytest.fixture(scope="module")
def loader():
    return digits_batches("train", 120, 120)


def loss_of(model, loader, *programs):
    return [score.loss for score in ls.score_execution_orders(model, loader, programs, progress=False)]


@pytest.mark.parametrize("allow_repeats", [True, False])
def test_two_layers_are_the_best_of_all(model, loader, allow_repeats):
    """A beam as wide as there are programs sees all of them."""
    found = search_program(model, loader, 2, beam_width=36, allow_repeats=allow_repeats, progress=False)
    programs = [p for p in itertools.product(range(6), repeat=2) if allow_repeats or p[0] != p[1]]
    losses = loss_of(model, loader, *programs)
    assert tuple(found) == programs[losses.index(min(losses))]


def test_it_is_never_worse_than_what_it_begins_with(model, loader, monkeypatch):
    """A beam search that went astray, which the other two starts make up for."""
    monkeypatch.setattr(program_search, "_extended", lambda programs, *_: [(*each, 5) for each in programs])
    found = search_program(model, loader, 4, beam_width=2, num_refinements=0, progress=False)
    kept = ls.search_layers(model, loader, 4, progress=False)
    spaced = evenly_spaced_layers(6, 4)
    losses = dict(zip(("kept", "spaced", "astray"), loss_of(model, loader, kept, spaced, [5, 5, 5, 5])))
    assert found == (kept if losses["kept"] <= losses["spaced"] else spaced)
    assert losses["astray"] > min(losses.values())


def test_as_many_layers_as_asked_for(model, loader):
    assert len(search_program(model, loader, 4, beam_width=2, progress=False)) == 4


def test_refinement_only_helps(model, loader):
    rough = search_program(model, loader, 4, beam_width=1, num_refinements=0, progress=False)
    fine = search_program(model, loader, 4, beam_width=1, num_refinements=4, progress=False)
    assert loss_of(model, loader, fine) < loss_of(model, loader, rough)


def test_without_repeats_no_layer_runs_twice(model, loader):
    found = search_program(model, loader, 6, beam_width=2, allow_repeats=False, num_refinements=1, progress=False)
    assert sorted(found) == list(range(6))


def test_neighbours_by_hand():
    assert set(_neighbours((0, 1), 3, True)) == {(1, 1), (2, 1), (0, 0), (0, 2), (1, 0)}
    assert set(_neighbours((0, 1), 3, False)) == {(2, 1), (0, 2), (1, 0)}
    assert set(_neighbours((1, 1), 2, True)) == {(0, 1), (1, 0)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers_run": 0}, "`num_layers_run` is 0"),
        ({"num_layers_run": 7}, "`num_layers_run` is 7; it must be at most 6"),
        ({"num_layers_run": 2.0}, "`num_layers_run` is 2.0"),
        ({"num_layers_run": 2, "beam_width": 0}, "`beam_width` is 0"),
        ({"num_layers_run": 2, "num_refinements": -1}, "`num_refinements` is -1"),
    ],
    ids=str,
)
def test_bad_arguments(model, loader, arguments, message):
    with pytest.raises(ValueError, match=message):
        search_program(model, loader, **arguments)


def test_a_program_is_searched_among_layers_with_their_mlps():
    """The positions of `skipped_mlps` are those of another program."""
    model = randomize(Architecture("vit").classifier()).eval()
    items = make_items(24, seed=1)
    expected = ls.search_program(model, items, 2, progress=False)
    model.config.skipped_mlps = [0, 3]
    assert ls.search_program(model, items, 2, progress=False) == expected and model.config.skipped_mlps == [0, 3]
