"""
One change at a time to what a key names, and which of several is the newer one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from twisted.internet.defer import Deferred

T = TypeVar("T")

KEPT: Final = 16
"""Sets of accepted types whose order is known for a tag: as many as its entry keeps answers to."""


class Places:
    """
    Places for work that only so much of may be done at once.

    @param count: places.
    """

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._waiting: OrderedDict[Deferred[None], None] = OrderedDict()
        self._giving = False

    @property
    def idle(self) -> bool:
        """
        Whether nobody has a place, or waits for one.
        """
        return self._free == self._count and not self._waiting

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """
        Wait for a place, first come first served.
        """
        place: Deferred[None] = Deferred(lambda left: self._waiting.pop(left, None))
        self._waiting[place] = None
        self._give()
        await self._given(place)
        try:
            yield
        finally:
            self._free += 1
            self._give()

    def _given(self, place: Deferred[None]) -> Awaitable[None]:
        return place

    def _give(self) -> None:
        """
        Give places in a loop: work that ends at once would otherwise start the next a few stack frames deeper.

        A hundred that wait would reach Python's limit. Twisted's C{DeferredLock} and C{DeferredSemaphore} do, and stay
        taken for ever then.
        """
        if self._giving:
            return
        self._giving = True
        try:
            while self._free and self._waiting:
                self._free -= 1
                self._waiting.popitem(last=False)[0].callback(None)
        finally:
            self._giving = False


class KeyedLocks:
    """
    At most one piece of work at a time for a key; the others wait in the order in which they came.
    """

    def __init__(self) -> None:
        self._locks: dict[Hashable, Places] = {}

    async def run(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """
        Do C{work} once all that came before it for C{key} is done.
        """
        lock = self._locks.setdefault(key, Places(1))
        try:
            async with lock.turn():
                return await work()
        finally:
            if lock.idle and self._locks.get(key) is lock:
                del self._locks[key]


@dataclass
class Order:
    """
    Which questions about one tag the newest answers were given to. Questions are numbered as they are asked.

    Some registries answer 404 if the tag has nothing that the client accepts. So a 404 denies what its client would
    have accepted, and says nothing about what other clients were given.

    @ivar gone: the last one that was answered with 404, for each set of accepted types.
    @ivar answered: the last one that was answered otherwise, for each set of accepted types.
    """

    gone: dict[frozenset[str], int] = field(default_factory=dict)
    answered: dict[frozenset[str], int] = field(default_factory=dict)

    def answer(self, accept: frozenset[str], media_type: str, question: int) -> bool:
        """
        Note an answer; return False if it is outdated: a later question has been answered already.
        """
        denied = (number for by, number in self.gone.items() if _denies(by, accept, media_type))
        if question < max(self.answered.get(accept, 0), *denied, 0):
            return False
        _note(self.answered, accept, question)
        return True

    def forget(self, by: frozenset[str], question: int, known: Mapping[frozenset[str], str]) -> set[frozenset[str]]:
        """
        Note a 404 to a client that accepts C{by}; return which of the C{known} answers stay.

        @param known: the media type of each answer.
        """
        _note(self.gone, by, max(question, self.gone.get(by, 0)))
        return {
            accept
            for accept, media_type in known.items()
            if self.answered.get(accept, 0) > question or not _denies(by, accept, media_type)
        }


def _denies(by: frozenset[str], accept: frozenset[str], media_type: str) -> bool:
    """
    Return True if a 404 to a client that accepts C{by}, any type if empty, denies an answer given to C{accept}.
    """
    return not by or by == accept or media_type in by


def _note(questions: dict[frozenset[str], int], accept: frozenset[str], question: int) -> None:
    questions[accept] = question
    if len(questions) > KEPT:
        del questions[min(questions, key=questions.__getitem__)]
