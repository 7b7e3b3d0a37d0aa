"""
What was answered from memory before is answered by the bytes of its head, as the long way would answer it.
"""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.both_ways import Scene, compare, deeds, heads

STEPS = st.integers(0, 255)


class SameStoryTests(SynchronousTestCase):
    """
    With the hot path and without: the same answers, lines, figures, questions to ECR, and clients that are connected.
    """

    @settings(max_examples=60, deadline=None)
    @given(st.lists(STEPS, max_size=40))
    @example([])
    def test_a_story_is_the_same_both_ways(self, steps: list[int]) -> None:
        compare(bytes(steps))

    def test_each_deed_between_two_requests_is_seen_by_the_second(self) -> None:
        """
        Each head is sent until it is known, then something happens, and it is sent again.
        """
        scene = Scene(hot_path=True)
        requests, others = len(heads(scene)), len(deeds(scene))
        scene.close()
        answered = 0
        for deed in range(others):
            story = list[int]()
            for request in range(requests):
                story += [request << 1, request << 1, request << 1 | 1]
            answered += compare(bytes([*story, (requests + deed) << 1, *story]))
        self.assertGreater(answered, others * 10)
