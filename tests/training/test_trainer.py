"""The Trainer: the orders it draws, stopping and going on, and what it is combined with."""

import json

import peft
import pytest
import torch
from conftest import record_layer_calls
from huggingface_hub import ModelCard
from support.trainers import RandomImages, RandomNumbers, Stop, arguments, recorded_orders, train
from transformers import Trainer, TrainingArguments, trainer_utils

import hf_layershuffle as ls


def test_every_micro_batch_draws_a_new_order(vit, tmp_path):
    model = vit.classifier(shuffle_mode="arbitrary")
    orders = recorded_orders(model)
    train(model, tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=2, max_steps=5)
    assert len(orders) == 20
    assert all(len(set(orders[step : step + 4])) > 1 for step in range(0, 20, 4))


def test_orders_depend_on_the_seed_alone(vit, tmp_path):
    runs = []
    for seed, count in ((3, 0), (3, 5), (4, 0)):
        model = vit.classifier(shuffle_mode="arbitrary")
        orders = recorded_orders(model)
        train(model, tmp_path, callbacks=[RandomNumbers(count)], seed=seed)
        runs.append(orders)
    assert runs[0] == runs[1] != runs[2]


def test_the_callback_may_have_a_seed_of_its_own(vit, tmp_path):
    runs = []
    for callbacks in ([ls.LayerShuffleCallback(seed=4)], [ls.LayerShuffleCallback()], []):
        model = vit.classifier(shuffle_mode="arbitrary")
        orders = recorded_orders(model)
        train(model, tmp_path, callbacks=callbacks)
        runs.append(orders)
    assert runs[0] != runs[1] == runs[2]


def test_the_callback_refuses_a_model_without_orders(vit, tmp_path):
    with pytest.raises(ValueError, match="found no LayerShuffle model in ViTForImageClassification"):
        train(vit.plain_classifier(), tmp_path)


def test_a_plain_trainer_trains_on_one_process(vit, tmp_path):
    model = vit.classifier(shuffle_mode="arbitrary")
    orders = recorded_orders(model)
    trainer = train(model, tmp_path, trainer_class=Trainer, max_steps=30)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert len(set(orders)) > 10


def test_a_resumed_run_warns_of_steps_only_where_they_are_others(vit, tmp_path, monkeypatch):
    """Fractions are the same steps as the numbers that the checkpoint made of them."""
    warnings = []
    monkeypatch.setattr(trainer_utils.logger, "warning_once", warnings.append)
    options = dict(logging_steps=0.3, eval_strategy="steps", eval_steps=0.5, save_strategy="steps", save_steps=0.5)
    train(vit.classifier(), tmp_path, callbacks=[Stop(3)], **options)
    checkpoint = str(tmp_path / "checkpoint-3")
    trainer = train(vit.classifier(), tmp_path, resume=checkpoint, **options)
    assert not warnings
    assert trainer.args.logging_steps == 0.3 and trainer.args.save_steps == 0.5
    train(vit.classifier(), tmp_path, resume=checkpoint, **{**options, "eval_steps": 0.2})
    assert len(warnings) == 1 and "eval_steps: 2 (from args) != 3" in warnings[0] and "logging" not in warnings[0]


@pytest.mark.parametrize("trainer_class", [ls.LayerShuffleTrainer, Trainer])
@pytest.mark.parametrize("stop_at", [3, 5])
def test_a_resumed_run_gives_the_weights_of_the_uninterrupted_one(vit, tmp_path, trainer_class, stop_at):
    flags = dict(
        shuffle_mode="arbitrary", layerdrop=0.2, depth_embedding=True, position_predictor=True, hidden_dropout_prob=0.1
    )
    options = dict(
        trainer_class=trainer_class, max_steps=8, gradient_accumulation_steps=2, per_device_train_batch_size=4
    )
    model = vit.classifier(**flags)
    expected_orders = recorded_orders(model)
    train(model, tmp_path / "whole", **options)

    first = vit.classifier(**flags)
    orders = recorded_orders(first)
    train(first, tmp_path / "parts", callbacks=[Stop(stop_at)], **options)
    checkpoint = tmp_path / "parts" / f"checkpoint-{stop_at}"
    resumed = vit.classifier(seed=99, **flags)
    resumed_orders = recorded_orders(resumed)
    torch.rand(1000)
    train(resumed, tmp_path / "parts", resume=str(checkpoint), **options)

    assert orders + resumed_orders == expected_orders
    assert len(expected_orders) == 16
    for (name, parameter), expected in zip(resumed.named_parameters(), model.parameters()):
        assert torch.equal(parameter, expected), name


def test_micro_batches_give_the_loss_of_the_batch(vit, tmp_path):
    """The Trainer divides by the number of images itself; class and position loss must both follow."""
    weights = []
    for micro_batches in (1, 4):
        model = vit.classifier(position_predictor=True)
        train(
            model,
            tmp_path,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            gradient_accumulation_steps=micro_batches,
            per_device_train_batch_size=8 // micro_batches,
        )
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_fewer_images_than_a_batch(vit, tmp_path):
    data = RandomImages(5)
    trainer = ls.LayerShuffleTrainer(
        vit.classifier(),
        arguments(tmp_path, dataloader_drop_last=True),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=ls.compute_metrics,
    )
    assert "eval_accuracy" in trainer.evaluate()
    with pytest.raises(ValueError, match="no batch to train on: 5 images, batches of 8 and `dataloader_drop_last`"):
        trainer.train()


@pytest.mark.parametrize(("layerdrop", "given", "expected"), [(0.2, None, True), (0.2, False, False), (0, None, None)])
def test_layerdrop_makes_ddp_look_for_unused_parameters(vit, tmp_path, layerdrop, given, expected):
    args = arguments(tmp_path, ddp_find_unused_parameters=given, gradient_checkpointing=True)
    trainer = ls.LayerShuffleTrainer(vit.classifier(layerdrop=layerdrop), args)
    assert trainer.args.ddp_find_unused_parameters is expected
    found = trainer.accelerator.ddp_handler.find_unused_parameters
    assert found == bool(layerdrop and given is not False)


def test_bf16_and_gradient_checkpointing(vit, tmp_path):
    model = vit.classifier(shuffle_mode="arbitrary", depth_embedding=True, position_predictor=True)
    trainer = train(model, tmp_path, bf16=True, gradient_checkpointing=True, max_steps=20)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_torch_compile_compiles_layer_by_layer(vit, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "")
    monkeypatch.delenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = vit.classifier(shuffle_mode="arbitrary")
    orders = recorded_orders(model)
    train(model, tmp_path, torch_compile=True, torch_compile_backend="aot_eager", max_steps=12)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5
    torch.compiler.reset()
    eager = vit.classifier(shuffle_mode="arbitrary")
    expected_orders = recorded_orders(eager)
    train(eager, tmp_path, max_steps=12)
    assert orders in ([], expected_orders)  # hooks set before compilation are not copied
    for (name, parameter), expected in zip(model.named_parameters(), eager.parameters()):
        torch.testing.assert_close(parameter, expected, msg=name)


def test_lora(vit, tmp_path, batch):
    flags = {"shuffle_mode": "arbitrary", "depth_embedding": True, "position_predictor": True}
    base = vit.classifier(**flags)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["classifier", "depth_embedding", "depth_projection", "position_head"],
    )
    model = peft.get_peft_model(base, config)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    # the layer list of a PEFT model is the same one
    calls = record_layer_calls(model.base_model.model)
    trainer = train(model, tmp_path / "run", max_steps=30)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert len({tuple(calls[start : start + 4]) for start in range(0, 120, 4)}) > 10
    assert frozen and all(torch.equal(dict(model.named_parameters())[name], tensor) for name, tensor in frozen.items())

    model.eval()
    expected = model(batch["pixel_values"], execution_order=[3, 1, 2]).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        ls.LayerShuffleViTForImageClassification.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    torch.testing.assert_close(loaded(batch["pixel_values"], execution_order=[3, 1, 2]).logits, expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(
        merged(batch["pixel_values"], execution_order=[3, 1, 2]).logits, expected, atol=1e-5, rtol=1e-4
    )


def test_the_trainer_writes_a_card_that_the_hub_understands(vit, tmp_path):
    trainer = train(
        vit.classifier(shuffle_mode="arbitrary"), tmp_path, eval_strategy="steps", eval_steps=6, eval_orders=2
    )
    trainer.create_model_card(dataset="random", finetuned_from="google/vit-base-patch16-224")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.library_name == "transformers"
    assert "layershuffle" in card.data.tags
    assert card.data.base_model == "google/vit-base-patch16-224"
    metrics = (
        trainer.state.log_history[-2]
        if "eval_accuracy" not in trainer.state.log_history[-1]
        else trainer.state.log_history[-1]
    )
    assert [result.metric_value for result in card.data.eval_results] == [
        round(metrics["eval_accuracy"], 4),
        round(metrics["eval_arbitrary_accuracy"], 4),
    ]
    assert f"{metrics['eval_arbitrary_accuracy_min']:.4f}" in card.text


def test_the_card_tells_the_metrics_of_the_weights_that_were_loaded_at_the_end(vit, tmp_path):
    options = dict(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    options |= dict(load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    # The first is the worst, and so the best here
    trainer = train(vit.classifier(), tmp_path, max_steps=12, **options)
    trainer.create_model_card(dataset="random")

    def told():
        return json.loads((tmp_path / "training.json").read_text())["metrics"]["eval_accuracy"]

    values = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert trainer.state.best_global_step == 2 and len(values) == 6
    assert told() == values[0] == trainer.evaluate()["eval_accuracy"] != values[-1]
    metrics = trainer.evaluate(RandomImages(3))
    trainer.create_model_card(dataset="random")
    assert told() == metrics["eval_accuracy"] != values[0]


def test_evaluations_change_nothing_of_the_training(vit, tmp_path):
    weights = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}):
        model = vit.classifier(shuffle_mode="arbitrary", drop_path_rate=0.3)
        train(model, tmp_path, **options)
        weights.append(model.state_dict())
    assert all(torch.equal(each, weights[1][name]) for name, each in weights[0].items())


def test_training_alone_writes_no_card(vit, tmp_path):
    train(vit.classifier(shuffle_mode="arbitrary"), tmp_path, save_strategy="steps", save_steps=3)
    assert not list(tmp_path.rglob("README.md"))


def test_training_arguments_are_saved_as_json_types(tmp_path):
    json.dumps(arguments(tmp_path, eval_orders=2).to_dict())


def test_the_plain_arguments_work_with_the_trainer(vit, tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    data = RandomImages()
    trainer = ls.LayerShuffleTrainer(vit.classifier(), args, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
