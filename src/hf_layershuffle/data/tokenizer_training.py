# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A small tokenizer trained on the texts of a dataset, for a model from scratch."""

from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


PAD, UNKNOWN, START, END, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PREFIX = "##"  # of a piece that goes on with a word
MOST_CHARACTERS = 1000  # the others are unknown


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int, has_segments: bool = False
) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer as BERT's, without capitals and accents, trained on texts.

    The same texts give the same tokenizer. The special tokens have the ids 0 to 4: `[PAD]`, `[UNK]`, `[CLS]`, `[SEP]`
    and `[MASK]`. `AutoTokenizer` loads what its `save_pretrained` writes.

    Args:
        texts: The texts to train on.
        vocab_size: Number of tokens at most. Every character that is kept is one, so there may be more if the number
            is small.
        max_length: Tokens of a text at most (`model_max_length`), with the special ones.
        has_segments: Whether it also says which of two texts a token is of (`token_type_ids`), as BERT takes it.
    """
    texts = list(texts)
    normalizer = normalizers.BertNormalizer(lowercase=True)
    counts = Counter(character for text in texts for character in normalizer.normalize_str(text))
    known = sorted(counts, key=lambda character: (-counts[character], character))
    alphabet = sorted([character for character in known if not character.isspace()][:MOST_CHARACTERS])
    # The trainer numbers the pieces of single characters as a hash table of words gives them, in another order in each
    # process, and so are ties broken. As special tokens they have their numbers before
    pieces = [f"{PREFIX}{character}" for character in alphabet]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *pieces],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=PREFIX,
        show_progress=False,
    )
    trained = _word_piece_tokenizer(models.WordPiece(unk_token=UNKNOWN), normalizer)
    trained.train_from_iterator(texts, trainer)
    model = models.WordPiece(trained.get_vocab(), unk_token=UNKNOWN, continuing_subword_prefix=PREFIX)
    tokenizer = _word_piece_tokenizer(model, normalizer)
    tokenizer.decoder = decoders.WordPiece(prefix=PREFIX)
    end, start = SPECIAL_TOKENS.index(END), SPECIAL_TOKENS.index(START)
    tokenizer.post_processor = processors.BertProcessing((END, end), (START, start))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=START,
        sep_token=END,
        mask_token=MASK,
        model_max_length=max_length,
        model_input_names=["input_ids", *(["token_type_ids"] if has_segments else []), "attention_mask"],
    )


def _word_piece_tokenizer(model: models.WordPiece, normalizer: normalizers.Normalizer) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer
