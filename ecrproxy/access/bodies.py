"""
Bodies in memory that clients are being sent: how many bytes they may have together, and who gives way.

Rules:

- A body counts once, however many clients are sent it: lists that ECR gives again are one object.
- When there is no room for another, the responses that began first are broken off, unless they are younger than
  C{SPARED_SECONDS}. Whoever reads has taken megabytes by then; a client that does not read holds nobody up for longer.
- If that makes no room, the newcomer is refused, and may ask again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

BODIES_BYTES: Final = 64 * 2**20
"""Bytes of all bodies together: four of the longest lists."""
SPARED_SECONDS: Final = 10.0
"""Seconds that every response has, however many others want the room."""


class NoRoomError(Exception):
    """
    All bodies that are being sent are too large together for another one.
    """


@dataclass(eq=False, slots=True)
class Sending:
    """
    One response.

    @ivar since: when it began, in seconds.
    @ivar cut: breaks it off, which ends it.
    """

    body: bytes
    since: float
    cut: Callable[[], None]


class Bodies:
    """
    What is being sent from memory.

    @ivar held: bytes of all bodies.
    """

    def __init__(self, limit: int = BODIES_BYTES) -> None:
        self._limit = limit
        self.held = 0
        self._sendings: dict[Sending, None] = {}  # in the order in which they began
        self._counts: dict[int, int] = {}  # by the identity of a body, which its sendings keep alive

    def begin(self, body: bytes, now: float, cut: Callable[[], None]) -> Sending:
        """
        Begin a response, which ends with C{end}.

        @raise NoRoomError: if there is no room for C{body}.
        """
        if id(body) not in self._counts:
            self._make_room(len(body), now)
            self.held += len(body)
        self._counts[id(body)] = self._counts.get(id(body), 0) + 1
        sending = Sending(body, now, cut)
        self._sendings[sending] = None
        return sending

    def end(self, sending: Sending) -> None:
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
