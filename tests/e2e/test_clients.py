"""
Access control: real clients with passwords, certificates and addresses, and where their secrets go.
"""

from __future__ import annotations

import base64
import socket
from collections.abc import Iterator
from pathlib import Path

import bcrypt
import pytest

from .asking import ask
from .certificates import make_client
from .chain import Chain, Equipment
from .clients import CommandError, Docker, Skopeo
from .conftest import MakeChain
from .images import Images
from .processes import PATIENCE, children, free_port
from .test_pull import reference
from .test_together import blob_path
from .test_workers import wait_for_workers

PASSWORD = "canary-of-a-password"
AWS_SECRET = "canary-of-an-aws-secret"
# How a token begins, which is base64 of "AWS:" and more.
TOKEN = "QVdTOg"


@pytest.fixture
def htpasswd(tmp_path: Path) -> Path:
    """
    Write a file of one user.
    """
    path = tmp_path / "htpasswd"
    path.write_bytes(b"ann:" + bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(5)).replace(b"2b", b"2y", 1) + b"\n")
    return path


@pytest.fixture(params=["http", "https", "workers"])
def closed(make_chain: MakeChain, htpasswd: Path, docker: Docker, request: pytest.FixtureRequest) -> Iterator[Chain]:
    """
    Return a chain whose daemon requires a password; docker has none for it afterwards.
    """
    settings = {"PROXY_HTPASSWD": str(htpasswd)}
    if request.param == "workers":
        settings["PROXY_WORKER_PROCESSES"] = "2"
    chain = make_chain(tls=request.param == "https", settings=settings)
    yield chain
    docker.log_out(chain.daemon.address)


def authorization(name: str, password: str) -> dict[str, str]:
    """
    Return the header for a password.
    """
    return {"Authorization": f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"}


def test_docker_logs_in_and_pulls(closed: Chain, docker: Docker, images: Images) -> None:
    """
    With the right password docker login succeeds, and a pull works then and not before.
    """
    assert docker.complaint(reference(closed, images.single))
    for name, password in (("ann", "wrong"), ("mallory", PASSWORD)):
        assert docker.log_in(closed.daemon.address, name, password).status != 0
        assert closed.daemon.ask("/v2/", headers=authorization(name, password)).status == 401
    assert docker.log_in(closed.daemon.address, "ann", PASSWORD).status == 0
    assert docker.pull(reference(closed, images.single)) == images.single.image_id


@pytest.mark.parametrize("processes", ["1", "2"])
def test_no_target_leads_past_the_password(
    make_chain: MakeChain, htpasswd: Path, images: Images, processes: str
) -> None:
    """
    In one process or in a worker.
    """
    closed = make_chain(settings={"PROXY_HTPASSWD": str(htpasswd), "PROXY_WORKER_PROCESSES": processes})
    path = f"/v2/{images.single.repository}/manifests/{images.single.tag}"
    for target, status in (
        *((f"{mark}readyz{path}", b"400") for mark in ("x", ":", "@")),
        *((target, b"400") for target in (path[1:], "xreadyz/v2/", "*", "proxy:80")),
        *((target, b"401") for target in (path, f"http://first{path}", f"/readyz/..{path}", "/elsewhere")),
    ):
        with socket.create_connection(("127.0.0.1", closed.daemon.port), PATIENCE) as client:
            client.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert client.makefile("rb").readline().split()[1] == status, target


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_client_that_half_closes_is_answered(make_chain: MakeChain, images: Images, processes: str) -> None:
    """
    From ECR and from the cache; then the connection is closed.
    """
    chain = make_chain(settings={"PROXY_WORKER_PROCESSES": processes})
    path = f"/v2/{images.single.repository}/manifests/{images.single.tag}"
    for target in ("/v2/", path, path, blob_path(images)):
        with socket.create_connection(("127.0.0.1", chain.daemon.port), PATIENCE) as client:
            client.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            client.shutdown(socket.SHUT_WR)
            head, _, body = client.makefile("rb").read().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n"), target
        assert f"Content-Length: {len(body)}".encode() in head


def test_a_password_that_is_taken_away_opens_no_more(make_chain: MakeChain, htpasswd: Path) -> None:
    """
    The file is read again when it changes, without a restart.
    """
    chain = make_chain(settings={"PROXY_HTPASSWD": str(htpasswd)})
    shown = authorization("ann", PASSWORD)
    assert chain.daemon.ask("/v2/", headers=shown).status == 200
    changed = htpasswd.with_suffix(".new")
    changed.write_bytes(htpasswd.read_bytes().replace(b"ann:", b"bob:"))
    changed.rename(htpasswd)
    chain.daemon.process.wait_until(lambda: chain.daemon.ask("/v2/", headers=shown).status == 401)
    assert chain.daemon.ask("/v2/", headers=authorization("bob", PASSWORD)).status == 200


def test_certificates_are_asked_for(
    make_chain: MakeChain, equipment: Equipment, skopeo: Skopeo, images: Images, tmp_path: Path
) -> None:
    """
    A client with a certificate of the CA is accepted, one without gets an error, one of another CA fails in TLS.
    """
    ours, others = (make_client(tmp_path / name, equipment.certificates, "Clients") for name in ("ours", "others"))
    chain = make_chain(tls=True, settings={"PROXY_CLIENT_CA": str(ours / "clients.pem")})
    repository = f"{chain.daemon.address}/{images.many}"
    assert skopeo.tags(repository, "--cert-dir", ours)
    refused = chain.daemon.ask("/v2/")
    assert (refused.status, refused.json()["errors"][0]["code"]) == (403, "DENIED")
    assert chain.daemon.ask("/healthz").status == 200
    with pytest.raises(CommandError, match="certificate"):
        skopeo.tags(repository, "--cert-dir", others)


def said_to(port: int, line: bytes) -> bytes:
    """
    Send a request after a PROXY header, and return the status line.
    """
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        client.sendall(line + b"\r\nGET /v2/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return client.makefile("rb").readline().strip()


def test_networks_are_those_of_the_clients_own_addresses(make_chain: MakeChain) -> None:
    """
    Behind a load balancer with the PROXY protocol too, of both families.
    """
    port = free_port()
    chain = make_chain(
        wait=False,
        settings={
            "PROXY_LISTEN": f"haproxy:tcp:{port} tcp:{free_port()}",
            "PROXY_ALLOW_FROM": "10.0.0.0/8 2001:db8::/32",
        },
    )
    chain.daemon.port = port

    def answers() -> bool:
        try:
            return b" 200 " in said_to(port, b"PROXY TCP4 10.1.2.3 127.0.0.1 40000 80")
        except OSError:
            return False

    chain.daemon.process.wait_until(answers)
    for line, status in (
        (b"PROXY TCP4 192.0.2.7 127.0.0.1 40000 80", b"403"),
        (b"PROXY TCP6 2001:db8::7 ::1 40000 80", b"200"),
        (b"PROXY TCP6 ::ffff:10.1.2.3 ::1 40000 80", b"200"),
        (b"PROXY TCP6 fe80::7 ::1 40000 80", b"403"),
    ):
        assert said_to(port, line).split()[1] == status, line


def seen_by_others(pid: int) -> bytes:
    """
    Return what every user of the machine may read of a process.
    """
    return b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "comm", "status"))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_no_secret_is_written_anywhere(
    make_chain: MakeChain, htpasswd: Path, docker: Docker, images: Images, workers: str
) -> None:
    """
    After pulls, refusals and failures no log, no file of the cache, and no process reveals a password, a token or a
    key.
    """
    admin = free_port()
    chain = make_chain(
        settings={
            "PROXY_HTPASSWD": str(htpasswd),
            "PROXY_ADMIN_LISTEN": f"tcp:{admin}:interface=127.0.0.1",
            "PROXY_WORKER_PROCESSES": workers,
            "PROXY_CACHE_KEY": "$http_user_agent$uri",
            "PROXY_LOG_LEVEL": "debug",
            "AWS_SECRET_ACCESS_KEY": AWS_SECRET,
        }
    )
    shown = authorization("ann", PASSWORD)
    assert docker.log_in(chain.daemon.address, "ann", PASSWORD).status == 0
    docker.pull(reference(chain, images.single))
    docker.log_out(chain.daemon.address)
    replies = [
        chain.daemon.ask(path, method, headers | {"Cookie": PASSWORD})
        for headers in (shown, authorization("ann", "wrong"), authorization(PASSWORD, PASSWORD))
        for method, path in (("GET", f"/v2/?{PASSWORD}"), ("GET", f"/v2/nowhere/tags/list?{PASSWORD}"), ("PUT", "/v2/"))
    ]
    pids = [chain.daemon.process.pid, *children(chain.daemon.process.pid)]
    if workers == "2":
        wait_for_workers(chain)
    chain.daemon.settle()  # the files read below must not vanish meanwhile
    chain.cut()
    replies += [chain.daemon.ask(f"/v2/{images.many}/tags/list?last={PASSWORD}", headers=shown)]
    replies += [ask(f"http://127.0.0.1:{admin}/{path}") for path in ("metrics", "readyz")]
    texts = [chain.daemon.process.output.read_bytes(), *map(seen_by_others, pids)]
    texts += [each.body + repr(each.headers).encode() for each in replies]
    texts += [bytes(each) for each in chain.daemon.cache.rglob("*")]
    texts += [each.read_bytes() for each in chain.daemon.cache.rglob("*") if each.is_file()]
    assert len(texts) > 20
    secrets = (PASSWORD, shown["Authorization"][6:], AWS_SECRET, TOKEN, "X-Amz-Signature", "X-Amz-Credential")
    for secret in secrets:
        assert not [each[:200] for each in texts if secret.encode() in each], secret
