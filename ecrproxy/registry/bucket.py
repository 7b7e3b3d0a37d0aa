"""
A blob's bytes, range by range, from the URL that ECR gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

from twisted.logger import Logger
from twisted.web.iweb import UNKNOWN_LENGTH, IResponse

from ecrproxy.oci import RegistryError, Route
from ecrproxy.registry.blob_range import BlobRange, Watch
from ecrproxy.registry.bodies import discard, excerpt
from ecrproxy.registry.bucket_errors import said_by_bucket
from ecrproxy.registry.headers import header, is_page, told_part
from ecrproxy.registry.race import SLOW_SECONDS, Race
from ecrproxy.registry.unavailable import UnavailableError, is_passed_on_always

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime


_FROM_THE_START: Final = "bytes=0-"
REFUSED_STATUSES: Final = (400, 401, 403, 404, 410)
"""A bucket's statuses for a presigned URL that is invalid or has expired."""


log = Logger()


class Locator(Protocol):
    """
    Locates a blob: see C{upstream.Upstream}.
    """

    clock: IReactorTime
    stall_seconds: float
    """Seconds within which a body must bring C{TRICKLE} bytes."""
    name: str
    """The registry's name in the log."""

    async def locate(self, route: Route, span: str = "", *, ahead: bool = False) -> tuple[str, IResponse | None]:
        """Ask for the URL, or, if the registry itself sends the blob, for its bytes."""

    async def fetch(self, url: str, route: Route, span: str, *, ahead: bool = False) -> tuple[str, IResponse]:
        """Request bytes from the URL."""

    async def pause(self, breaks: int) -> None:
        """Wait before requesting again bytes that did not come."""


@dataclass(slots=True, eq=False, repr=False)  # its URL is a secret
class _Source:
    """
    A registry that has the blob.

    @ivar url: the blob's URL, once the registry has given it.
    @ivar own: whether the registry itself sends the blob, and so needs a token for each range.
    @ivar barren: whether its last body broke off with next to nothing, or stalled, or none came.
    """

    upstream: Locator
    route: Route
    url: str = ""
    own: bool = False
    barren: bool = False

    def note(self, *, barren: bool) -> None:
        """
        Note whether a body has ended with next to nothing, or stalled.
        """
        self.barren = barren


class BlobSource:
    """
    The source of a blob's bytes: range by range if the bucket supports ranges.

    @param url: the blob's URL, if ECR has given it already.
    @ivar others: other registries whose clients wait for the blob, with their routes: further ranges are requested from
        them if this registry sends nothing, or is slow. More may be added.
    @ivar copies: the registry's replicas, used likewise.
    @ivar size: in bytes, if known.
    @ivar ahead: whether no client waits for it: then it is requested once, and only if that delays no other.
    @ivar first: the first range.
    @ivar ranged: whether the bucket supports ranges.
    @ivar is_page: whether the first answer claims to be a page for people, and not a range.
    """

    first: BlobRange

    def __init__(self, upstream: Locator, route: Route, url: str = "", *, ahead: bool = False) -> None:
        self._source, self.ahead = _Source(upstream, route, url), ahead
        self._sources = {upstream: self._source}
        self._route = route
        self.others: Mapping[Any, tuple[Locator, Route]] = {}
        self.copies: Iterable[Locator] = ()
        self._opening: list[Callable[[], None]] = []
        self.size: int | None = None
        self.ranged = self.is_page = False

    async def begin(self, start: int, stop: int | None) -> None:
        """
        Request the bytes from C{start} to C{stop}, or from C{start} on.
        """
        source = self._source
        response = await _ask(source, _span(start, stop) if start or stop is not None else "", ahead=self.ahead)
        if response.code == 416:  # noqa: PLR2004 (an empty blob has no first byte, another may have become shorter)
            discard(response, source.upstream.clock)
            start = 0
            response = await _ask(source, "", ahead=self.ahead)
        self.size, self.first = await self._understand(source, response, start, stop)
        part = response.code == 206  # noqa: PLR2004
        self.ranged = part or _offers_parts(response)
        self.is_page = not part and is_page(response)

    async def open(self, start: int, stop: int | None, breaks: int = 0) -> BlobRange:
        """
        Request the bytes from C{start} to C{stop}.

        @param breaks: number of consecutive requests that brought nothing; then wait before the next.
        """
        if breaks and not self._is_replaceable(self._source):
            await self._source.upstream.pause(breaks)
        asked = self._candidates()
        asks = [partial(self._open, each, start, stop) for each in asked]
        race = Race(asks, SLOW_SECONDS, self._source.upstream.clock.callLater, is_passed_on_always)

        def ask_new_ones() -> None:
            for each in self._known():
                if each not in asked:
                    asked.append(each)
                    race.add(partial(self._open, each, start, stop))

        self._opening.append(ask_new_ones)
        try:
            source, stretch = await race.won
        finally:
            self._opening.remove(ask_new_ones)
        self._turn_to(source, race.problem)
        more = stop is not None and (stretch.stop or 0) > stop
        self.ranged = self.ranged and not (stretch.skip or more)
        return stretch

    @property
    def sources(self) -> int:
        """
        The number of registries that may have it.
        """
        return len(self._known())

    def look_again(self) -> None:
        """
        Ask the registries that have been added to C{others}, too, where those before are slow.
        """
        for each in list(self._opening):
            each()

    def _candidates(self) -> list[_Source]:
        """
        Return the registries to ask, in order: the last one used, then the others; barren ones come last.
        """
        found = self._known()
        if all(each.barren for each in found):  # the others may send again by now
            for each in found[1:]:
                each.barren = False
        return sorted(found, key=lambda each: each.barren)

    def _known(self) -> list[_Source]:
        """
        Return all registries that may have it, the last one used first.
        """
        for upstream, route in (*((each, self._route) for each in self.copies), *self.others.values()):
            self._sources.setdefault(upstream, _Source(upstream, route))
        return [self._source, *(each for each in self._sources.values() if each is not self._source)]

    def _is_replaceable(self, source: _Source) -> bool:
        """
        Return True if another registry may send what C{source} does not.
        """
        return any(each is not source and not each.barren for each in self._known())

    def _turn_to(self, source: _Source, problem: BaseException | None) -> None:
        """
        Make C{source} the first choice for further requests.
        """
        if source is not self._source:
            why = problem.message if isinstance(problem, RegistryError) else "it is slow, or sent nothing"
            said = "Going on with {digest} from {name} instead of {before}: {why}"
            names = {"name": source.upstream.name, "before": self._source.upstream.name}
            log.info(said, digest=source.route.reference, why=why, once=source.route.reference, **names)
            self._source = source

    async def _open(self, source: _Source, start: int, stop: int | None) -> tuple[_Source, BlobRange]:
        try:
            response = await _ask(source, _span(start, stop), ahead=self.ahead)
            size, stretch = await self._understand(source, response, start, stop)
        except RegistryError:
            source.note(barren=True)
            raise
        if size != self.size:
            stretch.drop()
            raise UnavailableError(502, "UNAVAILABLE", f"{source.route.reference} has changed its size upstream")
        if source.barren and self._is_replaceable(source):  # another may be about to answer
            await _see_begin(stretch, source)
        return source, stretch

    async def _understand(
        self, source: _Source, response: IResponse, start: int, stop: int | None
    ) -> tuple[int | None, BlobRange]:
        """
        Return the blob's size and the range in the answer; a bucket without ranges sends all bytes from the first on.
        """
        host, clock = urlsplit(source.url).hostname or "", source.upstream.clock
        replaceable = partial(self._is_replaceable, source)
        watch = Watch(clock, source.upstream.stall_seconds, host, source.note, replaceable)
        if response.code == 200:  # noqa: PLR2004
            size = None if response.length is UNKNOWN_LENGTH else int(response.length)
            return size, BlobRange(response, watch, start, size, skip=start)
        part = told_part(header(response, "Content-Range"), start, stop) if response.code == 206 else None  # noqa: PLR2004
        if part is not None:
            end, size = part
            return size, BlobRange(response, watch, start, end)
        what = f"{host} answers {response.code} instead of {source.route.reference}"
        if response.code == 206:  # noqa: PLR2004
            discard(response, clock)
            raise UnavailableError(502, "UNAVAILABLE", f"{what}: another range than {_span(start, stop)}")
        raise UnavailableError(502, "UNAVAILABLE", await _refusal(response, clock, host, what))


async def _ask(source: _Source, span: str, *, ahead: bool) -> IResponse:
    """
    Request bytes; renew the URL once if the bucket refuses it, as after its expiry.
    """
    known = source.url and not source.own
    response = await (_fetch(source, span, ahead=ahead) if known else _locate(source, span, ahead=ahead))
    if response.code in REFUSED_STATUSES:
        discard(response, source.upstream.clock)
        response = await _locate(source, span, ahead=ahead)
    return response


async def _locate(source: _Source, span: str, *, ahead: bool) -> IResponse:
    was_own = source.own
    source.url, direct = await source.upstream.locate(source.route, span if was_own else "", ahead=ahead)
    source.own = direct is not None
    if direct is None:
        return await _fetch(source, span, ahead=ahead)
    if not _offers_parts(direct) or not span or span.startswith(_FROM_THE_START):
        return direct
    discard(direct, source.upstream.clock)  # otherwise everything before the range would come, too
    return await _locate(source, span, ahead=ahead)


async def _fetch(source: _Source, span: str, *, ahead: bool) -> IResponse:
    source.url, response = await source.upstream.fetch(source.url, source.route, span, ahead=ahead)
    return response


async def _see_begin(stretch: BlobRange, source: _Source) -> None:
    """
    Wait for the first bytes of a source that stopped before.

    @raise UnavailableError: if they don't come soon.
    """
    try:
        begun = await stretch.begin()
    except BaseException:
        stretch.drop()
        raise
    if not begun:
        stretch.drop()
        raise UnavailableError(504, "UNAVAILABLE", f"{source.upstream.name} sends next to nothing again")


async def _refusal(response: IResponse, clock: IReactorTime, host: str, what: str) -> str:
    """
    Add the bucket's error to C{what}, and log it.
    """
    said = said_by_bucket(await excerpt(response, clock))
    if said:
        what = f"{what}: {said}"
        log.error(
            "{what}; run 'ecr-proxy doctor' to check the way to the bucket",
            what=what,
            once=(host, said.partition(":")[0]),
        )
    return what


def _offers_parts(response: IResponse) -> bool:
    """
    Return True if a bucket that was asked for everything supports ranges.
    """
    asked_for_all = not response.request.headers.hasHeader(b"Range")
    return asked_for_all and (header(response, "Accept-Ranges") or "").strip().lower() == "bytes"


def _span(start: int, stop: int | None) -> str:
    return f"bytes={start}-{'' if stop is None else stop - 1}"
