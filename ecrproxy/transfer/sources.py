"""
The sources of a response's bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from twisted.python.failure import Failure

if TYPE_CHECKING:
    from ecrproxy.byte_ranges import Multipart
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
        """Return True if all bytes were sent."""

    @property
    def failure(self) -> Failure | None:
        """Return why the source can't continue, if it failed."""

    def piece(self, limit: int) -> FilePiece | bytes | None:
        """Return the next bytes, at most C{limit}; none if they have not arrived yet."""

    def sent(self, count: int) -> None:
        """Advance by C{count} bytes that were sent."""

    def listen(self, news: Callable[[], None]) -> None:
        """Call C{news} when there may be more."""

    def close(self) -> None:
        """Release the source."""


HELD_PIECE: Final = 2**16
"""Bytes of a body in memory that are copied to a transport at once: for a slow client, more would be held twice."""


class Held:
    """
    A range of bytes in memory, as a source.
    """

    failure: Failure | None = None

    def __init__(self, data: bytes, start: int = 0, stop: int | None = None) -> None:
        self._data, self._position = data, start
        self._stop = len(data) if stop is None else stop

    @property
    def done(self) -> bool:
        """
        Return True if all bytes were sent.
        """
        return self._position >= self._stop

    def piece(self, limit: int) -> FilePiece | bytes | None:
        """
        Return the next bytes.
        """
        return self._data[self._position : min(self._stop, self._position + min(limit, HELD_PIECE))]

    def sent(self, count: int) -> None:
        """
        Advance by C{count} bytes. The rest is not copied: other responses may hold the same bytes.
        """
        self._position += count

    def listen(self, news: Callable[[], None]) -> None:
        """
        Do nothing: all bytes are there.
        """

    def close(self) -> None:
        """
        Do nothing: there is nothing to release.
        """


class Shelved:
    """
    A range of a finished file: a source of bytes for C{sending}.

    A part of the file is complete once it is sent, whatever the verification finds later: see L{follower}.

    @param verification: the verification that the last byte of the whole file waits for, if the file isn't verified
        yet.
    """

    def __init__(self, content: Content, start: int, stop: int, verification: Verification | None = None) -> None:
        self._content, self.position, self._stop = content, start, stop
        self._verification = verification
        self._partial = (start, stop) != (0, content.size)
        self._on_news: Callable[[], None] = lambda: None

    @property
    def done(self) -> bool:
        """
        Return True if all bytes were read.
        """
        return self.position >= self._stop

    @property
    def failure(self) -> Failure | None:
        """
        Return the verification's failure, if the file turned out to be bad.
        """
        return self._verification.failure if self._verification is not None else None

    def piece(self, limit: int) -> FilePiece | bytes | None:
        """
        Return up to C{limit} bytes; none if the file must be verified first.
        """
        complete = self._partial or self._verification is None or self._verification.proved
        count = min(limit, (self._stop if complete else self._stop - 1) - self.position)
        return (self._content.fileno(), self.position, count) if count else None

    def sent(self, count: int) -> None:
        """
        Advance by C{count} bytes.
        """
        self.position += count

    def listen(self, news: Callable[[], None]) -> None:
        """
        Call C{news} when the verification of the file has ended.
        """
        self._on_news = news
        if self._verification is not None:
            self._verification.follow(news)

    def close(self) -> None:
        """
        Release the file.
        """
        if self._verification is not None:
            self._verification.leave(self._on_news)
        self._content.close()


class Parted:
    """
    Several parts of a blob, each after its header: the body of a multipart/byteranges response.

    @param follow: returns the source for a range. The next part is followed before the previous one is closed, so that
        a transfer never appears to have no reader.
    @param close: called at the end.
    """

    def __init__(
        self, frame: Multipart, follow: Callable[[int, int], Source], close: Callable[[], None] = lambda: None
    ) -> None:
        self._follow, self._close = follow, close
        self._left = deque(zip(frame.heads, frame.spans, strict=True))
        self._end = frame.end
        self._on_news: Callable[[], None] = lambda: None
        self._own_failure: Failure | None = None
        self._text = b""
        self._part = self._next()

    def _next(self) -> Source:
        head, (start, stop) = self._left.popleft()
        part = self._follow(start, stop)
        part.listen(self._news)
        self._text = head
        return part

    def _news(self) -> None:
        self._on_news()

    @property
    def done(self) -> bool:
        """
        Return True if all bytes were sent.
        """
        return not (self._text or self._left or self._end) and self._part.done

    @property
    def failure(self) -> Failure | None:
        """
        Return why the source can't continue, if it failed.
        """
        return self._own_failure or self._part.failure

    def piece(self, limit: int) -> FilePiece | bytes | None:
        """
        Return the next bytes: of a header, a part, or the final boundary.
        """
        if not self._text and self._part.done and self._own_failure is None:
            self._go_on()
        return self._text[:limit] or (None if self._part.done else self._part.piece(limit))

    def _go_on(self) -> None:
        if not self._left:
            self._text, self._end = self._end, b""
            return
        last = self._part
        try:
            self._part = self._next()
        except LookupError:
            self._own_failure = Failure()
            self._on_news()
        else:
            last.close()

    def sent(self, count: int) -> None:
        """
        Advance by C{count} bytes that were sent.
        """
        if self._text:
            self._text = self._text[count:]
        else:
            self._part.sent(count)

    def listen(self, news: Callable[[], None]) -> None:
        """
        Call C{news} when there may be more.
        """
        self._on_news = news

    def close(self) -> None:
        """
        Release the current part.
        """
        self._part.close()
        self._close()
