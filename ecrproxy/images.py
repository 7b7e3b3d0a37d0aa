"""
The images that clients pull, as far as their manifests have been seen. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from ecrproxy.cached.permissions import FACTS
from ecrproxy.documents import layers
from ecrproxy.identity import Repository
from ecrproxy.oci import Descriptor, Digest

IMAGES: Final = 64
"""Maximum number of images that are read ahead at the same time."""
NOTED: Final = 64
"""Maximum number of images noted per repository."""
NOTED_LAYERS: Final = 20_000
"""Maximum number of layers noted, of all images; a layer takes some 400 bytes."""


@dataclass(eq=False, slots=True)
class Image:
    """
    An image whose manifest was sent to a client.

    @ivar places: the index of each layer.
    """

    repository: Repository
    layers: Sequence[Descriptor]
    places: Mapping[Digest, int] = field(init=False)

    def __post_init__(self) -> None:
        self.places = {each.digest: at for at, each in reversed(list(enumerate(self.layers)))}


class Images:
    """
    The images whose manifests were sent recently, by repository; the latest is found first.
    """

    def __init__(self, most_layers: int = NOTED_LAYERS) -> None:
        self._most, self._count = most_layers, 0
        self._noted: OrderedDict[Repository, OrderedDict[Digest, Image]] = OrderedDict()

    def touch(self, repository: Repository, manifest: Digest) -> bool:
        """
        Note that a manifest was sent; return False if its layers must be noted.
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
        Return the image that a client who requests a layer is probably pulling.
        """
        images = self._noted.get(repository)
        found = reversed(images.values()) if images is not None else ()
        return next((each for each in found if layer in each.places), None)


def image_of(repository: Repository, manifest: bytes, media_type: str) -> Image:
    """
    Return the image of a manifest; without layers if it is not an image.
    """
    try:
        return Image(repository, list(islice(layers(manifest, media_type), FACTS)))
    except ValueError:
        return Image(repository, [])
