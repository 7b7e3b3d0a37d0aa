"""
The clients: curl for blobs, wrk for small answers, C{bench.pulling} for images, sockets for idle connections.

They run on this process's processor.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.content import MANIFEST_TYPE, REPOSITORY
from bench.ground import Ground
from bench.peers import Served
from bench.processes import LOCAL, ROOT, environment
from bench.tls import CIPHER

SECONDS = 300
GB = 1e9
_ON_ONE = 500
"""Requests on one connection: nginx takes a thousand."""
_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


class ClientError(Exception):
    """
    Raised if a client did not get what it requested.
    """


def download(ground: Ground, served: Served, path: str, size: int, streams: int, times: int) -> float:
    """
    Fetch C{path} so many times on each of so many connections, and return the seconds that it took.
    """
    argv = ["curl", "--silent", "--show-error", "--fail", "--http1.1", "--write-out", "%{stderr}%{size_download}\n"]
    if served.secure:
        argv += ["--cacert", str(ground.certificate.chain), "--tlsv1.3", "--tls13-ciphers", CIPHER]
    argv += ["--max-time", str(SECONDS), *[served.url + path] * times]
    began = time.monotonic()
    processes = [_curl(ground, argv) for _ in range(streams)]
    try:
        outputs = [process.communicate(timeout=SECONDS)[1] for process in processes]
        seconds = time.monotonic() - began
    finally:
        _end(processes)
    for output in outputs:
        if output.split() != [str(size)] * times:
            raise ClientError(f"{served.peer}: curl got {output!r}, not {times} times {size} bytes")
    return seconds


def _curl(ground: Ground, argv: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        argv,
        env=environment(ground.directory),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@dataclass(frozen=True)
class Rate:
    """
    Answers a second, their number, and milliseconds for the median and the slowest hundredth.
    """

    requests: float
    count: int
    median: float
    slow: float


def hammer(ground: Ground, served: Served, path: str, seconds: int, connections: int = 32) -> Rate:
    """
    Request C{path} on so many connections, as fast as it is answered.
    """
    argv = ["wrk", "--latency", "--threads", "1", "--connections", str(connections), "--duration", f"{seconds}s"]
    argv += ["--timeout", "30s", "--header", f"Accept: {MANIFEST_TYPE}", served.url + path]
    done = subprocess.run(
        argv, env=environment(ground.directory), capture_output=True, text=True, check=True, timeout=SECONDS
    )
    rate = re.search(r"Requests/sec:\s*([\d.]+)", done.stdout)
    bad = re.search(r"Non-2xx.*|Socket errors.*", done.stdout)
    if rate is None or bad is not None:
        raise ClientError(f"{served.peer}: wrk on {path}: {bad[0] if bad else done.stdout}")
    count = re.search(r"(\d+) requests in", done.stdout)
    return Rate(float(rate[1]), int(count[1]) if count else 0, _latency(done.stdout, 50), _latency(done.stdout, 99))


def _latency(output: str, percent: int) -> float:
    found = re.search(rf"{percent}%\s+([\d.]+)(us|ms|s)\b", output)
    return float(found[1]) * _UNITS[found[2]] if found else float("nan")


def pull(ground: Ground, url: str, *, clients: int = 1, token: str | None = None) -> float:
    """
    Have clients pull the image all at once, and return the seconds until the last was done.

    One client hashes, as Docker does; of many, the processor could do nothing but hash: they compare.
    """
    argv = [sys.executable, "-m", "bench.pulling", "--url", url, "--shelf", ground.shelf.to_json()]
    argv += ["--clients", str(clients), *(["--compare"] if clients > 1 else [])]
    if token is not None:
        argv += ["--token", token]
    done = subprocess.run(
        argv,
        env=environment(ground.directory),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    if done.returncode:
        raise ClientError(f"{url}: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout)["seconds"])


def fetch_together(served: Served, path: str, size: int, clients: int, times: int) -> float:
    """
    Have each of so many clients fetch C{path} so many times on a plain connection of its own; return the seconds.

    The kernel discards the bytes, so they cost the clients nothing.
    """
    request, scratch = f"GET {path} HTTP/1.1\r\nHost: {LOCAL}\r\n\r\n".encode(), bytearray(size + 2**14)
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        missing = dict.fromkeys(range(clients), 0)
        opened = [stack.enter_context(socket.create_connection((LOCAL, served.port), timeout=30)) for _ in missing]
        left, began = dict.fromkeys(missing, times), time.monotonic()
        for number, each in enumerate(opened):
            each.sendall(request)
            selector.register(each, selectors.EVENT_READ, number)
        while left:
            for key, _ in selector.select(SECONDS):
                number, connection = key.data, opened[key.data]
                if missing[number]:
                    missing[number] -= connection.recv_into(scratch, missing[number], socket.MSG_TRUNC)
                else:
                    head = connection.recv(2**14, socket.MSG_PEEK).partition(b"\r\n\r\n")[0]
                    missing[number] = size + len(head) + 4
                    if not head.startswith(b"HTTP/1.1 200"):
                        raise ClientError(f"{served.peer}: got {head!r}")
                if not missing[number]:
                    left[number] -= 1
                    if left[number]:
                        connection.sendall(request)
                    else:
                        selector.unregister(connection)
                        del left[number]
        return time.monotonic() - began


def fetch_all_at_once(served: Served, path: str, size: int, clients: int) -> int:
    """
    Have each of so many clients fetch C{path} once on a plain connection of its own; return how many failed.
    """
    request, scratch = f"GET {path} HTTP/1.1\r\nHost: {LOCAL}\r\n\r\n".encode(), bytearray(size + 2**14)
    failed, missing = 0, dict[socket.socket, int]()
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        opened = [
            stack.enter_context(socket.create_connection((LOCAL, served.port), timeout=30)) for _ in range(clients)
        ]
        for each in opened:
            each.sendall(request)
            selector.register(each, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(SECONDS)
            if not ready:
                return failed + len(selector.get_map())
            for key, _ in ready:
                connection: Any = key.fileobj
                missing[connection] = left = _left(connection, missing.get(connection), size, scratch)
                if left <= 0:
                    selector.unregister(connection)
                    failed += left < 0
    return failed


def _left(connection: socket.socket, missing: int | None, size: int, scratch: bytearray) -> int:
    """
    Read some of a response; return how many bytes are missing, or -1 if it is wrong.

    @param missing: the result of the last call.
    """
    try:
        if missing is not None:
            received = connection.recv_into(scratch, missing, socket.MSG_TRUNC)
            return missing - received if received else -1
        head = connection.recv(2**14, socket.MSG_PEEK).partition(b"\r\n\r\n")[0]
    except OSError:
        return -1
    return size + len(head) + 4 if head.startswith(b"HTTP/1.1 200") else -1


def hashing_seconds(ground: Ground, path: Path) -> float:
    """
    Return the CPU time for hashing a file. Debian's C{sha256sum} does not use the processor's own SHA-256.
    """
    before = os.times()
    argv = ["openssl", "dgst", "-sha256", str(path)]
    subprocess.run(argv, env=environment(ground.directory), stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def ask(served: Served, path: str, seconds: float, *, reconnecting: bool, connections: int = 16) -> int:
    """
    Request C{path}, which has less than 16 KiB, on so many plain connections; return the number of answers.

    @param reconnecting: whether each request has its own connection, which this side closes once it has the answer, as
        programs without keep-alive do. They don't announce that.
    """
    request = f"GET {path} HTTP/1.1\r\nHost: {LOCAL}\r\nAccept: {MANIFEST_TYPE}\r\n\r\n".encode()
    deadline, count, opened = time.monotonic() + seconds, 0, list[socket.socket]()
    while time.monotonic() < deadline:
        if reconnecting or count % (_ON_ONE * connections) == 0:
            for each in opened:
                each.close()
            opened = [socket.create_connection((LOCAL, served.port), timeout=30) for _ in range(connections)]
        for each in opened:
            each.sendall(request)
        for each in opened:
            _take(served, each)
            count += 1
    for each in opened:
        each.close()
    return count


def _take(served: Served, connection: socket.socket) -> None:
    data = b""
    while len(data) < _length(data):
        received = connection.recv(2**14)
        if not received:
            break
        data += received
    if not data.startswith(b"HTTP/1.1 200") or len(data) != _length(data):
        raise ClientError(f"{served.peer}: got {data[:100]!r}")


def _length(data: bytes) -> int:
    """
    Return the length of a response that begins with C{data}; a larger number while it is unknown.
    """
    head, end, _ = data.partition(b"\r\n\r\n")
    length = re.search(rb"\r\nContent-Length: (\d+)", head, re.IGNORECASE)
    return len(head) + len(end) + int(length[1]) if end and length else len(data) + 1


@contextlib.contextmanager
def idle(ground: Ground, served: Served, count: int) -> Iterator[None]:
    """
    Hold so many connections that have sent one request.
    """
    context = ground.certificate.context()
    request = f"GET {served.health} HTTP/1.1\r\nHost: {LOCAL}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(_connected(served, context, request))
        yield


def _connected(served: Served, context: ssl.SSLContext, request: bytes) -> socket.socket:
    connection = socket.create_connection((LOCAL, served.port), timeout=30)
    if served.secure:
        connection = context.wrap_socket(connection, server_hostname=LOCAL)
    connection.sendall(request)
    if not connection.recv(4096).startswith(b"HTTP/1.1 "):
        raise ClientError(f"{served.peer} does not answer {served.health}")
    return connection


def blob(digest: str) -> str:
    """
    Return a blob's path.
    """
    return f"/v2/{REPOSITORY}/blobs/{digest}"


def manifest(reference: str) -> str:
    """
    Return a manifest's path.
    """
    return f"/v2/{REPOSITORY}/manifests/{reference}"
