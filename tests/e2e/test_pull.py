"""
Docker, skopeo and podman pull through the daemon, over plain HTTP and over TLS.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from .chain import Chain
from .clients import CommandError, Docker, Podman, Skopeo
from .conftest import MakeChain
from .images import MANY_TAGS, Image, Images
from .processes import eventually

# A config and two layers: one platform of the index.
BLOBS_OF_A_PLATFORM = 3
SILENCE = 10.0
"""Clients try TLS before plain HTTP, and wait this many seconds for a silent server: no pull would be faster."""


@pytest.fixture(params=["http", "https"])
def chain(make_chain: MakeChain, request: pytest.FixtureRequest) -> Chain:
    """
    Return a chain with an empty cache, once with each scheme.
    """
    return make_chain(tls=request.param == "https")


def trust(chain: Chain, which: str = "") -> tuple[str, ...]:
    """
    Return the options by which skopeo and podman reach the daemon.
    """
    if chain.daemon.tls:
        return (f"--{which}cert-dir", str(chain.certificates.ca_directory))
    return (f"--{which}tls-verify=false",)


def reference(chain: Chain, image: Image) -> str:
    """
    Return an image's name with its tag.
    """
    return f"{chain.daemon.address}/{image.repository}:{image.tag}"


def by_digest(chain: Chain, image: Image) -> str:
    """
    Return an image's name with its digest.
    """
    return f"{chain.daemon.address}/{image.repository}@{image.digest}"


def layout_digests(directory: Path) -> tuple[str, tuple[str, ...]]:
    """
    Return the digest of a layout's index, and those of the images it lists.
    """
    top = json.loads((directory / "index.json").read_text())["manifests"][0]["digest"]
    index = json.loads((directory / "blobs/sha256" / top.removeprefix("sha256:")).read_text())
    return top, tuple(each["digest"] for each in index["manifests"])


def test_docker_pulls_by_tag(chain: Chain, docker: Docker, images: Images) -> None:
    """
    An image of several layers has the id that it was pushed with.
    """
    assert docker.pull(reference(chain, images.single)) == images.single.image_id


def test_docker_pulls_by_digest(chain: Chain, docker: Docker, images: Images) -> None:
    assert docker.pull(by_digest(chain, images.single)) == images.single.image_id


def test_docker_is_not_kept_waiting(chain: Chain, docker: Docker, images: Images) -> None:
    """
    A pull of a few megabytes takes a moment, even though docker tries TLS first.
    """

    def prompt() -> bool:
        docker.forget()
        started = time.monotonic()
        docker.pull(reference(chain, images.single))
        return time.monotonic() - started < SILENCE

    eventually(prompt, "a pull takes less than a client's patience with a silent server")  # one is enough to show it


def test_the_second_pull_brings_no_blob_from_the_bucket(chain: Chain, docker: Docker, images: Images) -> None:
    """
    What one client has pulled, the next one gets from the cache.
    """
    docker.pull(reference(chain, images.single))
    first = chain.counters()
    docker.forget()
    docker.pull(reference(chain, images.single))
    second = chain.counters()
    assert second["bucket"] == first["bucket"]
    # Docker may have kept the manifest of an earlier test, and request it in the second pull only.
    assert second["requests"].get("GET manifests", 0) <= 1


def test_docker_pulls_its_own_platform_of_an_index(chain: Chain, docker: Docker, images: Images) -> None:
    """
    Docker finds its platform in the index, and no other platform is fetched.
    """
    assert docker.pull(reference(chain, images.multi)) == images.multi.image_id
    assert chain.counters()["bucket"]["requests"] == BLOBS_OF_A_PLATFORM


def test_docker_pulls_an_index_by_digest(chain: Chain, docker: Docker, images: Images) -> None:
    assert docker.pull(by_digest(chain, images.multi)) == images.multi.image_id


def test_skopeo_copies_every_platform(chain: Chain, skopeo: Skopeo, images: Images, tmp_path: Path) -> None:
    """
    All platforms arrive, and the index keeps its digest.
    """
    options = trust(chain, "src-")
    skopeo.copy(f"docker://{reference(chain, images.multi)}", f"oci:{tmp_path}/out", *options)
    assert layout_digests(tmp_path / "out") == (images.multi.digest, images.multi.platforms)


def test_podman_pulls_its_own_platform(chain: Chain, podman: Podman, images: Images) -> None:
    """
    Podman gets the same image as Docker does.
    """
    podman.forget()
    pulled = podman.pull(reference(chain, images.multi), *trust(chain))
    assert pulled == images.multi.image_id


def test_podman_pulls_by_digest(chain: Chain, podman: Podman, images: Images) -> None:
    """
    Podman pulls Docker's own kind of image by its digest.
    """
    podman.forget()
    pulled = podman.pull(by_digest(chain, images.single), *trust(chain))
    assert pulled == images.single.image_id


def test_skopeo_lists_every_tag(chain: Chain, skopeo: Skopeo, images: Images) -> None:
    """
    The registry answers in pages; following their links through the daemon returns all tags.
    """
    options = trust(chain)
    tags = skopeo.tags(f"{chain.daemon.address}/{images.many}", *options)
    assert sorted(tags) == sorted({"latest", *(f"build-{n:04}" for n in range(MANY_TAGS))})


def test_a_page_of_tags_links_to_the_address_that_was_asked(chain: Chain, images: Images) -> None:
    """
    The next page comes from the daemon, not from the registry behind it.
    """
    first = chain.daemon.ask(f"/v2/{images.many}/tags/list?n=5000")
    assert first.status == 200
    second = chain.daemon.ask(f"/v2/{images.many}/tags/list?n=50")
    link = second.headers["link"]
    assert chain.front_url not in link
    assert link.startswith((f"<{chain.daemon.url}/v2/", "</v2/"))
    assert len(second.json()["tags"]) == 50


def test_an_unknown_authority_is_not_believed(make_chain: MakeChain, skopeo: Skopeo, images: Images) -> None:
    """
    The TLS pulls depend on the certificate: without its CA they fail.
    """
    chain = make_chain(tls=True)
    with pytest.raises(CommandError, match="certificate"):
        skopeo.tags(f"{chain.daemon.address}/{images.many}")
