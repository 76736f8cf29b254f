"""A model that the Trainer makes anew for each training (`model_init`), as a search over hyperparameters needs."""

import pytest
import torch
from datasets import ClassLabel, Dataset
from PIL import Image
from support.trainers import RandomImages, arguments
from transformers import ViTImageProcessor

import hf_layershuffle as ls


def test_each_training_has_its_own_rates(vit, tmp_path):
    args = arguments(tmp_path, layer_lr_decay=0.5, learning_rate=0.64, max_steps=1, lr_scheduler_type="constant")
    trainer = ls.LayerShuffleTrainer(model_init=lambda: vit.classifier(), args=args, train_dataset=RandomImages())
    for decay in (0.5, 0.25, 1.0):
        args.layer_lr_decay = decay  # as a search does
        trainer.train()
        rates = {group["lr"] for group in trainer.optimizer.param_groups}
        assert sorted(rates) == pytest.approx(sorted({0.64 * decay**depth for depth in range(6)}))


def test_a_layer_controller_is_trained_alone_and_exits_are_forgotten(vit, tmp_path):
    def model_init():
        return vit.classifier(layer_controller=True, exit_threshold=0.9)

    trainer = ls.LayerShuffleTrainer(model_init=model_init, args=arguments(tmp_path), train_dataset=RandomImages())
    assert trainer.model.config.exit_threshold == 0.9  # it may be there to be evaluated
    before = model_init().state_dict()
    for _ in range(2):
        trainer.train()
        trained = {name for name, each in trainer.model.state_dict().items() if not torch.equal(each, before[name])}
        assert trained and all(name.startswith("layer_controller.") for name in trained)
        assert trainer.model.config.exit_threshold is None


def test_the_names_of_the_classes_are_kept(vit, tmp_path):
    def shades(names):
        of_classes = {"black": 20, "grey": 120, "white": 230}
        rows = [names[index % 3] for index in range(60)]
        images = [Image.new("RGB", (8, 8), (of_classes[name],) * 3) for name in rows]
        return Dataset.from_dict({"image": images, "label": rows}).cast_column("label", ClassLabel(names=names))

    args = arguments(tmp_path, max_steps=40, learning_rate=3e-3)
    trainer = ls.LayerShuffleTrainer(
        model_init=lambda: vit.classifier(num_labels=3),
        args=args,
        train_dataset=shades(["white", "black", "grey"]),
        processing_class=ViTImageProcessor(size={"height": 8, "width": 8}),
        compute_metrics=ls.compute_metrics,
    )
    trainer.train()
    assert trainer.model.config.id2label == {0: "white", 1: "black", 2: "grey"}
    assert trainer.evaluate(shades(["black", "grey", "white"]))["eval_accuracy"] == 1.0
    # Names that the new model has of its own are its own
    names = {0: "a", 1: "b", 2: "c"}
    trainer.model_init = lambda: vit.classifier(
        num_labels=3, id2label=names, label2id={name: i for i, name in names.items()}
    )
    assert trainer.call_model_init().config.id2label == names
