"""
Where the bytes of a response come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from twisted.python.failure import Failure

if TYPE_CHECKING:
    from ecrproxy.cache.content import Content
    from ecrproxy.cache.verification import Verification


FilePiece = tuple[int, int, int]
"""File descriptor, offset, count."""


class Source(Protocol):
    """
    Bytes to send, in order.
    """

    @property
    def done(self) -> bool:
        """Tell whether all was sent."""

    @property
    def failure(self) -> Failure | None:
        """Tell why no more can be sent."""

    def piece(self, limit: int) -> FilePiece | bytes | None:
        """Point at the next bytes, at most so many; none if there are none yet."""

    def sent(self, count: int) -> None:
        """Note that so many were sent."""

    def listen(self, news: Callable[[], None]) -> None:
        """Call C{news} when there may be more."""

    def close(self) -> None:
        """Let go."""


class Held:
    """
    Bytes in memory, as a source.
    """

    failure: Failure | None = None

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    @property
    def done(self) -> bool:
        """
        Tell whether all was sent.
        """
        return self._position >= len(self._data)

    def piece(self, limit: int) -> FilePiece | bytes | None:
        """
        Give the next bytes.
        """
        return self._data[self._position : self._position + limit]

    def sent(self, count: int) -> None:
        """
        Go on behind what was sent. The rest is not copied: other responses may hold the same bytes.
        """
        self._position += count

    def listen(self, news: Callable[[], None]) -> None:
        """
        There will be no news of these bytes.
        """

    def close(self) -> None:
        """
        There is nothing to let go.
        """


class Shelved:
    """
    A range of a finished file: a source of bytes for C{sending}.

    @param verification: what its last byte waits for, if the file isn't proved.
    """

    def __init__(self, content: Content, start: int, stop: int, verification: Verification | None = None) -> None:
        self._content, self.position, self._stop = content, start, stop
        self._verification = verification
        self._on_news: Callable[[], None] = lambda: None

    @property
    def done(self) -> bool:
        """
        Tell whether all was read.
        """
        return self.position >= self._stop

    @property
    def failure(self) -> Failure | None:
        """
        Tell why it can't go on, if the file turned out to be bad.
        """
        return self._verification.failure if self._verification is not None else None

    def piece(self, limit: int) -> FilePiece | bytes | None:
        """
        Point at up to C{limit} bytes; none if the file must be proved first.
        """
        proved = self._verification is None or self._verification.proved
        count = min(limit, (self._stop if proved else self._stop - 1) - self.position)
        return (self._content.fileno(), self.position, count) if count else None

    def sent(self, count: int) -> None:
        """
        Note that C{count} bytes more were read.
        """
        self.position += count

    def listen(self, news: Callable[[], None]) -> None:
        """
        Call C{news} when there is a verdict about a file that isn't proved.
        """
        self._on_news = news
        if self._verification is not None:
            self._verification.follow(news)

    def close(self) -> None:
        """
        Let go of the file.
        """
        if self._verification is not None:
            self._verification.leave(self._on_news)
        self._content.close()
