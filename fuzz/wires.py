"""
The whole daemon in memory, with any bytes at all on one of its two sides.

Invariants: nothing is logged as an error of ours, nothing outside the pattern is requested, every answer is
well formed, and no complete answer has bytes that don't match its digest.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final, Self

from twisted.internet.task import Clock
from twisted.logger import LogLevel, formatEvent, globalLogPublisher

from tests.daemon import START, Daemon, Raw
from tests.registry import StandIn

PATIENCE: Final = 70
"""Seconds after which the daemon has given up whoever said nothing."""
PATTERN: Final = "team/.*"
BLOB: Final = b"a blob of a few bytes"
ASKED: Final = re.compile(
    r"/v2/team(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)+/(?:manifests|blobs|tags|referrers)/[\w.:+=-]+", re.ASCII
)
"""What may be asked of the registry: no path that somebody could read as another one."""
HEAD: Final = re.compile(rb"HTTP/1\.[01] (\d{3}) [A-Za-z -]+\r\n((?:[A-Za-z-]+: [^\r\n]*\r\n)*)\r\n")


class Scene:
    """
    A daemon with an empty cache, its stand-in, and what it logs.

    @param clients: whether the input comes from clients. That causes no error of ours; input from upstream may.
    """

    def __init__(self, *, clients: bool = False) -> None:
        self.clients = clients
        self.clock = Clock()
        self.clock.advance(START)
        self.standin = StandIn(self.clock)
        self.standin.push_image("team/app", "latest")
        self.standin.push_image("other/app", "latest")
        self.blob = self.standin.push_blob("team/app", BLOB)
        self.root = Path(tempfile.mkdtemp(prefix="ecrproxy-fuzz-"))
        self.loud: list[str] = []
        self.daemon = Daemon(self.standin, self.clock, self.root, pattern=PATTERN)
        self.daemon.flush()

    def note(self, event: Any) -> None:
        if "log_failure" in event or (self.clients and event["log_level"] >= LogLevel.error):
            failure = event.get("log_failure")
            self.loud.append(f"{formatEvent(event)} {failure.getTraceback() if failure else ''}")

    def __enter__(self) -> Self:
        globalLogPublisher.addObserver(self.note)  # type: ignore[arg-type]
        self.standin.heal()
        self.standin.forget_asked()
        return self

    def __exit__(self, *_: object) -> None:
        globalLogPublisher.removeObserver(self.note)  # type: ignore[arg-type]
        loud, self.loud = self.loud, []
        assert not loud, loud
        for asked in self.standin.asked if self.clients else ():  # upstream itself may redirect to anywhere of its own
            assert asked.service != "registry" or ASKED.fullmatch(asked.target.partition("?")[0]), asked.target

    def pass_time(self, seconds: float) -> None:
        for _ in range(int(seconds / 10)):
            self.clock.advance(10)
            self.daemon.flush()

    def close(self) -> None:
        """
        Check the invariants, and clean up.
        """
        for path in self.root.rglob("content/*/*/*"):
            assert is_right(path), path
        shutil.rmtree(self.root)


def is_right(path: Path) -> bool:
    return hashlib.new(path.parent.parent.name, path.read_bytes()).hexdigest() == path.name


@functools.cache
def scene_of_all() -> Scene:
    """
    One daemon for all inputs: their effects on each other are tested, too.
    """
    return Scene(clients=True)


def ask(data: bytes) -> None:
    """
    Bytes of a client; a byte of 0xff ends a piece that arrives by itself.
    """
    with scene_of_all() as scene:
        client = Raw()
        wire = scene.daemon.front.connect(client, "proxy.example", 80, secure=False)
        for piece in data.split(b"\xff"):
            wire.write(piece)
            scene.daemon.flush()
        scene.pass_time(PATIENCE)  # an unfinished head times out
        hold_answers(bytes(client.got), data)
        wire.abortConnection()
        scene.daemon.flush()


def hold_answers(got: bytes, data: bytes) -> None:
    """
    Check that the output consists of answers, the last of them perhaps cut off.
    """
    at, methods = 0, re.findall(rb"(?:^|\n)(GET|HEAD|[A-Z]+) ", data.replace(b"\xff", b""))
    bodiless = b"HEAD" in methods
    while at < len(got):
        if got.startswith(b"HTTP/1.1 100 Continue\r\n\r\n", at):
            at += 25
            continue
        head = HEAD.match(got, at)
        assert head is not None, got[at : at + 200]
        fields = {name.lower(): value for name, _, value in (line.partition(b": ") for line in head[2].split(b"\r\n"))}
        length = int(fields.get(b"content-length", b"0"))
        assert b"transfer-encoding" not in fields, fields
        at = head.end()
        if not (bodiless and got.startswith(b"HTTP/1.", at)) and head[1] != b"304":
            at += length


def answer(data: bytes) -> None:
    """
    Bytes of upstream: the first byte chooses the request and its host, the rest is the answer.
    """
    if not data:
        return
    scene = Scene()
    with scene:
        kinds = (
            f"blobs/{scene.blob}",
            f"blobs/{scene.blob}",
            "manifests/latest",
            "tags/list",
            f"referrers/{scene.blob}",
        )
        kind = kinds[(data[0] & 7) % len(kinds)]
        method = "HEAD" if data[0] & 8 else "GET"
        scene.standin.hang("bucket" if data[0] & 7 == 1 else "registry", times=1)
        reply = scene.daemon.send(method, f"/v2/team/app/{kind}")
        scene.daemon.flush()
        _, server = scene.daemon.back.ends[-1]
        server.write(data[1:])
        server.loseConnection()
        scene.pass_time(100)
        assert reply.ended, "a client still waits"
        if method == "GET" and reply.ended == "whole" and reply.code == 200 and kind.startswith("blobs"):
            assert bytes(reply.body) == BLOB, bytes(reply.body)
    scene.close()
