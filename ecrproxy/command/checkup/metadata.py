"""
Checks of the instance metadata service, which is unreachable from containers if the hop limit is 1.

The hop limit applies to the response with the session token. Its default of 1 means that the response is lost at a
container's bridge: the connection succeeds, but no data arrives. (EC2 user guide, "Use the Instance Metadata Service",
"hop limit".)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from ecrproxy.command.checkup.findings import Finding, failed, ok, skipped, warning
from ecrproxy.command.checkup.reach import Contact, touch

SECONDS: Final = 2.0
PLACE: Final = "http://169.254.169.254"
_LIFE: Final = {"X-aws-ec2-metadata-token-ttl-seconds": "60", "Content-Length": "0"}
_TOKEN: Final = "/latest/api/token"  # noqa: S105 (a path)
_ROLES: Final = "/latest/meta-data/iam/security-credentials/"

Ask = Callable[[str, str, Mapping[str, str]], Contact]
"""Sends method, URL and headers."""


def over_http(method: str, url: str, headers: Mapping[str, str]) -> Contact:
    """
    Send a request to the service.
    """
    host = url.split("/")[2]
    address = host.rpartition(":")[0].strip("[]") if host.rpartition(":")[2].isdecimal() else host.strip("[]")
    return touch(url, address, headers, method=method, seconds=SECONDS)


def look_at_metadata(environ: Mapping[str, str], ask: Ask, *, needed: bool) -> Iterator[Finding]:
    """
    Check that the service responds.

    @param needed: True if credentials should come from it.
    """
    check = "metadata"
    if environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        said = "AWS_EC2_METADATA_DISABLED is set"
        yield warning(check, said, "unset it if the role should come from there") if needed else skipped(check, said)
        return
    place = (environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or PLACE).rstrip("/")
    token = ask("PUT", place + _TOKEN, _LIFE)
    if token.problem and _is_there(ask, place):
        said = "reachable, but its session token does not arrive: the hop limit is too small"
        advice = (
            "aws ec2 modify-instance-metadata-options --instance-id ID --http-put-response-hop-limit 2,"
            " or use the role of the task or pod"
        )
        yield failed(check, said, advice) if needed else warning(check, said, advice)
    elif token.problem:
        said = f"does not answer: {token.problem}"
        advice = "provide a role in another way, or allow this machine to reach 169.254.169.254"
        yield failed(check, said, advice) if needed else skipped(check, f"{said}; nor is it needed")
    elif token.status != 200:  # noqa: PLR2004
        said = f"answers {token.status} when asked for a session"
        advice = "check that metadata is enabled for the instance"
        yield failed(check, said, advice) if needed else ok(check, f"{said}; it is not needed")
    else:
        yield _role(ask, place, token.body.decode("ascii", "replace").strip(), needed=needed)


def _is_there(ask: Ask, place: str) -> bool:
    """
    Send a request without a token (IMDSv1): an instance that requires tokens returns 401, whatever the hop limit.
    """
    return not ask("GET", f"{place}/latest/meta-data/", {}).problem


def _role(ask: Ask, place: str, token: str, *, needed: bool) -> Finding:
    check = "metadata"
    roles = ask("GET", place + _ROLES, {"X-aws-ec2-metadata-token": token})
    if roles.status == 200 and roles.body.strip():  # noqa: PLR2004
        return ok(check, f"answers; the instance has the role {roles.body.decode('utf-8', 'replace').split()[0][:80]}")
    said = "answers; the instance has no role"
    return failed(check, said, "attach an instance profile") if needed else ok(check, f"{said}, nor is one needed")
