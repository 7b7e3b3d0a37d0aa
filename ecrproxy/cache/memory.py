"""
A bounded in-memory LRU cache of small values.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Memory(Generic[K, V]):
    """
    Values by key. The least recently used are dropped when their total size exceeds the limit.

    @param limit: bytes of all values together.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._total = limit, 0
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __iter__(self) -> Iterator[K]:
        """
        Yield the keys, the least recently used first. Does not count as a use.
        """
        return iter(self._values)

    def get(self, key: K) -> V | None:
        """
        Return a value, and count that as a use. None if there is none.
        """
        found = self._values.get(key)
        if found is None:
            return None
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: K, value: V, size: int) -> None:
        """
        Store a value that takes C{size} bytes.
        """
        self.drop(key)
        self._values[key] = value, size
        self._total += size
        while self._total > self._limit:
            _, (_, gone) = self._values.popitem(last=False)
            self._total -= gone

    def drop(self, key: K) -> None:
        """
        Forget a value.
        """
        _, size = self._values.pop(key, (None, 0))
        self._total -= size

    def clear(self) -> None:
        """
        Forget all values.
        """
        self._values.clear()
        self._total = 0
