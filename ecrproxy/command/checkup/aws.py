"""
What AWS says, as plain values: botocore asked as the daemon asks it. Blocks: called in threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final

from ecrproxy.command.checkup.findings import Once, brief
from ecrproxy.registry.ecr import (
    CLOCK_WORDS,
    Credentials,
    CredentialsError,
    TokenUnavailableError,
    assumed,
    open_session,
    unusable,
)

CONNECT_SECONDS: Final = 4
READ_SECONDS: Final = 6


class RefusedError(Exception):
    """
    AWS has answered that it does not.

    @ivar code: AWS' word for why.
    @ivar skewed: whether it is the time of the request that it refuses.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message
        self.skewed = any(words in message.lower() for words in CLOCK_WORDS)


class UnreachableError(Exception):
    """
    AWS has not answered.
    """


class NoCredentialsError(Exception):
    """
    There is nothing to ask with.
    """


@dataclass(frozen=True, slots=True)
class Provider:
    """
    What gave the credentials.

    @ivar method: botocore's name for it.
    """

    method: str


@dataclass(frozen=True, slots=True)
class Identity:
    """
    Who AWS says that we are.
    """

    arn: str
    account: str


class Aws:
    """
    AWS, asked with the daemon's credentials for a registry.
    """

    def __init__(self, region: str, credentials: Credentials) -> None:
        self._region, self._public = region, credentials.public
        profile, instance_auth = credentials.profile, credentials.instance_auth
        self._session: Once[Any] = Once(lambda: open_session(profile, instance_auth=instance_auth))
        self._role: Once[dict[str, str]] = Once(lambda: assumed(self._make, credentials))
        self._making = Lock()

    def provider(self) -> Provider:
        """
        Tell what gives the credentials, after they have been used once to sign.

        @raise NoCredentialsError: if nothing does.
        @raise RefusedError: if a role can't be assumed.
        @raise UnreachableError: if who gives them does not answer.
        """
        with as_ours():
            credentials = self._session.get().get_credentials()
            credentials.get_frozen_credentials()  # a role is assumed only now
            return Provider(str(credentials.method))

    def identity(self) -> Identity:
        """
        Ask STS who we are, in the role if there is one. Needs no permission but to assume that.
        """
        with as_ours():
            told = self._client("sts").get_caller_identity()
            return Identity(told["Arn"], told["Account"])

    def token(self) -> tuple[str, float]:
        """
        Ask ECR, or ECR Public, for a token.

        @return: it, and when it expires, in seconds since the epoch.
        """
        with as_ours():
            data = self._client("ecr-public" if self._public else "ecr").get_authorization_token()["authorizationData"]
            data = data if self._public else data[0]  # (ECR Public has one for all)
            return data["authorizationToken"].strip(), data["expiresAt"].timestamp()

    def simulate(self, arn: str, actions: Sequence[str], resource: str) -> Mapping[str, str]:
        """
        Ask IAM what C{arn}'s own policies would say. Needs iam:SimulatePrincipalPolicy.

        @return: its decision for each action.
        """
        with as_ours():
            told = self._client("iam").simulate_principal_policy(
                PolicySourceArn=arn, ActionNames=list(actions), ResourceArns=[resource]
            )
            return {each["EvalActionName"]: each["EvalDecision"] for each in told["EvaluationResults"]}

    def _client(self, service: str) -> Any:  # noqa: ANN401
        return self._make(service, **self._role.get())

    def _make(self, service: str, **keys: str) -> Any:  # noqa: ANN401
        from botocore.config import Config  # noqa: PLC0415 (imported where it is needed)

        settings = Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"mode": "standard", "total_max_attempts": 1},
        )
        session = self._session.get()
        with self._making:  # clients may be shared by threads, a session may not: boto3's guide, "Multithreading"
            return session.create_client(service, region_name=self._region, config=settings, **keys)


@contextlib.contextmanager
def as_ours() -> Iterator[None]:
    """
    Tell botocore's many exceptions as one of three.
    """
    from botocore import exceptions  # noqa: PLC0415
    from botocore.parsers import ResponseParserError  # noqa: PLC0415

    no_credentials: tuple[type[Exception], ...] = (
        CredentialsError,
        TokenUnavailableError,
        exceptions.CredentialRetrievalError,
        *unusable(),
    )
    try:
        yield
    except exceptions.ClientError as problem:
        error: Mapping[str, Any] = problem.response.get("Error", {})
        raise RefusedError(str(error.get("Code", "")), brief(error.get("Message", ""))) from problem
    except no_credentials as problem:
        raise NoCredentialsError(brief(problem)) from problem
    except (
        exceptions.BotoCoreError,
        ResponseParserError,
    ) as problem:  # whatever keeps an answer from coming, or is none
        raise UnreachableError(brief(problem)) from problem
