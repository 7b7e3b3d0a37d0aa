"""
Serialize changes per key, and order answers about a tag.
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
"""Maximum sets of accepted types tracked for a tag: as many as its entry keeps answers for."""


class Places:
    """
    A semaphore: limits concurrent work.

    @param count: maximum number of concurrent pieces of work.
    """

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._waiting: OrderedDict[Deferred[None], None] = OrderedDict()
        self._giving = False

    @property
    def idle(self) -> bool:
        """
        Whether all places are free and nothing waits for one.
        """
        return self._free == self._count and not self._waiting

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """
        Hold a place; wait for one in order of arrival.
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
        Hand out places in a loop: otherwise, work that ends at once would start the next a few stack frames deeper.

        With a hundred waiting, that reaches Python's recursion limit, as in Twisted's C{DeferredLock} and
        C{DeferredSemaphore}, which then stay locked for ever.
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
    One lock per key; waiting work runs in order of arrival.
    """

    def __init__(self) -> None:
        self._locks: dict[Hashable, Places] = {}

    async def run(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """
        Run C{work} after all earlier work for C{key}.
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
    The newest answered requests to ECR for one tag, numbered in the order in which they were sent.

    Some registries answer 404 if the tag has nothing that the client accepts. So a 404 only denies what its client
    would have accepted, and says nothing about answers to other clients.

    @ivar gone: the last request that was answered with 404, by set of accepted types.
    @ivar answered: the last request that was answered otherwise, by set of accepted types.
    """

    gone: dict[frozenset[str], int] = field(default_factory=dict)
    answered: dict[frozenset[str], int] = field(default_factory=dict)

    def answer(self, accept: frozenset[str], media_type: str, question: int) -> bool:
        """
        Note an answer; return False if a later request has already been answered.
        """
        denied = (number for by, number in self.gone.items() if _denies(by, accept, media_type))
        if question < max(self.answered.get(accept, 0), *denied, 0):
            return False
        _note(self.answered, accept, question)
        return True

    def forget(self, by: frozenset[str], question: int, known: Mapping[frozenset[str], str]) -> set[frozenset[str]]:
        """
        Note a 404 to a client that accepts C{by}; return which C{known} answers remain valid.

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
    Return True if a 404 to a client that accepts C{by} (empty for any) denies an answer given for C{accept}.
    """
    return not by or by == accept or media_type in by


def _note(questions: dict[frozenset[str], int], accept: frozenset[str], question: int) -> None:
    questions[accept] = question
    if len(questions) > KEPT:
        del questions[min(questions, key=questions.__getitem__)]
