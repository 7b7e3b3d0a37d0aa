"""
The registry token: GetAuthorizationToken through botocore in a thread, kept fresh while the daemon runs.

The token is good for twelve hours, for every registry that the credentials may read in one region
(Amazon ECR API reference, GetAuthorizationToken). botocore is imported by the thread that first needs
it: its half second delays nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger

from ecrproxy.periodic import Periodic
from ecrproxy.registry.credential_process import CredentialProcessError, Process

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall, IReactorTime
    from twisted.python.failure import Failure

log = Logger()

SHORTEST_REFRESH: Final = 60.0
"""Seconds between two refreshes that the daemon makes by itself, whatever a token says of its own life."""
LONGEST_REFRESH: Final = 6 * 3600.0
"""Half of the life that ECR gives to each token: this machine's clock may make it longer."""
FIRST_RETRY: Final = 1.0
LONGEST_RETRY: Final = 60.0
PATIENCE: Final = 10.0
"""Seconds for which a request waits for the first token; nobody waits any more once there was none for so long."""
FETCH_SECONDS: Final = 30.0
"""Deadline for one fetch: a C{credential_process} may never return."""
OVERDUE: Final = 4
"""Most fetches past their deadline by less than C{OVERDUE_SECONDS}: each keeps a thread until it returns."""
OVERDUE_SECONDS: Final = 600.0
"""Seconds after which a fetch no longer keeps another from being tried: it may never return."""
MOST_OVERDUE: Final = 32
"""Most fetches past their deadline, however long: after more than an hour no other is tried until one returns."""
ASKED_RETRY: Final = 10.0
"""Shortest time from a failed fetch to the next while requests fail for want of a token."""
RENEW_SECONDS: Final = 60.0
"""Shortest time between two refreshes that ECR's rejections cause."""

INSTANCE_PROVIDERS: Final = frozenset({"assume-role-with-web-identity", "container-role", "iam-role"})
"""botocore's names for what gives an instance, a container or a pod its role."""
_SOURCES: Final = {
    "assume-role": "a role of the profile",
    "assume-role-with-web-identity": "the pod's web identity (IRSA)",
    "config-file": "AWS's configuration file",
    "container-role": "the container's or pod's role",
    "custom-process": "the profile's credential_process",
    "env": "the environment",
    "iam-role": "the instance's role",
    "shared-credentials-file": "AWS's credentials file",
    "sso": "IAM Identity Center",
}
"""What botocore's names for what gives credentials mean."""
_MAKING: Final = Lock()
"""Held while a client is made, which asks nobody: the first one loads the models, and the others find them loaded."""

# What AWS answers to credentials that won't get better by waiting. Names from the APIs of ECR and STS, "Common Errors".
_REFUSALS: Final = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "ExpiredToken",
        "ExpiredTokenException",
        "IncompleteSignature",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "MissingAuthenticationToken",
        "MissingAuthenticationTokenException",
        "NotAuthorized",
        "OptInRequired",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)
_SESSION: Final = "ecrproxy"
"""What CloudTrail calls a session of an assumed role."""
_SOURCE: Final = "AWS, or what gives the credentials,"
_LOOK: Final = "check the way to AWS and the file system of the credentials' files"
CLOCK_WORDS: Final = ("signature expired", "signature not yet current")
"""What AWS says of a request that was signed at a wrong time."""


@dataclass(frozen=True, slots=True)
class Token:
    """
    What ECR asks of its clients.

    @ivar secret: base64 of C{AWS:password}, as it goes behind C{Basic}.
    @ivar expires: seconds since the epoch.
    @ivar source: where the credentials come from that AWS gave it for, in words.
    """

    secret: str
    expires: float
    source: str = "AWS"

    def __repr__(self) -> str:
        return f"<Token, expires {self.expires:.0f}>"


class CredentialsError(Exception):
    """
    AWS gives no token to these credentials, and waiting won't change that.
    """


class TokenUnavailableError(Exception):
    """
    There is no token now; there may be one later.
    """


@dataclass(frozen=True, slots=True)
class Credentials:
    """
    Which of AWS's credentials to use.

    @ivar role: to assume with them: an ARN.
    @ivar external_id: for that role.
    @ivar profile: of AWS's configuration files.
    @ivar instance_auth: the role of the instance, container or pod alone.
    @ivar public: for a token of ECR Public: its API's, and its registry's.
    """

    role: str | None = None
    external_id: str | None = None
    profile: str | None = None
    instance_auth: bool = False
    public: bool = False


def fetch_token(region: str, credentials: Credentials) -> Token:
    """
    Ask AWS for a token. Blocks: call it in a thread.

    @raise Exception: what L{open_client} raises.
    """
    with open_client(region, credentials) as (client, source):
        data = client.get_authorization_token()["authorizationData"]
        data = data if credentials.public else data[0]  # (ECR Public has one for all)
    return Token(data["authorizationToken"].strip(), data["expiresAt"].timestamp(), source)


@contextmanager
def open_client(region: str, credentials: Credentials) -> Iterator[tuple[Any, str]]:
    """
    Open botocore's client of ECR, and raise what AWS refuses as below. Blocks.

    @return: with it, where its credentials come from, in words.

    @raise CredentialsError: if there are no credentials, or AWS refuses them for good.
    @raise TokenUnavailableError: if there is no role now, or AWS answers with another error.
    @raise Exception: whatever else botocore raises: worth another try.
    """
    from botocore import exceptions  # noqa: PLC0415 (imported where it delays nothing)
    from botocore.config import Config  # noqa: PLC0415

    # One attempt: retrying is the service's business, and a thread that waits can't be stopped.
    settings = Config(connect_timeout=5, read_timeout=10, retries={"mode": "standard", "total_max_attempts": 1})
    try:
        session = open_session(credentials.profile, instance_auth=credentials.instance_auth, popen=Process)

        def make(service: str, **keys: str) -> Any:  # noqa: ANN401
            with _MAKING:
                return session.create_client(service, region_name=region, config=settings, **keys)

        client = make("ecr-public" if credentials.public else "ecr", **assumed(make, credentials))
        yield client, _source(session.get_credentials().method)
    except exceptions.ClientError as problem:
        raise _judged(problem) from problem
    except CredentialProcessError as problem:
        raise TokenUnavailableError(str(problem)) from problem
    except unusable() as problem:
        raise CredentialsError(f"AWS credentials: {_brief(problem)}") from problem


def _source(method: str) -> str:
    return _SOURCES.get(method, method)


def assumed(make: Callable[..., Any], credentials: Credentials) -> dict[str, str]:
    """
    Assume the role, if there is one to assume. Blocks.

    @param make: makes a client of an AWS service.
    @return: what to make others with: the role's keys, good for an hour.
    """
    if credentials.role is None:
        return {}
    more = {"ExternalId": credentials.external_id} if credentials.external_id is not None else {}
    given = make("sts").assume_role(RoleArn=credentials.role, RoleSessionName=_SESSION, **more)["Credentials"]
    return {
        "aws_access_key_id": given["AccessKeyId"],
        "aws_secret_access_key": given["SecretAccessKey"],
        "aws_session_token": given["SessionToken"],
    }


def unusable() -> tuple[type[Exception], ...]:
    """
    Name what botocore raises where it finds no credentials, or none that could be tried.
    """
    from botocore import exceptions  # noqa: PLC0415

    return (
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.ProfileNotFound,
        exceptions.ConfigParseError,
        exceptions.InvalidConfigError,
        exceptions.UnauthorizedSSOTokenError,
        exceptions.SSOTokenLoadError,
    )


def open_session(profile: str | None = None, *, instance_auth: bool, popen: Callable[..., Any] | None = None) -> Any:  # noqa: ANN401 (it has no stubs)
    """
    Open a session that has credentials. Blocks.

    @param profile: of AWS's configuration files; None for the one of the environment.
    @param instance_auth: use the role of the instance, container or pod alone.
    @param popen: runs a C{credential_process}; none for botocore's own, which may ask a person at a terminal.
    @raise CredentialsError: if there are none.
    @raise TokenUnavailableError: if there is no role now.
    """
    from botocore.session import Session  # noqa: PLC0415

    session = Session(profile=profile)
    session.register_component("data_loader", _models(session.get_config_variable("data_path")))
    if instance_auth:
        _only_instance_roles(session)
    elif popen is not None:
        _run_programs_with(popen, session.get_component("credential_provider").providers)
    if session.get_credentials() is None:
        raise _none_found(instance_auth=instance_auth)
    return session


@cache
def _models(search_path: str | None) -> Any:  # noqa: ANN401
    """
    Return the loader of AWS's service models that all sessions share.

    A session that loads its own models takes 10 MiB and 0.2 s of processor time: fifty roles took 450 MiB at the start.

    @param search_path: botocore's C{data_path}.
    """
    from botocore.loaders import create_loader  # noqa: PLC0415

    return create_loader(search_path)


def _only_instance_roles(session: Any) -> None:  # noqa: ANN401
    from botocore.credentials import CredentialResolver  # noqa: PLC0415

    # A machine that boots may have its metadata service up a little later than us.
    session.set_config_variable("metadata_service_num_attempts", 3)
    chain = session.get_component("credential_provider")
    kept = [provider for provider in chain.providers if provider.METHOD in INSTANCE_PROVIDERS]
    session.register_component("credential_provider", CredentialResolver(kept))


def _run_programs_with(popen: Callable[..., Any], providers: list[Any]) -> list[Any]:
    """
    Have a C{credential_process} run by C{popen}, a profile's own and that of its C{source_profile}.

    botocore lets nobody hand it over: these are its private names, and the tests run real programs through both ways.
    """
    for each in providers:
        if each.METHOD == "custom-process":
            each._popen = popen  # noqa: SLF001
        builder = getattr(each, "_profile_provider_builder", None)
        if builder is not None:
            make = builder.providers
            builder.providers = lambda *args, make=make, **more: _run_programs_with(popen, make(*args, **more))
    return providers


def _none_found(*, instance_auth: bool) -> Exception:
    """
    Say what it means that there are no credentials.

    That an instance has no role looks like a metadata service that is down, throttling or not up yet: it is waited for.
    """
    if instance_auth:
        return TokenUnavailableError(
            "AWS_INSTANCE_AUTH=true: no role found for this instance, container or pod; attach one"
            " (behind a container's bridge the metadata hop limit must be 2), or unset AWS_INSTANCE_AUTH"
        )
    return CredentialsError(
        "AWS_ACCESS_KEY_ID: no AWS credentials found; set it with AWS_SECRET_ACCESS_KEY, or AWS_PROFILE,"
        " or run where a role is attached (behind a container's bridge the metadata hop limit must be 2)"
    )


def _brief(problem: object) -> str:
    """
    Keep the first line of a message: after it, AWS may repeat the request that was signed, session token included.
    """
    return str(problem).strip().partition("\n")[0][:300]


def _judged(problem: Any) -> Exception:  # noqa: ANN401
    """
    Tell a refusal for good from one worth another try.
    """
    error = problem.response.get("Error", {})
    code, message = error.get("Code", ""), _brief(error.get("Message", ""))
    if any(words in message.lower() for words in CLOCK_WORDS):
        return TokenUnavailableError(f"AWS refuses the time of the request, check this machine's clock: {message}")
    if code in _REFUSALS:
        return CredentialsError(f"AWS credentials are refused: {code}: {message}")
    return TokenUnavailableError(f"AWS answers {code}: {message}")


def next_refresh(expires: float, now: float) -> float:
    """
    Tell in how many seconds to refresh a token: at half of its remaining life.
    """
    return min(LONGEST_REFRESH, max(SHORTEST_REFRESH, (expires - now) / 2))


def next_retry(failures: int, chance: float) -> float:
    """
    Tell in how many seconds to try again after so many failures in a row: exponential, with full jitter.

    @param chance: a random number from 0 to 1.
    """
    return FIRST_RETRY + chance * min(LONGEST_RETRY, FIRST_RETRY * 2.0 ** min(failures, 10))


class TokenService(Service):
    """
    Keep the registry token fresh while the daemon runs.

    When to ask again is counted on a clock that nobody sets; the time of the day says only whether a token has expired.

    @param fetch: asks AWS; fires with a L{Token}.
    @param clock: counts seconds and calls back.
    @param now: seconds since the epoch.
    @param refused: told of credentials that AWS refuses for good before there ever was a token; returns whether that
        ends the daemon.
    @param chance: gives random numbers from 0 to 1.
    @param whose: what the log calls it, where there are several.
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
        self._overdue: dict[Deferred[Token], float] = {}  # when their time was up
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
        # Once a second it looks whether a refresh is due: a plain rhythm that no refresh has to rearrange.
        self._loop.start(1.0)

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        self._loop.stop()

    def problem(self) -> str | None:
        """
        Say why requests can't be sent to ECR now, if so.
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
        Tell when the token expires, in seconds since the epoch.
        """
        return self._token.expires if self._token is not None else None

    def refresh_seconds(self) -> float:
        """
        Tell in how many seconds the next refresh is due.
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
        Return the token to use instead of C{refused}, which ECR rejected; the same if no other can be had now.

        One refresh serves all who ask, and none begins within C{RENEW_SECONDS} of the last. While AWS fails, nobody
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
        Wait for the refresh under way, or due, but no longer than C{PATIENCE}.
        """
        waiter: Deferred[None] = Deferred(self._waiting.remove)
        self._waiting.append(waiter)
        limit = self._clock.callLater(PATIENCE, waiter.cancel)
        try:
            await waiter
        except CancelledError:
            if limit.active():
                raise  # the client has gone; otherwise the time is up, and who waited sees what there is
        finally:
            if limit.active():
                limit.cancel()

    def _hurry(self) -> None:
        """
        Bring the next retry forward: a request fails for want of a token.
        """
        if self._failures and self._due != float("inf"):
            self._due = min(self._due, self._failed_at + ASKED_RETRY)

    def _turn(self) -> None:
        if self._clock.seconds() >= self._due or self._has_been_overtaken():
            self._refresh()

    def _has_been_overtaken(self) -> bool:
        """
        Tell whether the token has expired before its refresh is due: a machine that slept counted no seconds.
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
        Fetch a token; fails after C{FETCH_SECONDS}. A token that comes later is used all the same.
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
        self._problem = _brief(problem) or type(problem).__name__
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
            self._wake()  # those who asked for another get the old one

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.called:
                waiter.callback(None)
