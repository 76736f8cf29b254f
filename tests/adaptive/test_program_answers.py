import numpy as np
import pytest
import torch
from support.analysis import digits_batches

import hf_layershuffle as ls
from hf_layershuffle.adaptive.program_answers import (
    ProgramAnswers,
    answers_of_programs,
    features_of,
    programs_by_length,
    shared_beginning,
)
from hf_layershuffle.adaptive.program_oracle import program_oracle
from hf_layershuffle.layerwise import LayerwiseClassifier


PROGRAMS = [[0, 1, 4], [0, 1, 2, 3, 4, 5], [0, 1, 5, 5]]


@pytest.fixture
def model():
    return ls.load_classifier(ls.example_model())


@pytest.fixture(scope="module")
def loader():
    return digits_batches("test", 60, 40)


def table(labels, answers, programs):
    answers = np.array(answers)
    return ProgramAnswers(programs, np.array(labels), answers, np.zeros((len(answers), 1), dtype=np.float32))


@torch.no_grad()
def test_answers_are_those_of_the_model_program_by_program(model, loader):
    found = answers_of_programs(model, loader, PROGRAMS, progress=False)
    for column, program in enumerate(PROGRAMS):
        expected = torch.cat([model(b["pixel_values"], execution_order=program).logits.argmax(-1) for b in loader])
        assert found.answers[:, column].tolist() == expected.tolist()
    assert found.labels.tolist() == torch.cat([batch["labels"] for batch in loader]).tolist()
    assert found.num_layers_run.tolist() == [3, 6, 4]
    assert found.at(np.array([3, 1])).is_right.tolist() == found.is_right[[3, 1]].tolist()


@torch.no_grad()
def test_features_are_of_the_shared_beginning(model, loader):
    found = answers_of_programs(model, loader, PROGRAMS, progress=False)
    images = torch.cat([batch["pixel_values"] for batch in loader])
    after = model(images, execution_order=[0, 1], output_hidden_states=True)
    states = after.hidden_states[2]
    expected = torch.cat((states.mean(1), after.logits), dim=1)
    np.testing.assert_allclose(found.features, expected.numpy(), atol=2e-5)
    parts = LayerwiseClassifier(model)
    assert features_of(parts, parts.embed(images)).shape == (60, 64 + 10)


def test_shared_layers_run_once(model, loader, monkeypatch):
    runs = []
    original = LayerwiseClassifier.run_layer

    def counted(self, hidden_states, index, position, **kwargs):
        runs.append(index)
        return original(self, hidden_states, index, position, **kwargs)

    monkeypatch.setattr(LayerwiseClassifier, "run_layer", counted)
    answers_of_programs(model, loader, PROGRAMS, progress=False)
    assert len(runs) == 2 * (2 + 1 + 4 + 2)  # of two batches: what all begin with, and what each adds


def test_sets_of_programs():
    assert programs_by_length(4, 2) == [[0, 1, 2], [0, 1, 2, 3]]
    assert programs_by_length(4, 0) == [[0], [0, 3], [0, 2, 3], [0, 1, 2, 3]]
    assert programs_by_length(6, 1) == [[0, 1], [0, 1, 5], [0, 1, 3, 5], [0, 1, 2, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert [len(each) for each in programs_by_length(12, 2, 6)] == [3, 5, 7, 8, 10, 12]
    assert programs_by_length(6, 2, 1) == [[0, 1, 2, 3, 4, 5]]
    assert shared_beginning([(0, 1, 2), (0, 1), (0, 1, 4)]) == (0, 1) and shared_beginning([(0,), (1,)]) == ()
    for arguments, message in [
        ((4, 4), "`num_shared` is 4; it must be an integer from 0 to 3"),
        ((4, -1), "`num_shared` is -1"),
        ((4, 2, 0), "`num_programs` is 0"),
        ((0,), "`num_layers` is 0; it must be an integer of at least 1"),
        (("6",), "`num_layers` is '6'"),
    ]:
        with pytest.raises(ValueError, match=message):
            programs_by_length(*arguments)


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        ([[0, 1]], "holds 1 programs, 1 different; give two or more"),
        ([[0, 1], [0, 1]], "holds 2 programs, 1 different"),
        ("arbitrary", "'arbitrary'; it must be a list of lists"),
        ([0, 1], "it must be a list of lists"),
        ([[0], [6]], "6"),
    ],
    ids=str,
)
def test_bad_programs(model, loader, programs, message):
    with pytest.raises(ValueError, match=message):
        answers_of_programs(model, loader, programs, progress=False)


def test_outputs_that_are_not_numbers_are_wrong(model, loader):
    with torch.no_grad():
        next(model.free_layers[5].parameters()).fill_(float("nan"))
    found = answers_of_programs(model, loader, PROGRAMS, progress=False)
    assert (found.answers[:, 1:] == -1).all() and found.is_right[:, 0].any()
    oracle = program_oracle(found)
    assert oracle.base_accuracy == oracle.base_accuracy_with_shuffled_labels == 0
    assert oracle.accuracy == pytest.approx(found.is_right[:, 0].mean())


# --- The oracle ---


def test_the_oracle_by_hand():
    """Two programs of one and three layers, four examples."""
    found = program_oracle(table([0, 1, 1, 2], [[0, 0], [1, 0], [0, 1], [0, 0]], ((0,), (0, 1, 2))))
    assert found.base_program == (0, 1, 2) and found.base_accuracy == 0.5
    assert found.accuracy == 0.75 and found.mean_num_layers == (1 + 1 + 3 + 1) / 4
    # Classes 0, 1, 1, 2: {0} is matched by 1/4, {0, 1} by 3/4 twice, {0} by 1/4
    assert found.accuracy_with_shuffled_labels == pytest.approx((0.25 + 0.75 + 0.75 + 0.25) / 4)
    assert found.base_accuracy_with_shuffled_labels == pytest.approx((0.25 + 0.25 + 0.5 + 0.25) / 4)
    # The last program gets 1 and 3 wrong. With the other's label, 1 would be a 2, never answered; 3 a 1, not answered
    assert found.num_wrong == 2 and found.repaired == 0.5 and found.repaired_by_chance == 0.0
    other = program_oracle(table([0, 1, 1, 2], [[0, 0], [1, 0], [0, 1], [0, 0]], ((0,), (0, 1, 2))), [0])
    assert other.base_program == (0,) and other.base_accuracy == 0.5 and other.num_wrong == 2
    with pytest.raises(ValueError, match=r"`base_program` is \[1\]; it must be one of the programs"):
        program_oracle(table([0], [[0, 0]], ((0,), (0, 1))), [1])


def test_chance_explains_programs_that_know_nothing():
    """Answers at random: the oracle repairs many errors, and as many with labels of other examples."""
    rng = np.random.default_rng(0)
    programs = tuple((layer,) for layer in range(6))
    found = program_oracle(table(rng.integers(5, size=3000), rng.integers(5, size=(3000, 6)), programs))
    assert found.base_accuracy == pytest.approx(0.2, abs=0.03)
    assert found.repaired == pytest.approx(1 - 0.8**5, abs=0.04)
    assert found.repaired_by_chance == pytest.approx(found.repaired, abs=0.03)
    assert found.repaired_by_confusion == pytest.approx(found.repaired, abs=0.03)
    assert found.accuracy == pytest.approx(found.accuracy_with_shuffled_labels, abs=0.03)


def test_chance_does_not_explain_programs_that_know():
    """The second program has right what the first has wrong."""
    rng = np.random.default_rng(0)
    labels = rng.integers(5, size=1000)
    wrong = (labels + rng.integers(1, 5, size=1000)) % 5
    found = program_oracle(table(labels, np.stack([wrong, labels], 1), ((0, 1), (0,))))
    assert found.repaired == found.accuracy == 1.0 and found.mean_num_layers == 1.0
    assert found.repaired_by_chance == pytest.approx(0.25, abs=0.05)


def test_confusion_explains_a_second_most_likely_class():
    """Class 1 is always taken for 0, and the other program answers 1 to whatever looks like 0."""
    labels = np.array([1] * 50 + [3] * 50)
    answers = np.array([[0, 1]] * 50 + [[2, 3]] * 50)
    found = program_oracle(table(labels, answers, ((0, 1), (0,))))
    assert found.repaired == 1.0 and found.repaired_by_confusion == 1.0
    assert found.repaired_by_chance == pytest.approx(49 / 99)


def test_an_oracle_without_errors():
    found = program_oracle(table([0, 1], [[0, 0], [1, 1]], ((0,), (0, 1))))
    assert found.num_wrong == 0 and found.repaired is found.repaired_by_chance is found.repaired_by_confusion is None
    assert found.to_dict()["base_program"] == [0, 1]
