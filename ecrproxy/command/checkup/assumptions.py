"""
The daemon's assumptions about ECR, compared with responses: each is a row of docs/ecr.rst, by name. Pure.

Judgements are written to a file for a public issue. So they only have words of this module, status codes, seconds and
media types from a fixed list, and never text from ECR or the bucket.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs, urlsplit

from ecrproxy.command.checkup.findings import Finding, failed, ok, skipped, warning
from ecrproxy.command.checkup.questions import Seen, UnseenError, own_type
from ecrproxy.command.checkup.reach import Contact
from ecrproxy.documents import Document, index_type
from ecrproxy.oci import INDEX_TYPES, MANIFEST_LIMIT, MANIFEST_TYPES, Digest
from ecrproxy.registry.bucket import REDIRECT_STATUSES, told_part
from ecrproxy.registry.bucket_errors import said_by_bucket
from ecrproxy.registry.links import next_target
from ecrproxy.registry.refusals import Refusal
from ecrproxy.registry.retries import asked_wait

_HOURS: Final = 12
_URL_SECONDS: Final = "3600"
_LENGTH: Final = re.compile(r"[0-9]{1,18}")
_SECONDS: Final = re.compile(r"[0-9]{1,9}")
_BLOB_TYPE: Final = "application/octet-stream"
_PAGES: Final = frozenset({"text/html", "application/xhtml+xml"})
_SHOWN_TYPES: Final = MANIFEST_TYPES | _PAGES | {_BLOB_TYPE, "binary/octet-stream", "text/plain", "application/json"}
_NO_IMAGE: Final = "the image is not there"
_HEAD_REFUSALS: Final = frozenset({400, 401, 403, 404, 405})
_URL_REFUSALS: Final = frozenset({400, 401, 403, 404, 410})
_LAYERS: Final = re.compile(
    r"prod-([a-z0-9-]+)-starport-layer-bucket\.s3\.(?:dualstack\.)?\1\.amazonaws\.(?:com|com\.cn|eu)"
)


class Outcome(enum.Enum):
    """
    The result for one assumption.
    """

    DOCUMENTED = "as documented"
    OTHERWISE = "otherwise"
    DEFECT = "defect"
    UNSEEN = "not seen"


@dataclass(frozen=True, slots=True)
class Judgement:
    """
    One assumption, compared with the responses.

    @ivar said: what was seen, in publishable words.
    @ivar daemon: how the daemon handles behavior that is not as documented.
    """

    outcome: Outcome
    said: str
    daemon: str = ""


def _documented(said: str) -> Judgement:
    return Judgement(Outcome.DOCUMENTED, said)


def _otherwise(said: str, daemon: str) -> Judgement:
    return Judgement(Outcome.OTHERWISE, said, daemon)


def _defect(said: str, daemon: str) -> Judgement:
    return Judgement(Outcome.DEFECT, said, daemon)


def _type(contact: Contact) -> str:
    return contact.headers.get("content-type", "").partition(";")[0].strip().lower()


def _shown(contact: Contact) -> str:
    """
    Return a Content-Type in publishable words.
    """
    named = _type(contact)
    return named if named in _SHOWN_TYPES else "another type" if named else "no type"


# Tokens and refusals.


def token_lifetime(seen: Seen) -> Judgement:
    """GetAuthorizationToken gives a token for twelve hours."""
    if seen.token_seconds is None:
        raise UnseenError("no token")
    hours = seen.token_seconds / 3600
    if abs(hours - _HOURS) < 0.1:  # noqa: PLR2004
        return _documented("12 hours")
    return _otherwise(f"{hours:.1f} hours", "refreshes a token at half of its life, once a minute at most")


def token_refused(seen: Seen) -> Judgement:
    """A token that ECR can't read is 400 without a challenge."""
    answer = seen.answer("no-token")
    challenged = "www-authenticate" in answer.headers
    said = f"{answer.status} {'with' if challenged else 'without'} a challenge"
    if answer.status == 400 and not challenged and not _refusal(answer).is_registry_error:  # noqa: PLR2004
        return _documented(said)
    if _refusal(answer).is_about_token:
        return _otherwise(said, "refreshes the token once, and sends the request again")
    if answer.status < 400:  # noqa: PLR2004
        return _otherwise(f"{said}: any token is accepted", "sends its token anyway")
    return _defect(said, "treats it as a refusal of this request, and keeps the token")


def iam_wording(seen: Seen) -> Judgement:
    """IAM's refusals are 403 in the specification's JSON, and say what is not authorized."""
    found = [
        _refusal(each)
        for name, each in seen.answers.items()
        if each.status == 403 and each.body and name not in ("no-token", "part", "parts", "forged")  # noqa: PLR2004
    ]
    if not found:
        raise UnseenError("nothing was refused with 403")
    if any(each.is_about_token for each in found):
        return _defect("403 that speaks of the token, which is fresh", "treats the token as expired, and refreshes it")
    if not all(each.is_registry_error for each in found):
        said = "403 without the specification's JSON"
        return _defect(said, "treats it as the answer of something between: 502, or a tag as last known")
    if all("not authorized to perform" in each.message.lower() for each in found):
        return _documented("403 in JSON, which names the action")
    return _otherwise("403 in JSON, in other words", "answers clients 403, and logs ECR's words")


def throttling(seen: Seen) -> Judgement:
    """429 has Retry-After."""
    found = [each for each in seen.answers.values() if each.status == 429]  # noqa: PLR2004
    if not found:
        raise UnseenError("nothing was answered with 429")
    if all(asked_wait(each.headers.get("retry-after"), each.headers.get("date")) is not None for each in found):
        return _documented("429 with Retry-After")
    return _otherwise("429 without a readable Retry-After", "waits by itself, with jitter")


def missing_tag(seen: Seen) -> Judgement:
    """A tag that does not exist is 404 MANIFEST_UNKNOWN."""
    if not is_there(seen):  # the repository may be missing as well
        raise UnseenError(_NO_IMAGE)
    return _missing(seen.answer("no-tag"), "MANIFEST_UNKNOWN")


def missing_repository(seen: Seen) -> Judgement:
    """A repository that does not exist is 404 NAME_UNKNOWN."""
    return _missing(seen.answer("no-repository"), "NAME_UNKNOWN")


def _missing(answer: Contact, code: str) -> Judgement:
    refusal = _refusal(answer)
    if answer.status == 404:  # noqa: PLR2004
        if not refusal.is_registry_error:
            said = "404 without the specification's JSON"
            return _defect(said, "treats it as the answer of something between: 502, or a tag as last known")
        if refusal.code == code:
            return _documented(f"404 {code}")
        return _otherwise("404 with another code", "hands ECR's code on")
    if answer.status == 403 and refusal.is_registry_error and not refusal.is_about_token:  # noqa: PLR2004
        return _otherwise("403, as IAM hides what it does not grant", "answers clients 403")
    return _defect(f"{answer.status}", "does not treat it as something that does not exist")


def is_there(seen: Seen) -> bool:
    """
    Return False if ECR says that the image does not exist.
    """
    answer = seen.answers.get("manifest")
    return answer is None or answer.status != 404  # noqa: PLR2004


def _refusal(answer: Contact) -> Refusal:
    return Refusal.read(answer.status, answer.body, challenged="www-authenticate" in answer.headers)


# Manifests.


def manifest_head(seen: Seen) -> Judgement:
    """HEAD of a manifest works."""
    if not is_there(seen):
        raise UnseenError(_NO_IMAGE)
    status = seen.answer("head").status
    if status == 200:  # noqa: PLR2004
        return _documented("200")
    if status in _HEAD_REFUSALS:
        return _otherwise(f"refused with {status}", "sends a GET")
    return _defect(f"{status}", "answers 502")


def manifest_head_length(seen: Seen) -> Judgement:
    """HEAD of a manifest has its length and type."""
    answer = seen.good("head")
    length = answer.headers.get("content-length", "")
    told = _LENGTH.fullmatch(length) is not None and 0 < int(length) <= MANIFEST_LIMIT
    if told and _type(answer) in MANIFEST_TYPES:
        return _documented(f"a length, and {_shown(answer)}")
    return _otherwise(f"{'a' if told else 'no usable'} length, and {_shown(answer)}", "sends a GET")


def manifest_head_digest(seen: Seen) -> Judgement:
    """HEAD of a manifest names the digest of what GET gives."""
    named, body = seen.good("head").headers.get("docker-content-digest"), seen.good("manifest").body
    if not named:
        return _otherwise("no digest", "fetches the manifest, and computes the digest")
    if _is_digest_of(named, body):
        return _documented("the digest of what GET gives")
    return _defect("not the digest of what GET gives", "serves no bytes under a digest that is not theirs")


def manifest_get_digest(seen: Seen) -> Judgement:
    """GET of a manifest names no digest."""
    answer = seen.good("manifest")
    named = answer.headers.get("docker-content-digest")
    if not named:
        return _documented("no digest")
    if _is_digest_of(named, answer.body):
        return _otherwise("the digest", "compares it with the one that it computes")
    return _defect("another digest than that of the bytes", "answers 502")


def manifest_type(seen: Seen) -> Judgement:
    """The Content-Type of a manifest is its media type."""
    answer = seen.good("manifest")
    try:
        named = _own_type(answer)
    except ValueError:
        return _defect(f"{_shown(answer)}, which is not the manifest's own", "answers 502")
    if answer.headers["content-type"] == named:
        return _documented(named)
    return _otherwise(f"{named}, with parameters or capitals", "leaves them out")


def manifest_length(seen: Seen) -> Judgement:
    """A manifest comes with its length."""
    answer = seen.good("manifest")
    length = answer.headers.get("content-length")
    if len(answer.body) > MANIFEST_LIMIT:
        return _defect("more than 4 MiB", "answers 502")
    if length is None:
        return _otherwise("no length", "reads it to its end, up to 4 MiB and for 25 s")
    if _LENGTH.fullmatch(length):
        return _documented("its length")
    return _defect("a length that is no number", "answers 502")


def manifest_vary(seen: Seen) -> Judgement:
    """A manifest has no Vary."""
    if "vary" not in seen.good("manifest").headers:
        return _documented("no Vary")
    return _otherwise("Vary", "does not look at it: what a tag leads to depends on the accepted types in any case")


def manifest_conversion(seen: Seen) -> Judgement:
    """ECR converts what is asked for by tag, from OCI to schema 2 and back, for clients that accept that alone."""
    stored = own_type(seen.good("manifest"))
    if "twin" not in seen.known:
        raise UnseenError("an image of this kind is not converted")
    answer = seen.answer("converted")
    if answer.status != 200:  # noqa: PLR2004
        return _otherwise(f"refused with {answer.status}", "hands ECR's answer on to clients that accept that alone")
    try:
        given = _own_type(answer)
    except ValueError:
        return _defect(f"given as {_shown(answer)}, which is not the manifest's own type", "answers 502")
    if given == seen.known["twin"]:
        return _documented("converted")
    said = "given as it is stored" if given == stored else f"given as {given}"
    return _otherwise(said, "hands it on, under the digest of its bytes")


def manifest_by_digest(seen: Seen) -> Judgement:
    """What is asked for by digest has that digest: it is never converted."""
    answer = seen.good("image")
    if _is_digest_of(seen.known["image"], answer.body):
        return _documented("the bytes of that digest")
    return _defect("other bytes", "answers 502")


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


def blob_head(seen: Seen) -> Judgement:
    """HEAD of a blob works."""
    status = seen.answer("blob-head").status
    if status == 200:  # noqa: PLR2004
        return _documented("200")
    if status in REDIRECT_STATUSES or status in _HEAD_REFUSALS:
        return _otherwise(f"{status}", "sends a GET for one byte")
    return _defect(f"{status}", "answers 502")


def blob_head_type(seen: Seen) -> Judgement:
    """HEAD of a blob is of no particular type."""
    answer = seen.good("blob-head")
    if _type(answer) == _BLOB_TYPE:
        return _documented(_BLOB_TYPE)
    if _type(answer) in _PAGES and "docker-content-digest" not in answer.headers:
        return _otherwise(
            f"{_shown(answer)}, without a digest", "sends a GET for one byte: it may be another server's page"
        )
    return _otherwise(_shown(answer), "does not look at it")


def blob_head_length(seen: Seen) -> Judgement:
    """HEAD of a blob has the length that the manifest gives."""
    length = seen.good("blob-head").headers.get("content-length", "")
    if not _LENGTH.fullmatch(length):
        return _otherwise("no length", "sends a GET for one byte")
    if int(length) == int(seen.known["size"]):
        return _documented("the length that the manifest gives")
    return _defect("another length than the manifest gives", "uses it as the blob's size")


def blob_redirect(seen: Seen) -> Judgement:
    """GET of a blob redirects with 307."""
    status = seen.answer("blob").status
    if status in REDIRECT_STATUSES:
        if "location" not in seen.known:
            return _defect(f"{status} to nowhere that the daemon goes", "answers 502")
        if status == 307:  # noqa: PLR2004
            return _documented("307")
        return _otherwise(f"{status}", "follows it")
    if status in (200, 206):
        return _otherwise(f"{status}: the bytes themselves", "takes them")
    if status in (401, 403, 404):
        raise UnseenError(f"refused with {status}")
    return _defect(f"{status}", "answers 502")


def redirect_host(seen: Seen) -> Judgement:
    """Blobs lie in the region's bucket for layers."""
    host = urlsplit(_location(seen)).hostname or ""
    if _LAYERS.fullmatch(host):
        return _documented("the region's bucket for layers")
    where = next((end for end in (".amazonaws.com", ".cloudfront.net") if host.endswith(end)), "")
    said = f"another host{f' of {where[1:]}' if where else ''}"
    return _otherwise(said, "goes where ECR says, but for loopback and link-local addresses")


def redirect_expiry(seen: Seen) -> Judgement:
    """The URL that ECR signs is good for an hour."""
    told = parse_qs(urlsplit(_location(seen)).query).get("X-Amz-Expires", [""])[0]
    if told == _URL_SECONDS:
        return _documented(f"{told} s")
    said = f"{told} s" if _SECONDS.fullmatch(told) else "not said"
    return _otherwise(said, "asks ECR for another URL when one is refused")


def bucket_addresses(seen: Seen) -> Judgement:
    """The bucket has IPv4 addresses alone."""
    _location(seen)
    if not seen.bucket:
        raise UnseenError("not looked up")
    if not any(":" in address for address in seen.bucket):
        return _documented("IPv4 alone")
    return _otherwise("IPv6 as well", "tries all addresses that the name resolves to")


def bucket_range(seen: Seen) -> Judgement:
    """The bucket gives the range that it is asked for."""
    answer, size = _from_bucket(seen, "part"), int(seen.known["size"])
    if size < 3:  # noqa: PLR2004
        raise UnseenError("the blob is too small")
    if answer.status == 200:  # noqa: PLR2004
        return _otherwise("the whole", "cuts it")
    if answer.status != 206:  # noqa: PLR2004
        return _defect(f"{answer.status}", "answers 502")
    part = told_part(answer.headers.get("content-range"), 1, 3)
    if part is None:
        return _defect("206 with another range", "answers 502")
    if part[1] != size:
        return _defect("206 of another size than the manifest gives", "answers 502")
    return _documented("206") if part[0] == 3 else _otherwise("less than was asked for", "asks for the rest")  # noqa: PLR2004


def bucket_ranges(seen: Seen) -> Judgement:
    """Several ranges at once give the whole."""
    answer = _from_bucket(seen, "parts")
    if answer.status == 200:  # noqa: PLR2004
        return _documented("the whole")
    several = answer.headers.get("content-type", "").lower().startswith("multipart/byteranges")
    said = f"{answer.status}{', multipart' if several else ''}"
    return _otherwise(said, "asks for one range at a time in any case")


def bucket_refusal(seen: Seen) -> Judgement:
    """A URL whose signature is not right is 403, as one that has expired."""
    status = _from_bucket(seen, "forged", refused=True).status
    if status == 403:  # noqa: PLR2004
        return _documented("403")
    if status in _URL_REFUSALS:
        return _otherwise(f"{status}", "asks ECR for another URL, once")
    if status in (200, 206):
        return _otherwise(f"{status}: signatures are not looked at", "needs no other URL")
    return _defect(f"{status}", "does not ask for another URL: 502")


def bucket_words(seen: Seen) -> Judgement:
    """The bucket's errors have S3's Code and Message."""
    answer = _from_bucket(seen, "forged", refused=True)
    if answer.status < 400:  # noqa: PLR2004
        raise UnseenError("nothing was refused")
    if said_by_bucket(answer.body):
        return _documented("S3's words")
    return _otherwise("other words", "logs the status alone")


def _location(seen: Seen) -> str:
    if "location" not in seen.known:
        raise UnseenError("no redirect")
    return seen.known["location"]


def _from_bucket(seen: Seen, name: str, *, refused: bool = False) -> Contact:
    """
    Return the bucket's response.

    @param refused: True if it should refuse. It may refuse all requests from here, which another line reports.
    """
    _location(seen)
    answer = seen.answer(name)
    if answer.status in REDIRECT_STATUSES:
        raise UnseenError("redirected again")
    if answer.status in _URL_REFUSALS and not refused:
        raise UnseenError(f"refused with {answer.status}")
    return answer


# Tags and referrers.


def tags_type(seen: Seen) -> Judgement:
    """A page of tags is called text/plain."""
    answer = seen.good("tags")
    if _type(answer) == "text/plain":
        return _documented("text/plain")
    return _otherwise(_shown(answer), "takes the page, whatever the type")


def tags_next(seen: Seen) -> Judgement:
    """The next page of tags is named by an absolute Link."""
    answer = seen.good("tags")
    link = answer.headers.get("link")
    if link is None:
        tags = _members(answer.body, "tags")
        if tags is None:
            return _defect("no list of tags", "answers 502")
        if len(tags) > 1:
            return _otherwise("more tags than were asked for", "hands the page on")
        raise UnseenError("there is no other page")
    target = next_target(link)
    if target is None or not urlsplit(target).query:
        return _defect("a Link that leads nowhere", "hands the page on as the last one")
    if target.startswith(f"{seen.registry}/"):
        return _documented("an absolute Link")
    return _otherwise("a relative Link, or one to another host", "uses the query of it alone")


def tags_limit(seen: Seen) -> Judgement:
    """More than 1,000 tags at once are refused with 405."""
    status = seen.answer("many-tags").status
    if status == 405:  # noqa: PLR2004
        return _documented("405")
    if status in (401, 403, 404):
        raise UnseenError(f"refused with {status}")
    return _otherwise(f"{status}", "asks for 1,000 at most")


def referrers(seen: Seen) -> Judgement:
    """Referrers come as one index."""
    answer = seen.answer("referrers")
    if answer.status in (404, 405, 406):
        return _otherwise(f"refused with {answer.status}", "hands that on: clients fall back to tags")
    if not _is_index(seen.good("referrers")):
        return _defect("no index", "answers 502")
    if "link" in answer.headers:
        return _otherwise("an index in pages", "hands pages on")
    return _documented("an index, whole")


def referrers_of_nothing(seen: Seen) -> Judgement:
    """Referrers of what does not exist are an empty index."""
    answer = seen.answer("no-referrers")
    if answer.status in (401, 403):
        raise UnseenError(f"refused with {answer.status}")
    if answer.status == 200:  # noqa: PLR2004
        return _documented("an empty index") if _is_index(answer) else _defect("no index", "answers 502")
    if answer.status in (404, 405, 406) and _refusal(answer).is_registry_error:
        return _otherwise(f"{answer.status}", "hands that on")
    return _defect(f"{answer.status}", "answers 502 or 404, in words of its own")


def _is_index(answer: Contact) -> bool:
    try:
        named = index_type(answer.headers.get("content-type", ""), answer.body)
    except ValueError:
        return False
    return named in INDEX_TYPES and _members(answer.body, "manifests") is not None


def _members(body: bytes, name: str) -> list[object] | None:
    try:
        found = json.loads(body)[name]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return found if isinstance(found, list) else None


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
