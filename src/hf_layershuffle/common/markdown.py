# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Texts of others in Markdown, such as the names in a record: shown as they are, and never read as markup."""

import re


_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")


def one_line(text: object) -> str:
    """The text in one line, without characters that are not shown."""
    line = " ".join(str(text).split())
    return "".join(character for character in line if character.isprintable())


def escape(text: object) -> str:
    """The text for headings, prose and table cells, where it is neither markup, HTML nor a further cell."""
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(lambda match: "\\" + match[0], line)


def in_code(text: object) -> str:
    """The text for a place between two backticks, also in a table.

    Nothing can be escaped there. So what would end the code or the cell, or begin a comment, is shown by another
    character.
    """
    return one_line(text).replace("`", "'").replace("|", "¦").replace("<!--", "<! --").replace("-->", "-- >")


def in_code_deep(value: object) -> object:
    """[`in_code`] of all texts in lists and dictionaries, keys included; all else as it is."""
    if isinstance(value, dict):
        return {in_code(name): in_code_deep(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [in_code_deep(item) for item in value]
    return in_code(value) if isinstance(value, str) else value
