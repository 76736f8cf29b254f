"""Weights that are stored in half precision."""

import peft
import pytest
import torch
from support.trainers import RandomImages, Stop, arguments, train

import hf_layershuffle as ls


@pytest.mark.parametrize("mixed_precision", [{}, {"bf16": True}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_trains_like_one_in_float32(vit, tmp_path, caplog, mixed_precision, dtype):
    vit.classifier(shuffle_mode="arbitrary").to(dtype).save_pretrained(tmp_path / "half")
    weights = []
    for kwargs in ({}, {"dtype": torch.float32}):
        model = vit.classifier_class.from_pretrained(tmp_path / "half", **kwargs)
        assert model.dtype == kwargs.get("dtype", dtype)
        caplog.clear()
        train(model, tmp_path / "run", learning_rate=1e-5, **mixed_precision)
        name = str(dtype).removeprefix("torch.")
        warnings = [record for record in caplog.messages if f"The model is in {name}, in which small" in record]
        assert len(warnings) == (0 if kwargs else 1)
        weights.append(model.state_dict())
    start = vit.classifier_class.from_pretrained(tmp_path / "half").state_dict()
    for name, tensor in weights[0].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[1][name]), name
    assert not torch.equal(weights[0]["classifier.weight"], start["classifier.weight"].float())


def test_a_resumed_run_in_half_precision_does_not_round_its_checkpoint(vit, tmp_path):
    whole, first, resumed = (vit.classifier().half() for _ in "123")
    train(whole, tmp_path / "whole")
    train(first, tmp_path / "parts", callbacks=[Stop(2)])
    train(resumed, tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-2"))
    assert all(torch.equal(ours, other) for ours, other in zip(resumed.parameters(), whole.parameters()))


def test_a_model_made_by_the_trainer_is_trained_in_float32(vit, tmp_path):
    trainer = ls.LayerShuffleTrainer(
        model_init=lambda: vit.classifier(layerdrop=0.2).half(), args=arguments(tmp_path), train_dataset=RandomImages()
    )
    trainer.train()
    assert trainer.model.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "bf16"), [(torch.float16, False), (torch.bfloat16, True)])
def test_the_frozen_base_of_adapters_stays_in_half_precision(vit, tmp_path, dtype, bf16):
    base = vit.classifier(shuffle_mode="arbitrary", depth_embedding=True, position_predictor=True).to(dtype)
    saved = ["classifier", "depth_embedding", "depth_projection", "position_head"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    model = peft.get_peft_model(base, config)
    trainer = train(model, tmp_path, max_steps=30, gradient_checkpointing=True, bf16=bf16)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else dtype), name
    assert "eval_accuracy" in trainer.evaluate()
    if not bf16:
        with pytest.raises(ValueError, match="frozen weights in float16, which cannot be run in `bf16`"):
            train(model, tmp_path, bf16=True)
