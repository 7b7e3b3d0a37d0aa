"""
The doctor's requests to ECR about one image, as data, and the responses. Pure.

Rules:

- All requests are GET or HEAD. Of a blob, only single bytes are requested; of any response, C{most} bytes are read.
- Requests that begin with a slash go to the registry, with the token. All others go elsewhere, without it.
- A request is skipped if no earlier response has filled its placeholders.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from ecrproxy.command.checkup.reach import Contact
from ecrproxy.documents import Document, listed
from ecrproxy.oci import INDEX_TYPES, MANIFEST_LIMIT, MANIFEST_TYPES, Descriptor, Digest, Kind
from ecrproxy.registry.headers import REDIRECT_STATUSES
from ecrproxy.registry.upstream import resolved

OCI: Final = "application/vnd.oci.image.manifest.v1+json"
SCHEMA2: Final = "application/vnd.docker.distribution.manifest.v2+json"
TWINS: Final = {OCI: SCHEMA2, SCHEMA2: OCI}
"""Media types that ECR converts into each other."""
ACCEPT: Final = {"Accept": ", ".join(sorted(MANIFEST_TYPES))}
NOTHING: Final = "ecr-proxy-doctor-no-such-name"
"""A tag and a repository that should not exist."""

_LIST_BYTES: Final = 64 * 2**10
_BUCKET_BYTES: Final = 1024
_NO_TOKEN: Final = "Basic " + base64.b64encode(b"AWS:no-token").decode()
_SIGNATURE: Final = re.compile(r"(?<=X-Amz-Signature=)[0-9a-fA-F]+")


@dataclass(frozen=True, slots=True)
class DoctorRequest:
    """
    One request.

    @ivar target: with placeholders for values from earlier responses.
    @ivar most: maximum bytes of the body to read.
    """

    name: str
    target: str
    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict)
    most: int = _LIST_BYTES


QUESTIONS: Final = (
    DoctorRequest("head", "/v2/{repository}/manifests/{tag}", "HEAD", ACCEPT),
    DoctorRequest("manifest", "/v2/{repository}/manifests/{tag}", headers=ACCEPT, most=MANIFEST_LIMIT + 1),
    DoctorRequest("image", "/v2/{repository}/manifests/{image}", headers=ACCEPT, most=MANIFEST_LIMIT + 1),
    DoctorRequest(
        "converted", "/v2/{repository}/manifests/{tag}", headers={"Accept": "{twin}"}, most=MANIFEST_LIMIT + 1
    ),
    DoctorRequest("blob-head", "/v2/{repository}/blobs/{blob}", "HEAD"),
    DoctorRequest("blob", "/v2/{repository}/blobs/{blob}", headers={"Range": "bytes=0-0"}, most=_BUCKET_BYTES),
    DoctorRequest("part", "{location}", headers={"Range": "bytes=1-2"}, most=_BUCKET_BYTES),
    DoctorRequest("parts", "{location}", headers={"Range": "bytes=0-0,2-2"}, most=_BUCKET_BYTES),
    DoctorRequest("forged", "{forged}", headers={"Range": "bytes=0-0"}, most=_BUCKET_BYTES),
    DoctorRequest("tags", "/v2/{repository}/tags/list?n=1"),
    DoctorRequest("many-tags", "/v2/{repository}/tags/list?n=10000"),
    DoctorRequest("referrers", "/v2/{repository}/referrers/{digest}", most=MANIFEST_LIMIT + 1),
    DoctorRequest("no-referrers", "/v2/{repository}/referrers/{nothing}"),
    DoctorRequest("no-tag", f"/v2/{{repository}}/manifests/{NOTHING}", headers=ACCEPT),
    DoctorRequest("no-repository", f"/v2/{NOTHING}/manifests/{NOTHING}", headers=ACCEPT),
    DoctorRequest("no-token", "/v2/{repository}/manifests/{tag}", headers={**ACCEPT, "Authorization": _NO_TOKEN}),
)
"""In the order of the requests."""

Ask = Callable[[DoctorRequest], Contact]
"""Sends a request without placeholders."""


class UnseenError(Exception):
    """
    A response that is needed for a judgement is missing; the message says why.
    """


@dataclass(frozen=True, slots=True)
class Seen:
    """
    The responses.

    @ivar answers: by the name of the question.
    @ivar known: the values of the placeholders.
    @ivar registry: its URL.
    @ivar token_seconds: lifetime of a fresh token; None if there is none.
    @ivar bucket: the addresses of the blob's host.
    """

    answers: Mapping[str, Contact]
    known: Mapping[str, str]
    registry: str
    token_seconds: float | None = None
    bucket: Sequence[str] = ()

    def answer(self, name: str) -> Contact:
        """
        Return a response.

        @raise UnseenError: if there is none, or only a temporary failure.
        """
        found = self.answers.get(name)
        if found is None:
            raise UnseenError("not asked: an earlier response is missing, or time is up")
        if not found.status:
            raise UnseenError("no answer")
        if found.status == 429 or found.status >= 500:  # noqa: PLR2004
            raise UnseenError(f"{found.status}, which may be temporary")
        return found

    def good(self, name: str) -> Contact:
        """
        Return a response with status 200.

        @raise UnseenError: if there is none.
        """
        found = self.answer(name)
        if found.status != 200:  # noqa: PLR2004
            raise UnseenError(f"refused with {found.status}")
        return found


def interview(ask: Ask, registry: str, repository: str, tag: str, *, in_time: Callable[[], bool]) -> Seen:
    """
    Send all requests whose placeholders are known.

    @param in_time: returns True if there is time for another request.
    """
    known = {"repository": repository, "tag": tag, "nothing": str(Digest.of(NOTHING.encode()))}
    answers: dict[str, Contact] = {}
    for question in QUESTIONS:
        filled = _filled(question, known)
        if filled is not None and in_time():
            answers[question.name] = ask(filled)
            known |= _learned(question.name, answers[question.name], registry)
    return Seen(answers, known, registry)


def _filled(question: DoctorRequest, known: Mapping[str, str]) -> DoctorRequest | None:
    try:
        target = question.target.format_map(known)
        headers = {name: value.format_map(known) for name, value in question.headers.items()}
    except KeyError:
        return None
    return DoctorRequest(question.name, target, question.method, headers, question.most)


def _learned(name: str, answer: Contact, registry: str) -> dict[str, str]:
    """
    Return the placeholders for later requests.
    """
    if name == "blob" and answer.status in REDIRECT_STATUSES:
        location = resolved(registry, answer.headers.get("location"))
        if location is None:
            return {}
        forged = {"forged": _SIGNATURE.sub(lambda found: "0" * len(found[0]), location)}
        return {"location": location, **(forged if _SIGNATURE.search(location) else {})}
    if answer.status != 200:  # noqa: PLR2004
        return {}
    if name == "manifest":
        media_type, digest = own_type(answer), str(Digest.of(answer.body))
        inner = [str(each.digest) for kind, each in _listed(answer) if kind is Kind.MANIFEST]
        image = inner[:1] if media_type in INDEX_TYPES else [digest]
        twin = {"twin": TWINS[media_type]} if media_type in TWINS else {}
        return {"digest": digest, **twin, **({"image": image[0]} if image else {})}
    if name == "image":
        blobs = [each for kind, each in _listed(answer) if kind is Kind.BLOB]
        largest = max(blobs, key=lambda each: each.size, default=None)
        return {} if largest is None else {"blob": str(largest.digest), "size": str(largest.size)}
    return {}


def own_type(manifest: Contact) -> str:
    """
    Return a manifest's own media type, else the Content-Type.
    """
    try:
        found = Document.read(manifest.body).own_type
    except ValueError:
        found = None
    return found or manifest.headers.get("content-type", "").partition(";")[0].strip().lower()


def _listed(manifest: Contact) -> Iterator[tuple[Kind, Descriptor]]:
    try:
        yield from listed(manifest.body, own_type(manifest))
    except ValueError:
        return
