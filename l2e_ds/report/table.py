"""A table of a report: rows of cells, written as formatted text, as Markdown, and as CSV with all digits."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from l2e_ds.console import markdown
from l2e_ds.report.statistics import Measured


@dataclass(frozen=True)
class Column:
    """A column. form: format of its numbers, empty for text. group: a heading above several columns."""

    head: str
    form: str = ""
    group: str = ""

    @property
    def full_head(self) -> str:
        return f"{self.group}: {self.head}" if self.group else self.head

    @property
    def css(self) -> str:
        return "number" if self.form else "words"


@dataclass(frozen=True)
class Table:
    """A table. name: that of its files. A cell is text, a number, a Measured or None."""

    name: str
    title: str
    note: str
    columns: list[Column]
    rows: list[list[Any]]

    def texts(self) -> list[list[str]]:
        return [
            [text_of(cell, column.form) for cell, column in zip(row, self.columns, strict=True)] for row in self.rows
        ]

    def groups(self) -> list[tuple[str, int]]:
        """Return the headings above the columns' heads, each with its number of columns, or [] if there are none.

        The first column, which stays in view, has a heading of its own.
        """
        first, *others = [column.group for column in self.columns]
        groups = [(first, 1), *((name, len(list(same))) for name, same in groupby(others))]
        return groups if any(name for name, _ in groups) else []

    def markdown(self) -> str:
        heads = [column.full_head for column in self.columns]
        safe = [[html.escape(text, quote=False) for text in row] for row in (heads, *self.texts())]
        note = html.escape(self.note, quote=False)
        return f"## {html.escape(self.title, quote=False)}\n\n{markdown(safe[0], safe[1:])}\n{note}\n"

    def csv(self) -> str:
        """Return the table as CSV with all digits.

        A column of values with standard errors becomes two, or three with n, the number of seeds or pairs.
        """
        columns: list[list[Any]] = []
        for i, column in enumerate(self.columns):
            cells = [row[i] for row in self.rows]
            measured = [cell if isinstance(cell, Measured) else None for cell in cells]
            columns.append([column.full_head, *(cell.value if isinstance(cell, Measured) else cell for cell in cells)])
            if any(measured):
                columns.append([f"{column.full_head}, standard error", *(one and one.error for one in measured)])
            if any(one and one.n > 1 for one in measured):
                columns.append([f"{column.full_head}, n", *(one and one.n for one in measured)])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(zip(*columns, strict=True))
        return text.getvalue()


def table_of(name: str, title: str, note: str, rows: Sequence[Mapping[Column, Any]]) -> Table:
    """Return a table of rows that hold a cell for each column, without the columns in which no row has one."""
    columns = [column for column in (rows[0] if rows else ()) if any(row[column] is not None for row in rows)]
    return Table(name, title, note, columns, [[row[column] for column in columns] for row in rows])


def text_of(cell: Any, form: str) -> str:
    """Return a cell as formatted text."""
    if cell is None or cell == "":
        return "–"
    if isinstance(cell, Measured):
        value = text_of(cell.value, form)
        if cell.error is None:
            return value
        return f"{value} ± {format(cell.error, form.removeprefix('+'))}{f' (n = {cell.n})' if cell.n > 1 else ''}"
    return format(cell, form).replace("-", "−") if form and not isinstance(cell, str) else str(cell)


def about_errors(cells: Iterable[Any]) -> list[str]:
    """Return sentences that say what ± is in these cells, or [] if none has a standard error over seeds or pairs."""
    counts = {cell.n for cell in cells if isinstance(cell, Measured) and cell.error is not None and cell.n > 1}
    if not counts:
        return []
    two = "With n = 2 it is half the distance between the two: too few for a confidence interval."
    return ["±: standard error over n seeds, of a difference over n pairs.", *([two] if 2 in counts else [])]
