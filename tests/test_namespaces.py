"""
Which repositories are let in, and that no pattern stops the daemon.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.access import namespaces
from ecrproxy.access.namespaces import MATCH_SECONDS, Namespaces
from ecrproxy.oci import RegistryError
from ecrproxy.settings.values import parse_pattern
from tests.daemon import DaemonTestCase, Hands

CATASTROPHE = r"(?:a|a|aa)+b?c?(?=z)"
"""Tries three ways for each character, and looks ahead for what can't follow."""
LONG = "a" * 200
SHORT = 0.05
"""Seconds that are too few for that, and plenty for a name that is judged at once."""


class Counted:
    """
    Threads that count what they are given.
    """

    def __init__(self) -> None:
        self.hands = Hands()
        self.calls = 0

    def __call__(self, blocking: Callable[..., Any], *args: Any) -> Deferred[Any]:
        self.calls += 1
        return self.hands(blocking, *args)


class NamespacesTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.threads = Counted()

    def make(self, pattern: str, seconds: float = MATCH_SECONDS) -> Namespaces:
        return Namespaces(parse_pattern(pattern), self.threads, seconds=seconds)

    def test_another_registrys_repositories_are_none_of_ours(self) -> None:
        """
        Whatever they are called: the same name may hold something else there.
        """
        judge = Namespaces(parse_pattern(".*"), self.threads, "other".__eq__)
        judge.admit_registry("ours")
        problem = self.assertRaises(RegistryError, judge.admit_registry, "other")
        self.assertEqual((404, "NAME_UNKNOWN", "namespace"), (problem.status, problem.code, problem.reason))

    def status(self, judge: Namespaces, name: str) -> int:
        """
        Say how a name fares: 200, or the status of its refusal.
        """
        outcome: list[int] = []

        async def ask() -> None:
            try:
                await judge.admit(name)
            except RegistryError as problem:
                outcome.append(problem.status)
            else:
                outcome.append(200)

        self.successResultOf(Deferred.fromCoroutine(ask()))
        return outcome[0]

    def test_verdicts_are_remembered(self) -> None:
        """
        A name is judged once, whether it is let in or not.
        """
        judge = self.make("image1|image3")
        for _ in range(3):
            self.assertEqual([200, 403, 403], [self.status(judge, name) for name in ("image1", "image11", "aimage3")])
        self.assertEqual(3, self.threads.calls)

    def test_what_is_remembered_is_bounded(self) -> None:
        """
        However many names are asked for, memory keeps the last ones.
        """
        self.patch(namespaces, "REMEMBERED", 4)
        judge = self.make(".*")
        for number in range(100):
            self.status(judge, f"image{number}")
        for number in (96, 97, 98, 99):
            self.status(judge, f"image{number}")
        self.assertEqual(100, self.threads.calls)
        self.assertEqual(4, len(judge._verdicts))  # noqa: SLF001

    def test_who_asks_meanwhile_waits_for_the_same_verdict(self) -> None:
        """
        A name is in a thread once, and a client that leaves takes nobody's verdict along.
        """
        self.threads.hands.idle = False
        judge = self.make(".*")
        asked = [Deferred.fromCoroutine(judge.admit("image")) for _ in range(3)]
        asked[0].cancel()
        self.failureResultOf(asked[0])
        self.threads.hands.work_off()
        self.assertEqual([None, None], [self.successResultOf(each) for each in asked[1:]])
        self.assertEqual(1, self.threads.calls)

    def test_a_pattern_that_takes_too_long_refuses(self) -> None:
        """
        Out of time nothing is decided: 503, and the name is judged again when it is asked for again.
        """
        judge = self.make(CATASTROPHE, SHORT)
        self.assertEqual([503, 503], [self.status(judge, LONG), self.status(judge, LONG)])
        self.assertEqual(2, self.threads.calls)

    def test_known_names_pass_while_a_pattern_takes_its_time(self) -> None:
        """
        Only names that nobody asked for before wait for one that can't be judged, and not endlessly many.
        """
        judge = self.make("image|" + CATASTROPHE, SHORT)
        self.assertEqual(200, self.status(judge, "image"))
        self.threads.hands.idle = False
        waiting = [Deferred.fromCoroutine(judge.admit(f"{LONG}{number}")) for number in range(namespaces.WAITING + 1)]
        for each in waiting:
            self.assertNoResult(each)
        self.assertEqual(2, self.threads.calls)  # one at a time
        self.assertEqual([200, 503], [self.status(judge, "image"), self.status(judge, "another")])
        self.threads.hands.work_off()
        for each in waiting:
            self.failureResultOf(each, RegistryError)


class PatternTests(DaemonTestCase):
    def test_a_refusal_logs_the_pattern_once_per_repository(self) -> None:
        self.start(pattern="team/.*")
        for repository in ("other/app", "other/app", "team/app", "another"):
            self.get(f"/v2/{repository}/manifests/latest")
        refused = [line for line in self.logged().splitlines() if "PROXY_NAMESPACE_PATTERN='team/.*'" in line]
        self.assertEqual(2, len(refused), refused)
        for name, line in zip(("other/app", "another"), refused, strict=True):
            self.assertIn(f"Refused {name}:", line)

    def test_a_client_is_told_that_the_pattern_is_too_slow(self) -> None:
        """
        A name that can't be judged in time is refused with 503, a line tells the operator, and ECR is not asked.
        """
        self.start(pattern=CATASTROPHE)
        reply = self.get(f"/v2/{LONG}/manifests/latest")
        self.assertRefused(reply, 503, "UNAVAILABLE", "takes too long")
        self.assertEqual("10", reply.header("Retry-After"))
        self.assertIn("PROXY_NAMESPACE_PATTERN took more than", self.logged())
        self.assertEqual([], self.standin.asked)
