"""
A record is read as it was written, and believed as far as it makes sense; what follows from it is tested too.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.record import (
    RECORD,
    STALLED_SECONDS,
    UNKNOWN_BOOT,
    Look,
    Record,
    State,
    Step,
    Stretches,
    Why,
    next_step,
)
from tests.daemon import MIB
from tests.store_contract import START

SIZE = 3 * MIB
BOOT = b"this machine's.."
SPANS = ((0, 5), (7, 9), (SIZE - 1, SIZE))
GOOD = Record(SIZE, START, BOOT, SPANS, ((0, 5),), 5, 3, 70, State.FAILED, Why.DISK)


class RecordTests(SynchronousTestCase):
    def test_is_read_as_it_was_written(self) -> None:
        for record in (GOOD, Record(SIZE, START), replace(GOOD, there=((0, SIZE),), shown=((0, SIZE),), hashed=SIZE)):
            self.assertEqual(record, Record.unpack(record.pack()))
            self.assertEqual(record, Record.unpack(record.pack() + b"of a longer one before"))

    def test_of_any_kind_is_none(self) -> None:
        """
        Bytes of another kind, of a torn record, or of an implausible one are ignored.
        """
        good = GOOD.pack()
        torn = [good[:length] for length in range(len(good))]
        flipped = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(len(good))]
        wrong = [((0, SIZE + 1),), ((5, 5),), ((5, 4),), ((5, 9), (0, 2)), ((0, 3), (3, 4))]
        senseless = [replace(GOOD, there=spans) for spans in wrong] + [replace(GOOD, shown=spans) for spans in wrong]
        senseless += [replace(GOOD, hashed=SIZE + 1)]
        senseless += [replace(GOOD, when=when) for when in (float("nan"), float("inf"), 1e300, -1.0, 2.0**62)]
        for data in (*torn, *flipped, *(each.pack() for each in senseless)):
            self.assertIsNone(Record.unpack(data), data)

    def test_torn_between_two_is_none(self) -> None:
        """
        A reader may see the first bytes of one record and the last of another.
        """
        one, other = GOOD.pack(), replace(GOOD, progress=71, hashed=6, shown=((0, 6),)).pack()
        for at in range(1, len(one)):
            mixed = other[:at] + one[at:]
            self.assertIn(Record.unpack(mixed), (None, GOOD, Record.unpack(other)), at)

    @given(st.binary(max_size=2 * RECORD))
    def test_of_any_bytes_is_none(self, data: bytes) -> None:
        self.assertIsNone(Record.unpack(data))

    def test_fits_its_place(self) -> None:
        """
        However many gaps there are, it fits into its reserved space; ranges that do not fit are fetched again.
        """
        spans = tuple((2 * at, 2 * at + 1) for at in range(1000))
        packed = replace(GOOD, there=spans, shown=spans).pack()
        self.assertLessEqual(len(packed), RECORD)
        found = Record.unpack(packed)
        assert found is not None
        self.assertGreater(len(found.there), 100)
        self.assertEqual((spans[: len(found.there)], spans[: len(found.shown)]), (found.there, found.shown))

    def test_shows_nothing_of_another_boot(self) -> None:
        """
        What was not synced before a crash of the machine may be full of zeros.
        """
        self.assertEqual([5, 5, 7], [GOOD.reach(offset, BOOT) for offset in (0, 4, 7)])
        for boot, record in (
            (b"another", GOOD),
            (UNKNOWN_BOOT, GOOD),
            (UNKNOWN_BOOT, replace(GOOD, boot=UNKNOWN_BOOT)),
        ):
            self.assertEqual([0, 4], [record.reach(offset, boot) for offset in (0, 4)])

    def test_leaves_something_to_ask_ecr_for(self) -> None:
        """
        Resuming a file that has all its bytes needs ECR's permission as well.
        """
        whole = replace(GOOD, there=((0, SIZE),))
        self.assertEqual([(SIZE - 1, SIZE)], whole.resumable.gaps(SIZE))
        self.assertEqual([(5, 7), (9, SIZE - 1)], GOOD.resumable.gaps(SIZE))


class ProgressTests(SynchronousTestCase):
    def test_a_byte_now_and_then_is_none(self) -> None:
        before = replace(GOOD, size=2**30, there=((0, 2**20),), hashed=2**20)
        for more, progress in (
            ({"when": before.when + 1, "progress": before.progress + 1}, False),
            ({"there": ((0, 2**20 + 1023),)}, False),
            ({"there": ((0, 2**20 + 1024),)}, True),
            ({"there": ((0, 2**20), (2**21, 2**21 + 2**10))}, True),
            ({"hashed": 0}, True),
            ({"epoch": before.epoch + 1}, True),
            ({"state": State.VERIFIED}, before.state is not State.VERIFIED),
        ):
            self.assertIs(progress, replace(before, **more).is_progress_since(before), more)


class NextStepTests(SynchronousTestCase):
    """
    What a process does that follows another one's transfer.
    """

    LIVE = replace(GOOD, state=State.ARRIVING, why=Why.NOTHING)

    def test_looks_again_while_the_writer_lives(self) -> None:
        for record in (None, self.LIVE, replace(self.LIVE, state=State.CLAIMED)):
            self.assertEqual(Step.WAIT, next_step(Look(record), 0))
            self.assertEqual(Step.WAIT, next_step(Look(record), STALLED_SECONDS - 0.1))

    def test_goes_alone_if_the_writer_gets_no_further(self) -> None:
        """
        A process that was stopped keeps its lock: it is neither broken nor waited for.
        """
        self.assertEqual(Step.GO_ALONE, next_step(Look(self.LIVE), STALLED_SECONDS))

    def test_takes_over_when_the_lock_is_free(self) -> None:
        for idle in (0, 2 * STALLED_SECONDS):
            self.assertEqual(Step.TAKE_OVER, next_step(Look(self.LIVE, free=True), idle))

    def test_goes_alone_when_the_file_is_another_one(self) -> None:
        """
        A process that started again has other bytes at the same place.
        """
        for free in (False, True):
            self.assertEqual(Step.GO_ALONE, next_step(Look(self.LIVE, in_place=False, free=free), 0))

    def test_finishes_once_the_bytes_are_verified(self) -> None:
        """
        Whatever happens to the writer and to the file's name then.
        """
        for state in (State.VERIFIED, State.CONTENT):
            for in_place, free in itertools.product((False, True), repeat=2):
                look = Look(replace(self.LIVE, state=state), in_place=in_place, free=free)
                self.assertEqual(Step.FINISH, next_step(look, 2 * STALLED_SECONDS))

    def test_goes_alone_after_a_disk_that_failed_and_fails_after_wrong_bytes(self) -> None:
        for why, step in ((Why.DISK, Step.GO_ALONE), (Why.DIGEST, Step.FAIL)):
            failed = replace(self.LIVE, state=State.FAILED, why=why)
            self.assertEqual(step, next_step(Look(failed, in_place=False, free=True), 0))


class GapTests(SynchronousTestCase):
    """
    Gaps are the missing ranges.
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
        From any byte on, they give the first that is missing.
        """
        stretches, there = Stretches(), set[int]()
        for start, length in parts:
            stretches.add(start, start + length)
            there |= set(range(start, start + length))
            for offset in range(54):
                missing = next(byte for byte in range(offset, 60) if byte not in there)
                self.assertEqual(missing, stretches.end_of(offset))
