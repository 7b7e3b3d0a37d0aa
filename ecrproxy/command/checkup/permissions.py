"""
Checks of the permissions in ECR by using them: each request of a pull once, in one repository.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Final

from ecrproxy.command.checkup.account import judge_call
from ecrproxy.command.checkup.findings import Finding, skipped
from ecrproxy.command.checkup.reach import Contact
from ecrproxy.documents import Document, listed
from ecrproxy.oci import MANIFEST_TYPES, Digest, Kind
from ecrproxy.registry.headers import REDIRECT_STATUSES
from ecrproxy.registry.refusals import Refusal

ACCEPT: Final = {"Accept": ", ".join(sorted(MANIFEST_TYPES))}
_OK: Final = frozenset({200})
_OK_OR_ELSEWHERE: Final = frozenset({200, 206, *REDIRECT_STATUSES})
_ONE_BYTE: Final = {"Range": "bytes=0-0"}

Ask = Callable[[str, str, Mapping[str, str]], Contact]
"""Sends method, path and headers to the registry, with the token."""


class Trial:
    """
    Requests for one repository's tags, a manifest, a blob and referrers.

    @ivar location: the URL of the blob. It grants access to anyone, so it is never shown.
    """

    def __init__(self, ask: Ask, repository: str) -> None:
        self._ask, self._repository = ask, repository
        self.findings: list[Finding] = []
        self.location = ""

    def run(self, reference: str | None) -> None:
        """
        Send the requests.

        @param reference: a tag or digest; None for the first tag in the list.
        """
        tags = self._attempt("ecr:ListImages", "GET", "/tags/list?n=1")
        reference = reference or _first_tag(tags)
        if reference is None:
            advice = f"give one: --repository {self._repository}:TAG"
            self.findings.append(skipped("ecr:BatchGetImage", "no image to test with", advice))
            return
        manifest = self._attempt("ecr:BatchGetImage", "GET", f"/manifests/{reference}", ACCEPT)
        if manifest is None:
            return
        self._try_blob(manifest)
        self._attempt("ecr:ListImageReferrers", "GET", f"/referrers/{Digest.of(manifest.body)}")

    def _try_blob(self, manifest: Contact) -> None:
        if (inner := _first(manifest, Kind.MANIFEST)) is not None:
            manifest = self._ask("GET", f"/v2/{self._repository}/manifests/{inner}", ACCEPT)
        blob = _first(manifest, Kind.BLOB)
        if blob is None:
            self.findings.append(skipped("ecr:GetDownloadUrlForLayer", "the manifest lists nothing to test with"))
            return
        self._attempt("ecr:BatchCheckLayerAvailability", "HEAD", f"/blobs/{blob}", good=_OK_OR_ELSEWHERE)
        found = self._attempt("ecr:GetDownloadUrlForLayer", "GET", f"/blobs/{blob}", _ONE_BYTE, good=_OK_OR_ELSEWHERE)
        self.location = found.headers.get("location", "") if found is not None else ""

    def _attempt(
        self,
        action: str,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        good: Collection[int] = _OK,
    ) -> Contact | None:
        """
        Send a request that needs an action; return None if it is refused.
        """
        answer = self._ask(method, f"/v2/{self._repository}{path}", headers or {})
        if answer.status in good:
            self.findings.append(judge_call(action, answer.status, "", good))
            return answer
        said = Refusal.read(answer.status, answer.body, challenged=False).message or answer.problem
        if answer.status == 403 and method == "HEAD":  # noqa: PLR2004 (responses to HEAD have no message)
            said = f"not authorized to perform: {action}"
        self.findings.append(judge_call(action, answer.status, said, good))
        return None


def _first(manifest: Contact, wanted: Kind) -> Digest | None:
    """
    Return a small blob of a manifest, which is the config; or the last manifest of an index.
    """
    try:
        media_type = Document.read(manifest.body).own_type or manifest.headers.get("content-type", "")
        found = [descriptor.digest for kind, descriptor in listed(manifest.body, media_type) if kind is wanted]
    except ValueError:
        return None
    return found[-1] if found else None


def _first_tag(tags: Contact | None) -> str | None:
    try:
        return str(json.loads(tags.body)["tags"][0]) if tags is not None else None
    except (ValueError, LookupError, TypeError):
        return None
