"""
What the daemon assumes about lists of tags and of referrers.
"""

from __future__ import annotations

import json
from urllib.parse import urlsplit

from ecrproxy.command.checkup.judgement import (
    Judgement,
    defect,
    documented,
    otherwise,
    refusal_in,
    shown,
    type_of,
)
from ecrproxy.command.checkup.questions import Seen, UnseenError
from ecrproxy.command.checkup.reach import Contact
from ecrproxy.documents import index_type
from ecrproxy.oci import INDEX_TYPES
from ecrproxy.registry.links import next_target


def tags_type(seen: Seen) -> Judgement:
    """A page of tags is called text/plain."""
    answer = seen.good("tags")
    if type_of(answer) == "text/plain":
        return documented("text/plain")
    return otherwise(shown(answer), "takes the page, whatever the type")


def tags_next(seen: Seen) -> Judgement:
    """The next page of tags is named by an absolute Link."""
    answer = seen.good("tags")
    link = answer.headers.get("link")
    if link is None:
        tags = _members(answer.body, "tags")
        if tags is None:
            return defect("no list of tags", "answers 502")
        if len(tags) > 1:
            return otherwise("more tags than were asked for", "hands the page on")
        raise UnseenError("there is no other page")
    target = next_target(link)
    if target is None or not urlsplit(target).query:
        return defect("a Link that leads nowhere", "hands the page on as the last one")
    if target.startswith(f"{seen.registry}/"):
        return documented("an absolute Link")
    return otherwise("a relative Link, or one to another host", "uses the query of it alone")


def tags_limit(seen: Seen) -> Judgement:
    """More than 1,000 tags at once are refused with 405."""
    status = seen.answer("many-tags").status
    if status == 405:  # noqa: PLR2004
        return documented("405")
    if status in (401, 403, 404):
        raise UnseenError(f"refused with {status}")
    return otherwise(f"{status}", "asks for 1,000 at most")


def referrers(seen: Seen) -> Judgement:
    """Referrers come as one index."""
    answer = seen.answer("referrers")
    if answer.status in (404, 405, 406):
        return otherwise(f"refused with {answer.status}", "hands that on: clients fall back to tags")
    if not _is_index(seen.good("referrers")):
        return defect("no index", "answers 502")
    if "link" in answer.headers:
        return otherwise("an index in pages", "hands pages on")
    return documented("an index, whole")


def referrers_of_nothing(seen: Seen) -> Judgement:
    """Referrers of what does not exist are an empty index."""
    answer = seen.answer("no-referrers")
    if answer.status in (401, 403):
        raise UnseenError(f"refused with {answer.status}")
    if answer.status == 200:  # noqa: PLR2004
        return documented("an empty index") if _is_index(answer) else defect("no index", "answers 502")
    if answer.status in (404, 405, 406) and refusal_in(answer).is_registry_error:
        return otherwise(f"{answer.status}", "hands that on")
    return defect(f"{answer.status}", "answers 502 or 404, in words of its own")


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
