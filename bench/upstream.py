"""
A fast stand-in for ECR, so that the upstream is not the bottleneck: C{python -m bench.upstream --shelf JSON}.

Three ports: C{registry} checks the token as ECR does and issues one for signed calls of AWS's API; C{open} is the same
registry for servers without such tokens; C{bucket} serves the bytes that both redirect to, at a rate for each
connection.
A thread for each connection; the kernel moves the bytes, unless the bucket uses TLS. C{/_counts} on any port returns
the counts of requests so far.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import signal
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from bench.content import MANIFEST_TYPE, MEDIUM_BYTES, TAG, Shelf
from bench.processes import LOCAL

SECRET = base64.b64encode(b"AWS:" + b"bench" * 200).decode()
"""The token that ECR gives out here; a real one is longer than a kilobyte, too."""
TOKEN_SECONDS = 12 * 3600
BACKLOG = 1024
PACE = 256 * 2**10
"""Bytes sent at once where there is a rate."""

_PATH = re.compile(r"/v2/[^?]+/(manifests|blobs)/([^/?]+)")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_REASONS = {200: "OK", 206: "Partial Content", 307: "Temporary Redirect", 401: "Unauthorized", 404: "Not Found"}


@dataclass(frozen=True)
class Asked:
    """
    One request.
    """

    method: str
    path: str
    headers: dict[str, str]


@dataclass(frozen=True)
class Reply:
    """
    One answer; C{span} are the offsets of a file's bytes that are its body.
    """

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    file: str | None = None
    span: tuple[int, int] = (0, 0)

    def head(self, length: int) -> bytes:
        """
        Write the headers.
        """
        lines = [f"HTTP/1.1 {self.status} {_REASONS.get(self.status, 'Unknown')}", f"Content-Length: {length}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class Tally:
    """
    Counts of requests.
    """

    def __init__(self) -> None:
        self._lock, self._counts = threading.Lock(), Counter[str]()

    def add(self, what: str, count: int = 1) -> None:
        with self._lock:
            self._counts[what] += count

    def read(self) -> dict[str, int]:
        """
        Return all counts.
        """
        with self._lock:
            return dict(self._counts)


class Registry:
    """
    The registry's side: manifests, redirects to the bucket, and tokens.
    """

    def __init__(self, shelf: Shelf, bucket: str, tally: Tally, *, open_to_all: bool) -> None:
        self._shelf, self._bucket, self._tally, self._open = shelf, bucket, tally, open_to_all
        self._manifest = shelf.read(shelf.manifest)
        self._sizes = {**shelf.blobs(), shelf.large: shelf.large_bytes, shelf.medium: MEDIUM_BYTES}
        self._sizes[shelf.huge] = shelf.huge_bytes

    def answer(self, asked: Asked) -> Reply:
        if asked.method == "POST":
            return self._token()
        if not self._open and asked.headers.get("authorization") != f"Basic {SECRET}":
            self._tally.add("refused")
            return Reply(401, {"WWW-Authenticate": 'Basic realm="ECR"'}, b"Not Authorized\n")
        if asked.path in ("/v2", "/v2/"):
            self._tally.add("pings")
            return Reply(200, {"Content-Type": "application/json"}, b"{}")
        found = _PATH.match(asked.path)
        if found is None:
            return Reply(404, body=b"{}")
        return self._manifests(found[2]) if found[1] == "manifests" else self._blobs(asked, found[2])

    def _token(self) -> Reply:
        self._tally.add("tokens")
        data = {"authorizationToken": SECRET, "expiresAt": time.time() + TOKEN_SECONDS}
        body = json.dumps({"authorizationData": [data]}).encode()
        return Reply(200, {"Content-Type": "application/x-amz-json-1.1"}, body)

    def _manifests(self, reference: str) -> Reply:
        self._tally.add("manifests")
        if reference not in (TAG, self._shelf.manifest):
            return Reply(404, body=b"{}")
        headers = {"Content-Type": MANIFEST_TYPE, "Docker-Content-Digest": self._shelf.manifest}
        return Reply(200, headers, self._manifest)

    def _blobs(self, asked: Asked, digest: str) -> Reply:
        size = self._sizes.get(digest)
        if size is None:
            return Reply(404, body=b"{}")
        if asked.method == "HEAD":
            self._tally.add("blob heads")
            return Reply(200, {"Docker-Content-Digest": digest}, file="", span=(0, size))
        self._tally.add("blobs")
        name = digest.partition(":")[2]
        return Reply(307, {"Location": f"{self._bucket}/layers/{name}?X-Amz-Expires=3600&X-Amz-Signature={name}"})


class Bucket:
    """
    The bucket's side: bytes of files, whole or one range of them.
    """

    def __init__(self, shelf: Shelf, tally: Tally) -> None:
        self._directory, self._tally = shelf.directory, tally

    def answer(self, asked: Asked) -> Reply:
        self._tally.add("bucket requests")
        if "authorization" in asked.headers:  # S3: "Only one auth mechanism allowed"
            return Reply(400, body=b"<Error><Code>InvalidArgument</Code></Error>")
        name = asked.path.partition("?")[0].rpartition("/")[2]
        path = Path(self._directory, name)
        size = path.stat().st_size
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", "ETag": f'"{name[:32]}"'}
        found = _RANGE.fullmatch(asked.headers.get("range", ""))
        if found is None:
            return Reply(200, headers, file=str(path), span=(0, size))
        if found[1]:
            start, stop = int(found[1]), min(size, int(found[2]) + 1 if found[2] else size)
        else:
            start, stop = max(0, size - int(found[2])), size
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Reply(206, headers, file=str(path), span=(start, stop))


class Listener:
    """
    One port, and the threads behind it.

    @param latency: seconds before each answer.
    @param rate: bytes a second of each connection, or 0.
    @param tls: makes it use TLS.
    """

    def __init__(
        self,
        what: Registry | Bucket | None,
        tally: Tally,
        latency: float,
        rate: float,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.what, self._tally, self._latency, self._rate = what, tally, latency, rate
        self._socket, self._tls = socket.create_server((LOCAL, 0), backlog=BACKLOG), tls
        self.url = f"{'http' if tls is None else 'https'}://{LOCAL}:{self._socket.getsockname()[1]}"

    def start(self) -> None:
        """
        Start serving.
        """
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            with connection, connection.makefile("rb") as stream:
                first = True
                while (asked := _read(stream)) is not None:
                    self._answer(connection, asked, first=first)
                    first = False
                    if asked.headers.get("connection", "").lower() == "close":
                        return
        except OSError:
            pass  # the client has disconnected

    def _answer(self, connection: socket.socket, asked: Asked, *, first: bool) -> None:
        if asked.path == "/_counts":
            body = json.dumps(self._tally.read()).encode()
            connection.sendall(Reply(200).head(len(body)) + body)
            return
        if first:
            self._tally.add("connections")
        assert self.what is not None
        reply = self.what.answer(asked)
        if self._latency:
            time.sleep(self._latency)
        start, stop = reply.span
        head = reply.head(len(reply.body) if reply.file is None else stop - start)
        connection.sendall(head if asked.method == "HEAD" else head + reply.body)
        if reply.file and asked.method != "HEAD":
            self._send(connection, reply.file, start, stop)

    def _send(self, connection: socket.socket, path: str, start: int, stop: int) -> None:
        piece = PACE if self._rate else 2**30
        began = time.monotonic()
        with Path(path).open("rb") as file:
            at = start
            while at < stop:
                sent = _move(connection, file, at, min(piece, stop - at))
                self._tally.add("bucket bytes", sent)
                at += sent
                ahead = (at - start) / self._rate - (time.monotonic() - began) if self._rate else 0
                if ahead > 0:
                    time.sleep(ahead)


def _move(connection: socket.socket, file: BinaryIO, at: int, count: int) -> int:
    """
    Send bytes of a file; return how many.
    """
    if not isinstance(connection, ssl.SSLSocket):
        return os.sendfile(connection.fileno(), file.fileno(), at, count)
    data = os.pread(file.fileno(), min(count, PACE), at)
    connection.sendall(data)
    return len(data)


def _read(stream: BufferedReader) -> Asked | None:
    """
    Read a request, and discard its body; return None at the connection's end.
    """
    line = stream.readline().decode("latin-1").split()
    if len(line) != 3:
        return None
    headers = {}
    while (header := stream.readline().decode("latin-1").strip()) != "":
        name, _, value = header.partition(":")
        headers[name.lower()] = value.strip()
    stream.read(int(headers.get("content-length", 0)))
    return Asked(line[0], line[1], headers)


def main() -> None:
    """
    Serve until stopped; the first line has the addresses.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.upstream", description=__doc__)
    parser.add_argument("--shelf", required=True, type=Shelf.from_json, help="the content, as JSON")
    parser.add_argument("--latency", type=float, default=0, help="seconds before each answer")
    parser.add_argument("--rate", type=float, default=0, help="bytes a second of each bucket connection; 0: no limit")
    parser.add_argument(
        "--certificate", nargs=2, metavar=("CHAIN", "KEY"), help="files with which the bucket speaks TLS"
    )
    options = parser.parse_args()
    tls = None
    if options.certificate:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(*options.certificate)
    tally = Tally()
    listeners = {name: Listener(None, tally, options.latency, 0) for name in ("registry", "open")}
    listeners["bucket"] = bucket = Listener(Bucket(options.shelf, tally), tally, options.latency, options.rate, tls)
    for name in ("registry", "open"):
        listeners[name].what = Registry(options.shelf, bucket.url, tally, open_to_all=name == "open")
    for each in listeners.values():
        each.start()
    print(json.dumps({name: each.url for name, each in listeners.items()}), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.pause()


if __name__ == "__main__":
    main()
