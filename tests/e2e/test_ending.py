"""
How the daemon ends, on request or not, and what is left of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import signal
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from .asking import ask, connect, download
from .certificates import Certificates, make_certificates
from .chain import Chain, Equipment, standard_settings
from .conftest import COUNTS, MakeChain
from .images import Images
from .processes import PATIENCE, Process, alive, children, environment, eventually
from .test_together import blob_path
from .test_workers import wait_for_workers

SLOW = 24 * 2**20
ENOUGH = 12 * 2**20
HELD = 2**20
"""Less than half of a lane's first request."""
LONG = {"PROXY_DRAIN_SECONDS": "300"}
HANGING = """
import os, sys, time

def audit(event, arguments):
    while event == "open" and str(arguments[0]).startswith({folder!r}) and os.path.exists({hangs!r}):
        time.sleep(0.05)

sys.addaudithook(audit)
"""
"""A file system that hangs while a certain file exists: Python imports this as sitecustomize."""


class Reading:
    """
    A blob whose beginning was read.
    """

    def __init__(self, chain: Chain, path: str, size: int) -> None:
        self.connection = connect(chain.daemon.url, chain.certificates.ca, PATIENCE)
        self.connection.request("GET", path)
        self._response = self.connection.getresponse()
        assert self._response.status == 200
        self._sha = hashlib.sha256()
        while size > 0:
            size -= self._take()

    def _take(self) -> int:
        piece = self._response.read1(2**16)
        self._sha.update(piece)
        return len(piece)

    def rest(self) -> str:
        """
        Read to the end, and return the digest of all.

        @raise http.client.IncompleteRead: if that was not all.
        """
        while self._take():
            pass
        if left := self._response.length:
            raise http.client.IncompleteRead(b"", left)
        return f"sha256:{self._sha.hexdigest()}"


@contextlib.contextmanager
def reading(chain: Chain, path: str, size: int) -> Iterator[Reading]:
    """
    Read the beginning of a blob, and leave the connection open in the middle of it.
    """
    transfer = Reading(chain, path, size)
    try:
        yield transfer
    finally:
        transfer.connection.close()


def put(made: Certificates, key: Path, certificate: Path) -> None:
    """
    Put a key and a certificate where the daemon reads them.
    """
    key.write_bytes(made.key.read_bytes())
    certificate.write_bytes(made.chain.read_bytes())


def trusts(chain: Chain, made: Certificates) -> bool:
    """
    Return True if a new connection has a certificate of this CA.
    """
    try:
        return ask(chain.daemon.url + "/healthz", ca=made.ca).status == 200
    except OSError:
        return False


@COUNTS
def test_a_kill_in_the_middle_of_a_transfer_leaves_nothing_wrong(
    make_chain: MakeChain, images: Images, hold: Path, count: str
) -> None:
    """
    After the restart nothing unverified is in the cache, and the next pull is correct.
    """
    chain = make_chain(front=("--hold", str(hold)), settings={"PROXY_WORKER_PROCESSES": count})
    with reading(chain, blob_path(images), HELD):
        assert chain.daemon.arriving()
        chain.daemon.kill()
    hold.unlink()
    assert chain.daemon.process.status == -signal.SIGKILL
    assert chain.daemon.wrong_content() == []

    chain.daemon.restart()
    assert chain.daemon.wrong_content() == []
    pulled = download(chain.daemon.url + blob_path(images))
    assert (pulled.status, pulled.digest) == (200, images.big.layers[0])
    chain.daemon.settle()
    assert chain.daemon.holds(images.big.layers[0])
    assert chain.daemon.wrong_content() == []


@COUNTS
def test_a_transfer_goes_on_after_a_kill(make_chain: MakeChain, images: Images, hold: Path, count: str) -> None:
    """
    What is on the disk is not fetched again: the bucket sends only the rest.
    """
    chain = make_chain(front=("--hold", str(hold)), settings={"PROXY_WORKER_PROCESSES": count})
    with reading(chain, blob_path(images), HELD):
        chain.daemon.kill()
    (left,) = chain.daemon.arriving()

    chain.daemon.restart()
    assert chain.daemon.arriving() == [left]
    before = chain.counters()["bucket"]["bytes"]  # by now the bucket knows that the first client has gone
    hold.unlink()
    pulled = download(chain.daemon.url + blob_path(images))
    assert (pulled.status, pulled.digest) == (200, images.big.layers[0])
    fetched = chain.counters()["bucket"]["bytes"] - before
    assert 0 < fetched <= pulled.size - HELD
    chain.daemon.settle()
    assert chain.daemon.holds(images.big.layers[0])


@COUNTS
def test_what_was_whole_before_a_kill_is_served_after_it(make_chain: MakeChain, images: Images, count: str) -> None:
    """
    The directory is the only truth: it needs no clean shutdown.
    """
    chain = make_chain(settings={"PROXY_WORKER_PROCESSES": count})
    path = blob_path(images)
    assert chain.daemon.ask(path).status == 200
    chain.daemon.settle()
    chain.daemon.kill()
    chain.daemon.restart()
    again = chain.daemon.ask(path)
    assert (again.status, again.headers["x-cache-status"]) == (200, "HIT")
    assert chain.counters()["bucket"]["bytes"] == len(again.body)


def test_sigterm_ends_the_daemon(make_chain: MakeChain) -> None:
    """
    The signal that service managers and containers send is enough, and ends it cleanly.
    """
    chain = make_chain()
    assert chain.daemon.process.terminate() == 0
    assert "Traceback" not in chain.daemon.process.tail()


def test_sigint_ends_the_daemon(make_chain: MakeChain) -> None:
    """
    So does Ctrl-C.
    """
    chain = make_chain()
    chain.daemon.process.send(signal.SIGINT)
    assert chain.daemon.process.wait() == 0


def refuses(chain: Chain) -> bool:
    """
    Return True if new connections are refused.
    """
    try:
        socket.create_connection(("127.0.0.1", chain.daemon.port), 5).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it was about to be accepted when the socket was shut down
        return False
    return False


def test_a_socket_of_systemd_loses_no_connection(
    make_chain: MakeChain, equipment: Equipment, images: Images, tmp_path: Path
) -> None:
    """
    While one daemon ends no connection is refused: it waits for the next daemon, which has the same socket.
    """
    chain = make_chain(front=("--rate", str(SLOW)))
    chain.daemon.process.stop()
    listening_there = {"PROXY_LISTEN": "systemd:domain=INET:index=0", "PROXY_CACHE_DIR": str(tmp_path / "cache")}
    settings = standard_settings(chain.front_url) | listening_there | LONG
    with socket.create_server(("127.0.0.1", 0)) as listening:
        fd = listening.fileno()
        chain.daemon.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        daemon = f"LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=proxy exec {equipment.twistd} -n --pidfile= ecr-proxy"
        with contextlib.ExitStack() as running:

            def start(name: str) -> Process:
                argv = ["/bin/bash", "-c", f"exec 3<&{fd}; {daemon}"]
                env = environment(tmp_path, {name: value for name, value in settings.items() if value})
                process = Process(argv, env, tmp_path / f"{name}.log", tmp_path, inherits=[fd])
                running.callback(process.stop)
                return process

            first = start("first")
            first.wait_until(chain.daemon.ready)
            with reading(chain, blob_path(images), ENOUGH) as transfer:
                first.send(signal.SIGTERM)
                eventually(lambda: "Shutting down: " in first.output.read_text(), "the first daemon ends")
                waiting = connect(chain.daemon.url, None, PATIENCE)
                waiting.request("GET", "/healthz")
                second = start("second")
                assert waiting.getresponse().status == 200
                waiting.close()
                assert transfer.rest() == images.big.layers[0]
            assert (first.wait(), second.terminate()) == (0, 0)


TLS = pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])


class TestDrain:
    """
    What happens between SIGTERM and the end.
    """

    @COUNTS
    @TLS
    def test_a_transfer_goes_on_to_its_end(self, make_chain: MakeChain, images: Images, count: str, tls: bool) -> None:
        """
        A client whose blob is in transfer gets all of it, though new ones are rejected; then the daemon ends cleanly.
        """
        chain = make_chain(front=("--rate", str(SLOW)), tls=tls, settings={"PROXY_WORKER_PROCESSES": count} | LONG)
        with reading(chain, blob_path(images), ENOUGH) as transfer:
            chain.daemon.process.send(signal.SIGTERM)
            eventually(lambda: refuses(chain), "connections are refused")
            assert chain.daemon.process.status is None
            assert transfer.rest() == images.big.layers[0]
        assert chain.daemon.process.wait() == 0
        assert "Traceback" not in chain.daemon.process.tail()
        assert chain.daemon.wrong_content() == []

    @COUNTS
    def test_a_client_that_reads_slowly_gets_all(self, make_chain: MakeChain, images: Images, count: str) -> None:
        """
        The same for a blob that is in the cache.
        """
        chain = make_chain(settings={"PROXY_WORKER_PROCESSES": count} | LONG)
        assert chain.daemon.ask(blob_path(images)).status == 200
        chain.daemon.settle()
        with reading(chain, blob_path(images), 1) as transfer:
            chain.daemon.process.send(signal.SIGTERM)
            eventually(lambda: refuses(chain), "connections are refused")
            assert transfer.rest() == images.big.layers[0]
        assert chain.daemon.process.wait() == 0

    @COUNTS
    @TLS
    def test_idle_connections_are_not_waited_for(
        self, make_chain: MakeChain, equipment: Equipment, count: str, tls: bool
    ) -> None:
        """
        A client with an idle keep-alive connection does not delay the daemon.
        """
        chain = make_chain(tls=tls, settings={"PROXY_WORKER_PROCESSES": count, "PROXY_IDLE_SECONDS": "300"} | LONG)
        connection = connect(chain.daemon.url, equipment.certificates.ca, PATIENCE)
        connection.request("GET", "/healthz")
        connection.getresponse().read()
        assert chain.daemon.process.terminate() == 0
        connection.close()

    @COUNTS
    def test_a_second_signal_ends_it_at_once(self, make_chain: MakeChain, images: Images, count: str) -> None:
        """
        No process is left.
        """
        settings = {"PROXY_WORKER_PROCESSES": count} | LONG
        chain = make_chain(front=("--rate", str(SLOW)), settings=settings)
        with reading(chain, blob_path(images), 1):
            pids = children(chain.daemon.process.pid)
            chain.daemon.process.send(signal.SIGTERM)
            eventually(lambda: refuses(chain), "connections are refused")
            chain.daemon.process.send(signal.SIGTERM)
            assert chain.daemon.process.wait() == 128 + signal.SIGTERM
            eventually(lambda: not any(map(alive, pids)), "the workers have ended")

    @COUNTS
    def test_the_limit_cuts(self, make_chain: MakeChain, images: Images, count: str) -> None:
        """
        A client that takes longer than the limit is cut off, notices that, and leaves nothing wrong.
        """
        settings = {"PROXY_WORKER_PROCESSES": count, "PROXY_DRAIN_SECONDS": "1"}
        chain = make_chain(front=("--rate", str(SLOW)), settings=settings)
        with reading(chain, blob_path(images), 1) as transfer:
            assert chain.daemon.process.terminate() == 0
            with pytest.raises((OSError, http.client.IncompleteRead)):
                transfer.rest()
        assert chain.daemon.wrong_content() == []


class TestSighup:
    """
    A certificate that is renewed while the daemon runs.
    """

    @COUNTS
    def test_what_is_new_is_used(self, make_chain: MakeChain, tmp_path: Path, count: str) -> None:
        """
        New connections get the new certificate, others go on; an invalid pair changes nothing.
        """
        first, second = make_certificates(tmp_path / "first"), make_certificates(tmp_path / "second")
        key, certificate = tmp_path / "key", tmp_path / "certificate"
        put(first, key, certificate)
        settings = {
            "PROXY_WORKER_PROCESSES": count,
            "PROXY_SSL_KEY": str(key),
            "PROXY_SSL_CERTIFICATE": str(certificate),
            "PROXY_IDLE_SECONDS": "300",
        }
        chain = make_chain(wait=False, settings=settings)
        output = chain.daemon.process.output
        chain.daemon.process.wait_until(lambda: trusts(chain, first))
        kept = connect(chain.daemon.url, first.ca, PATIENCE)
        kept.request("GET", "/healthz")
        kept.getresponse().read()

        # A worker that is told before its handlers are there ends, and the next one reads the new files at its start.
        readers = 1 if count == "1" else 1 + len(wait_for_workers(chain))
        put(second, key, certificate)
        chain.daemon.process.send(signal.SIGHUP)
        eventually(lambda: output.read_text().count("were read again") == readers, "all have read")
        assert all(trusts(chain, second) for _ in range(10))
        kept.request("GET", "/healthz")
        assert kept.getresponse().read() == b""

        key.write_bytes(first.key.read_bytes())
        chain.daemon.process.send(signal.SIGHUP)
        eventually(lambda: "stay in use" in output.read_text(), "the pair is refused")
        assert output.read_text().count("stay in use") == 1
        assert all(trusts(chain, second) for _ in range(10))
        kept.close()

    @COUNTS
    def test_registries_are_those_of_the_file(
        self, make_chain: MakeChain, images: Images, tmp_path: Path, count: str
    ) -> None:
        """
        All processes have them; an invalid file changes nothing in any of them.
        """
        file = tmp_path / "settings.toml"
        file.write_text("")
        chain = make_chain(
            settings={"PROXY_WORKER_PROCESSES": count, "PROXY_CONFIG": str(file), "PROXY_REGISTRY_ALIASES": ""}
        )
        output = chain.daemon.process.output
        blob = blob_path(images)
        if count != "1":
            wait_for_workers(chain)
        assert chain.daemon.ask(f"{blob}?ns=one.example").status == 404

        for text, line, statuses in (
            ('registry-aliases = "one.example"', "Reloaded ", (200, 404)),
            ('registry-aliases = "two.example"\nmoon = 1', "Not reloaded: ", (200, 404)),
            ('registry-aliases = "two.example"', "Reloaded ", (404, 200)),
        ):
            said = output.read_text().count(line)
            file.write_text(text)
            chain.daemon.process.send(signal.SIGHUP)
            eventually(partial(lambda line, said: output.read_text().count(line) > said, line, said), line)
            for name, status in zip(("one", "two"), statuses, strict=True):
                ask = partial(chain.daemon.ask, f"{blob}?ns={name}.example")
                eventually(partial(lambda ask, status: ask().status == status, ask, status), f"{name}: {status}")
                assert {ask().status for _ in range(10)} == {status}

    @COUNTS
    def test_files_that_hang_or_are_no_files_stop_nothing(
        self, make_chain: MakeChain, tmp_path: Path, count: str
    ) -> None:
        """
        What was requested meanwhile is done once they can be read.
        """
        pair, folder, hangs = make_certificates(tmp_path / "first"), tmp_path / "files", tmp_path / "hangs"
        key, certificate, file = (folder / name for name in ("key", "certificate", "settings.toml"))
        folder.mkdir()
        put(pair, key, certificate)
        file.write_text("")
        (tmp_path / "python").mkdir()
        (tmp_path / "python" / "sitecustomize.py").write_text(HANGING.format(folder=str(folder), hangs=str(hangs)))
        settings = {
            "PROXY_WORKER_PROCESSES": count,
            "PROXY_SSL_KEY": str(key),
            "PROXY_SSL_CERTIFICATE": str(certificate),
            "PROXY_CONFIG": str(file),
            "PYTHONPATH": str(tmp_path / "python"),
        }
        chain = make_chain(wait=False, settings=settings)
        output = chain.daemon.process.output
        chain.daemon.process.wait_until(lambda: trusts(chain, pair))

        def serves_until(line: str) -> bool:
            assert trusts(chain, pair)
            return line in output.read_text()

        hangs.touch()
        chain.daemon.process.send(signal.SIGHUP)
        for what in ("The configuration file", "Key and certificate"):
            eventually(partial(serves_until, f"{what}: not read"), what)
        hangs.unlink()
        for line in ("Reloaded ", "were read again"):
            eventually(partial(serves_until, line), line)

        for each in (key, file):
            each.unlink()
            os.mkfifo(each)
        chain.daemon.process.send(signal.SIGHUP)
        eventually(lambda: output.read_text().count("it is a FIFO, not a regular file") == 2, "both are told")
        assert all(trusts(chain, pair) for _ in range(10))

    def test_without_tls_nothing_happens(self, make_chain: MakeChain) -> None:
        """
        There is nothing to read, and nothing ends.
        """
        chain = make_chain()
        chain.daemon.process.send(signal.SIGHUP)
        assert chain.daemon.ask("/healthz").status == 200
        assert chain.daemon.process.terminate() == 0
