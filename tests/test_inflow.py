"""
How many connections a blob uses, in which parts, and how much may wait for the disk.
"""

from __future__ import annotations

from itertools import pairwise

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.transfer.gaps import (
    LARGEST_PART,
    MOST_GAPS,
    SMALLEST_PART,
    SMALLEST_WISH,
    SPLIT,
    Gaps,
    Urgency,
    Wish,
    part_size,
)
from ecrproxy.transfer.inflow import GATHER_SECONDS, GATHERED, HIGH_WATER, Buffered, Inflow, Lanes
from tests.daemon import MIB
from tests.test_download import Tap

PIECE = 2**16


class LanesTests(SynchronousTestCase):
    def test_are_several_for_large_blobs(self) -> None:
        """
        From 16 MiB on a blob uses the maximum per blob; a smaller one, or one of unknown size, uses one.
        """
        for size, taken in ((0, 1), (SPLIT - 1, 1), (SPLIT, 4), (2**40, 4)):
            self.assertEqual(taken, Lanes(4, 64).take(size))
        self.assertEqual(1, Lanes(1, 64).take(2**40))

    def test_are_bounded_together(self) -> None:
        """
        If few are left a blob gets those, if none are it still gets one; released ones are free again.
        """
        lanes = Lanes(4, 6)
        self.assertEqual([4, 2, 1, 1], [lanes.take(SPLIT) for _ in range(4)])
        lanes.give_back(1)
        lanes.give_back(1)
        self.assertEqual(1, lanes.take(SPLIT))
        for taken in (4, 2, 1):
            lanes.give_back(taken)
        self.assertEqual([4, 2], [lanes.take(SPLIT) for _ in range(2)])

    def test_of_small_blobs_count(self) -> None:
        """
        A small blob's one connection counts towards the total.
        """
        lanes = Lanes(4, 6)
        for _ in range(3):
            lanes.take(1)
        self.assertEqual(3, lanes.take(SPLIT))

    def test_ask_for_a_first_part(self) -> None:
        """
        A blob that may be large starts with a first part; one that is known to be small, or has one lane, with
        everything.
        """
        lanes = Lanes(4, 64)
        self.assertEqual([SMALLEST_PART] * 2, [lanes.first_part(size) for size in (None, SPLIT)])
        self.assertEqual([None] * 2, [lanes.first_part(size) for size in (0, SPLIT - 1)])
        self.assertIsNone(Lanes(1, 64).first_part(2**40))


class GapsTests(SynchronousTestCase):
    def test_are_taken_in_order(self) -> None:
        """
        Part after part, none across two gaps, until nothing is left.
        """
        gaps = Gaps([(10, 20), (30, 30 + 3 * SMALLEST_PART)])
        parts = [gaps.take(4) for _ in range(5)]
        ends = [30 + count * SMALLEST_PART for count in range(4)]
        self.assertEqual([(10, 20), *pairwise(ends), None], parts)

    def test_of_one_lane_are_taken_whole(self) -> None:
        """
        With one connection, there is one part per gap.
        """
        gaps = Gaps([(10, 20), (30, 2**40)])
        self.assertEqual([(10, 20), (30, 2**40), None], [gaps.take(1) for _ in range(3)])

    def test_may_be_taken_from_anywhere(self) -> None:
        """
        The missing bytes of the range are taken, and the rest stays.
        """
        gaps = Gaps([(10, 20), (30, 40)])
        self.assertEqual((12, 15), gaps.take_from(12, 15))
        self.assertEqual((32, 40), gaps.take_from(32, 99))
        for there in (9, 12, 20, 25, 40):
            self.assertIsNone(gaps.take_from(there, 99))
        self.assertEqual([(10, 12), (15, 20), (30, 32), None], [gaps.take(1) for _ in range(4)])

    def test_refuse_empty_and_reversed_ranges(self) -> None:
        """
        A range whose end is before its start would make a gap wider than it was.
        """
        gaps = Gaps([(10, 20)])
        for start, stop in ((15, 15), (15, 12), (15, 0), (15, -1), (10, 10), (10, 1)):
            self.assertIsNone(gaps.take_from(start, stop))
        self.assertEqual([(10, 20), None], [gaps.take(1) for _ in range(2)])
        for wrong in ([(5, 5)], [(5, 4)], [(0, 10), (5, 20)], [(10, 20), (0, 5)]):
            self.assertRaises(ValueError, Gaps, wrong)

    def test_are_given_up(self) -> None:
        """
        When one lane has failed, no other takes a part.
        """
        gaps = Gaps([(10, 20)])
        gaps.give_up()
        self.assertIsNone(gaps.take(4))


class PartTests(SynchronousTestCase):
    def test_of_one_lane_is_all(self) -> None:
        """
        A single lane takes the rest at once.
        """
        self.assertEqual(2**40, part_size(2**40, 1))

    def test_shrink_towards_the_end(self) -> None:
        """
        Parts are between 4 and 16 MiB, never grow, and end with what is left.
        """
        for lanes in (2, 4, 16):
            remaining, sizes = 2**30 + 1, []
            while remaining:
                sizes.append(part_size(remaining, lanes))
                remaining -= sizes[-1]
            self.assertEqual(sizes, sorted(sizes, reverse=True))
            self.assertEqual(LARGEST_PART, sizes[0])
            self.assertEqual({True}, {SMALLEST_PART <= size <= LARGEST_PART for size in sizes[:-1]})
            self.assertLessEqual(sizes[-1], SMALLEST_PART)
        self.assertEqual((1, 0), (part_size(1, 4), part_size(0, 4)))
        self.assertEqual(SMALLEST_PART * 2, part_size(SMALLEST_PART * 16, 4))


class WishTests(SynchronousTestCase):
    """
    Ranges that are taken out of order.
    """

    def test_the_smallest_comes_first(self) -> None:
        gaps = Gaps([(0, 100 * MIB)])
        wishes = [Wish(10 * MIB, 90 * MIB), Wish(98 * MIB, 100 * MIB), Wish(97 * MIB, 98 * MIB)]
        self.assertEqual((97 * MIB, 98 * MIB, Urgency.SMALL), gaps.take_wished(wishes))
        self.assertEqual((98 * MIB, 100 * MIB, Urgency.SMALL), gaps.take_wished(wishes))
        self.assertEqual((10 * MIB, 10 * MIB + SMALLEST_PART, Urgency.READER), gaps.take_wished(wishes))

    def test_of_large_ones_the_one_with_the_least_on_its_way_comes_first(self) -> None:
        """
        However much remains of each. Parts in flight count as much as received ones.
        """
        gaps = Gaps([(0, 100 * MIB)])
        wishes = [Wish(0, 100 * MIB), Wish(50 * MIB, 100 * MIB), Wish(90 * MIB, 100 * MIB)]
        starts = [part[0] // MIB for _ in range(7) if (part := gaps.take_wished(wishes)) is not None]
        self.assertEqual([0, 50, 90, 4, 54, 94, 8], starts)

    def test_equal_ones_come_in_their_order(self) -> None:
        wishes = [Wish(50 * MIB, 100 * MIB), Wish(0, 100 * MIB)]
        for order in (wishes, wishes[::-1]):
            part = Gaps([(0, 100 * MIB)]).take_wished(order)
            self.assertEqual((order[0].position, order[0].position + SMALLEST_PART, Urgency.READER), part)

    def test_what_is_there_is_no_wish(self) -> None:
        gaps = Gaps([(5 * MIB, 6 * MIB)])
        self.assertIsNone(gaps.take_wished([Wish(0, 5 * MIB), Wish(6 * MIB, 9 * MIB)]))
        self.assertEqual((5 * MIB, 6 * MIB, Urgency.READER), gaps.take_wished([Wish(0, 9 * MIB)]))

    def test_tiny_ones_leave_no_gap_each(self) -> None:
        gaps = Gaps([(0, MIB)])
        self.assertEqual((1000, 1000 + SMALLEST_WISH, Urgency.SMALL), gaps.take_wished([Wish(1000, 1001)]))
        self.assertEqual((MIB - 1, MIB, Urgency.SMALL), gaps.take_wished([Wish(MIB - 1, MIB)]))

    def test_are_none_where_there_are_gaps_without_number(self) -> None:
        gaps = Gaps([(at, at + 1) for at in range(0, 2 * MOST_GAPS, 2)])
        self.assertIsNone(gaps.take_wished([Wish(0, 1)]))

    def test_what_is_given_back_joins_its_neighbours(self) -> None:
        gaps = Gaps([(0, 100)])
        self.assertEqual((0, 100), gaps.take(1))
        for start, stop in ((50, 100), (0, 20), (20, 50), (7, 7)):
            gaps.give_back(start, stop)
        self.assertIn(99, gaps)
        self.assertEqual((0, 100), gaps.take(1))


class BufferedTests(SynchronousTestCase):
    def test_all_transfers_together_hold_what_is_allowed_and_a_read_each(self) -> None:
        """
        Sixty transfers to a slow disk, each of which could hold four megabytes.
        """
        buffered = Buffered(8 * MIB)
        taps, inflows = [Tap(0, None) for _ in range(60)], [Inflow(buffered) for _ in range(60)]
        for tap, inflow in zip(taps, inflows, strict=True):
            inflow.begin(tap)
        for _ in range(100):
            for tap in taps:
                if not tap.paused:
                    tap.arrived(bytes(2**16))
        self.assertLessEqual(buffered.size, 8 * MIB + 60 * 2**16)
        self.assertEqual({True}, {tap.paused for tap in taps})
        for tap, inflow in zip(taps, inflows, strict=True):
            self.successResultOf(Deferred.fromCoroutine(inflow.batch()))  # being written
            self.assertTrue(tap.paused)
            Deferred.fromCoroutine(inflow.batch())  # written
            self.assertFalse(tap.paused)
        self.assertEqual(0, buffered.size)

    def test_what_is_dropped_is_counted_no_more(self) -> None:
        buffered = Buffered()
        tap, inflow = Tap(0, None), Inflow(buffered)
        inflow.begin(tap)
        tap.arrived(bytes(1000))
        self.successResultOf(Deferred.fromCoroutine(inflow.batch()))
        tap.arrived(bytes(500))
        self.assertEqual(1500, buffered.size)
        inflow.abort()
        self.assertEqual(0, buffered.size)

    def test_what_is_refused_leaves_what_has_come(self) -> None:
        tap, inflow = Tap(0, None), Inflow(Buffered())
        inflow.begin(tap)
        tap.arrived(b"here")
        inflow.refuse()
        tap.arrived(b"late")
        self.assertTrue(tap.aborted)
        self.assertEqual([b"here"], self.successResultOf(Deferred.fromCoroutine(inflow.batch())))
        self.assertEqual([], self.successResultOf(Deferred.fromCoroutine(inflow.batch())))


class InflowTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.inflow, self.tap = Inflow(Buffered()), Tap(0, None)
        self.inflow.begin(self.tap)

    def batch(self) -> Deferred[list[bytes]]:
        """
        Request the next batch.
        """
        return Deferred.fromCoroutine(self.inflow.batch())

    def test_gives_what_came(self) -> None:
        """
        Waiting bytes come together and in order; a call before any arrived waits for the first.
        """
        self.tap.arrived(b"a")
        self.tap.arrived(b"b")
        self.assertEqual([b"a", b"b"], self.successResultOf(self.batch()))
        waiting = self.batch()
        self.assertNoResult(waiting)
        self.tap.arrived(b"c")
        self.assertEqual([b"c"], self.successResultOf(waiting))

    def test_pauses_who_is_faster_than_the_disk(self) -> None:
        """
        No more than 4 MiB and a piece wait, however slow the disk is, beside what is being written.
        """
        came = 0
        for _ in range(3):
            while not self.tap.paused:
                self.tap.arrived(bytes(PIECE))
                came += PIECE
            batch = self.successResultOf(self.batch())
            self.assertEqual((HIGH_WATER + PIECE, came), (came, len(b"".join(batch))))
            self.assertTrue(self.tap.paused, "the bytes are not written yet")
            waiting, came = self.batch(), 0
            self.assertFalse(self.tap.paused)
            self.tap.arrived(b"x")
            self.assertEqual([b"x"], self.successResultOf(waiting))
        self.assertEqual(3, self.tap.pauses)

    def test_does_not_pause_who_is_not(self) -> None:
        """
        Up to 4 MiB may wait without a pause; and a paused connection is paused once.
        """
        self.tap.arrived(bytes(HIGH_WATER))
        self.assertEqual(0, self.tap.pauses)
        for _ in range(5):
            self.tap.arrived(b"x")
        self.assertEqual(1, self.tap.pauses)

    def test_takes_all_before_the_end(self) -> None:
        """
        An end, good or bad, comes after all bytes before it.
        """
        for problem in (None, Failure(ZeroDivisionError())):
            self.setUp()
            self.tap.arrived(b"a")
            self.tap.ended(problem)
            self.assertEqual([b"a"], self.successResultOf(self.batch()))
            for _ in range(2):
                end = self.batch()
                if problem is None:
                    self.assertEqual([], self.successResultOf(end))
                else:
                    self.failureResultOf(end, ZeroDivisionError)

    def test_tells_who_waits_of_the_end(self) -> None:
        """
        A call that waits when the connection ends returns.
        """
        waiting = self.batch()
        self.tap.ended(None)
        self.assertEqual([], self.successResultOf(waiting))

    def test_does_not_resume_what_has_ended(self) -> None:
        """
        A connection that was paused when it ended is left alone.
        """
        self.tap.arrived(bytes(HIGH_WATER + 1))
        self.assertTrue(self.tap.paused)
        self.successResultOf(self.batch())
        self.tap.ended(None)
        self.assertEqual([], self.successResultOf(self.batch()))
        self.assertTrue(self.tap.paused)

    def test_drops_what_waits_when_aborted(self) -> None:
        """
        It closes the connection once, returns nothing more and reports the reason.
        """
        self.tap.arrived(b"a")
        self.inflow.abort(Failure(ZeroDivisionError()))
        self.assertTrue(self.tap.aborted)
        self.failureResultOf(self.batch(), ZeroDivisionError)
        self.tap.aborted = False
        self.inflow.abort()
        self.assertFalse(self.tap.aborted)

    def test_leaves_a_connection_that_has_ended(self) -> None:
        """
        A connection with a complete response is not closed: it may serve the next request.
        """
        self.tap.ended(None)
        self.inflow.abort()
        self.assertFalse(self.tap.aborted)
        self.assertEqual([], self.successResultOf(self.batch()))

    def test_takes_what_comes_at_once(self) -> None:
        """
        Bytes, and even the end, may arrive while the connection is only being begun.
        """
        tap, inflow = Tap(0, None), Inflow(Buffered())
        tap.early = [bytes(HIGH_WATER), b"x"]
        inflow.begin(tap)
        self.assertEqual(2, len(self.successResultOf(Deferred.fromCoroutine(inflow.batch()))))
        self.assertEqual([], self.successResultOf(Deferred.fromCoroutine(inflow.batch())))

    def test_takes_nothing_after_its_end(self) -> None:
        """
        Bytes that arrive after the end, here or on the connection, are not held.
        """
        for end in (Inflow.abort, lambda inflow: inflow.ended(None)):
            self.setUp()
            end(self.inflow)
            self.tap.arrived(b"late")
            self.assertEqual([], self.successResultOf(self.batch()))


class GatheringTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock, self.buffered, self.tap = Clock(), Buffered(), Tap(0, None)
        self.inflow = Inflow(self.buffered, call_later=self.clock.callLater)
        self.inflow.begin(self.tap)

    def batch(self, worth: int = GATHERED) -> Deferred[int]:
        """
        Request so many bytes, if they come soon; return how many there were.
        """
        return Deferred.fromCoroutine(self.inflow.batch(worth)).addCallback(lambda batch: len(b"".join(batch)))

    def test_bytes_wait_for_others_and_not_for_long(self) -> None:
        waiting = self.batch()
        self.clock.advance(60)
        self.tap.arrived(bytes(PIECE))
        self.clock.advance(GATHER_SECONDS / 2)
        self.tap.arrived(bytes(PIECE))
        self.assertNoResult(waiting)
        self.clock.advance(GATHER_SECONDS / 2)
        self.assertEqual(2 * PIECE, self.successResultOf(waiting))

    def test_bytes_wait_no_longer_once_there_are_enough(self) -> None:
        waiting = self.batch()
        for _ in range(GATHERED // PIECE):
            self.assertNoResult(waiting)
            self.tap.arrived(bytes(PIECE))
        self.assertEqual(GATHERED, self.successResultOf(waiting))
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_bytes_do_not_wait_for_what_can_not_come(self) -> None:
        """
        The connection has ended, or is paused; or there is no space for so many.
        """
        waiting = self.batch()
        self.tap.arrived(b"x")
        self.tap.ended(None)
        self.assertEqual(1, self.successResultOf(waiting))
        self.setUp()
        waiting, self.buffered.most = self.batch(), 0
        self.tap.arrived(b"x")
        self.assertTrue(self.tap.paused)
        self.assertEqual(1, self.successResultOf(waiting))
        self.setUp()
        self.inflow = Inflow(self.buffered, 4 * PIECE, self.clock.callLater)
        self.inflow.begin(self.tap)
        waiting = self.batch()
        self.tap.arrived(bytes(PIECE))
        self.assertEqual(PIECE, self.successResultOf(waiting))

    def test_an_aborted_connection_is_not_waited_for(self) -> None:
        waiting = self.batch()
        self.tap.arrived(b"x")
        self.inflow.abort(Failure(ZeroDivisionError()))
        self.failureResultOf(waiting, ZeroDivisionError)
        self.assertEqual([], self.clock.getDelayedCalls())
