"""
A registry's own endpoint: requests with authorization, which is sent nowhere else.
"""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.http import FORBIDDEN
from twisted.web.http_headers import Headers
from twisted.web.iweb import IResponse

from ecrproxy import tracing
from ecrproxy.oci import Route
from ecrproxy.reasons import Reason
from ecrproxy.registry.authorization import Authorization
from ecrproxy.registry.aws import TokenUnavailableError
from ecrproxy.registry.circuit import Circuit, CircuitState, Switch
from ecrproxy.registry.governor import Governor
from ecrproxy.registry.headers import header_values
from ecrproxy.registry.queue import NoPlentyError
from ecrproxy.registry.quotas import Call, call_of
from ecrproxy.registry.refusals import Refusal
from ecrproxy.registry.retries import TransientError, Tries
from ecrproxy.registry.unavailable import UnavailableError
from ecrproxy.registry.wire import HEADER_SECONDS, Wire

log = Logger()

PROBE_SECONDS: Final = 5.0
"""
Seconds that a probe waits for an answer: the request that serves as the probe may have an older answer to fall back to.
"""
AHEAD_SECONDS: Final = 10.0
"""Maximum seconds of a request that no client waits for."""
_TOLD_BY_BODY: Final = frozenset({400, 401, 403, 404, 405})


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """
    A request to ECR.

    @ivar accept: accepted media types.
    @ivar query: the query string, without C{?}.
    @ivar span: the Range header; empty for all.
    @ivar limit: maximum bytes of the answer; None to leave the body to the caller.
    @ivar ahead: whether no client waits for the answer.
    """

    method: str
    route: Route
    accept: str = ""
    query: str = ""
    span: str = ""
    limit: int | None = None
    ahead: bool = False

    @property
    def is_list(self) -> bool:
        """
        Return True if tags or referrers are requested: ECR has quotas, permissions and failures of their own for these.
        """
        return call_of(self.method, self.route.kind) is Call.LIST


@dataclass(frozen=True, slots=True)
class UpstreamReply:
    """
    ECR's answer.

    @ivar body: empty if it was not read, as for HEAD.
    """

    response: IResponse
    body: bytes


class Endpoint:
    """
    The endpoint of one registry.

    @ivar url: the registry's, without a path.
    """

    def __init__(
        self, url: str, wire: Wire, authorization: Authorization, governor: Governor, circuit: Circuit
    ) -> None:
        self.url, self._wire, self._authorization = url, wire, authorization
        self._governor, self._circuit = governor, circuit
        self._doubting = self._left = False

    def leave(self) -> None:
        """
        Send only what requests in progress need, and refuse none of it by circuit.
        """
        self._left = True
        self._circuit.dissolve()
        self._wire.leave()

    async def ask(self, question: UpstreamRequest) -> UpstreamReply:
        """
        Send a request; retry temporary failures, and once with another token if ECR rejects this one.

        A HEAD that is refused is repeated as GET, because only a body says which refusal it is, and
        some registries do not support HEAD (docs/ecr.rst).

        @raise RegistryError: if the answer is a refusal, or there is none.
        """
        if question.ahead:
            return await self._ask_ahead(question)
        repository = question.route.repository.name
        self._circuit.check(repository, lists=question.is_list)
        shown = await self._shown(question, self._authorization.show(repository))
        tries = self._wire.tries()
        for last in (False, True):
            reply = await self._persist(tries, question, shown)
            if question.method == "HEAD" and reply.response.code in _TOLD_BY_BODY:
                question = replace(question, method="GET")
                reply = await self._persist(tries, question, shown)
            if reply.response.code < 400:  # noqa: PLR2004
                return reply
            refusal = Refusal.of(reply.response, reply.body, self._wire.name)
            if last or not refusal.is_about_token:
                refusal.of_one(shown).raise_for(question.route)
            challenges = header_values(reply.response, "WWW-Authenticate")
            renewed = await self._shown(question, self._authorization.renew(shown, repository, challenges))
            if renewed == shown:
                refusal.raise_for(question.route)
            shown = renewed
        raise AssertionError("the second turn answers or raises")

    def has_plenty(self, question: UpstreamRequest) -> bool:
        """
        Return True if a request that no client waits for would delay no other.
        """
        repository = question.route.repository.name
        well = not self._left and self._circuit.is_well(repository)
        return well and self._governor.has_plenty(call_of(question.method, question.route.kind), repository)

    async def _ask_ahead(self, question: UpstreamRequest) -> UpstreamReply:
        """
        Send a request that no client waits for: once, and only if ECR is well.

        Its failure is not evidence: only clients' requests are reported to the circuit, and may be its probe.

        @raise RegistryError: if the answer is a refusal, or there is none, or the request would take a place from a
            client.
        """
        repository = question.route.repository.name
        if not self.has_plenty(question):
            raise NoPlentyError(503, "UNAVAILABLE", f"nothing is asked ahead of {self._wire.name} now")
        try:
            shown = await self._authorization.show(repository)
        except TokenUnavailableError as problem:
            raise UnavailableError(503, "UNAVAILABLE", str(problem), reason=Reason.NO_TOKEN) from None
        with self._governor.spare_place(call_of(question.method, question.route.kind), repository):
            reply = await self._send(question, shown, AHEAD_SECONDS)
        if reply.response.code >= 400:  # noqa: PLR2004
            Refusal.of(reply.response, reply.body, self._wire.name).of_one(shown).raise_for(question.route)
        self._circuit.answered(repository)
        return reply

    async def _shown(self, question: UpstreamRequest, asked: Coroutine[object, object, str]) -> str:
        try:
            return await asked
        except TransientError as problem:
            self._fail(question, problem)
            raise
        except TokenUnavailableError as problem:
            raise UnavailableError(
                503,
                "UNAVAILABLE",
                f"the proxy has no token for {self._wire.name}: {problem}",
                {"Retry-After": "5"},
                Reason.NO_TOKEN,
            ) from None

    async def _persist(self, tries: Tries, question: UpstreamRequest, shown: str) -> UpstreamReply:
        try:
            return await self._wire.persist(tries, partial(self._try, tries, question, shown))
        except TransientError as problem:
            self._fail(question, problem)
            raise

    def _fail(self, question: UpstreamRequest, problem: TransientError) -> None:
        """
        Note a failure; if it opened a circuit, refuse the requests that now wait in vain.
        """
        if problem.throttled or self._left:
            return
        repository, lists = question.route.repository.name, question.is_list
        opened = self._circuit.failed(repository, problem, lists=lists)
        if not lists or opened is self._circuit.whole:  # a pull may queue beside a list
            self._act_on(opened, repository)
        if lists or self._circuit.suspects:
            self._doubt()

    def _act_on(self, opened: Switch | None, repository: str | None = None) -> None:
        if opened is None:
            return
        whole = opened is self._circuit.whole
        self._governor.send_away(opened.refusal, None if whole else repository)
        if whole:
            probing = tracing.apart(self._probe_until_answered())
            probing.addErrback(lambda failure: log.failure("Probing {name}", failure, name=self._wire.name))

    def _doubt(self) -> None:
        """
        Find out whether ECR fails, or only what clients request.
        """
        if not (self._doubting or self._left):
            self._doubting = True
            asking = tracing.apart(self._ask_itself())
            asking.addErrback(lambda failure: log.failure("Probing {name}", failure, name=self._wire.name))

    async def _ask_itself(self) -> None:
        try:
            problem = await self._probed()
        finally:
            self._doubting = False
        if problem is None:
            self._circuit.vouched()
        elif not self._left:
            self._act_on(self._circuit.doubted(problem))

    async def _probe_until_answered(self) -> None:
        whole = self._circuit.whole
        while whole.state is not CircuitState.CLOSED:
            await deferLater(self._wire.clock, whole.rest)
            if whole.rest or not whole.enter():
                continue
            problem = await self._probed()
            if problem is not None:
                whole.probe_failed(problem)
            else:
                self._circuit.recovered()

    async def _probed(self) -> UnavailableError | None:
        """
        Send a request that concerns no repository; any answer will do.

        @return: why there is none.
        """
        try:
            await self._probe()
        except UnavailableError as problem:
            return problem if problem.status != 429 else None  # noqa: PLR2004
        except Exception:  # noqa: BLE001 (who probes goes on: nothing else lets clients' questions go again)
            log.failure("Probing {name}", name=self._wire.name)
            return UnavailableError(502, "UNAVAILABLE", f"the proxy failed to ask {self._wire.name}; its log says why")
        return None

    async def _probe(self) -> None:
        try:
            headers = _headers(await self._authorization.show_for_probe())
        except TokenUnavailableError:
            headers = _headers()
        response = await self._wire.request("GET", f"{self.url}/v2/", headers, PROBE_SECONDS)
        await self._wire.read_beginning(response)

    async def _try(self, tries: Tries, question: UpstreamRequest, shown: str) -> UpstreamReply:
        """
        Send a request once, when there is a place for it.
        """
        call, repository = call_of(question.method, question.route.kind), question.route.repository.name
        async with self._governor.place(call, repository):
            try:
                return await self._through_circuit(tries, question, shown)
            except TransientError as problem:
                if problem.throttled and problem.wait:
                    self._governor.rest(call, repository, problem.wait)
                raise

    async def _through_circuit(self, tries: Tries, question: UpstreamRequest, shown: str) -> UpstreamReply:
        """
        Send a request, if the circuit permits, and report the outcome to it.
        """
        repository, lists = question.route.repository.name, question.is_list
        probed = self._circuit.enter(repository, lists=lists)
        if probed is None:
            waited = tries.seconds(self._wire.clock.seconds())
            reply = await self._watched(question, shown, max(PROBE_SECONDS, HEADER_SECONDS - waited))
            self._answered(question, reply)
            return reply
        tries.give_up()  # a probe is one short attempt
        try:
            reply = await self._send(question, shown, PROBE_SECONDS)
        except TransientError as problem:
            if problem.throttled:
                self._circuit.answered(repository, lists=lists)
            probed.probe_failed(problem)
            raise
        except BaseException:
            probed.probe_left()
            raise
        self._answered(question, reply)
        return reply

    def _answered(self, question: UpstreamRequest, reply: UpstreamReply) -> None:
        repository = question.route.repository.name
        self._circuit.answered(repository, lists=question.is_list)
        if not question.is_list:  # a different permission, which says nothing about pulls
            denials = self._circuit.denials
            (denials.denied if reply.response.code == FORBIDDEN else denials.granted)(repository)

    def _note_silence(self, began: float) -> None:
        if not self._circuit.heard_since(began):
            self._doubt()

    async def _watched(self, question: UpstreamRequest, shown: str, seconds: float) -> UpstreamReply:
        """
        Send a request; if ECR answers nothing until C{PROBE_SECONDS} before its deadline, send the daemon's own, too.

        So the circuit of a silent ECR opens as soon as clients' requests have failed.
        """
        clock = self._wire.clock
        silence = clock.callLater(max(0.0, seconds - PROBE_SECONDS), self._note_silence, clock.seconds())
        try:
            return await self._send(question, shown, seconds)
        finally:
            if silence.active():
                silence.cancel()

    async def _send(self, question: UpstreamRequest, shown: str, seconds: float) -> UpstreamReply:
        headers = _headers(shown)
        if question.accept:
            headers.setRawHeaders("Accept", [question.accept])
        if question.span:
            headers.setRawHeaders("Range", [question.span])
        url = self.url + question.route.path + (f"?{question.query}" if question.query else "")
        response = await self._wire.request(question.method, url, headers, seconds)
        if question.method == "HEAD":
            return UpstreamReply(response, b"")
        if response.code >= 400:  # noqa: PLR2004
            return UpstreamReply(response, await self._wire.read_beginning(response))
        limit = question.limit
        return UpstreamReply(response, b"" if limit is None else await self._wire.read(response, limit))


def _headers(shown: str = "") -> Headers:
    headers = Headers({"User-Agent": ["ecrproxy"]})
    if shown:
        headers.setRawHeaders("Authorization", [shown])
    return headers
