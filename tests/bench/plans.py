"""The plans of one pass, nested statements included, written to a file to be looked at."""

from __future__ import annotations

import psycopg

from .report import Report
from .scale import Scale
from .servers import REPOSITORY, Lab

FOLDER = REPOSITORY / "build" / "bench"
SETTINGS = """
load 'auto_explain';
set auto_explain.log_min_duration = 0;
set auto_explain.log_nested_statements = on;
set auto_explain.log_analyze = on;
set auto_explain.log_buffers = on;
set auto_explain.log_wal = on;
set client_min_messages = log
"""
WAITING = 10_000
PASS = (
    "select pgqueue.publish('t', '1')",
    "select count(*) from pgqueue.publish_batch('t', array_fill('1'::jsonb, array[1000]))",
    "select max(receipt) from pgqueue.receive('{0}', 100)",
    "select max(receipt) from pgqueue.receive('{0}', 100, ack_receipt => {1})",
    "select pgqueue.ack({1})",
    "select pgqueue.await('{0}')",
    "select * from pgqueue.maintain()",
)


def run(lab: Lab, report: Report, scale: Scale) -> None:
    """Publish, receive, ack, await and maintain, for each ordering."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / f"plans-{lab.server.major}.txt"
    with lab.database("pgqueue") as database, database.connect() as connection, file.open("w") as f:
        for ordering in ("none", "total", "key"):
            connection.execute("select pgqueue.subscribe(%s, 't', %s)", [ordering, ordering])
        connection.execute(
            "insert into pgqueue.messages (topic, key, payload)"
            " select 't', i %% 10, '1' from generate_series(1, %s) i",
            [WAITING],
        )
        connection.execute(SETTINGS)
        connection.add_notice_handler(lambda notice: print(_text(notice), file=f))
        for ordering in ("none", "total", "key"):
            receipt = 0
            for template in PASS:
                statement = template.format(ordering, receipt)
                print(f"\n\n==== {statement}\n", file=f)
                row = connection.execute(statement.encode()).fetchone()
                if row and "receive" in statement:
                    (receipt,) = row
    report.figure(f"plans: {file.relative_to(REPOSITORY)}")


def _text(notice: psycopg.errors.Diagnostic) -> str:
    return notice.message_primary or ""
