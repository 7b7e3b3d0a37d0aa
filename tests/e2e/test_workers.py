"""
A daemon of several processes: what clients notice of it, and what is left of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from .chain import Chain, Equipment, standard_settings
from .clients import Docker
from .conftest import MakeChain
from .images import Images
from .processes import PATH, PATIENCE, Process, alive, children, environment, eventually, free_port, serving
from .sockets import connected, descendants, listening
from .test_pull import reference
from .test_together import blob_path, download_together

CLIENTS = 20
CROWD = 300
SEVERAL = {"PROXY_WORKER_PROCESSES": "2"}


def workers(chain: Chain) -> list[int]:
    """
    List the workers of a daemon.
    """
    return children(chain.daemon.process.pid)


def wait_for_workers(chain: Chain, count: int = 2) -> list[int]:
    """
    Wait until all workers serve, and list them.
    """
    return serving(chain.daemon.process.pid, count)


def ask_unix(path: Path, target: str) -> bytes:
    """
    Send one request over a UNIX socket, and return the status line.
    """
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(path))
        client.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return client.makefile("rb").readline().strip()


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_docker_pulls(make_chain: MakeChain, docker: Docker, images: Images, tls: bool) -> None:
    """
    An image is complete through workers, and again from the cache; each worker requests one token from AWS.
    """
    chain = make_chain(tls=tls, settings=SEVERAL)
    assert docker.pull(reference(chain, images.single)) == images.single.image_id
    first = chain.counters()
    docker.forget()
    assert docker.pull(reference(chain, images.single)) == images.single.image_id
    second = chain.counters()
    assert second["bucket"] == first["bucket"]
    assert len(workers(chain)) == 2
    assert second["token_calls"] == 2


def test_twenty_clients_cost_one_transfer(make_chain: MakeChain, images: Images, hold: Path) -> None:
    """
    Whichever workers serve the clients, a cold blob is fetched once for all of them, and all have the right bytes.
    """
    chain = make_chain(front=("--hold", str(hold)), settings=SEVERAL)
    wait_for_workers(chain)
    transfers = download_together(chain.daemon.url + blob_path(images), CLIENTS, hold.unlink)
    assert {each.status for each in transfers} == {200}
    assert {each.digest for each in transfers} == {images.big.layers[0]}
    assert chain.counters()["bucket"]["bytes"] == transfers[0].size
    assert sorted(each.cache for each in transfers) == ["JOINED"] * (CLIENTS - 1) + ["MISS"]


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_nothing_listens_but_for_clients_and_the_operator(make_chain: MakeChain, tmp_path: Path, kind: str) -> None:
    """
    In all processes there are two listening sockets, and each worker has the clients' one; the parent, which has both,
    has no connection of a client's. A worker can't be reached in any other way: no other TCP port, no UNIX socket with
    or without a file, no socket for datagrams.
    """
    admin, path = free_port(), tmp_path / "clients"
    if kind == "unix":
        listen = {"PROXY_LISTEN": f"unix:{path}", "PROXY_ADMIN_LISTEN": f"unix:{tmp_path}/operators"}
        chain = make_chain(wait=False, settings=SEVERAL | listen)
        chain.daemon.process.wait_until(lambda: TestUnixSocket.ready(path))
    else:
        chain = make_chain(settings=SEVERAL | {"PROXY_ADMIN_LISTEN": f"tcp:{admin}:interface=127.0.0.1"})
    clients, operators = (str(path), f"{tmp_path}/operators") if kind == "unix" else (chain.daemon.port, admin)
    address = str(path) if kind == "unix" else ("127.0.0.1", chain.daemon.port)
    parent, pids = chain.daemon.process.pid, wait_for_workers(chain)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            client = stack.enter_context(socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET))
            client.settimeout(PATIENCE)
            client.connect(address)
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"
        assert listening(parent) == {clients, operators}
        assert {frozenset(listening(each)) for each in pids} == {frozenset({clients})}
        assert sorted(descendants(parent)) == sorted([parent, *pids])
        if kind == "tcp":
            assert connected(parent) == 0
            assert sum(map(connected, pids)) >= 20


def test_what_listens_is_seen_whatever_its_kind(tmp_path: Path) -> None:
    """
    The previous test misses none.
    """
    before, abstract = listening(os.getpid()), f"\0e2e-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        ports = {stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]}
        ports.add(stack.enter_context(socket.create_server(("::1", 0), family=socket.AF_INET6)).getsockname()[1])
        for path in (str(tmp_path / "path"), abstract, ""):  # the kernel names the last one, abstract as well
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            listener.listen()
        named = listener.getsockname().decode()
        datagrams = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        datagrams.bind(("127.0.0.1", 0))
        expected = {*ports, str(tmp_path / "path"), abstract.replace("\0", "@"), named.replace("\0", "@")}
        assert listening(os.getpid()) - before == expected | {f"udp {datagrams.getsockname()[1]}"}


def test_a_crowd_is_refused_nothing(make_chain: MakeChain) -> None:
    """
    All of them come at the same moment, and each requests what a worker has to read from the disk.
    """
    chain = make_chain(settings=SEVERAL)
    wait_for_workers(chain)
    # Whichever worker answers, it has a token by now.
    eventually(lambda: {chain.daemon.ask("/readyz").status for _ in range(40)} == {200}, "all workers are ready")
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", chain.daemon.port))) for _ in range(CROWD)
        ]
        for client in clients:
            client.settimeout(PATIENCE)
            client.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        statuses = {client.makefile("rb").readline().strip() for client in clients}
    assert statuses == {b"HTTP/1.1 200 OK"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_worker_that_is_killed_is_replaced(
    make_chain: MakeChain, docker: Docker, images: Images, number: signal.Signals
) -> None:
    """
    Another replaces it, and pulls go on. Truncating a file that is mapped into memory makes the kernel kill the
    process.
    """
    chain = make_chain(settings=SEVERAL)
    before = wait_for_workers(chain)
    os.kill(before[0], number)
    eventually(lambda: set(workers(chain)) - set(before) != set() and len(workers(chain)) == 2, "a worker in its place")
    assert docker.pull(reference(chain, images.single)) == images.single.image_id


def test_sigterm_ends_all(make_chain: MakeChain, images: Images) -> None:
    """
    Of a daemon that is told to end no process is left, and no error.
    """
    chain = make_chain(settings=SEVERAL)
    assert chain.daemon.ask(blob_path(images)).status == 200
    pids = wait_for_workers(chain)
    assert chain.daemon.process.terminate() == 0
    assert [each for each in pids if alive(each)] == []
    assert "Traceback" not in chain.daemon.process.tail()


def test_a_kill_ends_all(make_chain: MakeChain) -> None:
    """
    Workers do not outlive a killed parent: their channels end.
    """
    chain = make_chain(settings=SEVERAL)
    pids = wait_for_workers(chain)
    chain.daemon.process.kill()
    try:
        eventually(lambda: not any(map(alive, pids)), "the workers have ended")
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def test_a_kill_leaves_the_port_to_the_next_daemon(make_chain: MakeChain, images: Images) -> None:
    """
    Although workers go on sending to clients of unfinished responses.
    """
    chain = make_chain(settings=SEVERAL)
    assert chain.daemon.ask(blob_path(images)).status == 200
    pids = wait_for_workers(chain)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", chain.daemon.port))
        client.sendall(f"GET {blob_path(images)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert client.recv(1) == b"H"
        chain.daemon.process.kill()
        eventually(lambda: is_free(chain.daemon.port), "the port is free")
        assert any(map(alive, pids))


def is_free(port: int) -> bool:
    """
    Return True if a daemon can listen on a port.
    """
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


class TestUnixSocket:
    """
    A UNIX socket that several processes share.
    """

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "socket"

    @pytest.fixture
    def chain(self, make_chain: MakeChain, path: Path) -> Chain:
        """
        Return a daemon that listens there.
        """
        chain = make_chain(wait=False, settings=SEVERAL | {"PROXY_LISTEN": f"unix:{path}:mode=600"})
        chain.daemon.process.wait_until(lambda: self.ready(path))
        return chain

    @staticmethod
    def ready(path: Path) -> bool:
        """
        Return True if the daemon answers.
        """
        try:
            return b" 200 " in ask_unix(path, "/readyz")
        except OSError:
            return False

    def test_serves(self, chain: Chain, path: Path, images: Images) -> None:
        """
        Blobs come over it.
        """
        assert b" 200 " in ask_unix(path, f"/v2/{images.single.repository}/manifests/{images.single.tag}")

    def test_keeps_its_mode(self, chain: Chain, path: Path) -> None:
        """
        The operator's setting decides which clients may connect.
        """
        wait_for_workers(chain)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_outlives_a_worker(self, chain: Chain, path: Path) -> None:
        """
        A worker that ends, even cleanly, leaves the socket to the others.
        """
        before = wait_for_workers(chain)
        os.kill(before[0], signal.SIGTERM)
        eventually(lambda: set(workers(chain)) - set(before) != set() and len(workers(chain)) == 2, "another worker")
        assert self.ready(path)

    def test_ends_without_complaint(self, chain: Chain, path: Path) -> None:
        """
        It is removed once, by the process that created it.
        """
        wait_for_workers(chain)
        assert chain.daemon.process.terminate() == 0
        assert not path.exists()
        assert "Traceback" not in chain.daemon.process.tail()


def test_an_ssl_endpoint_is_served(make_chain: MakeChain, equipment: Equipment) -> None:
    """
    TLS by an endpoint string works with workers as it does without.
    """
    made = equipment.certificates
    for count in ("1", "2"):
        port = free_port()
        listen = f"ssl:{port}:privateKey={made.key}:certKey={made.chain}"
        chain = make_chain(wait=False, settings={"PROXY_WORKER_PROCESSES": count, "PROXY_LISTEN": listen})
        chain.daemon.url = f"https://127.0.0.1:{port}"
        chain.daemon.wait()


class TestSystemdSocket:
    """
    A socket that systemd has bound.
    """

    @pytest.fixture
    def process(self, make_chain: MakeChain, equipment: Equipment, tmp_path: Path) -> Iterator[tuple[Process, Path]]:
        """
        Start the daemon as systemd does for the first client.
        """
        activate = shutil.which("systemd-socket-activate", path=PATH)
        assert activate is not None, "not installed: systemd; run tests/e2e/install-packages.sh"
        path = tmp_path / "socket"
        chain = make_chain()
        listen = "systemd:domain=UNIX:index=0"
        settings = standard_settings(chain.front_url) | SEVERAL | {"PROXY_LISTEN": listen}
        given = {name: value for name, value in settings.items() if value} | {
            "PROXY_CACHE_DIR": str(tmp_path / "cache")
        }
        flags = [f"--setenv={name}={value}" for name, value in given.items()]
        argv = [
            activate,
            f"--listen={path}",
            "--fdname=proxy",
            *flags,
            str(equipment.twistd),
            "-n",
            "--pidfile=",
            "ecr-proxy",
        ]
        process = Process(argv, environment(tmp_path, given), tmp_path / "activated.log", tmp_path)
        process.wait_until(path.exists)
        yield process, path
        process.stop()

    def test_is_served_by_workers(self, process: tuple[Process, Path]) -> None:
        """
        The parent passes on the socket that it was given.
        """
        activated, path = process
        activated.wait_until(lambda: TestUnixSocket.ready(path))
        pids = children(activated.pid)
        assert len(pids) == 2
        assert activated.terminate() == 0
        assert not any(map(alive, pids))
