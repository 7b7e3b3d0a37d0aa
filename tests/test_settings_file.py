"""
The configuration file, and C{ecr-proxy config}.
"""

from __future__ import annotations

import errno
import os
import tomllib
from dataclasses import replace
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.registry.quotas import Quotas
from ecrproxy.settings.config import NO_FILE, Config
from ecrproxy.settings.file import LIMIT, for_worker, parse_file, read_file
from ecrproxy.settings.registries import parse_registries
from ecrproxy.settings.table import CONFIG, SETTINGS, ConfigError
from ecrproxy.upstream_wiring import quotas_of
from tests.caller import Caller
from tests.store_contract import scratch
from tests.test_config import ECR, EXAMPLES, MINIMUM, pair_for, value_of

NAMES = tuple(name for name in EXAMPLES if name != CONFIG)


def parsed(text: str) -> dict[str, str]:
    """
    Return the texts of settings in a file.
    """
    return {name: text for name, (text, _) in parse_file("x.toml", text.encode()).settings.items()}


class FileTests(SynchronousTestCase):
    def problems(self, text: str | bytes) -> tuple[str, ...]:
        data = text.encode() if isinstance(text, str) else text
        problem: ConfigError = self.assertRaises(ConfigError, parse_file, "x.toml", data)
        return problem.errors

    def test_has_any_setting_by_the_name_of_its_flag(self) -> None:
        for name in NAMES:
            variable, text, value, *_ = EXAMPLES[name]
            environ = pair_for(name, {variable: text})
            del environ[variable]
            file = parse_file("x.toml", f"{name} = '''{text}'''".encode())
            self.assertEqual(value, value_of(Config.load({}, environ, file), name), name)

    def test_gives_way_to_variables_and_flags(self) -> None:
        """
        One file serves machines that differ in a setting. An empty variable counts as unset.
        """
        file = parse_file("x.toml", b"port = 1\nconnections = 2\ntransfers = 3")
        config = Config.load({"port": "80"}, {**MINIMUM, "PROXY_CONNECTIONS": "90", "PROXY_TRANSFERS": ""}, file)
        self.assertEqual((80, 90, 3), (config.port, config.connections, config.transfers))

    def test_has_numbers_truths_and_lists(self) -> None:
        text = 'port = 80\ntag-ttl = 0.5\nread-ahead = true\ninstance-auth = false\nlisten = ["tcp:1", "unix:/x"]\n'
        expected = {"port": "80", "tag-ttl": "0.5", "read-ahead": "true", "instance-auth": "false"}
        self.assertEqual({**expected, "listen": "tcp:1 unix:/x"}, parsed(text))

    def test_all_that_is_wrong_is_told_at_once(self) -> None:
        """
        Unknown settings, with a suggestion, and invalid values.
        """
        text = 'cache-limt = 1\nPROXY_PORT = 2\nmoon = 3\nconfig = "y.toml"\nport = {a = 1}\nlisten = ["tcp:1", 2]\n'
        form = "give a text, a number, true, false, or a list of texts"
        self.assertEqual(
            (
                "x.toml: 'cache-limt' is not a setting; set cache-limit if that is meant",
                "x.toml: 'PROXY_PORT' is not a setting; set port if that is meant",
                "x.toml: 'moon' is not a setting; settings are named like the flags of --help",
                "x.toml: 'config' is not a setting; settings are named like the flags of --help",
                f"x.toml: port: {form}",
                f"x.toml: listen: {form}",
            ),
            tuple(sorted(self.problems(text), key=lambda line: "not a setting" not in line)),
        )

    def test_a_wrong_value_is_told_with_its_place(self) -> None:
        file = parse_file("x.toml", b"cache-limit = '64 parsecs'")
        problem = self.assertRaises(ConfigError, Config.load, {}, MINIMUM, file)
        self.assertIn("x.toml: cache-limit='64 parsecs': not a size", str(problem))
        secret = parse_file("x.toml", b"htpasswd = 'ann:$2y$05$secret'")
        problem = self.assertRaises(ConfigError, Config.load, {}, MINIMUM, secret)
        self.assertEqual("x.toml: htpasswd: give the path of a file, not its contents", str(problem))

    def test_what_is_no_toml_is_one_line(self) -> None:
        for data in (b"a b", b"\xff", b"a = " + b"[" * 100_000, b"#" * (LIMIT + 1), b"port = 1\nport = 2"):
            (line,) = self.problems(data)
            self.assertTrue(line.startswith("x.toml: "), line)
            self.assertNotIn("\n", line)
            self.assertLess(len(line), 300)

    def test_one_that_cannot_be_read_is_told_with_what_named_it(self) -> None:
        nowhere, why = "/nowhere/settings.toml", os.strerror(errno.ENOENT)
        for flags, environ, named in (
            ({"config": nowhere}, {}, "--config"),
            ({}, {"PROXY_CONFIG": nowhere}, "PROXY_CONFIG"),
        ):
            problem = self.assertRaises(ConfigError, read_file, flags, environ)
            self.assertEqual(f"{named}={nowhere!r}: can't be read: {why}; give a TOML file", str(problem))
        self.assertEqual(NO_FILE, read_file({}, {}))


class RegistriesTests(SynchronousTestCase):
    ONE, TWO = "111122223333.dkr.ecr.eu-west-1.amazonaws.com", "444455556666.dkr.ecr.us-east-1.amazonaws.com"
    THREE = "777788889999.dkr.ecr.eu-west-1.amazonaws.com"

    def load(self, text: str, **environ: str) -> Config:
        return Config.load({}, {"HOME": "/home/me", **environ}, parse_file("x.toml", text.encode()))

    def test_the_default_comes_first_and_is_what_the_settings_say(self) -> None:
        """
        AWS_REGION, which is set on many machines for other reasons, does not affect a table.
        """
        config = self.load(f'[registry."{self.TWO}"]\n[registry."{self.ONE}"]\ndefault = true', AWS_REGION="us-west-1")
        self.assertEqual([self.ONE, self.TWO], [each.name for each in config.registries])
        self.assertEqual((f"https://{self.ONE}", "eu-west-1"), (config.ecr_endpoint, config.region))

    def test_ecr_public_is_asked_as_often_as_it_takes(self) -> None:
        """
        Of each kind once a second anonymously, ten times with an account; by all processes together.
        """
        for credentials, rate in (("anonymous", 1.0), ("aws", 10.0)):
            for processes in ("1", "2"):
                public = f'[registry."public.ecr.aws"]\ncredentials = "{credentials}"'
                config = self.load(
                    f'[registry."{self.ONE}"]\ndefault = true\n{public}', PROXY_WORKER_PROCESSES=processes
                )
                share = rate / int(processes)
                self.assertEqual(Quotas(share, share, share, share), quotas_of(config, config.registries[1]))

    def test_a_setting_names_the_default_too(self) -> None:
        """
        One of the tables, or another registry.
        """
        text = f'[registry."{self.TWO}"]\ninstance-auth = true'
        for endpoint, names in ((self.ONE, [self.ONE, self.TWO]), (self.TWO, [self.TWO])):
            config = self.load(text, PROXY_ECR_ENDPOINT=endpoint)
            self.assertEqual(names, [each.name for each in config.registries])
            self.assertEqual([True, False][: len(names)], [each.default for each in config.registries])
            self.assertEqual(endpoint == self.TWO, config.instance_auth)
        self.assertEqual([ECR.removeprefix("https://")], [each.name for each in Config.load({}, MINIMUM).registries])

    def test_the_region_of_a_table_counts_where_a_setting_names_its_registry(self) -> None:
        """
        An endpoint without a region in its name needs no AWS_REGION then.
        """
        text = '[registry."ecr.test"]\nregion = "eu-west-1"'
        self.assertEqual("eu-west-1", self.load(text, PROXY_ECR_ENDPOINT="ecr.test").region)

    def test_a_setting_names_several_and_the_first_is_the_default(self) -> None:
        """
        Each is what a table without keys would be, or the table that exists.
        """
        both = f"{self.ONE}\n  https://{self.TWO}"
        one, two = self.load("", PROXY_ECR_ENDPOINT=both, AWS_REGION="eu-west-1").registries
        self.assertEqual(((one, two), []), parse_registries("x", {self.ONE: {"default": True}, self.TWO: {}}))
        text = f'[registry."{self.TWO}"]\npath-prefix = "us"\n[registry."*.dkr.ecr.eu-west-2.amazonaws.com"]'
        config = self.load(text, PROXY_ECR_ENDPOINT=f"{both} {self.ONE}")
        self.assertEqual(
            [self.ONE, self.TWO, "*.dkr.ecr.eu-west-2.amazonaws.com"], [each.name for each in config.registries]
        )
        self.assertEqual([True, False, False], [each.default for each in config.registries])
        self.assertEqual("us", config.registries[1].path_prefix)
        config = self.load(
            "", PROXY_ECR_ENDPOINT="http://a.test:1 http://b.test:1", AWS_REGION="eu-west-1", AWS_INSTANCE_AUTH="1"
        )
        self.assertEqual(
            [("a.test:1", "eu-west-1", True), ("b.test:1", "eu-west-1", True)],
            [(each.name, each.region, each.instance_auth) for each in config.registries],
        )

    def test_are_handed_on_to_workers(self) -> None:
        """
        Workers read no file, which may have changed by then.
        """
        text = f'[registry."{self.TWO}"]\ndefault = true\nhosts = ["a.test"]'
        filed = parse_file("x.toml", text.encode())
        self.assertEqual(filed.registries, read_file({}, for_worker(filed)).registries)
        self.assertEqual(NO_FILE, read_file({}, for_worker(NO_FILE)))

    def test_whatever_a_file_says_has_room_in_the_environment_of_a_worker(self) -> None:
        """
        Linux allows 128 KiB for a variable, including its name and its end. In ASCII, a letter of two bytes takes six.
        """
        for each in ("\u00e9", "\U0001f40b", '"', "\\\\"):
            written = "'" + each * ((LIMIT - 1000) // len(each.encode())) + "'"
            text = f'[registry."{self.TWO}"]\ndefault = true\nprofile = {written}'
            filed = parse_file("x.toml", text.encode())
            variables = for_worker(filed)
            longest = max(len(os.fsencode(f"{name}={value}")) for name, value in variables.items())
            self.assertLess(longest, 2**17)
            self.assertEqual(filed, replace(read_file({}, variables), settings=filed.settings))

    def test_what_contradicts_is_told(self) -> None:
        both, dual = f"{self.ONE} {self.TWO}", self.TWO.replace("dkr.ecr", "dkr-ecr").replace("amazonaws.com", "on.aws")
        named = f"PROXY_ECR_ENDPOINT='https://{self.ONE} https://{self.TWO}': "
        for text, environ, said in (
            (f'[registry."{self.TWO}"]', {}, "is the default; set default = true in that of an ECR registry"),
            (
                f'[registry."{self.TWO}"]\ndefault = true',
                {"PROXY_ECR_ENDPOINT": both},
                f"{named}the file says that {self.TWO} is the default; name it first, or leave one out",
            ),
            (
                f'[registry."{dual}"]',
                {"PROXY_ECR_ENDPOINT": both},
                f"{named}registry: {self.TWO} and {dual} are one registry; leave one out",
            ),
            (
                "",
                {"PROXY_ECR_ENDPOINT": f"{self.TWO} {dual}"},
                f"registry: {self.TWO} and {dual} are one registry; leave one out",
            ),
            (
                f'[registry."{self.THREE}"]\nhosts = ["{self.TWO}"]',
                {"PROXY_ECR_ENDPOINT": both},
                f"{named}registry: {self.TWO} and {self.THREE} both have the host {self.TWO}; leave one out",
            ),
            (
                "",
                {"PROXY_ECR_ENDPOINT": both, "PROXY_REGISTRY_ALIASES": f"a.test {dual}"},
                f"PROXY_REGISTRY_ALIASES has {self.TWO}, which is not the default but a registry of its own; leave one",
            ),
            *(
                (
                    f'registry-aliases = "{alias}"\n{table}',
                    {"PROXY_ECR_ENDPOINT": self.ONE},
                    f"x.toml: registry-aliases has {alias}, which is not the default but {means}; leave one out",
                )
                for alias, table, means in (
                    ("a.test", '[registry."quay.io"]\nhosts = ["a.test"]', "the host of quay.io"),
                    ("a.test", '[registry."quay.io"]\npath-prefix = "a.test"', "the path-prefix of quay.io"),
                    ("a.test", '[registry."b.test"]\nendpoint = "a.test"', "the endpoint of b.test"),
                    (
                        self.TWO,
                        '[registry."*.dkr.ecr.us-east-1.amazonaws.com"]',
                        "an account of *.dkr.ecr.us-east-1.amazonaws.com",
                    ),
                )
            ),
            (
                "",
                {"PROXY_ECR_ENDPOINT": f"{self.ONE} b.test"},
                "AWS_REGION is not set, and PROXY_ECR_ENDPOINT has none",
            ),
            (
                "",
                {"PROXY_ECR_ENDPOINT": both, "AWS_REGION": "us-east-1"},
                "AWS_REGION='us-east-1': PROXY_ECR_ENDPOINT is in eu-west-1",
            ),
            (
                f'[registry."{self.TWO}"]\ndefault = true',
                {"PROXY_ECR_ENDPOINT": self.ONE},
                f"PROXY_ECR_ENDPOINT='https://{self.ONE}': the file says that {self.TWO} is the default; name it first",
            ),
        ):
            problem = self.assertRaises(ConfigError, self.load, text, **environ)
            self.assertIn(said, str(problem))


class CommandTests(SynchronousTestCase):
    """
    C{ecr-proxy config}.
    """

    def setUp(self) -> None:
        self.caller = Caller()
        self.file = scratch(self)
        self.file.write_text(f'ecr-endpoint = "{ECR}"\ncache-limit = "2g"\nport = 5005\n')
        self.caller.variables = {"PROXY_CONFIG": str(self.file), "PROXY_TAG_TTL": "3", "HOME": "/home/me"}

    def test_shows_each_setting_and_where_it_comes_from(self) -> None:
        told = self.caller.call("config", "--port=80").splitlines()
        self.assertEqual((0, ""), (self.caller.status, self.caller.complaint))
        for line in (
            f'cache-limit = "2g"  # {self.file}: cache-limit',
            'tag-ttl = "3"  # PROXY_TAG_TTL',
            'port = "80"  # --port',
            'connections = "10000"  # default',
            'cache-dir = "/home/me/.cache/ecr-proxy"  # default',
        ):
            self.assertIn(line, told)

    def test_what_it_shows_is_a_file_that_says_the_same(self) -> None:
        for name in NAMES:
            variable, text, *_ = EXAMPLES[name]
            environ = pair_for(name, {variable: text})
            self.caller.variables = environ
            shown = self.caller.call("config")
            again = Config.load({}, {}, parse_file("x.toml", shown.encode()))
            for each in SETTINGS:
                one, other = (value_of(config, each.name) for config in (Config.load({}, environ), again))
                self.assertEqual(one, other, f"{each.name} with {name}")
            self.assertLessEqual({name}, set(tomllib.loads(shown)))

    def shown(self, text: str, **environ: str) -> str:
        self.file.write_text(text)
        self.caller.variables = {"PROXY_CONFIG": str(self.file), "HOME": "/home/me", **environ}
        return self.caller.call("config")

    def test_shows_each_registry_and_where_its_values_come_from(self) -> None:
        one, two = RegistriesTests.ONE, RegistriesTests.TWO
        shown = self.shown(
            f'namespace-pattern = "a/.*"\n[registry."{two.upper()}"]\nhosts = ["us.test", "b.test"]\n'
            '[registry."public.ecr.aws"]\n[registry."INDEX.docker.io"]\nnamespaces = "\\\\w+/.*"\n'
            'username = "ann"\npassword-file = "/x"',
            PROXY_ECR_ENDPOINT=f"{one} http://[::1]:5000",
            AWS_REGION="eu-west-1",
            AWS_INSTANCE_AUTH="true",
        )
        where, pattern = f'{self.file}: registry."{two.upper()}"', f"{self.file}: namespace-pattern"
        hub = f'{self.file}: registry."INDEX.docker.io"'
        self.assertEqual(
            f"""
[registry."{one}"]
default = true  # PROXY_ECR_ENDPOINT
endpoint = "https://{one}"  # PROXY_ECR_ENDPOINT
region = "eu-west-1"  # default
instance-auth = true  # AWS_INSTANCE_AUTH
namespaces = "a/.*"  # {pattern}

[registry."[::1]:5000"]
endpoint = "http://[::1]:5000"  # PROXY_ECR_ENDPOINT
region = "eu-west-1"  # AWS_REGION
instance-auth = true  # AWS_INSTANCE_AUTH
namespaces = "a/.*"  # {pattern}

[registry."{two}"]
endpoint = "https://{two}"  # default
region = "us-east-1"  # default
hosts = ["b.test", "us.test"]  # {where}.hosts
namespaces = "a/.*"  # {pattern}

[registry."public.ecr.aws"]
endpoint = "https://public.ecr.aws"  # default
credentials = "anonymous"  # default
namespaces = "a/.*"  # {pattern}

[registry."docker.io"]
endpoint = "https://registry-1.docker.io"  # default
namespaces = "\\\\w+/.*"  # {hub}.namespaces
username = "ann"  # {hub}.username
password-file = "/x"  # {hub}.password-file
""",
            "\n" + shown.partition("\n\n")[2],
        )

    def test_what_it_shows_of_registries_is_a_file_that_says_the_same(self) -> None:
        one, two = RegistriesTests.ONE, RegistriesTests.TWO
        recipe = (Path(__file__).parent.parent / "deploy/registries/ecr-proxy.toml").read_text("utf-8")
        several = f"{one} http://[::1]:5000 http://a.test:1"
        vpce = "https://vpce-0a1b2c3d4e5f-abcdefgh.dkr.ecr.us-east-1.vpce.amazonaws.com"
        for text, environ in (
            (recipe, {}),
            ("", {"PROXY_ECR_ENDPOINT": several, "AWS_REGION": "eu-west-1", "AWS_INSTANCE_AUTH": "1"}),
            (f'[registry."{two}"]\ndefault = true\nprofile = "\U0001f40b \\u007f\\" = #"', {"AWS_REGION": "eu-west-3"}),
            (f'[registry."{two}"]\nendpoint = "{vpce}"\nregion = "us-east-1"', {"PROXY_ECR_ENDPOINT": vpce}),
            (
                (
                    f'[registry."{one}"]\nreplicas = ["{two}"]\nrole = "arn:aws:iam::444455556666:role/pull"\n'
                    'external-id = "x"'
                ),
                {"PROXY_ECR_ENDPOINT": one},
            ),
            (
                (
                    '[registry."public.ecr.aws"]\ncredentials = "aws"\npath-prefix = "public"\n[registry."quay.io"]\n'
                    'realms = ["b.test:80", "a.test"]'
                ),
                {"PROXY_ECR_ENDPOINT": one},
            ),
        ):
            shown = self.shown(text, **environ)
            self.assertEqual((0, ""), (self.caller.status, self.caller.complaint.partition("ecr-proxy: warning")[0]))
            once = Config.load({}, {"HOME": "/home/me", **environ}, parse_file("x.toml", text.encode()))
            again = Config.load({}, {}, parse_file("x.toml", shown.encode()))
            self.assertEqual(once.registries, again.registries, shown)
            own = [each.namespaces or once.namespace_pattern for each in once.registries]
            self.assertEqual(own, [each.namespaces for each in again.registries])

    def test_a_check_writes_only_what_is_wrong(self) -> None:
        """
        Status 0 for warnings alone, 1 if the daemon would not start, 2 if a setting can't be read.
        """
        for flags, status, words in (
            ((), 0, ""),
            (("--cache-limit=2m",), 0, "warning: PROXY_CACHE_LIMIT is 2097152 bytes"),
            (("--admin-listen=tcp:5001",), 1, "ecr-proxy: PROXY_ADMIN_LISTEN='tcp:5001' would let"),
            (("--port=70000",), 2, "--port='70000': not a port"),
            (("--config=/nowhere",), 2, "--config='/nowhere': can't be read"),
        ):
            self.assertEqual("", self.caller.call("config", "--check", *flags), flags)
            self.assertEqual(status, self.caller.status, flags)
            self.assertIn(words, self.caller.complaint)

    def test_the_recipe_for_all_registries_of_a_company_has_nothing_to_warn_of(self) -> None:
        """
        C{public.ecr.aws} only resembles a private registry of ECR.
        """
        recipe = Path(__file__).parent.parent / "deploy/registries/ecr-proxy.toml"
        self.caller.variables = {"HOME": "/home/me"}
        self.caller.call("config", "--check", f"--config={recipe}", "--port=5000", "--cache-limit=2g")
        self.assertEqual((0, ""), (self.caller.status, self.caller.complaint))

    def test_the_recipes_of_clients_name_the_registries_of_the_daemons(self) -> None:
        """
        C{buildkitd.toml}, where BuildKit names the registry by C{ns}, and C{registries.conf}, by path prefixes.
        """
        recipes = Path(__file__).parent.parent / "deploy/registries"
        daemon, buildkit, podman = (
            tomllib.loads((recipes / name).read_text("utf-8"))["registry"]
            for name in ("ecr-proxy.toml", "buildkitd.toml", "registries.conf")
        )
        proxy = "proxy.example:5000"
        self.assertEqual({name: {"mirrors": [proxy]} for name in daemon} | {proxy: {"http": True}}, buildkit)
        places = {name: "/".join(filter(None, (proxy, each.get("path-prefix")))) for name, each in daemon.items()}
        self.assertEqual(places, {each["prefix"]: each["mirror"][0]["location"] for each in podman})
        self.assertEqual([each["prefix"] for each in podman], [each["location"] for each in podman])

    def test_other_subcommands_read_the_file(self) -> None:
        self.file.write_text("admin-listen = 'off'\n")
        self.caller.call("stats")
        self.assertIn("PROXY_ADMIN_LISTEN is off", self.caller.complaint)
