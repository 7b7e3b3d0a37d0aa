"""
The units of deploy/systemd, started by a real systemd as docs/systemd.rst says.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .asking import answers, ask
from .certificates import Certificates
from .chain import Chain, standard_settings
from .clients import Docker
from .conftest import FAILED, Figures, MakeChain
from .images import Images, accept
from .installing import CHECKOUT
from .machine import UNITS, Machine
from .processes import PATH, PATIENCE, children, eventually, free_port
from .test_clients import PASSWORD, authorization, htpasswd
from .test_ending import SLOW, Reading
from .test_together import blob_path
from .test_workers import wait_for_workers

__all__ = ["htpasswd"]

RECIPES = CHECKOUT / "deploy/systemd"
SERVICE, SOCKET = "ecr-proxy.service", "ecr-proxy.socket"
EXPOSURE = 12
"""Maximum exposure reported by systemd-analyze, of 100."""
CLIENTS = 6
RESTARTS = 3
OCI = "application/vnd.oci.image.index.v1+json"


@pytest.fixture(scope="module")
def machine(home: Path) -> Iterator[Machine]:
    """
    Run a systemd with the daemon installed.
    """
    directory = home / "machine"
    directory.mkdir()
    made = Machine(directory)
    yield made
    made.stop()


class Unit:
    """
    The daemon as a service, before a chain's front. The chain's own daemon has ended.
    """

    def __init__(self, machine: Machine, chain: Chain) -> None:
        self.machine, self.chain, self.port = machine, chain, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.settings = {
            **{name: value for name, value in standard_settings(chain.front_url).items() if value},
            "PROXY_PORT": str(self.port),
        }
        machine.run("rm", "-rf", f"/{UNITS}/{SERVICE}.d", f"/{UNITS}/{SOCKET}.d", "/run/ecr-proxy.log")
        for name in (SERVICE, SOCKET):
            machine.write(f"{UNITS}/{name}", (RECIPES / name).read_text())
        # A readable log, and no limit for starts: there are many within seconds here.
        log = "StandardOutput=append:/run/ecr-proxy.log\nStandardError=inherit\n"
        self.add(SERVICE, "test", f"[Unit]\nStartLimitIntervalSec=0\n[Service]\n{log}")

    def add(self, unit: str, name: str, text: str) -> None:
        """
        Add a drop-in, as an operator does.
        """
        self.machine.write(f"{UNITS}/{unit}.d/{name}.conf", text)

    def start(self, unit: str = SERVICE) -> None:
        """
        Start the service, or its socket.
        """
        lines = "".join(f"{name}={value}\n" for name, value in self.settings.items())
        self.machine.write("etc/ecr-proxy.env", lines, 0o600)
        self.machine.run("systemctl", "daemon-reload")
        self.machine.run("systemctl", "start", unit)

    def hand_over(self, files: Mapping[str, str]) -> None:
        """
        Have systemd pass files that only root can read, by the lines that are comments in the unit.
        """
        offered = re.findall(r"^# ((?:LoadCredential|Environment)=.*)$", (RECIPES / SERVICE).read_text(), re.MULTILINE)
        for name, text in files.items():
            self.machine.write(f"etc/ecr-proxy/{name}", text, 0o600)
            lines = [line for line in offered if f"{name}:" in line or f"%d/{name}" in line]
            assert lines
            self.add(SERVICE, name, "\n".join(["[Service]", *lines, ""]))

    def show(self, name: str) -> str:
        """
        Return systemd's status of the service.
        """
        return self.machine.show(SERVICE, name)

    def says(self, words: str) -> None:
        """
        Wait until its status has these words.
        """
        eventually(lambda: words in self.show("StatusText"), f"its status says {words}")

    def stop(self) -> None:
        """
        Stop both, and reset their state.
        """
        self.machine.run("systemctl", "stop", SOCKET, SERVICE)
        self.machine.attempt("systemctl", "reset-failed")

    def log(self) -> str:
        """
        Return the daemon's output.
        """
        path = self.machine.path("run/ecr-proxy.log")
        return path.read_text() if path.exists() else ""


@pytest.fixture
def unit(machine: Machine, make_chain: MakeChain, request: pytest.FixtureRequest) -> Iterator[Unit]:
    """
    Return a service that has not been started.
    """
    chain = make_chain(front=("--rate", str(SLOW)), wait=False)
    chain.daemon.process.stop()
    made = Unit(machine, chain)
    yield made
    made.stop()
    if request.node.stash.get(FAILED, False):
        request.node.add_report_section("teardown", "service", made.log())


@pytest.fixture
def serving(unit: Unit) -> Unit:
    """
    Return one that has a token.
    """
    unit.start()
    eventually(answers(f"{unit.url}/readyz"), "the daemon is ready")
    return unit


def test_the_unit_is_hardened() -> None:
    """
    systemd-analyze finds little that the daemon could do beside its work.
    """
    analysis = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", str(RECIPES / SERVICE)]
    done = subprocess.run(analysis, capture_output=True, text=True, timeout=PATIENCE, check=False, env={"PATH": PATH})
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_units_are_understood(unit: Unit) -> None:
    """
    systemd-analyze has no objections, with the socket's drop-in and without it.
    """
    verify = ("env", f"SYSTEMD_UNIT_PATH=/{UNITS}", "systemd-analyze", "verify", SERVICE, SOCKET)
    plain = unit.machine.attempt(*verify)
    unit.add(SERVICE, "socket", (RECIPES / f"{SERVICE}.d/socket.conf").read_text())
    with_socket = unit.machine.attempt(*verify)
    assert [(each.returncode, each.stderr) for each in (plain, with_socket)] == [(0, "")] * 2


def test_started_means_that_clients_are_served(unit: Unit, docker: Docker, images: Images) -> None:
    """
    As an unprivileged user, with its cache where systemd keeps caches; and stopped means a clean exit.
    """
    unit.settings["PROXY_CACHE_LIMIT"] = "4g"  # less than any disk that this runs on
    unit.start()
    assert ask(f"{unit.url}/healthz").status == 200
    pid = unit.show("MainPID")
    status = unit.machine.path(f"proc/{pid}/status").read_text()
    assert re.search(r"^Uid:\t(?!0\t)", status, re.MULTILINE)
    assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
    image = images.single
    assert docker.pull(f"127.0.0.1:{unit.port}/{image.repository}:{image.tag}") == image.image_id
    content = unit.machine.path("var/cache/private/ecr-proxy/content")
    assert any(each.is_file() for each in content.rglob("*"))
    unit.says("Ready; the cache holds 0.0 of 4.0 GiB")
    unit.machine.run("systemctl", "stop", SERVICE)
    found = [unit.show(name) for name in ("Result", "ExecMainStatus", "NRestarts")]
    assert found == ["success", "0", "0"]
    assert "Traceback" not in unit.log()


def test_it_starts_while_ecr_is_away(unit: Unit, images: Images) -> None:
    """
    It serves cached content; its status names the missing role, and says when that is there.
    """
    unit.start()
    eventually(answers(f"{unit.url}/readyz"), "the daemon is ready")
    assert ask(unit.url + blob_path(images)).status == 200
    unit.machine.run("systemctl", "stop", SERVICE)
    unit.settings["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{free_port()}"
    unit.start()
    assert ask(unit.url + blob_path(images)).status == 200
    unit.says("no token: ")
    assert unit.show("ActiveState") == "active"


def test_credentials_that_aws_refuses_are_a_failure(unit: Unit, refusing: str) -> None:
    """
    systemd reports that the service has failed, and its log why.
    """
    unit.machine.run("rm", "-rf", "/var/cache/private/ecr-proxy")  # a daemon that has content would serve it
    unit.settings |= {"PROXY_ECR_ENDPOINT": refusing, "AWS_ENDPOINT_URL": refusing}
    unit.add(SERVICE, "once", "[Service]\nRestart=no\n")
    unit.start()
    eventually(lambda: unit.show("ActiveState") == "failed", "the service has failed")
    assert (unit.show("Result"), unit.show("ExecMainStatus")) == ("exit-code", "1")
    assert "AWS credentials are refused" in unit.log()


def test_the_journal_knows_how_grave_each_line_is(unit: Unit) -> None:
    """
    journalctl finds an error by its level, and no other lines.
    """
    for name in ("systemd-journald.service", "systemd-journald.socket"):
        unit.machine.write(f"{UNITS}/{name}", (Path("/usr/lib/systemd/system") / name).read_text())
    unit.add(SERVICE, "with-journal", "[Service]\nStandardOutput=journal\nStandardError=journal\n")
    unit.settings["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{free_port()}"
    unit.machine.run("systemctl", "daemon-reload")
    unit.machine.run("systemctl", "start", "systemd-journald.service")
    unit.start()

    def told(*options: str) -> str:
        return unit.machine.run("journalctl", "--quiet", "--output=cat", f"--unit={SERVICE}", *options)

    eventually(lambda: "No token: " in told("--priority=err"), "the journal has the error")
    assert "starting up" in told()
    assert "starting up" not in told("--priority=err")


def test_a_loop_that_stands_still_is_started_anew(serving: Unit) -> None:
    """
    The watchdog notices that the loop has stalled.
    """
    serving.add(SERVICE, "soon", "[Service]\nWatchdogSec=10\nRestartSec=0\n")
    serving.machine.run("systemctl", "daemon-reload")
    serving.machine.run("systemctl", "restart", SERVICE)
    first = serving.show("MainPID")
    serving.machine.run("kill", "-STOP", first)
    eventually(lambda: serving.show("MainPID") not in (first, "0"), "another was started")
    eventually(answers(f"{serving.url}/readyz"), "the daemon is ready")
    assert serving.show("NRestarts") != "0"


def test_reloading_reads_again(unit: Unit, htpasswd: Path, equipment_certificates: Certificates) -> None:
    """
    With key, certificate, passwords and AWS credentials passed by LoadCredential, which only root can read.
    """
    given = {"tls.key": equipment_certificates.key, "tls.crt": equipment_certificates.chain, "htpasswd": htpasswd}
    unit.hand_over({name: source.read_text() for name, source in given.items()})
    keys = [unit.settings.pop(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    profile = "[default]\naws_access_key_id={}\naws_secret_access_key={}\n".format(*keys)
    unit.hand_over({"aws": profile})
    unit.start()
    url, ca = f"https://127.0.0.1:{unit.port}", equipment_certificates.ca
    eventually(lambda: ask(f"{url}/readyz", ca=ca).status == 200, "the daemon is ready")
    assert ask(f"{url}/v2/", ca=ca).status == 401
    assert ask(f"{url}/v2/", headers=authorization("ann", PASSWORD), ca=ca).status == 200
    unit.machine.run("systemctl", "reload", SERVICE)
    eventually(lambda: "key and certificate were read again" in unit.log(), "they were read again")
    eventually(lambda: unit.show("ActiveState") == "active", "the service has done it")
    assert unit.show("NRestarts") == "0"


@pytest.fixture
def equipment_certificates(unit: Unit) -> Certificates:
    """
    Return the server's certificate of this run.
    """
    return unit.chain.certificates


class Load:
    """
    Clients that send requests all the time, each on a connection of its own, and remember failures.
    """

    def __init__(self, url: str, images: Images) -> None:
        image = images.multi
        manifest = (f"{url}/v2/{image.repository}/manifests/{image.tag}", accept(OCI))
        blobs = [(f"{url}/v2/{image.repository}/blobs/{digest}", dict[str, str]()) for digest in image.layers]
        self._questions = [manifest, *blobs]
        self.answered, self.wrong = 0, list[object]()
        self._done = threading.Event()

    def _ask(self) -> None:
        while not self._done.is_set():
            for url, headers in self._questions:
                try:
                    status: object = ask(url, headers=headers, timeout=PATIENCE).status
                except Exception as problem:  # noqa: BLE001 (whatever it is, it should not be)
                    status = problem
                self.answered += 1
                if status != 200:
                    self.wrong.append((url, status))

    def during(self, action: Callable[[], object]) -> None:
        """
        Send requests while something happens, and a little longer.
        """
        with ThreadPoolExecutor(CLIENTS) as pool:
            running = [pool.submit(self._ask) for _ in range(CLIENTS)]
            try:
                action()
                enough = self.answered + 10 * CLIENTS
                eventually(lambda: self.answered >= enough, "all are answered again")
            finally:
                self._done.set()
            for each in running:
                each.result(timeout=2 * PATIENCE)


@pytest.fixture
def behind_socket(unit: Unit) -> Unit:
    """
    Return a service whose socket listens, and which has no request yet.
    """
    unit.add(SOCKET, "port", f"[Socket]\nListenStream=\nListenStream=[::]:{unit.port}\n")
    unit.add(SERVICE, "socket", (RECIPES / f"{SERVICE}.d/socket.conf").read_text())
    unit.start(SOCKET)
    return unit


def restart_under_way(unit: Unit, images: Images) -> None:
    """
    Restart the service while a client is being sent something, and have it read on to the end.
    """
    transfer, before = Reading(unit.chain, blob_path(images), 1), unit.show("MainPID")
    unit.machine.run("systemctl", "restart", "--no-block", SERVICE)
    assert transfer.rest() == images.big.layers[0]
    transfer.connection.close()
    eventually(lambda: unit.show("MainPID") not in (before, "0"), "the next was started")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_restart_behind_the_socket_fails_nobody(
    behind_socket: Unit, docker: Docker, images: Images, figures: Figures, workers: str
) -> None:
    """
    The first client starts the daemon; a client during a restart waits for the next one, and one that is being sent
    something gets all of it.
    """
    unit = behind_socket
    unit.settings["PROXY_WORKER_PROCESSES"] = workers
    unit.start(SOCKET)
    assert unit.show("ActiveState") == "inactive"
    load = Load(unit.url, images)
    unit.chain.daemon.url = unit.url

    def restart() -> None:
        for _ in range(RESTARTS):
            restart_under_way(unit, images)

    load.during(restart)
    assert load.wrong == []
    assert unit.show("NRestarts") == "0"
    image = images.single
    assert docker.pull(f"127.0.0.1:{unit.port}/{image.repository}:{image.tag}") == image.image_id
    figures.append(
        f"{RESTARTS} restarts behind systemd's socket, {workers} process(es): {load.answered} answers, none wrong"
    )


def test_the_socket_speaks_tls(behind_socket: Unit) -> None:
    """
    If key and certificate are set, over the socket that systemd has bound as well.
    """
    unit = behind_socket
    made = unit.chain.certificates
    unit.hand_over({"tls.key": made.key.read_text(), "tls.crt": made.chain.read_text()})
    unit.start(SOCKET)
    assert ask(f"https://127.0.0.1:{unit.port}/healthz", ca=made.ca).status == 200


@pytest.mark.parametrize("kind", ["path", "abstract"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_main_process_alone_tells(make_chain: MakeChain, tmp_path: Path, kind: str, workers: str) -> None:
    """
    Over a socket with a path and an abstract one: ready, reloading, ready again, stopping; only the process that was
    started, and with systemd's clock.
    """
    name = str(tmp_path / "notify") if kind == "path" else f"@ecr-proxy-{os.getpid()}-{workers}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        manager.settimeout(PATIENCE)
        manager.bind(name if kind == "path" else f"\0{name[1:]}")
        told: list[tuple[int, list[str]]] = []

        def wait_for(fact: str) -> None:
            while True:
                data, ancillary, _, _ = manager.recvmsg(4096, socket.CMSG_SPACE(12))
                told.append((int.from_bytes(ancillary[0][2][:4], "little"), data.decode().split("\n")))
                if any(each.startswith(fact) for each in told[-1][1]):
                    return

        settings = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "2000000", "PROXY_WORKER_PROCESSES": workers}
        chain = make_chain(wait=False, settings=settings)
        wait_for("READY=1")
        assert chain.daemon.ask("/healthz").status == 200
        if workers == "2":
            wait_for_workers(chain)
            assert len(children(chain.daemon.process.pid)) == 2
        wait_for("WATCHDOG=1")
        chain.daemon.process.send(signal.SIGHUP)
        wait_for("RELOADING=1")
        assert told[-1][1][1].startswith("MONOTONIC_USEC=")
        wait_for("READY=1")
        chain.daemon.process.send(signal.SIGTERM)
        wait_for("STOPPING=1")
        assert chain.daemon.process.wait() == 0
        assert {pid for pid, _ in told} == {chain.daemon.process.pid}
