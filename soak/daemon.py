"""
The daemon under test as a process: started, killed, stopped, and measured from outside.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ecrproxy.cache.claim import SUFFIX
from ecrproxy.cache.record import RECORD, Record
from tests.e2e.asking import answers
from tests.e2e.processes import PATIENCE, Process, environment, eventually, free_port

CHECKOUT: Final = Path(__file__).parent.parent
STALL_SECONDS: Final = 2
DRAIN_SECONDS: Final = 5
OLD: Final = 30 * 24 * 3600


@dataclass(frozen=True)
class Size:
    """
    A process's use of the machine.
    """

    rss: int
    threads: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Size:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return cls(
            int(status["VmRSS"].split()[0]) * 1024,
            int(status["Threads"]),
            len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208
        )

    def __str__(self) -> str:
        return f"{self.rss / 2**20:.0f} MiB, {self.threads} threads, {self.descriptors} descriptors"


class StandIn:
    """
    The stand-in for ECR, as a process of its own.
    """

    def __init__(self, *options: str) -> None:
        argv = [sys.executable, "-m", "soak.standin", *options]
        self._popen = subprocess.Popen(argv, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self._popen.stdout is not None
        self._output = self._popen.stdout
        self.registry: str = json.loads(self._output.readline())["registry"]

    def stop(self) -> dict[str, int]:
        """
        Stop it, and return its faults.
        """
        os.kill(self._popen.pid, signal.SIGTERM)
        counts, _ = self._popen.communicate(timeout=PATIENCE)
        return dict(json.loads(counts or "{}"))


class Daemon:
    """
    The daemon over one cache directory, in whichever process at the moment.

    @param twistd: starts it.
    """

    def __init__(self, twistd: str | Path, home: Path, registry: str, limit: int, **more: str) -> None:
        self.home, self.cache, self.limit, self.port = home, home / "cache", limit, free_port()
        self._twistd = twistd
        self._settings = settings(registry, self.cache, self.port, limit) | more
        self._known: dict[Path, int] = {}
        self.process: Process

    def start(self, path: str = "/readyz") -> None:
        """
        Start it, and wait until it answers C{path} with 200.
        """
        argv = [self._twistd, "-n", "--pidfile=", "ecr-proxy"]
        self.process = Process(argv, environment(self.home, self._settings), self.home / "daemon.log", self.home)
        self.process.wait_until(answers(f"http://127.0.0.1:{self.port}{path}"))

    def size(self) -> Size:
        return Size.of(self.process.pid)

    def files(self, top: str) -> list[Path]:
        return sorted(path for path in (self.cache / top).rglob("*") if path.is_file())

    def used(self) -> int:
        """
        Return the bytes of all files in the directory; while it runs some may vanish before they are counted.
        """
        total = 0
        for folder, _, names in os.walk(self.cache):
            for name in names:
                try:
                    total += os.lstat(os.path.join(folder, name)).st_size  # noqa: PTH118
                except FileNotFoundError:
                    continue
        return total

    def wrong_content(self) -> list[Path]:
        """
        List the content that does not match its digest; verified files are not checked again.
        """
        wrong, known = [], {}
        for path in self.files("content"):
            with contextlib.suppress(FileNotFoundError):  # it was evicted meanwhile
                number = path.stat().st_ino
                if self._known.get(path) != number and not is_right(path):
                    wrong.append(path)
                known[path] = number
        self._known = known
        return wrong

    def age(self) -> None:
        """
        Make unfinished files look as old as if nobody had requested them for a month.
        """
        then = time.time() - OLD
        for path in self.files("arriving"):
            record = Record.unpack(path.read_bytes()[:RECORD]) if path.suffix == SUFFIX else None
            if record is not None:
                path.write_bytes(replace(record, when=then).pack())
            os.utime(path, (then, then))


def settings(registry: str, cache: Path, port: int, limit: int) -> dict[str, str]:
    return {
        "PROXY_ECR_ENDPOINT": registry,
        "AWS_ENDPOINT_URL": registry.replace("127.0.0.1", "localhost"),
        "AWS_REGION": "eu-west-1",
        "AWS_ACCESS_KEY_ID": "AKIASTANDIN",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_EC2_METADATA_DISABLED": "true",
        "PROXY_DNS_RESOLVER": "system",
        "PROXY_NAMESPACE_PATTERN": "team/.*",
        "PROXY_PORT": str(port),
        "PROXY_CACHE_DIR": str(cache),
        "PROXY_CACHE_LIMIT": str(limit),
        "PROXY_STALL_SECONDS": str(STALL_SECONDS),
        "PROXY_DRAIN_SECONDS": str(DRAIN_SECONDS),
        "PROXY_ADMIN_LISTEN": "off",
    }


def is_right(path: Path) -> bool:
    with path.open("rb") as file:
        return hashlib.file_digest(file, path.parent.parent.name).hexdigest() == path.name


def wait_for(holds: Callable[[], bool], what: str) -> Sequence[str]:
    """
    Return the conditions that did not hold in time.
    """
    try:
        eventually(holds, what)
    except TimeoutError as problem:
        return [str(problem)]
    return []
