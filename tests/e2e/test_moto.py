"""
The AWS call of another stand-in: moto's tokens have an expiry in 2015.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.session import Session

from .chain import start_moto
from .conftest import MakeChain
from .processes import Process

WATCHED = 5.0


@pytest.fixture
def moto(tmp_path: Path) -> Iterator[tuple[Process, str]]:
    process, url = start_moto(tmp_path)
    try:
        yield process, url
    finally:
        process.stop()


def calls(process: Process) -> int:
    """
    Count the calls of AWS: moto logs each as a POST of the root. A call that times out is repeated.
    """
    return process.tail().count('"POST / HTTP')


def test_a_token_of_the_past_is_no_reason_to_hammer(make_chain: MakeChain, moto: tuple[Process, str]) -> None:
    """
    The daemon becomes ready, and does not ask again a moment later.
    """
    process, url = moto
    make_chain(settings={"AWS_ENDPOINT_URL": url})
    before = calls(process)
    assert before
    time.sleep(WATCHED)
    assert calls(process) == before  # a minute is far from over


def test_the_catalog_lists_what_aws_says(make_chain: MakeChain, moto: tuple[Process, str]) -> None:
    """
    By one process and by workers, which each ask for themselves.
    """
    _, url = moto
    client: Any = Session().create_client(
        "ecr",
        region_name="eu-west-1",
        endpoint_url=url,
        aws_access_key_id="x",
        aws_secret_access_key="x",
    )
    for number in range(3):
        client.create_repository(repositoryName=f"team/app{number}")
    client.create_repository(repositoryName="secret/app")
    for count in ("1", "2"):
        settings = {
            "AWS_ENDPOINT_URL": url,
            "PROXY_NAMESPACE_PATTERN": "team/.*",
            "PROXY_WORKER_PROCESSES": count,
        }
        chain = make_chain(settings=settings)
        page = chain.daemon.ask("/v2/_catalog?n=2")
        assert page.json() == {"repositories": ["team/app0", "team/app1"]}
        assert page.headers["link"] == '</v2/_catalog?last=team%2Fapp1&n=2>; rel="next"'
