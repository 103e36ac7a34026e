# Generated from _async by `make sync`: do not edit.
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
from .acks import Acks, Messages
from .message import Message
from .runtime import HandlerCall, HandlerResult, Heartbeat, Shield, Slots
from .source import Source

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

logger = logging.getLogger("pgqueue_sql")

T = TypeVar("T")
OnError = Callable[[Exception, Sequence[Message[Any]]], None]


class Consumer(Generic[T]):
    """One run of `consume`.

    The messages of one receipt are handled one after the other, or in groups of `batch`; what the
    consumer does not get to (it is stopped, or the message before failed) it releases.
    """

    def __init__(
        self,
        source: Source,
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
        self._acks = Acks(source, self._fail)
        self.shield = Shield(self.stop)

    def stop(self) -> None:
        """Let `run` return once the delivery at hand is settled. From any thread."""
        self._stopping = True
        self._source.stop()

    def run(self) -> None:
        """Consume until stopped, or until something fails."""
        try:
            try:
                self._consume()
            except Exception as error:
                self._fail(error)
            self._slots.join()
            self.shield.run(self._give_back_rest)
        except BaseException:
            # cancelled: at once, so not waiting for handlers that cannot be
            self.stop()
            self._slots.cancel()
            self._give_back_rest()
            raise
        finally:
            try:
                self._acks.stop()
            finally:
                try:
                    self._heartbeat.stop()
                finally:
                    self._source.close()
        if len(self._errors) > 1:
            raise BaseExceptionGroup("several errors stopped consuming", self._errors)
        if self._errors:
            raise self._errors[0]

    def _consume(self) -> None:
        self._source.subscribe()
        self._source.listen()
        self._heartbeat.start()
        try:
            while not self._stopping:
                self._slots.wait_for_one()
                if self._stopping:
                    break
                messages = self.shield.run(self._fetch)
                if messages:
                    self._slots.run(self._handle_receipt, messages)
                elif not self._stopping:
                    self.shield.run(self._source.wait)
        finally:
            self.shield.run(self._leave)
        self._slots.join()
        self.shield.run(self._acks.send)

    def _leave(self) -> None:
        leave = getattr(self._source, "leave", None)
        if leave is not None:
            leave()

    def _fetch(self) -> Messages:
        asked = time.monotonic()
        messages = self._acks.fetch(self._pace.messages, one_receipt=self._concurrency == 1)
        if messages:
            self._at_hand[messages[0].receipt] = messages
            self._kept_until[messages[0].receipt] = asked + self._source.lease
        return messages

    def _handle_receipt(self, messages: Messages) -> None:
        """Handle the messages of one receipt, in order. Records errors instead of raising them."""
        size = self._batch or 1
        started = time.monotonic()
        try:
            for start in range(0, len(messages), size):
                receipt = messages[0].receipt
                if messages[0].lease_lost or time.monotonic() > self._kept_until[receipt]:
                    self.shield.run(self._make_sure, messages)
                if (
                    self._stopping
                    or self._is_gone(messages)
                    or not self._deliver(messages[start : start + size])
                ):
                    self.shield.run(self._release, messages)
                    break
            if self._concurrency > 1:
                self.shield.run(self._acks.send)
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

    def _deliver(self, messages: Messages) -> bool:
        """Hand messages to the handler and settle them; False if some of them were not acked."""
        for message in messages:
            try:
                message.payload = unwrap(message.payload, self._into)
            except UnwrapError as error:
                self.shield.run(self._requeue, [message], error)
                return False
        if self._stopping:
            return False
        try:
            answer = self._call_handler(messages)
        except LeaseLost:
            raise  # nothing is left to settle
        except Exception as error:
            self.shield.run(self._requeue, messages, error)
            return False
        if answer is Ack.REQUEUE or any(message.requeued for message in messages):
            self.shield.run(self._requeue, messages, None)
            return False
        self._acks.add(messages)
        return True

    def _call_handler(self, messages: Messages) -> Ack | None:
        receipt = messages[0].receipt
        call = self._calls[receipt] = HandlerCall()
        try:
            answer = call.result(self._handler(messages[0] if self._batch is None else messages))
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

    def _requeue(self, messages: Messages, error: Exception | None) -> None:
        """Give messages back, and report the exception, or stop at it."""
        try:
            self._acks.send()  # what was handled before goes before
            reason = None if error is None else describe(error)
            back = unsettled(messages)
            if back:
                self._source.requeue(back, error=reason)
            for message in messages:
                if message.acked_elsewhere:
                    # the transaction that acked it was committed, or rolled back
                    with suppress(LeaseLost, NotHeld):
                        self._source.requeue([message], error=reason)
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

    def _release(self, messages: Messages) -> None:
        self._acks.send()
        back = unsettled(messages)
        if back:
            self._source.release(back)
        for message in back:
            message.settled = True

    def _give_back_rest(self) -> None:
        """Release what is still at hand when consuming ends, and ack what was handled."""
        try:
            # lost: what was cut off may have settled them
            with suppress(LeaseLost, NotHeld):
                self._acks.send()
        except Exception:
            logger.exception("could not ack what was handled; it is given back")
        try:
            for messages in list(self._at_hand.values()):
                try:
                    self._release(messages)
                except (LeaseLost, NotHeld):
                    for message in messages:
                        with suppress(LeaseLost, NotHeld):
                            self._release([message])
        except Exception:
            logger.exception("could not give back what was at hand; it comes when the lease ends")

    def _make_sure(self, messages: Messages) -> None:
        """Fail if the lease is lost, as it may be where it was not extended in time."""
        self._acks.send()
        self._extend(messages)

    def _extend(self, messages: Messages) -> None:
        asked = time.monotonic()
        try:
            self._source.extend(messages)
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

    def _extend_leases(self) -> None:
        """Keep what is at hand, and tell the handler of what could not be kept."""
        for messages in list(self._at_hand.values()):
            try:
                self._extend(messages)
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
