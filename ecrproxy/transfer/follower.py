"""
One reader of a transfer that is under way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from twisted.python.failure import Failure

from ecrproxy.stopwatch import Stopwatch
from ecrproxy.transfer.sources import FilePiece


class Followed(Protocol):
    """
    A transfer under way, as those who read it see it: a C{Download}.

    @ivar size: of the blob, in bytes, if it is known.
    @ivar received: how many bytes have come, from the first one on without a gap.
    @ivar verified: whether all bytes are there, and are what the digest names.
    @ivar failure: why it has ended, if it has failed.
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
        Tell up to where there are bytes from C{position} on.
        """

    def piece(self, position: int, count: int) -> FilePiece | bytes:
        """
        Point at C{count} bytes from C{position} on.
        """

    def progressed(self) -> None:
        """
        Note that one who reads got further.
        """

    def left(self, follower: Follower) -> None:
        """
        Note that one reads no more.
        """


class Follower:
    """
    One reader of a transfer: a source of bytes for C{sending}.

    @ivar position: the offset of the next byte that it will read.
    @ivar until: up to where bytes are fetched for it; see C{Download.follow}.
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
        Tell whether all was read, and is right if it is the whole blob.
        """
        download = self._download
        read = self.position >= (download.received if self.stop is None else self.stop)
        return read and (self.partial or download.verified)

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
        reach = self._download.reach(self.position)
        if self.stop is not None:
            reach = min(reach, self.stop if self.partial or self._download.verified else self.stop - 1)
        count = min(limit, reach - self.position)
        return self._download.piece(self.position, count) if count > 0 else None

    def needs(self, start: int) -> bool:
        """
        Tell whether it reads anything of a window that starts at C{start}; what comes before it is in a file.
        """
        return self.stop is None or self.stop > max(start, self.position)

    def move(self, download: Followed) -> None:
        """
        Follow C{download}, which has the same bytes, from here on.
        """
        self._download = download

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
