"""Calls of pgqueue's functions."""

from __future__ import annotations

from datetime import timedelta
from typing import Any


def call(function: str, *arguments: Any, **options: Any) -> tuple[str, tuple[Any, ...]]:
    """The statement that calls a function, and its parameters.

    Options that are None are left out, so that the function's own defaults hold.
    """
    given = {name: value for name, value in options.items() if value is not None}
    placeholders = ["%s"] * len(arguments) + [f"{name} => %s" for name in given]
    return (
        f"select pgqueue.{function}({', '.join(placeholders)})",
        (*arguments, *given.values()),
    )


def seconds(value: float | None) -> timedelta | None:
    """An interval of so many seconds."""
    return None if value is None else timedelta(seconds=value)
