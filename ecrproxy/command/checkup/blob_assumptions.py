"""
What the daemon assumes about blobs, and about the buckets that have them.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import parse_qs, urlsplit

from ecrproxy.command.checkup.judgement import (
    BLOB_TYPE,
    HEAD_REFUSALS,
    LAYERS,
    LENGTH,
    PAGES,
    Judgement,
    defect,
    documented,
    otherwise,
    shown,
    type_of,
)
from ecrproxy.command.checkup.questions import Seen, UnseenError
from ecrproxy.command.checkup.reach import Contact
from ecrproxy.registry.bucket_errors import said_by_bucket
from ecrproxy.registry.headers import REDIRECT_STATUSES, told_part

_URL_SECONDS: Final = "3600"
_SECONDS: Final = re.compile(r"[0-9]{1,9}")
_URL_REFUSALS: Final = frozenset({400, 401, 403, 404, 410})


def blob_head(seen: Seen) -> Judgement:
    """HEAD of a blob works."""
    status = seen.answer("blob-head").status
    if status == 200:  # noqa: PLR2004
        return documented("200")
    if status in REDIRECT_STATUSES or status in HEAD_REFUSALS:
        return otherwise(f"{status}", "sends a GET for one byte")
    return defect(f"{status}", "answers 502")


def blob_head_type(seen: Seen) -> Judgement:
    """HEAD of a blob is of no particular type."""
    answer = seen.good("blob-head")
    if type_of(answer) == BLOB_TYPE:
        return documented(BLOB_TYPE)
    if type_of(answer) in PAGES and "docker-content-digest" not in answer.headers:
        return otherwise(
            f"{shown(answer)}, without a digest", "sends a GET for one byte: it may be another server's page"
        )
    return otherwise(shown(answer), "does not look at it")


def blob_head_length(seen: Seen) -> Judgement:
    """HEAD of a blob has the length that the manifest gives."""
    length = seen.good("blob-head").headers.get("content-length", "")
    if not LENGTH.fullmatch(length):
        return otherwise("no length", "sends a GET for one byte")
    if int(length) == int(seen.known["size"]):
        return documented("the length that the manifest gives")
    return defect("another length than the manifest gives", "uses it as the blob's size")


def blob_redirect(seen: Seen) -> Judgement:
    """GET of a blob redirects with 307."""
    status = seen.answer("blob").status
    if status in REDIRECT_STATUSES:
        if "location" not in seen.known:
            return defect(f"{status} to nowhere that the daemon goes", "answers 502")
        if status == 307:  # noqa: PLR2004
            return documented("307")
        return otherwise(f"{status}", "follows it")
    if status in (200, 206):
        return otherwise(f"{status}: the bytes themselves", "takes them")
    if status in (401, 403, 404):
        raise UnseenError(f"refused with {status}")
    return defect(f"{status}", "answers 502")


def redirect_host(seen: Seen) -> Judgement:
    """Blobs lie in the region's bucket for layers."""
    host = urlsplit(_location(seen)).hostname or ""
    if LAYERS.fullmatch(host):
        return documented("the region's bucket for layers")
    where = next((end for end in (".amazonaws.com", ".cloudfront.net") if host.endswith(end)), "")
    said = f"another host{f' of {where[1:]}' if where else ''}"
    return otherwise(said, "goes where ECR says, but for loopback and link-local addresses")


def redirect_expiry(seen: Seen) -> Judgement:
    """The URL that ECR signs is good for an hour."""
    told = parse_qs(urlsplit(_location(seen)).query).get("X-Amz-Expires", [""])[0]
    if told == _URL_SECONDS:
        return documented(f"{told} s")
    said = f"{told} s" if _SECONDS.fullmatch(told) else "not said"
    return otherwise(said, "asks ECR for another URL when one is refused")


def bucket_addresses(seen: Seen) -> Judgement:
    """The bucket has IPv4 addresses alone."""
    _location(seen)
    if not seen.bucket:
        raise UnseenError("not looked up")
    if not any(":" in address for address in seen.bucket):
        return documented("IPv4 alone")
    return otherwise("IPv6 as well", "tries all addresses that the name resolves to")


def bucket_range(seen: Seen) -> Judgement:
    """The bucket gives the range that it is asked for."""
    answer, size = _from_bucket(seen, "part"), int(seen.known["size"])
    if size < 3:  # noqa: PLR2004
        raise UnseenError("the blob is too small")
    if answer.status == 200:  # noqa: PLR2004
        return otherwise("the whole", "cuts it")
    if answer.status != 206:  # noqa: PLR2004
        return defect(f"{answer.status}", "answers 502")
    part = told_part(answer.headers.get("content-range"), 1, 3)
    if part is None:
        return defect("206 with another range", "answers 502")
    if part[1] != size:
        return defect("206 of another size than the manifest gives", "answers 502")
    return documented("206") if part[0] == 3 else otherwise("less than was asked for", "asks for the rest")  # noqa: PLR2004


def bucket_ranges(seen: Seen) -> Judgement:
    """Several ranges at once give the whole."""
    answer = _from_bucket(seen, "parts")
    if answer.status == 200:  # noqa: PLR2004
        return documented("the whole")
    several = answer.headers.get("content-type", "").lower().startswith("multipart/byteranges")
    said = f"{answer.status}{', multipart' if several else ''}"
    return otherwise(said, "asks for one range at a time in any case")


def bucket_refusal(seen: Seen) -> Judgement:
    """A URL whose signature is not right is 403, as one that has expired."""
    status = _from_bucket(seen, "forged", refused=True).status
    if status == 403:  # noqa: PLR2004
        return documented("403")
    if status in _URL_REFUSALS:
        return otherwise(f"{status}", "asks ECR for another URL, once")
    if status in (200, 206):
        return otherwise(f"{status}: signatures are not looked at", "needs no other URL")
    return defect(f"{status}", "does not ask for another URL: 502")


def bucket_words(seen: Seen) -> Judgement:
    """The bucket's errors have S3's Code and Message."""
    answer = _from_bucket(seen, "forged", refused=True)
    if answer.status < 400:  # noqa: PLR2004
        raise UnseenError("nothing was refused")
    if said_by_bucket(answer.body):
        return documented("S3's words")
    return otherwise("other words", "logs the status alone")


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
