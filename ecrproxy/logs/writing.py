"""
Where the lines go: what twistd would write to, in the shape that the operator has chosen.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, Protocol

from twisted.logger import ILogObserver, LogEvent
from twisted.python.logfile import LogFile
from zope.interface import implementer

from ecrproxy.logs.shapes import Shape, as_journal, as_json, as_text, priority_of
from ecrproxy.request_id import current


class File(Protocol):
    """
    What can be written to.
    """

    def write(self, data: bytes, /) -> object:
        """Take bytes."""

    def flush(self) -> object:
        """Let them go."""


@implementer(ILogObserver)
class LineWriter:
    """
    Writes events as lines.

    Worker processes write to the same pipe, and their lines must not mix. Up to PIPE_BUF bytes go in whole:
    pipe(7).

    @param limit: the priority of what is still written.
    """

    def __init__(self, file: File, shape: Shape, limit: int) -> None:
        self._file, self._shape, self._limit = file, shape, limit

    def __call__(self, event: LogEvent) -> None:
        """
        Write an event, if it is grave enough.
        """
        if priority_of(event) > self._limit:
            return
        for piece in _pieces(self._shape(event, event.get("request") or current.get())):
            self._file.write(piece)
            self._file.flush()


def _pieces(lines: Sequence[str]) -> Iterator[bytes]:
    data, start = ("\n".join(lines) + "\n" if lines else "").encode("utf-8", "backslashreplace"), 0
    while start < len(data):
        stop = len(data)
        if stop - start > select.PIPE_BUF:  # a line that is longer goes by itself
            stop = data.rfind(b"\n", start, start + select.PIPE_BUF) + 1 or data.index(b"\n", start) + 1
        yield data[start:stop]
        start = stop


def leads_to_journal(told: str | None, output: IO[str] | None) -> bool:
    """
    Tell whether what is written to C{output} comes to systemd's journal: systemd.exec(5), C{$JOURNAL_STREAM}.

    @param told: that variable.
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
    Make what writes the log where twistd's own flags say; none where they lead to something that has its own shape.

    @param twistd: its options.
    @param json: whether lines are JSON.
    @param limit: see L{LineWriter}.
    @param journal: C{$JOURNAL_STREAM}.
    @param later: has something called by the reactor, as C{callFromThread} does.
    """
    name = twistd.get("logfile") or ""
    if twistd.get("syslog") or twistd.get("logger"):
        return None
    if name not in ("", "-") or not twistd.get("nodaemon"):
        if name == "-":
            return None  # twistd refuses this
        return LineWriter(_file(name or "twistd.log", later), as_json if json else as_text, limit)
    output = sys.stdout
    shape = as_json if json else as_journal if leads_to_journal(journal, output) else as_text
    return LineWriter(output.buffer, shape, limit)


def _file(name: str, later: Callable[..., object]) -> LogFile:
    """
    Open a file as twistd does: SIGUSR1 begins a new one.
    """
    file: LogFile = LogFile.fromFullPath(name)
    if not signal.getsignal(signal.SIGUSR1):
        signal.signal(signal.SIGUSR1, lambda *_: later(file.rotate))
    return file
