"""
Each answer has a reason word that docs/reference/http.rst explains.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet.defer import fail
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.access.clients import Admission
from ecrproxy.access.limits import Limits
from ecrproxy.access.passwords import Passwords
from ecrproxy.cache import allocation
from ecrproxy.cache.purge_log import News
from ecrproxy.reasons import Reason
from ecrproxy.registry.aws import TokenUnavailableError
from ecrproxy.registry.circuit import FAILURES
from ecrproxy.registry.quotas import Quotas
from tests.daemon import DaemonTestCase, Reply, at_once, noise
from tests.registry import digest_of
from tests.registry_content import OCI_MANIFEST
from tests.test_htpasswd import line

CHECKOUT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^``([a-z-]+)`` +[A-Zn]", re.MULTILINE)


class ReasonTestCase(DaemonTestCase):
    """
    An image of one layer, and a blob.
    """

    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.data = noise("blob", 300_000)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.blob = f"/v2/team/app/blobs/{self.digest}"
        self.by_tag = "/v2/team/app/manifests/latest"
        self.by_digest = f"/v2/team/app/manifests/{self.image.digest}"

    def assertWhy(self, reply: Reply, cache: str | None, reason: str) -> None:
        """
        Assert that the answer has this reason.
        """
        self.assertEqual((cache, reason), (reply.cache, reply.header("X-Cache-Reason")))


class ContentTests(ReasonTestCase):
    """
    Reasons for the source of content.
    """

    def test_what_is_asked_for_the_first_time(self) -> None:
        """
        Also what a manifest lists: it was known, but not requested yet.
        """
        for path in (self.by_tag, f"/v2/team/app/blobs/{self.image.layers[0]}", self.blob):
            self.assertWhy(self.get(path), "MISS", "first-use")
        digest = self.standin.push_image("team/app", layers=[b"other"]).digest
        for path in ("manifests/" + digest, "blobs/" + self.standin.push_blob("team/app", b"head")):
            self.assertWhy(self.head(f"/v2/team/app/{path}"), "MISS", "first-use")
        self.assertWhy(self.get(f"/v2/team/app/manifests/{digest}"), "MISS", "first-use")

    def test_what_only_heads_have_asked_for(self) -> None:
        """
        A HEAD fetches nothing: its content is not missing from the cache, but new.
        """
        for path in (self.blob, self.by_tag):
            for _ in range(2):
                self.assertWhy(self.head(path), "MISS", "first-use")
            self.assertWhy(self.get(path), "MISS", "first-use")
            for file in self.files():
                file.unlink()
            self.daemon.cache.forget_purged(News(everything=True))
            for _ in range(2):
                self.assertWhy(self.head(path), "MISS", "not-kept")
            self.assertWhy(self.get(path), "MISS", "not-kept")

    def test_what_is_cached(self) -> None:
        """
        In memory or on the disk.
        """
        for path in (self.by_tag, self.blob, f"/v2/team/app/blobs/{self.image.config}"):
            self.get(path)
        for restart in (False, True):
            if restart:
                self.start()
            for path in (self.by_digest, self.blob, f"/v2/team/app/blobs/{self.image.config}"):
                self.assertWhy(self.head(path), "HIT", "cached")
                self.assertWhy(self.get(path), "HIT", "cached")

    def test_what_was_asked_for_before_and_is_not_there(self) -> None:
        """
        It was evicted, say.
        """
        for path in (self.by_tag, self.by_digest, self.blob):
            self.get(path)
        for ask, path in (
            (each, path) for path in (self.by_tag, self.by_digest, self.blob) for each in (self.head, self.get)
        ):
            for file in self.files():
                file.unlink()
            self.start()
            self.assertWhy(ask(path), "MISS", "not-kept" if path != self.by_digest else "first-use")

    def test_a_tag(self) -> None:
        """
        It is confirmed, within its TTL, or leads elsewhere by now.
        """
        self.assertWhy(self.get(self.by_tag), "MISS", "first-use")
        self.assertWhy(self.get(self.by_tag), "REVALIDATED", "tag-confirmed")
        self.start(tag_ttl=60)
        self.assertWhy(self.get(self.by_tag), "HIT", "tag-ttl")
        self.clock.advance(61)
        self.standin.push_image("team/app", "latest", layers=[b"another"])
        self.assertWhy(self.get(self.by_tag), "MISS", "tag-moved")

    def test_what_another_repository_brought(self) -> None:
        """
        ECR has confirmed that this one has it, too.
        """
        for path in (self.by_tag, self.blob):
            self.get(path)
        for repository, ask in (("team/other", self.head), ("third", self.get)):
            self.standin.push_image(repository, "latest")
            self.standin.push_blob(repository, self.data)
            for path in (self.by_digest, self.blob):
                self.assertWhy(ask(path.replace("team/app", repository)), "REVALIDATED", "repository-confirmed")

    def test_what_is_on_its_way(self) -> None:
        """
        Blobs and manifests are fetched once for all.
        """
        for path in (self.blob, self.by_tag):
            replies = [self.daemon.send("GET", path) for _ in range(2)]
            self.flush()
            for reply, (cache, reason) in zip(replies, (("MISS", "first-use"), ("JOINED", "in-flight")), strict=True):
                self.assertWhy(reply, cache, reason)

    def test_what_is_not_kept(self) -> None:
        """
        It is too large, or its transfer has passed its start already.
        """
        self.start(limit=200_000)
        self.standin.hold(self.digest)
        first = self.get(self.blob)
        self.arrive(self.digest, 100_000)
        late = self.get(self.blob)
        self.standin.release(self.digest)
        self.flush()
        self.assertWhy(first, "BYPASS", "too-large")
        self.assertWhy(late, "BYPASS", "passed")

    def test_what_there_is_no_room_for(self) -> None:
        """
        Everything that could be evicted for it is being sent.
        """
        self.start(limit=500_000)
        self.get(self.blob)
        slow = self.daemon.send("GET", self.blob)
        slow.stop_reading()
        self.flush()
        other = self.standin.push_blob("team/app", noise("other", 300_000))
        self.assertWhy(self.get(f"/v2/team/app/blobs/{other}"), "BYPASS", "no-room")
        slow.read_on()
        self.flush()

    def test_what_the_disk_does_not_take(self) -> None:
        """
        As when it is full.
        """

        def full(fd: int, size: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        self.patch(allocation, "fallocate", full)
        self.assertWhy(self.get(self.blob), "BYPASS", "disk")

    def test_what_has_no_size(self) -> None:
        """
        Upstream does not announce its length.
        """
        reply = self.daemon.send("GET", f"/v2/team/app/blobs/{digest_of(b'hello')}")
        self.answer_with(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
        self.assertWhy(reply, "BYPASS", "size-unknown")

    def test_lists(self) -> None:
        """
        They are passed through.
        """
        self.assertWhy(self.get("/v2/team/app/tags/list"), "BYPASS", "list")

    def test_what_has_not_changed(self) -> None:
        """
        A 304 has a reason too.
        """
        self.get(self.blob)
        reply = self.get(self.blob, If_None_Match=f'"{self.digest}"')
        self.assertEqual(304, reply.code)
        self.assertWhy(reply, "HIT", "cached")


class TroubleTests(ReasonTestCase):
    """
    Why ECR was of no help: the same words with stale content and without.
    """

    def check(self, word: str, trouble: Callable[[], object], wait: float = 0) -> None:
        """
        Assert that C{trouble} is reported as C{word}: for a known tag, and for an unknown one.
        """
        self.get(self.by_tag)
        trouble()
        for path, cache in ((self.by_tag, "STALE"), ("/v2/team/app/manifests/other", None)):
            reply = self.daemon.send("GET", path)
            self.flush()
            self.pass_time(wait)
            self.assertWhy(reply, cache, word)

    def test_that_does_not_answer(self) -> None:
        """
        It can't be reached, or is silent.
        """
        self.check("unreachable", lambda: self.standin.refuse("registry"))
        self.standin.heal()
        self.check("unreachable", lambda: self.standin.hang("registry"), 31)

    def test_that_fails(self) -> None:
        """
        Its answers are invalid.
        """
        self.check("failing", lambda: self.standin.fail("registry", status=500))

    def test_that_throttles(self) -> None:
        """
        It has been asked too often.
        """
        self.check("throttled", lambda: self.standin.throttle("registry"))

    def test_that_is_left_alone(self) -> None:
        """
        It kept failing: the circuit is open.
        """

        def open_circuit() -> None:
            self.standin.fail("registry", status=500)
            for number in range(FAILURES):
                self.daemon.send("GET", f"/v2/team/app/manifests/{number}")
            self.flush()

        self.check("circuit-open", open_circuit)

    def test_that_is_asked_too_much(self) -> None:
        """
        The queue is full.
        """

        def fill_queue() -> None:
            for number in range(9):
                self.daemon.send("GET", f"/v2/team/app/manifests/{number}")
            self.flush()

        self.start(quotas=Quotas(manifests=1))
        self.check("queue-full", fill_queue)
        self.pass_time(12)

    def test_that_there_is_no_token_for(self) -> None:
        """
        There was none, or ECR accepts none.
        """
        self.check("no-token", lambda: self.standin.fail("registry", status=401))
        self.start(fetch=lambda: fail(TokenUnavailableError("no")))
        self.pass_time(11)
        self.assertWhy(self.get(self.by_tag), "STALE", "no-token")
        self.assertWhy(self.get("/v2/team/app/tags/list"), None, "no-token")

    def test_that_sends_wrong_bytes(self) -> None:
        """
        They are no manifest's, or no blob's.
        """
        self.standin.corrupt(self.image.digest, b"{}")
        self.assertWhy(self.get(self.by_digest), None, "wrong-bytes")
        digest = self.standin.push_blob("team/app", b"right")
        self.standin.corrupt(digest, b"")
        self.assertWhy(self.get(f"/v2/team/app/blobs/{digest}"), None, "wrong-bytes")

    def test_that_sends_no_manifest(self) -> None:
        digest = self.standin.push_manifest("team/app", b"[]", OCI_MANIFEST)
        self.assertWhy(self.get(f"/v2/team/app/manifests/{digest}"), None, "no-manifest")


class DenialTests(ReasonTestCase):
    """
    Why a client gets nothing.
    """

    def test_what_ecr_refuses(self) -> None:
        """
        It does not have it, or does not allow the proxy to have it.
        """
        self.assertWhy(self.get("/v2/team/app/manifests/missing"), None, "not-found")
        self.assertWhy(self.get("/v2/nobody/tags/list"), None, "not-found")
        self.standin.deny()
        self.assertWhy(self.get(self.by_tag), None, "ecr-denied")
        self.assertWhy(self.head(self.by_tag), None, "ecr-denied")

    def test_what_the_pattern_excludes(self) -> None:
        """
        The repository is not served.
        """
        self.start(pattern="other/.*")
        self.assertWhy(self.get(self.by_tag), None, "namespace")

    def test_what_is_of_a_registry_that_is_not_configured(self) -> None:
        self.assertWhy(self.get(f"{self.by_tag}?ns=quay.io"), None, "unknown-registry")
        self.assertEqual([], self.standin.requests("registry"))

    def test_what_no_registry_has(self) -> None:
        """
        Invalid paths, names, methods and ranges.
        """
        for path in (
            "/v2/_catalog?n=x",
            "/v2/UPPER/manifests/x",
            "/v2/a/blobs/none",
            "/elsewhere",
            "/v2/a/tags/list?n=x",
        ):
            self.assertWhy(self.get(path), None, "bad-request")
        self.assertWhy(self.daemon.ask("DELETE", self.by_tag), None, "bad-request")
        reply = self.get(self.blob, Range="bytes=999999-")
        self.assertEqual(416, reply.code)
        self.assertWhy(reply, None, "bad-request")

    def test_what_is_too_much_for_the_proxy(self) -> None:
        """
        The limit of concurrent blobs is reached.
        """
        self.start(limits=Limits(transfers=1))
        slow = self.daemon.send("GET", self.blob)
        slow.stop_reading()
        self.flush()
        self.assertWhy(self.get(self.blob), None, "busy")
        slow.read_on()
        self.flush()

    def test_what_the_proxy_fails_at(self) -> None:
        """
        Its log says why.
        """

        def failing(asked: Any) -> None:
            raise ZeroDivisionError

        self.patch(self.daemon.cache, "at_hand", failing)
        self.assertWhy(self.get(self.blob), None, "failed")
        self.flushLoggedErrors(ZeroDivisionError)


class AskerTests(ReasonTestCase):
    """
    Why a client is not allowed.
    """

    def test_the_asker(self) -> None:
        """
        By address, certificate or password, or because a web page has sent the request.
        """
        path = Path(self.root.parent, f"{self.root.name}.htpasswd")
        path.write_bytes(line("ann", "client canary"))
        self.addCleanup(path.unlink)
        for word, admission in (
            ("address", Admission([])),
            ("certificate", Admission(certificates=True)),
            ("password", Admission(passwords=Passwords(str(path), at_once, self.clock, b"key"))),
        ):
            self.start(admission=admission).shown = ""
            self.assertWhy(self.get(self.by_tag), None, word)
        self.assertWhy(self.start().ask("GET", self.by_tag, Origin="http://evil.example"), None, "web-page")


class WordsTests(SynchronousTestCase):
    """
    The words are few, fixed and explained.
    """

    def test_the_page_has_them_all(self) -> None:
        """
        docs/reference/http.rst explains each existing word, and no other, once.
        """
        section = (CHECKOUT / "docs" / "reference" / "http.rst").read_text("utf-8").partition("X-Cache-Reason\n~~~")[2]
        words = ROW.findall(section.partition("\n~~~")[0])
        self.assertEqual(sorted(reason.value for reason in Reason), sorted(words))

    def test_each_is_shown_by_a_test(self) -> None:
        """
        Each occurs above.
        """
        shown = set(re.findall(r'"([a-z-]+)"', Path(__file__).read_text("utf-8")))
        self.assertEqual(set(), {reason.value for reason in Reason} - shown)
