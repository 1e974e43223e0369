"""A table, as text, Markdown and HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Cells as text, beneath a title."""

    title: str
    columns: Sequence[str]
    cells: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    texts: int = 2  # columns of text, which come before those of numbers

    def plain(self) -> str:
        """Columns of text."""
        lines = [self.columns, *self.cells]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        rows = (
            "  ".join(
                cell.ljust(width) if i < self.texts else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )
        return "\n".join([f"\n{self.title}", *rows, *self.notes])

    def markdown(self) -> str:
        """A table as GitHub shows it."""
        lines = [
            self.columns,
            ["---" if i < self.texts else "---:" for i in range(len(self.columns))],
            *self.cells,
        ]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def html(self) -> str:
        """A table in HTML."""

        def row(cells: Sequence[str], tag: str) -> str:
            return (
                "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
            )

        body = "".join(row(cells, "td") for cells in self.cells)
        notes = "".join(f"<p>{html.escape(note.strip())}</p>" for note in self.notes)
        return (
            f"<h3>{html.escape(self.title)}</h3><table>{row(self.columns, 'th')}{body}</table>"
            f"{notes}"
        )
