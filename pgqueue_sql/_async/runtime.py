"""What waiting and running side by side mean with asyncio. Written twice: see _sync/runtime.py."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from asyncio import Lock
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
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

HandlerResult: TypeAlias = Awaitable[Ack | None]
T = TypeVar("T")


class Waker:
    """A sleep that other tasks and threads, or a readable socket, can end."""

    def __init__(self) -> None:
        self._woken = False
        self._sleepers: set[asyncio.Future[bool]] = set()
        self._loop = asyncio.get_running_loop()

    def wake(self) -> None:
        """End the sleep, or the next one. From any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._woken = True
        for sleeper in self._sleepers:
            _end(sleeper, True)

    def forget(self) -> None:
        """Let the next sleep be a full one."""
        self._woken = False

    async def wait(self, seconds: float, fileno: int | None = None) -> bool:
        """Sleep, and forget the wake-up that ended it. Whether one did."""
        if self._woken:
            self._woken = False
            return True
        # A future of its own, and no wait_for, which starts a task for each sleep.
        sleeper: asyncio.Future[bool] = self._loop.create_future()
        timer = self._loop.call_later(seconds, _end, sleeper, False)
        # A loop has one reader per descriptor, and psycopg sets and removes its own.
        reader = None if fileno is None else os.dup(fileno)
        if reader is not None:
            self._loop.add_reader(reader, self._wake)
        self._sleepers.add(sleeper)
        try:
            woken = await sleeper
        finally:
            self._sleepers.discard(sleeper)
            timer.cancel()
            if reader is not None:
                self._loop.remove_reader(reader)
                os.close(reader)
        if woken:
            self._woken = False
        return woken

    def close(self) -> None:
        """Nothing to free here."""


def _end(sleeper: asyncio.Future[bool], woken: bool) -> None:
    if not sleeper.done():
        sleeper.set_result(woken)


class Shield:
    """Runs what must not be cut off in the middle: a cancellation calls `hurry`, and waits."""

    def __init__(self, hurry: Callable[[], None]) -> None:
        self._hurry = hurry

    async def run(self, work: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        """Run work(*arguments) and return its result."""
        task = asyncio.ensure_future(work(*arguments))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._hurry()
            await asyncio.wait([task])
            if not task.cancelled():
                task.exception()  # it counts as seen: the cancellation goes first
            raise


class HandlerCall:
    """A call of the handler that can be ended from outside."""

    def __init__(self) -> None:
        self._task: asyncio.Future[Ack | None] | None = None
        self.interrupted = False

    async def result(self, answer: HandlerResult) -> Ack | None:
        """What the handler returns. Cancelled, if it was interrupted before that."""
        self._task = asyncio.ensure_future(answer)
        try:
            return await self._task
        except asyncio.CancelledError as error:
            consumer = asyncio.current_task()
            # Python 3.10 cannot tell
            if self.interrupted or getattr(consumer, "cancelling", lambda: 1)() > 0:
                raise
            raise RuntimeError("the handler was cancelled, and not by its consumer") from error

    def interrupt(self) -> None:
        """Cancel the handler."""
        if self._task is not None and not self._task.done():
            self.interrupted = True
            self._task.cancel()


class Heartbeat:
    """Calls `beat` every so many seconds, in a task. It must not raise."""

    def __init__(self, seconds: float, beat: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._seconds = seconds
        self._beat = beat
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, with a pause."""
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            await self._beat()

    async def stop(self) -> None:
        """End, at once."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])


class Timer:
    """Calls `work`, which must not raise, so many seconds after the first `start`."""

    def __init__(self, seconds: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._seconds = seconds
        self._work = work
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin, unless it is begun."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._call)

    def _call(self) -> None:
        self._timer = None
        task = asyncio.create_task(self._work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Call it now, if it is begun, and wait for that."""
        while self._timer is not None or self._tasks:
            if self._timer is not None:
                self._timer.cancel()
                self._call()
            await asyncio.wait(self._tasks)


class Slots:
    """Runs up to `limit` coroutines side by side; with a limit of 1, in place."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tasks: set[asyncio.Task[None]] = set()
        self.cancelled = False

    async def run(self, work: Callable[[Any], Coroutine[Any, Any, None]], argument: Any) -> None:
        """Run work(argument). Where it does not run in place it must not raise."""
        if self._limit == 1:
            await work(argument)
            return
        task = asyncio.create_task(work(argument))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait_for_one(self) -> None:
        """Wait until fewer than `limit` run."""
        while len(self._tasks) >= self._limit:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    async def join(self) -> None:
        """Wait until none runs."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def cancel(self) -> None:
        """End at once what runs."""
        self.cancelled = True
        for task in self._tasks:
            task.cancel()
        await self.join()


class _Consuming:
    """Somebody whom the signals concern."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._task = asyncio.current_task()
        self._stopping = False

    def on_signal(self) -> None:
        if self._stopping and self._task is not None:
            self._task.cancel()
        self._stopping = True
        self._stop()


_consuming: list[_Consuming] = []
_replaced: dict[signal.Signals, Any] = {}


@contextmanager
def stop_on_signals(enabled: bool, stop: Callable[[], None], shield: Shield) -> Iterator[None]:
    """Call `stop` at the first SIGINT or SIGTERM; at a second one, cancel the task."""
    loop = asyncio.get_running_loop()
    one = _Consuming(stop)
    # consumers in the loops of other threads are none of the main thread's
    enabled = enabled and threading.current_thread() is threading.main_thread()

    def on_signal() -> None:
        for each in list(_consuming):
            each.on_signal()

    if enabled and not _consuming:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous = signal.getsignal(number)
            if getattr(previous, "__module__", None) == "asyncio.unix_events":
                continue  # by loop.add_signal_handler, and could not be put back: the application's
            try:
                loop.add_signal_handler(number, on_signal)
            except (NotImplementedError, RuntimeError, ValueError):
                break  # not the main thread, or Windows
            _replaced[number] = previous
    if enabled and _replaced:
        _consuming.append(one)
    try:
        yield
    finally:
        if one in _consuming:
            _consuming.remove(one)
            if not _consuming:
                for number, previous in _replaced.items():
                    loop.remove_signal_handler(number)
                    signal.signal(number, previous or signal.SIG_DFL)
                _replaced.clear()
