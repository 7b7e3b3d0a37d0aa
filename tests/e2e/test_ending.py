"""
How the daemon ends, whether asked to or not, and what is left of it.
"""

from __future__ import annotations

import http.client
import signal

from .asking import connect, download
from .chain import Chain
from .conftest import MakeChain
from .images import Images
from .test_together import blob_path

SLOW = 24 * 2**20
ENOUGH = 12 * 2**20


def read_some(chain: Chain, path: str, size: int) -> http.client.HTTPConnection:
    """
    Read the beginning of a blob, and leave the connection open in the middle of it.
    """
    connection = connect(chain.daemon.url, None, 60.0)
    connection.request("GET", path)
    response = connection.getresponse()
    assert response.status == 200
    while size > 0:
        size -= len(response.read1(size))
    return connection


def test_a_kill_in_the_middle_of_a_transfer_leaves_nothing_wrong(make_chain: MakeChain, images: Images) -> None:
    """
    After the restart nothing unverified is in the cache, and the next pull is correct.
    """
    chain = make_chain(front=("--rate", str(SLOW)))
    connection = read_some(chain, blob_path(images), ENOUGH)
    assert chain.daemon.arriving()
    chain.daemon.process.kill()
    connection.close()
    assert chain.daemon.process.status == -signal.SIGKILL
    assert chain.daemon.wrong_content() == []

    chain.daemon.restart()
    assert chain.daemon.wrong_content() == []
    pulled = download(chain.daemon.url + blob_path(images))
    assert (pulled.status, pulled.digest) == (200, images.big.layers[0])
    chain.daemon.settle()
    assert chain.daemon.holds(images.big.layers[0])
    assert chain.daemon.wrong_content() == []


def test_a_transfer_goes_on_after_a_kill(make_chain: MakeChain, images: Images) -> None:
    """
    What is on the disk is not fetched again: the bucket sends the rest alone.
    """
    chain = make_chain(front=("--rate", str(SLOW)))
    connection = read_some(chain, blob_path(images), ENOUGH)
    chain.daemon.process.kill()
    connection.close()
    (left,) = chain.daemon.arriving()

    chain.daemon.restart()
    assert chain.daemon.arriving() == [left]
    before = chain.counters()["bucket"]["bytes"]
    pulled = download(chain.daemon.url + blob_path(images))
    assert (pulled.status, pulled.digest) == (200, images.big.layers[0])
    fetched = chain.counters()["bucket"]["bytes"] - before
    assert 0 < fetched <= pulled.size - ENOUGH
    chain.daemon.settle()
    assert chain.daemon.holds(images.big.layers[0])


def test_what_was_whole_before_a_kill_is_served_after_it(make_chain: MakeChain, images: Images) -> None:
    """
    The directory is the whole truth: it needs no orderly end.
    """
    chain = make_chain()
    path = blob_path(images)
    assert chain.daemon.ask(path).status == 200
    chain.daemon.settle()
    chain.daemon.process.kill()
    chain.daemon.restart()
    again = chain.daemon.ask(path)
    assert (again.status, again.headers["x-cache-status"]) == (200, "HIT")
    assert chain.counters()["bucket"]["bytes"] == len(again.body)


def test_sigterm_ends_the_daemon(make_chain: MakeChain) -> None:
    """
    The signal that service managers and containers send is enough.
    """
    chain = make_chain()
    status = chain.daemon.process.terminate(seconds=10)
    # twistd ends by the signal itself, so that who started it can tell.
    assert status in (0, -signal.SIGTERM)
    assert "Traceback" not in chain.daemon.process.tail()


def test_sigterm_ends_the_daemon_in_the_middle_of_a_transfer(make_chain: MakeChain, images: Images) -> None:
    """
    A transfer under way does not keep the daemon for ever, and leaves nothing wrong.
    """
    chain = make_chain(front=("--rate", str(SLOW)))
    connection = read_some(chain, blob_path(images), ENOUGH)
    assert chain.daemon.process.terminate(seconds=45) in (0, -signal.SIGTERM)
    connection.close()
    assert chain.daemon.wrong_content() == []
