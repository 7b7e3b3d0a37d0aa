"""
Requests to AWS through botocore, as the daemon sends them, with plain results. Blocks: call in threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final

from ecrproxy.command.checkup.findings import Once, brief
from ecrproxy.registry.aws import (
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


class AwsRefusedError(Exception):
    """
    AWS rejected the request.

    @ivar code: AWS's error code.
    @ivar skewed: True if the reason is the time of the request.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message
        self.skewed = any(words in message.lower() for words in CLOCK_WORDS)


class AwsUnreachableError(Exception):
    """
    AWS did not respond.
    """


class NoCredentialsError(Exception):
    """
    There are no credentials.
    """


@dataclass(frozen=True, slots=True)
class Provider:
    """
    The source of the credentials.

    @ivar method: botocore's name for it.
    """

    method: str


@dataclass(frozen=True, slots=True)
class Identity:
    """
    The identity that AWS reports for the credentials.
    """

    arn: str
    account: str


class Aws:
    """
    AWS, used with the daemon's credentials for a registry.
    """

    def __init__(self, region: str, credentials: Credentials) -> None:
        self._region, self._public = region, credentials.public
        profile, instance_auth = credentials.profile, credentials.instance_auth
        self._session: Once[Any] = Once(lambda: open_session(profile, instance_auth=instance_auth))
        self._role: Once[dict[str, str]] = Once(lambda: assumed(self._make, credentials))
        self._making = Lock()

    def provider(self) -> Provider:
        """
        Return the source of the credentials, after signing with them once.

        @raise NoCredentialsError: if there are none.
        @raise RefusedError: if a role can't be assumed.
        @raise UnreachableError: if the source does not respond.
        """
        with as_ours():
            credentials = self._session.get().get_credentials()
            credentials.get_frozen_credentials()  # assumes the role
            return Provider(str(credentials.method))

    def identity(self) -> Identity:
        """
        Return the identity from STS, in the role if there is one. Only assuming the role needs a permission.
        """
        with as_ours():
            told = self._client("sts").get_caller_identity()
            return Identity(told["Arn"], told["Account"])

    def token(self) -> tuple[str, float]:
        """
        Ask ECR, or ECR Public, for a token.

        @return: the token, and when it expires, in seconds since the epoch.
        """
        with as_ours():
            data = self._client("ecr-public" if self._public else "ecr").get_authorization_token()["authorizationData"]
            data = data if self._public else data[0]  # (ECR Public has one for all)
            return data["authorizationToken"].strip(), data["expiresAt"].timestamp()

    def simulate(self, arn: str, actions: Sequence[str], resource: str) -> Mapping[str, str]:
        """
        Simulate the policies of C{arn} in IAM. Needs iam:SimulatePrincipalPolicy.

        @return: the decision for each action.
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
        with self._making:  # threads may share clients, but not a session: boto3's guide, "Multithreading"
            return session.create_client(service, region_name=self._region, config=settings, **keys)


@contextlib.contextmanager
def as_ours() -> Iterator[None]:
    """
    Convert botocore's exceptions to those of this module.
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
        raise AwsRefusedError(str(error.get("Code", "")), brief(error.get("Message", ""))) from problem
    except no_credentials as problem:
        raise NoCredentialsError(brief(problem)) from problem
    except (
        exceptions.BotoCoreError,
        ResponseParserError,
    ) as problem:  # no response, or an invalid one
        raise AwsUnreachableError(brief(problem)) from problem
