# Generated from _async by `make sync`: do not edit.
"""A subscription: something to consume from."""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import inf
from typing import Any, TypeVar, overload

from .consumer import Consumer, OnError
from .message import Message
from .runtime import HandlerResult, stop_on_signals
from .session import Connect
from .source import Source, SQLSource

T = TypeVar("T")


class Subscription:
    """A subscription, to consume from: any number of times, side by side or in turn."""

    def __init__(self, name: str, connect: Connect | None, source: Source | None = None) -> None:
        self.name = name
        self._connect = connect
        self._source = source
        self._running: list[Consumer[Any]] = []
        self._starting = threading.RLock()  # a signal handler may stop while it is held
        self._stop_next = False

    @classmethod
    def from_source(cls, source: Source) -> Subscription:
        """A subscription whose messages come from elsewhere, such as a test."""
        return cls(repr(source), None, source)

    @overload
    def consume(
        self,
        handler: Callable[[Message[T]], HandlerResult],
        *,
        into: Callable[..., T] | None = None,
        batch: None = None,
        prefetch: int | None = None,
        concurrency: int = 1,
        lease: float = 30.0,
        poll: float = 1.0,
        listen: bool = True,
        stop_on_requeue: bool = False,
        on_error: OnError | None = None,
        handle_signals: bool = True,
    ) -> None: ...

    @overload
    def consume(
        self,
        handler: Callable[[list[Message[T]]], HandlerResult],
        *,
        into: Callable[..., T] | None = None,
        batch: int,
        concurrency: int = 1,
        lease: float = 30.0,
        poll: float = 1.0,
        listen: bool = True,
        stop_on_requeue: bool = False,
        on_error: OnError | None = None,
        handle_signals: bool = True,
    ) -> None: ...

    def consume(
        self,
        handler: Callable[[Any], HandlerResult],
        *,
        into: Callable[..., Any] | None = None,
        batch: int | None = None,
        prefetch: int | None = None,
        concurrency: int = 1,
        lease: float = 30.0,
        poll: float = 1.0,
        listen: bool = True,
        stop_on_requeue: bool = False,
        on_error: OnError | None = None,
        handle_signals: bool = True,
    ) -> None:
        """Call `handler` with every message, what is pending and then what comes, until stopped.

        The handler's answer settles the message: Ack.OK or None acks it, Ack.REQUEUE gives it back,
        and so does an exception, which is reported to `on_error(exception, messages)`, by default
        to the log. What the handler settled itself, with `message.ok()` or `message.requeue()`,
        stays as it is.

        into: what to unwrap payloads into: a dataclass, a TypedDict, or a callable that takes the
            JSON. A payload that does not fit is requeued like one whose handler failed.
        batch: call the handler with a list of up to so many messages, which are settled together.
        prefetch: messages to take per round trip when they are handled one by one; by default as
            many as the handler lately took 10 ms for, up to 100. Their acks go in groups, at most
            10 ms late. What a consumer that dies has taken comes again, an attempt older.
        concurrency: calls of the handler at a time: tasks in asyncio, else threads.
        lease: seconds for which the messages are the consumer's; if they are not settled by then,
            another consumer gets them.
        poll: seconds after which to look again if no notification comes. Where 8 or more
            wait they look by turns, six times in these seconds; each within six times as long.
        listen: whether to LISTEN, or only to poll.
        stop_on_requeue: raise as soon as a message is requeued: the handler's exception if it
            raised one, else Requeued.
        handle_signals: let SIGINT and SIGTERM call `stop` and, the second time, cancel; only in the
            main thread, and not those that the application handles by loop.add_signal_handler.

        Stopping settles the delivery at hand and gives back what was fetched beyond it. Cancelling
        (the task, or by KeyboardInterrupt) does not wait for the handler: its message is pending
        again at once.

        Raises what goes wrong with fetching, listening and acking (LeaseLost when the handler took
        longer than the lease); an ExceptionGroup for more than one. A lost connection is made anew.
        """
        for name, value in (("batch", batch), ("prefetch", prefetch), ("concurrency", concurrency)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        for name, duration in (("lease", lease), ("poll", poll)):
            if not 0 < duration < inf:
                raise ValueError(f"{name} is {duration} seconds; it must be above 0, and finite")
        source = self._source
        if source is None:
            assert self._connect is not None
            source = SQLSource(self._connect, self.name, lease=lease, poll=poll, listen=listen)
        consumer = Consumer(
            source,
            handler,
            into=into,
            batch=batch,
            prefetch=prefetch,
            concurrency=concurrency,
            stop_on_requeue=stop_on_requeue,
            on_error=on_error,
        )
        with self._starting:
            self._running.append(consumer)
            if self._stop_next:
                self._stop_next = False
                consumer.stop()
        try:
            with stop_on_signals(handle_signals, consumer.stop, consumer.shield):
                consumer.run()
        finally:
            self._running.remove(consumer)

    def stop(self) -> None:
        """Let every `consume` of this object return once the delivery at hand is settled.

        No handler is called after that. If none is consuming, the next `consume` returns at once.
        From any thread, and from within a handler.
        """
        with self._starting:
            running = list(self._running)
            self._stop_next = not running
        for consumer in running:
            consumer.stop()
