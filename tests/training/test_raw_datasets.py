"""Datasets that a Trainer is given: in wrappers, with epochs, and of raw images."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from datasets import Dataset as ImageTable
from datasets import Image as ImageFeature
from PIL import Image
from support.texts import labelled_texts, text_classifier, tokenizer_of
from support.trainers import RandomImages, Stop, arguments
from torch.utils.data import ConcatDataset, Subset, random_split
from transformers import DataCollatorWithPadding, TrainerState, ViTImageProcessor

import hf_layershuffle as ls
from hf_layershuffle.data.datasets import load_image_datasets, match_labels
from hf_layershuffle.data.image_dataset import ImageClassificationDataset


class Wrapper:
    """One of a user's own, no subclass of PyTorch's."""

    def __init__(self, base):
        self.parts = {"images": base}

    def __len__(self):
        return len(self.parts["images"])

    def __getitem__(self, index):
        return self.parts["images"][index]


def split_in_two(dataset):
    return random_split(dataset, [30, 10], generator=torch.Generator().manual_seed(0))


WRAPPERS = {
    "subset": lambda dataset: Subset(dataset, range(40)),
    "concatenated": lambda dataset: ConcatDataset([Subset(dataset, range(15)), Subset(dataset, range(15, 40))]),
    "random split": lambda dataset: ConcatDataset(split_in_two(dataset)),
    "wrapper": Wrapper,
    "nested": lambda dataset: Subset(Wrapper(ConcatDataset([Wrapper(dataset)])), range(40)),
}


@pytest.mark.parametrize(("name", "workers"), [*((name, 0) for name in WRAPPERS), ("nested", 1)])
def test_augmentation_goes_on_inside_wrappers(vit, tmp_path, name, workers):
    def sums(wrap):
        augmented = ImageClassificationDataset(
            load_image_datasets("digits")["train"].select(range(40)),
            ViTImageProcessor(size={"height": 8, "width": 8}),
            augment=True,
            crop_padding=2,
            horizontal_flip=True,
        )
        model, found = vit.classifier(num_labels=10), []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: found.append(kwargs["pixel_values"].double().sum().item()), with_kwargs=True
        )
        args = arguments(
            tmp_path,
            num_train_epochs=3,
            max_steps=-1,
            per_device_train_batch_size=40,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=bool(workers),
        )
        ls.LayerShuffleTrainer(model, args, train_dataset=wrap(augmented)).train()
        return found

    expected, found = sums(lambda dataset: dataset), sums(WRAPPERS[name])
    assert len(set(found)) == 3
    assert found == pytest.approx(expected, rel=1e-9)


class Epochs(RandomImages):
    def __init__(self):
        super().__init__(24)
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def test_a_dataset_is_told_its_epoch_after_a_resume_too(vit, tmp_path):
    whole, parts = Epochs(), Epochs()
    options = {"num_train_epochs": 3, "max_steps": -1}
    ls.LayerShuffleTrainer(vit.classifier(), arguments(tmp_path, **options), train_dataset=whole).train()
    trainer = ls.LayerShuffleTrainer(
        vit.classifier(), arguments(tmp_path, **options), train_dataset=parts, callbacks=[Stop(4)]
    )
    trainer.train()
    trainer = ls.LayerShuffleTrainer(vit.classifier(), arguments(tmp_path, **options), train_dataset=parts)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    told = [[dict.fromkeys(data.epochs)] for data in (whole, parts)]
    assert told == [[dict.fromkeys([0, 1, 2])]] * 2
    assert all(type(epoch) is int for epoch in parts.epochs)
    # A third, thrice: the sum may lack its last bit
    state = TrainerState(epoch=1.9999999999999998)
    ls.LayerShuffleCallback().on_epoch_begin(None, state, None, train_dataloader=SimpleNamespace(dataset=whole))
    assert whole.epochs[-1] == 2


def raw_digits(**columns):
    dataset = load_image_datasets("digits")["train"].select(range(30))
    return dataset.rename_columns(columns) if columns else dataset


def as_pixels(rows):
    return {"pixel_values": [torch.tensor(image)[None] / 16.0 for image in rows["image"]], "labels": rows["label"]}


@pytest.mark.parametrize("columns", [{}, {"image": "img", "label": "digit"}])
def test_raw_images_are_prepared_by_the_processor(vit, tmp_path, columns):
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    raw = raw_digits()
    names = {str(9 - index): index for index in range(10)}  # the model's classes in another order than the dataset's
    flags = {"num_labels": 10, "num_channels": 1, "label2id": names, "id2label": {i: n for n, i in names.items()}}
    prepared = ImageClassificationDataset(match_labels(raw, vit.config(**flags)), processor, num_channels=1)
    results = []
    for dataset in (prepared, raw_digits(**columns)):
        model = vit.classifier(**flags)
        trainer = ls.LayerShuffleTrainer(
            model,
            arguments(tmp_path),
            train_dataset=dataset,
            eval_dataset={"a": dataset},
            processing_class=processor,
            compute_metrics=ls.compute_metrics,
        )
        trainer.train()
        metrics = trainer.evaluate()["eval_a_loss"], trainer.evaluate(dataset)["eval_loss"]
        results.append((metrics, trainer.predict(dataset).metrics["test_loss"], model.classifier.weight))
    assert results[0][:2] == results[1][:2] and torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize("kind", ["classes", "strings"])
def test_raw_datasets_in_other_class_orders_are_matched_by_name(vit, tmp_path, kind):
    pictures = [Image.fromarray(np.full((8, 8, 3), 40 * row, dtype=np.uint8)) for row in range(4)]
    features = [
        ClassLabel(names=names) for names in (["ant", "bee", "cat", "dog", "elk"], ["elk", "dog", "cat", "bee", "ant"])
    ]
    sets = []
    for feature, names in zip(features, (["ant", "bee", "cat", "dog"], ["dog", "cat", "dog", "cat"])):
        labels = names if kind == "strings" else [feature.str2int(name) for name in names]
        dataset = ImageTable.from_dict({"image": pictures, "label": labels}).cast_column("image", ImageFeature())
        sets.append(dataset.cast_column("label", feature) if kind == "classes" else dataset)
    trainer = ls.LayerShuffleTrainer(
        vit.classifier(), arguments(tmp_path), train_dataset=sets[0], eval_dataset=sets[1],
        processing_class=ViTImageProcessor(size={"height": 8, "width": 8}),
    )  # fmt: skip
    known = trainer.model.config.id2label
    assert [known[int(trainer.train_dataset[row]["labels"])] for row in range(4)] == ["ant", "bee", "cat", "dog"]
    assert [known[int(trainer.eval_dataset[row]["labels"])] for row in range(4)] == ["dog", "cat", "dog", "cat"]


def test_a_transform_is_taken_as_it_is(vit, tmp_path):
    dataset = raw_digits().with_transform(as_pixels)
    model = vit.classifier(num_labels=10, num_channels=1)
    trainer = ls.LayerShuffleTrainer(
        model, arguments(tmp_path), train_dataset=dataset, eval_dataset=dataset, compute_metrics=ls.compute_metrics
    )
    trainer.train()
    rows = as_pixels(raw_digits()[:])
    logits = model.eval()(torch.stack(rows["pixel_values"])).logits
    accuracy = (logits.argmax(-1) == torch.tensor(rows["labels"])).float().mean().item()
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(accuracy)


def test_texts_are_cut_after_the_tokens_that_the_model_takes(tmp_path):
    tokenizer = copy.deepcopy(tokenizer_of())
    tokenizer.model_max_length = int(1e30)  # as of a tokenizer that names no limit
    texts = labelled_texts().map(lambda row: {"text": 5 * f"{row['text']} "})
    args = arguments(tmp_path, max_steps=1)
    trainer = ls.LayerShuffleTrainer(
        text_classifier(), args, train_dataset=texts, eval_dataset=texts, processing_class=tokenizer
    )
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        assert {len(item["input_ids"]) for item in dataset} == {16}
    trainer.train()


def test_batches_of_texts_are_padded_on_the_right_unless_a_collator_is_given(tmp_path):
    left = copy.deepcopy(tokenizer_of())
    left.padding_side = "left"
    given = DataCollatorWithPadding(left)
    args = arguments(tmp_path, max_steps=1)

    def masks(*options, **kwargs):
        trainer = ls.LayerShuffleTrainer(
            text_classifier(), args, *options, train_dataset=labelled_texts(), eval_dataset=labelled_texts(),
            processing_class=left, **kwargs,
        )  # fmt: skip
        loaders = (trainer.get_train_dataloader(), trainer.get_eval_dataloader())
        return [next(iter(loader))["attention_mask"] for loader in loaders]

    assert all(mask[:, 0].all() and not mask[:, -1].all() for mask in masks())
    for kept in (masks(given), masks(data_collator=given)):
        assert all(mask[:, -1].all() and not mask[:, 0].all() for mask in kept)
    assert left.padding_side == "left"


def test_raw_images_without_a_way_to_prepare_them_are_refused(vit, tmp_path):
    model, args = vit.classifier(num_labels=10, num_channels=1), arguments(tmp_path)
    with pytest.raises(ValueError, match=r"`train_dataset` has the columns image, label and no `pixel_values`. Pass"):
        ls.LayerShuffleTrainer(model, args, train_dataset=raw_digits())
    with pytest.raises(ValueError, match=r"`train_dataset` is a stream .* image, label and no `pixel_values`"):
        ls.LayerShuffleTrainer(model, args, train_dataset=raw_digits().to_iterable_dataset())
    with pytest.raises(ValueError, match="The transform of `eval_dataset` gives image, label; it must give"):
        ls.LayerShuffleTrainer(model, args, eval_dataset=raw_digits().with_transform(lambda rows: rows))
    named = raw_digits().cast_column("label", ClassLabel(names=list("abcdefghij")))
    flags = {"num_labels": 2, "id2label": {0: "a", 1: "z"}, "label2id": {"a": 0, "z": 1}}
    with pytest.raises(ValueError, match="the model does not know"):
        ls.LayerShuffleTrainer(
            vit.classifier(**flags), args, train_dataset=named, processing_class=ViTImageProcessor()
        )


def test_texts_as_they_are_are_tokenized(tmp_path):
    args = ls.LayerShuffleTrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, eval_orders=2)
    names = labelled_texts().features["label"].names
    texts = labelled_texts().map(lambda row: {"kind": names[row["label"]]}).remove_columns("label")
    texts = texts.rename_columns({"text": "sentence", "kind": "label"})
    model = text_classifier(shuffle_mode="arbitrary")
    trainer = ls.LayerShuffleTrainer(
        model, args, train_dataset=texts, eval_dataset=labelled_texts(9, seed=2), processing_class=tokenizer_of()
    )
    assert trainer.train_dataset[4]["labels"] == 1 and isinstance(trainer.eval_dataset, ls.TextClassificationDataset)
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_arbitrary_accuracy"] <= 1
    tokenized = labelled_texts().map(lambda rows: tokenizer_of()(rows["text"], truncation=True), batched=True)
    ls.LayerShuffleTrainer(model, args, train_dataset=tokenized, processing_class=tokenizer_of()).train()
    with pytest.raises(ValueError, match=r"the columns text, label and no `input_ids`. Pass the model's tokenizer"):
        ls.LayerShuffleTrainer(model, args, train_dataset=labelled_texts())
    with pytest.raises(ValueError, match="a vocabulary of 50 tokens"):
        ls.LayerShuffleTrainer(
            text_classifier(vocab_size=50), args, train_dataset=labelled_texts(), processing_class=tokenizer_of()
        )
