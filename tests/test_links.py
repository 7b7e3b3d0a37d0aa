"""
The next page in a Link header.
"""

from __future__ import annotations

import time

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.registry.links import next_target


class NextTargetTests(SynchronousTestCase):
    def test_is_that_of_the_first_link_to_the_next_page(self) -> None:
        for header, target in {
            '<https://ecr/v2/a/tags/list?last=a%2Bb%3D&n=2>; rel="next"': "https://ecr/v2/a/tags/list?last=a%2Bb%3D&n=2",
            "<a>;rel=next": "a",
            '<a> ; REL = "Next"': "a",
            '<a>; rel="prev next"': "a",
            '<a>; title="x"; rel=next; title="y"': "a",
            '<b>; rel="prev", <a?x=1,2;3>; rel="next", <c>; rel=next': "a?x=1,2;3",
            '<b>; title="a, <c>; rel=next"; rel="prev", <a>; rel=next': "a",
            '<b>; title="\\", <c>; rel=next"; rel=prev,<a>;rel=next': "a",
            '<a>; rel="ne\\xt"': "a",
            "<>; rel=next": "",
        }.items():
            self.assertEqual(target, next_target(header), header)

    def test_is_none_where_no_link_says_so(self) -> None:
        for header in (
            "",
            "<a>",
            "a; rel=next",
            "<a; rel=next",
            "<a>; rel=nextish",
            "<a>; rel=prev; rel=next",
            "<a>; title=next",
            '<a>; title="rel=next"',
            "<a>, b; rel=next",
            "<a>; rel",
            "<a>; rel=",
            "\xff\x00",
        ):
            self.assertIsNone(next_target(header), header)

    def test_takes_time_in_proportion_to_the_header(self) -> None:
        for text in ("<", '"', "<>", '"\\', '\\"', "<a>;", ";", "=", ",", "rel=", '<a>;rel="', '<"', " ", "a"):
            for start in ("", '"', "<a>; rel=", '<a>; rel="'):
                began = time.process_time()
                next_target(start + text * (160_000 // len(text)))
                # A parser that scans the rest at each position took 100 s for ten times a header's 16 KB.
                self.assertLess(time.process_time() - began, 2)
