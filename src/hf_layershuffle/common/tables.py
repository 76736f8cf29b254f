# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Tables on a terminal, in Markdown and in HTML."""

import html
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from rich.table import Table


def render(table: "Table", width: int = 200) -> str:
    """A rich table as plain text."""
    from rich.console import Console

    console = Console(width=width, color_system=None, markup=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def table_cells(table: "Table") -> list[list[str]]:
    """The rows of a table as text, the header first."""
    header = [str(column.header).replace("\n", " ") for column in table.columns]
    return [header, *([str(cell) for cell in row] for row in zip(*(column.cells for column in table.columns)))]


def markdown_table(table: "Table") -> str:
    """A rich table in Markdown."""
    header, *rows = table_cells(table)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def html_table(table: "Table") -> str:
    """A rich table in HTML, with its title and caption."""
    header, *rows = table_cells(table)
    lines = ["<table>", f"<caption>{html.escape(str(table.title or ''))}</caption>"]
    for tag, cells in (("th", header), *(("td", row) for row in rows)):
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>")
    caption = f"<p>{html.escape(str(table.caption))}</p>" if table.caption else ""
    return "\n".join([*lines, "</table>", caption])
