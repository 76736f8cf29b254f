import json

import evaluate
import numpy as np
import peft
import pytest
import torch
from conftest import record_layer_calls
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_layershuffle as ls


class RandomImages(Dataset):
    """40 images of five classes that can be told apart by their mean."""

    def __init__(self, size: int = 40):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(size) % 5
        self.images = torch.randn(size, 3, 8, 8, generator=generator) + self.labels[:, None, None, None].float()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": int(self.labels[index])}


class Stop(TrainerCallback):
    """Stops after a step, as a user who interrupts a run that has just saved a checkpoint."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class RandomNumbers(TrainerCallback):
    """Something else that uses random numbers, at other times in each run."""

    def __init__(self, count: int):
        self.count = count

    def on_step_begin(self, args, state, control, **kwargs):
        torch.rand(self.count)


def arguments(folder, **kwargs):
    defaults = dict(
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    return ls.LayerShuffleTrainingArguments(output_dir=str(folder), **{**defaults, **kwargs})


def train(model, folder, trainer_class=ls.LayerShuffleTrainer, callbacks=(), resume=None, **kwargs):
    data = RandomImages()
    trainer = trainer_class(
        model=model,
        args=arguments(folder, **kwargs),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=ls.compute_metrics,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def recorded_orders(model) -> list[tuple[int, ...]]:
    """Hooks the encoder; the returned list grows by the order of each training forward."""
    orders = []

    def record(module, args, output):
        if module.training:
            orders.append(tuple(output.execution_order.tolist()))

    model.base_model.register_forward_hook(record)
    return orders


# --- Metrics ---


def test_accuracy_is_an_offline_evaluate_metric():
    metric = ls.Accuracy()
    assert isinstance(metric, evaluate.Metric)
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add_batch(predictions=np.array([2, 2]), references=np.array([2, 2]))
    assert metric.compute() == {"accuracy": 0.75}


@pytest.mark.parametrize("extras", [{}, {"depth_embedding": True, "position_predictor": True}])
def test_evaluation_measures_the_seeded_orders(vit, tmp_path, extras):
    model = vit.classifier(shuffle_mode="arbitrary", **extras)
    trainer = train(
        model,
        tmp_path,
        eval_strategy="steps",
        eval_steps=3,
        eval_orders=3,
        eval_orders_seed=5,
        per_device_eval_batch_size=7,
    )
    data = RandomImages()
    model.eval()
    with torch.no_grad():
        accuracies = [
            (model(data.images, execution_order=order).logits.argmax(-1) == data.labels).float().mean().item()
            for order in ls.arbitrary_execution_orders(4, 3, seed=5)
        ]
        sequential = (model(data.images).logits.argmax(-1) == data.labels).float().mean().item()
    logged = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(logged) == 2
    for metrics in (logged[-1], trainer.evaluate()):
        assert metrics["eval_accuracy"] == pytest.approx(sequential)
        assert metrics["eval_arbitrary_accuracy"] == pytest.approx(np.mean(accuracies))
        assert metrics["eval_arbitrary_accuracy_std"] == pytest.approx(np.std(accuracies))
        assert metrics["eval_arbitrary_accuracy_min"] == pytest.approx(min(accuracies))


def test_the_best_checkpoint_can_be_chosen_by_arbitrary_accuracy(vit, tmp_path):
    trainer = train(
        vit.classifier(shuffle_mode="arbitrary"),
        tmp_path,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        eval_orders=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_arbitrary_accuracy",
        greater_is_better=True,
    )
    values = [e["eval_arbitrary_accuracy"] for e in trainer.state.log_history if "eval_arbitrary_accuracy" in e]
    assert trainer.state.best_metric == max(values)
    assert len(set(values)) > 1
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize("name", ["eval_orders", "eval_orders_seed"])
def test_negative_counts_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` is -1; it must be an integer of at least 0"):
        arguments(tmp_path, **{name: -1})


def test_a_plain_trainer_sees_logits_only(vit, tmp_path):
    model = vit.classifier(shuffle_mode="arbitrary", position_predictor=True)
    trainer = Trainer(model, arguments(tmp_path), compute_metrics=ls.compute_metrics, eval_dataset=RandomImages())
    assert trainer.predict(RandomImages()).predictions.shape == (40, 5)
    assert "eval_accuracy" in trainer.evaluate()


# --- Orders ---


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


# --- Stop and resume ---


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


# --- Features of the Trainer ---


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


# --- Card ---


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
