"""
Everything that was pulled once can be pulled again without the registry.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .chain import Chain
from .clients import Docker, Podman, Skopeo
from .conftest import COUNTS, MakeChain
from .images import INDEX, Images
from .test_pull import by_digest, layout_digests, reference, trust


@pytest.fixture(params=["http", "https"])
def chain(
    make_chain: MakeChain,
    request: pytest.FixtureRequest,
    docker: Docker,
    skopeo: Skopeo,
    images: Images,
    tmp_path: Path,
) -> Chain:
    """
    Return a chain through which everything was pulled, and whose registry is gone.
    """
    chain: Chain = make_chain(tls=request.param == "https")
    source = f"docker://{reference(chain, images.multi)}"
    skopeo.copy(source, f"oci:{tmp_path}/before", *trust(chain, "src-"))
    docker.pull(reference(chain, images.multi))
    docker.pull(reference(chain, images.single))
    docker.forget()
    chain.daemon.settle()
    chain.cut()
    return chain


def test_docker_pulls_everything_again(chain: Chain, docker: Docker, images: Images) -> None:
    """
    By tag and by digest, single and multi-platform: Docker notices nothing.
    """
    for image in (images.single, images.multi):
        for name in (reference(chain, image), by_digest(chain, image)):
            docker.forget()
            assert docker.pull(name) == image.image_id


def test_skopeo_copies_every_platform_again(chain: Chain, skopeo: Skopeo, images: Images, tmp_path: Path) -> None:
    """
    Other platforms than Docker's are there as well, if they were pulled.
    """
    source = f"docker://{by_digest(chain, images.multi)}"
    skopeo.copy(source, f"oci:{tmp_path}/after", *trust(chain, "src-"))
    assert layout_digests(tmp_path / "after") == (images.multi.digest, images.multi.platforms)


def test_podman_pulls_what_others_have_pulled(chain: Chain, podman: Podman, images: Images) -> None:
    """
    A client that has never pulled before gets it as well.
    """
    podman.forget()
    assert podman.pull(reference(chain, images.multi), *trust(chain)) == images.multi.image_id


def test_the_answers_say_where_they_come_from(chain: Chain, images: Images) -> None:
    """
    A tag that can't be confirmed is STALE; content by digest is a HIT.
    """
    accept = {"Accept": INDEX}
    base = f"/v2/{images.multi.repository}"
    tag = chain.daemon.ask(f"{base}/manifests/{images.multi.tag}", headers=accept)
    digest = chain.daemon.ask(f"{base}/manifests/{images.multi.digest}", headers=accept)
    blob = chain.daemon.ask(f"{base}/blobs/{images.multi.layers[0]}")
    seen = [(each.status, each.headers["x-cache-status"]) for each in (tag, digest, blob)]
    assert seen == [(200, "STALE"), (200, "HIT"), (200, "HIT")]
    assert tag.headers["docker-content-digest"] == images.multi.digest


def test_what_was_never_pulled_is_an_upstream_failure(chain: Chain, images: Images) -> None:
    """
    The daemon does not call missing what it cannot know about.
    """
    missing = chain.daemon.ask(f"/v2/{images.big.repository}/manifests/{images.big.tag}")
    assert missing.status in (502, 503, 504)


@COUNTS
def test_a_start_without_ecr_serves_what_was_pulled(
    make_chain: MakeChain, docker: Docker, images: Images, count: str
) -> None:
    """
    Neither AWS nor ECR is there when the daemon starts: any of its processes serves the image.
    """
    chain = make_chain(settings={"PROXY_WORKER_PROCESSES": count})
    assert docker.pull(reference(chain, images.single)) == images.single.image_id
    docker.forget()
    chain.daemon.settle()
    chain.daemon.kill()
    chain.cut()
    chain.daemon.restart()
    base = f"/v2/{images.single.repository}"
    for _ in range(20):
        blob = chain.daemon.ask(f"{base}/blobs/{images.single.layers[0]}")
        assert (blob.status, blob.headers["x-cache-status"]) == (200, "HIT")
    tag = chain.daemon.ask(f"{base}/manifests/{images.single.tag}")
    assert (tag.status, tag.headers["x-cache-status"]) == (200, "STALE")
    assert docker.pull(reference(chain, images.single)) == images.single.image_id
