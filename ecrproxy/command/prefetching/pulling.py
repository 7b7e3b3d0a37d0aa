"""
One image or blob brought in: asked for as any client would, held against its digest, and thrown away.

Rules:

- What the cache has is not moved: a HEAD tells. So an interrupted run goes on where it was, blob by blob.
- A body that breaks off goes on from its last byte. Tries are counted anew whenever bytes have come.
- What may pass is tried again as the daemon does it: L{retries}. What else is wrong ends the image, not the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from typing import Any, Final, TypeVar

from ecrproxy.buffers import AT_ONCE
from ecrproxy.command.prefetching.door import Ask, Reply
from ecrproxy.command.prefetching.images import Image, target
from ecrproxy.command.prefetching.platforms import Offer, Platform, choose, may_hold, offers
from ecrproxy.oci import INDEX_TYPES, MANIFEST_LIMIT, MANIFEST_TYPES, Descriptor, Digest, Kind, Route, listed
from ecrproxy.reasons import Reason
from ecrproxy.registry.refusals import Refusal
from ecrproxy.registry.retries import TRANSIENT_STATUSES, Budget, TransientError, asked_wait, next_try

T = TypeVar("T")

ACCEPT: Final = ", ".join(sorted(MANIFEST_TYPES))
BUDGET: Final = Budget(tries=8, seconds=300.0)
"""With the waits between them a minute at the least: a daemon that is restarted has so long."""
IN_CACHE: Final = frozenset({"HIT", "REVALIDATED"})
"""What X-Cache-Status says to the HEAD of a blob whose bytes are there."""
INDEXES: Final = 100
"""The most indexes that an image may consist of, each counted for each platform that it is listed for."""
OFFERED: Final = 1000
"""The most manifests that these may list. Large images are for some twenty platforms, with an attestation for each."""
BLOBS: Final = 100_000
"""The most blobs that all these may list."""
_OK, _PARTIAL = 200, 206


class PullError(Exception):
    """
    An image can't be had: why, in one line.
    """


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What an image consists of.

    @ivar manifests: how many manifests were brought in.
    @ivar blobs: where its config and layers are asked for, and how many bytes each has.
    """

    manifests: int
    blobs: Mapping[Route, int]


@dataclass(frozen=True)
class Hands:
    """
    What pulling needs of the world.

    @ivar ask: asks the daemon.
    @ivar seconds: counts seconds on a clock that nobody sets.
    @ivar sleep: waits for so many; raises if there is no time any more.
    @ivar chance: gives random numbers from 0 to 1.
    @ivar said: told in a line why something is tried again.
    """

    ask: Ask
    seconds: Callable[[], float]
    sleep: Callable[[float], object]
    chance: Callable[[], float]
    said: Callable[[str], None] = lambda _: None


class Tries:
    """
    How often something failed in a row, since when.
    """

    def __init__(self, hands: Hands, budget: Budget = BUDGET) -> None:
        self._hands, self._budget = hands, budget
        self._failed, self._began = 0, hands.seconds()

    def progressed(self) -> None:
        """
        Count anew.
        """
        self._failed, self._began = 0, self._hands.seconds()

    def failed(self, what: str, problem: Exception) -> None:
        """
        Wait for the next try.

        @raise PullError: if there is none.
        """
        self._failed += 1
        asked = problem.wait if isinstance(problem, TransientError) else None
        elapsed = self._hands.seconds() - self._began
        # Half of each wait is sure: by bad luck all of them together would be over before a daemon has started.
        wait = next_try(self._budget, self._failed, elapsed, asked, (1 + self._hands.chance()) / 2)
        why = problem.message if isinstance(problem, TransientError) else str(problem) or type(problem).__name__
        if wait is None:
            raise PullError(why) from problem
        self._hands.said(f"{what}: {why}; again in {wait:.0f} s")
        self._hands.sleep(wait)


class Puller:
    """
    Pulls from one daemon.

    @param platforms: for which an index's images are pulled; for all of them if there are none.
    @param moved: told how many bytes have come, or, below zero, have come in vain.
    """

    def __init__(self, hands: Hands, platforms: Collection[Platform], moved: Callable[[int], None]) -> None:
        self._hands, self._platforms, self._moved = hands, platforms, moved

    def plan(self, image: Image) -> Plan:
        """
        Bring an image's manifests in, and tell what else it needs.

        @raise PullError: if it can't be had.
        """
        try:
            return self._plan(image.route)
        except ValueError as problem:
            raise PullError(str(problem)) from None

    def _plan(self, route: Route) -> Plan:
        """
        @raise ValueError: if something is no manifest, or there is none for a platform.
        """
        manifests: set[Digest] = set()
        blobs: dict[Route, int] = {}
        offered: dict[tuple[Digest, Platform | None], Offer] = {}
        indexes: list[tuple[Route, Platform | None]] = [(route, None)]
        noted: set[tuple[Digest | None, Platform | None]] = {(route.digest, None)}
        is_image = False
        while indexes:
            at, within = indexes.pop()
            media_type, body = self._manifest(at)
            manifests.add(Digest.of(body))
            if media_type not in INDEX_TYPES:
                is_image = True
                blobs.update(_blobs(route, media_type, body))
                continue
            for offer in offers(body, within):
                which = offer.descriptor.digest, offer.platform
                if not offer.is_manifest:
                    blobs[_blob(route, offer.descriptor)] = offer.descriptor.size
                elif not offer.is_index:
                    offered.setdefault(which, offer)
                elif which not in noted and may_hold(offer, self._platforms):
                    noted.add(which)
                    indexes.append((route.at(offer.descriptor.digest), offer.platform))
                _check_extent(noted, offered, blobs)
        # What lists layers and no image, as a BuildKit cache does, has no platforms to choose from.
        if offered or not (is_image or blobs):
            for each in choose(offered.values(), self._platforms):
                media_type, body = self._manifest(route.at(each.digest))
                manifests.add(each.digest)
                blobs.update(_blobs(route, media_type, body))
                _check_extent(noted, offered, blobs)
        return Plan(len(manifests), blobs)

    def bring(self, route: Route, size: int) -> bool:
        """
        Bring a blob in.

        @return: whether its bytes had to be moved.
        @raise PullError: if it can't be had.
        """
        if self._again(route, partial(self._is_in_cache, route)):
            return False
        self._move(route, size)
        return True

    def _manifest(self, route: Route) -> tuple[str, bytes]:
        return self._again(route, partial(self._ask_for_manifest, route))

    def _ask_for_manifest(self, route: Route) -> tuple[str, bytes]:
        with self._hands.ask("GET", target(route), {"Accept": ACCEPT}) as reply:
            _must_be(reply, _OK)
            body = _all_of(reply)
            told = reply.headers.get("docker-content-digest", "")
        for name in filter(None, [str(route.digest or ""), told]):
            try:
                digest = Digest.parse(name)
            except ValueError as problem:
                raise PullError(str(problem)) from None
            if Digest.of(body, digest.algorithm) != digest:
                raise PullError(f"the manifest that came is not {name}")
        return reply.headers.get("content-type", "").partition(";")[0].strip().lower(), body

    def _is_in_cache(self, route: Route) -> bool:
        with self._hands.ask("HEAD", target(route), {}) as reply:
            _must_be(reply, _OK)
            return reply.headers.get("x-cache-status") in IN_CACHE

    def _again(self, route: Route, attempt: Callable[[], T]) -> T:
        """
        Make an attempt until it is answered.
        """
        tries = Tries(self._hands)
        while True:
            try:
                return attempt()
            except (OSError, HTTPException, TransientError) as problem:
                tries.failed(_called(route), problem)

    def _move(self, route: Route, size: int) -> None:
        tries, arriving = Tries(self._hands), _Arriving(route, size, self._moved)
        while not arriving.complete:
            before = arriving.there
            try:
                with self._hands.ask("GET", target(route), arriving.headers()) as reply:
                    arriving.take(reply)
            except (OSError, HTTPException, TransientError) as problem:
                if arriving.there > before:
                    tries.progressed()
                tries.failed(_called(route), problem)
        arriving.check()


class _Arriving:
    """
    A blob on its way in: how much of it is there, and the hash of that.
    """

    def __init__(self, route: Route, size: int, moved: Callable[[int], None]) -> None:
        self._digest, self._size, self._moved = Digest.parse(route.reference), size, moved
        self._state: Any = self._digest.hasher()
        self.there, self.complete = 0, False

    def headers(self) -> dict[str, str]:
        """
        Ask for what is missing.
        """
        return {"Range": f"bytes={self.there}-"} if self.there else {}

    def take(self, reply: Reply) -> None:
        """
        Read a body to its end.

        @raise OSError: if it breaks off.
        @raise PullError: if it is not what was asked for.
        """
        _must_be(reply, _OK, _PARTIAL)
        if reply.status == _OK and self.there:  # all of it once more
            self._moved(-self.there)
            self._state, self.there = self._digest.hasher(), 0
        elif reply.status == _PARTIAL and not reply.headers.get("content-range", "").startswith(f"bytes {self.there}-"):
            raise PullError("another part than the one asked for came")
        while self.there <= self._size and (piece := reply.read(AT_ONCE)):
            self._state.update(piece)
            self.there += len(piece)
            self._moved(len(piece))
        if self.there < self._size:
            raise ConnectionError(f"broken off after {self.there} of {self._size} bytes")
        self.complete = True

    def check(self) -> None:
        """
        Hold what came against the digest.
        """
        if self.there > self._size or self._state.hexdigest() != self._digest.hex:
            raise PullError(f"what came is not {self._digest}")


def _check_extent(indexes: Sized, offered: Sized, blobs: Sized) -> None:
    """
    @raise ValueError: if an image is larger than any that somebody would pull.
    """
    for what, found, most in (("indexes", indexes, INDEXES), ("manifests", offered, OFFERED), ("blobs", blobs, BLOBS)):
        if len(found) > most:
            raise ValueError(f"lists more than {most} {what}")


def _blobs(manifest: Route, media_type: str, body: bytes) -> dict[Route, int]:
    return {_blob(manifest, each): each.size for kind, each in listed(body, media_type) if kind is Kind.BLOB}


def _blob(manifest: Route, descriptor: Descriptor) -> Route:
    return Route(Kind.BLOB, manifest.repository, str(descriptor.digest), descriptor.digest)


def _called(route: Route) -> str:
    if route.digest is None:
        return f"{route.repository.name}:{route.reference}"
    return f"{route.repository.name} {route.digest.algorithm}:{route.digest.hex[:12]}"


def _all_of(reply: Reply) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while size <= MANIFEST_LIMIT and (piece := reply.read(MANIFEST_LIMIT + 1 - size)):
        pieces.append(piece)
        size += len(piece)
    length = reply.headers.get("content-length", "")
    if re.fullmatch(r"[0-9]{1,18}", length) and size < int(length):
        raise ConnectionError("a manifest broke off")
    return b"".join(pieces)


def _must_be(reply: Reply, *statuses: int) -> None:
    """
    Let only an answer of one of the C{statuses} pass.

    @raise TransientError: for one that may be another next time.
    @raise PullError: for one that won't.
    """
    if reply.status in statuses:
        return
    said = _words(reply) or f"the proxy answers {reply.status}"
    if reply.status not in TRANSIENT_STATUSES or reply.headers.get("x-cache-reason") == Reason.NO_MANIFEST:
        raise PullError(said)
    problem = TransientError(reply.status, "UNAVAILABLE", said)
    problem.wait = asked_wait(reply.headers.get("retry-after"), reply.headers.get("date"))
    raise problem


def _words(reply: Reply) -> str:
    """
    Read what the proxy says of an error.
    """
    try:
        refusal = Refusal.read(reply.status, reply.read(2**16), challenged=False)
    except (OSError, HTTPException):
        return ""
    return ": ".join(" ".join(each.split()) for each in (refusal.code, refusal.message) if each)[:300]
