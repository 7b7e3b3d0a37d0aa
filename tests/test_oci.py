"""
Input from clients and registries has one meaning, or is rejected.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.documents import DIGITS_LIMIT, VALUES_LIMIT, Document, listed
from ecrproxy.identity import Repository
from ecrproxy.oci import (
    INDEX_TYPES,
    MANIFEST_LIMIT,
    MANIFEST_TYPES,
    Descriptor,
    Digest,
    Kind,
    RegistryError,
    Route,
    accepted_types,
    query_values,
)
from tests.routes import REGISTRY, route_to

HEX = "0123456789abcdef" * 4
SHA256 = f"sha256:{HEX}"
SHA512 = f"sha512:{HEX}{HEX}"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
SCHEMA2 = "application/vnd.docker.distribution.manifest.v2+json"
ARTIFACT = "application/vnd.oci.artifact.manifest.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"

NO_PATH = (404, "UNSUPPORTED")
NO_NAME = (400, "NAME_INVALID")
NO_TAG = (400, "TAG_INVALID")
NO_DIGEST = (400, "DIGEST_INVALID")
NO_QUERY = (400, "UNSUPPORTED")


def understood(target: str) -> tuple[Any, ...]:
    """
    Return where a target leads, or how it is rejected.
    """
    try:
        route = route_to(target)
    except RegistryError as problem:
        return problem.status, problem.code
    return route.kind, route.repository.name, route.reference


class RouteTests(SynchronousTestCase):
    """
    A path leads to one place, or nowhere.
    """

    def assert_understood(self, expected: dict[str, tuple[Any, ...]]) -> None:
        """
        Compare every target with where it must lead.
        """
        self.assertEqual(expected, {target: understood(target) for target in expected})

    def test_the_pull_side_of_the_protocol_is_understood(self) -> None:
        """
        Manifests by tag and by digest, blobs, tag lists and referrers each have their path.
        """
        self.assert_understood(
            {
                "/v2/image1/manifests/latest": (Kind.MANIFEST, "image1", "latest"),
                f"/v2/team/image1/manifests/{SHA256}": (Kind.MANIFEST, "team/image1", SHA256),
                f"/v2/image1/manifests/{SHA512}": (Kind.MANIFEST, "image1", SHA512),
                f"/v2/image1/blobs/{SHA256}": (Kind.BLOB, "image1", SHA256),
                f"/v2/image1/blobs/{SHA512}": (Kind.BLOB, "image1", SHA512),
                "/v2/image1/tags/list": (Kind.TAGS, "image1", "list"),
                f"/v2/image1/referrers/{SHA256}": (Kind.REFERRERS, "image1", SHA256),
            }
        )

    def test_the_last_words_of_a_path_decide(self) -> None:
        """
        A repository may have the protocol's own words as its name.
        """
        self.assert_understood(
            {
                "/v2/image1/manifests/x/manifests/latest": (Kind.MANIFEST, "image1/manifests/x", "latest"),
                "/v2/a/tags/list": (Kind.TAGS, "a", "list"),
                "/v2/a/manifests/list": (Kind.MANIFEST, "a", "list"),
                "/v2/tags/list/tags/list": (Kind.TAGS, "tags/list", "list"),
                "/v2/blobs/manifests/blobs": (Kind.MANIFEST, "blobs", "blobs"),
                f"/v2/a/blobs/b/blobs/{SHA256}": (Kind.BLOB, "a/blobs/b", SHA256),
            }
        )

    def test_paths_that_the_protocol_has_not_are_not_found(self) -> None:
        """
        Anything but a pull is answered with 404, and so is a target that is not a path.
        """
        targets = (
            "",
            "*",
            "/",
            "/v2",
            "/v2/",
            "/v1/a/manifests/x",
            "/V2/a/manifests/x",
            "/v2x/a/manifests/x",
            "//v2/a/manifests/x",
            "v2/a/manifests/x",
            "/v2/_catalog",
            "/v2/manifests/latest",
            "/v2/a/b",
            "/v2/a/tags/x",
            "/v2/a/tags/list/",
            "/v2/a/Manifests/x",
            "/v2/a/blobs/uploads/",
            "/v2/a/manifests/x/",
            "/v2/a/manifests%2Fx",
            "/v2/a/m%61nifests/x",
            "http://evil.test/v2/a/manifests/x",
            "https:/v2/a/manifests/x",
            "evil.test:443",
            "/../v2/a/manifests/x",
            "/%76%32/a/manifests/x",
        )
        self.assert_understood(dict.fromkeys(targets, NO_PATH))

    def test_names_outside_the_grammar_are_refused(self) -> None:
        """
        No escape, dot segment, doubled slash, backslash, NUL or upper case leads into or out of a name.
        """
        names = (
            "",
            "a%252fb",
            "a%2F",
            "%2Fa",
            "a%2F..%2Fb",
            "a%2F%2Fb",
            "a%",
            "a%2",
            "a%zz",
            "a%C3%A4",
            "a%ff",
            "%41",
            "..",
            ".",
            "a/..",
            "../a",
            "a/../b",
            "a/./b",
            "%2e%2e",
            "a/%2e%2e/b",
            "a//b",
            "/a",
            "a/",
            "a\\b",
            "a\0",
            "a%00",
            "A",
            "Image1",
            "a b",
            "a+b",
            "a:5000/b",
            "a@b",
            "a;b",
            "a#b",
            "a\n",
            "ä",
            "a\ufffd",
            "_a",
            "a_",
            "-a",
            "a-",
            ".a",
            "a..b",
            "a___b",
            "a._b",
            "a-_b",
            "a/" * 127 + "ab",
            "a" * 256,
        )
        self.assert_understood(dict.fromkeys((f"/v2/{name}/manifests/latest" for name in names), NO_NAME))

    def test_all_names_of_the_grammar_are_taken(self) -> None:
        """
        Separators within a name, and names of up to 255 characters, follow the specification.
        """
        names = ("a", "0", "a.b", "a_b", "a__b", "a-b", "a----b", "a/b/c/d/e", "a.b-c__d/e", "a" * 255)
        self.assert_understood(
            {f"/v2/{name}/manifests/latest": (Kind.MANIFEST, name, "latest") for name in names},
        )

    def test_tags_outside_the_grammar_are_refused(self) -> None:
        """
        A tag has letters, digits, dots, dashes and underscores, at most 128.
        """
        tags = ("", ".", "..", ".a", "-a", "a%2Fb", "%2e%2e", "a%00", "a\0", "a b", "a\\b", "a\n", "ä", "t" * 129)
        self.assert_understood(dict.fromkeys((f"/v2/a/manifests/{tag}" for tag in tags), NO_TAG))
        good = ("_", "1.0", "Latest-2_x", "t" * 128)
        self.assert_understood({f"/v2/a/manifests/{tag}": (Kind.MANIFEST, "a", tag) for tag in good})

    def test_digests_outside_the_grammar_are_refused(self) -> None:
        """
        Only complete, lower-case sha256 and sha512 digests name content.
        """
        digests = (
            "sha256:",
            "sha256:abc",
            f"sha256:{HEX.upper()}",
            f"sha256:{HEX}0",
            f"sha256:{HEX[1:]}g",
            f"sha256:{HEX}\n",
            f"SHA256:{HEX}",
            f"sha512:{HEX}",
            f"sha256:{HEX}{HEX}",
            f"md5:{HEX[:32]}",
            f"sha384:{HEX}{HEX[:32]}",
            f":{HEX}",
            f"sha256::{HEX}",
            f"sha256:{HEX}:",
            f"sha256:{HEX}%00",
        )
        for word in ("manifests", "blobs", "referrers"):
            self.assert_understood(dict.fromkeys((f"/v2/a/{word}/{digest}" for digest in digests), NO_DIGEST))

    def test_a_tag_names_no_blob(self) -> None:
        """
        Blobs and referrers are requested only by digest.
        """
        targets = ("/v2/a/blobs/latest", "/v2/a/referrers/latest", "/v2/a/blobs/..", "/v2/a/blobs/%2e%2e")
        self.assert_understood(dict.fromkeys(targets, NO_DIGEST))

    def test_names_and_references_are_decoded_once(self) -> None:
        """
        Clients with needless escapes, such as Azure's SDK, get what the others get; an escaped escape is not decoded.
        """
        self.assert_understood(
            {
                "/v2/team%2Fapp/manifests/v1%2E0": (Kind.MANIFEST, "team/app", "v1.0"),
                "/v2/team%2fapp%2F%61/tags/list": (Kind.TAGS, "team/app/a", "list"),
                "/v2/%61/manifests/%5f": (Kind.MANIFEST, "a", "_"),
                f"/v2/a%2Fb/referrers/sha256%3A{HEX}": (Kind.REFERRERS, "a/b", SHA256),
                "/v2/a%252Fb/manifests/latest": NO_NAME,
                "/v2/a/manifests/v1%252E0": NO_TAG,
                f"/v2/a/blobs/sha256%3A{HEX}": (Kind.BLOB, "a", SHA256),
                f"/v2/a/manifests/sha256%3a{HEX}": (Kind.MANIFEST, "a", SHA256),
                f"/v2/a/blobs/sha256%253A{HEX}": NO_DIGEST,
                f"/v2/a/manifests/sha256%253A{HEX}": NO_TAG,
            }
        )

    def test_a_path_has_one_spelling(self) -> None:
        """
        However a digest was spelled, the route and its path are the same, and the query does not distinguish routes.
        """
        escaped, plain = route_to(f"/v2/a/blobs/sha256%3A{HEX}?x=1"), route_to(f"/v2/a/blobs/{SHA256}")
        self.assertEqual(escaped, plain)
        self.assertEqual(f"/v2/a/blobs/{SHA256}", escaped.path)
        self.assertEqual("x=1", escaped.query)
        self.assertEqual("/v2/a/tags/list", route_to("/v2/a/tags/list?n=5").path)

    def test_a_digest_in_a_path_is_parsed(self) -> None:
        """
        A route by digest knows its digest; a route by tag has none.
        """
        self.assertEqual(Digest("sha256", HEX), route_to(f"/v2/a/manifests/{SHA256}").digest)
        self.assertIsNone(route_to("/v2/a/manifests/latest").digest)
        self.assertIsNone(route_to("/v2/a/tags/list").digest)

    def test_a_route_is_pointed_at_another_digest(self) -> None:
        """
        What a tag leads to is in the same repository, under its digest.
        """
        self.assertEqual(
            route_to(f"/v2/a/manifests/{SHA256}"),
            Route(Kind.MANIFEST, Repository(REGISTRY, "a"), "latest").at(Digest("sha256", HEX)),
        )

    def test_queries_with_characters_of_no_url_are_refused(self) -> None:
        """
        What could break out of a header or a log line is rejected.
        """
        queries = (
            "n=%",
            "n=%3",
            "%zz=1",
            "n=<1>",
            'n="1"',
            "n=1 2",
            "n=1\r\nx",
            "n=\0",
            "n=1#x",
            "n=ä",
            "n=\\",
            "n={}",
        )
        self.assert_understood(dict.fromkeys((f"/v2/a/tags/list?{query}" for query in queries), NO_QUERY))

    def test_queries_stay_as_they_came(self) -> None:
        """
        An opaque continuation is passed on with its escapes.
        """
        for query in ("", "n=1000&last=a%2Fb%3D", "last=YQ==", "artifactType=a/b%2Bc", "a?b"):
            self.assertEqual(query, route_to(f"/v2/a/tags/list?{query}").query)


class QueryTests(SynchronousTestCase):
    """
    A query string has values by name.
    """

    def test_the_first_of_several_values_counts(self) -> None:
        """
        Of a repeated name the first value counts, and values stay escaped.
        """
        self.assertEqual({"n": "1", "last": "a%2Fb"}, query_values("n=1&last=a%2Fb&&n=2"))

    def test_names_are_read_through_their_escapes(self) -> None:
        """
        An escaped name is decoded; a name alone has an empty value.
        """
        self.assertEqual({"last": "x", "n": ""}, query_values("l%61st=x&n"))
        self.assertEqual({}, query_values(""))


class DigestTests(SynchronousTestCase):
    """
    A digest names content by its hash.
    """

    def test_content_is_named_by_its_hash(self) -> None:
        """
        The digest of bytes is the one that all other programs compute.
        """
        self.assertEqual(
            "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", str(Digest.of(b"hello"))
        )
        self.assertEqual(f"sha512:{hashlib.sha512(b'x').hexdigest()}", str(Digest.of(b"x", "sha512")))

    def test_the_hash_of_a_digest_is_its_own(self) -> None:
        """
        The digest's own algorithm is used for the comparison.
        """
        for algorithm in ("sha256", "sha512"):
            digest = Digest.of(b"content", algorithm)
            state = digest.hasher()
            state.update(b"con")
            state.update(b"tent")
            self.assertEqual(digest.hex, state.hexdigest())

    def test_a_digest_is_read_as_it_is_written(self) -> None:
        """
        Text and value convert into each other; the error for an invalid digest shows it, shortened.
        """
        for text in (SHA256, SHA512):
            self.assertEqual(text, str(Digest.parse(text)))
        problem = self.assertRaises(ValueError, Digest.parse, "x" * 10_000)
        self.assertIn("xxx", str(problem))
        self.assertLess(len(str(problem)), 300)


class ErrorTests(SynchronousTestCase):
    """
    Errors use the protocol's own words.
    """

    def test_an_error_is_the_specs_json(self) -> None:
        """
        Code and message are where the specification puts them.
        """
        error = RegistryError(404, "MANIFEST_UNKNOWN", 'no "tag"', {"Retry-After": "1"})
        self.assertEqual(
            {"errors": [{"code": "MANIFEST_UNKNOWN", "message": 'no "tag"'}]},
            json.loads(error.body()),
        )
        self.assertEqual({"Retry-After": "1"}, error.headers)
        self.assertEqual({}, RegistryError(404, "X", "y").headers)


class AcceptTests(SynchronousTestCase):
    """
    Accept headers are parsed into the set of types that a client accepts.
    """

    def test_order_and_spelling_do_not_matter(self) -> None:
        """
        Clients that accept the same types share one answer.
        """
        one = accepted_types([f"{OCI_INDEX}, {SCHEMA2};q=0.5", OCI_MANIFEST])
        other = accepted_types([f" {OCI_MANIFEST.upper()} ; Q=1,{OCI_INDEX},,{SCHEMA2}; q=0.9"])
        self.assertEqual(frozenset({OCI_INDEX, SCHEMA2, OCI_MANIFEST}), one)
        self.assertEqual(one, other)

    def test_what_has_no_weight_is_not_taken(self) -> None:
        """
        A type of weight 0 is rejected, one of low weight is accepted.
        """
        self.assertEqual(
            frozenset({SCHEMA2}),
            accepted_types([f"{OCI_INDEX};q=0, {OCI_MANIFEST}; q=0.000, {SCHEMA2};q=0.001"]),
        )

    def test_anything_is_taken_by_who_says_so_or_nothing(self) -> None:
        """
        Without Accept, or with a wildcard among the types, all are accepted.
        """
        for accept in ([], [""], ["*/*"], [OCI_INDEX, "*/*;q=0.1"], [f"application/*, {SCHEMA2}"]):
            self.assertEqual(frozenset(), accepted_types(accept))

    def test_a_refused_wildcard_is_none(self) -> None:
        """
        A wildcard of weight 0 accepts nothing more.
        """
        self.assertEqual(frozenset({SCHEMA2}), accepted_types([f"{SCHEMA2}, */*;q=0"]))

    def test_types_that_no_manifest_has_are_dropped(self) -> None:
        """
        They choose nothing, and a client could fill memory and disk with them.
        """
        many = ", ".join(f"application/x-{number}" for number in range(1000))
        self.assertEqual(frozenset({SCHEMA2}), accepted_types([f"{many}, {SCHEMA2}"]))
        self.assertEqual(frozenset(), accepted_types(["text/html, application/json"]))


def type_of(content_type: str, manifest: bytes) -> str:
    """
    Return the media type of a manifest that came with a Content-Type.
    """
    return Document.read(manifest).type_as(content_type)


class ManifestTypeTests(SynchronousTestCase):
    """
    The type of a manifest follows from its content and its Content-Type, or it is rejected.
    """

    def test_the_content_type_names_the_manifest(self) -> None:
        """
        Parameters are ignored, whether or not the manifest names its type.
        """
        self.assertEqual(OCI_MANIFEST, type_of(OCI_MANIFEST, b"{}"))
        self.assertEqual(SCHEMA2, type_of(f"{SCHEMA2.upper()}; charset=utf-8", b"{}"))
        for media_type in MANIFEST_TYPES:
            self.assertEqual(media_type, type_of(media_type, json.dumps({"mediaType": media_type}).encode()))

    def test_more_values_than_any_manifest_has_are_refused_unparsed(self) -> None:
        """
        Parsing blocks all other threads: 4,200 layers with annotations pass, 100,000 empty lists do not.
        """
        annotated = {
            "mediaType": LAYER,
            "digest": "sha256:" + "a" * 64,
            "size": 1,
            "annotations": dict.fromkeys("abcdefgh", ""),
        }
        self.assertEqual(OCI_MANIFEST, type_of(OCI_MANIFEST, json.dumps({"layers": [annotated] * 4200}).encode()))
        for filler in (b"[],", b"{},", b"1,"):
            huge = b'{"a":[' + filler * VALUES_LIMIT + b"1]}"
            self.patch(json, "loads", lambda *_, **__: self.fail("it was parsed"))
            with self.assertRaisesRegex(ValueError, "100,000 values"):
                type_of(OCI_MANIFEST, huge)
            with self.assertRaisesRegex(ValueError, "100,000 values"):
                list(listed(huge, OCI_MANIFEST))

    def test_an_integer_of_thousands_of_digits_is_refused(self) -> None:
        """
        Parsing a thousand of these blocks all threads for a tenth of a second.
        """
        self.assertEqual(OCI_MANIFEST, type_of(OCI_MANIFEST, b'{"a": %b}' % (b"9" * DIGITS_LIMIT)))
        for sign in (b"", b"-"):
            with self.assertRaisesRegex(ValueError, "no JSON"):
                type_of(OCI_MANIFEST, b'{"a": %b%b}' % (sign, b"9" * (DIGITS_LIMIT + 1)))

    def test_what_is_no_manifests_type_is_refused(self) -> None:
        """
        A web page or a blob in a manifest's place is not passed on.
        """
        for content_type in ("", "text/html", "application/json", "application/octet-stream", LAYER):
            self.assertRaises(ValueError, type_of, content_type, b"{}")

    def test_one_type_is_not_passed_off_as_another(self) -> None:
        """
        A manifest that contradicts its Content-Type is rejected.
        """
        for own in (OCI_INDEX, 5, 0, False, [], [OCI_MANIFEST], " "):
            self.assertRaises(ValueError, type_of, OCI_MANIFEST, json.dumps({"mediaType": own}).encode())

    def test_what_is_no_json_object_is_refused(self) -> None:
        """
        Any bytes are either a manifest or an error of one kind.
        """
        for data in (b"", b"<html>", b"[]", b"null", b"5", b'"{}"', b"\xff\xfe", b"{", b"[" * 100_000):
            self.assertRaises(ValueError, type_of, OCI_MANIFEST, data)

    def test_a_media_type_of_null_or_nothing_is_none(self) -> None:
        for own in ("", None):
            document = json.dumps({"mediaType": own}).encode()
            self.assertEqual(OCI_MANIFEST, type_of(OCI_MANIFEST, document))

    def test_a_manifest_may_have_four_mebibytes(self) -> None:
        """
        The limit is the specification's and ECR's.
        """
        self.assertEqual(4_194_304, MANIFEST_LIMIT)


def item(digest: str = SHA256, media_type: object = LAYER, size: object = 7, **more: object) -> dict[str, object]:
    """
    Return a descriptor as in manifests.
    """
    return {"mediaType": media_type, "digest": digest, "size": size, **more}


def names_listed(document: object, media_type: str = OCI_MANIFEST) -> list[tuple[Kind, Descriptor]]:
    """
    Return what a manifest of some type lists.
    """
    return list(listed(json.dumps(document).encode(), media_type))


class ListedTests(SynchronousTestCase):
    """
    Content that a manifest lists in its own repository needs no further request to ECR.
    """

    def test_a_manifest_lists_its_config_and_layers(self) -> None:
        """
        Each of them is a blob with its type and size.
        """
        config = item(SHA512, "application/vnd.oci.image.config.v1+json", 3)
        self.assertEqual(
            [
                (Kind.BLOB, Descriptor(LAYER, Digest("sha256", HEX), 7)),
                (Kind.BLOB, Descriptor("application/vnd.oci.image.config.v1+json", Digest("sha512", HEX * 2), 3)),
            ],
            names_listed({"config": config, "layers": [item()]}),
        )

    def test_an_index_lists_its_manifests(self) -> None:
        """
        Each platform's manifest, with its size and type.
        """
        self.assertEqual(
            [(Kind.MANIFEST, Descriptor(SCHEMA2, Digest("sha256", HEX), 400))],
            names_listed({"manifests": [item(media_type=SCHEMA2, size=400, platform={"os": "linux"})]}, OCI_INDEX),
        )

    def test_an_artifact_lists_its_blobs(self) -> None:
        """
        Artifact manifests have blobs in the place of layers.
        """
        self.assertEqual(
            [(Kind.BLOB, Descriptor(LAYER, Digest("sha256", HEX), 7))],
            names_listed({"blobs": [item()]}, ARTIFACT),
        )

    def test_what_may_live_elsewhere_is_not_listed(self) -> None:
        """
        Foreign layers, content with URLs and subjects prove nothing.
        """
        foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
        kept_back = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
        document = {
            "layers": [
                item(media_type=foreign),
                item(media_type=kept_back),
                item(urls=["https://elsewhere.test/layer"]),
            ],
            "subject": item(media_type=OCI_MANIFEST),
        }
        self.assertEqual([], names_listed(document))
        self.assertEqual(1, len(names_listed({"layers": [item(urls=[])]})))

    def test_nor_is_what_may_by_names_in_another_case(self) -> None:
        """
        A registry in Go reads C{URLs} as C{urls}, and one may compare media types without their case: RFC 6838, 4.2.
        """
        foreign = "application/vnd.docker.image.rootfs.Foreign.diff.tar.gzip"
        kept_back = "application/vnd.oci.image.layer.NonDistributable.v1.tar+gzip"
        for name in ("URLs", "URLS", "url\u017f"):
            with self.subTest(name):
                self.assertEqual([], names_listed({"layers": [item() | {name: ["https://elsewhere.test/layer"]}]}))
        for media_type in (foreign, kept_back):
            with self.subTest(media_type):
                self.assertEqual([], names_listed({"layers": [item(media_type=media_type)]}))

    def test_what_is_no_descriptor_is_not_listed(self) -> None:
        """
        An invalid item costs a request to ECR, never a failure, and does not affect the others.
        """
        odd: tuple[object, ...] = (
            None,
            5,
            "x",
            [],
            {},
            item("sha256:abc"),
            item(media_type=None),
            item(size="7"),
            item(size=None),
            {"digest": SHA256, "size": 7},
            {"mediaType": LAYER, "digest": 5, "size": 7},
        )
        self.assertEqual(1, len(names_listed({"layers": [*odd, item()]})))
        for media_type in MANIFEST_TYPES:
            self.assertEqual([], names_listed({"layers": {}, "manifests": "x", "config": 5, "blobs": None}, media_type))

    def test_only_the_fields_of_the_media_type_are_read(self) -> None:
        """
        A registry checks no others, so other fields may name another repository's content.
        """
        document = {
            "layers": [item(size=1)],
            "config": item(size=2),
            "blobs": [item(size=3)],
            "manifests": [item(size=4, media_type=OCI_MANIFEST)],
        }
        expected = {OCI_MANIFEST: {1, 2}, SCHEMA2: {1, 2}, ARTIFACT: {3}} | {each: {4} for each in INDEX_TYPES}
        for media_type in MANIFEST_TYPES:
            found = {descriptor.size for _, descriptor in names_listed(document, media_type)}
            self.assertEqual(expected.get(media_type, set()), found, media_type)
        self.assertEqual([], names_listed(document, "text/html"))

    def test_sizes_that_no_content_has_are_not_listed(self) -> None:
        """
        A descriptor whose size is negative, or true, is invalid.
        """
        self.assertEqual([], names_listed({"layers": [item(size=-1), item(size=True), item(size=2**63)]}))

    def test_what_readers_may_read_differently_lists_nothing(self) -> None:
        """
        Of a repeated member parsers use the first or the last; Go's ignore the case of names, too.
        """
        other = json.dumps(item(SHA512))
        one = json.dumps(item())
        for text in (
            f'{{"layers": [{one}], "layers": [{other}]}}',
            f'{{"layers": [{one}], "Layers": [{other}]}}',
            f'{{"layers": [{one}], "layer\u017f": [{other}]}}',
            f'{{"layers": [{{"Digest": "{SHA512}", {one[1:]}]}}',
            f'{{"layers": [{{"digest": "{SHA512}", {one[1:]}]}}',
        ):
            self.assertEqual([], list(listed(text.encode(), OCI_MANIFEST)), text)
        self.assertEqual(2, len(names_listed({"layers": [item(), item()], "annotations": {"layers": "x"}})))

    def test_what_is_no_json_object_lists_nothing(self) -> None:
        """
        Bytes that are no manifest are an error, not an empty list.
        """
        for data in (b"", b"[]", b"<html>", b"\xff"):
            self.assertRaises(ValueError, list, listed(data, OCI_MANIFEST))
