"""
What becomes of questions to ECR while it keeps failing.
"""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.task import Clock
from twisted.logger import formatEvent
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.registry.bucket import UnavailableError
from ecrproxy.registry.circuit import FAILURES, LONGEST_PAUSE, PAUSE, Circuit, CircuitOpenError, CircuitState
from tests.daemon import Reply
from tests.test_upstream import UpstreamTestCase

PROBLEM = UnavailableError(503, "UNAVAILABLE", "ECR answers 503")


class CircuitTests(SynchronousTestCase):
    """
    The switch by itself.
    """

    def setUp(self) -> None:
        self.clock = Clock()
        self.circuit = Circuit(self.clock.seconds)

    def open(self) -> None:
        """
        Let so many questions fail that it opens.
        """
        for _ in range(FAILURES):
            self.circuit.enter()
            self.circuit.failed(PROBLEM)

    def wait(self) -> str:
        """
        Have a question refused; say how long its asker is told to wait.
        """
        problem: CircuitOpenError = self.assertRaises(CircuitOpenError, self.circuit.enter)
        return problem.headers["Retry-After"]

    def test_some_failures_leave_it_closed(self) -> None:
        """
        Fewer failures than it takes, or answers between them, change nothing.
        """
        for _ in range(20):
            for _ in range(FAILURES - 1):
                self.circuit.failed(PROBLEM)
            self.assertFalse(self.circuit.enter())
            self.circuit.answered()
        self.assertIs(CircuitState.CLOSED, self.circuit.state)

    def test_failures_in_a_row_open_it(self) -> None:
        """
        Then no question goes until the pause is over, and each is told when that is.
        """
        self.open()
        self.assertIs(CircuitState.OPEN, self.circuit.state)
        self.assertEqual("5", self.wait())
        self.clock.advance(PAUSE - 0.5)
        self.assertEqual("1", self.wait())

    def test_one_probe_goes_at_a_time(self) -> None:
        """
        After the pause one question goes, and no other until it has ended.
        """
        self.open()
        self.clock.advance(PAUSE)
        self.circuit.check()
        self.assertTrue(self.circuit.enter())
        self.assertIs(CircuitState.PROBING, self.circuit.state)
        self.assertEqual("1", self.wait())

    def test_a_probe_that_is_answered_closes_it(self) -> None:
        """
        All questions go again, and it takes as many failures as before to open it.
        """
        self.open()
        self.clock.advance(PAUSE)
        self.circuit.enter()
        self.circuit.answered()
        for _ in range(FAILURES - 1):
            self.assertFalse(self.circuit.enter())
            self.circuit.failed(PROBLEM)
        self.assertIs(CircuitState.CLOSED, self.circuit.state)

    def test_probes_that_fail_make_the_pauses_longer(self) -> None:
        """
        Twice as long each time, up to a minute; after an answer they begin anew.
        """
        self.open()
        pauses = []
        for _ in range(6):
            pauses.append(int(self.wait()))
            self.clock.advance(pauses[-1])
            self.assertTrue(self.circuit.enter())
            self.circuit.probe_failed(PROBLEM)
        self.assertEqual([5, 10, 20, 40, 60, 60], pauses)
        self.clock.advance(LONGEST_PAUSE)
        self.circuit.enter()
        self.circuit.answered()
        self.open()
        self.assertEqual("5", self.wait())

    def test_a_probe_that_tells_nothing_makes_room_for_the_next(self) -> None:
        """
        When who asked leaves, the next to ask is the probe.
        """
        self.open()
        self.clock.advance(PAUSE)
        self.circuit.enter()
        self.circuit.probe_left()
        self.assertTrue(self.circuit.enter())

    def test_what_was_asked_before_it_opened_says_little(self) -> None:
        """
        A late failure neither makes the pause longer nor ends the probe; a late answer closes it.
        """
        self.open()
        self.clock.advance(PAUSE - 1)
        self.circuit.failed(PROBLEM)
        self.assertEqual("1", self.wait())
        self.clock.advance(1)
        self.circuit.enter()
        self.circuit.failed(PROBLEM)
        self.assertIs(CircuitState.PROBING, self.circuit.state)
        self.circuit.answered()
        self.assertIs(CircuitState.CLOSED, self.circuit.state)
        self.circuit.probe_failed(PROBLEM)
        self.circuit.probe_left()
        self.assertIs(CircuitState.CLOSED, self.circuit.state)


class FailingRegistryTests(UpstreamTestCase):
    """
    Clients of the daemon while ECR keeps failing.
    """

    path = "/v2/team/app/manifests/latest"

    def setUp(self) -> None:
        super().setUp()
        self.assertWhole(self.get(self.path), self.image.manifest)

    def blobs(self, count: int) -> list[Reply]:
        """
        Ask for blobs that nobody has, all at once.
        """
        digests = [self.standin.push_blob("team/app", b"%d" % number) for number in range(count)]
        replies = [self.daemon.send("GET", f"/v2/team/app/blobs/{digest}") for digest in digests]
        self.flush()
        return replies

    def open(self) -> None:
        """
        Let ECR fail until the circuit is open.
        """
        self.standin.fail("registry", status=500)
        for reply in self.blobs(FAILURES):
            self.assertRefused(reply, 502, "UNAVAILABLE")
        self.assertIs(CircuitState.OPEN, self.daemon.circuit.state)
        self.standin.forget_asked()

    def said(self) -> list[str]:
        """
        Give the log's lines about the circuit.
        """
        lines = [formatEvent(event) for event in self.events if event["log_namespace"] == "ecrproxy.registry.circuit"]
        return [line.partition(":")[0] for line in lines]

    def test_are_served_stale_content_at_once(self) -> None:
        """
        With an open circuit a known tag comes from the cache without a question, and without time.
        """
        self.open()
        self.assertWhole(self.get(self.path), self.image.manifest, "STALE")
        self.assertEqual(0, self.standin.count("registry"))

    def test_are_refused_the_rest_at_once(self) -> None:
        """
        What is not in the cache is 503 with Retry-After, without a question.
        """
        self.open()
        for path in (f"/v2/team/app/blobs/{self.digest}", "/v2/team/app/tags/list", "/v2/team/app/manifests/other"):
            reply = self.get(path)
            self.assertRefused(reply, 503, "UNAVAILABLE", "left alone")
            self.assertEqual("5", reply.header("Retry-After"))
        self.assertEqual(0, self.standin.count("registry"))

    def test_cost_one_probe_at_a_time(self) -> None:
        """
        Of many who ask after the pause one asks ECR, once; when it is answered, all do.
        """
        self.open()
        self.pass_time(PAUSE)
        self.blobs(50)
        self.assertEqual(1, self.standin.count("registry"))
        self.pass_time(PAUSE)
        self.blobs(50)
        self.assertEqual(1, self.standin.count("registry"))
        self.pass_time(PAUSE)
        self.standin.heal()
        self.assertEqual(1, [reply.code for reply in self.blobs(50)].count(200))
        self.assertEqual({200}, {reply.code for reply in self.blobs(50)})

    def test_are_told_of_in_one_line_a_change(self) -> None:
        """
        The log says when the circuit opens, opens again and closes, once each.
        """
        self.open()
        self.blobs(50)
        self.pass_time(PAUSE)
        self.blobs(50)
        self.pass_time(2 * PAUSE)
        self.standin.heal()
        self.blobs(1)
        alone = "ECR keeps failing, it is left alone for %d s"
        self.assertEqual([alone % 5, alone % 10, "ECR answers again"], self.said())

    def test_open_it_for_silence_and_connections_as_well(self) -> None:
        """
        Silence and connections that can't be made count as 5xx do.
        """
        self.standin.hang("registry")
        self.blobs(FAILURES)
        self.pass_time(31)
        self.assertIs(CircuitState.OPEN, self.daemon.circuit.state)
        self.start()
        self.daemon.back.down = ConnectionRefusedError()
        self.blobs(FAILURES)
        self.assertIs(CircuitState.OPEN, self.daemon.circuit.state)

    def test_do_not_open_it_for_refusals(self) -> None:
        """
        Throttling, refusals, odd answers and a bucket that fails say nothing against ECR.
        """
        for status in (400, 403, 404, 418, 429):
            fault = self.standin.fail("registry", status=status, headers={"WWW-Authenticate": "Basic"})
            self.blobs(20)
            fault.remove()
        for service in ("bucket", "registry"):
            fault = self.standin.fail(service, status=500 if service == "bucket" else 204)
            self.blobs(20)
            fault.remove()
        self.assertIs(CircuitState.CLOSED, self.daemon.circuit.state)

    def test_count_questions_and_not_tries(self) -> None:
        """
        One question's failed tries don't open it.
        """
        self.standin.fail("registry", status=500)
        self.blobs(FAILURES - 1)
        self.assertEqual(3 * (FAILURES - 1), self.standin.count("registry", "GET", "blobs"))
        self.assertIs(CircuitState.CLOSED, self.daemon.circuit.state)

    def test_wait_for_a_probe_five_seconds_at_most(self) -> None:
        """
        A client whose question happens to be the probe gets stale content after five seconds of silence.
        """
        self.open()
        self.standin.heal()
        self.standin.hang("registry")
        self.pass_time(PAUSE)
        reply = self.daemon.send("GET", self.path)
        self.pass_time(4)
        self.assertEqual(0, reply.code)
        self.pass_time(2)
        self.assertWhole(reply, self.image.manifest, "STALE")
        self.assertEqual(1, self.standin.count("registry"))

    def test_wait_for_no_second_try_of_a_probe(self) -> None:
        """
        A probe that fails is not tried again: stale content is served at once.
        """
        self.start(chance=1.0)
        self.standin.fail("registry", status=500)
        self.blobs(FAILURES)
        self.pass_time(4)
        self.assertIs(CircuitState.OPEN, self.daemon.circuit.state)
        self.pass_time(PAUSE)
        self.assertWhole(self.get(self.path), self.image.manifest, "STALE")

    def test_may_leave_while_theirs_is_the_probe(self) -> None:
        """
        When the probe's asker leaves, the next to ask is the probe.
        """
        self.open()
        self.standin.heal()
        self.standin.hang("registry", times=1)
        self.pass_time(PAUSE)
        asking: Deferred[object] = self.asking(self.daemon.upstream.manifest(self.tag, ""))
        asking.cancel()
        self.flush()
        self.failureResultOf(asking, CancelledError)
        self.assertWhole(self.get(self.path), self.image.manifest, "REVALIDATED")

    def test_closes_for_throttling(self) -> None:
        """
        A probe that is throttled was answered.
        """
        self.open()
        self.standin.heal()
        self.standin.throttle("registry", times=1, retry_after="17")
        self.pass_time(PAUSE)
        self.assertEqual(429, self.get("/v2/team/app/tags/list").code)
        self.assertIs(CircuitState.CLOSED, self.daemon.circuit.state)

    def test_leave_the_daemon_ready(self) -> None:
        """
        A daemon that serves its cache is ready, whatever ECR does.
        """
        self.open()
        self.assertEqual(200, self.get("/readyz").code)
