"""
Requests that are sent again while there is no answer.
"""

from __future__ import annotations

from contextvars import ContextVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.registry.hedging import Hedged

WHO: ContextVar[str] = ContextVar("who", default="nobody")


class HedgedTests(SynchronousTestCase):
    """
    L{Hedged}.
    """

    def setUp(self) -> None:
        """
        Start with nothing sent.
        """
        self.clock = Clock()
        self.sent: list[tuple[float, Deferred[str]]] = []
        self.given_up: list[int] = []
        self.senders: list[str] = []

    def send(self) -> Deferred[str]:
        """
        Send a request that is answered by hand.
        """
        number = len(self.sent)
        attempt: Deferred[str] = Deferred(lambda _: self.given_up.append(number))
        self.sent.append((self.clock.seconds(), attempt))
        self.senders.append(WHO.get())
        return attempt

    def ask(self, seconds: float = 25.0) -> Hedged[str]:
        """
        Send a request with a deadline.
        """
        return Hedged(self.send, seconds, self.clock.callLater, self.send)

    def pass_time(self, seconds: int) -> None:
        """
        Advance the clock, a second at a time.
        """
        self.clock.pump([1.0] * seconds)

    def answer(self, number: int) -> None:
        """
        Answer an attempt.
        """
        self.sent[number][1].callback(f"answer {number}")

    def lose(self, number: int) -> None:
        """
        Fail an attempt.
        """
        self.sent[number][1].errback(ConnectionRefusedError())

    def assertOver(self) -> None:
        """
        Nothing goes on.
        """
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_one_that_is_answered_in_time_is_sent_once(self) -> None:
        asked = self.ask()
        self.pass_time(4)
        self.answer(0)
        self.assertEqual("answer 0", self.successResultOf(asked.answer))
        self.assertEqual(1, len(self.sent))
        self.assertOver()

    def test_one_that_is_lost_is_sent_again(self) -> None:
        asked = self.ask()
        self.pass_time(5)
        self.answer(1)
        self.assertEqual("answer 1", self.successResultOf(asked.answer))
        self.assertEqual([0], self.given_up)
        self.assertOver()

    def test_the_answer_to_the_first_attempt_counts_however_late(self) -> None:
        """
        Where all answers take 20 s; meanwhile there are two attempts at a time, at most.
        """
        asked = self.ask()
        self.pass_time(20)
        self.assertEqual([0, 5, 15], [when for when, _ in self.sent])
        self.assertEqual([1], self.given_up)
        self.answer(0)
        self.assertEqual("answer 0", self.successResultOf(asked.answer))
        self.assertEqual([1, 2], self.given_up)
        self.assertOver()

    def test_the_deadline_ends_all_attempts(self) -> None:
        asked = self.ask()
        self.pass_time(24)
        self.assertNoResult(asked.answer)
        self.pass_time(1)
        self.failureResultOf(asked.answer, TimeoutError)
        self.assertTrue(asked.late)
        self.assertEqual([1, 0, 2], self.given_up)
        self.assertOver()

    def test_a_short_deadline_leaves_no_second_attempt(self) -> None:
        asked = self.ask(10.0)
        self.pass_time(10)
        self.failureResultOf(asked.answer, TimeoutError)
        self.assertEqual(1, len(self.sent))

    def test_a_failure_counts_once_no_attempt_is_under_way(self) -> None:
        asked = self.ask()
        self.pass_time(5)
        self.lose(0)
        self.assertNoResult(asked.answer)
        self.lose(1)
        self.failureResultOf(asked.answer, ConnectionRefusedError)
        self.assertOver()

    def test_one_that_fails_at_once_is_not_sent_again(self) -> None:
        asked = self.ask()
        self.lose(0)
        self.failureResultOf(asked.answer, ConnectionRefusedError)
        self.assertEqual(1, len(self.sent))
        self.assertOver()

    def test_a_failure_is_told_at_the_deadline(self) -> None:
        """
        It says more than that there was no answer.
        """
        asked = self.ask()
        self.pass_time(5)
        self.lose(1)
        self.pass_time(20)
        self.failureResultOf(asked.answer, ConnectionRefusedError)
        self.assertFalse(asked.late)

    def test_who_cancels_ends_all_attempts(self) -> None:
        asked = self.ask()
        self.pass_time(5)
        asked.answer.cancel()
        self.failureResultOf(asked.answer, CancelledError)
        self.assertEqual([0, 1], self.given_up)
        self.assertOver()

    def test_an_attempt_that_ends_as_cancelled_is_no_cancelled_request(self) -> None:
        """
        As where a pool closes: the caller would believe that it cancelled the request itself.
        """
        asked = self.ask()
        self.sent[0][1].errback(CancelledError())
        self.assertIsNone(self.failureResultOf(asked.answer).check(CancelledError))

    def test_each_attempt_is_sent_on_behalf_of_the_same_request(self) -> None:
        token = WHO.set("a client")
        asked = self.ask()
        WHO.reset(token)
        self.pass_time(15)
        self.assertEqual(["a client"] * 3, self.senders)
        asked.answer.cancel()
        self.failureResultOf(asked.answer)
