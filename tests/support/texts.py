"""A few texts that can be told apart by their words, and tiny models of texts with a tokenizer of their own."""

import random
from functools import cache
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Features, Value

import hf_layershuffle as ls
from hf_layershuffle.data.tokenizer_training import train_tokenizer


WORDS = {
    "animals": "cat dog horse mouse whale eagle",
    "colours": "red green blue yellow violet orange",
    "numbers": "one two three seven twelve hundred",
}
# A model from scratch and a run so small that a test takes seconds
SMALL = """
    --hidden_size 16 --num_hidden_layers 3 --num_attention_heads 2 --vocab_size 150 --max_length 16
    --per_device_train_batch_size 8 --max_train_samples 64 --max_eval_samples 40 --max_steps 8 --save_steps 2
    --eval_strategy no --final_eval_orders 8 --disable_tqdm True --report_to none
""".split()


def labelled_texts(size: int = 24, seed: int = 0) -> Dataset:
    """Texts of 3 to 10 words, most of which are of the text's class."""
    rng = random.Random(seed)
    names = list(WORDS)
    labels = [index % len(names) for index in range(size)]
    common = "and the a some with of".split()
    texts = [" ".join(rng.choices(WORDS[names[label]].split() + common, k=rng.randint(3, 10))) for label in labels]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"text": texts, "label": labels}, features=features)


@cache
def tokenizer_of(max_length: int = 16, vocab_size: int = 120):
    return train_tokenizer(labelled_texts(60)["text"], vocab_size, max_length)


def text_classifier(seed: int = 0, **kwargs):
    """A tiny BERT with free layer order, of random weights, for the texts above."""
    tokenizer = tokenizer_of()
    sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    names = dict(enumerate(WORDS))
    labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    config = ls.LayerShuffleBertConfig(
        **{**sizes, **labels, "vocab_size": len(tokenizer), "max_position_embeddings": 16, **kwargs}
    )
    torch.manual_seed(seed)
    return ls.LayerShuffleBertForSequenceClassification(config).eval()


def trained_classifier(steps: int = 100):
    """A tiny BERT that tells the texts apart, after a second of training."""
    from hf_layershuffle.data.text_dataset import TextClassificationDataset

    model = text_classifier(
        shuffle_mode="arbitrary", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).train()
    data = TextClassificationDataset(labelled_texts(60), tokenizer_of())
    batch = data.collate([data[index] for index in range(len(data))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        model.seed_execution_order(0, step)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


def save_with_tokenizer(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder
