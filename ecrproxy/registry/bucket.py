"""
The bytes of a blob, part by part, from where ECR says that they lie.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, cast
from urllib.parse import urlsplit

from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone, ResponseFailed
from twisted.web.http import PotentialDataLoss
from twisted.web.iweb import UNKNOWN_LENGTH, IResponse

from ecrproxy.oci import RegistryError, Route
from ecrproxy.reasons import Reason

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall, IReactorTime


class UnavailableError(RegistryError):
    """
    ECR, or a bucket, is silent or failing: another time it may answer.
    """

    reason = Reason.FAILING


ERROR_LIMIT: Final = 64 * 2**10


_SPAN = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


_TOTAL = re.compile(r"bytes (?:\d+-\d+|\*)/(\d{1,18})")


REDIRECT_STATUSES: Final = (301, 302, 303, 307, 308)


class Sink(Protocol):
    """
    Where a blob's bytes go.
    """

    def arrived(self, data: bytes) -> None:
        """Take bytes."""

    def ended(self, problem: Failure | None) -> None:
        """Note the end, C{problem} if it is not a good one."""


class Locator(Protocol):
    """
    Who knows where a blob lies: see C{upstream.Upstream}.
    """

    clock: IReactorTime
    stall_seconds: float
    """How long a body may send nothing."""

    async def locate(self, route: Route) -> tuple[str, IResponse | None]:
        """Ask where."""

    async def fetch(self, url: str, route: Route, span: str) -> tuple[str, IResponse]:
        """Ask for bytes there."""

    async def pause(self, breaks: int) -> None:
        """Wait before asking again for bytes that did not come."""


class Blob:
    """
    Where a blob's bytes come from, part by part if the bucket gives parts.

    @ivar size: in bytes, if upstream said.
    @ivar first: what was asked for first.
    @ivar ranged: whether the bucket gives parts.
    """

    first: Stretch

    def __init__(self, upstream: Locator, route: Route) -> None:
        self._upstream, self._route = upstream, route
        self._url = ""
        self.size: int | None = None
        self.ranged = False

    async def begin(self, start: int, stop: int | None) -> None:
        """
        Ask for the bytes from C{start} to C{stop}, or for all from there on.
        """
        self._url, response = await self._upstream.locate(self._route)
        if response is None:
            response = await self._ask(_span(start, stop) if start or stop is not None else "")
            if response.code == 416:  # noqa: PLR2004 (an empty blob has no first byte, another may have become shorter)
                response.deliverBody(Drop())
                start = 0
                response = await self._ask("")
        self.size, self.first = self._understand(response, start)
        self.ranged = response.code == 206 or _offers_parts(response)  # noqa: PLR2004

    async def open(self, start: int, stop: int | None, breaks: int = 0) -> Stretch:
        """
        Ask for the bytes from C{start} to C{stop}; an URL that is refused, as expired ones are, is asked for again.

        @param breaks: how often in a row they were asked for, and none came: then the next time can wait.
        """
        if breaks:
            await self._upstream.pause(breaks)
        span = _span(start, stop)
        response = await self._ask(span)
        if response.code in (400, 401, 403, 404, 410):
            response.deliverBody(Drop())
            self._url, direct = await self._upstream.locate(self._route)
            response = direct or await self._ask(span)
        size, stretch = self._understand(response, start)
        if size != self.size:
            stretch.drop()
            raise UnavailableError(502, "UNAVAILABLE", f"{self._route.reference} has changed its size upstream")
        self.ranged = self.ranged and not stretch.skip
        return stretch

    async def _ask(self, span: str) -> IResponse:
        self._url, response = await self._upstream.fetch(self._url, self._route, span)
        return response

    def _understand(self, response: IResponse, start: int) -> tuple[int | None, Stretch]:
        """
        Read the whole's size and what of it comes; a bucket that knows no ranges sends all from the first byte on.
        """
        host = urlsplit(self._url).hostname or ""
        span = _SPAN.fullmatch(header(response, "Content-Range") or "")
        watch = Watch(self._upstream.clock, self._upstream.stall_seconds, host)
        if response.code == 206 and span and int(span[1]) == start:  # noqa: PLR2004
            return int(span[3]), Stretch(response, watch, start, int(span[2]) + 1)
        if response.code == 200:  # noqa: PLR2004
            size = None if response.length is UNKNOWN_LENGTH else int(response.length)
            return size, Stretch(response, watch, start, size, skip=start)
        response.deliverBody(Drop())
        what = f"{host} answers {response.code} instead of {self._route.reference}"
        raise UnavailableError(502, "UNAVAILABLE", what)


@dataclass(frozen=True, slots=True)
class Watch:
    """
    What ends a body that sends nothing.

    @ivar seconds: for so long.
    @ivar host: who sends it.
    """

    clock: IReactorTime
    seconds: float
    host: str


class Stretch:
    """
    Bytes of a blob that are about to come.

    @ivar start: the offset of the first.
    @ivar stop: the offset behind the last, if upstream said.
    @ivar skip: how many bytes come before them that nobody asked for.
    """

    def __init__(self, response: IResponse, watch: Watch, start: int, stop: int | None, *, skip: int = 0) -> None:
        self._response, self._watch = response, watch
        self.start, self.stop, self.skip = start, stop, skip

    def deliver(self, sink: Sink) -> BlobTransfer:
        """
        Let the bytes come.
        """
        transfer = BlobTransfer(sink, self._watch, self.skip)
        self._response.deliverBody(transfer)
        return transfer

    def drop(self) -> None:
        """
        Do without them.
        """
        self._response.deliverBody(Drop())


class BlobTransfer(TwistedProtocol):
    """
    A body on its way into a L{Sink}; given up when nothing came for too long.
    """

    def __init__(self, sink: Sink, watch: Watch, skip: int = 0) -> None:
        self._sink, self._watch, self._skip = sink, watch, skip
        self._timer: IDelayedCall | None = None
        self._stalled = False

    def connectionMade(self) -> None:  # noqa: D102
        self._wait()

    def dataReceived(self, data: bytes) -> None:  # noqa: D102
        if self._timer is not None:
            self._timer.reset(self._watch.seconds)
        if self._skip:
            data, self._skip = data[self._skip :], max(0, self._skip - len(data))
        if data:
            self._sink.arrived(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: D102
        self._wait_no_more()
        if self._stalled:
            what = f"{self._watch.host} has sent nothing for {self._watch.seconds:g} s"
            reason = Failure(UnavailableError(504, "UNAVAILABLE", what))
        elif reason.check(ResponseDone, PotentialDataLoss):
            self._sink.ended(None)  # that it is whole is for the digest to say
            return
        else:
            what = f"{self._watch.host} broke off: {describe(reason.value)}"
            reason = Failure(UnavailableError(502, "UNAVAILABLE", what))
        self._sink.ended(reason)

    def pause(self) -> None:
        """
        Send nothing for now.
        """
        self._wait_no_more()
        cast(IPushProducer, self.transport).pauseProducing()

    def resume(self) -> None:
        """
        Go on.
        """
        self._wait()
        cast(IPushProducer, self.transport).resumeProducing()

    def abort(self) -> None:
        """
        Send nothing more, ever.
        """
        self._wait_no_more()
        if self.transport is not None:
            self.transport.loseConnection()

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self._watch.clock.callLater(self._watch.seconds, self._stall)

    def _wait_no_more(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None

    def _stall(self) -> None:
        self._timer, self._stalled = None, True
        self.abort()


class Drop(TwistedProtocol):
    """
    Let a body that nobody wants go by, if it is short; close the connection if not.
    """

    _left = ERROR_LIMIT

    def dataReceived(self, data: bytes) -> None:  # noqa: D102
        self._left -= len(data)
        if self._left < 0 and self.transport is not None:
            self.transport.loseConnection()


def _offers_parts(response: IResponse) -> bool:
    """
    Tell whether a bucket that was asked for all would give parts.
    """
    asked_for_all = not response.request.headers.hasHeader(b"Range")
    return asked_for_all and (header(response, "Accept-Ranges") or "").strip().lower() == "bytes"


def _span(start: int, stop: int | None) -> str:
    return f"bytes={start}-{'' if stop is None else stop - 1}"


def first_cause(problem: BaseException | None) -> BaseException | None:
    """
    Tell what led to a network's trouble.
    """
    while isinstance(problem, ResponseFailed) and problem.reasons:
        problem = problem.reasons[0].value
    return problem


def describe(problem: BaseException | None) -> str:
    """
    Name a network's trouble in a line, by its first cause.
    """
    problem = first_cause(problem)
    text = str(problem).strip().rstrip(".") or type(problem).__name__
    return text.splitlines()[0][:200]


def whole_size(response: IResponse) -> int | None:
    """
    Tell how large the whole is of which C{response} is an answer: RFC 9110, 14.4 and 15.5.17.
    """
    if response.code in (206, 416):
        total = _TOTAL.fullmatch(header(response, "Content-Range") or "")
        return int(total[1]) if total else None
    if response.code != 200:  # noqa: PLR2004
        return None
    if response.request.method == b"HEAD":
        length = header(response, "Content-Length") or ""
        return int(length) if length.isdecimal() else None
    return None if response.length is UNKNOWN_LENGTH else int(response.length)


def header(response: IResponse, name: str) -> str | None:
    """
    Give the last value of a header of an answer.
    """
    values = response.headers.getRawHeaders(name.encode("ascii"))
    return values[-1].decode("latin-1") if values else None
