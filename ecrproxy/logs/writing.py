"""
The log's writer: to twistd's destination, in the configured format.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, Final

from twisted.logger import ILogObserver, LogEvent, LogLevel
from twisted.python.logfile import LogFile
from zope.interface import implementer

from ecrproxy.logs.outlet import Outlet, RawFile
from ecrproxy.logs.repeats import Repeats
from ecrproxy.logs.shapes import Shape, as_journal, as_json, as_text, priority_of
from ecrproxy.request_id import current

_LOST: Final = (
    "{lost} log lines were dropped, {requests} of them of requests: its reader is too slow, or its disk is full;"
    " check where the log goes"
)


@implementer(ILogObserver)
class LineWriter:
    """
    Writes events as lines, repeated ones as one line with a count. Thread-safe.

    Worker processes write to the same pipe, and their lines must not mix. Writes of up to PIPE_BUF bytes are atomic:
    pipe(7).

    @param limit: the highest priority number that is written.
    @param seconds: a monotonic clock.
    """

    def __init__(self, outlet: Outlet, shape: Shape, limit: int, seconds: Callable[[], float]) -> None:
        self._outlet, self._shape, self._limit = outlet, shape, limit
        self._repeats = Repeats(seconds)
        self._lock = threading.RLock()  # reentrant, because a signal handler may log too

    def __call__(self, event: LogEvent) -> None:
        """
        Write an event, unless its level is too low or it repeats too often.
        """
        if priority_of(event) > self._limit:
            return
        with self._lock:
            admitted = self._repeats.admit(event)
            if admitted is not None:
                self._write(admitted)

    def start(self) -> None:
        """
        Write in a thread from now on: see L{Outlet.start}.
        """
        self._outlet.start(self.tick)

    def tick(self, *, at_once: bool = False) -> None:
        """
        Write the counts of omitted and lost lines that are due.

        @param at_once: do not wait for the end of the minute.
        """
        with self._lock:
            for event in self._repeats.due(at_once=at_once):
                self._write({**event, "log_time": time.time()})
            lost, requests = self._outlet.take_lost()
            if lost:
                told = {"log_time": time.time(), "log_level": LogLevel.warn, "log_namespace": __name__}
                self._write({**told, "log_format": _LOST, "lost": lost, "requests": requests})

    def end(self, seconds: float) -> None:
        """
        Write the remaining lines; wait up to C{seconds}.
        """
        self.tick(at_once=True)
        self._outlet.drain(seconds)

    def _write(self, event: LogEvent) -> None:
        for piece in _pieces(self._shape(event, event.get("request") or current.get())):
            self._outlet.write(piece, of_requests="lines" in event)


def _pieces(lines: Sequence[str]) -> Iterator[bytes]:
    data, start = ("\n".join(lines) + "\n" if lines else "").encode("utf-8", "backslashreplace"), 0
    while start < len(data):
        stop = len(data)
        if stop - start > select.PIPE_BUF:  # a longer line is written alone
            stop = data.rfind(b"\n", start, start + select.PIPE_BUF) + 1 or data.index(b"\n", start) + 1
        yield data[start:stop]
        start = stop


def leads_to_journal(told: str | None, output: IO[str] | None) -> bool:
    """
    Return True if C{output} is connected to systemd's journal: systemd.exec(5), C{$JOURNAL_STREAM}.

    @param told: the value of that variable.
    """
    if not told or output is None:
        return False
    try:
        status = os.fstat(output.fileno())
    except OSError:
        return False
    return told == f"{status.st_dev}:{status.st_ino}"


def choose_writer(
    twistd: Mapping[str, Any], *, json: bool, limit: int, journal: str | None, later: Callable[..., object]
) -> LineWriter | None:
    """
    Make the writer for the destination in twistd's flags; None if that has a format of its own.

    @param twistd: twistd's options.
    @param json: True for JSON lines.
    @param limit: see L{LineWriter}.
    @param journal: C{$JOURNAL_STREAM}.
    @param later: schedules a call in the reactor, like C{callFromThread}.
    """
    name = twistd.get("logfile") or ""
    if twistd.get("syslog") or twistd.get("logger"):
        return None
    if name not in ("", "-") or not twistd.get("nodaemon"):
        if name == "-":
            return None  # twistd rejects this
        return LineWriter(_file(name or "twistd.log", later), as_json if json else as_text, limit, time.monotonic)
    output = sys.stdout
    shape = as_json if json else as_journal if leads_to_journal(journal, output) else as_text
    return LineWriter(Outlet(RawFile(output.fileno())), shape, limit, time.monotonic)


def _file(name: str, later: Callable[..., object]) -> Outlet:
    """
    Open a file as twistd does: SIGUSR1 rotates it.
    """
    file: LogFile = LogFile.fromFullPath(name)
    outlet = Outlet(file)
    if not signal.getsignal(signal.SIGUSR1):
        signal.signal(signal.SIGUSR1, lambda *_: later(outlet.call, file.rotate))
    return outlet
