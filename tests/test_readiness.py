"""
What the daemon reports about its readiness, and what that is based on.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.condition import FRESH_SECONDS, PATIENCE, Condition, ConditionReport
from ecrproxy.readiness import ACCOUNTS, Readiness, RegistryReadiness, judge, judge_all
from ecrproxy.registry.aws import CredentialsError, TokenUnavailableError
from ecrproxy.registry.circuit import LONGEST_PAUSE
from ecrproxy.registry.ecr import FETCH_SECONDS, RENEW_SECONDS, Token
from ecrproxy.registry.wire import HEADER_SECONDS
from ecrproxy.stale import STALE_SECONDS
from tests.daemon import DaemonTestCase, Hands, Reply, noise

WELL: dict[str, Any] = {"draining": False, "sources": [RegistryReadiness("one")], "disk": (), "filled": False}


class JudgeTests(SynchronousTestCase):
    def serves(self, **otherwise: Any) -> bool:
        return judge(**{**WELL, **otherwise}).can_serve

    def test_all_is_well_without_reasons(self) -> None:
        self.assertEqual(Readiness(can_serve=True, can_fetch=True, reasons=()), judge(**WELL))

    def test_a_token_or_content_lets_it_serve(self) -> None:
        found = {
            (token, filled): self.serves(sources=[RegistryReadiness("one", token)], filled=filled)
            for token in (None, "x")
            for filled in (0, 1)
        }
        self.assertEqual({(None, 0): True, (None, 1): True, ("x", 0): False, ("x", 1): True}, found)

    def test_a_token_and_an_ecr_that_answers_let_it_fetch(self) -> None:
        for token, ecr in itertools.product((None, "AWS is down"), (None, "ECR answers 500")):
            found = judge(**{**WELL, "sources": [RegistryReadiness("one", token, ecr)], "filled": True})
            self.assertEqual(token is None and ecr is None, found.can_fetch)
            self.assertEqual((token is not None) + (ecr is not None), len(found.reasons))

    def test_one_of_several_registries_is_enough(self) -> None:
        """
        Another that fails is named, and does not make the daemon less ready.
        """
        ill, well = RegistryReadiness("one.test", "denied", "it answers 500"), RegistryReadiness("two.test")
        found = judge(**{**WELL, "sources": [ill, well]})
        reasons = ("one.test: no token: denied", "one.test: it answers 500")
        self.assertEqual(Readiness(can_serve=True, can_fetch=True, reasons=reasons), found)
        found = judge(**{**WELL, "sources": [ill, ill]})
        self.assertEqual((False, False), (found.can_serve, found.can_fetch))

    def test_of_the_accounts_of_a_wildcard_a_few_are_named_and_the_others_counted(self) -> None:
        """
        There may be a thousand, and each has a line in the answer, in the log of a probe, and on the status page.
        """
        name = "*.dkr.ecr.eu-west-1.amazonaws.com"
        accounts = [RegistryReadiness(f"{number}.test", "denied", "it answers 500", name) for number in range(1000)]
        one, well = (
            RegistryReadiness("one.test", None, "it answers 500", "one.test"),
            RegistryReadiness("1001.test", label=name),
        )
        found = judge(**{**WELL, "sources": [one, *accounts, well]})
        lines = [f"{n}.test: {why}" for n in range(ACCOUNTS) for why in ("no token: denied", "it answers 500")]
        more = f"{name}: {1000 - ACCOUNTS} more registries can't be fetched from"
        self.assertEqual(("one.test: it answers 500", *lines, more), found.reasons)
        self.assertTrue(found.can_fetch)
        few = judge(**{**WELL, "sources": [one, *accounts[:ACCOUNTS]]})
        self.assertEqual(1 + 2 * ACCOUNTS, len(few.reasons))

    def test_one_that_ends_or_whose_disk_fails_gets_nothing_new(self) -> None:
        self.assertFalse(self.serves(draining=True, filled=True))
        self.assertFalse(self.serves(disk=("the cache directory can't be written",), filled=True))

    def test_all_reasons_are_given(self) -> None:
        found = judge(
            draining=True,
            sources=[RegistryReadiness("one", "none", "ECR answers 500")],
            disk=("full", "slow"),
            filled=True,
        )
        expected = ("draining: the daemon ends", "no token: none", "ECR answers 500", "full", "slow")
        self.assertEqual(expected, found.reasons)


class JudgeAllTests(SynchronousTestCase):
    """
    A daemon of several processes.
    """

    well = judge(**WELL)

    def test_one_that_drains_keeps_no_client_from_the_others(self) -> None:
        """
        It accepts no connections: all clients are served.
        """
        found = judge_all([self.well, judge(**{**WELL, "draining": True})], 2)
        self.assertEqual((True, True), (found.can_serve, found.can_fetch))
        self.assertEqual(("1 of 2 worker processes are draining",), found.reasons)

    def test_when_all_drain_nobody_is_served(self) -> None:
        self.assertFalse(judge_all([judge(**{**WELL, "draining": True})] * 2, 2).can_serve)


class ConditionTests(DaemonTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.hands = Hands()
        self.hands.idle = False
        self.condition = Condition(self.daemon.store, self.hands, self.clock)

    def ask(self) -> Deferred[ConditionReport]:
        return Deferred.fromCoroutine(self.condition.latest())

    def test_one_look_does_for_all_who_ask_within_two_seconds(self) -> None:
        asked = [self.ask() for _ in range(1000)]
        self.assertEqual(1, len(self.hands.waiting))
        self.hands.work()
        self.assertEqual({ConditionReport()}, {self.successResultOf(each) for each in asked})
        self.clock.advance(FRESH_SECONDS - 0.1)
        self.assertEqual(ConditionReport(), self.successResultOf(self.ask()))
        self.assertEqual(0, len(self.hands.waiting))
        self.clock.advance(0.1)
        self.assertNoResult(again := self.ask())
        self.hands.work()
        self.successResultOf(again)

    def test_content_is_found_and_anything_else_is_none(self) -> None:
        (self.root / "content" / "sha256" / "ab").mkdir(parents=True)
        (self.root / "arriving" / f"sha256-{'ab' * 32}").write_bytes(b"arriving")
        self.assertFalse(self.daemon.store.has_content())
        self.get(f"/v2/team/app/blobs/{self.standin.push_blob('team/app', noise('x', 10))}")
        self.assertTrue(self.daemon.store.has_content())

    def test_a_disk_that_hangs_is_told_and_asked_nothing_more(self) -> None:
        asked = self.ask()
        self.clock.advance(PATIENCE)
        self.assertIn("has not answered for 2 s", self.successResultOf(asked).reasons[0])
        self.clock.advance(60)
        self.assertIn("has not answered for 62 s", self.successResultOf(self.ask()).reasons[0])
        self.assertEqual(1, len(self.hands.waiting))
        self.hands.work()
        self.assertEqual(ConditionReport(), self.successResultOf(self.ask()))

    def test_a_client_that_leaves_takes_nobodys_answer_along(self) -> None:
        gone, kept = self.ask(), self.ask()
        gone.addErrback(lambda _: None)
        gone.cancel()
        self.hands.work()
        self.assertEqual(ConditionReport(), self.successResultOf(kept))

    def test_readyz_writes_to_the_disk_once_for_all_who_ask(self) -> None:
        written: list[int] = []
        check = self.daemon.store.checks.run

        def counted() -> None:
            written.append(1)
            check()

        self.patch(self.daemon.store.checks, "run", counted)
        self.pass_time(FRESH_SECONDS)
        replies = [self.daemon.send("GET", "/readyz") for _ in range(100)]
        self.flush()
        self.assertEqual(({200}, 1), ({reply.code for reply in replies}, len(written)))


class ReadyTestCase(DaemonTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.asked: list[Deferred[Token]] = []
        self.blob = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', noise('x', 1000))}"

    def fetch(self) -> Deferred[Token]:
        self.asked.append(Deferred())
        return self.asked[-1]

    def answer(self) -> None:
        self.asked[-1].callback(Token(self.standin.issue_token(), self.clock.seconds() + 12 * 3600))
        self.flush()

    def ready(self) -> tuple[int, bool, bool, str]:
        """
        Ask again: the status, whether it can serve, whether it can fetch, and why not.
        """
        self.pass_time(FRESH_SECONDS)
        reply = self.get("/readyz")
        said = json.loads(reply.body)
        return reply.code, said["can_serve"], said["can_fetch"], "; ".join(said["reasons"])


class ReadyTests(ReadyTestCase):
    """
    /readyz while AWS issues no token, with content in the cache and without.
    """

    def test_without_token_and_content_it_can_do_nothing(self) -> None:
        self.start(fetch=self.fetch)
        self.assertEqual((503, False, False, "no token: AWS has not answered yet"), self.ready())

    def test_content_lets_it_serve_while_aws_is_down(self) -> None:
        self.assertWhole(self.get(self.blob), noise("x", 1000))
        for problem in (TokenUnavailableError("AWS is down"), CredentialsError("refused")):
            self.asked.clear()
            self.start(fetch=self.fetch)
            self.asked[-1].errback(problem)
            self.assertEqual((200, True, False, f"no token: {problem}"), self.ready())
            self.assertWhole(self.get(self.blob), noise("x", 1000), "HIT")

    def test_content_lets_it_serve_while_aws_hangs(self) -> None:
        self.assertWhole(self.get(self.blob), noise("x", 1000))
        self.start(fetch=self.fetch)
        self.assertEqual((200, True, False), self.ready()[:3])
        self.assertWhole(self.get(self.blob), noise("x", 1000), "HIT")

    def test_a_token_that_ecr_rejects_is_none_if_aws_gives_no_other(self) -> None:
        self.start(fetch=self.fetch)
        self.answer()
        self.assertEqual((200, True, True, ""), self.ready())
        self.standin.expire_tokens()
        self.daemon.send("GET", self.blob)
        self.flush()
        self.asked[-1].errback(TokenUnavailableError("AWS is down"))
        self.flush()
        said = "no token: ECR rejects the token, and AWS gives no other: AWS is down"
        self.assertEqual((503, False, False, said), self.ready())
        self.pass_time(RENEW_SECONDS)
        self.answer()
        self.assertEqual((200, True, True, ""), self.ready())

    def test_a_rejected_token_is_none_while_a_fetch_hangs(self) -> None:
        self.start(fetch=self.fetch)
        self.answer()
        self.standin.expire_tokens()
        self.daemon.send("GET", self.blob)
        self.pass_time(FETCH_SECONDS + 1)
        for _ in range(30):
            self.assertEqual((503, False, False), self.ready()[:3])
        self.answer()
        self.assertEqual((200, True, True, ""), self.ready())

    def test_an_expired_token_is_none_while_a_fetch_hangs(self) -> None:
        self.start(fetch=self.fetch)
        self.answer()
        self.clock.advance(6 * 3600)
        self.pass_time(FETCH_SECONDS + 1)
        self.assertEqual((200, True, True, ""), self.ready(), "the token has six hours left")
        self.clock.advance(6 * 3600)
        code, can_serve, _, why = self.ready()
        self.assertEqual((503, False), (code, can_serve))
        self.assertIn("the token has expired", why)

    def test_ecr_that_is_left_alone_keeps_it_from_fetching(self) -> None:
        self.standin.fail("registry", status=503)
        for number in range(3):
            self.daemon.send("GET", f"/v2/team/app{number}/manifests/latest")
        self.pass_time(1)
        self.assertEqual((200, True, False), self.ready()[:3])
        self.assertIn("ECR keeps failing, and is left alone for a while: ", self.ready()[3])
        self.standin.heal()
        self.pass_time(10)
        self.assertEqual((200, True, True, ""), self.ready())

    def test_one_failed_question_keeps_it_from_fetching_until_ecr_answers(self) -> None:
        self.standin.fail("registry", status=503)
        self.get(self.blob)
        can_fetch, why = self.ready()[2:]
        self.assertEqual((False, "ECR failed when it was asked last, for team/app:"), (can_fetch, why[:48]))
        self.standin.heal()
        self.assertEqual(200, self.get(self.blob).code)
        self.assertEqual((200, True, True, ""), self.ready())


class HangingTests(ReadyTestCase):
    """
    An ECR that accepts requests for two minutes and answers none, while clients request known tags.
    """

    HUNG = 120

    def hang(self, repositories: int, every: int) -> tuple[int, int, int]:
        """
        Let it hang, and then recover.

        @param every: seconds between requests for each repository's tag.
        @return: seconds until it was noticed, until recovery was noticed, and the longest wait of a client.
        """
        images = [self.standin.push_image(f"team/app{number}", "latest") for number in range(repositories)]
        paths = [f"/v2/team/app{number}/manifests/latest" for number in range(repositories)]
        for path, image in zip(paths, images, strict=True):
            self.assertWhole(self.get(path), image.manifest)
        self.pass_time(60)
        self.standin.hang("registry")
        seen: list[int] = []
        over: list[int] = []
        asked: list[tuple[int, Reply]] = []
        waited = 0
        for second in range(self.HUNG + 60):
            if second == self.HUNG:
                self.standin.heal()
            if second % every == 0:
                asked += [(second, self.daemon.send("GET", path)) for path in paths]
            self.pass_time(1)
            waited = max([waited, *(second + 1 - since for since, reply in asked if not reply.ended)])
            asked = [(since, reply) for since, reply in asked if not reply.ended]
            said = json.loads(self.get("/readyz").body)
            self.assertTrue(said["can_serve"])
            (over if said["can_fetch"] else seen).append(second + 1)
        self.assertEqual(list(range(seen[0], seen[-1] + 1)), seen, "it is said without a break")
        self.assertEqual({200}, {reply.code for reply in self.daemon.replies if isinstance(reply, Reply)})
        self.assertWhole(self.get(paths[0]), images[0].manifest, "REVALIDATED")
        return seen[0], seen[-1] + 1 - self.HUNG, waited

    def test_is_seen_in_half_a_minute_however_seldom_one_tag_is_asked_for(self) -> None:
        for every in (10, 60):
            seen, over, waited = self.hang(1, every)
            self.assertLessEqual((seen, over, waited), (HEADER_SECONDS + 1, 2, STALE_SECONDS))

    def test_is_over_seconds_after_ecr_is_back_however_much_is_asked_for(self) -> None:
        for repositories, every in ((2, 5), (5, 1), (5, 30)):
            seen, over, waited = self.hang(repositories, every)
            self.assertLessEqual(seen, HEADER_SECONDS + 1)
            self.assertLessEqual(over, LONGEST_PAUSE + 1)
            self.assertLessEqual(waited, STALE_SECONDS)
