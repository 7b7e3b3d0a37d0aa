"""
AWS credentials, and clients of AWS's APIs, through botocore. Everything blocks: call it in threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any, Final

from ecrproxy.registry.credential_process import CredentialProcess, CredentialProcessError

INSTANCE_PROVIDERS: Final = frozenset({"assume-role-with-web-identity", "container-role", "iam-role"})
"""botocore's names of the providers of an instance's, container's or pod's role."""
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
"""The sources of credentials in words, by botocore's names."""
_MAKING: Final = Lock()
"""Held while a client is created, which sends nothing: the first loads the models, and the others reuse them."""
# AWS's errors for credentials that waiting does not mend. Names from the APIs of ECR and STS, "Common Errors".
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
"""The name of an assumed role's session in CloudTrail."""
CLOCK_WORDS: Final = ("signature expired", "signature not yet current")
"""AWS's words for a request that was signed at a wrong time."""


class CredentialsError(Exception):
    """
    AWS rejects these credentials, and waiting won't change that.
    """


class TokenUnavailableError(Exception):
    """
    There is no token now; there may be one later.
    """


@dataclass(frozen=True, slots=True)
class Credentials:
    """
    Which AWS credentials to use.

    @ivar role: ARN of a role to assume with them.
    @ivar external_id: for that role.
    @ivar profile: a profile in AWS's configuration files.
    @ivar instance_auth: use only the role of the instance, container or pod.
    @ivar public: for ECR Public: its API, and a token for its registry.
    """

    role: str | None = None
    external_id: str | None = None
    profile: str | None = None
    instance_auth: bool = False
    public: bool = False


@contextmanager
def open_client(region: str, credentials: Credentials) -> Iterator[tuple[Any, str]]:
    """
    Open botocore's client of ECR, and translate its errors. Blocks.

    @return: the client, and the source of its credentials in words.

    @raise CredentialsError: if there are no credentials, or AWS rejects them for good.
    @raise TokenUnavailableError: if there is no role now, or AWS answers with another error.
    @raise Exception: any other error of botocore: worth another attempt.
    """
    from botocore import exceptions  # noqa: PLC0415 (imported where it delays nothing)
    from botocore.config import Config  # noqa: PLC0415

    # One attempt: the service retries, and a thread that waits can't be stopped.
    settings = Config(connect_timeout=5, read_timeout=10, retries={"mode": "standard", "total_max_attempts": 1})
    try:
        session = open_session(credentials.profile, instance_auth=credentials.instance_auth, popen=CredentialProcess)

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
        raise CredentialsError(f"AWS credentials: {brief(problem)}") from problem


def _source(method: str) -> str:
    return _SOURCES.get(method, method)


def assumed(make: Callable[..., Any], credentials: Credentials) -> dict[str, str]:
    """
    Assume the role, if any. Blocks.

    @param make: creates a client of an AWS service.
    @return: arguments for the next clients: the role's keys, valid for an hour.
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
    Return botocore's exceptions for credentials that are missing or unusable.
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

    @param profile: a profile in AWS's configuration files; None for the environment's.
    @param instance_auth: use only the role of the instance, container or pod.
    @param popen: runs a C{credential_process}; None for botocore's own, which may prompt on a terminal.
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
    Return the loader of AWS's service models, shared by all sessions.

    A session that loads its own models takes 10 MiB and 0.2 s of processor time: fifty roles took 450 MiB at startup.

    @param search_path: botocore's C{data_path}.
    """
    from botocore.loaders import create_loader  # noqa: PLC0415

    return create_loader(search_path)


def _only_instance_roles(session: Any) -> None:  # noqa: ANN401
    from botocore.credentials import CredentialResolver  # noqa: PLC0415

    # On a booting machine the metadata service may be up slightly later than the daemon.
    session.set_config_variable("metadata_service_num_attempts", 3)
    chain = session.get_component("credential_provider")
    kept = [provider for provider in chain.providers if provider.METHOD in INSTANCE_PROVIDERS]
    session.register_component("credential_provider", CredentialResolver(kept))


def _run_programs_with(popen: Callable[..., Any], providers: list[Any]) -> list[Any]:
    """
    Run each C{credential_process} by C{popen}, also that of a C{source_profile}.

    botocore has no parameter for this: these are its private names, and tests run real programs both ways.
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
    Return the error for missing credentials.

    An instance without a role looks like a metadata service that is down, throttling or not up yet, so it is retried.
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


def brief(problem: object) -> str:
    """
    Return the first line of a message: after it AWS may repeat the signed request, with the session token.
    """
    return str(problem).strip().partition("\n")[0][:300]


def _judged(problem: Any) -> Exception:  # noqa: ANN401
    """
    Distinguish a final rejection from an error worth another attempt.
    """
    error = problem.response.get("Error", {})
    code, message = error.get("Code", ""), brief(error.get("Message", ""))
    if any(words in message.lower() for words in CLOCK_WORDS):
        return TokenUnavailableError(f"AWS refuses the time of the request, check this machine's clock: {message}")
    if code in _REFUSALS:
        return CredentialsError(f"AWS credentials are refused: {code}: {message}")
    return TokenUnavailableError(f"AWS answers {code}: {message}")
