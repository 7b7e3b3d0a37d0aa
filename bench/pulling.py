"""
Clients that pull an image as Docker does: C{python -m bench.pulling --url URL --shelf JSON}.

Each requests the tag, fetches the manifest by its digest, then the config and the layers, some at a time, on
keep-alive connections. All content is verified: hashed and compared with its digest, as Docker does, or compared byte
by
byte with what was pushed, which proves as much and leaves the processor to the servers. A redirect is
followed. Prints one line of JSON: seconds from the first request to the last verified byte.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import http.client
import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from bench.content import MANIFEST_TYPE, REPOSITORY, TAG, Shelf

BUFFER = 2**18
REDIRECTS = (301, 302, 307)
SECONDS = 120


class PullError(Exception):
    """
    Raised if a pull failed.
    """


class Link:
    """
    One thread's connections, one to each host.
    """

    def __init__(self, url: str, token: str | None) -> None:
        self._url, self._token = url, token
        self._kept: dict[str, http.client.HTTPConnection] = {}
        self._buffer = memoryview(bytearray(BUFFER))

    def ask(self, method: str, path: str) -> http.client.HTTPResponse:
        """
        Send a request to the registry; a redirect is followed, without the token.
        """
        headers = {"Accept": MANIFEST_TYPE}
        if self._token is not None:
            headers["Authorization"] = f"Basic {self._token}"
        answer = self._ask(method, self._url + path, headers)
        if answer.status in REDIRECTS:
            answer.read()
            answer = self._ask(method, answer.headers["Location"], {})
        if answer.status != http.client.OK:
            raise PullError(f"{method} {path}: {answer.status} {answer.read(500)!r}")
        return answer

    def _ask(self, method: str, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        parts = urlsplit(url)
        connection = self._kept.get(parts.netloc)
        if connection is None:
            connection = self._kept[parts.netloc] = http.client.HTTPConnection(parts.netloc, timeout=SECONDS)
        connection.request(method, f"{parts.path}?{parts.query}" if parts.query else parts.path, headers=headers)
        return connection.getresponse()

    def take(self, path: str, check: Callable[[memoryview], None]) -> None:
        """
        Fetch a body, checked piece by piece.
        """
        answer = self.ask("GET", path)
        while count := answer.readinto(self._buffer):
            check(self._buffer[:count])
        answer.close()


class Hashed:
    """
    A body with an expected digest.
    """

    def __init__(self, digest: str) -> None:
        self._digest, self._state = digest, hashlib.sha256()

    def __call__(self, piece: memoryview) -> None:
        self._state.update(piece)

    def finish(self) -> None:
        """
        Compare the hash with the digest.
        """
        if f"sha256:{self._state.hexdigest()}" != self._digest:
            raise PullError(f"the bytes do not match {self._digest}")


class Compared:
    """
    A body with expected bytes.
    """

    def __init__(self, expected: bytes) -> None:
        self._expected, self._at = expected, 0

    def __call__(self, piece: memoryview) -> None:
        if not self._expected.startswith(piece, self._at):
            raise PullError(f"other bytes came at {self._at}")
        self._at += len(piece)

    def finish(self) -> None:
        """
        Check that nothing is missing.
        """
        if self._at != len(self._expected):
            raise PullError(f"{self._at} bytes came of {len(self._expected)}")


Check = Callable[[str], Hashed | Compared]


class Client:
    """
    One client, with so many layers at a time.
    """

    def __init__(self, url: str, token: str | None, check: Check, parallel: int) -> None:
        self._links = [Link(url, token) for _ in range(parallel + 1)]
        self._check = check

    def pull(self) -> None:
        link = self._links[0]
        head = link.ask("HEAD", f"/v2/{REPOSITORY}/manifests/{TAG}")
        head.read()
        digest = head.headers["Docker-Content-Digest"]
        manifest = link.ask("GET", f"/v2/{REPOSITORY}/manifests/{digest}").read()
        if f"sha256:{hashlib.sha256(manifest).hexdigest()}" != digest:
            raise PullError("the bytes are not the manifest")
        document = json.loads(manifest)
        layers: queue.SimpleQueue[str] = queue.SimpleQueue()
        for each in document["layers"]:
            layers.put(each["digest"])
        together(
            [
                functools.partial(self._blob, link, document["config"]["digest"]),
                *(functools.partial(self._work, each, layers) for each in self._links[1:]),
            ]
        )

    def _work(self, link: Link, layers: queue.SimpleQueue[str]) -> None:
        while True:
            try:
                digest = layers.get_nowait()
            except queue.Empty:
                return
            self._blob(link, digest)

    def _blob(self, link: Link, digest: str) -> None:
        check = self._check(digest)
        link.take(f"/v2/{REPOSITORY}/blobs/{digest}", check)
        check.finish()


def together(jobs: Sequence[Callable[[], None]]) -> None:
    """
    Run jobs at once, each in a thread; the first failure of one is raised.
    """
    failures: list[BaseException] = []

    def work(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as problem:  # noqa: BLE001 (it is raised again in the thread that waits)
            failures.append(problem)

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pulling", description=__doc__)
    parser.add_argument("--url", required=True, help="the registry")
    parser.add_argument("--shelf", required=True, type=Shelf.from_json, help="what is there, as JSON")
    parser.add_argument("--token", help="the registry's token")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=3, help="layers at a time")
    parser.add_argument("--compare", action="store_true", help="compare the bytes instead of hashing them")
    options = parser.parse_args()
    check: Check = Hashed
    if options.compare:
        expected = {digest: options.shelf.read(digest) for digest in options.shelf.blobs()}

        def check(digest: str) -> Compared:
            return Compared(expected[digest])

    clients = [Client(options.url, options.token, check, options.parallel) for _ in range(options.clients)]
    began = time.monotonic()
    together([each.pull for each in clients])
    print(json.dumps({"seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    main()
