import gc
import json
import threading

import pytest
import torch
from support.encoder_checks import plain_model
from support.encoders import ENCODERS, texts
from support.models import EXTRAS, randomize

import hf_layershuffle as ls
from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.swarm.layer_worker import LayerWorker
from hf_layershuffle.swarm.split_model import SplitModel
from hf_layershuffle.swarm.transport import LayerCall


FAMILIES = ("ViT", "DINOv2", "BERT", "ModernBERT", "data2vec vision", "Qwen3 with sliding attention, classifier")
FAMILIES += ("SigLIP", "BEiT, shared bias", "TimeSformer", "HuBERT")
ORDERS = ([0, 1, 2, 3], [2, 0, 3, 1], [3, 1])


def through_workers(split: SplitModel, workers: list[LayerWorker], order: list[int], inputs) -> torch.Tensor:
    """The logits of layers that run one after the other on whichever worker holds them."""
    request = split.request(inputs)
    states = request.hidden_states
    for position, layer in enumerate(order):
        worker = next(each for each in workers if layer in each.info.layers)
        args, kwargs = request.call(layer)
        states = worker.run(LayerCall("request", layer, position, states, args, kwargs)).hidden_states
    return request.classify(states)


def assert_like_the_local_model(folder, inputs, orders=ORDERS, **options) -> None:
    local = load_classifier(folder, **options).eval()
    split = SplitModel.from_pretrained(folder, **options)
    workers = [LayerWorker(folder, split.layers[half::2], **options) for half in (0, 1)]
    assert {**workers[0].info.digests, **workers[1].info.digests, "rest": split.digests["rest"]} == split.digests
    seen = []
    for order in orders:
        with torch.no_grad():
            expected = local(**inputs, execution_order=order).logits
        given = through_workers(split, workers, order, inputs)
        assert given.dtype == expected.dtype
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)
        seen.append(given)
    assert not any(torch.allclose(seen[0], other, atol=1e-3) for other in seen[1:])  # the order matters


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_models_of_any_family(name, tmp_path):
    encoder = ENCODERS[name]
    plain_model(encoder).save_pretrained(tmp_path)
    inputs = encoder.inputs()
    inputs.pop("use_cache", None)
    assert_like_the_local_model(tmp_path, inputs)


@pytest.mark.parametrize("flags", [{}, EXTRAS, {"residual_init_scale": 0.5, "shuffle_mode": "arbitrary"}])
def test_free_models_with_and_without_what_tells_layers_their_position(vit, batch, flags, tmp_path):
    randomize(vit.classifier(**flags)).save_pretrained(tmp_path)
    assert_like_the_local_model(tmp_path, {"pixel_values": batch["pixel_values"]})
    assert SplitModel.from_pretrained(tmp_path).config.residual_init_scale == flags.get("residual_init_scale", 1.0)


@pytest.mark.parametrize("stored", [True, False])
def test_models_in_bfloat16(vit, batch, stored, tmp_path):
    model = randomize(vit.classifier(**EXTRAS))
    (model.bfloat16() if stored else model).save_pretrained(tmp_path)
    options = {} if stored else {"dtype": torch.bfloat16}
    assert SplitModel.from_pretrained(tmp_path, **options).dtype == torch.bfloat16
    assert_like_the_local_model(tmp_path, {"pixel_values": batch["pixel_values"].bfloat16()}, **options)


def test_a_pruned_model(vit, batch, tmp_path):
    model = ls.prune_layers(randomize(vit.classifier(num_hidden_layers=6, **EXTRAS)).eval(), [5, 0, 3])
    model.save_pretrained(tmp_path)
    assert_like_the_local_model(tmp_path, {"pixel_values": batch["pixel_values"]}, orders=([0, 1, 2], [2, 0], [1]))


def test_only_the_layers_of_the_execution_order_are_asked_for(vit, batch, tmp_path):
    model = randomize(vit.classifier(execution_order=[3, 0, 2])).eval()
    model.save_pretrained(tmp_path)
    split = SplitModel.from_pretrained(tmp_path)
    assert split.layers == [3, 0, 2] and split.digests.keys() == {3, 0, 2, "rest"}
    logits = through_workers(split, [LayerWorker(tmp_path, [0, 2, 3])], split.layers, batch["pixel_values"])
    torch.testing.assert_close(logits, model(batch["pixel_values"]).logits, atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"execution_order": [0, 0, 1]}))
    with pytest.raises(ValueError, match=r"`execution_order` of '.*' is \[0, 0, 1\], which runs a layer more than"):
        SplitModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"execution_order": "arbitrary"}))
    assert SplitModel.from_pretrained(tmp_path).layers == [0, 1, 2, 3]


@pytest.mark.parametrize("part", ["classifier", "vit.embeddings"])
def test_another_head_or_other_embeddings_have_another_digest(vit, part, tmp_path):
    model = vit.classifier()
    model.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        next(model.get_submodule(part).parameters()).add_(1)
    model.save_pretrained(tmp_path / "other")
    one, other = (SplitModel.from_pretrained(tmp_path / name).digests for name in ("one", "other"))
    assert {name for name in one if one[name] != other[name]} == {"rest"}


def test_the_layers_take_no_memory(vit, tmp_path):
    vit.classifier(num_hidden_layers=8).save_pretrained(tmp_path)
    gc.collect()
    before = {id(each) for each in gc.get_objects() if isinstance(each, torch.Tensor)}
    split = SplitModel.from_pretrained(tmp_path)
    gc.collect()
    found = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and id(each) not in before]
    held = sum(each.untyped_storage().nbytes() for each in found if not each.is_meta)
    rest = [each for name, each in split.model.named_parameters() if "layers." not in name]
    assert held == sum(each.nbytes for each in rest) > 0


def test_several_requests_at_a_time_do_not_see_each_other(tmp_path):
    plain_model(ENCODERS["BERT"]).save_pretrained(tmp_path)
    split, worker = SplitModel.from_pretrained(tmp_path), LayerWorker(tmp_path, [0, 1, 2, 3])
    batches = [{name: value[:, : 4 + length] for name, value in texts().items()} for length in range(6)]
    expected = [through_workers(split, [worker], [0, 1, 2, 3], batch) for batch in batches]
    requests = [split.request(batch) for batch in batches]  # all open before the first goes on
    for request, logits in zip(requests, expected):
        states = request.hidden_states
        for position in range(4):
            args, kwargs = request.call(position)
            states = worker.run(LayerCall("", position, position, states, args, kwargs)).hidden_states
        assert torch.equal(request.classify(states), logits)
    wrong = []

    def run(index: int) -> None:
        for _ in range(5):
            if not torch.equal(through_workers(split, [worker], [0, 1, 2, 3], batches[index]), expected[index]):
                wrong.append(index)

    running = [threading.Thread(target=run, args=(index,)) for index in range(6)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    assert wrong == []


def test_logits_are_tensors_like_others(vit, batch, tmp_path):
    vit.classifier().save_pretrained(tmp_path)
    split, worker = SplitModel.from_pretrained(tmp_path), LayerWorker(tmp_path, [0, 1, 2, 3])
    logits = through_workers(split, [worker], [0, 1], batch["pixel_values"])
    logits.add_(1)
    assert not logits.is_inference() and not logits.requires_grad


@pytest.fixture(scope="module")
def vit_split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    plain_model(ENCODERS["ViT"]).save_pretrained(folder)
    return SplitModel.from_pretrained(folder)


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NAN = IMAGES.clone()
NAN[1, 0, 3, 3] = float("nan")


@pytest.mark.parametrize(
    "inputs, message",
    [
        (IMAGES[:, :1], r"`pixel_values` has 1 channels \(shape \(2, 1, 16, 16\)\); this model takes 3"),
        (
            IMAGES[0],
            r"`pixel_values` has shape \(3, 16, 16\); it must be a batch of images, such as \(batch_size, 3, 16",
        ),
        (IMAGES[:0], r"`pixel_values` has shape \(0, 3, 16, 16\); it must hold at least one example"),
        (IMAGES.to(torch.uint8), "`pixel_values` is of torch.uint8; it must be of floats, as processors give them"),
        (NAN, "`pixel_values` holds NaN or infinite values"),
        (IMAGES.numpy(), "`pixel_values` is of type ndarray; it must be a tensor"),
        ({"pixels": IMAGES}, "`pixels` is no input of this model; it takes pixel_values"),
        ({"pixel_values": IMAGES, "labels": torch.zeros(2)}, "`labels` is no input of this model"),
        ({"bool_masked_pos": None}, "`pixel_values` is missing"),
        (torch.randn(2, 3, 12, 16), r"does not take these inputs, of shapes `pixel_values` \(2, 3, 12, 16\): .*12"),
    ],
)
def test_images_that_the_model_does_not_take_are_refused(vit_split, inputs, message):
    with pytest.raises(ValueError, match=message):
        vit_split.request(inputs)


def test_images_in_another_float_are_converted_and_options_by_name_are_taken(vit_split):
    assert vit_split.request(IMAGES.double()).hidden_states.dtype == torch.float32
    larger = torch.randn(1, 3, 24, 24)
    request = vit_split.request({"pixel_values": larger, "interpolate_pos_encoding": True})
    assert request.hidden_states.shape == (1, 37, 32)
    assert request.classify(request.hidden_states).shape == (1, 5)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"input_ids": torch.full((2, 12), 100)},
            "`input_ids` holds 100; this model's tokens have ids from 0 to 99",
        ),
        ({"input_ids": torch.full((2, 12), -1)}, "`input_ids` holds -1"),
        ({"input_ids": torch.ones(2, 12)}, "`input_ids` is of torch.float32; it must be of integers"),
        ({"input_ids": torch.ones(12).long()}, r"`input_ids` has shape \(12,\); it must be \(batch_size, tokens\)"),
        ({"attention_mask": torch.ones(2, 11)}, r"`attention_mask` has shape \(2, 11\), and `input_ids` \(2, 12\)"),
        ({"input_ids": torch.ones(2, 65).long()}, "`input_ids` has 65 tokens; this model takes 64"),
        ({"pixel_values": IMAGES}, "`pixel_values` is no input of this model"),
    ],
)
def test_texts_that_the_model_does_not_take_are_refused(change, message, tmp_path):
    plain_model(ENCODERS["BERT"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        SplitModel.from_pretrained(tmp_path).request(texts() | change)


def test_families_that_cannot_be_taken_apart_are_refused(tmp_path):
    plain_model(ENCODERS["DeBERTa-v2"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot run on workers: .*DebertaV2.* cannot be taken apart: its"):
        SplitModel.from_pretrained(tmp_path)


def test_models_without_a_head_are_refused(tmp_path):
    plain_model(ENCODERS["ViT"]).vit.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no trained image classifier: its weights lack"):
        SplitModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 8, device="meta"), "`pixel_values` is a tensor on 'meta'; it must be a dense one"),
        (torch.zeros(1, 3, 8, 8).to_sparse(), "`pixel_values` is a tensor of torch.sparse_coo"),
        (torch.nested.nested_tensor([torch.zeros(3, 8, 8)]), "`pixel_values` is a tensor nested"),
    ],
)
def test_tensors_without_numbers_of_their_own_are_refused(images, message, vit_split):
    with pytest.raises(ValueError, match=message):
        vit_split.request(images)
