"""
Settings come from flags and variables; an error is one line.
"""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.cache_key import CacheKey
from ecrproxy.endpoint_string import parse_endpoint_string
from ecrproxy.identity import RegistryId
from ecrproxy.registry.quotas import Quotas
from ecrproxy.settings import values
from ecrproxy.settings.config import Config
from ecrproxy.settings.table import SETTINGS, ConfigError

ECR = "https://123456789012.dkr.ecr.eu-west-1.amazonaws.com"
MINIMUM = {"PROXY_ECR_ENDPOINT": ECR, "HOME": "/home/me"}

# flag: its variable, a text for the variable, the resulting value, another text for the flag, the resulting value
EXAMPLES: dict[str, tuple[str, str, Any, str, Any]] = {
    "config": ("PROXY_CONFIG", "/one.toml", "/one.toml", "two.toml", "two.toml"),
    "ecr-endpoint": ("PROXY_ECR_ENDPOINT", "http://moto:5000", "http://moto:5000", "ecr.test", "https://ecr.test"),
    "region": ("AWS_REGION", "us-east-2", "us-east-2", "us-gov-west-1", "us-gov-west-1"),
    "instance-auth": ("AWS_INSTANCE_AUTH", "true", True, "false", False),
    "cache-key": ("PROXY_CACHE_KEY", "$host", CacheKey(("", "host", "")), "a$uri", CacheKey(("a", "uri", ""))),
    "cache-limit": ("PROXY_CACHE_LIMIT", "512m", 536_870_912, "2097152", 2_097_152),
    "cache-dir": ("PROXY_CACHE_DIR", "/srv/one", "/srv/one", "two", "two"),
    "dns-resolver": ("PROXY_DNS_RESOLVER", "1.1.1.1:5353", (("1.1.1.1", 5353),), "system", None),
    "namespace-pattern": ("PROXY_NAMESPACE_PATTERN", "one/.*", "one/x", "two/.*", "two/x"),
    "registry-aliases": (
        "PROXY_REGISTRY_ALIASES",
        "a.example, B.example:5000",
        frozenset({RegistryId("a.example:443"), RegistryId("b.example:5000")}),
        "c.svc",
        frozenset({RegistryId("c.svc:443")}),
    ),
    "unknown-registry-status": ("PROXY_UNKNOWN_REGISTRY_STATUS", "403", 403, "404", 404),
    "port": ("PROXY_PORT", "5001", 5001, "80", 80),
    "ssl-key": ("PROXY_SSL_KEY", "/key.pem", "/key.pem", "/other.pem", "/other.pem"),
    "ssl-certificate": ("PROXY_SSL_CERTIFICATE", "/cert.pem", "/cert.pem", "/other.pem", "/other.pem"),
    "client-ca": ("PROXY_CLIENT_CA", "/ca.pem", "/ca.pem", "/other.pem", "/other.pem"),
    "htpasswd": ("PROXY_HTPASSWD", "/users", "/users", "/others", "/others"),
    "allow-from": (
        "PROXY_ALLOW_FROM",
        "10.0.0.0/8, fd00::/8",
        (ip_network("10.0.0.0/8"), ip_network("fd00::/8")),
        "192.0.2.7",
        (ip_network("192.0.2.7/32"),),
    ),
    "allow-origin": ("PROXY_ALLOW_ORIGIN", "https://UI.example", "https://ui.example", "*", "*"),
    "listen": (
        "PROXY_LISTEN",
        "tcp:1 \n unix:/x",
        [parse_endpoint_string("tcp:1"), parse_endpoint_string("unix:/x")],
        "tcp:2",
        [parse_endpoint_string("tcp:2")],
    ),
    "admin-listen": ("PROXY_ADMIN_LISTEN", "tcp:9", parse_endpoint_string("tcp:9"), "off", None),
    "metrics-listen": ("PROXY_METRICS_LISTEN", "tcp:9", parse_endpoint_string("tcp:9"), "off", None),
    "admin-hosts": (
        "PROXY_ADMIN_HOSTS",
        "a.example, B.example",
        frozenset({"a.example", "b.example"}),
        "c.svc",
        frozenset({"c.svc"}),
    ),
    "log-format": ("PROXY_LOG_FORMAT", "json", "json", "TEXT", "text"),
    "log-level": ("PROXY_LOG_LEVEL", "warn", "warn", "Debug", "debug"),
    "otlp-endpoint": (
        "PROXY_OTLP_ENDPOINT",
        "http://collector.example:4318",
        "http://collector.example:4318",
        "https://[::1]:4318/tenant/",
        "https://[::1]:4318/tenant/",
    ),
    "tag-ttl": ("PROXY_TAG_TTL", "30", 30.0, "0.5", 0.5),
    "worker-processes": ("PROXY_WORKER_PROCESSES", "2", 2, "16", 16),
    "drain-seconds": ("PROXY_DRAIN_SECONDS", "60", 60.0, "0", 0.0),
    "read-ahead": ("PROXY_READ_AHEAD", "false", False, "true", True),
    "blob-connections": ("PROXY_BLOB_CONNECTIONS", "8", 8, "1", 1),
    "bucket-connections": ("PROXY_BUCKET_CONNECTIONS", "100", 100, "9999", 9999),
    "stall-seconds": ("PROXY_STALL_SECONDS", "10", 10.0, "0.5", 0.5),
    "ecr-connections": ("PROXY_ECR_CONNECTIONS", "10", 10, "1", 1),
    "ecr-quotas": ("PROXY_ECR_QUOTAS", "lists=5", Quotas(lists=5), "blobs=1,lists=2", Quotas(blobs=1, lists=2)),
    "upstream-tries": ("PROXY_UPSTREAM_TRIES", "1", 1, "5", 5),
    "upstream-seconds": ("PROXY_UPSTREAM_SECONDS", "0", 0.0, "2.5", 2.5),
    "header-seconds": ("PROXY_HEADER_SECONDS", "30", 30.0, "0", 0.0),
    "idle-seconds": ("PROXY_IDLE_SECONDS", "70", 70.0, "0.5", 0.5),
    "send-seconds": ("PROXY_SEND_SECONDS", "60", 60.0, "0", 0.0),
    "header-bytes": ("PROXY_HEADER_BYTES", "8k", 8192, "1000", 1000),
    "header-count": ("PROXY_HEADER_COUNT", "50", 50, "0", 0),
    "connections": ("PROXY_CONNECTIONS", "500", 500, "0", 0),
    "connections-per-address": ("PROXY_CONNECTIONS_PER_ADDRESS", "10", 10, "auto", None),
    "transfers": ("PROXY_TRANSFERS", "5", 5, "0", 0),
}
# flag: invalid texts, and words of the advice
WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "ecr-endpoint": (
        (
            *("ftp://x", "https://", "https://h/v2", "two wo_rds", "one.test two/words"),
            *(
                "docker.io",
                "registry-1.docker.io",
                "public.ecr.aws",
                "ecr-public.aws.com",
                "ghcr.io",
                "https://eu.gcr.io",
            ),
            "12345678901.dkr.ecr.eu-west-1.amazonaws.com",
            "team.dkr.ecr.eu-west-1.amazonaws.com",
            "123456789012.dkr.ecr.amazonaws.com",
            "api.ecr.eu-west-1.amazonaws.com",
            "http://123456789012.dkr.ecr.eu-west-1.amazonaws.com",
        ),
        "give one such as https://",
    ),
    "region": (("eu west", "EU-WEST-1", "europe", "eu-west-1\nx"), "give one such as eu-west-1"),
    "instance-auth": (("maybe", "2"), "true nor false"),
    "cache-key": (("$nonsense", "fixed", "$"), "$"),
    "cache-limit": (("64 parsecs", "-1", "0", "1.5g", "64", "64k", "1048575"), "64g"),
    "dns-resolver": (("dns.example", "8.8.8.8:0", ","), "system"),
    "namespace-pattern": (("(a", "a)|(b", "*"), "not a regular expression"),
    "port": (("0", "65536", "http", "-1"), "from 1 to 65535"),
    "allow-from": (("everywhere", "10.0.0.0/33", ","), "10.0.0.0/8"),
    "allow-origin": (
        ("ui.example", "https://a.example/x", "https://*.example", "null"),
        "give one such as https://ui.example",
    ),
    "registry-aliases": (("http://a.example", "a b/c", "a:b"), "is not the name of a registry's host"),
    "unknown-registry-status": (("200", "401", "deny"), "give 404, after which clients ask elsewhere, or 403"),
    "admin-hosts": (("*.example", "http://a.example", "a.example:5001"), "give one such as ecr-proxy.infra.svc"),
    "log-format": (("xml", "jsonl"), "give text or json"),
    "log-level": (("loud", "warning", "3"), "give debug, info, warn, error or critical"),
    "tag-ttl": (("soon", "-1", "inf"), "give 0 or more"),
    "drain-seconds": (("soon", "-1", "1m"), "give 0 or more"),
    "worker-processes": (("0", "-1", "many", "1.5", "1000"), "give 1 or more, or auto"),
    "read-ahead": (("maybe", "2"), "true nor false"),
    "blob-connections": (("0", "-1", "four", "10000"), "give 1 or more"),
    "bucket-connections": (("0", "-1", "auto"), "give 1 or more"),
    "stall-seconds": (("0", "0.0", "-1", "never"), "above 0"),
    "ecr-connections": (("0", "-1", "many"), "give 1 or more"),
    "ecr-quotas": (
        ("2000", "blobs=0", "blobs=-1", "lists=1 lists=1", "pushes=5", "lists=1.5"),
        "manifests=2000",
    ),
    "upstream-tries": (("0", "-1", "100", "twice"), "give 1 to 99"),
    "upstream-seconds": (("-1", "ten"), "give 0 or more"),
    "header-seconds": (("soon", "-1"), "give 0 or more"),
    "idle-seconds": (("soon", "-1"), "give 0 or more"),
    "send-seconds": (("soon", "-1"), "give 0 or more"),
    "header-bytes": (("0", "-1", "1.5k", "16", "511"), "give"),
    "listen": (("5000", ":5000", "tcp:5000 127.0.0.1:5001", "http://localhost:5000"), "give tcp:500"),
    "admin-listen": (("15101", "localhost:15101", "[::1]:15101"), "15101:interface="),
    "header-count": (("-1", "many", "1.5", "1" * 10), "give 0 for no limit"),
    "connections": (("-1", "many", "1.5", "1" * 10), "give 0 for no limit"),
    "connections-per-address": (("-1", "many", "1.5", "1" * 10), "give 0 for no limit"),
    "transfers": (("-1", "many", "1.5", "1" * 10), "give 0 for no limit"),
}


def loaded(flags: dict[str, str] | None = None, /, **environ: str) -> Config:
    """
    Read settings on top of the required ones.
    """
    return Config.load(flags or {}, {**MINIMUM, **environ})


def pair_for(name: str, environ: dict[str, str]) -> dict[str, str]:
    """
    Add the other half where a setting needs one.
    """
    other = {"ssl-key": "PROXY_SSL_CERTIFICATE", "ssl-certificate": "PROXY_SSL_KEY"}.get(name)
    region = {"AWS_REGION": "eu-west-1"} if name == "ecr-endpoint" else {}
    tls = {"PROXY_SSL_KEY": "/k", "PROXY_SSL_CERTIFICATE": "/c"} if name == "client-ca" else {}
    plain = {"PROXY_ECR_ENDPOINT": "http://moto:5000"} if name == "region" else {}
    return {**MINIMUM, **({other: "/x"} if other else {}), **region, **plain, **tls, **environ}


def value_of(config: Config, name: str) -> Any:
    """
    Return a setting by its flag; for a pattern, an example of what it matches.
    """
    value = getattr(config, name.replace("-", "_"))
    if name == "namespace-pattern":
        return next((text for text in ("one/x", "two/x") if value.fullmatch(text)), None)
    return value


class SettingsTests(SynchronousTestCase):
    """
    Every setting is a variable and a flag.
    """

    def problem(self, flags: dict[str, str], environ: dict[str, str]) -> str:
        """
        Return the one line of the error.
        """
        text = str(self.assertRaises(ConfigError, Config.load, flags, environ))
        self.assertEqual(1, len(text.splitlines()), text)
        return text

    def test_an_endpoint_is_all_that_is_needed(self) -> None:
        """
        Everything else has its documented default.
        """
        config = loaded()
        self.assertEqual(
            (ECR, "eu-west-1", False, 68_719_476_736, "/home/me/.cache/ecr-proxy", (("8.8.8.8", 53),), 5000, 0.0),
            (
                config.ecr_endpoint,
                config.region,
                config.instance_auth,
                config.cache_limit,
                config.cache_dir,
                config.dns_resolver,
                config.port,
                config.tag_ttl,
            ),
        )
        self.assertEqual(
            (1, True, 4, 64),
            (config.worker_processes, config.read_ahead, config.blob_connections, config.bucket_connections),
        )
        self.assertEqual((128, Quotas(2000, 1000, 3000, 100)), (config.ecr_connections, config.ecr_quotas))
        self.assertEqual((3, 10.0), (config.upstream_tries, config.upstream_seconds))
        self.assertEqual((None, None, []), (config.ssl_key, config.ssl_certificate, config.listen))
        self.assertEqual((None, None, None), (config.client_ca, config.htpasswd, config.allow_from))
        self.assertEqual(CacheKey(("", "uri", "")), config.cache_key)
        self.assertTrue(config.namespace_pattern.fullmatch("any/name-at_all"))

    def test_the_table_has_the_documented_flags_and_variables(self) -> None:
        self.assertEqual(
            {name: variable for name, (variable, *_) in EXAMPLES.items()},
            {setting.name: setting.variable for setting in SETTINGS},
        )

    def test_automatic_workers_are_one_a_core(self) -> None:
        """
        auto starts as many workers as there are processors that this process may use.
        """
        self.patch(values, "usable_cores", lambda: 3)
        self.assertEqual(3, loaded(PROXY_WORKER_PROCESSES="auto").worker_processes)

    def test_limits_are_shared_among_workers(self) -> None:
        """
        Each worker has its share of the totals; times and the size of a request are the same for all.
        """
        alone = loaded(PROXY_WORKER_PROCESSES="3", PROXY_CONNECTIONS="100", PROXY_TRANSFERS="0")
        config, limits = alone.share(), alone.limits()
        self.assertEqual(64, alone.bucket_connections)
        self.assertEqual((42, 21, 0), (limits.connections, limits.connections_per_address, limits.transfers))
        crowded = loaded(PROXY_WORKER_PROCESSES="3", PROXY_CONNECTIONS="0").limits()
        self.assertEqual((0, 1000), (crowded.connections, crowded.connections_per_address))
        self.assertEqual((4, 27, 54), (config.blob_connections, config.bucket_connections, config.ecr_connections))
        self.assertEqual(Quotas(2000 / 3, 1000 / 3, 1000, 100 / 3), config.ecr_quotas)
        self.assertEqual(alone.cache_limit, config.cache_limit)
        self.assertEqual((10.0, 65.0, 300.0), (limits.header_seconds, limits.idle_seconds, limits.send_seconds))
        self.assertEqual((16384, 100), (limits.header_bytes, limits.header_count))

    def test_one_address_may_have_its_whole_limit_of_any_worker(self) -> None:
        """
        A cluster behind NAT is not rejected because one worker accepts most of its connections; nor does it fill a
        worker.
        """
        shares = [
            loaded(PROXY_WORKER_PROCESSES=count).limits().connections_per_address for count in ("1", "2", "4", "8")
        ]
        self.assertEqual([1000, 1000, 1000, 781], shares)

    def test_one_address_has_half_of_what_there_is_unless_the_operator_says_more(self) -> None:
        """
        However few descriptors there are; behind NAT, where one address stands for all, the setting counts.
        """
        self.assertEqual([1000, 322, 1], [loaded().limits(room).connections_per_address for room in (10_000, 645, 1)])
        chosen = loaded(PROXY_CONNECTIONS_PER_ADDRESS="1000").limits(645)
        self.assertEqual((645, 1000), (chosen.connections, chosen.connections_per_address))
        self.assertEqual(645, loaded(PROXY_CONNECTIONS="0").limits(645).connections)

    def test_each_variable_is_read(self) -> None:
        """
        Every setting reads its variable.
        """
        for name, (variable, text, value, _, _) in EXAMPLES.items():
            self.assertEqual(value, value_of(Config.load({}, pair_for(name, {variable: text})), name), name)

    def test_a_flag_wins_over_its_variable(self) -> None:
        for name, (variable, text, _, flag, value) in EXAMPLES.items():
            config = Config.load({name: flag}, pair_for(name, {variable: text}))
            self.assertEqual(value, value_of(config, name), name)

    def test_a_flag_hides_a_wrong_variable(self) -> None:
        """
        An unused variable can't be wrong.
        """
        self.assertEqual(80, loaded({"port": "80"}, PROXY_PORT="http").port)

    def test_an_empty_variable_is_none(self) -> None:
        """
        Compose files and units that pass on an unset variable change nothing.
        """
        names = [setting.variable for setting in SETTINGS if setting.name != "ecr-endpoint"]
        names += ["AWS_DEFAULT_REGION", "CACHE_DIRECTORY", "XDG_CACHE_HOME"]
        empty, plain = loaded(**dict.fromkeys(names, "")), loaded()
        self.assertEqual(
            {setting.name: value_of(plain, setting.name) for setting in SETTINGS},
            {setting.name: value_of(empty, setting.name) for setting in SETTINGS},
        )
        self.assertIn("PROXY_ECR_ENDPOINT is not set", self.problem({}, {"PROXY_ECR_ENDPOINT": ""}))

    def test_a_wrong_value_is_told_with_its_variable_and_what_would_be_right(self) -> None:
        """
        The line names the variable and the value, and gives valid ones.
        """
        for name, (texts, right) in WRONG.items():
            variable = EXAMPLES[name][0]
            for text in texts:
                line = self.problem({}, {**MINIMUM, variable: text})
                self.assertTrue(line.startswith(f"{variable}={text!r}: "), line)
                self.assertIn(right, line)

    def test_a_wrong_value_of_a_flag_is_told_with_the_flag(self) -> None:
        """
        Not with the variable.
        """
        for name, (texts, right) in WRONG.items():
            for text in (*texts, *([""] if name != "listen" else [])):
                line = self.problem({name: text}, MINIMUM)
                self.assertTrue(line.startswith(f"--{name}={text!r}: "), line)
                self.assertIn(right if text else ":", line)

    def test_an_empty_flag_for_a_file_is_wrong(self) -> None:
        """
        An empty path names no file.
        """
        for name in ("cache-dir", "ssl-key", "ssl-certificate"):
            self.assertIn(f"--{name}='': ", self.problem({name: ""}, MINIMUM))

    def test_a_long_wrong_value_is_shortened(self) -> None:
        """
        A whole file pasted into a variable does not fill the screen.
        """
        self.assertLess(len(self.problem({}, {**MINIMUM, "PROXY_PORT": "x" * 100_000})), 400)

    def test_the_endpoint_is_required(self) -> None:
        self.assertIn("PROXY_ECR_ENDPOINT is not set", self.problem({}, {}))

    def test_a_key_without_certificate_is_refused(self) -> None:
        """
        TLS needs both; one alone does not mean plain HTTP.
        """
        line = self.problem({"ssl-key": "/k.pem"}, MINIMUM)
        self.assertIn("PROXY_SSL_CERTIFICATE is not set", line)
        line = self.problem({}, {**MINIMUM, "PROXY_SSL_CERTIFICATE": "/c.pem"})
        self.assertIn("PROXY_SSL_KEY is not set", line)

    def test_what_is_in_a_file_is_not_taken_for_its_path_and_not_shown(self) -> None:
        for name, text in (
            ("ssl-key", "-----BEGIN PRIVATE KEY-----\nsecret"),
            ("htpasswd", "ann:$2y$10$secret"),
            ("htpasswd", "ann:$apr1$secret"),
            ("htpasswd", "ann:secret"),
        ):
            line = self.problem({}, {**MINIMUM, EXAMPLES[name][0]: text})
            self.assertTrue(line.startswith(f"{EXAMPLES[name][0]}: give the path"), line)
            self.assertNotIn("secret", line)

    def test_a_password_in_the_endpoint_is_refused_and_not_shown(self) -> None:
        line = self.problem({}, {"PROXY_ECR_ENDPOINT": "https://AWS:secret@registry.test"})
        self.assertIn("PROXY_ECR_ENDPOINT: holds a name or password", line)
        self.assertNotIn("secret", line)

    def test_a_password_in_the_collectors_url_is_not_shown(self) -> None:
        for url in ("http://user:secret@collector:4318", "http://user:secret@[::1", "user:secret@collector"):
            line = self.problem({}, {**MINIMUM, "PROXY_OTLP_ENDPOINT": url})
            self.assertIn("PROXY_OTLP_ENDPOINT: holds a name or password", line)
            self.assertNotIn("secret", line)

    def test_a_tilde_is_not_taken_for_a_directory(self) -> None:
        self.assertIn("give the full path", self.problem({"cache-dir": "~/cache"}, MINIMUM))

    def test_a_port_that_kubernetes_set_for_a_service_is_not_read(self) -> None:
        self.assertEqual(5000, loaded(PROXY_PORT="tcp://10.0.0.1:5000").port)
        self.assertEqual(80, loaded({"port": "80"}, PROXY_PORT="tcp://10.0.0.1:5000").port)
        self.assertIn("not a port", self.problem({}, {**MINIMUM, "PROXY_PORT": "http://10.0.0.1:5000"}))

    def test_a_configuration_does_not_change(self) -> None:
        """
        What was checked at the start holds until the end.
        """
        self.assertRaises(AttributeError, setattr, loaded(), "port", 1)


class RegionTests(SynchronousTestCase):
    """
    The region comes from its variables, or from the registry's host name.
    """

    def test_the_region_has_three_sources_in_order(self) -> None:
        """
        The flag, AWS_REGION, AWS_DEFAULT_REGION, the host name.
        """
        plain = "http://moto:5000"
        both = {"AWS_REGION": "eu-west-2", "AWS_DEFAULT_REGION": "eu-west-3", "PROXY_ECR_ENDPOINT": plain}
        self.assertEqual("eu-west-1", loaded().region)
        self.assertEqual("eu-west-2", loaded(**both).region)
        self.assertEqual("eu-west-3", loaded(**{**both, "AWS_REGION": ""}).region)
        self.assertEqual("us-east-1", loaded({"region": "us-east-1"}, **both).region)

    def test_no_region_at_all_is_an_error(self) -> None:
        """
        The error asks for AWS_REGION.
        """
        problem = self.assertRaises(ConfigError, loaded, None, PROXY_ECR_ENDPOINT="ecr.internal")
        self.assertIn("AWS_REGION is not set", str(problem))

    def test_a_region_other_than_the_registrys_is_an_error(self) -> None:
        """
        A token of one region is useless at a registry of another, so this is reported at once, with both.
        """
        for variable in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            problem = str(self.assertRaises(ConfigError, loaded, None, **{variable: "us-east-1"}))
            self.assertTrue(problem.startswith(f"{variable}='us-east-1'"), problem)
            self.assertIn("give eu-west-1", problem)
        self.assertIn("--region=", str(self.assertRaises(ConfigError, loaded, {"region": "us-east-1"})))

    def test_a_wrong_default_region_is_told_by_its_own_name(self) -> None:
        """
        The message names the variable that was set.
        """
        problem = self.assertRaises(ConfigError, loaded, None, AWS_DEFAULT_REGION="Dublin")
        self.assertTrue(str(problem).startswith("AWS_DEFAULT_REGION='Dublin': "))


class CacheDirectoryTests(SynchronousTestCase):
    """
    The cache directory comes from the setting, the service's unit or the user's home.
    """

    def test_the_unit_comes_before_the_home(self) -> None:
        """
        systemd's CACHE_DIRECTORY is used if nothing is set, and the first of several.
        """
        self.assertEqual("/var/cache/e", loaded(CACHE_DIRECTORY="/var/cache/e").cache_dir)
        self.assertEqual("/var/cache/e", loaded(CACHE_DIRECTORY="/var/cache/e:/var/cache/f").cache_dir)
        self.assertEqual("/own", loaded(CACHE_DIRECTORY="/var/cache/e", PROXY_CACHE_DIR="/own").cache_dir)

    def test_the_users_cache_is_the_last_resort(self) -> None:
        """
        XDG_CACHE_HOME overrides the home directory; without either there is still a default.
        """
        self.assertEqual("/xdg/ecr-proxy", loaded(XDG_CACHE_HOME="/xdg").cache_dir)
        self.assertEqual("/.cache/ecr-proxy", Config.load({}, {"PROXY_ECR_ENDPOINT": ECR}).cache_dir)
