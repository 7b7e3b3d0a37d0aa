"""
What the upstream holds: one image of several layers, and single blobs, as files named by their digest.

The bytes are random: they can't be compressed, and no run can benefit from another's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = "bench/app"
TAG = "latest"
MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
LAYER_TYPE = "application/vnd.docker.image.rootfs.diff.tar.gzip"
PIECE = 2**24
MEDIUM_BYTES = 2**20


@dataclass(frozen=True)
class Shelf:
    """
    What was put into C{directory}: digests of the image's manifest, and of blobs: large, larger still, and of 1 MiB.
    """

    directory: str
    manifest: str
    large: str
    large_bytes: int
    image_bytes: int
    medium: str
    huge: str
    huge_bytes: int

    def read(self, digest: str) -> bytes:
        """
        Return content by its digest.
        """
        return (Path(self.directory) / digest.partition(":")[2]).read_bytes()

    def blobs(self) -> dict[str, int]:
        """
        Return the image's blobs in the order of its manifest, config first, with their sizes.
        """
        manifest = json.loads(self.read(self.manifest))
        return {each["digest"]: each["size"] for each in (manifest["config"], *manifest["layers"])}

    def to_json(self) -> str:
        """
        Serialize it for another process.
        """
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Shelf:
        """
        Parse what C{to_json} wrote.
        """
        return cls(**json.loads(text))


def _put(directory: Path, pieces: Iterable[bytes]) -> str:
    state = hashlib.sha256()
    draft = directory / "draft"
    with draft.open("wb") as file:
        for piece in pieces:
            state.update(piece)
            file.write(piece)
    draft.rename(directory / state.hexdigest())
    return f"sha256:{state.hexdigest()}"


def _random(size: int) -> Iterable[bytes]:
    return (os.urandom(min(PIECE, size - at)) for at in range(0, size, PIECE))


def _json(document: Mapping[str, Any]) -> list[bytes]:
    return [json.dumps(document, indent=3).encode()]


def _described(media_type: str, digest: str, directory: Path) -> dict[str, Any]:
    size = (directory / digest.partition(":")[2]).stat().st_size
    return {"mediaType": media_type, "size": size, "digest": digest}


def fill(directory: Path, layers: int, layer_bytes: int, large_bytes: int, huge_bytes: int) -> Shelf:
    """
    Create the content.
    """
    directory.mkdir()
    digests = [_put(directory, _random(layer_bytes)) for _ in range(layers)]
    config = _put(directory, _json({"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": digests}}))
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": _described(CONFIG_TYPE, config, directory),
        "layers": [_described(LAYER_TYPE, digest, directory) for digest in digests],
    }
    manifest = _put(directory, _json(document))
    image_bytes = layers * layer_bytes + int(document["config"]["size"])  # type: ignore[index]
    large, medium, huge = (_put(directory, _random(size)) for size in (large_bytes, MEDIUM_BYTES, huge_bytes))
    return Shelf(str(directory), manifest, large, large_bytes, image_bytes, medium, huge, huge_bytes)
