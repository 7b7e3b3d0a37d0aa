"""
Request targets are parsed once, and unsupported forms are rejected at the channel.
"""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.http.target import Target, parse_target
from tests.daemon import DaemonTestCase

ORIGIN: dict[bytes, Target] = {
    b"/": Target("/"),
    b"/v2/": Target("/v2/"),
    b"/v2/a/tags/list?n=1&last=a%2Fb?c": Target("/v2/a/tags/list", "n=1&last=a%2Fb?c"),
    b"/v2/?": Target("/v2/"),
    b"//evil.example/v2/": Target("//evil.example/v2/"),
    b"//v2//": Target("/v2/"),
    b"///v2//a//tags///list?last=a//b": Target("/v2/a/tags/list", "last=a//b"),
    b"//v2x/": Target("//v2x/"),
    b"/v2/a%2F%2Fb/tags/list": Target("/v2/a%2F%2Fb/tags/list"),
    b"/%72eadyz": Target("/%72eadyz"),
    b"/v2/\xe4": Target("/v2/\xe4"),
}
ABSOLUTE: dict[bytes, Target] = {
    b"http://proxy.example/v2/": Target("/v2/", "", "proxy.example"),
    b"HTTPS://proxy.example:5000/v2/?a=b": Target("/v2/", "a=b", "proxy.example:5000"),
    b"http://[::1]:5000/v2/": Target("/v2/", "", "[::1]:5000"),
    b"http://proxy.example": Target("/", "", "proxy.example"),
    b"http://proxy.example?a": Target("/", "a", "proxy.example"),
    b"http://a//v2/": Target("/v2/", "", "a"),
}
NEITHER: tuple[bytes, ...] = (
    *(b"*", b"*/v2/", b"proxy.example:443", b"proxy.example", b"v2/", b"?x", b"\\v2\\", b"%2Fv2/", b"xreadyz"),
    *(b"xreadyz/v2/a/manifests/b", b":readyz/v2/a/manifests/b", b"@readyz/v2/a/manifests/b", b".evil.example/v2/"),
    *(b"http:/v2/", b"http:///v2/", b"http://", b"http://?a", b"http://#a", b"http://a#b/v2/", b"http://a\\b/v2/"),
    *(b"http://user@a/v2/", b"http://user:word@a/v2/", b"http://a\xe4/v2/", b"ftp://a/v2/", b"file:///etc/passwd"),
    *(b"xhttp://a/v2/", b"http//a/v2/", b"wss://a/v2/", b"unix:///run/x"),
)


class ParseTargetTests(SynchronousTestCase):
    def test_origin_form_is_a_path_and_a_query(self) -> None:
        self.assertEqual(ORIGIN, {each: parse_target(each) for each in ORIGIN})

    def test_absolute_form_is_the_same_and_an_authority(self) -> None:
        self.assertEqual(ABSOLUTE, {each: parse_target(each) for each in ABSOLUTE})

    def test_other_forms_are_refused(self) -> None:
        for each in NEITHER:
            with self.assertRaises(ValueError, msg=each):
                parse_target(each)

    def test_origin_is_what_the_access_log_and_the_cache_key_see(self) -> None:
        self.assertEqual("/v2/?a=b", parse_target(b"http://evil.example/v2/?a=b").origin)
        self.assertEqual("/v2/", parse_target(b"/v2/?").origin)


class ChannelTests(DaemonTestCase):
    def test_targets_of_other_forms_are_400_for_every_method(self) -> None:
        for each in NEITHER:
            for method in (b"GET", b"HEAD", b"OPTIONS", b"CONNECT", b"DELETE"):
                got = self.daemon.raw(method + b" " + each + b" HTTP/1.1\r\nHost: x\r\n\r\n")
                self.assertEqual(b"HTTP/1.1 400 Bad Request", got.partition(b"\r\n")[0], (method, each))
        self.assertEqual([], self.standin.asked)

    def test_the_authority_of_an_absolute_target_replaces_host(self) -> None:
        digest = self.standin.push_blob("team/app", b"data")
        self.start(cache_key="$host$request_uri")
        ask = f"GET http://one.example:80/v2/team/app/blobs/{digest} HTTP/1.1\r\nHost: two.example\r\n\r\n"
        for cache in (b"MISS", b"HIT"):
            self.assertIn(b"X-Cache-Status: " + cache, self.daemon.raw(ask.encode()))
        self.assertEqual("HIT", self.get(f"/v2/team/app/blobs/{digest}", Host="one.example").cache)

    def test_repeated_slashes_are_one_for_routing_access_rules_and_the_cache_key(self) -> None:
        digest = self.standin.push_blob("team/app", b"data")
        self.start(cache_key="$request_uri", pattern="team/app")
        for path in (f"//v2/team/app/blobs/{digest}", f"/v2//team//app///blobs//{digest}"):
            self.assertEqual(b"data", self.get(path).body)
        self.assertEqual(1, self.standin.count("bucket"))
        self.assertEqual(200, self.get("//v2//").code)
        self.assertRefused(self.get(f"//v2/team//other/blobs/{digest}"), 403, "DENIED")

    def test_an_absolute_target_needs_a_host_field_as_any_other(self) -> None:
        got = self.daemon.raw(b"GET http://proxy.example/v2/ HTTP/1.1\r\n\r\n")
        self.assertEqual(b"HTTP/1.1 400 Bad Request", got.partition(b"\r\n")[0])

    def test_health_is_not_reached_by_another_spelling(self) -> None:
        for path in ("/%68ealthz", "/healthz/", "//healthz", "/healthz;x", "/readyz/../v2/", "/x/../healthz"):
            self.assertRefused(self.get(path), 404, "UNSUPPORTED")
        self.assertEqual(200, self.get("/healthz?x").code)
