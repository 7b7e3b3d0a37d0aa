"""
The files of deploy/containerd, deploy/containers and deploy/docker, read by the programs that they are for.

Images are pulled by the registry's own name, as if the proxy were not there; by Docker, by the proxy's.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from .certificates import PROXY, make_client
from .chain import Chain, Equipment
from .clients import Client, Podman, start_engine
from .conftest import MakeChain
from .images import Image, Images
from .installing import CHECKOUT
from .processes import Process, environment, eventually

DEPLOY = CHECKOUT / "deploy"
REGISTRY = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
PLACE = f"{PROXY}:5000"
# This machine, at an address that Docker does not take for loopback, which it trusts by default.
HOSTS = f"127.0.0.1 localhost\n0.0.0.0 {PROXY}\n"


@pytest.fixture
def chain(make_chain: MakeChain) -> Chain:
    """
    Return a chain whose daemon the recipes are about.
    """
    return make_chain()


@pytest.fixture
def etc(chain: Chain, tmp_path: Path) -> Path:
    """
    Return the additional files of /etc: the unchanged recipes, except for the port; and the address of the proxy.
    """
    directory = tmp_path / "etc"
    for recipe, place in (("containerd", "containerd"), ("containers", "containers"), ("docker", "docker")):
        shutil.copytree(DEPLOY / recipe, directory / place)
    for each in directory.rglob("*"):
        if each.is_file():
            each.write_text(each.read_text().replace(PLACE, f"{PROXY}:{chain.daemon.port}"))
    (directory / "hosts").write_text(HOSTS)
    return directory


class Containerd(Client):
    """
    containerd, by its own client and by the kubelet's interface.
    """

    @property
    def socket(self) -> Path:
        """
        Return the path of its socket.
        """
        return self.home / "containerd.sock"

    def pull(self, reference: str) -> None:
        """
        Pull by the client, which reads certs.d itself.
        """
        self.ctr("images", "pull", "--hosts-dir", "/etc/containerd/certs.d", reference)

    def ctr(self, *words: str) -> str:
        """
        Run the client.
        """
        return self.run("ctr", "--address", self.socket, *words)

    def pull_as_kubelet(self, reference: str) -> str:
        """
        Request an image by CRI, the interface of Kubernetes, and return its id.
        """
        asked = told(told(reference.encode()))  # PullImageRequest.image, ImageSpec.image
        return self._call("ImageService/PullImage", asked)[2:].decode()  # PullImageResponse.image_ref

    def ready(self) -> bool:
        """
        Return True if both ways are served: CRI works a little after its socket listens.
        """
        if self.attempt("ctr", "--address", self.socket, "version").status:
            return False
        try:
            self._call("RuntimeService/Version", b"")
        except grpc.RpcError:
            return False
        return True

    def _call(self, method: str, asked: bytes) -> bytes:
        with grpc.insecure_channel(f"unix:{self.socket}") as channel:
            call = channel.unary_unary(f"/runtime.v1.{method}")
            answer: bytes = call(asked, timeout=self.seconds, wait_for_ready=True)
        return answer


def told(value: bytes) -> bytes:
    """
    Encode the first field of a protobuf message, which is a text or another message.
    """
    length = bytes([len(value)]) if len(value) < 128 else bytes([len(value) % 128 + 128, len(value) // 128])
    return b"\x0a" + length + value


@contextmanager
def running_containerd_1(etc: Path, home: Path) -> Iterator[Containerd]:
    """
    Run a containerd that keeps to its own directory, and reads the recipe for its configuration.
    """
    client = Containerd(home, etc=etc)
    config = home / "config.toml"
    places = f'root = "{home}/root"\nstate = "{home}/state"\n[grpc]\naddress = "{client.socket}"\n'
    inner = f'[ttrpc]\naddress = "{home}/ttrpc.sock"\n'
    opt = f'[plugins."io.containerd.internal.v1.opt"]\npath = "{home}/opt"\n'
    config.write_text(f'version = 2\nimports = ["/etc/containerd/config.toml"]\n{places}{inner}{opt}')
    with running(client, config):
        yield client


@pytest.fixture
def containerd(etc: Path, tmp_path: Path) -> Iterator[Containerd]:
    with running_containerd_1(etc, tmp_path) as containerd:
        yield containerd


@contextmanager
def running(client: Containerd, config: Path, program: str = "containerd") -> Iterator[None]:
    """
    Run a containerd for a client, until both ways are served.
    """
    argv = client.command([program, "--config", config])
    process = Process(argv, environment(client.home), client.home / "containerd.log", client.home)
    try:
        process.wait_until(client.ready)
        yield
    finally:
        process.stop()


def was_asked(chain: Chain, image: Image) -> None:
    """
    Assert that the daemon got requests for both kinds of an image's content. Its lines are batched.
    """

    def kinds() -> list[str]:
        asked = re.findall(r"GET (/v2/\S+/(?:manifests|blobs)/)", chain.daemon.process.output.read_text())
        return sorted(set(asked))

    expected = [f"/v2/{image.repository}/{kind}/" for kind in ("blobs", "manifests")]
    eventually(lambda: kinds() == expected, "the daemon was asked for all of it")


def test_containerd_pulls_by_the_registrys_name(chain: Chain, containerd: Containerd, images: Images) -> None:
    """
    Its own client uses the proxy as the registry's mirror.
    """
    image = images.multi
    name = f"{REGISTRY}/{image.repository}:{image.tag}"
    containerd.pull(name)
    assert image.digest in containerd.ctr("images", "list", f"name=={name}")
    was_asked(chain, image)


def test_kubernetes_nodes_pull_by_the_registrys_name(chain: Chain, containerd: Containerd, images: Images) -> None:
    """
    So does containerd for a kubelet, by tag and by digest.
    """
    image = images.multi
    name = f"{REGISTRY}/{image.repository}"
    assert containerd.pull_as_kubelet(f"{name}:{image.tag}") == image.image_id
    assert containerd.pull_as_kubelet(f"{name}@{image.digest}") == image.image_id
    was_asked(chain, image)


def test_podman_pulls_by_the_registrys_name(chain: Chain, etc: Path, images: Images) -> None:
    """
    It reads the files that CRI-O, buildah and skopeo read.
    """
    podman = Podman(chain.home, etc=etc)  # podman's paths may only have fifty characters
    assert podman.pull(f"{REGISTRY}/{images.single.repository}:{images.single.tag}") == images.single.image_id
    was_asked(chain, images.single)


def test_docker_pulls_by_the_proxys_name(chain: Chain, etc: Path, tmp_path: Path, images: Images) -> None:
    """
    Docker has mirrors only for Docker Hub.
    """
    process, docker = start_engine(tmp_path, etc)
    try:
        name = f"{PROXY}:{chain.daemon.port}/{images.single.repository}:{images.single.tag}"
        assert docker.pull(name) == images.single.image_id
    finally:
        process.stop()


def test_docker_shows_its_certificate(
    make_chain: MakeChain, equipment: Equipment, tmp_path: Path, images: Images
) -> None:
    """
    With PROXY_CLIENT_CA set, Docker pulls with a certificate in its directory for the proxy, and not without.
    """
    made = make_client(tmp_path / "made", equipment.certificates, "Clients")
    chain = make_chain(tls=True, settings={"PROXY_CLIENT_CA": str(made / "clients.pem")})
    place = f"{PROXY}:{chain.daemon.port}"
    etc, directory = tmp_path / "etc", Path("docker/certs.d") / place
    shutil.copytree(made, etc / directory, ignore=shutil.ignore_patterns("clients.pem"))
    (etc / "hosts").write_text(HOSTS)
    process, docker = start_engine(tmp_path, etc)
    try:
        assert docker.pull(f"{place}/{images.single.repository}:{images.single.tag}") == images.single.image_id
        for name in ("client.cert", "client.key"):
            (Path(f"/proc/{process.pid}/root/etc") / directory / name).unlink()
        complaint = docker.complaint(f"{place}/{images.multi.repository}:{images.multi.tag}")
        assert "this proxy asks for a client certificate" in complaint
    finally:
        process.stop()
