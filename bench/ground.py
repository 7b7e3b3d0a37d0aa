"""
The environment of a benchmark: a temporary directory, two processors, and the stand-in for ECR.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.content import Shelf, fill
from bench.processes import PATH, ROOT, Processors, environment, first_line, running, settle_down
from bench.tls import Certificate, make_certificate

TOOLS = ("taskset", "curl", "wrk")


@dataclass(frozen=True)
class Upstream:
    """
    The running stand-in for ECR.
    """

    registry: str
    open: str
    bucket: str

    def counts(self) -> dict[str, int]:
        """
        Return its counts of requests so far.
        """
        connection = http.client.HTTPConnection(self.registry.partition("//")[2], timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/_counts")
            counts: dict[str, int] = json.loads(connection.getresponse().read())
            return counts


@dataclass(frozen=True)
class Ground:
    """
    The environment of a benchmark.
    """

    directory: Path
    processors: Processors
    shelf: Shelf
    certificate: Certificate

    def fresh(self, name: str) -> Path:
        """
        Create a new directory.
        """
        return Path(tempfile.mkdtemp(prefix=f"{name.replace(' ', '-')}-", dir=self.directory))

    @contextlib.contextmanager
    def upstream(self, latency: float = 0, rate: float = 0, *, secure: bool = False) -> Iterator[Upstream]:
        """
        Run an upstream.

        @param secure: whether its bucket uses TLS.
        """
        output = self.fresh("upstream") / "upstream.log"
        argv = [sys.executable, "-m", "bench.upstream", "--shelf", self.shelf.to_json()]
        argv += ["--latency", str(latency), "--rate", str(rate)]
        if secure:
            argv += ["--certificate", str(self.certificate.chain), str(self.certificate.key)]
        env = environment(output.parent)
        cpu = self.processors.others
        with running(argv, cpu=cpu, env=env, output=output, cwd=ROOT, stdout=subprocess.PIPE) as process:
            yield Upstream(**json.loads(first_line(process, output)))


def say(line: str) -> None:
    """
    Report progress to the user.
    """
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def prepared(
    within: str | None, layers: int, layer_bytes: int, large_bytes: int, huge_bytes: int = 4096
) -> Iterator[Ground]:
    """
    Set up the environment, and remove it afterwards. Exits if a tool is missing.
    """
    if missing := [tool for tool in TOOLS if not shutil.which(tool, path=PATH)]:
        sys.exit(f"bench: not installed: {', '.join(missing)}; see bench/install-packages.sh")
    processors = settle_down()
    with tempfile.TemporaryDirectory(prefix="ecrproxy-bench-", dir=within, ignore_cleanup_errors=True) as name:
        directory = Path(name)
        shelf = fill(directory / "content", layers, layer_bytes, large_bytes, huge_bytes)
        yield Ground(directory, processors, shelf, make_certificate(directory))
