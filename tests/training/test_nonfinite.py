"""Numbers that are not finite."""

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from support.trainers import RandomImages, arguments, train
from transformers import TrainerCallback

import hf_layershuffle as ls
from hf_layershuffle.training.nonfinite import NonFiniteWatch


class BrokenFrom(RandomImages):
    """Images of not-a-numbers from this access on."""

    def __init__(self, first: int):
        super().__init__()
        self.first, self.count = first, 0

    def __getitem__(self, index):
        self.count += 1
        item = super().__getitem__(index)
        return item if self.count <= self.first else {**item, "pixel_values": item["pixel_values"] * torch.nan}


@pytest.mark.parametrize("at_once", [True, False])
def test_training_stops_at_the_first_loss_that_is_not_finite(vit, tmp_path, monkeypatch, at_once):
    """An accelerator is asked when the Trainer logs or saves only, and the step is told all the same."""
    if not at_once:
        monkeypatch.setattr(ls.LayerShuffleTrainer, "_reads_at_once", lambda self: False)
    trainer = ls.LayerShuffleTrainer(
        vit.classifier(),
        arguments(tmp_path, save_strategy="steps", save_steps=2, logging_steps=5),
        train_dataset=BrokenFrom(2 * 8),
    )
    with pytest.raises(ValueError) as error:
        trainer.train()
    kept = tmp_path / "checkpoint-2"
    assert "Training stopped: the loss of step 3 is not finite." in str(error.value)
    assert f"the last good checkpoint is '{kept}'" in str(error.value)
    assert "Lower `learning_rate` (0.01)" in str(error.value)
    assert trainer.state.global_step == (2 if at_once else 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    assert all(tensor.isfinite().all() for tensor in load_file(kept / "model.safetensors").values())


class Overflow(TrainerCallback):
    """A step that is too large for the weights, of gradients that are finite."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.classifier.weight.data[0, 0] = torch.inf


def test_weights_that_are_not_finite_are_not_saved(vit, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(ValueError, match=r"the largest weight of step 3 is not finite\. .* is '.*checkpoint-2'"):
        train(vit.classifier(), tmp_path, callbacks=[Overflow()], **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    with pytest.raises(ValueError, match=r"Training stopped: the loss of step 2 .* no checkpoint .* \(1e\+36\)"):
        train(vit.classifier(), tmp_path / "rate", learning_rate=1e36)


def test_a_gradient_that_overflows_stops_training_but_for_loss_scaling(vit, tmp_path, monkeypatch):
    def overflow(self, model, grad_norm=None):
        return torch.tensor(torch.inf) if self.state.global_step == 1 else grad_norm

    monkeypatch.setattr(ls.LayerShuffleTrainer, "_get_grad_norm", overflow)
    with pytest.raises(ValueError, match="the gradient norm of step 2 is not finite"):
        train(vit.classifier(), tmp_path)
    trainer = train(vit.classifier(), tmp_path, stop_on_nonfinite=False)
    assert trainer.state.global_step == 6 and not trainer._watch._noted
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16"))
        assert train(vit.classifier(), tmp_path).state.global_step == 6


def test_numbers_are_read_after_a_hundred_steps_at_the_latest(vit, tmp_path, monkeypatch):
    monkeypatch.setattr(ls.LayerShuffleTrainer, "_reads_at_once", lambda self: False)
    monkeypatch.setattr("hf_layershuffle.training.trainer.CHECK_EVERY", 4)
    reads = []
    first = NonFiniteWatch.first
    monkeypatch.setattr(
        NonFiniteWatch, "first", lambda self, *args: reads.append(len(self._noted)) or first(self, *args)
    )
    train(vit.classifier(), tmp_path, max_steps=10, logging_strategy="no", num_train_epochs=9)
    # Loss and gradient norm of each step; once more where an epoch ends; the largest weight at the end of training
    assert reads == [8, 9, 5, 2]
