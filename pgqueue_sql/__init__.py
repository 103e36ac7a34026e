"""A durable publish/subscribe message queue in PostgreSQL.

The queue is the SQL extension pgqueue; this package calls its functions and runs the loop that
listens, fetches and handles.

    import pgqueue_sql

    with pgqueue_sql.connect("dbname=app") as queue:
        subscription = queue.subscribe("mailer", "orders")
        queue.publish("orders", {"id": 1})
        subscription.consume(lambda message: print(message.payload))
"""

from __future__ import annotations

from ._ack import Ack
from ._async.message import AsyncMessage
from ._async.queue import AsyncQueue
from ._async.source import AsyncSource, AsyncSQLSource
from ._async.subscription import AsyncSubscription
from ._install import install
from ._sync.message import Message
from ._sync.queue import Queue
from ._sync.source import Source, SQLSource
from ._sync.subscription import Subscription
from .errors import (
    BacklogFull,
    LeaseLost,
    NotHeld,
    PgQueueError,
    Requeued,
    SettingsDiffer,
    UnknownSubscription,
    UnwrapError,
)

__version__ = "0.1.0"

connect = Queue.connect

__all__ = [
    "Ack",
    "AsyncMessage",
    "AsyncQueue",
    "AsyncSQLSource",
    "AsyncSource",
    "AsyncSubscription",
    "BacklogFull",
    "LeaseLost",
    "Message",
    "NotHeld",
    "PgQueueError",
    "Queue",
    "Requeued",
    "SQLSource",
    "SettingsDiffer",
    "Source",
    "Subscription",
    "UnknownSubscription",
    "UnwrapError",
    "connect",
    "install",
]
