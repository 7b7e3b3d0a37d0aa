"""
All registries of a company behind one daemon, by the recipes of deploy/registries: this year's clients and the
machine's own pull from each by the names that people use.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.registry_content import Shelves

from .asking import ask
from .certificates import PROXY
from .chain import Daemon, Equipment, standard_settings, start_moto, start_registry, wait_or_stop
from .clients import Client, Docker, Podman, Skopeo
from .company import EU, HUB, LOGIN, PUBLIC, SHARED, TAGS, US, TokenService, fill
from .conftest import FAILED
from .images import MACHINES, Layout, push, zipped
from .installing import CHECKOUT
from .processes import Process, environment, eventually, free_port
from .sid import Sid
from .test_newer_clients import running_containerd_1_7, running_containerd_2, running_docker
from .test_runtimes import DEPLOY, HOSTS, PLACE, running_containerd_1

RECIPES = DEPLOY / "registries"
NAMES = {EU: f"{EU}/team/app", US: f"{US}/team/app", PUBLIC: f"{PUBLIC}/team/app", HUB: f"{HUB}/library/tool"}
OWN = 64 * 2**10
"""More bytes than all content that the registries do not share."""
ASKED = 30
"""Failing requests, more than needed to open a circuit breaker."""
DOCKER, BUILDER = "docker 28", "its builder"
CONTAINERD_2, CONTAINERD_1_7, CONTAINERD_1_6 = "containerd 2", "containerd 1.7", "containerd 1.6"
MIRRORING = (DOCKER, BUILDER, CONTAINERD_2, CONTAINERD_1_7, CONTAINERD_1_6)
"""Clients that fall back to the registry itself if its mirror lacks content, whatever the name."""
CLIENTS = (*MIRRORING, "podman 5", "podman 4")
Pull = Callable[[str], str]


class Company:
    """
    Four registries, AWS, and a daemon before them.

    @ivar images: for each registry and tag, the digests of the manifest and of the config: clients call either its id.
    @ivar elsewhere: a registry that the daemon's configuration does not name. It has what HUB has, for everybody.
    """

    def __init__(self, equipment: Equipment, home: Path, skopeo: Skopeo) -> None:
        self._home, self._ports = home, {each: [free_port() for _ in range(3)] for each in (EU, US, PUBLIC)}
        self._processes: dict[str, Process] = {}
        self._ending = ExitStack()
        try:
            for each in self._ports:
                self.start(each)
            self.images = {each: _ids(each) for each in self._ports}
            self._processes["elsewhere"], address = start_registry(home / "elsewhere", home / "storage")
            self.elsewhere = address.replace("127.0.0.1", "localhost")
            self.images[HUB] = _push_tools(home, skopeo, address)
            tokens = TokenService(home)
            self._ending.callback(tokens.stop)
            self._processes[HUB], address = start_registry(home / "hub", home / "storage", tokens.auth)
            self._processes["aws"], aws = start_moto(home)
            endpoints = {each: f"127.0.0.1:{ports[0]}" for each, ports in self._ports.items()} | {HUB: address}
            self.daemon = Daemon(equipment, home / "daemon", self._settings(endpoints, aws))
            self.daemon.wait()
        except BaseException:
            self.stop()
            raise

    def _settings(self, endpoints: Mapping[str, str], aws: str) -> dict[str, str | None]:
        """
        Return the settings: the recipe, with the registries' addresses and the password here.
        """
        text, password = (RECIPES / "ecr-proxy.toml").read_text(), self._home / "password"
        password.write_text(LOGIN[1])
        text = text.replace("/etc/ecr-proxy/docker.io", str(password)).replace('"pulls"', f'"{LOGIN[0]}"')
        for each, address in endpoints.items():
            region = re.search(r"\.ecr\.([a-z0-9-]+)\.", each)
            here = f'endpoint = "http://{address}"\n' + (f'region = "{region[1]}"\n' if region else "")
            text = text.replace(f'[registry."{each}"]\n', f'[registry."{each}"]\n{here}')
        config = self._home / "ecr-proxy.toml"
        config.write_text(text)
        left_out = ("PROXY_ECR_ENDPOINT", "PROXY_NAMESPACE_PATTERN", "PROXY_REGISTRY_ALIASES", "AWS_REGION")
        return standard_settings(aws) | dict.fromkeys(left_out) | {"PROXY_CONFIG": str(config)}

    def start(self, registry: str) -> None:
        """
        Start one of those that count what they send.
        """
        port, bucket, realm = map(str, self._ports[registry])
        argv = [sys.executable, "-m", "tests.e2e.company", registry, "--port", port]
        argv += ["--bucket-port", bucket, "--realm-port", realm]
        process = Process(argv, environment(self._home), self._home / f"{registry}.log", CHECKOUT)
        self._processes[registry] = process
        wait_or_stop(process, f"http://localhost:{port}/_asked")

    @contextmanager
    def without(self, registry: str) -> Iterator[None]:
        """
        Stop a registry for a while.
        """
        self._processes[registry].stop()
        try:
            yield
        finally:
            self.start(registry)

    def sent(self) -> int:
        """
        Count the bytes of blobs that those three have sent since they started.
        """
        asked = (ask(f"http://localhost:{ports[0]}/_asked").json() for ports in self._ports.values())
        return sum(each["bytes_sent"] for each in asked)

    def stop(self) -> None:
        """
        Stop everything, the daemon first.
        """
        for process in self._running():
            process.stop()
        self._ending.close()

    def logs(self) -> str:
        """
        Return the end of each program's output.
        """
        return "\n".join(f"-- {each.name}\n{each.tail()}" for each in self._running())

    def _running(self) -> list[Process]:
        daemon = [self.daemon.process] if hasattr(self, "daemon") else []  # another one after a restart
        return [*daemon, *self._processes.values()]


def _ids(registry: str) -> dict[str, tuple[str, str]]:
    return {tag: (image.digest, image.config) for tag, image in fill(Shelves(), registry).items()}


def _push_tools(home: Path, skopeo: Skopeo, address: str) -> dict[str, tuple[str, str]]:
    found = {}
    for tag in TAGS:
        layout = Layout(home / f"tool-{tag}")
        top = layout.image(MACHINES[platform.machine()], [zipped("tool", tag.encode())])
        push(skopeo, layout.finish(top), f"{address}/library/tool:{tag}")
        found[tag] = top["digest"], layout.read(top)["config"]["digest"]
    return found


@pytest.fixture(scope="module")
def place(home: Path) -> Path:
    """
    Return a directory with a short name: podman's paths may only have fifty characters.
    """
    directory = home / "company"
    for name in ("docker", "containerd-2", "containerd-1.7", "containerd-1.6", "podman-5", "podman-4"):
        (directory / name).mkdir(parents=True)
    return directory


@pytest.fixture(scope="module")
def company(equipment: Equipment, place: Path, skopeo: Skopeo) -> Iterator[Company]:
    """
    Return the registries behind their daemon.
    """
    company = Company(equipment, place, skopeo)
    yield company
    company.stop()


@pytest.fixture(autouse=True)
def told(company: Company, request: pytest.FixtureRequest) -> Iterator[None]:
    """
    Show the programs' output if a test fails.
    """
    yield
    if request.node.stash.get(FAILED, False):
        request.node.add_report_section("teardown", "logs", company.logs())


@pytest.fixture(scope="module")
def clients(sid: Sid, company: Company, place: Path) -> Iterator[Mapping[str, Pull]]:
    """
    Return how each client pulls, by the unchanged recipes, except for the proxy's port.
    """
    recent, older = _etc(place / "etc", company.daemon), _etc(place / "older", company.daemon)
    shutil.copy(DEPLOY / "containerd/config.toml", older / "containerd/config.toml")
    last = _etc(place / "last", company.daemon)
    with (
        running_docker(sid, recent, place / "docker") as docker,
        running_containerd_2(sid, recent, place / "containerd-2") as second,
        running_containerd_1_7(sid, last, place / "containerd-1.7") as seventh,
        running_containerd_1(older, place / "containerd-1.6") as sixth,
    ):
        yield {
            DOCKER: docker.pull,
            BUILDER: partial(_build, docker),
            CONTAINERD_2: second.pull_as_kubelet,
            CONTAINERD_1_7: seventh.pull_as_kubelet,
            CONTAINERD_1_6: sixth.pull_as_kubelet,
            "podman 5": Podman(place / "podman-5", etc=recent, sid=sid).pull,
            "podman 4": Podman(place / "podman-4", etc=older).pull,
        }


def _build(docker: Docker, name: str) -> str:
    """
    Build an image from another by BuildKit, the builder within the engine, and return the digest of that one.
    """
    context, said = docker.home / "context", docker.home / "built.json"
    context.mkdir(exist_ok=True)
    (context / "Dockerfile").write_text(f"FROM {name}\nCOPY Dockerfile /\n")
    docker.run("docker", "buildx", "build", "--quiet", "--no-cache", "--metadata-file", said, context)
    (base,) = json.loads(said.read_text())["buildx.build.provenance"]["materials"]
    return f"sha256:{base['digest']['sha256']}"


def _etc(directory: Path, daemon: Daemon) -> Path:
    recipes = {
        "containerd/certs.d/_default/hosts.toml": "hosts.toml",
        "docker/certs.d/_default/hosts.toml": "hosts.toml",
        "containers/registries.conf.d/registries.conf": "registries.conf",
    }
    for target, recipe in recipes.items():
        (directory / target).parent.mkdir(parents=True)
        (directory / target).write_text((RECIPES / recipe).read_text().replace(PLACE, f"{PROXY}:{daemon.port}"))
    (directory / "hosts").write_text(HOSTS)
    return directory


@pytest.mark.parametrize("client", CLIENTS)
def test_each_registry_is_pulled_from_by_its_own_name(
    company: Company, clients: Mapping[str, Pull], client: str
) -> None:
    """
    The same repository and tag of three registries are three images, whose layer has crossed the network once.

    A client requests it once as well, so each begins with another registry.
    """
    first = CLIENTS.index(client)
    for registry in [*NAMES, *NAMES][first:][: len(NAMES)]:
        assert clients[client](f"{NAMES[registry]}:1") in company.images[registry]["1"]
    size = len(SHARED)
    assert size <= company.sent() < size + OWN


def test_one_that_is_stopped_costs_the_others_nothing(company: Company, clients: Mapping[str, Pull]) -> None:
    """
    Clients go on pulling new images from the others, however many requests that one gets.
    """
    with company.without(EU), ThreadPoolExecutor(ASKED) as pool:
        paths = [f"/v2/team/app{number}/manifests/2?ns={EU}" for number in range(ASKED)]
        assert {each.status for each in pool.map(company.daemon.ask, paths)} <= {502, 503, 504}
        for pull in clients.values():
            for registry in (US, PUBLIC, HUB):
                assert pull(f"{NAMES[registry]}:2") in company.images[registry]["2"]


def test_what_refers_to_an_image_is_found_where_the_registry_keeps_no_list(
    company: Company, sid: Sid, place: Path
) -> None:
    """
    oras looks for a tag instead, if it learns that there is no list: distribution 2 says so by a page.
    """
    oras = Client(place, sid=sid)
    (place / "note").write_text("about the tool")
    tool = f"{company.elsewhere}/library/tool:1"
    oras.run("oras", "attach", "--plain-http", "--artifact-type=test/note", tool, "note")
    image = f"localhost:{company.daemon.port}/{NAMES[HUB]}:1"
    assert "test/note" in oras.run("oras", "discover", "--plain-http", "--format=tree", image)


def test_other_registries_are_asked_themselves(company: Company, clients: Mapping[str, Pull]) -> None:
    """
    The proxy answers 404 for what its configuration does not name, and Docker and containerd go on; as they do while it
    is stopped.
    """
    name, images = f"{company.elsewhere}/library/tool", company.images[HUB]
    for client in MIRRORING:
        assert clients[client](f"{name}:1") in images["1"]
    eventually(lambda: company.elsewhere in company.daemon.process.output.read_text(), "the proxy was asked first")
    company.daemon.process.stop()
    try:
        for client in MIRRORING:
            assert clients[client](f"{name}:2") in images["2"]
    finally:
        company.daemon.restart()
