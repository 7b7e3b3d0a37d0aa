"""
Run blocking calls outside the reactor thread.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall, IReactorTime

log = Logger()
SILENT: Final = "the disk does not answer"
_SUSPICIOUS_SECONDS: Final = 1.0
T = TypeVar("T")


class InThread(Protocol):
    """
    Call a blocking function in a thread.
    """

    def __call__(self, blocking: Callable[..., T], *args: Any) -> Deferred[T]:  # noqa: ANN401
        """
        Call C{blocking(*args)}; fires with its result.
        """


@dataclass(frozen=True, slots=True)
class Disk:
    """
    Threads for the cache's disk. Each kind of work has its own, so that it never waits for a slower one.

    @ivar reading: lookups and reads for cache hits.
    @ivar writing: writes of incoming data.
    @ivar committing: flushes files to disk, which may take seconds each.
    @ivar hashing: hashes files of any size.
    @ivar digesting: hashes data in memory, independently of the disk.
    @ivar closing: closes and unlinks the files of transfers, which may take long.
    """

    reading: InThread
    writing: InThread
    committing: InThread
    hashing: InThread
    digesting: InThread
    closing: InThread

    @classmethod
    def of(cls, in_thread: InThread) -> Disk:
        """
        Use the same threads for everything.
        """
        return cls(*[in_thread] * 6)


class _Call:
    """
    A call that runs in a thread or waits for one.
    """

    def __init__(self, blocking: Callable[[], Any], *, patient: bool) -> None:
        self.blocking, self.patient = blocking, patient
        self.result: Deferred[Any] = Deferred()
        self.limit: IDelayedCall | None = None

    def cancel_limit(self) -> None:
        """
        Remove the time limit.
        """
        if self.limit is not None and self.limit.active():
            self.limit.cancel()

    def end(self, outcome: object) -> None:
        """
        Deliver the outcome, unless the caller has cancelled.
        """
        self.cancel_limit()
        if not self.result.called:
            self.result.callback(outcome)


class Bounded:
    """
    Calls in threads that fail with C{TimeoutError}, an C{OSError}, if they take too long: the disk may hang.

    A thread can't be interrupted. It counts as hanging once its call has run for C{seconds}, however long the caller
    has waited. While all threads hang, further calls fail at once; a thread that returns is used again. Late results
    are dropped. With a slow disk, hundreds of calls may wait for a thread: each waits at most C{seconds}, and is then
    never started. See L{patiently} for calls without that limit.

    @param in_thread: calls in one of C{size} threads.
    @param seconds: how long a call may wait for a thread; also, how long it may then run.
    @param disk: what to check if a call does not return, for the log.
    """

    def __init__(
        self,
        in_thread: InThread,
        size: int,
        seconds: float,
        clock: IReactorTime,
        disk: str = "the cache's file system",
    ) -> None:
        self._in_thread, self._size, self._seconds, self._clock, self._disk = in_thread, size, seconds, clock, disk
        self._patient, self._others, self._turn = deque[_Call](), deque[_Call](), 0
        self._running: set[_Call] = set()
        self._hanging = 0

    def __call__(self, blocking: Callable[..., T], *args: Any) -> Deferred[T]:  # noqa: ANN401
        """
        Call C{blocking(*args)}; fires with its result.
        """
        call = self._call(_Call(partial(blocking, *args), patient=False))
        if call.limit is None and not call.result.called:
            call.limit = self._clock.callLater(self._patience, self._left_waiting, call)
        return call.result

    def patiently(self, blocking: Callable[..., T], *args: Any) -> Deferred[T]:  # noqa: ANN401
        """
        Do the same, but wait for a thread until all of them hang: for work that can't be done without the disk.

        Other calls are short and have priority; after as many of them as there are threads, one of these is started. It
        has the full time, even if others hang: on a slow disk, one call in many may be late.
        """
        return self._call(_Call(partial(blocking, *args), patient=True)).result

    def _call(self, call: _Call) -> _Call:
        if self._hanging == self._size:
            call.end(_timed_out())
        else:
            (self._patient if call.patient else self._others).append(call)
            self._go_on()
        return call

    @property
    def _patience(self) -> float:
        """
        Return the time limit; it is shorter while a call hangs, because a request may need the disk several times.
        """
        return min(self._seconds, _SUSPICIOUS_SECONDS) if self._hanging else self._seconds

    def _go_on(self) -> None:
        while len(self._running) + self._hanging < self._size and (call := self._next()) is not None:
            call.cancel_limit()
            self._begin(call)

    def _next(self) -> _Call | None:
        """
        Remove and return the next call, skipping those that were cancelled; None if none waits.
        """
        for each in (self._patient, self._others):
            while each and each[0].result.called:
                each.popleft().cancel_limit()
        if not (self._patient or self._others):
            return None
        self._turn = (self._turn + 1) % (self._size + 1)
        return ((self._others or self._patient) if self._turn else (self._patient or self._others)).popleft()

    def _begin(self, call: _Call) -> None:
        self._running.add(call)
        patience = self._seconds if call.patient else self._patience
        call.limit = self._clock.callLater(patience, self._expire, call, self._seconds - patience)
        self._in_thread(call.blocking).addBoth(self._returned, call)

    def _left_waiting(self, call: _Call) -> None:
        log.warn(
            "The disk is too slow for all that is asked of it: some goes on without it; check {disk}",
            disk=self._disk,
            once=("slow", self._disk),
        )
        call.end(_timed_out())

    def _expire(self, call: _Call, left: float) -> None:
        """
        Time out a call.

        @param left: seconds until its thread counts as hanging.
        """
        call.end(_timed_out())
        if left:
            call.limit = self._clock.callLater(left, self._expire, call, 0.0)
            return
        log.error(
            "The disk does not answer within {seconds:g} s: going on without it; check {disk}",
            seconds=self._seconds,
            disk=self._disk,
            once=("hangs", self._disk),
        )
        self._running.discard(call)
        self._hanging += 1
        if self._hanging == self._size:
            waiting = [*self._others, *self._patient]
            self._others.clear()
            self._patient.clear()
            for each in waiting:
                each.end(_timed_out())

    def _returned(self, outcome: object, call: _Call) -> None:
        if call in self._running:
            self._running.discard(call)
        else:
            self._hanging -= 1
        call.end(outcome)
        self._go_on()


def _timed_out() -> Failure:
    return Failure(TimeoutError(errno.ETIMEDOUT, SILENT))


async def undone_if_late(
    in_thread: InThread,
    blocking: Callable[[], T],
    undo: Callable[[T], object],
    unbegun: Callable[[], object] | None = None,
) -> T:
    """
    Call C{blocking()} in a thread, and C{undo(result)} if the caller cancels or times out.

    @param unbegun: called instead if C{blocking} had not started by then, and it is never started. Without it,
        C{blocking} runs late and is undone.
    """
    lock, results, begun, left = threading.Lock(), list[T](), False, False

    def call() -> T:
        nonlocal begun
        with lock:
            if left and unbegun is not None:
                raise CancelledError
            begun = True
        result = blocking()
        with lock:
            results.append(result)
            late = left
        if late:
            undo(result)
        return result

    try:
        return await in_thread(call)
    except BaseException:
        with lock:
            left, early, never = True, list(results), not begun
        for result in early:
            undo(result)
        if never and unbegun is not None:
            unbegun()
        raise


def patient(in_thread: InThread) -> InThread:
    """
    Return C{in_thread} without its limit on waiting for a thread: see L{Bounded.patiently}.
    """
    return in_thread.patiently if isinstance(in_thread, Bounded) else in_thread


def on_its_own(work: Coroutine[Any, Any, None]) -> None:
    """
    Run work in the background, and log its failure.
    """
    Deferred.fromCoroutine(work).addErrback(lambda failure: log.failure("On its own", failure))
