"""What a handler acked in a transaction that it rolled back is not acked with what came with it."""

from __future__ import annotations

from typing import Any

import pytest

from pgqueue_sql import Message
from tests.consuming import in_flight, open_queue, pending
from tests.helpers import one
from tests.servers import Database

pytestmark = pytest.mark.one_backend


@pytest.mark.parametrize("options", [{"prefetch": 3}, {"batch": 3}])
def test_message_whose_ack_was_rolled_back_comes_again(
    database: Database, options: dict[str, Any]
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2, 3])
    own = database.connect()
    got: list[tuple[int, int]] = []

    def handle(messages: list[Message[int]] | Message[int]) -> None:
        for message in messages if isinstance(messages, list) else [messages]:
            got.append((message.payload, message.deliveries))
            if message.payload == 1 and message.deliveries == 1:
                message.ok(own)
                own.rollback()
        if len(got) == 3:
            # its lease is given up by the next fetch, which finds nothing
            queue.publish("t", 4)
        elif got[-1][0] == 4:
            subscription.stop()

    subscription.consume(handle, lease=60.0, **options)
    assert [payload for payload, _ in got] == [1, 2, 3, 4]
    # not acked: with the consumer's session its lease ends
    connection = queue.connection
    assert one(connection, "select payload from pgqueue.receive('s')") == 1
    assert in_flight(connection) == 1
    assert pending(connection) == []
