"""
How many bytes the cache directory holds, and in which order they were used.
"""

from __future__ import annotations

import re
import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final


class Settled:
    """
    What was in the directory when it was counted: hundreds of thousands of files, in 46 bytes each.

    @param names: the files' names as L{packed} makes them, one behind the other, in order.
    @param sizes: their bytes, in the same order.
    @param order: their places in that order, the least recently used first.
    """

    def __init__(
        self, names: bytearray | bytes = b"", sizes: array[int] | None = None, order: array[int] | None = None
    ) -> None:
        self._names = names
        self._sizes = array("Q") if sizes is None else sizes
        self._order = array("I") if order is None else order
        self._there = bytearray(b"\1" * len(self._sizes))
        self._passed = 0
        self.count = len(self._sizes)

    def find(self, name: bytes) -> int | None:
        """
        Look a file up; none if it isn't there, or is there no more.
        """
        low, high = 0, len(self._sizes)
        while low < high:
            middle = (low + high) // 2
            if self._names[middle * PACKED : (middle + 1) * PACKED] < name:
                low = middle + 1
            else:
                high = middle
        found = self._names[low * PACKED : (low + 1) * PACKED] == name and self._there[low]
        return low if found else None

    def take(self, place: int) -> int:
        """
        Take a file out.

        @return: its bytes.
        """
        self._there[place] = 0
        self.count -= 1
        return self._sizes[place]

    def oldest(self) -> Iterator[tuple[bytes, int]]:
        """
        Yield name and bytes, the least recently used first.
        """
        while self._passed < len(self._order) and not self._there[self._order[self._passed]]:
            self._passed += 1
        for at in range(self._passed, len(self._order)):
            place = self._order[at]
            if self._there[place]:
                yield bytes(self._names[place * PACKED : (place + 1) * PACKED]), self._sizes[place]


PACKED: Final = 33


def packed(path: str) -> bytes | None:
    """
    Write the path of an entry or of sha256 content in C{PACKED} bytes; none for others, which are few.
    """
    for mark, folder in _FOLDERS.items():
        if path.startswith(folder):
            found = _FILE.fullmatch(path, len(folder))
            return mark + bytes.fromhex(found[2]) if found else None
    return None


def unpacked(name: bytes) -> str:
    """
    Give the path back.
    """
    digits = name[1:].hex()
    return f"{_FOLDERS[name[:1]]}{digits[:2]}/{digits}"


def is_own(path: str) -> bool:
    """
    Return True if the store can have made a file of this name: content, an entry, or what arrives.
    """
    return _OWN.fullmatch(path) is not None


_OWN: Final = re.compile(
    r"(?:content/sha256|entries)/([0-9a-f]{2})/\1[0-9a-f]{62}"
    r"|content/sha512/([0-9a-f]{2})/\2[0-9a-f]{126}"
    r"|arriving/(?:sha256-[0-9a-f]{64}|sha512-[0-9a-f]{128})"
)
# fromhex() by itself would take capitals and blanks, and give another name or a shorter one.
_FILE: Final = re.compile(r"([0-9a-f]{2})/(\1[0-9a-f]{62})")
_FOLDERS: Final = {b"\0": "content/sha256/", b"\1": "entries/"}


class Ledger:
    """
    How many bytes the directory holds, which file was used least recently, and which are being read.

    Shared by threads. A path is relative to the cache directory.

    @ivar total: the bytes of the files known.
    @ivar reserved: the bytes promised to what is arriving.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.total = 0
        self.reserved = 0
        self._settled = Settled()
        self._used: OrderedDict[str, int] = OrderedDict()
        self._readers: Counter[str] = Counter()
        self._meanwhile: OrderedDict[str, int | None] | None = OrderedDict()

    def __len__(self) -> int:
        return self._settled.count + len(self._used)

    def used(self, path: str, size: int) -> None:
        """
        Note that C{path}, of C{size} bytes, is there and was used just now.
        """
        with self.lock:
            self.gone(path)
            self._used[path] = size
            self.total += size
            self._note(path, size)

    def gone(self, path: str) -> int:
        """
        Note that C{path} is there no more.

        @return: the bytes that it had.
        """
        with self.lock:
            size = self._used.pop(path, None)
            if size is None:
                name = packed(path)
                place = self._settled.find(name) if name is not None else None
                size = self._settled.take(place) if place is not None else 0
            self.total -= size
            self._note(path, None)
            return size

    def _note(self, path: str, size: int | None) -> None:
        if self._meanwhile is not None:
            self._meanwhile[path] = size
            self._meanwhile.move_to_end(path)

    def reading(self, path: str, readers: int) -> None:
        """
        Note that C{path} has so many readers more, or fewer.
        """
        with self.lock:
            self._readers[path] += readers
            if not self._readers[path]:
                del self._readers[path]

    def reserve(self, size: int) -> None:
        """
        Promise bytes to something arriving, or, negative, take the promise back.
        """
        with self.lock:
            self.reserved += size

    def begin(self) -> None:
        """
        Note what changes from now on: the directory is about to be counted.
        """
        with self.lock:
            if self._meanwhile is None:  # else nothing was counted yet, or not to the end
                self._meanwhile = OrderedDict()

    def load(self, settled: Settled, total: int, others: Sequence[tuple[str, int]] = ()) -> int:
        """
        Take in what was counted, in place of what was known; what has changed since L{begin} is more recent.

        @param total: the bytes of C{settled}.
        @param others: path and bytes of files whose names can't be packed, the least recently used first.
        @return: the bytes that were found and not known, less those that were known and not found.
        """
        with self.lock:
            known = self.total
            meanwhile, self._meanwhile = self._meanwhile, None
            self._used, self._settled, self.total = (
                OrderedDict(others),
                settled,
                total + sum(size for _, size in others),
            )
            for path, size in (meanwhile or {}).items():
                if size is None:
                    self.gone(path)
                else:
                    self.used(path, size)
            return self.total - known

    def oldest(self) -> Iterator[tuple[str, int, bool]]:
        """
        Yield path, bytes and whether it is being read, the least recently used first. Hold C{lock} meanwhile.
        """
        for name, size in self._settled.oldest():
            path = unpacked(name)
            yield path, size, path in self._readers
        for path, size in self._used.items():
            yield path, size, path in self._readers
