import pytest
import torch
from support.encoder_checks import free_model
from support.encoders import ENCODERS
from support.models import randomize
from transformers import Trainer, TrainingArguments

import hf_layershuffle as ls
from hf_layershuffle.models.exit_rule import CRITERIA, confidence


CLASSIFIERS = [name for name, encoder in ENCODERS.items() if encoder.is_classifier]
ORDERS = ([0, 1, 2, 3], [2, 0, 3, 1], [1, 1, 0])
RULES = [
    {"exit_threshold": 0.7},
    {"exit_threshold": 0.6, "exit_criterion": "margin"},
    {"exit_threshold": 0.5, "exit_criterion": "entropy"},
    {"exit_patience": 2},
]


def make_vit(**flags):
    torch.manual_seed(0)
    config = ls.LayerShuffleViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        num_labels=5, **flags,
    )  # fmt: skip
    return randomize(ls.LayerShuffleViTForImageClassification(config)).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def assert_runs_to_its_depth(model, inputs, output, order):
    """Each example has the logits of the model run to the layer at which it left."""
    for index, depth in enumerate(output.num_layers_run.tolist()):
        expected = model(**inputs, execution_order=order[:depth]).logits[index]
        torch.testing.assert_close(output.logits[index], expected, rtol=1e-5, atol=1e-5)


def several(value):
    """Six examples of two, so that some leave while others stay."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.cat([value, value.flip(0), value.roll(1, -1) if value.is_floating_point() else value])


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_every_family_with_a_head(name):
    model = free_model(ENCODERS[name])
    inputs = {key: several(value) for key, value in ENCODERS[name].inputs().items()}
    order = [2, 0, 3, 1]
    # A threshold between the least and the most sure answer after the first layer, so that some leave there
    sureness = confidence(model(**inputs, execution_order=order[:1]).logits)
    threshold = float((sureness.min() + sureness.max()) / 2)
    output = model(**inputs, execution_order=order, exit_threshold=threshold)
    assert_runs_to_its_depth(model, inputs, output, order)
    assert output.num_layers_run.min() == 1
    output = model(**inputs, execution_order=order, exit_patience=2)
    assert_runs_to_its_depth(model, inputs, output, order)
    assert output.num_layers_run.min() >= 2


@pytest.mark.parametrize("flags", [{}, {"depth_embedding": True}, {"position_predictor": True}], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
@torch.no_grad()
def test_each_image_leaves_at_the_first_sure_layer(images, flags, rule, order):
    model = make_vit(**flags)
    output = model(images, execution_order=order, **rule)
    assert_runs_to_its_depth(model, {"pixel_values": images}, output, order)
    assert output.position_logits is None and output.execution_order.tolist() == order
    logits = [model(images, execution_order=order[: depth + 1]).logits for depth in range(len(order))]
    if "exit_patience" in rule:
        answers = torch.stack([each.argmax(-1) for each in logits])
        is_sure = torch.stack([answers[depth] == answers[depth - 1] for depth in range(1, len(order))])
        is_sure = torch.cat([torch.zeros_like(is_sure[:1]), is_sure])
    else:
        sureness = torch.stack([confidence(each, rule.get("exit_criterion", "probability")) for each in logits])
        is_sure = sureness >= rule["exit_threshold"]
    is_sure[-1] = True
    expected = is_sure.int().argmax(0) + 1
    assert output.num_layers_run.tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 1  # else nothing is shown


@torch.no_grad()
def test_only_images_that_stay_are_computed(images):
    model = make_vit()
    counts = []
    for layer in model.free_layers:
        layer.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    depths = model(images, exit_threshold=0.7).num_layers_run
    stayed = [int((depths > depth).sum()) for depth in range(4)]
    assert counts == [count for count in stayed if count]
    assert counts[0] == 12 and counts[-1] < 12


@torch.no_grad()
def test_confidence_by_hand():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]])
    logits = probabilities.log()
    torch.testing.assert_close(confidence(logits), torch.tensor([0.7, 1 / 3, 1.0]))
    torch.testing.assert_close(confidence(logits, "margin"), torch.tensor([0.5, 0.0, 1.0]), atol=1e-6, rtol=0)
    # -(0.7 ln 0.7 + 0.2 ln 0.2 + 0.1 ln 0.1) / ln 3 = 0.80182 / 1.09861
    torch.testing.assert_close(confidence(logits, "entropy"), torch.tensor([0.27016, 0.0, 1.0]), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_configuration_says_it_too_and_a_call_wins(images, tmp_path):
    model = make_vit(exit_threshold=0.7, exit_criterion="margin")
    expected = make_vit()(images, exit_threshold=0.7, exit_criterion="margin")
    assert model(images).num_layers_run.tolist() == expected.num_layers_run.tolist()
    assert model(images, exit_patience=1).num_layers_run.tolist() == [1] * 12
    assert model(images, exit_threshold=1.0).num_layers_run.tolist() == [4] * 12
    model.save_pretrained(tmp_path)
    loaded = ls.LayerShuffleViTForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(images).logits, expected.logits)
    assert loaded(images).to_tuple()[0].shape == (12, 5)
    loaded.train()
    assert loaded(images).num_layers_run is None  # in training all run


@torch.no_grad()
def test_a_call_can_switch_the_rule_off(images):
    model = make_vit(exit_threshold=0.7)
    output = model(images, exit_threshold="off", output_hidden_states=True)
    assert output.num_layers_run is None and len(output.hidden_states) == 5
    torch.testing.assert_close(output.logits, make_vit()(images).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match="leave one of them out"):
        model(images, exit_threshold="off", exit_patience=1)
    with pytest.raises(ValueError, match="`exit_criterion` is given without"):
        model(images, exit_patience=1, exit_criterion="margin")


@torch.no_grad()
def test_the_encoder_of_such_a_classifier_runs_all_layers(images, tmp_path):
    make_vit(exit_threshold=0.0).save_pretrained(tmp_path)
    encoder = ls.LayerShuffleViTModel.from_pretrained(tmp_path, add_pooling_layer=False)
    expected = make_vit().vit(images).last_hidden_state
    torch.testing.assert_close(encoder(images).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["DINOv3, classifier", "DeBERTa-v2", "ModernBERT"])
@torch.no_grad()
def test_a_batch_as_long_as_the_positions(name):
    """What all examples share is not taken for what each has."""
    model, inputs = free_model(ENCODERS[name]), ENCODERS[name].inputs()
    seen = []
    for layer in model.free_layers:
        layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    model(**inputs)
    lengths = {
        len(part)
        for args, kwargs in seen
        for value in (*args, *kwargs.values())
        for part in (value if isinstance(value, tuple) else [value])
        if isinstance(part, torch.Tensor) and part.ndim and 2 < len(part) <= 64
    }
    for length in lengths | {16}:
        batch = {key: torch.cat([value.roll(i, -1) for i in range(length)])[:length] for key, value in inputs.items()}
        output = model(**batch, execution_order=[2, 0, 3, 1], exit_patience=2)
        assert_runs_to_its_depth(model, batch, output, [2, 0, 3, 1])


@torch.no_grad()
def test_labels_give_the_loss_of_these_logits(images):
    labels = torch.arange(12) % 5
    output = make_vit()(images, labels=labels, exit_threshold=0.7)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))


def test_the_trainer_evaluates_such_a_model(images, tmp_path):
    data = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(images)]
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=12)
    output = Trainer(make_vit(exit_threshold=0.7), args).predict(data)
    assert output.predictions.shape == (12, 5)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(output.predictions), make_vit()(images, exit_threshold=0.7).logits, rtol=1e-5, atol=1e-5
        )


def test_bfloat16_and_one_image(images):
    model = make_vit().to(torch.bfloat16)
    with torch.no_grad():
        assert model(images.bfloat16(), exit_threshold=0.5).logits.dtype == torch.bfloat16
        one = model(images[:1].bfloat16(), exit_threshold=0.0)
    assert one.num_layers_run.tolist() == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exit_threshold": 1.1}, "`exit_threshold` is 1.1; it must be None or a number in"),
        ({"exit_threshold": -0.1}, "it must be None or a number in"),
        ({"exit_threshold": float("nan")}, "it must be None or a number in"),
        ({"exit_threshold": True}, "it must be None or a number in"),
        ({"exit_patience": 0}, "`exit_patience` is 0; it must be None or an integer of at least 1"),
        ({"exit_patience": 2, "exit_threshold": 0.5}, "set the other to None"),
        ({"exit_threshold": 0.5, "exit_criterion": "sure"}, f"one of {', '.join(map(repr, CRITERIA))}"),
        ({"exit_criterion": "margin"}, "`exit_criterion` is given without `exit_threshold`"),
        ({"exit_threshold": 0.5, "output_hidden_states": True}, "`output_hidden_states` is True"),
        ({"exit_threshold": 0.5, "output_attentions": True}, "`output_attentions` is True"),
    ],
    ids=str,
)
def test_bad_arguments(images, arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make_vit()(images, **arguments)


@pytest.mark.parametrize(
    "flags",
    [
        {"exit_threshold": 2},
        {"exit_patience": 1.5},
        {"exit_criterion": "sure"},
        {"exit_threshold": 0.5, "exit_patience": 1},
    ],
    ids=str,
)
def test_bad_configurations(flags):
    with pytest.raises(ValueError, match="exit_"):
        make_vit(**flags)


def test_models_that_do_not_choose_one_class(images):
    model = make_vit()
    with pytest.raises(ValueError, match="LayerShuffleViTModel has no head"):
        model.vit(images, exit_threshold=0.5)
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="'multi_label_classification'"):
        model(images, exit_threshold=0.5)
    model.config.problem_type = None
    model.config.num_labels = 1
    with pytest.raises(ValueError, match=r"1 outputs and `config.problem_type` 'regression'"):
        model(images, exit_threshold=0.5)
    with pytest.raises(ValueError, match="in training mode"):
        make_vit().train()(images, exit_threshold=0.5)


@torch.no_grad()
def test_a_compiled_model_gives_the_same(images):
    model = make_vit()
    expected = model(images, exit_threshold=0.7)
    torch._dynamo.reset()
    output = torch.compile(model, backend="eager")(images, exit_threshold=0.7)
    assert output.num_layers_run.tolist() == expected.num_layers_run.tolist()
    torch.testing.assert_close(output.logits, expected.logits)


# --- Models whose configuration has a rule, in the rest of the package ---


@pytest.fixture
def exiting():
    return make_vit(exit_threshold=0.7)


def as_items(images):
    return [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(images)]


def test_what_measures_orders_runs_all_layers(exiting, images):
    rules = {"progress": False, "num_orders": 2, "num_subsets": 1}
    report = ls.evaluate_robustness(exiting, as_items(images), **rules)
    assert report.sequential == ls.evaluate_robustness(make_vit(), as_items(images), **rules).sequential
    assert exiting.config.exit_threshold == 0.7


@pytest.mark.parametrize("name", ["DINOv3, classifier", "DistilBERT"])
def test_families_are_taken_apart_though_their_examples_leave(name):
    """Of families that no test knows, the first batch is compared with the model."""
    model = free_model(ENCODERS[name], exit_threshold=0.0)
    parts = ls.LayerwiseClassifier(model)
    parts.embed(ENCODERS[name].inputs())
    assert parts._is_checked and model.config.exit_threshold == 0.0


def test_a_new_model_does_not_keep_the_rule(exiting, images, tmp_path, caplog):
    short = ls.prune_layers(exiting, [0, 1])
    assert short.config.exit_threshold is None and exiting.config.exit_threshold == 0.7
    for name in ("one", "two"):
        make_vit(exit_threshold=0.7).save_pretrained(tmp_path / name)
    plan = ls.MergePlan(
        sources={"one": str(tmp_path / "one"), "two": str(tmp_path / "two")},
        layers=[{"source": "one", "layer": 0}, {"source": "two", "layer": 1}],
        base="one",
    )
    ls.merge(plan, tmp_path / "merged")
    assert ls.LayerShuffleViTForImageClassification.from_pretrained(tmp_path / "merged").config.exit_threshold is None
    args = TrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True, max_steps=1, save_strategy="no")
    ls.LayerShuffleTrainer(exiting, args, train_dataset=as_items(images)).train()
    assert exiting.config.exit_threshold is None


def test_a_teacher_runs_all_layers(images, tmp_path):
    """Also in several orders; its configuration stays as it was."""
    whole, exiting = make_vit(), make_vit(exit_threshold=0.0)
    answers = []
    for teacher in (whole, exiting):
        args = ls.LayerShuffleTrainingArguments(
            str(tmp_path), report_to="none", use_cpu=True, max_steps=1, save_strategy="no", teacher_orders=2, seed=0
        )
        student = make_vit()
        ls.LayerShuffleTrainer(student, args, train_dataset=as_items(images), teacher_model=teacher).train()
        answers.append(student.classifier.weight.detach())
    assert torch.equal(*answers) and exiting.config.exit_threshold == 0.0
