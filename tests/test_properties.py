"""
Claims for any request, setting and entry, checked against models that are simple enough to be obviously right.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import string
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Final
from urllib.parse import unquote

from hypothesis import assume, example, given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.byte_ranges import SMALL_GAP, Ranges, joined
from ecrproxy.cache.cache_key import Asker, CacheKey
from ecrproxy.cache.entries import Confirmed, Entry, EntryKey
from ecrproxy.cache.sqlite import Rows
from ecrproxy.documents import Document, listed
from ecrproxy.identity import RegistryId
from ecrproxy.oci import (
    INDEX_TYPE,
    MANIFEST_TYPES,
    Descriptor,
    Digest,
    Kind,
    RegistryError,
    Route,
    accepted_types,
    parse_route,
    query_values,
)
from ecrproxy.settings.table import SETTINGS, ConfigError, Setting
from ecrproxy.settings.values import (
    parse_connections,
    parse_pattern,
    parse_port,
    parse_seconds,
    parse_size,
    parse_workers,
)
from tests.routes import route_to

# The grammar again, letter for letter as in the distribution spec.
NAME: Final = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(\/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*"
TAG: Final = r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}"
DIGEST: Final = r"sha256:[a-f0-9]{64}|sha512:[a-f0-9]{128}"
PATH: Final = re.compile(
    rf"/v2/(?P<name>{NAME})/(manifests/({TAG}|{DIGEST})|blobs/({DIGEST})|referrers/({DIGEST})|tags/list)"
)

# Of the same shape, but short: longer ones show nothing more, and are slow to generate.
_PART: Final = r"[a-z0-9]{1,3}((\.|_|__|-{1,3})[a-z0-9]{1,2}){0,2}"
names = st.from_regex(rf"{_PART}(/{_PART}){{0,2}}", fullmatch=True)
tags = st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,9}", fullmatch=True)
digests = st.one_of(
    st.binary(max_size=4).map(Digest.of), st.binary(max_size=4).map(lambda data: Digest.of(data, "sha512"))
)
references = {
    Kind.MANIFEST: st.one_of(tags, digests.map(str)),
    Kind.BLOB: digests.map(str),
    Kind.REFERRERS: digests.map(str),
    Kind.TAGS: st.just("list"),
}
paths = st.sampled_from(Kind).flatmap(
    lambda kind: st.builds(lambda name, last: f"/v2/{name}/{kind.value}/{last}", names, references[kind])
)
registries = st.sampled_from([RegistryId("one.test:443"), RegistryId("two.test:443")])
routes = st.builds(parse_route, paths, registries)
_ENCODED: Final = ["%", "%2f", "%2F", "%2e", "%252f", "%3a", "%3A", "%00", "%6c"]
_DOTS: Final = ["/", "//", ".", "..", "/./", "/../", "\\", ":", "?", "#", "@", ";"]
_OTHERS: Final = ["\0", "\n", " ", "A", "_", "-", "\xe9", "\u0661", "tags/list", "/v2/", "http://x", "sha256:"]
games = st.sampled_from([*_ENCODED, *_DOTS, *_OTHERS])


@st.composite
def spoiled(draw: st.DrawFn) -> str:
    """
    A valid path in which something was inserted, removed or replaced.
    """
    path = draw(paths)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(path)))
        path = path[:start] + draw(games | st.just("")) + path[start + draw(st.integers(0, 3)) :]
    return path


def route_of(target: str) -> Route | None:
    """
    Parse a target; return None if it is rejected.
    """
    try:
        return route_to(target)
    except RegistryError:
        return None


class RouteTests(SynchronousTestCase):
    @given(paths)
    def test_a_route_has_one_path(self, path: str) -> None:
        """
        Every path of the grammar is parsed, and the result is spelled as it was requested.
        """
        route = route_to(path)
        self.assertEqual(path, route.path)
        self.assertEqual(route, route_to(route.path))

    @given(spoiled() | st.text())
    @example("/v2/a/blobs/sha256:" + "\u0661" * 64)
    @example("/v2/a/tags/list\n")
    @example("/v2/a/manifests/tag\n")
    @example("/v2/a/manifests/%6c")
    def test_nothing_else_gets_through(self, target: str) -> None:
        """
        Paths outside the grammar are rejected; spellings of one place differ only in escapes of name and reference.
        """
        route = route_of(target)
        path, _, query = target.partition("?")
        parts = path.removeprefix("/v2/").rsplit("/", 2)
        plain = path
        if path.startswith("/v2/") and len(parts) == 3:
            plain = f"/v2/{unquote(parts[0])}/{parts[1]}/{unquote(parts[2])}"
        fitting = PATH.fullmatch(plain)
        good = fitting is not None and len(fitting["name"]) <= 255
        if route is not None:
            self.assertTrue(good, target)
            self.assertEqual(plain, route.path)
            self.assertTrue(query.isascii() and query.isprintable() and " " not in query)
        elif not query:
            self.assertFalse(good, target)

    @given(st.text(alphabet=st.characters(codec="latin-1")))
    def test_a_query_is_split_whatever_it_is(self, query: str) -> None:
        """
        Each value of a query is a piece of it, unchanged.
        """
        for value in query_values(query).values():
            self.assertIn(value, query)


ACCEPTED: Final = (INDEX_TYPE, f"{INDEX_TYPE};q=0", f"{INDEX_TYPE.upper()};q=0.5", *sorted(MANIFEST_TYPES), "a/b")


class AcceptTests(SynchronousTestCase):
    @given(
        st.lists(
            st.sampled_from([INDEX_TYPE, f"{INDEX_TYPE};q=0", *MANIFEST_TYPES, f"{INDEX_TYPE.upper()};q=0.5", "a/b"])
        ),
        st.randoms(),
        st.booleans(),
    )
    def test_order_and_lines_say_nothing(self, types: list[str], chance: random.Random, lines: bool) -> None:
        """
        Clients that accept the same types share one answer, in whatever order and on however many lines.
        """
        other = chance.sample(types, len(types))
        given_so = other if lines else [",".join(other)]
        self.assertEqual(accepted_types([", ".join(types)]), accepted_types(given_so))

    @given(st.lists(st.text(alphabet=st.characters(codec="latin-1"))))
    def test_any_header_is_read(self, accept: list[str]) -> None:
        """
        Any Accept header becomes a set of manifest types, or any.
        """
        for media_type in accepted_types(accept):
            self.assertIn(media_type, MANIFEST_TYPES)


VARIABLES: Final = ("uri", "request_uri", "args", "host", "scheme", "request_method", "remote_addr", "repository")
texts = st.text(alphabet=st.characters(exclude_characters="$", codec="utf-8"), max_size=8)


class CacheKeyTests(SynchronousTestCase):
    @given(texts, st.lists(st.tuples(st.sampled_from(VARIABLES), texts), min_size=1, max_size=5), routes)
    def test_a_template_is_filled_in(self, start: str, rest: list[tuple[str, str]], route: Route) -> None:
        """
        A key is the template with each variable replaced by its value, and nothing else changed.
        """
        asker = Asker("GET", "/target", "https", "host.example", "192.0.2.1")
        values = {"uri": route.path, "request_uri": "/target", "args": "", "host": "host.example", "scheme": "https"}
        values |= {"request_method": "GET", "remote_addr": "192.0.2.1", "repository": route.repository.name}
        template = start + "".join(f"${{{name}}}{text}" for name, text in rest)
        expected = start + "".join(values[name] + text for name, text in rest)
        self.assertEqual(expected, CacheKey.parse(template).expand(route, asker))

    @given(st.text(alphabet=st.sampled_from("${}_ab:/" + "é")) | st.text())
    def test_a_template_is_understood_or_refused(self, template: str) -> None:
        """
        A template is rejected with ValueError, or its parts are all of it.
        """
        try:
            key = CacheKey.parse(template)
        except ValueError:
            return
        bare = template.replace("${", "").replace("}", "").replace("$", "")
        self.assertEqual(bare, "".join(key.parts).replace("${", "").replace("}", "").replace("$", ""))

    @given(st.text(max_size=3), routes, st.text(max_size=3), routes)
    def test_no_two_askers_share_an_entry(self, key: str, route: Route, other_key: str, other: Route) -> None:
        """
        Two requests have one entry only if key, kind, registry, repository and reference are the same.
        """
        one = (key, route.kind, route.repository, route.reference)
        two = (other_key, other.kind, other.repository, other.reference)
        same = EntryKey.of(route, key) == EntryKey.of(other, other_key)
        self.assertEqual(one == two, same)


class RangeTests(SynchronousTestCase):
    @given(st.none() | st.integers(0, 12), st.none() | st.integers(0, 12), st.integers(0, 10))
    def test_a_range_is_the_bytes_that_it_names(self, first: int | None, last: int | None, size: int) -> None:
        """
        A range is exactly the blob's bytes that it names; without any it is no range.
        """
        header = f"bytes={'' if first is None else first}-{'' if last is None else last}"
        data = range(size)
        if first is None:
            named = list(data[max(0, size - last) :]) if last is not None else []
        else:
            named = [byte for byte in data if first <= byte and (last is None or byte <= last)]
        if (first is None and last is None) or (first is not None and last is not None and last < first):
            self.assertIsNone(Ranges.parse(header))
            return
        ranges = Ranges.parse(header)
        assert ranges is not None
        if not named:
            self.assertRaises(LookupError, ranges.of, size)
        else:
            self.assertEqual([(named[0], named[-1] + 1)], ranges.of(size))

    @given(st.lists(st.tuples(st.integers(0, 30 * SMALL_GAP), st.integers(1, SMALL_GAP))), st.integers(1, 8))
    def test_joined_ranges_have_all_the_bytes_in_their_order(self, spans: list[tuple[int, int]], most: int) -> None:
        """
        No more than allowed, in order, and each range is read forwards from one of them.
        """
        ranges = [(start, start + size) for start, size in spans]
        asked = deque(joined(ranges, most))
        if not asked:
            self.assertTrue(not ranges or sum(stop > start for (_, stop), (start, _) in pairwise(ranges)) >= most)
            return
        self.assertLessEqual(len(asked), most)
        at = asked[0][0]
        for start, stop in ranges:
            if not at <= start < stop <= asked[0][1]:
                asked.popleft()
                at = asked[0][0]
            self.assertTrue(at <= start < stop <= asked[0][1])
            at = stop
        self.assertEqual(1, len(asked))

    @given(st.text() | st.text(alphabet="bytes=0123456789-, \u0663"), st.integers(0, 2**62))
    @example("bytes=\u0663-", 10)
    @example("bytes=0-0,2-3", 10)
    def test_a_header_that_is_none_asks_for_all(self, header: str, size: int) -> None:
        """
        Ranges lie within the blob, have no more bytes than it if there are several, and are ASCII.
        """
        ranges = Ranges.parse(header)
        if ranges is None:
            return
        self.assertTrue(re.fullmatch(r"bytes=[0-9,\s-]+", header.strip()), header)
        with contextlib.suppress(LookupError):
            chosen = ranges.of(size)
            self.assertTrue(all(0 <= start < stop <= size for start, stop in chosen))
            self.assertLessEqual(sum(stop - start for start, stop in chosen), size)


NUMBERS: Final = (parse_size, parse_port, parse_connections, parse_workers, parse_seconds)


class SettingTests(SynchronousTestCase):
    @given(
        st.sampled_from(SETTINGS), st.text() | st.text(alphabet=string.printable) | st.text(alphabet="(?[]{}*+|\\P<>=!")
    )
    @example(SETTINGS[0], "http://[")
    @example(next(each for each in SETTINGS if each.parse is parse_pattern), "(?\n")
    def test_any_text_is_taken_or_refused_in_a_line(self, setting: Setting, text: str) -> None:
        """
        Any value of a setting is accepted or rejected with one printable line.
        """
        try:
            setting.read(text, "PROXY_X")
        except ConfigError as problem:
            self.assertEqual(1, len(str(problem).splitlines()), str(problem))

    @given(st.integers(1, 10**12), st.sampled_from("kmgt"), st.sampled_from(["", "b", "ib"]), st.booleans())
    def test_a_size_is_its_number_times_its_unit(self, number: int, unit: str, end: str, upper: bool) -> None:
        """
        Units are powers of 1024, whatever the spelling.
        """
        text = f"{number} {unit}{end}"
        self.assertEqual(number * 1024 ** ("kmgt".index(unit) + 1), parse_size(text.upper() if upper else text))
        self.assertEqual(number, parse_size(str(number)))

    @given(st.sampled_from(NUMBERS), st.text(alphabet="1\u0661\u0967\uff11g\u212a", min_size=1, max_size=3))
    @example(parse_size, "\u0666\u0664g")
    @example(parse_size, "1\u212a")
    @example(parse_port, "\uff11")
    def test_a_number_is_ascii(self, parse: Callable[[str], float], text: str) -> None:
        """
        Digits and units of other scripts make no number.
        """
        try:
            parse(text)
        except ValueError:
            return
        self.assertTrue(text.isascii(), text)

    @given(st.lists(names, min_size=1, max_size=4), names, names)
    def test_a_pattern_matches_whole_names(self, allowed: list[str], name: str, more: str) -> None:
        """
        A pattern of several names matches these, and none that only begins or ends with one.
        """
        assume(name not in allowed)
        pattern = parse_pattern("|".join(map(re.escape, allowed)))
        self.assertIsNone(pattern.fullmatch(name))
        for each in allowed:
            self.assertIsNotNone(pattern.fullmatch(each))
            for other in (f"{each}/{more}", f"{more}/{each}", f"{each}\n"):
                self.assertEqual(other in allowed, pattern.fullmatch(other) is not None)


media_types = st.sampled_from(sorted(MANIFEST_TYPES))
confirmations = st.builds(
    Confirmed,
    st.builds(Descriptor, media_types, digests, st.integers(0, 2**60)),
    st.integers(0, 2**32).map(float),
)
answers = st.dictionaries(st.frozensets(media_types, max_size=3), confirmations, max_size=4)


class EntryTests(SynchronousTestCase):
    @given(names, tags, answers)
    def test_an_entry_is_given_back_as_it_was_saved(
        self, name: str, tag: str, given_so: dict[frozenset[str], Confirmed]
    ) -> None:
        """
        The index returns a tag as it was saved.
        """
        rows, key = Rows(), EntryKey.of(route_to(f"/v2/{name}/manifests/{tag}"))
        rows.save([(key, Entry(given_so))], 0)
        self.assertEqual(Entry(given_so) if given_so else None, rows.entry(key))
        self.assertEqual(key, EntryKey.parse(str(key)))


manifest_words = st.sampled_from(["mediaType", "manifests", "layers", "blobs", "config", "digest", "size", "urls"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(manifest_words, inner, max_size=4),
    max_leaves=12,
)


class ManifestTests(SynchronousTestCase):
    @given(st.text(max_size=20) | media_types, st.binary() | json_values.map(json.dumps).map(str.encode))
    def test_any_bytes_are_a_manifest_or_refused(self, content_type: str, body: bytes) -> None:
        """
        Any bytes are a manifest, or rejected with ValueError.
        """
        with contextlib.suppress(ValueError):
            Document.read(body).type_as(content_type)
        with contextlib.suppress(ValueError):
            self.assertTrue(all(descriptor.size >= 0 for _, descriptor in listed(body, content_type)))
