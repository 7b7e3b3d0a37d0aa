"""
What a file that arrives says of itself is read as it was written, and believed as far as it makes sense.
"""

from __future__ import annotations

import struct
import zlib

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.trailer import TRAILER, Stretches, Trailer
from tests.daemon import MIB
from tests.store_contract import START

SIZE = 3 * MIB


class TrailerTests(SynchronousTestCase):
    """
    A file's own word on itself.
    """

    def test_is_read_as_it_was_written(self) -> None:
        """
        Size, time and stretches come back.
        """
        trailer = Trailer(SIZE, START, ((0, 5), (7, 9), (SIZE - 1, SIZE)))
        self.assertEqual(trailer, Trailer.unpack(trailer.pack()))

    def test_of_any_kind_is_none(self) -> None:
        """
        Bytes of no trailer, of a torn one, or of one that makes no sense, say nothing.
        """
        good = Trailer(SIZE, START, ((0, 5), (7, 9))).pack()
        torn = [good[:length] for length in range(len(good))]
        flipped = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(len(good))]
        senseless = [
            Trailer(SIZE, START, there).pack()
            for there in ((), ((0, SIZE),), ((0, SIZE + 1),), ((5, 5),), ((5, 4),), ((5, 9), (0, 2)), ((0, 3), (3, 4)))
        ]
        for data in (*torn, *flipped, *senseless):
            self.assertIsNone(Trailer.unpack(data), data)

    @given(st.binary(max_size=2 * TRAILER))
    def test_of_any_bytes_is_none(self, data: bytes) -> None:
        """
        Whatever is in the file, reading it fails nobody.
        """
        self.assertIsNone(Trailer.unpack(data))

    @given(st.integers(0, 2**32 - 1), st.binary(max_size=TRAILER))
    def test_with_a_right_checksum_is_still_judged(self, count: int, rest: bytes) -> None:
        """
        Bytes that only look like a trailer don't get further than its bounds.
        """
        data = struct.pack(">8sQdI", b"ecrprxy1", SIZE, START, count) + rest
        found = Trailer.unpack(data + zlib.crc32(data).to_bytes(4, "big"))
        if found is not None:
            self.assertLessEqual(found.there[-1][1], SIZE)

    def test_of_no_moment_is_none(self) -> None:
        for when in (float("nan"), float("inf"), float("-inf"), 1e300, -1.0, 2.0**62):
            self.assertIsNone(Trailer.unpack(Trailer(SIZE, when, ((0, 1),)).pack()), when)

    def test_fits_its_place(self) -> None:
        """
        However many gaps there are, it takes no more than was kept for it; what it can't tell comes again.
        """
        trailer = Trailer(SIZE, START, tuple((2 * at, 2 * at + 1) for at in range(1000)))
        packed = trailer.pack()
        self.assertLessEqual(len(packed), TRAILER)
        found = Trailer.unpack(packed)
        assert found is not None
        self.assertEqual(trailer.there[: len(found.there)], found.there)


class GapTests(SynchronousTestCase):
    """
    What is missing is what is not there.
    """

    def test_are_between_the_stretches(self) -> None:
        """
        Before the first, between any two, and behind the last.
        """
        for there, gaps in (
            ((), [(0, 10)]),
            (((0, 10),), []),
            (((0, 4),), [(4, 10)]),
            (((4, 10),), [(0, 4)]),
            (((1, 2), (4, 6)), [(0, 1), (2, 4), (6, 10)]),
        ):
            self.assertEqual(gaps, Stretches(there).gaps(10))
        self.assertEqual([], Stretches().gaps(0))


class StretchesTests(SynchronousTestCase):
    @given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=15))
    def test_they_are_a_set_of_bytes(self, parts: list[tuple[int, int]]) -> None:
        """
        From any byte on, they tell the first that is missing.
        """
        stretches, there = Stretches(), set[int]()
        for start, length in parts:
            stretches.add(start, start + length)
            there |= set(range(start, start + length))
            for offset in range(54):
                missing = next(byte for byte in range(offset, 60) if byte not in there)
                self.assertEqual(missing, stretches.end_of(offset))
