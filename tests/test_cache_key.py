"""
PROXY_CACHE_KEY names cache entries as nginx's proxy_cache_key does.
"""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.cache.cache_key import _NAMES, NOBODY, Asker, CacheKey
from tests.routes import route_to

DIGEST = "sha256:" + "ab" * 32
TARGET = "/v2/team/image1/manifests/latest?n=5&last=a%2Fb&n=6"


def asker() -> Asker:
    """
    Build a request with everything that a key may name.
    """
    return Asker(
        method="HEAD",
        target=TARGET,
        scheme="https",
        host="cache.test",
        address="192.0.2.7",
        headers={"user-agent": "docker/27", "x-tenant": "blue"},
    )


def expanded(template: str, target: str = TARGET) -> str:
    """
    Expand a template for a request.
    """
    return CacheKey.parse(template).expand(route_to(target), asker())


class CacheKeyTests(SynchronousTestCase):
    """
    A template of variables and text becomes the name of an entry.
    """

    def test_only_some_speak_of_who_asks(self) -> None:
        """
        All other templates need no login: the key is the same for all clients.
        """
        route = route_to(TARGET)
        for name in (*_NAMES, "arg_n", "http_x_tenant"):
            key = CacheKey.parse(f"${name}")
            self.assertEqual(key.asks, key.expand(route, asker()) != key.expand(route, NOBODY), name)
        self.assertTrue(CacheKey.parse("$uri $scheme").asks)

    def test_each_variable_has_its_value(self) -> None:
        """
        nginx's variables mean the same as there, and ours what their names say.
        """
        expected = {
            "$uri": "/v2/team/image1/manifests/latest",
            "$request_uri": TARGET,
            "$args": "n=5&last=a%2Fb&n=6",
            "$arg_n": "5",
            "$arg_last": "a%2Fb",
            "$arg_other": "",
            "$host": "cache.test",
            "$scheme": "https",
            "$request_method": "HEAD",
            "$remote_addr": "192.0.2.7",
            "$http_user_agent": "docker/27",
            "$http_X_Tenant": "blue",
            "$http_absent": "",
            "$repository": "team/image1",
            "$reference": "latest",
            "$digest": "",
        }
        self.assertEqual(expected, {template: expanded(template) for template in expected})

    def test_what_is_asked_for_by_digest_has_it(self) -> None:
        """
        A digest is both the reference and the digest, in its canonical spelling, and so in the path.
        """
        target = f"/v2/a/blobs/{DIGEST.replace(':', '%3A')}"
        self.assertEqual(
            f"{DIGEST} {DIGEST} /v2/a/blobs/{DIGEST}",
            expanded("$digest $reference $uri", target),
        )

    def test_secrets_name_no_entry(self) -> None:
        """
        Guesses could be tested against a hash of a password in file names.
        """
        for name in ("http_authorization", "http_Authorization", "http_proxy_authorization", "http_cookie"):
            problem = self.assertRaises(ValueError, CacheKey.parse, f"${name}$uri")
            self.assertIn("goes nowhere", str(problem))

    def test_a_list_of_tags_has_no_reference(self) -> None:
        """
        The last word in the path of a tag list is no tag.
        """
        self.assertEqual("a||", expanded("$repository|$reference|$digest", "/v2/a/tags/list"))

    def test_text_and_variables_mix(self) -> None:
        """
        Braces end a variable's name before text, and other characters are literal.
        """
        self.assertEqual("https://cache.test/x", expanded("$scheme://$host/x"))
        self.assertEqual("httpss", expanded("${scheme}s"))
        self.assertEqual("httpscache.test", expanded("$scheme$host"))
        self.assertEqual("v1 {https}", expanded("v1 {$scheme}"))

    def test_a_value_is_not_expanded_again(self) -> None:
        """
        A variable's name in a client's request does not lead to another entry.
        """
        key = CacheKey.parse("$http_x-$host")
        sly = Asker(host="h", headers={"x": "$host"})
        self.assertEqual("$host-h", key.expand(route_to("/v2/a/tags/list"), sly))

    def test_an_unknown_variable_is_an_error_that_lists_the_known(self) -> None:
        """
        The error names the typo and the known variables.
        """
        problem = self.assertRaises(ValueError, CacheKey.parse, "$uri$nonsense")
        for word in ("$nonsense", "$uri", "$remote_addr", "$repository", "$arg_NAME", "$http_NAME"):
            self.assertIn(word, str(problem))

    def test_templates_that_name_nothing_are_errors(self) -> None:
        """
        A dollar sign without a name, a prefix without its name and a key without variables are rejected.
        """
        for template in ("", "fixed", "$", "$uri$", "$$uri", "${uri", "$ uri", "${}", "$-", "$arg_", "$http_", "$URI"):
            self.assertRaises(ValueError, CacheKey.parse, template)
