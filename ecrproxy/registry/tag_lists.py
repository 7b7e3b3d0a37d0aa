"""
Lists of tags: pages from the registry, joined for clients that do not follow Link.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote
from weakref import WeakValueDictionary

from ecrproxy.access.turns import QueueTimeoutError, Turns
from ecrproxy.documents import read_json
from ecrproxy.oci import Kind, RegistryError, Route, passed_on, to_query
from ecrproxy.reasons import Reason
from ecrproxy.registry.unavailable import UnavailableError

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime


TAGS_LIMIT: Final = 1000
"""Maximum number of tags on ECR's pages; it refuses to list more (docs/ecr.rst)."""
ALL_TAGS: Final = 100_000
"""Maximum number of tags that are joined into one list for clients that request no page."""
ALL_BYTES: Final = 2**24
"""Bytes after which no further page is joined: C{ALL_TAGS} of 128 characters fit. ECR's tags may have 300."""
JOINABLE: Final = frozenset({"last", "nextToken"})
"""
Parameters that a client may give for a joined list: where it begins, by the specification's name and by ECR's own.
"""
JOINS: Final = 3
"""
Maximum number of lists from the beginning that are joined at the same time, each with up to C{ALL_BYTES}; and one
other.
"""
LIST_SECONDS: Final = 10.0
"""Seconds that a list waits for another of its repository, and then for its place among those that are joined."""
ALL_PAGES: Final = 1000
"""
Maximum number of pages that are joined: enough for C{ALL_TAGS}, if ECR returns a hundred per page whatever the request.
"""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class ListPage:
    """
    A page of tags or referrers.

    @ivar next: the raw query of the next page.
    @ivar filters: the OCI-Filters-Applied header.
    """

    content_type: str
    body: bytes
    next: str | None
    filters: str | None


class TagLists:
    """
    Joins a registry's pages of tags into one list.

    @param page: requests a page, by its query.
    @param name: the registry's name in errors.
    """

    def __init__(self, page: Callable[[Route, str], Awaitable[ListPage]], name: str, clock: IReactorTime) -> None:
        self._page, self._name = page, name
        self._joining = {whole: Turns(JOINS if whole else 1, LIST_SECONDS, clock) for whole in (True, False)}
        self._listing: WeakValueDictionary[tuple[str, bool], Turns] = WeakValueDictionary()
        self._clock = clock

    async def all(self, route: Route, query: str) -> ListPage:
        """
        Join ECR's pages of tags, for clients that do not follow Link.

        After C{ALL_TAGS} or C{ALL_BYTES} there is a Link.

        With C{last}, clients can request any number of different lists, and each costs up to a hundred requests: these
        are made one at a time per repository. The list from the beginning, the common one, waits for none of these.
        """
        whole = not query
        turns = self._listing.get((route.repository.name, whole))
        if turns is None:
            turns = self._listing[route.repository.name, whole] = Turns(1, LIST_SECONDS, self._clock)
        try:
            async with turns.turn():
                page = await self._page(route, _with_n(query))
                if page.next is None:
                    return page
                async with self._joining[whole].turn():
                    return await self._joined(route, query, page)
        except QueueTimeoutError as problem:
            said = "too many lists of tags are being made; ask again, or for pages of it (n=1000)"
            raise UnavailableError(503, "UNAVAILABLE", said, {"Retry-After": "5"}, Reason.QUEUE_FULL) from problem

    async def _joined(self, route: Route, query: str, page: ListPage) -> ListPage:
        tags = self._tags_of(page)
        count, parts, asked = len(tags), [_listed(tags)], {query}
        size = len(parts[0])
        while page.next is not None and count < ALL_TAGS and size < ALL_BYTES and len(asked) < ALL_PAGES:
            if page.next in asked:
                raise UnavailableError(502, "UNAVAILABLE", f"{self._name}'s pages of tags lead in a circle")
            asked.add(page.next)
            page = await self._page(route, _with_n(page.next))
            tags = self._tags_of(page)
            count += len(tags)
            parts.append(_listed(tags))
            size += len(parts[-1])
        name = route.repository.name.encode("ascii")
        body = b'{"name": "%b", "tags": [%b]}' % (name, b", ".join(filter(None, parts)))
        return replace(page, body=body, next=page.next and _led_on(page.next))

    def _tags_of(self, page: ListPage) -> list[str]:
        """
        Return the tags of a page.
        """
        try:
            tags = read_json(page.body)["tags"] or []
        except (ValueError, LookupError, TypeError):
            tags = None
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise UnavailableError(502, "UNAVAILABLE", f"{self._name}'s answer makes no sense: no list of tags")
        return tags


def _listed(tags: list[str]) -> bytes:
    """
    Write tags as part of a JSON list: a large list at once would stall the event loop for a tenth of a second.
    """
    return json.dumps(tags)[1:-1].encode("ascii")


def _with_n(query: str) -> str:
    return to_query({**passed_on(query), "n": str(TAGS_LIMIT)})


def _led_on(query: str) -> str:
    """
    Return the query for what follows a joined list: for another one, if that has everything in ECR's link.
    """
    rest = {name: value for name, value in passed_on(query).items() if name != "n"}
    return to_query(rest) if rest.keys() <= JOINABLE else _with_n(query)


def upstream_query(route: Route) -> str:
    """
    Choose the parameters of a client's query that are sent to ECR.

    A page may have any parameter, as ECR's links may. A joined list has only those of C{JOINABLE}: with others,
    clients could make up any number of lists.

    @raise RegistryError: if C{n} is not a number.
    """
    values = passed_on(route.query)
    if route.kind is not Kind.TAGS:
        return to_query(values)
    if "n" not in values:
        values = {name: value for name, value in values.items() if name in JOINABLE}
    else:
        given = unquote(values["n"])
        if not given.isdecimal() or not given.isascii() or len(given) > 18:  # noqa: PLR2004
            raise RegistryError(400, "PAGINATION_NUMBER_INVALID", "n is not a number of tags")
        values["n"] = str(min(int(given), TAGS_LIMIT))
    return to_query(values)
