"""Numbers and kinds in argument files: one line before anything is read or written."""

from dataclasses import dataclass, field

import pytest

from hf_layershuffle.training import session
from hf_layershuffle.training.argument_checks import LIMITS, check_kinds, check_numbers
from hf_layershuffle.training.argument_parser import parse_arguments


@dataclass
class Arguments:
    image_size: int | None = None
    patch_size: int | None = None
    learning_rate: float = 0.1
    lr_scheduler_kwargs: dict | str | None = None
    label_names: list[str] | None = None
    execution_order: str | None = None
    text: str = field(default="x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 0}, "`image_size` is 0; it must be at least 1"),
        ({"image_size": 1_000_000}, "`image_size` is 1000000; it must be at most 4,096"),
        ({"patch_size": -3}, "`patch_size` is -3; it must be at least 1"),
        ({"learning_rate": float("inf")}, r"`learning_rate` is inf; it must be .*finite"),
        ({"learning_rate": float("nan")}, "`learning_rate` is nan; it must be a finite number"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(values, message):
    check_numbers(Arguments(), Arguments(image_size=LIMITS["image_size"][1], patch_size=1))
    with pytest.raises(ValueError, match=message):
        check_numbers(Arguments(), Arguments(**values))


@pytest.mark.parametrize(
    "values", [{"image_size": {"height": 8}}, {"text": ["a"]}, {"image_size": [[8]]}, {"label_names": [{"a": 1}]}]
)
def test_one_value_is_wanted_where_the_argument_takes_one(values):
    good = {
        "lr_scheduler_kwargs": {"a": 1},
        "label_names": ["a"],
        "execution_order": [0, 1],
        "unknown": {},
        "text": None,
    }
    check_kinds(good, (Arguments,), "'a.yaml'")
    (name,) = values
    with pytest.raises(ValueError, match=rf"`{name}` is .* in 'a\.yaml'; it must be one number or text"):
        check_kinds(values, (Arguments,), "'a.yaml'")


@pytest.mark.parametrize("value", ["no", "off", "false", "'no'"])
def test_no_is_a_strategy_in_a_file_too(tmp_path, value):
    names = ("eval_strategy", "save_strategy", "logging_strategy")
    path = tmp_path / "arguments.yaml"
    path.write_text("\n".join(f"{name}: {value}" for name in names))
    _, _, args = parse_arguments([str(path), "--use_cpu"])
    assert [getattr(args, name) for name in names] == ["no"] * 3


def test_the_command_refuses_them_before_a_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, message in (
        ("learning_rate: .inf", r"line 1: \.inf is not a finite number"),
        ("learning_rate: 1e999", r"`learning_rate` is inf; it must be .*finite"),
        ("image_size: 1000000", "`image_size` is 1000000; it must be at most"),
        ("hidden_size: 0", "`hidden_size` is 0; it must be at least 1"),
        ("patch_size: 0", "`patch_size` is 0; it must be at least 1"),
        ("num_attention_heads: 0", "`num_attention_heads` is 0; it must be at least 1"),
        ("intermediate_size: 0", "`intermediate_size` is 0; it must be at least 1"),
        ("label_smoothing_factor: 2", "`label_smoothing_factor` is 2.0; it must lie in"),
        ("label_smoothing_factor: -0.1", "`label_smoothing_factor` is -0.1; it must lie in"),
        ("hidden_size: {a: 1}", "`hidden_size` is {'a': 1} in .*; it must be one number or text"),
        ("seed: 2026-11-25", "`seed` is datetime"),
        ("seed: 1\nseed: 2", "line 2: the key 'seed' is there already"),
        ("[" * 3000, "nested more than 50 levels deep"),
    ):
        (tmp_path / "arguments.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            session.run(["arguments.yaml", "--use_cpu", "--output_dir", "out"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arguments.yaml"]
