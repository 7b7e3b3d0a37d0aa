"""
At most one fetch in flight per key.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Hashable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy import tracing

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall

log = Logger()
T = TypeVar("T")


class DeadlineExceededError(Exception):
    """
    The work did not finish within its deadline; it continues.
    """


def within(seconds: float, work: Coroutine[Any, Any, T], call_later: Callable[..., IDelayedCall]) -> Deferred[T]:
    """
    Wait up to C{seconds} for C{work}, which continues after that.

    @return: fires with the result, or fails with L{DeadlineExceededError}. Cancelling before that cancels C{work}.
    """

    def end(outcome: T | Failure) -> None:
        if limit.active():
            limit.cancel()
        if not waiting.called:
            waiting.callback(outcome)
        elif isinstance(outcome, Failure):
            log.debug("Failed when nobody waited any longer: {problem}", problem=outcome.value)

    def leave(_: Deferred[T]) -> None:
        limit.cancel()  # before the work, which may take a while to end
        working.cancel()

    waiting: Deferred[T] = Deferred(leave)
    limit = call_later(seconds, lambda: waiting.errback(DeadlineExceededError()))
    working = Deferred.fromCoroutine(work).addBoth(end)
    return waiting


class Flights(Generic[T]):
    """
    At most one fetch in flight per key; concurrent callers wait for it.

    @param abandons: cancel a fetch when its last waiter is cancelled.
    @param foreseen: failures that need no traceback. It is dropped, with the data that its frames hold.
    """

    def __init__(self, *, abandons: bool = False, foreseen: type[Exception] | None = None) -> None:
        self._abandons, self._foreseen = abandons, foreseen
        self._waiting: dict[Hashable, list[Deferred[T]]] = {}
        self._fetching: dict[Hashable, Deferred[T]] = {}
        self._spans: dict[Hashable, tracing.Span] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._waiting

    def join(self, key: Hashable, fetch: Callable[[], Coroutine[Any, Any, T]]) -> Deferred[T]:
        """
        Wait for the fetch of C{key}; call C{fetch} if none is in flight.

        Cancelling the returned Deferred stops only this wait.
        """
        flying, waiting = key in self._waiting, self._waiting.setdefault(key, [])
        waiter: Deferred[T] = Deferred(lambda leaver: self._leave(key, waiting, leaver))
        waiting.append(waiter)
        if flying:
            tracing.link(self._spans.get(key))
        else:  # no await between this check and the registration
            if (span := tracing.current.get()) is not None:
                self._spans[key] = span
            self._fetching[key] = fetching = Deferred.fromCoroutine(fetch())
            fetching.addBoth(self._land, key, waiting)
        return waiter

    def _leave(self, key: Hashable, waiting: list[Deferred[T]], leaver: Deferred[T]) -> None:
        waiting.remove(leaver)
        if self._abandons and not waiting and self._waiting.get(key) is waiting:
            del self._waiting[key]  # the next caller starts a new fetch
            self._spans.pop(key, None)
            self._fetching.pop(key).cancel()

    def _land(self, result: T | Failure, key: Hashable, waiting: list[Deferred[T]]) -> None:
        if self._waiting.get(key) is waiting:
            del self._waiting[key], self._fetching[key]
            self._spans.pop(key, None)
        if isinstance(result, Failure) and self._foreseen is not None and result.check(self._foreseen):
            _let_go_of_frames(result)
        if not waiting and isinstance(result, Failure):
            log.debug("Nobody waited any more for {key}: {problem}", key=key, problem=result.value)
        for waiter in list(waiting):
            if not waiter.called:  # an earlier waiter's callback may have cancelled this one
                waiter.callback(result)


def _let_go_of_frames(failure: Failure) -> None:
    """
    Drop the traceback frames of a failure.

    Awaiting a failure creates a reference cycle with them, and the garbage collector counts objects, not bytes.
    """
    failure.cleanFailure()
    problem: BaseException | None = failure.value
    while problem is not None:
        problem.__traceback__, problem = None, problem.__cause__ or problem.__context__
