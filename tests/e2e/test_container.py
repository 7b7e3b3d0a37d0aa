"""
The image as the Dockerfile builds it, run by a real Docker Engine as README.rst says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from .asking import answers, ask
from .bases import BASE
from .chain import Chain, standard_settings
from .clients import Docker
from .conftest import Figures, MakeChain
from .images import Images
from .installing import CHECKOUT
from .kustomize import Rendered, overlay
from .processes import PATIENCE, eventually, free_port

IMAGE = "ecrproxy:e2e"
CONFINED = ("--user", "65532:65532", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
MIB = 2**20


@pytest.fixture(scope="module")
def image(builder: Docker, base: str) -> str:
    built = ("docker", "build", "--network", "host", "--build-arg", f"BASE={base}", "--tag", IMAGE, CHECKOUT)
    builder.run(*built)
    return IMAGE


class Container:
    """
    The daemon in a container, before a chain's front.
    """

    def __init__(
        self,
        docker: Docker,
        image: str,
        settings: Mapping[str, str | None],
        *mounts: str,
        confined: Sequence[str] = CONFINED,
    ) -> None:
        self._docker, self.port = docker, free_port()
        given = {**settings, "PROXY_PORT": str(self.port)}
        words = [word for name, value in given.items() if value for word in ("--env", f"{name}={value}")]
        volumes = [word for mount in mounts for word in ("--volume", mount)]
        running = ("docker", "run", "--detach", "--health-interval", "1s", "--network", "host")
        started = (*running, *confined, *volumes, *words, image)
        self.name = docker.run(*started)

    @property
    def state(self) -> dict[str, Any]:
        """
        Return its state from the engine.
        """
        described: list[dict[str, Any]] = json.loads(self._docker.run("docker", "inspect", self.name))
        state: dict[str, Any] = described[0]["State"]
        return state

    def wait_until_healthy(self) -> None:
        """
        Wait until the HEALTHCHECK succeeds.
        """
        eventually(lambda: self.state["Health"]["Status"] == "healthy", "the container is healthy")

    def stop(self) -> int:
        """
        Have the engine stop it like any container, and return its exit status.
        """
        self._docker.run("docker", "stop", "--time", f"{PATIENCE:.0f}", self.name)
        status: int = self.state["ExitCode"]
        self._docker.run("docker", "rm", "--force", "--volumes", self.name)
        return status


def test_the_image_is_small_and_says_what_it_is(builder: Docker, image: str, figures: Figures) -> None:
    """
    Two layers above the base, no pip at run time, labels.
    """
    base, made = (json.loads(builder.run("docker", "image", "inspect", each))[0] for each in (BASE, image))
    added = (made["Size"] - base["Size"]) / MIB
    figures.append(f"the image is its base and {added:.0f} MiB, in {len(made['RootFS']['Layers'])} layers")
    assert len(made["RootFS"]["Layers"]) - len(base["RootFS"]["Layers"]) == 2
    assert made["Config"]["Labels"]["org.opencontainers.image.title"] == "ecrproxy"
    pip = ("docker", "run", "--rm", "--network", "host", "--entrypoint", "/opt/ecrproxy/bin/python", image, "-m", "pip")
    assert "No module named pip" in builder.attempt(*pip).complaint


def test_docker_pulls_through_the_container(
    builder: Docker, image: str, make_chain: MakeChain, docker: Docker, images: Images
) -> None:
    """
    With a read-only root, without any capability, its cache in a volume; SIGTERM ends it cleanly.
    """
    chain: Chain = make_chain()
    container = Container(builder, image, standard_settings(chain.front_url))
    container.wait_until_healthy()
    pulled = docker.pull(f"127.0.0.1:{container.port}/{images.single.repository}:{images.single.tag}")
    assert pulled == images.single.image_id
    assert container.stop() == 0


def test_the_health_check_speaks_tls(builder: Docker, image: str, make_chain: MakeChain, tmp_path: Path) -> None:
    """
    A container that serves TLS becomes healthy too.
    """
    chain: Chain = make_chain()
    made = chain.certificates
    shown = tmp_path / "tls"
    shown.mkdir(mode=0o755)
    for name, source in (("tls.key", made.key), ("tls.crt", made.chain)):
        (shown / name).write_bytes(source.read_bytes())
        (shown / name).chmod(0o644)
    files = {"PROXY_SSL_KEY": "/tls/tls.key", "PROXY_SSL_CERTIFICATE": "/tls/tls.crt"}
    container = Container(builder, image, standard_settings(chain.front_url) | files, f"{shown}:/tls:ro")
    container.wait_until_healthy()
    assert ask(f"https://127.0.0.1:{container.port}/healthz", ca=made.ca).status == 200
    assert container.stop() == 0


def test_the_nginx_proxys_own_line_works(
    builder: Docker, image: str, make_chain: MakeChain, docker: Docker, images: Images, tmp_path: Path
) -> None:
    """
    As root, with a directory that Docker makes on the host: it is given to the daemon's user, and so is the process.
    """
    chain: Chain = make_chain()
    mounted = tmp_path / "made" / "cache"
    container = Container(builder, image, standard_settings(chain.front_url), f"{mounted}:/cache", confined=())
    container.wait_until_healthy()
    pulled = docker.pull(f"127.0.0.1:{container.port}/{images.single.repository}:{images.single.tag}")
    assert pulled == images.single.image_id
    owners = {each.stat().st_uid for each in (mounted, *mounted.rglob("*"), Path(f"/proc/{container.state['Pid']}"))}
    assert owners == {65532}
    rights = Path(f"/proc/{container.state['Pid']}/status").read_text()
    assert "CapEff:\t0000000000000000" in rights
    assert container.stop() == 0


def test_root_without_rights_is_told_what_to_do(builder: Docker, image: str) -> None:
    """
    The daemon does not run as root, whatever capabilities are left.
    """
    started = ("docker", "run", "--rm", "--network", "host", "--cap-drop", "ALL", "--tmpfs", "/cache", image)
    assert "--user 65532:65532" in builder.attempt(*started).complaint


def confinement(rendered: Rendered) -> list[str]:
    """
    Return Docker's options for a kubelet's user and privileges.
    """
    pod, container = rendered.pod["spec"], rendered.container
    user, own = pod["securityContext"], container["securityContext"]
    flags = ["--user", f"{user['runAsUser']}:{user['runAsGroup']}"]
    flags += [word for each in own["capabilities"]["drop"] for word in ("--cap-drop", each)]
    flags += ["--read-only"] if own["readOnlyRootFilesystem"] else []
    flags += [] if own["allowPrivilegeEscalation"] else ["--security-opt", "no-new-privileges"]
    return flags


def empty_directories(rendered: Rendered, home: Path) -> list[str]:
    """
    Create what a kubelet creates for the mounts: directories that are empty, root's, and writable for all.
    """
    volumes = []
    for mount in rendered.container["volumeMounts"]:
        directory = home / mount["name"]
        directory.mkdir()
        directory.chmod(0o777)
        volumes.append(f"{directory}:{mount['mountPath']}")
    return volumes


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_pod_of_the_kubernetes_manifests_serves(
    builder: Docker, image: str, make_chain: MakeChain, docker: Docker, images: Images, tmp_path: Path, workers: str
) -> None:
    """
    Its container starts, passes its probes, and serves, with the rights that the manifests give.
    """
    chain: Chain = make_chain()
    rendered = overlay(tmp_path / "overlay", [])
    probed = free_port()
    own = {"PROXY_WORKER_PROCESSES": workers, "PROXY_METRICS_LISTEN": f"tcp:{probed}"}
    settings = {**rendered.settings, **standard_settings(chain.front_url), **own}
    volumes = empty_directories(rendered, tmp_path)
    container = Container(builder, image, settings, *volumes, confined=confinement(rendered))
    for probe in ("startup", "readiness", "liveness"):
        path = rendered.container[f"{probe}Probe"]["httpGet"]["path"]
        eventually(answers(f"http://127.0.0.1:{probed}{path}"), f"the {probe} probe succeeds")
    pulled = docker.pull(f"127.0.0.1:{container.port}/{images.single.repository}:{images.single.tag}")
    assert pulled == images.single.image_id
    assert container.stop() == 0
