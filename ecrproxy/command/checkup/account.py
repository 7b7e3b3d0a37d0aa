"""
Credentials, identity, token and permissions: AWS's responses, and their consequences for the daemon.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from http import HTTPStatus
from typing import Final
from urllib.parse import urlsplit

from ecrproxy.command.checkup.aws import AwsRefusedError, AwsUnreachableError, Identity, NoCredentialsError, Provider
from ecrproxy.command.checkup.findings import Finding, Once, failed, ok, skipped, warning
from ecrproxy.command.checkup.reach import Contact
from ecrproxy.registry.challenges import Challenge, may_follow

PROVIDERS: Final = {
    "env": "the environment: AWS_ACCESS_KEY_ID",
    "shared-credentials-file": "the shared credentials file",
    "config-file": "AWS's config file",
    "assume-role": "a profile that assumes a role",
    "assume-role-with-web-identity": "a web identity, as EKS gives a service account's role (IRSA)",
    "sso": "a login by IAM Identity Center",
    "login": "a login by AWS's command line",
    "custom-process": "a program: credential_process of the profile",
    "container-role": "the container's role, of ECS or of EKS Pod Identity",
    "iam-role": "the instance's role, by its metadata service",
    "boto-config": "boto's old config file",
    "ec2-credentials-file": "the file named by AWS_CREDENTIAL_FILE",
}
"""Descriptions of botocore's credential providers."""

NEEDED: Final = (
    "ecr:GetAuthorizationToken",
    "ecr:BatchGetImage",
    "ecr:GetDownloadUrlForLayer",
    "ecr:BatchCheckLayerAvailability",
)
"""Actions that pulls need."""
USEFUL: Final = {"ecr:ListImages": "list tags", "ecr:ListImageReferrers": "find signatures by the referrers API"}
"""Optional actions, and what clients can't do without them."""
IMPORTING: Final = {
    "ecr:BatchImportUpstreamImage": "bring in images and tags that ECR has not cached yet",
    "ecr:CreateRepository": "bring in the first image of a repository",
}
"""Actions that only repositories of ECR's own pull-through cache rules need, and what for."""

# "User: arn:aws:sts::1:assumed-role/r/s is not authorized to perform: ecr:BatchGetImage on resource: arn:aws:ecr:..
# because no identity-based policy allows the ecr:BatchGetImage action" (IAM user guide, "Access denied messages").
_DENIAL = re.compile(r"not authorized to perform: ([\w-]+:\w+)(?: on resource: (\S+))?", re.IGNORECASE)
_BECAUSE: Final = (
    ("explicit deny in a service control policy", "a service control policy of the organization forbids it"),
    ("explicit deny in a vpc endpoint policy", "the VPC endpoint's policy forbids it"),
    ("no vpc endpoint policy allows", "the VPC endpoint's policy has to allow it"),
    ("explicit deny in a resource-based policy", "the repository's policy forbids it"),
    ("no resource-based policy allows", "the repository's own policy has to allow it, which is another account's"),
    ("explicit deny", "a policy denies it explicitly: remove that statement"),
    ("no permissions boundary allows", "the permissions boundary has to allow it"),
    ("no session policy allows", "the session's policy has to allow it"),
)
_ROLE = re.compile(r"arn:(aws[\w-]*):sts::(\d{12}):assumed-role/([^/]+)/.+")
_HOPS: Final = "in a container the metadata hop limit must be 2, see the line about metadata"
_CLOCK_ADVICE: Final = "synchronize this machine's clock: chrony or systemd-timesyncd"


def denied_action(message: str) -> str | None:
    """
    Return the missing action in an error message.
    """
    found = _DENIAL.search(message)
    return found[1] if found else None


def permission_advice(message: str) -> str:
    """
    Return what to do about an error message of AWS.
    """
    found, lowered = _DENIAL.search(message), message.lower()
    if found is None:
        return "check which policy denies it"
    for words, advice in _BECAUSE:
        if words in lowered:
            return f"{found[1]}: {advice}"
    on = f" on {found[2].rstrip('.,')}" if found[2] else ""
    return f"allow {found[1]}{on} in the policy of the role or user"


def look_at_credentials(
    provider: Once[Provider], *, instance_auth: bool, environ: Mapping[str, str]
) -> Iterator[Finding]:
    """
    Check that there are credentials, and report their source.
    """
    check = "credentials"
    try:
        method = provider.get().method
    except NoCredentialsError as problem:
        yield failed(check, str(problem), _where_from(environ, instance_auth=instance_auth))
        return
    except AwsRefusedError as problem:
        trust = "see that the role's trust policy names who assumes it, and that a web identity's token is current"
        yield failed(check, f"no role: AWS answers {problem}", _CLOCK_ADVICE if problem.skewed else trust)
        return
    except AwsUnreachableError as problem:
        yield failed(check, f"their source does not answer: {problem}", "check that STS can be reached from here")
        return
    said = f"by {PROVIDERS.get(method, method)}"
    if (
        method == "env"
        and not environ.get("AWS_SESSION_TOKEN")
        and environ.get("AWS_ACCESS_KEY_ID", "").startswith("ASIA")
    ):
        yield failed(check, f"{said}; a temporary key without AWS_SESSION_TOKEN", "set AWS_SESSION_TOKEN too")
    elif method == "env" and environ.get("AWS_SESSION_TOKEN"):
        yield warning(check, f"{said}, temporary, and nothing here renews it", "use a role: it renews itself")
    else:
        yield ok(check, said)


def _where_from(environ: Mapping[str, str], *, instance_auth: bool) -> str:
    """
    Return advice on where credentials should come from, by the variables that are set.
    """
    if environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        return "see that AWS_WEB_IDENTITY_TOKEN_FILE can be read, and that AWS_ROLE_ARN is set"
    if environ.get("AWS_CONTAINER_CREDENTIALS_FULL_URI") or environ.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"):
        return "see that the agent of ECS, or of EKS Pod Identity, answers, and that the task or pod has a role"
    if environ.get("AWS_PROFILE"):
        return f"see that the profile {environ['AWS_PROFILE']} is in the config file of the daemon's user"
    if bool(environ.get("AWS_ACCESS_KEY_ID")) != bool(environ.get("AWS_SECRET_ACCESS_KEY")):
        return "set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if instance_auth:
        return f"attach a role to the instance, task or pod; {_HOPS}"
    return f"attach a role to the instance, task or pod ({_HOPS}), or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


def look_at_identity(identity: Once[Identity], registry: str | None) -> Iterator[Finding]:
    """
    Check the identity that STS reports.

    @param registry: the registry's account, if known.
    """
    check = "identity"
    try:
        found = identity.get()
    except AwsRefusedError as problem:
        other = "the key is wrong, switched off, or of another partition: give another"
        yield failed(check, f"STS answers {problem}", _CLOCK_ADVICE if problem.skewed else other)
    except AwsUnreachableError as problem:
        yield warning(
            check,
            f"STS does not answer: {problem}",
            "the daemon needs it only to assume roles; in a VPC without a way out add the endpoint for sts",
        )
    except NoCredentialsError:
        yield skipped(check, "not without credentials")
    else:
        yield ok(check, found.arn)
        if registry is not None and registry != found.account:
            said = f"the registry is account {registry}'s, the credentials are account {found.account}'s"
            yield ok("account", said, f"policies of the repositories have to let {found.arn} pull")


def look_at_role(acting: Once[Identity], role: str) -> Iterator[Finding]:
    """
    Check that a role can be assumed.

    @param acting: the identity in the role.
    """
    check = "role"
    try:
        found = acting.get()
    except AwsRefusedError as problem:
        trust = f"see that the trust policy of {role} names who assumes it, and that they may sts:AssumeRole on it"
        yield failed(check, f"STS answers {problem}", _CLOCK_ADVICE if problem.skewed else trust)
    except AwsUnreachableError as problem:
        advice = "let this machine out to STS: in a VPC without a way out add the endpoint for sts"
        yield failed(check, f"STS does not answer: {problem}", advice)
    except NoCredentialsError:
        yield skipped(check, "not without credentials")
    else:
        yield ok(check, f"assumed: {found.arn}")


def look_at_token(token: Once[tuple[str, float]], now: float) -> Iterator[Finding]:
    """
    Check that ECR issues a token.
    """
    check = "token"
    try:
        _, expires = token.get()
    except AwsRefusedError as problem:
        advice = _CLOCK_ADVICE if problem.skewed else permission_advice(problem.message)
        yield failed(check, f"ECR answers {problem}", advice)
    except AwsUnreachableError as problem:
        yield failed(
            check,
            f"ECR's API does not answer: {problem}",
            "see that api.ecr of the region can be reached: in a VPC without a way out add the endpoint for ecr.api;"
            " through a proxy set HTTPS_PROXY",
        )
    except NoCredentialsError:
        yield skipped(check, "not without credentials")
    else:
        yield ok(check, f"ECR issues one, valid for {max(0.0, expires - now) / 3600:.1f} hours")


def look_at_realm(challenge: str, url: str, realms: Collection[str]) -> Iterator[Finding]:
    """
    Check that a registry's token server is one that the daemon may use; yield nothing if so.

    @param challenge: the registry's response to a request without a token.
    @param realms: hosts outside its domain that the operator allows.
    """
    wanted = Challenge.read([challenge])
    if wanted is not None and wanted.scheme == "bearer" and not may_follow(wanted.realm, url, realms):
        said = f"the registry's token server {wanted.realm[:200]!r} is outside its domain, or not https"
        yield failed("realm", said, "if that is intended, list its host in the registry's realms")


def look_at_login(
    challenge: str, url: str, realms: Collection[str], login: str, ask: Callable[[str, Mapping[str, str]], Contact]
) -> Iterator[Finding]:
    """
    Check that a registry, or its token service, accepts a user and a password; as C{docker login} does.

    @param challenge: the registry's answer to a request without a token.
    @param realms: hosts beyond its own domain that the operator lists.
    @param login: base64 of C{user:password}, RFC 7617.
    @param ask: sends a GET to a URL.
    """
    check, wanted = "login", Challenge.read([challenge])
    if wanted is None or (wanted.scheme == "bearer" and not may_follow(wanted.realm, url, realms)):
        return
    where = wanted.url("") if wanted.scheme == "bearer" else f"{url}/v2/"
    contact = ask(where, {"Authorization": f"Basic {login}"})
    host = urlsplit(where).netloc
    if contact.status == HTTPStatus.OK:
        yield ok(check, f"{host} accepts the username and the password")
    elif contact.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        said = f"{host} answers {contact.status} to the username and the password"
        yield failed(check, said, "renew the password or the access token in password-file, and check username")
    else:
        said = f"{host} answers {contact.status or contact.problem} to the username and the password"
        yield warning(check, said, "try again later: it has neither accepted nor refused them")


def principal(arn: str) -> str:
    """
    Return the ARN whose policies IAM knows: for a session, its role.
    """
    found = _ROLE.fullmatch(arn)
    return f"arn:{found[1]}:iam::{found[2]}:role/{found[3]}" if found else arn


def judge_simulation(decisions: Mapping[str, str]) -> Iterator[Finding]:
    """
    Report IAM's simulated decisions.
    """
    for action, decision in decisions.items():
        if decision == "allowed":
            yield ok(action, "allowed, by the policies of the identity itself")
        elif action in IMPORTING:
            yield ok(
                action,
                f"IAM says {decision}; only repositories of a pull-through cache rule need it",
                f"allow it if there are any and clients are to {IMPORTING[action]}",
            )
        elif action in USEFUL:
            yield warning(action, f"IAM says {decision}", f"allow it if clients are to {USEFUL[action]}")
        else:
            yield failed(action, f"IAM says {decision}", f"allow {action} in the policy of the role or user")


def judge_call(action: str, status: int, message: str, good: Collection[int]) -> Finding:
    """
    Judge ECR's response to a request that needs C{action}.

    @param message: its error message.
    @param good: the statuses that mean permission.
    """
    if status in good:
        return ok(action, "allowed: tried")
    missing = denied_action(message)
    advice = permission_advice(message)
    if missing is not None and action in USEFUL:
        return warning(action, "refused by ECR", f"{advice}, if clients are to {USEFUL[action]}")
    if missing in IMPORTING:
        advice += f": a repository of a pull-through cache rule needs it to {IMPORTING[missing]}"
    if missing is not None:
        return failed(action, f"refused by ECR: {missing}", advice)
    if status in (401, 403):
        return failed(action, f"ECR answers {status}: {message}", "see the lines about token and identity")
    importing = f"if a pull-through cache rule is to make it, allow {' and '.join(IMPORTING)}"
    advice = importing if status == 404 else ""  # noqa: PLR2004
    return skipped(action, f"unknown: ECR answers {status} {message}".rstrip(), advice)
