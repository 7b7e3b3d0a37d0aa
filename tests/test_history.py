"""
The last hour, in samples.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.admin.history import KEPT, SAMPLE_SECONDS, TOGETHER, History, Point, Sample, Sampler, stretches, totals
from ecrproxy.metrics import Figures


class HistoryTests(SynchronousTestCase):
    def test_a_point_tells_what_there_was_in_its_seconds(self) -> None:
        """
        Totals that grow become what was new in each stretch of time.
        """
        history = History()
        for turn in range(1, TOGETHER + 2):
            history.note(Sample(10 * turn, 5 * turn, 100 * turn, turn))
        whole = Point(TOGETHER * SAMPLE_SECONDS, 10 * TOGETHER, 5 * TOGETHER, 100 * TOGETHER, TOGETHER)
        begun = Point(SAMPLE_SECONDS, 10, 5, 100, 1)
        self.assertEqual((whole, begun), history.points())
        self.assertEqual(begun, history.latest())

    def test_before_the_first_sample_there_is_nothing(self) -> None:
        """
        A daemon that has just started has no history.
        """
        self.assertEqual((), History().points())
        self.assertEqual(Point(0), History().latest())

    def test_a_daemon_that_stood_still_has_a_gap(self) -> None:
        """
        The time that was missed counts, with nothing in it, however long it was.
        """
        history = History()
        history.note(Sample(1), turns=3)
        (point,) = history.points()
        self.assertEqual(Point(3 * SAMPLE_SECONDS, 1), point)
        history.note(Sample(2), turns=10**9)
        self.assertEqual(3600, sum(each.seconds for each in history.points()))

    @given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50)), min_size=1, max_size=300))
    def test_never_holds_more_than_an_hour(self, turns: list[tuple[int, int]]) -> None:
        """
        Whatever the turns were, no more is kept than an hour, and of the last hour nothing is lost.
        """
        history, total, passed = History(), 0, 0
        for more, missed in turns:
            total, passed = total + more, passed + missed
            history.note(Sample(total), missed)
        points = history.points()
        self.assertEqual(min(passed, KEPT) * SAMPLE_SECONDS, sum(each.seconds for each in points))
        self.assertLessEqual(len(points), KEPT // TOGETHER + 1)
        if passed <= KEPT:
            self.assertEqual(total, sum(each.asked for each in points))

    def test_points_add_up_to_longer_stretches(self) -> None:
        """
        The newest first, the oldest as long as what there is.
        """
        points = [Point(10, 1), *[Point(30, 2)] * 3]
        self.assertEqual([Point(60, 4), Point(40, 3)], list(stretches(points, 60)))


class SamplerTests(SynchronousTestCase):
    def test_counts_content_alone_as_hits_and_misses(self) -> None:
        """
        Lists, refusals and health checks are no question for the cache; the bytes of all answers are traffic.
        """
        figures, clock, history = Figures("0"), Clock(), History()
        sampler = Sampler(history, figures, clock)
        sampler.startService()
        for told in ("blob HIT", "blob MISS", "manifest STALE", "tags BYPASS", "blob -"):
            route, cache = told.split()
            figures.served.requests.note((route, "GET", "200", cache, "-"), 0.1, 7)
        figures.upstream.note(("bucket", "206", "-"), 0.1, 3)
        clock.advance(SAMPLE_SECONDS)
        self.assertEqual(Point(SAMPLE_SECONDS, asked=3, hits=2, sent=35, received=3), history.latest())
        sampler.stopService()
        self.assertEqual([], clock.getDelayedCalls())

    def test_adds_up_all_that_was_counted(self) -> None:
        """
        Nothing counted is nothing.
        """
        self.assertEqual(Sample(), totals([], []))
