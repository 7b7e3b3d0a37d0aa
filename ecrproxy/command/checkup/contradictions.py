"""
Settings that are right each by itself and wrong together, or for this machine. Pure, but for the files that they name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Final
from urllib.parse import urlsplit

from cryptography import x509

from ecrproxy.access.htpasswd import HtpasswdError, read_users
from ecrproxy.command.checkup.findings import Finding, failed, ok, warning
from ecrproxy.command.checkup.network import SOON
from ecrproxy.command.checkup.reach import describe
from ecrproxy.daemon.tls import Certificate, CertificateError
from ecrproxy.settings.config import SETTINGS, Config
from ecrproxy.settings.predecessors import notices

FILES_OF_A_CLIENT: Final = 3
"""The most files that one client takes: its connection, what it is sent, and a share of what arrives."""
FILES_OF_ITS_OWN: Final = 200
_INTERFACE = re.compile(r"interface=((?:\\.|[^:])*)")


def look_at_settings(config: Config, environ: Mapping[str, str], cores: int) -> Iterator[Finding]:
    """
    Find what contradicts.

    @param cores: of the machine.
    """
    check = "settings"
    found = [*_ignored(config, environ), *_pointless(config, cores), *_open(config)]
    found += [(said, "see docs/moving.rst") for said in notices(environ)]
    for said, advice in found:
        yield warning(check, said, advice)
    if not found:
        yield ok(check, f"{len(SETTINGS)}, none of which contradicts another")


def _ignored(config: Config, environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """
    Find what has no effect because of something else.
    """
    if config.listen and environ.get("PROXY_PORT"):
        yield "PROXY_PORT is not used, for PROXY_LISTEN says where to listen", "unset one of them"
    if config.listen and config.ssl_key:
        yield (
            "PROXY_SSL_KEY and PROXY_SSL_CERTIFICATE are not used, for PROXY_LISTEN says where to listen",
            "give an ssl: endpoint there, or unset PROXY_LISTEN",
        )
    if config.instance_auth and environ.get("AWS_ACCESS_KEY_ID"):
        yield "AWS_ACCESS_KEY_ID is not used, for AWS_INSTANCE_AUTH is set", "unset one of them"
    if environ.get("AWS_ACCESS_KEY_ID") and environ.get("AWS_PROFILE"):
        yield "AWS_PROFILE's credentials are not used, for AWS_ACCESS_KEY_ID is set", "unset one of them"
    if any(environ.get(name) for name in ("HTTPS_PROXY", "https_proxy")):
        yield (
            "HTTPS_PROXY is used for AWS's API alone, not for registry and buckets",
            "let this machine out to those directly, or by VPC endpoints",
        )


def _pointless(config: Config, cores: int) -> Iterator[tuple[str, str]]:
    """
    Find limits that others make pointless.
    """
    if config.bucket_connections < config.blob_connections:
        together = f"all blobs together may have PROXY_BUCKET_CONNECTIONS={config.bucket_connections}"
        yield f"PROXY_BLOB_CONNECTIONS={config.blob_connections}, but {together}", "raise the second"
    if config.connections and config.connections_per_address > config.connections:
        yield (
            "PROXY_CONNECTIONS_PER_ADDRESS is more than PROXY_CONNECTIONS, and so limits nothing",
            "lower it, or set 0",
        )
    if config.connections and config.transfers > config.connections:
        yield "PROXY_TRANSFERS is more than PROXY_CONNECTIONS, and so limits nothing", "lower it, or set 0"
    if config.upstream_tries > 1 and not config.upstream_seconds:
        yield "PROXY_UPSTREAM_SECONDS=0 leaves no time for a second try", "set PROXY_UPSTREAM_TRIES=1, or more seconds"
    if config.worker_processes > cores:
        yield f"PROXY_WORKER_PROCESSES={config.worker_processes}, on {cores} cores", "set auto"


def _open(config: Config) -> Iterator[tuple[str, str]]:
    """
    Find what others could read, or reach.
    """
    secure = config.ssl_key is not None or any(text.startswith(("ssl:", "tls:", "haproxy:")) for text in config.listen)
    local = config.listen and all(_is_local(text) for text in config.listen)
    if config.htpasswd and not secure and not local:
        yield "PROXY_HTPASSWD without TLS: passwords go over the network as they are", "set PROXY_SSL_KEY too"
    if config.admin_listen and not _is_local(config.admin_listen):
        yield (
            f"PROXY_ADMIN_LISTEN={config.admin_listen} can be reached from other machines, and asks for no password",
            "let a firewall or a NetworkPolicy keep others from it",
        )
    if urlsplit(config.ecr_endpoint).scheme == "http":
        yield "PROXY_ECR_ENDPOINT is http: the token goes over the network as it is", "give an https URL"


def _is_local(text: str) -> bool:
    """
    Tell whether an endpoint string is of a socket, or of this machine's own address: else others reach it.
    """
    kind = text.removeprefix("haproxy:").partition(":")[0]
    if kind not in ("tcp", "tcp6", "ssl", "tls"):
        return True
    named = _INTERFACE.search(text)
    interface = named[1].replace("\\", "") if named else ""
    try:
        return ipaddress.ip_address(interface).is_loopback
    except ValueError:
        return interface == "localhost"


def look_at_files(config: Config, now: float) -> Iterator[Finding]:
    """
    Read the files that settings name, as the daemon will.
    """
    if config.ssl_key is not None and config.ssl_certificate is not None:
        yield _certificate(config.ssl_key, config.ssl_certificate, config.client_ca, now)
    if config.htpasswd is not None:
        try:
            users = read_users(config.htpasswd)
        except HtpasswdError as problem:
            yield failed(
                "passwords", f"PROXY_HTPASSWD={config.htpasswd}: {problem}", "see that the daemon's user can read it"
            )
        else:
            yield ok("passwords", f"{config.htpasswd} has {len(users.hashes)} names")


def _certificate(key: str, certificate: str, authorities: str | None, now: float) -> Finding:
    check = "certificate"
    try:
        Certificate(key, certificate, authorities)
        with open(certificate, "rb") as file:  # noqa: PTH123
            shown = describe(x509.load_pem_x509_certificate(file.read()))
    except CertificateError as problem:
        named = {"key": f"PROXY_SSL_KEY={key}", "authorities": f"PROXY_CLIENT_CA={authorities}"}
        where = named.get(problem.what, f"PROXY_SSL_CERTIFICATE={certificate}")
        return failed(
            check, f"{where}: {problem.why}", "give PEM files that belong together, and that the daemon's user can read"
        )
    except (OSError, ValueError) as problem:
        return failed(check, f"{certificate}: {problem}", "give a PEM certificate")
    days = (shown.until - now) / 86400
    names = ", ".join(shown.names[:4]) or "no names"
    if days < 0:
        return failed(check, f"{certificate} ended {-days:.1f} days ago", "renew it, and send the daemon SIGHUP")
    if days * 86400 < SOON:
        return warning(check, f"{certificate} ends in {days:.1f} days", "renew it, and send the daemon SIGHUP")
    return ok(check, f"for {names}, good for {days:.0f} days")


def judge_files(most: int, config: Config) -> Finding:
    """
    Hold the number of files that a process may open against the number of clients.

    @param most: how many it may have; the daemon raises its own limit so far.
    """
    check = "open files"
    clients = config.limits.connections
    wanted = clients * FILES_OF_A_CLIENT + FILES_OF_ITS_OWN
    said = f"{most} for a process started from here"
    if not clients or wanted <= most:
        return ok(
            check, f"{said}; {clients or 'no limit of'} clients of a process may need {wanted if clients else 'more'}"
        )
    return warning(
        check,
        f"{said}; {clients} clients may need {wanted}",
        "raise it: LimitNOFILE= in the unit, --ulimit nofile= for docker; or lower PROXY_CONNECTIONS",
    )
