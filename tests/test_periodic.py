"""
Periodic tasks go on after a failure.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, cast

from twisted.application.service import Service
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.access.passwords import Passwords
from ecrproxy.admin.history import History, Sampler
from ecrproxy.cache.index import Index
from ecrproxy.cache.purge_log import News
from ecrproxy.cache.purges import LOOK_SECONDS, Purges
from ecrproxy.daemon.renewal import Renewal
from ecrproxy.daemon.supervision import Supervised, Supervisor
from ecrproxy.metrics import Figures
from ecrproxy.oci import Digest
from ecrproxy.periodic import Periodic
from ecrproxy.registry.ecr import Token, TokenService
from ecrproxy.workers.channel import Channel
from ecrproxy.workers.messages import FromParent
from ecrproxy.workers.worker import Reports
from tests.daemon import at_once
from tests.store_contract import START, scratch
from tests.test_htpasswd import line


class FailingOnce:
    """
    A dependency whose first call fails.
    """

    def __init__(self, returns: object = None) -> None:
        self.calls, self._returns = 0, returns

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """
        Fail, the first time.
        """
        self.calls += 1
        if self.calls == 1:
            raise OSError(errno.EIO, "Input/output error")
        return self._returns


class FailingThread(FailingOnce):
    """
    Threads whose first call fails.
    """

    def __call__(self, *args: object, **kwargs: object) -> Deferred[Any]:
        """
        Fail as a thread does.
        """
        try:
            return succeed(super().__call__())
        except OSError:
            return fail()


class PeriodicTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock, self.outcomes, self.calls = Clock(), list[Any](), list[tuple[int, ...]]()

    def turn(self, *count: int) -> Any:
        self.calls.append(count)
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def test_goes_on_whatever_way_a_turn_fails(self) -> None:
        async def failing() -> None:
            raise ValueError("in a coroutine")

        self.outcomes = [OSError(errno.EIO, "at once"), fail(TimeoutError("later")), failing()]
        periodic = Periodic("Looking", self.turn, self.clock)
        with capturedLogs() as events:
            periodic.start(1.0)
            self.clock.pump([1.0] * 4)
        self.assertEqual(5, len(self.calls))
        self.assertEqual(["Looking"] * 3, [event["once"] for event in events])
        self.assertIn("at once", formatEvent(events[0]) or "")
        self.assertEqual(1, len(self.flushLoggedErrors(ValueError)))

    def test_a_turn_waits_for_the_last(self) -> None:
        slow: Deferred[None] = Deferred()
        self.outcomes = [slow]
        Periodic("Looking", self.turn, self.clock).start(1.0)
        self.clock.pump([1.0] * 3)
        self.assertEqual(1, len(self.calls))
        slow.callback(None)
        self.clock.advance(1.0)
        self.assertEqual(2, len(self.calls))

    def test_turns_that_were_missed_are_counted(self) -> None:
        self.outcomes = [ValueError("once")]
        Periodic("Counting", self.turn, self.clock, counted=True).start(1.0, now=False)
        self.clock.advance(1.0)
        self.clock.advance(3.0)
        self.assertEqual([(1,), (3,)], self.calls)
        self.flushLoggedErrors(ValueError)

    def test_stops_with_no_call_left_and_need_not_have_begun(self) -> None:
        periodic = Periodic("Looking", self.turn, self.clock)
        periodic.stop()
        periodic.start(1.0)
        periodic.stop()
        self.assertEqual([], self.clock.getDelayedCalls())


class PartsTests(SynchronousTestCase):
    """
    Each part with a periodic task repeats it after a failure.
    """

    def assert_goes_on(self, part: Service, dependency: FailingOnce, clock: Clock) -> None:
        """
        Assert that C{part} repeats the call that failed.
        """
        part.startService()
        clock.pump([1.0] * 130)
        self.assertGreater(dependency.calls, 1)
        part.stopService()
        self.flushLoggedErrors()

    def test_purges_are_looked_for(self) -> None:
        clock, thread = Clock(), FailingThread(News())
        index = Index(scratch(self), lambda: START, memory=True)
        self.assert_goes_on(Purges(index, lambda _: None, thread, clock), thread, clock)

    def test_samples_are_taken(self) -> None:
        clock, failing, history = Clock(), FailingOnce(), History()
        self.patch(history, "note", failing)
        self.assert_goes_on(Sampler(history, Figures("1"), clock), failing, clock)

    def test_certificates_are_looked_for(self) -> None:
        clock, thread = Clock(), FailingThread([False])
        self.assert_goes_on(Renewal([], thread, lambda: None, clock), thread, clock)

    def test_passwords_are_looked_for(self) -> None:
        clock, thread, path = Clock(), FailingThread(), Path(str(scratch(self)) + ".htpasswd")
        path.write_bytes(line("ann", "one"))
        passwords = Passwords(str(path), thread, clock, b"key")
        self.assert_goes_on(passwords, thread, clock)

    def test_the_service_manager_is_told(self) -> None:
        reactor, tell = MemoryReactorClock(), FailingOnce()

        class Manager:
            beat, patience = 1.0, None

            def tell(self, message: object) -> None:
                tell(message)

        async def describe() -> str:
            return "Ready"

        supervised = Supervised(cast("Supervisor", Manager()), describe, reactor)
        reactor.run()
        self.assert_goes_on(supervised, tell, reactor)

    def test_the_parent_is_told(self) -> None:
        reactor, failing = MemoryReactorClock(), FailingOnce([])

        class Noted:
            def take(self) -> Any:
                return failing()

        incidents: Any = Noted()
        nothing: Any = None
        reactor.run()
        reports = Reports(
            Channel(FromParent),
            Figures("0"),
            incidents,
            readiness=nothing,
            standing=nothing,
            reread=nothing,
            reload=nothing,
            prefetch=nothing,
            orphaned=nothing,
            reactor=reactor,
        )
        self.assert_goes_on(reports, failing, reactor)

    def test_a_due_token_is_looked_for(self) -> None:
        clock, now = Clock(), FailingOnce(START)
        now.calls = -1  # the first one sets the token's lifetime
        service = TokenService(lambda: succeed(Token("token", START + 3600)), clock, now)
        self.assert_goes_on(service, now, clock)


class PurgesTests(SynchronousTestCase):
    def test_all_is_forgotten_once_the_disk_answers_again(self) -> None:
        """
        Content may have been purged meanwhile: its state proves nothing.
        """
        clock, hung, forgotten = Clock(), list[bool](), list[News]()
        index = Index(scratch(self), lambda: START, memory=True)

        in_thread: Any = lambda *call: fail(TimeoutError("it does not answer")) if hung else at_once(*call)  # noqa: E731
        purges = Purges(index, forgotten.append, in_thread, clock)
        purges.startService()
        hung.append(True)
        clock.pump([LOOK_SECONDS] * 5)
        self.assertEqual([], forgotten)
        hung.clear()
        clock.advance(LOOK_SECONDS)
        self.assertEqual([News(everything=True)], forgotten)
        index.purge([], [Digest.of(b"x")])
        clock.pump([LOOK_SECONDS] * 3)
        self.assertEqual([News(purged=[Digest.of(b"x")])], forgotten[1:])
        purges.stopService()
        self.flushLoggedErrors()
