"""
A reader of a running transfer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from twisted.python.failure import Failure

from ecrproxy.stopwatch import Stopwatch
from ecrproxy.transfer.sources import FilePiece


class Followed(Protocol):
    """
    A running transfer, as its readers see it: a C{Download}.

    @ivar size: of the blob, in bytes, if known.
    @ivar received: number of contiguous bytes that have come, from the first one on.
    @ivar verified: whether all bytes have arrived and match the digest.
    @ivar failure: why the transfer failed, if it did.
    """

    @property
    def size(self) -> int | None: ...  # noqa: D102

    @property
    def received(self) -> int: ...  # noqa: D102

    @property
    def verified(self) -> bool: ...  # noqa: D102

    @property
    def failure(self) -> Failure | None: ...  # noqa: D102

    def reach(self, position: int) -> int:
        """
        Return the end of the contiguous bytes that begin at C{position}.
        """

    def piece(self, position: int, count: int) -> FilePiece | bytes:
        """
        Return up to C{count} bytes at C{position}.
        """

    def progressed(self) -> None:
        """
        Record that a reader has advanced.
        """

    def left(self, follower: Follower) -> None:
        """
        Record that a reader has left.
        """


class Follower:
    """
    One reader of a transfer: a source of bytes for C{sending}.

    @ivar position: the offset of the next byte to read.
    @ivar until: the end of the bytes to fetch for this reader; see C{Download.follow}.
    @ivar partial: whether it reads a part of the blob: then it gets its last byte before the whole is verified.
    """

    def __init__(
        self, download: Followed, start: int, stop: int | None, waiting: Stopwatch, until: int | None = None
    ) -> None:
        self._download, self.position, self.stop, self._waiting = download, start, stop, waiting
        self.until = stop if until is None else until
        self.partial = stop is not None and (start, stop) != (0, download.size)
        self._left_behind: Failure | None = None
        self._on_news: Callable[[], None] = lambda: None

    @property
    def done(self) -> bool:
        """
        Return True if all bytes were read and, for the whole blob, verified.
        """
        download = self._download
        read = self.position >= (download.received if self.stop is None else self.stop)
        return read and (self.partial or download.verified)

    @property
    def failure(self) -> Failure | None:
        """
        Return why the reader can't continue, if it can't.
        """
        return self._left_behind or self._download.failure

    def piece(self, limit: int) -> FilePiece | bytes | None:
        """
        Return up to C{limit} bytes that may be sent now; none if more must arrive or be verified first.
        """
        piece = self._piece(limit)
        if piece is None:
            self._waiting.start()
        else:
            self._waiting.stop()
        return piece

    def _piece(self, limit: int) -> FilePiece | bytes | None:
        reach = self._download.reach(self.position)
        if self.stop is not None:
            reach = min(reach, self.stop if self.partial or self._download.verified else self.stop - 1)
        count = min(limit, reach - self.position)
        return self._download.piece(self.position, count) if count > 0 else None

    def needs(self, start: int) -> bool:
        """
        Return True if the reader needs bytes of a window that starts at C{start}; those before it are in a file.
        """
        return self.stop is None or self.stop > max(start, self.position)

    def move(self, download: Followed) -> None:
        """
        Continue with C{download}, which has the same bytes.
        """
        self._download = download

    def leave_behind(self, problem: Failure) -> None:
        """
        Fail: the transfer continues without this reader.
        """
        self._left_behind = problem
        self._download.left(self)
        self.news()

    def sent(self, count: int) -> None:
        """
        Advance by C{count} bytes.
        """
        self.position += count
        self._download.progressed()

    def listen(self, news: Callable[[], None]) -> None:
        """
        Call C{news} whenever there may be more bytes, an end or a failure.
        """
        self._on_news = news

    def news(self) -> None:
        """
        Notify the listener.
        """
        self._on_news()

    def close(self) -> None:
        """
        Leave the transfer.
        """
        self._on_news = lambda: None
        self._waiting.stop()
        self._download.left(self)
