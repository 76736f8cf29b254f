"""docs/encoders.md, from the records of experiments/encoder_table.py."""

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from support.encoder_checks import CHECKS, FAST_CHECKS, SHARDING, SLOW_CHECKS
from support.encoder_sharding import check_sharded
from support.encoder_sweep import CHECKS as SWEPT_CHECKS
from support.encoder_sweep import classification_classes
from support.encoders import ENCODERS, GROUPS, REFUSED, Encoder


PASSED = "✓"
COMMAND = "python experiments/encoder_table.py"
KINDS = {"image": "Images", "video": "Video", "audio": "Audio", "text": "Texts"}


def page(records: Mapping[str, Any]) -> str:
    """The text of the page."""
    versions = ", ".join(f"{name} {number}" for name, number in records["checks"]["versions"].items())
    model_types = {encoder.model_type for encoder in ENCODERS.values()}
    parts = [
        "# Encoders whose layers run in any order",
        f"Written by `{COMMAND}` (`make encoders`) on {records['checks']['date']}, with {versions}. "
        "The checks are those of the tests (`tests/support/encoder_checks.py`), on tiny models with random weights. "
        "No checkpoint was downloaded; those named here are examples of the family.",
        "`hf-layershuffle train` makes classifiers of images and texts. What else is here is used in Python, as is "
        "SigLIP 2 for images of any shape. timm's vision transformers (`tests/models/test_timm_layers.py`) and "
        "[causal language models](causal.md) have tests of their own. Of a model with several towers, such as "
        '`CLIPModel`, `tower="vision"` or `"text"` says which runs in free order.',
        "`LayerShuffle` and the name of a class, such as `LayerShuffleDinov2ForImageClassification`, is that class "
        f"with free layer order. {len(ENCODERS)} configurations of {len(model_types)} model types were checked:",
        *legend(),
        *(text for group, encoders in GROUPS.items() for text in group_section(group, encoders, records)),
        *passed_section(records["sweep"]["found"]),
        *refused_section(records),
    ]
    return "\n\n".join(parts) + "\n"


def legend() -> list[str]:
    """What each column says, in the words of its check."""
    functions = {**FAST_CHECKS, **SLOW_CHECKS, SHARDING: check_sharded}
    lines = [
        f"- **{name}**: {' '.join((inspect.getdoc(function) or '').split())}" for name, function in functions.items()
    ]
    return ["\n".join(lines), f"{PASSED}: passed. A number: did not pass, for the reason of this number."]


def group_section(group: str, encoders: Iterable[Encoder], records: Mapping[str, Any]) -> list[str]:
    """Heading, table and reasons of the encoders of a group."""
    reasons: list[str] = []
    rows = []
    for encoder in encoders:
        wrong = {**records["checks"]["found"][encoder.name], SHARDING: records["fsdp2"]["found"][encoder.name]}
        cells = [_cell(encoder, check, wrong[check], reasons) for check in CHECKS]
        rows.append([_family(encoder), *cells])
    table = markdown_table(["family, model type, class, a checkpoint", *CHECKS], rows)
    return [
        f"## {group}",
        table,
        *(["\n".join(f"{i}. {text}" for i, text in enumerate(reasons, 1))] if reasons else []),
    ]


def _family(encoder: Encoder) -> str:
    """The first cell of a row."""
    is_ours = encoder.plain_class.__module__.startswith("hf_layershuffle")
    return "<br>".join(
        (
            encoder.name,
            f"`{encoder.model_type}`",
            f"`{encoder.model_class}`{', a head of this package' if is_ours else ''}",
            f"[{encoder.checkpoint}](https://huggingface.co/{encoder.checkpoint})",
        )
    )


def _cell(encoder: Encoder, check: str, wrong: str | None, reasons: list[str]) -> str:
    if wrong is None:
        return PASSED
    limit = encoder.limits.get(check)
    is_known = limit is not None and re.search(limit.message, wrong)
    reason = f"{check}: {limit.why if limit is not None and is_known else f'`{wrong}`'}"
    if reason not in reasons:
        reasons.append(reason)
    return str(reasons.index(reason) + 1)


def markdown_table(columns: list[str], rows: Iterable[list[str]]) -> str:
    lines = [columns, ["---", *[":---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def passed_section(found: Mapping[str, Any]) -> list[str]:
    """Classes that passed the sweep and have no row of their own."""
    classes = classification_classes()
    rows = {encoder.model_class for encoder in ENCODERS.values()}
    passed = [name for name, each in found.items() if each["result"] == "passed"]
    lines = []
    for kind, title in KINDS.items():
        names = sorted(name for name in passed if classes[name][0] == kind and name not in rows)
        if names:
            lines.append(f"- {title}: {', '.join(f'`{name}`' for name in names)}")
    return [
        "## Also passed the sweep",
        f"The sweep makes a tiny model of each of the {len(found)} classes that transformers has for the "
        f"classification of images, videos, sounds and texts. {len(passed)} pass "
        f"{', '.join(f'*{check}*' for check in SWEPT_CHECKS)}. Those without a row above:",
        "\n".join(lines),
    ]


def refused_section(records: Mapping[str, Any]) -> list[str]:
    """What cannot run in any order, in the words of the refusal, and what else did not pass the sweep."""
    named = [
        [encoder.name, f"`{encoder.model_class}`", str(records["refused"]["found"][encoder.name])]
        for encoder in REFUSED
    ]
    names = {encoder.model_class for encoder in (*REFUSED, *ENCODERS.values())}
    by_reason: dict[str, list[str]] = {}
    for name, each in records["sweep"]["found"].items():
        if each["result"] in ("refused", "failed") and name not in names:
            by_reason.setdefault(_without_name(each["reason"], name), []).append(name)
    swept = [
        [", ".join(f"`{name}`" for name in found), reason]
        for reason, found in sorted(by_reason.items(), key=lambda each: (-len(each[1]), each[0]))
    ]
    unknown = [name for name, each in records["sweep"]["found"].items() if each["result"] == "not built"]
    return [
        "## Refused, or not possible",
        _left_table(["family", "class", "what is said"], named),
        "Of the sweep, with the first check that did not pass:",
        _left_table(["classes", "what came out"], swept),
        f"Not tried in the sweep, which made no tiny model of them: {', '.join(f'`{name}`' for name in unknown)}.",
    ]


def _without_name(reason: str, name: str) -> str:
    """A reason without the name of the class and of its lists of layers, so that classes can share a row."""
    reason = re.sub(rf"(LayerShuffle)?{name}( \('.*?'\))?", "the class", reason)
    reason = reason.removeprefix("plain: ").removeprefix("the class cannot run its layers in any order: ")
    return re.sub(r"differs by \S+", "differs", re.sub(r" lists of layers \(.*?\)", " lists of layers", reason))


def _left_table(columns: list[str], rows: Iterable[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
