"""The loop behind `consume`: fetch, unwrap, call the handler, settle."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import psycopg

from .._ack import Ack
from .._pace import Pace
from .._unwrap import unwrap
from ..errors import LeaseLost, NotHeld, Requeued, UnwrapError, describe
from .acks import AsyncAcks, Messages
from .message import AsyncMessage
from .runtime import HandlerCall, HandlerResult, Heartbeat, Shield, Slots
from .source import AsyncSource

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

logger = logging.getLogger("pgqueue_sql")

T = TypeVar("T")
OnError = Callable[[Exception, Sequence[AsyncMessage[Any]]], None]


class AsyncConsumer(Generic[T]):
    """One run of `consume`.

    The messages of one receipt are handled one after the other, or in groups of `batch`; what the
    consumer does not get to (it is stopped, or the message before failed) it releases.
    """

    def __init__(
        self,
        source: AsyncSource,
        handler: Callable[[Any], HandlerResult],
        *,
        into: Callable[..., T] | None,
        batch: int | None,
        prefetch: int | None,
        concurrency: int,
        stop_on_requeue: bool,
        on_error: OnError | None,
    ) -> None:
        self._source = source
        self._handler = handler
        self._into = into
        self._batch = batch
        self._pace = Pace(batch or prefetch)
        self._concurrency = concurrency
        self._stop_on_requeue = stop_on_requeue
        self._on_error = on_error
        self._slots = Slots(concurrency)
        # often enough that one late or lost beat does not lose the lease
        self._heartbeat = Heartbeat(source.lease / 3, self._extend_leases)
        self._calls: dict[int, HandlerCall] = {}
        self._stopping = False
        self._errors: list[BaseException] = []
        self._at_hand: dict[int, Messages] = {}
        self._kept_until: dict[int, float] = {}
        self._acks = AsyncAcks(source, self._fail)
        self.shield = Shield(self.stop)

    def stop(self) -> None:
        """Let `run` return once the delivery at hand is settled. From any thread."""
        self._stopping = True
        self._source.stop()

    async def run(self) -> None:
        """Consume until stopped, or until something fails."""
        try:
            try:
                await self._consume()
            except Exception as error:
                self._fail(error)
            await self._slots.join()
            await self.shield.run(self._give_back_rest)
        except BaseException:
            # cancelled: at once, so not waiting for handlers that cannot be
            self.stop()
            await self._slots.cancel()
            await self._give_back_rest()
            raise
        finally:
            try:
                await self._acks.stop()
            finally:
                try:
                    await self._heartbeat.stop()
                finally:
                    await self._source.close()
        if len(self._errors) > 1:
            raise BaseExceptionGroup("several errors stopped consuming", self._errors)
        if self._errors:
            raise self._errors[0]

    async def _consume(self) -> None:
        await self._source.subscribe()
        await self._source.listen()
        self._heartbeat.start()
        try:
            while not self._stopping:
                await self._slots.wait_for_one()
                if self._stopping:
                    break
                messages = await self.shield.run(self._fetch)
                if messages:
                    await self._slots.run(self._handle_receipt, messages)
                elif not self._stopping:
                    await self.shield.run(self._source.wait)
        finally:
            await self.shield.run(self._leave)
        await self._slots.join()
        await self.shield.run(self._acks.send)

    async def _leave(self) -> None:
        leave = getattr(self._source, "leave", None)
        if leave is not None:
            await leave()

    async def _fetch(self) -> Messages:
        asked = time.monotonic()
        messages = await self._acks.fetch(self._pace.messages, one_receipt=self._concurrency == 1)
        if messages:
            self._at_hand[messages[0].receipt] = messages
            self._kept_until[messages[0].receipt] = asked + self._source.lease
        return messages

    async def _handle_receipt(self, messages: Messages) -> None:
        """Handle the messages of one receipt, in order. Records errors instead of raising them."""
        size = self._batch or 1
        started = time.monotonic()
        try:
            for start in range(0, len(messages), size):
                receipt = messages[0].receipt
                if messages[0].lease_lost or time.monotonic() > self._kept_until[receipt]:
                    await self.shield.run(self._make_sure, messages)
                if (
                    self._stopping
                    or self._is_gone(messages)
                    or not await self._deliver(messages[start : start + size])
                ):
                    await self.shield.run(self._release, messages)
                    break
            if self._concurrency > 1:
                await self.shield.run(self._acks.send)
            del self._at_hand[messages[0].receipt]
            del self._kept_until[messages[0].receipt]
            self._pace.handled(len(messages), time.monotonic() - started)
        except Exception as error:
            self._fail(error)
        except BaseException as error:
            if self._concurrency == 1 or self._slots.cancelled:
                raise
            self._fail(error)
        if self._concurrency > 1:
            self._source.wake()

    async def _deliver(self, messages: Messages) -> bool:
        """Hand messages to the handler and settle them; False if some of them were not acked."""
        for message in messages:
            try:
                message.payload = unwrap(message.payload, self._into)
            except UnwrapError as error:
                await self.shield.run(self._requeue, [message], error)
                return False
        if self._stopping:
            return False
        try:
            answer = await self._call_handler(messages)
        except LeaseLost:
            raise  # nothing is left to settle
        except Exception as error:
            await self.shield.run(self._requeue, messages, error)
            return False
        if answer is Ack.REQUEUE or any(message.requeued for message in messages):
            await self.shield.run(self._requeue, messages, None)
            return False
        self._acks.add(messages)
        return True

    async def _call_handler(self, messages: Messages) -> Ack | None:
        receipt = messages[0].receipt
        call = self._calls[receipt] = HandlerCall()
        try:
            answer = await call.result(
                self._handler(messages[0] if self._batch is None else messages)
            )
        except BaseException as error:
            if call.interrupted:
                raise LeaseLost(
                    f"the lease of message {messages[0].message_id} ended under its handler"
                ) from error
            raise
        finally:
            del self._calls[receipt]
        if answer is not None and not isinstance(answer, Ack):
            raise TypeError(f"a handler returns Ack.OK, Ack.REQUEUE or None, not {answer!r}")
        return answer

    async def _requeue(self, messages: Messages, error: Exception | None) -> None:
        """Give messages back, and report the exception, or stop at it."""
        try:
            await self._acks.send()  # what was handled before goes before
            reason = None if error is None else describe(error)
            back = unsettled(messages)
            if back:
                await self._source.requeue(back, error=reason)
            for message in messages:
                if message.acked_elsewhere:
                    # the transaction that acked it was committed, or rolled back
                    with suppress(LeaseLost, NotHeld):
                        await self._source.requeue([message], error=reason)
        except Exception:
            if error is not None:
                self._errors.append(error)
            raise
        for message in messages:
            message.settled = True
        if self._stop_on_requeue:
            self._fail(error or Requeued(messages))
        elif error is not None:
            self._report(error, messages)

    def _report(self, error: Exception, messages: Messages) -> None:
        if self._on_error is not None:
            self._on_error(error, messages)
        else:
            logger.error(
                "the handler failed with message %s of topic %s",
                ", ".join(str(message.message_id) for message in messages),
                messages[0].topic,
                exc_info=error,
            )

    async def _release(self, messages: Messages) -> None:
        await self._acks.send()
        back = unsettled(messages)
        if back:
            await self._source.release(back)
        for message in back:
            message.settled = True

    async def _give_back_rest(self) -> None:
        """Release what is still at hand when consuming ends, and ack what was handled."""
        try:
            # lost: what was cut off may have settled them
            with suppress(LeaseLost, NotHeld):
                await self._acks.send()
        except Exception:
            logger.exception("could not ack what was handled; it is given back")
        try:
            for messages in list(self._at_hand.values()):
                try:
                    await self._release(messages)
                except (LeaseLost, NotHeld):
                    for message in messages:
                        with suppress(LeaseLost, NotHeld):
                            await self._release([message])
        except Exception:
            logger.exception("could not give back what was at hand; it comes when the lease ends")

    async def _make_sure(self, messages: Messages) -> None:
        """Fail if the lease is lost, as it may be where it was not extended in time."""
        await self._acks.send()
        await self._extend(messages)

    async def _extend(self, messages: Messages) -> None:
        asked = time.monotonic()
        try:
            await self._source.extend(messages)
        except psycopg.errors.LockNotAvailable:
            return  # nobody takes it over while a handler's transaction that acks some is open
        except LeaseLost:
            if self._is_gone(messages):
                return
            raise
        self._kept_until[messages[0].receipt] = asked + self._source.lease

    def _is_gone(self, messages: Messages) -> bool:
        """Whether the lease went with a connection: what was not begun is left to others."""
        is_gone = getattr(self._source, "is_gone", None)
        return is_gone is not None and is_gone(messages)

    async def _extend_leases(self) -> None:
        """Keep what is at hand, and tell the handler of what could not be kept."""
        for messages in list(self._at_hand.values()):
            try:
                await self._extend(messages)
            except LeaseLost:
                self._tell_lost(messages)
            except Exception:
                logger.exception("could not extend a lease; it may run out")

    def _tell_lost(self, messages: Messages) -> None:
        if messages[0].receipt not in self._at_hand or not unsettled(messages):
            return  # settled while we asked
        for message in messages:
            message.lease_lost = True
        call = self._calls.get(messages[0].receipt)
        if call is not None:
            call.interrupt()

    def _fail(self, error: BaseException) -> None:
        # both the loop and a timer may meet the loss of one lease
        if not any(type(error) is type(one) and str(error) == str(one) for one in self._errors):
            self._errors.append(error)
        self.stop()


def unsettled(messages: Messages) -> Messages:
    """Those that neither the handler nor the consumer has settled."""
    return [message for message in messages if not message.settled]
