"""
The servers: nginx set up as the ECR proxy sets it up, distribution's registry in pull-through mode, the daemon.

Each is started with an empty cache directory unless it is given one, listens on a port of its own, and writes its
access log to a file, as in production.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.ground import Ground, Upstream
from bench.nginx_configuration import KEEP_MANIFESTS, TEXT
from bench.processes import LOCAL, PATH, environment, running, wait_until
from bench.upstream import SECRET
from tests.e2e.processes import free_port

NGINX, DISTRIBUTION, OURS, DIRECT = "nginx", "distribution", "ecrproxy", "ECR direct"


MANIFESTS = "keep manifests"
"""The setting that has nginx do so."""
_STALL = re.compile(r"longest event-loop stall ([\d.]+) s")


@dataclass(frozen=True)
class Served:
    """
    A running server.

    @ivar health: a path that it answers by itself.
    @ivar stalls: its longest event-loop stall, in seconds: known when it has ended, if it reports that.
    """

    peer: str
    pid: int
    port: int
    secure: bool
    health: str
    stalls: list[float] = field(default_factory=list)

    @property
    def url(self) -> str:
        """
        Return its URL.
        """
        return f"{'https' if self.secure else 'http'}://{LOCAL}:{self.port}"


def available() -> dict[str, str]:
    """
    Return which servers are installed, and their versions.
    """
    found = {}
    if shutil.which("nginx", path=PATH):
        found[NGINX] = _version("nginx", "-v")
    if shutil.which("docker-registry", path=PATH):
        found[DISTRIBUTION] = _version("docker-registry", "--version")
    found[OURS] = _version(str(twistd()), "ecr-proxy", "--version")
    return found


def twistd() -> Path:
    """
    Find the twistd of the interpreter that runs the bench.
    """
    return Path(sys.executable).parent / "twistd"


def _version(*argv: str) -> str:
    env = environment(Path(tempfile.gettempdir()))
    done = subprocess.run(
        argv, env=env, capture_output=True, text=True, check=False, timeout=60, cwd=tempfile.gettempdir()
    )
    found = re.search(r"\d+(\.\d+)+\S*", done.stdout + done.stderr)
    return found[0] if found else "unknown"


@contextlib.contextmanager
def served(
    peer: str,
    ground: Ground,
    upstream: Upstream,
    *,
    secure: bool = False,
    cache: Path | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Served]:
    """
    Run a server until the block ends; its cache is removed unless it was given.

    @param settings: more variables for the daemon; L{MANIFESTS} for nginx.
    """
    home = ground.fresh(peer)
    start = {NGINX: nginx, DISTRIBUTION: distribution, OURS: ours}[peer]
    try:
        with start(ground, upstream, home, cache or home / "cache", secure, settings or {}) as running_one:
            yield running_one
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def nginx(
    ground: Ground, upstream: Upstream, home: Path, cache: Path, secure: bool, settings: Mapping[str, str]
) -> Iterator[Served]:
    port = free_port()
    tls = f"ssl_certificate {ground.certificate.chain}; ssl_certificate_key {ground.certificate.key};"
    text = TEXT.format(
        user="user root;" if os.geteuid() == 0 else "",
        home=home,
        cache=cache,
        address=f"{LOCAL}:{port}",
        secure=" ssl" if secure else "",
        certificate=f"{tls} ssl_protocols TLSv1.3;" if secure else "",
        registry=upstream.registry,
        secret=SECRET,
        manifests=KEEP_MANIFESTS if settings.get(MANIFESTS) else "",
    )
    configuration = home / "nginx.conf"
    configuration.write_text(text)
    output = home / "nginx.log"
    argv = ["nginx", "-p", str(home), "-c", str(configuration)]
    with running(argv, cpu=ground.processors.server, env=environment(home), output=output) as process:
        wait_until(lambda: listens(port), process, output)
        yield Served(NGINX, process.pid, port, secure, "/_health")


@contextlib.contextmanager
def distribution(
    ground: Ground, upstream: Upstream, home: Path, cache: Path, secure: bool, settings: Mapping[str, str]
) -> Iterator[Served]:
    port = free_port()
    http_part: dict[str, object] = {"addr": f"{LOCAL}:{port}", "secret": "bench"}
    if secure:
        http_part["tls"] = {"certificate": str(ground.certificate.chain), "key": str(ground.certificate.key)}
    document = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(cache)}, "cache": {"blobdescriptor": "inmemory"}},
        "http": http_part,
        "proxy": {"remoteurl": upstream.open},
    }
    configuration = home / "registry.yml"
    configuration.write_text(json.dumps(document))  # which is YAML, too
    output = home / "distribution.log"
    argv = ["docker-registry", "serve", str(configuration)]
    with running(argv, cpu=ground.processors.server, env=environment(home), output=output) as process:
        wait_until(lambda: listens(port), process, output)
        yield Served(DISTRIBUTION, process.pid, port, secure, "/")


def our_environment(
    upstream: Upstream, home: Path, cache: Path, port: int, settings: Mapping[str, str]
) -> dict[str, str]:
    """
    Return the daemon's environment.
    """
    return environment(
        home,
        {
            "PROXY_ECR_ENDPOINT": upstream.registry,
            "PROXY_PORT": str(port),
            "PROXY_CACHE_DIR": str(cache),
            "PROXY_DNS_RESOLVER": "system",
            "PROXY_TAG_TTL": "0",
            "AWS_REGION": "eu-west-1",
            "AWS_ENDPOINT_URL": upstream.registry,
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_EC2_METADATA_DISABLED": "true",
            **settings,
        },
    )


@contextlib.contextmanager
def ours(
    ground: Ground, upstream: Upstream, home: Path, cache: Path, secure: bool, settings: Mapping[str, str]
) -> Iterator[Served]:
    """
    Run the daemon that is installed with the interpreter of the bench; if the number of its processes is set, on the
    clients' processor too.
    """
    port = free_port()
    tls = {"PROXY_SSL_KEY": str(ground.certificate.key), "PROXY_SSL_CERTIFICATE": str(ground.certificate.chain)}
    env = our_environment(upstream, home, cache, port, {**(tls if secure else {}), **settings})
    output = home / "ecrproxy.log"
    argv = [str(twistd()), "-n", "--pidfile=", "ecr-proxy"]
    cpu = ground.processors.both if "PROXY_WORKER_PROCESSES" in settings else ground.processors.server
    with running(argv, cpu=cpu, env=env, output=output) as process:
        wait_until(lambda: listens(port), process, output)
        one = Served(OURS, process.pid, port, secure, "/_health")
        wait_until(lambda: _has_token(ground, one), process, output)
        yield one
    one.stalls.extend(float(found[1]) for found in _STALL.finditer(output.read_text()))


def listens(port: int) -> bool:
    """
    Return True if the port accepts connections.
    """
    try:
        socket.create_connection((LOCAL, port), timeout=5).close()
    except OSError:
        return False
    return True


def _has_token(ground: Ground, one: Served) -> bool:
    return status_of(ground, one, "/readyz") == http.client.OK


def status_of(ground: Ground, one: Served, path: str) -> int:
    """
    Request C{path} and return the answer's status; 0 for none.
    """
    context = ground.certificate.context()
    connection = (
        http.client.HTTPSConnection(LOCAL, one.port, timeout=30, context=context)
        if one.secure
        else http.client.HTTPConnection(LOCAL, one.port, timeout=30)
    )
    with contextlib.closing(connection):
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except OSError:
            return 0
