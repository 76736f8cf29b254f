"""Text classifiers and their tokenizers, from scratch and from checkpoints, and what is refused."""

import pytest
import torch
from support.texts import SMALL, labelled_texts, save_with_tokenizer, text_classifier, tokenizer_of
from transformers import BertConfig, BertForSequenceClassification

from hf_layershuffle.checkpoints.tokenizers import check_tokenizer, tokenizer_digest
from hf_layershuffle.training.argument_parser import parse_task
from hf_layershuffle.training.text_arguments import TextModelArguments
from hf_layershuffle.training.text_model_building import TextTeacher, build_text_model, load_text_teacher


NAMES = ["animals", "colours", "numbers"]
TINY = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=90, max_length=12)


def build(teacher=None, texts=None, flags=None, **arguments):
    args = TextModelArguments(**arguments)
    return build_text_model(args, flags or {}, NAMES, texts or labelled_texts(), teacher or TextTeacher())


@pytest.mark.parametrize(
    "architecture", ["bert", "roberta", "distilbert", "electra", "modernbert", "deberta-v2", "qwen3"]
)
def test_a_family_from_scratch_takes_its_sizes_and_the_longest_text(architecture):
    model, tokenizer = build(**TINY, architecture=architecture)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (16, 3, 2)
    assert config.vocab_size == len(tokenizer) <= 90 and config.pad_token_id == tokenizer.pad_token_id
    assert (config.shuffle_mode, config.id2label[1], config.problem_type) == (
        "arbitrary",
        "colours",
        "single_label_classification",
    )
    check_tokenizer(tokenizer, config)
    long = tokenizer(["cat " * 50, "cat"], truncation=True, padding=True, return_tensors="pt")
    assert long["input_ids"].shape == (2, 12)
    with torch.no_grad():
        logits = model.eval()(**long, execution_order=[2, 0, 1]).logits
    assert logits.shape == (2, 3) and logits.isfinite().all()


def test_the_width_of_the_mlp_has_other_names():
    model, _ = build(**TINY, architecture="distilbert", intermediate_size=40)
    assert model.config.hidden_dim == 40 and model.distilbert.transformer.layer[0].ffn.lin1.out_features == 40
    assert build(**TINY, hidden_dropout_prob=0.3)[0].config.attention_probs_dropout_prob == 0.3


def test_pairs_have_segments():
    pairs = labelled_texts().map(lambda row: {"text_pair": row["text"]})
    _, tokenizer = build(**TINY, texts=pairs)
    assert tokenizer("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]
    assert "token_type_ids" not in build(**TINY)[1]("a", "b")


def test_a_checkpoint_keeps_its_tokenizer(tmp_path):
    folder = str(save_with_tokenizer(text_classifier(), tmp_path / "model"))
    model, tokenizer = build(model_name_or_path=folder)
    assert tokenizer_digest(tokenizer) == tokenizer_digest(tokenizer_of()) and tokenizer.model_max_length == 16
    assert build(model_name_or_path=folder, max_length=9)[1].model_max_length == 9
    for name, value in text_classifier().state_dict().items():
        assert model.state_dict()[name].equal(value)


def test_a_plain_encoder_from_the_hub_becomes_a_classifier(tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    plain = BertForSequenceClassification(BertConfig(**sizes, vocab_size=120, max_position_embeddings=20))
    plain.bert.save_pretrained(tmp_path)
    tokenizer_of(max_length=10**30).save_pretrained(tmp_path)
    model, tokenizer = build(model_name_or_path=str(tmp_path))
    assert type(model).__name__ == "LayerShuffleBertForSequenceClassification" and tokenizer.model_max_length == 20
    weight = "encoder.layer.2.output.dense.weight"
    assert model.bert.get_parameter(weight).equal(plain.bert.get_parameter(weight))


def test_a_teacher_gives_its_tokenizer(tmp_path):
    folder = str(save_with_tokenizer(text_classifier(seed=3), tmp_path / "teacher"))
    teacher = load_text_teacher(TextModelArguments(teacher_model_name_or_path=folder))
    sizes = {name: value for name, value in TINY.items() if name not in ("vocab_size", "max_length")}
    model, tokenizer = build(teacher, **sizes)
    assert tokenizer_digest(tokenizer) == tokenizer_digest(tokenizer_of())
    assert model.config.vocab_size == teacher.model.config.vocab_size and tokenizer.model_max_length == 16
    with pytest.raises(ValueError, match=r"`vocab_size` is 90, and the teacher has"):
        build(teacher, **TINY)
    other = text_classifier().save_pretrained(tmp_path / "other") or str(tmp_path / "other")
    tokenizer_of(vocab_size=70).save_pretrained(other)
    with pytest.raises(
        ValueError, match=r"is another than that of its teacher '.*teacher'; both models read the same"
    ):
        build(teacher, model_name_or_path=other, teacher_model_name_or_path=folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "vit"}, "`architecture` is 'vit', which is no model of texts; take bert"),
        ({"architecture": "nonsense"}, "`architecture` is 'nonsense', which is a model of type 'nonsense'"),
        ({"architecture": "gemma3"}, "whose configuration holds several models"),
        ({"architecture": "funnel"}, "it pools its tokens between blocks of layers"),
        ({"architecture": "fnet"}, "`num_attention_heads` is 2, and a model of type 'fnet' has none"),
        ({"num_attention_heads": 3}, "`num_attention_heads` is 3; it must divide the width 16"),
        ({"initializer_range": 0.0}, "`initializer_range` is 0.0; it must be a finite number above 0"),
    ],
)
def test_sizes_and_families_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**(TINY | arguments))


def test_what_does_not_fit_a_checkpoint(tmp_path):
    folder = str(save_with_tokenizer(text_classifier(), tmp_path / "model"))
    with pytest.raises(
        ValueError, match=r"`max_length` is 17; the model and its teacher take texts of at most 16 tokens"
    ):
        build(model_name_or_path=folder, max_length=17)
    with pytest.raises(ValueError, match=r"`vocab_size` is 99, and '.*' has \d+, which fine-tuning keeps"):
        build(model_name_or_path=folder, vocab_size=99)
    with pytest.raises(ValueError, match=r"`hidden_size` is 64, and '.*' has 32, which fine-tuning keeps"):
        build(model_name_or_path=folder, hidden_size=64)
    text_classifier(vocab_size=50).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"has a vocabulary of 50 tokens .*, and its tokenizer gives ids up to"):
        build(model_name_or_path=folder)


def test_flags_of_parts_that_are_not_there():
    with pytest.raises(ValueError, match=r"`depth_embedding_dim` is 4 without `depth_embedding`"):
        build(**TINY, flags={"depth_embedding_dim": 4})


def test_options_of_images_are_none_of_texts():
    task, (model_args, data_args, args) = parse_task([*SMALL, "--task", "text-classification"])
    assert (task.name, model_args.max_length, args.max_steps) == ("text-classification", 16, 8)
    assert data_args.dataset_name == "python-docs" and data_args.image_column_name is None
    for option in ("--image_size", "--crop_padding", "--image_column_name"):
        with pytest.raises(ValueError, match=f"There is no option {option}"):
            parse_task([option, "8"], task="text-classification")
    with pytest.raises(ValueError, match=r"There is no option --max_length"):
        parse_task(["--max_length", "8"])
    with pytest.raises(ValueError, match=r"`task` is 'speech'; choose from image-classification, text-classification"):
        parse_task(["--task", "speech"])
    with pytest.raises(ValueError, match=r"`max_length` is 2; it must be at least 3"):
        parse_task(["--task", "text-classification", "--max_length", "2"])
