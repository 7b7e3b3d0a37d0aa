"""
Layers that are fetched before anybody asks for them: those behind the one that a client fetches.

Rules:

- It begins when a client fetches a layer: one that a manifest of the repository lists, and that is not in the cache.
  Who gets a manifest, or a config, may only be looking. Then the layers behind it follow, in the manifest's order.
- Clients come first. A layer is asked for only while ECR is well, nobody queues, and half of all places, connections,
  quotas and memory is left to clients; see C{has_plenty} of those who give them. It never waits for any of these.
- A client that asks for a layer which is being asked for ahead waits for that for C{PATIENCE_SECONDS}, and then asks by
  itself. What has begun, it joins.
- What nobody has asked for is bounded in bytes, and evicts nothing that was used lately: see L{Cache.lacks}.
- When nobody has asked for anything of an image for C{LEFT_SECONDS}, and no client fetches any, its transfers stop.
- A question ahead that fails is no evidence of anything: reading ahead of that registry rests for C{REST_SECONDS}.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from ecrproxy.answers import Asked
from ecrproxy.cached import FACTS, SMALL_BLOB, Cache
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.oci import Descriptor, Digest, Kind, RegistryError, Route, layers
from ecrproxy.registry.bucket import UnavailableError
from ecrproxy.registry.governor import NoPlentyError
from ecrproxy.threads import on_its_own

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall

    from ecrproxy.transfer.download import Download

log = Logger()

AT_ONCE: Final = 32
"""Transfers, those of clients among them, beside which none is begun that nobody has asked for."""
BYTES: Final = 256 * 2**20
"""Bytes that may be ahead: of layers that were begun, and that nobody has asked for yet."""
PART_OF_CACHE: Final = 16
"""They are no more than the cache's limit divided by this."""
BEGIN_SECONDS: Final = 0.02
"""How long the layers behind wait: clients ask for several at once, and their own questions come first."""
PATIENCE_SECONDS: Final = 1.0
LEFT_SECONDS: Final = 15.0
REST_SECONDS: Final = 10.0
LOOK_SECONDS: Final = 0.2
"""How often it is looked whether there is plenty again."""
JUDGED_SECONDS: Final = 600.0
"""When what nobody has asked for by then counts as fetched in vain."""
IMAGES: Final = 64
"""Images that are read ahead at the same time."""
NOTED: Final = 64
"""Images of one repository that are noted."""
NOTED_LAYERS: Final = 20_000
"""Layers that are noted, of all images together; a layer takes some 400 bytes."""
UNASKED: Final = 10_000
"""Layers that nobody has asked for and that are not judged yet."""


@dataclass(eq=False, slots=True)
class Image:
    """
    An image that a client got the manifest of.

    @ivar places: where each layer is among them.
    """

    repository: Repository
    layers: Sequence[Descriptor]
    places: Mapping[Digest, int] = field(init=False)

    def __post_init__(self) -> None:
        self.places = {each.digest: at for at, each in reversed(list(enumerate(self.layers)))}


class Images:
    """
    The images that clients got the manifests of lately, by repository; those that were got last are found first.
    """

    def __init__(self, most_layers: int = NOTED_LAYERS) -> None:
        self._most, self._count = most_layers, 0
        self._noted: OrderedDict[Repository, OrderedDict[Digest, Image]] = OrderedDict()

    def touch(self, repository: Repository, manifest: Digest) -> bool:
        """
        Note that a client got a manifest; return False if its layers have to be noted.
        """
        images = self._noted.get(repository)
        if images is None or manifest not in images:
            return False
        images.move_to_end(manifest)
        self._noted.move_to_end(repository)
        return True

    def note(self, manifest: Digest, image: Image) -> None:
        """
        Note the layers of a manifest.
        """
        if self.touch(image.repository, manifest):
            return
        images = self._noted.setdefault(image.repository, OrderedDict())
        images[manifest] = image
        self._count += len(image.layers) + 1
        self.touch(image.repository, manifest)
        while len(images) > NOTED:
            self._forget(images)
        while self._count > self._most and self._noted:
            oldest = next(iter(self._noted.values()))
            self._forget(oldest)
            if not oldest:
                self._noted.popitem(last=False)

    def _forget(self, images: OrderedDict[Digest, Image]) -> None:
        self._count -= len(images.popitem(last=False)[1].layers) + 1

    def listing(self, repository: Repository, layer: Digest) -> Image | None:
        """
        Find the image that a client means which asks for a layer.
        """
        images = self._noted.get(repository)
        found = reversed(images.values()) if images is not None else ()
        return next((each for each in found if layer in each.places), None)


def image_of(repository: Repository, manifest: bytes, media_type: str) -> Image:
    """
    Read the layers of a manifest; none of what is no image.
    """
    try:
        return Image(repository, list(islice(layers(manifest, media_type), FACTS)))
    except ValueError:
        return Image(repository, [])


def most_bytes(limit: int, most: int = BYTES) -> int:
    """
    Return how many bytes may be ahead.

    @param limit: the cache's, in bytes.
    """
    return min(most, limit // PART_OF_CACHE)


@dataclass(eq=False, slots=True)
class Pull:
    """
    An image that clients fetch.

    @ivar next: which of its layers comes next.
    @ivar timer: fires when its clients seem to have left; or, before anything is begun, when that may be.
    @ivar begun: whether layers may be begun.
    @ivar unasked: layers that were begun, and that nobody has asked for: their bytes, and since when they come.
    @ivar bytes: those of all of them.
    """

    image: Image
    next: int
    timer: IDelayedCall
    begun: bool = False
    unasked: dict[Digest, tuple[int, float]] = field(default_factory=dict)
    bytes: int = 0

    def add(self, layer: Digest, size: int, since: float) -> None:
        """
        Note that a layer is ahead.
        """
        self.remove(layer)
        self.unasked[layer] = size, since
        self.bytes += size

    def remove(self, layer: Digest) -> None:
        """
        Note that a layer is not ahead, or no longer.
        """
        size, _ = self.unasked.pop(layer, (0, 0.0))
        self.bytes -= size

    def passed(self, layer: Digest) -> None:
        """
        Note that a client asks for a layer: those before it have been asked for, or are not wanted.
        """
        self.next = max(self.next, self.image.places.get(layer, -1) + 1)

    @property
    def coming(self) -> Descriptor | None:
        """
        The layer that comes next, if there is another.
        """
        return self.image.layers[self.next] if self.next < len(self.image.layers) else None


@dataclass(slots=True)
class Opening:
    """
    A layer that is being asked for.

    @ivar before: an earlier pull that had it ahead, and nobody asked for it: it may be there still.
    @ivar asking: the question to upstream, while it is under way.
    @ivar waiting: clients that wait for it to begin.
    @ivar refused: whether there was no place for it.
    """

    before: Pull | None = None
    asking: Deferred[Any] | None = None
    refused: bool = False
    waiting: list[Deferred[None]] = field(default_factory=list)


class Transfers:
    """
    What reading ahead needs of who transfers blobs: see L{proxy.PullThrough}.

    @ivar all: lists the transfers that are under way.
    @ivar has: whether a blob is on its way, or being asked for by a client.
    @ivar has_plenty: whether there is plenty of all that a layer of so many bytes needs, beside so many others.
    @ivar ask: asks upstream for a layer.
    @ivar begin: begins the transfer of what was asked for; none if it has come otherwise.
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
    Fetches the layers behind those that clients fetch.

    @param now: seconds since the epoch.
    @param call_later: a reactor's.
    @param may: whether anything may be begun, as it may not when the daemon ends.
    @param processes: how many there are that do the same, each its part.
    @ivar brought: bytes that have come before anybody had asked.
    @ivar in_vain: those of them that nobody has asked for within C{JUDGED_SECONDS}.
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
        self._openings: dict[Digest, Opening] = {}
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
        Tell how many images clients fetch.
        """
        return len(self._pulls)

    @property
    def bytes_ahead(self) -> int:
        """
        Tell how many bytes are ahead.
        """
        return sum(each.bytes for each in self._pulls.values())

    # Who asks for what.

    def answered(self, route: Route, digest: Digest, body: bytes, media_type: str) -> None:
        """
        Note that a client gets a manifest.

        @param digest: that of the manifest.
        """
        if not self._images.touch(route.repository, digest):
            if len(body) <= SMALL_BLOB:
                self._images.note(digest, image_of(route.repository, body, media_type))
            else:
                on_its_own(self._note(route.repository, digest, body, media_type))

    async def _note(self, repository: Repository, digest: Digest, body: bytes, media_type: str) -> None:
        image = await self._cache.parse(body, lambda manifest: image_of(repository, manifest, media_type))
        self._images.note(digest, image)

    def again(self, route: Route, digest: Digest) -> None:
        """
        Note that a client gets a manifest that was noted already, as the hot path does each time.
        """
        if route is not self._last:
            self._last = route
            self._images.touch(route.repository, digest)

    def asked_for(self, digest: Digest) -> None:
        """
        Note that a client asks for a blob.
        """
        pull = self._unasked.pop(digest, None)
        if pull is not None:
            pull.remove(digest)
            self._stay(pull, digest)

    def missed(self, asked: Asked) -> None:
        """
        Note that a client fetches a blob that is not in the cache: what is behind it may be read ahead.
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
        Follow a client that got the manifest from another process, or before a restart.
        """
        try:
            found = await self._cache.manifest_of(asked)
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
        Stop to read an image ahead, unless clients fetch some of it.
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
        Count what nobody has asked for, in any process.
        """
        for digest, (size, since) in list(pull.unasked.items()):
            if self._unasked.get(digest) is pull:
                del self._unasked[digest]
                if not await self._cache.was_used(digest, since):
                    self.in_vain += size

    # What is begun.

    def go_on(self) -> None:
        """
        Begin what may be begun: of each image one layer, by turns.
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
        Go on if there is plenty by now: nobody tells that clients need less.
        """
        self._look = None
        self.go_on()

    def _begin_next(self, pull: Pull) -> bool:
        """
        Begin the next layer of an image; return whether there may be another.
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
        opening = self._openings[layer.digest] = Opening(before)
        self._unasked[layer.digest] = pull
        pull.add(layer.digest, layer.size, self._now())
        opened = Deferred.fromCoroutine(self._open(pull, opening, route, layer))
        opened.addBoth(self._opened, pull, layer, opening).addErrback(_failed)
        return True

    def _is_left_out(self, layer: Descriptor, most: int) -> bool:
        """
        Return True if a layer is on its way already, or has a size with which none is fetched ahead.
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
        except LookupError:  # after a reload, it is no registry of the configuration
            return False

    async def _open(self, pull: Pull, opening: Opening, route: Route, layer: Descriptor) -> Download | None:
        if not await self._cache.lacks(layer.digest, layer.size) or self._pulls.get(pull.image) is not pull:
            return None
        if self._transfers.has(layer.digest):
            return None
        opening.asking = Deferred.fromCoroutine(self._transfers.ask(route, layer))
        try:
            answer = await opening.asking
        except NoPlentyError:  # others were quicker: it comes again
            pull.next = min(pull.next, pull.image.places[layer.digest])
            opening.refused = True
            return None
        finally:
            opening.asking = None
        return await self._transfers.begin(route, layer, answer)

    def _opened(self, result: Download | Failure | None, pull: Pull, layer: Descriptor, opening: Opening) -> None:
        del self._openings[layer.digest]
        self._cache.lacks_no_more(layer.digest)
        if result is None or isinstance(result, Failure):
            pull.remove(layer.digest)
            if self._unasked.pop(layer.digest, None) is pull and opening.before is not None:
                self._unasked[layer.digest] = opening.before
        self._let_go(opening)
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
        Note that a transfer has ended that was begun here.
        """
        size = download.received
        self.brought += size
        pull = self._unasked.get(download.digest)
        if pull is None and download.verified:  # who has asked for it may have come when it was being filed
            self._cache.used(download.digest)
        elif pull is not None and download.digest in pull.unasked:
            pull.add(download.digest, size, pull.unasked[download.digest][1])
        self.go_on()

    # Clients that come to wait for it.

    async def opened(self, digest: Digest) -> None:
        """
        Wait until a layer has begun, or does not; not for long: whoever waits asks for it then.
        """
        opening = self._openings.get(digest)
        if opening is None:
            return
        waiting: Deferred[None] = Deferred(opening.waiting.remove)
        opening.waiting.append(waiting)
        impatient = self._call_later(PATIENCE_SECONDS, self._lose_patience, digest, opening)
        try:
            await waiting
        finally:
            if impatient.active():
                impatient.cancel()

    def _lose_patience(self, digest: Digest, opening: Opening) -> None:
        self.give_way(digest)
        self._let_go(opening)

    @staticmethod
    def _let_go(opening: Opening) -> None:
        while opening.waiting:  # one may leave because of what another does
            opening.waiting.pop(0).callback(None)

    def give_way(self, digest: Digest) -> None:
        """
        Leave a layer to who asks for it, if it is still being asked for.
        """
        opening = self._openings.get(digest)
        if opening is not None and opening.asking is not None:
            opening.asking.cancel()


def _failed(failure: Failure) -> None:
    log.failure("Reading ahead", failure)
