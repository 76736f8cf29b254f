# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The text of a model card: which of it is ours, and how ours is renewed while a person's stays as it is.

All functions are pure.

Ours are the sections between `<!-- hf-layershuffle: name -->` and `<!-- /hf-layershuffle: name -->`, and our entries
of the metadata. One of these is a digest of all other text, as it was when the card was last published: so it is known
whether a person has changed the card since, here or on the Hub.
"""

import hashlib
import re
from collections.abc import Callable, Collection

from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from ..common.yaml_files import parse_yaml


SOURCE_NAME = "hf-layershuffle"  # tells our entries of the metadata's `model-index` from a person's
_SECTION = re.compile(r"<!-- hf-layershuffle: (\w+) -->.*?<!-- /hf-layershuffle: \1 -->", re.DOTALL)
_DIGEST_KEY = "hf_layershuffle_text"
_LICENSE_KEY = "hf_layershuffle_license"
# A line that starts a key of the metadata, as opposed to one that continues or comments on it
_KEY_LINE = re.compile(r"""^(["']?)([^\s#\-\[\]{}"'][^:"']*)\1\s*:(\s|$)""")
_LISTS = ("tags", "datasets", "base_model")
_ORIGINS = ("datasets", "base_model")  # whose entries our sections name, as `org/name`
_NAME = re.compile(r"`([^`\n]+)`")
_OUR_EXAMPLE = re.compile(r"examples/(\d+\.png|examples\.json)")
_REPLACED = ("license",)  # the new card has the one that is there, unless somebody just asked for another


def update_card_text(text: str, fresh: str) -> tuple[str, bool]:
    """`text` with its sections and our metadata as in `fresh`, and whether `text` has one of the sections.

    Raises:
        `ValueError`: if the metadata of `text` is not valid.
    """
    _, fresh_metadata, fresh_body = split_card(fresh)
    _, _, old_body = split_card(text)
    sections = {match[1]: match[0] for match in _SECTION.finditer(fresh_body)}

    def renewed(block: str, body: str) -> tuple[str, str]:
        block = update_metadata(block, fresh_metadata, _names_in_sections(body))
        return block, _SECTION.sub(lambda match: sections.get(match[1], match[0]), body)

    return _rewrite(text, renewed), any(match[1] in sections for match in _SECTION.finditer(old_body))


def mark_published(text: str, with_license: bool = False) -> str:
    """`text` with the digest of a person's part of it, from which [`is_edited`] tells later changes.

    Args:
        with_license: Whether the licence is noted too, for [`published_license`].
    """
    license = split_card(text)[1].get("license") if with_license else None
    noted = {} if license is None else {_LICENSE_KEY: license}
    return _rewrite(text, lambda block, body: (_with_keys(block, {_DIGEST_KEY: _digest(body), **noted}), body))


def published_license(text: str) -> str | list[str] | None:
    """The licence that a card had when it was last published; None if it had none, or was not."""
    return split_card(text)[1].get(_LICENSE_KEY)


def is_edited(text: str) -> bool:
    """Whether a person has changed the text of the card since it was written or last published."""
    _, metadata, body = split_card(text)
    recorded = metadata.get(_DIGEST_KEY)
    return bool(_persons_text(body)) if recorded is None else recorded != _digest(body)


def combine_cards(local: str, hub: str, where: str) -> str:
    """The card to go on from: the one that a person changed, with the metadata of a person that only the other has.

    Args:
        local: Text of the folder's card.
        hub: Text of the Hub's card.
        where: Name of the Hub's card, for the message.

    Raises:
        `ValueError`: if a person changed both, each in another way.
    """
    (_, local_metadata, local_body), (_, hub_metadata, hub_body) = split_card(local), split_card(hub)
    same = _digest(local_body) == _digest(hub_body)
    if not same and is_edited(local) and is_edited(hub):
        raise ValueError(
            f"README.md was edited both here and on {where}, and one of the two would be lost. Copy what you want to "
            "keep of the Hub's card into the folder's README.md, and publish again with `overwrite_card=True` "
            "(--overwrite_card)."
        )
    kept, metadata, other = (local, local_metadata, hub)
    if not same and is_edited(hub):
        kept, metadata, other = (hub, hub_metadata, local)
    _, other_metadata, _ = split_card(_without_ours(other))
    missing = {
        name: value for name, value in other_metadata.items() if name not in (*metadata, _DIGEST_KEY, _LICENSE_KEY)
    }
    return _rewrite(kept, lambda block, body: (_with_keys(block, missing), body))


def split_card(text: str) -> tuple[str, dict, str]:
    """The metadata as text and as a dictionary, both empty without any, and the rest of the card.

    Raises:
        `ValueError`: if the metadata is not valid YAML, or not a mapping.
    """
    match = REGEX_YAML_BLOCK.search(text)
    block, body = (match[2], text[match.end() :]) if match else ("", text)
    try:
        metadata = parse_yaml(block, "The metadata at the top of README.md") or {}
    except ValueError as error:
        raise ValueError(f"{error} Mend or remove it.") from error
    if not isinstance(metadata, dict):
        raise ValueError("The metadata at the top of README.md is not a mapping of keys to values. Mend or remove it.")
    return block, metadata, body


def update_metadata(block: str, ours: dict, earlier: Collection[str] = ()) -> str:
    """The text `block` of a card's metadata with our entries renewed.

    Lists gain our entries. Our results, examples and origins that are no longer so are removed. A person's other keys
    stay, with their order and comments. A single value that is there stays, too.

    Args:
        earlier: The names in our sections of this card. The origins among them are ours.
    """
    _, metadata, _ = split_card(f"---\n{block}\n---\n")
    changed = {}
    for name in dict.fromkeys([*ours, *_ORIGINS, "widget", "model-index"]):
        current, value = metadata.get(name), ours.get(name)
        if name in _LISTS:
            value = _merge_list(current, value, earlier if name in _ORIGINS else ())
        elif name == "widget":
            value = [entry for entry in _as_list(current) if not _is_our_example(entry)] + _as_list(value)
        elif name == "model-index":
            value = _merge_model_index(current, _as_list(value))
        elif current is not None and name not in _REPLACED:
            continue
        if value != current and (value or current):
            changed[name] = value or None
    base_models = _as_list(changed.get("base_model", metadata.get("base_model")))
    if any(model not in base_models for model in _as_list(metadata.get("base_model"))):
        changed["base_model_relation"] = ours.get("base_model_relation")
    return _with_keys(block, changed)


def _with_keys(block: str, values: dict) -> str:
    """The text with these keys set, or removed where the value is None, and all other lines as they are."""
    parts = []
    remaining = dict(values)
    for key, lines in _by_key(block):
        parts.append(_line_of(key, remaining.pop(key)) if key in remaining else lines)
    parts += [_line_of(key, value) for key, value in remaining.items()]
    result = "\n".join(part for part in parts if part)
    _, expected, _ = split_card(f"---\n{block}\n---\n")
    removed = {key for key, value in values.items() if value is None}
    expected = {key: value for key, value in (expected | values).items() if key not in removed}
    try:
        if (parse_yaml(result, "") or {}) == expected:
            return result
    except ValueError:
        pass  # metadata may be written in ways that lines do not tell; then it is written anew, without its comments
    return yaml_dump(expected, sort_keys=False).rstrip("\n") if expected else ""


def _line_of(key: str | None, value: object) -> str:
    return "" if value is None else yaml_dump({key: value}, sort_keys=False).rstrip("\n")


def _by_key(block: str) -> list[tuple[str | None, str]]:
    """The text in pieces, one a key with the lines that belong to it; None for what stands before the first."""
    pieces: list[tuple[str | None, list[str]]] = [(None, [])]
    for line in block.split("\n"):
        match = _KEY_LINE.match(line)
        if match:
            pieces.append((match[2].strip(), []))
        pieces[-1][1].append(line)
    return [(key, "\n".join(lines)) for key, lines in pieces]


def _merge_list(current: object, ours: object, earlier: Collection[str]) -> object:
    """The entries that are there, without those of ours that are so no longer, and our entries."""
    ours_now = _as_list(ours)
    kept = [entry for entry in _as_list(current) if entry in ours_now or entry not in earlier]
    merged = kept + [entry for entry in ours_now if entry not in kept]
    is_single = not isinstance(current if ours is None else ours, list)
    return merged[0] if len(merged) == 1 and is_single else merged


def _merge_model_index(current: object, ours: list[dict]) -> list[dict]:
    """A person's results, and our results in place of our earlier ones."""
    entries = [dict(entry) for entry in _as_list(current) if isinstance(entry, dict)]
    for entry in entries:
        entry["results"] = [result for result in _as_list(entry.get("results")) if not _is_our_result(result)]
    if ours and entries:
        entries[0]["results"] += ours[0]["results"]
    return [entry for entry in entries if entry["results"]] or ours


def _is_our_result(result: object) -> bool:
    source = result.get("source") if isinstance(result, dict) else None
    return isinstance(source, dict) and source.get("name") == SOURCE_NAME


def _is_our_example(entry: object) -> bool:
    """Whether an entry of `widget` is ours: one of our images, or a text with the title that ours have."""
    if not isinstance(entry, dict):
        return False
    is_our_text = "text" in entry and str(entry.get("example_title", "")).startswith("Class ") and "output" in entry
    return is_our_text or is_our_example_file(str(entry.get("src", "")))


def is_our_example_file(name: str) -> bool:
    """Whether a file of the model's folder is one that [`write_examples`] writes."""
    return _OUR_EXAMPLE.fullmatch(name) is not None


def _names_in_sections(body: str) -> list[str]:
    """What stands between backticks in our sections."""
    return [name for section in _SECTION.finditer(body) for name in _NAME.findall(section[0])]


def _without_ours(text: str) -> str:
    """The card without our results, examples and origins in its metadata."""
    return _rewrite(text, lambda block, body: (update_metadata(block, {}, _names_in_sections(body)), body))


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _persons_text(body: str) -> str:
    return " ".join(_SECTION.sub("", body).split())


def _digest(body: str) -> str:
    return f"sha256-{hashlib.sha256(_persons_text(body).encode()).hexdigest()[:16]}"


def _rewrite(text: str, change: Callable[[str, str], tuple[str, str]]) -> str:
    """Applies `change` to the metadata's text and the body, both with "\n", and gives the text its line ends back."""
    line_break = "\r\n" if "\r\n" in text else "\n"
    block, _, body = split_card(text.replace("\r\n", "\n"))
    block, body = change(block, body)
    return (f"---\n{block}\n---\n{body}" if block else body).replace("\n", line_break)
