"""
ECR's own endpoint: asked with the token, which goes there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol

from twisted.web.http_headers import Headers
from twisted.web.iweb import IResponse

from ecrproxy.oci import Route
from ecrproxy.reasons import Reason
from ecrproxy.registry.bodies import ERROR_LIMIT
from ecrproxy.registry.bucket import UnavailableError
from ecrproxy.registry.circuit import Circuit, CircuitState
from ecrproxy.registry.ecr import TokenUnavailableError
from ecrproxy.registry.governor import Governor
from ecrproxy.registry.quotas import call_of
from ecrproxy.registry.refusals import Refusal
from ecrproxy.registry.retries import TransientError, Tries
from ecrproxy.registry.wire import HEADER_SECONDS, Wire

PROBE_SECONDS: Final = 5.0
"""How long a probe waits for an answer: whoever asks with it may have something old to be served instead."""


class Tokens(Protocol):
    """
    Where the token comes from: see C{ecr.TokenService}.
    """

    async def get(self) -> str:
        """Return the token."""

    async def renew(self, refused: str) -> str:
        """Return another than C{refused}."""


@dataclass(frozen=True, slots=True)
class Question:
    """
    What ECR is asked.

    @ivar accept: the media types that are taken.
    @ivar query: as it goes behind the C{?}.
    @ivar limit: the most bytes that the answer may have; none to leave its body to who asks.
    """

    method: str
    route: Route
    accept: str = ""
    query: str = ""
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """
    What ECR answers.

    @ivar body: empty where it was not to be read, as that of a HEAD.
    """

    response: IResponse
    body: bytes


class Endpoint:
    """
    One registry, asked with the token.

    @ivar url: the registry's, without a path.
    """

    def __init__(self, url: str, wire: Wire, tokens: Tokens, governor: Governor, circuit: Circuit) -> None:
        self.url, self._wire, self._tokens = url, wire, tokens
        self._governor, self._circuit = governor, circuit

    async def ask(self, question: Question) -> Reply:
        """
        Ask, again after failures that may pass, and once more after a refresh if ECR takes the token no more.

        A HEAD that is refused is asked again as GET, for only a body says which refusal it is, and
        some registries know no HEAD (field notes C5).

        @raise RegistryError: if the answer is a refusal, or there is none.
        """
        self._circuit.check()
        secret = await self._secret(self._tokens.get())
        tries = self._wire.tries()
        for last in (False, True):
            reply = await self._persist(tries, question, secret)
            code = reply.response.code
            if question.method == "HEAD" and (code in (403, 404, 405) or (last and code == 401)):  # noqa: PLR2004
                question = replace(question, method="GET")
                reply = await self._persist(tries, question, secret)
            if reply.response.code < 400:  # noqa: PLR2004
                return reply
            refusal = Refusal.of(reply.response, reply.body)
            if last or not refusal.is_about_token:
                refusal.raise_for(question.route)
            secret = await self._secret(self._tokens.renew(secret))
        raise AssertionError("the second turn answers or raises")

    async def _secret(self, asked: Coroutine[object, object, str]) -> str:
        try:
            return await asked
        except TokenUnavailableError as problem:
            raise UnavailableError(
                503,
                "UNAVAILABLE",
                f"the proxy has no token for ECR: {problem}",
                {"Retry-After": "5"},
                Reason.NO_TOKEN,
            ) from None

    async def _persist(self, tries: Tries, question: Question, secret: str) -> Reply:
        try:
            return await self._wire.persist(tries, partial(self._try, tries, question, secret))
        except TransientError as problem:
            if not problem.throttled:
                self._circuit.failed(problem)
            if self._circuit.state is CircuitState.OPEN:
                self._governor.send_away(self._circuit.refusal)
            raise

    async def _try(self, tries: Tries, question: Question, secret: str) -> Reply:
        """
        Ask once, when there is a place for it.
        """
        call = call_of(question.method, question.route.kind)
        async with self._governor.place(call):
            try:
                return await self._through_circuit(tries, question, secret)
            except TransientError as problem:
                if problem.throttled and problem.wait:
                    self._governor.rest(call, problem.wait)
                raise

    async def _through_circuit(self, tries: Tries, question: Question, secret: str) -> Reply:
        """
        Ask, if the circuit lets; tell it what came of that.
        """
        if not self._circuit.enter():
            reply = await self._send(question, secret, HEADER_SECONDS)
            self._circuit.answered()
            return reply
        tries.give_up()  # a probe is one try, and not a long one
        try:
            reply = await self._send(question, secret, PROBE_SECONDS)
        except TransientError as problem:
            if problem.throttled:
                self._circuit.answered()
            self._circuit.probe_failed(problem)
            raise
        except BaseException:
            self._circuit.probe_left()
            raise
        self._circuit.answered()
        return reply

    async def _send(self, question: Question, secret: str, seconds: float) -> Reply:
        headers = Headers({"User-Agent": ["ecrproxy"], "Authorization": [f"Basic {secret}"]})
        if question.accept:
            headers.setRawHeaders("Accept", [question.accept])
        url = self.url + question.route.path + (f"?{question.query}" if question.query else "")
        response = await self._wire.request(question.method, url, headers, seconds)
        limit = question.limit if response.code < 400 else ERROR_LIMIT  # noqa: PLR2004
        if question.method == "HEAD" or limit is None:
            return Reply(response, b"")
        return Reply(response, await self._wire.read(response, limit))
