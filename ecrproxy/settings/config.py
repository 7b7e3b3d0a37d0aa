"""
All settings: one table gives each setting's flag, variable, default, parser and help text.

A L{Config} is frozen, and is complete before anything listens. Pure: flags, environment and the contents of the
configuration file (see L{file}) are passed in. Problems that only the machine can show (an unreadable key, a port in
use) are found by C{tap}.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

import regex

from ecrproxy.access.limits import Limits
from ecrproxy.cache.cache_key import CacheKey
from ecrproxy.endpoint_string import EndpointString
from ecrproxy.identity import RegistryId
from ecrproxy.registry.quotas import Quotas
from ecrproxy.settings.endpoints import region_of
from ecrproxy.settings.registries import table_at, table_of_settings
from ecrproxy.settings.registry_clashes import clashes, meaning_of
from ecrproxy.settings.registry_table import RegistryTable
from ecrproxy.settings.table import CONFIG, SETTINGS, ConfigError, Setting
from ecrproxy.settings.values import Network, Server
from ecrproxy.settings.variables import service_of
from ecrproxy.shares import share

Given = Mapping[str, tuple[str, str]]
"""The text of each setting and where it was given, by setting name."""


@dataclass(frozen=True, slots=True)
class Filed:
    """
    The contents of a configuration file.

    @ivar settings: the settings in the file.
    @ivar registries: its tables of registries, parsed.
    @ivar tables: the same tables as written.
    """

    settings: Given = field(default_factory=dict)
    registries: tuple[RegistryTable, ...] = ()
    tables: Mapping[str, Any] = field(default_factory=dict)


NO_FILE: Final = Filed()


_WITHOUT_TEXT: Final = ("required", "none")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """
    All settings, checked.

    @ivar dns_resolver: name servers; None for the host's own resolver.
    @ivar cache_limit: in bytes.
    @ivar tag_ttl: in seconds.
    @ivar allow_origin: as browsers write it, or C{*}.
    @ivar listen: empty to listen on C{port}, with TLS if there is a key.
    @ivar admin_listen: None for no admin port; likewise C{metrics_listen}.
    @ivar admin_hosts: names of the admin port, in addition to those that are always accepted.
    @ivar registries: the default first; C{ecr_endpoint}, C{region} and C{instance_auth} are that one's.
    """

    config: str | None
    ecr_endpoint: str
    region: str
    instance_auth: bool
    cache_key: CacheKey
    cache_limit: int
    cache_dir: str
    dns_resolver: tuple[Server, ...] | None
    namespace_pattern: regex.Pattern[str]
    registry_aliases: frozenset[RegistryId] | None
    unknown_registry_status: int
    port: int
    ssl_key: str | None
    ssl_certificate: str | None
    client_ca: str | None
    htpasswd: str | None
    allow_from: tuple[Network, ...] | None
    allow_origin: str | None
    listen: Sequence[EndpointString]
    admin_listen: EndpointString | None
    metrics_listen: EndpointString | None
    admin_hosts: frozenset[str] | None
    log_format: str
    log_level: str
    otlp_endpoint: str | None
    tag_ttl: float
    worker_processes: int
    drain_seconds: float
    read_ahead: bool
    blob_connections: int
    bucket_connections: int
    stall_seconds: float
    ecr_connections: int
    ecr_quotas: Quotas
    upstream_tries: int
    upstream_seconds: float
    header_seconds: float
    idle_seconds: float
    send_seconds: float
    header_bytes: int
    header_count: int
    connections: int
    connections_per_address: int | None
    transfers: int
    registries: tuple[RegistryTable, ...]

    def limits(self, room: int = 0) -> Limits:
        """
        Return the limits of clients for one process.

        @param room: connections for which the process has descriptors; 0 for no limit.
        """
        given = {each.name: getattr(self, each.name) for each in fields(Limits)}
        limits = Limits(**{name: value for name, value in given.items() if value is not None})
        return limits.share(self.worker_processes, room, chosen=self.connections_per_address is not None)

    def share(self) -> Config:
        """
        Return the settings of a worker: its share of the connections to ECR and buckets.

        The cache limit is not divided: it is that of the shared directory.
        """
        count = self.worker_processes
        return replace(
            self,
            ecr_connections=share(self.ecr_connections, count),
            ecr_quotas=self.ecr_quotas.share(count),
            bucket_connections=share(self.bucket_connections, count),
        )

    @classmethod
    def load(cls, flags: Mapping[str, str], environ: Mapping[str, str], file: Filed = NO_FILE) -> Config:
        """
        Read the settings. Flags override variables, variables override the file; empty variables are ignored.

        @param flags: by setting name.
        @raise ConfigError: for the first that is invalid.
        """
        texts = texts_of(flags, environ, file)
        values = _values(texts, SETTINGS)
        _check_tls(values)
        default, *others = _registries(values, texts, file.registries)
        for alias in sorted(values["registry_aliases"] or (), key=str):
            if (means := meaning_of(alias, default, others)) is not None:
                raise ConfigError(f"{texts['registry-aliases'][1]} has {means}; leave one out")
        values |= {"ecr_endpoint": default.endpoint, "region": default.region, "instance_auth": default.instance_auth}
        return cls(**values, registries=(default, *others))


def config_file(flags: Mapping[str, str], environ: Mapping[str, str]) -> str | None:
    """
    Return the path of the configuration file; None if there is none.

    @raise ConfigError: if the path is invalid.
    """
    path: str | None = read_settings([CONFIG], flags, environ)[CONFIG]
    return path


def read_settings(
    names: Iterable[str], flags: Mapping[str, str], environ: Mapping[str, str], file: Filed = NO_FILE
) -> dict[str, Any]:
    """
    Read some settings, by L{Config}'s attribute, without checking the others.

    @raise ConfigError: for the first that is invalid.
    """
    return _values(texts_of(flags, environ, file), [each for each in SETTINGS if each.name in set(names)])


def registries_of(
    flags: Mapping[str, str], environ: Mapping[str, str], file: Filed = NO_FILE
) -> tuple[RegistryTable, ...]:
    """
    Return the configured registries, the default first; empty if none are configured.

    For callers that need only the names: the region may be missing.

    @raise ConfigError: if the settings of a registry are invalid.
    """
    texts = texts_of(flags, environ, file)
    values = _values(texts, [each for each in SETTINGS if each.name in ("ecr-endpoint", "region", "instance-auth")])
    if values["ecr_endpoint"] is None and not file.registries:
        return ()
    first, *_ = values["ecr_endpoint"] or ("",)
    values["region"] = values["region"] or region_of(first) or "unknown"
    return _registries(values, texts, file.registries)


def given(flags: Mapping[str, str], environ: Mapping[str, str], file: Filed = NO_FILE) -> Given:
    """
    Return the settings that a flag, a variable or the file gives, and where; without defaults.
    """
    by_flag = {each.name: (flags[each.name], f"--{each.name}") for each in SETTINGS if flags.get(each.name) is not None}
    return {**file.settings, **_from_environment(environ), **by_flag}


def texts_of(flags: Mapping[str, str], environ: Mapping[str, str], file: Filed = NO_FILE) -> Given:
    """
    Return the text of each setting and where it was given; defaults count as given by the variable.
    """
    return {**_defaults(environ), **given(flags, environ, file)}


def _values(texts: Given, settings: Iterable[Setting]) -> dict[str, Any]:
    return {each.attribute: each.read(*texts[each.name]) if each.name in texts else None for each in settings}


def _defaults(environ: Mapping[str, str]) -> Given:
    texts = {each.name: (each.default, each.variable) for each in SETTINGS if each.default not in _WITHOUT_TEXT}
    del texts["region"]
    texts["listen"] = ("", "PROXY_LISTEN")
    home = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME") or "/", ".cache")  # noqa: PTH118 (text, not a file)
    # systemd may give several directories, colon-separated: systemd.exec(5), CacheDirectory.
    ours = environ.get("CACHE_DIRECTORY", "").split(":")[0]
    texts["cache-dir"] = (ours or os.path.join(home, "ecr-proxy"), "PROXY_CACHE_DIR")  # noqa: PTH118
    return texts


def _from_environment(environ: Mapping[str, str]) -> Given:
    texts = {
        each.name: (environ[each.variable], each.variable)
        for each in SETTINGS
        if environ.get(each.variable) and service_of(each.variable, environ[each.variable]) is None
    }
    if environ.get("AWS_DEFAULT_REGION"):
        texts.setdefault("region", (environ["AWS_DEFAULT_REGION"], "AWS_DEFAULT_REGION"))
    return texts


def _check_tls(values: Mapping[str, Any]) -> None:
    if (values["ssl_key"] is None) != (values["ssl_certificate"] is None):
        missing, given = ("PROXY_SSL_CERTIFICATE", "PROXY_SSL_KEY")
        if values["ssl_key"] is None:
            missing, given = given, missing
        raise ConfigError(f"{missing} is not set, but {given} is: TLS needs both, plain HTTP neither")


def _registries(values: Mapping[str, Any], texts: Given, tables: Sequence[RegistryTable]) -> tuple[RegistryTable, ...]:
    """
    Return all registries, the default first: those in PROXY_ECR_ENDPOINT, and those with a table.

    @raise ConfigError: if there is none, a region is unknown, or two can't be distinguished.
    """
    endpoints, default = values["ecr_endpoint"] or (), next((each for each in tables if each.default), None)
    if not endpoints:
        if default is None:
            raise ConfigError(f"PROXY_ECR_ENDPOINT is not set{_no_default(texts, tables)}")
        return (default, *(each for each in tables if each.name != default.name))
    if default is None:
        _check_region(endpoints[0], values["region"], texts)
    named = [
        table_at(each, tables)
        or table_of_settings(each, _region(each, values["region"]), instance_auth=values["instance_auth"])
        for each in endpoints
    ]
    first, said = named[0], f"{texts['ecr-endpoint'][1]}={' '.join(endpoints)[:200]!r}"
    if default is not None and default.name != first.name:
        raise ConfigError(f"{said}: the file says that {default.name} is the default; name it first, or leave one out")
    others = {each.name: replace(each, default=False) for each in (*named, *tables)}
    registries = first, *(each for name, each in others.items() if name != first.name)
    for problem in clashes(registries):
        raise ConfigError(f"{said}: {problem}")
    return registries


def _no_default(texts: Given, tables: Sequence[RegistryTable]) -> str:
    if not tables:
        return ": give the URL of your ECR registry"
    file = texts.get(CONFIG, ("the configuration file", ""))[0]
    return f", and no table of {file} is the default; set default = true in that of an ECR registry"


def _check_region(endpoint: str, given: str | None, texts: Given) -> None:
    own = region_of(endpoint)
    if given is not None and own is not None and given != own:
        raise ConfigError(
            f"{texts['region'][1]}={given!r}: PROXY_ECR_ENDPOINT is in {own}; tokens are for one region; give {own}"
        )


def _region(endpoint: str, given: str | None) -> str:
    region = region_of(endpoint) or given
    if region is None:
        raise ConfigError("AWS_REGION is not set, and PROXY_ECR_ENDPOINT has none: give the registry's region")
    return region
