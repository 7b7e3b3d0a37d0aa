"""
Failed requests of clients are recorded by kind, within a bound.
"""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.failures import LIMIT, LONGEST, Failed, Failures

PATH = "/v2/team/app/manifests/1"


class FailuresTests(SynchronousTestCase):
    """
    One process's failures, merged with those of others.
    """

    def setUp(self) -> None:
        self.now = 1000.0
        self.failures = Failures(lambda: self.now)

    def test_the_same_is_one_row_with_its_first_and_its_last_time(self) -> None:
        self.failures.note(PATH, 502, "failing", "192.0.2.1")
        self.now += 60
        self.failures.note(PATH, 502, "failing", "192.0.2.2")
        self.assertEqual((Failed(PATH, 502, "failing", 1000, 1060, 2, "192.0.2.2"),), self.failures.latest())

    def test_what_failed_last_is_first_and_what_failed_longest_ago_goes(self) -> None:
        for number in range(LIMIT + 3):
            self.failures.note(f"{PATH}.{number}", 502, "failing", "192.0.2.1")
        self.failures.note(f"{PATH}.5", 502, "failing", "192.0.2.1")
        kept = [each.path.rpartition(".")[2] for each in self.failures.latest()]
        self.assertEqual([*map(str, (5, *range(LIMIT + 2, 5, -1), 4, 3))], kept)

    def test_another_answer_is_another_row(self) -> None:
        self.failures.note(PATH, 502, "failing", "192.0.2.1")
        self.failures.note(PATH, 503, "circuit-open", "192.0.2.1")
        self.assertEqual([503, 502], [each.status for each in self.failures.latest()])

    def test_a_path_is_cut(self) -> None:
        self.failures.note("x" * 10_000, 502, "failing", "192.0.2.1")
        self.assertEqual([LONGEST], [len(each.path) for each in self.failures.latest()])

    def test_those_of_other_processes_are_added_up(self) -> None:
        """
        In any order: the earliest time of all counts, and the client of the latest failure.
        """
        other = Failures(lambda: self.now)
        other.note(PATH, 502, "failing", "192.0.2.9")
        self.now += 5
        self.failures.note(PATH, 502, "failing", "192.0.2.1")
        self.failures.add(other.take())
        self.assertEqual((), other.latest())
        self.assertEqual((Failed(PATH, 502, "failing", 1000, 1005, 2, "192.0.2.1"),), self.failures.latest())
