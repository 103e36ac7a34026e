"""Rows as a table of text."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any


def table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns under their names, numbers to the right."""
    cells = [[cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    lines = ["  ".join(name.ljust(width) for name, width in zip(names, widths, strict=True))]
    lines.append("  ".join("-" * width for width in widths))
    for row, shown in zip(rows, cells, strict=True):
        lines.append(
            "  ".join(
                text.rjust(width) if isinstance(value, (int, float)) else text.ljust(width)
                for value, text, width in zip(row, shown, widths, strict=True)
            )
        )
    return "\n".join(line.rstrip() for line in lines)


def cell(value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="seconds")
    return str(value)
