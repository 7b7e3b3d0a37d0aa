"""
HTTP requests upstream: without content coding, with a deadline for the headers, retried after temporary failures.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urlsplit

from treq.client import HTTPClient
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectError, ConnectionClosed, DNSLookupError
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.protocol import connectionDone
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from ecrproxy.oci import RegistryError
from ecrproxy.registry.bodies import ERROR_LIMIT, discard
from ecrproxy.registry.headers import header, header_values
from ecrproxy.registry.hedging import AGAIN_SECONDS, Hedged
from ecrproxy.registry.retries import FIRST_WAIT, TRANSIENT_STATUSES, Budget, TransientError, Tries, asked_wait, failure
from ecrproxy.registry.unavailable import RefusedAnswerError, UnavailableError, describe, first_cause

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

log = Logger()
T = TypeVar("T")

HEADER_SECONDS: Final = 25.0
"""
Maximum seconds until the headers, connecting included; for ECR, from the time a request begins to queue, retries
included. containerd waits 30 s for our headers.
"""
_NO_CODINGS: Final = frozenset({"", "identity", "aws-chunked"})
"""
Codings in lower case that leave the bytes as they are. S3 dropped C{aws-chunked}, the framing of an upload, but until
2024 kept the header, empty; other stores keep the word ("Signature Calculations: Transferring Payload in Multiple
Chunks" in the API reference of S3; boto3 #3629, versitygw #2398).
"""
_DOUBLED: Final = 3
"""Number of breaks after which the wait for more of a body no longer grows."""


@implementer(IAgent)
class PlainAgent:
    """
    An agent beneath treq that requests bytes without coding, and accepts no others.

    treq always asks for gzip, and would decode it unseen; digests, lengths and ranges
    are those of the original bytes. treq's cookie jar is shared by all requests, so cookies are removed.
    """

    def __init__(self, agent: IAgent, clock: IReactorTime) -> None:
        self._agent, self._clock = agent, clock

    def request(
        self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: IBodyProducer | None = None
    ) -> Deferred[IResponse]:
        """
        Send the request. Fails with L{RefusedAnswerError} for an encoded answer.
        """
        headers = Headers() if headers is None else headers.copy()
        headers.setRawHeaders("Accept-Encoding", ["identity"])
        headers.removeHeader("Cookie")
        return self._agent.request(method, uri, headers, bodyProducer).addCallback(_plain, self._clock)


def _plain(response: IResponse, clock: IReactorTime) -> IResponse:
    response.headers.removeHeader("Set-Cookie")  # otherwise treq's jar parses and keeps it
    encoding = ",".join(header_values(response, "Content-Encoding"))
    if not _NO_CODINGS.issuperset(each.strip().lower() for each in encoding.split(",")):
        discard(response, clock)
        said = f"upstream sends {encoding[:80]!r} where plain bytes were asked for"
        raise RefusedAnswerError(502, "UNAVAILABLE", said)
    return response


def _judged(what: str, problem: BaseException | None) -> UnavailableError:
    """
    Distinguish a failed connection, which is temporary, from an invalid answer, which upstream would repeat.
    """
    cause, said = first_cause(problem), f"{what}: {describe(problem)}"
    if not isinstance(cause, ConnectError | ConnectionClosed | DNSLookupError):
        return UnavailableError(502, "UNAVAILABLE", said)
    failed = TransientError(502, "UNAVAILABLE", said)
    failed.reached = isinstance(cause, ConnectionClosed)
    return failed


class Wire:
    """
    Sends requests.

    @param agent: sends them.
    @param budget: how often each request may be tried.
    @param chance: returns random numbers from 0 to 1.
    @ivar leave: closes idle connections, now and later: only requests in progress need any.
    @ivar name: the registry's name in the log and for clients.
    @ivar retried: number of attempts beyond the first ones, hedged ones included.
    """

    def __init__(
        self,
        agent: IAgent,
        clock: IReactorTime,
        budget: Budget = Budget(),  # noqa: B008 (it is frozen)
        chance: Callable[[], float] = random.random,
        leave: Callable[[], object] = lambda: None,
        name: str = "ECR",
    ) -> None:
        self._client, self.clock, self.leave = HTTPClient(PlainAgent(agent, clock)), clock, leave
        self._budget, self._chance, self.name = budget, chance, name
        self.retried = 0

    def tries(self) -> Tries:
        """
        Start counting the attempts of a request.
        """
        return Tries(self._budget, self.clock.seconds())

    async def persist(self, tries: Tries, ask: Callable[[], Awaitable[T]]) -> T:
        """
        Send a request, and retry it after temporary failures, as long as C{tries} permits.

        @raise TransientError: the last failure.
        """
        while True:
            try:
                return await ask()
            except TransientError as problem:
                wait = tries.failed(problem, self.clock.seconds(), self._chance())
                if wait is None:
                    raise
                self.retried += 1
                log.info("Asking again in {wait:.1f} s: {problem}", wait=wait, problem=problem.message)
            await deferLater(self.clock, wait)

    async def pause(self, breaks: int) -> None:
        """
        Wait before requesting more of a body that broke off C{breaks} times in a row without progress.
        """
        await deferLater(self.clock, self._chance() * FIRST_WAIT * 2.0 ** (min(breaks, _DOUBLED) - 1))

    async def request(self, method: str, url: str, headers: Headers, seconds: float = HEADER_SECONDS) -> IResponse:
        """
        Send a request once; redirects are not followed.

        @param seconds: deadline for the headers of the answer.
        @raise TransientError: if there is no answer, or one that says to try again.
        """
        host = urlsplit(url).hostname or ""

        def send() -> Deferred[IResponse]:
            asked = self._client.request(method, url, headers=headers, allow_redirects=False, unbuffered=True)
            return asked.addCallback(attrgetter("original"))

        def again() -> Deferred[IResponse]:
            self._note_repeat(host)
            return send().addCallback(self._accepted, host)

        try:
            asked = Hedged(send, seconds, self.clock.callLater, again)
        except ValueError:
            raise UnavailableError(502, "UNAVAILABLE", f"{self.name} redirects to what is no URL") from None
        try:
            return self._accepted(await asked.answer, host)
        except (RegistryError, CancelledError):
            raise
        except Exception as problem:
            if asked.late:
                raise TransientError(504, "UNAVAILABLE", f"{host} has not answered for {seconds:.0f} s") from None
            raise _judged(f"{host} can't be reached", problem) from problem

    def _accepted(self, response: IResponse, host: str) -> IResponse:
        """
        Return an answer, unless it says to try again.
        """
        if response.code not in TRANSIENT_STATUSES:
            return response
        discard(response, self.clock)
        wait = asked_wait(header(response, "Retry-After"), header(response, "Date"))
        raise failure(host, response.code, wait)

    def _note_repeat(self, host: str) -> None:
        self.retried += 1
        said = "{host} has not answered for {seconds:.0f} s: asking again over another connection"
        log.info(said, host=host, seconds=AGAIN_SECONDS, once=host)

    async def read(self, response: IResponse, limit: int) -> bytes:
        """
        Read a small body.

        @raise RefusedAnswerError: if it is longer than C{limit}.
        @raise TransientError: if it is incomplete.
        """
        return await self._collected(response, limit)

    async def read_beginning(self, response: IResponse) -> bytes:
        """
        Read a body, or its first C{ERROR_LIMIT} bytes: a refusal may be a long page.

        @raise TransientError: if it is incomplete.
        """
        return await self._collected(response, ERROR_LIMIT, beginning=True)

    async def _collected(self, response: IResponse, limit: int, *, beginning: bool = False) -> bytes:
        collected = _Collect(limit, self.clock, self.name, beginning=beginning)
        response.deliverBody(collected)
        return await collected.whole


class _Collect(TwistedProtocol):
    """
    Collects a small body: a limited number of bytes, within the deadline for headers.

    @param beginning: whether the beginning of a longer body suffices.
    """

    def __init__(self, limit: int, clock: IReactorTime, name: str, *, beginning: bool) -> None:
        self._limit, self._name, self._parts, self._size = limit, name, list[bytes](), 0
        self._beginning = beginning
        self.whole: Deferred[bytes] = Deferred(lambda _: self._give_up())
        self._timer = clock.callLater(HEADER_SECONDS, self._late)

    def dataReceived(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= self._limit:
            self._parts.append(data)
        elif self._beginning:
            self._end(b"".join((*self._parts, data))[: self._limit])
            self._give_up()
        else:
            what = f"an answer of {self._name} has more than the {self._limit} bytes that it may have"
            self._fail(RefusedAnswerError(502, "UNAVAILABLE", what))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if reason.check(ResponseDone, PotentialDataLoss):
            self._end(b"".join(self._parts))
        else:
            self._fail(_judged(f"{self._name} broke off", reason.value))

    def _late(self) -> None:
        what = f"an answer of {self._name} has not ended after {HEADER_SECONDS:.0f} s"
        self._fail(TransientError(504, "UNAVAILABLE", what))

    def _fail(self, problem: UnavailableError) -> None:
        self._end(Failure(problem))
        self._give_up()

    def _end(self, result: bytes | Failure) -> None:
        if self._timer.active():
            self._timer.cancel()
        if not self.whole.called:
            self.whole.callback(result)

    def _give_up(self) -> None:
        if self._timer.active():
            self._timer.cancel()
        if self.transport is not None:
            self.transport.loseConnection()
