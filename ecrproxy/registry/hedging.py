"""
Hedged requests: a request without an early answer is sent again, and the first answer counts.

A server that loses a request, or the connection that it came by, answers the next one (Dean and Barroso, "The Tail at
Scale", 2013; AWS advises the same for S3: "Performance design patterns"). The first attempt is kept, because
a server that is slow with everything would answer no other in time; of the later ones, the last. So a request has two
connections at most.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionAborted
from twisted.python.failure import Failure

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall

T = TypeVar("T")

AGAIN_SECONDS: Final = 5.0
"""
Seconds without an answer after which a request is sent again, and doubled after that. The idle connections of its host
have been closed by then: see C{connections.SILENT_SECONDS}.
"""
SHORT_SECONDS: Final = 10.0
"""Deadline, in seconds, up to which a request is sent once: nobody waits for its answer, or another one will do."""


class Hedged(Generic[T]):
    """
    A request, which may be sent several times until its deadline.

    @param send: sends it; called in the context of the constructor's caller.
    @param seconds: its deadline.
    @param again: sends it again; called in the same context. Its failure counts only without a better outcome: an
        overloaded server refuses a second request, but may be about to answer the first.
    @ivar answer: fires with the first answer; with a failure once no attempt is in progress; after the deadline, with
        the first failure, or C{TimeoutError}. Cancelling it cancels all attempts.
    @ivar late: whether the deadline has passed, and no attempt has failed.
    """

    def __init__(
        self,
        send: Callable[[], Deferred[T]],
        seconds: float,
        call_later: Callable[..., IDelayedCall],
        again: Callable[[], Deferred[T]],
    ) -> None:
        self._again, self._context, self._call_later = again, copy_context(), call_later
        self._left = seconds
        self._step = AGAIN_SECONDS if seconds > SHORT_SECONDS else seconds
        self._attempts: list[Deferred[T]] = []
        self._failure: Failure | None = None
        self.late = False
        self.answer: Deferred[T] = Deferred(lambda _: self._stop())
        first = send()
        self._timer = call_later(self._step, self._wake)
        self._await(first)

    def _await(self, attempt: Deferred[T]) -> None:
        self._attempts.append(attempt)
        attempt.addBoth(self._ended, attempt)

    def _ended(self, result: T | Failure, attempt: Deferred[T]) -> None:
        if attempt not in self._attempts:
            return  # given up
        self._attempts.remove(attempt)
        if isinstance(result, Failure) and result.check(CancelledError):  # not by the caller
            result = Failure(ConnectionAborted("it was given up"))
        if isinstance(result, Failure):
            self._failure = self._failure or result
            if self._attempts:
                return
        self._stop()
        self.answer.callback(result)

    def _wake(self) -> None:
        self._left -= self._step
        if self._left <= 0:
            self.late = self._failure is None
            self._stop()
            self.answer.errback(self._failure or TimeoutError())
            return
        self._step = min(2 * self._step, self._left)
        self._timer = self._call_later(self._step, self._wake)
        self._give_up(self._attempts[1:])
        self._await(self._context.run(self._again))

    def _stop(self) -> None:
        if self._timer.active():
            self._timer.cancel()
        self._give_up(self._attempts)

    def _give_up(self, attempts: list[Deferred[T]]) -> None:
        given_up = list(attempts)
        self._attempts = [each for each in self._attempts if each not in given_up]
        for each in given_up:
            each.cancel()
