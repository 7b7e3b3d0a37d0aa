"""
The registry token: GetAuthorizationToken through botocore in a thread, refreshed while the daemon runs.

A token is valid for twelve hours, for every registry that the credentials may read in one region
(Amazon ECR API reference, GetAuthorizationToken). The thread that first needs botocore imports it, so the
half second that this takes delays nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger

from ecrproxy.periodic import Periodic
from ecrproxy.registry.aws import Credentials, CredentialsError, TokenUnavailableError, brief, open_client

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall, IReactorTime
    from twisted.python.failure import Failure

log = Logger()

SHORTEST_REFRESH: Final = 60.0
"""Minimum seconds between two scheduled refreshes, whatever lifetime a token claims."""
LONGEST_REFRESH: Final = 6 * 3600.0
"""Maximum seconds until a scheduled refresh: half of the life of ECR's tokens, which a wrong clock could lengthen."""
FIRST_RETRY: Final = 1.0
LONGEST_RETRY: Final = 60.0
PATIENCE: Final = 10.0
"""Seconds for which a request waits for the first token; after as long without one, no request waits."""
FETCH_SECONDS: Final = 30.0
"""Deadline of one fetch, in seconds: a C{credential_process} may never return."""
OVERDUE: Final = 4
"""
Maximum number of fetches that have exceeded their deadline by less than C{OVERDUE_SECONDS}: each occupies a thread.
"""
OVERDUE_SECONDS: Final = 600.0
"""Seconds after which an overdue fetch no longer prevents another: it may never return."""
MOST_OVERDUE: Final = 32
"""
Maximum number of overdue fetches in total: after more than an hour there are no further attempts until one returns.
"""
ASKED_RETRY: Final = 10.0
"""Minimum seconds between a failed fetch and the next while requests fail because there is no token."""
RENEW_SECONDS: Final = 60.0
"""Minimum seconds between two refreshes caused by ECR's rejections."""
_SOURCE: Final = "AWS, or what gives the credentials,"
_LOOK: Final = "check the way to AWS and the file system of the credentials' files"


@dataclass(frozen=True, slots=True)
class Token:
    """
    A token for ECR.

    @ivar secret: base64 of C{AWS:password}, as sent after C{Basic}.
    @ivar expires: seconds since the epoch.
    @ivar source: the source of the credentials, in words.
    """

    secret: str
    expires: float
    source: str = "AWS"

    def __repr__(self) -> str:
        return f"<Token, expires {self.expires:.0f}>"


def fetch_token(region: str, credentials: Credentials) -> Token:
    """
    Fetch a token from AWS. Blocks: call it in a thread.

    @raise Exception: as L{open_client}.
    """
    with open_client(region, credentials) as (client, source):
        data = client.get_authorization_token()["authorizationData"]
        data = data if credentials.public else data[0]  # (ECR Public has one for all)
    return Token(data["authorizationToken"].strip(), data["expiresAt"].timestamp(), source)


def next_refresh(expires: float, now: float) -> float:
    """
    Return the seconds until a token should be refreshed: half of its remaining life.
    """
    return min(LONGEST_REFRESH, max(SHORTEST_REFRESH, (expires - now) / 2))


def next_retry(failures: int, chance: float) -> float:
    """
    Return the seconds until the next attempt after consecutive failures: exponential, with full jitter.

    @param chance: a random number from 0 to 1.
    """
    return FIRST_RETRY + chance * min(LONGEST_RETRY, FIRST_RETRY * 2.0 ** min(failures, 10))


class TokenService(Service):
    """
    Keeps the registry token fresh.

    Refreshes are scheduled on a monotonic clock; the time of day only decides whether a token has expired.

    @param fetch: fetches from AWS; fires with a L{Token}.
    @param clock: a monotonic clock, with timers.
    @param now: returns seconds since the epoch.
    @param refused: called if AWS rejects the credentials before there was a token; returns True if the daemon exits.
    @param chance: returns random numbers from 0 to 1.
    @param whose: the name in the log, if there are several.
    """

    def __init__(
        self,
        fetch: Callable[[], Deferred[Token]],
        clock: IReactorTime,
        now: Callable[[], float],
        refused: Callable[[CredentialsError], bool] = lambda _: False,
        chance: Callable[[], float] = random.random,
        whose: str = "",
    ) -> None:
        self._whose = f" for {whose}" if whose else ""
        self._fetch, self._clock, self._now, self._refused, self._chance = fetch, clock, now, refused, chance
        self._token: Token | None = None
        self._rejected: Token | None = None
        self._renewed = float("-inf")
        self._overdue: dict[Deferred[Token], float] = {}  # when their deadline passed
        self._problem = "AWS has not answered yet"
        self._failures, self._failed_at = 0, 0.0
        self._due, self._started, self._received = 0.0, 0.0, 0.0
        self.failed = 0
        self._refreshing = False
        self._waiting: list[Deferred[None]] = []
        self._loop = Periodic("Refreshing the token", self._turn, clock)

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._due = self._started = self._clock.seconds()
        # Check once a second whether a refresh is due, so that no timer has to be rearranged.
        self._loop.start(1.0)

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        self._loop.stop()

    def problem(self) -> str | None:
        """
        Return why requests can't be sent to ECR now, if so.
        """
        if self._token is None:
            return self._problem
        if self._rejected is self._token and (self._failures or not self._refreshing):
            return f"ECR rejects the token{f', and AWS gives no other: {self._problem}' if self._failures else ''}"
        if self._token.expires <= self._now() and self._failures:
            return f"the token has expired: {self._problem}"
        return None

    @property
    def expires(self) -> float | None:
        """
        The token's expiry, in seconds since the epoch.
        """
        return self._token.expires if self._token is not None else None

    def refresh_seconds(self) -> float:
        """
        The seconds until the next refresh.
        """
        return max(0.0, self._due - self._clock.seconds())

    async def get(self) -> str:
        """
        Return the token, waiting up to C{PATIENCE} for the first.

        @raise TokenUnavailableError: if there is none.
        """
        if self._token is None and self._clock.seconds() < self._started + PATIENCE:
            await self._wait()
        if self._token is None:
            self._hurry()
            raise TokenUnavailableError(self._problem)
        return self._token.secret

    async def renew(self, refused: str) -> str:
        """
        Return the token to use instead of C{refused}, which ECR rejected; the same if no other is available now.

        One refresh serves all callers, and none begins within C{RENEW_SECONDS} of the last. While AWS fails, no caller
        waits for its next answer.

        @raise TokenUnavailableError: if there is none.
        """
        if self._token is not None and self._token.secret == refused:
            self._rejected = self._token
            if self._failures:
                self._hurry()
            else:
                self._due = min(self._due, self._renewed + RENEW_SECONDS)
                self._turn()
                if self._refreshing:
                    await self._wait()
        if self._token is None:
            raise TokenUnavailableError(self._problem)
        return self._token.secret

    async def _wait(self) -> None:
        """
        Wait for the refresh in progress, or due, but at most C{PATIENCE}.
        """
        waiter: Deferred[None] = Deferred(self._waiting.remove)
        self._waiting.append(waiter)
        limit = self._clock.callLater(PATIENCE, waiter.cancel)
        try:
            await waiter
        except CancelledError:
            if limit.active():
                raise  # the client has disconnected; else the deadline has passed, and the caller uses what there is
        finally:
            if limit.active():
                limit.cancel()

    def _hurry(self) -> None:
        """
        Bring the next attempt forward: a request fails because there is no token.
        """
        if self._failures and self._due != float("inf"):
            self._due = min(self._due, self._failed_at + ASKED_RETRY)

    def _turn(self) -> None:
        if self._clock.seconds() >= self._due or self._has_been_overtaken():
            self._refresh()

    def _has_been_overtaken(self) -> bool:
        """
        Return True if the token has expired before its refresh is due: a suspended machine counts no seconds.
        """
        if self._token is None or self._failures or self._token.expires > self._now():
            return False
        return self._clock.seconds() >= self._received + SHORTEST_REFRESH

    def _refresh(self) -> None:
        if self._refreshing:
            return
        self._refreshing = True
        if self._token is not None and self._rejected is self._token:
            self._renewed = self._clock.seconds()
            log.info("ECR rejected the token{whose}; refreshing", whose=self._whose)
        Deferred.fromCoroutine(self._ask()).addErrback(lambda failure: log.failure("Token refresh", failure))

    async def _ask(self) -> None:
        try:
            token = await self._fetch_in_time()
        except Exception as problem:  # noqa: BLE001 (any failure of any provider: the old token stays in use)
            self._failed(problem)
        else:
            self._receive(token)
        finally:
            self._refreshing = False

    def _fetch_in_time(self) -> Deferred[Token]:
        """
        Fetch a token; fails after C{FETCH_SECONDS}. A token that arrives later is still used.
        """
        began = self._clock.seconds()
        recent = sum(began - each < OVERDUE_SECONDS for each in self._overdue.values())
        if recent >= OVERDUE or len(self._overdue) >= MOST_OVERDUE:
            raise TokenUnavailableError(f"{_SOURCE} has not answered {len(self._overdue)} times; {_LOOK}")
        answer: Deferred[Token] = Deferred()
        limit = self._clock.callLater(FETCH_SECONDS, self._give_up, answer)
        try:
            fetching = self._fetch()
        except BaseException:
            limit.cancel()
            raise
        fetching.addBoth(self._fetched, answer, limit)
        return answer

    def _give_up(self, answer: Deferred[Token]) -> None:
        self._overdue[answer] = self._clock.seconds()
        answer.errback(TokenUnavailableError(f"{_SOURCE} has not answered for {FETCH_SECONDS:.0f} s; {_LOOK}"))

    def _fetched(self, outcome: Token | Failure, answer: Deferred[Token], limit: IDelayedCall) -> None:
        if limit.active():
            limit.cancel()
            answer.callback(outcome)
            return
        del self._overdue[answer]
        if isinstance(outcome, Token) and (self._token is None or outcome.expires > self._token.expires):
            self._receive(outcome)

    def _receive(self, token: Token) -> None:
        self._token = token
        wait = next_refresh(token.expires, self._now())
        self._received = self._clock.seconds()
        self._failures, self._due = 0, self._received + wait
        log.info(
            "Token received{whose} with credentials from {source}; the next is due in {minutes:.0f} min",
            whose=self._whose,
            source=token.source,
            minutes=wait / 60,
        )
        self._wake()

    def _failed(self, problem: Exception) -> None:
        self._failures += 1
        self.failed += 1
        wait = next_retry(self._failures, self._chance())
        self._failed_at = self._clock.seconds()
        self._due = self._failed_at + wait
        self._problem = brief(problem) or type(problem).__name__
        if self._token is None and isinstance(problem, CredentialsError) and self._refused(problem):
            self._due = float("inf")
            return
        log.error(
            "No token{whose}: {problem}. Next try in {wait:.0f} s",
            whose=self._whose,
            problem=self._problem,
            wait=wait,
            once=(self._whose, self._problem),
        )
        if self._token is not None:
            self._wake()  # callers that need another token get the old one

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.called:
                waiter.callback(None)
