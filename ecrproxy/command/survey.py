"""
The contents of a cache as users see them: repositories, tagged and untagged images, and their references. Pure.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ecrproxy.identity import RegistryId, Repository
from ecrproxy.oci import Kind


class CacheEntry(NamedTuple):
    """
    An entry: a reference in a repository, and what it resolved to.

    @ivar name: unique name of the entry.
    @ivar tag: the reference, unless it is a digest.
    @ivar digests: what it resolves to.
    @ivar used: last use, in seconds since the epoch.
    @ivar moves: what a tag resolved to before, newest first.
    """

    name: str
    manifest: bool
    repository: Repository
    tag: str | None
    digests: tuple[str, ...]
    used: float
    moves: Sequence[Any] = ()


class SurveyedFile(NamedTuple):
    """
    A file of content.
    """

    bytes: int
    used: float


@dataclass(frozen=True, slots=True)
class CachedImage:
    """
    A tag, or a manifest without a tag that no index lists.

    @ivar digests: of its manifests; several if clients requested different media types.
    @ivar bytes: size in the cache of everything that it references.
    """

    repository: Repository
    tag: str | None
    digests: Sequence[str]
    bytes: int
    used: float
    moves: Sequence[Any] = ()


@dataclass(slots=True)
class Survey:
    """
    The contents of a cache at one time.

    @ivar lists: what each manifest references.
    """

    entries: list[CacheEntry] = field(default_factory=list)
    content: dict[str, SurveyedFile] = field(default_factory=dict)
    lists: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Iterable[Any], content: Iterable[Any]) -> Survey:
        """
        Make a survey from the daemon's documents.
        """
        survey = cls()
        for told in content:
            survey.content[sys.intern(told["digest"])] = SurveyedFile(told["bytes"], told["used"])
        for told in entries:
            if "name" in told:  # else it tells of a step
                survey._take(told)
        return survey

    def _take(self, told: Mapping[str, Any]) -> None:
        for answer in told["answers"]:
            if answer.get("lists"):
                self.lists[sys.intern(answer["digest"])] = tuple(map(sys.intern, answer["lists"]))
        digests = tuple(sys.intern(answer["digest"]) for answer in told["answers"])
        tag = None if ":" in told["reference"] else told["reference"]
        named = told["registry"], told["repository"]
        repository = self._repositories.get(named)
        if repository is None:
            repository = self._repositories[named] = Repository(RegistryId(named[0]), named[1])
        manifest = told["kind"] == Kind.MANIFEST.value
        moves = told.get("moves", ())
        self.entries.append(CacheEntry(told["name"], manifest, repository, tag, digests, told["used"], moves))

    def reached(self, roots: Iterable[str]) -> set[str]:
        """
        Return C{roots} and everything that they reference, directly or not.
        """
        reached: set[str] = set()
        waiting = list(roots)
        while waiting:
            digest = waiting.pop()
            if digest not in reached:
                reached.add(digest)
                waiting += self.lists.get(digest, ())
        return reached

    def size(self, digests: Iterable[str]) -> int:
        """
        Return the bytes in the cache for C{digests}, each counted once.
        """
        return sum(self.content[each].bytes for each in set(digests) if each in self.content)

    def registries(self) -> set[RegistryId]:
        """
        Return the registries that have entries.
        """
        return {each.registry for each in self._repositories.values()}

    def by_repository(self, called: Callable[[Repository], str]) -> dict[Repository, list[CacheEntry]]:
        """
        Return the entries of each repository, sorted by displayed name.
        """
        found: defaultdict[Repository, list[CacheEntry]] = defaultdict(list)
        for each in self.entries:
            found[each.repository].append(each)
        return dict(sorted(found.items(), key=lambda item: called(item[0])))

    def images(self, entries: Iterable[CacheEntry]) -> list[CachedImage]:
        """
        Return the images among one repository's entries, those with a tag first.
        """
        tags: defaultdict[str, list[CacheEntry]] = defaultdict(list)
        single: defaultdict[str, list[CacheEntry]] = defaultdict(list)
        for each in entries:
            if each.tag is not None:
                tags[each.tag].append(each)
            elif each.manifest:
                for digest in each.digests:
                    single[digest].append(each)
        led_to = self.reached(digest for several in tags.values() for each in several for digest in each.digests)
        for digest in single:
            led_to |= self.reached(self.lists.get(digest, ()))
        left = {
            digest: several for digest, several in single.items() if digest not in led_to and digest in self.content
        }
        found = [self._image(tag, tags[tag]) for tag in sorted(tags)]
        return found + [self._image(None, left[digest]) for digest in sorted(left)]

    def _image(self, tag: str | None, entries: Sequence[CacheEntry]) -> CachedImage:
        digests = sorted({digest for each in entries for digest in each.digests})
        used = max(each.used for each in entries)
        moves = entries[0].moves if tag is not None else ()  # a tag's moves are the same for all cache keys
        return CachedImage(entries[0].repository, tag, digests, self.size(self.reached(digests)), used, moves)
