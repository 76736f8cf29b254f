import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from support.trainers import RandomImages, Stop, arguments, recorded_orders
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
)

import hf_layershuffle as ls
from hf_layershuffle.models.position_modules import position_loss
from hf_layershuffle.training.distillation import distillation_loss


def trainer_of(model, teacher, folder, callbacks=(), trainer_arguments=None, **kwargs):
    data = RandomImages()
    return ls.LayerShuffleTrainer(
        model=model,
        args=trainer_arguments or arguments(folder, **kwargs),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=ls.compute_metrics,
        teacher_model=teacher,
        callbacks=list(callbacks),
    )


def strong_teacher(vit, **kwargs):
    """One whose answers are far from uniform."""
    teacher = vit.plain_classifier(seed=7, **kwargs)
    with torch.no_grad():
        teacher.classifier.weight.mul_(50)
    return teacher


def test_the_loss_is_the_divergence_of_softened_probabilities():
    generator = torch.Generator().manual_seed(0)
    logits, teacher_logits = torch.randn(2, 3, 5, generator=generator).mul(3)
    losses = distillation_loss(logits, teacher_logits, torch.tensor([1, -100, 4]), temperature=2.0)
    p, q = (np.exp(each.double().numpy() / 2) for each in (teacher_logits, logits))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    expected = 4 * (p * np.log(p / q)).sum(1)
    expected[1] = 0
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert not distillation_loss(logits, logits, torch.zeros(3), temperature=2.0).any()
    # Without labels all images count; one that is left out counts for nothing, whatever the teacher says of it
    losses_of_all = distillation_loss(logits, teacher_logits, None, temperature=2.0)
    assert losses_of_all[[0, 2]].equal(losses[[0, 2]]) and losses_of_all[1] > 0
    teacher_logits[1] = torch.nan
    assert distillation_loss(logits, teacher_logits, torch.tensor([1, -100, 4]), temperature=2.0).equal(losses)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("label_smoothing_factor", [0.0, 0.1])
def test_a_step_follows_the_gradient_of_the_weighted_sum(vit, tmp_path, micro_batches, label_smoothing_factor):
    flags = {"position_predictor": True, "position_loss_weight": 0.5}
    teacher, model, expected = strong_teacher(vit), vit.classifier(**flags), vit.classifier(**flags)
    data = RandomImages()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    labels = torch.tensor([-100, *data.labels[1:].tolist()])  # one image that counts in neither loss
    outputs = expected.train()(data.images, labels=labels)
    class_loss = outputs.loss
    if label_smoothing_factor:
        class_loss = F.cross_entropy(outputs.logits, labels, label_smoothing=label_smoothing_factor)
        class_loss = class_loss + 0.5 * position_loss(outputs.position_logits, labels)
    with torch.no_grad():
        targets = (teacher.eval()(data.images).logits / 3).softmax(-1)
    divergence = F.kl_div((outputs.logits / 3).log_softmax(-1), targets, reduction="none").sum(-1)
    (0.4 * class_loss + 0.6 * 9 * divergence[1:].mean()).backward()
    optimizer.step()

    trainer = trainer_of(
        *(model, teacher, tmp_path),
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0,
        max_steps=1,
        lr_scheduler_type="constant",
        per_device_train_batch_size=40 // micro_batches,
        gradient_accumulation_steps=micro_batches,
        distillation_weight=0.6,
        distillation_temperature=3.0,
        label_smoothing_factor=label_smoothing_factor,
    )
    trainer.train_dataset.labels = labels
    trainer.train()
    moved = 0.0
    for (name, parameter), other, start in zip(
        model.named_parameters(), expected.parameters(), vit.classifier(**flags).parameters()
    ):
        torch.testing.assert_close(parameter, other, atol=1e-5, rtol=1e-4, msg=name)
        moved += (parameter - start).abs().sum().item()
    assert moved > 0.1


def test_the_model_learns_the_teachers_answers(vit, tmp_path):
    """With a weight of 1 and labels that say nothing."""
    teacher = strong_teacher(vit, hidden_dropout_prob=0.3).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    model = vit.classifier(shuffle_mode="arbitrary")
    trainer = trainer_of(model, teacher, tmp_path, max_steps=120, learning_rate=3e-3, distillation_weight=1.0)
    images = trainer.train_dataset.images
    trainer.train_dataset.labels = torch.zeros(40, dtype=torch.long)
    trainer.train()
    with torch.no_grad():
        answers, ours = teacher(images).logits.argmax(-1), model.eval()(images).logits.argmax(-1)
    assert len(answers.unique()) > 1 and 0 not in answers
    assert (answers == ours).float().mean() > 0.8
    assert not teacher.training
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


class Unlabelled(torch.utils.data.Dataset):
    def __init__(self):
        self.items = RandomImages()

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"pixel_values": self.items[index]["pixel_values"]}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_images_without_labels_are_learnt_from_the_teacher_alone(vit, tmp_path, micro_batches):
    teacher, model, expected = strong_teacher(vit), vit.classifier(), vit.classifier()
    images = torch.stack([item["pixel_values"] for item in map(Unlabelled().__getitem__, range(16))])
    with torch.no_grad():
        targets = (teacher.eval()(images).logits / 4).softmax(-1)
    loss = F.kl_div((expected.train()(images).logits / 4).log_softmax(-1), targets, reduction="batchmean")
    (16 * loss).backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "max_steps": 1}
    options |= {"per_device_train_batch_size": 16 // micro_batches, "gradient_accumulation_steps": micro_batches}
    trainer = trainer_of(model, teacher, tmp_path, distillation_weight=1, lr_scheduler_type="constant", **options)
    trainer.train_dataset = Unlabelled()
    trainer.train()
    for (name, parameter), other in zip(model.named_parameters(), expected.named_parameters()):
        torch.testing.assert_close(parameter, other[1], atol=1e-5, rtol=1e-4, msg=name)
    trainer = trainer_of(model, teacher, tmp_path, distillation_weight=0.9)
    trainer.train_dataset = Unlabelled()
    with pytest.raises(ValueError, match=r"no labels, .* `distillation_weight` is 0.9. Set it to 1"):
        trainer.train()


def test_a_teacher_that_is_not_finite_is_refused(vit, tmp_path):
    teacher = vit.plain_classifier()
    with torch.no_grad():
        teacher.vit.layernorm.bias[3] = torch.nan
    with pytest.raises(ValueError, match=r"`teacher_model` holds numbers that are not finite in 'vit.layernorm.bias'"):
        trainer_of(vit.classifier(), teacher, tmp_path)
    teacher = vit.plain_classifier()
    teacher.classifier.register_forward_hook(lambda module, args, output: output * torch.inf)
    model = vit.classifier()
    with pytest.raises(ValueError, match=r"the teacher's answer of step 1 is not finite.*Pass a teacher"):
        trainer_of(model, teacher, tmp_path).train()
    trainer = trainer_of(model, teacher, tmp_path, max_steps=1)
    trainer.train_dataset.labels = torch.full((40,), -100)  # what it says of images that are left out does not matter
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_evaluation_is_without_the_teacher(vit, tmp_path):
    model = vit.classifier()
    metrics = [trainer_of(model, teacher, tmp_path).evaluate() for teacher in (None, strong_teacher(vit))]
    assert metrics[0]["eval_loss"] == metrics[1]["eval_loss"]


def test_a_resumed_run_gives_the_weights_of_the_uninterrupted_one(vit, tmp_path):
    options = {"max_steps": 6, "bf16": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    whole, first, resumed = (vit.classifier(seed=seed, shuffle_mode="arbitrary") for seed in (0, 0, 9))
    without = vit.classifier(shuffle_mode="arbitrary")
    expected_orders = recorded_orders(whole)
    trainer_of(whole, strong_teacher(vit), tmp_path / "whole", **options).train()
    trainer_of(first, strong_teacher(vit), tmp_path / "parts", [Stop(2)], **options).train()
    orders = recorded_orders(resumed)
    trainer = trainer_of(resumed, strong_teacher(vit), tmp_path / "parts", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert orders == expected_orders[4:]
    assert all(torch.equal(ours, other) for ours, other in zip(resumed.parameters(), whole.parameters()))
    other_orders = recorded_orders(without)
    trainer_of(without, None, tmp_path / "without", **options).train()
    assert other_orders == expected_orders  # a teacher draws no random numbers
    assert not torch.equal(without.classifier.weight, whole.classifier.weight)


def test_any_architecture_teaches_and_the_card_says_so(vit, tmp_path):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    teacher = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=5)).to(torch.bfloat16)
    teacher.save_pretrained(tmp_path / "resnet-tiny")
    teacher = ResNetForImageClassification.from_pretrained(tmp_path / "resnet-tiny")
    assert teacher.dtype == torch.bfloat16
    model = vit.classifier(shuffle_mode="arbitrary")
    trainer = trainer_of(model, teacher, tmp_path / "run", trainer_arguments=plain_arguments(tmp_path / "run"))
    trainer.train()
    trainer.create_model_card(dataset="random")
    assert "Distilled from a local model" in ModelCard.load(tmp_path / "run" / "README.md").text
    trainer = trainer_of(model, teacher, tmp_path / "run", distillation_temperature=3)
    trainer.create_model_card(dataset="random")
    recorded = json.loads((tmp_path / "run" / "training.json").read_text())["arguments"]
    assert (recorded["distillation_weight"], recorded["distillation_temperature"]) == (0.9, 3)
    trainer_of(model, None, tmp_path / "run").create_model_card(dataset="random")
    assert "istill" not in (tmp_path / "run" / "README.md").read_text()


def plain_arguments(folder):
    return TrainingArguments(str(folder), max_steps=2, use_cpu=True, report_to="none", save_strategy="no")


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"num_labels": 4}, "`num_labels` of the teacher is 4 and of the model 5"),
        ({"image_size": 16}, "`image_size` of the teacher is 16 and of the model 8"),
        ({"num_channels": 1}, "`num_channels` of the teacher is 1 and of the model 3"),
        (
            {"id2label": {i: f"LABEL_{4 - i}" for i in range(5)}},
            "classes in another order: LABEL_4, LABEL_3, LABEL_2, LABEL_1, LABEL_0 instead of LABEL_0",
        ),
        # Two of them, swapped, are enough to tell
        ({"id2label": dict(enumerate(["a", "LABEL_2", "LABEL_1", "b", "c"]))}, "classes in another order: a, LABEL_2"),
    ],
)
def test_a_teacher_of_other_images_or_classes_is_refused(vit, tmp_path, teacher, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(vit.classifier(), vit.plain_classifier(**teacher), tmp_path)


def test_names_that_differ_altogether_are_taken_by_number_with_a_warning(vit, tmp_path, caplog):
    letters, others = dict(enumerate("abcde")), dict(enumerate("vwxyz"))
    trainer_of(vit.classifier(), vit.plain_classifier(id2label=letters), tmp_path)
    assert not caplog.records
    trainer_of(vit.classifier(id2label=others), vit.plain_classifier(id2label=letters), tmp_path)
    assert "classes are called a, b, c, ... and the model's v, w, x, ...;" in caplog.text


def test_what_is_no_image_classifier_is_refused(vit, tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    text = BertForSequenceClassification(BertConfig(**sizes, num_labels=5))
    for teacher, message in (
        ("org/vit", "`teacher_model` is a str; pass an image classifier of transformers"),
        (text, "`teacher_model` is a BertForSequenceClassification; pass an image classifier"),
        (vit.plain_model_class(vit.plain_config_class(num_labels=5)), "is a ViTModel, which has no classifier"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(vit.classifier(), teacher, tmp_path)


def test_a_model_is_not_its_own_teacher(vit, tmp_path):
    model = vit.classifier()
    with pytest.raises(ValueError, match="is the model to train itself"):
        trainer_of(model, model, tmp_path)
    model = vit.classifier(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="`problem_type` 'multi_label_classification' and 5 classes"):
        trainer_of(model, vit.plain_classifier(), tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distillation_weight": 1.5}, r"`distillation_weight` is 1.5; it must lie in \[0, 1\]"),
        ({"distillation_weight": float("nan")}, "`distillation_weight` is nan"),
        ({"distillation_temperature": 0}, "`distillation_temperature` is 0; it must be a finite number above 0"),
    ],
)
def test_weights_and_temperatures_out_of_range_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **values)


def test_a_teacher_of_texts(tmp_path):
    from conftest import Architecture
    from support.texts import labelled_texts, text_classifier, tokenizer_of
    from transformers import BertConfig, BertForSequenceClassification

    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, num_labels=3)
    teacher = BertForSequenceClassification(BertConfig(**sizes, vocab_size=len(tokenizer_of()))).eval()
    args = ls.LayerShuffleTrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", use_cpu=True, distillation_weight=1.0
    )
    data, model = labelled_texts(8), text_classifier(shuffle_mode="none", hidden_dropout_prob=0.0)
    trainer = ls.LayerShuffleTrainer(
        model, args, teacher_model=teacher, train_dataset=data, processing_class=tokenizer_of()
    )
    model.eval()  # without dropout, but in the Trainer's way of training
    model.training = True
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        temperature = args.distillation_temperature
        log_probabilities = (model(**inputs).logits / temperature).log_softmax(-1)
        targets = (teacher(**inputs).logits / temperature).log_softmax(-1)
        expected = temperature**2 * (targets.exp() * (targets - log_probabilities)).sum(-1).mean()
        assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-4)
    few = BertForSequenceClassification(BertConfig(**sizes, vocab_size=50))
    with pytest.raises(ValueError, match="`vocab_size` of the teacher is 50 and of the model"):
        ls.LayerShuffleTrainer(model, args, teacher_model=few, train_dataset=data, processing_class=tokenizer_of())
    vit = Architecture("vit").plain_classifier(num_labels=3)
    with pytest.raises(
        ValueError, match="pass a text classifier of transformers, such as AutoModelForSequenceClassif"
    ):
        ls.LayerShuffleTrainer(model, args, teacher_model=vit, train_dataset=data, processing_class=tokenizer_of())
