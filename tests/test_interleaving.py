"""
A transfer whose connections, threads and readers act in any order.

A thread's result reaches the event loop later than its work is done: what other threads and connections did between
the two must not be undone.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.error import ConnectionLost
from twisted.python.failure import Failure

from ecrproxy.cache.content import DigestMismatchError
from ecrproxy.threads import Bounded, Disk
from ecrproxy.transfer.download import Download
from ecrproxy.transfer.file_backed import TAIL
from ecrproxy.transfer.gaps import SMALLEST_PART
from tests.daemon import noise
from tests.test_download import PWRITE, DownloadTestCase, Reader, Source, Tap, is_data

SIZES = (1, TAIL, TAIL + 1, 3 * TAIL, SMALLEST_PART + TAIL, 3 * SMALLEST_PART + 17)
"""Sizes of the blob: one batch, a tail and little more, and several parts."""
assert settings.default is not None
FEWER = settings(max_examples=settings.default.max_examples // 2)
CHUNKS = (1, TAIL // 2, TAIL, SMALLEST_PART)
SECONDS = 10.0
"""Time limit for a call in a thread when the disk may hang."""
BREAKS, HANGS, STAYS = 0.05, 0.05, 0.7
"""Probability that a connection breaks, that the disk hangs, and that a reader stays to the end."""


class InterleavingTests(DownloadTestCase):
    """
    Any order of events.
    """

    def setUp(self) -> None:
        super().setUp()
        self.arrived: dict[Tap, int] = {}

    def bring(self, data: bytes, tap: Tap, count: int) -> None:
        """
        Have a connection deliver so many bytes more, and end with its last.
        """
        at = tap.start + self.arrived.get(tap, 0)
        stop = len(data) if tap.stop is None else tap.stop
        piece = data[at : min(at + count, stop)]
        self.arrived[tap] = self.arrived.get(tap, 0) + len(piece)
        for start in range(0, len(piece), 2**16):
            tap.arrived(piece[start : start + 2**16])
        if at + len(piece) == stop and not tap.over:
            tap.ended(None)

    def events(self, data: bytes, blob: Source, chunk: int) -> list[Callable[[], None]]:
        """
        Return what may happen next.
        """
        hands = self.hands
        return [
            *(partial(self.bring, data, tap, chunk) for tap in blob.taps if tap.began and not (tap.over or tap.paused)),
            *(partial(hands.do, which) for which in range(len(hands.waiting))),
            *(partial(hands.tell, which) for which in range(len(hands.untold))),
        ]

    def play(self, data: bytes, download: Download, chance: Random) -> None:
        """
        Let everything happen that can, in the order that C{chance} picks; visible bytes stay visible.
        """
        shown = 0
        while events := self.events(data, self.blob, chance.choice(CHUNKS)):
            chance.choice(events)()
            self.assertGreaterEqual(download.received, shown)
            shown = download.received

    @FEWER
    @given(st.sampled_from(SIZES), st.integers(1, 4), st.integers(0, 2**32))
    def test_ends_with_every_byte(self, size: int, lanes: int, seed: int) -> None:
        """
        Each reader gets everything, the blob is content, and no file stays open.
        """
        data = noise("x", size)
        self.hands.idle = False
        download = self.begin(data, lanes=lanes, first=min(size, SMALLEST_PART))
        readers = [Reader(download.follow(start, size)) for start in (0, size // 2)]
        self.play(data, download, Random(seed))
        self.assertEqual([data, data[size // 2 :]], [bytes(each.got) for each in readers])
        self.assertIsNone(download.failure)
        self.leave(readers)
        self.assertEqual(data, (self.root / self.store.content_path(download.digest)).read_bytes())

    @FEWER
    @given(st.sampled_from(SIZES), st.integers(1, 4), st.integers(0, 2**32))
    def test_a_full_disk_loses_nothing(self, size: int, lanes: int, seed: int) -> None:
        """
        Each reader gets everything, wherever the disk was full, and nothing is left of the file.
        """
        data, chance = noise("x", size), Random(seed)
        room = [chance.randrange(size)]

        def write(fd: int, piece: Any, offset: int) -> int:
            if is_data(piece):
                room[0] -= len(piece)
            if room[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return PWRITE(fd, piece, offset)

        self.hands.idle = False
        download = self.begin(data, lanes=lanes, first=min(size, SMALLEST_PART))
        readers = [Reader(download.follow(start, size)) for start in (0, size // 2)]
        patch = self.patch(os, "pwrite", write)
        self.play(data, download, chance)
        patch.restore()
        self.assertEqual([data, data[size // 2 :]], [bytes(each.got) for each in readers])
        self.leave(readers)
        self.assertEqual([], [path for path in self.root.rglob("*") if path.is_file()])

    @FEWER
    @given(st.sampled_from(SIZES), st.integers(1, 4), st.integers(0, 2**32))
    def test_other_bytes_complete_no_answer(self, size: int, lanes: int, seed: int) -> None:
        """
        With one wrong byte, no reader of the whole gets the last one, and nothing is left of the file.
        """
        data, chance = bytearray(noise("x", size)), Random(seed)
        self.hands.idle = False
        download = self.begin(bytes(data), lanes=lanes, first=min(size, SMALLEST_PART))
        reader = Reader(download.follow(0, size))
        data[chance.randrange(size)] ^= 1
        self.play(bytes(data), download, chance)
        self.assertLess(len(reader.got), size)
        self.leave([reader])
        self.assertFailed(download, DigestMismatchError)

    @settings(max_examples=60)
    @given(st.sampled_from(SIZES), st.integers(1, 4), st.integers(0, 2**32))
    def test_readers_come_and_go_and_connections_break(self, size: int, lanes: int, seed: int) -> None:
        """
        Each reader gets what it requested, whenever it comes, wherever it reads, and whichever others leave.
        """
        data, chance = noise("x", size), Random(seed)
        self.hands.idle = False
        download = self.begin(data, lanes=lanes, first=min(size, SMALLEST_PART))
        self.blob.late = []
        visits = [self.visit(data, download, chance) for _ in range(3)]
        breaks = 2
        while events := [*self.events(data, self.blob, chance.choice(CHUNKS)), *self.answers()]:
            event = chance.choice(events)
            if breaks and chance.random() < BREAKS:
                breaks -= 1
                event = partial(self.break_off, chance)
            event()
            next(chance.choice(visits), None)
        self.assertIsNone(download.failure)
        for each in visits:
            self.assertLess(sum(1 for _ in islice(each, 1000)), 1000, "a reader waits for ever")
        self.leave([])
        self.assertEqual(data, (self.root / self.store.content_path(download.digest)).read_bytes())

    @settings(max_examples=60)
    @given(st.sampled_from(SIZES), st.integers(1, 4), st.integers(0, 2**32))
    def test_a_disk_that_hangs_for_a_while_loses_nothing(self, size: int, lanes: int, seed: int) -> None:
        """
        Each reader gets everything, though the transfer went on without the disk, and its threads finish their calls
        later.
        """
        data, chance = noise("x", size), Random(seed)
        self.hands.idle = False
        reading, writing, committing, hashing = (Bounded(self.hands, 4, SECONDS, self.clock) for _ in range(4))
        disk = Disk(reading, writing, committing, hashing, digesting=self.hands, closing=self.hands)
        download = self.begin(data, lanes=lanes, first=min(size, SMALLEST_PART), disk=disk)
        readers = [Reader(download.follow(start, size)) for start in (0, size // 2)]
        hangs = 2
        while events := self.events(data, self.blob, chance.choice(CHUNKS)):
            event = chance.choice(events)
            if hangs and chance.random() < HANGS:
                hangs -= 1
                event = partial(self.clock.advance, SECONDS)
            event()
        self.assertEqual([data, data[size // 2 :]], [bytes(each.got) for each in readers])
        self.leave(readers)
        self.assertEqual([], list((self.root / "arriving").iterdir()))

    def visit(self, data: bytes, download: Download, chance: Random) -> Iterator[None]:
        """
        Add readers, now and then, of the whole or a part; some leave early.
        """
        size = len(data)
        for _ in range(6):
            start = chance.choice([0, chance.randrange(size)])
            stop = chance.choice([size, min(size, start + chance.choice(CHUNKS))])
            if not download.offers(start):
                return
            reader, stays = Reader(download.follow(start, stop)), chance.random() < STAYS
            for _ in range(chance.randrange(20)):
                yield
            while stays and not reader.follower.done:
                yield
            self.assertEqual(data[start : stop if stays else start + len(reader.got)], bytes(reader.got))
            reader.follower.close()

    def answers(self) -> list[Callable[[], None]]:
        """
        Return the bucket's outstanding answers.
        """
        return [partial(each.callback, None) for each in self.blob.late or [] if not each.called]

    def break_off(self, chance: Random) -> None:
        """
        Break a connection, if there is one.
        """
        if there := [tap for tap in self.blob.taps if tap.began and not tap.over]:
            chance.choice(there).ended(Failure(ConnectionLost()))

    def leave(self, readers: list[Reader]) -> None:
        """
        Close all readers, and assert that no file stays open.
        """
        for each in readers:
            each.follower.close()
        self.hands.work_off()
        self.assertEqual([], self.open_files())
