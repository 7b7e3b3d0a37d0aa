"""
Checks of the settings, as at the daemon's startup, and of the files that they name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from cryptography import x509

from ecrproxy.access.htpasswd import HtpasswdError, read_users
from ecrproxy.command.checkup.findings import Finding, failed, ok, warning
from ecrproxy.command.checkup.network import SOON
from ecrproxy.command.checkup.reach import describe
from ecrproxy.command.terminal import counted
from ecrproxy.daemon.process import FILES_OF_A_CLIENT, KEPT_FILES, OWN_FILES
from ecrproxy.daemon.tls import Certificate, CertificateError
from ecrproxy.files import open_file, unread
from ecrproxy.otel import complaint
from ecrproxy.registry.login import read_password, why_unread
from ecrproxy.settings import contradictions
from ecrproxy.settings.config import Config, Given
from ecrproxy.settings.table import SETTINGS


def look_at_settings(config: Config, given: Given, environ: Mapping[str, str], cores: int) -> Iterator[Finding]:
    """
    Report the problems that the daemon would report at startup.

    @param given: the texts that C{config} was loaded from.
    @param cores: of the machine. The check of the cache directory covers its disk.
    """
    check = "settings"
    found = contradictions.look_at_settings(config, given, environ, contradictions.Machine(cores))
    for each in found:
        yield (failed if each.grave else warning)(check, each.said, each.advice)
    untraced = None if config.otlp_endpoint is None else complaint(config.otlp_endpoint, environ)
    if untraced is not None:
        yield failed(check, untraced, "see docs/howto/traces.rst, or unset PROXY_OTLP_ENDPOINT")
    if not found and untraced is None:
        yield ok(check, f"{len(SETTINGS)}, without contradictions")


def look_at_files(config: Config, now: float) -> Iterator[Finding]:
    """
    Check the files that the settings name.
    """
    if config.ssl_key is not None and config.ssl_certificate is not None:
        yield _certificate(config.ssl_key, config.ssl_certificate, config.client_ca, now)
    for each in filter(None, (*config.listen, config.admin_listen, config.metrics_listen)):
        key = each.options.get("privateKey", "")
        if key.startswith("/"):  # others are relative to the daemon's directory, which is unknown here
            yield _certificate(key, each.options.get("certKey", key), None, now, each.text)
    if config.htpasswd is not None:
        try:
            users = read_users(config.htpasswd)
        except HtpasswdError as problem:
            yield failed(
                "passwords", f"PROXY_HTPASSWD={config.htpasswd}: {problem}", "see that the daemon's user can read it"
            )
        else:
            yield ok("passwords", f"{config.htpasswd} has {counted(len(users.hashes), 'name')}")


def look_at_password(file: str) -> Finding:
    """
    Check the password file for a registry, which the daemon reads on each use.
    """
    try:
        read_password(Path(file))
    except (OSError, ValueError) as problem:
        return failed("password", why_unread(Path(file), problem), "see that the daemon's user can read it")
    return ok("password", f"{file} has one")


def _certificate(key: str, certificate: str, authorities: str | None, now: float, endpoint: str = "") -> Finding:
    """
    Check the key and certificate of the settings, or of an endpoint string.
    """
    check = "certificate"
    try:
        Certificate(key, certificate, authorities)
        with open_file(certificate) as file:
            shown = describe(x509.load_pem_x509_certificate(file.read()))
    except CertificateError as problem:
        named = {"key": f"PROXY_SSL_KEY={key}", "authorities": f"PROXY_CLIENT_CA={authorities}"}
        where = endpoint or named.get(problem.what, f"PROXY_SSL_CERTIFICATE={certificate}")
        return failed(
            check, f"{where}: {problem.why}", "give PEM files that belong together, and that the daemon's user can read"
        )
    except OSError as problem:
        return failed(check, f"{certificate} {unread(problem)}", "give a PEM certificate")
    except ValueError:
        return failed(check, f"{certificate} has no readable certificate", "give a PEM certificate")
    days = (shown.until - now) / 86400
    names = ", ".join(shown.names[:4]) or "no names"
    if days < 0:
        return failed(check, f"{certificate} ended {-days:.1f} days ago", "renew it; the daemon notices")
    if days * 86400 < SOON:
        return warning(check, f"{certificate} ends in {days:.1f} days", "renew it; the daemon notices")
    return ok(check, f"for {names}, good for {days:.0f} days")


def judge_files(most: int, config: Config) -> Finding:
    """
    Compare the limit of open files with the number of clients.

    @param most: the hard limit, to which the daemon raises its own.
    """
    check = "open files"
    clients = config.limits().connections
    wanted = clients * FILES_OF_A_CLIENT + OWN_FILES + KEPT_FILES
    said = f"{most} for a process started here"
    if not clients or wanted <= most:
        allowed = counted(clients, "client") if clients else "no limit of clients"
        return ok(check, f"{said}; {allowed} of a process may need {wanted if clients else 'more'}")
    return warning(
        check,
        f"{said}; {counted(clients, 'client')} may need {wanted}",
        "raise it: LimitNOFILE= in the unit, --ulimit nofile= for docker; or lower PROXY_CONNECTIONS",
    )
