"""
The circuit breaker for requests to ECR.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from twisted.internet.defer import CancelledError, Deferred, fail
from twisted.internet.error import ConnectionRefusedError, DNSLookupError
from twisted.internet.task import Clock
from twisted.logger import formatEvent
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.iweb import IAgent, IResponse

from ecrproxy.oci import RegistryError
from ecrproxy.registry.circuit import (
    ANSWER_SECONDS,
    FAILURES,
    KEPT,
    LONGEST_PAUSE,
    PAUSE,
    REPOSITORIES,
    Circuit,
    CircuitOpenError,
    CircuitState,
    Switch,
)
from ecrproxy.registry.endpoint import PROBE_SECONDS
from ecrproxy.registry.retries import TransientError
from tests.daemon import Network, Reply
from tests.test_upstream import UpstreamTestCase

PROBLEM = TransientError(503, "UNAVAILABLE", "ECR answers 503")
UNREACHED = TransientError(502, "UNAVAILABLE", "ECR can't be reached")
UNREACHED.reached = False


class SwitchTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.circuit = Switch("ECR", self.clock.seconds)

    def open(self) -> None:
        """
        Fail as many requests as it takes to open it.
        """
        for _ in range(FAILURES):
            self.circuit.enter()
            self.circuit.failed(PROBLEM)

    def wait(self) -> str:
        """
        Have a request rejected; return the wait that is reported.
        """
        problem: CircuitOpenError = self.assertRaises(CircuitOpenError, self.circuit.enter)
        return problem.headers["Retry-After"]

    def test_some_failures_leave_it_closed(self) -> None:
        """
        Fewer failures than the limit, or answers between them, change nothing.
        """
        for _ in range(20):
            for _ in range(FAILURES - 1):
                self.circuit.failed(PROBLEM)
            self.assertFalse(self.circuit.enter())
            self.circuit.answered()
        self.assertIs(CircuitState.CLOSED, self.circuit.state)

    def test_failures_in_a_row_open_it(self) -> None:
        """
        Then no request goes out until the pause is over, and each rejection says when that is.
        """
        self.open()
        self.assertIs(CircuitState.OPEN, self.circuit.state)
        self.assertEqual("5", self.wait())
        self.clock.advance(PAUSE - 0.5)
        self.assertEqual("1", self.wait())

    def test_one_probe_goes_at_a_time(self) -> None:
        """
        After the pause one request goes out, and no other until it has ended.
        """
        self.open()
        self.clock.advance(PAUSE)
        self.circuit.check()
        self.assertTrue(self.circuit.enter())
        self.assertIs(CircuitState.PROBING, self.circuit.state)
        self.assertEqual("1", self.wait())

    def test_a_probe_that_is_answered_closes_it(self) -> None:
        """
        All requests go out again, and the count of failures starts again.
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
        Twice as long each time, up to 20 s; after an answer they start again.
        """
        self.open()
        pauses = []
        for _ in range(6):
            pauses.append(int(self.wait()))
            self.clock.advance(pauses[-1])
            self.assertTrue(self.circuit.enter())
            self.circuit.probe_failed(PROBLEM)
        self.assertEqual([5, 10, 20, 20, 20, 20], pauses)
        self.clock.advance(LONGEST_PAUSE)
        self.circuit.enter()
        self.circuit.answered()
        self.open()
        self.assertEqual("5", self.wait())

    def test_pauses_stay_short_while_nothing_is_reached(self) -> None:
        self.open()
        for problem, pause in ((UNREACHED, 5), (UNREACHED, 5), (PROBLEM, 5), (PROBLEM, 10), (UNREACHED, 5)):
            self.clock.advance(LONGEST_PAUSE)
            self.assertTrue(self.circuit.enter())
            self.circuit.probe_failed(problem)
            self.assertEqual(str(pause), self.wait())

    def test_pauses_grow_until_a_question_is_answered(self) -> None:
        """
        An answer to the daemon's own probe lets requests through, but says little about their outcome.
        """
        pauses = []
        for _ in range(3):
            self.open()
            pauses.append(self.wait())
            self.circuit.close()
        self.circuit.answered()
        self.open()
        self.assertEqual((["5", "10", "20"], "5"), (pauses, self.wait()))

    def test_a_probe_that_tells_nothing_makes_room_for_the_next(self) -> None:
        """
        When its client disconnects, the next request is the probe.
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


class CircuitTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.circuit = Circuit(self.clock.seconds)

    def failing(self, *repositories: str, problem: TransientError = PROBLEM) -> None:
        for repository in repositories:
            self.circuit.failed(repository, problem)

    def refused(self, *repositories: str) -> list[str]:
        found = []
        for repository in repositories:
            try:
                self.circuit.check(repository)
            except CircuitOpenError:
                found.append(repository)
        return found

    def test_a_repository_that_fails_is_left_alone_by_itself(self) -> None:
        self.failing(*["bad"] * 100)
        self.assertEqual(["bad"], self.refused("bad", "good"))
        self.assertIs(CircuitState.CLOSED, self.circuit.state)
        self.circuit.answered("good")
        self.assertIsNone(self.circuit.problem())

    def test_one_failed_question_is_a_problem_until_ecr_answers_anything(self) -> None:
        for problem in (PROBLEM, UNREACHED):
            self.failing("a", problem=problem)
            self.assertEqual(f"ECR failed when it was asked last, for a: {problem.message}", self.circuit.problem())
            self.circuit.answered("b")
            self.assertIsNone(self.circuit.problem())
            self.clock.advance(ANSWER_SECONDS)
            self.assertIsNone(self.circuit.problem())
            self.setUp()

    def test_a_repository_that_is_left_alone_stays_a_problem_while_it_is_probed(self) -> None:
        self.failing(*["a"] * FAILURES)
        self.assertEqual(1, self.circuit.open_repositories)
        self.clock.advance(PAUSE)
        self.assertIsNotNone(self.circuit.enter("a"))
        self.assertIsNotNone(self.circuit.problem())
        self.circuit.answered("a")
        self.assertEqual((None, 0), (self.circuit.problem(), self.circuit.open_repositories))

    def test_failures_are_no_problem_while_ecr_answered_lately(self) -> None:
        self.circuit.answered("good")
        self.failing("a")
        self.clock.advance(ANSWER_SECONDS - 1)
        self.assertIsNone(self.circuit.problem())
        self.clock.advance(1)
        self.assertIsNotNone(self.circuit.problem())

    def test_a_repository_that_failed_while_ecr_answered_about_others_says_little_of_ecr(self) -> None:
        self.failing("bad")
        self.circuit.answered("good")
        self.clock.advance(600)
        self.failing(*["bad"] * (FAILURES - 1))
        self.assertIsNone(self.circuit.problem())
        self.failing("good")
        self.assertIn("bad and good", str(self.circuit.problem()))
        self.circuit.answered("good")
        self.clock.advance(600)
        self.failing(*["bad"] * FAILURES)
        self.assertIsNotNone(self.circuit.problem(), "nothing else was asked")

    def test_seldom_asked_repositories_do_not_make_it_flap_if_one_of_them_is_broken(self) -> None:
        told = []
        for _ in range(20):
            self.failing("bad")
            self.clock.advance(60)
            told.append(self.circuit.problem() is None)
            self.circuit.answered("good")
            self.clock.advance(60)
        self.assertEqual([False] + [True] * 19, told)

    def test_its_probe_is_one_of_its_own_questions(self) -> None:
        self.failing(*["bad"] * FAILURES)
        self.clock.advance(PAUSE)
        self.assertIsNone(self.circuit.enter("good"))
        self.assertIsNotNone(probed := self.circuit.enter("bad"))
        self.assertEqual(["bad"], self.refused("bad", "good"))
        assert probed is not None
        probed.probe_failed(PROBLEM)
        self.clock.advance(PAUSE)
        self.assertEqual(["bad"], self.refused("bad"), "its pause is twice as long now")
        self.circuit.answered("bad")
        self.assertEqual([], self.refused("bad"))

    def test_repositories_below_one_component_are_evidence_once_the_daemons_own_question_fails(self) -> None:
        self.failing("one", "team/a", "team/b", "team/c")
        self.assertEqual([], self.refused("team/a", "good"))
        self.assertTrue(self.circuit.suspects)
        self.circuit.vouched()
        self.assertFalse(self.circuit.suspects)
        self.assertIsNotNone(self.circuit.problem(), "no repository was answered")
        self.failing("team/d", "team/e")
        self.assertIsNone(self.circuit.doubted(PROBLEM))
        self.failing("team/f")
        self.assertEqual(["team/a", "good"], self.refused("team/a", "good"))

    def test_several_repositories_that_fail_without_an_answer_mean_ecr(self) -> None:
        self.failing("one", "two", "three")
        self.assertEqual(["one", "good"], self.refused("one", "good"))
        self.assertEqual("ECR keeps failing, and is left alone for a while: ECR answers 503", self.circuit.problem())

    def test_an_answer_between_says_that_ecr_is_well(self) -> None:
        for _ in range(20):
            self.failing("one", "two")
            self.circuit.answered("good")
        self.assertIs(CircuitState.CLOSED, self.circuit.state)

    def test_failures_to_reach_it_mean_ecr_whatever_the_repository(self) -> None:
        self.failing(*["one"] * (FAILURES - 1), problem=UNREACHED)
        self.assertEqual([], self.refused("one"))
        self.failing("one", problem=UNREACHED)
        self.assertEqual(["one", "good"], self.refused("one", "good"))

    def test_failures_of_lists_mean_ecr_only_if_it_was_not_reached(self) -> None:
        for problem, opened in ((PROBLEM, []), (UNREACHED, ["one"])):
            for name in ("one", "two", "three", "one", "one"):
                self.circuit.failed(name, problem, lists=True)
            self.assertEqual(opened, self.refused("one"))

    def test_a_doubt_that_comes_true_when_ecr_is_left_alone_already_ends_with_that(self) -> None:
        self.failing("one", "two", "three")
        self.circuit.doubted(PROBLEM)
        self.circuit.recovered()
        self.clock.advance(ANSWER_SECONDS)
        self.assertIsNone(self.circuit.problem())

    def test_recovery_gives_every_repository_another_chance(self) -> None:
        self.failing(*["bad"] * FAILURES, "two", "three")
        self.circuit.recovered()
        self.assertEqual([], self.refused("bad", "two"))

    def test_what_is_remembered_of_repositories_is_bounded(self) -> None:
        for number in range(KEPT + 10):
            self.failing(f"bad{number}")
            self.circuit.answered("good")
        self.assertEqual(KEPT, len(self.circuit._parts))  # noqa: SLF001


class Breaking:
    """
    An agent whose next requests fail with C{problems}.
    """

    def __init__(self, agent: IAgent, problems: list[Exception]) -> None:
        self._agent, self._problems = agent, problems

    def request(self, *args: Any) -> Deferred[IResponse]:
        return fail(self._problems.pop()) if self._problems else self._agent.request(*args)


class FailingTestCase(UpstreamTestCase):
    path = "/v2/team/app/manifests/latest"

    def setUp(self) -> None:
        super().setUp()
        self.assertWhole(self.get(self.path), self.image.manifest)

    def blobs(self, count: int, repositories: Sequence[str] = ("team/app", "team/one", "team/two")) -> list[Reply]:
        """
        Request blobs that are not cached, all at once, of these repositories in turn.
        """
        replies = []
        for number in range(count):
            repository = repositories[number % len(repositories)]
            digest = self.standin.push_blob(repository, b"%d %d" % (len(self.daemon.replies), number))
            replies.append(self.daemon.send("GET", f"/v2/{repository}/blobs/{digest}"))
        self.flush()
        return replies

    def said(self) -> list[str]:
        """
        Return the log's lines about the circuit.
        """
        lines = [formatEvent(event) for event in self.events if event["log_namespace"] == "ecrproxy.registry.circuit"]
        return [line.partition(":")[0] for line in lines]

    def probes(self) -> int:
        """
        Count the requests that are not about a repository.
        """
        return sum(asked.path == "/v2/" for asked in self.standin.asked)


class FailingRegistryTests(FailingTestCase):
    """
    Clients of the daemon while ECR keeps failing.
    """

    def open(self) -> None:
        """
        Let ECR fail until the circuit opens.
        """
        self.standin.fail("registry", status=500)
        for reply in self.blobs(REPOSITORIES):
            self.assertRefused(reply, 502, "UNAVAILABLE")
        self.assertIs(CircuitState.OPEN, self.daemon.circuit.state)
        self.standin.forget_asked()

    def test_are_served_stale_content_at_once(self) -> None:
        """
        With an open circuit a known tag comes from the cache without a request to ECR, and without delay.
        """
        self.open()
        self.assertWhole(self.get(self.path), self.image.manifest, "STALE")
        self.assertEqual(0, self.standin.count("registry"))

    def test_are_refused_the_rest_at_once(self) -> None:
        """
        Whatever is not cached gets 503 with Retry-After, without a request to ECR.
        """
        self.open()
        for path in (f"/v2/team/app/blobs/{self.digest}", "/v2/team/app/tags/list", "/v2/team/app/manifests/other"):
            reply = self.get(path)
            self.assertRefused(reply, 503, "UNAVAILABLE", "left alone")
            self.assertEqual("5", reply.header("Retry-After"))
        self.assertEqual(0, self.standin.count("registry"))

    def test_cost_one_probe_after_each_pause(self) -> None:
        """
        However many clients there are: no client's request is the probe. When it is answered, all requests go out.
        """
        self.open()
        for pause in (5, 10):
            self.blobs(50)
            self.pass_time(pause)
        self.assertEqual((2, 2), (self.probes(), self.standin.count("registry")))
        self.standin.heal()
        self.pass_time(20)
        self.assertEqual({200}, {reply.code for reply in self.blobs(50)})

    def test_need_not_ask_for_the_daemon_to_find_ecr_well(self) -> None:
        self.open()
        self.standin.heal()
        self.pass_time(PAUSE)
        self.assertEqual((CircuitState.CLOSED, 1), (self.daemon.circuit.state, self.standin.count("registry")))

    def test_are_told_of_in_one_line_a_change(self) -> None:
        """
        The log says when the circuit opens, opens again and closes, once each.
        """
        self.open()
        self.blobs(50)
        self.pass_time(PAUSE)
        self.blobs(50)
        self.standin.heal()
        self.pass_time(2 * PAUSE)
        alone = "ECR keeps failing, it is left alone for %d s"
        self.assertEqual([alone % 5, alone % 10, "ECR answers again"], self.said())

    def test_open_it_for_silence_and_connections_as_well(self) -> None:
        """
        Timeouts and failed connections count like 5xx.
        """
        self.standin.hang("registry")
        self.blobs(REPOSITORIES)
        self.pass_time(26)
        self.assertIs(CircuitState.OPEN, self.daemon.circuit.state)
        self.start()
        self.daemon.back.down = ConnectionRefusedError()
        self.blobs(FAILURES, ["team/app"])
        self.assertIs(CircuitState.OPEN, self.daemon.circuit.state)

    def test_get_their_content_five_seconds_after_names_resolve_again(self) -> None:
        """
        However long they did not: while ECR is unreachable, a pause protects nothing.
        """
        self.daemon.back.down = DNSLookupError("no results for hostname lookup")
        for _ in range(60):
            self.blobs(5)
            self.pass_time(1)
        self.assertIn("DNS lookup failed", self.logged())
        self.daemon.back.down = None
        self.pass_time(PAUSE)
        self.assertEqual({200}, {reply.code for reply in self.blobs(50)})

    def test_do_not_open_it_for_refusals(self) -> None:
        """
        Throttling, refusals, invalid answers and a failing bucket are no failures of ECR.
        """
        for status in (400, 403, 404, 418, 429):
            fault = self.standin.fail("registry", status=status, headers={"WWW-Authenticate": "Basic"})
            self.blobs(20)
            fault.remove()
        for service in ("bucket", "registry"):
            fault = self.standin.fail(service, status=500 if service == "bucket" else 204)
            self.blobs(20)
            fault.remove()
        self.assertEqual([], self.said())

    def test_are_told_of_an_answer_that_is_none_to_the_probe(self) -> None:
        """
        An answer that HTTP does not allow is a failure, and the next probe follows.
        """
        self.open()
        self.standin.heal()
        self.standin.fail("registry", status=200, headers={"Content-Encoding": "gzip"}, times=1)
        self.pass_time(PAUSE)
        self.assertIs(CircuitState.OPEN, self.daemon.circuit.state)
        self.pass_time(2 * PAUSE)
        self.assertIs(CircuitState.CLOSED, self.daemon.circuit.state)

    def test_are_asked_again_after_a_probe_that_ended_as_none_should(self) -> None:
        broken: list[Exception] = []

        def agent(back: Network) -> IAgent:
            return cast(IAgent, Breaking(back.agent(persistent=False), broken))

        self.start(agent=agent)
        self.open()
        self.standin.heal()
        broken.append(RegistryError(400, "UNSUPPORTED", "nobody expects this"))
        self.pass_time(PAUSE)
        self.assertIs(CircuitState.OPEN, self.daemon.circuit.state)
        self.assertEqual(1, len(self.flushLoggedErrors(RegistryError)))
        self.pass_time(2 * PAUSE)
        self.assertIs(CircuitState.CLOSED, self.daemon.circuit.state)

    def test_do_not_wait_for_a_probe_that_hangs(self) -> None:
        self.open()
        self.standin.heal()
        self.standin.hang("registry")
        self.pass_time(PAUSE + 1)
        self.assertWhole(self.get(self.path), self.image.manifest, "STALE")
        self.standin.heal()
        self.pass_time(PROBE_SECONDS + 2 * PAUSE)
        self.assertIs(CircuitState.CLOSED, self.daemon.circuit.state)

    def test_closes_for_throttling_and_refusals(self) -> None:
        """
        A probe that is throttled, or refused, was answered.
        """
        for status in (401, 403, 404, 429):
            self.open()
            self.standin.heal()
            fault = self.standin.fail("registry", status=status)
            self.pass_time(PAUSE)
            self.assertIs(CircuitState.CLOSED, self.daemon.circuit.state, status)
            fault.remove()
            self.assertEqual({200}, {reply.code for reply in self.blobs(5)})

    def test_are_spared_longer_where_only_content_fails(self) -> None:
        """
        ECR answers the probe, and fails everything else: each pause is longer than the last.
        """
        everywhere = ("team/app", "other/app", "third")
        self.standin.fail("registry", path_contains="/blobs/")
        self.blobs(REPOSITORIES, everywhere)
        for pause in (5, 10, 20):
            self.pass_time(pause - 1)
            self.assertIs(CircuitState.OPEN, self.daemon.circuit.state)
            self.pass_time(1)
            self.assertIs(CircuitState.CLOSED, self.daemon.circuit.state)
            self.blobs(REPOSITORIES, everywhere)

    def test_are_served_while_made_up_names_fail_below_one_prefix(self) -> None:
        """
        However many of them fail between two answers: ECR answers its own probe.
        """
        self.standin.fail("registry", status=500, path_contains="/pull-through/")
        for number in range(30):
            made_up = [f"pull-through/{number}-{name}" for name in range(10)]
            self.assertEqual({502}, {reply.code for reply in self.blobs(10, made_up)})
            self.assertEqual([200], [reply.code for reply in self.blobs(1)])
            self.pass_time(1)
        self.assertIs(CircuitState.CLOSED, self.daemon.circuit.state)
        self.assertLessEqual(self.probes(), 30 * 4)

    def test_are_not_refused_because_of_silence_about_made_up_names(self) -> None:
        self.standin.hang("registry", "/pull-through/")
        self.blobs(50, [f"pull-through/{number}" for number in range(50)])
        self.pass_time(26)
        self.assertIs(CircuitState.CLOSED, self.daemon.circuit.state)
        self.assertEqual([200], [reply.code for reply in self.blobs(1)])
        self.assertLess(self.probes(), 5)

    def test_leave_the_daemon_ready(self) -> None:
        """
        A daemon that serves its cache is ready, whatever ECR does.
        """
        self.open()
        self.assertEqual(200, self.get("/readyz").code)


class FailingRepositoryTests(FailingTestCase):
    """
    Clients of the daemon while ECR fails only for one repository.
    """

    def failing(self) -> None:
        """
        Let it fail until its circuit opens.
        """
        self.standin.fail("registry", status=500, path_contains="/v2/team/app/")
        self.blobs(FAILURES, ["team/app"])
        self.standin.forget_asked()

    def test_do_not_notice_if_theirs_is_another(self) -> None:
        self.standin.fail("registry", status=500, path_contains="/v2/team/app/")
        for _ in range(30):
            bad, good = self.blobs(5, ["team/app"]), self.blobs(3, ["team/one"])
            self.assertEqual({200}, {reply.code for reply in good})
            self.assertNotIn(200, {reply.code for reply in bad})
            self.pass_time(2)
        self.assertIs(CircuitState.CLOSED, self.daemon.circuit.state)

    def test_do_not_notice_either_if_it_hangs(self) -> None:
        self.standin.hang("registry", "/v2/team/app/")
        bad = self.blobs(20, ["team/app"])
        for _ in range(30):
            self.assertEqual({200}, {reply.code for reply in self.blobs(3, ["team/one"])})
            self.pass_time(2)
        self.assertEqual({504}, {reply.code for reply in bad})

    def test_are_served_stale_content_at_once_and_refused_the_rest(self) -> None:
        self.failing()
        self.assertWhole(self.get(self.path), self.image.manifest, "STALE")
        reply = self.get("/v2/team/app/manifests/other")
        self.assertRefused(reply, 503, "UNAVAILABLE", "team/app keeps failing, and is left alone")
        self.assertEqual("5", reply.header("Retry-After"))
        self.assertEqual(0, self.standin.count("registry"))

    def test_cost_one_probe_at_a_time(self) -> None:
        """
        Of many requests after the pause one goes to ECR, once; when it is answered, all do.
        """
        self.failing()
        for _ in range(2):
            self.pass_time(PAUSE)
            self.blobs(50, ["team/app"])
            self.assertEqual(1, self.standin.count("registry"))
        self.pass_time(PAUSE)
        self.standin.heal()
        self.assertEqual(1, [reply.code for reply in self.blobs(50, ["team/app"])].count(200))
        self.assertEqual({200}, {reply.code for reply in self.blobs(50, ["team/app"])})

    def test_count_questions_and_not_tries(self) -> None:
        """
        The failed attempts of one request open no circuit.
        """
        self.standin.fail("registry", status=500)
        self.blobs(FAILURES - 1, ["team/app"])
        self.assertEqual(3 * (FAILURES - 1), self.standin.count("registry", "GET", "blobs"))
        self.assertEqual([], self.said())

    def test_wait_for_a_probe_five_seconds_at_most(self) -> None:
        """
        A client whose request happens to be the probe gets stale content after five seconds of silence.
        """
        self.failing()
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
        A failed probe is not retried: stale content is served at once.
        """
        self.start(chance=1.0)
        self.standin.fail("registry", status=500)
        self.blobs(FAILURES, ["team/app"])
        self.pass_time(4)
        self.pass_time(PAUSE)
        self.assertWhole(self.get(self.path), self.image.manifest, "STALE")

    def test_may_leave_while_theirs_is_the_probe(self) -> None:
        """
        When the probe's client disconnects, the next request is the probe.
        """
        self.failing()
        self.standin.heal()
        self.standin.hang("registry", times=1)
        self.pass_time(PAUSE)
        asking: Deferred[object] = self.asking(self.daemon.upstream.manifest(self.tag, ""))
        asking.cancel()
        self.flush()
        self.failureResultOf(asking, CancelledError)
        self.assertWhole(self.get(self.path), self.image.manifest, "REVALIDATED")

    def test_end_its_pause_with_any_answer(self) -> None:
        """
        A probe that is throttled was answered.
        """
        self.failing()
        self.standin.heal()
        self.standin.throttle("registry", times=1, retry_after="17")
        self.pass_time(PAUSE)
        self.assertEqual(429, self.get("/v2/team/app/manifests/other").code)
        self.assertIn("ECR's repository team/app answers again", self.said())


class FailingListsTests(FailingTestCase):
    """
    Clients that pull while ECR fails only for lists of tags and referrers: ListImages and ListImageReferrers are
    separate calls, and for a pull-through cache ECR asks the upstream for referrers.
    """

    def lists(self, repositories: Sequence[str], count: int = 1) -> list[int]:
        """
        Request lists of each of these repositories.
        """
        paths, replies = ["tags/list", f"referrers/{self.image.digest}"], []
        for turn in range(count):
            replies += [self.daemon.send("GET", f"/v2/{name}/{paths[turn % 2]}") for name in repositories]
            self.pass_time(1)  # quotas for lists are small
        return [reply.code for reply in replies]

    def setUp(self) -> None:
        super().setUp()
        for path in ("/tags/", "/referrers/"):
            self.standin.fail("registry", status=500, path_contains=path)

    def test_do_not_notice(self) -> None:
        """
        Neither in that repository nor, however many repositories' lists fail with no answer between, in any.
        """
        repositories = ["team/app", "other/app", "third", "fourth"]
        self.assertNotIn(200, self.lists(repositories, FAILURES))
        self.assertIs(CircuitState.CLOSED, self.daemon.circuit.state)
        self.assertEqual({200}, {reply.code for reply in self.blobs(4, repositories)})
        self.assertWhole(self.get(self.path), self.image.manifest, "REVALIDATED")

    def test_are_not_said_to_get_nothing(self) -> None:
        self.pass_time(ANSWER_SECONDS)
        self.lists(["team/app", "other/app"], FAILURES)
        self.assertIsNone(self.daemon.circuit.problem())

    def test_have_those_lists_left_alone(self) -> None:
        self.lists(["team/app"], FAILURES)
        self.standin.forget_asked()
        said = "team/app (tags and referrers) keeps failing, and is left alone"
        self.assertRefused(self.get("/v2/team/app/tags/list"), 503, "UNAVAILABLE", said)
        self.assertEqual(0, self.standin.count("registry"))
        self.standin.heal()
        self.pass_time(PAUSE)
        self.assertEqual([200], self.lists(["team/app"]))

    def test_have_lists_refused_while_their_repository_is_left_alone(self) -> None:
        self.standin.heal()
        self.standin.fail("registry", status=500, path_contains="/v2/team/app/")
        self.blobs(FAILURES, ["team/app"])
        self.standin.forget_asked()
        self.assertEqual([503], self.lists(["team/app"]))
        self.assertEqual(0, self.standin.count("registry"))

    def test_are_told_that_pulls_fail_where_lists_are_answered(self) -> None:
        """
        A program that requests lists each second would have hidden it for ever.
        """
        self.standin.heal()
        for path in ("/manifests/", "/blobs/"):
            self.standin.fail("registry", status=500, path_contains=path)
        self.pass_time(ANSWER_SECONDS)
        self.assertEqual([502], [reply.code for reply in self.blobs(1, ["team/app"])])
        self.assertEqual([200], self.lists(["team/app"]))
        self.assertIn("when it was asked last, for team/app", str(self.daemon.circuit.problem()))
        self.standin.heal()
        self.assertEqual([200], [reply.code for reply in self.blobs(1, ["team/app"])])
        self.assertIsNone(self.daemon.circuit.problem())

    def test_have_the_daemon_find_out_whether_ecr_fails(self) -> None:
        """
        There may be only requests for lists.
        """
        self.standin.fail("registry", status=500)
        self.pass_time(ANSWER_SECONDS)
        self.lists(["team/app"])
        self.pass_time(PROBE_SECONDS)
        self.assertIn("when it was asked last, for the proxy itself", str(self.daemon.circuit.problem()))
        self.standin.heal()
        self.assertEqual([200], self.lists(["team/app"]))
        self.assertIsNone(self.daemon.circuit.problem())
