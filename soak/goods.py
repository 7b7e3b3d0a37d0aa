"""
The content, the same for the stand-in that has it and the clients that know it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from tests.registry_content import SCHEMA2, Shelves, digest_of, layer
from tests.registry_server import noise

REPOSITORIES: Final = 4
SMALL: Final = 40
LARGE: Final = 7
LARGE_BYTES: Final = 17 * 2**20
"""From 16 MiB on, a blob comes over several connections."""
WRONG: Final = noise("wrong", LARGE_BYTES + 2**20)
"""What the bucket gives in place of a blob at times, as far as the blob goes."""


@dataclass(frozen=True)
class Goods:
    """
    Paths and the bytes that they lead to.

    @ivar tags: paths of manifests by tag.
    """

    small: dict[str, bytes]
    large: dict[str, bytes]
    manifests: dict[str, bytes]
    tags: dict[str, bytes]

    @property
    def blobs(self) -> dict[str, bytes]:
        return self.small | self.large

    @property
    def size(self) -> int:
        """
        Return the bytes of all blobs.
        """
        return sum(map(len, self.blobs.values()))


def fill(shelves: Shelves) -> Goods:
    """
    Push it all.
    """
    chance = random.Random("goods")
    goods = Goods({}, {}, {}, {})
    for number in range(SMALL):
        put_blob(shelves, goods.small, number, noise(f"small{number}", int(2 ** chance.uniform(4, 20.5))))
    for number in range(LARGE):
        put_blob(shelves, goods.large, number, noise(f"large{number}", LARGE_BYTES + number * 99_991))
    for number in range(REPOSITORIES):
        repository, tag = f"team/app{number}", f"v{number}"
        layers = [layer(f"layer{number}", noise(f"layer{number}", 200_000))]
        image = shelves.push_image(repository, tag, layers=layers, media_type=SCHEMA2)
        goods.manifests[f"/v2/{repository}/manifests/{image.digest}"] = image.manifest
        goods.tags[f"/v2/{repository}/manifests/{tag}"] = image.manifest
    return goods


def put_blob(shelves: Shelves, blobs: dict[str, bytes], number: int, data: bytes) -> None:
    repository = f"team/app{number % REPOSITORIES}"
    blobs[f"/v2/{repository}/blobs/{digest_of(data)}"] = data
    shelves.push_blob(repository, data)
