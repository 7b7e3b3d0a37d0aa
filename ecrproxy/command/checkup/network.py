"""
Registry and bucket: whether they are reached, who shows which certificate, and what their clock says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from email.utils import parsedate_to_datetime
from typing import Final

from ecrproxy.command.checkup.findings import Finding, failed, ok, warning
from ecrproxy.command.checkup.reach import Contact, Shown, split

SOON: Final = 14 * 86400
"""In how many seconds a certificate ends that is worth a warning."""
SKEW_SECONDS: Final = 60
SIGNATURE_SECONDS: Final = 300
"""How far from AWS's own clock a signed request may be: AWS signature version 4, "X-Amz-Date"."""

# OpenSSL, x509_vfy.h.
_NOT_YET, _EXPIRED = 9, 10
_UNTRUSTED: Final = frozenset({18, 19, 20, 21})
_OTHER_NAME: Final = frozenset({62, 64})
_AWS: Final = (".amazonaws.com", ".amazonaws.com.cn", ".amazonaws.eu", ".on.aws", ".api.aws")
_TRUST: Final = (
    "what is between opens the TLS: have it leave this host alone, or trust its CA: SSL_CERT_FILE for registry and"
    " buckets, AWS_CA_BUNDLE for AWS's API"
)


def look_at_host(
    check: str, url: str, addresses: Sequence[str], touch: Callable[[str], Contact], now: float
) -> Iterator[Finding]:
    """
    See whether a host is reached, at the first of its addresses that is.

    @param touch: connects to one of them.
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
    Say what lets a machine reach a host.
    """
    if ".s3." in host or host.startswith("s3."):
        return (
            "let this machine out to S3: by NAT, or by a gateway endpoint for S3 whose policy lets in"
            " arn:aws:s3:::prod-REGION-starport-layer-bucket/*, or set HTTPS_PROXY"
        )
    return (
        "let this machine out to it: by NAT, or by the interface endpoint for ecr.dkr, with a security group that lets"
        " port 443 in, or set HTTPS_PROXY"
    )


def judge_contact(check: str, host: str, contact: Contact, now: float, *, secure: bool) -> Iterator[Finding]:
    """
    Read what came of connecting to a host that answered.
    """
    if contact.distrust:
        yield _distrusted(check, host, contact, now)
        return
    if not secure:
        yield warning(
            check, f"{host} answers at {contact.address}, without TLS", "the token is sent as it is: use https"
        )
        return
    shown = contact.shown
    if shown is not None and host.endswith(_AWS) and "amazon" not in shown.issuer.lower():
        yield warning(check, f"{host} answers at {contact.address} with a certificate of {shown.issuer!r}", _TRUST)
        return
    if shown is not None and shown.until - now < SOON:
        days = (shown.until - now) / 86400
        yield warning(
            check, f"{host} answers; its certificate ends in {days:.1f} days", "whoever runs it has to renew it"
        )
        return
    issuer = f", certificate of {shown.issuer!r}" if shown is not None else ""
    yield ok(check, f"{host} answers at {contact.address}{issuer}")


def _distrusted(check: str, host: str, contact: Contact, now: float) -> Finding:
    shown = contact.shown or Shown("nobody known", (), 0, 0)
    if contact.distrust in (_EXPIRED, _NOT_YET):
        when = "has ended" if contact.distrust == _EXPIRED else "has not begun to hold"
        days = abs(now - (shown.until if contact.distrust == _EXPIRED else shown.since)) / 86400
        said = f"the certificate of {host} {when}, by {days:.1f} days of this machine's clock"
        return failed(check, said, "see the line about the clock; if that is right, whoever runs it has to renew it")
    if contact.distrust in _OTHER_NAME:
        names = ", ".join(shown.names[:4]) or "nobody"
        said = f"what answers for {host} at {contact.address} shows a certificate for {names}"
        return failed(
            check, said, "the name leads to another machine: see the line about the resolver, or give the right host"
        )
    if contact.distrust in _UNTRUSTED and host.endswith(_AWS):
        said = f"the certificate of {host} is signed by {shown.issuer!r}, whom this machine does not trust"
        return failed(check, said, _TRUST)
    said = f"the certificate of {host} is not trusted: {contact.problem}; signed by {shown.issuer!r}"
    return failed(check, said, "add the CA to the system's, or name its file by SSL_CERT_FILE")


def judge_clock(date: str | None, now: float) -> Finding:
    """
    Hold this machine's clock against the Date that a server says.
    """
    check = "clock"
    try:
        skew = now - parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError):
        return ok(check, "the registry says no time to hold it against")
    said = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the registry's"
    advice = "set this machine's clock, and keep it right: chrony or systemd-timesyncd"
    if abs(skew) > SIGNATURE_SECONDS:
        return failed(check, f"{said}: AWS refuses what is signed so", advice)
    if abs(skew) > SKEW_SECONDS:
        return warning(check, said, advice)
    return ok(check, "right, by the registry's")
