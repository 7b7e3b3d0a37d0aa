"""
Pulling one image or blob as a client would: the bytes are verified against the digest, and discarded.

Rules:

- Cached content is not transferred: a HEAD request detects it. So an interrupted run resumes, blob by blob.
- An interrupted body resumes at its last byte. The count of attempts restarts whenever bytes have arrived.
- Temporary failures are retried as in the daemon: L{retries}. Other failures end the image, but not the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from typing import Any, Final, TypeVar

from ecrproxy.buffers import AT_ONCE
from ecrproxy.command.prefetching.door import Ask, Reply
from ecrproxy.command.prefetching.images import WantedImage, target
from ecrproxy.documents import listed
from ecrproxy.oci import INDEX_TYPES, MANIFEST_LIMIT, MANIFEST_TYPES, Descriptor, Digest, Kind, Route
from ecrproxy.platforms import Offer, Platform, choose, may_hold, offers
from ecrproxy.reasons import Reason
from ecrproxy.registry.refusals import Refusal
from ecrproxy.registry.retries import TRANSIENT_STATUSES, Budget, TransientError, asked_wait, next_try

T = TypeVar("T")

ACCEPT: Final = ", ".join(sorted(MANIFEST_TYPES))
BUDGET: Final = Budget(tries=8, seconds=300.0)
"""With the pauses at least a minute, so that a daemon can restart meanwhile."""
IN_CACHE: Final = frozenset({"HIT", "REVALIDATED"})
"""Values of X-Cache-Status in responses to HEAD requests for cached blobs."""
INDEXES: Final = 100
"""Maximum number of indexes of an image, each counted once per platform that it is listed for."""
OFFERED: Final = 1000
"""Maximum number of manifests in these. Large images have some twenty platforms, with an attestation for each."""
BLOBS: Final = 100_000
"""Maximum number of blobs in all these."""
MOST_TOLD: Final = 3
"""Maximum number of missing manifests that an error names."""
_OK, _PARTIAL = 200, 206


class PullError(Exception):
    """
    An image can't be pulled; one line says why.
    """


@dataclass(frozen=True, slots=True)
class Plan:
    """
    The parts of an image.

    @ivar manifests: number of manifests that were pulled.
    @ivar blobs: the routes of its config and layers, with their sizes in bytes.
    @ivar missing: a line for each listed manifest that could not be pulled; the others are worth having.
    """

    manifests: int
    blobs: Mapping[Route, int]
    missing: Sequence[str] = ()


@dataclass(frozen=True)
class Hands:
    """
    The puller's interface to the outside world.

    @ivar ask: sends requests to the daemon.
    @ivar seconds: a monotonic clock.
    @ivar sleep: sleeps for a number of seconds; raises if the time budget is used up.
    @ivar chance: returns random numbers from 0 to 1.
    @ivar said: called with a line that explains a retry.
    """

    ask: Ask
    seconds: Callable[[], float]
    sleep: Callable[[float], object]
    chance: Callable[[], float]
    said: Callable[[str], None] = lambda _: None


class Attempts:
    """
    Counts consecutive failures, and the time since the first.
    """

    def __init__(self, hands: Hands, budget: Budget = BUDGET) -> None:
        self._hands, self._budget = hands, budget
        self._failed, self._began = 0, hands.seconds()

    def progressed(self) -> None:
        """
        Restart the count.
        """
        self._failed, self._began = 0, self._hands.seconds()

    def failed(self, what: str, problem: Exception) -> None:
        """
        Wait before the next attempt.

        @raise PullError: if no attempt is left.
        """
        self._failed += 1
        asked = problem.wait if isinstance(problem, TransientError) else None
        elapsed = self._hands.seconds() - self._began
        # At least half of each wait, else bad luck could use up all attempts before a daemon has started.
        wait = next_try(self._budget, self._failed, elapsed, asked, (1 + self._hands.chance()) / 2)
        why = problem.message if isinstance(problem, TransientError) else str(problem) or type(problem).__name__
        if wait is None:
            raise PullError(why) from problem
        self._hands.said(f"{what}: {why}; again in {wait:.0f} s")
        self._hands.sleep(wait)


class Puller:
    """
    Pulls from one daemon.

    @param platforms: the platforms of an index to pull; all if empty.
    @param moved: called with the number of bytes that arrived; negative if they have to be discarded.
    """

    def __init__(self, hands: Hands, platforms: Collection[Platform], moved: Callable[[int], None]) -> None:
        self._hands, self._platforms, self._moved = hands, platforms, moved

    def plan(self, image: WantedImage) -> Plan:
        """
        Pull an image's manifests, and return its other parts.

        @raise PullError: if it can't be pulled.
        """
        try:
            return self._plan(image.route)
        except ValueError as problem:
            raise PullError(str(problem)) from None

    def _plan(self, route: Route) -> Plan:
        """
        Pull the manifests, and note what they list.

        @raise ValueError: if a manifest is invalid, or a platform is missing.
        @raise PullError: if the image's own manifest can't be pulled, or none of those that it lists.
        """
        missing: list[str] = []
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
        # An index that lists only layers, such as a BuildKit cache, has no platforms to select from.
        if offered or not (is_image or blobs):
            for digest, found in self._listed(route, choose(offered.values(), self._platforms), missing):
                manifests.add(digest)
                blobs.update(_blobs(route, *found))
                _check_extent(noted, offered, blobs)
        return Plan(len(manifests), blobs, missing)

    def _listed(
        self, route: Route, chosen: Iterable[Descriptor], missing: list[str]
    ) -> Iterator[tuple[Digest, tuple[str, bytes]]]:
        """
        Pull manifests that an index lists; add a line to C{missing} for each that can't be pulled.

        @raise PullError: if none can.
        """
        found = 0
        for each in chosen:
            try:
                pulled = self._manifest(route.at(each.digest))
            except PullError as problem:
                missing.append(f"{each.digest}: {problem}")
            else:
                found += 1
                yield each.digest, pulled
        if missing and not found:
            raise PullError("; ".join(missing[:MOST_TOLD]))

    def bring(self, route: Route, size: int) -> bool:
        """
        Pull a blob.

        @return: True if its bytes were transferred, False if it was cached.
        @raise PullError: if it can't be pulled.
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
                raise PullError(f"the manifest does not match {name}")
        return reply.headers.get("content-type", "").partition(";")[0].strip().lower(), body

    def _is_in_cache(self, route: Route) -> bool:
        with self._hands.ask("HEAD", target(route), {}) as reply:
            _must_be(reply, _OK)
            return reply.headers.get("x-cache-status") in IN_CACHE

    def _again(self, route: Route, attempt: Callable[[], T]) -> T:
        """
        Retry an attempt until it succeeds.
        """
        tries = Attempts(self._hands)
        while True:
            try:
                return attempt()
            except (OSError, HTTPException, TransientError) as problem:
                tries.failed(_called(route), problem)

    def _move(self, route: Route, size: int) -> None:
        tries, arriving = Attempts(self._hands), _Arriving(route, size, self._moved)
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
    A blob being received: the bytes so far, and their hash.
    """

    def __init__(self, route: Route, size: int, moved: Callable[[int], None]) -> None:
        self._digest, self._size, self._moved = Digest.parse(route.reference), size, moved
        self._state: Any = self._digest.hasher()
        self.there, self.complete = 0, False

    def headers(self) -> dict[str, str]:
        """
        Return the headers that request the missing bytes.
        """
        return {"Range": f"bytes={self.there}-"} if self.there else {}

    def take(self, reply: Reply) -> None:
        """
        Read a body to its end.

        @raise OSError: if it ends early.
        @raise PullError: if it is not what was requested.
        """
        _must_be(reply, _OK, _PARTIAL)
        if reply.status == _OK and self.there:  # the complete blob, from the start
            self._moved(-self.there)
            self._state, self.there = self._digest.hasher(), 0
        elif reply.status == _PARTIAL and not reply.headers.get("content-range", "").startswith(f"bytes {self.there}-"):
            raise PullError("the response has another range than requested")
        while self.there <= self._size and (piece := reply.read(AT_ONCE)):
            self._state.update(piece)
            self.there += len(piece)
            self._moved(len(piece))
        if self.there < self._size:
            raise ConnectionError(f"interrupted after {self.there} of {self._size} bytes")
        self.complete = True

    def check(self) -> None:
        """
        Verify the digest.
        """
        if self.there > self._size or self._state.hexdigest() != self._digest.hex:
            raise PullError(f"the content does not match {self._digest}")


def _check_extent(indexes: Sized, offered: Sized, blobs: Sized) -> None:
    """
    @raise ValueError: if an image is unreasonably large.
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
        raise ConnectionError("a manifest was interrupted")
    return b"".join(pieces)


def _must_be(reply: Reply, *statuses: int) -> None:
    """
    Return if the response has one of the C{statuses}.

    @raise TransientError: if another attempt may succeed.
    @raise PullError: otherwise.
    """
    if reply.status in statuses:
        return
    said = _words(reply) or f"the proxy returned {reply.status}"
    if reply.status not in TRANSIENT_STATUSES or reply.headers.get("x-cache-reason") == Reason.NO_MANIFEST:
        raise PullError(said)
    problem = TransientError(reply.status, "UNAVAILABLE", said)
    problem.wait = asked_wait(reply.headers.get("retry-after"), reply.headers.get("date"))
    raise problem


def _words(reply: Reply) -> str:
    """
    Return the proxy's error message.
    """
    try:
        refusal = Refusal.read(reply.status, reply.read(2**16), challenged=False)
    except (OSError, HTTPException):
        return ""
    return ": ".join(" ".join(each.split()) for each in (refusal.code, refusal.message) if each)[:300]
