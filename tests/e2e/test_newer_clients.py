"""
This year's clients, of Debian's unstable release: by the proxy's address over plain HTTP, and by ECR's own name.

Docker 28, containerd 2.1 and BuildKit try TLS first on localhost, and fall back to HTTP only if the answer
begins with C{HTTP/}.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .certificates import PROXY
from .chain import Chain
from .clients import Client, Docker, Podman, Skopeo, write_policy
from .conftest import MakeChain
from .images import Images
from .processes import Process, environment
from .sid import CONTAINERD_1_7, Sid
from .test_runtimes import DEPLOY, HOSTS, PLACE, REGISTRY, Containerd, running, was_asked

CHART = "team/chart"
NOTE = "team/note"
CACHED, PREFIX = "cached.example", "team/"
"""A registry with a possible pull-through cache in ECR, and the rule's prefix."""


@pytest.fixture
def chain(make_chain: MakeChain) -> Chain:
    """
    Return a chain that the clients pull through.
    """
    return make_chain(settings={"PROXY_REGISTRY_ALIASES": f"{REGISTRY} {CACHED}"})


@pytest.fixture
def place(chain: Chain) -> str:
    """
    Return the proxy's address as developers write it.
    """
    return f"localhost:{chain.daemon.port}"


@pytest.fixture
def etc(chain: Chain, tmp_path: Path) -> Path:
    """
    Return the unchanged recipes, except for the port; and the address of the proxy.
    """
    directory = tmp_path / "etc"
    shutil.copytree(DEPLOY / "containerd/certs.d", directory / "containerd/certs.d")
    shutil.copytree(DEPLOY / "docker/certs.d", directory / "docker/certs.d")
    shutil.copytree(DEPLOY / "containers", directory / "containers")
    hosts = directory / "docker/certs.d" / CACHED / "hosts.toml"
    hosts.parent.mkdir()
    hosts.write_text(
        f'server = "https://{CACHED}"\n[host."http://{PLACE}/v2/{PREFIX.rstrip("/")}"]\n'
        'capabilities = ["pull", "resolve"]\noverride_path = true\n'
    )
    for each in directory.rglob("*"):
        if each.is_file():
            each.write_text(each.read_text().replace(PLACE, f"{PROXY}:{chain.daemon.port}"))
    (directory / "hosts").write_text(HOSTS)
    return directory


@contextmanager
def running_docker(sid: Sid, etc: Path, home: Path) -> Iterator[Docker]:
    """
    Run a Docker Engine with containerd's image store, the default of new installations.
    """
    (etc / "docker/daemon.json").write_text(json.dumps({"features": {"containerd-snapshotter": True}}))
    host = f"unix://{home}/docker.sock"
    docker = Docker(home, {"DOCKER_HOST": host}, etc=etc, sid=sid)
    argv: list[str | Path] = [
        *("dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=native"),
        *("--data-root=/data/docker", "--exec-root=/run/docker", "--pidfile=/run/docker.pid", f"--host={host}"),
    ]
    engine = Process(docker.command(argv), environment(home), home / "dockerd.log", home)
    try:
        engine.wait_until(lambda: docker.attempt("docker", "version").status == 0)
        yield docker
    finally:
        engine.stop()


@contextmanager
def running_containerd_2(sid: Sid, etc: Path, home: Path) -> Iterator[Containerd]:
    """
    Run a containerd with the recipe for its second major version.
    """
    shutil.copy(DEPLOY / "containerd/config-2.toml", etc / "containerd/config.toml")
    with _running(sid, etc, home, 3, "containerd") as client:
        yield client


@contextmanager
def running_containerd_1_7(sid: Sid, etc: Path, home: Path) -> Iterator[Containerd]:
    """
    Run the last containerd of the first major version, with the recipe for that.
    """
    shutil.copy(DEPLOY / "containerd/config.toml", etc / "containerd/config.toml")
    with _running(sid, etc, home, 2, CONTAINERD_1_7) as client:
        yield client


@contextmanager
def _running(sid: Sid, etc: Path, home: Path, version: int, program: str) -> Iterator[Containerd]:
    client = Containerd(home, etc=etc, sid=sid)
    config = home / "config.toml"
    config.write_text(
        f'version = {version}\nimports = ["/etc/containerd/config.toml"]\n'
        f'root = "/data/root"\nstate = "/run/containerd"\n'
        f'[grpc]\naddress = "{client.socket}"\n[ttrpc]\naddress = "{home}/ttrpc.sock"\n'
    )
    with running(client, config, program):
        yield client


@pytest.fixture
def docker(sid: Sid, etc: Path, tmp_path: Path) -> Iterator[Docker]:
    with running_docker(sid, etc, tmp_path) as docker:
        yield docker


@pytest.fixture
def containerd(sid: Sid, etc: Path, tmp_path: Path) -> Iterator[Containerd]:
    with running_containerd_2(sid, etc, tmp_path) as containerd:
        yield containerd


def test_docker_28_pulls_from_localhost_over_plain_http(docker: Docker, place: str, images: Images) -> None:
    """
    With nothing configured, as developers do.
    """
    image = images.single
    assert docker.pull(f"{place}/{image.repository}:{image.tag}") == image.digest


def test_docker_28_pulls_by_the_registrys_name(docker: Docker, chain: Chain, images: Images) -> None:
    """
    It reads hosts.toml: image names need not change.
    """
    image = images.single
    assert docker.pull(f"{REGISTRY}/{image.repository}:{image.tag}") == image.digest
    was_asked(chain, image)


def test_docker_28_pulls_by_the_name_of_a_registry_that_ecr_caches(
    docker: Docker, chain: Chain, images: Images
) -> None:
    """
    As docs/howto/containerd.rst says of ECR's pull-through cache: the mirror's URL has the rule's prefix.
    """
    image = images.single
    assert docker.pull(f"{CACHED}/{image.repository.removeprefix(PREFIX)}:{image.tag}") == image.digest
    was_asked(chain, image)


def test_containerd_2_pulls_from_localhost_over_plain_http(containerd: Containerd, place: str, images: Images) -> None:
    """
    As with a developer's own registry.
    """
    image = images.multi
    containerd.ctr("images", "pull", f"{place}/{image.repository}:{image.tag}")
    assert containerd.pull_as_kubelet(f"{place}/{image.repository}:{image.tag}") == image.image_id


def test_containerd_2_pulls_by_the_registrys_name(chain: Chain, containerd: Containerd, images: Images) -> None:
    """
    As for a kubelet, by tag and by digest.
    """
    image = images.multi
    name = f"{REGISTRY}/{image.repository}"
    assert containerd.pull_as_kubelet(f"{name}:{image.tag}") == image.image_id
    assert containerd.pull_as_kubelet(f"{name}@{image.digest}") == image.image_id
    was_asked(chain, image)


def test_podman_5_pulls_by_address_and_by_the_registrys_name(
    sid: Sid, chain: Chain, etc: Path, place: str, images: Images
) -> None:
    """
    The second way by the recipe for registries.conf.
    """
    podman = Podman(chain.home, etc=etc, sid=sid)  # podman's paths may only have fifty characters
    image = images.single
    assert podman.pull(f"{place}/{image.repository}:{image.tag}", "--tls-verify=false") == image.image_id
    podman.forget()
    assert podman.pull(f"{REGISTRY}/{image.repository}:{image.tag}") == image.image_id


def test_skopeo_lists_all_tags_and_copies_all_platforms(sid: Sid, tmp_path: Path, place: str, images: Images) -> None:
    """
    Bytes unchanged.
    """
    skopeo = Skopeo(tmp_path, sid=sid)
    assert len(skopeo.tags(f"{place}/{images.many}", "--tls-verify=false")) > 200
    source = f"docker://{place}/{images.multi.repository}@{images.multi.digest}"
    skopeo.copy(source, f"oci:{tmp_path}/copy", "--src-tls-verify=false")
    assert json.loads((tmp_path / "copy/index.json").read_text())["manifests"][0]["digest"] == images.multi.digest


def test_buildah_pulls(sid: Sid, chain: Chain, place: str, images: Images) -> None:
    """
    For a build that begins with an image of the proxy.
    """
    write_policy(chain.home / ".config/containers")
    store = ("--root", chain.home / "buildah", "--runroot", chain.home / "run", "--storage-driver", "vfs")
    name = f"{place}/{images.single.repository}:{images.single.tag}"
    pulled = Client(chain.home, sid=sid).run("buildah", *store, "pull", "--quiet", "--tls-verify=false", name)
    assert f"sha256:{pulled}" == images.single.image_id


def test_oras_pulls_an_artifact(sid: Sid, tmp_path: Path, place: str, artifacts: bytes) -> None:
    """
    Complete, and by its tag.
    """
    oras = Client(tmp_path, sid=sid)
    assert "1" in oras.run("oras", "repo", "tags", "--plain-http", f"{place}/{NOTE}")
    oras.run("oras", "pull", "--plain-http", f"{place}/{NOTE}:1")
    assert (tmp_path / "note.bin").read_bytes() == artifacts


def test_helm_4_pulls_a_chart(tmp_path: Path, helm: Path, place: str, artifacts: bytes) -> None:
    """
    By its version, which is a tag.
    """
    Client(tmp_path).run(helm, "pull", f"oci://{place}/{CHART}", "--version", "0.1.0", "--plain-http")
    assert (tmp_path / "chart-0.1.0.tgz").exists()
