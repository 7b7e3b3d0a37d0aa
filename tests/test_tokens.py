"""
What clients see of problems with the token.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred

from ecrproxy.registry.aws import TokenUnavailableError
from ecrproxy.registry.ecr import Token
from tests.daemon import DaemonTestCase, Reply, noise


class TokenTestCase(DaemonTestCase):
    """
    A daemon with a token, and content that was not requested yet.
    """

    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.path = "/v2/team/app/manifests/latest"
        self.data = noise("blob", 1000)
        self.blob = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', self.data)}"

    @property
    def issued(self) -> int:
        """
        Return how many tokens AWS issued.
        """
        return len(self.standin.tokens._until)  # noqa: SLF001

    def pull(self, path: str) -> Reply:
        """
        Send a request, and advance the clock by a second.
        """
        reply = self.daemon.send("GET", path)
        self.flush()
        self.pass_time(1)
        return reply


class RefusedTokenTests(TokenTestCase):
    def test_one_that_has_expired_is_replaced(self) -> None:
        """
        Twenty clients whose token has expired get their answers, with one refresh.
        """
        self.standin.expire_tokens()
        replies = [self.daemon.send("GET", self.path) for _ in range(10)]
        replies += [self.daemon.send("GET", self.blob) for _ in range(10)]
        self.flush()
        self.pass_time(1)
        for reply in replies[:10]:
            self.assertWhole(reply, self.image.manifest)
        for reply in replies[10:]:
            self.assertWhole(reply, self.data)
        self.assertEqual(2, self.issued)

    def test_one_that_ecr_does_not_know_is_replaced(self) -> None:
        """
        A token that ECR can no longer read, as after a change of its keys, costs one refresh.
        """
        self.standin.forget_tokens()
        self.assertWhole(self.pull(self.path), self.image.manifest)
        self.assertEqual(1, self.issued)

    def test_one_that_was_revoked_is_replaced(self) -> None:
        """
        A bare 401, as other registries answer, costs one refresh.
        """
        self.standin.fail("registry", status=401, body=b"Not Authorized\n", times=1)
        self.assertWhole(self.pull(self.path), self.image.manifest)
        self.assertEqual(2, self.issued)

    def test_all_of_them_being_refused_is_said(self) -> None:
        """
        If ECR accepts no token at all the client gets 502 after one refresh, and cached content is served.
        """
        self.assertWhole(self.get(self.blob), self.data)
        refusal = b'{"errors": [{"code": "DENIED", "message": "Your authorization token has expired."}]}'
        fault = self.standin.fail("registry", status=403, body=refusal)
        self.assertRefused(self.pull(self.path), 502, "UNAVAILABLE", "does not accept the proxy's token")
        self.assertEqual(2, self.issued)
        self.assertWhole(self.get(self.blob), self.data, "HIT")
        fault.remove()
        self.assertWhole(self.pull(self.path), self.image.manifest)

    def test_iam_saying_no_is_not_about_the_token(self) -> None:
        """
        What IAM forbids is 403 DENIED, without AWS's identities, with the reason in the log, and without a refresh.
        """
        self.standin.deny("ecr:BatchGetImage")
        reply = self.pull(self.path)
        self.assertRefused(reply, 403, "DENIED")
        self.assertNotIn(b"arn:", reply.body)
        self.assertIn("not authorized to perform: ecr:BatchGetImage", self.logged())
        self.assertEqual(1, self.issued)
        self.standin.heal()
        self.assertWhole(self.pull(self.path), self.image.manifest)


class NoTokenTests(TokenTestCase):
    """
    STS, ECR's API or the metadata service in trouble: the thread that asks them returns at last, or doesn't.
    """

    def setUp(self) -> None:
        super().setUp()
        self.asked: list[Deferred[Token]] = []

    def fetch(self) -> Deferred[Token]:
        """
        Ask AWS.
        """
        self.asked.append(Deferred())
        return self.asked[-1]

    def answer(self) -> None:
        """
        Have AWS issue a token.
        """
        self.asked[-1].callback(Token(self.standin.issue_token(), self.clock.seconds() + 12 * 3600))
        self.flush()

    def test_slow_at_the_start(self) -> None:
        """
        A request is answered as soon as there is a token; one that waits too long gets Retry-After.
        """
        self.start(fetch=self.fetch)
        reply = self.daemon.send("GET", self.path)
        self.pass_time(9)
        self.assertEqual(0, reply.code)
        self.answer()
        self.assertWhole(reply, self.image.manifest)
        self.asked.clear()
        self.start(fetch=self.fetch)
        reply = self.daemon.send("GET", self.blob)
        self.pass_time(11)
        self.assertRefused(reply, 503, "UNAVAILABLE", "no token")
        self.assertEqual("5", reply.header("Retry-After"))
        self.answer()
        self.assertWhole(self.get(self.blob), self.data)

    def test_down_or_throttling_while_the_token_is_good(self) -> None:
        """
        The old token is used as long as ECR accepts it.
        """
        self.start(fetch=self.fetch)
        self.answer()
        self.clock.advance(6 * 3600)
        self.asked[-1].errback(TokenUnavailableError("AWS answers ThrottlingException: Rate exceeded"))
        self.assertWhole(self.pull(self.path), self.image.manifest)
        self.assertIn("ThrottlingException", self.logged())

    def test_down_until_the_token_has_expired(self) -> None:
        """
        Then ECR rejects it: 502, cached content is served, and a minute after AWS is back everything works.
        """
        self.start(fetch=self.fetch)
        self.answer()
        self.assertWhole(self.get(self.blob), self.data)
        self.standin.expire_tokens()
        reply = self.daemon.send("GET", self.path)
        self.flush()
        self.asked[-1].errback(TokenUnavailableError("STS is down"))
        self.flush()
        self.assertRefused(reply, 502, "UNAVAILABLE", "does not accept")
        self.assertWhole(self.get(self.blob), self.data, "HIT")
        for _ in range(61):
            self.pass_time(1)
            if not self.asked[-1].called:
                self.answer()
        self.assertWhole(self.pull(self.path), self.image.manifest)

    def test_silent_when_a_token_is_refused(self) -> None:
        """
        Requests wait ten seconds for a refresh that does not end.
        """
        self.start(fetch=self.fetch)
        self.answer()
        self.standin.expire_tokens()
        reply = self.daemon.send("GET", self.path)
        self.pass_time(11)
        self.assertRefused(reply, 502, "UNAVAILABLE", "does not accept")
        self.answer()
        self.assertWhole(self.pull(self.path), self.image.manifest)
