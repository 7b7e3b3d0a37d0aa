"""
Lists of tags and referrers, page by page. They change with each push, so ECR is asked each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakValueDictionary

from ecrproxy.answers import CacheStatus
from ecrproxy.cache.memory import Memory
from ecrproxy.flights import DeadlineExceededError, Flights, within
from ecrproxy.oci import RegistryError, Route
from ecrproxy.reasons import Reason
from ecrproxy.registry.refusals import NoListError
from ecrproxy.registry.tag_lists import ListPage, upstream_query
from ecrproxy.registry.unavailable import UnavailableError
from ecrproxy.registry.upstream import Upstream
from ecrproxy.stale import STALE_SECONDS, why_stale

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall

_PAGES_BYTES = 8 * 2**20
_PAGE_BYTES = 2**20
"""Bytes of memory for all pages, and for one. They are served while ECR is not available."""


class _Key(NamedTuple):
    """
    The key of a page.

    @ivar query: the part of the client's query that is passed to ECR.
    """

    route: Route
    query: str


class Lists:
    """
    The registries' lists.

    @param upstream: returns the registry of a route.
    @param call_later: the reactor's C{callLater}.
    """

    def __init__(self, upstream: Callable[[Route], Upstream], call_later: Callable[..., IDelayedCall]) -> None:
        self._upstream, self._call_later = upstream, call_later
        self._pages: Flights[ListPage] = Flights(abandons=True, foreseen=RegistryError)
        self._last_pages: Memory[_Key, ListPage] = Memory(_PAGES_BYTES)
        self._sent_pages: WeakValueDictionary[_Key, ListPage] = WeakValueDictionary()

    async def page(self, route: Route) -> tuple[CacheStatus, Reason, ListPage]:
        """
        Fetch a page of tags or referrers. Concurrent requests share one request to ECR.

        @return: cache status, reason, and the page: the last known one if ECR is not available.
        @raise RegistryError: ECR's error.
        """
        key = _Key(route, upstream_query(route))
        last = self._last_pages.get(key)
        if last is None:
            return CacheStatus.BYPASS, Reason.LIST, await self._first_page(key)
        try:
            page = await within(STALE_SECONDS, self._ask_for_page(key), self._call_later)
        except (DeadlineExceededError, UnavailableError) as problem:
            return CacheStatus.STALE, why_stale(route, self._upstream(route).name, problem), last
        return CacheStatus.BYPASS, Reason.LIST, page

    async def _first_page(self, key: _Key) -> ListPage:
        """
        Fetch a page that is not in memory.

        Only after a 404 do clients fall back to the referrers tag: distribution spec 1.1, "Unavailable Referrers API".
        If something else answers for the registry, they find no tag there either.
        """
        try:
            return await self._ask_for_page(key)
        except NoListError as problem:
            raise RegistryError(404, "UNSUPPORTED", problem.message, reason=Reason.NOT_FOUND) from problem

    async def _ask_for_page(self, key: _Key) -> ListPage:
        try:
            page = await self._pages.join(key, lambda: self._upstream(key.route).page(key.route))
        except UnavailableError:
            raise
        except RegistryError:
            self._last_pages.drop(key)
            raise
        sent = self._sent_pages.get(key)
        if page == sent:
            page = sent  # one copy in memory for all slow clients
        self._sent_pages[key] = page
        if len(page.body) <= _PAGE_BYTES:
            self._last_pages.put(key, page, len(page.body) + 2 * len(key.query) + 1000)
        return page
