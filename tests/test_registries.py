"""
The tables of registries, and which of them a request means.
"""

from __future__ import annotations

import tomllib
import tracemalloc
from functools import partial
from random import Random
from typing import Any
from urllib.parse import quote

from hypothesis import assume, given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.cache_key import CacheKey
from ecrproxy.http.web import Registry
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.oci import RegistryError, parse_route
from ecrproxy.registries import Chosen, Registries
from ecrproxy.settings.config import Config, Filed
from ecrproxy.settings.registries import parse_registries
from ecrproxy.settings.registry_table import Protocol, RegistryTable
from ecrproxy.settings.table import ConfigError
from ecrproxy.world import World, Worlds
from tests.test_identity import spelled
from tests.test_properties import names

ONE, TWO = "111122223333.dkr.ecr.eu-west-1.amazonaws.com", "444455556666.dkr.ecr.us-east-1.amazonaws.com"
CENTRAL = ONE.replace("eu-west-1", "eu-central-1")
COMPANY = f"""
[registry."{ONE}"]
default = true
[registry."{TWO}"]
role = "arn:aws:iam::444455556666:role/pull"
path-prefix = "us"
hosts = ["us.registry.example"]
namespaces = "team/.*"
[registry."*.dkr.ecr.eu-central-1.amazonaws.com"]
[registry."public.ecr.aws"]
credentials = "anonymous"
[registry."docker.io"]
endpoint = "https://{ONE}"
ecr-repository-prefix = "docker-hub"
[registry."quay.io"]
"""


def parsed(text: str) -> tuple[tuple[RegistryTable, ...], list[str]]:
    return parse_registries("x.toml", tomllib.loads(text)["registry"])


class TableTests(SynchronousTestCase):
    def test_say_what_each_registry_is(self) -> None:
        tables, errors = parsed(COMPANY)
        self.assertEqual([], errors)
        one, two, any_account, public, hub, quay = tables
        self.assertEqual(
            [Protocol.ECR] * 3 + [Protocol.ECR_PUBLIC, Protocol.ECR, Protocol.OCI], [each.protocol for each in tables]
        )
        self.assertEqual(["eu-west-1", "us-east-1", "eu-central-1"], [each.region for each in (one, two, any_account)])
        self.assertEqual([True] + [False] * 5, [each.default for each in tables])
        self.assertEqual(
            [f"https://{ONE}", f"https://{TWO}", None], [each.endpoint for each in (one, two, any_account)]
        )
        self.assertEqual(
            (f"https://{ONE}", "docker-hub", "eu-west-1"), (hub.endpoint, hub.repository_prefix, hub.region)
        )
        self.assertEqual([True, True], [each.anonymous for each in (public, quay)])
        (hub, *_), _ = parsed('[registry."index.docker.io"]')
        self.assertEqual(("docker.io", "https://registry-1.docker.io"), (hub.name, hub.endpoint))
        self.assertEqual(("us", frozenset({"us.registry.example"})), (two.path_prefix, two.hosts))

    def test_what_is_wrong_is_a_line_with_file_table_and_key(self) -> None:
        for table, said in {
            "role = 1": ".role: give a text",
            "role = 'arn:aws:iam::1:role/x'": ".role: not a role's ARN; give one such as",
            "rol = 'x'": ".rol is not known; set role if that is meant",
            "moon = 'x'": ".moon is not known; there are default, endpoint",
            "default = 'yes'": ".default: give true or false",
            "region = 'eu-west-2'": ".region: the registry is in eu-west-1, and tokens are valid in one region",
            "external-id = 'x'": ".external-id: goes with a role",
            "external-id = ''": ".external-id: empty; give a text, or leave it out",
            "profile = ' '": ".profile: empty; give a text, or leave it out",
            "role = ''": ".role: empty; give a text, or leave it out",
            "namespaces = '(a'": ".namespaces: not a regular expression",
            "path-prefix = 'a/b'": ".path-prefix: give one component, without /",
            "path-prefix = 'A'": ".path-prefix: outside the grammar",
            "hosts = 'a'": ".hosts: give a list of texts",
            "endpoint = 'ftp://x'": ".endpoint: not the URL of a registry",
            "endpoint = 'https://a b.test'": ".endpoint: not the URL of a registry",
            "endpoint = 'https://a.test#x'": ".endpoint: not the URL of a registry",
            "endpoint = 'https://a.test:0'": ".endpoint: not the URL of a registry",
            f"endpoint = 'http://{ONE}'": ".endpoint: ECR speaks https alone",
            f"endpoint = '{ONE.replace('1111', '2222')}'": ".endpoint: another registry of ECR",
            "username = 'ann'": ".username: it uses AWS's tokens",
            "username = 'ann'\npassword-file = '/x'": ".password-file: it uses AWS's tokens",
            "realms = ['a.test']": ".realms: it uses AWS's tokens",
            "credentials = 'anonymous'": ".credentials: is for public.ecr.aws",
            "profile = 'a'\ninstance-auth = true": ".instance-auth: contradicts profile",
            f"replicas = ['{ONE.replace('ecr.', 'ecr-fips.')}']": ".replicas: https://1",
            f"replicas = ['{TWO}', '{TWO}']": f".replicas: https://{TWO} is the registry itself, or there twice; leave",
        }.items():
            _, (line,) = parsed(f'[registry."{ONE}"]\n{table}')
            self.assertTrue(line.startswith(f'x.toml: registry."{ONE}"{said}'), line)
        for name, table, said in (
            (
                "quay.io",
                "role = 'arn:aws:iam::444455556666:role/pull'",
                ".role: only a private registry of ECR has that",
            ),
            ("quay.io", "username = 'ann'", ".username: goes with password-file"),
            ("quay.io", "default = true", ".default: only a private registry of ECR has that"),
            ("quay.io", "realms = ['a_b']", ".realms: 'a_b' is not the name of a host"),
            ("public.ecr.aws", "profile = 'a'", ".profile: it is asked anonymously; set credentials"),
            ("public.ecr.aws", "region = 'us-west-2'", ".region: only a private registry of ECR has that"),
            (
                "quay.io",
                "ecr-repository-prefix = 'x'",
                ".ecr-repository-prefix: only a private registry of ECR has that",
            ),
            ("*.dkr.ecr.eu-west-1.amazonaws.com", "default = true", ".default: not for wildcards"),
            ("a_b", "", ": 'a_b' is not the name of a host"),
            (ONE[1:], "", ".endpoint: an account has 12 digits"),
            ("api.ecr.eu-west-1.amazonaws.com", "", ".endpoint: a host of AWS that is no registry"),
            ("a.test:0", "", ".endpoint: not the URL of a registry"),
            ("quay.io", "username = 'a:b'", ".username: a colon or a control character"),
            ("quay.io", "username = ''", ".username: empty; give a text, or leave it out"),
            ("a.test:", "", ": 'a.test:' is not the name of a registry's host"),
            ("quay.io", "realms = ['a.test:']", ".realms: 'a.test:' is not the name of a registry's host"),
            (
                "*.dkr.ecr.cn-north-1.amazonaws.com",
                "",
                ": registries in cn-north-1 have other names; give *.dkr.ecr.cn-north-1.amazonaws.com.cn",
            ),
            ("a.test:x", "", ": 'a.test:x' is not the name of a registry's host"),
        ):
            _, (line,) = parsed(f'[registry."{name}"]\n{table}')
            self.assertTrue(line.startswith(f'x.toml: registry."{name}"{said}'), line)
        for text in ("registry = 1", "[registry]\na = 1"):
            self.assertIn('give a table for each registry: [registry."NAME"]', parsed(text)[1][0])

    def test_what_two_claim_is_told(self) -> None:
        for first, second, said in (
            ("default = true", "default = true", f"{ONE} and {TWO} are both the default"),
            ("path-prefix = 'us'", "path-prefix = 'us'", f"{ONE} and {TWO} both have the path-prefix us"),
            ("hosts = ['a.test']", "hosts = ['b.test', 'A.test']", f"{ONE} and {TWO} both have the host a.test"),
        ):
            _, (line,) = parsed(f'[registry."{ONE}"]\n{first}\n[registry."{TWO}"]\n{second}')
            self.assertTrue(line.startswith(f"x.toml: registry: {said}"), line)
        hub = f'[registry."docker.io"]\nendpoint = "{CENTRAL}"\necr-repository-prefix = "hub"\nprofile = "x"'
        for second, said in (
            (f'[registry."{TWO}"]\nhosts = ["{ONE}"]', f"{ONE} and {TWO} both have the host {ONE}"),
            (f'[registry."{TWO}"]\npath-prefix = "{ONE}"', f"{ONE} and {TWO} both have the path-prefix {ONE}"),
            (f'[registry."a.test"]\nendpoint = "{ONE}"', f"{ONE} and a.test both have the endpoint https://{ONE}"),
            (
                f'[registry."docker.io"]\nendpoint = "{ONE}"\necr-repository-prefix = "hub"\nprofile = "x"',
                f"docker.io is reached through {ONE}, which has other credentials; give them there",
            ),
            (
                f'[registry."*.dkr.ecr.eu-central-1.amazonaws.com"]\n{hub}',
                "docker.io is reached through *.dkr.ecr.eu-central-1.amazonaws.com, which has other credentials",
            ),
        ):
            _, (line,) = parsed(f'[registry."{ONE}"]\n{second}')
            self.assertTrue(line.startswith(f"x.toml: registry: {said}"), line)
        wildcard = "*.dkr.ecr.eu-west-1.amazonaws.com"
        account = ONE.replace("1111", "9999").replace("ecr.", "ecr-fips.")
        for key, value in (("path-prefix", f"'{account}'"), ("hosts", f"['{account}']")):
            _, (line,) = parsed(f'[registry."{wildcard}"]\n[registry."{TWO}"]\n{key} = {value}')
            said = f'registry."{TWO}".{key}: {account} is an account of {wildcard}; leave one out'
            self.assertEqual(f"x.toml: {said}", line)
        own = f'[registry."{wildcard}"]\n[registry."{ONE}"]\npath-prefix = "{ONE}"\nhosts = ["{ONE}"]'
        self.assertEqual([], parsed(own)[1])
        for name, other in (("quay.io", "Quay.io"), ("docker.io", "index.docker.io"), (wildcard, wildcard.upper())):
            _, (line,) = parsed(f'[registry."{name}"]\n[registry."{other}"]\nnamespaces = "a"')
            self.assertEqual(f"x.toml: registry: {name} has two tables; leave one out", line)
        _, (line,) = parsed('[registry."public.ecr.aws"]\n[registry."ecr-public.aws.com"]')
        self.assertEqual("x.toml: registry: public.ecr.aws has two tables; leave one out", line)
        twin = ONE.replace("dkr.ecr", "dkr-ecr").replace("amazonaws.com", "on.aws")
        _, (line,) = parsed(f'[registry."{ONE}"]\n[registry."{twin}"]')
        self.assertIn(f"{ONE} and {twin} are one registry", line)

    def test_ecr_public_may_be_asked_at_its_dual_stack_name(self) -> None:
        """
        It is ECR Public then, too, with its tokens.
        """
        for table in (
            '[registry."ECR-Public.aws.com"]\ncredentials = "aws"',
            '[registry."public.ecr.aws"]\nendpoint = "https://ecr-public.aws.com"\ncredentials = "aws"',
        ):
            (found,), problems = parsed(table)
            self.assertEqual([], problems)
            self.assertEqual(("public.ecr.aws", "https://ecr-public.aws.com"), (found.name, found.endpoint))
            self.assertEqual((Protocol.ECR_PUBLIC, False), (found.protocol, found.anonymous))


class ChooseTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.registries = Registries(parsed(COMPANY)[0])

    def chosen(self, name: str, ns: str | None = None, host: str = "") -> Chosen:
        route = parse_route(f"/v2/{name}/manifests/latest", RegistryId("nobody"))
        return self.registries.choose(route, ns, host)

    def test_what_a_client_says_most_clearly_counts(self) -> None:
        """
        ns, then this proxy's name for it, then the first component, then the default.
        """
        for name, ns, host, registry, repository in (
            ("team/app", None, "", ONE, "team/app"),
            ("team/app", None, "127.0.0.1", ONE, "team/app"),
            ("us/team/app", None, "", TWO, "team/app"),
            (f"{TWO}/team/app", None, "", TWO, "team/app"),
            ("us", None, "", ONE, "us"),
            ("us/team/app", None, "US.registry.example", TWO, "us/team/app"),
            ("us/team/app", ONE, "us.registry.example", ONE, "us/team/app"),
            ("team/app", None, TWO, TWO, "team/app"),
            ("team/app", TWO.replace(".dkr.ecr.", ".dkr.ecr-fips."), "", TWO, "team/app"),
            ("team/app", f"{TWO}:443", "", TWO, "team/app"),
            ("nginx", "docker.io", "", ONE, "docker-hub/library/nginx"),
            ("team/nginx", "registry-1.docker.io", "", ONE, "docker-hub/team/nginx"),
            ("docker.io/nginx", None, "", ONE, "docker-hub/library/nginx"),
            ("team/app", "quay.io", "", "quay.io", "team/app"),
            ("nginx/nginx", "ecr-public.aws.com", "", "public.ecr.aws", "nginx/nginx"),
            ("ecr-public.aws.com/nginx/nginx", None, "", "public.ecr.aws", "nginx/nginx"),
            (
                "team/app",
                ONE.replace("eu-west-1", "eu-central-1"),
                "",
                ONE.replace("eu-west-1", "eu-central-1"),
                "team/app",
            ),
        ):
            found = self.chosen(name, ns, host)
            expected = Repository(RegistryId.of_host(registry), repository)
            self.assertEqual(expected, found.route.repository, (name, ns, host))

    def test_what_leads_through_an_account_of_a_wildcard_is_asked_as_that(self) -> None:
        """
        With the wildcard's credentials, and counted there; also if the client names the account itself.
        """
        wildcard = "*.dkr.ecr.eu-central-1.amazonaws.com"
        text = f"""
            [registry."{wildcard}"]
            profile = "central"
            [registry."gcr.io"]
            endpoint = "{CENTRAL}"
            ecr-repository-prefix = "google"
        """
        self.registries = Registries(parsed(COMPANY.replace(f'[registry."{wildcard}"]', text))[0])
        for ns, registry in (("gcr.io", "gcr.io"), (CENTRAL, CENTRAL)):
            found = self.chosen("team/app", ns)
            self.assertEqual(registry, found.registry.table.name)
            self.assertEqual((wildcard, CENTRAL), (found.asked.label, found.asked.table.name))
            self.assertEqual("central", found.asked.table.profile)
        self.assertNotIn("gcr.io", [each.table.name for each in self.registries.named])

    def test_namespaces_are_about_the_name_that_clients_use(self) -> None:
        self.assertEqual("library/nginx", self.chosen("nginx", "docker.io").name)
        self.assertEqual("team/app", self.chosen("us/team/app").name)

    def test_what_is_not_named_is_not_there(self) -> None:
        """
        Whatever it resembles; and no invalid name leads to the default.
        """
        for ns in (
            "gcr.io",
            "quay.io:5000",
            f"{ONE}.evil.test",
            ONE.replace("eu-west-1", "eu-west-2"),
            "",
            "localhost",
        ):
            problem = self.assertRaises(RegistryError, self.chosen, "team/app", ns)
            self.assertEqual((404, "NAME_UNKNOWN"), (problem.status, problem.code), ns)

    @given(
        names,
        st.sampled_from(["", "us/", f"{TWO}/", "quay.io/", "docker.io/"]),
        st.sampled_from([None, ONE, TWO, CENTRAL, "quay.io", "docker.io", "public.ecr.aws"]),
        st.sampled_from(["", "x", TWO, "us.registry.example"]),
    )
    def test_no_two_are_confused(self, name: str, first: str, ns: str | None, host: str) -> None:
        """
        ns and another way to name a registry have the same meaning; and the request goes only to that registry.
        """
        found = self.chosen(first + name, ns, host)
        self.assertEqual(found, self.chosen(found.name, found.registry.table.name))
        self.assertEqual(RegistryId.of_url(found.registry.table.endpoint or ""), found.route.repository.registry)


KNOWN = {ONE: "", TWO: "us", CENTRAL: "", "public.ecr.aws": "", "docker.io": "", "quay.io": ""}
"""The company's registries, each with its path prefix, if any."""
OTHERS = {
    TWO: [TWO.replace("dkr.ecr", "dkr-ecr").replace("amazonaws.com", "on.aws"), TWO.replace("ecr.", "ecr-fips.")],
    "docker.io": ["registry-1.docker.io", "index.docker.io"],
}
"""Their other names."""
STRANGERS = (
    ONE.replace("1111", "1112"),
    ONE.replace("eu-west-1", "eu-west-3"),
    ONE.replace("amazonaws.com", "amazonaws.com.evil.test"),
    f"x.{ONE}",
    f"{ONE}:444",
    f"a@{ONE}",
    f"{ONE}/",
    f" {ONE}",
    f"{ONE}..",
    f"{ONE},{TWO}",
    f"https://{ONE}",
    ONE.replace("r", "\u0433", 1),
    "quay.io:5000",
    "quay.io\r\n",
    "us",
    "us.registry.example",
    "*.dkr.ecr.eu-central-1.amazonaws.com",
    "",
)
"""Values of C{ns} that are none of them."""


class NeverConfusedTests(SynchronousTestCase):
    """
    Whatever ns, Host and path say, and however they are written, a request means one registry, or none.
    """

    def setUp(self) -> None:
        nothing: Any = None
        registries = Registries(parsed(COMPANY)[0])
        worlds = Worlds(World(registries, nothing, nothing, nothing))
        self.ask = partial(Registry(nothing, worlds, CacheKey.parse("$uri"), nothing)._understood, registries)  # noqa: SLF001

    def meant(self, target: str, host: str) -> tuple[str, Repository] | int:
        """
        Return which table a request means and what is requested from which registry, or how it is rejected.
        """
        try:
            chosen, _ = self.ask(target, host)
        except RegistryError as problem:
            return problem.status
        return chosen.registry.table.name, chosen.route.repository

    @staticmethod
    def expected(name: str, repository: str) -> tuple[str, Repository]:
        if name == "docker.io":
            rest = repository if "/" in repository else f"library/{repository}"
            return name, Repository(RegistryId.of_host(ONE), f"docker-hub/{rest}")
        return name, Repository(RegistryId.of_host(name), repository)

    @staticmethod
    def escaped(draw: Any, text: str) -> str:
        """
        Percent-encode a parameter, or some of it, needlessly.
        """
        plain = draw(st.sets(st.sampled_from(sorted(set(text)))) if text else st.just(set()))
        keep = {each for each in plain if each.isascii() and (each.isalnum() or each in ".-:/@*")}
        return "".join(each if each in keep else "".join(f"%{byte:02x}" for byte in each.encode()) for each in text)

    @given(st.data(), st.sampled_from(sorted(KNOWN)), names)
    def test_ns_wins_over_all_else(self, data: st.DataObject, name: str, repository: str) -> None:
        """
        Over Host, a first component that is another's name or prefix, and further parameters of that name.
        """
        host = data.draw(st.sampled_from(["", "proxy.example", "us.registry.example", *KNOWN, *STRANGERS]))
        first = data.draw(st.sampled_from(["", "us/", f"{TWO}/", "quay.io/"]))
        text = spelled(data.draw, data.draw(st.sampled_from([name, *OTHERS.get(name, ())])))
        more = data.draw(st.lists(st.sampled_from(["x=1", f"ns={ONE}", "ns=quay.io", "NS=quay.io", "ns", "n%73=us"])))
        before = data.draw(st.sampled_from(["", "a=b&", "NS=quay.io&", "nss=quay.io&", "&&"]))
        key = data.draw(st.sampled_from(["ns", "n%73", "%6e%73"]))
        query = f"{before}{key}={self.escaped(data.draw, text)}&{'&'.join(more)}"
        target = f"/v2/{first}{repository}/manifests/latest?{query}"
        self.assertEqual(self.expected(name, first + repository), self.meant(target, host), target)

    @given(st.data(), st.sampled_from(STRANGERS), names)
    def test_what_is_not_configured_is_nobody_elses(self, data: st.DataObject, ns: str, repository: str) -> None:
        host = data.draw(st.sampled_from(["", "us.registry.example", *KNOWN]))
        first = data.draw(st.sampled_from(["", "us/", f"{TWO}/"]))
        target = f"/v2/{first}{repository}/tags/list?ns={self.escaped(data.draw, ns)}&ns={ONE}"
        self.assertEqual(404, self.meant(target, host), target)

    @given(st.data(), st.sampled_from(sorted(KNOWN)), names)
    def test_host_wins_over_the_path(self, data: st.DataObject, name: str, repository: str) -> None:
        first = data.draw(st.sampled_from(["", "us/", f"{TWO}/", "quay.io/"]))
        host = spelled(data.draw, data.draw(st.sampled_from([name, *OTHERS.get(name, ())]))).removesuffix(":443")
        self.assertEqual(
            self.expected(name, first + repository), self.meant(f"/v2/{first}{repository}/manifests/1", host)
        )

    @given(st.data(), st.sampled_from(sorted(KNOWN)), names)
    def test_else_a_first_component_counts_and_is_no_part_of_the_name(
        self, data: st.DataObject, name: str, repository: str
    ) -> None:
        """
        However a client escapes it; what only resembles one is the default's.
        """
        first = self.escaped(data.draw, data.draw(st.sampled_from([each for each in (name, KNOWN[name]) if each])))
        host = data.draw(
            st.sampled_from(["", "proxy.example", "127.0.0.1", "localhost", "us", "x.us.registry.example"])
        )
        slash = data.draw(st.sampled_from(["/", "%2f", "%2F"]))
        target = f"/v2/{first}{slash}{repository}/manifests/1"
        self.assertEqual(self.expected(name, repository), self.meant(target, host), target)
        target = f"/v2/x{first}{slash}{repository}/manifests/1"
        found = self.meant(target, host)
        self.assertEqual(
            (ONE, RegistryId.of_host(ONE)), (found[0], found[1].registry) if isinstance(found, tuple) else 0
        )

    @given(st.text(max_size=60), st.text(max_size=60), st.text(max_size=30), names)
    def test_whatever_comes_leads_to_a_configured_registry_or_nowhere(
        self, ns: str, host: str, first: str, repository: str
    ) -> None:
        for query in ("", f"?ns={quote(ns)}", f"?ns={ns}"):
            found = self.meant(f"/v2/{first}/{repository}/manifests/1{query}", host)
            if isinstance(found, tuple):
                self.assertIn(found[0], KNOWN)

    def test_an_endpoint_in_a_vpc_is_one_registry_with_the_name(self) -> None:
        vpce = "vpce-0a1b2c3d4e5f-abcdefgh.dkr.ecr.us-east-1.vpce.amazonaws.com"
        tables, errors = parsed(
            f'[registry."{ONE}"]\n[registry."{TWO}"]\nendpoint = "https://{vpce}"\nregion = "us-east-1"'
        )
        self.assertEqual([], errors)
        registries, route = Registries(tables), parse_route("/v2/team/app/tags/list", RegistryId("nobody"))
        by_name, by_endpoint = (registries.choose(route, each, "") for each in (TWO, vpce))
        self.assertEqual(by_name, by_endpoint)
        self.assertEqual(TWO, by_name.registry.table.name)


class OneMeaningTests(SynchronousTestCase):
    """
    Settings that are accepted give each name one meaning.
    """

    WORDS = (
        *(ONE, TWO, CENTRAL, CENTRAL.replace("1111", "9999"), CENTRAL.replace("dkr.ecr", "dkr.ecr-fips")),
        *("docker.io", "registry-1.docker.io", "quay.io", "a.test", "a.test:5000", "a.test:80", "us", "localhost"),
    )
    WILD = ("*.dkr.ecr.eu-central-1.amazonaws.com", "*.dkr.ecr.us-east-1.amazonaws.com")
    words = st.sampled_from(WORDS)
    hosts = st.sampled_from([each for each in WORDS if ":" not in each])
    endpoints = words | st.sampled_from(["http://a.test", f"https://{ONE}", "http://a.test:443"])
    keys = st.fixed_dictionaries(
        {},
        optional={
            "endpoint": endpoints,
            "region": st.just("us-east-1"),
            "hosts": st.lists(hosts, min_size=1, max_size=2),
            "path-prefix": hosts,
            "ecr-repository-prefix": st.just("hub"),
        },
    )
    tables = st.dictionaries(words | st.sampled_from(WILD), keys, max_size=3)

    @staticmethod
    def loaded(tables: dict[str, Any], aliases: list[str]) -> Config | None:
        found, errors = parse_registries("x.toml", tables)
        environ = {"PROXY_ECR_ENDPOINT": ONE, "PROXY_REGISTRY_ALIASES": " ".join(aliases)}
        if errors:
            return None
        try:
            return Config.load({}, environ, Filed({}, found, tables))
        except ConfigError:
            return None

    @staticmethod
    def meant(registries: Registries, word: str) -> set[str]:
        """
        Return the tables that a name means by ns, as the host, and as a first component.
        """
        found = set()
        for way in ("ns", "host", "path"):
            try:
                if way == "path":
                    known, rest = registries.split(f"{word}/app")
                    found |= {known.label} if rest == "app" else set()
                elif way == "ns" or ":" not in word:
                    named = registries.named_by(*((word, "") if way == "ns" else (None, word)))
                    found |= {named.label} if named else set()
            except RegistryError:
                pass
        return found

    @given(tables, st.lists(words, max_size=2), st.randoms(use_true_random=False))
    def test_whichever_way_it_is_said(self, tables: dict[str, Any], aliases: list[str], order: Random) -> None:
        """
        And in whatever order the tables are.
        """
        config = self.loaded(tables, aliases)
        assume(config is not None)
        assert config is not None
        registries = Registries(config.registries, config.registry_aliases or ())
        others = list(config.registries[1:])
        order.shuffle(others)
        shuffled = Registries([config.registries[0], *others], config.registry_aliases or ())
        for word in self.WORDS:
            meant = self.meant(registries, word)
            self.assertLessEqual(len(meant), 1, (word, meant, tables, aliases))
            self.assertEqual(meant, self.meant(shuffled, word), (word, tables, aliases))

    @given(tables, st.lists(words, max_size=2))
    def test_each_claim_leads_to_its_table(self, tables: dict[str, Any], aliases: list[str]) -> None:
        config = self.loaded(tables, aliases)
        assume(config is not None)
        assert config is not None
        registries = Registries(config.registries, config.registry_aliases or ())
        for table in config.registries:
            claims = {table.name.replace("*", "888888888888"), *table.hosts, table.path_prefix or table.name}
            for word in claims if not table.is_wildcard else [table.name.replace("*", "888888888888")]:
                self.assertEqual({table.name}, self.meant(registries, word), (word, tables, aliases))
        for word in aliases:
            self.assertEqual({registries.default.label}, self.meant(registries, word), (word, tables, aliases))


class RememberedTests(SynchronousTestCase):
    def setUp(self) -> None:
        nothing: Any = None
        registries = Registries(parsed(COMPANY)[0])
        resource = Registry(
            nothing, Worlds(World(registries, nothing, nothing, nothing)), CacheKey.parse("$uri"), nothing
        )
        self.ask = partial(resource._understood, registries)  # noqa: SLF001

    def test_long_targets_are_not_remembered(self) -> None:
        """
        Clients could fill the memory with them: the limit is 6 MiB.
        """
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        before, _ = tracemalloc.get_traced_memory()
        for size, count in ((400, 4096), (15_000, 400)):
            for number in range(count):
                self.ask(f"/v2/team/app/manifests/latest?{number:0{size}}", "x")
        after, _ = tracemalloc.get_traced_memory()
        self.assertLess(after - before, 6 * 2**20)

    def test_the_same_target_means_the_same_to_who_calls_the_proxy_the_same(self) -> None:
        ask = self.ask
        self.assertIs(ask("/v2/team/app/manifests/v1", ""), ask("/v2/team/app/manifests/v1", ""))
        here, there = (ask("/v2/team/app/manifests/v1", host)[0] for host in ("", "us.registry.example"))
        self.assertNotEqual(here.route.repository, there.route.repository)
