"""
Run blocking calls outside the reactor thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, fail
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall, IReactorTime

log = Logger()
_NICE = 10
_SILENT: Final = "the disk does not answer"
_SUSPICIOUS_SECONDS: Final = 1.0
_STOP_SECONDS: Final = 2.0
RESTORE_SECONDS: Final = 600.0
"""How long pools stay smaller after threads were given back."""
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
    return Failure(TimeoutError(errno.ETIMEDOUT, _SILENT))


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


class Threads:
    """
    A separate pool of threads, which never delays the pool that resolves names. See L{Pools.threads}.
    """

    def __init__(self, pool: ThreadPool, size: int, reactor: Any) -> None:  # noqa: ANN401
        self._pool, self._size, self._reactor = pool, size, reactor

    def call(self, blocking: Callable[..., T], *args: Any) -> Deferred[T]:  # noqa: ANN401
        """
        Call C{blocking(*args)} in a thread of the pool.
        """
        return deferToThreadPool(self._reactor, self._pool, blocking, *args)

    def post(self, blocking: Callable[[], None]) -> None:
        """
        Call C{blocking()}, which must not fail, in a thread of the pool. May be called from any thread.

        @raise RuntimeError: if no thread can be started.
        """
        self._pool.callInThreadWithCallback(lambda _, __: None, blocking)

    def bounded(self, seconds: float) -> InThread:
        """
        Limit calls in these threads to C{seconds} each. Use the threads for nothing else.
        """
        return Bounded(self.call, self._size, seconds, self._reactor)


def content_with_few(pool: ThreadPool) -> ThreadPool:
    """
    Let a pool continue with its present threads while the system can't start more.

    Twisted starts threads on demand, and fails a call if it can't. The first thread exists from the start. Calls wait
    in the pool itself, because only the pool knows when a thread is free, which is later than its outcome.
    """
    call = pool.callInThreadWithCallback

    def call_or_wait(*args: Any, **more: Any) -> None:  # noqa: ANN401
        try:
            call(*args, **more)
        except RuntimeError:  # raised by threading
            pool.threads.pop()  # never started, so can't be joined
            most, pool.max = pool.max, 0
            try:
                call(*args, **more)
            finally:
                pool.max = most

    pool.callInThreadWithCallback = call_or_wait  # type: ignore[method-assign]
    pool.min = 1
    return pool


class Pools(Service):
    """
    All thread pools of a process: first to start, last to stop.

    Shutdown waits at most C{_STOP_SECONDS} for calls that do not return, all pools together.
    """

    def __init__(self, reactor: Any) -> None:  # noqa: ANN401
        self._reactor = reactor
        self._pools: list[ThreadPool] = []
        self._sizes: list[tuple[ThreadPool, int]] = []
        self._restoring: IDelayedCall | None = None

    def threads(self, size: int, *, yielding: bool = True) -> Threads:
        """
        Create a pool. Call this before any pool is started.

        @param size: maximum number of threads.
        @param yielding: whether the threads yield the CPU to the event loop. Must be False for threads that mostly run
            Python: on a busy machine the event loop would wait for a thread that holds the interpreter lock but gets
            no CPU time.
        """
        pool = content_with_few(ThreadPool(1, size, "ecrproxy"))
        pool.threadFactory = _Yielding if yielding else _Abandoned
        self._pools.append(pool)
        return Threads(pool, size, self._reactor)

    def give_back(self) -> None:
        """
        Stop half of the idle threads, but not the last of a pool, and start no others for C{RESTORE_SECONDS}.

        Otherwise a pool keeps every thread it has ever started: together they may exhaust a limit on threads, and leave
        none for a token, a worker process or another program under the same limit.
        """
        pools = [*self._pools, self._reactor.getThreadPool()]
        if self._restoring is None:
            self._sizes = [(pool, pool.max) for pool in pools]
            self._restoring = self._reactor.callLater(RESTORE_SECONDS, self._restore)
            log.warn(
                "No more threads can be started: doing with fewer for {minutes:.0f} minutes; raise the limit of"
                " threads (TasksMax, pids.max, ulimit -u) or of address space (ulimit -v)",
                minutes=RESTORE_SECONDS / 60,
            )
        for pool in pools:
            # Don't rely on busy threads: their calls may hang.
            pool.adjustPoolsize(1, max(1, pool.workers - (len(pool.waiters) + 1) // 2))

    def _restore(self) -> None:
        self._restoring = None
        for pool, size in self._sizes:
            pool.adjustPoolsize(1, size)

    def startService(self) -> None:  # noqa: D102
        super().startService()
        for pool in self._pools:
            pool.start()

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        restoring, self._restoring = self._restoring, None
        if restoring is not None:
            restoring.cancel()
        stopping = [threading.Thread(target=pool.stop, name="ecrproxy-stop", daemon=True) for pool in self._pools]
        begun = []
        for each in stopping:
            with contextlib.suppress(RuntimeError):  # no more threads: leave that pool as it is
                each.start()
                begun.append(each)
        deadline = time.monotonic() + _STOP_SECONDS
        for each in begun:
            each.join(max(0.0, deadline - time.monotonic()))


class _Abandoned(threading.Thread):
    """
    A thread that does not block the exit of the process: a hung disk may never let it return.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs, daemon=True)


class _Yielding(_Abandoned):
    """
    A thread that yields the CPU to the event loop, which hashing must not stall.
    """

    def run(self) -> None:
        with contextlib.suppress(OSError):  # some sandboxes forbid even this
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        super().run()


def in_time(blocking: Callable[[], T], seconds: float) -> T:
    """
    Call C{blocking()} before the reactor runs, in a thread that is abandoned after C{seconds}.

    @raise TimeoutError: if the call takes longer, or no thread can be started.
    """
    outcomes: list[T | Failure] = []

    def call() -> None:
        try:
            outcomes.append(blocking())
        except Exception:  # noqa: BLE001 (raised in the caller)
            outcomes.append(Failure())

    calling = threading.Thread(target=call, name="ecrproxy-start", daemon=True)
    try:
        calling.start()
    except RuntimeError as problem:  # no thread, so no result
        raise TimeoutError(errno.EAGAIN, str(problem)) from problem
    calling.join(seconds)
    if not outcomes:
        raise TimeoutError(errno.ETIMEDOUT, _SILENT)
    if isinstance(outcome := outcomes[0], Failure):
        outcome.raiseException()
    return outcome


def call_unowned(reactor: Any, blocking: Callable[..., T], *args: Any) -> Deferred[T]:  # noqa: ANN401
    """
    Call C{blocking(*args)} in a thread that does not delay shutdown: a call to AWS may take long.

    @return: fires with the result; fails with C{RuntimeError} if no thread can be started.
    """
    result: Deferred[T] = Deferred()

    def call() -> None:
        try:
            outcome: T | Failure = blocking(*args)
        except Exception:  # noqa: BLE001 (passed to the caller)
            outcome = Failure()
        reactor.callFromThread(result.callback, outcome)

    try:
        threading.Thread(target=call, name="ecrproxy-unowned", daemon=True).start()
    except RuntimeError:
        return fail()
    return result


def on_its_own(work: Coroutine[Any, Any, None]) -> None:
    """
    Run work in the background, and log its failure.
    """
    Deferred.fromCoroutine(work).addErrback(lambda failure: log.failure("On its own", failure))
