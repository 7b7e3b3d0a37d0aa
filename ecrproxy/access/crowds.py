"""
The crowds of several processes, told as one.

Rules:

- Who is there now is what each worker said last. One that has been silent for long has died, and its clients with it.
- What was refused or let go adds up, whatever becomes of the worker that did it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

from ecrproxy.access.limits import COUNTED

if TYPE_CHECKING:
    from ecrproxy.access.limits import Crowd

SILENT_SECONDS: Final = 5.0
"""For how long a worker's word holds: it says another each second, as long as it has clients."""

Row = tuple[int, int, int, Mapping[str, int]]
"""A worker's process id, its connections and transfers, and the limits that were met since its last word."""


class Word:
    """
    What a worker has to say of its crowd: nothing, once it has said that nobody is there.
    """

    def __init__(self, crowd: Crowd, worker: int) -> None:
        self._crowd, self._worker = crowd, worker
        self._said, self._met = (0, 0), Counter[str]()

    def take(self) -> list[Row]:
        """
        Say it.
        """
        now = (self._crowd.connected, self._crowd.transferring)
        met = Counter({limit: self._crowd.met(limit) for limit in COUNTED})
        news = met - self._met
        quiet = not (any(now) or any(self._said) or news)
        self._said, self._met = now, met
        return [] if quiet else [(self._worker, *now, news)]


class Crowds:
    """
    A process's own crowd, and those that workers tell of.

    @ivar own: the process's own.
    @param seconds: gives seconds that nobody sets.
    """

    def __init__(self, own: Crowd, seconds: Callable[[], float]) -> None:
        self.own, self._seconds = own, seconds
        self._words: dict[int, tuple[float, int, int]] = {}
        self._met = Counter[str]()

    def add(self, rows: Iterable[Row]) -> None:
        """
        Take in a worker's word.
        """
        self._words = self._lasting()
        for worker, connected, transferring, met in rows:
            self._words[worker] = (self._seconds(), connected, transferring)
            self._met.update(met)

    @property
    def connected(self) -> int:
        """
        Connections now.
        """
        return self.own.connected + sum(connected for _, connected, _ in self._lasting().values())

    @property
    def transferring(self) -> int:
        """
        Transfers now.
        """
        return self.own.transferring + sum(transferring for _, _, transferring in self._lasting().values())

    def met(self, limit: str) -> int:
        """
        Tell how often a limit was met.
        """
        return self.own.met(limit) + self._met[limit]

    def _lasting(self) -> dict[int, tuple[float, int, int]]:
        oldest = self._seconds() - SILENT_SECONDS
        return {worker: word for worker, word in self._words.items() if word[0] > oldest}
