"""
Event-loop stalls.
"""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.metrics import STALL_SECONDS, TICK_SECONDS, LoopStall


class LoopStallTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1000)
        self.stall = LoopStall(self.clock, self.clock.seconds)

    def run_for(self, seconds: float) -> None:
        """
        Run the loop without a stall.
        """
        self.clock.pump([TICK_SECONDS] * round(seconds / TICK_SECONDS))

    def test_is_nothing_while_all_turns_come_in_time(self) -> None:
        """
        An idle loop does not stall, however long the daemon had run before.
        """
        self.stall.startService()
        self.run_for(10)
        self.assertAlmostEqual(0, self.stall.longest)

    def test_is_the_longest(self) -> None:
        """
        The longest delay of a turn is kept; shorter ones later do not count, longer ones do.
        """
        self.stall.startService()
        for late, longest in ((0.05, 0.05), (0.5, 0.5), (0.2, 0.5), (0.7, 0.7)):
            self.clock.advance(TICK_SECONDS + late)
            self.run_for(1)
            self.assertAlmostEqual(longest, self.stall.longest)

    def test_is_told_for_some_minutes_and_no_longer(self) -> None:
        """
        Alerts use it: one pause must not page somebody for as long as the daemon runs.
        """
        self.stall.startService()
        self.clock.advance(TICK_SECONDS + 2)
        self.run_for(STALL_SECONDS)
        self.assertAlmostEqual(2, self.stall.lately)
        self.run_for(STALL_SECONDS + 1)
        self.assertAlmostEqual(0, self.stall.lately)
        self.assertAlmostEqual(2, self.stall.longest)

    def test_is_not_measured_after_the_end(self) -> None:
        self.stall.startService()
        self.clock.advance(TICK_SECONDS + 0.25)
        self.stall.stopService()
        self.assertAlmostEqual(0.25, self.stall.longest)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_may_be_started_again(self) -> None:
        """
        The time between an end and a new start is no stall.
        """
        for _ in range(2):
            self.stall.startService()
            self.run_for(1)
            self.stall.stopService()
            self.clock.advance(60)
        self.assertAlmostEqual(0, self.stall.longest)
