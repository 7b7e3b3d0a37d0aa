"""
Resources that answer with a coroutine, and the code that all responses share.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from twisted.internet.defer import CancelledError, Deferred, execute
from twisted.internet.error import ConnectionDone
from twisted.logger import Logger
from twisted.web.http import OK, SERVICE_UNAVAILABLE
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from ecrproxy import tracing
from ecrproxy.access.bodies import NoRoomError
from ecrproxy.cache.content import Content, DigestMismatchError
from ecrproxy.http.request import RegistryRequest, path
from ecrproxy.oci import RegistryError
from ecrproxy.readiness import Readiness
from ecrproxy.reasons import Reason
from ecrproxy.request_id import current
from ecrproxy.threads import InThread
from ecrproxy.transfer.lane import ShortBodyError
from ecrproxy.transfer.response_body import LEAST_PIECE, CutShortError
from ecrproxy.transfer.sending import send
from ecrproxy.transfer.sources import Held, Source

if TYPE_CHECKING:
    from twisted.python.failure import Failure

    from ecrproxy.access.limits import Crowd

log = Logger()
T = TypeVar("T")

HSTS: Final = "max-age=31536000"
# Clients show the status line as received, and programs match its words; Twisted does not know 429.
_PHRASES: Final = {each.value: each.phrase.encode("ascii") for each in HTTPStatus}
# The nginx proxy sets its headers on these statuses only: those of nginx's add_header without C{always}.
_DECORATED: Final = frozenset({200, 201, 204, 206, 301, 302, 303, 304, 307, 308})


# Errors that a disk returns for an unreadable file, and a socket never.
_UNREADABLE: Final = frozenset({errno.EIO, errno.EBADMSG, errno.ENODATA, errno.ESTALE, errno.EUCLEAN})

# Errors that are not logged here: already logged where they happened, or just a client that disconnected.
KNOWN: Final = (
    RegistryError,
    CancelledError,
    ConnectionDone,
    ConnectionError,
    DigestMismatchError,
    ShortBodyError,
)


class Answering(Resource):
    """
    A leaf that answers each request with the coroutine C{respond}, cancelled when the client disconnects.

    @cvar methods: the allowed methods.
    """

    isLeaf = True
    methods: Sequence[bytes] = (b"GET", b"HEAD")

    def render(self, request: Request) -> int:
        """
        Start answering.
        """
        asked = cast(RegistryRequest, request)
        answer = Deferred.fromCoroutine(self._respond(asked))
        request.notifyFinish().addErrback(lambda _: answer.cancel())
        answer.addErrback(self._failed, asked)
        return NOT_DONE_YET

    async def _respond(self, request: RegistryRequest) -> None:
        current.set(request.id)
        tracing.current.set(request.span)
        try:
            _only_by(self.methods, request)
            await self.respond(request)
        except RegistryError as problem:
            if request.startedWriting:
                raise
            _refuse(request, problem)

    async def respond(self, request: RegistryRequest) -> None:
        """
        Answer a request and finish it.

        @raise RegistryError: to answer with an error.
        """
        raise NotImplementedError

    def _failed(self, failure: Failure, request: RegistryRequest) -> None:
        if request.channel is None:  # the client has disconnected
            return
        if not failure.check(*KNOWN):
            log.failure("Answering {path}", failure, path=path(request), request=request.id)
        if not request.startedWriting:
            _refuse(request, _answer_to(failure))
        elif failure.check(DigestMismatchError):
            cast(Any, request.channel).abort()  # no client should resume after wrong bytes
        else:
            cast(Any, request.channel).break_off()


def _refuse(request: Request, problem: RegistryError) -> None:
    request.setHeader("Cache-Control", "no-cache")
    for name, value in problem.headers.items():
        request.setHeader(name, value)
    request.setHeader("X-Cache-Reason", problem.reason)
    send_small(request, problem.status, "application/json", problem.body())


def _answer_to(failure: Failure) -> RegistryError:
    """
    Return the error response for a failure.
    """
    if isinstance(failure.value, RegistryError):
        return failure.value
    if failure.check(DigestMismatchError, ShortBodyError):
        said = f"upstream sent wrong bytes: {failure.value}"
        return RegistryError(502, "UNAVAILABLE", said, reason=Reason.WRONG_BYTES)
    return RegistryError(500, "UNKNOWN", "the proxy failed; its log says why", reason=Reason.FAILED)


def _only_by(methods: Sequence[bytes], request: Request) -> None:
    if request.method not in methods:
        raise RegistryError(405, "UNSUPPORTED", "this proxy only reads", {"Allow": b", ".join(methods).decode()})


class Missing(Answering):
    """
    An unknown path.
    """

    async def respond(self, request: RegistryRequest) -> None:  # noqa: ARG002
        """
        Answer 404.
        """
        raise RegistryError(404, "UNSUPPORTED", "no such path: a registry is at /v2/")


class Health(Answering):
    """
    The liveness check.
    """

    async def respond(self, request: RegistryRequest) -> None:
        """
        Answer 200.
        """
        send_small(request, OK, "text/plain", b"")


class Ready(Answering):
    """
    The readiness check: what the daemon can do, and what is wrong.
    """

    def __init__(self, readiness: Callable[[], Awaitable[Readiness]]) -> None:
        super().__init__()
        self._readiness = readiness

    async def respond(self, request: RegistryRequest) -> None:
        """
        Answer 200 if the daemon can serve, else 503.
        """
        found = await self._readiness()
        said = {
            "ready": found.can_serve,
            "alive": True,
            "can_serve": found.can_serve,
            "can_fetch": found.can_fetch,
            "reasons": found.reasons,
        }
        status = OK if found.can_serve else SERVICE_UNAVAILABLE
        send_small(request, status, "application/json", json.dumps(said).encode() + b"\n")


def begin(request: Request, status: int) -> None:
    """
    Set the status, and the headers that every response has.
    """
    request.setResponseCode(status, _PHRASES.get(status))
    if not request.responseHeaders.hasHeader("Cache-Control"):
        # Without it, caches choose how long to keep a response, even a 404: RFC 9111, 4.2.2.
        request.setHeader("Cache-Control", "no-cache")
    if status in _DECORATED:
        if request.isSecure():
            request.setHeader("Strict-Transport-Security", HSTS)
    else:
        request.responseHeaders.removeHeader("X-Cache-Status")


@contextmanager
def transferring(request: Request) -> Iterator[None]:
    """
    Count a response as a transfer.

    @raise RegistryError: if the limit on transfers is reached.
    """
    crowd: Crowd = cast(Any, request.channel).crowd
    if not crowd.begin_transfer():
        raise _busy("as many large answers are being sent as may be; ask again")
    try:
        yield
    finally:
        crowd.end_transfer()


@contextmanager
def holding(request: Request, body: bytes) -> Iterator[None]:
    """
    Count a response whose C{body} stays in memory until it is sent, both as such and as a transfer.

    @raise RegistryError: if either limit is reached.
    """
    channel: Any = request.channel
    bodies, now = channel.crowd.bodies, channel.factory.reactor.seconds()
    with transferring(request):
        try:
            sending = bodies.begin(body, now, channel.break_off)
        except NoRoomError:
            raise _busy("too many large answers are being sent; ask again") from None
        try:
            yield
        finally:
            bodies.end(sending)


def _busy(said: str) -> RegistryError:
    return RegistryError(503, "UNAVAILABLE", said, {"Retry-After": "5"}, Reason.BUSY)


def _here(blocking: Callable[..., T], *args: Any) -> Deferred[T]:  # noqa: ANN401 (InThread)
    """
    Call C{blocking} directly, in place of a thread: reading from memory does not block.
    """
    return execute(blocking, *args)


async def send_source(
    request: Any,  # noqa: ANN401 (a Request, or what channels and senders treat as one)
    source: Source,
    body: object,
    in_thread: InThread,
    held: Callable[[], int],
) -> None:
    """
    Send the rest of a response. Drop a cached file that can't be read, so that the next request downloads it again.

    @param body: where C{source} reads from.
    """
    try:
        await send(request, source, in_thread, held)
    except (CutShortError, OSError) as problem:
        unreadable = isinstance(problem, CutShortError) or problem.errno in _UNREADABLE
        if not unreadable or not isinstance(body, Content):
            raise
        await in_thread(body.drop, problem)
        raise ShortBodyError(f"{body.digest} can't be read to its end") from problem


async def send_body(request: Request, status: int, content_type: str, body: bytes) -> None:
    """
    Send a complete response of any size, at the client's pace.

    @raise RegistryError: if too many large responses are being sent.
    """
    if len(body) <= LEAST_PIECE or request.method == b"HEAD":
        send_small(request, status, content_type, body)
        return
    with holding(request, body):
        begin(request, status)
        request.setHeader("Content-Type", content_type)
        request.setHeader("Content-Length", str(len(body)))
        request.write(b"")
        await send(request, Held(body), _here, lambda: LEAST_PIECE)
    request.finish()


def send_small(request: Request, status: int, content_type: str, body: bytes) -> None:
    """
    Send a complete response of at most C{LEAST_PIECE} bytes.
    """
    begin(request, status)
    request.setHeader("Content-Type", content_type)
    request.setHeader("Content-Length", str(len(body)))
    if body:
        request.write(body)
    request.finish()
