"""
The status page, read as a browser and a screen reader would.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

from twisted.trial.unittest import SynchronousTestCase
from twisted.web.template import flattenString

from ecrproxy.admin.charts import HEIGHT, LEAST, WIDTH, ceiling, hit_chart, traffic_chart
from ecrproxy.admin.history import SCALES, Point, Scale
from ecrproxy.admin.incidents import Incident
from ecrproxy.admin.page import Page
from ecrproxy.admin.port import PARTS
from ecrproxy.admin.snapshot import (
    TRANSFERS,
    Answers,
    Clients,
    Fill,
    Leaving,
    RegistryState,
    Saving,
    Snapshot,
    TokenState,
    Transfer,
    UpstreamState,
)
from ecrproxy.admin.units import ago, clean, moment, share, short, size, span, stamp
from ecrproxy.failures import Failed
from tests.daemon import noise
from tests.markup import Node, Reader
from tests.test_status import StatusTestCase

DIGEST = f"sha256:{'0123456789abcdef' * 4}"
EMPTY = Snapshot(
    version="1.0.0",
    host="one",
    registry="https://123456789012.dkr.ecr.eu-west-1.amazonaws.com",
    when=1_800_000_000.0,
    uptime=100.0,
    reasons=(),
    cache=Fill(0, 0, 2**30, 0, 0, ()),
    clients=Clients(),
    transfers=(),
    repositories=(),
    token=TokenState(None, 1_800_010_000.0, 5000.0, 0),
    upstream=UpstreamState("closed", 0, None, {"manifests": 0}, 0, {}),
    registries=(),
    answers={},
    now=Point(0),
    lately=Point(0),
    history=(),
    failed=(),
    incidents=(),
)
FULL = replace(
    EMPTY,
    clients=Clients(12, 340, 3, 0.25, 2),
    cache=Fill(2**29, 2**20, 2**30, 20, 3, (Leaving("content", DIGEST, 2**20, EMPTY.when - 7200),)),
    transfers=(
        Transfer("team/app", DIGEST, 1000, 250, 2, kept=True),
        Transfer("team/big", DIGEST, None, 9, 1, kept=False),
    ),
    repositories=(Saving("team/app", 2**30, 12), Saving("team/base", 2**29, 3)),
    upstream=UpstreamState(
        "closed", 0, 2.0, {"manifests": 1}, 4, {"registry": {"200": 5, "404": 2, "429": 1, "503": 3}}
    ),
    registries=(
        RegistryState("one.test", EMPTY.token, EMPTY.upstream),
        RegistryState(
            "*.two.test",
            TokenState("denied", None, 1.0, 1),
            UpstreamState(
                "open", 0, None, {}, 0, {"registry": {"404": 1, "429": 2, "503": 4}, "bucket": {"failed": 8}}
            ),
            {"HIT": Answers(1, 2**20), "MISS": Answers(1, 2**30)},
        ),
    ),
    answers={"HIT": Answers(30, 300), "MISS": Answers(10, 100)},
    now=Point(5, 2, 1, 5 * 2**20, 2**20),
    lately=Point(35, 12, 10),
    history=(
        Point(30, 10, 9, 100, 10, 0, (3, 7, *[0] * 7)),
        Point(5, 2, 1, 5 * 2**20, 2**20, 0, (*[0] * 6, 1, 0, 1)),
    ),
    failed=(Failed("/v2/team/app/manifests/1", 502, "failing", EMPTY.when - 7200, EMPTY.when - 3660, 12, "192.0.2.7"),),
    incidents=(Incident(EMPTY.when - 60, "error", "the disk is full", 3),),
)


class PageTestCase(SynchronousTestCase):
    def page(self, snapshot: Snapshot) -> Node:
        """
        Render a page, and parse it.
        """
        self.html = self.successResultOf(flattenString(None, Page(snapshot))).decode()
        return Reader(self.html).top

    def section(self, page: Node, name: str) -> Node:
        """
        Return the section with that heading.
        """
        (found,) = [each for each in page.all("section") if each.all("h2")[0].text == name]
        return found

    def rows(self, section: Node) -> list[list[str]]:
        """
        Return the text of a section's table, without its head.
        """
        rows = [[cell.text for cell in row.all("th", "td")] for row in section.all("tr")]
        return rows[1:]


class PageTests(PageTestCase):
    """
    The page's content.
    """

    def test_shows_what_is_on_its_way_and_who_follows(self) -> None:
        """
        With a bar for each, without a length if upstream does not announce the size.
        """
        section = self.section(self.page(FULL), "On the way from ECR")
        self.assertIn("2 for 3 clients", section.text)
        self.assertEqual(
            [
                ["team/app sha256:0123456789…", "25.0 % of 1,000 B 25.0 % of 1,000 B", "2"],
                ["team/big sha256:0123456789…", "9 B so far 9 B so far, not kept", "1"],
            ],
            self.rows(section),
        )
        known, unknown = section.all("progress")
        self.assertEqual(("250", "1000"), (known.attributes["value"], known.attributes["max"]))
        self.assertNotIn("value", unknown.attributes)

    def test_shows_the_cache_and_what_goes_next(self) -> None:
        """
        How full it is, and what would be evicted next.
        """
        section = self.section(self.page(FULL), "Cache")
        self.assertEqual("Used 512 MiB Arriving 1.0 MiB Limit 1.0 GiB Files 20 Evicted 3", section.all("dl")[0].text)
        self.assertEqual([["sha256:0123456789… content", "1.0 MiB", "2 h ago"]], self.rows(section))

    def test_shows_repositories_by_bytes_saved(self) -> None:
        """
        The one with the most has the longest bar.
        """
        section = self.section(self.page(FULL), "Repositories by bytes saved")
        self.assertEqual([["team/app", "1.0 GiB", "12"], ["team/base", "512 MiB", "3"]], self.rows(section))
        self.assertEqual(["100.0", "50.0"], [each.attributes["width"] for each in section.all("rect")])

    def test_shows_token_ecr_and_troubles(self) -> None:
        """
        What an operator needs when something is wrong.
        """
        page = self.page(FULL)
        self.assertIn("State good Expires in 2 h 46 min Next refresh in 1 h 23 min", self.section(page, "Token").text)
        ecr = self.section(page, "ECR")
        self.assertIn("Can fetch yes Circuit closed Answered last 2 s ago Asked again 4", ecr.text)
        self.assertEqual([["registry", "5", "2", "1", "3"]], self.rows(ecr))
        self.assertEqual(
            [["1 min ago error", "the disk is full (3 times)"]], self.rows(self.section(page, "Warnings and errors"))
        )

    def test_shows_how_each_registry_is(self) -> None:
        """
        If there are several.
        """
        self.assertEqual(
            [["one.test", "closed", "good", "0", "0 B"], ["*.two.test", "open", "denied", "14", "1.0 MiB"]],
            self.rows(self.section(self.page(FULL), "Registries")),
        )
        page = self.page(replace(FULL, registries=FULL.registries[:1]))
        self.assertNotIn("Registries", [each.text for each in page.all("h2")])

    def test_shows_at_a_glance_what_went_through(self) -> None:
        """
        Ratio, traffic and savings, as numbers.
        """
        glance = self.section(self.page(FULL), "At a glance").text
        for words in ("83.3 % of 12 requests", "1.0 MiB/s now", "300 B 75.0 % of all bytes"):
            self.assertIn(words, glance)
        self.assertIn("Half answered within 25 ms 99 % within over 5 min", glance)

    def test_links_to_each_range_and_tells_which_is_shown(self) -> None:
        page = self.page(replace(FULL, scale=SCALES[1]))
        links = [each for each in page.all("a") if each.attributes["href"].startswith("?range=")]
        self.assertEqual(
            [("?range=15m", "15 min", None), ("?range=6h", "6 h", "true"), ("?range=3d", "3 days", None)],
            [(each.attributes["href"], each.text, each.attributes.get("aria-current")) for each in links],
        )
        self.assertIn("Failed, last 6 h", self.section(page, "At a glance").text)
        self.assertIn("6 h ago 3 h 0 min now", self.section(page, "Traffic").text)

    def test_its_table_adds_up_to_its_tiles(self) -> None:
        rows = self.rows(self.page(FULL).all("details")[0])
        self.assertEqual([["35 s", "12", "0", "83.3 %", "5.0 MiB", "1.0 MiB"]], rows)

    def test_shows_what_the_daemon_has_to_do(self) -> None:
        told = self.section(self.page(FULL), "This daemon").text
        self.assertEqual(
            "This daemon Machine one Processes 2 Connections 12 of 340 Sending 3 answers Longest stall 250 ms", told
        )

    def test_says_how_the_daemon_is(self) -> None:
        """
        In words, first of all and in the title, with the reasons.
        """
        page = self.page(FULL)
        self.assertEqual("ecrproxy: ready", page.all("title")[0].text)
        left = replace(EMPTY, can_fetch=False, upstream=UpstreamState("open", 0, 60.0, {}, 0, {}))
        self.assertEqual(
            "ecrproxy: can't fetch from upstream, serves what is cached", self.page(left).all("title")[0].text
        )
        page = self.page(replace(EMPTY, can_serve=False, reasons=("the disk is full",)))
        (health,) = [each for each in page.all("div") if each.attributes.get("role") == "status"]
        self.assertEqual("Not ready the disk is full", health.text)

    def test_says_first_that_requests_fail(self) -> None:
        """
        Those of the last minutes, whether or not ECR is known to be down.
        """
        lately = replace(EMPTY, lately=Point(300, 81, failed=8))
        for snapshot, words in (
            (lately, "Serves, but 8 requests failed in the last 5 min"),
            (
                replace(lately, can_fetch=False),
                "Can't fetch from upstream, serves what is cached; 8 requests failed in the last 5 min",
            ),
            (replace(lately, lately=Point(300, 90)), "Ready"),
        ):
            (health,) = [each for each in self.page(snapshot).all("div") if each.attributes.get("role") == "status"]
            self.assertEqual(words, health.text)

    def test_shows_what_failed_for_whom_and_since_when_before_the_charts(self) -> None:
        page = self.page(FULL)
        self.assertEqual(
            [["1 h ago first 2 h ago", "team/app/manifests/1 502 failing (12 times), last for 192.0.2.7"]],
            self.rows(self.section(page, "Failed requests")),
        )
        headings = [each.text for each in page.all("h2")]
        self.assertEqual(["At a glance", "Failed requests", "Warnings and errors", "Hit ratio"], headings[:4])

    def test_of_a_daemon_that_has_done_nothing_is_whole(self) -> None:
        """
        Empty sections have words, and no empty tables.
        """
        page = self.page(EMPTY)
        for words in ("Nothing is on its way.", "The cache is empty.", "Nothing was saved yet", "There were none."):
            self.assertIn(words, page.text)
        self.assertEqual(["details"], [each.tag for each in page.all("details", "section") if each.all("table")])

    def test_does_not_grow_without_end(self) -> None:
        """
        With the maximum of everything it has a few hundred KB, most of it transfers.
        """
        name = "a" * 255
        most = replace(
            FULL,
            transfers=(Transfer(name, DIGEST, 2**40, 2**39, 10**6, kept=True),) * TRANSFERS,
            repositories=(Saving(name, 2**50, 10**9),) * 10,
            history=(Point(864, 10**6, 10**5, 2**40, 2**40),) * 180,
            incidents=(Incident(0, "critical", "x" * 300),) * 20,
        )
        self.page(most)
        self.assertLess(len(self.html), 250_000)


class HostileTests(PageTestCase):
    """
    Text from outside.
    """

    def test_are_shown_as_text(self) -> None:
        """
        Markup, quotes, bidirectional and unprintable characters have no effect, wherever they occur.
        """
        evil = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\u202e\0\ud800"
        page = self.page(
            replace(
                FULL,
                registry=f"https://{evil}",
                reasons=(evil,),
                cache=replace(FULL.cache, next=(Leaving("content", evil, 1, 0),)),
                transfers=(Transfer(evil, DIGEST, 2, 1, 1, kept=True),),
                repositories=(Saving(evil, 1, 1),),
                token=TokenState(evil, None, 0.0, 1),
                registries=(RegistryState(evil, TokenState(evil, None, 0.0, 1), FULL.upstream),) * 2,
                incidents=(Incident(0, "error", evil),),
            )
        )
        self.assertEqual(["script.js"], [each.attributes["src"] for each in page.all("script")])
        self.assertEqual([], page.all("img"))
        self.assertEqual(12, page.text.count("<script>alert(1)</script>") + self.progress(page).count("<script>"))
        for char in "\u202e\0":
            self.assertNotIn(char, self.html)

    def progress(self, page: Node) -> str:
        (bar,) = page.all("progress")
        return bar.attributes["aria-label"]


class StrictTests(PageTestCase):
    """
    The elements of the page.
    """

    def test_nothing_comes_from_elsewhere(self) -> None:
        """
        Every address in it is on this port, by a relative path.
        """
        named = [
            value
            for each in self.page(FULL).all()
            for name, value in each.attributes.items()
            if name in ("src", "href")
        ]
        links = "?registry=one.test", "?registry=%2A.two.test", *(f"?range={each.name}" for each in SCALES)
        others = "#figures", "contents", "status.json", "metrics", "readyz"
        self.assertEqual({*PARTS, *others, *links} - {"contents.js"}, set(named))
        self.assertEqual([], re.findall(r"https?://(?!www\.w3\.org)", self.html))

    def test_there_is_no_style_or_script_in_it(self) -> None:
        """
        Its Content-Security-Policy forbids them.
        """
        page = self.page(FULL)
        self.assertEqual([], page.all("style"))
        self.assertEqual("", "".join(each.text for each in page.all("script")))
        names = {name for each in page.all() for name in each.attributes}
        self.assertEqual(set(), {name for name in names if name == "style" or name.startswith("on")})

    def test_without_scripts_it_is_loaded_again(self) -> None:
        """
        Only then: with scripts, a reload would lose the reader's state.
        """
        (noscript,) = self.page(FULL).all("noscript")
        self.assertEqual(
            [{"http-equiv": "refresh", "content": "5"}], [each.attributes for each in noscript.all("meta")]
        )
        self.assertEqual(1, self.html.count("http-equiv"))


class SpokenTests(PageTestCase):
    """
    What a screen reader finds.
    """

    def setUp(self) -> None:
        self.top = self.page(FULL)

    def test_landmarks_and_headings(self) -> None:
        """
        One of each landmark, a language, and headings without a missing level.
        """
        for tag in ("header", "main", "footer", "nav", "h1"):
            self.assertEqual(1, len(self.top.all(tag)), tag)
        self.assertEqual("en", self.top.all("html")[0].attributes["lang"])
        levels = [int(each.tag[1]) for each in self.top.all("h1", "h2", "h3")]
        self.assertTrue(all(after - before <= 1 for before, after in pairwise(levels)))

    def test_sections_are_named_by_their_headings(self) -> None:
        """
        Each refers to an existing heading, and ids are unique.
        """
        ids = [each.attributes["id"] for each in self.top.all() if "id" in each.attributes]
        self.assertEqual(len(ids), len(set(ids)))
        for section in self.top.all("section"):
            self.assertEqual(section.attributes["aria-labelledby"], section.all("h2")[0].attributes["id"])

    def test_tables_have_heads(self) -> None:
        """
        Each column and each row has a head with a scope.
        """
        for table in self.top.all("table"):
            head, body = table.all("thead")[0], table.all("tbody")[0]
            self.assertEqual({"col"}, {each.attributes["scope"] for each in head.all("th")})
            for row in body.all("tr"):
                self.assertEqual(["row"], [each.attributes["scope"] for each in row.all("th")])
                self.assertEqual(len(head.all("th")), len(row.all("th", "td")))

    def test_what_is_drawn_is_told_in_words(self) -> None:
        """
        Charts, bars and meters have names; decoration is hidden.
        """
        for each in self.top.all("progress", "meter"):
            self.assertTrue(each.attributes["aria-label"])
        spoken = [each for each in self.top.all("svg") if "aria-hidden" not in each.attributes]
        self.assertEqual(["img", "img"], [each.attributes["role"] for each in spoken])
        self.assertEqual(
            [
                "Hit ratio in the last 15 min: 83.3 % over all, 50.0 % at the lowest, 50.0 % at last.",
                "Traffic in the last 15 min: to clients 1.0 MiB/s at the highest, from upstream 205 KiB/s.",
            ],
            [each.attributes["aria-label"] for each in spoken],
        )

    def test_little_is_announced_by_itself(self) -> None:
        """
        The state of the daemon, and that it does not answer: no numbers.
        """
        live = [each for each in self.top.all() if "role" in each.attributes and each.attributes["role"] == "status"]
        self.assertEqual(["Ready", ""], [each.text for each in live])
        self.assertNotIn("aria-live", self.html)


class ServedTests(StatusTestCase):
    """
    The page as the daemon serves it.
    """

    def test_shows_a_pull_under_way(self) -> None:
        """
        Its progress, from one view to the next, and the number of followers.
        """
        self.standin.hold(self.digest)
        for _ in range(2):
            self.daemon.send("GET", self.blob)
        for delivered in (100_000, 50_000):
            self.flush()
            self.arrive(self.digest, delivered)
        page = self.daemon.ask_admin("/").body.decode()
        (bar,) = Reader(page).top.all("progress")
        self.assertEqual({"150000", "300000"}, {bar.attributes["value"], bar.attributes["max"]})
        self.assertIn("for 2 clients", Reader(page).top.text)

    def test_a_page_and_its_parts_are_what_they_say(self) -> None:
        """
        With types, and a policy that allows nothing else.
        """
        for path, content_type in {"": "text/html; charset=utf-8", **PARTS}.items():
            reply = self.daemon.ask_admin(f"/{path}")
            self.assertEqual((200, content_type), (reply.code, reply.header("Content-Type")), path)
            self.assertIn("default-src 'none'", reply.header("Content-Security-Policy") or "")
            self.assertGreater(len(reply.body), 100)
        self.assertTrue(self.daemon.ask_admin("/").body.startswith(b"<!DOCTYPE html>"))

    def test_a_strangers_name_for_this_port_is_refused(self) -> None:
        """
        Page and parts are only served under our own names.
        """
        for path in ("", *PARTS):
            self.assertEqual(403, self.daemon.ask_admin(f"/{path}", host="evil.example").code)

    def test_a_pulls_name_is_escaped_wherever_it_comes_from(self) -> None:
        """
        Text from a client's path is escaped on the page, if it appears at all.
        """
        self.get("/v2/team/%3Cscript%3E/manifests/latest")
        self.standin.fail("registry", status=503)
        self.get("/v2/team/app/manifests/%3Cb%3E")
        self.get(f"/v2/team/app/blobs/{self.standin.push_blob('team/app', noise('x', 10))}")
        page = self.daemon.ask_admin("/").body.decode()
        self.assertEqual(1, page.count("<script"))
        self.assertNotIn("<b>", page)


def svg(tag: Any) -> str:
    """
    Return the paths of a chart's lines.
    """
    lines = [each for each in tag.children if each.attributes["class"].startswith("line")]
    return " ".join(each.attributes["d"] for each in lines)


HOUR = Scale("1h", "hour", 4, 12)


class ChartTests(SynchronousTestCase):
    def test_the_last_point_is_at_the_right(self) -> None:
        """
        Half an hour of points fills the right half, as high as the ratio.
        """
        half = [Point(900, 4, 4), Point(900, 4, 1)]
        self.assertEqual(f"M360.0 0.0V0.0H540.0V{0.75 * HEIGHT}H{WIDTH}.0", svg(hit_chart(half, HOUR)))

    def test_where_nothing_was_asked_there_is_a_gap(self) -> None:
        """
        Without requests there is no ratio, neither 0 nor 1.
        """
        drawn = svg(hit_chart([Point(900, 1, 1), Point(900), Point(900, 1, 1)], HOUR))
        self.assertEqual("M180.0 0.0V0.0H360.0M540.0 0.0V0.0H720.0", drawn)
        self.assertEqual("", svg(hit_chart([], HOUR)))
        self.assertIn("no requests", str(hit_chart([Point(30)], HOUR).attributes["aria-label"]))

    def test_traffic_reaches_up_to_a_power_of_two(self) -> None:
        """
        So that the scale seldom changes, and is easy to read.
        """
        self.assertEqual(LEAST, ceiling([]))
        self.assertEqual(2**20, ceiling([Point(10, sent=10 * 2**20), Point(0)]))
        self.assertEqual(2**21, ceiling([Point(10, received=10 * 2**20 + 10)]))
        drawn = svg(traffic_chart([Point(3600, sent=3600 * 2**20, received=3600 * 2**19)], HOUR))
        self.assertEqual(f"M0.0 0.0V0.0H720.0 M0.0 {HEIGHT / 2}V{HEIGHT / 2}H720.0", drawn)
        self.assertIn("nothing", str(traffic_chart([Point(30)], HOUR).attributes["aria-label"]))


class UnitTests(SynchronousTestCase):
    def test_bytes(self) -> None:
        """
        In the unit with few digits.
        """
        told = {
            0: "0 B",
            1000: "1,000 B",
            1024: "1.0 KiB",
            10 * 2**20: "10 MiB",
            2**30 - 1: "1.0 GiB",
            2**60: "1,048,576 TiB",
        }
        for count, words in told.items():
            self.assertEqual(words, size(count))

    def test_shares(self) -> None:
        """
        Nearly all is not shown as all, nor hardly anything as nothing.
        """
        told = {(0, 0): "\N{EN DASH}", (0, 5): "0 %", (5, 5): "100 %", (9999, 10000): "99.9 %", (1, 10**6): "0.1 %"}
        for (part, whole), words in told.items():
            self.assertEqual(words, share(part, whole))

    def test_times(self) -> None:
        """
        Durations and times; whatever a file says of its last use.
        """
        told = {-5: "0 s", 59: "59 s", 3599: "59 min", 3661: "1 h 1 min", 90000: "1 d 1 h"}
        for seconds, words in told.items():
            self.assertEqual(words, span(seconds))
        for seconds, words in {
            -5: "just now",
            1: "1 s ago",
            119: "1 min ago",
            7200: "2 h ago",
            10**6: "11 d ago",
        }.items():
            self.assertEqual(words, ago(seconds))
        self.assertEqual("08:00:00 UTC", moment(1_800_000_000))
        self.assertEqual("2027-01-15T08:00:00Z", stamp(1_800_000_000))
        for impossible in (1e300, -1e300, float("inf")):
            self.assertIn("1970", stamp(impossible))

    def test_digests_are_cut_and_nothing_else(self) -> None:
        """
        Wherever they occur in a name.
        """
        self.assertEqual("team/app@sha256:0123456789…", short(f"team/app@{DIGEST}"))
        for name in ("team/app:release-2026.10.1", "sha256:0123"):
            self.assertEqual(name, short(name))

    def test_what_can_not_be_shown_is_marked(self) -> None:
        """
        Control characters, lone surrogates, and bidirectional marks.
        """
        self.assertEqual("a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}é", clean("a\u202eb\0é"))
