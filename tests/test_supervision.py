"""
The service manager is notified when the daemon is ready, alive, reloading and stopping, and of its status.
"""

from __future__ import annotations

from collections.abc import Sequence

from twisted.internet.defer import Deferred, succeed
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.daemon.supervision import BEAT_SECONDS, Supervised, Supervisor, summary
from ecrproxy.readiness import Readiness

GIB = 2**30


class Recorded(Supervisor):
    """
    A service manager that records its notifications.
    """

    def __init__(self, patience: float | None = None) -> None:
        super().__init__("@nowhere", patience)
        self.messages: list[list[str]] = []

    def tell(self, message: Sequence[str]) -> None:
        """
        Record a message.
        """
        self.messages.append(list(message))


class SupervisorTests(SynchronousTestCase):
    """
    The service manager's variables.
    """

    def read(self, **environ: str) -> Supervisor | None:
        """
        Read them as process 7.
        """
        return Supervisor.from_environ(environ, 7)

    def read_patience(self, **environ: str) -> float | None:
        """
        Read the watchdog's time.
        """
        found = self.read(NOTIFY_SOCKET="/run/systemd/notify", **environ)
        assert found is not None
        return found.patience

    def test_none_is_told_nothing(self) -> None:
        """
        Without a socket, or with one of an unknown kind.
        """
        self.assertEqual([None, None, None], [self.read(), self.read(NOTIFY_SOCKET=""), self.read(NOTIFY_SOCKET="x:1")])

    def test_the_watchdog_is_that_of_this_process(self) -> None:
        """
        Its time is in microseconds, for one process.
        """
        self.assertEqual(30.0, self.read_patience(WATCHDOG_USEC="30000000", WATCHDOG_PID="7"))
        self.assertEqual(0.5, self.read_patience(WATCHDOG_USEC="500000"))
        self.assertIsNone(self.read_patience(WATCHDOG_USEC="30000000", WATCHDOG_PID="8"))

    def test_without_a_watchdog_there_is_no_time(self) -> None:
        """
        None, nothing or nonsense is no watchdog.
        """
        found = [
            self.read_patience(**each)
            for each in ({}, *({"WATCHDOG_USEC": text} for text in ("", "0", "-1", "x", "9" * 5000, "\u0663")))
        ]
        self.assertEqual([None] * 7, found)

    def test_nobody_there_is_no_trouble(self) -> None:
        """
        A message without a receiver is lost, and nothing else happens.
        """
        Supervisor("/nowhere/notify").tell(["READY=1"])
        Supervisor("@nowhere/notify").tell(["READY=1"])


class SupervisedTests(SynchronousTestCase):
    """
    A daemon with a service manager.
    """

    def setUp(self) -> None:
        self.reactor = MemoryReactorClock()
        self.said = "Ready"
        self.start(Recorded(patience=8.0))

    def start(self, supervisor: Recorded) -> None:
        """
        Start under this one.
        """
        self.supervisor = supervisor
        self.supervised = Supervised(supervisor, self.describe, self.reactor, monotonic=self.reactor.seconds)
        self.supervised.startService()

    async def describe(self) -> str:
        """
        Describe the daemon's state.
        """
        return self.said

    def test_it_is_ready_once_all_that_it_waits_for_is(self) -> None:
        """
        All workers have to listen; a daemon that ends before that says so, and is never ready.
        """
        for ends in (False, True):
            ready, supervisor = Deferred[None](), Recorded(patience=8.0)
            self.reactor = MemoryReactorClock()
            Supervised(supervisor, self.describe, self.reactor, ready).startService()
            self.run_reactor()
            self.reactor.advance(100)
            self.assertEqual([], supervisor.messages)
            if ends:
                self.end()
                self.assertIn("STOPPING=1", supervisor.messages[-1])
            else:
                ready.callback(None)
                self.assertIn("READY=1", supervisor.messages[0])

    def run_reactor(self) -> None:
        """
        Let the reactor start.
        """
        self.reactor.run()

    def end(self) -> None:
        """
        Have the reactor announce its end.
        """
        for call, args, kwargs in self.reactor.triggers["before"]["shutdown"]:
            call(*args, **kwargs)

    def test_is_ready_once_the_reactor_runs(self) -> None:
        """
        By then the ports are bound, and connections are accepted.
        """
        self.assertEqual([], self.supervisor.messages)
        self.run_reactor()
        self.assertEqual(["READY=1", "STATUS=Accepts connections", "WATCHDOG=1"], self.supervisor.messages[0])

    def test_its_status_follows(self) -> None:
        """
        At once if it has changed, in one line whatever it says.
        """
        self.run_reactor()
        self.assertEqual("STATUS=Ready", self.supervisor.messages[-1][1])
        self.said = "no token: AWS\nis away"
        self.reactor.advance(4.0)
        self.assertEqual("STATUS=no token: AWS is away", self.supervisor.messages[-1][1])

    def test_tells_the_watchdog_twice_in_its_time(self) -> None:
        """
        Each punctual turn of the event loop notifies.
        """
        self.run_reactor()
        before = len(self.supervisor.messages)
        self.reactor.pump([4.0] * 5)
        told = self.supervisor.messages[before:]
        self.assertEqual([["READY=1", "STATUS=Ready", "WATCHDOG=1"]] * 5, told)

    def test_without_a_watchdog_tells_its_state_alone(self) -> None:
        """
        Now and then, for the service manager may have been too busy to receive it.
        """
        self.start(Recorded())
        self.run_reactor()
        del self.supervisor.messages[:]
        self.reactor.advance(BEAT_SECONDS)
        self.assertEqual([["READY=1", "STATUS=Ready"]], self.supervisor.messages)

    def test_a_disk_that_hangs_does_not_silence_it(self) -> None:
        """
        Its status is old then, and it is still alive; the status is requested once, not again and again.
        """
        asked: list[Deferred[str]] = []

        def describe() -> Deferred[str]:
            asked.append(Deferred())
            return asked[-1]

        self.supervised = Supervised(self.supervisor, describe, self.reactor)
        self.supervised.startService()
        self.run_reactor()
        del self.supervisor.messages[:]
        self.supervised._beat()  # noqa: SLF001 (the other one has beats as well)
        self.assertEqual([["READY=1", "STATUS=Accepts connections", "WATCHDOG=1"]], self.supervisor.messages)
        self.assertEqual(1, len(asked))
        asked[0].callback("Ready")
        self.assertEqual("STATUS=Ready", self.supervisor.messages[-1][1])

    def test_what_can_not_be_described_ends_nothing(self) -> None:
        """
        It is one error in the log; the next beat tries again.
        """

        async def fail() -> str:
            raise RuntimeError("of no kind that is known")

        self.supervised._describe = fail  # noqa: SLF001
        self.run_reactor()
        self.reactor.advance(4.0)
        self.assertEqual(2, len(self.flushLoggedErrors(RuntimeError)))
        self.supervised._describe = self.describe  # noqa: SLF001
        self.reactor.advance(4.0)
        self.assertEqual("STATUS=Ready", self.supervisor.messages[-1][1])

    def test_reading_again_has_a_beginning_and_an_end(self) -> None:
        """
        The beginning has the monotonic time, as Type=notify-reload requires.
        """
        self.run_reactor()
        self.reactor.advance(1.5)
        del self.supervisor.messages[:]
        reading = Deferred[None]()
        self.supervised.rereading(lambda: reading)
        began = ["RELOADING=1", "MONOTONIC_USEC=1500000", "STATUS=Ready", "WATCHDOG=1"]
        self.assertEqual([began], self.supervisor.messages)
        reading.callback(None)
        self.assertEqual([began, ["READY=1", "STATUS=Ready", "WATCHDOG=1"]], self.supervisor.messages)

    def test_is_ready_once_all_readings_are_done(self) -> None:
        """
        Each beginning is sent with its time: a service manager waits for one that is later than its signal.
        """
        self.run_reactor()
        del self.supervisor.messages[:]
        readings = [Deferred[None](), Deferred[None]()]
        for each in readings:
            self.reactor.advance(1)
            self.supervised.rereading(lambda each=each: each)  # type: ignore[misc]
        began = [each[:2] for each in self.supervisor.messages]
        self.assertEqual([["RELOADING=1", f"MONOTONIC_USEC={at}000000"] for at in (1, 2)], began)
        readings[0].callback(None)
        self.assertEqual(2, len(self.supervisor.messages))
        readings[1].callback(None)
        self.assertEqual("READY=1", self.supervisor.messages[-1][0])

    def test_reading_again_makes_nothing_ready_that_was_not(self) -> None:
        """
        SIGHUP may come while workers start.
        """
        ready, supervisor, reactor = Deferred[None](), Recorded(), MemoryReactorClock()
        supervised = Supervised(supervisor, self.describe, reactor, ready)
        supervised.startService()
        reactor.run()
        supervised.rereading(lambda: succeed(None))
        self.assertEqual([], supervisor.messages)
        ready.callback(None)
        self.assertEqual("READY=1", supervisor.messages[0][0])

    def test_an_end_during_a_reading_is_one(self) -> None:
        self.run_reactor()
        reading = Deferred[None]()
        self.supervised.rereading(lambda: reading)
        self.end()
        reading.callback(None)
        self.assertEqual("STOPPING=1", self.supervisor.messages[-1][0])

    def test_is_ready_again_whatever_came_of_reading(self) -> None:
        """
        An unexpected error does not leave it reloading for ever.
        """

        def fail() -> Deferred[None]:
            raise RuntimeError("of no kind that is known")

        self.run_reactor()
        self.supervised.rereading(fail)
        self.assertEqual(1, len(self.flushLoggedErrors(RuntimeError)))
        self.assertEqual("READY=1", self.supervisor.messages[-1][0])

    def test_tells_that_it_ends_and_is_alive_meanwhile(self) -> None:
        """
        The watchdog does not cut short responses; a reload no longer makes it ready.
        """
        self.run_reactor()
        self.end()
        self.assertEqual(["STOPPING=1", "STATUS=Ready", "WATCHDOG=1"], self.supervisor.messages[-1])
        self.said = "draining"
        self.reactor.advance(4.0)
        self.supervised.rereading(lambda: succeed(None))
        self.assertEqual(["STOPPING=1", "STATUS=draining", "WATCHDOG=1"], self.supervisor.messages[-1])
        self.supervised.stopService()
        self.assertEqual([], self.reactor.getDelayedCalls())

    def test_without_a_service_manager_nothing_is_told(self) -> None:
        """
        And SIGHUP still works.
        """
        reactor = MemoryReactorClock()
        supervised = Supervised(None, self.describe, reactor)
        supervised.startService()
        read: list[bool] = []
        supervised.rereading(lambda: succeed(True).addCallback(read.append))
        reactor.run()
        supervised.stopService()
        self.assertEqual(([True], []), (read, reactor.getDelayedCalls()))

    def test_an_end_before_the_beginning_is_one(self) -> None:
        """
        A service that is stopped before the reactor runs sends nothing.
        """
        self.supervised.stopService()
        self.run_reactor()
        self.assertEqual([], self.supervisor.messages)


WELL = Readiness(can_serve=True, can_fetch=True, reasons=())


class SummaryTests(SynchronousTestCase):
    """
    What an operator reads in systemctl status.
    """

    def test_says_how_full_the_cache_is(self) -> None:
        """
        In GiB, with the limit.
        """
        self.assertEqual("Ready; the cache holds 12.3 of 64.0 GiB", summary(WELL, int(12.3 * GIB), 64 * GIB))

    def test_says_what_keeps_it_from_its_work(self) -> None:
        """
        In the words of /readyz.
        """
        reasons = "no token: AWS has not answered yet", "draining: the daemon ends"
        said = summary(Readiness(can_serve=False, can_fetch=False, reasons=reasons), 0, GIB)
        self.assertEqual(
            "no token: AWS has not answered yet; draining: the daemon ends; the cache holds 0.0 of 1.0 GiB", said
        )

    def test_says_what_is_wrong_although_it_serves(self) -> None:
        said = summary(Readiness(can_serve=True, can_fetch=False, reasons=("no token: AWS is down",)), GIB, GIB)
        self.assertEqual("Ready, but no token: AWS is down; the cache holds 1.0 of 1.0 GiB", said)
