"""
What the process is set to before anything runs in it: files, memory, garbage, the clock of its timers.
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
from ecrproxy.threads import content_with_few

OWN_FILES: Final = 64
"""Descriptors that are left for all but clients: listening sockets, AWS, ECR and its buckets, files that arrive."""
KEPT_FILES: Final = 256
"""The most files of content that are kept open for a second."""
_KEPT_PART: Final = 16
"""What part of the descriptors they have at the most: the rest is for clients."""
FILES_OF_A_CLIENT: Final = 3
"""A client's socket, the file that it is sent, and a connection upstream."""
GIVEN_BACK_SECONDS: Final = 30.0
"""How often memory is given back."""
STILL_SECONDS: Final = 2.0
"""The most seconds that count of those in which nobody looked at the clock. A reactor that runs does twice as often."""


def set_up(reactor: Any) -> None:  # noqa: ANN401
    """
    Do all of it that comes before anything runs.
    """
    count_steadily(reactor)
    end_each_lookup(reactor)
    open_many_files()
    map_large_pieces()
    give_memory_back_now_and_then(reactor)
    set_aside_what_was_imported()


def count_steadily(reactor: Any) -> None:  # noqa: ANN401
    """
    Have a reactor's timers go by a clock that nobody sets, and that stands still with the process.

    Twisted's reactors count by the time of the day: set forward, it would fire each timer at once; set back, it would
    freeze all of them, limits of time and the token's refresh among them. No timer has been made yet. A reactor in
    memory has a clock of its own.
    """
    if isinstance(reactor, ReactorBase):
        reactor.seconds = Running()  # (timers ask the instance, in each reactor)
        _look_each_second(reactor)


def _look_each_second(reactor: Any) -> None:  # noqa: ANN401
    """
    Have a reactor look at its clock while it waits for a timer that is due later: that is no standstill.
    """
    reactor.callLater(STILL_SECONDS / 2, _look_each_second, reactor)


class Running:
    """
    Counts the seconds for which this process runs; of each standstill C{STILL_SECONDS}, for it may be a slow turn.

    What was stopped, frozen, or had no processor, would go on with timers that are overdue: they would end each request
    and each call of the disk, whose answers wait to be read.

    Any thread may ask.
    """

    def __init__(self) -> None:
        self._state = time.monotonic(), 0.0

    def __call__(self) -> float:
        """
        Return the count, in seconds since whenever.
        """
        last, lost = self._state  # before the time: what another thread counts meanwhile is of a later one
        now = time.monotonic()
        if now - last > STILL_SECONDS:
            lost += now - last - STILL_SECONDS
        if now > self._state[0]:  # another thread may have been quicker
            self._state = now, lost
        return now - lost


def end_each_lookup(reactor: Any) -> None:  # noqa: ANN401
    """
    Have each lookup of a name end, whatever becomes of it.

    Twisted's resolver never answers where no thread can be started, nor where the lookup fails with anything but
    C{gaierror}: without a descriptor or memory, or for a name that IDNA does not allow. All who want that name later
    wait for the same answer: see L{ecrproxy.registry.resolver.SharedLookups}.
    """
    if isinstance(reactor, ReactorBase):
        content_with_few(reactor.getThreadPool())
        reactor.installNameResolver(GAIResolver(cast(Any, reactor), reactor.getThreadPool, cast(Any, look_up)))


def look_up(*question: Any) -> Any:  # noqa: ANN401
    """
    Look a name up as C{socket.getaddrinfo} does. Blocks.

    @raise socket.gaierror: if that fails, whatever the reason.
    """
    try:
        return socket.getaddrinfo(*question)
    except socket.gaierror:
        raise
    except Exception as problem:
        raise socket.gaierror(socket.EAI_FAIL, str(problem)) from problem


def give_memory_back_now_and_then(reactor: Any) -> None:  # noqa: ANN401
    """
    Have what was freed given back to the system, in a thread of the reactor's.
    """

    def go_on() -> None:
        reactor.callInThread(give_memory_back)
        reactor.callLater(GIVEN_BACK_SECONDS, go_on)

    if isinstance(reactor, ReactorBase):
        reactor.callLater(GIVEN_BACK_SECONDS, go_on)


def open_many_files() -> None:
    """
    Raise the number of files that this process may have open as far as it goes: each client takes up to three.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some sandboxes forbid even this
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def most_clients(files: int | None = None) -> int:
    """
    Give the number of connections of clients for which there are descriptors; at least one.

    @param files: how many this process may have; what the system says if it is not given.
    """
    soft = _most_files(files)
    return max(1, (soft - OWN_FILES - kept_files(soft)) // FILES_OF_A_CLIENT)


def kept_files(files: int | None = None) -> int:
    """
    Return how many files of content may be kept open when nobody is sent them.

    @param files: as for L{most_clients}.
    """
    return max(0, min(KEPT_FILES, (_most_files(files) - OWN_FILES) // _KEPT_PART))


def _most_files(files: int | None) -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if files is None else files
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def clients_beside_spare(files: int | None = None) -> int:
    """
    Give the number of connections that clients may have, so that a few are left to be told that there are no more.

    @param files: as for L{most_clients}.
    """
    most = most_clients(files)
    return most - min(2 * SPARE, most // 2)  # the oldest of the spare ones is closed for the next


@cache
def set_aside_what_was_imported() -> None:
    """
    Keep the garbage collector from the modules that are there before anything runs.

    It has so much less to look through with the first token: for 10 ms, and not for 40.
    """
    gc.freeze()


@cache
def set_aside_what_stays() -> None:
    """
    Keep the garbage collector from what has come with the first token, and has come to stay.

    Among botocore's modules it would stall the event loop again and again. Once only, and garbage first: what is
    frozen is never collected, whatever becomes of it. Before the first token no transfer can be among it.
    """
    gc.collect()
    gc.freeze()
