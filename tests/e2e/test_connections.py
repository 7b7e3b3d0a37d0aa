"""
Connections with the wrong protocol, without a PROXY header, or beyond the system's limits.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import time
from pathlib import Path

import pytest

from .chain import Chain, Equipment
from .clients import Skopeo
from .conftest import MakeChain
from .images import Images
from .processes import PATIENCE, environment, eventually, free_port
from .test_together import blob_path

PROXY_LINE = b"PROXY TCP4 10.1.2.3 127.0.0.1 40000 80\r\n"
GOOD = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
MIB = 2**20


def hello() -> bytes:
    """
    Return the first flight of a TLS client.
    """
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def said_to(port: int, *pieces: bytes) -> bytes:
    """
    Send pieces one after the other, and only then read the answer, up to the end of the connection.
    """
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        for piece in pieces:
            client.sendall(piece)
            time.sleep(0.1)  # long enough for a reset to arrive, if there is one
        return client.makefile("rb").read()


def behind_balancer(make_chain: MakeChain) -> tuple[Chain, int]:
    """
    Start a daemon behind a load balancer, and return its port.
    """
    port, plain = free_port(), free_port()
    listen = f"haproxy:tcp:{port}:interface=127.0.0.1 tcp:{plain}:interface=127.0.0.1"
    chain = make_chain(wait=False, settings={"PROXY_LISTEN": listen})
    chain.daemon.url = f"http://127.0.0.1:{plain}"
    chain.daemon.wait()
    return chain, port


def test_a_tls_hello_to_a_plain_port_is_answered_in_http(make_chain: MakeChain) -> None:
    """
    In one piece or two: more input does not destroy the answer. openssl recognizes it.
    """
    chain, behind = behind_balancer(make_chain)
    first, plain = hello(), int(chain.daemon.url.rpartition(":")[2])
    for port, greeting in ((plain, b""), (behind, PROXY_LINE)):
        for pieces in ((greeting + first,), (greeting + first[:5], first[5:], b"x" * MIB)):
            got = said_to(port, *pieces)
            assert got.startswith(b"HTTP/1.0 400 Bad Request\r\n"), got
            assert got.endswith(b"This port speaks HTTP without TLS.\n"), got
    asked = ["openssl", "s_client", "-connect", f"127.0.0.1:{plain}"]
    done = subprocess.run(
        asked, input=b"", capture_output=True, timeout=PATIENCE, env=environment(Path("/")), check=False
    )
    assert b"packet length too long" in done.stderr or b"wrong version number" in done.stderr, done.stderr
    assert "127.0.0.1 speaks TLS to a plain port" in chain.daemon.process.tail()
    assert "10.1.2.3 speaks TLS to a plain port" in chain.daemon.process.tail()


@pytest.mark.parametrize("way", ["settings", "endpoint", "workers"])
def test_plain_http_to_a_tls_port_is_answered_in_http(make_chain: MakeChain, equipment: Equipment, way: str) -> None:
    port, certificates = free_port(), equipment.certificates
    described = f"ssl:{port}:privateKey={certificates.key}:certKey={certificates.chain}"
    settings: dict[str, dict[str, str | None]] = {
        "settings": {},
        "endpoint": {"PROXY_LISTEN": described},
        "workers": {"PROXY_WORKER_PROCESSES": "2"},
    }
    chain = make_chain(wait=False, tls=way != "endpoint", settings=settings[way])
    if way == "endpoint":
        chain.daemon.url, chain.daemon.port = f"https://127.0.0.1:{port}", port
    chain.daemon.wait()
    for pieces in ((GOOD,), (GOOD[:1], GOOD[1:], b"x" * MIB)):
        got = said_to(chain.daemon.port, *pieces)
        assert got.startswith(b"HTTP/1.0 400 Bad Request\r\n"), got
        assert got.endswith(b"use https.\n"), got
    assert chain.daemon.ask("/healthz").status == 200
    assert "127.0.0.1 speaks plain HTTP to a TLS port" in chain.daemon.process.tail()


def test_a_refusal_is_read_before_the_reset(make_chain: MakeChain) -> None:
    """
    A client that uploads before it reads gets the refusal of its upload.
    """
    chain = make_chain()
    head = b"PUT /v2/team/app/blobs/uploads/x HTTP/1.1\r\nHost: x\r\nContent-Length: 16777216\r\n\r\n"
    got = said_to(chain.daemon.port, head, *[b"x" * MIB] * 16)
    assert got.startswith(b"HTTP/1.1 405 "), got
    assert b"this proxy only reads" in got


def test_skopeo_falls_back_from_tls(make_chain: MakeChain, skopeo: Skopeo, images: Images) -> None:
    """
    It tries TLS first, with a registry that it was told not to verify.
    """
    chain = make_chain()
    found = skopeo.tags(f"{chain.daemon.address}/{images.single.repository}", "--tls-verify=false")
    assert images.single.tag in found
    assert "127.0.0.1 speaks TLS to a plain port" in chain.daemon.process.tail()


def test_silent_connections_lock_nobody_out_behind_a_balancer(make_chain: MakeChain) -> None:
    """
    Each of them is closed when its time is over.
    """
    chain, port = behind_balancer(make_chain)
    with contextlib.ExitStack() as opened:
        silent = [opened.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE)) for _ in range(300)]
        assert b" 200 OK" in said_to(port, PROXY_LINE + GOOD)
        eventually(lambda: all(is_gone(each) for each in silent), "all of them are closed", 20)
    assert "Traceback" not in chain.daemon.process.tail()


def is_gone(client: socket.socket) -> bool:
    """
    Return True if the other side has closed or reset a connection on which nothing was sent.
    """
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_without_descriptors_connections_wait(make_chain: MakeChain, images: Images) -> None:
    """
    Each of sixty clients is served in the end, and the log does not grow with time.
    """
    chain = make_chain(settings={"PROXY_IDLE_SECONDS": "5"})
    assert chain.daemon.ask(blob_path(images)).status == 200
    chain.daemon.settle()
    log, pid = chain.daemon.process.output, chain.daemon.process.pid
    used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    subprocess.run(["prlimit", f"--pid={pid}", f"--nofile={used + 20}"], check=True)
    before = log.stat().st_size
    with contextlib.ExitStack() as opened:
        several = [opened.enter_context(socket.create_connection(("127.0.0.1", chain.daemon.port))) for _ in range(60)]
        for each in several:
            each.settimeout(PATIENCE)
            each.sendall(GOOD)
        assert [each.makefile("rb").readline() for each in several] == [b"HTTP/1.1 200 OK\r\n"] * 60
    assert chain.daemon.ask(blob_path(images)).status == 200
    said = log.read_bytes()[before:].decode()
    assert "No more connections are accepted until one closes" in said
    assert len(said.splitlines()) < 150, said
    assert "EMFILE" not in said
