"""The payloads that every contestant publishes: JSON texts of about 150 bytes and 4 kB."""

from __future__ import annotations

import json
import random

_random = random.Random(4)


def _order(note_length: int) -> str:
    # hexadecimal noise, as text that TOAST could compress would not stay at 4 kB
    note = "".join(_random.choices("0123456789abcdef", k=note_length))
    order = {"order": 4711, "customer": "c-1042", "total": 99.5, "currency": "EUR", "note": note}
    return json.dumps(order)


SMALL = _order(70)
LARGE = _order(4000)
BY_SIZE = {"150 B": SMALL, "4 kB": LARGE}
