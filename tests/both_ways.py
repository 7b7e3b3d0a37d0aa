"""
Run the same story against two daemons, one with the hot path and one without: all observable behaviour must be the
same.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final

from twisted.internet.task import Clock

from ecrproxy.access.browsers import Pages
from ecrproxy.access.clients import Admission
from ecrproxy.access.limits import Limits
from ecrproxy.access.namespaces import Namespaces
from ecrproxy.access.passwords import FAILURES, Passwords
from ecrproxy.cache.index import Index
from ecrproxy.cache.inventory import Inventory
from ecrproxy.http.access_log import AccessLine
from ecrproxy.oci import Digest
from ecrproxy.request_id import numbered
from ecrproxy.settings.values import parse_pattern
from tests.daemon import CLIENT, START, Daemon, End, Raw, at_once, noise
from tests.registry import StandIn
from tests.test_htpasswd import line
from tests.test_passwords import basic

TTL: Final = 30
"""Seconds for which a tag is served without asking ECR."""
USER, PASSWORD, OTHER = "ann", "client canary", "another canary"
CONNECTIONS: Final = 4
_IN_STORIES: Final = (0, 1, CONNECTIONS - 1)
"""Connections used by stories: as many as one byte encodes."""
FILE_BYTES: Final = 100_000
"""Size of a blob that is sent from its file."""
LIMIT: Final = 200_000
"""The cache's limit in bytes: room for one such blob, and all small content."""
ELSEWHERE: Final = "198.51.100.7"
"""An address that is denied access."""
_DATE = re.compile(rb"Date: [^\r]*")
_LAST = re.compile(rb"(HTTP/1\.1 [^\r]*\r\n)((?:[^\r]+\r\n)*?)(Connection: close\r\n)")
"""The last response of its connection: its header comes first if shutdown had begun before the request."""


class Scene:
    """
    A daemon that requires a password, its stand-in, keep-alive clients, and everything observable about them.

    @cvar shown: the header with the right password.
    """

    shown = f"Authorization: {basic(USER, PASSWORD)}\r\n"

    def __init__(self, *, hot_path: bool, tag_ttl: int = TTL, read_ahead: bool = False) -> None:
        self.clock = Clock()
        self.clock.advance(START)
        self.standin = StandIn(self.clock)
        self.manifest = self.standin.push_image("team/app", "latest").digest
        self.other = self.standin.push_image("team/other", "latest").digest
        self.blob = self.standin.push_blob("team/app", b"a blob of a few bytes")
        self.file = self.standin.push_blob("team/app", noise("a blob that is held in no memory", FILE_BYTES))
        self.late = self.standin.push_blob("team/app", noise("one that makes another go", FILE_BYTES))
        self.root = Path(tempfile.mkdtemp(prefix="ecrproxy-ways-"))
        self.passwords = Path(tempfile.mkdtemp(prefix="ecrproxy-ways-"), "htpasswd")
        self.passwords.write_bytes(line(USER, PASSWORD))
        self.lines: list[AccessLine] = []
        self.open = self.flushing = True
        now = self.clock.seconds
        self.index = Index(self.root, now, memory=True)
        here = [ip_network(CLIENT)]
        admission = Admission(here, passwords=Passwords(str(self.passwords), at_once, self.clock, b"key"))
        self.daemon = Daemon(
            self.standin,
            self.clock,
            self.root,
            tag_ttl=tag_ttl,
            read_ahead=read_ahead,
            index=self.index,
            admission=admission,
            limits=Limits(transfers=1),
            limit=LIMIT,
            pages=Pages(),
            hot_path=hot_path,
        )
        self.admission = admission
        self.daemon.access_log.write = self.lines.append  # type: ignore[method-assign, assignment]
        self.daemon.site.new_id = numbered("id")
        self.daemon.flush()
        self.clients: list[tuple[Raw, End]] = [self._connected(number) for number in range(CONNECTIONS)]

    def _connected(self, number: int) -> tuple[Raw, End]:
        """
        Connect a client; one of the clients uses TLS.
        """
        client = Raw()
        return client, self.daemon.front.connect(client, "proxy.example", 80, secure=number == CONNECTIONS - 1)

    @property
    def answered(self) -> int:
        """
        Return how many requests the hot path has answered.
        """
        return self.daemon.hot_path.answered if self.daemon.hot_path is not None else 0

    def send(self, number: int, data: bytes) -> None:
        """
        Write to a connection; if it is closed, open another in its place. A byte of 0xff ends a piece.
        """
        at = number % CONNECTIONS
        if self.clients[at][0].closed:
            self.clients.append(self.clients[at])
            self.clients[at] = self._connected(at)
        for piece in data.split(b"\xff"):
            self.clients[at][1].write(piece)
            if self.flushing:
                self.daemon.flush()

    def wait(self, seconds: float) -> None:
        """
        Advance the clock.
        """
        self.clock.advance(seconds)
        self.daemon.flush()

    def gather(self) -> None:
        """
        Delay what is sent and deliver it together; or deliver each piece at once again.
        """
        self.flushing = not self.flushing
        self.daemon.flush()

    def leave(self) -> None:
        """
        Disconnect a client, whatever it waits for.
        """
        self.clients[0][1].abortConnection()
        if self.flushing:
            self.daemon.flush()

    def move(self) -> None:
        """
        Disconnect a client; new connections come from another address, or from one that may authenticate again.
        """
        self.daemon.front.client = ELSEWHERE if self.daemon.front.client == CLIENT else CLIENT
        self.leave()

    def guess(self, connection: int = 0) -> None:
        """
        Have a client send one wrong password more than are allowed.
        """
        for number in range(FAILURES + 1):
            shown = f"Authorization: {basic(USER, f'guess {number}')}"
            self.send(connection, f"GET /v2/ HTTP/1.1\r\nHost: proxy.example\r\n{shown}\r\n\r\n".encode())

    def move_tag(self) -> None:
        """
        Point the tag at another image.
        """
        self.standin.push_image("team/app", "latest", layers=[bytes([len(self.lines) % 256])])

    def purge(self, digest: Digest) -> None:
        Inventory(self.daemon.store).remove([], [digest])
        self.look()

    def forget(self) -> None:
        """
        Purge everything known about repositories.
        """
        Inventory(self.daemon.store).remove([key for key, _, _ in self.index.entries()], [])
        self.look()

    def lose(self) -> None:
        """
        Remove the file of a blob, as if somebody had deleted it.
        """
        self.of_file().unlink(missing_ok=True)

    def replace(self) -> None:
        """
        Replace the file of a blob by another one with the same bytes.
        """
        if self.of_file().exists():
            copy = self.root / "copy"
            copy.write_bytes(self.of_file().read_bytes())
            copy.rename(self.of_file())

    def spoil(self) -> None:
        """
        Overwrite bytes in the file of a blob.
        """
        if self.of_file().exists():
            self.of_file().write_bytes(bytes(FILE_BYTES))

    def condemn(self) -> None:
        """
        Have the operator verify the blob; its content is compared as it is.
        """
        for _ in Inventory(self.daemon.store).verify(Digest.parse(self.file), keep=False):
            pass

    def cut(self) -> None:
        """
        Truncate the file of a blob.
        """
        if self.of_file().exists():
            os.truncate(self.of_file(), FILE_BYTES // 2)

    def evict(self) -> None:
        """
        Evict a blob to free space.
        """
        self.daemon.store.evict_unused([Digest.parse(self.file)])

    def of_file(self) -> Path:
        return self.root / self.daemon.store.content_path(Digest.parse(self.file))

    def stop_reading(self) -> None:
        """
        Pause or resume a client's reading.
        """
        end = self.clients[0][1]
        end.reading = not end.reading and not end.disconnecting
        if self.flushing:
            self.daemon.flush()

    def look(self) -> None:
        """
        Have the daemon check for purges.
        """
        self.daemon.flush()
        self.clock.advance(1)
        self.daemon.flush()

    def change_password(self) -> None:
        """
        Change the valid password.
        """
        right = PASSWORD if self.passwords.read_bytes().endswith(b"\n\n") else OTHER
        self.passwords.write_bytes(line(USER, right) + (b"\n" if right == PASSWORD else b"\n\n"))
        self.admission.reread()
        self.daemon.flush()

    def reload(self) -> None:
        """
        Reload the registries, with another pattern of names.
        """
        self.open = not self.open
        pattern = parse_pattern(".*" if self.open else "team/other")
        self.daemon.namespaces = Namespaces(pattern, at_once, self.clock)
        self.daemon.reload({})

    def drain(self) -> None:
        """
        Start draining.
        """
        self.daemon.site.connections.drain()
        self.daemon.flush()

    def fill(self) -> None:
        """
        Use up all transfer slots, or free them.
        """
        if not self.daemon.crowd.begin_transfer():
            self.daemon.crowd.end_transfer()

    def seen(self) -> list[Any]:
        """
        Return everything observable, except for the dates in answers and the position of C{Connection} among their
        headers.
        """
        crowd = self.daemon.crowd
        return [
            *(_LAST.sub(rb"\1\3\2", _DATE.sub(b"Date: ", bytes(client.got))) for client, _ in self.clients),
            [client.closed for client, _ in self.clients],
            sorted(self.lines, key=lambda each: (each.ended, each.request)),  # sent together, they arrive in any order
            [each for each in self.daemon.figures.served.requests.rows() if each],
            self.daemon.figures.served.saved.top(10),
            [(asked.method, asked.path) for asked in self.standin.asked],
            (crowd.connected, crowd.transferring, crowd.bad_requests, crowd.refused_transfers, len(crowd.idle_ones)),
        ]

    def close(self) -> None:
        self.index.close()
        shutil.rmtree(self.root)
        shutil.rmtree(self.passwords.parent)


def heads(scene: Scene) -> list[bytes]:
    """
    Build the request heads that clients send: each requests something cacheable, in a different form.
    """
    shown = scene.shown
    accept = "Accept: application/vnd.oci.image.manifest.v1+json\r\n"
    by_digest, by_tag = f"/v2/team/app/manifests/{scene.manifest}", "/v2/team/app/manifests/latest"
    blob, file, late = (f"/v2/team/app/blobs/{each}" for each in (scene.blob, scene.file, scene.late))
    etag = f'If-None-Match: "{scene.manifest}"\r\n'
    asked: Sequence[tuple[str, str, str]] = (
        ("GET", by_digest, shown),
        ("GET", by_digest, shown + accept),
        ("HEAD", by_digest, shown),
        ("GET", by_digest, shown + etag),
        ("GET", by_tag, shown + accept),
        ("HEAD", by_tag, shown + accept),
        ("GET", by_tag, shown + etag),
        ("GET", blob, shown),
        ("HEAD", blob, shown),
        ("GET", blob, shown + "Range: bytes=0-3\r\n"),
        ("GET", blob, shown + "Range: bytes=0-\r\n"),
        ("GET", f"/v2/team/other/manifests/{scene.other}", shown),
        ("GET", f"/v2/team/other/manifests/{scene.manifest}", shown),
        ("GET", by_digest, ""),
        ("GET", by_digest, f"Authorization: {basic(USER, OTHER)}\r\n"),
        ("GET", by_digest, f"Authorization: {basic(USER, 'guess')}\r\n"),
        ("GET", by_digest, shown * 2),
        ("GET", by_digest, shown + "X-Request-Id: mine\r\n"),
        ("GET", by_digest, shown + "Connection: close\r\n"),
        ("GET", by_digest, shown + "Accept-Language: en\r\nOrigin: http://evil.example\r\n"),
        ("GET", by_digest, shown + "Expect: 100-continue\r\n"),
        ("GET", by_digest, shown + "Content-Length: 0\r\n"),
        ("GET", f"{by_digest}?ns=123456789012.dkr.ecr.eu-west-1.amazonaws.com", shown),
        ("GET", f"http://proxy.example{by_digest}", shown),
        ("GET", "/v2/", shown),
        ("GET", "/healthz", ""),
        ("POST", by_digest, shown),
        ("GET", file, shown),
        ("HEAD", file, shown),
        ("GET", file, shown + f'If-None-Match: "{scene.file}"\r\n'),
        ("GET", file, shown + "Range: bytes=0-3\r\n"),
        ("GET", file, shown + "Range: bytes=0-\r\n"),
        ("GET", file, shown + "Range: bytes=1-2,5-6\r\n"),
        ("GET", file, shown + f'Range: bytes=0-3\r\nIf-Range: "{scene.blob}"\r\n'),
        ("GET", file, f"Authorization: {basic(USER, OTHER)}\r\n"),
        ("GET", file.replace("app", "other"), shown),
        ("GET", late, shown),
    )
    made = [f"{method} {path} HTTP/1.1\r\nHost: proxy.example\r\n{rest}\r\n".encode() for method, path, rest in asked]
    made.append(made[0][:-2] + b"Transfer-Encoding: chunked\r\n\r\n\xff0\r\n\r\n")
    one = made[0]
    odd = [one.replace(b"HTTP/1.1", b"HTTP/1.0"), one * 2, one + b"GET", b"\r\n", one[:30] + b"\xff" + one[30:]]
    return made + odd


def deeds(scene: Scene) -> list[Callable[[], object]]:
    """
    List what else may happen between requests.
    """
    return [
        lambda: scene.wait(1),
        lambda: scene.wait(TTL),
        lambda: scene.wait(400),
        scene.move_tag,
        lambda: scene.standin.repositories["team/app"].tags.pop("latest", None),
        lambda: scene.purge(Digest.parse(scene.manifest)),
        lambda: scene.purge(Digest.parse(scene.blob)),
        scene.forget,
        scene.change_password,
        scene.reload,
        scene.drain,
        scene.fill,
        scene.gather,
        scene.leave,
        lambda: scene.standin.fail("registry"),
        lambda: scene.standin.hang("registry"),
        scene.standin.heal,
        scene.move,
        scene.guess,
        scene.lose,
        scene.replace,
        scene.spoil,
        scene.condemn,
        scene.cut,
        scene.evict,
        scene.stop_reading,
        lambda: scene.purge(Digest.parse(scene.file)),
    ]


def step_of(what: int, which: int = 0) -> int:
    """
    Return the byte of a story that stands for a request or a deed; both share one numbering.

    @param which: the connection.
    """
    return len(_IN_STORIES) * what + which


def tell(scene: Scene, story: bytes) -> None:
    """
    Run a story: each byte is a request on a connection, a deed, or the beginning of a request with one byte changed; in
    the last case the request, the position and the new byte follow.
    """
    requests, others = heads(scene), deeds(scene)
    steps = iter(story)
    for step in steps:
        what, which = divmod(step, len(_IN_STORIES))
        connection = _IN_STORIES[which]
        if what < len(requests):
            scene.send(connection, requests[what])
        elif what < len(requests) + len(others):
            others[what - len(requests)]()
        else:
            request = requests[next(steps, 0) % len(requests)]
            at = next(steps, 0) % len(request)
            scene.send(connection, request[:at] + bytes([next(steps, 0)]) + request[at + 1 :])


def compare(story: bytes) -> int:
    """
    Run a story against both daemons and assert that there is no difference. Stories of odd length set a TTL for tags;
    half of these read ahead what manifests list.

    @return: how many requests the hot path has answered.
    """
    ttl, ahead = TTL * (len(story) % 2), bool(len(story) // 2 % 2)
    hot, long = (Scene(hot_path=each, tag_ttl=ttl, read_ahead=ahead) for each in (True, False))
    try:
        tell(hot, story)
        tell(long, story)
        for one, other in zip(hot.seen(), long.seen(), strict=True):
            assert one == other, (list(story), one, other)
        return hot.answered
    finally:
        hot.close()
        long.close()
