"""
All settings: one table gives each setting's flag, variable, default, parser and help text.

A L{Config} is frozen, and is complete before anything listens. Pure: flags, environment and the contents of the
configuration file (see L{file}) are passed in. Problems that only the machine can show (an unreadable key, a port in
use) are found by C{tap}.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

import regex

from ecrproxy.access.limits import Limits
from ecrproxy.cache.cache_key import CacheKey
from ecrproxy.endpoint_string import EndpointString
from ecrproxy.identity import RegistryId
from ecrproxy.registry.quotas import Quotas
from ecrproxy.settings.registries import RegistryTable, clashes, meaning_of, table_at, table_of_settings
from ecrproxy.settings.values import (
    Network,
    SecretError,
    Server,
    parse_admin,
    parse_collector,
    parse_connections,
    parse_count,
    parse_endpoints,
    parse_flag,
    parse_header_bytes,
    parse_hosts,
    parse_limit,
    parse_listen,
    parse_log_format,
    parse_log_level,
    parse_networks,
    parse_origin,
    parse_path,
    parse_patience,
    parse_pattern,
    parse_port,
    parse_region,
    parse_registries,
    parse_resolver,
    parse_seconds,
    parse_share,
    parse_tries,
    parse_unknown_status,
    parse_workers,
    region_of,
)
from ecrproxy.settings.variables import service_of
from ecrproxy.shares import share

Given = Mapping[str, tuple[str, str]]
"""The text of each setting and where it was given, by setting name."""
CONFIG: Final = "config"
"""The setting that names the configuration file."""
RELOADED: Final = frozenset({"ecr-endpoint", "region", "instance-auth", "registry-aliases", "namespace-pattern"})
"""The settings that a reload changes, as it changes the file's tables of registries."""


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


class ConfigError(Exception):
    """
    Settings are invalid. Each line names one setting, its value and a valid value.

    @ivar errors: these lines.
    @ivar warnings: lines about other settings that would not prevent a start.
    """

    def __init__(self, *errors: str, warnings: Iterable[str] = ()) -> None:
        super().__init__("; ".join(errors))
        self.errors, self.warnings = errors, tuple(warnings)


@dataclass(frozen=True, slots=True)
class Setting:
    """
    One row of the table.

    @ivar name: the flag without its dashes; with underscores, the attribute of C{Config}.
    @ivar parse: parses the text; raises C{ValueError} with a message that names valid values.
    @ivar default: as shown in the help.
    """

    name: str
    variable: str
    parse: Callable[[str], Any]
    default: str
    help: str

    @property
    def attribute(self) -> str:
        """
        The attribute of L{Config} that holds the value.
        """
        return self.name.replace("-", "_")

    def read(self, text: str, source: str) -> Any:  # noqa: ANN401
        """
        Parse C{text}, which was given in C{source}.

        @raise ConfigError: if the text is invalid.
        """
        try:
            return self.parse(text)
        except SecretError as problem:
            raise ConfigError(f"{source}: {problem}") from None
        except ValueError as problem:
            line = " ".join(str(problem).split())  # re's own words hold what was given, line ends included
            raise ConfigError(f"{source}={text[:200]!r}: {line}") from None


ADMIN_LISTEN: Final = "tcp:5001:interface=127.0.0.1"
"""The default address of the admin port: reachable from this machine only."""

SETTINGS: Final[Sequence[Setting]] = (
    Setting(
        CONFIG,
        "PROXY_CONFIG",
        parse_path,
        "none",
        "TOML file of settings, each named like its flag; variables and flags win",
    ),
    Setting(
        "ecr-endpoint",
        "PROXY_ECR_ENDPOINT",
        parse_endpoints,
        "required",
        "URLs of ECR registries, separated by whitespace; the first is the default; a bare host means https",
    ),
    Setting(
        "region",
        "AWS_REGION",
        parse_region,
        "AWS_DEFAULT_REGION, else the endpoint's",
        "AWS region of the default registry",
    ),
    Setting(
        "instance-auth", "AWS_INSTANCE_AUTH", parse_flag, "false", "use the role of the instance, container or pod only"
    ),
    Setting(
        "cache-key", "PROXY_CACHE_KEY", CacheKey.parse, "$uri", "template of nginx variables that names a cache entry"
    ),
    Setting(
        "cache-limit",
        "PROXY_CACHE_LIMIT",
        parse_limit,
        "64gb",
        "maximum size of the cache directory, at least 1m",
    ),
    Setting(
        "cache-dir",
        "PROXY_CACHE_DIR",
        parse_path,
        "$CACHE_DIRECTORY, else ecr-proxy in the user's cache",
        "the cache directory",
    ),
    Setting(
        "dns-resolver",
        "PROXY_DNS_RESOLVER",
        parse_resolver,
        "8.8.8.8",
        "name servers for the names of registries and buckets, or: system",
    ),
    Setting(
        "namespace-pattern",
        "PROXY_NAMESPACE_PATTERN",
        parse_pattern,
        ".*",
        "regular expression that whole repository names must match",
    ),
    Setting(
        "registry-aliases",
        "PROXY_REGISTRY_ALIASES",
        parse_registries,
        "none",
        "other names of the registry, HOST or HOST:PORT, for clients that send ns=",
    ),
    Setting(
        "unknown-registry-status",
        "PROXY_UNKNOWN_REGISTRY_STATUS",
        parse_unknown_status,
        "404",
        "status for registries that are not configured: 404, or 403 if clients must not bypass the proxy",
    ),
    Setting("port", "PROXY_PORT", parse_port, "5000", "TCP port to listen on"),
    Setting("ssl-key", "PROXY_SSL_KEY", parse_path, "none", "file of the TLS private key"),
    Setting(
        "ssl-certificate", "PROXY_SSL_CERTIFICATE", parse_path, "none", "file of the TLS certificate and its chain"
    ),
    Setting(
        "client-ca", "PROXY_CLIENT_CA", parse_path, "none", "file of CAs; clients need a certificate from one of them"
    ),
    Setting(
        "htpasswd",
        "PROXY_HTPASSWD",
        parse_path,
        "none",
        "password file, made with htpasswd -B; clients must authenticate",
    ),
    Setting(
        "allow-from",
        "PROXY_ALLOW_FROM",
        parse_networks,
        "none",
        "networks of the clients that are allowed; all others are refused",
    ),
    Setting(
        "allow-origin",
        "PROXY_ALLOW_ORIGIN",
        parse_origin,
        "none",
        "origin of web pages that may read responses (CORS), or: *",
    ),
    Setting("listen", "PROXY_LISTEN", parse_listen, "made from port and TLS files", "Twisted endpoint strings"),
    Setting(
        "admin-listen",
        "PROXY_ADMIN_LISTEN",
        parse_admin,
        ADMIN_LISTEN,
        "Twisted endpoint string of the admin port (/metrics, status page, purge), or: off",
    ),
    Setting(
        "metrics-listen",
        "PROXY_METRICS_LISTEN",
        parse_admin,
        "off",
        "Twisted endpoint string for /metrics, /readyz and /healthz only, for scrapers that must not purge",
    ),
    Setting("log-format", "PROXY_LOG_FORMAT", parse_log_format, "text", "log format: text or json"),
    Setting(
        "log-level",
        "PROXY_LOG_LEVEL",
        parse_log_level,
        "info",
        "minimum level that is logged: debug, info, warn, error or critical",
    ),
    Setting(
        "otlp-endpoint",
        "PROXY_OTLP_ENDPOINT",
        parse_collector,
        "none",
        "URL of an OpenTelemetry collector (OTLP over HTTP) for traces; needs ecrproxy[otel]",
    ),
    Setting(
        "admin-hosts",
        "PROXY_ADMIN_HOSTS",
        parse_hosts,
        "none",
        "host names that requests to the admin port may use, in addition to addresses and the machine's names",
    ),
    Setting(
        "tag-ttl",
        "PROXY_TAG_TTL",
        parse_seconds,
        "0",
        "seconds to trust the digest of a tag; 0 asks ECR each time",
    ),
    Setting(
        "worker-processes",
        "PROXY_WORKER_PROCESSES",
        parse_workers,
        "1",
        "number of processes that serve clients; auto for one per core",
    ),
    Setting(
        "drain-seconds",
        "PROXY_DRAIN_SECONDS",
        parse_seconds,
        "30",
        "seconds to let responses finish on shutdown",
    ),
    Setting(
        "read-ahead",
        "PROXY_READ_AHEAD",
        parse_flag,
        "true",
        "prefetch the next layers of an image while a client downloads one",
    ),
    Setting(
        "blob-connections",
        "PROXY_BLOB_CONNECTIONS",
        parse_connections,
        "4",
        "parallel connections to the bucket for one large blob",
    ),
    Setting(
        "ecr-connections",
        "PROXY_ECR_CONNECTIONS",
        parse_connections,
        "128",
        "maximum number of concurrent requests to ECR",
    ),
    Setting(
        "ecr-quotas",
        "PROXY_ECR_QUOTAS",
        Quotas.parse,
        "manifests=2000 blobs=3000 checks=1000 lists=100",
        "requests per second that the account's ECR quotas allow, by kind; more are delayed",
    ),
    Setting(
        "upstream-tries",
        "PROXY_UPSTREAM_TRIES",
        parse_tries,
        "3",
        "maximum attempts for requests to ECR or a bucket that fail temporarily (429, 5xx, connection errors)",
    ),
    Setting(
        "upstream-seconds",
        "PROXY_UPSTREAM_SECONDS",
        parse_seconds,
        "10",
        "time budget for retries, in seconds from the first attempt",
    ),
    Setting(
        "bucket-connections",
        "PROXY_BUCKET_CONNECTIONS",
        parse_connections,
        "64",
        "maximum number of parallel connections to buckets, all blobs together",
    ),
    Setting(
        "stall-seconds",
        "PROXY_STALL_SECONDS",
        parse_patience,
        "30",
        "seconds in which a bucket must send at least 1 KiB, else the request is retried",
    ),
    Setting(
        "header-seconds",
        "PROXY_HEADER_SECONDS",
        parse_seconds,
        "10",
        "seconds to receive the request line and headers; 0 for no limit",
    ),
    Setting(
        "idle-seconds",
        "PROXY_IDLE_SECONDS",
        parse_seconds,
        "65",
        "seconds that a connection may be idle between requests; 0 for no limit",
    ),
    Setting(
        "send-seconds",
        "PROXY_SEND_SECONDS",
        parse_seconds,
        "300",
        "seconds without progress while sending to a client; 0 for no limit",
    ),
    Setting(
        "header-bytes",
        "PROXY_HEADER_BYTES",
        parse_header_bytes,
        "16k",
        "maximum bytes of the request line and headers together",
    ),
    Setting("header-count", "PROXY_HEADER_COUNT", parse_count, "100", "maximum number of headers; 0 for no limit"),
    Setting("connections", "PROXY_CONNECTIONS", parse_count, "10000", "maximum client connections; 0 for no limit"),
    Setting(
        "connections-per-address",
        "PROXY_CONNECTIONS_PER_ADDRESS",
        parse_share,
        "auto",
        "maximum connections from one address; 0 for no limit; auto for half of all connections, at most 1000",
    ),
    Setting(
        "transfers",
        "PROXY_TRANSFERS",
        parse_count,
        "4096",
        "maximum concurrent responses with a blob or of more than 64 KiB; 0 for no limit",
    ),
)

GROUPS: Final[Mapping[str, Sequence[str]]] = {
    "Registry": ("config", "ecr-endpoint", "region", "registry-aliases", "unknown-registry-status"),
    "Credentials": ("instance-auth",),
    "Cache": ("cache-dir", "cache-limit", "cache-key", "tag-ttl", "read-ahead"),
    "Listening": (
        *("port", "listen", "ssl-key", "ssl-certificate", "admin-listen", "metrics-listen", "admin-hosts"),
        *("worker-processes", "drain-seconds"),
    ),
    "Access": ("namespace-pattern", "allow-from", "allow-origin", "htpasswd", "client-ca"),
    "Limits of clients": (
        *("header-seconds", "idle-seconds", "send-seconds", "header-bytes", "header-count"),
        *("connections", "connections-per-address", "transfers"),
    ),
    "Upstream": (
        *("dns-resolver", "blob-connections", "bucket-connections", "stall-seconds", "ecr-connections", "ecr-quotas"),
        *("upstream-tries", "upstream-seconds"),
    ),
    "Log and traces": ("log-format", "log-level", "otlp-endpoint"),
}
"""The settings by topic, in the order of the help."""

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
