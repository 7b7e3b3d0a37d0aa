"""
One change at a time to what a key names, and which of several is the newer one.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from twisted.internet.defer import DeferredLock

T = TypeVar("T")

KEPT: Final = 16
"""Sets of accepted types whose order is known for a tag: as many as its entry keeps answers to."""


class KeyedLocks:
    """
    At most one piece of work at a time for a key; the others wait in the order in which they came.
    """

    def __init__(self) -> None:
        self._locks: dict[Hashable, DeferredLock] = {}

    async def run(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """
        Do C{work} once all that came before it for C{key} is done.
        """
        lock = self._locks.setdefault(key, DeferredLock())
        await lock.acquire()
        try:
            return await work()
        finally:
            lock.release()
            if not lock.locked and self._locks.get(key) is lock:
                del self._locks[key]


@dataclass
class Order:
    """
    Which questions about one tag the newest answers were given to. Questions are numbered as they are asked.

    @ivar gone: the last one to which the answer was that there is no such tag.
    @ivar answered: the last one for each set of accepted types.
    """

    gone: int = 0
    answered: dict[frozenset[str], int] = field(default_factory=dict)

    def answer(self, accept: frozenset[str], question: int) -> bool:
        """
        Note an answer; return False if it is outdated: a later question has been answered already.
        """
        if question < max(self.gone, self.answered.get(accept, 0)):
            return False
        self.answered[accept] = question
        if len(self.answered) > KEPT:
            del self.answered[min(self.answered, key=self.answered.__getitem__)]
        return True

    def forget(self, question: int, known: Iterable[frozenset[str]]) -> set[frozenset[str]]:
        """
        Note that there was no such tag; return which of the C{known} answers were given to later questions.
        """
        self.gone = max(self.gone, question)
        return {accept for accept in known if self.answered.get(accept, 0) > question}
