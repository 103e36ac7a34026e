"""`python -m pgqueue_sql`: the queue from the shell."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import psycopg

from . import Ack, Message, PgQueueError, __version__, connect, install
from ._table import table

PUBLISHED_AT_ONCE = 1000


def main() -> int:
    """Run the command and return the exit code."""
    arguments = parser().parse_args()
    try:
        code: int | None = arguments.command(arguments)
    except json.JSONDecodeError as error:
        print(f"pgqueue: {error.doc.strip()[:60]!r} is not JSON: {error}", file=sys.stderr)
        return 1
    except (PgQueueError, psycopg.Error, ValueError) as error:
        print(f"pgqueue: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except KeyboardInterrupt:
        return 130
    return code or 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m pgqueue_sql",
        description="A durable publish/subscribe message queue in PostgreSQL.",
        epilog="The database: --dsn, else PGQUEUE_DSN, else libpq's variables (PGHOST, ...).",
    )
    top.add_argument("--version", action="version", version=__version__)
    database = argparse.ArgumentParser(add_help=False)
    database.add_argument(
        "--dsn", default=os.environ.get("PGQUEUE_DSN", ""), help="connection string or URI"
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, parents=[database])
        added.set_defaults(command=function)
        return added

    added = command("install", run_install, "Install pgqueue's SQL, if it is not there.")
    added.add_argument("dsn_argument", nargs="?", metavar="DSN", help="the same as --dsn")

    added = command("subscribe", run_subscribe, "Create a subscription.")
    added.add_argument("subscription")
    added.add_argument("topic")
    added.add_argument("--ordering", choices=("none", "total", "key"), default="none")
    added.add_argument("--max-attempts", type=int, metavar="N")
    added.add_argument("--retry-delay", type=float, metavar="SECONDS")

    added = command("publish", run_publish, "Publish JSON and print the messages' ids.")
    added.add_argument("topic")
    added.add_argument("payload", nargs="*", help="JSON; without any: JSON lines from stdin")
    added.add_argument("--key")
    added.add_argument("--headers", type=json.loads, metavar="JSON")

    added = command("consume", run_consume, "Consume messages, and print each as a line of JSON.")
    added.add_argument("subscription")
    added.add_argument(
        "--exec",
        metavar="CMD",
        help="run CMD in the shell for each message instead, with the line on its stdin; the"
        " message is requeued if CMD fails",
    )
    added.add_argument("--count", type=int, metavar="N", help="stop after N messages")
    added.add_argument("--concurrency", type=int, default=1, metavar="N", help="CMDs at a time")
    added.add_argument("--lease", type=float, default=30.0, metavar="SECONDS")

    added = command("status", run_status, "Show each subscription.")
    added.add_argument(
        "--watch", nargs="?", type=float, const=2.0, metavar="SECONDS", help="again and again"
    )

    for name, text in (
        ("pause", "Deliver nothing from a subscription, until resumed."),
        ("resume", "End a pause."),
        ("purge", "Drop what waits in a subscription."),
        ("redrive", "Deliver dead letters of a subscription again."),
        ("discard", "Drop dead letters of a subscription."),
    ):
        added = command(name, run_on_subscription, text)
        added.set_defaults(method=name)
        added.add_argument("subscription")
        if name in ("redrive", "discard"):
            added.add_argument("ids", nargs="*", type=int, metavar="ID", help="without any: all")

    added = command("dead", run_dead, "Print dead letters as lines of JSON.")
    added.add_argument("subscription")
    command("demo", run_demo, "Show what pgqueue does, on the database given or one of its own.")
    return top


def run_install(arguments: argparse.Namespace) -> None:
    """Install by script."""
    with psycopg.connect(arguments.dsn_argument or arguments.dsn) as connection:
        print(install(connection))


def run_subscribe(arguments: argparse.Namespace) -> None:
    """Create a subscription."""
    with connect(arguments.dsn) as queue:
        queue.subscribe(
            arguments.subscription,
            arguments.topic,
            ordering=arguments.ordering,
            max_attempts=arguments.max_attempts,
            retry_delay=arguments.retry_delay,
        )


def run_publish(arguments: argparse.Namespace) -> None:
    """Publish the arguments, or standard input."""
    lines = iter(arguments.payload or (line for line in sys.stdin if line.strip()))
    with connect(arguments.dsn) as queue:
        while texts := list(islice(lines, PUBLISHED_AT_ONCE)):
            payloads = [json.loads(text) for text in texts]
            ids = queue.publish_batch(
                arguments.topic,
                payloads,
                headers=[arguments.headers] * len(payloads),
                keys=[arguments.key] * len(payloads),
            )
            print(*ids, sep="\n", flush=True)


def run_consume(arguments: argparse.Namespace) -> None:
    """Print messages or run a command for each, until stopped by a signal or the count."""
    left = arguments.count

    def handle(message: Message[Any]) -> Ack:
        nonlocal left
        line = json.dumps(as_json(message), default=str)
        if arguments.exec is None:
            print(line, flush=True)
        else:
            run_command(arguments.exec, line + "\n")
        if left is not None:
            left -= 1
            if left <= 0:
                subscription.stop()
        return Ack.OK

    with connect(arguments.dsn) as queue:
        subscription = queue.subscription(arguments.subscription)
        subscription.consume(
            handle,
            concurrency=arguments.concurrency,
            lease=arguments.lease,
            # nobody reads any more: the message is for the next one who does
            stop_on_requeue=arguments.exec is None,
        )


def run_command(command: str, line: str) -> None:
    """Run a shell command with a line on its standard input.

    Ctrl-C is not for it but for us, who let it end; a second one ends it, too.
    """
    with subprocess.Popen(
        command, shell=True, stdin=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            process.communicate(line)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)


def as_json(message: Message[Any]) -> dict[str, Any]:
    """The fields of a message, for a line of JSON."""
    return {
        "message_id": message.message_id,
        "topic": message.topic,
        "key": message.key,
        "headers": message.headers,
        "payload": message.payload,
        "published_at": message.published_at.isoformat(),
        "deliveries": message.deliveries,
    }


def run_status(arguments: argparse.Namespace) -> None:
    """Print the view pgqueue.status as a table."""
    with connect(arguments.dsn) as queue:
        for _ in once_or_every(arguments.watch):
            with queue.connection.cursor() as cursor:
                cursor.execute("select * from pgqueue.status")
                names = [column.name for column in cursor.description or ()]
                print(table(names, cursor.fetchall()), flush=True)


def run_on_subscription(arguments: argparse.Namespace) -> None:
    """Call the method of that name, and print what it returns."""
    with connect(arguments.dsn) as queue:
        method = getattr(queue, arguments.method)
        chosen = [arguments.ids] if getattr(arguments, "ids", None) else []
        print(method(arguments.subscription, *chosen))


def run_dead(arguments: argparse.Namespace) -> None:
    """Print a subscription's dead letters, with the history of their failures."""
    with connect(arguments.dsn) as queue:
        rows = queue.connection.execute(
            "select to_jsonb(d) from pgqueue.dead_letters d where d.subscription = %s"
            " order by d.message_id",
            (arguments.subscription,),
        )
        for (dead,) in rows:
            print(json.dumps(dead))


def run_demo(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    from ._demo import demo  # noqa: PLC0415 - needs POSIX, which the rest does not

    return demo(arguments.dsn)


def once_or_every(seconds: float | None) -> Iterator[None]:
    """One turn, or one turn every so many seconds on a cleared screen."""
    while seconds is not None:
        if sys.stdout.isatty():
            print("\033[H\033[2J", end="")
        yield
        time.sleep(seconds)
    yield


if __name__ == "__main__":
    sys.exit(main())
