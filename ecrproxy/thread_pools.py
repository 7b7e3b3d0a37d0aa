"""
The threads of a process: pools that start, yield and end, and single calls outside of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from twisted.application.service import Service
from twisted.internet.defer import Deferred, fail
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall
from ecrproxy.threads import SILENT, Bounded, InThread

log = Logger()
T = TypeVar("T")
_NICE = 10
_STOP_SECONDS: Final = 2.0
RESTORE_SECONDS: Final = 600.0
"""How long pools stay smaller after threads were given back."""


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
        raise TimeoutError(errno.ETIMEDOUT, SILENT)
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
