"""Two orders that shall agree, and a teacher that answers in several."""

import numpy as np
import pytest
import torch
from support.trainers import RandomImages, arguments
from torch.nn import functional as F

import hf_layershuffle as ls
from hf_layershuffle.models.execution_order import arbitrary_execution_orders, draw_execution_order
from hf_layershuffle.training.order_agreement import TeacherAnswer, check_order_consistency, order_divergence


def trainer_of(model, folder, teacher=None, **kwargs):
    data = RandomImages()
    return ls.LayerShuffleTrainer(
        model=model, teacher_model=teacher, args=arguments(folder, **kwargs), train_dataset=data, eval_dataset=data
    )


def order_of(step: int, forward: int, num_layers: int) -> list[int]:
    """The order of a forward pass of a step of the seed 0."""
    return draw_execution_order(num_layers, np.random.default_rng((0, step, 1, forward)))


def test_the_divergence_is_the_mean_of_both_directions():
    first, second = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 0.0]]), torch.tensor([[0.5, 0.5, 0.0], [1.0, 1.0, 2.0]])
    p, q = first.double().softmax(-1), second.double().softmax(-1)
    expected = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)) / 2
    assert order_divergence(first, second, None).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert not order_divergence(first, first, None).any()
    assert order_divergence(first, second, torch.tensor([-100, 1])).tolist()[0] == 0


@pytest.mark.parametrize("label_smoothing_factor", [0.0, 0.1])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_follows_the_mean_of_two_orders_and_their_divergence(
    vit, tmp_path, micro_batches, label_smoothing_factor
):
    model, expected = vit.classifier(shuffle_mode="arbitrary"), vit.classifier(shuffle_mode="arbitrary")
    data = RandomImages()
    size = 40 // micro_batches
    loss = torch.zeros(())
    for index in range(micro_batches):
        images, labels = (each[index * size : (index + 1) * size] for each in (data.images, data.labels))
        depth = expected.config.num_hidden_layers
        orders = [order_of(0, 2 * index + forward, depth) for forward in (0, 1)]
        assert orders[0] != orders[1]
        logits = [expected.train()(images, execution_order=order).logits for order in orders]
        losses = [F.cross_entropy(each, labels, label_smoothing=label_smoothing_factor) for each in logits]
        loss = loss + (sum(losses) / 2 + 0.7 * order_divergence(*logits, labels).mean()) / micro_batches
    loss.backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()

    trainer = trainer_of(
        *(model, tmp_path),
        seed=0,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0,
        max_steps=1,
        lr_scheduler_type="constant",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=micro_batches,
        order_consistency=0.7,
        label_smoothing_factor=label_smoothing_factor,
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(parameter, other, atol=1e-5, rtol=1e-4, msg=name)


def test_two_orders_of_some_layers_do_not_go_with_distributed_data_parallel(vit):
    """test_distributed.py shows that the Trainer asks."""
    model = vit.classifier(shuffle_mode="arbitrary", layerdrop=0.2)
    check_order_consistency(1.0, model)
    check_order_consistency(0.0, model, uses_ddp=True)
    check_order_consistency(1.0, vit.classifier(shuffle_mode="arbitrary"), uses_ddp=True)
    with pytest.raises(ValueError, match=r"`order_consistency` is 1.0 and `layerdrop` is 0.2.* set one to 0"):
        check_order_consistency(1.0, model, uses_ddp=True)


def test_evaluation_runs_one_order(vit, tmp_path):
    model = vit.classifier(shuffle_mode="arbitrary")
    trainer = trainer_of(model, tmp_path, order_consistency=1.0, per_device_eval_batch_size=40)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    loss = trainer.evaluate()["eval_loss"]
    assert len(calls) == 1
    data = RandomImages()
    with torch.no_grad():
        assert loss == pytest.approx(model.eval()(data.images, labels=data.labels).loss.item(), rel=1e-4)


def test_a_teacher_answers_with_the_mean_over_its_orders(vit):
    teacher = vit.classifier(seed=3).eval()
    images = RandomImages().images[:5]
    depth = teacher.config.num_hidden_layers
    answer = TeacherAnswer(teacher, 3, depth - 1, seed=4)
    assert answer.orders == [order[: depth - 1] for order in arbitrary_execution_orders(depth, 3, seed=4)]
    with torch.no_grad():
        expected = sum(teacher(images, execution_order=order).logits.softmax(-1) for order in answer.orders) / 3
        torch.testing.assert_close(answer(teacher, {"pixel_values": images}).softmax(-1), expected)
        own = TeacherAnswer(teacher)(teacher, {"pixel_values": images})
        assert own.equal(teacher(images).logits)


def test_the_model_learns_the_teachers_mean_answer(vit, tmp_path):
    teacher = vit.classifier(seed=7)
    with torch.no_grad():
        teacher.classifier.weight.mul_(50)
    model = vit.classifier()
    trainer = trainer_of(
        model, tmp_path, teacher, seed=0, max_steps=1, optim="sgd", learning_rate=0.1, max_grad_norm=0,
        lr_scheduler_type="constant", per_device_train_batch_size=40, distillation_weight=1.0,
        distillation_temperature=1.0, teacher_orders=2,
    )  # fmt: skip
    expected = vit.classifier()
    images = trainer.train_dataset.images
    orders = arbitrary_execution_orders(teacher.config.num_hidden_layers, 2, seed=0)
    with torch.no_grad():
        targets = sum(teacher.eval()(images, execution_order=order).logits.softmax(-1) for order in orders) / 2
    divergence = F.kl_div(expected.train()(images).logits.log_softmax(-1), targets, reduction="none").sum(-1)
    divergence.mean().backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    trainer.train()
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(parameter, other, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("flags", "settings", "message"),
    [
        ({"shuffle_mode": "none"}, {"order_consistency": 1.0}, "trains in one order only; set its `shuffle_mode`"),
        (
            {"shuffle_mode": "arbitrary", "problem_type": "regression"},
            {"order_consistency": 0.5},
            "`order_consistency` is 0.5, and needs a single label of two classes",
        ),
        ({}, {"teacher_orders": 2}, "`teacher_orders` is 2, and there is no teacher"),
    ],
)
def test_what_cannot_agree_is_refused(vit, tmp_path, flags, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(vit.classifier(**flags), tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order_consistency": -1.0}, "`order_consistency` is -1.0; it must be a finite number from 0"),
        ({"order_consistency": float("nan")}, "`order_consistency` is nan"),
        ({"teacher_orders": -1}, "`teacher_orders` is -1; it must be an integer of at least 0"),
        ({"teacher_layers": 0}, "`teacher_layers` is 0; it must be an integer of at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


def test_teachers_that_cannot_answer_so_are_refused(vit, tmp_path):
    with pytest.raises(
        ValueError, match="`teacher_orders` is 2, and the teacher, a ViTForImageClassification, has one"
    ):
        trainer_of(vit.classifier(), tmp_path, vit.plain_classifier(seed=7), teacher_orders=2)
    teacher = vit.classifier(seed=7)
    with pytest.raises(ValueError, match="`teacher_layers` is 3 without `teacher_orders`"):
        TeacherAnswer(teacher, 0, 3)
    with pytest.raises(ValueError, match=r"`teacher_layers` is 99, and the teacher has \d+ layers; choose 1 to"):
        TeacherAnswer(teacher, 2, 99)
