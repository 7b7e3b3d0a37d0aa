"""
Which repositories are allowed, and that no pattern blocks the daemon.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import formatEvent
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.access import namespaces
from ecrproxy.access.namespaces import LIST_SECONDS, LONGEST_WAIT, MATCH_SECONDS, Namespaces
from ecrproxy.settings.values import parse_pattern
from tests.daemon import DaemonTestCase, Hands

CATASTROPHE = r"(?:a|a|aa)+b?c?(?=z)"
"""Tries three ways for each character, and looks ahead for what can't follow."""
SLOW = r"(?:a|aa)+b|a+c[0-9]*"
"""Tries two ways for each character of such names, and still matches them."""
SLOW_NAME = "a" * 26 + "c"
LONG = "a" * 200
SHORT = 0.05
"""Seconds: too few for that pattern, and plenty for a name that is matched at once."""


class Counted:
    """
    Threads that count their calls.
    """

    def __init__(self) -> None:
        self.hands = Hands()
        self.calls = 0

    def __call__(self, blocking: Callable[..., Any], *args: Any) -> Deferred[Any]:
        self.calls += 1
        return self.hands(blocking, *args)


class NamespacesTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.threads, self.clock = Counted(), Clock()

    def make(self, pattern: str, seconds: float = MATCH_SECONDS) -> Namespaces:
        return Namespaces(parse_pattern(pattern), self.threads, self.clock, seconds=seconds)

    def status(self, judge: Namespaces, name: str) -> int:
        """
        Return 200 for a name, or the status of its refusal.
        """
        return self.statuses([self.ask(judge, name)])[0]

    def ask(self, judge: Namespaces, name: str) -> Deferred[None]:
        return Deferred.fromCoroutine(judge.admit(name))

    def statuses(self, asked: list[Deferred[None]]) -> list[int]:
        found: list[Any] = []
        for each in asked:
            each.addCallbacks(lambda _: found.append(200), lambda failure: found.append(failure.value.status))
        return found

    def test_a_pattern_decides_on_whole_names(self) -> None:
        judge = self.make("image1|image3")
        for _ in range(3):
            self.assertEqual([200, 403, 403], [self.status(judge, name) for name in ("image1", "image11", "aimage3")])

    def test_a_list_is_judged_in_a_thread_and_not_for_ever(self) -> None:
        self.threads.hands.idle = False
        judge = self.make("team/.*")
        good, bad = (Deferred.fromCoroutine(judge.choose(["team/a", "other/a", "team/b"])) for _ in range(2))
        self.assertEqual(1, self.threads.calls)
        self.threads.hands.work()
        self.assertEqual(["team/a", "team/b"], self.successResultOf(good))
        self.patch(self.clock, "seconds", count(0.0, LIST_SECONDS / 2).__next__)
        self.threads.hands.work()
        self.assertEqual(503, self.failureResultOf(bad).value.status)

    def test_a_herd_of_new_names_needs_no_thread(self) -> None:
        self.threads.hands.idle = False
        judge = self.make(".*")
        self.assertEqual([200] * 200, [self.status(judge, f"image{number}") for number in range(200)])
        self.assertEqual(0, self.threads.calls)

    def test_slow_verdicts_are_remembered(self) -> None:
        judge = self.make(SLOW)
        self.assertEqual([200, 200], [self.status(judge, SLOW_NAME), self.status(judge, SLOW_NAME)])
        self.assertEqual(1, self.threads.calls)

    def test_a_herd_of_slow_names_is_let_in(self) -> None:
        self.threads.hands.idle = False
        judge = self.make(SLOW)
        herd = [self.ask(judge, f"{SLOW_NAME}{number}") for number in range(20)]
        self.assertEqual(1, len(self.threads.hands.waiting), "more than one at a time")
        self.threads.hands.work_off()
        self.assertEqual([200] * 20, self.statuses(herd))

    def test_what_is_remembered_is_bounded(self) -> None:
        """
        However many names are requested, memory keeps the latest ones.
        """
        self.patch(namespaces, "REMEMBERED", 4)
        judge = self.make(".*")
        for number in range(100):
            self.status(judge, f"image{number}")
        self.assertEqual([f"image{number}" for number in range(96, 100)], [name for _, name in judge._verdicts])  # noqa: SLF001

    def test_who_asks_meanwhile_waits_for_the_same_verdict(self) -> None:
        """
        A name is judged in a thread once, and a client that disconnects cancels no other's verdict.
        """
        self.threads.hands.idle = False
        judge = self.make(SLOW)
        asked = [self.ask(judge, SLOW_NAME) for _ in range(3)]
        asked[0].cancel()
        self.failureResultOf(asked[0])
        self.threads.hands.work_off()
        self.assertEqual([None, None], [self.successResultOf(each) for each in asked[1:]])
        self.assertEqual(1, self.threads.calls)

    def test_a_pattern_that_takes_too_long_refuses(self) -> None:
        """
        A timeout decides nothing: 503, and the name is judged again with the next request.
        """
        judge = self.make(CATASTROPHE, SHORT)
        self.assertEqual([503, 503], [self.status(judge, LONG), self.status(judge, LONG)])
        self.assertEqual(2, self.threads.calls)

    def test_new_names_pass_while_others_wait_for_a_slow_pattern(self) -> None:
        judge = self.make("image[0-9]*|" + CATASTROPHE, SHORT)
        self.threads.hands.idle = False
        waiting = [self.ask(judge, f"{LONG}{number}") for number in range(30)]
        self.assertEqual([200] * 200, [self.status(judge, f"image{number}") for number in range(200)])
        self.assertEqual(1, len(self.threads.hands.waiting))
        self.threads.hands.work_off()
        self.assertEqual({503}, set(self.statuses(waiting)))

    def test_names_wait_for_the_thread_ten_seconds_at_most(self) -> None:
        self.threads.hands.idle = False
        judge = self.make(CATASTROPHE, SHORT)
        waiting = [self.ask(judge, f"{LONG}{number}") for number in range(100)]
        self.clock.advance(LONGEST_WAIT)
        self.assertEqual([503] * 99, [each for each in self.statuses(waiting) if each != 200])
        self.threads.hands.work_off()
        self.assertEqual(1, self.threads.calls, "names were judged for clients that were told to come again")


class PatternTests(DaemonTestCase):
    def test_a_refusal_logs_the_pattern_once_per_repository(self) -> None:
        self.start(pattern="team/.*")
        for repository in ("other/app", "other/app", "team/app", "another"):
            self.get(f"/v2/{repository}/manifests/latest")
        refused = [line for line in self.logged().splitlines() if "PROXY_NAMESPACE_PATTERN='team/.*'" in line]
        self.assertEqual(2, len(refused), refused)
        for name, line in zip(("other/app", "another"), refused, strict=True):
            self.assertIn(f"Refused {name}:", line)

    def test_a_refused_registry_is_logged_once(self) -> None:
        for name in ("docker.io", "docker%2Eio", "123456789012.dkr.ecr.eu-west-1.amazonaws.com"):
            self.daemon.ask("HEAD", f"/v2/docker-hub/library/nginx/manifests/latest?ns={name}")
        refused = [event for event in self.events if event.get("registry")]
        self.assertEqual({("ns", "docker.io")}, {event["once"] for event in refused}, "which the log writes once")
        self.assertIn("'docker.io': add that name to PROXY_REGISTRY_ALIASES", formatEvent(refused[0]))

    def test_a_client_is_told_that_the_pattern_is_too_slow(self) -> None:
        """
        A name that can't be judged in time gets 503, a line tells the operator, and ECR is not asked.
        """
        self.start(pattern=CATASTROPHE)
        reply = self.get(f"/v2/{LONG}/manifests/latest")
        self.assertRefused(reply, 503, "UNAVAILABLE", "takes too long")
        self.assertEqual("10", reply.header("Retry-After"))
        self.assertIn("PROXY_NAMESPACE_PATTERN took more than", self.logged())
        self.assertEqual([], self.standin.asked)
