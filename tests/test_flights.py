"""
One fetch in flight for a key, however many callers wait.
"""

from __future__ import annotations

import gc
import weakref

from twisted.internet.defer import CancelledError, Deferred, fail
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.flights import DeadlineExceededError, Flights, within
from ecrproxy.oci import RegistryError


class FlightsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.flights: Flights[str] = Flights()
        self.landing: list[Deferred[str]] = []

    async def fetch(self) -> str:
        self.landing.append(Deferred())
        return await self.landing[-1]

    def test_one_fetch_serves_all_who_wait(self) -> None:
        waiting = [self.flights.join("x", self.fetch) for _ in range(3)]
        self.assertEqual(1, len(self.landing))
        self.assertIn("x", self.flights)
        self.landing[0].callback("blob")
        self.assertEqual(["blob"] * 3, [self.successResultOf(each) for each in waiting])
        self.assertNotIn("x", self.flights)

    def test_other_things_are_other_flights(self) -> None:
        x, y = self.flights.join("x", self.fetch), self.flights.join("y", self.fetch)
        self.landing[1].callback("of y")
        self.assertNoResult(x)
        self.assertEqual("of y", self.successResultOf(y))

    def test_a_failure_is_everybodys(self) -> None:
        """
        A fetch that fails fails for all that wait.
        """
        waiting = [self.flights.join("x", self.fetch) for _ in range(2)]
        self.landing[0].errback(ZeroDivisionError())
        for each in waiting:
            self.failureResultOf(each, ZeroDivisionError)

    def test_a_refusal_keeps_nothing_of_what_was_fetched(self) -> None:
        """
        A failure that was awaited is a cycle with its frames, and so with what these have fetched.
        """

        class Fetched:
            pass

        seen = []

        async def fetch() -> str:
            fetched = Fetched()
            seen.append(weakref.ref(fetched))
            parsed: Deferred[str] = fail(ValueError("no manifest"))
            try:
                return await parsed
            except ValueError:
                raise RegistryError(502, "UNAVAILABLE", "no manifest") from None

        async def ask() -> str:
            return await flights.join("x", fetch)

        flights: Flights[str] = Flights(foreseen=RegistryError)
        gc.disable()
        self.addCleanup(gc.enable)
        self.failureResultOf(Deferred.fromCoroutine(ask()), RegistryError)
        self.assertIsNone(seen[0]())

    def test_who_leaves_ends_only_its_own_waiting(self) -> None:
        """
        A caller that cancels, the first one too, leaves the fetch to the others.
        """
        gone, kept = self.flights.join("x", self.fetch), self.flights.join("x", self.fetch)
        gone.cancel()
        self.failureResultOf(gone, CancelledError)
        self.landing[0].callback("blob")
        self.assertEqual("blob", self.successResultOf(kept))

    def test_lands_with_nobody_waiting(self) -> None:
        """
        The fetch goes on after the last caller has cancelled; its failure is no error.
        """
        for problem in (None, ZeroDivisionError()):
            self.flights.join("x", self.fetch).addErrback(lambda failure: failure.trap(CancelledError)).cancel()
            self.assertIn("x", self.flights)
            if problem is None:
                self.landing[-1].callback("blob")
            else:
                self.landing[-1].errback(problem)
            self.assertNotIn("x", self.flights)

    def test_after_landing_the_next_is_a_new_one(self) -> None:
        """
        Results are not kept: a later call is another fetch, even from within a callback.
        """
        again: list[Deferred[str]] = []
        self.flights.join("x", self.fetch).addCallback(lambda _: again.append(self.flights.join("x", self.fetch)))
        self.landing[0].callback("old")
        self.assertEqual(2, len(self.landing))
        self.landing[1].callback("new")
        self.assertEqual("new", self.successResultOf(again[0]))

    def test_who_leaves_while_another_is_answered(self) -> None:
        """
        A callback may cancel another caller; the rest are still answered.
        """
        first, second, third = (self.flights.join("x", self.fetch) for _ in range(3))
        first.addCallback(lambda _: second.cancel())
        self.landing[0].callback("blob")
        self.failureResultOf(second, CancelledError)
        self.assertEqual("blob", self.successResultOf(third))

    def test_what_nobody_waits_for_goes_on(self) -> None:
        gone = self.flights.join("x", self.fetch)
        gone.cancel()
        self.failureResultOf(gone, CancelledError)
        self.assertFalse(self.landing[0].called)
        self.assertIn("x", self.flights)

    def test_or_is_cancelled_and_begun_anew_for_whoever_comes(self) -> None:
        self.flights = Flights(abandons=True)
        first, second = self.flights.join("x", self.fetch), self.flights.join("x", self.fetch)
        first.cancel()
        self.assertFalse(self.landing[0].called)
        second.cancel()
        self.assertTrue(self.landing[0].called)
        self.assertNotIn("x", self.flights)
        for each in (first, second):
            self.failureResultOf(each, CancelledError)
        third = self.flights.join("x", self.fetch)
        self.landing[1].callback("blob")
        self.assertEqual("blob", self.successResultOf(third))


class WithinTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock, self.coming, self.done = Clock(), Deferred[str](), list[str]()

    async def work(self) -> str:
        self.done.append(await self.coming)
        return "done"

    def wait(self) -> Deferred[str]:
        return within(5, self.work(), self.clock.callLater)

    def test_gives_what_comes_in_time(self) -> None:
        waiting = self.wait()
        self.clock.advance(4.9)
        self.coming.callback("x")
        self.assertEqual("done", self.successResultOf(waiting))
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_passes_on_what_fails_in_time(self) -> None:
        waiting = self.wait()
        self.coming.errback(ZeroDivisionError())
        self.failureResultOf(waiting, ZeroDivisionError)

    def test_what_is_late_goes_on(self) -> None:
        waiting = self.wait()
        self.clock.advance(5)
        self.failureResultOf(waiting, DeadlineExceededError)
        self.coming.callback("x")
        self.assertEqual(["x"], self.done)

    def test_what_fails_late_is_no_error_of_anybody(self) -> None:
        waiting = self.wait()
        self.clock.advance(5)
        self.failureResultOf(waiting, DeadlineExceededError)
        self.coming.errback(ZeroDivisionError())
        self.assertEqual([], self.flushLoggedErrors())

    def test_work_that_does_not_end_at_once_holds_up_nobody_who_leaves(self) -> None:
        more: Deferred[None] = Deferred()

        async def stubborn() -> str:
            try:
                return await self.coming
            except CancelledError:
                await more
                raise

        waiting = within(5, stubborn(), self.clock.callLater)
        waiting.cancel()
        self.failureResultOf(waiting, CancelledError)
        self.clock.advance(5)  # no second outcome
        more.callback(None)
        self.assertEqual([], self.flushLoggedErrors())

    def test_nothing_is_left_of_one_who_leaves(self) -> None:
        """
        Clients may come and go by the thousand while ECR is silent.
        """
        waiting = self.wait()
        waiting.cancel()
        self.failureResultOf(waiting, CancelledError)
        self.assertEqual([], self.clock.getDelayedCalls())
        self.assertTrue(self.coming.called)
        self.assertEqual([], self.done)
