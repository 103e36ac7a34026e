"""What works only where each statement sees the newest commits, and what everywhere."""

from __future__ import annotations

import pytest

from tests.helpers import column, receive
from tests.servers import Database
from tests.test_bad_input import RECEIPT, filled, refused

# No server differs in this, and there are many cases.
pytestmark = pytest.mark.one_backend


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
@pytest.mark.parametrize(
    "call",
    [
        "receive('s')",
        "receive_or_await('s')",
        "receive('ordered')",
        "fetch_pending('s')",
        "mark_delivered('s', '{3}')",
        f"requeue({RECEIPT})",
        f"release({RECEIPT})",
        "await('s')",
        "maintain()",
    ],
)
def test_isolation_level_that_would_lose_or_repeat_messages(
    database: Database, call: str, level: str
) -> None:
    connection = filled(database)
    connection.autocommit = False
    connection.execute(f"set session characteristics as transaction isolation level {level}")
    connection.commit()
    with refused(connection, "25000"):
        connection.execute(f"select pgqueue.{call}")


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_publish_extend_and_ack_work_at_every_isolation_level(
    database: Database, level: str
) -> None:
    connection = filled(database)
    connection.execute(f"begin isolation level {level}")
    connection.execute("select pgqueue.publish('t', '4')")
    connection.execute("select pgqueue.publish_batch('t', '{5,6}')")
    connection.execute("select pgqueue.extend(%s, '2 hours')", [RECEIPT])
    assert column(connection, "select pgqueue.ack(%s, '{1}')", RECEIPT) == [1]
    assert column(connection, "select pgqueue.ack(%s)", RECEIPT) == [1]
    connection.execute("commit")
    assert [message.payload for message in receive(connection, "s", 9)] == [3, 4, 5, 6]
    assert [message.payload for message in receive(connection, "ordered", 9)] == [1, 2, 3, 4, 5, 6]
