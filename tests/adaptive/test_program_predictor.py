import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.analysis import digits_batches, make_items
from support.texts import labelled_texts, text_classifier, tokenizer_of

import hf_layershuffle as ls
from hf_layershuffle.adaptive.policies import Calibration
from hf_layershuffle.adaptive.predictor_training import cost_weight_for, fit
from hf_layershuffle.adaptive.program_answers import ProgramAnswers, answers_of_programs, programs_by_length
from hf_layershuffle.adaptive.program_policies import PredictedPrograms, ShuffledPrograms
from hf_layershuffle.adaptive.program_predictor import FILE_NAME, ProgramPredictor
from hf_layershuffle.checkpoints.identity import weights_digest
from hf_layershuffle.data import as_dataloader
from hf_layershuffle.layerwise import LayerwiseClassifier


PROGRAMS = ((0,), (0, 1, 2))
SETTINGS = {"hidden_size": 8, "num_layers": 3, "weights": "00000000"}


def told_by_the_first_feature(count=400, seed=0):
    """The short program is right where the first of four features is above 0, the long one always."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, 4)).astype(np.float32) * [5, 1, 1, 1] + [3, 0, 0, 0]
    is_easy = features[:, 0] > 3
    answers = np.stack([np.where(is_easy, 1, 0), np.ones(count, dtype=int)], 1)
    return ProgramAnswers(PROGRAMS, np.ones(count, dtype=int), answers, features.astype(np.float32)), is_easy


@pytest.fixture
def model():
    return ls.load_classifier(ls.example_model())


@pytest.fixture(scope="module")
def loader():
    return digits_batches("test", 120, 60)


@pytest.fixture(scope="module")
def predictor(loader):
    model = ls.load_classifier(ls.example_model())
    return ls.train_program_predictor(model, loader, programs_by_length(6, 1), num_steps=60, progress=False)


def test_it_learns_which_examples_are_easy():
    table, _ = told_by_the_first_feature()
    predictor = fit(table, SETTINGS)
    others, is_easy = told_by_the_first_feature(seed=1)
    chosen = predictor.choose(torch.from_numpy(others.features), 0.75)  # taken if its chance is above 1/2
    assert ((chosen == 0).numpy() == is_easy).mean() > 0.95
    assert (predictor.choose(torch.from_numpy(others.features), 0.0) == 1).float().mean() > 0.5
    assert (predictor.choose(torch.from_numpy(others.features), 100.0) == 0).all()


def test_the_choice_by_hand():
    predictor = ProgramPredictor(PROGRAMS, 1, 1, 3, "0")
    chances = torch.tensor([[0.5, 0.9], [0.8, 0.9], [0.7, 0.9]])
    predictor.forward = lambda features: torch.logit(chances)
    # The short one costs a third: it is taken if it is less than 2/3 of the weight likelier to be wrong
    assert predictor.choose(chances, 0.27).tolist() == [1, 0, 1]
    assert predictor.choose(chances, 0.33).tolist() == [1, 0, 0]
    assert predictor.choose(chances, 0.0).tolist() == [1, 1, 1]
    assert predictor.num_layers_run.tolist() == [1, 3]


def test_the_same_seed_gives_the_same_predictor():
    table, _ = told_by_the_first_feature()
    state = torch.random.get_rng_state()
    one, two, other = (fit(table, SETTINGS, num_steps=5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.hidden.weight, two.hidden.weight) and not torch.equal(
        one.hidden.weight, other.hidden.weight
    )
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_cost_weight_for_a_depth():
    table, _ = told_by_the_first_feature()
    predictor = fit(table, SETTINGS)
    for depth in (1.5, 2.0, 2.5, 3.0):
        weight = cost_weight_for(predictor, table.features, depth)
        chosen = predictor.choose(torch.from_numpy(table.features), weight)
        assert predictor.num_layers_run[chosen].float().mean() <= depth
    assert cost_weight_for(predictor, table.features, 3) == pytest.approx(1e-4)
    assert cost_weight_for(predictor, table.features, 0.5) == pytest.approx(10)


@torch.no_grad()
def test_each_example_has_the_logits_of_its_program(model, loader, predictor):
    images = next(iter(loader))["pixel_values"]
    found = predictor.run(model, images, 0.2)
    assert len(found.program_indices.unique()) > 2
    for index, program in enumerate(found.program_indices.tolist()):
        layers = list(predictor.programs[program])
        expected = model(images[index : index + 1], execution_order=layers).logits[0]
        torch.testing.assert_close(found.logits[index], expected, rtol=1e-5, atol=1e-5)
        assert found.num_layers_run[index] == len(layers)
    table = answers_of_programs(model, loader, predictor.programs, progress=False)
    assert torch.equal(predictor.choose(torch.from_numpy(table.features[:60]), 0.2), found.program_indices)


@torch.no_grad()
def test_texts_keep_their_masks():
    """Of texts of several lengths, which are padded."""
    model = text_classifier(num_hidden_layers=4).eval()
    programs = [[0], [0, 3], [2, 1]]
    data = as_dataloader(labelled_texts(24), tokenizer_of(), batch_size=24)
    predictor = ls.train_program_predictor(model, data, programs, num_steps=5, progress=False)
    predictor.forward = lambda features: torch.eye(3)[torch.arange(len(features)) % 3]
    inputs = {name: value for name, value in next(iter(data)).items() if name != "labels"}
    assert not inputs["attention_mask"].all()
    found = predictor.run(model, inputs, 0.0)
    assert found.program_indices.tolist() == [0, 1, 2] * 8
    for index, program in enumerate(found.program_indices.tolist()):
        one = {name: value[index : index + 1] for name, value in inputs.items()}
        expected = model(**one, execution_order=programs[program]).logits[0]
        torch.testing.assert_close(found.logits[index], expected, rtol=1e-5, atol=1e-5)


def test_layers_that_are_not_needed_do_not_run(model, loader, predictor):
    images = next(iter(loader))["pixel_values"]
    parts = LayerwiseClassifier(model)
    predictor.run(parts, images, 0.2)  # the first call finds out what the head needs
    sizes = []
    for layer in model.free_layers.children():
        layer.register_forward_hook(lambda _, args, output: sizes.append(len(args[0])))
    found = predictor.run(parts, images, 0.2)
    assert sum(sizes) == 60 + (found.num_layers_run - 1).sum()


def test_weights_are_compared_once_of_a_plain_model_too(vit, monkeypatch):
    plain = vit.plain_classifier().eval()
    predictor = ls.train_program_predictor(plain, make_items(8), num_steps=2, progress=False)
    compared = []
    monkeypatch.setattr(
        "hf_layershuffle.adaptive.program_predictor.weights_digest",
        lambda model: compared.append(1) or weights_digest(model),
    )
    for _ in range(3):
        predictor.run(plain, make_items(2)[0]["pixel_values"][None])
    assert len(compared) == 1


def test_it_is_of_the_mlps_that_ran_in_training(model, loader, tmp_path):
    model.config.skipped_mlps = [2, 1]
    programs = programs_by_length(6, 1)
    ls.train_program_predictor(model, loader, programs, num_steps=2, progress=False).save_pretrained(tmp_path)
    found = ProgramPredictor.from_pretrained(tmp_path)
    found.check_model(model)
    model.config.skipped_mlps = None
    with pytest.raises(ValueError, match=r"`skipped_mlps` \[1, 2\], and this one has None"):
        found.check_model(model)


def test_a_file_of_an_earlier_version_is_of_all_mlps(predictor, tmp_path):
    path = predictor.save_pretrained(tmp_path)
    header = {"format": 1, **predictor.settings}
    del header["skipped_mlps"]
    save_file(load_file(path), path, metadata={"program_predictor": json.dumps(header)})
    assert ProgramPredictor.from_pretrained(tmp_path).settings == predictor.settings


def test_it_is_saved_and_loaded(model, loader, predictor, tmp_path):
    images = next(iter(loader))["pixel_values"]
    path = predictor.save_pretrained(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [FILE_NAME] and path == tmp_path / FILE_NAME
    for place in (tmp_path, path):
        loaded = ProgramPredictor.from_pretrained(place)
        assert loaded.programs == predictor.programs and loaded.settings == predictor.settings
        assert torch.equal(loaded.run(model, images).logits, predictor.run(model, images).logits)
    assert torch.equal(pickle.loads(pickle.dumps(loaded)).hidden.weight, predictor.hidden.weight)


def test_a_failed_save_leaves_the_earlier_file(predictor, tmp_path, monkeypatch):
    path = predictor.save_pretrained(tmp_path)
    before = path.read_bytes()

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("hf_layershuffle.adaptive.program_predictor.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        predictor.save_pretrained(tmp_path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def rewritten(path, **changes):
    """The file with other settings in its header."""
    predictor = ProgramPredictor.from_pretrained(path)
    header = {"format": 1, **predictor.settings, **changes}
    save_file(load_file(path), path, metadata={"program_predictor": json.dumps(header)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "no program predictor of format 1"),
        ({"programs": [[0]] * 4 + [[9]]}, "does not hold what its header says: `execution_order` holds 9"),
        ({"programs": [[0]] * 5}, "does not hold what its header says: `programs` holds 5 programs, 1 different"),
        (
            {"programs": [[0, 1], [0, 2]]},
            r"`output.bias` is F32 of shape \(5,\), and should be F32 of shape \(2,\)",
        ),
        ({"programs": "abc"}, "`programs`: Input should be a valid list"),
        ({"programs": [[0.5]]}, r"`programs\[0\]\[0\]`: "),
        ({"hidden_size": 10**12}, r"`hidden.bias` is F32 of shape \(64,\), and should be .* \(1000000000000,"),
        ({"hidden_size": 64.0}, "`hidden_size`: "),
        ({"num_features": 0}, "`num_features`: "),
        ({"num_layers": "six"}, "`num_layers`: "),
        ({"num_layers": 6.0}, "`num_layers`: "),
        ({"weights": "\x1b[31mred"}, r"`weights`: .*it is '\\x1b\[31mred'"),
        ({"further": 1}, "`further`: Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_files_of_others(predictor, tmp_path, changes, message):
    path = predictor.save_pretrained(tmp_path)
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=message):
        ProgramPredictor.from_pretrained(tmp_path)


@pytest.mark.parametrize("header", ["[1]", '"text"', "{}", "null"])
def test_headers_of_others(predictor, tmp_path, header):
    path = predictor.save_pretrained(tmp_path)
    save_file(load_file(path), path, metadata={"program_predictor": header})
    with pytest.raises(ValueError, match="no program predictor of format 1"):
        ProgramPredictor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("output.weight", lambda tensor: tensor * torch.nan, "NaN or infinite values in output.weight"),
        ("deviation", torch.zeros_like, "`deviation` holds numbers that are not above 0"),
        ("mean", torch.Tensor.int, "`mean` is I32 of shape .*, and should be F32"),
        ("mean", lambda tensor: tensor.to(torch.complex64), "`mean` is C64 of shape"),
        ("mean", lambda tensor: tensor[:3].clone(), r"`mean` is F32 of shape \(3,\)"),
        ("mean", lambda tensor: None, "`mean` is not there, and should be F32"),
        ("further", lambda tensor: torch.zeros(1), r"`further` is F32 of shape \(1,\), and should be not there"),
    ],
)
def test_tensors_of_others(predictor, tmp_path, name, change, message):
    path = predictor.save_pretrained(tmp_path)
    tensors = load_file(path)
    tensors[name] = change(tensors.get(name))
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, metadata={"program_predictor": json.dumps({"format": 1, **predictor.settings})})
    with pytest.raises(ValueError, match=f"does not hold what its header says: .*{message}"):
        ProgramPredictor.from_pretrained(path)


def test_no_file_asks_for_more_memory_than_it_has(predictor, tmp_path, monkeypatch):
    """A matrix without columns has as many rows as its header likes."""
    path, many = predictor.save_pretrained(tmp_path), 150_000_000
    tensors = {"hidden.weight": torch.zeros(many, 0), "mean": torch.zeros(0), "deviation": torch.ones(0)}
    settings = {"format": 1, **predictor.settings, "hidden_size": many, "num_features": 0}
    for num_features in (0, 1):
        header = json.dumps(settings | {"num_features": num_features})
        save_file(load_file(path) | tensors, path, metadata={"program_predictor": header})
        monkeypatch.setattr(ProgramPredictor, "__init__", lambda *args: pytest.fail("made"))
        with pytest.raises(ValueError, match=f"{path}"):
            ProgramPredictor.from_pretrained(path)


def test_it_is_kept_in_float32(predictor, tmp_path):
    wide = pickle.loads(pickle.dumps(predictor)).double()
    wide.save_pretrained(tmp_path)
    assert ProgramPredictor.from_pretrained(tmp_path).hidden.weight.dtype == torch.float32


def test_nothing_is_learned_from_what_is_no_number():
    table, _ = told_by_the_first_feature()
    table.features[3, 1] = np.nan
    with pytest.raises(ValueError, match="The model's outputs are not finite"):
        fit(table, SETTINGS)


def test_files_that_are_none(predictor, tmp_path):
    with pytest.raises(OSError, match="There is no "):
        ProgramPredictor.from_pretrained(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / FILE_NAME)
    with pytest.raises(ValueError, match="no program predictor"):
        ProgramPredictor.from_pretrained(tmp_path)
    path = predictor.save_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(OSError, match="truncated or corrupted"):
        ProgramPredictor.from_pretrained(tmp_path)


def test_other_models_are_refused(model, loader, predictor):
    images = next(iter(loader))["pixel_values"][:2]
    with pytest.raises(ValueError, match="of a model of 6 layers, and this one has 4"):
        predictor.run(ls.prune_layers(ls.load_classifier(ls.example_model()), [0, 1, 2, 3]), images)
    other = ls.load_classifier(ls.example_model())
    with torch.no_grad():
        other.classifier.bias.add_(0.1)
    with pytest.raises(ValueError, match=r"whose weights have the digest .*Train one for this model"):
        predictor.run(other, images)
    model.config.skipped_mlps = [1, 2]
    with pytest.raises(ValueError, match=r"`skipped_mlps` None, and this one has \[1, 2\]. Train one for this model"):
        predictor.run(model, images)
    model.config.skipped_mlps = None
    with pytest.raises(ValueError, match="the model is in training mode"):
        predictor.run(model.train(), images)
    with pytest.raises(ValueError, match="`cost_weight` is -1"):
        predictor.run(model.eval(), images, -1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0}, "`hidden_size` is 0"),
        ({"num_steps": 0}, "`num_steps` is 0"),
        ({"weight_decay": -1}, "`weight_decay` is -1"),
        ({"seed": -1}, "`seed` is -1"),
        ({"programs": [[0, 1]]}, "give two or more"),
    ],
    ids=str,
)
def test_bad_arguments(model, loader, arguments, message):
    with pytest.raises(ValueError, match=message):
        ls.train_program_predictor(model, loader, progress=False, **arguments)


@torch.no_grad()
def test_policies(model, loader):
    calibration = Calibration(model, loader, loader, [1, 3, 4, 5, 6])
    settings, controls = PredictedPrograms(calibration).settings(), ShuffledPrograms(calibration).settings()
    assert [each.label for each in settings] == [each.label for each in controls] and len(settings) > 2
    assert all(each.is_random for each in controls) and not any(each.is_random for each in settings)
    inputs = {"pixel_values": next(iter(loader))["pixel_values"]}
    middle = len(settings) // 2
    found, control = settings[middle].run(inputs), controls[middle].run(inputs)
    assert sorted(found.num_layers_run.tolist()) == sorted(control.num_layers_run.tolist())
    assert not torch.equal(found.program_indices, control.program_indices)
    depths = [each.run(inputs).num_layers_run.float().mean() for each in settings]
    assert depths == sorted(depths) or depths == sorted(depths, reverse=True)


def test_models_of_few_layers():
    """Two programs are the least there can be."""
    for depth, lengths in [(2, [1, 2]), (3, [2, 3]), (4, [3, 4])]:
        model = text_classifier(num_hidden_layers=depth).eval()
        data = as_dataloader(labelled_texts(8), tokenizer_of(), batch_size=8)
        predictor = ls.train_program_predictor(model, data, num_steps=2, progress=False)
        assert [len(program) for program in predictor.programs] == lengths
        assert PredictedPrograms.applies_to(model)
    assert not PredictedPrograms.applies_to(text_classifier(num_hidden_layers=1))
