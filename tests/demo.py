"""
Run what C{make demo} shows: an image pulled twice through the daemon, from a stand-in for ECR.

The stand-in and the daemon are separate programs; the daemon is the one that twistd
starts. All of it stays on this machine, in a directory that is removed afterwards. The exit status is 0 if both pulls
returned content that matches its digests, and the second downloaded no layer from upstream.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit

from tests.e2e.processes import free_port

CHECKOUT: Final = Path(__file__).resolve().parents[1]
LOCAL: Final = "127.0.0.1"
IMAGE: Final = ("demo/app", "latest")
LAYERS: Final = 4
MIB: Final = 2**20
LAYER_BYTES: Final = 8 * MIB
RATE: Final = 7 * MIB
"""Bytes per second and connection to the stand-in's bucket, so that a pull takes as long as over a network."""
LATENCY: Final = 0.03
AT_ONCE: Final = 3
"""Concurrent downloads of blobs per client, as in Docker."""
START_SECONDS: Final = 90.0
PULL_SECONDS: Final = 90.0
SILENT_SECONDS: Final = 60.0
BAR: Final = 30
MANIFEST_TYPES: Final = (
    "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json,"
    " application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json"
)


class DemoError(Exception):
    """
    Raised if the demonstration can't go on.
    """


@dataclass
class Pull:
    """
    The result of one pull of the image.
    """

    title: str
    seconds: float = 0
    received: int = 0
    total: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    upstream_bytes: int = 0
    upstream_requests: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def took(self, count: int) -> None:
        """
        Count received bytes.
        """
        with self.lock:
            self.received += count

    def answered(self, status: str) -> None:
        """
        Record an answer's X-Cache-Status.
        """
        with self.lock:
            self.statuses[status] += 1


def get(place: str, path: str, accept: str = "*/*") -> HTTPResponse:
    """
    Request something that must exist.
    """
    connection = HTTPConnection(place, timeout=SILENT_SECONDS)
    connection.request("GET", path, headers={"Accept": accept, "Connection": "close"})
    response = connection.getresponse()
    if response.status != 200:
        raise DemoError(f"{path} answers {response.status}: {response.read(500).decode(errors='replace').strip()}")
    return response


def fetch(place: str, path: str, digest: str, pull: Pull, end: float) -> bytes:
    """
    Fetch content by its digest, and verify it.
    """
    parts, state = [], hashlib.sha256()
    with get(place, path, MANIFEST_TYPES) as response:
        while data := response.read1(256 * 1024):
            parts.append(data)
            state.update(data)
            pull.took(len(data))
            if time.monotonic() > end:
                raise DemoError(f"{path} takes more than {PULL_SECONDS:.0f} s")
        pull.answered(response.getheader("X-Cache-Status", "none"))
        digest = digest or response.getheader("Docker-Content-Digest", "")
    if f"sha256:{state.hexdigest()}" != digest:
        raise DemoError(f"{path}: the bytes do not match {digest}")
    return b"".join(parts)


def pull_image(place: str, title: str) -> Pull:
    """
    Pull the image as a client does: its manifest, then everything that the manifest lists.
    """
    pull, began = Pull(title), time.monotonic()
    fetch_image(place, IMAGE, pull, lambda fetching: show(pull, fetching, began))
    pull.seconds = time.monotonic() - began
    return pull


def fetch_image(
    place: str,
    image: tuple[str, str],
    pull: Pull,
    wait_for: Callable[[Sequence[Future[bytes]]], object] = wait,
) -> None:
    """
    Fetch the manifest of an image (the first one of an index), and everything that it lists.

    @param wait_for: waits for the blobs.
    @raise DemoError: if anything is wrong.
    """
    name, tag = image
    end = time.monotonic() + PULL_SECONDS
    manifest = json.loads(fetch(place, f"/v2/{name}/manifests/{tag}", "", pull, end))
    if "manifests" in manifest:
        digest = manifest["manifests"][0]["digest"]
        manifest = json.loads(fetch(place, f"/v2/{name}/manifests/{digest}", digest, pull, end))
    blobs = [manifest["config"], *manifest["layers"]]
    pull.received, pull.total = 0, sum(blob["size"] for blob in blobs)
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        fetching = [
            pool.submit(fetch, place, f"/v2/{name}/blobs/{blob['digest']}", blob["digest"], pull, end) for blob in blobs
        ]
        wait_for(fetching)
    finally:
        # Don't wait for them here: those that are still reading are cut off when the programs end.
        pool.shutdown(wait=False, cancel_futures=True)


def show(pull: Pull, fetching: Sequence[Future[bytes]], began: float) -> None:
    """
    Show the progress of a pull until it is done: a bar on a terminal, a line at its end elsewhere.

    @raise DemoError: if a part of it failed.
    """
    left = set(fetching)
    while left:
        done, left = wait(left, timeout=0.05)
        draw(pull, time.monotonic() - began)
        for each in done:
            each.result()
    if sys.stdout.isatty():
        print()
    else:
        print(f"{pull.title.strip()}: {pull.received / MIB:.1f} MiB in {time.monotonic() - began:.2f} s", flush=True)


def draw(pull: Pull, seconds: float) -> None:
    """
    Draw the bar, if there is a terminal.
    """
    if not sys.stdout.isatty():
        return
    filled = BAR * pull.received // pull.total
    bar = "#" * filled + "." * (BAR - filled)
    figures = f"{pull.received / MIB:5.1f} of {pull.total / MIB:.1f} MiB  {seconds:5.2f} s"
    print(f"\r{pull.title}  [{bar}]  {figures}", end="", flush=True)


class Program:
    """
    A program that was started here, and is stopped here by its own process id.
    """

    def __init__(self, argv: Sequence[str], environ: dict[str, str], cwd: Path, log: Path, **more: Any) -> None:
        self._log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                argv,
                env=environ,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stderr=errors,
                text=True,
                # Ctrl-C at the terminal is for us: we stop it.
                start_new_session=True,
                **more,
            )

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """
        Wait until the program is ready.

        @raise DemoError: if it exits instead, or takes too long.
        """
        end = time.monotonic() + START_SECONDS
        while not ready():
            self.check()
            if time.monotonic() > end:
                self._give_up(f"is not ready after {START_SECONDS:.0f} s")
            time.sleep(0.05)

    def _give_up(self, why: str) -> NoReturn:
        said = self._log.read_text("utf-8", "replace").strip().splitlines()[-10:]
        raise DemoError("\n".join([f"{self._log.stem} {why}; it said:", *said]))

    def check(self) -> None:
        """
        Check that the program still runs.

        @raise DemoError: if it does not.
        """
        if self.process.poll() is not None:
            self._give_up(f"ended with status {self.process.returncode}")

    def end(self) -> None:
        """
        Stop the program, by SIGKILL if necessary.
        """
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def running(program: Program) -> Iterator[Program]:
    """
    Stop the program when the block ends, whatever the reason.
    """
    try:
        yield program
    finally:
        program.end()


def environment(home: Path, **more: str) -> dict[str, str]:
    """
    Return an environment without the caller's AWS and proxy settings.
    """
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    return {**kept, "HOME": str(home), **more}


def start_stand_in(home: Path) -> Program:
    """
    Start the stand-in for ECR that the tests use; it prints a line of JSON when it is ready.
    """
    sizes = ("--layers", str(LAYERS), "--layer-bytes", str(LAYER_BYTES))
    speed = ("--rate", str(RATE), "--latency", str(LATENCY))
    argv = [sys.executable, "-m", "tests.registry_server", *sizes, *speed]
    with (home / "places.json").open("wb") as places:
        return Program(argv, environment(home), CHECKOUT, home / "stand-in.log", stdout=places)


def start_daemon(home: Path, places: dict[str, Any], port: int, **more: str) -> Program:
    """
    Start the daemon as an operator does, with keys that the stand-in does not check.

    @param more: settings.
    """
    settings = {
        "PROXY_ECR_ENDPOINT": places["registry"],
        "PROXY_LISTEN": f"tcp:{port}:interface={LOCAL}",
        "PROXY_CACHE_DIR": str(home / "cache"),
        "PROXY_DNS_RESOLVER": "system",
        "AWS_REGION": "eu-west-1",
        "AWS_ENDPOINT_URL": places["api"],
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    twistd = Path(sys.executable).with_name("twistd")  # not resolved: the environment's own interpreter
    log = home / "daemon.log"
    with log.open("ab") as output:
        argv = [str(twistd), "-n", "--pidfile=", "ecr-proxy"]
        return Program(argv, environment(home, **settings, **more), home, log, stdout=output)


def is_ready(place: str) -> bool:
    """
    Return True if the daemon has its token and its cache.
    """
    connection = HTTPConnection(place, timeout=SILENT_SECONDS)
    try:
        connection.request("GET", "/readyz", headers={"Connection": "close"})
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def upstream(places: dict[str, Any]) -> tuple[int, int]:
    """
    Return what the stand-in recorded: the bytes that its bucket sent, and requests for content.
    """
    at = urlsplit(places["asked"])
    with get(at.netloc, at.path) as response:
        seen = json.load(response)
    return seen["bytes_sent"], sum(each["service"] != "api" for each in seen["asked"])


def report(pulls: Sequence[Pull]) -> None:
    """
    Print the results of both pulls.
    """
    print(f"\n{'':12}  {'time':>7}  {'from upstream':>13}  {'requests':>8}  X-Cache-Status")
    for pull in pulls:
        statuses = ", ".join(f"{status} {count}" for status, count in sorted(pull.statuses.items()))
        amount = f"{pull.upstream_bytes / MIB:.1f} MiB"
        print(f"{pull.title:12}  {pull.seconds:5.2f} s  {amount:>13}  {pull.upstream_requests:>8}  {statuses}")


def run(home: Path) -> None:
    """
    Start both programs, pull twice, and report.

    @raise DemoError: if anything is wrong.
    """
    began = time.monotonic()
    places_file = home / "places.json"
    with running(start_stand_in(home)) as stand_in:
        stand_in.wait_until(lambda: places_file.exists() and places_file.read_text().endswith("\n"))
        places = json.loads(places_file.read_text())
        port = free_port()
        place = f"{LOCAL}:{port}"
        with running(start_daemon(home, places, port)) as daemon:
            daemon.wait_until(lambda: is_ready(place))
            print(f"stand-in for ECR  {places['registry']}")
            print(f"ecr-proxy         http://{place}, ready after {time.monotonic() - began:.1f} s")
            print(f"image             {place}/{':'.join(IMAGE)}, {LAYERS} layers\n", flush=True)
            pulls, before = [], (0, 0)
            for title in ("first pull", "second pull"):
                pull = pull_image(place, f"{title:11}")
                after = upstream(places)
                pull.upstream_bytes, pull.upstream_requests = after[0] - before[0], after[1] - before[1]
                pulls.append(pull)
                before = after
            report(pulls)
    if pulls[1].upstream_bytes or not pulls[0].upstream_bytes:
        raise DemoError("the layers did not come from upstream once and from the cache then")


def interrupt(number: int, frame: object) -> NoReturn:
    """
    End as Ctrl-C does.
    """
    raise KeyboardInterrupt


def main() -> int:
    """
    Return the exit status.
    """
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="ecrproxy-demo-") as home:
            run(Path(home))
    except (DemoError, OSError, HTTPException) as problem:
        print(f"\ndemo: {problem or type(problem).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
