"""
The daemon's process while AWS rejects it or never answers, and after a restart that many clients waited for.
"""

from __future__ import annotations

import base64
import socket
import time
from pathlib import Path
from typing import Any

import bcrypt
import pytest

from .chain import Chain, Equipment
from .chain import Daemon as Started
from .conftest import MakeChain
from .images import Images
from .test_together import blob_path

HERD = 200


def again(chain: Chain, equipment: Equipment, home: Path, **changes: str | None) -> Started:
    """
    Start a second daemon over the cache of the first, with other settings.
    """
    settings: dict[str, Any] = {**chain.daemon.variables, **changes}
    del settings["PROXY_PORT"]
    return Started(equipment, home, settings)


@pytest.fixture
def warm(make_chain: MakeChain, images: Images) -> Chain:
    """
    Return a chain with a blob in its cache, whose daemon has ended.
    """
    chain = make_chain()
    assert chain.daemon.ask(blob_path(images)).status == 200
    chain.daemon.process.stop()
    return chain


def test_a_credential_process_that_never_returns(
    warm: Chain, equipment: Equipment, images: Images, tmp_path: Path
) -> None:
    """
    The daemon serves what it has, says that it can't fetch, and ends when told.
    """
    config = tmp_path / "aws"
    config.write_text("[default]\ncredential_process = sleep 30\n")
    keys = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_CONFIG_FILE": str(config)}
    daemon = again(warm, equipment, tmp_path / "second", **keys)
    try:
        daemon.process.wait_until(lambda: daemon.answers("/readyz", 200))
        said = daemon.ask("/readyz").json()
        assert (said["can_serve"], said["can_fetch"]) == (True, False)
        assert daemon.ask(blob_path(images)).status == 200
    finally:
        daemon.process.stop()
    assert daemon.process.status == 0


def test_credentials_that_aws_refuses_end_no_daemon_that_has_content(
    warm: Chain, equipment: Equipment, images: Images, refusing: str, tmp_path: Path
) -> None:
    daemon = again(warm, equipment, tmp_path / "second", AWS_ENDPOINT_URL=refusing)
    try:
        daemon.process.wait_until(lambda: daemon.answers("/readyz", 200))
        daemon.process.wait_until(lambda: "refused" in str(daemon.ask("/readyz").json()["reasons"]))
        assert daemon.ask(blob_path(images)).status == 200
    finally:
        daemon.process.stop()


def test_a_herd_with_one_password_is_let_in_after_a_restart(
    make_chain: MakeChain, tmp_path: Path, figures: list[str]
) -> None:
    """
    With bcrypt's usual cost, by 200 connections at once.
    """
    path = tmp_path / "htpasswd"
    path.write_bytes(b"ann:" + bcrypt.hashpw(b"one", bcrypt.gensalt(12)) + b"\n")
    chain = make_chain(settings={"PROXY_HTPASSWD": str(path)})
    shown = base64.b64encode(b"ann:one")
    request = b"GET /v2/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Basic " + shown + b"\r\n\r\n"
    began = time.monotonic()
    clients = [socket.create_connection(("127.0.0.1", chain.daemon.port), 30) for _ in range(HERD)]
    for client in clients:
        client.sendall(request)
    answers = [client.makefile("rb").read() for client in clients]
    for client in clients:
        client.close()
    figures.append(f"{HERD} clients with one password, after a restart: all served in {time.monotonic() - began:.1f} s")
    assert {answer.split()[1] for answer in answers} == {b"200"}
