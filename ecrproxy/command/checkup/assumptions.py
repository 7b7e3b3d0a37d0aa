"""
The daemon's assumptions about ECR, compared with responses: each is a row of docs/ecr.rst, by name. Pure.

Judgements are written to a file for a public issue. So they only have words of this module, status codes, seconds and
media types from a fixed list, and never text from ECR or the bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from ecrproxy.command.checkup.blob_assumptions import (
    blob_head,
    blob_head_length,
    blob_head_type,
    blob_redirect,
    bucket_addresses,
    bucket_range,
    bucket_ranges,
    bucket_refusal,
    bucket_words,
    redirect_expiry,
    redirect_host,
)
from ecrproxy.command.checkup.findings import Finding, failed, ok, skipped, warning
from ecrproxy.command.checkup.judgement import (
    HEAD_REFUSALS,
    LENGTH,
    Judgement,
    Outcome,
    defect,
    documented,
    otherwise,
    refusal_in,
    shown,
    type_of,
)
from ecrproxy.command.checkup.page_assumptions import referrers, referrers_of_nothing, tags_limit, tags_next, tags_type
from ecrproxy.command.checkup.questions import Seen, UnseenError, own_type
from ecrproxy.command.checkup.reach import Contact
from ecrproxy.documents import Document
from ecrproxy.oci import MANIFEST_LIMIT, MANIFEST_TYPES, Digest
from ecrproxy.registry.retries import asked_wait

_HOURS: Final = 12
_NO_IMAGE: Final = "the image is not there"


# Tokens and refusals.


def token_lifetime(seen: Seen) -> Judgement:
    """GetAuthorizationToken gives a token for twelve hours."""
    if seen.token_seconds is None:
        raise UnseenError("no token")
    hours = seen.token_seconds / 3600
    if abs(hours - _HOURS) < 0.1:  # noqa: PLR2004
        return documented("12 hours")
    return otherwise(f"{hours:.1f} hours", "refreshes a token at half of its life, once a minute at most")


def token_refused(seen: Seen) -> Judgement:
    """A token that ECR can't read is 400 without a challenge."""
    answer = seen.answer("no-token")
    challenged = "www-authenticate" in answer.headers
    said = f"{answer.status} {'with' if challenged else 'without'} a challenge"
    if answer.status == 400 and not challenged and not refusal_in(answer).is_registry_error:  # noqa: PLR2004
        return documented(said)
    if refusal_in(answer).is_about_token:
        return otherwise(said, "refreshes the token once, and sends the request again")
    if answer.status < 400:  # noqa: PLR2004
        return otherwise(f"{said}: any token is accepted", "sends its token anyway")
    return defect(said, "treats it as a refusal of this request, and keeps the token")


def iam_wording(seen: Seen) -> Judgement:
    """IAM's refusals are 403 in the specification's JSON, and say what is not authorized."""
    found = [
        refusal_in(each)
        for name, each in seen.answers.items()
        if each.status == 403 and each.body and name not in ("no-token", "part", "parts", "forged")  # noqa: PLR2004
    ]
    if not found:
        raise UnseenError("nothing was refused with 403")
    if any(each.is_about_token for each in found):
        return defect("403 that speaks of the token, which is fresh", "treats the token as expired, and refreshes it")
    if not all(each.is_registry_error for each in found):
        said = "403 without the specification's JSON"
        return defect(said, "treats it as the answer of something between: 502, or a tag as last known")
    if all("not authorized to perform" in each.message.lower() for each in found):
        return documented("403 in JSON, which names the action")
    return otherwise("403 in JSON, in other words", "answers clients 403, and logs ECR's words")


def throttling(seen: Seen) -> Judgement:
    """429 has Retry-After."""
    found = [each for each in seen.answers.values() if each.status == 429]  # noqa: PLR2004
    if not found:
        raise UnseenError("nothing was answered with 429")
    if all(asked_wait(each.headers.get("retry-after"), each.headers.get("date")) is not None for each in found):
        return documented("429 with Retry-After")
    return otherwise("429 without a readable Retry-After", "waits by itself, with jitter")


def missing_tag(seen: Seen) -> Judgement:
    """A tag that does not exist is 404 MANIFEST_UNKNOWN."""
    if not is_there(seen):  # the repository may be missing as well
        raise UnseenError(_NO_IMAGE)
    return _missing(seen.answer("no-tag"), "MANIFEST_UNKNOWN")


def missing_repository(seen: Seen) -> Judgement:
    """A repository that does not exist is 404 NAME_UNKNOWN."""
    return _missing(seen.answer("no-repository"), "NAME_UNKNOWN")


def _missing(answer: Contact, code: str) -> Judgement:
    refusal = refusal_in(answer)
    if answer.status == 404:  # noqa: PLR2004
        if not refusal.is_registry_error:
            said = "404 without the specification's JSON"
            return defect(said, "treats it as the answer of something between: 502, or a tag as last known")
        if refusal.code == code:
            return documented(f"404 {code}")
        return otherwise("404 with another code", "hands ECR's code on")
    if answer.status == 403 and refusal.is_registry_error and not refusal.is_about_token:  # noqa: PLR2004
        return otherwise("403, as IAM hides what it does not grant", "answers clients 403")
    return defect(f"{answer.status}", "does not treat it as something that does not exist")


def is_there(seen: Seen) -> bool:
    """
    Return False if ECR says that the image does not exist.
    """
    answer = seen.answers.get("manifest")
    return answer is None or answer.status != 404  # noqa: PLR2004


# Manifests.


def manifest_head(seen: Seen) -> Judgement:
    """HEAD of a manifest works."""
    if not is_there(seen):
        raise UnseenError(_NO_IMAGE)
    status = seen.answer("head").status
    if status == 200:  # noqa: PLR2004
        return documented("200")
    if status in HEAD_REFUSALS:
        return otherwise(f"refused with {status}", "sends a GET")
    return defect(f"{status}", "answers 502")


def manifest_head_length(seen: Seen) -> Judgement:
    """HEAD of a manifest has its length and type."""
    answer = seen.good("head")
    length = answer.headers.get("content-length", "")
    told = LENGTH.fullmatch(length) is not None and 0 < int(length) <= MANIFEST_LIMIT
    if told and type_of(answer) in MANIFEST_TYPES:
        return documented(f"a length, and {shown(answer)}")
    return otherwise(f"{'a' if told else 'no usable'} length, and {shown(answer)}", "sends a GET")


def manifest_head_digest(seen: Seen) -> Judgement:
    """HEAD of a manifest names the digest of what GET gives."""
    named, body = seen.good("head").headers.get("docker-content-digest"), seen.good("manifest").body
    if not named:
        return otherwise("no digest", "fetches the manifest, and computes the digest")
    if _is_digest_of(named, body):
        return documented("the digest of what GET gives")
    return defect("not the digest of what GET gives", "serves no bytes under a digest that is not theirs")


def manifest_get_digest(seen: Seen) -> Judgement:
    """GET of a manifest names no digest."""
    answer = seen.good("manifest")
    named = answer.headers.get("docker-content-digest")
    if not named:
        return documented("no digest")
    if _is_digest_of(named, answer.body):
        return otherwise("the digest", "compares it with the one that it computes")
    return defect("another digest than that of the bytes", "answers 502")


def manifest_type(seen: Seen) -> Judgement:
    """The Content-Type of a manifest is its media type."""
    answer = seen.good("manifest")
    try:
        named = _own_type(answer)
    except ValueError:
        return defect(f"{shown(answer)}, which is not the manifest's own", "answers 502")
    if answer.headers["content-type"] == named:
        return documented(named)
    return otherwise(f"{named}, with parameters or capitals", "leaves them out")


def manifest_length(seen: Seen) -> Judgement:
    """A manifest comes with its length."""
    answer = seen.good("manifest")
    length = answer.headers.get("content-length")
    if len(answer.body) > MANIFEST_LIMIT:
        return defect("more than 4 MiB", "answers 502")
    if length is None:
        return otherwise("no length", "reads it to its end, up to 4 MiB and for 25 s")
    if LENGTH.fullmatch(length):
        return documented("its length")
    return defect("a length that is no number", "answers 502")


def manifest_vary(seen: Seen) -> Judgement:
    """A manifest has no Vary."""
    if "vary" not in seen.good("manifest").headers:
        return documented("no Vary")
    return otherwise("Vary", "does not look at it: what a tag leads to depends on the accepted types in any case")


def manifest_conversion(seen: Seen) -> Judgement:
    """ECR converts what is asked for by tag, from OCI to schema 2 and back, for clients that accept that alone."""
    stored = own_type(seen.good("manifest"))
    if "twin" not in seen.known:
        raise UnseenError("an image of this kind is not converted")
    answer = seen.answer("converted")
    if answer.status != 200:  # noqa: PLR2004
        return otherwise(f"refused with {answer.status}", "hands ECR's answer on to clients that accept that alone")
    try:
        given = _own_type(answer)
    except ValueError:
        return defect(f"given as {shown(answer)}, which is not the manifest's own type", "answers 502")
    if given == seen.known["twin"]:
        return documented("converted")
    said = "given as it is stored" if given == stored else f"given as {given}"
    return otherwise(said, "hands it on, under the digest of its bytes")


def manifest_by_digest(seen: Seen) -> Judgement:
    """What is asked for by digest has that digest: it is never converted."""
    answer = seen.good("image")
    if _is_digest_of(seen.known["image"], answer.body):
        return documented("the bytes of that digest")
    return defect("other bytes", "answers 502")


def _own_type(manifest: Contact) -> str:
    """
    Return the type of a manifest.

    @raise ValueError: if the daemon would reject the manifest for it.
    """
    return Document.read(manifest.body).type_as(manifest.headers.get("content-type", ""))


def _is_digest_of(named: str, body: bytes) -> bool:
    try:
        digest = Digest.parse(named)
    except ValueError:
        return False
    return Digest.of(body, digest.algorithm) == digest


# Blobs.


# Tags and referrers.


ASSUMPTIONS: Final[Mapping[str, Callable[[Seen], Judgement]]] = {
    each.__name__.replace("_", "-"): each
    for each in (
        token_lifetime,
        token_refused,
        iam_wording,
        throttling,
        missing_tag,
        missing_repository,
        manifest_head,
        manifest_head_length,
        manifest_head_digest,
        manifest_get_digest,
        manifest_type,
        manifest_length,
        manifest_vary,
        manifest_conversion,
        manifest_by_digest,
        blob_head,
        blob_head_type,
        blob_head_length,
        blob_redirect,
        redirect_host,
        redirect_expiry,
        bucket_addresses,
        bucket_range,
        bucket_ranges,
        bucket_refusal,
        bucket_words,
        tags_type,
        tags_next,
        tags_limit,
        referrers,
        referrers_of_nothing,
    )
}
"""By their names in docs/ecr.rst."""


def judge(name: str, seen: Seen) -> Judgement:
    """
    Compare one assumption with the responses.
    """
    try:
        return ASSUMPTIONS[name](seen)
    except UnseenError as problem:
        return Judgement(Outcome.UNSEEN, str(problem))


def findings(seen: Seen) -> Iterator[Finding]:
    """
    Compare all assumptions with the responses.
    """
    for name in ASSUMPTIONS:
        found = judge(name, seen)
        said = f"{found.outcome.value}: {found.said}"
        match found.outcome:
            case Outcome.DOCUMENTED:
                yield ok(name, said)
            case Outcome.OTHERWISE:
                yield warning(name, said, f"the daemon copes: it {found.daemon}")
            case Outcome.DEFECT:
                yield failed(name, said, f"the daemon {found.daemon}; please report this, with --report FILE")
            case Outcome.UNSEEN:
                yield skipped(name, said)


def report(found: Mapping[str, Finding], version: str) -> str:
    """
    Format the findings, to be attached to an issue.

    @param found: by the name of the assumption; others are left out.
    """
    lines = [f"ecr-proxy {version} doctor --image: what ECR does, by the names in docs/ecr.rst", ""]
    width = max(map(len, ASSUMPTIONS))
    for name in ASSUMPTIONS:
        each = found.get(name, skipped(name, f"{Outcome.UNSEEN.value}: not asked in time, or without a token"))
        lines.append(f"{name:<{width}}  {each.said}")
        if each.advice:
            lines.append(f"{'':<{width}}  -> {each.advice}")
    return "\n".join(lines) + "\n"
