"""
Settings that contradict each other, or are probably unintended: errors that prevent the start, and warnings.
"""

from __future__ import annotations

from collections.abc import Mapping

import botocore.session
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.settings.complaints import Complaint
from ecrproxy.settings.config import Config, given
from ecrproxy.settings.contradictions import Machine, load, look_at_environment, look_at_log, look_at_settings
from ecrproxy.settings.endpoints import REGIONS
from ecrproxy.settings.file import parse_file
from ecrproxy.settings.table import SETTINGS, ConfigError

ENDPOINT = {"PROXY_ECR_ENDPOINT": "https://123456789012.dkr.ecr.eu-west-1.amazonaws.com"}
ONE, TWO = "123456789012.dkr.ecr.eu-west-1.amazonaws.com", "444455556666.dkr.ecr.us-east-1.amazonaws.com"
TLS = {"PROXY_SSL_KEY": "/k", "PROXY_SSL_CERTIFICATE": "/c"}
GIB = 2**30


class LookCase(SynchronousTestCase):
    def look(
        self, environ: Mapping[str, str], flags: Mapping[str, str] | None = None, disk: int | None = None
    ) -> list[Complaint]:
        flags = {name.replace("_", "-"): value for name, value in (flags or {}).items()}
        all_of_it = {**ENDPOINT, **environ}
        return look_at_settings(Config.load(flags, all_of_it), given(flags, all_of_it), all_of_it, Machine(2, disk))

    def assert_refused(self, words: str, environ: Mapping[str, str]) -> None:
        """
        Assert that the result is exactly one error.
        """
        grave = [str(each) for each in self.look(environ) if each.grave]
        self.assertEqual(1, len(grave), (environ, grave))
        self.assertIn(words, grave[0])

    def assert_warned(self, words: str, environ: Mapping[str, str], **flags: str) -> None:
        """
        Assert that the result is exactly one warning.
        """
        (found,) = self.look(environ, flags)
        self.assertIn(words, str(found))
        self.assertFalse(found.grave, found)

    def assert_well(self, environ: Mapping[str, str], **flags: str) -> None:
        self.assertEqual([], [str(each) for each in self.look(environ, flags)])


class TableTests(LookCase):
    def test_tables_that_have_other_credentials_than_instances_are_told(self) -> None:
        """
        An operator who sets AWS_INSTANCE_AUTH wants no other credentials.
        """
        environ = {"AWS_INSTANCE_AUTH": "true"}
        tables = f'[registry."{ONE}"]\ndefault = true\n[registry."{TWO}"]\ninstance-auth = true\n[registry."quay.io"]\n'
        for text, names in ((tables, [ONE]), (tables.replace("default = true", "default = true\nprofile = 'a'"), [])):
            filed = parse_file("x.toml", text.encode())
            config = Config.load({}, environ, filed)
            found = look_at_settings(config, given({}, environ, filed), environ, Machine(2))
            self.assertEqual(
                [f"AWS_INSTANCE_AUTH is not used for {each}: tables have their own credentials" for each in names],
                [str(each).partition(";")[0] for each in found],
            )


class LostProtectionTests(LookCase):
    def test_key_and_certificate_that_a_plain_endpoint_does_not_use_are_refused(self) -> None:
        for listen in (
            "tcp:5000",
            "tcp6:5000",
            "TCP6:5000",
            "haproxy:tcp:5000",
            "ssl:5443 tcp:5000",
            "tcp:1:interface=10.0.0.1",
        ):
            self.assert_refused("it serves plain HTTP", {**TLS, "PROXY_LISTEN": listen})

    def test_key_and_certificate_that_are_not_missed_are_warned_of(self) -> None:
        local = ("ssl:5443:privateKey=/k", "unix:/x", "tcp:5000:interface=127.0.0.1", r"tcp6:5:interface=\:\:1")
        for listen in (*local, "systemd:domain=INET6:name=x tcp:5000"):
            self.assert_warned("PROXY_SSL_KEY", {**TLS, "PROXY_LISTEN": listen})

    def test_key_and_certificate_that_are_used_are_well(self) -> None:
        self.assert_well(TLS)
        for listen in ("systemd:domain=INET6:name=x", "haproxy:systemd:domain=INET:index=0"):
            self.assert_well({**TLS, "PROXY_LISTEN": listen, "PROXY_WORKER_PROCESSES": "2"})
        self.assert_well({"PROXY_LISTEN": "tcp:5000 unix:/x haproxy:tcp:5003 ssl:5443:privateKey=/k"})

    def test_client_certificates_need_our_own_tls(self) -> None:
        words = "without PROXY_LISTEN"
        self.assert_refused(words, {"PROXY_CLIENT_CA": "/ca.pem"})
        for listen in ("ssl:5443", "unix:/x"):
            self.assert_refused(words, {**TLS, "PROXY_CLIENT_CA": "/ca.pem", "PROXY_LISTEN": listen})
        self.assert_well({**TLS, "PROXY_CLIENT_CA": "/ca.pem"})
        self.assert_well({**TLS, "PROXY_CLIENT_CA": "/ca.pem", "PROXY_LISTEN": "systemd:domain=INET6:name=x"})

    def test_an_admin_port_on_every_network_is_refused_unless_they_are_named(self) -> None:
        for listen, meant in (
            ("tcp:5001", "tcp:5001:interface=127.0.0.1"),
            ("ssl:5001:privateKey=/k", "interface=127.0.0.1"),
            ("tcp6:5001", r"tcp6:5001:interface=\:\:1"),
            ("TCP6:5001", r"TCP6:5001:interface=\:\:1"),
            ("tls:/pems:5001", r"tls:/pems:5001:interface=\:\:1"),
        ):
            self.assert_refused(meant, {"PROXY_ADMIN_LISTEN": listen})
        for listen in ("tcp:5001:interface=0.0.0.0", r"tcp6:5001:interface=\:\:", "tcp:5001:interface=10.0.0.5"):
            self.assert_warned("can be reached from other machines", {"PROXY_ADMIN_LISTEN": listen})
        for listen in (
            "off",
            "unix:/x",
            "tcp:5001:localhost",
            "tcp:5001:interface=localhost",
            r"tcp6:5001:interface=\:\:1",
        ):
            self.assert_well({"PROXY_ADMIN_LISTEN": listen})


class ExposedTests(LookCase):
    def test_passwords_without_tls_are_warned_of_beyond_this_machine(self) -> None:
        words, htpasswd = "passwords are sent unencrypted", {"PROXY_HTPASSWD": "/users"}
        self.assert_warned(words, htpasswd)
        for listen in ("tcp:5000", "ssl:5443:privateKey=/k tcp:5000", "systemd:domain=INET6:name=x"):
            self.assert_warned(words, {**htpasswd, "PROXY_LISTEN": listen})
        for listen in ("tcp:5000:interface=127.0.0.1", "ssl:5443:privateKey=/k", "unix:/x", "haproxy:tcp:5000"):
            self.assert_well({**htpasswd, "PROXY_LISTEN": listen})
        self.assert_well({**htpasswd, **TLS})
        self.assert_well({**htpasswd, **TLS, "PROXY_LISTEN": "systemd:domain=INET6:name=x"})
        self.assert_well({**htpasswd, "PROXY_LISTEN": "systemd:domain=UNIX:name=x"})

    def test_networks_that_keep_nobody_out_or_everybody_are_warned_of(self) -> None:
        for networks in ("0.0.0.0/0", "10.0.0.0/8 ::/0"):
            self.assert_warned("refuses no client", {"PROXY_ALLOW_FROM": networks})
        allowed = {"PROXY_ALLOW_FROM": "10.0.0.0/8"}
        for listen in ("unix:/x", "systemd:domain=UNIX:index=0"):
            self.assert_warned("refuses all clients", {**allowed, "PROXY_LISTEN": listen})
        for listen in ("haproxy:tcp:5000", "HAProxy:tcp:5000", "haproxy:systemd:domain=INET:index=0"):
            self.assert_warned("trusts the addresses in PROXY headers", {**allowed, "PROXY_LISTEN": listen})
        for listen in (
            "tcp:5000 haproxy:tcp:5003:interface=127.0.0.1",
            "haproxy:unix:/x",
            "haproxy:tcp:5000:127.0.0.1",
        ):
            self.assert_well({**allowed, "PROXY_LISTEN": listen})

    def test_a_token_without_tls_is_warned_of_beyond_this_machine(self) -> None:
        region = {"AWS_REGION": "eu-west-1"}
        self.assert_warned("token is sent unencrypted", {**region, "PROXY_ECR_ENDPOINT": "http://registry.test"})
        self.assert_well({**region, "PROXY_ECR_ENDPOINT": "http://127.0.0.1:5000"})


class OnePortTests(LookCase):
    """
    The daemon's own sockets: for clients, for administration and for metrics.
    """

    def test_two_sockets_at_one_port_are_refused(self) -> None:
        """
        The system would only say that the port is in use.
        """
        here = "tcp:6000:interface=127.0.0.1"
        for words, environ in (
            ("PROXY_METRICS_LISTEN=tcp:5000 is already used by PROXY_PORT=5000", {"PROXY_METRICS_LISTEN": "tcp:5000"}),
            ("PROXY_METRICS_LISTEN=tcp6:7000", {"PROXY_METRICS_LISTEN": "tcp6:7000", "PROXY_PORT": "7000"}),
            (f"{here} is already used by PROXY_PORT=6000", {"PROXY_ADMIN_LISTEN": here, "PROXY_PORT": "6000"}),
            ("by PROXY_METRICS_LISTEN=tcp:6000", {"PROXY_ADMIN_LISTEN": here, "PROXY_METRICS_LISTEN": "tcp:6000"}),
            ("by PROXY_LISTEN=haproxy:tcp:6000", {"PROXY_ADMIN_LISTEN": here, "PROXY_LISTEN": "haproxy:tcp:6000"}),
            ("PROXY_LISTEN=tcp:5000 is already used by PROXY_LISTEN=tcp:5000", {"PROXY_LISTEN": "tcp:5000 tcp:5000"}),
        ):
            self.assert_refused(words, environ)

    def test_what_takes_the_port_of_an_operator_who_has_said_nothing_is_told(self) -> None:
        """
        The daemon runs without the admin port, as if another program had its port.
        """
        for environ in ({"PROXY_METRICS_LISTEN": "tcp:5001"}, {"PROXY_PORT": "5001"}):
            self.assert_warned("starts without the admin port", environ)

    def test_sockets_that_do_not_meet_are_well(self) -> None:
        for environ in (
            {"PROXY_METRICS_LISTEN": "tcp:5001:interface=192.0.2.1"},
            {"PROXY_METRICS_LISTEN": "tcp:5001", "PROXY_ADMIN_LISTEN": "off"},
            {"PROXY_METRICS_LISTEN": "tcp:0", "PROXY_ADMIN_LISTEN": "tcp:0:interface=127.0.0.1"},
            {"PROXY_LISTEN": "tcp:5000 tcp6:5000", "PROXY_METRICS_LISTEN": "unix:/run/metrics"},
            {"PROXY_METRICS_LISTEN": "tcp:5001:interface=node.example"},
        ):
            self.assert_well(environ)


class LogTests(SynchronousTestCase):
    """
    Twistd's flags with worker processes, whose log goes to standard output.
    """

    def find(self, twistd: Mapping[str, object], processes: str = "2") -> list[Complaint]:
        environ = {"PROXY_ECR_ENDPOINT": "https://123456789012.dkr.ecr.eu-west-1.amazonaws.com"}
        return look_at_log(Config.load({"worker-processes": processes}, environ), twistd)

    def test_a_daemon_whose_standard_output_is_closed_is_refused(self) -> None:
        (found,) = self.find({"nodaemon": 0, "logfile": "/var/log/proxy.log"})
        self.assertTrue(found.grave)
        self.assertEqual([], self.find({"nodaemon": 0}, "1"))

    def test_a_log_elsewhere_is_warned_of(self) -> None:
        for flag, value in (("logfile", "x"), ("syslog", 1), ("logger", "ours.log")):
            (found,) = self.find({"nodaemon": 1, flag: value})
            self.assertEqual((False, True), (found.grave, f"--{flag}" in found.said))
        own = {"nodaemon": 1, "syslog": 0, "logfile": None, "logger": None}  # the default of twistd -n
        for twistd in (own, {**own, "logfile": "-"}, {}):
            self.assertEqual([], self.find(twistd))


class IgnoredTests(LookCase):
    def test_a_port_beside_endpoints_is_warned_of_by_the_names_they_were_given_by(self) -> None:
        self.assert_warned(
            "PROXY_PORT is not used, because PROXY_LISTEN", {"PROXY_PORT": "1", "PROXY_LISTEN": "tcp:5000"}
        )
        self.assert_warned("--port is not used, because PROXY_LISTEN", {"PROXY_LISTEN": "tcp:5000"}, port="1")
        self.assert_warned("PROXY_PORT is not used, because --listen", {"PROXY_PORT": "1"}, listen="tcp:5000")

    def test_names_of_an_admin_port_that_is_off_are_warned_of(self) -> None:
        names = {"PROXY_ADMIN_HOSTS": "a.example"}
        self.assert_warned("PROXY_ADMIN_HOSTS is not used", {**names, "PROXY_ADMIN_LISTEN": "off"})
        self.assert_well(names)

    def test_credentials_that_others_hide_are_warned_of_and_not_shown(self) -> None:
        keys = {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_PROFILE": "p"}
        self.assert_warned("AWS_PROFILE's credentials are not used", keys)
        said = " ".join(map(str, self.look({**keys, "AWS_INSTANCE_AUTH": "true"})))
        for name in keys:
            self.assertIn(f"{name} is not used, because AWS_INSTANCE_AUTH", said)
        self.assertNotIn("AKIA", said)

    def test_limits_that_others_make_pointless_are_warned_of_where_they_were_given(self) -> None:
        self.assert_warned("PROXY_BUCKET_CONNECTIONS=2", {"PROXY_BUCKET_CONNECTIONS": "2"}, blob_connections="4")
        few = {"PROXY_CONNECTIONS": "10"}
        self.assert_warned("--transfers is more", few, transfers="11")
        self.assert_warned("PROXY_CONNECTIONS_PER_ADDRESS", {**few, "PROXY_CONNECTIONS_PER_ADDRESS": "11"})
        self.assert_warned("no time", {"PROXY_UPSTREAM_SECONDS": "0", "PROXY_UPSTREAM_TRIES": "2"})
        self.assert_warned("there are no retries", {"PROXY_UPSTREAM_SECONDS": "5", "PROXY_UPSTREAM_TRIES": "1"})
        self.assert_warned("on 2 cores", {"PROXY_WORKER_PROCESSES": "8"})
        self.assert_well({**few, "PROXY_UPSTREAM_SECONDS": "0", "PROXY_BUCKET_CONNECTIONS": "2"})


class DoubtfulValueTests(LookCase):
    def test_patterns_that_match_other_names_than_meant_are_warned_of(self) -> None:
        for pattern, words in (
            ("team/*", "looks like a glob"),
            ("team-*", "looks like a glob"),
            ("Team/.*", "capital letters"),
            ("team/", "the whole name"),
            ("^team/", "the whole name"),
            ("/team/.*", "the whole name"),
            ("team/a,team/b", "separated by |"),
            ('"team/.*"', "no repository's name has"),
            ("team/app:latest", "no repository's name has"),
            (r"123456789012\.dkr\.ecr\.eu-west-1\.amazonaws\.com/team/.*", "no part of a repository's name"),
        ):
            self.assert_warned(words, {"PROXY_NAMESPACE_PATTERN": pattern})
        for pattern in (r"team/.*", r"a|b", r"(?i)Team/\w+", r"[a-z]*/(?:x|y){1,2}", r"(?!secret)[^/A-Z]+", r"\d*\/x"):
            self.assert_well({"PROXY_NAMESPACE_PATTERN": pattern})

    def test_a_limit_that_disk_or_images_do_not_fit_is_warned_of(self) -> None:
        (found,) = self.look({"PROXY_CACHE_LIMIT": "64g"}, disk=60 * GIB)
        self.assertIn("the whole file system", str(found))
        self.assertEqual([], self.look({"PROXY_CACHE_LIMIT": "64g"}, disk=64 * GIB))
        self.assert_warned("larger layers", {"PROXY_CACHE_LIMIT": "64m"})

    def test_a_region_that_is_not_known_is_warned_of(self) -> None:
        plain = {"PROXY_ECR_ENDPOINT": "https://registry.test"}
        self.assert_warned("eu-wset-1", {**plain, "AWS_REGION": "eu-wset-1"})
        self.assert_well({**plain, "AWS_REGION": "eusc-de-east-1"})

    def test_another_registry_as_an_alias_is_warned_of(self) -> None:
        self.assert_warned("docker.io: requests for that registry", {"PROXY_REGISTRY_ALIASES": "docker.io"})
        self.assert_well({"PROXY_REGISTRY_ALIASES": "registry.example"})

    def test_a_registry_without_a_dot_is_warned_of(self) -> None:
        self.assert_warned("without a dot", {"PROXY_ECR_ENDPOINT": "https://team", "AWS_REGION": "eu-west-1"})
        self.assert_well({"PROXY_ECR_ENDPOINT": "http://localhost:5000", "AWS_REGION": "eu-west-1"})

    def test_only_regions_that_aws_has_are_known(self) -> None:
        data = botocore.session.Session().get_component("data_loader").load_data("partitions")
        there = {region for partition in data["partitions"] for region in partition["regions"]}
        self.assertEqual(set(), REGIONS - there)

    def test_a_registry_whose_name_only_resembles_ecrs_is_warned_of(self) -> None:
        for end in ("amazonaws.co", "amazonaws.com.evil.example"):
            endpoint = f"https://123456789012.dkr.ecr.eu-west-1.{end}"
            self.assert_warned("its end is none of AWS's", {"PROXY_ECR_ENDPOINT": endpoint})
        for host in (
            "vpce-1.dkr.ecr.eu-west-1.vpce.amazonaws.com",
            "1.dkr.ecr.us-iso-east-1.c2s.ic.gov",
            "ecr.internal",
        ):
            self.assert_well({"PROXY_ECR_ENDPOINT": f"https://{host}", "AWS_REGION": "eu-west-1"})

    def test_tags_that_live_for_more_than_a_day_are_warned_of(self) -> None:
        self.assert_warned("out of date", {"PROXY_TAG_TTL": "86401"})


class MisspeltTests(LookCase):
    def test_a_variable_that_resembles_a_setting_is_refused_with_a_suggestion(self) -> None:
        for wrong, right in {
            "PROXY_NAMESPACE_PATERN": "PROXY_NAMESPACE_PATTERN",
            "PROXY_NAMESPACES": "PROXY_NAMESPACE_PATTERN",
            "PROXY_NAMESPACE_REGEX": "PROXY_NAMESPACE_PATTERN",
            "PROXY_ALLOWED_FROM": "PROXY_ALLOW_FROM",
            "PROXY_ALLOW": "PROXY_ALLOW_FROM",
            "PROXY_HTPASSWD_FILE": "PROXY_HTPASSWD",
            "PROXY_ALLOWED_NETWORKS": "PROXY_ALLOW_FROM",
            "PROXY_BASIC_AUTH": "PROXY_HTPASSWD",
            "PROXY_USERS_FILE": "PROXY_HTPASSWD",
            "PROXY_TLS_KEY": "PROXY_SSL_KEY",
            "PROXY_TLS_CERT": "PROXY_SSL_CERTIFICATE",
            "PROXY_CLIENT_CA_FILE": "PROXY_CLIENT_CA",
            "PROXY_CACHE_SIZE": "PROXY_CACHE_",
            "proxy_namespace_pattern": "PROXY_NAMESPACE_PATTERN",
        }.items():
            self.assert_refused(f"{wrong} is not a setting; set {right}", {wrong: "x"})

    def test_another_variable_with_our_prefix_is_warned_of(self) -> None:
        for name in ("PROXY_HOST", "PROXY_USER", "PROXY_URL", "PROXY_CONNECT_TIMEOUT", "PROXY_DEBUG"):
            self.assert_warned(f"{name} is not a setting, and is not read", {name: "x"})

    def test_a_setting_without_its_prefix_is_warned_of(self) -> None:
        self.assert_warned("AWS_INSTANCE_AUTH", {"AWS_INSTANCE_AUHT": "true"})
        self.assert_warned("PROXY_NAMESPACE_PATTERN", {"ROXY_NAMESPACE_PATTERN": "a"})

    def test_our_own_variables_empty_ones_and_those_of_others_are_well(self) -> None:
        others = {"PROXY_NAMESPACE_PATERN": "", "HTTP_PROXY": "http://proxy", "AWS_DEFAULT_REGION": "eu-west-1"}
        self.assertEqual([], look_at_environment({each.variable: "x" for each in SETTINGS}))
        self.assert_well({**others, "ECRPROXY_WORKER": "", "HOME": "/root", "ECR_PROXY_PASSWORD": "x"})

    def test_a_missing_endpoint_is_told_with_the_name_it_was_given_by(self) -> None:
        problem = self.assertRaises(ConfigError, load, {}, {"PROXY_ECR_ENDPONT": "https://registry.test"})
        self.assertIn("PROXY_ECR_ENDPOINT is not set", str(problem))
        self.assertIn("PROXY_ECR_ENDPONT is not a setting", str(problem))


class ServiceLinkTests(LookCase):
    LINKS = {  # noqa: RUF012
        "PROXY_SERVICE_HOST": "10.0.0.1",
        "PROXY_SERVICE_PORT": "5000",
        "PROXY_SERVICE_PORT_REGISTRY": "5000",
        "PROXY_PORT": "tcp://10.0.0.1:5000",
        "PROXY_PORT_5000_TCP": "tcp://10.0.0.1:5000",
        "PROXY_PORT_5000_TCP_PROTO": "tcp",
        "PROXY_PORT_5000_TCP_PORT": "5000",
        "PROXY_PORT_5000_TCP_ADDR": "10.0.0.1",
    }

    def test_what_kubernetes_sets_for_a_service_named_proxy_is_explained_once(self) -> None:
        self.assert_warned("PROXY_PORT and 7 more are not read: Kubernetes sets them for a Service named", self.LINKS)
        self.assert_warned("enableServiceLinks: false", {"PROXY_PORT": "tcp://10.0.0.1:5000"})

    def test_services_whose_names_are_longer_are_recognized_too(self) -> None:
        links = {name.replace("PROXY_", "PROXY_CACHE_", 1): value for name, value in self.LINKS.items()}
        self.assert_warned("named proxy-cache", links)

    def test_services_of_other_names_are_no_matter(self) -> None:
        self.assert_well({f"ECR_{name}": value for name, value in self.LINKS.items()})

    def test_a_port_that_is_set_beside_them_counts(self) -> None:
        self.assert_warned("PROXY_SERVICE_HOST and 6 more", {**self.LINKS, "PROXY_PORT": "80"})
