"""Encoders of several families: threads, fresh processes, taken apart, shortened, merged; and what is refused.

What each family must pass by itself is in test_encoders.py.
"""

import copy
import threading

import pytest
import torch
import transformers
from conftest import run_python
from safetensors.torch import load_file, save_file
from support import encoder_checks
from support.encoder_checks import fresh_model, same
from support.encoders import BERT, ENCODERS, IMAGE, SIZES, images, texts
from support.models import EXTRAS
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForSequenceClassification

import hf_layershuffle as ls
from hf_layershuffle.hub.published_files import check_folder
from hf_layershuffle.layerwise import LayerwiseClassifier, load_classifier
from hf_layershuffle.models.modeling_layershuffle import layershuffle_class
from hf_layershuffle.models.order_check import residual_writers


# Some of those of test_encoders.py, for what is more than one check
MODELS = {
    "vit": ENCODERS["ViT"],
    "deit": ENCODERS["DeiT"],
    "dinov2": ENCODERS["DINOv2"],
    "beit": ENCODERS["BEiT, relative bias"],
    "siglip vision": ENCODERS["SigLIP, vision tower"],
    "siglip": ENCODERS["SigLIP"],
    "bert": ENCODERS["BERT"],
    "bert encoder": ENCODERS["BERT, encoder"],
}
CLASSIFIERS = [name for name, encoder in MODELS.items() if encoder.is_classifier]
ORDERS = ([2, 0, 3, 1], [3, 1], [0, 1, 1, 2, 3, 3])


def plain_model(name: str, seed: int = 0) -> nn.Module:
    return copy.deepcopy(encoder_checks.plain_model(MODELS[name], seed=seed))


def free_model(name: str, **flags) -> nn.Module:
    return encoder_checks.free_model(MODELS[name], **flags)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_threads_with_other_orders_do_not_see_each_other(name):
    inputs, model, found = MODELS[name].inputs(), free_model(name), {}
    orders = [None, *ORDERS]

    def run(number: int) -> None:
        with torch.no_grad():
            found[number] = [model(**inputs, execution_order=orders[number]) for _ in range(4)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(orders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, order in enumerate(orders):
        expected = model(**inputs, execution_order=order)
        assert all(same(each, expected) for each in found[number])


AUTO = {"bert": AutoModelForSequenceClassification, "siglip vision": AutoModel, "bert encoder": AutoModel}
FRESH_PROCESS = """
import sys
import torch, transformers
if sys.argv[1] == "package":
    import hf_layershuffle
else:
    sys.modules["hf_layershuffle"] = None  # not installed
trust = {"trust_remote_code": sys.argv[1] != "package"}
for folder in sys.argv[2:]:
    expected = torch.load(f"{folder}/expected.pt", weights_only=True)
    auto = getattr(transformers, expected.pop("auto"))
    model = auto.from_pretrained(folder, **trust).eval()
    with torch.no_grad():
        output = model(**expected["inputs"], execution_order=[2, 0, 3, 1])
    assert torch.equal(output.to_tuple()[0], expected["output"]), folder
    assert torch.equal(output.execution_order, torch.tensor([2, 0, 3, 1]))
    if not folder.endswith("/siglip"):  # whose text tower a classifier's folder has not
        assert type(transformers.AutoModel.from_pretrained(folder, **trust)).__name__.startswith("LayerShuffle")
"""


@pytest.fixture(scope="module")
def saved_folders(tmp_path_factory) -> list:
    folders = []
    for name in MODELS:
        folder = tmp_path_factory.mktemp("saved") / name.replace(" ", "-")
        inputs, model = MODELS[name].inputs(), free_model(name, **EXTRAS)
        model.save_pretrained(folder)
        auto = AUTO.get(name, AutoModelForImageClassification).__name__
        with torch.no_grad():
            output = model(**inputs, execution_order=[2, 0, 3, 1]).to_tuple()[0]
        torch.save({"auto": auto, "inputs": inputs, "output": output}, folder / "expected.pt")
        folders.append(folder)
    return folders


@pytest.mark.parametrize("how", ["package", "remote code"])
def test_auto_classes_load_every_family_in_a_fresh_process(saved_folders, how, tmp_path):
    result = run_python(FRESH_PROCESS, how, *saved_folders, environment={"HF_MODULES_CACHE": str(tmp_path)})
    assert result.returncode == 0, result.stderr


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("flags", [{}, EXTRAS], ids=["no flags", "flags"])
def test_taken_apart_and_put_together_it_is_the_model(name, flags):
    inputs, model = MODELS[name].inputs(), free_model(name, **flags)
    parts = LayerwiseClassifier(model)
    for _ in range(2):  # the second time with what was learned of the tail
        hidden_states = parts.embed(inputs)
        for position, index in enumerate(ORDERS[2]):
            hidden_states, position_logits = parts.run_layer(hidden_states, index, position)
            assert (position_logits is None) == (not flags)
        expected = model(**inputs, execution_order=ORDERS[2]).logits
        assert torch.equal(parts.classify(hidden_states), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_evaluation_pruning_and_the_plain_export_know_every_family(name):
    inputs, model = MODELS[name].inputs(), free_model(name)
    items = [{key: value[i] for key, value in inputs.items()} | {"labels": i} for i in range(2)]
    scores = ls.score_execution_orders(model, items, ORDERS, batch_size=2, progress=False)
    for score, order in zip(scores, ORDERS):
        logits = model(**inputs, execution_order=order).logits
        assert score.accuracy == pytest.approx((logits.argmax(-1) == torch.arange(2)).float().mean().item())
        assert score.loss == pytest.approx(nn.functional.cross_entropy(logits, torch.arange(2)).item(), abs=1e-5)
    expected = model(**inputs, execution_order=[3, 1]).logits
    assert torch.equal(ls.prune_layers(model, [3, 1]).eval()(**inputs).logits, expected)
    plain = ls.to_plain_vit(model, [3, 1])
    assert type(plain) is type(plain_model(name)) and type(plain.config) is type(plain_model(name).config)
    assert torch.equal(plain(**inputs).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "beit", "siglip"])
def test_the_residual_writers_of_a_pre_norm_layer_make_it_the_identity_at_zero(name):
    model = fresh_model(MODELS[name], residual_init_scale=0.0)
    names = residual_writers(model.plain_class, model.config)
    assert len(names) == 2
    for layer in model.free_layers:
        assert not any(layer.get_submodule(name).weight.any() for name in names)
    assert same(*(model(**images(), execution_order=order) for order in ([0, 1, 2, 3], [2, 0])))


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_whether_a_loss_is_divided_by_the_trainers_count_is_known(name):
    inputs, model = MODELS[name].inputs(), free_model(name)
    labels = torch.tensor([0, 1])
    mean = model(**inputs, labels=labels).loss
    counted = model(**inputs, labels=labels, num_items_in_batch=4).loss
    assert getattr(model, "accepts_loss_kwargs", True) == (not torch.equal(counted, mean))
    torch.testing.assert_close(counted, mean / 2 if getattr(model, "accepts_loss_kwargs", True) else mean)


def test_training_draws_orders_in_every_family():
    for name in MODELS:
        model = free_model(name, shuffle_mode="arbitrary").train()
        model.seed_execution_order(0)
        orders = {tuple(model(**MODELS[name].inputs()).execution_order.tolist()) for _ in range(8)}
        assert len(orders) > 3 and all(sorted(order) == [0, 1, 2, 3] for order in orders)


def test_a_model_made_free_in_place_leaves_others_of_its_configuration_alone():
    plain = plain_model("dinov2")
    other = type(plain)(plain.config).eval()
    free = ls.free_order(plain, shuffle_mode="arbitrary")
    assert free is plain and type(free).__name__ == "LayerShuffleDinov2ForImageClassification"
    assert free.config.shuffle_mode == "arbitrary" and free.base_model.config is free.config
    assert type(other.config) is transformers.Dinov2Config
    with pytest.raises(ValueError, match="has free layer order already"):
        ls.free_order(free)
    with pytest.raises(ValueError, match="`shuffle` is not a flag of free layer order; these are shuffle_mode"):
        ls.free_order(plain_model("bert"), shuffle=True)
    with pytest.raises(ValueError, match="`model` is a Linear; pass a model of transformers"):
        ls.free_order(nn.Linear(1, 1))


class TwoListsViT(transformers.ViTModel):
    def __init__(self, config):
        super().__init__(config)
        self.more_layers = copy.deepcopy(self.layers)


def test_models_without_one_list_of_layers_are_refused():
    config = MODELS["vit"].config()
    with pytest.raises(ValueError, match=r"TwoListsViT has 2 lists of layers \(layers, more_layers\)"):
        ls.free_order(TwoListsViT(config))
    model = transformers.ViTModel(config)
    del model.layers
    with pytest.raises(ValueError, match="ViTModel has no list of layers, of as many equal modules as its config"):
        ls.free_order(model)


def test_layers_that_depend_on_the_first_are_refused():
    model = transformers.ViTModel(MODELS["vit"].config())
    model.layers[0].attention.bias_of_all = nn.Embedding(4, 2)
    with pytest.raises(ValueError, match=r"first layer of ViTModel alone holds 'attention.bias_of_all.weight'"):
        ls.free_order(model)


class IndexedViT(transformers.ViTModel):
    """A model that does not ask its list for the next layer."""

    def forward(self, pixel_values, return_dict=None):
        hidden_states = self.embeddings(pixel_values)
        for index in range(len(self.layers)):
            hidden_states = self.layers[index](hidden_states)
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=hidden_states)


class ShortViT(transformers.ViTModel):
    """A model whose loop ends by itself."""

    def forward(self, pixel_values, return_dict=None):
        hidden_states = self.embeddings(pixel_values)
        for _, layer in zip(range(4), self.layers):
            hidden_states = layer(hidden_states)
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=hidden_states)


@pytest.mark.parametrize(("plain", "took"), [(IndexedViT, "no layer"), (ShortViT, "4 of the 6 layers of the order")])
def test_a_forward_that_does_not_follow_the_order_says_so(plain, took):
    model = ls.free_order(plain(MODELS["vit"].config()).eval())
    with pytest.raises(ValueError, match=f"took {took} by iterating its list of layers"):
        model(**images(), execution_order=[0, 1, 1, 2, 3, 3])


def test_two_classes_of_one_name_are_two_classes():
    other = type("ViTModel", (transformers.ViTModel,), {"__module__": "elsewhere"})
    assert layershuffle_class(other).plain_class is other
    assert layershuffle_class(transformers.ViTModel).plain_class is transformers.ViTModel


def test_a_configuration_of_a_plain_model_is_refused_with_the_remedy():
    made = layershuffle_class(transformers.ViTModel)
    with pytest.raises(ValueError, match=r"LayerShuffleViTModel needs a LayerShuffleViTConfig, not a ViTConfig"):
        made(MODELS["vit"].config())


def test_auto_classes_know_what_was_never_imported():
    assert AutoConfig.for_model("layershuffle_modernbert").plain_model_type == "modernbert"
    with pytest.raises(ValueError, match="layershuffle_no_such_model"):
        AutoConfig.for_model("layershuffle_no_such_model")


# --- What breaks a family apart, and is refused or mended ---


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_shorter_models_are_saved_and_loaded(name, tmp_path):
    inputs = MODELS[name].inputs()
    model = free_model(name)
    expected = model(**inputs, execution_order=[2, 0]).logits
    pruned = ls.prune_layers(model, [2, 0])
    pruned.save_pretrained(tmp_path / "pruned")
    assert torch.equal(type(pruned).from_pretrained(tmp_path / "pruned").eval()(**inputs).logits, expected)
    plain = ls.to_plain_vit(model, [2, 0])
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(type(plain).from_pretrained(tmp_path / "plain").eval()(**inputs).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2", "beit", "siglip", "bert"])
def test_other_families_are_merged_and_published_with_a_card(name, tmp_path):
    for seed in (0, 1):
        ls.free_order(plain_model(name, seed=seed)).save_pretrained(tmp_path / str(seed))
    sources = {"a": str(tmp_path / "0"), "b": str(tmp_path / "1")}
    plan = ls.MergePlan(sources=sources, base="a", layers=[{"source": x, "layer": i} for i, x in enumerate("aba")])
    folder = ls.merge(plan, tmp_path / "merged", progress=False)
    check_folder(folder)
    card = (folder / "README.md").read_text()
    kind = "text" if name == "bert" else "image"
    assert f"{kind} classifier of type `layershuffle_{name}` with 3 layers" in card
    assert "a width of 32 and 4 attention heads" in card and f'pipeline("{kind}-classification"' in card
    assert ("image" in card) == (kind == "image")
    merged = load_classifier(str(folder)).eval()
    pool = free_model(name)
    other = ls.free_order(plain_model(name, seed=1))
    pool.free_layers[1].load_state_dict(other.free_layers[1].state_dict())
    inputs = MODELS[name].inputs()
    torch.testing.assert_close(merged(**inputs).logits, pool(**inputs, execution_order=[0, 1, 2]).logits)


def test_towers_that_do_not_fit_are_not_merged(tmp_path):
    free_model("siglip").save_pretrained(tmp_path / "a")
    config = MODELS["siglip"].config()
    config.vision_config.num_attention_heads = 2
    ls.free_order(transformers.SiglipForImageClassification(config)).save_pretrained(tmp_path / "b")
    plan = ls.MergePlan.random({name: str(tmp_path / name) for name in "ab"}, seed=0)
    with pytest.raises(ValueError, match="`num_attention_heads` is 4 in 'a' and 2 in 'b'"):
        ls.merge(plan, tmp_path / "merged", progress=False)


@torch.no_grad()
def test_layers_that_know_where_they_were_built_stay_there():
    sizes = {**BERT, "local_attention": 4, "global_attn_every_n_layers": 2, "pad_token_id": 0}
    special = {f"{name}_token_id": number for number, name in enumerate(("bos", "eos", "cls", "sep"), 1)}
    config = transformers.ModernBertConfig(**sizes, **special, num_labels=5)
    model = ls.free_order(transformers.ModernBertForSequenceClassification(config).eval())
    assert model(**texts(), execution_order=[2, 1]).execution_order.tolist() == [2, 1]
    for build in (ls.prune_layers, ls.to_plain_vit):
        with pytest.raises(ValueError, match=r"Layer 1 cannot stand at position 0: its '.*' is not that of layer 0"):
            build(model, [1, 0])


@torch.no_grad()
def test_a_family_that_does_more_between_its_layers_is_not_taken_apart():
    sizes = {**BERT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
    config = transformers.DebertaV2Config(**sizes, conv_kernel_size=3, pad_token_id=0, num_labels=5)
    model = ls.free_order(transformers.DebertaV2ForSequenceClassification(config).eval())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    with pytest.raises(ValueError, match="cannot be taken apart: its forward does more between its layers"):
        ls.score_execution_orders(model, [dict(zip(texts(), (row[0] for row in texts().values())), labels=0)], [[0]])


@torch.no_grad()
def test_a_backbones_order_is_as_long_as_the_model_since_feature_maps_go_by_the_position():
    config = transformers.Dinov2Config(**SIZES, **IMAGE, out_features=["stage2", "stage4"])
    model = ls.free_order(transformers.Dinov2Backbone(config).eval())
    assert len(model(**images(), execution_order=[3, 1, 0, 2]).feature_maps) == 2
    for order in ([3, 1], [0, 1, 2, 3, 0]):
        with pytest.raises(ValueError, match=rf"has {len(order)} layers, and .* gives feature maps by the position"):
            model(**images(), execution_order=order)


def test_a_familys_own_layerdrop_is_refused_and_its_labels_are_taken():
    sizes = dict(conv_dim=(32,), conv_kernel=(10,), conv_stride=(5,), num_feat_extract_layers=1, vocab_size=32)
    sizes |= dict(num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, apply_spec_augment=False, num_labels=5)
    config = transformers.Wav2Vec2Config(**SIZES, **sizes, layerdrop=0.0)
    model = ls.free_order(transformers.Wav2Vec2ForSequenceClassification(config), shuffle_mode="arbitrary").train()
    assert model(input_values=torch.randn(2, 400), labels=torch.tensor([0, 4])).loss.isfinite()
    with pytest.raises(ValueError, match=r"`layerdrop` is 0\.5, and .* leaves layers out by itself"):
        ls.free_order(transformers.Wav2Vec2ForSequenceClassification(config), layerdrop=0.5)


@torch.no_grad()
def test_a_cache_does_not_change_what_a_repeat_computes():
    config = transformers.LlamaConfig(**BERT, num_labels=5, pad_token_id=0)
    model = ls.free_order(transformers.LlamaForSequenceClassification(config).eval())
    inputs = {"input_ids": texts()["input_ids"]}
    expected = model(**inputs, execution_order=[0, 1, 1], use_cache=False).logits
    assert torch.equal(model(**inputs, execution_order=[0, 1, 1]).logits, expected)


def test_initial_weights_are_not_scaled_afterwards():
    with pytest.raises(ValueError, match=r"`residual_init_scale` is 0\.5, which is of initial weights"):
        ls.free_order(plain_model("vit"), residual_init_scale=0.5)


def test_a_new_head_on_a_tower_is_new(tmp_path):
    plain = plain_model("siglip")
    plain.save_pretrained(tmp_path)
    made = type(free_model("siglip"))
    tensors = {
        key: value for key, value in load_file(tmp_path / "model.safetensors").items() if "classifier" not in key
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = made.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    save_file({key: value for key, value in tensors.items() if "layers.2." not in key}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks tensors of this model"):
        made.from_pretrained(tmp_path)


def test_the_first_map_of_an_mlp_learns_where_it_is_as_wide_as_the_stream():
    config = transformers.ViTConfig(**{**SIZES, "intermediate_size": 32}, **IMAGE)
    assert residual_writers(transformers.ViTModel, config) == ("attention.o_proj", "mlp.fc2")


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_fresh_layers_of_every_family_begin_by_adding_nothing(name):
    """Also where a plain encoder inside the model initialises what is in its layers."""
    model = fresh_model(MODELS[name], residual_init_scale=0.0, **EXTRAS).eval()
    for module in model.modules():
        if getattr(module, "starts_at_zero", False):
            assert not module.weight.any()
    if name != "bert":  # whose LayerNorms after the additions change what they get
        logits = [model(**MODELS[name].inputs(), execution_order=order).logits for order in ([0, 1, 2, 3], [3, 1])]
        assert torch.equal(*logits)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_step_of_micro_batches_is_their_mean_for_every_family(name, tmp_path):
    inputs = MODELS[name].inputs()
    items = [{key: value[index] for key, value in inputs.items()} | {"labels": index} for index in (0, 1)]
    gradient_norms = []
    for size in (2, 1):
        args = ls.LayerShuffleTrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=2 // size,
            use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, max_grad_norm=1e9,
        )  # fmt: skip
        model = ls.free_order(plain_model(name))
        for module in model.modules():
            module.p = 0.0 if isinstance(module, nn.Dropout) else getattr(module, "p", None)
        trainer = ls.LayerShuffleTrainer(model, args, train_dataset=items)
        trainer.train()
        gradient_norms.append(trainer.state.log_history[0]["grad_norm"])
    assert gradient_norms[0] == pytest.approx(gradient_norms[1], rel=1e-3)
