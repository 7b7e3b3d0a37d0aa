"""
The repositories for which the cache saved the most bytes, in a bounded table.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.ranking import LIMIT, Ranking


class RankingTests(SynchronousTestCase):
    def test_the_largest_come_first(self) -> None:
        """
        By bytes, with the number of answers.
        """
        ranking = Ranking()
        for name, size in (("small", 5), ("large", 10), ("small", 1)):
            ranking.note(name, size)
        self.assertEqual([("large", 10, 1), ("small", 6, 2)], ranking.top(5))
        self.assertEqual([("large", 10, 1)], ranking.top(1))

    def test_does_not_grow_with_the_names_that_clients_ask_for(self) -> None:
        """
        A hundred thousand names leave as many rows as a few, and do not displace those with the most bytes.
        """
        ranking = Ranking()
        for number in range(100_000):
            ranking.note(f"team/{number}", 1)
            if not number % 20:
                ranking.note("team/app", 1)
        rows = ranking.top(10**6)
        self.assertEqual(LIMIT, len(rows))
        self.assertEqual("team/app", rows[0][0])

    @given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 100)), max_size=60))
    def test_who_has_enough_is_in_the_table(self, noted: list[tuple[str, int]]) -> None:
        """
        A name with more than the total divided by the rows is there, and no count is too low.
        """
        ranking, truth = Ranking(limit=3), Counter[str]()
        for name, size in noted:
            ranking.note(name, size)
            truth[name] += size
        rows = {name: size for name, size, _ in ranking.top(3)}
        for name, size in truth.items():
            if size > truth.total() / 3:
                self.assertIn(name, rows)
        for name, size in rows.items():
            self.assertGreaterEqual(size, truth[name])

    def test_what_was_taken_can_be_added_elsewhere(self) -> None:
        """
        A worker's rows become its parent's, and are counted once.
        """
        worker, parent = Ranking(), Ranking()
        parent.note("team/app", 5)
        worker.note("team/app", 7)
        worker.note("team/base", 1)
        parent.add(worker.take())
        parent.add(worker.take())
        self.assertEqual([("team/app", 12, 2), ("team/base", 1, 1)], parent.top(5))
