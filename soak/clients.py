"""
Clients of every kind, which know the right answers.

A complete answer must be right: nothing more is required of it, for upstream fails all the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from soak.goods import WRONG, Goods
from tests.registry_content import SCHEMA2

PIECE: Final = 2**16
PATIENCE: Final = 300.0
"""
Seconds without a byte after which a client calls its answer stuck.

Upstream may be silent for half a minute when it is asked where a blob lies, and again when it is asked for bytes;
and what breaks off is asked for three times.
"""
OUTSIDE: Final = ("/v2/other/app/manifests/v0", "/v2/team/app0/../app1/manifests/v0", "/v2/other%2fapp0/manifests/v0")
_HEAD: Final = b" /v2/ HTTP/1.1\r\nHost: x\r\n"
BAD: Final = (
    b"nonsense\r\n\r\n",
    b"GET" + _HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET" + _HEAD + b"Content-Length: 5\r\n\r\nGET /",
    b"POST" + _HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"GET" + _HEAD + b"Host: y\r\n\r\n",
    b"GET" + _HEAD + b"A: b\r\n c\r\n\r\n",
    b"GET /v2/ HTTP/1.1\nHost: x\n\n\r\n\r\n",
    b"GET /v2/\0 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PATCH" + _HEAD + b"Content-Length: 999999999\r\n\r\nxxxx",
    b"GET /" + b"a" * 100_000,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
)


def is_mixed(body: bytes, right: bytes, wrong: bytes) -> bool:
    """
    Return True if a part has bytes of the blob and of what the bucket sent in its place, each at its offset.

    The daemon does not verify parts: their clients do.
    """
    if len(body) != len(right):
        return False
    return body in (right, wrong) or all(map(lambda got, *may: got in may, body, right, wrong))


class BrokenError(Exception):
    """
    Raised if the answer ended before it was complete.
    """


@dataclass
class Tally:
    """
    The results of all requests.

    @ivar wrong: violated invariants.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    bytes: int = 0

    def violate(self, what: str) -> None:
        self.wrong.append(what)


class Connection:
    """
    One connection, and the answers on it.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer

    async def ask(self, method: str, path: str, *lines: str) -> tuple[int, dict[str, str]]:
        """
        Send a request, and read the head of its answer.
        """
        head = "\r\n".join([f"{method} {path} HTTP/1.1", "Host: proxy.example", f"Accept: {SCHEMA2}", *lines, "", ""])
        self.writer.write(head.encode())
        return await self.head()

    async def head(self) -> tuple[int, dict[str, str]]:
        head = await patiently(self._reader.readuntil(b"\r\n\r\n"))
        status, *lines = head.decode("latin-1").rstrip().split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines)
        return int(status.split()[1]), {name.lower(): value for name, value in fields.items()}

    async def body(self, length: int, pause: float = 0, leave_after: int | None = None) -> bytes:
        """
        Read so many bytes, slowly.

        @raise BrokenError: if they don't come, or the client disconnects before.
        """
        data = bytearray()
        while len(data) < length:
            piece = await patiently(self._reader.read(min(PIECE, length - len(data))))
            data += piece
            if not piece or (leave_after is not None and len(data) >= leave_after):
                raise BrokenError
            if pause:
                await asyncio.sleep(pause)
        return bytes(data)

    async def rest(self) -> bytes:
        return await patiently(self._reader.read(PIECE))


async def patiently(reading: Awaitable[bytes]) -> bytes:
    async with asyncio.timeout(PATIENCE):  # wait_for() of Python 3.11 may lose a cancellation
        return await reading


class Crowd:
    """
    Any number of clients, until they are told to stop.
    """

    def __init__(self, port: int, goods: Goods, tally: Tally) -> None:
        self._port, self._goods, self._tally = port, goods, tally
        self._blobs = goods.blobs

    async def run(self, clients: int, seed: str) -> None:
        """
        Keep clients busy until cancelled; each does one thing after the other.
        """
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self.client(random.Random(f"{seed}-{number}")))

    async def client(self, chance: random.Random) -> None:
        habits = [self.pull, self.pull, self.small, self.small, self.slow, self.leave, self.span, self.head]
        habits += [self.tag, self.tag, self.several, self.list_tags, self.outside, self.nonsense]
        while True:
            habit = chance.choice(habits)
            await self.once(habit.__name__, habit, chance)
            await asyncio.sleep(chance.uniform(0, 0.05))

    async def once(
        self, name: str, habit: Callable[[Connection, random.Random], Awaitable[str]], chance: random.Random
    ) -> None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=PIECE)
        except OSError:
            self._tally.counts["no connection"] += 1
            await asyncio.sleep(0.05)
            return
        try:
            outcome = await habit(Connection(reader, writer), chance)
        except TimeoutError:  # which is an OSError, too
            outcome = "stuck"
            self._tally.violate(f"{name}: no byte for {PATIENCE:.0f} s")
        except (OSError, asyncio.IncompleteReadError, BrokenError):
            outcome = "broken off"
        finally:
            writer.transport.abort()
        self._tally.counts[f"{name}: {outcome}"] += 1

    def some(self, chance: random.Random) -> tuple[str, bytes]:
        """
        Choose a blob; a third of them is large.
        """
        return chance.choice(list((self._goods.large if chance.random() < 0.33 else self._goods.small).items()))

    async def get(
        self, there: Connection, path: str, data: bytes, *lines: str, pause: float = 0, leave_after: int | None = None
    ) -> str:
        """
        Send a request, and compare the answer with the right one.
        """
        status, fields = await there.ask("GET", path, *lines)
        length = int(fields["content-length"])
        body = await there.body(length, pause, leave_after)
        if status not in (200, 206):
            if status < 400 or status in (401, 403, 404):
                self._tally.violate(f"{status} for {path}: {body[:200]!r}")
            return str(status)
        self._tally.bytes += length
        if status == 206:
            first, last, size = re.findall("[0-9]+", fields["content-range"])
            start, stop = int(first), int(last) + 1
            partial = (start, stop) != (0, int(size))
            if partial and (int(size) != len(data) or is_mixed(body, data[start:stop], WRONG[start:stop])):
                return "part"
            data = data[start:stop]
        if body != data:
            self._tally.violate(f"wrong bytes of {path} {lines}: {len(body)} of {len(data)}")
        return "whole"

    async def pull(self, there: Connection, chance: random.Random) -> str:
        return await self.get(there, *self.some(chance))

    async def small(self, there: Connection, chance: random.Random) -> str:
        return await self.get(there, *chance.choice(list(self._goods.small.items())))

    async def slow(self, there: Connection, chance: random.Random) -> str:
        return await self.get(there, *self.some(chance), pause=0.01)

    async def leave(self, there: Connection, chance: random.Random) -> str:
        path, data = self.some(chance)
        return await self.get(there, path, data, leave_after=chance.randint(0, len(data)))

    async def span(self, there: Connection, chance: random.Random) -> str:
        path, data = self.some(chance)
        first = chance.randrange(max(1, len(data)))
        last = chance.choice(("", str(chance.randint(first, first + 2**20))))
        return await self.get(there, path, data, f"Range: bytes={first}-{last}")

    async def head(self, there: Connection, chance: random.Random) -> str:
        path, data = self.some(chance)
        status, fields = await there.ask("HEAD", path)
        if status != 200:
            return str(status)
        if int(fields["content-length"]) == len(data):
            return "whole"
        if fields["x-cache-status"] != "MISS":  # for uncached content, only a bucket that lies gives the size
            self._tally.violate(f"HEAD of {path} has the size {fields['content-length']}, not {len(data)}")
        return "as upstream says"

    async def tag(self, there: Connection, chance: random.Random) -> str:
        return await self.get(there, *chance.choice(list((self._goods.tags | self._goods.manifests).items())))

    async def several(self, there: Connection, chance: random.Random) -> str:
        """
        Send several requests on one connection, pipelined.
        """
        outcome = ""
        for _ in range(chance.randint(2, 5)):
            outcome = await self.get(there, *chance.choice(list(self._goods.small.items())))
        return outcome

    async def list_tags(self, there: Connection, chance: random.Random) -> str:
        repository = chance.choice(list(self._goods.tags)).removeprefix("/v2/").partition("/manifests")[0]
        status, fields = await there.ask("GET", f"/v2/{repository}/tags/list")
        await there.body(int(fields["content-length"]))
        return "whole" if status == 200 else str(status)

    async def outside(self, there: Connection, chance: random.Random) -> str:
        path = chance.choice(OUTSIDE)
        status, _ = await there.ask("GET", path)
        if not 400 <= status < 500 and status != 503:
            self._tally.violate(f"{status} for {path}")
        return str(status)

    async def nonsense(self, there: Connection, chance: random.Random) -> str:
        """
        Send garbage: it is rejected once, and what follows it is not answered.
        """
        there.writer.write(chance.choice(BAD) + b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
        got = b""
        with contextlib.suppress(OSError):
            while piece := await there.rest():
                got += piece
        if got.count(b"HTTP/1.1 ") > 1 or b" 200 OK" in got:
            self._tally.violate(f"nonsense was answered with {got[:100]!r}")
        return got[9:12].decode() or "closed"
