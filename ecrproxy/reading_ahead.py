"""
Reading ahead: fetch the layers after the one that a client fetches, before they are requested.

Rules:

- Reading ahead starts when a client fetches a layer that a manifest of the repository lists and the cache lacks. A
  client that gets only a manifest or a config may just be inspecting. The layers after it follow in manifest order.
- Clients have priority. A layer is requested only while ECR is healthy, no client queues, and half of all places,
  connections, quotas and memory is left to clients; see their C{has_plenty}. Reading ahead never waits for any of them.
- A client that requests a layer for which a request ahead is pending waits a moment for it (L{LayerRequest.end}), then
  sends its own. It joins a transfer that has started.
- Unrequested layers are limited in bytes, and evict nothing that was used recently: see L{Cache.begin_prefetch}.
- If no client has requested anything of an image for C{LEFT_SECONDS}, and none fetches a part of it, transfers stop.
- A failed request ahead proves nothing: reading ahead from that registry pauses for C{REST_SECONDS}.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy import tracing
from ecrproxy.answers import Asked
from ecrproxy.cached.bodies import SMALL_BLOB
from ecrproxy.cached.cache import Cache
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.images import IMAGES, Image, Images, image_of
from ecrproxy.oci import Descriptor, Digest, Kind, RegistryError, Route
from ecrproxy.pulls import LayerRequest, Pull
from ecrproxy.registry.queue import NoPlentyError
from ecrproxy.registry.unavailable import UnavailableError
from ecrproxy.threads import on_its_own

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall

    from ecrproxy.transfer.download import Download

log = Logger()

AT_ONCE: Final = 32
"""Maximum transfers, including those of clients, with which reading ahead starts another."""
BYTES: Final = 256 * 2**20
"""Maximum bytes of layers that were read ahead, or are being read, and not requested yet."""
PART_OF_CACHE: Final = 16
"""C{BYTES} is also limited to the cache's limit divided by this."""
BEGIN_SECONDS: Final = 0.02
"""Delay before reading ahead: clients request several layers at once, and their own requests have priority."""
LEFT_SECONDS: Final = 15.0
REST_SECONDS: Final = 10.0
LOOK_SECONDS: Final = 0.2
"""Interval of checks for free resources."""
JUDGED_SECONDS: Final = 600.0
"""Time after which unrequested layers count as fetched in vain."""
UNASKED: Final = 10_000
"""Maximum number of unrequested layers that are not counted as in vain yet."""


def most_bytes(limit: int, most: int = BYTES) -> int:
    """
    Return the maximum bytes ahead.

    @param limit: the cache's limit, in bytes.
    """
    return min(most, limit // PART_OF_CACHE)


class Transfers:
    """
    The functions of L{proxy.PullThrough} that reading ahead needs.

    @ivar all: returns the transfers in flight.
    @ivar has: whether a blob is in flight, or being requested by a client.
    @ivar has_plenty: whether there are resources for a layer of a given size, besides other layers to come.
    @ivar ask: requests a layer from upstream.
    @ivar begin: starts the transfer of a requested layer; returns None if it has arrived otherwise.
    """

    def __init__(
        self,
        every: Callable[[], Sequence[Download]],
        has: Callable[[Digest], bool],
        has_plenty: Callable[[Route, int, int], bool],
        ask: Callable[[Route, Descriptor], Coroutine[Any, Any, Any]],
        begin: Callable[[Route, Descriptor, Any], Coroutine[Any, Any, Download | None]],
    ) -> None:
        self.all, self.has, self.has_plenty, self.ask, self.begin = every, has, has_plenty, ask, begin


class ReadingAhead:
    """
    Fetches the layers after those that clients fetch.

    @param now: seconds since the epoch.
    @param call_later: the reactor's C{callLater}.
    @param may: whether transfers may be started; False on shutdown.
    @param processes: number of processes that share the limits.
    @ivar brought: bytes that arrived before they were requested.
    @ivar in_vain: those of them not requested within C{JUDGED_SECONDS}.
    """

    def __init__(
        self,
        transfers: Transfers,
        cache: Cache,
        now: Callable[[], float],
        call_later: Callable[..., IDelayedCall],
        may: Callable[[], bool] = lambda: True,
        processes: int = 1,
    ) -> None:
        self._transfers, self._cache, self._now, self._call_later = transfers, cache, now, call_later
        self._may, self._at_once, self._bytes = may, max(4, AT_ONCE // processes), BYTES // processes
        self._images = Images()
        self._pulls: dict[Image, Pull] = {}
        self._openings: dict[Digest, LayerRequest] = {}
        self._unasked: dict[Digest, Pull] = {}
        self._resting: set[RegistryId] = set()
        self._learning = set[tuple[Repository, Digest]]()
        self._going_on = self._again = False
        self._last: Route | None = None
        self._look: IDelayedCall | None = None
        self.brought = self.in_vain = 0

    @property
    def pulls(self) -> int:
        """
        Return the number of images that clients are pulling.
        """
        return len(self._pulls)

    @property
    def bytes_ahead(self) -> int:
        """
        Return the bytes ahead.
        """
        return sum(each.bytes for each in self._pulls.values())

    # Requests of clients.

    def answered(self, route: Route, digest: Digest, body: bytes, media_type: str) -> None:
        """
        Note that a manifest is sent to a client.

        @param digest: the manifest's.
        """
        if not self._images.touch(route.repository, digest):
            if len(body) <= SMALL_BLOB:
                self._images.note(digest, image_of(route.repository, body, media_type))
            else:
                on_its_own(self._note(route.repository, digest, body, media_type))

    async def _note(self, repository: Repository, digest: Digest, body: bytes, media_type: str) -> None:
        image = await self._cache.bodies.parse(body, lambda manifest: image_of(repository, manifest, media_type))
        self._images.note(digest, image)

    def again(self, route: Route, digest: Digest) -> None:
        """
        Note that an already noted manifest is sent to a client, as on the hot path.
        """
        if route is not self._last:
            self._last = route
            self._images.touch(route.repository, digest)

    def asked_for(self, digest: Digest) -> None:
        """
        Note that a client requests a blob.
        """
        pull = self._unasked.pop(digest, None)
        if pull is not None:
            pull.remove(digest)
            self._stay(pull, digest)

    def missed(self, asked: Asked) -> None:
        """
        Note that a client fetches a blob that is not in the cache: the layers after it may be read ahead.
        """
        image = self._images.listing(asked.route.repository, asked.digest)
        if image is not None:
            self._follow(image, asked.digest)
            return
        what = asked.route.repository, asked.digest
        if len(self._learning) < IMAGES and what not in self._learning and self._cache.is_well:
            self._learning.add(what)
            on_its_own(self._learn(asked))

    async def _learn(self, asked: Asked) -> None:
        """
        Start reading ahead for a client that got the manifest from another process, or before a restart.
        """
        try:
            found = await self._cache.permissions.manifest_of(asked)
            if found is not None:
                known, document = found
                await self._note(asked.route.repository, known.digest, document.body, known.media_type)
                image = self._images.listing(asked.route.repository, asked.digest)
                if image is not None:
                    self._follow(image, asked.digest)
        finally:
            self._learning.discard((asked.route.repository, asked.digest))

    def _follow(self, image: Image, layer: Digest) -> None:
        pull = self._pulls.get(image)
        if pull is not None:
            self._stay(pull, layer)
        elif layer in image.places and len(self._pulls) < IMAGES:
            timer = self._call_later(BEGIN_SECONDS, self._begin, image)
            self._pulls[image] = pull = Pull(image, image.places[layer] + 1, timer)

    def _begin(self, image: Image) -> None:
        pull = self._pulls[image]
        pull.begun, pull.timer = True, self._call_later(LEFT_SECONDS, self._seem_left, pull)
        self.go_on()

    def _stay(self, pull: Pull, layer: Digest) -> None:
        pull.passed(layer)
        if pull.begun and pull.timer.active():
            pull.timer.reset(LEFT_SECONDS)
            self.go_on()

    def _seem_left(self, pull: Pull) -> None:
        """
        Stop reading an image ahead, unless clients are fetching a part of it.
        """
        coming = [each for each in self._transfers.all() if each.digest in pull.image.places]
        if any(each.followers for each in coming):
            pull.timer = self._call_later(LEFT_SECONDS, self._seem_left, pull)
            return
        del self._pulls[pull.image]
        for digest in pull.unasked.keys() & self._openings.keys():
            self.give_way(digest)
        for each in coming:
            if each.ahead:
                each.stop()
        if pull.unasked:
            self._call_later(JUDGED_SECONDS, lambda: on_its_own(self._judge(pull)))
        self.go_on()

    async def _judge(self, pull: Pull) -> None:
        """
        Count the layers that no client of any process has requested.
        """
        for digest, (size, since) in list(pull.unasked.items()):
            if self._unasked.get(digest) is pull:
                del self._unasked[digest]
                if not await self._cache.was_used(digest, since):
                    self.in_vain += size

    # Transfers.

    def go_on(self) -> None:
        """
        Start as many layers as possible, one of each image in turn.
        """
        self._again = True
        if self._going_on:
            return
        self._going_on = True
        try:
            while self._again:
                self._again = False
                for pull in list(self._pulls.values()):
                    if pull.begun and self._begin_next(pull):
                        self._again = True
        finally:
            self._going_on = False
        if self._look is None and any(each.begun and each.coming is not None for each in self._pulls.values()):
            self._look = self._call_later(LOOK_SECONDS, self._look_again)

    def _look_again(self) -> None:
        """
        Continue if there are enough resources by now: there is no notification when clients need less.
        """
        self._look = None
        self.go_on()

    def _begin_next(self, pull: Pull) -> bool:
        """
        Start the next layer of an image; return whether there may be another.
        """
        most = most_bytes(self._cache.limit, self._bytes)
        while (layer := pull.coming) is not None and self._is_left_out(layer, most):
            pull.next += 1
        if layer is None or pull.image.repository.registry in self._resting:
            return False
        route = Route(Kind.BLOB, pull.image.repository, str(layer.digest), layer.digest)
        if not self._has_plenty(route, layer.size, most):
            return False
        pull.next += 1
        before = self._unasked.get(layer.digest)
        opening = self._openings[layer.digest] = LayerRequest(before)
        self._unasked[layer.digest] = pull
        pull.add(layer.digest, layer.size, self._now())
        opened = Deferred.fromCoroutine(self._open(pull, opening, route, layer))
        opened.addBoth(self._opened, pull, layer, opening).addErrback(_failed)
        return True

    def _is_left_out(self, layer: Descriptor, most: int) -> bool:
        """
        Return True if a layer is already in flight, or its size rules out reading it ahead.
        """
        before = self._unasked.get(layer.digest)
        ahead = layer.digest in self._openings or (before is not None and self._pulls.get(before.image) is before)
        return ahead or self._transfers.has(layer.digest) or layer.size > most or not layer.size

    def _has_plenty(self, route: Route, size: int, most: int) -> bool:
        under_way = len(self._openings) + len(self._transfers.all())
        room = under_way < self._at_once and self.bytes_ahead + size <= most and len(self._unasked) < UNASKED
        try:
            return (
                room
                and self._may()
                and self._cache.is_well
                and self._transfers.has_plenty(route, size, len(self._openings))
            )
        except LookupError:  # after a reload, the registry is no longer configured
            return False

    async def _open(self, pull: Pull, opening: LayerRequest, route: Route, layer: Descriptor) -> Download | None:
        tracing.current.set(pull.span)
        if not await self._cache.begin_prefetch(layer.digest, layer.size) or self._pulls.get(pull.image) is not pull:
            return None
        if self._transfers.has(layer.digest):
            return None
        opening.asking = Deferred.fromCoroutine(self._transfers.ask(route, layer))
        try:
            answer = await opening.asking
        except NoPlentyError:  # others were faster: retried later
            pull.next = min(pull.next, pull.image.places[layer.digest])
            opening.refused = True
            return None
        finally:
            opening.asking = None
        return await self._transfers.begin(route, layer, answer)

    def _opened(self, result: Download | Failure | None, pull: Pull, layer: Descriptor, opening: LayerRequest) -> None:
        del self._openings[layer.digest]
        self._cache.end_prefetch(layer.digest)
        if result is None or isinstance(result, Failure):
            pull.remove(layer.digest)
            if self._unasked.pop(layer.digest, None) is pull and opening.before is not None:
                self._unasked[layer.digest] = opening.before
        opening.release()
        if isinstance(result, Failure):
            self._note_failure(result, pull.image.repository.registry)
        if not opening.refused:
            self.go_on()

    def _note_failure(self, failure: Failure, registry: RegistryId) -> None:
        if failure.check(RegistryError, CancelledError) is None:
            failure.raiseException()
        if failure.check(RegistryError):
            log.info("Not read ahead: {problem}", problem=failure.value, once="read ahead")
        if failure.check(UnavailableError) and registry not in self._resting:
            self._resting.add(registry)
            self._call_later(REST_SECONDS, self._rested, registry)

    def _rested(self, registry: RegistryId) -> None:
        self._resting.discard(registry)
        self.go_on()

    def ended(self, download: Download) -> None:
        """
        Note the end of a transfer that was started here.
        """
        size = download.received
        self.brought += size
        pull = self._unasked.get(download.digest)
        if pull is None and download.verified:  # it may have been requested while it was being committed
            self._cache.used(download.digest)
        elif pull is not None and download.digest in pull.unasked:
            pull.add(download.digest, size, pull.unasked[download.digest][1])
        self.go_on()

    # Waiting clients.

    async def opened(self, digest: Digest) -> None:
        """
        Wait a moment for a layer that is being requested; then the client sends its own request.
        """
        opening = self._openings.get(digest)
        if opening is not None:
            await opening.end(self._call_later)

    def give_way(self, digest: Digest) -> None:
        """
        Leave a layer to the client, if it is still being requested from upstream.
        """
        opening = self._openings.get(digest)
        if opening is not None:
            opening.give_way()


def _failed(failure: Failure) -> None:
    log.failure("Reading ahead", failure)
