"""
One reader of a transfer that is under way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from twisted.python.failure import Failure

from ecrproxy.stopwatch import Stopwatch
from ecrproxy.transfer.sources import FilePiece

if TYPE_CHECKING:
    from ecrproxy.transfer.download import Download


class Follower:
    """
    One reader of a L{Download}: a source of bytes for C{sending}.

    @ivar position: the offset of the next byte that it will read.
    """

    def __init__(self, download: Download, start: int, stop: int | None, waiting: Stopwatch) -> None:
        self._download, self.position, self._stop, self._waiting = download, start, stop, waiting
        self._last: bytes | None = None
        self._left_behind: Failure | None = None
        self._on_news: Callable[[], None] = lambda: None

    @property
    def done(self) -> bool:
        """
        Tell whether all was read, and is right.
        """
        download = self._download
        return download.verified and self.position >= (download.received if self._stop is None else self._stop)

    @property
    def failure(self) -> Failure | None:
        """
        Tell why it can't go on, if it can't.
        """
        return self._left_behind or self._download.failure

    def piece(self, limit: int) -> FilePiece | bytes | None:
        """
        Point at up to C{limit} bytes that may be sent now; none if more must arrive, or be proved, first.
        """
        piece = self._piece(limit)
        if piece is None:
            self._waiting.start()
        else:
            self._waiting.stop()
        return piece

    def _piece(self, limit: int) -> FilePiece | bytes | None:
        if self._last is not None:
            return self._last if self._download.verified else None
        reach = self._download.reach(self.position)
        if self._stop is not None:
            reach = min(reach, self._stop if self._download.verified else self._stop - 1)
        count = min(limit, reach - self.position)
        return self._download.piece(self.position, count) if count > 0 else None

    def lay_aside(self, start: int, received: int) -> int | None:
        """
        Take the last byte out of a window that others need: it may be sent only at the end of all.

        @param start: where the window starts; what comes before it is in a file.
        @param received: how many bytes were received.
        @return: from where on this reader still needs the window, if it does.
        """
        if self._stop is not None and self._stop <= start:
            return None
        if self._last is None and self._stop is not None and self.position == self._stop - 1 < received:
            piece = self._download.piece(self.position, 1)
            self._last = piece if isinstance(piece, bytes) else None
        return self.position if self._last is None else None

    def leave_behind(self, problem: Failure) -> None:
        """
        Go no further: the transfer goes on without it.
        """
        self._left_behind = problem
        self._download.left(self)
        self.news()

    def sent(self, count: int) -> None:
        """
        Note that C{count} bytes more were read.
        """
        self.position += count
        self._last = None
        self._download.progressed()

    def listen(self, news: Callable[[], None]) -> None:
        """
        Call C{news} whenever there may be more, an end or a failure.
        """
        self._on_news = news

    def news(self) -> None:
        """
        Pass the word on.
        """
        self._on_news()

    def close(self) -> None:
        """
        Read no more.
        """
        self._on_news = lambda: None
        self._waiting.stop()
        self._download.left(self)
