"""
Several processes on one cache directory, and a stand-in for ECR that counts what its bucket sends.

They are workers of one daemon, or separate daemons: the same claims hold for both.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from soak.daemon import Daemon

from .asking import Transfer, ask, download
from .installing import CHECKOUT
from .processes import PATIENCE, serving
from .sockets import accepted_by

DAEMONS: Final = "two daemons"
WORKERS: Final = "three workers"
_COUNTS: Final = {DAEMONS: 2, WORKERS: 3}


@dataclass
class StandIn:
    """
    The running stand-in.

    @ivar names: its content: digests by name.
    """

    registry: str
    asked: str
    names: dict[str, str]

    @property
    def sent(self) -> int:
        """
        Return the bytes that the bucket has sent.
        """
        return int(ask(self.asked).json()["bytes_sent"])

    def named(self, prefix: str) -> list[str]:
        """
        List the digests of a kind.
        """
        return [digest for name, digest in self.names.items() if name.startswith(prefix)]


@contextlib.contextmanager
def standing_in(*options: str) -> Iterator[StandIn]:
    """
    Run the stand-in.
    """
    argv = [sys.executable, "-m", "tests.registry_server", *options]
    with subprocess.Popen(argv, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        said: dict[str, Any] = json.loads(process.stdout.readline())
        try:
            yield StandIn(said["registry"], said["asked"], said["images"])
        finally:
            process.terminate()


class Group:
    """
    The processes.

    @param kind: L{DAEMONS} or L{WORKERS}.
    @ivar pids: the processes that serve clients.
    @ivar cache: their directory.
    """

    def __init__(self, kind: str, twistd: Path, home: Path, standin: StandIn, limit: int) -> None:
        self.kind, self.standin, self.cache = kind, standin, home / "cache"
        self._daemons: list[Daemon] = []
        more = {
            "PROXY_CACHE_DIR": str(self.cache),
            "PROXY_NAMESPACE_PATTERN": "demo/.*",
            "PROXY_STALL_SECONDS": "60",
            "PROXY_IDLE_SECONDS": "0",
            "PROXY_SEND_SECONDS": "0",
            "PROXY_WORKER_PROCESSES": str(_COUNTS[kind]) if kind == WORKERS else "1",
        }
        try:
            for number in range(1 if kind == WORKERS else _COUNTS[kind]):
                folder = home / str(number)
                folder.mkdir(parents=True)
                daemon = Daemon(twistd, folder, standin.registry, limit, **more)
                daemon.cache = self.cache
                daemon.start()
                self._daemons.append(daemon)
            first = self._daemons[0].process.pid
            self.pids = serving(first, 3) if kind == WORKERS else [each.process.pid for each in self._daemons]
        except BaseException:
            self.stop()
            raise

    @property
    def one(self) -> Daemon:
        """
        Return any daemon, for access to the directory.
        """
        return self._daemons[-1]

    def connect(self, count: int) -> dict[int, list[http.client.HTTPConnection]]:
        """
        Open so many connections to each of the processes.
        """
        if self.kind == WORKERS:
            return accepted_by(self.pids, self._daemons[0].port, count)
        ports = {each.process.pid: each.port for each in self._daemons}
        made = {pid: [http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)] for pid, port in ports.items()}
        for pid, clients in made.items():
            clients += [http.client.HTTPConnection("127.0.0.1", ports[pid], timeout=PATIENCE) for _ in range(count - 1)]
        return made

    def kill(self, pid: int) -> None:
        for daemon in self._daemons:
            if daemon.process.pid == pid:
                daemon.process.kill()
                return
        assert pid in self.pids
        os.kill(pid, signal.SIGKILL)

    def content(self, digest: str) -> Path:
        """
        Return the path of a blob's file.
        """
        name = digest.removeprefix("sha256:")
        return self.cache / "content/sha256" / name[:2] / name

    def stop(self) -> None:
        for daemon in self._daemons:
            daemon.process.stop()

    def said(self) -> str:
        """
        Return everything that they have logged.
        """
        return "".join(each.process.output.read_text("utf-8", "replace") for each in self._daemons)


def pull(
    connection: http.client.HTTPConnection, repository: str, digest: str, begun: Callable[[], object] = lambda: None
) -> Transfer:
    """
    Pull a blob on a connection, which is closed afterwards.
    """
    url = f"http://{connection.host}:{connection.port}/v2/{repository}/blobs/{digest}"
    return download(url, begun=begun, connection=connection)
