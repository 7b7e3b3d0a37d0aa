"""
Call what blocks somewhere else than in the reactor's thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

log = Logger()
_NICE = 10
T = TypeVar("T")


class InThread(Protocol):
    """
    Call a blocking function in a thread.
    """

    def __call__(self, blocking: Callable[..., T], *args: Any) -> Deferred[T]:  # noqa: ANN401
        """
        Call C{blocking(*args)}; fires with its result.
        """


class Threads(Service):
    """
    A pool of threads of its own, whose waiting never holds up the pool that resolves names.

    @param yielding: whether they leave the processor to the event loop. Not those that are busy with Python itself:
        the event loop waits for the interpreter's lock, and on a busy machine with it for a thread that has the lock
        and no processor.
    """

    def __init__(self, size: int, reactor: Any, *, yielding: bool = True) -> None:  # noqa: ANN401
        self._pool, self._reactor = ThreadPool(0, size, "ecrproxy"), reactor
        if yielding:
            self._pool.threadFactory = _Yielding

    def call(self, blocking: Callable[..., T], *args: Any) -> Deferred[T]:  # noqa: ANN401
        """
        Call C{blocking(*args)} in one of them.
        """
        return deferToThreadPool(self._reactor, self._pool, blocking, *args)

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._pool.start()

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        self._pool.stop()


class _Yielding(threading.Thread):
    """
    A thread that leaves the processor to the event loop: hashing must not stall it.
    """

    def run(self) -> None:
        with contextlib.suppress(OSError):  # some sandboxes forbid even this
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        super().run()


def call_unowned(reactor: Any, blocking: Callable[[], T]) -> Deferred[T]:  # noqa: ANN401
    """
    Call C{blocking()} in a thread that the end of the daemon does not wait for: AWS may keep it for long.
    """
    result: Deferred[T] = Deferred()

    def call() -> None:
        try:
            outcome: T | Failure = blocking()
        except Exception:  # noqa: BLE001 (told to who waits)
            outcome = Failure()
        reactor.callFromThread(result.callback, outcome)

    threading.Thread(target=call, name="ecrproxy-aws", daemon=True).start()
    return result


def on_its_own(work: Coroutine[Any, Any, None]) -> None:
    """
    Let work go on by itself, whose failure is nobody's answer: it is logged.
    """
    Deferred.fromCoroutine(work).addErrback(lambda failure: log.failure("On its own", failure))
