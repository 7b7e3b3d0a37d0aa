"""
The table of all settings: name, variable, parser, default and help of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ecrproxy.cache.cache_key import CacheKey
from ecrproxy.registry.quotas import Quotas
from ecrproxy.settings.endpoints import SecretError, parse_endpoints, parse_region
from ecrproxy.settings.values import (
    parse_admin,
    parse_collector,
    parse_connections,
    parse_count,
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
    parse_registries,
    parse_resolver,
    parse_seconds,
    parse_share,
    parse_tries,
    parse_unknown_status,
    parse_workers,
)

CONFIG: Final = "config"
"""The setting that names the configuration file."""
RELOADED: Final = frozenset({"ecr-endpoint", "region", "instance-auth", "registry-aliases", "namespace-pattern"})
"""The settings that a reload changes, as it changes the file's tables of registries."""


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
