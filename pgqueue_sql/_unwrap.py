"""From a JSON payload to the type that a handler works with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, get_origin, get_type_hints, is_typeddict

from .errors import UnwrapError

T = TypeVar("T")


def unwrap(payload: Any, into: Callable[..., T] | None) -> T:
    """Convert a payload.

    `into` is None for the JSON as it is, a dataclass (built from the members of the JSON object),
    a TypedDict (whose required keys must be there; the types of values are not looked at) or a
    callable that takes the payload, such as a pydantic model's `model_validate`.

    Raises UnwrapError, from the cause if there is one.
    """
    if into is None:
        return payload  # type: ignore[no-any-return]
    try:
        if is_typeddict(into):
            missing = _required_keys(into) - _members(payload).keys()
            if missing:
                raise TypeError(f"missing keys: {', '.join(sorted(missing))}")
            return payload  # type: ignore[no-any-return]
        if dataclasses.is_dataclass(into):
            return into(**_members(payload))  # type: ignore[return-value]
        return into(payload)
    except Exception as error:
        name = getattr(into, "__qualname__", repr(into))
        raise UnwrapError(f"the payload does not unwrap into {name}: {error}") from error


def _required_keys(into: Any) -> set[str]:
    """Not simply __required_keys__: that is wrong where annotations are strings."""
    required = set(into.__required_keys__)
    for name, hint in get_type_hints(into, include_extras=True).items():
        marker = getattr(get_origin(hint), "_name", None)  # Required has no name before 3.11
        if marker == "Required":
            required.add(name)
        elif marker == "NotRequired":
            required.discard(name)
    return required


def _members(payload: Any) -> dict[str, Any]:
    if not isinstance(payload, dict):
        raise TypeError(f"a JSON object is needed, not {type(payload).__name__}")
    return payload
