"""
The tables of registries, and which of them a request means.
"""

from __future__ import annotations

import tomllib
import tracemalloc
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.cache_key import CacheKey
from ecrproxy.http.web import Registry
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.oci import RegistryError, parse_route
from ecrproxy.registries import Chosen, Registries
from ecrproxy.settings.registries import Protocol, RegistryTable, parse_registries
from ecrproxy.world import World, Worlds
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
        self.assertEqual(("us", frozenset({"us.registry.example"})), (two.path_prefix, two.hosts))

    def test_what_is_wrong_is_a_line_with_file_table_and_key(self) -> None:
        for table, said in {
            "role = 1": ".role: give a text",
            "role = 'arn:aws:iam::1:role/x'": ".role: not a role's ARN; give one such as",
            "rol = 'x'": ".rol is not known; set role if that is meant",
            "moon = 'x'": ".moon is not known; there are default, endpoint",
            "default = 'yes'": ".default: give true or false",
            "region = 'eu-west-2'": ".region: the registry is in eu-west-1, and a token is good in one region",
            "external-id = 'x'": ".external-id: goes with a role",
            "namespaces = '(a'": ".namespaces: not a regular expression",
            "path-prefix = 'a/b'": ".path-prefix: give one component, without /",
            "path-prefix = 'A'": ".path-prefix: outside the grammar",
            "hosts = 'a'": ".hosts: give a list of texts",
            "endpoint = 'ftp://x'": ".endpoint: not the URL of a registry",
            "username = 'ann'": ".username: AWS gives its tokens",
            "username = 'ann'\npassword-file = '/x'": ".username: AWS gives its tokens",
            "credentials = 'anonymous'": ".credentials: is for public.ecr.aws",
            "profile = 'a'\ninstance-auth = true": ".instance-auth: contradicts profile",
        }.items():
            _, (line,) = parsed(f'[registry."{ONE}"]\n{table}')
            self.assertTrue(line.startswith(f'x.toml: registry."{ONE}"{said}'), line)
        for name, table, said in (
            ("quay.io", "role = 'arn:aws:iam::444455556666:role/pull'", ".role: only a registry of ECR has that"),
            ("quay.io", "username = 'ann'", ".username: goes with password-file"),
            ("quay.io", "ecr-repository-prefix = 'x'", ".ecr-repository-prefix: only a registry of ECR has that"),
            ("*.dkr.ecr.eu-west-1.amazonaws.com", "default = true", ".default: a wildcard stands for many"),
            ("a_b", "", ": 'a_b' is not the name of a host"),
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
        twin = ONE.replace("dkr.ecr", "dkr-ecr").replace("amazonaws.com", "on.aws")
        _, (line,) = parsed(f'[registry."{ONE}"]\n[registry."{twin}"]')
        self.assertIn(f"{ONE} and {twin} are one registry", line)


class ChooseTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.registries = Registries(parsed(COMPANY)[0])

    def chosen(self, name: str, ns: str | None = None, host: str = "") -> Chosen:
        route = parse_route(f"/v2/{name}/manifests/latest", RegistryId("nobody"))
        return self.registries.choose(route, ns, host)

    def test_what_a_client_says_most_clearly_counts(self) -> None:
        """
        ns, then the name of this proxy, then the first component, then the default.
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

    def test_namespaces_are_about_the_name_that_clients_use(self) -> None:
        self.assertEqual("library/nginx", self.chosen("nginx", "docker.io").name)
        self.assertEqual("team/app", self.chosen("us/team/app").name)

    def test_what_is_not_named_is_not_there(self) -> None:
        """
        Whatever it resembles; and no name that is none leads to the default.
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
        Who says by ns what was found otherwise means the same; and what is asked for goes to that registry alone.
        """
        found = self.chosen(first + name, ns, host)
        self.assertEqual(found, self.chosen(found.name, found.registry.table.name))
        self.assertEqual(RegistryId.of_url(found.registry.table.endpoint or ""), found.route.repository.registry)


class RememberedTests(SynchronousTestCase):
    def setUp(self) -> None:
        nothing: Any = None
        worlds = Worlds(World(Registries(parsed(COMPANY)[0]), nothing, nothing))
        self.resource = Registry(nothing, worlds, CacheKey.parse("$uri"), nothing)

    def test_long_targets_are_not_remembered(self) -> None:
        """
        Clients could fill the memory with them: what is remembered has 6 MiB at most.
        """
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        before, _ = tracemalloc.get_traced_memory()
        for size, count in ((400, 4096), (15_000, 400)):
            for number in range(count):
                self.resource._understood(f"/v2/team/app/manifests/latest?{number:0{size}}", "x")  # noqa: SLF001
        after, _ = tracemalloc.get_traced_memory()
        self.assertLess(after - before, 6 * 2**20)

    def test_the_same_target_means_the_same_to_who_calls_the_proxy_the_same(self) -> None:
        ask = self.resource._understood  # noqa: SLF001
        self.assertIs(ask("/v2/team/app/manifests/v1", ""), ask("/v2/team/app/manifests/v1", ""))
        here, there = (ask("/v2/team/app/manifests/v1", host)[0] for host in ("", "us.registry.example"))
        self.assertNotEqual(here.route.repository, there.route.repository)
