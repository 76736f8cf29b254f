"""Which tensors outside the layers belong to which part of a merge plan, in each family."""

import pytest
import torch
from support.encoders import ENCODERS
from support.merges import assert_refused
from support.timm_without_torchvision import use_timm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)
from transformers.initialization import no_init_weights

import hf_layershuffle as ls
from hf_layershuffle.merging.merged_model import prepare_merge
from hf_layershuffle.merging.merged_tensors import part_of
from hf_layershuffle.merging.plan import MergePlan
from hf_layershuffle.models.layer_lists import find_layers


SIZES = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
BOTH = ("weight", "bias")
TIMM = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2)
MODELS = {
    "timm": lambda: TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=TIMM, num_labels=3)
    ),
    "gpt2": lambda: GPT2ForSequenceClassification(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, pad_token_id=0)
    ),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES)),
}


def plan_of(name, tmp_path, **parts) -> MergePlan:
    """A plan that takes the layers of `a`, of two models of a family."""
    for source in "ab":
        ls.free_order(MODELS[name]()).save_pretrained(tmp_path / source)
    layers = [{"source": "a", "layer": index} for index in range(2)]
    return MergePlan(sources={source: str(tmp_path / source) for source in "ab"}, layers=layers, **parts)


@pytest.mark.parametrize(
    ("name", "part", "expected"),
    [
        ("timm", "classifier", {"timm_model.head.weight", "timm_model.head.bias"}),
        ("timm", "embeddings", {f"timm_model.{n}" for n in ("cls_token", "pos_embed")}
            | {f"timm_model.patch_embed.proj.{kind}" for kind in BOTH}),
        ("timm", "layernorm", {"timm_model.norm.weight", "timm_model.norm.bias"}),
        ("gpt2", "embeddings", {"transformer.wte.weight", "transformer.wpe.weight"}),
        ("gpt2", "layernorm", {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
        ("bert", "classifier", {f"{n}.{kind}" for n in ("classifier", "bert.pooler.dense") for kind in BOTH}),
    ],
)  # fmt: skip
def test_a_part_is_all_of_what_belongs_together(name, part, expected, tmp_path, monkeypatch):
    use_timm(monkeypatch)
    prepared = prepare_merge(plan_of(name, tmp_path, **{part: "b"}))
    found = {tensor.name for tensor in prepared.tensors if [stored.source for stored, _ in tensor.inputs] == ["b"]}
    assert found == expected


@pytest.mark.parametrize(("name", "part"), [("roberta", "layernorm"), ("bert", "depth_embedding")])
def test_a_part_that_the_models_lack_is_refused(name, part, tmp_path):
    plan = plan_of(name, tmp_path, **{part: "b"})
    assert_refused(
        plan, tmp_path, f"`{part}` names 'b', .* have no such part .*; there are embeddings, classifier. Leave"
    )
    prepare_merge(MergePlan.average([plan.sources[source].path for source in "ab"]))  # which says it of all parts
    prepare_merge(plan_of(name, tmp_path, **{part: "a"}))  # as without it


@pytest.mark.parametrize(
    "encoder", [each for each in ENCODERS.values() if each.is_classifier], ids=lambda each: each.name
)
def test_embeddings_and_heads_of_all_families_are_found(encoder):
    with torch.device("meta"), no_init_weights():
        model = encoder.plain_class(encoder.config())
    path = find_layers(model)
    parts = {name: part_of(name, path) for name in model.state_dict()}
    assert {"embeddings", "classifier"} <= set(parts.values()) <= {"embeddings", "layernorm", "classifier", None}
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        embeddings = torch.nn.Module()
    first = {id(parameter) for parameter in embeddings.parameters()}
    assert {parts[name] for name, each in model.named_parameters() if id(each) in first} <= {"embeddings"}
    rest = [name for name, part in parts.items() if part == "layernorm"]
    others = (
        "vjepa2.predictor",
        "deberta.encoder.conv",
        "esm.contact_head",
        "backbone.summary_idxs",
        "transformer.ln_f",
    )
    assert all("norm" in name.lower() or "layrnorm" in name or name.startswith(others) for name in rest), rest
