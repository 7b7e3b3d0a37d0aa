"""
Call what blocks somewhere else than in the reactor's thread.
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
"""How long pools do with fewer threads after some were given back."""
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
    Threads for the cache's disk. Each kind of work has its own, so that none waits for a slower one.

    @ivar reading: looks up and reads: what a cache hit needs.
    @ivar writing: writes what arrives.
    @ivar committing: flushes files to the disk, which may take seconds each.
    @ivar hashing: hashes files of any size.
    @ivar digesting: hashes what is in memory, whatever the disk does.
    @ivar closing: closes and unlinks what a transfer leaves, however long that takes.
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
        Do everything in the same threads.
        """
        return cls(*[in_thread] * 6)


class _Call:
    """
    A call in a pool of threads, or waiting for one.
    """

    def __init__(self, blocking: Callable[[], Any], *, patient: bool) -> None:
        self.blocking, self.patient = blocking, patient
        self.result: Deferred[Any] = Deferred()
        self.limit: IDelayedCall | None = None

    def cancel_limit(self) -> None:
        """
        Let it wait, or take, as long as it likes.
        """
        if self.limit is not None and self.limit.active():
            self.limit.cancel()

    def end(self, outcome: object) -> None:
        """
        Pass the outcome on, unless whoever asked has left.
        """
        self.cancel_limit()
        if not self.result.called:
            self.result.callback(outcome)


class Bounded:
    """
    Calls in threads that fail with C{TimeoutError}, an C{OSError}, if they take too long: the disk may hang.

    A thread can't be interrupted. It counts as hanging once its call has taken C{seconds}, however long
    anybody waited for that. While all of them hang, further calls fail at once; one that returns is used again.
    What a call returns after its time is dropped. A disk that is slow may keep hundreds waiting for a thread: each of
    them waits no longer than a call may take, and then never begins. See L{patiently} for the others.

    @param in_thread: calls in one of C{size} threads.
    @param seconds: how long a call may wait for a thread; and how long it may take, once a thread is at it.
    @param disk: what the log says is to be checked where one does not return.
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

        The other calls are short, and go first; each time that they have had as many turns as there are threads, one of
        these has its turn. It has all its time then, though others hang: of a slow disk one call in many may be late.
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
        Once a call hangs, others get less time: a request may need the disk several times.
        """
        return min(self._seconds, _SUSPICIOUS_SECONDS) if self._hanging else self._seconds

    def _go_on(self) -> None:
        while len(self._running) + self._hanging < self._size and (call := self._next()) is not None:
            call.cancel_limit()
            self._begin(call)

    def _next(self) -> _Call | None:
        """
        Take the call whose turn it is; none if none waits. Those that were given up have no turns.
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
        Have nobody wait for a call any longer.

        @param left: seconds until it counts as hanging.
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
    Call C{blocking()} in a thread, and C{undo(result)} if whoever waits for the result leaves, or gives the disk up.

    @param unbegun: called instead if that had not begun by then: it never does. Without, it is done late, and undone.
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
    A pool of threads of its own, whose waiting never holds up the pool that resolves names. See L{Pools.threads}.
    """

    def __init__(self, pool: ThreadPool, size: int, reactor: Any) -> None:  # noqa: ANN401
        self._pool, self._size, self._reactor = pool, size, reactor

    def call(self, blocking: Callable[..., T], *args: Any) -> Deferred[T]:  # noqa: ANN401
        """
        Call C{blocking(*args)} in one of them.
        """
        return deferToThreadPool(self._reactor, self._pool, blocking, *args)

    def post(self, blocking: Callable[[], None]) -> None:
        """
        Call C{blocking()}, which does not fail, in one of them. May itself be called in any thread.

        @raise RuntimeError: if no thread can be started.
        """
        self._pool.callInThreadWithCallback(lambda _, __: None, blocking)

    def bounded(self, seconds: float) -> InThread:
        """
        Give these threads to calls that may take C{seconds} each. There must be no others.
        """
        return Bounded(self.call, self._size, seconds, self._reactor)


def content_with_few(pool: ThreadPool) -> ThreadPool:
    """
    Have a pool do with the threads that it has, where the machine gives no other for a while.

    Others are started when they are needed, and Twisted lets a call fail for which none can be. One there is from the
    start. Calls wait in the pool itself, which alone knows when a thread is free: that is later than its outcome.
    """
    call = pool.callInThreadWithCallback

    def call_or_wait(*args: Any, **more: Any) -> None:  # noqa: ANN401
        try:
            call(*args, **more)
        except RuntimeError:  # as threading has it
            pool.threads.pop()  # it never began, and can't be joined
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
    All pools of threads of a process: the first to start, and the last to stop.

    The end does not wait long for calls that do not return: C{_STOP_SECONDS} for all pools together.
    """

    def __init__(self, reactor: Any) -> None:  # noqa: ANN401
        self._reactor = reactor
        self._pools: list[ThreadPool] = []
        self._sizes: list[tuple[ThreadPool, int]] = []
        self._restoring: IDelayedCall | None = None

    def threads(self, size: int, *, yielding: bool = True) -> Threads:
        """
        Make a pool, before any is started.

        @param size: the most threads.
        @param yielding: whether they leave the processor to the event loop. Not those that are busy with Python itself:
            the event loop waits for the interpreter's lock, and on a busy machine with it for a thread that has the
            lock and no processor.
        """
        pool = content_with_few(ThreadPool(1, size, "ecrproxy"))
        pool.threadFactory = _Yielding if yielding else _Abandoned
        self._pools.append(pool)
        return Threads(pool, size, self._reactor)

    def give_back(self) -> None:
        """
        Stop half of the threads that are idle, but the last one of each pool, and start no others for some minutes.

        A pool otherwise keeps each thread that it has ever needed: together they may use up a limit of threads, and
        leave none for a token, a worker process or another program within the same limit.
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
            # Busy threads can't be counted on: what they do may hang.
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
            with contextlib.suppress(RuntimeError):  # the machine gives no more threads: that pool is left as it is
                each.start()
                begun.append(each)
        deadline = time.monotonic() + _STOP_SECONDS
        for each in begun:
            each.join(max(0.0, deadline - time.monotonic()))


class _Abandoned(threading.Thread):
    """
    A thread that the process does not wait for when it ends: a hung disk never lets it return.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs, daemon=True)


class _Yielding(_Abandoned):
    """
    A thread that leaves the processor to the event loop: hashing must not stall it.
    """

    def run(self) -> None:
        with contextlib.suppress(OSError):  # some sandboxes forbid even this
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        super().run()


def in_time(blocking: Callable[[], T], seconds: float) -> T:
    """
    Call C{blocking()} before the reactor runs, in a thread that is left alone if it takes longer than C{seconds}.

    @raise TimeoutError: if it does, or if there is no thread.
    """
    outcomes: list[T | Failure] = []

    def call() -> None:
        try:
            outcomes.append(blocking())
        except Exception:  # noqa: BLE001 (raised to who waits)
            outcomes.append(Failure())

    calling = threading.Thread(target=call, name="ecrproxy-start", daemon=True)
    try:
        calling.start()
    except RuntimeError as problem:  # it would never return
        raise TimeoutError(errno.EAGAIN, str(problem)) from problem
    calling.join(seconds)
    if not outcomes:
        raise TimeoutError(errno.ETIMEDOUT, _SILENT)
    if isinstance(outcome := outcomes[0], Failure):
        outcome.raiseException()
    return outcome


def call_unowned(reactor: Any, blocking: Callable[..., T], *args: Any) -> Deferred[T]:  # noqa: ANN401
    """
    Call C{blocking(*args)} in a thread that the end of the daemon does not wait for: AWS may keep it for long.

    @return: fires with the result; fails with C{RuntimeError} if no thread can be started.
    """
    result: Deferred[T] = Deferred()

    def call() -> None:
        try:
            outcome: T | Failure = blocking(*args)
        except Exception:  # noqa: BLE001 (told to who waits)
            outcome = Failure()
        reactor.callFromThread(result.callback, outcome)

    try:
        threading.Thread(target=call, name="ecrproxy-unowned", daemon=True).start()
    except RuntimeError:
        return fail()
    return result


def on_its_own(work: Coroutine[Any, Any, None]) -> None:
    """
    Let work go on by itself, whose failure is nobody's answer: it is logged.
    """
    Deferred.fromCoroutine(work).addErrback(lambda failure: log.failure("On its own", failure))
