"""
Which entries and which content a purge removes. Pure.

Rules:

- What is named goes, and what it alone leads to. What anything else in its repository leads to stays.
- Content goes when no entry is left, of any repository, that leads to it.
- With an age, everything is judged by its own last use instead, as when room is made: an old layer of a young image
  goes, for nobody has fetched it in that time.
- What was never named by an entry, such as what is just arriving, is touched only by its digest or by its age.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ecrproxy.command.naming import Naming, Pattern
from ecrproxy.command.survey import Held, Survey
from ecrproxy.oci import Digest

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_AGE = re.compile(r"([0-9]{1,9})([smhdw])")


_ALL = Pattern("*")


@dataclass(frozen=True, slots=True)
class Target:
    """
    What a person wants purged. Repository and tag are patterns; what is none matches all.
    """

    repository: Pattern = _ALL
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str, naming: Naming) -> Target:
        """
        Read C{repository}, C{repository:tag}, C{repository@digest} or C{digest}; each repository may have a registry.

        @raise ValueError: if it is none of these.
        """
        if text.startswith(("sha256:", "sha512:")):
            return cls(digest=str(Digest.parse(text)))
        repository, at, digest = text.partition("@")
        if at:
            return cls(naming.meant(_named(repository)), digest=str(Digest.parse(digest)))
        folder, slash, last = text.rpartition("/")  # a host may have a port
        repository, colon, tag = last.partition(":")
        if (colon and not tag) or ":" in tag:
            raise ValueError(f"{text!r}: give a repository, repository:tag, repository@digest or a digest")
        return cls(naming.meant(_named(folder + slash + repository)), tag or None)

    def names(self, entry: Held) -> bool:
        """
        Tell whether it names an entry of its repository.
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
    Read an age, in seconds.

    @raise ValueError: if it is none.
    """
    found = _AGE.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r}: not an age; give one such as 30d, 12h or 2w")
    return int(found[1]) * _UNITS[found[2]]


@dataclass(frozen=True, slots=True)
class Chosen:
    """
    What would go.
    """

    entries: Sequence[Held]
    content: Sequence[str]


def chosen(survey: Survey, targets: Sequence[Target], naming: Naming, before: float | None = None) -> Chosen:
    """
    Choose what goes.

    @param targets: what is named; nothing for everything.
    @param before: what was used after this moment stays, if there is one.
    """
    repositories = survey.by_repository(naming.called).values()
    entries = [each for entries in repositories for each in _named_by(survey, targets, naming, entries)]
    digests = {digest for each in entries for digest in each.digests}
    named = {each.digest for each in targets if each.digest is not None}
    if before is not None:
        candidates = digests | named if targets else survey.content.keys()
        return Chosen(
            [each for each in entries if each.used <= before],
            sorted(each for each in candidates if each in survey.content and survey.content[each].used <= before),
        )
    going = {each.name for each in entries}
    staying = {digest for each in survey.entries if each.name not in going for digest in each.digests}
    content = (digests - survey.reached(staying)) | (named - staying)
    return Chosen(entries, sorted(content & survey.content.keys()))


def _named_by(survey: Survey, targets: Sequence[Target], naming: Naming, entries: Sequence[Held]) -> list[Held]:
    """
    Choose among one repository's entries those that are named, and those of what they alone lead to.
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
