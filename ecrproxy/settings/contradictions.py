"""
Settings that are right each by itself and wrong together, or probably not meant. Pure.

The daemon asks at its start, and does not start if protection would be lost; the doctor asks whenever it is called.
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
from ecrproxy.settings.config import ADMIN_LISTEN, NO_FILE, SETTINGS, Config, ConfigError, Filed, Given
from ecrproxy.settings.registries import Protocol
from ecrproxy.settings.values import REGIONS, endpoint_in_doubt, is_other_registry, parse_flag, pattern_in_doubt
from ecrproxy.settings.variables import look_at_variables

LONG_TAG_TTL: Final = 86400.0
SMALL_CACHE: Final = 2**30
_EVERY: Final = {"tcp": "0.0.0.0", "tcp6": "::"}  # noqa: S104 (compared, not bound)
"""All addresses, by the kind of endpoint that has none."""
_OURS: Final = frozenset({*(each.variable for each in SETTINGS), "AWS_DEFAULT_REGION"})


@dataclass(frozen=True, slots=True)
class Machine:
    """
    What the settings are held against.

    @ivar cores: that this process may use.
    @ivar disk: bytes of the file system that the cache directory is on; None if that is not known.
    """

    cores: int
    disk: int | None = None


def load(flags: Mapping[str, str], environ: Mapping[str, str], file: Filed = NO_FILE) -> Config:
    """
    Read the settings as L{Config.load} does; the error has misspelt variables too, which may be what is missing.

    @raise ConfigError: if they are wrong.
    """
    try:
        return Config.load(flags, environ, file)
    except ConfigError as problem:
        raise refusal(look_at_environment(environ), *problem.errors) from problem


def refusal(found: Sequence[Complaint], *errors: str) -> ConfigError:
    """
    Make the error that tells C{errors}, and of what was found the grave complaints; the others are its warnings.
    """
    grave = [str(each) for each in found if each.grave]
    return ConfigError(*errors, *grave, warnings=[str(each) for each in found if not each.grave])


def look_at_environment(environ: Mapping[str, str]) -> list[Complaint]:
    """
    Find variables that were probably meant as settings.
    """
    return look_at_variables(environ, _OURS)


def look_at_settings(config: Config, given: Given, environ: Mapping[str, str], machine: Machine) -> list[Complaint]:
    """
    Find all that is wrong with the settings; grave complaints come first.

    @param given: what C{config} was loaded from.
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
    Find where twistd's flags lose the log of worker processes, which goes to standard output.

    A file of twistd's can't have it: what one process renames when it is full, the others would go on writing to.

    @param twistd: its options; empty if nobody has said where the log goes.
    """
    if not twistd or config.worker_processes == 1:
        return []
    several = f"PROXY_WORKER_PROCESSES={config.worker_processes}"
    if not twistd.get("nodaemon"):
        said = f"{several}: without twistd -n, standard output is closed, and the log of all requests goes there"
        return [Complaint(said, "start twistd -n, or set PROXY_WORKER_PROCESSES=1", grave=True)]
    flag = next((each for each in ("logfile", "syslog", "logger") if twistd.get(each) and twistd[each] != "-"), None)
    if flag is None:
        return []
    said = f"{several}: the log of all requests goes to standard output, and twistd's --{flag} has that of the parent"
    return [Complaint(said, "have standard output kept as well")]


def _lost(config: Config) -> Iterator[Complaint]:
    """
    Find protection that was asked for, and that something else takes away.
    """
    own_tls = [each for each in config.listen if each.kind == SYSTEMD]
    others = [each for each in config.listen if each.kind != SYSTEMD]
    plain = [each for each in others if not each.secure and not each.is_local]
    if config.client_ca is not None and (config.ssl_key is None or others):
        yield Complaint(
            f"PROXY_CLIENT_CA={config.client_ca!r}: certificates are asked for where PROXY_SSL_KEY and"
            " PROXY_SSL_CERTIFICATE make TLS, without PROXY_LISTEN but for systemd:",
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
            f"PROXY_ADMIN_LISTEN={admin.text!r} would let every network purge the cache",
            f"give {admin}:interface={loopback}, or, if every network is meant, interface={every}",
            grave=True,
        )
    if config.allow_from and config.listen and not any(each.has_addresses or each.balanced for each in config.listen):
        yield Complaint(
            "PROXY_ALLOW_FROM refuses everybody: clients of a socket that has a path have no address",
            "unset it, or give an endpoint with addresses in PROXY_LISTEN",
        )


def _exposed(config: Config) -> Iterator[Complaint]:
    """
    Find what others could read, reach or pretend.
    """
    plain = [each for each in config.listen if not each.secure and (each.kind != SYSTEMD or config.ssl_key is None)]
    in_the_open = [each for each in plain if not each.is_local and not each.balanced]
    if config.htpasswd and (in_the_open or (not config.listen and config.ssl_key is None)):
        yield Complaint(
            "PROXY_HTPASSWD without TLS: passwords go over the network as they are",
            "set PROXY_SSL_KEY and PROXY_SSL_CERTIFICATE too",
        )
    if config.admin_listen and config.admin_listen.interface and not config.admin_listen.is_local:
        yield Complaint(
            f"PROXY_ADMIN_LISTEN={config.admin_listen} can be reached from other machines, and asks for no password",
            "let a firewall or a NetworkPolicy keep others from it",
        )
    behind = [each for each in config.listen if each.balanced and not each.is_local]
    if config.allow_from and behind:
        yield Complaint(
            f"PROXY_ALLOW_FROM believes whatever address is told to PROXY_LISTEN={behind[0]}",
            "let nobody but the load balancer reach that port",
        )
    if config.allow_from and any(not network.prefixlen for network in config.allow_from):
        yield Complaint("PROXY_ALLOW_FROM has a network of all addresses, and so keeps nobody out", "name yours")
    for each in config.registries:
        parts = urlsplit(each.endpoint or "")
        if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            said = f"registry {each.name}: its endpoint is http, and the token goes over the network as it is"
            yield Complaint(said, "give an https URL")


def _at_one_port(config: Config) -> Iterator[Complaint]:
    """
    Find where one of the daemon's own sockets keeps another from listening.
    """
    told = set()
    for (one, port, here), (other, others, there) in combinations(_sockets(config), 2):
        if port != others or not _overlap(here, there) or (one, other) in told:
            continue
        told.add((one, other))
        if other == f"PROXY_ADMIN_LISTEN={ADMIN_LISTEN}":  # where nobody has set it, the daemon goes on without
            said = f"{other}, the default, is where {one} listens already: there is no operator's port"
            yield Complaint(said, "give another port there, or set PROXY_ADMIN_LISTEN")
        else:
            yield Complaint(f"{other} is where {one} listens already", "give one of them another port", grave=True)


def _sockets(config: Config) -> Iterator[tuple[str, int, str]]:
    """
    List the TCP ports that the daemon listens on itself, in the order in which it does: what says so, and the address.
    """
    if not config.listen:
        yield from ((f"PROXY_PORT={config.port}", config.port, every) for every in _EVERY.values())
    named = [*(("PROXY_LISTEN", each) for each in config.listen), ("PROXY_METRICS_LISTEN", config.metrics_listen)]
    for name, each in (*named, ("PROXY_ADMIN_LISTEN", config.admin_listen)):
        if each is not None and each.port:
            yield f"{name}={each}", each.port, each.interface or _EVERY[each.socket().kind]


def _overlap(one: str, other: str) -> bool:
    """
    Return True if who listens at one address has the other, too.
    """
    try:
        addresses = ip_address(one), ip_address(other)
    except ValueError:
        return one == other
    among = any(each.is_unspecified for each in addresses)
    return addresses[0] == addresses[1] or (among and addresses[0].version == addresses[1].version)


def _ignored(config: Config, sources: Mapping[str, str], environ: Mapping[str, str]) -> Iterator[Complaint]:
    """
    Find what has no effect because of something else.
    """
    if config.listen and "port" in sources:
        listen = sources.get("listen", "PROXY_LISTEN")
        yield Complaint(f"{sources['port']} is not used, for {listen} says where to listen", "unset one of them")
    if config.admin_hosts and config.admin_listen is None:
        yield Complaint("PROXY_ADMIN_HOSTS is not used, for PROXY_ADMIN_LISTEN is off", "unset one of them")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        if config.instance_auth and environ.get(name):
            yield Complaint(f"{name} is not used, for AWS_INSTANCE_AUTH is set", "unset one of them")
    if not config.instance_auth and environ.get("AWS_ACCESS_KEY_ID") and environ.get("AWS_PROFILE"):
        yield Complaint("AWS_PROFILE's credentials are not used, for AWS_ACCESS_KEY_ID is set", "unset one of them")


def _ignored_by_tables(config: Config, given: Given) -> Iterator[Complaint]:
    """
    Find where AWS_INSTANCE_AUTH does not keep other credentials from being used.
    """
    text, source = given.get("instance-auth", ("false", ""))
    others = [
        each.name
        for each in config.registries
        if each.protocol is not Protocol.OCI and not (each.anonymous or each.instance_auth or each.profile)
    ]
    if others and parse_flag(text):
        named = ", ".join(others[:3]) + (" and others" if len(others) > 3 else "")  # noqa: PLR2004
        said = f"{source} is not used for {named}: a table says for itself which credentials it has"
        yield Complaint(said, "set instance-auth = true there")


def _pointless(config: Config, sources: Mapping[str, str], cores: int) -> Iterator[Complaint]:
    """
    Find limits that others make pointless; defaults are not complained of.
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
            "PROXY_UPSTREAM_SECONDS=0 leaves no time for a second try", "set PROXY_UPSTREAM_TRIES=1, or more seconds"
        )
    if "upstream-seconds" in sources and config.upstream_tries == 1:
        said = f"{sources['upstream-seconds']} is not used, for there is one try"
        yield Complaint(said, "unset it, or set PROXY_UPSTREAM_TRIES to more")
    if config.worker_processes > cores:
        yield Complaint(
            f"PROXY_WORKER_PROCESSES={config.worker_processes}, on {cores} core{'s' * (cores != 1)}", "set auto"
        )


def _in_doubt(config: Config, disk: int | None) -> Iterator[Complaint]:
    """
    Find values that are possible, and probably not meant.
    """
    for each in config.registries:
        resembles = each.protocol is Protocol.ECR or (each.protocol is Protocol.OCI and ".ecr." in each.name)
        if resembles and each.endpoint is not None and (doubt := endpoint_in_doubt(each.endpoint)):
            yield Complaint(f"registry {each.name}: {doubt}", "see that it is the name of your registry")
    for alias in sorted(map(str, config.registry_aliases or ())):
        host = alias.rpartition(":")[0]
        if is_other_registry(host):
            said = f"PROXY_REGISTRY_ALIASES has {host}: what clients ask of that registry is answered from ECR"
            yield Complaint(said, "leave it out, unless ECR's repositories are its copies")
    if config.region not in REGIONS:
        yield Complaint(
            f"AWS_REGION={config.region} is a region that this version does not know", "see how it is spelt"
        )
    if doubt := pattern_in_doubt(config.namespace_pattern):
        shown = config.namespace_pattern.pattern[:200]
        yield Complaint(f"PROXY_NAMESPACE_PATTERN={shown!r} {doubt}", "see docs/howto/access.rst")
    if disk is not None and config.cache_limit > disk:
        yield Complaint(
            f"PROXY_CACHE_LIMIT is {config.cache_limit} bytes, the whole file system of PROXY_CACHE_DIR {disk}",
            "lower it: a full disk keeps nothing new",
        )
    if config.cache_limit < SMALL_CACHE:
        said = f"PROXY_CACHE_LIMIT is {config.cache_limit} bytes: larger layers are fetched again for each client"
        yield Complaint(said, "give it more, as 64g")
    if config.tag_ttl > LONG_TAG_TTL:
        yield Complaint(f"PROXY_TAG_TTL={config.tag_ttl:g}: tags may be out of date for so many seconds", "lower it")
