"""
How people name repositories of several registries, and how the commands understand it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from io import BytesIO

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.command.naming import Naming, naming_of
from ecrproxy.command.prefetch import PREFETCH
from ecrproxy.command.prefetching.door import Reply
from ecrproxy.command.prefetching.work import run
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.settings.registry_table import Protocol, RegistryTable
from tests.registry import StandIn
from tests.test_holdings import HoldingsTestCase
from tests.test_registries import COMPANY, ONE, TWO, parsed

GONE = "999900001111.dkr.ecr.eu-west-3.amazonaws.com"
ANYWHERE = (
    Repository(RegistryId.of_host(ONE), "team/app"),
    Repository(RegistryId.of_host(ONE), "docker-hub/library/nginx"),
    Repository(RegistryId.of_host(ONE), "us/app"),
    Repository(RegistryId.of_host(TWO), "team/app"),
    Repository(RegistryId.of_host("222200001111.dkr.ecr.eu-central-1.amazonaws.com"), "team/app"),
    Repository(RegistryId.of_host("quay.io"), "team/app"),
    Repository(RegistryId.of_host(GONE), "team/app"),
    Repository(RegistryId.of_host("localhost:5000"), "team/app"),
)

ANY = "*.dkr.ecr.eu-central-1.amazonaws.com"
THROUGH = f"""
[registry."{TWO}"]
default = true
[registry."{ANY}"]
[registry."docker.io"]
endpoint = "{ONE}"
ecr-repository-prefix = "docker-hub"
[registry."gcr.io"]
endpoint = "{ONE}"
ecr-repository-prefix = "google"
[registry."quay.io"]
endpoint = "{ANY.replace("*", "222200001111")}"
ecr-repository-prefix = "quay"
"""
"""Registries reached through one without a table, and through one that matches a wildcard."""


def company() -> Naming:
    tables, errors = parsed(COMPANY)
    assert not errors
    return naming_of(tables, (), ())


class NamingTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.naming = company()

    def meant(self, text: str) -> list[str]:
        pattern = self.naming.meant(text)
        return [self.naming.called(each) for each in ANYWHERE if self.naming.is_of(pattern, each)]

    def test_the_registry_is_named_unless_it_is_the_default(self) -> None:
        called = [self.naming.called(each) for each in ANYWHERE]
        self.assertEqual(
            [
                "team/app",
                "docker-hub/library/nginx",
                f"{ONE}/us/app",
                f"{TWO}/team/app",
                "222200001111.dkr.ecr.eu-central-1.amazonaws.com/team/app",
                "quay.io/team/app",
                f"{GONE}/team/app",
                "localhost:5000/team/app",
            ],
            called,
        )
        self.assertEqual(len(called), len(set(called)))

    def test_what_something_is_called_means_it_alone(self) -> None:
        for each in ANYWHERE:
            called = self.naming.called(each)
            self.assertEqual([called], self.meant(called))

    def test_a_registry_whose_name_has_no_dot_is_not_taken_for_a_part_of_the_defaults_names(self) -> None:
        text = f'[registry."{ONE}"]\ndefault = true\n[registry."harbor"]\n[registry."hub"]\npath-prefix = "hub"\n'
        self.naming = naming_of(parsed(text)[0], (), ())
        named = {
            "harbor/app": Repository(RegistryId.of_host(ONE), "harbor/app"),
            "harbor:443/app": Repository(RegistryId.of_host("harbor"), "app"),
            "hub/app": Repository(RegistryId.of_host("hub"), "app"),
        }
        for called, repository in named.items():
            self.assertEqual((called, repository), (self.naming.called(repository), self.naming.named(called)))
            pattern = self.naming.meant(called)
            self.assertEqual([repository], [each for each in named.values() if self.naming.is_of(pattern, each)])

    def test_each_spelling_of_a_registry_means_it(self) -> None:
        fips, dual = TWO.replace(".ecr.", ".ecr-fips."), "444455556666.dkr-ecr.us-east-1.on.aws"
        for name in (TWO, TWO.upper(), fips, dual, "us"):
            for pattern in ("team/app", "*", "team/?pp"):
                self.assertEqual([f"{TWO}/team/app"], self.meant(f"{name}/{pattern}"), (name, pattern))
        self.assertEqual([f"{GONE}/team/app"], self.meant(f"{GONE.replace('.ecr.', '.ecr-fips.')}/*"))
        self.assertEqual(["team/app"], self.meant(f"{ONE.replace('.ecr.', '.ecr-fips.')}/team/*"))

    def test_a_table_that_leads_to_another_registry_means_what_is_asked_there(self) -> None:
        for name in ("docker.io/nginx", "docker.io/library/nginx", "docker.io/library/*", "registry-1.docker.io/nginx"):
            self.assertEqual(["docker-hub/library/nginx"], self.meant(name), name)

    def test_a_short_pattern_is_for_the_default_and_one_with_a_dot_for_hosts(self) -> None:
        self.assertEqual(["team/app"], self.meant("team/*"))
        self.assertEqual(["team/app", f"{TWO}/team/app"], self.meant("*.dkr.ecr.*-*-1.amazonaws.com/team/app")[:2])
        self.assertEqual(6, len(self.meant("*/team/app")) + 1)
        self.assertEqual(len(ANYWHERE), len(self.meant("*")))

    def test_what_is_reached_through_a_registry_without_a_table_is_called_as_clients_call_it(self) -> None:
        """
        A registry that is reached only through a table keeps its own name for everything else of it in the cache.
        """
        tables, errors = parsed(THROUGH)
        self.assertEqual([], errors)
        self.naming = naming_of(tables, (), ())
        of_one, of_any = RegistryId.of_host(ONE), RegistryId.of_host(ANY.replace("*", "222200001111"))
        named = {
            "docker.io/library/nginx": Repository(of_one, "docker-hub/library/nginx"),
            "gcr.io/a/b": Repository(of_one, "google/a/b"),
            f"{ONE}/team/app": Repository(of_one, "team/app"),
            f"{of_any.host}/quay/team/app": Repository(of_any, "quay/team/app"),
            f"{of_any.host}/team/app": Repository(of_any, "team/app"),
            "team/app": Repository(RegistryId.of_host(TWO), "team/app"),
        }
        self.assertEqual(list(named), [self.naming.called(each) for each in named.values()])
        for called, repository in named.items():
            pattern = self.naming.meant(called)
            self.assertEqual(
                [repository], [each for each in named.values() if self.naming.is_of(pattern, each)], called
            )
        for called in ("docker.io/library/nginx", "gcr.io/a/b", "team/app"):
            self.assertEqual(named[called], self.naming.named(called))

    def test_a_default_that_leads_through_another_registry_is_called_by_short_names(self) -> None:
        through = f'[registry."docker.io"]\ndefault = true\nendpoint = "{ONE}"\necr-repository-prefix = "docker-hub"\n'
        for more in ("", f'[registry."{ONE}"]\n'):
            self.naming = naming_of(parsed(through + more)[0], (), ())
            called = self.naming.called(Repository(RegistryId.of_host(ONE), "docker-hub/library/nginx"))
            self.assertEqual("library/nginx", called)
            self.assertEqual(f"{ONE}/team/app", self.naming.called(Repository(RegistryId.of_host(ONE), "team/app")))

    def test_what_is_no_name_is_refused(self) -> None:
        for text in ("a:b/c", f"{TWO}/a:b", "us/a:b"):
            self.assertRaises(ValueError, self.naming.meant, text)

    def test_without_a_configuration_the_only_registry_is_the_default(self) -> None:
        quay = RegistryId.of_host("quay.io")
        self.assertEqual("a", naming_of((), (), {quay}).called(Repository(quay, "a")))
        raised = self.assertRaises(ValueError, naming_of, (), (), {quay, RegistryId.of_host(TWO)})
        self.assertIn(f"{TWO}, quay.io; name the default", str(raised))


class SubcommandTests(HoldingsTestCase):
    """
    The subcommands, where another registry has a repository and a tag of the same names.
    """

    def setUp(self) -> None:
        super().setUp()
        self.theirs = StandIn(self.clock, registry=f"https://{TWO}")
        image = self.theirs.push_image("team/app", "v1", layers=[self.shared, b"theirs"])
        table = RegistryTable(
            name=TWO, protocol=Protocol.ECR, endpoint=f"https://{TWO}", region="us-east-1", path_prefix="us"
        )
        self.start(others={table: self.theirs})
        self.pull("us/team/app", "v1", image)
        self.their_image = image
        path = self.root.parent / f"{self.root.name}.toml"
        path.write_text(f'ecr-endpoint = "{self.standin.registry}"\n[registry."{TWO}"]\npath-prefix = "us"\n')
        self.addCleanup(path.unlink)
        self.caller.variables["PROXY_CONFIG"] = str(path)

    def repositories(self, *arguments: str) -> list[str]:
        return [each["repository"] for each in self.document("ls", *arguments)["repositories"]]

    def test_ls_names_the_registry_unless_it_is_the_default(self) -> None:
        every = [f"{TWO}/team/app", "team/app", "team/other"]
        self.assertEqual(every, self.repositories())
        self.assertEqual(every, self.repositories("--offline", "--cache-dir", str(self.root)))
        self.assertEqual(every[:1], self.repositories(f"{TWO.replace('.ecr.', '.ecr-fips.')}/team/app:v1"))
        self.assertEqual(every[:1], self.repositories("us/*"))
        self.assertEqual(every[1:], self.repositories("team/*"))
        lines = self.call("ls", f"{TWO}/*").splitlines()
        self.assertEqual([f"{TWO}/team/app", "v1"], lines[1].split()[:2])

    def test_shells_complete_what_repositories_are_called(self) -> None:
        self.assertEqual([f"{TWO}/team/app", "team/app", "team/other"], self.call("completion", "repositories").split())

    def test_ls_lists_the_tags_that_are_named(self) -> None:
        (app,) = self.document("ls", "team/app:v2")["repositories"]
        self.assertEqual(["v2"], [each["tag"] for each in app["images"]])
        self.call("ls", "team/app:v3", status=1)

    def test_purge_takes_from_the_registry_that_is_named_alone(self) -> None:
        purged = self.document("purge", "--yes", f"{TWO}/team/app:v1")["entries"]
        self.assertEqual({f"{TWO}/team/app"}, {each["repository"] for each in purged})
        self.assertEqual((False, True), (self.has(self.their_image.digest), self.has(self.v1.digest)))
        self.pull("us/team/app", "v1", self.their_image)
        self.call("purge", "--yes", "team/*")
        self.assertEqual([f"{TWO}/team/app"], self.repositories())
        self.call("purge", "--yes", "*")
        self.assertEqual([], self.repositories())

    def test_without_a_configuration_the_default_must_be_named(self) -> None:
        self.caller.variables.clear()
        self.call("ls", status=2)
        self.assertIn("name the default with --ecr-endpoint or --config", self.caller.complaint)
        self.assertEqual(3, len(self.repositories("--ecr-endpoint", self.standin.registry)))

    def ask(self, method: str, path: str, headers: Mapping[str, str]) -> Reply:
        reply = self.daemon.ask(method, path, **headers)
        lowered = {name.decode().lower(): values[0].decode() for name, values in reply.headers.getAllRawHeaders()}
        return Reply(reply.code, lowered, BytesIO(bytes(reply.body)).read)

    def prefetch(self, *arguments: str) -> str:
        subcommands = [replace(PREFETCH, run=partial(run, ask_of=lambda door: self.ask))]
        return self.caller.call("prefetch", "--jobs", "1", *arguments, subcommands=subcommands)

    def test_prefetch_brings_each_image_from_its_registry(self) -> None:
        self.call("purge", "--yes", "*")
        names = [f"{TWO.replace('.ecr.', '.ecr-fips.')}/team/app:v1", "team/app:v2", "us/team/app:v1"]
        said = self.prefetch(*names)
        self.assertIn("2 images, 0 failed", said + self.caller.complaint)  # two names are one image
        self.assertEqual([f"{TWO}/team/app", "team/app"], self.repositories())
        self.assertTrue(self.has(self.their_image.digest))
        self.assertFalse(self.has(self.v1.digest))

    def test_stats_tells_how_each_registry_is_and_of_the_repositories_that_are_named(self) -> None:
        for prefix in ("", "us/"):
            self.get(f"/v2/{prefix}team/app/blobs/{self.v1.layers[0]}")
        lines = self.call("stats").splitlines()
        (row,) = [line.split() for line in lines if line.startswith(f"{TWO} ")]
        self.assertEqual(["closed", "expires"], row[1:3])
        for name, expected in (
            (f"{TWO}/*", f"{TWO}/team/app"),
            ("us/team/app", f"{TWO}/team/app"),
            ("team/*", "team/app"),
        ):
            told = [each["repository"] for each in self.document("stats", name)["repositories"]]
            self.assertEqual(expected, told[0], told)
        self.assertEqual([], self.document("stats", "us/none")["repositories"])
