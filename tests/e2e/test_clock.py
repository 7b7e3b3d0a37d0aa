"""
The machine's clock is set while the daemon runs: libfaketime sets it, only for the daemon.
"""

from __future__ import annotations

import socket
from pathlib import Path

from .asking import connect
from .conftest import MakeChain
from .images import Images
from .processes import PATIENCE
from .test_together import blob_path

SLOW = 16 * 2**20
ENOUGH = 4 * 2**20
(LIBRARY,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")


class Clock:
    """
    The daemon's wall clock; its monotonic clock is unchanged.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set("+0")
        self.settings = {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def set(self, by: str) -> None:
        """
        Set the clock.
        """
        new = self._file.with_suffix(".new")
        new.write_text(by + "\n")
        new.rename(self._file)


def test_a_clock_set_forward_ends_nothing(make_chain: MakeChain, images: Images, tmp_path: Path) -> None:
    """
    Neither a transfer nor an idle connection is taken for too old; the next pull is served.
    """
    clock = Clock(tmp_path / "clock")
    settings = {**clock.settings, "PROXY_IDLE_SECONDS": "600"}
    chain = make_chain(front=("--rate", str(SLOW)), settings=settings)
    resting, pulling = (connect(chain.daemon.url, None, PATIENCE) for _ in range(2))
    resting.request("GET", "/healthz")
    resting.getresponse().read()
    pulling.request("GET", blob_path(images))
    response = pulling.getresponse()
    assert response.status == 200
    left = int(response.headers["Content-Length"]) - len(response.read(ENOUGH))
    clock.set("+3650d")
    for _ in range(3):  # whatever was due would happen between two requests
        assert chain.daemon.ask("/v2/team/absent/manifests/1").status == 404
    assert resting.sock is not None  # else http.client would connect again
    resting.auto_open = 0
    resting.request("GET", "/healthz")
    assert resting.getresponse().status == 200
    assert len(response.read()) == left
    for connection in (resting, pulling):
        connection.close()
    chain.daemon.settle()
    assert chain.daemon.wrong_content() == []
    again = chain.daemon.ask(blob_path(images))
    assert (again.status, again.headers["x-cache-status"]) == (200, "HIT")
    assert "Traceback" not in chain.daemon.process.tail()


def test_a_clock_set_back_stops_no_timer(make_chain: MakeChain, images: Images, tmp_path: Path) -> None:
    """
    An idle connection is still closed after its timeout; a pull is served.
    """
    clock = Clock(tmp_path / "clock")
    chain = make_chain(settings={**clock.settings, "PROXY_IDLE_SECONDS": "3"})
    with socket.create_connection(("127.0.0.1", chain.daemon.port), timeout=PATIENCE) as resting:
        resting.sendall(b"GET /healthz HTTP/1.1\r\nHost: proxy\r\n\r\n")
        assert resting.recv(9) == b"HTTP/1.1 "
        clock.set("-3650d")
        assert chain.daemon.ask(blob_path(images)).status == 200
        while resting.recv(4096):
            pass
    chain.daemon.settle()
    assert chain.daemon.holds(images.big.layers[0])
    assert "Traceback" not in chain.daemon.process.tail()
