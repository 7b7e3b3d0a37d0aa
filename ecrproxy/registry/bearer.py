"""
The token flow of registries other than ECR: a token for each repository, from the service that the registry names.

Rules:

- The registry is asked once, without a token, what it requires; later it may require something else with a refusal.
  If no token can be had there, the registry is asked again without one: nvcr.io names another realm to clients
  with an expired token, which issues none without a password.
  After a token could not be had, the registry is asked again before the next attempt: the service may have moved.
- The user and password are sent to the realm that the registry names, if it may be followed; tokens to the registry.
  A redirect of the realm is followed if that may be followed, too, with the password if it stays on the same host.
- One request serves all clients that need a token for the same repository, and takes at most C{TOKEN_SECONDS}.
- A password that is refused without a scope, too, as for C{docker login}, is wrong: it is not shown for any token for a
  while, because accounts get locked. Another one is tried at once.
- A token service that throttles is not asked for the same token until its Retry-After. Other tokens are not affected.

Sources: distribution's "Token Authentication Specification"; RFC 6750 and 7617; docs/ecr.rst for ECR Public.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from twisted.logger import Logger
from twisted.web.http import FORBIDDEN, NOT_FOUND, OK, UNAUTHORIZED
from twisted.web.http_headers import Headers

from ecrproxy.access.turns import Turns
from ecrproxy.cache.memory import Memory
from ecrproxy.flights import DeadlineExceededError, Flights, within
from ecrproxy.oci import RegistryError
from ecrproxy.reasons import Reason
from ecrproxy.registry.authorization import Tokens
from ecrproxy.registry.bodies import ERROR_LIMIT, discard
from ecrproxy.registry.challenges import Challenge, Pass, may_follow, redirected
from ecrproxy.registry.headers import REDIRECT_STATUSES, header, header_values
from ecrproxy.registry.retries import TransientError, failure
from ecrproxy.registry.unavailable import UnavailableError
from ecrproxy.registry.wire import Wire

log = Logger()
T = TypeVar("T")

TOKEN_SECONDS: Final = 10.0
"""Maximum seconds for a token, retries included: a client that requests a manifest waits 30 s in total."""
TOGETHER: Final = 32
"""
Maximum concurrent token requests to one registry. One that queues is refused before its client gives up.
"""
_TOKENS_BYTES: Final = 4 * 2**20
"""Maximum bytes of memory for the tokens of one registry."""
REDIRECTS: Final = 5
"""Maximum redirects of a token service that are followed."""
REST_SECONDS: Final = 5.0, 60.0
"""Seconds until a token service that throttles is asked for the same token again: without Retry-After, and at most."""
REFUSED_SECONDS: Final = 30
"""Seconds for which a wrong password is not shown again."""
_RESTS_BYTES: Final = 2**20
_KEPT: Final = 0.9
"""The fraction of a token's life for which it is used, so that it does not expire on its way."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """
    An answer of the registry or its token service.

    @ivar proved: whether a password was shown.
    """

    status: int
    body: bytes
    challenges: Sequence[str]
    location: str | None
    proved: bool

    @property
    def is_refusal(self) -> bool:
        """
        Return True if the password is refused, for one scope at least.
        """
        return self.status == UNAUTHORIZED and self.proved


class Bearer:
    """
    Authorizes requests to a registry as it requires.

    @param url: the registry's.
    @param login: returns the user and password for the token service; None for anonymous pulls.
    @param realms: hosts outside the registry's own domain that may issue its tokens.
    """

    def __init__(self, url: str, wire: Wire, login: Tokens | None = None, realms: Collection[str] = ()) -> None:
        self._url, self._wire, self._login, self._realms = url, wire, login, realms
        self._wanted: Challenge | None = None
        self._doubted = False
        self._asking: Flights[Challenge] = Flights(foreseen=RegistryError)
        self._fetching: Flights[str] = Flights(foreseen=RegistryError)
        self._turns = Turns(TOGETHER, TOKEN_SECONDS, wire.clock)
        self._tokens: Memory[str, tuple[str, float]] = Memory(_TOKENS_BYTES)
        self._wrong = "", 0, 0.0
        self._proving: Flights[None] = Flights(foreseen=RegistryError)
        self._rests: Memory[tuple[str, str, int], float] = Memory(_RESTS_BYTES)

    async def show(self, repository: str) -> str:
        """
        Return the Authorization header for a request for C{repository}.

        @raise RegistryError: if the token service denies access, or there is no token now.
        @raise TokenUnavailableError: if there is no password.
        """
        wanted = self._wanted or await self._learn()
        if self._doubted and not self._kept(wanted.scope_of(repository)):
            wanted = await self._learn()
        return await self._what(wanted, repository)

    async def _what(self, wanted: Challenge, repository: str) -> str:
        if wanted.scheme == "basic" and self._login is not None:
            return f"Basic {await self._login.get()}"
        if wanted.scheme != "bearer":
            return ""
        scope = wanted.scope_of(repository)
        return f"Bearer {self._kept(scope) or await self._another(wanted, scope, repository)}"

    async def renew(self, refused: str, repository: str, challenges: Sequence[str]) -> str:
        """
        Return what to send instead of C{refused}; the same if there is nothing else.

        @param challenges: the registry's, with its refusal; empty when ECR Public no longer accepts a token.
        @raise RegistryError: as L{show}.
        @raise TokenUnavailableError: if there is no password.
        """
        said, before = Challenge.read(challenges), self._wanted
        for wanted in filter(None, (said, before)):
            scope = wanted.scope_of(repository)
            token, _ = self._tokens.get(scope) or ("", 0.0)
            if refused == f"Bearer {token}":
                self._tokens.drop(scope)
        if said is None or before is None or before == said:
            self._wanted = said or before
            return await self.show(repository)
        if token := self._kept(said.scope_of(repository)):  # another request has had it renewed
            return f"Bearer {token}"
        try:
            shown = await self._what(said, repository)
        except RegistryError:
            if await self._learn() == said:
                raise
            return await self.show(repository)
        if said.scheme == "bearer":
            self._wanted = said  # not earlier: other requests would fail there, too
        else:
            await self._learn()  # no token was issued that would show whether it applies to others
        return shown

    async def show_for_probe(self) -> str:
        """
        Send no authorization: any answer will do.
        """
        return ""

    def _kept(self, scope: str) -> str:
        """
        Return the token for C{scope}; empty if none is valid.
        """
        token, until = self._tokens.get(scope) or ("", 0.0)
        return token if self._wire.clock.seconds() < until else ""

    async def _learn(self) -> Challenge:
        self._wanted = await self._asking.join("", partial(self._in_time, self._ask))
        self._doubted = False
        return self._wanted

    async def _another(self, wanted: Challenge, scope: str, repository: str) -> str:
        fetch = partial(self._fetch, wanted, scope, repository)
        try:
            return await self._fetching.join((wanted.realm, scope), partial(self._in_time, fetch))
        except RegistryError as problem:
            self._doubted = self._doubted or not (isinstance(problem, TransientError) and problem.throttled)
            raise

    async def _in_time(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        try:
            return await within(TOKEN_SECONDS, work(), self._wire.clock.callLater)
        except DeadlineExceededError:
            said = f"{urlsplit(self._url).hostname} has given no token for {TOKEN_SECONDS:.0f} s"
            raise TransientError(504, "UNAVAILABLE", said, reason=Reason.NO_TOKEN) from None

    async def _ask(self) -> Challenge:
        """
        Ask the registry what it requires.
        """
        answer = await self._get(f"{self._url}/v2/", "", headers_only=True)
        return (Challenge.read(answer.challenges) if answer.status == UNAUTHORIZED else None) or Challenge()

    async def _fetch(self, wanted: Challenge, scope: str, repository: str) -> str:
        if not may_follow(wanted.realm, self._url, self._realms):
            said = f"{self._url} has its tokens at {wanted.realm[:200]!r}, which is not of its own domain"
            raise self._failed(f"{said}; if that is right, list its host in the registry's realms")
        secret, began = await self._login.get() if self._login is not None else "", self._wire.clock.seconds()
        answer = await self._issued(wanted, scope, secret)
        if answer.status == UNAUTHORIZED and self._login is not None:
            again = await self._login.renew(secret)
            if again != secret:
                secret, answer = again, await self._issued(wanted, scope, again)
            if answer.is_refusal:
                with contextlib.suppress(RegistryError):
                    await self._proving.join((wanted.realm, hash(secret)), partial(self._prove, wanted, secret))
                raise self._refused(wanted.realm)
        if (status := answer.status) in (UNAUTHORIZED, FORBIDDEN, NOT_FOUND):
            log.error("{realm} gives no token for {scope}: {status}", realm=wanted.realm, scope=scope, status=status)
            said = f"{urlsplit(self._url).hostname} denies the proxy access to {repository}"
            raise RegistryError(403, "DENIED", said, reason=Reason.ECR_DENIED)
        try:
            if status != OK:
                raise ValueError(f"it answers {status}")  # noqa: TRY301
            given = Pass.read(answer.body)
        except ValueError as problem:
            raise self._failed(f"{wanted.realm} gives no token: {problem}") from None
        until = began + _KEPT * given.seconds
        self._tokens.put(scope, (given.token, until), len(scope) + len(given.token) + 300)
        return given.token

    async def _prove(self, wanted: Challenge, secret: str) -> None:
        """
        Find out whether a password that was refused is wrong, or refused for a repository.
        """
        if wanted.scope or (await self._issued(wanted, "", secret)).is_refusal:
            self._wrong = wanted.realm, hash(secret), self._wire.clock.seconds() + REFUSED_SECONDS

    def _refused(self, realm: str) -> UnavailableError:
        return self._failed(f"{realm} refuses the proxy's user and password")

    async def _issued(self, wanted: Challenge, scope: str, secret: str) -> _Answer:
        """
        Ask for a token, unless the service has just throttled the same request.
        """
        key, now = (wanted.realm, scope, hash(secret)), self._wire.clock.seconds()
        if (until := self._rests.get(key) or 0.0) > now:
            raise failure(urlsplit(wanted.realm).hostname or "", 429, until - now)
        try:
            return await self._follow(wanted, scope, secret)
        except TransientError as problem:
            if problem.throttled:
                least, most = REST_SECONDS
                until = self._wire.clock.seconds() + min(problem.wait or least, most)
                self._rests.put(key, until, len(wanted.realm) + len(scope) + 300)
            raise

    async def _follow(self, wanted: Challenge, scope: str, secret: str) -> _Answer:
        """
        Ask for a token, and follow redirects.
        """
        url = wanted.url(scope)
        for _ in range(REDIRECTS + 1):
            answer = await self._get(url, secret, realm=wanted.realm, queues=bool(scope))
            if answer.status not in REDIRECT_STATUSES or answer.location is None:
                return answer
            try:
                url, same = redirected(url, answer.location, self._url, self._realms)
            except ValueError as problem:
                raise self._failed(f"{wanted.realm} gives no token: {problem}") from None
            secret = secret if same else ""
        raise self._failed(f"{wanted.realm} gives no token: it redirects more than {REDIRECTS} times")

    def _failed(self, said: str) -> UnavailableError:
        log.error("{said}", said=said, once=said)
        return UnavailableError(502, "UNAVAILABLE", said, reason=Reason.NO_TOKEN)

    async def _get(
        self, url: str, secret: str, *, realm: str = "", queues: bool = True, headers_only: bool = False
    ) -> _Answer:
        headers = Headers({"User-Agent": ["ecrproxy"], **({"Authorization": [f"Basic {secret}"]} if secret else {})})

        async def ask() -> _Answer:
            async with self._turns.turn() if queues else contextlib.nullcontext():
                if self._wrong[:2] == (realm, hash(secret)) and self._wire.clock.seconds() < self._wrong[2]:
                    raise self._refused(realm)
                response = await self._wire.request("GET", url, headers, TOKEN_SECONDS)
                body = b""
                if response.code == OK and not headers_only:
                    body = await self._wire.read(response, ERROR_LIMIT)
                else:
                    discard(response, self._wire.clock)
            challenges, location = header_values(response, "WWW-Authenticate"), header(response, "Location")
            return _Answer(response.code, body, challenges, location, bool(secret))

        return await self._wire.persist(self._wire.tries(), ask)
