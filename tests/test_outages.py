"""
Each upstream dependency failing, slow and hung: requests that don't need it are not affected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import DNSLookupError
from twisted.internet.interfaces import IHostnameResolver, IResolutionReceiver
from twisted.internet.task import deferLater
from twisted.names import dns
from twisted.names.error import DNSQueryTimeoutError, DNSServerError
from twisted.web.client import URI
from twisted.web.iweb import IAgent, IResponse
from zope.interface import implementer

from ecrproxy.registry.aws import TokenUnavailableError
from ecrproxy.registry.circuit import PAUSE
from ecrproxy.registry.ecr import FETCH_SECONDS, PATIENCE, Token
from ecrproxy.registry.resolver import ChosenServers
from ecrproxy.stale import STALE_SECONDS
from tests.daemon import DaemonTestCase, noise

MANIFEST = "/v2/team/app/manifests/"


class DependencyTestCase(DaemonTestCase):
    """
    A daemon with an image in its cache, freshly started.
    """

    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.data = noise("blob", 100_000)
        self.blob = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', self.data)}"
        self.other = noise("other", 1000)
        self.new = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', self.other)}"
        self.assertWhole(self.get(MANIFEST + "latest"), self.image.manifest)
        self.assertWhole(self.get(self.blob), self.data)

    def assertUnnoticed(self) -> None:
        """
        Assert that cached content is served at once, and that the daemon is ready to serve.
        """
        self.assertWhole(self.get(MANIFEST + self.image.digest), self.image.manifest, "HIT")
        self.assertWhole(self.get(self.blob), self.data, "HIT")
        self.assertEqual(200, self.get("/readyz").code)
        self.assertEqual(200, self.get("/healthz").code)

    def assertStaleWithin(self, seconds: float) -> None:
        reply = self.daemon.send("GET", MANIFEST + "latest")
        self.pass_time(seconds)
        self.assertWhole(reply, self.image.manifest, "STALE")


class TokenServiceTests(DependencyTestCase):
    def restart(self, fetch: Callable[[], Deferred[Token]]) -> None:
        """
        Restart with this as AWS's token service.
        """
        self.start(fetch=fetch)

    def token(self) -> Token:
        return Token(self.standin.issue_token(), self.clock.seconds() + 12 * 3600)

    def failing(self) -> Deferred[Token]:
        return deferLater(self.clock, 0, self.fail_for, TokenUnavailableError("AWS is down"))

    def fail_for(self, problem: Exception) -> Token:
        raise problem

    def test_failing(self) -> None:
        self.restart(self.failing)
        self.assertUnnoticed()
        self.assertStaleWithin(PATIENCE + 1)
        self.assertStaleWithin(0)
        self.assertRefused(self.get(self.new), 503, "UNAVAILABLE", "AWS is down")

    def test_slow(self) -> None:
        """
        Slower than the timeout of a fetch: the token is used when it arrives.
        """
        self.restart(lambda: deferLater(self.clock, FETCH_SECONDS + 20, self.token))
        self.assertUnnoticed()
        self.assertStaleWithin(PATIENCE + 1)
        self.pass_time(FETCH_SECONDS + 20)
        self.assertWhole(self.get(self.new), self.other, "MISS")

    def test_hung(self) -> None:
        self.restart(Deferred)
        self.assertUnnoticed()
        self.assertStaleWithin(PATIENCE + 1)
        self.pass_time(300)
        self.assertUnnoticed()
        self.assertStaleWithin(0)
        self.assertRefused(self.get(self.new), 503, "UNAVAILABLE", "has not answered")

    def test_hung_while_ecr_rejects_the_token(self) -> None:
        fetches: list[Deferred[Token]] = []

        def once() -> Deferred[Token]:
            fetches.append(Deferred())
            return deferLater(self.clock, 0, self.token) if len(fetches) == 1 else fetches[-1]

        self.restart(once)
        self.standin.expire_tokens()
        self.assertStaleWithin(PATIENCE + 1)
        self.pass_time(FETCH_SECONDS)
        self.assertUnnoticed()
        self.assertStaleWithin(0)


class EcrTests(DependencyTestCase):
    def test_failing(self) -> None:
        self.standin.fail("registry", status=500)
        self.assertUnnoticed()
        for _ in range(10):
            self.assertStaleWithin(0)

    def test_slow(self) -> None:
        self.standin.quirks.latency = 20
        slow = self.daemon.send("GET", self.new)
        self.assertUnnoticed()
        self.pass_time(45)
        self.assertWhole(slow, self.other, "MISS")

    def test_hung(self) -> None:
        self.standin.hang("registry")
        self.assertUnnoticed()
        asked = [self.daemon.send("GET", MANIFEST + "latest") for _ in range(20)]
        self.pass_time(31)
        for reply in asked:
            self.assertWhole(reply, self.image.manifest, "STALE")
        self.assertUnnoticed()


@implementer(IHostnameResolver)
class Nobody:
    """
    A host's resolver that knows no name.
    """

    def resolveHostName(  # type: ignore[override]  # (zope's stubs count self twice)
        self, receiver: IResolutionReceiver, *_: object, **__: object
    ) -> None:
        receiver.resolutionComplete()


@implementer(IResolutionReceiver)
class Found:
    """
    Fires with the addresses of a name.
    """

    def __init__(self) -> None:
        self.addresses: list[object] = []
        self.all: Deferred[list[object]] = Deferred()

    def resolutionBegan(self, resolution: object) -> None:
        pass

    def addressResolved(self, address: object) -> None:
        self.addresses.append(address)

    def resolutionComplete(self) -> None:
        self.all.callback(self.addresses)


@implementer(IAgent)
class Resolving:
    """
    Sends each request once the host's name is resolved.
    """

    def __init__(self, names: ChosenServers, agent: IAgent) -> None:
        self._names, self._agent = names, agent

    def request(self, method: bytes, uri: bytes, *rest: Any) -> Deferred[IResponse]:
        host, found = URI.fromBytes(uri).host.decode(), Found()
        self._names.resolveHostName(found, host)
        return found.all.addCallback(self._send, host, method, uri, *rest)

    def _send(self, addresses: list[object], host: str, *request: Any) -> Deferred[IResponse]:
        if not addresses:
            raise DNSLookupError(f"no results for hostname lookup: {host}")
        return self._agent.request(*request)


class NamesTests(DependencyTestCase):
    """
    Only the configured name servers know the registry, and each request resolves its name.
    """

    def setUp(self) -> None:
        super().setUp()
        self.well()
        servers: Any = self
        self.names = ChosenServers(servers, Nobody(), [], self.clock)
        self.start(agent=lambda back: Resolving(self.names, back.agent(persistent=True)))

    def lookupAddress(self, name: str, timeout: object) -> Deferred[Any]:
        """
        Act as a name server.
        """
        record = dns.RRHeader(name, dns.A, payload=dns.Record_A("192.0.2.1"))
        return deferLater(self.clock, self.seconds, self.reply, ([record], [], []))

    def lookupIPV6Address(self, name: str, timeout: object) -> Deferred[Any]:
        return deferLater(self.clock, self.seconds, self.reply, ([], [], []))

    def well(self) -> None:
        self.seconds = 0.0
        self.problem: Exception | None = None

    def reply(self, answer: object) -> object:
        if self.problem is not None:
            raise self.problem
        return answer

    def assertRecoversWithin(self, seconds: float) -> None:
        self.well()
        self.pass_time(seconds)
        self.assertWhole(self.get(self.new), self.other, "MISS")

    def fail_for(self, seconds: int) -> None:
        self.problem = DNSServerError()
        for _ in range(seconds):
            for number in range(5):
                self.daemon.send("GET", f"{MANIFEST}v{number}")
            self.pass_time(1)
        self.assertUnnoticed()
        self.assertStaleWithin(0)
        self.assertIn("DNS lookup failed", self.logged())

    def test_failing_for_two_seconds(self) -> None:
        self.fail_for(2)
        self.assertRecoversWithin(PAUSE)

    def test_failing_for_long(self) -> None:
        self.fail_for(120)
        self.assertRecoversWithin(PAUSE)

    def test_failing_once_the_name_was_known(self) -> None:
        """
        The last addresses are used.
        """
        self.assertWhole(self.get(MANIFEST + "latest"), self.image.manifest, "REVALIDATED")
        self.pass_time(3600)
        self.problem = DNSServerError()
        self.assertWhole(self.get(MANIFEST + "latest"), self.image.manifest, "REVALIDATED")

    def test_slow(self) -> None:
        self.seconds = 2.5
        slow = self.daemon.send("GET", self.new)
        self.assertUnnoticed()
        self.pass_time(6)
        self.assertWhole(slow, self.other, "MISS")

    def test_hung(self) -> None:
        """
        Servers that time out after three seconds each time.
        """
        self.seconds, self.problem = 3.0, DNSQueryTimeoutError(1)
        for number in range(5):
            self.daemon.send("GET", f"{MANIFEST}v{number}")
        self.assertUnnoticed()
        self.pass_time(15)
        self.assertUnnoticed()
        self.assertStaleWithin(0)
        self.assertRecoversWithin(8)


class ListTests(DependencyTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.tags = "/v2/team/app/tags/list"
        self.referrers = f"/v2/team/app/referrers/{self.image.digest}"

    def test_are_served_as_last_known(self) -> None:
        """
        If an admission controller finds no signature, no pod starts, even if its image is served.
        """
        before = {path: bytes(self.get(path).body) for path in (self.tags, self.referrers, f"{self.tags}?n=1")}
        outage = self.standin.fail("registry", status=503)
        for path, body in before.items():
            reply = self.daemon.send("GET", path)
            self.pass_time(30)
            self.assertWhole(reply, body, "STALE")
            self.assertNotIn(reply.header("X-Cache-Reason"), (None, "list"))
        self.assertEqual(503, self.get(f"{self.referrers}?artifactType=x").code)
        outage.remove()
        self.pass_time(PAUSE)
        self.assertWhole(self.get(self.tags), before[self.tags], "BYPASS")

    def test_are_served_as_last_known_when_ecr_takes_too_long(self) -> None:
        body = bytes(self.get(self.tags).body)
        self.standin.hang("registry")
        reply = self.daemon.ask("GET", self.tags)
        self.pass_time(STALE_SECONDS)
        self.assertWhole(reply, body, "STALE")

    def test_that_ecr_refuses_are_not_served_later(self) -> None:
        self.assertEqual(200, self.get(self.tags).code)
        self.standin.deny(times=1)
        self.assertEqual(403, self.get(self.tags).code)
        self.standin.fail("registry", status=503)
        self.assertEqual(503, self.get(self.tags).code)

    def test_are_asked_for_once_for_all_who_ask_at_once(self) -> None:
        for path in (self.tags, self.referrers):
            replies = [self.daemon.send("GET", path) for _ in range(50)]
            self.pass_time(0)
            self.assertEqual([200] * 50, [reply.code for reply in replies])
            self.assertEqual(1, self.standin.count("registry", path_contains=path))

    def test_are_held_in_bounded_memory(self) -> None:
        self.standin.fail("registry", body=b'{"tags": ["' + b"x" * 2**20 + b'"]}', status=200, times=1)
        self.assertEqual(200, self.get(f"{self.tags}?n=1").code)
        self.standin.fail("registry", status=503)
        self.assertEqual(503, self.get(f"{self.tags}?n=1").code)
