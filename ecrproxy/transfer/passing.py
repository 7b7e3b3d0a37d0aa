"""
Parts of a blob that is not kept, straight from the bucket to one client.

Nothing verifies them here: clients that ask for parts verify by themselves, and the whole is not at hand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy.stopwatch import Stopwatch
from ecrproxy.threads import on_its_own
from ecrproxy.transfer.inflow import Blob, Buffered
from ecrproxy.transfer.lane import Lane, drop

if TYPE_CHECKING:
    from ecrproxy.oci import Digest
    from ecrproxy.reasons import Reason

log = Logger()

HELD: Final = 2**20
"""Bytes that may wait for a client before its connection to the bucket is paused."""


class Passing:
    """
    A blob that is not kept, of which a client reads one part or more.

    @ivar unkept: why it is not kept.
    """

    def __init__(self, digest: Digest, blob: Blob, unkept: Reason, buffered: Buffered) -> None:
        self.digest, self.size, self.unkept = digest, blob.size, unkept
        self._blob, self._buffered = blob, buffered
        self._asked: Blob | None = blob

    def follow(self, start: int, stop: int, waiting: Stopwatch) -> Passage:
        """
        Read the bytes from C{start} to C{stop}.
        """
        first = self._blob.first if self._asked is not None and self._blob.first.start == start else None
        if first is not None:
            self._asked = None
        self.let_go()
        return Passage(Lane(self.digest, self._blob, start, stop, first, self._buffered, high_water=HELD), waiting)

    def let_go(self) -> None:
        """
        Do without the bytes that were asked for first, unless somebody reads them.
        """
        asked, self._asked = self._asked, None
        if asked is not None:
            drop(asked.first)

    # Its client may have gone while it was asked for: nobody is left to let it go then.
    __del__ = let_go


class Passage:
    """
    One part on its way: a source of bytes for C{sending}.

    @ivar failure: why there will be no more of it.
    """

    def __init__(self, lane: Lane, waiting: Stopwatch) -> None:
        self._lane, self._waiting = lane, waiting
        self._pieces: deque[bytes] = deque()
        self._ended = self._closed = False
        self._wake: Deferred[None] | None = None
        self._on_news: Callable[[], None] = lambda: None
        self.failure: Failure | None = None
        on_its_own(self._run())

    async def _run(self) -> None:
        try:
            while batch := await self._lane.batch():
                self._pieces.extend(batch)
                del batch
                self._on_news()
                while self._pieces:
                    self._wake = Deferred()
                    await self._wake
            self._ended = True
        except Exception as problem:  # noqa: BLE001 (whatever it is, the client must be told)
            if self._closed:
                return
            self.failure = Failure(problem)
            log.warn("A part of {digest} failed: {problem}", digest=self._lane.digest, problem=str(problem))
            self.failure.cleanFailure()
        self._on_news()

    @property
    def done(self) -> bool:
        """
        Tell whether all was sent.
        """
        return self._ended and not self._pieces

    def piece(self, limit: int) -> bytes | None:
        """
        Give the next bytes; none if they must arrive first.
        """
        if not self._pieces:
            self._waiting.start()
            return None
        self._waiting.stop()
        return self._pieces[0][:limit]

    def sent(self, count: int) -> None:
        """
        Drop what was sent.
        """
        head = self._pieces.popleft()
        if count < len(head):
            self._pieces.appendleft(head[count:])
        elif not self._pieces:
            wake, self._wake = self._wake, None
            if wake is not None:
                wake.callback(None)

    def listen(self, news: Callable[[], None]) -> None:
        """
        Call C{news} when there may be more.
        """
        self._on_news = news

    def close(self) -> None:
        """
        Ask for no more.
        """
        self._on_news, self._closed = lambda: None, True
        self._waiting.stop()
        self._pieces.clear()
        self._lane.abort(Failure(CancelledError("the client has gone")))
