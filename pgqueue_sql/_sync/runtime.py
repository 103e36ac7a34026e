"""What waiting and running side by side mean with threads. Written twice: see _async/runtime.py."""

from __future__ import annotations

import selectors
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from types import FrameType
from typing import Any, TypeAlias, TypeVar

from .._ack import Ack

__all__ = [
    "HandlerCall",
    "HandlerResult",
    "Heartbeat",
    "Lock",
    "Shield",
    "Slots",
    "Timer",
    "Waker",
    "stop_on_signals",
]

HandlerResult: TypeAlias = Ack | None
T = TypeVar("T")


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

    def wait(self, seconds: float, fileno: int | None = None) -> bool:
        """Sleep, and forget the wake-up that ended it. Whether one did."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._receiver, selectors.EVENT_READ)
            if fileno is not None:
                selector.register(fileno, selectors.EVENT_READ)
            woken = bool(selector.select(seconds))
        if woken:
            self.forget()
        return woken

    def close(self) -> None:
        """Free the sockets."""
        self._receiver.close()
        self._sender.close()


class Shield:
    """Runs what must not be cut off in the middle: the second signal calls `hurry`, and waits."""

    def __init__(self, hurry: Callable[[], None]) -> None:
        self._hurry = hurry
        self._busy = False
        self._interrupted = False

    def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run work(*arguments) and return its result."""
        if self._busy or threading.current_thread() is not threading.main_thread():
            return work(*arguments)
        self._busy = True
        try:
            return work(*arguments)
        finally:
            self._busy = False
            if self._interrupted:
                self._interrupted = False
                raise KeyboardInterrupt

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt, once the main thread is through with what it must finish."""
        if not self._busy:
            raise KeyboardInterrupt
        self._interrupted = True
        self._hurry()


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


class Timer:
    """Calls `work`, which must not raise, so many seconds after the first `start`, in a thread."""

    def __init__(self, seconds: float, work: Callable[[], None]) -> None:
        self._seconds = seconds
        self._work = work
        self._starting = threading.Lock()
        self._started = threading.Event()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, unless it is begun."""
        if self._started.is_set():
            return
        with self._starting:
            self._started.set()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="pgqueue timer", daemon=True)
                thread.start()
                self._thread = thread

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._started.wait()
            self._stopped.wait(self._seconds)
            self._started.clear()
            self._work()

    def stop(self) -> None:
        """Call it now, if it is begun, and wait for that."""
        self._stopped.set()
        self._started.set()
        if self._thread is not None:
            self._thread.join()


class Slots:
    """Runs up to `limit` calls side by side in threads; with a limit of 1, in place.

    The threads are daemons: after a second signal the process need not wait for a handler.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running = 0
        self._changed = threading.Condition()
        self.cancelled = False

    def run(self, work: Callable[[Any], None], argument: Any) -> None:
        """Run work(argument). Where it does not run in place it must not raise."""
        if self._limit == 1:
            work(argument)
            return

        def run() -> None:
            try:
                work(argument)
            finally:
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()

        with self._changed:
            threading.Thread(target=run, name="pgqueue handler", daemon=True).start()
            self._running += 1

    def wait_for_one(self) -> None:
        """Wait until fewer than `limit` run."""
        with self._changed:
            self._changed.wait_for(lambda: self._running < self._limit)

    def join(self) -> None:
        """Wait until none runs."""
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0)

    def cancel(self) -> None:
        """Wait for nothing: a thread cannot be ended from outside."""
        self.cancelled = True


class _Consuming:
    """Somebody whom the signals concern."""

    def __init__(self, stop: Callable[[], None], shield: Shield) -> None:
        self._stop = stop
        self._shield = shield
        self._signals: list[int] = []

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        # one handler may interrupt another at any point, but not this call
        self._signals.append(number)
        if len(self._signals) > 1:
            self._shield.interrupt()
        self._stop()


@contextmanager
def stop_on_signals(enabled: bool, stop: Callable[[], None], shield: Shield) -> Iterator[None]:
    """Call `stop` at the first SIGINT or SIGTERM; at a second one, raise KeyboardInterrupt."""
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield
        return
    one = _Consuming(stop, shield)
    replaced = {
        number: signal.signal(number, one.on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, previous in replaced.items():
            signal.signal(number, previous or signal.SIG_DFL)
