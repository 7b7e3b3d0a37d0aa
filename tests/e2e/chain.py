"""
The chain that a pull goes through: daemon, front, registry.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sqlite3
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .asking import Reply, answers, ask
from .certificates import Certificates
from .installing import CHECKOUT
from .processes import Process, alive, children, environment, eventually, free_port

PATTERN = "team/.*"
LOOKS = 20
DRAFTS = ("entry.", "probe.")
"""Name prefixes of small files that are being written: a kill may leave some."""


@dataclass(frozen=True)
class Equipment:
    """What every chain is made of."""

    home: Path
    twistd: Path
    storage: Path
    certificates: Certificates


def start_registry(home: Path, storage: Path, auth: str = "") -> tuple[Process, str]:
    """
    Start a plain registry over a directory, and return its address.

    @param auth: its access rules, as in its configuration file; empty for everybody.
    """
    home.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    config = home / "registry.yml"
    config.write_text(
        "version: 0.1\n"
        "log: {level: warn, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {storage}}}}}\n"
        f"http: {{addr: '{address}', secret: of-no-use-here}}\n{auth}"
    )
    process = Process(["docker-registry", "serve", config], environment(home), home / "registry.log", home)
    wait_or_stop(process, f"http://{address}/v2/", 401 if auth else 200)
    return process, address


def start_moto(home: Path) -> tuple[Process, str]:
    """
    Start moto, another stand-in for AWS's API, and return its URL.
    """
    port = free_port()
    argv = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process, url = Process(argv, environment(home), home / "moto.log", home), f"http://127.0.0.1:{port}"
    wait_or_stop(process, f"{url}/moto-api/")
    return process, url


def wait_or_stop(process: Process, url: str, status: int = 200) -> None:
    """
    Wait until a program answers; stop one that never does.
    """
    try:
        process.wait_until(answers(url, status))
    except BaseException:
        process.stop()
        raise


class Daemon:
    """
    The daemon as an operator starts it, over one cache directory.
    """

    def __init__(self, equipment: Equipment, home: Path, settings: Mapping[str, str | None]) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self._equipment, self._home = equipment, home
        self.port = free_port()
        self.cache = home / "cache"
        self._settings = {
            "PROXY_PORT": str(self.port),
            "PROXY_CACHE_DIR": str(self.cache),
            **settings,
        }
        self.tls = self._settings.get("PROXY_SSL_KEY") is not None
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"{'https' if self.tls else 'http'}://{self.address}"
        self.process = self.start()

    @property
    def variables(self) -> dict[str, str]:
        """
        Return the variables for its start.
        """
        return {name: value for name, value in self._settings.items() if value is not None}

    def start(self) -> Process:
        """
        Start the daemon, without waiting until it is ready.
        """
        self._torn = {each for each in self._arriving() if each.name.startswith(DRAFTS)}  # their writer was killed
        return Process(
            [self._equipment.twistd, "-n", "--pidfile=", "ecr-proxy"],
            environment(self._home, self.variables),
            self._home / "daemon.log",
            self._home,
        )

    def ask(self, path: str, method: str = "GET", headers: Mapping[str, str] | None = None) -> Reply:
        """
        Send one request.
        """
        return ask(self.url + path, method, headers, ca=self._equipment.certificates.ca)

    def ready(self) -> bool:
        """
        Return True if the daemon says that it is ready: each of its workers, as far as several requests can show.
        """
        times = 1 if self.variables.get("PROXY_WORKER_PROCESSES", "1") == "1" else LOOKS
        return all(self.answers("/readyz", 200) for _ in range(times))

    def answers(self, path: str, status: int) -> bool:
        """
        Return True if a path has the expected answer by now.
        """
        try:
            return self.ask(path).status == status
        except OSError:
            return False

    def wait(self) -> None:
        """
        Wait until the daemon is ready.
        """
        self.process.wait_until(self.ready)

    def kill(self) -> None:
        """
        Kill the daemon with all its workers, as a power cut would: the parent first, or it would replace them.
        """
        workers = children(self.process.pid)
        self.process.kill()
        for pid in filter(alive, workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not any(map(alive, workers)), "the workers are gone")

    def restart(self) -> None:
        """
        Start again over the same directory, however the daemon ended.
        """
        self.process = self.start()
        self.wait()

    def holds(self, digest: str) -> bool:
        """
        Return True if the cache has a blob.
        """
        return any((self.cache / "content").rglob(digest.removeprefix("sha256:")))

    def wrong_content(self) -> list[Path]:
        """
        List the files of the cache that do not match their digests.
        """
        contents = [each for each in (self.cache / "content").rglob("*") if each.is_file()]
        return [each for each in contents if hash_of(each) != each.name]

    def settle(self) -> None:
        """
        Wait until the disk has what the clients have, who do not wait for it, and the daemon has closed it.

        Until then another client may still join the transfer, and what a client got has no entry yet.
        """
        eventually(lambda: not self._arriving() - self._torn, "nothing is arriving any more")
        eventually(lambda: not self._open_files(), "the daemon has no file of the cache open")
        eventually(lambda: len(self._files("content")) <= self._entries(), "all content has an entry")

    def arriving(self) -> list[Path]:
        """
        List the transfers that are in flight, or were when the daemon ended.
        """
        return [each for each in self._arriving() if not each.name.startswith(DRAFTS) and each.suffix != ".claim"]

    def _arriving(self) -> set[Path]:
        return self._files("arriving")

    def _entries(self) -> int:
        """
        Count the content that an entry of the index leads to.
        """
        (path,) = self.cache.glob("index-*.sqlite3")
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as index:
            (count,) = index.execute(
                "SELECT count(*) FROM (SELECT digest FROM holds UNION SELECT digest FROM tag)"
            ).fetchone()
        return int(count)

    def _files(self, top: str) -> set[Path]:
        return {each for each in (self.cache / top).rglob("*") if each.is_file()}

    def _open_files(self) -> list[str]:
        found = []
        for pid in (self.process.pid, *children(self.process.pid)):
            for each in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
                    found.append(str(each.readlink()))
        return [each for each in found if each.startswith((f"{self.cache}/content", f"{self.cache}/arriving"))]


def hash_of(path: Path) -> str:
    """
    Return the hash of a file.
    """
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


class Chain:
    """
    A registry, a front and a daemon of their own, which are stopped together.
    """

    def __init__(
        self,
        equipment: Equipment,
        name: str,
        *,
        front: tuple[str, ...] = (),
        tls: bool = False,
        settings: Mapping[str, str | None] | None = None,
    ) -> None:
        self.home, self.certificates = equipment.home / name, equipment.certificates
        self.command = equipment.twistd.with_name("ecr-proxy")
        self._running: list[Process] = []
        try:
            self.registry, self.plain = start_registry(self.home, equipment.storage)
            self._running.append(self.registry)
            self.front_url = self._start_front(equipment, front)
            given = standard_settings(self.front_url) | dict(settings or {})
            if tls:
                given |= tls_settings(equipment.certificates)
            self.daemon = Daemon(equipment, self.home, given)
            self._running.append(self.daemon.process)
        except BaseException:
            self.stop()
            raise

    def _start_front(self, equipment: Equipment, options: tuple[str, ...]) -> str:
        port, bucket_port = free_port(), free_port()
        argv: list[str | Path] = [
            *(sys.executable, "-m", "tests.e2e.front", "--registry", f"http://{self.plain}"),
            *("--storage", equipment.storage, "--port", str(port)),
            *("--bucket-port", str(bucket_port), *options),
        ]
        # The front is part of these tests, not of what they test: it runs from here.
        process = Process(argv, environment(self.home), self.home / "front.log", CHECKOUT)
        self._running.append(process)
        url = f"http://127.0.0.1:{port}"
        process.wait_until(answers(f"{url}/_counters"))
        self.front = process
        return url

    def counters(self) -> dict[str, Any]:
        """
        Return the front's counters.
        """
        counted: dict[str, Any] = ask(f"{self.front_url}/_counters").json()
        return counted

    def cut(self) -> None:
        """
        Stop everything behind the daemon.
        """
        self.front.stop()
        self.registry.stop()

    def stop(self) -> None:
        """
        Stop everything, the daemon first.
        """
        if hasattr(self, "daemon"):
            self.daemon.process.stop()
        for process in reversed(self._running):
            process.stop()

    def logs(self) -> str:
        """
        Return the end of each program's output.
        """
        return "\n".join(f"-- {each.name}\n{each.tail()}" for each in self._running)


def standard_settings(front: str) -> dict[str, str | None]:
    """
    Return the settings of a daemon before a front.
    """
    return {
        "PROXY_ECR_ENDPOINT": front,
        "PROXY_DNS_RESOLVER": "system",
        "PROXY_NAMESPACE_PATTERN": PATTERN,
        # The name in the recipes, whose endpoint is on this machine here.
        "PROXY_REGISTRY_ALIASES": "123456789012.dkr.ecr.eu-west-1.amazonaws.com",
        "AWS_REGION": "eu-west-1",
        "AWS_ACCESS_KEY_ID": "AKIASTANDIN",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_ENDPOINT_URL": front,
        # One machine runs several of them here.
        "PROXY_ADMIN_LISTEN": "off",
        # Nothing answers there, and waiting for that takes time.
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def tls_settings(certificates: Certificates) -> dict[str, str | None]:
    """
    Return the settings of a daemon that serves TLS.
    """
    return {
        "PROXY_SSL_KEY": str(certificates.key),
        "PROXY_SSL_CERTIFICATE": str(certificates.chain),
    }
