"""
Process-wide setup before anything runs: files, memory, garbage collection, the clock of timers.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import socket
import sys
import time
from functools import cache
from typing import Any, Final, cast

from twisted.internet._resolver import GAIResolver
from twisted.internet.base import ReactorBase

from ecrproxy.access.limits import SPARE
from ecrproxy.buffers import give_memory_back, map_large_pieces
from ecrproxy.thread_pools import content_with_few

OWN_FILES: Final = 64
"""Descriptors reserved for all but clients: listening sockets, AWS, ECR and its buckets, files being written."""
KEPT_FILES: Final = 256
"""Maximum number of content files that are kept open for a second."""
_KEPT_PART: Final = 16
"""The maximum part of all descriptors for kept files: the rest is for clients."""
FILES_OF_A_CLIENT: Final = 4
"""
Descriptors per client: its socket, the file being sent, and a connection upstream; two, while nothing answers there:
see C{registry.hedging}.
"""
GIVEN_BACK_SECONDS: Final = 30.0
"""Interval for returning freed memory to the system."""
STILL_SECONDS: Final = 2.0
"""Maximum seconds counted between two looks at the clock. A running reactor looks at least twice as often."""


def set_up(reactor: Any) -> None:  # noqa: ANN401
    """
    Do all setup that must precede the reactor's start.
    """
    count_steadily(reactor)
    end_each_lookup(reactor)
    open_many_files()
    map_large_pieces()
    give_memory_back_now_and_then(reactor)
    set_aside_what_was_imported()


def count_steadily(reactor: Any) -> None:  # noqa: ANN401
    """
    Make a reactor's timers use a monotonic clock that stops while the process is suspended.

    Twisted's reactors use the time of day: if that is set forward, all timers fire at once; if it is set back, all
    timers freeze, including timeouts and the token refresh. Call this before any timer is made. A reactor in memory
    has its own clock.
    """
    if isinstance(reactor, ReactorBase):
        reactor.seconds = Running()  # (timers call the instance's attribute, in each reactor)
        _look_each_second(reactor)


def _look_each_second(reactor: Any) -> None:  # noqa: ANN401
    """
    Make a reactor look at its clock while it waits for a later timer, so that waiting does not count as a suspension.
    """
    reactor.callLater(STILL_SECONDS / 2, _look_each_second, reactor)


class Running:
    """
    A clock of the seconds for which this process ran. A suspension counts as C{STILL_SECONDS}: it may be a slow turn.

    Otherwise, after the process was stopped, frozen or without a CPU, overdue timers would abort all requests and disk
    operations whose results are waiting to be read.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._state = time.monotonic(), 0.0

    def __call__(self) -> float:
        """
        Return the count in seconds, from an arbitrary start.
        """
        last, lost = self._state  # read before the time, so that other threads' updates meanwhile are later
        now = time.monotonic()
        if now - last > STILL_SECONDS:
            lost += now - last - STILL_SECONDS
        if now > self._state[0]:  # another thread may have been faster
            self._state = now, lost
        return now - lost


def end_each_lookup(reactor: Any) -> None:  # noqa: ANN401
    """
    Make sure that each name lookup ends.

    Twisted's resolver never answers if no thread can be started, or if the lookup fails with anything but C{gaierror}:
    without a descriptor or memory, or for names that IDNA does not allow. Later lookups of the name would wait for the
    same answer: see L{ecrproxy.registry.resolver.SharedLookups}.
    """
    if isinstance(reactor, ReactorBase):
        content_with_few(reactor.getThreadPool())
        reactor.installNameResolver(GAIResolver(cast(Any, reactor), reactor.getThreadPool, cast(Any, look_up)))


def look_up(*question: Any) -> Any:  # noqa: ANN401
    """
    Look up a name like C{socket.getaddrinfo}. Blocks.

    @raise socket.gaierror: for all failures.
    """
    try:
        return socket.getaddrinfo(*question)
    except socket.gaierror:
        raise
    except Exception as problem:
        raise socket.gaierror(socket.EAI_FAIL, str(problem)) from problem


def give_memory_back_now_and_then(reactor: Any) -> None:  # noqa: ANN401
    """
    Return freed memory to the system regularly, in a reactor thread.
    """

    def go_on() -> None:
        reactor.callInThread(give_memory_back)
        reactor.callLater(GIVEN_BACK_SECONDS, go_on)

    if isinstance(reactor, ReactorBase):
        reactor.callLater(GIVEN_BACK_SECONDS, go_on)


def open_many_files() -> None:
    """
    Raise the limit of open files to its maximum: each client needs several.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some sandboxes forbid this
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def most_clients(files: int | None = None) -> int:
    """
    Return the number of client connections for which there are descriptors; at least one.

    @param files: the process's limit of open files; the system's limit if not given.
    """
    soft = _most_files(files)
    return max(1, (soft - OWN_FILES - kept_files(soft)) // FILES_OF_A_CLIENT)


def kept_files(files: int | None = None) -> int:
    """
    Return how many content files may be kept open while they are not being sent.

    @param files: as for L{most_clients}.
    """
    return max(0, min(KEPT_FILES, (_most_files(files) - OWN_FILES) // _KEPT_PART))


def _most_files(files: int | None) -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if files is None else files
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def clients_beside_spare(files: int | None = None) -> int:
    """
    Return the maximum number of client connections, minus some spare ones for refusing further clients.

    @param files: as for L{most_clients}.
    """
    most = most_clients(files)
    return most - min(2 * SPARE, most // 2)  # twice: a new spare connection opens before the oldest is closed


@cache
def set_aside_what_was_imported() -> None:
    """
    Exempt the modules imported so far from garbage collection.

    That shortens the collection at the first token from 40 ms to 10 ms.
    """
    gc.freeze()


@cache
def set_aside_what_stays() -> None:
    """
    Exempt the objects that the first token created from garbage collection; they stay anyway.

    Scanning botocore's modules would stall the event loop again and again. Call once, after a collection: frozen
    objects are never freed. No transfer can be among them before the first token.
    """
    gc.collect()
    gc.freeze()
