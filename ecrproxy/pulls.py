"""
What clients are pulling, as far as its layers are read ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from twisted.internet.defer import Deferred

from ecrproxy import tracing
from ecrproxy.images import Image
from ecrproxy.oci import Descriptor, Digest

if TYPE_CHECKING:
    from twisted.internet.interfaces import IDelayedCall

PATIENCE_SECONDS: Final = 1.0
"""Seconds for which a client waits for a layer that is being requested ahead."""


@dataclass(eq=False, slots=True)
class Pull:
    """
    An image that clients are pulling.

    @ivar next: index of the next layer.
    @ivar timer: fires when the clients seem to have left; before the start, when reading ahead may start.
    @ivar begun: whether reading ahead may start layers.
    @ivar unasked: layers that were started but not requested: their bytes and start times.
    @ivar bytes: the bytes of all of them.
    @ivar span: of the request that began it, if that is traced; timers and others' transfers start the layers.
    """

    image: Image
    next: int
    timer: IDelayedCall
    begun: bool = False
    unasked: dict[Digest, tuple[int, float]] = field(default_factory=dict)
    bytes: int = 0
    span: tracing.Span | None = field(default_factory=tracing.current.get)

    def add(self, layer: Digest, size: int, since: float) -> None:
        """
        Note that a layer is ahead.
        """
        self.remove(layer)
        self.unasked[layer] = size, since
        self.bytes += size

    def remove(self, layer: Digest) -> None:
        """
        Note that a layer is not ahead.
        """
        size, _ = self.unasked.pop(layer, (0, 0.0))
        self.bytes -= size

    def passed(self, layer: Digest) -> None:
        """
        Note that a client requests a layer: earlier ones have been requested, or are not needed.
        """
        self.next = max(self.next, self.image.places.get(layer, -1) + 1)

    @property
    def coming(self) -> Descriptor | None:
        """
        The next layer, or None.
        """
        return self.image.layers[self.next] if self.next < len(self.image.layers) else None


@dataclass(slots=True)
class LayerRequest:
    """
    A layer that is being requested from upstream.

    @ivar before: an earlier pull that read it ahead, unrequested: it may still be there.
    @ivar asking: the request to upstream while it is in flight.
    @ivar waiting: clients that wait for the transfer to start.
    @ivar refused: whether there was no place for it.
    """

    before: Pull | None = None
    asking: Deferred[Any] | None = None
    refused: bool = False
    waiting: list[Deferred[None]] = field(default_factory=list)

    async def end(self, call_later: Callable[..., IDelayedCall]) -> None:
        """
        Wait until the layer has started or failed. After C{PATIENCE_SECONDS}, leave it to the client that waits.
        """
        waiting: Deferred[None] = Deferred(self.waiting.remove)
        self.waiting.append(waiting)
        impatient = call_later(PATIENCE_SECONDS, self._lose_patience)
        try:
            await waiting
        finally:
            if impatient.active():
                impatient.cancel()

    def _lose_patience(self) -> None:
        self.give_way()
        self.release()

    def release(self) -> None:
        """
        Let the clients that wait go on.
        """
        while self.waiting:  # a callback may cancel another waiter
            self.waiting.pop(0).callback(None)

    def give_way(self) -> None:
        """
        Leave the layer to a client, if it is still being requested from upstream.
        """
        if self.asking is not None:
            self.asking.cancel()
