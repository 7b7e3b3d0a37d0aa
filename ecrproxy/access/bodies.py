"""
Response bodies in memory: a limit on the bytes of all bodies, and which responses are aborted when it is reached.

Rules:

- A body counts once, however many clients receive it: repeated lists from ECR are the same object.
- To make room for another body, the oldest responses are aborted, except those younger than C{SPARED_SECONDS}. A
  client that reads has received megabytes by then; one that does not read blocks others no longer than that.
- If that does not free enough, the new response is refused; the client may retry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

BODIES_BYTES: Final = 64 * 2**20
"""Limit for all bodies together, in bytes: four of the longest lists."""
SPARED_SECONDS: Final = 10.0
"""Minimum seconds for each response before it may be aborted."""


class NoRoomError(Exception):
    """
    The limit for bodies in memory is reached.
    """


@dataclass(eq=False, slots=True)
class MemoryResponse:
    """
    One response.

    @ivar since: start time, in seconds.
    @ivar cut: aborts the response, which then calls C{end}.
    """

    body: bytes
    since: float
    cut: Callable[[], None]


class Bodies:
    """
    The responses that are sent from memory.

    @ivar held: bytes of all bodies.
    """

    def __init__(self, limit: int = BODIES_BYTES) -> None:
        self._limit = limit
        self.held = 0
        self._sendings: dict[MemoryResponse, None] = {}  # oldest first
        self._counts: dict[int, int] = {}  # by id() of the body, which its sendings keep alive

    def begin(self, body: bytes, now: float, cut: Callable[[], None]) -> MemoryResponse:
        """
        Start a response; finish it with C{end}.

        @raise NoRoomError: if there is no room for C{body}.
        """
        if id(body) not in self._counts:
            self._make_room(len(body), now)
            self.held += len(body)
        self._counts[id(body)] = self._counts.get(id(body), 0) + 1
        sending = MemoryResponse(body, now, cut)
        self._sendings[sending] = None
        return sending

    def end(self, sending: MemoryResponse) -> None:
        """
        End a response.
        """
        del self._sendings[sending]
        self._counts[id(sending.body)] -= 1
        if not self._counts[id(sending.body)]:
            del self._counts[id(sending.body)]
            self.held -= len(sending.body)

    def _make_room(self, size: int, now: float) -> None:
        for sending in list(self._sendings):
            if self.held + size <= self._limit or now < sending.since + SPARED_SECONDS:
                break
            if sending in self._sendings:
                sending.cut()
        if self._sendings and self.held + size > self._limit:
            raise NoRoomError
