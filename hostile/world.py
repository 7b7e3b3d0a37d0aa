"""
A daemon in a process of its own, and around it, in this one, everything that it depends on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from twisted.web.pages import notFound

from hostile.names import NameServer
from soak.clients import BrokenError, Connection
from soak.daemon import Daemon, Size
from tests.e2e.processes import children
from tests.registry import StandIn
from tests.registry_server import LOCAL, QuietSite, listen, noise

LIMIT: Final = 256 * 2**20
SMALL_BYTES: Final = 60_000
LARGE_BYTES: Final = 16 * 2**20
WARMING: Final = 40
"""How often each thing is asked for first: enough that every worker has answered, and so has it in memory."""
DISK: Final = Path(__file__).parent / "disk"


@dataclass(frozen=True)
class Got:
    """
    The result of one request.

    @ivar status: 0 if there was no complete answer.
    @ivar seconds: until its end.
    """

    status: int
    seconds: float
    fields: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def __str__(self) -> str:
        cache = self.fields.get("x-cache-status", "")
        return f"{self.status or 'none'} {cache} {self.seconds:.1f}s".replace("  ", " ")


class CountingSite(QuietSite):
    """
    A site whose connections can be closed, so that names must be resolved again.
    """

    def __init__(self, resource: Any) -> None:
        super().__init__(resource)
        self._channels: list[Any] = []

    def buildProtocol(self, addr: Any) -> Any:
        channel: Any = super().buildProtocol(addr)
        self._channels.append(channel._channel)  # noqa: SLF001 (what it wraps has the transport)
        return channel

    def hang_up(self) -> None:
        channels, self._channels = self._channels, []
        for each in channels:
            if each.transport is not None and each.transport.connected:
                each.transport.abortConnection()


class World:
    """
    One daemon and its surroundings.

    @param settings: variables besides the usual ones.
    """

    def __init__(self, reactor: Any, twistd: str, home: Path, **settings: str) -> None:
        home.mkdir()
        self.sites = [CountingSite(notFound()), CountingSite(notFound())]
        registry, bucket = (
            f"http://{name}.hostile.test:{listen(reactor, 0, site)}"
            for name, site in zip(("registry", "bucket"), self.sites, strict=True)
        )
        self.standin = StandIn(reactor, registry=registry, bucket=bucket)
        for site in self.sites:
            site.resource = self.standin.resource
        self.names = NameServer(reactor)
        resolver = reactor.listenUDP(0, self.names, interface=LOCAL).getHost().port
        self._disk = home / "disk"
        self.disk("well")
        surroundings = {
            "AWS_ENDPOINT_URL": registry.replace("registry.hostile.test", "localhost"),
            "PROXY_DNS_RESOLVER": f"{LOCAL}:{resolver}",
            "PROXY_UPSTREAM_SECONDS": "4",
            "PYTHONPATH": str(DISK),
            "HOSTILE_DISK": str(self._disk),
            "HOSTILE_CACHE": str(home / "cache"),
        }
        self.daemon = Daemon(twistd, home, registry, LIMIT, **(surroundings | settings))
        self._cold = 0
        self.small = self.push("team/app", "small", SMALL_BYTES)
        self.large = self.push("team/app", "large", LARGE_BYTES)
        self.image = self.standin.push_image("team/app", "latest")

    @property
    def tag(self) -> str:
        return "/v2/team/app/manifests/latest"

    def disk(self, word: str) -> None:
        """
        Set the state of the disk.
        """
        self._disk.write_text(word.ljust(20))

    def push(self, repository: str, seed: str, size: int) -> str:
        """
        Push a blob into the registry, and return its path.
        """
        return f"/v2/{repository}/blobs/{self.standin.push_blob(repository, noise(seed, size))}"

    def cold(self) -> str:
        """
        Return the path of a blob that was never requested.
        """
        self._cold += 1
        return self.push("team/app", f"cold{self._cold}", SMALL_BYTES)

    async def start(self, *lines: str) -> None:
        """
        Start the daemon and fill its cache with the content of later requests.
        """
        await asyncio.to_thread(self.daemon.start)
        for path in (self.tag, self.small, self.large):
            for _ in range(WARMING):
                got = await self.get(path, *lines)
                assert got.status == 200, (path, got, self.daemon.process.tail())
        for _ in range(WARMING):  # every worker has used the bucket, and knows its address
            assert (await self.get(self.cold(), *lines)).status == 200

    async def get(self, path: str, *lines: str, method: str = "GET", seconds: float = 60) -> Got:
        """
        Send one request, on a connection of its own.
        """
        began = time.monotonic()
        writer = None
        try:
            async with asyncio.timeout(seconds):
                reader, writer = await asyncio.open_connection(LOCAL, self.daemon.port)
                connection = Connection(reader, writer)
                status, fields = await connection.ask(method, path, *lines)
                length = int(fields.get("content-length", "0")) if method == "GET" else 0
                body = await connection.body(length)
                return Got(status, time.monotonic() - began, fields, body)
        except (OSError, asyncio.IncompleteReadError, BrokenError):  # a TimeoutError is an OSError
            return Got(0, time.monotonic() - began)
        finally:
            if writer is not None:
                writer.transport.abort()

    def memory(self) -> int:
        """
        Return the resident bytes of the daemon and its workers.
        """
        pid = self.daemon.process.pid
        return sum(Size.of(each).rss for each in (pid, *children(pid)))

    def stop(self) -> None:
        self.disk("well")
        self.daemon.process.stop()
