"""
Requests as they go out: of plain bytes, with a limit on the time until headers come, and again after what may pass.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
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
from ecrproxy.registry.bucket import RefusedAnswerError, UnavailableError, describe, first_cause, header
from ecrproxy.registry.retries import FIRST_WAIT, TRANSIENT_STATUSES, Budget, TransientError, Tries, asked_wait, failure

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

log = Logger()
T = TypeVar("T")

HEADER_SECONDS: Final = 25.0
"""
Seconds for an upstream's headers, connecting included; for ECR, from the moment a question begins to queue, retries
included. containerd waits 30 s for our headers.
"""
_DOUBLED: Final = 3
"""After how many breaks the longest wait for more of a body grows no more."""


@implementer(IAgent)
class PlainAgent:
    """
    An agent beneath treq that asks for bytes as they are, and takes no others.

    treq asks for gzip whatever it is told and would unpack it unseen; digests, lengths and ranges
    are those of the bytes as they are. Its cookie jar is one for all: no cookie passes.
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
    response.headers.removeHeader("Set-Cookie")  # else treq's jar parses and keeps it
    encoding = header(response, "Content-Encoding")
    if encoding not in (None, "identity"):
        discard(response, clock)
        raise RefusedAnswerError(502, "UNAVAILABLE", f"upstream sends {encoding!r} where plain bytes were asked for")
    return response


def _judged(what: str, problem: BaseException | None) -> UnavailableError:
    """
    Tell a connection that failed, which may pass, from an answer that is none, which an upstream gives for reasons.
    """
    cause, said = first_cause(problem), f"{what}: {describe(problem)}"
    if not isinstance(cause, ConnectError | ConnectionClosed | DNSLookupError):
        return UnavailableError(502, "UNAVAILABLE", said)
    failed = TransientError(502, "UNAVAILABLE", said)
    failed.reached = isinstance(cause, ConnectionClosed)
    return failed


def _unless_cancelled(asked: Deferred[T]) -> Deferred[T]:
    """
    Wait for C{asked}; whoever cancels that sees a C{CancelledError}, and not what becomes of the request then.

    treq tells both its own troubles and a request that was cancelled as a C{ResponseFailed}; one is tried again.
    A request whose time was up may end as cancelled: that is its failure, and nobody's who waits for it.
    """

    def cancel(waiting: Deferred[T]) -> None:
        waiting.errback(CancelledError())
        asked.cancel()

    def ended(result: T | Failure) -> None:
        if waiting.called:
            return
        if isinstance(result, Failure) and result.check(CancelledError):
            result = Failure(TimeoutError("it was given up"))
        waiting.callback(result)

    waiting: Deferred[T] = Deferred(cancel)
    asked.addBoth(ended)
    return waiting


class Wire:
    """
    What requests go out over.

    @param agent: sends them.
    @param budget: how often each question may be tried.
    @param chance: gives random numbers from 0 to 1.
    @ivar leave: closes connections that are idle, now and later: only requests in progress ask anything from now on.
    @ivar name: what the log and clients are told that the registry is.
    @ivar retried: how many tries there were beyond the first ones.
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
        Begin to count the tries of one question.
        """
        return Tries(self._budget, self.clock.seconds())

    async def persist(self, tries: Tries, ask: Callable[[], Awaitable[T]]) -> T:
        """
        Ask, and again after failures that may pass, as long as C{tries} let.

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
        Wait before asking for more of a body that broke off C{breaks} times in a row without bringing anything.
        """
        await deferLater(self.clock, self._chance() * FIRST_WAIT * 2.0 ** (min(breaks, _DOUBLED) - 1))

    async def request(self, method: str, url: str, headers: Headers, seconds: float = HEADER_SECONDS) -> IResponse:
        """
        Send a request, once; its redirects are not followed.

        @param seconds: how long to wait for the answer's headers.
        @raise TransientError: if no answer comes, or one that says to try again.
        """
        response = await self._sent(method, url, headers, seconds)
        if response.code not in TRANSIENT_STATUSES:
            return response
        discard(response, self.clock)
        wait = asked_wait(header(response, "Retry-After"), header(response, "Date"))
        raise failure(urlsplit(url).hostname or "", response.code, wait)

    async def _sent(self, method: str, url: str, headers: Headers, seconds: float) -> IResponse:
        try:
            asked = self._client.request(method, url, headers=headers, allow_redirects=False, unbuffered=True)
        except ValueError:
            raise UnavailableError(502, "UNAVAILABLE", f"{self.name} redirects to what is no URL") from None
        limit = self.clock.callLater(seconds, asked.cancel)
        try:
            return (await _unless_cancelled(asked)).original
        except (RegistryError, CancelledError):
            raise
        except Exception as problem:
            host = urlsplit(url).hostname
            if not limit.active():
                raise TransientError(504, "UNAVAILABLE", f"{host} has not answered for {seconds:.0f} s") from None
            raise _judged(f"{host} can't be reached", problem) from problem
        finally:
            if limit.active():
                limit.cancel()

    async def read(self, response: IResponse, limit: int) -> bytes:
        """
        Read a small body.

        @raise RefusedAnswerError: if it is longer than C{limit}.
        @raise TransientError: if it does not come to its end.
        """
        return await self._collected(response, limit)

    async def read_beginning(self, response: IResponse) -> bytes:
        """
        Read a body, or its first C{ERROR_LIMIT} bytes: a long page refuses as well as a short text.

        @raise TransientError: if it does not come to its end.
        """
        return await self._collected(response, ERROR_LIMIT, beginning=True)

    async def _collected(self, response: IResponse, limit: int, *, beginning: bool = False) -> bytes:
        collected = _Collect(limit, self.clock, self.name, beginning=beginning)
        response.deliverBody(collected)
        return await collected.whole


class _Collect(TwistedProtocol):
    """
    Collect a small body: at most so many bytes, in no more than the time of headers.

    @param beginning: whether the beginning of one that is longer does.
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
