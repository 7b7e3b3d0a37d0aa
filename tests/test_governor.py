"""
How many requests to ECR at once queue.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.reasons import Reason
from ecrproxy.registry.circuit import FAILURES, CircuitOpenError
from ecrproxy.registry.governor import LONGEST_WAIT, TICK, Governor
from ecrproxy.registry.queue import QueueFullError
from ecrproxy.registry.quotas import Call, Quotas
from ecrproxy.registry.wire import HEADER_SECONDS
from tests.registry import digest_of
from tests.routes import route_to
from tests.test_upstream import UpstreamTestCase

MANY = Quotas(10**6, 10**6, 10**6, 10**6)


class GovernorTests(SynchronousTestCase):
    """
    Requests that take no time, or as much as a test wants.
    """

    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(4_000_000_000.0)
        self.went: list[tuple[str, float]] = []
        self.under_way: dict[str, Deferred[None]] = {}
        self.most = 0

    def govern(self, quotas: Quotas, together: int = 128) -> Governor:
        self.governor = Governor(quotas, together, self.clock)
        return self.governor

    async def question(self, call: Call, name: str, about: str, answer: Deferred[None] | None) -> None:
        async with self.governor.place(call, about):
            self.went.append((name, self.clock.seconds()))
            if answer is not None:
                self.under_way[name] = answer
                self.most = max(self.most, len(self.under_way))
                try:
                    await answer
                finally:
                    del self.under_way[name]

    def ask(self, call: Call, name: str = "", about: str = "team/app", *, held: bool = False) -> Deferred[None]:
        """
        Send a request; one that is held keeps its slot until it is answered.
        """
        return Deferred.fromCoroutine(self.question(call, name, about, Deferred() if held else None))

    def hold(self, count: int, *repositories: str) -> int:
        """
        Send so many unanswered requests about each of these repositories, in turn; return how many have slots.
        """
        before = len(self.under_way)
        for number in range(count):
            for repository in repositories:
                self.ask(Call.MANIFEST, f"{repository} {number}", repository, held=True).addErrback(lambda _: None)
        return len(self.under_way) - before

    def names(self) -> list[str]:
        return [name for name, _ in self.went]

    def pass_time(self, seconds: float) -> None:
        self.clock.pump([TICK] * round(seconds / TICK))

    def test_a_storm_keeps_to_the_quota(self) -> None:
        """
        5,000 requests for blobs at once: no second has more than the quota, and all are sent soon.
        """
        self.govern(Quotas())
        asked = [self.ask(Call.BLOB, str(number)) for number in range(5000)]
        self.pass_time(2)
        for each in asked:
            self.successResultOf(each)
        times = [when for _, when in self.went]
        for first, later in zip(times, times[3000:], strict=False):
            self.assertGreaterEqual(later - first, 1.0)
        self.assertEqual([str(number) for number in range(5000)], self.names())

    def test_kinds_do_not_wait_for_each_other(self) -> None:
        """
        A storm for blobs leaves manifests their own rate.
        """
        self.govern(Quotas(blobs=10))
        for number in range(50):
            self.ask(Call.BLOB, str(number))
        self.successResultOf(self.ask(Call.MANIFEST, "manifest"))
        self.assertEqual(["0", "manifest"], self.names())

    def test_manifests_overtake_blobs(self) -> None:
        """
        If slots are few, manifests go before everything that waits already, checks before blobs, blobs before lists.
        """
        self.govern(MANY, 1)
        self.ask(Call.BLOB, "first", held=True)
        for call in (Call.LIST, Call.BLOB, Call.CHECK, Call.MANIFEST):
            for number in range(2):
                self.ask(call, f"{call.value}{number}")
        self.under_way["first"].callback(None)
        kinds = ["manifests", "checks", "blobs", "lists"]
        self.assertEqual(["first"] + [f"{kind}{number}" for kind in kinds for number in range(2)], self.names())

    def test_places_are_few(self) -> None:
        """
        The number of requests in flight is bounded; each that ends lets the next go.
        """
        self.govern(MANY, 3)
        asked = [self.ask(Call.BLOB, str(number), held=True, about=f"{number}") for number in range(20)]
        while self.under_way:
            self.assertLessEqual(len(self.under_way), 3)
            next(iter(self.under_way.values())).callback(None)
        for each in asked:
            self.successResultOf(each)
        self.assertEqual((20, 3), (len(self.went), self.most))

    def test_a_place_is_given_back_however_its_question_ends(self) -> None:
        """
        An error and a client that disconnects free their slot for the next.
        """
        self.govern(MANY, 1)
        for end in ("fail", "leave"):
            asked = self.ask(Call.BLOB, end, held=True)
            behind = self.ask(Call.BLOB, "behind")
            if end == "fail":
                self.under_way[end].errback(ZeroDivisionError())
                self.failureResultOf(asked, ZeroDivisionError)
            else:
                asked.cancel()
                self.failureResultOf(asked, CancelledError)
            self.successResultOf(behind)

    def test_who_leaves_the_queue_takes_nothing(self) -> None:
        """
        Cancelled waiters are not sent, and cost neither a slot nor a call.
        """
        self.govern(Quotas(lists=10))
        asked = [self.ask(Call.LIST, str(number)) for number in range(50)]
        for each in asked[1:49]:
            each.cancel()
            self.failureResultOf(each, CancelledError)
        self.assertEqual(1, self.governor.waiting(Call.LIST))
        self.pass_time(0.2)
        self.assertEqual(["0", "49"], self.names())
        self.pass_time(10)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_a_queue_that_would_take_too_long_is_full(self) -> None:
        """
        A request that would wait longer than ten seconds is rejected at once, with the time to retry.
        """
        self.govern(Quotas(lists=10))
        asked = [self.ask(Call.LIST) for _ in range(100)]
        refused = [each for each in asked if each.called]
        problem = self.failureResultOf(refused[-1], QueueFullError).value
        self.assertEqual((429, "TOOMANYREQUESTS", "11"), (problem.status, problem.code, problem.headers["Retry-After"]))
        for each in refused[1:-1]:
            self.failureResultOf(each, QueueFullError)
        self.assertAlmostEqual(9 * LONGEST_WAIT, self.governor.waiting(Call.LIST), delta=2)
        self.pass_time(LONGEST_WAIT)
        self.assertEqual(0, self.governor.waiting(Call.LIST))
        self.assertGreater(len(self.went), 80)
        for each in asked[len(self.went) : 1 - len(refused)]:
            self.failureResultOf(each, QueueFullError)  # the estimate was off by less than a second

    def test_a_silent_repository_has_a_quarter_of_the_places_and_a_prefix_half(self) -> None:
        """
        Of 128 slots; made-up names below one prefix have no more than their prefix.
        """
        self.govern(MANY)
        self.assertEqual(32, self.hold(200, "slow/one"))
        self.assertEqual(32, self.hold(1, *(f"slow/{number}" for number in range(600))))
        self.assertEqual(16, self.hold(200, "other/one"))
        self.successResultOf(self.ask(Call.LIST, "well", "team/app"))

    def test_prefixes_that_are_silent_leave_places_to_one_more(self) -> None:
        self.govern(MANY)
        for number in range(6):
            self.hold(1, *(f"slow{number}/{name}" for name in range(200)))
        self.assertLess(len(self.under_way), 128)
        self.successResultOf(self.ask(Call.BLOB, "well", "team/app"))

    def test_many_repositories_of_one_prefix_start_without_waiting(self) -> None:
        """
        Two hundred repositories of one prefix, answered in 50 ms each, need half of the slots.
        """
        self.govern(MANY)
        asked = [self.ask(Call.MANIFEST, str(number), f"team/{number}", held=True) for number in range(200)]
        turns = 0
        while self.under_way:
            turns += 1
            for answer in list(self.under_way.values()):
                answer.callback(None)
        for each in asked:
            self.successResultOf(each)
        self.assertEqual(4, turns)

    def test_prefixes_take_turns_and_so_do_their_repositories(self) -> None:
        self.govern(MANY, 2)
        self.ask(Call.BLOB, "first", held=True)
        self.ask(Call.BLOB, "second", "other", held=True)
        for about in ("a/x", "a/x", "a/x", "a/y", "a/y", "b/z", "b/z"):
            self.ask(Call.BLOB, about, about)
        self.under_way["first"].callback(None)
        self.assertEqual(["a/x", "b/z", "a/y", "b/z", "a/x", "a/y", "a/x"], self.names()[2:])

    def test_none_waits_for_a_place_longer_than_ten_seconds(self) -> None:
        """
        Except those about a repository that keeps its slots.
        """
        self.govern(MANY)
        asked = [self.ask(Call.BLOB, str(number), held=True) for number in range(140)]
        self.clock.advance(LONGEST_WAIT - 1)
        late = self.ask(Call.BLOB, "late", held=True)
        self.clock.advance(1)
        refused = [each for each in asked if each.called]
        self.assertEqual((140 - 32, 1), (len(refused), self.governor.waiting(Call.BLOB)))
        problem = self.failureResultOf(refused[0], QueueFullError).value
        self.assertEqual((429, "10"), (problem.status, problem.headers["Retry-After"]))
        for each in refused[1:]:
            self.failureResultOf(each, QueueFullError)
        self.clock.advance(LONGEST_WAIT - 1)
        self.failureResultOf(late, QueueFullError)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_a_queue_that_is_full_of_one_prefix_takes_others(self) -> None:
        """
        A request that would be sent within ten seconds is accepted, however long others wait.
        """
        self.govern(Quotas(lists=10))
        for number in range(100):
            self.ask(Call.LIST, str(number)).addErrback(lambda _: None)
        well = self.ask(Call.LIST, "well", "other/app")
        self.assertNoResult(well)
        self.pass_time(0.4)
        self.successResultOf(well)

    def test_what_a_full_queue_refuses_is_counted_and_logged_once(self) -> None:
        """
        Otherwise most pulls of a cluster may be 429, and nothing says so.
        """
        self.govern(Quotas(lists=10))
        with capturedLogs() as events:
            for _ in range(150):
                self.ask(Call.LIST).addErrback(lambda failure: failure.trap(QueueFullError))
        told = [event for event in events if event["log_level"] is LogLevel.warn]
        self.assertEqual({("ECR", "lists")}, {event["once"] for event in told})
        self.assertIn("Refused a question about lists: ", formatEvent(told[0]))
        self.assertEqual((len(told), 0), (self.governor.refused(Call.LIST), self.governor.refused(Call.BLOB)))
        self.assertGreater(len(told), 30)
        self.pass_time(LONGEST_WAIT + 1)

    def test_a_kind_that_rests_is_waited_for(self) -> None:
        """
        Requests that ECR has throttled go when it said; other kinds go meanwhile, in time.
        """
        self.govern(Quotas(lists=10))
        self.governor.rest(Call.BLOB, "team/app", 7)
        self.ask(Call.BLOB, "blob", "team/other")
        self.ask(Call.LIST, "list")
        self.ask(Call.LIST, "second list")
        self.pass_time(0.2)
        self.assertEqual(["list", "second list"], self.names())
        self.pass_time(6.5)
        self.assertEqual(2, len(self.went))
        self.pass_time(0.5)
        self.assertEqual("blob", self.went[-1][0])

    def test_what_one_prefix_is_throttled_for_keeps_no_other_waiting(self) -> None:
        """
        Docker Hub's limit behind a pull-through cache rule is no other repository's: only the rule's are refused.
        """
        self.govern(MANY)
        self.governor.rest(Call.MANIFEST, "docker-hub/library/nginx", 3600)
        refused = self.ask(Call.MANIFEST, "hub", "docker-hub/grafana/loki")
        problem = self.failureResultOf(refused, QueueFullError).value
        self.assertEqual((429, Reason.THROTTLED), (problem.status, problem.reason))
        self.assertEqual("60", problem.headers["Retry-After"])
        self.assertIn("docker-hub", problem.message)
        self.successResultOf(self.ask(Call.MANIFEST, "own", "team/app"))
        self.successResultOf(self.ask(Call.BLOB, "blob", "docker-hub/grafana/loki"))
        plenty = [self.governor.has_plenty(Call.MANIFEST, name) for name in ("docker-hub/x", "team/app")]
        self.assertEqual([False, True], plenty)
        self.clock.advance(61)
        self.successResultOf(self.ask(Call.MANIFEST, "hub again", "docker-hub/grafana/loki"))
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_what_waits_for_a_throttled_prefix_lets_others_by(self) -> None:
        """
        A rest that is worth waiting for is waited for; later requests for others go before.
        """
        self.govern(MANY)
        self.governor.rest(Call.MANIFEST, "docker-hub/library/nginx", 5)
        self.ask(Call.MANIFEST, "hub", "docker-hub/library/nginx")
        self.ask(Call.MANIFEST, "own", "team/app")
        self.assertEqual(["own"], self.names())
        self.pass_time(4.9)
        self.assertEqual(["own"], self.names())
        self.pass_time(0.2)
        self.assertEqual(["own", "hub"], self.names())

    def test_all_rules_throttled_at_once_refuse_nothing_else(self) -> None:
        """
        A registry may have fifty pull-through cache rules, whose upstream may be the same.
        """
        self.govern(MANY)
        for number in range(50):
            self.governor.rest(Call.MANIFEST, f"rule-{number}/library/nginx", 3600)
        self.successResultOf(self.ask(Call.MANIFEST, "own", "team/app"))
        self.failureResultOf(self.ask(Call.MANIFEST, "hub", "rule-49/library/redis"), QueueFullError)

    def test_more_throttled_prefixes_than_rules_are_the_account(self) -> None:
        """
        Then the whole kind rests, until the first of them may be asked about again.
        """
        self.govern(MANY)
        for number in range(49):
            self.governor.rest(Call.MANIFEST, f"rule-{number}/library/nginx", 3600)
        self.governor.rest(Call.MANIFEST, "team/app", 4)
        self.successResultOf(self.ask(Call.MANIFEST, "first", "other/app"))
        self.governor.rest(Call.MANIFEST, "third/app", 6)
        self.ask(Call.MANIFEST, "second", "other/app")
        self.assertEqual(["first"], self.names())
        self.pass_time(4.1)
        self.assertEqual(["first", "second"], self.names())

    def test_a_long_queue_that_ends_at_once_is_no_deep_stack(self) -> None:
        """
        Ten thousand that wait for one slot, and do nothing with it, all go.
        """
        self.govern(MANY, 1)
        self.ask(Call.BLOB, "first", held=True)
        for number in range(10_000):
            self.ask(Call.BLOB, str(number))
        self.under_way["first"].callback(None)
        self.assertEqual(10_001, len(self.went))


class StormTests(UpstreamTestCase):
    """
    The real requests, to the stand-in.
    """

    def test_a_silent_repository_keeps_nobody_else_from_an_answer(self) -> None:
        self.standin.push_image("other/app", "latest")
        self.standin.hang("registry", "team/app")
        silent = [self.daemon.send("HEAD", f"/v2/team/app/manifests/{number}") for number in range(200)]
        made_up = [self.daemon.send("HEAD", f"/v2/team/app{number}/manifests/v") for number in range(200)]
        self.flush()
        self.assertEqual(200, self.get("/v2/other/app/manifests/latest").code)
        self.pass_time(LONGEST_WAIT)
        queued = [reply for reply in silent + made_up if reply.ended]
        self.assertEqual((400 - 64, {429}), (len(queued), {reply.code for reply in queued}))

    def test_time_in_the_queue_counts_as_time_for_the_answer(self) -> None:
        self.start(together=1)
        self.standin.hang("registry", "team/app")
        first = self.daemon.send("GET", "/v2/team/app/manifests/latest")
        self.flush()
        self.pass_time(HEADER_SECONDS - 9)
        second = self.daemon.send("GET", "/v2/team/app/manifests/second")
        self.flush()
        self.pass_time(9)
        self.assertEqual((504, False), (first.code, bool(second.ended)))
        self.pass_time(HEADER_SECONDS - 9)
        self.assertEqual(504, second.code)

    def locate(self, count: int) -> list[Deferred[Any]]:
        """
        Request the locations of so many blobs.
        """
        routes = [route_to(f"/v2/team/app/blobs/{digest_of(b'%d' % number)}") for number in range(count)]
        asked: list[Deferred[Any]] = [Deferred.fromCoroutine(self.daemon.upstream.locate(route)) for route in routes]
        for each in asked:
            each.addErrback(lambda failure: failure.value)
        self.flush()
        return asked

    def test_each_question_is_counted_as_what_it_is(self) -> None:
        """
        Each kind of request has its own quota, for retries after failures as well.
        """
        self.start(quotas=Quotas(10, 10, 10, 10))
        self.standin.push_image("team/app", "latest")
        paths = {
            "manifests": "/v2/team/app/manifests/latest",
            "blobs": f"/v2/team/app/blobs/{self.digest}",
            "tags": "/v2/team/app/tags/list",
        }
        self.standin.fail("registry", status=503, times=1)
        for path in paths.values():
            self.daemon.send("GET", path)
        self.daemon.send("HEAD", paths["blobs"])
        self.flush()
        asked = Counter(
            each.path.split("/")[4] + each.method for each in self.standin.asked if each.service == "registry"
        )
        self.assertEqual({"manifestsGET": 1, "blobsGET": 1, "blobsHEAD": 1, "tagsGET": 1}, dict(asked))
        self.pass_time(1)
        self.assertEqual(5, self.standin.count("registry"))

    def test_a_storm_queues_here(self) -> None:
        """
        Of 500 requests no more than the quota reach ECR in any second, and a manifest overtakes them.
        """
        self.start(quotas=Quotas(blobs=100), together=20)
        self.standin.quirks.latency = 0.01
        asked = self.locate(500)
        counts = []
        for second in range(6):
            before = self.standin.count("registry")
            for _ in range(50):
                self.clock.advance(0.02)
                self.flush()
            counts.append(self.standin.count("registry") - before)
            if not second:
                self.clock.advance(0)
                manifest = self.asking(self.daemon.upstream.manifest(self.tag, ""))
                self.clock.advance(0.02)
                self.flush()
                self.successResultOf(manifest)
                self.assertFalse(asked[-1].called)
        self.assertLessEqual(max(counts), 101)  # the manifest is one
        self.assertTrue(all(each.called for each in asked))

    def test_clients_beyond_the_queue_are_told(self) -> None:
        """
        A client whose request would wait too long gets 429 with Retry-After; one that requests a known tag, STALE.
        """
        self.start(quotas=Quotas(manifests=1))
        path = "/v2/team/app/manifests/latest"
        self.assertWhole(self.get(path), self.image.manifest, "MISS")
        for number in range(9):
            self.daemon.send("GET", f"/v2/team/app/manifests/{number}")
        self.flush()
        reply = self.get("/v2/team/app/manifests/other")
        self.assertRefused(reply, 429, "TOOMANYREQUESTS", "wait for ECR")
        self.assertEqual("12", reply.header("Retry-After"))
        self.assertWhole(self.get(path), self.image.manifest, "STALE")
        self.pass_time(12)

    def test_throttling_slows_its_kind(self) -> None:
        """
        After a 429 with Retry-After no request of its kind goes before that; others do.
        """
        self.standin.throttle("registry", times=1, retry_after="4")
        first = self.asking(self.daemon.upstream.manifest(self.tag, ""))
        second = self.asking(self.daemon.upstream.manifest(self.tag, ""))
        self.assertEqual(1, self.standin.count("registry"))
        self.assertEqual(1000, self.size())
        self.pass_time(5)
        self.successResultOf(first)
        self.successResultOf(second)

    def test_throttling_of_one_prefix_refuses_no_other(self) -> None:
        """
        ECR passes Docker Hub's 429 on for what a pull-through cache rule has not; other repositories are pulled.
        """
        self.standin.throttle("registry", path_contains="/docker-hub/", retry_after="3600")
        for name in ("nginx", "redis"):
            reply = self.get(f"/v2/docker-hub/library/{name}/manifests/latest")
            self.assertEqual((429, "throttled"), (reply.code, reply.header("X-Cache-Reason")))
        self.assertEqual(1, self.standin.count("registry", path_contains="/docker-hub/"))
        self.assertWhole(self.get("/v2/team/app/manifests/latest"), self.image.manifest, "MISS")

    def test_an_open_circuit_empties_the_queue(self) -> None:
        """
        Waiting requests are rejected at once, without being sent, though the slots are in use.
        """
        self.start(together=4 * FAILURES)
        self.standin.hang("registry")
        self.locate(FAILURES)
        self.pass_time(HEADER_SECONDS - 1)
        asked = self.locate(3000)
        sent = 3 * FAILURES  # each is sent again twice
        self.assertEqual(sent, self.standin.count("registry", path_contains="/blobs/"))
        self.pass_time(2)
        refused = [each for each in asked if each.called and isinstance(each.result, CircuitOpenError)]
        asked_ecr = self.standin.count("registry", path_contains="/blobs/")
        self.assertEqual((sent + FAILURES, 3000 - FAILURES), (asked_ecr, len(refused)))
        self.pass_time(30)
        self.assertTrue(all(each.called for each in asked))
