# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The text of a model card: which of it is ours, and how ours is renewed while a person's stays as it is.

All functions are pure.

Ours are the sections between `<!-- hf-layershuffle: name -->` and `<!-- /hf-layershuffle: name -->`, and our entries
of the metadata. One of these is a digest of all other text, as it was when the card was last published: so it is known
whether a person has changed the card since, here or on the Hub.
"""

import hashlib
import re
from collections.abc import Callable

from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from ..common.yaml_files import parse_yaml


_SECTION = re.compile(r"<!-- hf-layershuffle: (\w+) -->.*?<!-- /hf-layershuffle: \1 -->", re.DOTALL)
_DIGEST_KEY = "hf_layershuffle_text"
# A line that starts a key of the metadata, as opposed to one that continues or comments on it
_KEY_LINE = re.compile(r"""^(["']?)([^\s#\-\[\]{}"'][^:"']*)\1\s*:(\s|$)""")
_LISTS = ("tags", "datasets", "base_model")
_REPLACED = ("license",)  # in the new card only if somebody just asked for it


def update_card_text(text: str, fresh: str) -> tuple[str, bool]:
    """`text` with its sections and our metadata as in `fresh`, and whether `text` has one of the sections.

    Raises:
        `ValueError`: if the metadata of `text` is not valid.
    """
    _, fresh_metadata, fresh_body = split_card(fresh)
    _, _, old_body = split_card(text)
    sections = {match[1]: match[0] for match in _SECTION.finditer(fresh_body)}

    def renewed(block: str, body: str) -> tuple[str, str]:
        return update_metadata(block, fresh_metadata), _SECTION.sub(
            lambda match: sections.get(match[1], match[0]), body
        )

    return _rewrite(text, renewed), any(match[1] in sections for match in _SECTION.finditer(old_body))


def mark_published(text: str) -> str:
    """`text` with the digest of a person's part of it, from which [`is_edited`] tells later changes."""
    return _rewrite(text, lambda block, body: (_with_keys(block, {_DIGEST_KEY: _digest(body)}), body))


def is_edited(text: str) -> bool:
    """Whether a person has changed the text of the card since it was written or last published."""
    _, metadata, body = split_card(text)
    recorded = metadata.get(_DIGEST_KEY)
    return bool(_persons_text(body)) if recorded is None else recorded != _digest(body)


def combine_cards(local: str, hub: str, where: str) -> str:
    """The card to go on from: the one that a person changed, with the metadata that only the other has.

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
    kept, metadata, other = (local, local_metadata, hub_metadata)
    if not same and is_edited(hub):
        kept, metadata, other = (hub, hub_metadata, local_metadata)
    missing = {name: value for name, value in other.items() if name not in metadata and name != _DIGEST_KEY}
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


def update_metadata(block: str, ours: dict) -> str:
    """The text `block` of a card's metadata with our entries renewed.

    Lists gain our entries. A person's other keys stay, with their order and comments. A single value that is there
    stays, too.
    """
    _, metadata, _ = split_card(f"---\n{block}\n---\n")
    changed = {}
    for name, value in ours.items():
        current = metadata.get(name)
        if name in _LISTS:
            merged = list(dict.fromkeys([*_as_list(current), *_as_list(value)]))
            value = merged[0] if len(merged) == 1 and isinstance(value, str) else merged
        elif name == "widget":
            value = [entry for entry in _as_list(current) if not _is_our_example(entry)] + value
        elif name == "model-index":
            value = _merge_model_index(current, value)
        elif current is not None and name not in _REPLACED:
            continue
        if value != current:
            changed[name] = value
    return _with_keys(block, changed)


def _with_keys(block: str, values: dict) -> str:
    """The text with these keys set, all other lines as they are."""
    parts = []
    remaining = dict(values)
    for key, lines in _by_key(block):
        if key in remaining:
            lines = yaml_dump({key: remaining.pop(key)}, sort_keys=False).rstrip("\n")
        parts.append(lines)
    parts += [yaml_dump({key: value}, sort_keys=False).rstrip("\n") for key, value in remaining.items()]
    result = "\n".join(part for part in parts if part)
    _, expected, _ = split_card(f"---\n{block}\n---\n")
    expected = expected | values
    try:
        if (parse_yaml(result, "") or {}) == expected:
            return result
    except ValueError:
        pass  # metadata may be written in ways that lines do not tell; then it is written anew, without its comments
    return yaml_dump(expected, sort_keys=False).rstrip("\n")


def _by_key(block: str) -> list[tuple[str | None, str]]:
    """The text in pieces, one a key with the lines that belong to it; None for what stands before the first."""
    pieces: list[tuple[str | None, list[str]]] = [(None, [])]
    for line in block.split("\n"):
        match = _KEY_LINE.match(line)
        if match:
            pieces.append((match[2].strip(), []))
        pieces[-1][1].append(line)
    return [(key, "\n".join(lines)) for key, lines in pieces]


def _merge_model_index(current: object, ours: list[dict]) -> list[dict]:
    """A person's results, and our results in place of our earlier ones."""
    names = {result["source"]["name"] for result in ours[0]["results"]}
    entries = [dict(entry) for entry in _as_list(current) if isinstance(entry, dict)]
    if not entries:
        return ours
    for entry in entries:
        entry["results"] = [
            result for result in entry.get("results") or [] if (result.get("source") or {}).get("name") not in names
        ]
    entries[0]["results"] += ours[0]["results"]
    return entries


def _is_our_example(entry: object) -> bool:
    """Whether an entry of `widget` is ours: an image of the folder, or a text with the title that ours have."""
    if not isinstance(entry, dict):
        return False
    is_our_text = "text" in entry and str(entry.get("example_title", "")).startswith("Class ") and "output" in entry
    return is_our_text or str(entry.get("src", "")).startswith("examples/")


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
