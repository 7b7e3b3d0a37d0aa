"""
What the stand-in for ECR holds: repositories of blobs, manifests and tags.

Pure data, without HTTP and without a clock. The one surprise in here is
L{negotiated}: like ECR it rewrites an image manifest when a client requests it by tag
and does not accept the stored type, so one tag can have two digests.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
OCI_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
OCI_GZIP: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
SCHEMA2: Final = "application/vnd.docker.distribution.manifest.v2+json"
SCHEMA2_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
SIGNED: Final = "application/vnd.docker.distribution.manifest.v1+prettyjws"
SCHEMA2_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
SCHEMA2_LAYER: Final = "application/vnd.docker.image.rootfs.diff.tar"
SCHEMA2_GZIP: Final = "application/vnd.docker.image.rootfs.diff.tar.gzip"

_TO_SCHEMA2: Final = {
    OCI_MANIFEST: SCHEMA2,
    OCI_CONFIG: SCHEMA2_CONFIG,
    OCI_LAYER: SCHEMA2_LAYER,
    OCI_GZIP: SCHEMA2_GZIP,
}
_TO_OCI: Final = {docker: oci for oci, docker in _TO_SCHEMA2.items()}


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    """
    Return the digest of bytes as registries write it.
    """
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


@dataclass(frozen=True)
class Manifest:
    """
    Manifest bytes and the media type they were pushed with.

    @ivar signed: the digest of the signed bytes, if it is signed: registries call it by that one.
    """

    data: bytes
    media_type: str
    signed: str = ""

    @property
    def digest(self) -> str:
        """
        Return the digest by which registries call it.
        """
        return self.signed or digest_of(self.data)

    def parsed(self) -> dict[str, Any]:
        """
        Return the manifest as JSON; empty if it is not a JSON object.
        """
        try:
            found = json.loads(self.data)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Image:
    """
    One pushed image and the names of all its parts.
    """

    repository: str
    digest: str
    manifest: bytes
    media_type: str
    config: str
    layers: tuple[str, ...]
    platform: str

    def descriptor(self) -> dict[str, Any]:
        """
        Return the image as an entry of an index.
        """
        system, _, machine = self.platform.partition("/")
        return {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": len(self.manifest),
            "platform": {"architecture": machine, "os": system},
        }


@dataclass
class Repository:
    """
    One repository and its content.
    """

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, Manifest] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def tag_names(self) -> list[str]:
        """
        Return all tags in a stable order that is not alphabetical: nor is ECR's.
        """
        return sorted(self.tags, key=lambda tag: hashlib.sha256(tag.encode()).digest())

    def delete_manifest(self, digest: str) -> None:
        """
        Delete a manifest and its tags.
        """
        del self.manifests[digest]
        self.tags = {tag: to for tag, to in self.tags.items() if to != digest}

    def referrers(self, subject: str) -> Iterator[dict[str, Any]]:
        """
        Describe every manifest that names this digest as its subject.
        """
        for manifest in self.manifests.values():
            parsed = manifest.parsed()
            if parsed.get("subject", {}).get("digest") != subject:
                continue
            config_type = parsed.get("config", {}).get("mediaType", "")
            yield {
                "mediaType": manifest.media_type,
                "digest": manifest.digest,
                "size": len(manifest.data),
                "artifactType": parsed.get("artifactType", config_type),
                "annotations": parsed.get("annotations", {}),
            }


def accepted(accept: str | None) -> frozenset[str]:
    """
    Return the media types of an Accept header; a missing header accepts anything.
    """
    wanted = set()
    for item in (accept or "").split(","):
        media_type, *parameters = (part.strip().lower() for part in item.split(";"))
        if media_type and "q=0" not in parameters:
            wanted.add(media_type)
    return frozenset(wanted)


def negotiated(stored: Manifest, accept: str | None) -> Manifest:
    """
    Return what ECR answers for a tag: the stored manifest, or its OCI or schema2 equivalent.

    Without an equivalent (indexes, layers that are neither tar nor gzip) it is sent as stored.
    """
    wanted = accepted(accept)
    if not wanted or wanted & {stored.media_type, "*/*", "application/*"}:
        return stored
    for twins in (_TO_SCHEMA2, _TO_OCI):
        if twins.get(stored.media_type) in wanted:
            return _converted(stored, twins) or stored
    return stored


def _converted(stored: Manifest, twins: Mapping[str, str]) -> Manifest | None:
    """
    Return the same manifest with every media type converted, if all of them can be.
    """
    manifest = stored.parsed()
    parts = [manifest.get("config", {}), *manifest.get("layers", [])]
    if any(part.get("mediaType") not in twins for part in parts):
        return None
    manifest["mediaType"] = twins[stored.media_type]
    for part in parts:
        part["mediaType"] = twins[part["mediaType"]]
    return Manifest(json.dumps(manifest, indent=3).encode(), twins[stored.media_type])


def layer(name: str, content: bytes) -> bytes:
    """
    Return a real layer with one file: the same bytes each time, so the same digest.
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(content), 0o644
        archive.addfile(entry, io.BytesIO(content))
    return gzip.compress(packed.getvalue(), compresslevel=1, mtime=0)


def _is_gzip(data: bytes) -> bool:
    return data.startswith(b"\x1f\x8b")


def image_config(layers: Sequence[bytes], platform: str) -> bytes:
    """
    Return a config that real clients accept: its diff ids are those of the unpacked layers.
    """
    system, _, machine = platform.partition("/")
    diffs = [digest_of(gzip.decompress(data) if _is_gzip(data) else data) for data in layers]
    config = {
        "architecture": machine,
        "os": system,
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": diffs},
        "history": [{"created_by": f"layer {number}"} for number, _ in enumerate(diffs)],
    }
    return json.dumps(config).encode()


def image_manifest(config: bytes, layers: Sequence[bytes], media_type: str) -> bytes:
    """
    Return a manifest of OCI's or Docker's kind over a config and its layers.
    """

    def described(data: bytes, oci_type: str) -> dict[str, Any]:
        kind = oci_type if media_type == OCI_MANIFEST else _TO_SCHEMA2[oci_type]
        return {"mediaType": kind, "size": len(data), "digest": digest_of(data)}

    manifest = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": described(config, OCI_CONFIG),
        "layers": [described(data, OCI_GZIP if _is_gzip(data) else OCI_LAYER) for data in layers],
    }
    return json.dumps(manifest).encode()


def signed_manifest(content: Mapping[str, Any], signature: str = "c2lnbmVk", **more: str | int) -> Manifest:
    """
    Return a manifest of schema 1 with a signature after its own members. Nobody verifies the signature.

    @param more: says otherwise what is signed: C{formatLength}, C{formatTail}.
    """
    plain = json.dumps(content, indent=3).encode()
    inside, tail = plain[:-2], plain[-2:]
    form = {"formatLength": len(inside), "formatTail": base64.urlsafe_b64encode(tail).decode().rstrip("="), **more}
    signed_tail = base64.urlsafe_b64decode(f"{form['formatTail']}==")
    protected = base64.urlsafe_b64encode(json.dumps(form).encode()).decode().rstrip("=")
    signatures = json.dumps([{"header": {"alg": "ES256"}, "signature": signature, "protected": protected}])
    return Manifest(
        inside + b',\n   "signatures": ' + signatures.encode() + tail, SIGNED, digest_of(inside + signed_tail)
    )


class Shelves:
    """
    All repositories, and how to fill and empty them.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}

    def push_blob(self, repository: str, data: bytes, algorithm: str = "sha256") -> str:
        """
        Put a blob into one repository; return its digest.
        """
        digest = digest_of(data, algorithm)
        self._repository(repository).blobs[digest] = data
        return digest

    def push_manifest(self, repository: str, manifest: bytes | Mapping[str, Any], media_type: str, *tags: str) -> str:
        """
        Put a manifest into a repository under any number of tags; return its digest.
        """
        data = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
        pushed = Manifest(data, media_type)
        into = self._repository(repository)
        into.manifests[pushed.digest] = pushed
        into.tags.update(dict.fromkeys(tags, pushed.digest))
        return pushed.digest

    def push_signed(self, repository: str, *tags: str) -> Manifest:
        """
        Put a signed manifest of schema 1 into a repository.
        """
        layers = [{"blobSum": self.push_blob(repository, layer("old", b"image"))}]
        content = {"schemaVersion": 1, "name": repository, "fsLayers": layers, "history": [{"v1Compatibility": "{}"}]}
        pushed, into = signed_manifest(content), self._repository(repository)
        into.manifests[pushed.digest] = pushed
        into.tags.update(dict.fromkeys(tags, pushed.digest))
        return pushed

    def push_image(
        self,
        repository: str,
        *tags: str,
        layers: Sequence[bytes] = (layer("hello", b"world"), layer("more", b"of it")),
        platform: str = "linux/amd64",
        media_type: str = OCI_MANIFEST,
    ) -> Image:
        """
        Put a small image into a repository; with SCHEMA2 as media type one of Docker's kind.
        """
        config = image_config(layers, platform)
        manifest = image_manifest(config, layers, media_type)
        return Image(
            repository=repository,
            digest=self.push_manifest(repository, manifest, media_type, *tags),
            manifest=manifest,
            media_type=media_type,
            config=self.push_blob(repository, config),
            layers=tuple(self.push_blob(repository, data) for data in layers),
            platform=platform,
        )

    def push_index(self, repository: str, tag: str, images: Sequence[Image], media_type: str = OCI_INDEX) -> str:
        """
        Put an index of images for several platforms into a repository; return its digest.
        """
        entries = [image.descriptor() for image in images]
        index = {"schemaVersion": 2, "mediaType": media_type, "manifests": entries}
        return self.push_manifest(repository, index, media_type, *([tag] if tag else []))

    def delete_tag(self, repository: str, tag: str) -> None:
        """
        Delete a tag, but not its manifest.
        """
        del self.repositories[repository].tags[tag]

    def delete_manifest(self, repository: str, digest: str) -> None:
        """
        Delete a manifest and its tags.
        """
        self.repositories[repository].delete_manifest(digest)

    def delete_blob(self, repository: str, digest: str) -> None:
        """
        Delete a blob from one repository.
        """
        del self.repositories[repository].blobs[digest]

    def delete_repository(self, repository: str) -> None:
        """
        Delete a repository and its content.
        """
        del self.repositories[repository]

    def _repository(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())
