"""
Samples of the traffic.
"""

from __future__ import annotations

import json
import os
import tempfile
from fcntl import LOCK_EX, flock
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.admin.history import (
    SAMPLE_SECONDS,
    SCALES,
    STEPS,
    History,
    Point,
    Sample,
    Sampler,
    merged,
    stretches,
    totals,
)
from ecrproxy.admin.kept_history import NAME, WRITE_SECONDS, KeptHistory, read, recalled, told, write
from ecrproxy.metrics import Figures
from tests.daemon import Hands, at_once

FINE, MIDDLE, COARSE = SCALES
TOOK = (1, *[0] * 8)
NOW = 1_800_000_000.0


class HistoryTests(SynchronousTestCase):
    def test_a_point_tells_what_there_was_in_its_seconds(self) -> None:
        """
        Growing totals become the increase in each interval.
        """
        history, count = History(), MIDDLE.samples
        for turn in range(1, count + 2):
            history.note(Sample(10 * turn, 5 * turn, 100 * turn, turn, 0, (turn, *[0] * 8)))
        begun = Point(SAMPLE_SECONDS, 10, 5, 100, 1, 0, TOOK)
        whole = Point(count * SAMPLE_SECONDS, 10 * count, 5 * count, 100 * count, count, 0, (count, *[0] * 8))
        self.assertEqual((whole, begun), history.points(MIDDLE))
        self.assertEqual((begun,) * (count + 1), history.points(FINE))
        self.assertEqual(begun, history.latest())

    def test_before_the_first_sample_there_is_nothing(self) -> None:
        self.assertEqual((), History().points())
        self.assertEqual((Point(0), Point(0)), (History().latest(), History().lately()))

    def test_a_daemon_that_stood_still_has_a_gap(self) -> None:
        """
        The missed time counts, with nothing in it, however long it was.
        """
        history = History()
        history.note(Sample(1), turns=3)
        (point,) = history.points(COARSE)
        self.assertEqual(Point(3 * SAMPLE_SECONDS, 1), point)
        self.assertEqual((Point(SAMPLE_SECONDS),) * 2, history.points()[:2])
        history.note(Sample(2), turns=10**9)
        for scale in SCALES:
            lacking = scale.seconds - merged(history.points(scale)).seconds
            self.assertIn(lacking, range(scale.samples * SAMPLE_SECONDS))

    @given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50)), min_size=1, max_size=300))
    def test_never_holds_more_than_its_steps(self, turns: list[tuple[int, int]]) -> None:
        """
        Whatever the intervals were, only what is shown is kept, and of that time nothing is lost.
        """
        history, total, passed = History(), 0, 0
        for more, missed in turns:
            total, passed = total + more, passed + missed
            history.note(Sample(total), missed)
        for scale in SCALES:
            points, most = history.points(scale), scale.samples * STEPS
            self.assertLessEqual(len(points), STEPS)
            self.assertEqual(
                {scale.samples * SAMPLE_SECONDS},
                {each.seconds for each in points[:-1]} or {scale.samples * SAMPLE_SECONDS},
            )
            if passed <= most:
                self.assertEqual((passed * SAMPLE_SECONDS, total), (merged(points).seconds, merged(points).asked))

    def test_points_add_up_to_longer_stretches(self) -> None:
        """
        The newest first, the oldest as long as what there is.
        """
        points = [Point(10, 1), *[Point(30, 2)] * 3]
        self.assertEqual([Point(60, 4), Point(40, 3)], list(stretches(points, 60)))


class KeptHistoryTests(SynchronousTestCase):
    """
    The file from which a restart continues.
    """

    def setUp(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="ecrproxy-history-"))
        self.history = History()
        for turn in range(1, 400):
            self.history.note(Sample(turn, turn, turn, turn, turn, (turn, *[0] * 8)), turn % 3 + 1)

    def points(self, history: History) -> list[tuple[Point, ...]]:
        return [history.points(each) for each in SCALES]

    def test_a_restart_goes_on_where_it_was(self) -> None:
        write(self.root, told(self.history, NOW))
        self.assertEqual(self.points(self.history), self.points(read(self.root, NOW)))
        self.assertEqual([NAME], [each.name for each in self.root.iterdir()])

    def test_in_the_time_in_which_the_daemon_did_not_run_there_was_nothing(self) -> None:
        data = told(self.history, NOW)
        self.history.note(Sample(), 2)  # a total that starts again
        after = recalled(data, NOW + 2 * SAMPLE_SECONDS + 1)
        self.assertEqual((Point(SAMPLE_SECONDS),) * 2, after.points()[-2:])
        self.assertEqual(0, merged(recalled(data, NOW + 10**9).points(COARSE)).asked)
        self.assertEqual(recalled(data, NOW).points(), recalled(data, NOW - 10**9).points())

    def test_what_can_not_be_read_is_begun_anew_and_told(self) -> None:
        good = json.loads(told(self.history, NOW))
        bad: list[bytes] = [b"", b"{", b"[]", b"\xff", b"null", b"[" * 10**5, b"9" * 10**5, bytes(2**20)]
        steps = [None, [[1]], [[10**9, [1, 1, 1, 1, 1, [0] * 9]]], [[1, [1, 1, 1, 1, 1, [1]]]]]
        steps += [[[1, [count, 1, 1, 1, 1, [0] * 9]]] for count in (-1, 10**30, 1.5, "1", None, True)]
        bad += [json.dumps({**good, "scales": {**good["scales"], "15m": each}}).encode() for each in steps]
        bad += [json.dumps({**good, "when": when}).encode() for when in ("x", None, -float("inf"))]
        for data in bad:
            (self.root / NAME).write_bytes(data)
            with capturedLogs() as events:
                self.assertEqual([()] * 3, self.points(read(self.root, NOW)), data[:100])
            self.assertEqual(
                [True], ["starts with an empty history" in formatEvent(each) for each in events], data[:100]
            )

    def test_no_file_is_no_trouble_and_another_thing_in_its_place_is_left(self) -> None:
        with capturedLogs() as events:
            self.assertEqual([()] * 3, self.points(read(self.root, NOW)))
        self.assertEqual([], events)
        os.mkfifo(self.root / NAME)
        read(self.root, NOW)
        (self.root / f"{NAME}.new").symlink_to(self.root / "elsewhere")
        self.assertRaises(OSError, write, self.root, b"x")
        self.assertFalse((self.root / "elsewhere").exists())

    def test_no_file_that_has_a_name_elsewhere_is_written_to(self) -> None:
        elsewhere, draft = self.root / "elsewhere", self.root / f"{NAME}.new"
        elsewhere.write_bytes(b"of somebody else")
        draft.hardlink_to(elsewhere)
        self.assertRaises(OSError, write, self.root, b"x")
        self.assertEqual(b"of somebody else", elsewhere.read_bytes())
        write(self.root, b"x")
        self.assertEqual((b"x", b"of somebody else"), ((self.root / NAME).read_bytes(), elsewhere.read_bytes()))

    def test_of_two_processes_that_write_one_does(self) -> None:
        (self.root / NAME).write_bytes(b"before")
        with open(self.root / f"{NAME}.new", "wb") as other:  # noqa: PTH123
            flock(other, LOCK_EX)
            write(self.root, b"mine")
        self.assertEqual(b"before", (self.root / NAME).read_bytes())
        write(self.root, b"mine")
        self.assertEqual(b"mine", (self.root / NAME).read_bytes())

    def test_is_written_each_minute_in_a_thread_one_at_a_time(self) -> None:
        clock, hands = Clock(), Hands()
        kept = KeptHistory(self.root, self.history, lambda: NOW, hands, clock)
        hands.idle = False
        kept.startService()
        self.assertEqual(0, len(hands.waiting))
        clock.advance(WRITE_SECONDS)
        clock.advance(WRITE_SECONDS)
        self.assertEqual(1, len(hands.waiting))
        hands.work_off()
        self.assertEqual(self.points(self.history), self.points(read(self.root, NOW)))
        kept.stopService()
        self.assertEqual([], clock.getDelayedCalls())

    def test_a_disk_that_fails_is_told_and_tried_again(self) -> None:
        clock = Clock()
        kept = KeptHistory(self.root / "gone", self.history, lambda: NOW, at_once, clock)
        kept.startService()
        with capturedLogs() as events:
            clock.advance(WRITE_SECONDS)
        self.assertIn("history failed", formatEvent(events[0]))
        (self.root / "gone").mkdir()
        clock.advance(WRITE_SECONDS)
        self.assertTrue((self.root / "gone" / NAME).exists())


class SamplerTests(SynchronousTestCase):
    def test_counts_content_alone_as_hits_and_misses(self) -> None:
        """
        Lists, refusals and health checks don't count for the cache; the bytes of all answers are traffic.
        """
        figures, clock, history = Figures("0"), Clock(), History()
        sampler = Sampler(history, figures, clock)
        sampler.startService()
        for words in ("blob HIT", "blob MISS", "manifest STALE", "tags BYPASS", "blob -"):
            route, cache = words.split()
            figures.served.requests.note((route, "GET", "200", cache, "-"), 0.1, 7)
        figures.upstream.note(("bucket", "206", "-"), 0.1, 3)
        clock.advance(SAMPLE_SECONDS)
        took = (0, 0, 3, *[0] * 6)
        self.assertEqual(Point(SAMPLE_SECONDS, asked=3, hits=2, sent=35, received=3, took=took), history.latest())
        sampler.stopService()
        self.assertEqual([], clock.getDelayedCalls())

    def test_adds_up_all_that_was_counted(self) -> None:
        self.assertEqual(Sample(), totals([], []))
