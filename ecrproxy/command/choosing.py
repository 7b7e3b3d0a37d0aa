"""
Selecting the entries and content that a purge removes. Pure.

Rules:

- Named entries are removed, with what only they reference. What other entries of the repository reference stays.
- Content is removed when no entry of any repository references it.
- With an age, each file is selected by its own last use instead, as for eviction: an old layer of a recent image is
  removed, because no client has fetched it in that time.
- Content that never had an entry, such as a running download, is only selected by its digest or age.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ecrproxy.command.naming import Naming, Pattern
from ecrproxy.command.survey import CacheEntry, Survey
from ecrproxy.oci import Digest

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_AGE = re.compile(r"([0-9]{1,9})([smhdw])")


_ALL = Pattern("*")


@dataclass(frozen=True, slots=True)
class PurgeTarget:
    """
    What the user wants to purge. Repository and tag are patterns; None matches all.
    """

    repository: Pattern = _ALL
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str, naming: Naming) -> PurgeTarget:
        """
        Parse C{repository}, C{repository:tag}, C{repository@digest} or C{digest}; a repository may have a registry.

        @raise ValueError: if the text is invalid.
        """
        if text.startswith(("sha256:", "sha512:")):
            return cls(digest=str(Digest.parse(text)))
        repository, at, digest = text.partition("@")
        if at:
            return cls(naming.meant(_named(repository)), digest=str(Digest.parse(digest)))
        folder, slash, last = text.rpartition("/")  # a host may have a port, with a colon
        repository, colon, tag = last.partition(":")
        if (colon and not tag) or ":" in tag:
            raise ValueError(f"{text!r}: give a repository, repository:tag, repository@digest or a digest")
        return cls(naming.meant(_named(folder + slash + repository)), tag or None)

    def names(self, entry: CacheEntry) -> bool:
        """
        Return True if the target includes an entry of its repository.
        """
        if self.digest is not None:
            return self.digest in entry.digests
        return self.tag is None or (entry.tag is not None and fnmatchcase(entry.tag, self.tag))


def _named(repository: str) -> str:
    if not repository:
        raise ValueError("a repository's name is missing; give * for all")
    return repository


def parse_age(text: str) -> int:
    """
    Parse an age, in seconds.

    @raise ValueError: if the text is invalid.
    """
    found = _AGE.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r}: not an age; give one such as 30d, 12h or 2w")
    return int(found[1]) * _UNITS[found[2]]


@dataclass(frozen=True, slots=True)
class Selection:
    """
    The entries and content to remove.
    """

    entries: Sequence[CacheEntry]
    content: Sequence[str]


def chosen(survey: Survey, targets: Sequence[PurgeTarget], naming: Naming, before: float | None = None) -> Selection:
    """
    Select what to remove.

    @param targets: what the user named; empty for everything.
    @param before: keep what was used after this time; None to ignore the age.
    """
    repositories = survey.by_repository(naming.called).values()
    entries = [each for entries in repositories for each in _named_by(survey, targets, naming, entries)]
    digests = {digest for each in entries for digest in each.digests}
    named = {each.digest for each in targets if each.digest is not None}
    if before is not None:
        candidates = digests | named if targets else survey.content.keys()
        return Selection(
            [each for each in entries if each.used <= before],
            sorted(each for each in candidates if each in survey.content and survey.content[each].used <= before),
        )
    going = {each.name for each in entries}
    staying = {digest for each in survey.entries if each.name not in going for digest in each.digests}
    content = (digests - survey.reached(staying)) | (named - staying)
    return Selection(entries, sorted(content & survey.content.keys()))


def _named_by(
    survey: Survey, targets: Sequence[PurgeTarget], naming: Naming, entries: Sequence[CacheEntry]
) -> list[CacheEntry]:
    """
    Select from one repository's entries the named ones, and those that only they reference.
    """
    here = [each for each in targets if naming.is_of(each.repository, entries[0].repository)]
    if not targets or any(each.tag is None and each.digest is None for each in here):
        return list(entries)
    named = {entry.name for entry in entries if any(each.names(entry) for each in here)}
    roots = {digest for entry in entries if entry.name in named for digest in entry.digests}
    reached = survey.reached(roots)
    others = {
        digest
        for entry in entries
        if entry.name not in named and entry.manifest
        for digest in entry.digests
        if entry.tag is not None or digest not in reached
    }
    lost = reached - survey.reached(others)
    return [entry for entry in entries if entry.name in named or (entry.tag is None and lost.issuperset(entry.digests))]
