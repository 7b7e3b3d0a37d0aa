"""
Looks at other processes' transfers.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.record import POLL_SECONDS, Look
from ecrproxy.transfer.looks import Looks
from tests.daemon import Hands
from tests.store_contract import failing

LOOK = Look(None)


class Transfer:
    """
    A transfer that looks like nothing, or can't be looked at.
    """

    def __init__(self, look: Callable[[], Look] = lambda: LOOK) -> None:
        self.look = look


class LooksTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock, self.hands = Clock(), Hands()
        self.hands.idle = False
        self.looks = Looks(self.hands, self.clock.callLater)

    def at(self, count: int, **options: Any) -> list[Deferred[Look]]:
        return [self.looks.at(Transfer(**options)) for _ in range(count)]

    def test_any_number_costs_one_call_a_look(self) -> None:
        """
        Many followed transfers don't keep the threads from other reads.
        """
        for _ in range(3):
            found = self.at(100)
            self.assertEqual(0, len(self.hands.waiting))
            self.clock.advance(POLL_SECONDS)
            self.assertEqual(1, len(self.hands.waiting))
            self.hands.work()
            self.assertEqual([LOOK] * 100, [self.successResultOf(each) for each in found])
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_one_that_can_not_be_looked_at_is_no_matter_to_the_others(self) -> None:
        (bad,), (good,) = self.at(1, look=failing(errno.EIO)), self.at(1)
        self.clock.advance(POLL_SECONDS)
        self.hands.work()
        self.failureResultOf(bad, OSError)
        self.successResultOf(good)

    def test_a_disk_that_does_not_answer_fails_them_all(self) -> None:
        found = self.at(3)
        self.clock.advance(POLL_SECONDS)
        done, *_ = self.hands.waiting.popleft()
        done.errback(TimeoutError())
        for each in found:
            self.failureResultOf(each, TimeoutError)

    def test_who_comes_while_a_look_takes_long_is_in_the_next(self) -> None:
        first = self.at(1)
        self.clock.advance(POLL_SECONDS)
        second = self.at(1)
        self.clock.advance(POLL_SECONDS)
        self.hands.work_off()
        for each in (*first, *second):
            self.successResultOf(each)
