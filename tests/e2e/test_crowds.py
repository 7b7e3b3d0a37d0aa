"""
A thousand clients of each bad kind, and one good one among them.
"""

from __future__ import annotations

import contextlib
import re
import resource
import select
import socket
from collections.abc import Iterator

import pytest

from .clients import Docker
from .conftest import MakeChain
from .images import Images
from .processes import PATIENCE, eventually, free_port
from .test_metrics import page_of
from .test_pull import reference
from .test_together import blob_path

CROWD = 1000
GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR
SLOW, IDLE, READERS = "127.0.0.2", "127.0.0.3", "127.0.0.4"
"""The crowds' addresses: each has its own, and so its own limit."""


class Crowd:
    """
    Connections from one address, none of which reads.
    """

    def __init__(self, stack: contextlib.ExitStack, port: int, address: str, greeting: bytes = b"") -> None:
        self._poll, self.sockets = select.poll(), list[socket.socket]()
        for _ in range(CROWD):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(PATIENCE)
            client.bind((address, 0))
            client.connect(("127.0.0.1", port))
            client.sendall(greeting)
            self._poll.register(client, GONE)
            self.sockets.append(client)

    def gone(self) -> int:
        """
        Return how many of them the daemon has closed.
        """
        return len(self._poll.poll(0))


def one_more(port: int, address: str) -> bytes:
    """
    Send a request from an address, and return what comes before the end of the connection.
    """
    with socket.socket() as client:
        client.settimeout(PATIENCE)
        client.bind((address, 0))
        try:
            client.connect(("127.0.0.1", port))
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return client.makefile("rb").read()
        except ConnectionError:
            return b""


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """
    Close what is opened; and raise the limit of open files.
    """
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before < 4 * CROWD:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4 * CROWD), most))
    with contextlib.ExitStack() as opened:
        yield opened


def limit_acted(port: int, limit: str) -> int:
    """
    Return how often a limit was applied.
    """
    found = re.search(rf'ecr_proxy_client_limits_total{{limit="{limit}"}} (\S+)', page_of(port))
    return int(float(found[1])) if found else 0


def test_a_thousand_of_each_hold_up_nobody(
    make_chain: MakeChain, docker: Docker, images: Images, stack: contextlib.ExitStack
) -> None:
    """
    Slow heads, idle connections and readers that don't read, at once: another pulls; then all of them are closed.
    """
    admin = free_port()
    seconds = {"PROXY_HEADER_SECONDS": "30", "PROXY_IDLE_SECONDS": "30", "PROXY_SEND_SECONDS": "30"}
    others = {"PROXY_CONNECTIONS_PER_ADDRESS": str(CROWD), "PROXY_ADMIN_LISTEN": f"tcp:{admin}:interface=127.0.0.1"}
    chain = make_chain(settings=seconds | others)
    port, path = chain.daemon.port, blob_path(images)
    assert chain.daemon.ask(path).status == 200
    slow = Crowd(stack, port, SLOW, b"GET /v2/ HTTP/1.1\r\nHost: x\r\nA")
    assert one_more(port, SLOW) == b""  # before the others make the daemon busy: the first of these may soon be closed
    readers = Crowd(stack, port, READERS, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    idle = Crowd(stack, port, IDLE)
    assert chain.daemon.ask("/healthz").status == 200
    assert docker.pull(reference(chain, images.single)) == images.single.image_id
    assert chain.daemon.ask(path).status == 200
    crowds = (readers, slow, idle)
    eventually(lambda: [each.gone() for each in crowds] == [CROWD] * len(crowds), "all are closed", 2 * PATIENCE)
    assert chain.daemon.ask("/healthz").status == 200
    assert limit_acted(admin, "connections") >= 1
    assert {limit_acted(admin, each) >= CROWD for each in ("slow_reader", "slow_head", "idle")} == {True}
    assert "Traceback" not in chain.daemon.process.tail()
