"""
The AWS call as another stand-in gives it: moto says that its tokens ended in 2015.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .chain import start_moto
from .conftest import MakeChain
from .processes import Process

WATCHED = 5.0


@pytest.fixture
def moto(tmp_path: Path) -> Iterator[tuple[Process, str]]:
    """
    Run moto's server.
    """
    process, url = start_moto(tmp_path)
    try:
        yield process, url
    finally:
        process.stop()


def calls(process: Process) -> int:
    """
    Count the calls of AWS: moto logs each as a POST of the root. One that it is too slow for is made again.
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
