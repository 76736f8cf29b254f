import pytest
import torch
import transformers
from conftest import TINY, Architecture, of_both_architectures
from transformers import BlipTextConfig, BlipTextModel

import hf_layershuffle as ls
from hf_layershuffle.checkpoints.loading import as_layershuffle, load_classifier
from hf_layershuffle.layerwise import LayerwiseClassifier


@pytest.mark.parametrize("flags", [{}, {"depth_embedding": True, "position_predictor": True}])
@torch.no_grad()
def test_layers_one_by_one_give_the_logits_of_the_order(vit, batch, flags):
    model = vit.classifier(**flags).eval()
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    parts = LayerwiseClassifier(model)
    order = [3, 0, 0, 2, 1, 1]
    hidden_states, position_logits = parts.embed(batch["pixel_values"]), []
    for position, index in enumerate(order):
        hidden_states, logits = parts.run_layer(hidden_states, index, position)
        position_logits.append(logits)
    expected = model(batch["pixel_values"], execution_order=order)
    torch.testing.assert_close(parts.classify(hidden_states), expected.logits)
    if flags:
        assert torch.equal(torch.stack(position_logits, dim=1), expected.position_logits)
    else:
        assert position_logits == [None] * 6


@of_both_architectures
def test_a_plain_classifier_becomes_a_layershuffle_one_that_shares_its_weights(architecture, batch):
    plain = architecture.plain_classifier(attn_implementation="eager").eval()
    ours = as_layershuffle(plain)
    assert isinstance(ours, architecture.classifier_class)
    assert not ours.training
    assert ours.config._attn_implementation == "eager"
    assert torch.equal(ours(**batch).logits, plain(**batch).logits)
    assert not torch.equal(ours(**batch, execution_order=[0, 0, 0]).logits, plain(**batch).logits)
    pointers = {name: tensor.data_ptr() for name, tensor in plain.state_dict().items()}
    assert {name: tensor.data_ptr() for name, tensor in ours.state_dict().items()} == pointers
    assert as_layershuffle(ours) is ours


@of_both_architectures
def test_plain_and_layershuffle_folders_load(architecture, tmp_path, batch):
    plain, ours = architecture.plain_classifier().eval(), architecture.classifier(shuffle_mode="arbitrary").eval()
    for name, model in (("plain", plain), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
        loaded = load_classifier(str(tmp_path / name)).eval()
        assert isinstance(loaded, architecture.classifier_class)
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    assert loaded.config.shuffle_mode == "arbitrary"


def test_other_models_are_refused(tmp_path):
    blip = BlipTextConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    BlipTextModel(blip).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="is a model of type 'blip_text_model', of which transformers has no classifier"
    ):
        load_classifier(str(tmp_path))
    vit = Architecture("vit")
    with pytest.raises(
        ValueError, match="ViTModel is not a classifier of its whole input; pass a ViTForImageClassification"
    ):
        as_layershuffle(vit.plain_model_class(vit.plain_classifier().config))
    with pytest.raises(OSError, match="no-such-folder"):
        load_classifier(str(tmp_path / "no-such-folder"))


def test_a_model_of_another_task_is_no_classifier():
    masked = transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**{**TINY, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="ViTForMaskedImageModeling is not a classifier of its whole input"):
        as_layershuffle(masked)


@torch.no_grad()
def test_a_head_that_weighs_all_hidden_states_cannot_be_taken_apart():
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=32)
    audio = dict(conv_dim=(32,), conv_kernel=(10,), conv_stride=(5,), num_feat_extract_layers=1, layerdrop=0.0)
    config = transformers.Wav2Vec2Config(**sizes, **audio, use_weighted_layer_sum=True, num_labels=3)
    model = ls.free_order(transformers.Wav2Vec2ForSequenceClassification(config).eval())
    clips = [{"input_values": torch.randn(400), "labels": 0}] * 2
    with pytest.raises(ValueError, match="cannot be taken apart: its forward does more between its layers"):
        ls.score_execution_orders(model, clips, [[0, 1, 2]], progress=False)
