"""
Settings that are valid one by one but contradict each other, or are probably a mistake. Pure.

The daemon checks at startup, and does not start if protection would be lost. C{ecr-proxy doctor} checks, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import combinations
from typing import Any, Final
from urllib.parse import urlsplit

from ecrproxy.endpoint_string import PARAMETERS, SYSTEMD, is_loopback
from ecrproxy.settings.complaints import Complaint
from ecrproxy.settings.config import NO_FILE, Config, Filed, Given
from ecrproxy.settings.endpoints import REGIONS, endpoint_in_doubt, is_other_registry
from ecrproxy.settings.registry_table import Protocol
from ecrproxy.settings.table import ADMIN_LISTEN, SETTINGS, ConfigError
from ecrproxy.settings.values import parse_flag, pattern_in_doubt
from ecrproxy.settings.variables import look_at_variables

LONG_TAG_TTL: Final = 86400.0
SMALL_CACHE: Final = 2**30
_EVERY: Final = {"tcp": "0.0.0.0", "tcp6": "::"}  # noqa: S104 (compared, not bound)
"""The address that means all addresses, by kind of endpoint."""
_OURS: Final = frozenset({*(each.variable for each in SETTINGS), "AWS_DEFAULT_REGION"})


@dataclass(frozen=True, slots=True)
class Machine:
    """
    The machine's resources that settings are compared with.

    @ivar cores: CPU cores available to this process.
    @ivar disk: size of the cache directory's file system in bytes; None if unknown.
    """

    cores: int
    disk: int | None = None


def load(flags: Mapping[str, str], environ: Mapping[str, str], file: Filed = NO_FILE) -> Config:
    """
    Read the settings as L{Config.load} does. Errors include misspelled variables, which may explain a missing setting.

    @raise ConfigError: if the settings are invalid.
    """
    try:
        return Config.load(flags, environ, file)
    except ConfigError as problem:
        raise refusal(look_at_environment(environ), *problem.errors) from problem


def refusal(found: Sequence[Complaint], *errors: str) -> ConfigError:
    """
    Make an error from C{errors} and the grave complaints; the other complaints become its warnings.
    """
    grave = [str(each) for each in found if each.grave]
    return ConfigError(*errors, *grave, warnings=[str(each) for each in found if not each.grave])


def look_at_environment(environ: Mapping[str, str]) -> list[Complaint]:
    """
    Find variables that were probably meant to be settings.
    """
    return look_at_variables(environ, _OURS)


def look_at_settings(config: Config, given: Given, environ: Mapping[str, str], machine: Machine) -> list[Complaint]:
    """
    Find all problems of the settings, grave ones first.

    @param given: the texts that C{config} was loaded from.
    """
    sources = {name: source for name, (_, source) in given.items()}
    found = [
        *look_at_environment(environ),
        *_lost(config),
        *_exposed(config),
        *_at_one_port(config),
        *_ignored(config, sources, environ),
        *_ignored_by_tables(config, given),
        *_pointless(config, sources, machine.cores),
        *_in_doubt(config, machine.disk),
    ]
    return sorted(found, key=lambda each: not each.grave)


def look_at_log(config: Config, twistd: Mapping[str, Any]) -> list[Complaint]:
    """
    Find twistd flags that lose the log of worker processes, which goes to standard output.

    Workers can't share twistd's log file: after one process rotates it, the others would write to the old file.

    @param twistd: twistd's options; empty if unknown.
    """
    if not twistd or config.worker_processes == 1:
        return []
    several = f"PROXY_WORKER_PROCESSES={config.worker_processes}"
    if not twistd.get("nodaemon"):
        said = f"{several}: workers log to standard output, which twistd closes without -n"
        return [Complaint(said, "start twistd -n, or set PROXY_WORKER_PROCESSES=1", grave=True)]
    flag = next((each for each in ("logfile", "syslog", "logger") if twistd.get(each) and twistd[each] != "-"), None)
    if flag is None:
        return []
    said = f"{several}: workers log to standard output, and twistd's --{flag} only gets the parent's log"
    return [Complaint(said, "keep standard output as well")]


def _lost(config: Config) -> Iterator[Complaint]:
    """
    Find protection that was requested but that another setting disables.
    """
    own_tls = [each for each in config.listen if each.kind == SYSTEMD]
    others = [each for each in config.listen if each.kind != SYSTEMD]
    plain = [each for each in others if not each.secure and not each.is_local]
    if config.client_ca is not None and (config.ssl_key is None or others):
        yield Complaint(
            f"PROXY_CLIENT_CA={config.client_ca!r}: client certificates are only requested with TLS of PROXY_SSL_KEY"
            " and PROXY_SSL_CERTIFICATE, without PROXY_LISTEN except for systemd",
            "set these two, or unset it",
            grave=True,
        )
    if config.ssl_key is not None and others:
        served = f"PROXY_LISTEN={' '.join(map(str, others))!r} does not use PROXY_SSL_KEY and PROXY_SSL_CERTIFICATE"
        yield Complaint(
            f"{served}: it serves plain HTTP" if plain else served,
            "unset PROXY_LISTEN and set PROXY_PORT, give an ssl: endpoint there, or unset these two",
            grave=bool(plain) and not own_tls,
        )
    admin = config.admin_listen
    if admin is not None and "interface" in PARAMETERS[admin.kind] and not admin.interface:
        loopback, every = ("127.0.0.1", "0.0.0.0") if admin.socket().kind == "tcp" else (r"\:\:1", r"\:\:")  # noqa: S104
        yield Complaint(
            f"PROXY_ADMIN_LISTEN={admin.text!r} would let clients in all networks purge the cache",
            f"give {admin}:interface={loopback}, or, if that is intended, interface={every}",
            grave=True,
        )
    if config.allow_from and config.listen and not any(each.has_addresses or each.balanced for each in config.listen):
        yield Complaint(
            "PROXY_ALLOW_FROM refuses all clients: clients of a Unix socket have no address",
            "unset it, or give an endpoint with addresses in PROXY_LISTEN",
        )


def _exposed(config: Config) -> Iterator[Complaint]:
    """
    Find what others could read, reach or forge.
    """
    plain = [each for each in config.listen if not each.secure and (each.kind != SYSTEMD or config.ssl_key is None)]
    in_the_open = [each for each in plain if not each.is_local and not each.balanced]
    if config.htpasswd and (in_the_open or (not config.listen and config.ssl_key is None)):
        yield Complaint(
            "PROXY_HTPASSWD without TLS: passwords are sent unencrypted",
            "set PROXY_SSL_KEY and PROXY_SSL_CERTIFICATE too",
        )
    if config.admin_listen and config.admin_listen.interface and not config.admin_listen.is_local:
        yield Complaint(
            f"PROXY_ADMIN_LISTEN={config.admin_listen} can be reached from other machines, and asks for no password",
            "restrict access with a firewall or a NetworkPolicy",
        )
    behind = [each for each in config.listen if each.balanced and not each.is_local]
    if config.allow_from and behind:
        yield Complaint(
            f"PROXY_ALLOW_FROM trusts the addresses in PROXY headers sent to PROXY_LISTEN={behind[0]}",
            "allow only the load balancer to reach that port",
        )
    if config.allow_from and any(not network.prefixlen for network in config.allow_from):
        yield Complaint("PROXY_ALLOW_FROM includes all addresses, and so refuses no client", "list only your networks")
    for each in config.registries:
        parts = urlsplit(each.endpoint or "")
        if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            said = f"registry {each.name}: its endpoint is http, so the token is sent unencrypted"
            yield Complaint(said, "give an https URL")


def _at_one_port(config: Config) -> Iterator[Complaint]:
    """
    Find conflicts between the daemon's own listening sockets.
    """
    told = set()
    for (one, port, here), (other, others, there) in combinations(_sockets(config), 2):
        if port != others or not _overlap(here, there) or (one, other) in told:
            continue
        told.add((one, other))
        if other == f"PROXY_ADMIN_LISTEN={ADMIN_LISTEN}":  # the default: the daemon starts without the admin port
            said = f"{other}, the default, is already used by {one}: the daemon starts without the admin port"
            yield Complaint(said, "give another port there, or set PROXY_ADMIN_LISTEN")
        else:
            yield Complaint(f"{other} is already used by {one}", "give one of them another port", grave=True)


def _sockets(config: Config) -> Iterator[tuple[str, int, str]]:
    """
    List the TCP ports that the daemon listens on, in order of binding: source of the setting, port and address.
    """
    if not config.listen:
        yield from ((f"PROXY_PORT={config.port}", config.port, every) for every in _EVERY.values())
    named = [*(("PROXY_LISTEN", each) for each in config.listen), ("PROXY_METRICS_LISTEN", config.metrics_listen)]
    for name, each in (*named, ("PROXY_ADMIN_LISTEN", config.admin_listen)):
        if each is not None and each.port:
            yield f"{name}={each}", each.port, each.interface or _EVERY[each.socket().kind]


def _overlap(one: str, other: str) -> bool:
    """
    Return True if a socket bound to one address also takes connections to the other.
    """
    try:
        addresses = ip_address(one), ip_address(other)
    except ValueError:
        return one == other
    among = any(each.is_unspecified for each in addresses)
    return addresses[0] == addresses[1] or (among and addresses[0].version == addresses[1].version)


def _ignored(config: Config, sources: Mapping[str, str], environ: Mapping[str, str]) -> Iterator[Complaint]:
    """
    Find settings that another setting makes ineffective.
    """
    if config.listen and "port" in sources:
        listen = sources.get("listen", "PROXY_LISTEN")
        yield Complaint(f"{sources['port']} is not used, because {listen} is set", "unset one of them")
    if config.admin_hosts and config.admin_listen is None:
        yield Complaint("PROXY_ADMIN_HOSTS is not used, because PROXY_ADMIN_LISTEN is off", "unset one of them")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        if config.instance_auth and environ.get(name):
            yield Complaint(f"{name} is not used, because AWS_INSTANCE_AUTH is set", "unset one of them")
    if not config.instance_auth and environ.get("AWS_ACCESS_KEY_ID") and environ.get("AWS_PROFILE"):
        yield Complaint("AWS_PROFILE's credentials are not used, because AWS_ACCESS_KEY_ID is set", "unset one of them")


def _ignored_by_tables(config: Config, given: Given) -> Iterator[Complaint]:
    """
    Find tables that use other credentials despite AWS_INSTANCE_AUTH.
    """
    text, source = given.get("instance-auth", ("false", ""))
    others = [
        each.name
        for each in config.registries
        if each.protocol is not Protocol.OCI and not (each.anonymous or each.instance_auth or each.profile)
    ]
    if others and parse_flag(text):
        named = ", ".join(others[:3]) + (" and others" if len(others) > 3 else "")  # noqa: PLR2004
        said = f"{source} is not used for {named}: tables have their own credentials"
        yield Complaint(said, "set instance-auth = true there")


def _pointless(config: Config, sources: Mapping[str, str], cores: int) -> Iterator[Complaint]:
    """
    Find limits that other limits make pointless. Defaults are not reported.
    """
    if "blob-connections" in sources and config.bucket_connections < config.blob_connections:
        together = f"all blobs together may have PROXY_BUCKET_CONNECTIONS={config.bucket_connections}"
        yield Complaint(f"PROXY_BLOB_CONNECTIONS={config.blob_connections}, but {together}", "raise the second")
    for name in ("connections-per-address", "transfers"):
        if name in sources and 0 < config.connections < (getattr(config, name.replace("-", "_")) or 0):
            said = f"{sources[name]} is more than PROXY_CONNECTIONS, and so limits nothing"
            yield Complaint(said, "lower it, or set 0")
    if "upstream-tries" in sources and config.upstream_tries > 1 and not config.upstream_seconds:
        yield Complaint(
            "PROXY_UPSTREAM_SECONDS=0 leaves no time for a retry", "set PROXY_UPSTREAM_TRIES=1, or more seconds"
        )
    if "upstream-seconds" in sources and config.upstream_tries == 1:
        said = f"{sources['upstream-seconds']} is not used, because there are no retries"
        yield Complaint(said, "unset it, or set PROXY_UPSTREAM_TRIES to more")
    if config.worker_processes > cores:
        yield Complaint(
            f"PROXY_WORKER_PROCESSES={config.worker_processes}, on {cores} core{'s' * (cores != 1)}", "set auto"
        )


def _in_doubt(config: Config, disk: int | None) -> Iterator[Complaint]:
    """
    Find values that are valid but probably not intended.
    """
    for each in config.registries:
        resembles = each.protocol is Protocol.ECR or (each.protocol is Protocol.OCI and ".ecr." in each.name)
        if resembles and each.endpoint is not None and (doubt := endpoint_in_doubt(each.endpoint)):
            yield Complaint(f"registry {each.name}: {doubt}", "check that it is the name of your registry")
    for alias in sorted(map(str, config.registry_aliases or ())):
        host = alias.rpartition(":")[0]
        if is_other_registry(host):
            said = f"PROXY_REGISTRY_ALIASES has {host}: requests for that registry are answered from ECR"
            yield Complaint(said, "leave it out, unless ECR has copies of its repositories")
    if config.region not in REGIONS:
        yield Complaint(f"AWS_REGION={config.region} is not a region that this version knows", "check the spelling")
    if doubt := pattern_in_doubt(config.namespace_pattern):
        shown = config.namespace_pattern.pattern[:200]
        yield Complaint(f"PROXY_NAMESPACE_PATTERN={shown!r} {doubt}", "see docs/howto/access.rst")
    if disk is not None and config.cache_limit > disk:
        yield Complaint(
            f"PROXY_CACHE_LIMIT is {config.cache_limit} bytes, the whole file system of PROXY_CACHE_DIR {disk}",
            "lower it: nothing new is cached on a full disk",
        )
    if config.cache_limit < SMALL_CACHE:
        said = f"PROXY_CACHE_LIMIT is {config.cache_limit} bytes: larger layers are fetched again for each client"
        yield Complaint(said, "raise it, for example to 64g")
    if config.tag_ttl > LONG_TAG_TTL:
        yield Complaint(f"PROXY_TAG_TTL={config.tag_ttl:g}: tags may be out of date for that many seconds", "lower it")
