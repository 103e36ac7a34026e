"""From a JSON payload to the type that a handler works with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, is_typeddict

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
            missing = into.__required_keys__ - _members(payload).keys()  # type: ignore[attr-defined]
            if missing:
                raise TypeError(f"missing keys: {', '.join(sorted(missing))}")
            return payload  # type: ignore[no-any-return]
        if dataclasses.is_dataclass(into):
            return into(**_members(payload))  # type: ignore[return-value]
        return into(payload)
    except Exception as error:
        name = getattr(into, "__qualname__", repr(into))
        raise UnwrapError(f"the payload does not unwrap into {name}: {error}") from error


def _members(payload: Any) -> dict[str, Any]:
    if not isinstance(payload, dict):
        raise TypeError(f"a JSON object is needed, not {type(payload).__name__}")
    return payload
