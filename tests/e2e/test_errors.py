"""
Failed pulls have the errors that Docker's users know.
"""

from __future__ import annotations

import ssl

import pytest

from .asking import connect
from .chain import Chain
from .clients import Docker
from .conftest import MakeChain
from .images import Images
from .processes import PATIENCE

SOME_DIGEST = "sha256:" + "0" * 64


@pytest.fixture
def chain(make_chain: MakeChain) -> Chain:
    """
    Return a chain with an empty cache.
    """
    return make_chain()


@pytest.mark.parametrize("missing", ["team/single:missing", f"team/single@{SOME_DIGEST}"])
def test_a_missing_image_is_called_so(chain: Chain, docker: Docker, missing: str) -> None:
    """
    Docker says of a missing tag or digest what it says with a plain registry.
    """
    plain = docker.complaint(f"{chain.plain}/{missing}").replace(chain.plain, "HERE")
    ours = docker.complaint(f"{chain.daemon.address}/{missing}")
    ours = ours.replace(chain.daemon.address, "HERE")
    # The last part is the registry's own message: here it is ECR's.
    words, _, _ = plain.strip().rpartition(": ")
    assert words.endswith("not found: manifest unknown")
    assert ours.strip() == f"{words}: Requested image not found"


def test_a_missing_repository_is_called_so(chain: Chain, docker: Docker) -> None:
    """
    Docker says that there is no such repository, and shows ECR's own sentence.
    """
    complaint = docker.complaint(f"{chain.daemon.address}/team/absent:1")
    words = f"repository {chain.daemon.address}/team/absent not found: name unknown: "
    assert words in complaint
    assert "The repository with name 'team/absent' does not exist in the registry" in complaint


def test_an_excluded_namespace_is_denied(chain: Chain, docker: Docker, images: Images) -> None:
    """
    What the pattern excludes is denied, although the registry has it.
    """
    before = chain.counters()
    complaint = docker.complaint(f"{chain.daemon.address}/{images.excluded}:1")
    after = chain.counters()
    assert f"pull access denied for {chain.daemon.address}/{images.excluded}" in complaint
    assert "denied: " in complaint
    assert images.excluded not in after["repositories"]
    assert after["requests"] == before["requests"]


def test_a_tls_hello_to_the_plain_port_is_turned_away_at_once(make_chain: MakeChain) -> None:
    """
    Docker, skopeo and podman try TLS first, and only then plain HTTP.

    A server that waits for the rest of a line which never comes costs each of
    their commands the ten seconds of a handshake that timed out.
    tests/e2e/test_connections.py shows that the answer is HTTP.
    """
    chain = make_chain(settings={"PROXY_HEADER_SECONDS": "0"})
    with pytest.raises((ssl.SSLError, ConnectionError)):  # and not TimeoutError
        connect(f"https://{chain.daemon.address}", None, PATIENCE).connect()
