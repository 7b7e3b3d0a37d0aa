"""
Registries other than ECR's private ones: their challenges, and where tokens go.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.registry.aws import TokenUnavailableError
from ecrproxy.registry.bearer import REDIRECTS, REFUSED_SECONDS, TOGETHER, TOKEN_SECONDS
from ecrproxy.registry.challenges import LONGEST_TOKEN, Challenge, Pass, may_follow
from ecrproxy.registry.login import LONGEST, READ_SECONDS, Login
from ecrproxy.settings.registry_table import Protocol, RegistryTable
from tests.daemon import MIB, DaemonTestCase, Reply, at_once, noise
from tests.registry import Fault, StandIn
from tests.registry import Reply as Answer
from tests.registry_content import OCI_MANIFEST
from tests.store_contract import scratch

TOKEN_QUERY = "service=registry.test&scope=repository%3Alibrary%2Fnginx%3Apull"
HUB, REALM = "registry-1.docker.io", "https://auth.docker.io/token"
PUBLIC, PUBLIC_REALM = "public.ecr.aws", "https://public.ecr.aws:8443/token/"


class ChallengeTests(SynchronousTestCase):
    def test_the_one_that_is_known_here_is_read(self) -> None:
        """
        In any order and case, quoted or not, from one header or several. Bearer is preferred to a password.
        """
        wanted = Challenge("bearer", "https://a.test/token?x=1", "a b, c")
        said = 'Bearer realm="https://a.test/token?x=1",service="a b, c"'
        for values in (
            [said],
            [f'Basic realm="x", {said}'],
            [f"Negotiate, {said}, error=invalid_token"],
            ['Basic realm="x"', said],
            [said.replace("Bearer", "bearer").replace("realm=", "REALM = ").replace(",service", " , service")],
            [f'{said},scope="repository:other/app:pull,push"'],
        ):
            self.assertEqual(wanted, Challenge.read(values), values)
        self.assertEqual(Challenge("basic"), Challenge.read(['Basic realm="x"']))
        for values in ([], [""], ["Negotiate"], ["realm=x"], ["===,,,\"'"]):
            self.assertIsNone(Challenge.read(values), values)

    def test_a_token_is_for_pulls_of_one_repository(self) -> None:
        """
        Unless the registry's tokens are for all repositories, as ECR Public's.
        """
        one = Challenge("bearer", "https://a.test/token?x=1", "a")
        self.assertEqual(
            "https://a.test/token?x=1&service=a&scope=repository%3Ateam%2Fapp%3Apull", one.url(one.scope_of("team/app"))
        )
        public = Challenge.read(['Bearer realm="https://a.test",scope="aws"']) or Challenge()
        self.assertEqual("https://a.test/?scope=aws", public.url(public.scope_of("team/app")))

    @given(st.lists(st.text(max_size=200), max_size=3))
    def test_no_header_breaks_it(self, values: list[str]) -> None:
        found = Challenge.read(values)
        self.assertTrue(found is None or found.scheme in ("basic", "bearer"))

    def test_an_answer_that_is_no_token_is_refused(self) -> None:
        self.assertEqual(Pass("x", 60), Pass.read(b'{"access_token": "x"}'))
        self.assertEqual(Pass("x", 9), Pass.read(b'{"token": "x", "expires_in": 9}'))
        self.assertNotIn("x", repr(Pass("x", 60)))
        long = json.dumps({"token": "x" * (LONGEST_TOKEN + 1)}).encode()
        for body in (b"", b"[]", b"{}", b'{"token": 1}', b'{"token": "a b"}', b'{"token": "a\\r\\nX: y"}', long):
            self.assertRaises(ValueError, Pass.read, body)
        for seconds in ("-1", '"9"', "true", "NaN"):
            self.assertRaises(ValueError, Pass.read, b'{"token": "x", "expires_in": %s}' % seconds.encode())


class FollowTests(SynchronousTestCase):
    def test_a_realm_is_followed_within_the_registrys_own_domain(self) -> None:
        for realm, endpoint in (
            (REALM, f"https://{HUB}"),
            ("https://quay.io/v2/auth", "https://quay.io"),
            ("https://auth.quay.io/v2/auth", "https://quay.io"),
            ("https://a.test:5001/token", "https://a.test:5000"),
            ("http://a.test/token", "http://a.test"),
            ("https://a.test/token", "http://a.test"),
            ("https://127.0.0.1:5001/token", "https://127.0.0.1:5000"),
        ):
            self.assertTrue(may_follow(realm, endpoint, ()), realm)
        for realm, endpoint in (
            ("https://auth.example.co.uk/token", "https://example.co.uk"),
            ("https://auth.example.co.uk/token", "https://registry.example.co.uk"),
            ("https://auth.co.com/token", "https://registry.co.com"),
        ):
            self.assertTrue(may_follow(realm, endpoint, ()), realm)

    def test_it_is_followed_nowhere_else_but_where_the_operator_says(self) -> None:
        for realm, endpoint in (
            ("http://auth.docker.io/token", f"https://{HUB}"),
            ("https://docker.io.evil.test/token", f"https://{HUB}"),
            ("https://evildocker.io/token", f"https://{HUB}"),
            ("https://other.io/token", "https://quay.io"),
            ("https://me:secret@quay.io/token", "https://quay.io"),
            ("https://10.0.0.2/token", "https://10.0.0.1"),
            ("https://evil.co.uk/token", "https://example.co.uk"),
            ("https://evil.com.au/token", "https://example.com.au"),
            ("ftp://quay.io/token", "https://quay.io"),
            ("https://[x/token", "https://quay.io"),
            ("https://quay.io:x/token", "https://quay.io"),
            ("/token", "https://quay.io"),
            ("", "https://quay.io"),
        ):
            self.assertFalse(may_follow(realm, endpoint, ()), realm)
        for realm, endpoint in (("public.ecr.aws", "ecr-public.aws.com"), ("ecr-public.aws.com", "public.ecr.aws")):
            self.assertTrue(may_follow(f"https://{realm}/token/", f"https://{endpoint}", ()), realm)
        self.assertFalse(may_follow("http://public.ecr.aws/token/", "https://ecr-public.aws.com", ()))
        self.assertTrue(may_follow("https://other.io/token", "https://quay.io", {"other.io"}))
        self.assertFalse(may_follow("http://other.io/token", "https://quay.io", {"other.io"}))
        self.assertFalse(may_follow("https://other.io:8443/token", "https://quay.io", {"other.io"}))


class LoginTests(SynchronousTestCase):
    def test_a_file_system_that_hangs_delays_no_other_password(self) -> None:
        """
        Nor one that is read from it once it answers again; it uses one thread, however many requests need the password.
        """
        hung, well, clock = scratch(self), scratch(self), Clock()
        hung.write_text("one")
        well.write_text("two")
        kept: list[Deferred[Any]] = []

        def begin(blocking: Callable[..., Any], *args: Any) -> Deferred[Any]:
            result = Deferred[Any]()
            kept.append(result)
            return result

        slow, other = Login("ann", hung, begin, clock), Login("bob", well, at_once, clock)
        asked = [Deferred.fromCoroutine(slow.get()) for _ in range(3)]
        with capturedLogs() as events:
            clock.advance(READ_SECONDS)
        self.assertIn("check the file system of the password", "".join(map(str, map(formatEvent, events))))
        for each in asked:
            self.assertIn("can't be read", str(self.failureResultOf(each, TokenUnavailableError).value))
        self.assertEqual(
            base64.b64encode(b"bob:two").decode(), self.successResultOf(Deferred.fromCoroutine(other.get()))
        )
        self.failureResultOf(Deferred.fromCoroutine(slow.get()), TokenUnavailableError)
        self.assertEqual(1, len(kept))
        kept[0].callback(b"one")
        again = Deferred.fromCoroutine(slow.get())
        kept[1].callback(b"one")
        self.assertEqual(base64.b64encode(b"ann:one").decode(), self.successResultOf(again))

    def test_where_no_thread_can_be_started_there_is_no_password(self) -> None:
        login = Login("ann", scratch(self), lambda *_: fail(RuntimeError("can't start new thread")), Clock())
        self.assertNone(login, "can't start new thread")

    def assertNone(self, login: Login, why: str) -> None:
        """
        Assert that there is no password, that the log says why, and that the client doesn't learn the file.
        """
        with capturedLogs() as events:
            problem = self.failureResultOf(Deferred.fromCoroutine(login.get()), TokenUnavailableError).value
        self.assertEqual("its password can't be read; the proxy's log says why", str(problem))
        self.assertIn(why, str(formatEvent(events[-1])))

    def test_the_password_is_the_one_that_the_file_has_now(self) -> None:
        file = scratch(self)
        login = Login("ann", file, at_once, Clock())
        for text in ("one", "two\n", "three: ü\r\n"):
            file.write_bytes(text.encode())
            secret = self.successResultOf(login.renew("x"))
            self.assertEqual(f"ann:{text.strip()}", base64.b64decode(secret).decode())
            self.assertEqual(secret, self.successResultOf(login.get()))

    def test_a_file_without_one_is_told(self) -> None:
        file = scratch(self)
        for data in (b"", b"\n", b"one\ntwo\n", b"x" * (LONGEST + 1)):
            file.write_bytes(data)
            self.assertNone(Login("ann", file, at_once, Clock()), f"{str(file)!r} has no password")
        file.unlink()
        self.assertNone(Login("ann", file, at_once, Clock()), f"{str(file)!r} can't be read: No such file")
        os.mkfifo(file)
        self.assertNone(Login("ann", file, at_once, Clock()), "can't be read: it is a FIFO, not a regular file")


class OthersTests(DaemonTestCase):
    """
    Docker Hub and ECR Public behind one daemon.
    """

    def setUp(self) -> None:
        super().setUp()
        self.hub = StandIn(self.clock, registry=f"https://{HUB}", bucket="https://cdn.test", realm=REALM)
        self.public = StandIn(
            self.clock, registry=f"https://{PUBLIC}", bucket="https://cloudfront.test", realm=PUBLIC_REALM
        )
        self.public.bearers.public, self.public.quirks.blob_head = True, 401
        self.layer = noise("layer", 100_000)
        self.nginx = self.hub.push_image("library/nginx", "latest", layers=[self.layer])
        self.lambdas = self.public.push_image("lambda/python", "latest", layers=[self.layer])
        self.begin()

    def begin(self, *, anonymous: bool = True, realms: frozenset[str] = frozenset()) -> None:
        """
        Start a daemon.
        """
        hub = RegistryTable(
            name="docker.io",
            protocol=Protocol.OCI,
            endpoint=f"https://{HUB}",
            anonymous=anonymous,
            path_prefix="hub",
            realms=realms,
        )
        public = RegistryTable(
            name=PUBLIC, protocol=Protocol.ECR_PUBLIC, endpoint=f"https://{PUBLIC}", anonymous=anonymous
        )
        self.start(others={hub: self.hub, public: self.public})

    def blob(self, prefix: str) -> str:
        digest = json.loads(self.nginx.manifest)["layers"][0]["digest"]
        return f"/v2/{prefix}/blobs/{digest}"

    def shown(self, standin: StandIn, service: str) -> set[str | None]:
        return {each.headers.get("authorization") for each in standin.asked if each.service == service}

    def test_images_are_pulled_by_the_names_that_people_use(self) -> None:
        self.assertWhole(self.get("/v2/hub/nginx/manifests/latest"), self.nginx.manifest, "MISS")
        self.assertWhole(self.get("/v2/library/nginx/manifests/latest?ns=docker.io"), self.nginx.manifest, None)
        self.assertWhole(self.get(self.blob("hub/nginx")), self.layer, "MISS")
        path = f"/v2/{PUBLIC}/lambda/python/manifests/latest"
        self.assertWhole(self.get(path), self.lambdas.manifest, "MISS")
        sent = self.public.bytes_sent
        self.assertWhole(self.get(self.blob(f"{PUBLIC}/lambda/python")), self.layer, None)
        self.assertLessEqual(self.public.bytes_sent - sent, 1)
        self.assertEqual(200, self.head(self.blob(f"{PUBLIC}/lambda/python")).code)

    def test_one_token_serves_a_repository_as_long_as_it_is_good(self) -> None:
        for standin, path in ((self.hub, "/v2/hub/nginx"), (self.public, f"/v2/{PUBLIC}/lambda/python")):
            for _ in range(3):
                self.get(f"{path}/manifests/latest")
            self.get(f"{path}/tags/list")
            self.assertEqual(1, standin.count("realm"))
            self.pass_time(standin.bearers.lifetime)
            self.assertEqual(200, self.get(f"{path}/manifests/latest").code)
            self.assertEqual(2, standin.count("realm"))

    def redirect(self, kind: str, body: bytes, headers: dict[str, str], status: int = 200) -> None:
        """
        Redirect manifests or lists, as registry.k8s.io does for all.
        """
        self.hub.fail("registry", status=307, path_contains=kind, headers={"Location": f"https://cdn.test/k8s/{kind}"})
        self.hub.fail("bucket", status=status, path_contains=kind, headers=headers, body=body)

    def test_manifests_and_lists_may_be_elsewhere(self) -> None:
        """
        registry.k8s.io redirects everything to one of several registries. The token does not go there.
        """
        self.redirect("manifests", self.nginx.manifest, {"Content-Type": OCI_MANIFEST})
        self.redirect("tags", b'{"name": "k8s/nginx", "tags": ["latest"]}', {})
        head = self.head("/v2/hub/nginx/manifests/latest")
        self.assertEqual((200, self.nginx.digest), (head.code, head.header("Docker-Content-Digest")))
        for reference, status in (("latest", "MISS"), (self.nginx.digest, "HIT")):
            path = f"/v2/hub/nginx/manifests/{reference}"
            self.assertWhole(self.get(path, Accept=OCI_MANIFEST), self.nginx.manifest, status)
        self.assertEqual(["latest"], json.loads(self.get("/v2/hub/nginx/tags/list").body)["tags"])
        self.assertEqual({None}, self.shown(self.hub, "bucket"))
        self.assertIn(OCI_MANIFEST, {each.headers.get("accept") for each in self.hub.requests("bucket")})

    def test_what_is_refused_elsewhere_is_refused(self) -> None:
        missing = json.dumps({"errors": [{"code": "MANIFEST_UNKNOWN", "message": "no such image"}]}).encode()
        self.redirect("manifests", missing, {}, 404)
        self.assertRefused(self.get("/v2/hub/nginx/manifests/latest"), 404, "MANIFEST_UNKNOWN", "no such image")
        self.assertRefused(self.get("/v2/hub/nginx/manifests/latest"), 404, "MANIFEST_UNKNOWN", "no such image")
        self.redirect("manifests", b"", {"WWW-Authenticate": "Bearer realm=x"}, 401)
        said = "redirects to cdn.test, which asks for a token of its own; make it the endpoint of docker.io"
        self.assertRefused(self.get("/v2/hub/nginx/manifests/latest"), 502, "UNAVAILABLE", said)
        self.redirect("manifests", b"", {"Location": "https://cdn.test/k8s/manifests"}, 302)
        self.assertRefused(self.get("/v2/hub/nginx/manifests/latest"), 502, "UNAVAILABLE", "more than 5 times")
        self.hub.heal()
        self.hub.fail("registry", status=307, path_contains="manifests", headers={"Location": "http://cdn.test/x"})
        self.assertRefused(self.get("/v2/hub/nginx/manifests/latest"), 502, "UNAVAILABLE", "does not go")
        self.hub.heal()
        self.assertEqual(200, self.get("/v2/hub/nginx/manifests/latest").code)

    def test_referrers_that_a_registry_does_not_know_are_404(self) -> None:
        """
        distribution 2 answers with plain text. Clients look for the referrers tag only after a 404.
        """
        for prefix, standin, image in (
            ("hub/nginx", self.hub, self.nginx),
            (f"{PUBLIC}/lambda/python", self.public, self.lambdas),
        ):
            path = f"/v2/{prefix}/referrers/{image.digest}"
            for body in (b"404 page not found\n", b"<html>No such page</html>", b""):
                fault = standin.fail("registry", status=404, path_contains="referrers", body=body)
                reply = self.get(path)
                self.assertRefused(reply, 404, "UNSUPPORTED", "referrers")
                self.assertEqual("not-found", reply.header("X-Cache-Reason"))
                fault.remove()
        self.redirect("referrers", b"404 page not found\n", {}, 404)
        self.assertRefused(self.get(f"/v2/hub/nginx/referrers/{self.nginx.digest}"), 404, "UNSUPPORTED", "referrers")

    def test_referrers_that_it_has_listed_before_are_as_last_known_where_a_page_is_in_their_place(self) -> None:
        path = f"/v2/hub/nginx/referrers/{self.nginx.digest}"
        before = bytes(self.get(path).body)
        self.hub.fail("registry", status=404, path_contains="referrers", body=b"404 page not found\n")
        self.assertWhole(self.get(path), before, "STALE")

    def test_of_another_digest_than_was_asked_for_is_nothing_that_is_elsewhere(self) -> None:
        self.redirect("manifests", self.nginx.manifest + b" ", {"Content-Type": OCI_MANIFEST})
        self.assertRefused(self.get(f"/v2/hub/nginx/manifests/{self.nginx.digest}"), 502, "UNAVAILABLE")

    def test_each_part_of_a_blob_that_the_registry_itself_sends_is_asked_for_with_the_token(self) -> None:
        """
        So nothing of it comes twice: neither when it breaks off, nor for a client that requests the end first.
        """
        self.hub.quirks.sends_blobs = True
        for number, wanted in enumerate(("", "bytes=20000000-20000999")):
            layer = noise(f"large {number}", 20 * MIB)
            digest = self.hub.push_image("library/nginx", "large", layers=[layer]).layers[0]
            self.get("/v2/hub/nginx/manifests/large")
            self.hub.hold(digest)
            sent = self.hub.bytes_sent
            reply = self.daemon.send("GET", f"/v2/hub/nginx/blobs/{digest}", **({"Range": wanted} if wanted else {}))
            self.flush()
            self.hub.deliver(digest, MIB)
            self.flush()
            self.hub.cut(digest)
            self.hub.release(digest)
            self.pass_time(5)
            self.assertTrue(bytes(reply.body) == (layer[20_000_000:20_001_000] if wanted else layer))
            self.assertWhole(self.get(f"/v2/hub/nginx/blobs/{digest}"), layer, "HIT")
            self.assertLess(self.hub.bytes_sent - sent, len(layer) + 4 * MIB)
            self.assertLess(len([each for each in self.hub.requests("registry") if digest in each.path]), 20)

    def test_a_token_is_for_its_repository_alone(self) -> None:
        self.hub.push_image("library/redis", "latest")
        self.get("/v2/hub/nginx/manifests/latest")
        self.get("/v2/hub/redis/manifests/latest")
        self.assertEqual(
            ["repository%3Alibrary%2Fnginx%3Apull", "repository%3Alibrary%2Fredis%3Apull"],
            [each.query.rpartition("scope=")[2] for each in self.hub.requests("realm")],
        )

    def test_a_token_that_is_no_longer_taken_is_renewed(self) -> None:
        """
        Docker Hub challenges; ECR Public answers 400 without a challenge.
        """
        for standin, path, image in (
            (self.hub, "/v2/hub/nginx/manifests/latest", self.nginx),
            (self.public, f"/v2/{PUBLIC}/lambda/python/manifests/latest", self.lambdas),
        ):
            self.get(path)
            standin.expire_tokens()
            self.assertWhole(self.get(path), image.manifest, "REVALIDATED")

    def test_what_is_denied_is_denied_and_no_outage(self) -> None:
        """
        Docker Hub issues anonymous tokens, and answers 401 for missing repositories. Nothing stale is served for it.
        """
        self.get("/v2/hub/nginx/manifests/latest")
        self.hub.bearers.denied.add("library/nginx")
        for name in ("nginx", "nginx", "nginx"):
            self.assertEqual((403, "DENIED"), self.get(f"/v2/hub/{name}/manifests/latest").error[:2])
        self.hub.bearers.denied.clear()
        self.assertEqual(200, self.get("/v2/hub/nginx/manifests/latest").code)

    def test_the_password_goes_to_the_realm_and_the_token_to_the_registry(self) -> None:
        self.begin(anonymous=False)
        login = self.daemon.others["docker.io"].tokens._token  # noqa: SLF001
        self.assertIsNotNone(login)
        assert login is not None
        self.hub.bearers.logins = {login.secret}
        self.hub.forget_asked()
        self.assertWhole(self.get("/v2/hub/nginx/manifests/latest"), self.nginx.manifest, None)
        self.get(self.blob("hub/nginx"))
        self.assertEqual({f"Basic {login.secret}"}, self.shown(self.hub, "realm"))
        shown = {(each or "").partition(" ")[0] for each in self.shown(self.hub, "registry")}
        self.assertEqual({"", "Bearer"}, shown)
        self.assertEqual({None}, self.shown(self.hub, "bucket"))

    def test_a_realm_elsewhere_is_not_asked(self) -> None:
        """
        Unless the operator lists it.
        """
        self.hub.bearers.realm = "https://auth.elsewhere.test/token"
        code, _, message = self.get("/v2/hub/nginx/manifests/latest").error
        self.assertEqual(502, code)
        self.assertIn("not of its own domain; if that is right, list its host in the registry's realms", message)
        self.assertEqual(0, self.hub.count("realm"))
        self.begin(realms=frozenset({"auth.elsewhere.test"}))
        self.get("/v2/hub/nginx/manifests/latest")
        self.assertEqual(
            ["auth.elsewhere.test"], [each.headers["host"] for each in self.hub.asked if "scope" in each.query]
        )

    def ask_after_redirect(self, location: str, *, then: str = REALM, anonymous: bool = False) -> Reply:
        """
        Redirect requests for a repository's token, and request its image.

        @param then: where the token service is by then.
        """
        self.hub.bearers.realm, logins, self.hub.bearers.logins = REALM, self.hub.bearers.logins, set()
        self.begin(anonymous=anonymous)
        self.get("/v2/hub/other/manifests/latest")
        self.hub.bearers.logins = logins
        self.hub.forget_asked()
        self.hub.bearers.realm = then
        told = {"Location": location.replace("?", f"?{TOKEN_QUERY}&")}
        redirect = self.hub.fail("realm" if then == REALM else "api", status=307, headers=told, path_contains="/token?")
        reply = self.get("/v2/hub/nginx/manifests/latest")
        redirect.remove()
        return reply

    def test_a_token_service_that_has_moved_is_followed_with_the_password_on_its_own_host(self) -> None:
        for location, then, shown in (
            ("https://auth.docker.io/moved?", REALM, True),
            ("moved?#here", REALM, True),
            ("https://login.docker.io/moved?", "https://login.docker.io/", False),
            ("https://registry-1.docker.io:8443/moved?", "https://registry-1.docker.io:8443/", False),
        ):
            reply = self.ask_after_redirect(location, then=then)
            self.assertEqual(200, reply.code, location)
            first, second = (each for each in self.hub.asked if "scope" in each.query)
            self.assertEqual(("/token", "/moved"), (first.path, second.path))
            self.assertIn("authorization", first.headers)
            self.assertEqual(shown, "authorization" in second.headers, location)

    def test_who_was_shown_no_password_refuses_none(self) -> None:
        self.hub.bearers.logins = {"other"}
        reply = self.ask_after_redirect("https://login.docker.io/moved?", then="https://login.docker.io/")
        self.assertRefused(reply, 403, "DENIED", "denies the proxy access")

    def test_it_is_followed_no_further_than_a_realm(self) -> None:
        for location in (
            "http://auth.docker.io/moved?",
            "https://elsewhere.test/?",
            "https://[x/?",
            "https://a:b@quay.io/?",
        ):
            for anonymous in (True, False):
                reply = self.ask_after_redirect(location, anonymous=anonymous)
                self.assertRefused(reply, 502, "UNAVAILABLE", f"{REALM} gives no token: ")
                self.assertEqual(["/token"], [each.path for each in self.hub.asked if "scope" in each.query])
        reply = self.ask_after_redirect("https://auth.docker.io/token?")
        self.assertRefused(reply, 502, "UNAVAILABLE", "more than 5 times")
        self.assertEqual(REDIRECTS + 1, len([each for each in self.hub.asked if "scope" in each.query]))

    def test_a_token_service_that_throttles_is_asked_for_no_such_token_until_it_says(self) -> None:
        """
        Others are not affected, whether they are other repositories' or those that are good.
        """
        self.hub.push_image("library/redis", "latest")
        self.get("/v2/hub/redis/manifests/latest")
        for told, seconds in (("40", 40), ("3600", 60), (None, 5)):
            self.begin()
            headers = {"Retry-After": told} if told else {}
            throttled = self.hub.fail("realm", status=429, headers=headers, path_contains="nginx")
            reply = self.daemon.send("GET", "/v2/hub/nginx/manifests/latest")
            self.pass_time(3)
            self.assertRefused(reply, 429, "TOOMANYREQUESTS", "auth.docker.io throttles the proxy")
            throttled.remove()
            self.hub.forget_asked()
            reply = self.get("/v2/hub/nginx/tags/list")
            self.assertRefused(reply, 429, "TOOMANYREQUESTS", "auth.docker.io throttles the proxy")
            self.assertLessEqual(int(reply.header("Retry-After") or 99), seconds)
            self.assertEqual([], self.hub.asked)
            self.assertEqual(200, self.get("/v2/hub/redis/manifests/latest").code)
            self.assertEqual(1, self.hub.count("realm"))
            self.pass_time(seconds)
            self.assertEqual(200, self.get("/v2/hub/nginx/tags/list").code)

    def test_a_token_service_that_throttles_leaves_what_is_known(self) -> None:
        self.get("/v2/hub/nginx/manifests/latest")
        self.pass_time(self.hub.bearers.lifetime)
        self.hub.fail("realm", status=429, headers={"Retry-After": "40"})
        for _ in range(2):
            self.assertWhole(self.get("/v2/hub/nginx/manifests/latest"), self.nginx.manifest, "STALE")
        self.assertEqual(2, self.hub.count("realm"))

    def log_in(self, password: str) -> Path:
        """
        Log in at Docker Hub with the password of a file, which is returned.
        """
        self.begin(anonymous=False)
        file = scratch(self)
        file.write_text(password)
        bearer: Any = self.daemon.others["docker.io"].authorization
        bearer._login = Login("ann", file, at_once, self.clock)  # noqa: SLF001
        self.hub.bearers.logins = {base64.b64encode(b"ann:right").decode()}
        self.hub.push_image("library/redis", "latest")
        return file

    def test_a_wrong_password_is_not_shown_for_any_token_until_the_file_has_another(self) -> None:
        """
        Accounts and addresses get locked that show one again and again.
        """
        file = self.log_in("wrong")
        for _ in range(2):
            self.hub.forget_asked()
            for path in ("nginx/manifests/latest", "redis/manifests/latest", "nginx/tags/list"):
                reply = self.get(f"/v2/hub/{path}")
                self.assertRefused(reply, 502, "UNAVAILABLE", f"{REALM} refuses the proxy's user and password")
            self.assertEqual([True, False], ["scope=" in each.query for each in self.hub.requests("realm")])
            self.pass_time(REFUSED_SECONDS)
        self.get("/v2/hub/redis/manifests/latest")
        file.write_text("right")
        self.assertEqual(200, self.get("/v2/hub/redis/manifests/latest").code)

    def test_no_herd_shows_a_wrong_password_before_it_is_known(self) -> None:
        self.log_in("wrong")
        for number in range(5 * TOGETHER):
            self.daemon.send("GET", f"/v2/hub/made/up{number}/manifests/latest")
        self.flush()
        self.assertLess(self.hub.count("realm"), 3 * TOGETHER)

    def test_a_password_that_is_refused_for_one_repository_is_shown_for_others(self) -> None:
        self.log_in("right")
        self.hub.fail("realm", status=401, path_contains="nginx")
        for _ in range(2):
            self.assertEqual(502, self.get("/v2/hub/nginx/manifests/latest").code)
        self.assertEqual(200, self.get("/v2/hub/redis/manifests/latest").code)

    def test_a_registry_says_anew_where_its_tokens_are_after_it_gave_none(self) -> None:
        """
        It named a realm elsewhere, or one that fails or issues nothing; other repositories' tokens stay valid.
        """
        self.get("/v2/hub/nginx/manifests/latest")
        for number, (realm, status) in enumerate((("https://elsewhere.test/", 200), (REALM, 500), (REALM, 404))):
            fault = self.hub.fault(Fault("realm", reply=Answer(status)))
            self.begin()
            self.hub.bearers.realm = realm
            path = f"/v2/hub/moved{number}/manifests/latest"
            image = self.hub.push_image(f"library/moved{number}", "latest")
            reply = self.daemon.send("GET", path)
            self.pass_time(int(TOKEN_SECONDS))
            self.assertIn(reply.code, (403, 502))
            fault.remove()
            self.hub.bearers.realm = "https://login.docker.io/token"
            self.assertWhole(self.get(path), image.manifest, "MISS")

    def tell_who_shows_a_token(self, realm: str) -> None:
        """
        Have the next token rejected, with a challenge that names another realm.
        """
        said = f'Bearer realm="{realm}",service="registry.test",error="invalid_token"'
        # For the HEAD, and for the GET that gets details.
        self.hub.fail("registry", status=401, headers={"WWW-Authenticate": said}, path_contains="nginx", times=2)
        self.hub.forget_asked()

    def test_its_tokens_are_where_it_says_to_who_shows_none_if_there_are_none_elsewhere(self) -> None:
        """
        nvcr.io names another realm in challenges for expired tokens, which issues no token without a password.
        """
        path = "/v2/hub/nginx/manifests/latest"
        self.get(path)
        for realm in ("https://authn.elsewhere.test/token", "https://authn.docker.io/token"):
            self.tell_who_shows_a_token(realm)
            self.assertWhole(self.get(path), self.nginx.manifest, "REVALIDATED")
            self.assertEqual(1, self.hub.count("realm"))
        self.hub.bearers.realm = "https://authn.elsewhere.test/token"
        self.tell_who_shows_a_token(self.hub.bearers.realm)
        self.assertRefused(self.get("/v2/hub/nginx/tags/list"), 502, "UNAVAILABLE", "not of its own domain")

    def test_a_realm_where_no_tokens_are_counts_for_nobody_else(self) -> None:
        """
        Neither for who is refused at the same time, or later, nor for who needs a token of another repository.
        """
        for name in ("alpine", "busybox"):
            self.hub.push_image(f"library/{name}", "1", layers=[self.layer])
        nginx = "/v2/hub/nginx"
        self.get(f"{nginx}/manifests/latest")
        self.tell_who_shows_a_token("https://authn.docker.io/token")
        said = {"WWW-Authenticate": 'Bearer realm="https://authn.docker.io/token",service="registry.test"'}
        self.hub.fail("registry", status=401, headers=said, path_contains="n=1", times=1)
        self.hub.slow("registry", 10, "n=2", times=1, reply=Answer(401, said, b"two seconds".ljust(20)))
        self.hub.slow("api", 10, times=1, reply=Answer(401, {}, b"one second"))
        paths = [f"{nginx}/manifests/latest", f"{nginx}/tags/list?n=1", f"{nginx}/tags/list?n=2"]
        asked = [self.daemon.send("GET", path) for path in paths]
        self.flush()
        self.assertEqual(1, self.hub.count("api"))
        asked += [self.daemon.send("GET", each) for each in (f"{nginx}/tags/list?n=3", "/v2/hub/alpine/manifests/1")]
        self.pass_time(3)
        self.assertEqual([200] * 5, [each.code for each in asked])
        self.assertEqual(200, self.get("/v2/hub/busybox/manifests/1").code)

    def test_what_one_repository_wants_counts_for_nobody_else(self) -> None:
        """
        Where a refusal names another scheme, service or scope, under the same realm, too: others show what they did.
        """
        self.hub.push_image("library/alpine", "1", layers=[self.layer])
        other = f'Bearer realm="{REALM}",service="other",scope="all"'
        for number, said in enumerate(('Basic realm="x"', 'Bearer error="invalid_token"', other)):
            self.get("/v2/hub/alpine/manifests/1")
            self.get("/v2/hub/nginx/manifests/latest")
            self.hub.fail("registry", status=401, headers={"WWW-Authenticate": said}, path_contains=f"odd{number}")
            odd = self.daemon.send("GET", f"/v2/hub/odd{number}/manifests/latest")
            self.pass_time(1)
            self.assertIn(odd.code, (403, 502), said)
            self.hub.forget_asked()
            self.assertWhole(self.get("/v2/hub/nginx/manifests/latest"), self.nginx.manifest, None)
            self.assertEqual(200, self.get("/v2/hub/alpine/tags/list").code)
            asked = [(each.method, (each.headers.get("authorization") or "")[:6]) for each in self.hub.asked]
            self.assertEqual([("HEAD", "Bearer"), ("GET", "Bearer")], asked, said)

    def test_what_it_wants_may_be_said_in_any_bytes(self) -> None:
        """
        Not in UTF-8 either: to who shows nothing, and to who shows a token that it no longer takes.
        """
        said = f'Basic realm="D\xe9p\xf4t", {self.hub.bearers.challenge}'
        probe = self.hub.fail("registry", status=401, headers={"WWW-Authenticate": said}, times=1)
        self.assertWhole(self.get("/v2/hub/nginx/manifests/latest"), self.nginx.manifest, "MISS")
        self.assertEqual(0, probe.times)
        self.hub.fail("registry", status=401, headers={"WWW-Authenticate": said}, path_contains="nginx", times=1)
        self.assertEqual(["latest"], json.loads(self.get("/v2/hub/nginx/tags/list").body)["tags"])

    def test_pages_of_any_size_are_refusals_like_others(self) -> None:
        """
        What the registry wants, a token that it no longer takes, and referrers that it does not know.
        """
        page, said = b"<html>".ljust(100_000), {"WWW-Authenticate": self.hub.bearers.challenge}
        self.hub.fail("registry", status=401, headers=said, body=page, times=1)
        self.assertWhole(self.get("/v2/hub/nginx/manifests/latest"), self.nginx.manifest, "MISS")
        self.hub.fail("registry", status=401, headers=said, body=page, times=1)
        self.assertEqual(["latest"], json.loads(self.get("/v2/hub/nginx/tags/list").body)["tags"])
        self.hub.fail("registry", status=404, body=page, times=1)
        self.assertRefused(self.get(f"/v2/hub/nginx/referrers/{self.nginx.digest}"), 404, "UNSUPPORTED", "referrers")
        self.redirect("referrers", page, {}, 404)
        self.assertRefused(self.get(f"/v2/hub/nginx/referrers/{self.nginx.digest}"), 404, "UNSUPPORTED", "referrers")

    def test_a_registry_that_answers_with_a_long_page_is_well(self) -> None:
        """
        Its circuit closes again: any answer to a probe will do.
        """
        self.get("/v2/hub/nginx/manifests/latest")
        outage = self.hub.fail("registry", status=503)
        for number in range(8):
            self.daemon.send("GET", f"/v2/hub/made-up{number}/manifests/latest")
            self.pass_time(20)
        self.assertEqual("circuit-open", self.get("/v2/hub/made-up/manifests/latest").header("X-Cache-Reason"))
        outage.remove()
        self.hub.forget_asked()
        page = self.hub.fail("registry", status=200, body=b"<html>".ljust(100_000))
        while not self.hub.asked:
            self.pass_time(1)
        page.remove()
        self.assertWhole(self.get("/v2/hub/nginx/manifests/latest"), self.nginx.manifest, "REVALIDATED")

    def test_its_tokens_are_where_a_refusal_says_if_they_are(self) -> None:
        """
        The proxy doesn't ask for another challenge: some registries name a realm for each repository.
        """
        path = "/v2/hub/nginx/manifests/latest"
        self.get(path)
        self.hub.bearers.realm = "https://login.docker.io/token"
        self.tell_who_shows_a_token(self.hub.bearers.realm)
        self.assertWhole(self.get(path), self.nginx.manifest, "REVALIDATED")
        self.assertEqual("login.docker.io", self.hub.requests("realm")[0].headers["host"])
        self.assertNotIn("/v2/", [each.path for each in self.hub.asked])

    def test_a_token_service_that_fails_keeps_nobody_from_tokens_that_are_good(self) -> None:
        """
        The registry is not asked again for its realm until another token is needed.
        """
        self.get("/v2/hub/nginx/manifests/latest")
        self.hub.fault(Fault("realm", reply=Answer(403)))
        self.assertEqual(403, self.get("/v2/hub/other/manifests/latest").code)
        self.hub.forget_asked()
        self.assertWhole(self.get("/v2/hub/nginx/manifests/latest"), self.nginx.manifest, None)
        self.assertNotIn("/v2/", [each.path for each in self.hub.asked])

    def test_what_its_manifests_list_is_given_after_it_has_confirmed_that(self) -> None:
        """
        Some registries accept a manifest that lists blobs they don't have, such as a layer of the company's own.
        """
        secret = noise("secret", 100_000)
        private = self.standin.push_image("team/app", "latest", layers=[secret])
        copied = self.hub.push_image("mine/app", "latest", layers=[secret])
        wrapped = self.hub.push_index("mine/app", "index", [copied])
        for digest in (*copied.layers, copied.config):
            self.hub.delete_blob("mine/app", digest)
        for path in ("manifests/latest", f"manifests/{private.digest}", *(f"blobs/{each}" for each in private.layers)):
            self.assertEqual(200, self.get(f"/v2/team/app/{path}").code)
        for reference in ("index", wrapped, "latest", "latest"):
            self.assertEqual(200, self.get(f"/v2/hub/mine/app/manifests/{reference}").code)
        for digest in private.layers:
            self.assertRefused(self.get(f"/v2/hub/mine/app/blobs/{digest}"), 404, "BLOB_UNKNOWN")
            self.assertEqual(404, self.head(f"/v2/hub/mine/app/blobs/{digest}").code)

    def test_a_token_service_that_fails_leaves_what_is_known(self) -> None:
        """
        When it fails, rejects the proxy's password, answers nonsense, or is silent.
        """
        self.get("/v2/hub/nginx/manifests/latest")
        for fault in (Fault("realm", reply=Answer(500)), Fault("realm", reply=Answer(200)), Fault("realm")):
            self.pass_time(self.hub.bearers.lifetime)
            self.hub.fault(fault)
            reply = self.daemon.send("GET", "/v2/hub/nginx/manifests/latest")
            self.pass_time(3 * TOKEN_SECONDS)
            self.assertWhole(reply, self.nginx.manifest, "STALE")
            fault.remove()
            self.pass_time(60)
            self.assertWhole(self.get("/v2/hub/nginx/manifests/latest"), self.nginx.manifest, "REVALIDATED")

    def test_a_refused_password_is_an_outage_that_is_named(self) -> None:
        self.get("/v2/hub/nginx/manifests/latest")
        self.begin(anonymous=False)
        self.hub.bearers.logins = {"other"}
        self.assertWhole(self.get("/v2/hub/nginx/manifests/latest"), self.nginx.manifest, "STALE")
        code, _, message = self.get("/v2/hub/other/manifests/latest").error
        self.assertEqual((502, f"{REALM} refuses the proxy's user and password"), (code, message))

    def test_a_herd_of_made_up_repositories_asks_few_questions_at_a_time(self) -> None:
        """
        Each has a token of its own, and requests go on after clients disconnect: connections would run out.
        """
        silence = self.hub.fault(Fault("realm"))
        replies = [self.daemon.send("GET", f"/v2/hub/made/up{number}/manifests/latest") for number in range(40)]
        self.flush()
        self.assertEqual(TOGETHER, self.hub.count("realm"))
        self.pass_time(2 * TOKEN_SECONDS)
        self.assertEqual({504}, {each.code for each in replies})
        silence.remove()
        self.pass_time(60)
        self.assertWhole(self.get("/v2/hub/nginx/manifests/latest"), self.nginx.manifest, "MISS")

    def test_one_question_serves_a_herd(self) -> None:
        replies = [self.daemon.send("GET", "/v2/hub/nginx/manifests/latest") for _ in range(20)]
        self.flush()
        for reply in replies:
            self.assertWhole(reply, self.nginx.manifest, None)
        self.assertEqual((1, 1), (self.hub.count("realm"), len([e for e in self.hub.asked if e.path == "/v2/"])))
