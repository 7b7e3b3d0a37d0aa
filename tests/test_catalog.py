"""
GET /v2/_catalog lists the repositories of the default registry that clients may pull, and costs ECR one request a
minute.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count, pairwise
from typing import Any

from botocore.exceptions import EndpointConnectionError
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.access.limits import Limits
from ecrproxy.catalog import FAILED_SECONDS, KEPT_SECONDS, PATIENCE
from ecrproxy.registry.aws import Credentials, CredentialsError, TokenUnavailableError
from ecrproxy.registry.repositories import BYTES, PAGES, SECONDS, TooManyError, list_repositories
from ecrproxy.settings.registry_table import Protocol, RegistryTable
from tests.daemon import DaemonTestCase, Reply
from tests.registry import StandIn
from tests.test_ecr import FakeAws
from tests.test_namespaces import CATASTROPHE, LONG

CATALOG = "/v2/_catalog"
DEFAULT = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
OTHER = "444455556666.dkr.ecr.us-east-1.amazonaws.com"


def listed(reply: Reply) -> list[str]:
    names: list[str] = json.loads(reply.body)["repositories"]
    return names


class CatalogTestCase(DaemonTestCase):
    """
    A few repositories, and a list that ECR returns when the test says so.
    """

    def setUp(self) -> None:
        super().setUp()
        for name in ("team/b", "team/a", "other/c", "team/a-b", "us/app"):
            self.standin.push_image(name, "latest")
        self.answers: list[Deferred[Sequence[str]]] = []

    def by_hand(self) -> Deferred[Sequence[str]]:
        self.answers.append(Deferred())
        return self.answers[-1]

    def send(self) -> Reply:
        reply = self.daemon.send("GET", CATALOG)
        self.flush()
        return reply


class ListTests(CatalogTestCase):
    def test_has_what_the_pattern_lets_in_in_order(self) -> None:
        self.start(pattern="team/.*|us/.*")
        reply = self.get(CATALOG)
        self.assertEqual(["team/a", "team/a-b", "team/b", "us/app"], listed(reply))
        self.assertEqual(
            ("application/json", "no-cache"), (reply.header("Content-Type"), reply.header("Cache-Control"))
        )
        self.assertEqual(("BYPASS", "list", None), (reply.cache, reply.header("X-Cache-Reason"), reply.header("Link")))
        self.assertNotIn("Refused", self.logged())
        self.assertEqual([], self.standin.requests("registry"))

    def test_leaves_out_what_its_name_does_not_lead_to(self) -> None:
        table = RegistryTable(
            name=OTHER, protocol=Protocol.ECR, endpoint=f"https://{OTHER}", region="us-east-1", path_prefix="us"
        )
        self.start(others={table: StandIn(self.clock, registry=f"https://{OTHER}")})
        self.assertEqual(["other/c", "team/a", "team/a-b", "team/b"], listed(self.get(CATALOG)))

    def test_comes_in_pages_that_lead_on(self) -> None:
        """
        With names that a query has to escape, and with the registry that the client named.
        """
        for ns in ("", f"&ns={DEFAULT}"):
            path, seen = f"{CATALOG}?n=2{ns}", list[list[str]]()
            while path:
                reply = self.get(path)
                seen.append(listed(reply))
                self.assertEqual(DEFAULT if ns else None, reply.header("OCI-Namespace"))
                link = reply.header("Link")
                self.assertNotIn("/", (link or "").partition("?")[2])
                path = link[1 : link.index(">")] if link else ""
            self.assertEqual([["other/c", "team/a"], ["team/a-b", "team/b"], ["us/app"]], seen)

    def test_pages_are_what_was_asked_for(self) -> None:
        for query, names, more in (
            ("n=0", [], False),
            ("last=team%2Fa-b", ["team/b", "us/app"], False),
            ("last=team/ab&n=1", ["team/b"], True),
            ("last=zzz", [], False),
            ("n=", ["other/c", "team/a", "team/a-b", "team/b", "us/app"], False),
            ("n=5&last=", ["other/c", "team/a", "team/a-b", "team/b", "us/app"], False),
            ("n=999999999&n=x", ["other/c", "team/a", "team/a-b", "team/b", "us/app"], False),
        ):
            reply = self.get(f"{CATALOG}?{query}")
            self.assertEqual((names, more), (listed(reply), reply.header("Link") is not None), query)
        for query in ("n=x", "n=-1", "n=1.5", "n=%D9%A1", "n=9999999999"):
            self.assertRefused(self.get(f"{CATALOG}?{query}"), 400, "PAGINATION_NUMBER_INVALID", "from 1 to 1000")
        self.assertEqual(1, self.daemon.listings)

    def test_no_page_has_more_than_a_thousand(self) -> None:
        self.start(list_repositories=self.by_hand)
        names = [f"team/{number:05}{'x' * 200}" for number in range(2500)]
        reply = self.send()
        self.answers[0].callback(names)
        self.flush()
        self.assertEqual(names[:1000], listed(reply))
        self.assertEqual(names[1000:2000], listed(self.get(f"{CATALOG}?n=2000&last={names[999]}")))

    def test_is_of_the_default_alone(self) -> None:
        table = RegistryTable(name=OTHER, protocol=Protocol.ECR, endpoint=f"https://{OTHER}", region="us-east-1")
        self.start(others={table: StandIn(self.clock, registry=f"https://{OTHER}")})
        for reply in (self.get(f"{CATALOG}?ns={OTHER}"), self.get(CATALOG, Host=OTHER)):
            self.assertRefused(reply, 404, "UNSUPPORTED", "default registry alone")
        for reply in (self.get(f"{CATALOG}?ns=quay.io"), self.get(CATALOG, Host="quay.io")):
            self.assertRefused(reply, 404, "NAME_UNKNOWN")
        self.assertEqual(0, self.daemon.listings)

    def test_is_only_read(self) -> None:
        self.assertWhole(self.head(CATALOG), b"")
        for method in ("POST", "DELETE", "PUT"):
            self.assertEqual(405, self.daemon.ask(method, CATALOG).code)

    def test_large_pages_count_as_transfers(self) -> None:
        self.start(list_repositories=self.by_hand, limits=Limits(transfers=1))
        slow = self.send()
        slow.stop_reading()
        self.answers[0].callback([f"team/{number:05}{'x' * 200}" for number in range(1000)])
        self.flush()
        self.assertRefused(self.get(CATALOG), 503, "UNAVAILABLE", "as many large answers")
        slow.read_on()
        self.flush()
        self.assertEqual(1000, len(listed(slow)))


class QuestionTests(CatalogTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.start(list_repositories=self.by_hand)

    def test_is_one_for_all_who_ask_and_for_a_minute(self) -> None:
        waiting = [self.send() for _ in range(5)]
        self.assertEqual(1, len(self.answers))
        self.answers[0].callback(["team/a"])
        self.flush()
        self.assertEqual([["team/a"]] * 5, [listed(each) for each in waiting])
        self.pass_time(KEPT_SECONDS - 2)
        self.assertEqual(["team/a"], listed(self.get(CATALOG)))
        self.pass_time(3)
        late = self.send()
        self.answers[1].callback(["team/b"])
        self.flush()
        self.assertEqual(["team/b"], listed(late))

    def test_that_fails_is_one_clear_error_and_not_asked_again_at_once(self) -> None:
        for problem, status, code, said, logged in (
            (
                CredentialsError("AWS credentials are refused: AccessDeniedException: no"),
                403,
                "DENIED",
                "does not let",
                "ecr:DescribeRepositories",
            ),
            (
                TokenUnavailableError("AWS answers ThrottlingException: slow"),
                502,
                "UNAVAILABLE",
                "did not list",
                "Throttling",
            ),
            (EndpointConnectionError(endpoint_url="https://x"), 502, "UNAVAILABLE", "did not list", "https://x"),
            (TooManyError("ECR has more"), 502, "UNAVAILABLE", "did not list", "ECR has more"),
        ):
            waiting = [self.send(), self.send()]
            self.answers[-1].errback(problem)
            self.flush()
            for reply in (*waiting, self.get(CATALOG)):
                self.assertRefused(reply, status, code, said)
            self.assertIn(logged, self.logged())
            asked = len(self.answers)
            self.pass_time(FAILED_SECONDS + 1)
            self.assertEqual(asked, len(self.answers))
        reply = self.send()
        self.answers[-1].callback(["team/a"])
        self.flush()
        self.assertEqual(["team/a"], listed(reply))

    def test_that_hangs_is_an_error_in_time_and_keeps_one_thread(self) -> None:
        """
        A late result is used.
        """
        reply = self.send()
        self.pass_time(PATIENCE + 1)
        for each in (reply, self.get(CATALOG)):
            self.assertRefused(each, 504, "UNAVAILABLE", "has not listed its repositories within 25 s")
            self.assertEqual(("unreachable", "5"), (each.header("X-Cache-Reason"), each.header("Retry-After")))
        self.assertEqual(1, len(self.answers))
        self.assertEqual(200, self.get("/v2/team/a/manifests/latest").code)
        self.answers[0].callback(["team/a"])
        self.assertEqual(["team/a"], listed(self.get(CATALOG)))
        self.pass_time(KEPT_SECONDS + 1)
        self.send()
        self.assertEqual(2, len(self.answers))

    def test_a_pattern_that_takes_too_long_is_told(self) -> None:
        self.start(pattern=CATASTROPHE, list_repositories=self.by_hand)
        reply = self.send()
        self.answers[0].callback([LONG])
        self.flush()
        self.assertRefused(reply, 503, "UNAVAILABLE", "takes too long for these names")


class DescribeTests(SynchronousTestCase):
    """
    The requests to AWS.
    """

    def setUp(self) -> None:
        self.aws = FakeAws(self)
        self.send = self.aws._send  # noqa: SLF001
        self.bodies: list[dict[str, Any]] = []

    def pages(self, *pages: Sequence[str]) -> None:
        """
        Answer with these pages, one after the other; the last has no next page.
        """
        answers = [{"repositories": [{"repositoryName": name} for name in names]} for names in pages]
        tokens = [{"nextToken": f"token-{number}"} for number, _ in enumerate(pairwise(pages))]
        texts = iter([json.dumps({**answer, **token}) for answer, token in zip(answers, [*tokens, {}], strict=True)])
        self.bodies.clear()

        def answer(request: Any) -> Any:
            self.bodies.append(json.loads(request.body))
            self.aws.grants(next(texts))
            return self.send(request)

        self.aws._send = answer  # type: ignore[method-assign] # noqa: SLF001

    def ask(self, account: str | None = "111122223333", **more: Any) -> list[str]:
        return list_repositories("eu-west-1", Credentials(), account, **more)

    def test_all_pages_of_the_account_that_the_registry_is_of(self) -> None:
        """
        The credentials may be those of another account.
        """
        self.pages(["b", "a"], ["c"])
        self.assertEqual(["b", "a", "c"], self.ask())
        first = {"registryId": "111122223333", "maxResults": 1000}
        self.assertEqual([first, {**first, "nextToken": "token-0"}], self.bodies)

    def test_of_the_credentials_own_account_where_no_other_is_known(self) -> None:
        self.pages([])
        self.assertEqual([], self.ask(None))
        self.assertEqual([{"maxResults": 1000}], self.bodies)

    def test_has_an_end(self) -> None:
        """
        In pages, in bytes, in seconds.
        """
        self.pages(*[["a"]] * (PAGES + 1))
        self.assertRaises(TooManyError, self.ask)
        self.assertEqual(PAGES, len(self.bodies))
        self.pages(["x" * (BYTES // 2)], ["x" * (BYTES // 2 + 1)], ["x"])
        self.assertRaises(TooManyError, self.ask)
        ticks = count(0.0, SECONDS)
        self.pages(["a"], ["b"], ["c"])
        self.assertRaises(TimeoutError, self.ask, clock=lambda: next(ticks))

    def test_a_refusal_is_one(self) -> None:
        self.aws.refuses("AccessDeniedException", "not authorized to perform: ecr:DescribeRepositories")
        problem = self.assertRaises(CredentialsError, self.ask)
        self.assertIn("ecr:DescribeRepositories", str(problem))
