"""
C{ecr-proxy ls, purge, verify, stats}, from the wheel, over the real daemon while clients pull.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from .asking import Transfer, download
from .chain import Chain
from .clients import Client, Done
from .conftest import MakeChain
from .images import Images
from .processes import PATIENCE, environment, eventually, free_port
from .test_workers import wait_for_workers

Call = Callable[..., Done]


@pytest.fixture(params=["1", "2"], ids=["alone", "workers"])
def chain(make_chain: MakeChain, images: Images, request: pytest.FixtureRequest) -> Chain:
    """
    Return a chain whose daemon, by itself or with workers, has fetched two images.
    """
    settings = {"PROXY_ADMIN_LISTEN": f"tcp:{free_port()}:interface=127.0.0.1", "PROXY_WORKER_PROCESSES": request.param}
    chain = make_chain(settings=settings)
    if request.param != "1":
        wait_for_workers(chain, int(request.param))
    for image in (images.single, images.big):
        assert chain.daemon.ask(f"/v2/{image.repository}/manifests/{image.tag}").status == 200
        for layer in image.layers:
            assert download(f"{chain.daemon.url}/v2/{image.repository}/blobs/{layer}").digest == layer
    chain.daemon.settle()
    return chain


@pytest.fixture
def call(chain: Chain, tmp_path: Path) -> Call:
    """
    Run the command as an operator does, beside the daemon, with its variables.
    """
    client = Client(tmp_path, chain.daemon.variables)
    return lambda *arguments: client.attempt(chain.command, *arguments)


def told(done: Done) -> Any:
    """
    Return its output for programs.
    """
    assert done.status == 0, done
    return json.loads(done.output)


class Pulling:
    """
    Clients that pull a layer again and again, until they are told to stop.
    """

    def __init__(self, url: str, clients: int = 3) -> None:
        self._url, self._over = url, threading.Event()
        self.transfers: list[Transfer] = []
        self.failures: list[Exception] = []
        self._threads = [threading.Thread(target=self._pull) for _ in range(clients)]

    def __enter__(self) -> Self:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for each in self._threads:
            each.join()

    def _pull(self) -> None:
        while not self._over.is_set():
            try:
                self.transfers.append(download(self._url))
            except Exception as problem:  # noqa: BLE001 (each is one too many)
                self.failures.append(problem)


def test_purge_and_verify_break_off_nobodys_pull(chain: Chain, call: Call, images: Images) -> None:
    """
    Each pull is complete and right while everything is purged and verified, again and again.
    """
    layer = images.big.layers[0]
    with Pulling(f"{chain.daemon.url}/v2/{images.big.repository}/blobs/{layer}") as pulling:
        for _ in range(4):
            assert call("verify").status == 0
            assert call("purge", "--yes", "*").status in (0, 1)  # it may have been empty
            before = len(pulling.transfers)
            eventually(lambda: len(pulling.transfers) >= before + 3, "clients pull on")  # noqa: B023 (called at once)
    assert pulling.failures == []
    assert {(each.status, each.digest) for each in pulling.transfers} == {(200, layer)}
    assert {"MISS", "HIT"} <= {each.cache for each in pulling.transfers}
    chain.daemon.settle()
    assert chain.daemon.wrong_content() == []
    assert "Traceback" not in chain.daemon.process.tail()


def test_what_was_purged_is_fetched_again(chain: Chain, call: Call, images: Images) -> None:
    """
    Only the tag and its layers are removed; each process, whatever it had in memory, fetches it again.
    """
    image = images.single
    blob = f"/v2/{image.repository}/blobs/{image.layers[0]}"
    manifest = f"/v2/{image.repository}/manifests/{image.digest}"
    for _ in range(8):  # each worker has it in memory
        assert chain.daemon.ask(manifest).headers["x-cache-status"] == "HIT"
    done = call("purge", "--yes", f"{image.repository}:{image.tag}")
    assert done.status == 0, done
    assert not chain.daemon.holds(image.layers[0])
    assert chain.daemon.holds(images.big.layers[0])

    def asked_for_afresh() -> bool:  # a worker that hasn't checked yet may serve it from memory
        return chain.daemon.ask(manifest).headers["x-cache-status"] == "MISS"

    eventually(asked_for_afresh, "the manifest is asked for afresh")
    assert chain.daemon.ask(blob).headers["x-cache-status"] in ("MISS", "REVALIDATED")


def test_ls_and_stats_tell_what_is_there(chain: Chain, call: Call, images: Images) -> None:
    """
    Tags with the bytes that are on the disk, the same without the daemon, and the same sum by its own count.
    """
    on_disk = sum(each.stat().st_size for each in (chain.daemon.cache / "content").rglob("*") if each.is_file())
    listed = told(call("ls", "--json"))
    assert listed["bytes"] == on_disk
    tags = {(each["repository"], image["tag"]) for each in listed["repositories"] for image in each["images"]}
    assert tags == {(images.single.repository, images.single.tag), (images.big.repository, images.big.tag)}

    def tells_the_same() -> bool:  # when uses are written each second
        return bool(told(call("ls", "--json")) == told(call("ls", "--json", "--offline")))

    eventually(tells_the_same, "it tells the same without the daemon")
    assert images.big.tag in call("ls").output

    def counted() -> int:
        return int(told(call("stats", "--json"))["cache"]["bytes"])

    # Each process reads the totals of the index once a second.
    eventually(lambda: counted() >= on_disk, "all is counted")
    assert "ready" in call("stats").output


def test_verify_finds_what_rotted(chain: Chain, call: Call, images: Images) -> None:
    """
    Even if the file's times do not show it; the next pull has the right bytes.
    """
    layer = images.single.layers[0]
    (path,) = (chain.daemon.cache / "content").rglob(layer.removeprefix("sha256:"))
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    done = call("verify")
    assert done.status == 1, done
    assert f"bad: {layer}, dropped" in done.complaint
    assert call("verify").status == 0
    assert download(f"{chain.daemon.url}/v2/{images.single.repository}/blobs/{layer}").digest == layer


def test_a_person_is_asked(chain: Chain, tmp_path: Path, images: Images) -> None:
    """
    At a real terminal: what would be removed, a question, and what was removed.
    """
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        [chain.command, "purge", images.single.repository],
        env=environment(tmp_path, chain.daemon.variables),
        cwd=tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while b"[y/N]" not in shown:
            shown += os.read(ours, 4096)
        os.write(ours, b"y\n")
        assert running.wait(PATIENCE) == 0
        with contextlib.suppress(OSError):  # which is how a terminal's other side ends
            while more := os.read(ours, 65536):
                shown += more
    finally:
        running.kill()
        running.wait()
        os.close(ours)
    assert b"removed" in shown
    assert not chain.daemon.holds(images.single.layers[0])


def test_whatever_is_in_the_way_is_a_line(chain: Chain, call: Call, tmp_path: Path) -> None:
    """
    No traceback: a closed pipe, an unreadable directory, a daemon that is down.
    """
    client = Client(tmp_path, chain.daemon.variables)
    done = client.attempt("sh", "-c", f"{chain.command} ls --json | head -n 1")
    assert (done.status, done.output, done.complaint) == (0, "{\n", "")
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    done = client.attempt(*nobody, chain.command, "ls", "--offline")
    assert done.status == 3, done
    assert "Permission denied" in done.complaint
    chain.daemon.process.kill()
    for arguments in (("ls",), ("purge", "--yes", "*"), ("verify",), ("stats",)):
        done = call(*arguments)
        assert done.status == 3, done
        assert done.complaint.startswith("ecr-proxy: no daemon answers at 127.0.0.1:")
        assert done.complaint.count("\n") == 1
    assert call("ls", "--offline").status == 0
