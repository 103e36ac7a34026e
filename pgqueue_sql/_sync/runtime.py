"""What waiting and running side by side mean with threads. Written twice: see _async/runtime.py."""

from __future__ import annotations

import selectors
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from threading import Lock
from types import FrameType
from typing import Any, TypeAlias

from .._ack import Ack

__all__ = [
    "HandlerCall",
    "HandlerResult",
    "Heartbeat",
    "Lock",
    "Slots",
    "Waker",
    "stop_on_signals",
]

HandlerResult: TypeAlias = Ack | None


class Waker:
    """A sleep that other threads, signal handlers, or a readable socket, can end."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)

    def wake(self) -> None:
        """End the sleep, or the next one. From any thread."""
        with suppress(OSError):  # full: woken already; closed: nobody sleeps
            self._sender.send(b"\0")

    def forget(self) -> None:
        """Let the next sleep be a full one."""
        with suppress(BlockingIOError):
            while self._receiver.recv(4096):
                pass

    def wait(self, seconds: float, fileno: int | None = None) -> None:
        """Sleep, and forget the wake-up that ended it."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._receiver, selectors.EVENT_READ)
            if fileno is not None:
                selector.register(fileno, selectors.EVENT_READ)
            selector.select(seconds)
        self.forget()

    def close(self) -> None:
        """Free the sockets."""
        self._receiver.close()
        self._sender.close()


class HandlerCall:
    """A call of the handler. A thread cannot be ended from outside: it looks at its message."""

    interrupted = False

    def result(self, answer: HandlerResult) -> Ack | None:
        """What the handler returned."""
        return answer

    def interrupt(self) -> None:
        """Nothing that could be done."""


class Heartbeat:
    """Calls `beat` every so many seconds, in a thread. It must not raise."""

    def __init__(self, seconds: float, beat: Callable[[], None]) -> None:
        self._seconds = seconds
        self._beat = beat
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pgqueue heartbeat", daemon=True)

    def start(self) -> None:
        """Begin, with a pause."""
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            self._beat()

    def stop(self) -> None:
        """End, after a beat that goes on."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()


class Slots:
    """Runs up to `limit` calls side by side in threads; with a limit of 1, in place."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._futures: set[Future[None]] = set()
        self._executor = (
            ThreadPoolExecutor(limit, thread_name_prefix="pgqueue") if limit > 1 else None
        )

    @property
    def busy(self) -> int:
        """How many run now."""
        return sum(not future.done() for future in self._futures)

    def run(self, work: Callable[[Any], None], argument: Any) -> None:
        """Run work(argument). It must not raise."""
        if self._executor is None:
            work(argument)
            return
        self._futures = {future for future in self._futures if not future.done()}
        self._futures.add(self._executor.submit(work, argument))

    def wait_for_one(self) -> None:
        """Wait until fewer than `limit` run."""
        while self.busy >= self._limit:
            wait(self._futures, return_when=FIRST_COMPLETED)
            self._futures = {future for future in self._futures if not future.done()}

    def join(self) -> None:
        """Wait until none runs."""
        if self._executor is not None:
            wait(self._futures)
            self._executor.shutdown()

    def cancel(self) -> None:
        """Wait for nothing: a thread cannot be ended from outside."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)


@contextmanager
def stop_on_signals(enabled: bool, stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at the first SIGINT or SIGTERM; at a second one, raise KeyboardInterrupt."""
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield
        return
    stopping = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            raise KeyboardInterrupt
        stopping = True
        stop()

    replaced = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, previous in replaced.items():
            signal.signal(number, previous)
