"""
How an answer of ECR compares with what the daemon assumes.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final

from ecrproxy.command.checkup.reach import Contact
from ecrproxy.oci import MANIFEST_TYPES
from ecrproxy.registry.refusals import Refusal

BLOB_TYPE: Final = "application/octet-stream"
PAGES: Final = frozenset({"text/html", "application/xhtml+xml"})
SHOWN_TYPES: Final = MANIFEST_TYPES | PAGES | {BLOB_TYPE, "binary/octet-stream", "text/plain", "application/json"}

HEAD_REFUSALS: Final = frozenset({400, 401, 403, 404, 405})
LAYERS: Final = re.compile(
    r"prod-([a-z0-9-]+)-starport-layer-bucket\.s3\.(?:dualstack\.)?\1\.amazonaws\.(?:com|com\.cn|eu)"
)
LENGTH: Final = re.compile(r"[0-9]{1,18}")


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


def documented(said: str) -> Judgement:
    """
    It is as documented.
    """
    return Judgement(Outcome.DOCUMENTED, said)


def otherwise(said: str, daemon: str) -> Judgement:
    """
    It is not, and the daemon copes.
    """
    return Judgement(Outcome.OTHERWISE, said, daemon)


def defect(said: str, daemon: str) -> Judgement:
    """
    It is not, and the daemon does not cope.
    """
    return Judgement(Outcome.DEFECT, said, daemon)


def type_of(contact: Contact) -> str:
    """
    Return the media type of an answer, without parameters.
    """
    return contact.headers.get("content-type", "").partition(";")[0].strip().lower()


def shown(contact: Contact) -> str:
    """
    Return a Content-Type in publishable words.
    """
    named = type_of(contact)
    return named if named in SHOWN_TYPES else "another type" if named else "no type"


def refusal_in(answer: Contact) -> Refusal:
    """
    Read the refusal in an answer.
    """
    return Refusal.read(answer.status, answer.body, challenged="www-authenticate" in answer.headers)
