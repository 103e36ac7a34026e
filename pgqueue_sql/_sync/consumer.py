# Generated from _async by `make sync`: do not edit.
"""The loop behind `consume`: fetch, unwrap, call the handler, settle."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

from .._ack import Ack
from .._unwrap import unwrap
from ..errors import LeaseLost, NotHeld, Requeued
from .message import Message
from .runtime import HandlerCall, HandlerResult, Heartbeat, Slots
from .source import Source

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

logger = logging.getLogger("pgqueue_sql")

T = TypeVar("T")
Messages = list[Message[Any]]
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
        prefetch: int,
        concurrency: int,
        stop_on_requeue: bool,
        on_error: OnError | None,
    ) -> None:
        self._source = source
        self._handler = handler
        self._into = into
        self._batch = batch
        self._prefetch = prefetch
        self._concurrency = concurrency
        self._stop_on_requeue = stop_on_requeue
        self._on_error = on_error
        self._slots = Slots(concurrency)
        # often enough that one late or lost beat does not lose the lease
        self._heartbeat = Heartbeat(source.lease / 3, self._extend_leases)
        self._calls: dict[int, HandlerCall] = {}
        self._stopping = False
        self._errors: list[Exception] = []
        self._at_hand: list[Messages] = []
        self._to_ack: Messages = []

    def stop(self) -> None:
        """Let `run` return once the delivery at hand is settled. From any thread."""
        self._stopping = True
        self._source.stop()

    def run(self) -> None:
        """Consume until stopped, or until something fails."""
        try:
            self._source.subscribe()
            self._source.listen()
            self._heartbeat.start()
            while not self._stopping:
                self._slots.wait_for_one()
                if not self._stopping:
                    self._fetch_and_handle()
            self._slots.join()
            self._ack_handled()
        except Exception as error:
            self._errors.append(error)
            self._stopping = True
            self._slots.join()
        except BaseException:
            self._cancel()
            raise
        finally:
            self._heartbeat.stop()
            self._source.close()
        if len(self._errors) > 1:
            raise ExceptionGroup("several errors stopped consuming", self._errors)
        if self._errors:
            raise self._errors[0]

    def _fetch_and_handle(self) -> None:
        acked, self._to_ack = self._to_ack, []
        messages = list(self._source.fetch_pending(self._batch or self._prefetch, acked))
        if messages:
            self._at_hand.append(messages)
            self._slots.run(self._handle_receipt, messages)
        elif not self._stopping:
            self._source.wait()

    def _handle_receipt(self, messages: Messages) -> None:
        """Handle the messages of one receipt, in order. Records errors instead of raising them."""
        size = self._batch or 1
        try:
            for start in range(0, len(messages), size):
                if self._stopping or not self._deliver(messages[start : start + size]):
                    self._release(messages)
                    break
        except Exception as error:
            self._fail(error)
        self._at_hand.remove(messages)
        if self._concurrency > 1:
            self._source.wake()

    def _deliver(self, messages: Messages) -> bool:
        """Hand messages to the handler and settle them; False if they went back."""
        try:
            answer = self._call_handler(messages)
        except LeaseLost:
            raise  # nothing is left to settle
        except Exception as error:
            self._requeue(messages, error)
            return False
        if answer is Ack.REQUEUE or any(message.requeued for message in messages):
            self._requeue(messages, None)
            return False
        self._ack(unsettled(messages))
        return True

    def _call_handler(self, messages: Messages) -> Ack | None:
        unwrapped = [unwrap(message.payload, self._into) for message in messages]
        for message, payload in zip(messages, unwrapped, strict=True):
            message.payload = payload
        call = self._calls[messages[0].receipt] = HandlerCall()
        try:
            answer = call.result(self._handler(messages[0] if self._batch is None else messages))
        except BaseException as error:
            if call.interrupted:
                raise LeaseLost(
                    f"the lease of message {messages[0].message_id} ended under its handler"
                ) from error
            raise
        finally:
            del self._calls[messages[0].receipt]
        if answer is not None and not isinstance(answer, Ack):
            raise TypeError(f"a handler returns Ack.OK, Ack.REQUEUE or None, not {answer!r}")
        return answer

    def _extend_leases(self) -> None:
        """Keep what is at hand, and tell the handler of what could not be kept."""
        for messages in list(self._at_hand):
            try:
                self._source.extend(messages)
            except LeaseLost:
                self._tell_lost(messages)
            except Exception:
                logger.exception("could not extend a lease; it may run out")

    def _tell_lost(self, messages: Messages) -> None:
        if messages not in self._at_hand or not unsettled(messages):
            return  # settled while we asked
        for message in messages:
            message.lease_lost = True
        call = self._calls.get(messages[0].receipt)
        if call is not None:
            call.interrupt()

    def _ack(self, messages: Messages) -> None:
        if not messages:
            return
        if self._concurrency == 1 and messages[-1] is self._at_hand[-1][-1] and not self._stopping:
            # all that is left of the receipt: goes with the next fetch, to save a round trip
            self._to_ack = messages
        else:
            self._source.ack(messages)
        for message in messages:
            message.settled = True

    def _requeue(self, messages: Messages, handler_error: Exception | None) -> None:
        reason = None if handler_error is None else describe(handler_error)
        try:
            back = unsettled(messages)
            if back:
                self._source.requeue(back, error=reason)
            for message in messages if handler_error is not None else ():
                if message.acked_elsewhere:
                    # the transaction that acked it was committed, or went with the exception
                    with suppress(LeaseLost, NotHeld):
                        self._source.requeue([message], error=reason)
        except Exception:
            if handler_error is not None:
                self._errors.append(handler_error)
            raise
        for message in messages:
            message.settled = True
        if self._stop_on_requeue:
            self._fail(handler_error or Requeued(messages))
        elif handler_error is not None:
            self._report(handler_error, messages)

    def _report(self, error: Exception, messages: Messages) -> None:
        if self._on_error is not None:
            self._on_error(error, messages)
        else:
            logger.error(
                "the handler failed; requeued message %s of topic %s",
                ", ".join(str(message.message_id) for message in messages),
                messages[0].topic,
                exc_info=error,
            )

    def _release(self, messages: Messages) -> None:
        back = unsettled(messages)
        if back:
            self._source.release(back)
        for message in back:
            message.settled = True

    def _ack_handled(self) -> None:
        if self._to_ack:
            acked, self._to_ack = self._to_ack, []
            self._source.ack(acked)

    def _cancel(self) -> None:
        """Give back at once what is at hand. What was handled is acked."""
        self._stopping = True
        at_hand = list(self._at_hand)
        self._slots.cancel()
        try:
            self._ack_handled()
            for messages in at_hand:
                # a thread, or the call that was cut off, may have settled them
                with suppress(LeaseLost, NotHeld):
                    self._release(messages)
        except Exception:
            logger.exception("could not give back what was at hand; its lease will run out")

    def _fail(self, error: Exception) -> None:
        self._errors.append(error)
        self._stopping = True
        self._source.wake()


def unsettled(messages: Messages) -> Messages:
    """Those that neither the handler nor the consumer has settled."""
    return [message for message in messages if not message.settled]


def describe(error: Exception) -> str:
    """An exception in a line, for the history of failures."""
    return f"{type(error).__name__}: {error}"
