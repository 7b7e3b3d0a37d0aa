"""
Checks of registry and bucket: reachability, certificate, clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from email.utils import parsedate_to_datetime
from typing import Final

from ecrproxy.command.checkup.findings import Finding, failed, ok, warning
from ecrproxy.command.checkup.reach import Contact, ShownCertificate, split

SOON: Final = 14 * 86400
"""A certificate that expires within this many seconds causes a warning."""
SKEW_SECONDS: Final = 60
SIGNATURE_SECONDS: Final = 300
"""Maximum clock skew of a signed request, in seconds: AWS signature version 4, "X-Amz-Date"."""

# OpenSSL, x509_vfy.h.
_NOT_YET, _EXPIRED = 9, 10
_UNTRUSTED: Final = frozenset({18, 19, 20, 21})
_OTHER_NAME: Final = frozenset({62, 64})
_AWS: Final = (".amazonaws.com", ".amazonaws.com.cn", ".amazonaws.eu", ".on.aws", ".api.aws")
_TRUST: Final = (
    "a middlebox intercepts TLS: exclude this host, or trust its CA: SSL_CERT_FILE for registry and"
    " buckets, AWS_CA_BUNDLE for AWS's API"
)


def look_at_host(
    check: str, url: str, addresses: Sequence[str], touch: Callable[[str], Contact], now: float
) -> Iterator[Finding]:
    """
    Check that a host can be reached at one of its addresses.

    @param touch: connects to an address.
    """
    host, port, secure = split(url)
    problems = []
    for address in addresses[:4]:
        contact = touch(address)
        if not contact.problem or contact.distrust:
            yield from judge_contact(check, host, contact, now, secure=secure)
            return
        problems.append(f"{address}: {contact.problem}")
    said = f"{host} can't be reached at port {port}: {'; '.join(problems) or 'it has no address'}"
    yield failed(check, said, reach_advice(host))


def reach_advice(host: str) -> str:
    """
    Return advice on how to make a host reachable.
    """
    if ".s3." in host or host.startswith("s3."):
        return (
            "allow this machine to reach S3 by NAT, or by a gateway endpoint for S3 whose policy lets in"
            " arn:aws:s3:::prod-REGION-starport-layer-bucket/*, or set HTTPS_PROXY"
        )
    return (
        "allow this machine to reach it by NAT or by the interface endpoint for ecr.dkr, with a security group that"
        " allows port 443, or set HTTPS_PROXY"
    )


def judge_contact(check: str, host: str, contact: Contact, now: float, *, secure: bool) -> Iterator[Finding]:
    """
    Judge a successful connection to a host.
    """
    if contact.distrust:
        yield _distrusted(check, host, contact, now)
        return
    if not secure:
        yield warning(
            check, f"{host} answers at {contact.address}, without TLS", "the token is sent unencrypted: use https"
        )
        return
    shown = contact.shown
    if shown is not None and host.endswith(_AWS) and "amazon" not in shown.issuer.lower():
        yield warning(check, f"{host} answers at {contact.address} with a certificate of {shown.issuer!r}", _TRUST)
        return
    if shown is not None and shown.until - now < SOON:
        days = (shown.until - now) / 86400
        yield warning(
            check, f"{host} answers; its certificate ends in {days:.1f} days", "the host's operator must renew it"
        )
        return
    issuer = f", certificate of {shown.issuer!r}" if shown is not None else ""
    yield ok(check, f"{host} answers at {contact.address}{issuer}")


def _distrusted(check: str, host: str, contact: Contact, now: float) -> Finding:
    shown = contact.shown or ShownCertificate("an unknown issuer", (), 0, 0)
    if contact.distrust in (_EXPIRED, _NOT_YET):
        when = "has ended" if contact.distrust == _EXPIRED else "has not begun to hold"
        days = abs(now - (shown.until if contact.distrust == _EXPIRED else shown.since)) / 86400
        said = f"the certificate of {host} {when}, by {days:.1f} days of this machine's clock"
        return failed(check, said, "see the line about the clock; if that is right, the host's operator must renew it")
    if contact.distrust in _OTHER_NAME:
        names = ", ".join(shown.names[:4]) or "no name"
        said = f"what answers for {host} at {contact.address} shows a certificate for {names}"
        return failed(
            check, said, "the name resolves to another machine: see the line about the resolver, or correct the host"
        )
    if contact.distrust in _UNTRUSTED and host.endswith(_AWS):
        said = f"the certificate of {host} is signed by {shown.issuer!r}, which this machine does not trust"
        return failed(check, said, _TRUST)
    said = f"the certificate of {host} is not trusted: {contact.problem}; signed by {shown.issuer!r}"
    return failed(check, said, "add the CA to the system's, or set SSL_CERT_FILE to its file")


def judge_clock(date: str | None, now: float) -> Finding:
    """
    Compare this machine's clock with a server's Date.
    """
    check = "clock"
    try:
        skew = now - parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError):
        return ok(check, "the registry sends no time to compare with")
    said = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the registry's"
    advice = "synchronize this machine's clock: chrony or systemd-timesyncd"
    if abs(skew) > SIGNATURE_SECONDS:
        return failed(check, f"{said}: AWS rejects requests signed with this time", advice)
    if abs(skew) > SKEW_SECONDS:
        return warning(check, said, advice)
    return ok(check, "matches the registry's")
