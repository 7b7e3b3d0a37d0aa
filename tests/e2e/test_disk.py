"""
Disk troubles that only a kernel causes: full, read-only, changed behind the daemon's back; and out of descriptors.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from .asking import Transfer, download
from .chain import Chain, Daemon
from .conftest import MakeChain
from .images import BIG, Images
from .processes import PATIENCE, eventually
from .test_together import blob_path

SLOW = 24 * 2**20


def small_path(images: Images) -> str:
    """
    Return the path of a manifest.
    """
    return f"/v2/{images.big.repository}/manifests/{images.big.digest}"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """
    Mount a disk that is smaller than the large blob.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={BIG // 2}", "tmpfs", folder)
    yield folder
    run("umount", "--lazy", folder)


def run(*argv: str | Path) -> None:
    """
    Run a program that must succeed.
    """
    subprocess.run([str(each) for each in argv], check=True, timeout=PATIENCE)


def pull(chain: Chain, images: Images) -> Transfer:
    """
    Pull the large blob, whose bytes must be right.
    """
    pulled = download(chain.daemon.url + blob_path(images))
    assert (pulled.status, pulled.digest) == (200, images.big.layers[0])
    return pulled


def pull_cut_off(chain: Chain, images: Images) -> None:
    """
    Pull the large blob, which must not be complete.
    """
    with contextlib.suppress(OSError, http.client.HTTPException):
        assert download(chain.daemon.url + blob_path(images)).size < BIG


def reasons(daemon: Daemon) -> str:
    """
    Return why the daemon isn't ready.
    """
    return ", ".join(daemon.ask("/readyz").json()["reasons"])


def says(daemon: Daemon, why: str) -> bool:
    """
    Return True if the daemon answers that it isn't ready for that reason.
    """
    with contextlib.suppress(OSError):
        return why in reasons(daemon)
    return False


def begun(daemon: Daemon) -> int:
    """
    Count the lines that report disk trouble.
    """
    return daemon.process.output.read_text().count("going on without it")


def file_of(daemon: Daemon, digest: str) -> Path:
    """
    Find a blob in the cache.
    """
    (found,) = (daemon.cache / "content").rglob(digest.removeprefix("sha256:"))
    return found


def test_a_blob_larger_than_the_disk_is_handed_through(make_chain: MakeChain, images: Images, disk: Path) -> None:
    """
    The disk's size is the limit, whatever the settings say: one line says so.
    """
    chain = make_chain(settings={"PROXY_CACHE_DIR": str(disk)})
    chain.daemon.cache = disk
    for _ in range(2):
        assert pull(chain, images).cache == "BYPASS"
    assert reasons(chain.daemon) == ""
    assert chain.daemon.process.output.read_text().count("The cache is limited to") == 1
    assert chain.daemon.ask(small_path(images)).status == 200
    chain.daemon.settle()
    assert chain.daemon.ask(small_path(images)).headers["x-cache-status"] == "HIT"


def test_a_disk_that_others_fill_up_has_room_made(make_chain: MakeChain, images: Images, disk: Path) -> None:
    """
    Below its limit, the cache evicts the least recently used content for new content.
    """
    run("mount", "-o", f"remount,size={BIG + BIG // 4}", disk)
    chain = make_chain(settings={"PROXY_CACHE_DIR": str(disk)})
    chain.daemon.cache = disk
    assert pull(chain, images).cache == "MISS"
    chain.daemon.settle()
    with contextlib.suppress(OSError), (disk / "of-others").open("wb", buffering=0) as other:
        while other.write(bytes(2**16)):
            pass
    image = images.single
    path = f"/v2/{image.repository}/manifests/{image.digest}"
    assert chain.daemon.ask(path).headers["x-cache-status"] == "MISS"
    eventually(lambda: chain.daemon.holds(image.digest), "it is kept")
    assert chain.daemon.ask(path).headers["x-cache-status"] == "HIT"
    assert not chain.daemon.holds(images.big.layers[0])
    assert (reasons(chain.daemon), begun(chain.daemon)) == ("", 0)


def test_a_read_only_disk_keeps_no_pull_from_its_bytes(make_chain: MakeChain, images: Images, disk: Path) -> None:
    """
    What it has is served, everything else streams through; once the disk can be written again, it is.
    """
    run("mount", "-o", f"remount,size={BIG * 3}", disk)
    chain = make_chain(settings={"PROXY_CACHE_DIR": str(disk)})
    chain.daemon.cache = disk
    assert chain.daemon.ask(small_path(images)).status == 200
    eventually(lambda: chain.daemon.holds(images.big.digest), "it is kept")
    chain.daemon.settle()
    chain.daemon.process.terminate()  # the index is open as long as it runs
    run("mount", "-o", "remount,ro", disk)
    chain.daemon.process = chain.daemon.start()
    chain.daemon.process.wait_until(partial(says, chain.daemon, "can't be written: Read-only file system"))
    assert chain.daemon.ask(small_path(images)).headers["x-cache-status"] == "HIT"
    assert pull(chain, images).cache == "BYPASS"
    run("mount", "-o", "remount,rw", disk)
    eventually(chain.daemon.ready, "the daemon is ready again")
    eventually(lambda: pull(chain, images).cache == "MISS", "its index is opened again")
    chain.daemon.settle()  # else the second may still follow the first one's transfer
    assert pull(chain, images).cache == "HIT"


def test_a_cache_removed_in_the_middle_of_a_pull_costs_no_byte(make_chain: MakeChain, images: Images) -> None:
    """
    The client gets all of it; the directory is created again, and holds the next one.
    """
    chain = make_chain(front=("--rate", str(SLOW)))
    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(pull, chain, images)
        eventually(lambda: bool(chain.daemon.arriving()), "the blob arrives")
        shutil.rmtree(chain.daemon.cache, ignore_errors=True)
        assert pulling.result(timeout=PATIENCE).cache == "MISS"
    # The second may have joined the first, whose file can't be kept.
    eventually(lambda: pull(chain, images).cache == "HIT", "it is kept again")
    assert chain.daemon.wrong_content() == []


def alter(path: Path) -> None:
    """
    Change one byte.
    """
    with path.open("r+b") as file:
        file.seek(BIG // 2)
        byte = file.read(1)[0]
        file.seek(BIG // 2)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("restarted", [False, True])
def test_an_altered_file_completes_no_answer(make_chain: MakeChain, images: Images, restarted: bool) -> None:
    """
    Whether or not it happened while the daemon ran: the client is cut off, and the next one gets the right bytes.
    """
    chain = make_chain()
    pull(chain, images)
    chain.daemon.settle()
    path = file_of(chain.daemon, images.big.layers[0])
    times = path.stat()
    if restarted:
        chain.daemon.process.kill()
    alter(path)
    if restarted:  # as bit rot leaves it
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        chain.daemon.restart()
    pull_cut_off(chain, images)
    assert not path.exists()
    assert chain.daemon.process.output.read_text().count("in the cache is dropped") == 1
    assert pull(chain, images).cache == "MISS"
    chain.daemon.settle()
    assert pull(chain, images).cache == "HIT"
    assert chain.daemon.wrong_content() == []


@pytest.mark.parametrize("harm", [lambda path: os.truncate(path, BIG // 3), Path.unlink])
def test_a_file_cut_or_deleted_is_fetched_again(
    make_chain: MakeChain, images: Images, harm: Callable[[Path], None]
) -> None:
    """
    It is noticed before a byte of it is sent.
    """
    chain = make_chain()
    pull(chain, images)
    chain.daemon.settle()
    harm(file_of(chain.daemon, images.big.layers[0]))
    assert pull(chain, images).cache == "MISS"
    chain.daemon.settle()
    assert chain.daemon.wrong_content() == []


def test_no_more_file_descriptors_pass(make_chain: MakeChain, images: Images) -> None:
    """
    While clients hold all of them others wait or are rejected; then all is as before, with the cache intact.
    """
    chain = make_chain(settings={"PROXY_IDLE_SECONDS": "5"})
    pull(chain, images)
    chain.daemon.settle()
    pid = chain.daemon.process.pid
    used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    run("prlimit", f"--pid={pid}", f"--nofile={used + 8}")
    with contextlib.ExitStack() as held:
        for _ in range(60):
            held.enter_context(contextlib.closing(socket.create_connection(("127.0.0.1", chain.daemon.port), PATIENCE)))
        for _ in range(3):
            with contextlib.suppress(OSError, http.client.HTTPException):
                chain.daemon.ask(small_path(images))
    eventually(lambda: chain.daemon.answers("/healthz", 200), "the daemon answers again")
    assert pull(chain, images).cache == "HIT"
    assert chain.daemon.process.output.stat().st_size < 200_000
    assert chain.daemon.holds(images.big.layers[0])
    eventually(chain.daemon.ready, "the daemon is ready again")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_without_memory_ends(make_chain: MakeChain, images: Images, processes: int) -> None:
    """
    One line says so, and the supervisor may start another.
    """
    chain = make_chain(settings={"PROXY_WORKER_PROCESSES": str(processes)})
    process = chain.daemon.process
    size = re.search(r"VmSize:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert size is not None
    run("prlimit", f"--pid={process.pid}", f"--as={int(size[1]) * 512}")
    assert process.wait() == 1
    said = process.output.read_text()
    assert (said.count("Out of memory: ending"), len(said) < 200_000) == (1, True)
