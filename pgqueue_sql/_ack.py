"""What a handler answers."""

from __future__ import annotations

from enum import Enum


class Ack(Enum):
    """A handler's verdict on a delivery. Returning None means OK."""

    OK = "ok"
    REQUEUE = "requeue"
