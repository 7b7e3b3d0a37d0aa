"""
Images made on the spot: there is nowhere to get them from.

Docker itself builds and pushes one; the others are OCI layouts written by
hand, so that their digests are known and their platforms can be many.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import platform
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .asking import ask
from .clients import Client, Docker, Skopeo

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"

MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
PLATFORMS = ("amd64", "arm64", "s390x")
MANY_TAGS = 230
BIG = 64 * 2**20

Descriptor = dict[str, Any]


@dataclass(frozen=True)
class Image:
    """
    An image in the registry, and the expected result of pulling it.
    """

    repository: str
    tag: str
    digest: str
    image_id: str
    layers: tuple[str, ...] = ()
    platforms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Images:
    """Everything that the registry holds."""

    single: Image
    multi: Image
    big: Image
    many: str
    excluded: str


@dataclass
class Layout:
    """
    An OCI image layout in a directory.
    """

    directory: Path
    top: list[Descriptor] = field(default_factory=list)

    def blob(self, media_type: str, content: bytes, **more: Any) -> Descriptor:
        """
        Write a blob and return its descriptor.
        """
        digest = hashlib.sha256(content).hexdigest()
        blobs = self.directory / "blobs/sha256"
        blobs.mkdir(parents=True, exist_ok=True)
        (blobs / digest).write_bytes(content)
        described = {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}
        return described | more

    def image(self, architecture: str, layers: list[tuple[str, bytes]]) -> Descriptor:
        """
        Write an image for one platform; a layer is a media type and a tar file.
        """
        plain = [gzip.decompress(data) if kind.endswith("gzip") else data for kind, data in layers]
        config = {
            "architecture": architecture,
            "os": "linux",
            "config": {"Cmd": ["/true"]},
            "rootfs": {
                "type": "layers",
                "diff_ids": [f"sha256:{hashlib.sha256(each).hexdigest()}" for each in plain],
            },
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.blob(CONFIG, json.dumps(config).encode()),
            "layers": [self.blob(kind, data) for kind, data in layers],
        }
        there = {"architecture": architecture, "os": "linux"}
        return self.blob(MANIFEST, json.dumps(manifest).encode(), platform=there)

    def index(self, manifests: list[Descriptor]) -> Descriptor:
        """
        Write an index of images.
        """
        body = {"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}
        return self.blob(INDEX, json.dumps(body).encode())

    def finish(self, top: Descriptor) -> str:
        """
        Name the layout's one image, and return the source that skopeo reads.
        """
        (self.directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        body = {"schemaVersion": 2, "manifests": [top]}
        (self.directory / "index.json").write_text(json.dumps(body))
        return f"oci:{self.directory}"

    def read(self, descriptor: Descriptor) -> Any:
        """
        Return a JSON blob.
        """
        digest = descriptor["digest"].removeprefix("sha256:")
        return json.loads((self.directory / "blobs/sha256" / digest).read_bytes())


def layer(name: str, content: bytes) -> bytes:
    """
    Return a layer with one file.
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def zipped(name: str, content: bytes) -> tuple[str, bytes]:
    """
    Return a compressed layer with one file.
    """
    return f"{LAYER}+gzip", gzip.compress(layer(name, content), 1, mtime=0)


def push_single(docker: Docker, registry: str, home: Path) -> Image:
    """
    Let Docker build an image of several layers, and push it.
    """
    context = home / "context"
    context.mkdir()
    sizes = {"small": 1_000, "middle": 300_000, "large": 6_000_000}
    for each, size in sizes.items():
        (context / each).write_bytes(os.urandom(size))
    steps = [f"COPY {each} /{each}" for each in sizes]
    (context / "Dockerfile").write_text("\n".join(["FROM scratch", *steps, 'CMD ["/small"]']))
    reference = f"{registry}/team/single:1.0"
    docker.run("docker", "build", "--network", "host", "--tag", reference, context)
    image_id = docker.run("docker", "image", "inspect", "--format", "{{.Id}}", reference)
    docker.run("docker", "push", reference)
    found = ask(f"http://{registry}/v2/team/single/manifests/1.0", headers=accept(DOCKER_MANIFEST))
    layers = tuple(each["digest"] for each in found.json()["layers"])
    digest = f"sha256:{hashlib.sha256(found.body).hexdigest()}"
    docker.forget()
    return Image("team/single", "1.0", digest, image_id, layers)


def push_multi(skopeo: Skopeo, registry: str, home: Path) -> Image:
    """
    Write an index of three platforms, which share a layer, and push it.
    """
    layout = Layout(home / "multi")
    shared = zipped("shared", os.urandom(200_000))
    made = {each: layout.image(each, [shared, zipped(each, os.urandom(50_000))]) for each in PLATFORMS}
    top = layout.index(list(made.values()))
    push(skopeo, layout.finish(top), f"{registry}/team/multi:latest")
    ours = layout.read(made[MACHINES[platform.machine()]])
    return Image(
        "team/multi",
        "latest",
        top["digest"],
        ours["config"]["digest"],
        tuple(each["digest"] for each in ours["layers"]),
        tuple(each["digest"] for each in made.values()),
    )


def push_big(skopeo: Skopeo, registry: str, home: Path) -> Image:
    """
    Write an image with one layer of the size that a test needs, and push it.
    """
    layout = Layout(home / "big")
    # The tar file's overhead is subtracted from the content.
    added = len(layer("big", b"")) + 1024
    data = layer("big", os.urandom(BIG - added - (BIG - added) % 512))
    top = layout.image("amd64", [(LAYER, data)])
    push(skopeo, layout.finish(top), f"{registry}/team/big:1")
    manifest = layout.read(top)
    layers = (manifest["layers"][0]["digest"],)
    return Image("team/big", "1", top["digest"], manifest["config"]["digest"], layers)


def push_tags(registry: str, image: Image, tags: int) -> None:
    """
    Give an image as many tags as make several pages.
    """
    url = f"http://{registry}/v2/{image.repository}/manifests"
    body = ask(f"{url}/{image.digest}", headers=accept(INDEX)).body
    for number in range(tags):
        done = ask(f"{url}/build-{number:04}", "PUT", {"Content-Type": INDEX}, body)
        if done.status != 201:
            raise RuntimeError(f"tag {number}: {done}")


def push_feature(oras: Client, registry: str) -> None:
    """
    Push a feature of dev containers, as their command publishes it.
    """
    about = json.dumps({"id": "feature", "version": "1.0.0"})
    (oras.home / "feature.json").write_text("{}")
    with tarfile.open(oras.home / "feature.tgz", "w:gz") as packed:
        packed.addfile(tarfile.TarInfo("install.sh"))
    oras.run(
        *("oras", "push", "--plain-http", "--annotation", f"dev.containers.metadata={about}"),
        *("--config", "feature.json:application/vnd.devcontainers", f"{registry}/team/feature:1"),
        "feature.tgz:application/vnd.devcontainers.layer.v1+tar",
    )


def push(skopeo: Skopeo, source: str, target: str) -> None:
    """
    Push an image to the plain registry.
    """
    skopeo.copy(source, f"docker://{target}", "--dest-tls-verify=false")


def accept(media_type: str) -> dict[str, str]:
    """
    Return the header that accepts one kind of manifest.
    """
    return {"Accept": media_type}


def push_all(docker: Docker, skopeo: Skopeo, registry: str, home: Path) -> Images:
    """
    Fill a registry.
    """
    home.mkdir()
    single = push_single(docker, registry, home)
    multi = push_multi(skopeo, registry, home)
    big = push_big(skopeo, registry, home)
    push_tags(registry, multi, MANY_TAGS)
    hidden = f"{registry}/secret/app:1"
    push(skopeo, f"oci:{home / 'multi'}", hidden)
    return Images(single, multi, big, "team/multi", "secret/app")
