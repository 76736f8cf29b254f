"""In what order items are trained on: of the seed and the epoch, also after a resume and in several processes."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from support.texts import labelled_texts, text_classifier, tokenizer_of
from support.trainers import Stop, arguments
from torch.utils.data import DataLoader, RandomSampler
from transformers import TrainerState

import hf_layershuffle as ls
from hf_layershuffle.training.length_sampler import SeededLengthSampler


@pytest.mark.parametrize("workers", [0, 2])
def test_texts_of_like_length_go_on_in_their_order_after_a_resume(tmp_path, workers):
    texts = labelled_texts(40).map(lambda rows: tokenizer_of()(rows["text"], truncation=True), batched=True)
    texts = texts.remove_columns("text").rename_columns({"label": "labels"})
    options = dict(train_sampling_strategy="group_by_length", num_train_epochs=3, max_steps=-1)

    def run(folder, resume=None, callbacks=()):
        model, batches = text_classifier(shuffle_mode="arbitrary", hidden_dropout_prob=0.1), []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: batches.append(kwargs["input_ids"].tolist()), with_kwargs=True
        )
        args = arguments(folder, dataloader_num_workers=workers, **options)
        trainer = ls.LayerShuffleTrainer(
            model, args, train_dataset=texts, processing_class=tokenizer_of(), callbacks=list(callbacks)
        )
        trainer.train(resume_from_checkpoint=resume)
        return batches, model.state_dict()

    whole, weights = run(tmp_path / "whole")
    first, _ = run(tmp_path / "parts", callbacks=[Stop(7)])
    torch.rand(1000)
    second, resumed = run(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-7"))
    assert first + second == whole and len(whole) == 15
    assert whole[:5] != whole[5:10]
    assert all(torch.equal(each, resumed[name]) for name, each in weights.items())


def samplers():
    lengths = torch.randint(1, 50, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    return {"random": RandomSampler(range(40)), "group_by_length": SeededLengthSampler(4, lengths, seed=3)}


@pytest.mark.parametrize("name", samplers())
@pytest.mark.parametrize("num_processes", [1, 2])
def test_processes_share_the_items_of_an_epoch_after_a_resume_too(name, num_processes):
    def batches(epoch, rank, skipped=0):
        torch.rand(rank)  # random numbers that others do not draw
        loader = DataLoader(range(40), batch_size=4, sampler=samplers()[name])
        loader = prepare_data_loader(
            loader, num_processes=num_processes, process_index=rank, use_seedable_sampler=True, data_seed=3
        )
        ls.LayerShuffleCallback().on_epoch_begin(None, TrainerState(epoch=epoch), None, train_dataloader=loader)
        loader = skip_first_batches(loader, skipped) if skipped else loader
        loader.set_epoch(epoch)
        return [batch.tolist() for batch in loader]

    ranks = range(num_processes)
    orders = [[batches(epoch, rank) for rank in ranks] for epoch in (0, 2)]
    for whole in orders:
        assert sorted(item for rank in ranks for batch in whole[rank] for item in batch) == list(range(40))
    assert orders[0] != orders[1]
    assert [batches(2, rank, skipped=2) for rank in ranks] == [whole[2:] for whole in orders[1]]


def test_the_callback_takes_what_has_no_sampler():
    for loader in (None, SimpleNamespace(), SimpleNamespace(batch_sampler=None)):
        ls.LayerShuffleCallback().on_epoch_begin(None, TrainerState(epoch=1), None, train_dataloader=loader)
