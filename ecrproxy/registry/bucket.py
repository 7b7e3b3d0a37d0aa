"""
A blob's bytes, range by range, from the URL that ECR gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, cast
from urllib.parse import urlsplit

from OpenSSL import SSL
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError, ConnectionClosed, ConnectionDone
from twisted.internet.error import TimeoutError as NotConnectedError
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone, ResponseFailed
from twisted.web.http import PotentialDataLoss
from twisted.web.iweb import UNKNOWN_LENGTH, IResponse

from ecrproxy.oci import RegistryError, Route
from ecrproxy.reasons import Reason
from ecrproxy.registry.bodies import discard, excerpt
from ecrproxy.registry.bucket_errors import said_by_bucket
from ecrproxy.registry.race import SLOW_SECONDS, Race

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall, IReactorTime


class UnavailableError(RegistryError):
    """
    ECR, or a bucket, does not answer or fails; it may answer later.
    """

    reason = Reason.FAILING


class RefusedAnswerError(UnavailableError):
    """
    An answer that is not passed on: it is not what was requested, or does not match its digest.

    @ivar named: the digest that ECR named for it, unparsed; empty if none.
    """

    named = ""


def is_passed_on(failure: Failure, number: int) -> bool:
    """
    Return True if others may answer after one registry's failure: not after a refusal of the first.
    """
    return failure.check(RegistryError if number else UnavailableError) is not None


def is_passed_on_always(failure: Failure, _: int) -> bool:
    """
    Return True if others may answer after one registry's failure, when its refusals do not concern them.
    """
    return failure.check(RegistryError) is not None


_COUNT = re.compile(r"[0-9]{1,18}")
_FROM_THE_START: Final = "bytes=0-"
_SPAN = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
REDIRECT_STATUSES: Final = (301, 302, 303, 307, 308)
REFUSED_STATUSES: Final = (400, 401, 403, 404, 410)
"""A bucket's statuses for a presigned URL that is invalid or has expired."""
TRICKLE: Final = 1024
"""Minimum bytes of a body within the stall time; fewer count as none."""
SOONER_SECONDS: Final = 5.0
"""Stall time, in seconds, of a body whose rest another registry may send."""

BEGUN: Final = 8 * 2**10
BEGUN_SECONDS: Final = 10.0
"""
The bytes that a blob must bring, and within how many seconds, before other content is evicted for it.

A slower blob is not kept, but fetched for each client. A slow link shared by a hundred blobs must suffice.
"""

log = Logger()


class Sink(Protocol):
    """
    Receives a blob's bytes.
    """

    def arrived(self, data: bytes) -> None:
        """Take bytes."""

    def ended(self, problem: Failure | None) -> None:
        """Note the end; C{problem} if it failed."""


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
        raise UnavailableError(504, "UNAVAILABLE", f"{source.upstream.name} sends next to nothing once more")


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


@dataclass(frozen=True, slots=True)
class Watch:
    """
    Ends a body that sends nothing, or next to nothing.

    @ivar seconds: seconds within which it must bring C{TRICKLE} bytes.
    @ivar host: the host that sends it.
    @ivar note: called when a body has ended, with whether it brought next to nothing.
    @ivar replaceable: returns True if another source may send the rest: then C{SOONER_SECONDS} apply.
    """

    clock: IReactorTime
    seconds: float
    host: str
    note: Callable[..., object] = lambda **_: None
    replaceable: Callable[[], bool] = lambda: False


class BlobRange:
    """
    A range of a blob that is about to arrive.

    @ivar start: the offset of its first byte.
    @ivar stop: the offset after its last byte, if upstream said.
    @ivar skip: number of bytes before it that were not requested.
    """

    def __init__(self, response: IResponse, watch: Watch, start: int, stop: int | None, *, skip: int = 0) -> None:
        self._response, self._watch = response, watch
        self.start, self.stop, self.skip = start, stop, skip
        self._begun: _Begun | None = None

    async def begin(self) -> bool:
        """
        Wait for the first C{BEGUN} bytes, or all if there are fewer; they are kept until L{deliver}.

        @return: whether they came within C{BEGUN_SECONDS}.
        """
        self._begun = begun = _Begun(self._watch, self.skip)
        self._response.deliverBody(begun.transfer)
        return await begun.wait()

    def deliver(self, sink: Sink) -> BlobTransfer:
        """
        Deliver the bytes.
        """
        if self._begun is not None:
            return self._begun.hand_over(sink)
        transfer = BlobTransfer(sink, self._watch, self.skip)
        self._response.deliverBody(transfer)
        return transfer

    def drop(self) -> None:
        """
        Discard the bytes.
        """
        if self._begun is not None:
            self._begun.transfer.abort()
            return
        discard(self._response, self._watch.clock)


class _Begun:
    """
    The first bytes of a range, until L{hand_over}.
    """

    def __init__(self, watch: Watch, skip: int) -> None:
        self.transfer, self._clock = BlobTransfer(self, watch, skip), watch.clock
        self._data: list[bytes] = []
        self._size, self._over = 0, False
        self._problem: Failure | None = None
        self._came: Deferred[bool] = Deferred()

    async def wait(self) -> bool:
        late = self._clock.callLater(BEGUN_SECONDS, self._decide, came=False)
        try:
            return await self._came
        finally:
            if late.active():
                late.cancel()

    def arrived(self, data: bytes) -> None:
        self._data.append(data)
        self._size += len(data)
        if self._size >= BEGUN:
            self.transfer.pause()
            self._decide(came=True)

    def ended(self, problem: Failure | None) -> None:
        self._over, self._problem = True, problem
        self._decide(came=problem is None)

    def _decide(self, *, came: bool) -> None:
        if not self._came.called:
            self._came.callback(came)

    def hand_over(self, sink: Sink) -> BlobTransfer:
        """
        Pass on the bytes so far, and those to come: not at once, because readers have yet to follow the download.
        """
        self._clock.callLater(0, self._pass_on, sink)
        return self.transfer

    def _pass_on(self, sink: Sink) -> None:
        transfer, data, self._data = self.transfer, self._data, []
        transfer.sink = sink
        was_paused, transfer.paused = transfer.paused, False
        if data:
            sink.arrived(b"".join(data))
        if self._over:
            sink.ended(self._problem)
        elif was_paused and not transfer.paused:  # the sink may have enough for now
            transfer.resume()


class BlobTransfer(TwistedProtocol):
    """
    A body that is delivered to a L{Sink}, and ended if it brings nothing, or next to nothing, for too long.

    @ivar paused: whether it should send nothing for now.
    """

    paused = False

    def __init__(self, sink: Sink, watch: Watch, skip: int = 0) -> None:
        self.sink, self._watch, self._skip = sink, watch, skip
        self._timer: IDelayedCall | None = None
        self._stalled, self._left, self._came = False, False, 0
        self._since, self._waited = 0, 0.0

    def connectionMade(self) -> None:  # noqa: D102
        self._wait()

    def dataReceived(self, data: bytes) -> None:  # noqa: D102
        self._since += len(data)
        if self._timer is not None and self._since >= TRICKLE:
            self._since, self._waited = 0, 0.0
            self._timer.reset(self._step)
        if self._skip:
            data, self._skip = data[self._skip :], max(0, self._skip - len(data))
        if data:
            self._came += len(data)
            self.sink.arrived(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: D102
        self._wait_no_more()
        whole = reason.check(ResponseDone, PotentialDataLoss)
        nothing = self._came < (1 if whole else TRICKLE)
        if not (nothing and self._left and not self._stalled):  # otherwise nothing waited for its bytes
            self._watch.note(barren=self._stalled or nothing)
        if self._stalled:
            sent = f"no more than {self._since} bytes" if self._since else "nothing"
            what = f"{self._watch.host} has sent {sent} for {self._waited:g} s"
            reason = Failure(UnavailableError(504, "UNAVAILABLE", what))
        elif whole:
            self.sink.ended(None)  # the digest decides whether it is complete
            return
        else:
            what = f"{self._watch.host} broke off: {describe(reason.value)}"
            reason = Failure(UnavailableError(502, "UNAVAILABLE", what))
        self.sink.ended(reason)

    def pause(self) -> None:
        """
        Pause the connection.
        """
        self.paused = True
        self._wait_no_more()
        cast(IPushProducer, self.transport).pauseProducing()

    def resume(self) -> None:
        """
        Resume it.
        """
        self.paused = False
        self._wait()
        cast(IPushProducer, self.transport).resumeProducing()

    def abort(self) -> None:
        """
        Close it.
        """
        self._left = True
        self._hang_up()

    def _hang_up(self) -> None:
        self._wait_no_more()
        if self.transport is not None:
            self.transport.loseConnection()

    def _wait(self) -> None:
        if self._timer is None:
            self._since, self._waited = 0, 0.0
            self._timer = self._watch.clock.callLater(self._step, self._doubt)

    def _wait_no_more(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None

    @property
    def _step(self) -> float:
        return min(SOONER_SECONDS, self._watch.seconds - self._waited)

    def _doubt(self) -> None:
        """
        End the body if its time is over, which may be earlier than when it began.
        """
        self._waited += self._step
        if self._waited < self._watch.seconds and not self._watch.replaceable():
            self._timer = self._watch.clock.callLater(self._step, self._doubt)
            return
        self._timer, self._stalled = None, True
        self._hang_up()


def _offers_parts(response: IResponse) -> bool:
    """
    Return True if a bucket that was asked for everything supports ranges.
    """
    asked_for_all = not response.request.headers.hasHeader(b"Range")
    return asked_for_all and (header(response, "Accept-Ranges") or "").strip().lower() == "bytes"


def _span(start: int, stop: int | None) -> str:
    return f"bytes={start}-{'' if stop is None else stop - 1}"


def first_cause(problem: BaseException | None) -> BaseException | None:
    """
    Return the first cause of a network error.
    """
    while isinstance(problem, ResponseFailed) and problem.reasons:
        problem = problem.reasons[0].value
    return problem


def describe(problem: BaseException | None) -> str:
    """
    Describe a network error in a line, by its first cause.
    """
    problem = first_cause(problem)
    text = _words_of(problem).strip().rstrip(".") or type(problem).__name__
    return text.splitlines()[0][:200]


def _words_of(problem: BaseException | None) -> str:
    """
    Describe an error of Twisted or pyOpenSSL in common words; an error of the system in the system's words.
    """
    match problem:
        case NotConnectedError():
            return "the connection is not accepted"
        case ConnectError(args=(str() as said, *_)) if said:
            return said
        case ConnectionClosed(args=args):
            how = "closed" if isinstance(problem, ConnectionDone) else "lost"
            return ": ".join([f"the connection was {how}", *map(str, args)])
        case SSL.Error(args=([*errors], *_)) if errors:
            return f"TLS failed: {errors[-1][-1]}"
    return str(problem)


def told_part(content_range: str | None, start: int, stop: int | None) -> tuple[int, int] | None:
    """
    Parse a Content-Range: the end of the range from C{start}, and the size of the whole: RFC 9110, 14.4.

    @param stop: the end of the requested range; None for everything from C{start} on.
    @return: None for another range, one longer than requested, reversed, or outside the whole.
    """
    found = _SPAN.fullmatch(content_range or "")
    if found is None:
        return None
    first, last, size = map(int, found.groups())
    if first != start or not first <= last < size or (stop is not None and last >= stop):
        return None
    return last + 1, size


def told_length(response: IResponse) -> int | None:
    """
    Parse the Content-Length of an answer to a HEAD; None if there is none, or it is not a number.
    """
    length = header(response, "Content-Length") or ""
    return int(length) if _COUNT.fullmatch(length) else None


def header(response: IResponse, name: str) -> str | None:
    """
    Return the last value of a header.
    """
    values = header_values(response, name)
    return values[-1] if values else None


def header_values(response: IResponse, name: str) -> list[str]:
    """
    Return all values of a header, which may be any bytes: RFC 9110, 5.5. Twisted would decode them as UTF-8.
    """
    return [value.decode("latin-1") for value in response.headers.getRawHeaders(name.encode("ascii"), [])]


def is_page(response: IResponse) -> bool:
    """
    Return True if an answer is HTML and names no content: an intermediary's page, not the registry's answer.
    """
    media_type = (header(response, "Content-Type") or "").partition(";")[0].strip().lower()
    return media_type in ("text/html", "application/xhtml+xml") and header(response, "Docker-Content-Digest") is None
