"""
Answers /contents: what the cache has of all registries, of one, of a repository, or of an image.

Rules: the index and manifests are read step by step in a thread, and a page has a fixed number of rows. If the client
disconnects, the work ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final, TypeVar, cast
from urllib.parse import unquote_plus

from twisted.web.template import flattenString

from ecrproxy.admin.contents_page import ContentsPage, ContentsShown
from ecrproxy.admin.page import DOCTYPE
from ecrproxy.cache.cells import File
from ecrproxy.cache.contents import Contents, HeldImage, ImagePart
from ecrproxy.cache.repository_rows import Weight
from ecrproxy.http.answering import Answering, send_body
from ecrproxy.http.request import RegistryRequest
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.oci import Digest, RegistryError, query_values

if TYPE_CHECKING:
    from twisted.web.server import Request

    from ecrproxy.admin.status import Status
    from ecrproxy.threads import InThread

T = TypeVar("T")

ROWS: Final = 100
"""Maximum number of repositories, images or parts on a page."""
_STEPS: Final = 50
"""Steps in one call of a thread: some milliseconds."""


class ContentsView(Answering):
    """
    The pages of the cache's contents.

    @param status: knows what clients were sent.
    @param in_thread: runs disk accesses.
    """

    def __init__(self, contents: Contents, status: Status, in_thread: InThread) -> None:
        super().__init__()
        self._contents, self._status, self._in_thread = contents, status, in_thread

    async def respond(self, request: Request) -> None:
        """
        Send the page for the registry, repository and image in the query.

        @raise RegistryError: if there is no such image, or the index can't be read.
        """
        query = query_values(cast(RegistryRequest, request).target.query)
        # An empty name is none: the buttons would mean the whole registry, which such a page does not show.
        asked = {name: unquote_plus(value) for name, value in query.items() if value}
        try:
            shown = await self._shown(asked)
        except OSError as problem:
            raise RegistryError(503, "UNAVAILABLE", f"the cache's index can't be read: {problem}") from problem
        page = await flattenString(request, ContentsPage(shown))
        await send_body(request, 200, "text/html; charset=utf-8", DOCTYPE + page)

    async def _shown(self, asked: Mapping[str, str]) -> ContentsShown:
        registry = RegistryId(asked["registry"]) if "registry" in asked else None
        if registry is None or "repository" not in asked:
            return await self._repositories(registry, asked)
        repository = Repository(registry, asked["repository"])
        if "image" in asked:
            return await self._image(repository, asked["image"])
        return await self._repository(repository, asked)

    async def _repositories(self, registry: RegistryId | None, asked: Mapping[str, str]) -> ContentsShown:
        after = None
        if "after" in asked:
            after = Repository(RegistryId(asked.get("of", str(registry or ""))), asked["after"])
        found = await self._some(self._contents.repositories(registry, after), ROWS + 1)
        last = found[ROWS - 1].repository if len(found) > ROWS else None
        return ContentsShown(
            when=self._status.now(),
            registry=registry,
            total=self._contents.total if registry is None else None,
            repositories=found[:ROWS],
            first=after is None,
            next={} if last is None else {"of": str(last.registry), "after": last.name},
        )

    async def _repository(self, repository: Repository, asked: Mapping[str, str]) -> ContentsShown:
        by_digest, after = asked.get("by") == "digest", asked.get("after", "")
        listed: Iterator[HeldImage | None] = self._contents.tagged(repository, after)
        if by_digest:
            listed = self._contents.manifests(repository, _digest(after) if after else None)
        found = await self._some(listed, ROWS + 1)
        total = Weight()
        for weight in await self._some(self._contents.weigh(repository), None):
            total = total.plus(weight)
        called = self._status.called(repository)
        return ContentsShown(
            when=self._status.now(),
            registry=repository.registry,
            repository=repository,
            by_digest=by_digest,
            total=total,
            images=found[:ROWS],
            askers=self._status.figures.served.askers.of(called),
            saved=self._status.figures.served.saved.of(called),
            first=not after,
            next={"after": found[ROWS - 1].reference} if len(found) > ROWS else {},
        )

    async def _image(self, repository: Repository, reference: str) -> ContentsShown:
        if ":" in reference:
            _digest(reference)
        image = await self._in_thread(self._contents.image, repository, reference)
        if image is None:
            raise RegistryError(404, "MANIFEST_UNKNOWN", "the cache knows nothing of such an image")
        parts = await self._some(self._parts(self._contents.parts(image.roots, ROWS)), ROWS)
        moves = [] if ":" in reference else await self._in_thread(self._contents.moves, repository, reference)
        ways = {reference, *(str(each.descriptor.digest) for each, _ in parts)}
        return ContentsShown(
            when=self._status.now(),
            registry=repository.registry,
            repository=repository,
            image=image,
            parts=parts,
            left_out=max(0, image.parts - len(parts)) if image.whole else None,
            askers=[
                each
                for each in self._status.figures.served.askers.of(self._status.called(repository))
                if each.reference in ways
            ],
            moves=moves,
        )

    def _parts(self, parts: Iterator[ImagePart]) -> Iterator[tuple[ImagePart, File | None]]:
        for each in parts:
            yield each, self._contents.known(each.descriptor.digest)

    async def _some(self, listed: Iterator[T | None], most: int | None) -> list[T]:
        """
        Read the first C{most} items of a list in a thread, or all.
        """
        found = list[T]()
        while most is None or len(found) < most:
            steps = _STEPS if most is None else min(_STEPS, most - len(found))
            some = await self._in_thread(_next, listed, steps)
            found += [each for each in some if each is not None]
            if len(some) < steps:
                break
        return found


def _next(listed: Iterator[T], count: int) -> list[T]:
    return list(itertools.islice(listed, count))


def _digest(text: str) -> Digest:
    """
    @raise RegistryError: if it is none.
    """
    try:
        return Digest.parse(text)
    except ValueError as problem:
        raise RegistryError(400, "DIGEST_INVALID", str(problem)) from None
