"""
The daemon's assumptions about ECR, checked against a stand-in that meets them, differs, or is wrong.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.http_headers import Headers

from ecrproxy.command.checkup.assumptions import ASSUMPTIONS, findings, judge, report
from ecrproxy.command.checkup.findings import Finding, Verdict
from ecrproxy.command.checkup.judgement import Judgement, Outcome
from ecrproxy.command.checkup.questions import QUESTIONS, DoctorRequest, Seen, interview
from ecrproxy.command.checkup.reach import Contact
from tests.registry import StandIn, digest_of
from tests.registry_content import OCI_INDEX, OCI_MANIFEST, SCHEMA2, SCHEMA2_LIST
from tests.registry_http import Quirks
from tests.registry_replies import EXPIRED, registry_error
from tests.registry_server import noise
from tests.test_registry import START, TRAVERSAL, Body

SCHEMA1: Final = "application/vnd.docker.distribution.manifest.v1+prettyjws"
HEADERS: Final = (
    *("content-type", "content-length", "content-range", "docker-content-digest", "link", "location"),
    *("retry-after", "vary", "www-authenticate"),
)
REPOSITORY, TAG = "hidden-team/hidden-app", "hidden-tag"
PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "ecr.rst"


class Rig:
    """
    A doctor with a stand-in for ECR.

    @ivar questions: the questions that were asked.
    """

    def __init__(self, **quirks: Any) -> None:
        self.clock = Clock()
        self.clock.advance(START)
        self.standin = StandIn(self.clock)
        self.standin.quirks.__dict__.update(vars(Quirks(**quirks)))
        self.image = self.standin.push_image(REPOSITORY, "a-tag", TAG, layers=[noise("big", 5000)])
        self.token_seconds: float | None = self.standin.quirks.token_lifetime
        self.bucket, self.seconds = ["52.0.0.1"], 100
        self.questions: list[DoctorRequest] = []
        self._token = self.standin.issue_token()
        self._altered: dict[str, Callable[[Contact], Contact]] = {}

    def alter(self, question: str, status: int | None = None, body: bytes | None = None, **headers: str | None) -> None:
        """
        Change some parts of an answer; a header that is None is left out.
        """
        named = {name.replace("_", "-"): value for name, value in headers.items()}

        def change(contact: Contact) -> Contact:
            kept = {name: value for name, value in ({**contact.headers, **named}).items() if value is not None}
            changed = replace(contact, headers=kept, body=contact.body if body is None else body)
            return replace(changed, status=status or contact.status)

        self._altered[question] = change

    def silence(self, question: str) -> None:
        """
        Leave a question unanswered.
        """
        self._altered[question] = lambda _: Contact("x", "it does not answer")

    def store_as(self, media_type: str) -> None:
        """
        Put an index of that type behind the tag.
        """
        self.standin.push_index(REPOSITORY, TAG, [self.image], media_type)

    def refer(self, count: int) -> None:
        """
        Add so many manifests that refer to the image.
        """
        subject = self.image.descriptor()
        for number in range(count):
            manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "subject": subject, "number": number}
            self.standin.push_manifest(REPOSITORY, manifest, OCI_MANIFEST)

    def ask(self, question: DoctorRequest) -> Contact:
        """
        Ask the stand-in.
        """
        self.questions.append(question)
        url, shown = question.target, {}
        if url.startswith("/"):
            url, shown = self.standin.registry + url, {"Authorization": f"Basic {self._token}"}
        fields = Headers({name: [value] for name, value in {**shown, **question.headers}.items()})
        asking = TRAVERSAL(self.standin.resource).request(question.method.encode(), url.encode(), fields)
        got: list[Any] = []
        asking.addCallback(got.append)
        (response,) = got
        body: list[bytes] = []
        Body(response).done.addCallback(body.append)
        told = {name.decode().lower(): values[0].decode() for name, values in response.headers.getAllRawHeaders()}
        if isinstance(response.length, int):
            told.setdefault("content-length", str(response.length))  # not among the headers of a GET
        contact = Contact("x", status=response.code, headers=told, body=body[0][: question.most])
        change = self._altered.get(question.name)
        return contact if change is None else change(contact)

    def in_time(self) -> bool:
        """
        Return True if there is time for one more question.
        """
        return len(self.questions) < self.seconds

    def seen(self) -> Seen:
        """
        Ask everything.
        """
        seen = interview(self.ask, self.standin.registry, REPOSITORY, TAG, in_time=self.in_time)
        return replace(seen, token_seconds=self.token_seconds, bucket=self.bucket)


def altered(question: str, status: int | None = None, body: bytes | None = None, **headers: str | None) -> Prepare:
    return lambda rig: rig.alter(question, status, body, **headers)


def with_quirks(**quirks: Any) -> Prepare:
    """
    Set some of the stand-in's quirks.
    """
    return lambda rig: rig.standin.quirks.__dict__.update(quirks)


def error(question: str, status: int, code: str, message: str = "") -> Prepare:
    """
    Reject a question in the specification's words.
    """
    return altered(question, status, bytes(registry_error(status, code, message).body))


Prepare = Callable[[Rig], object]
WELL, OTHER, WRONG, UNSEEN = Outcome.DOCUMENTED, Outcome.OTHERWISE, Outcome.DEFECT, Outcome.UNSEEN


def as_it_is(_: Rig) -> None:
    """
    The stand-in behaves as documented.
    """


def location(url: str) -> Prepare:
    """
    Change the location of blobs.
    """
    return altered("blob", location=url)


BUCKET = "https://prod-eu-west-1-starport-layer-bucket.s3.eu-west-1.amazonaws.com/hidden"
BY_TAG = f"/manifests/{TAG}"
CASES: Mapping[str, list[tuple[Outcome, Prepare]]] = {
    "token-lifetime": [
        (WELL, as_it_is),
        (OTHER, lambda rig: setattr(rig, "token_seconds", 3600.0)),
        (OTHER, lambda rig: setattr(rig, "token_seconds", -5.0)),
        (UNSEEN, lambda rig: setattr(rig, "token_seconds", None)),
    ],
    "token-refused": [
        (WELL, as_it_is),
        (OTHER, error("no-token", 403, "DENIED", EXPIRED)),
        (OTHER, altered("no-token", 401, www_authenticate="Basic")),
        (OTHER, altered("no-token", 200)),
        (WRONG, error("no-token", 403, "DENIED", "go away")),
        (WRONG, error("no-token", 404, "NAME_UNKNOWN")),
        (UNSEEN, lambda rig: rig.silence("no-token")),
    ],
    "iam-wording": [
        (WELL, lambda rig: rig.standin.deny("ecr:BatchGetImage", path_contains="/referrers/")),
        (OTHER, error("referrers", 403, "DENIED", "no")),
        (WRONG, error("referrers", 403, "DENIED", "your token is not for this")),
        (WRONG, altered("referrers", 403, b"<html>hidden</html>")),
        (UNSEEN, as_it_is),
    ],
    "throttling": [
        (WELL, lambda rig: rig.standin.throttle("registry", path_contains="/referrers/", retry_after="3")),
        (OTHER, lambda rig: rig.standin.throttle("registry", path_contains="/referrers/")),
        (OTHER, lambda rig: rig.standin.throttle("registry", path_contains="/referrers/", retry_after="hidden")),
        (UNSEEN, as_it_is),
    ],
    "missing-tag": [
        (WELL, as_it_is),
        (OTHER, error("no-tag", 404, "NOT_FOUND")),
        (OTHER, error("no-tag", 403, "DENIED", "User is not authorized to perform: ecr:BatchGetImage")),
        (WRONG, altered("no-tag", 404, b"not found")),
        (WRONG, altered("no-tag", 200)),
        (UNSEEN, lambda rig: rig.silence("no-tag")),
        (UNSEEN, lambda rig: rig.standin.delete_tag(REPOSITORY, TAG)),
    ],
    "missing-repository": [
        (WELL, as_it_is),
        (OTHER, error("no-repository", 404, "NOT_FOUND")),
        (OTHER, error("no-repository", 403, "DENIED", "User is not authorized to perform: ecr:BatchGetImage")),
        (WRONG, altered("no-repository", 404, b"not found")),
        (WRONG, error("no-repository", 400, "NAME_INVALID")),
        (UNSEEN, lambda rig: rig.silence("no-repository")),
    ],
    "manifest-head": [
        (WELL, as_it_is),
        *((OTHER, altered("head", status)) for status in (400, 401, 403, 404, 405)),
        (WRONG, altered("head", 302)),
        (UNSEEN, altered("head", 503)),
        (UNSEEN, lambda rig: rig.standin.delete_tag(REPOSITORY, TAG)),
    ],
    "manifest-head-length": [
        (WELL, as_it_is),
        (OTHER, altered("head", content_length=None)),
        (OTHER, altered("head", content_length="0")),
        (OTHER, altered("head", content_length=str(2**23))),
        (OTHER, altered("head", content_type="text/hidden")),
        (UNSEEN, altered("head", 405)),
    ],
    "manifest-head-digest": [
        (WELL, as_it_is),
        (OTHER, altered("head", docker_content_digest=None)),
        (WRONG, altered("head", docker_content_digest="hidden")),
        (WRONG, altered("head", docker_content_digest=digest_of(b"hidden"))),
        (UNSEEN, altered("head", 405)),
    ],
    "manifest-get-digest": [
        (WELL, as_it_is),
        (OTHER, lambda rig: rig.alter("manifest", docker_content_digest=rig.image.digest)),
        (WRONG, altered("manifest", docker_content_digest=digest_of(b"hidden"))),
        (UNSEEN, altered("manifest", 404)),
    ],
    "manifest-type": [
        (WELL, as_it_is),
        (WELL, lambda rig: rig.store_as(OCI_INDEX)),
        (OTHER, altered("manifest", content_type=f"{OCI_MANIFEST.upper()};charset=utf-8")),
        (WRONG, altered("manifest", content_type=SCHEMA2)),
        (WRONG, altered("manifest", content_type=None)),
        (WRONG, altered("manifest", body=b"hidden")),
        (UNSEEN, altered("manifest", 403)),
    ],
    "manifest-length": [
        (WELL, as_it_is),
        (OTHER, altered("manifest", content_length=None)),
        (WRONG, altered("manifest", content_length="hidden")),
        (WRONG, altered("manifest", body=b" " * (4 * 2**20 + 1))),
        (UNSEEN, altered("manifest", 404)),
    ],
    "manifest-vary": [
        (WELL, as_it_is),
        (OTHER, altered("manifest", vary="Accept")),
        (UNSEEN, altered("manifest", 404)),
    ],
    "manifest-conversion": [
        (WELL, as_it_is),
        (OTHER, lambda rig: rig.alter("converted", body=rig.image.manifest, content_type=OCI_MANIFEST)),
        (OTHER, altered("converted", body=b'{"schemaVersion": 1}', content_type=SCHEMA1)),  # as old registries do
        (OTHER, error("converted", 406, "UNSUPPORTED")),
        (WRONG, altered("converted", body=b"hidden", content_type="text/html")),
        (UNSEEN, lambda rig: rig.store_as(SCHEMA2_LIST)),
        (UNSEEN, altered("manifest", 404)),
    ],
    "manifest-by-digest": [
        (WELL, as_it_is),
        (WELL, lambda rig: rig.store_as(OCI_INDEX)),
        (WRONG, altered("image", body=b"hidden")),
        (UNSEEN, altered("manifest", 404)),
    ],
    "blob-head": [
        (WELL, as_it_is),
        (OTHER, with_quirks(blob_head=307)),
        (OTHER, with_quirks(blob_head=401)),
        (WRONG, altered("blob-head", 206)),
        (UNSEEN, lambda rig: rig.silence("blob-head")),
    ],
    "blob-head-type": [
        (WELL, as_it_is),
        (OTHER, altered("blob-head", content_type=None)),
        (OTHER, altered("blob-head", content_type="text/html")),
        (OTHER, altered("blob-head", content_type="text/html", docker_content_digest=None)),
        (UNSEEN, with_quirks(blob_head=307)),
    ],
    "blob-head-length": [
        (WELL, as_it_is),
        (OTHER, altered("blob-head", content_length=None)),
        (WRONG, altered("blob-head", content_length="17")),
        (UNSEEN, with_quirks(blob_head=401)),
    ],
    "blob-redirect": [
        (WELL, as_it_is),
        (OTHER, altered("blob", 302)),
        (OTHER, altered("blob", 206, b"x")),
        (WRONG, location("ftp://hidden/")),
        (WRONG, location("http://hidden/")),  # from https
        (WRONG, altered("blob", 400)),
        (UNSEEN, altered("blob", 403)),
    ],
    "redirect-host": [
        (WELL, as_it_is),
        (OTHER, location("https://hidden.s3.eu-west-1.amazonaws.com/")),
        (OTHER, location("https://hidden.cloudfront.net/")),
        (OTHER, location(BUCKET.replace(".com/", ".com.hidden.example/"))),
        (UNSEEN, altered("blob", 206)),
    ],
    "redirect-expiry": [
        (WELL, as_it_is),
        (OTHER, with_quirks(url_lifetime=900)),
        (OTHER, location(f"{BUCKET}?X-Amz-Expires=hidden")),
        (OTHER, location(BUCKET)),
        (UNSEEN, altered("blob", 206)),
    ],
    "bucket-addresses": [
        (WELL, as_it_is),
        (OTHER, lambda rig: rig.bucket.append("2001:db8::1")),
        (UNSEEN, lambda rig: rig.bucket.clear()),
        (UNSEEN, altered("blob", 206)),
    ],
    "bucket-range": [
        (WELL, as_it_is),
        (OTHER, with_quirks(ignore_range=True)),
        (OTHER, with_quirks(longest_part=1)),
        (WRONG, altered("part", content_range="bytes 0-1/9000")),
        (WRONG, altered("part", content_range="bytes 1-2/*")),
        (WRONG, altered("part", content_range="bytes 1-2/9")),
        (WRONG, altered("part", 204)),
        (UNSEEN, altered("part", 403)),
        (UNSEEN, altered("part", 307)),
        (UNSEEN, altered("image", body=b'{"layers": []}')),
    ],
    "bucket-ranges": [
        (WELL, as_it_is),
        (OTHER, altered("parts", 206, content_type="multipart/byteranges; boundary=hidden")),
        (OTHER, altered("parts", 416)),
        (UNSEEN, altered("parts", 403)),
    ],
    "bucket-refusal": [
        (WELL, as_it_is),
        *((OTHER, altered("forged", status)) for status in (400, 401, 404, 410, 206)),
        (WRONG, altered("forged", 405)),
        (UNSEEN, altered("forged", 307)),
        (UNSEEN, location(f"{BUCKET}?unsigned")),
    ],
    "bucket-words": [
        (WELL, as_it_is),
        (OTHER, altered("forged", body=b"hidden")),
        (UNSEEN, altered("forged", 206)),
    ],
    "tags-type": [
        (WELL, as_it_is),
        (OTHER, altered("tags", content_type="application/json")),
        (OTHER, altered("tags", content_type=None)),
        (UNSEEN, altered("tags", 403)),
    ],
    "tags-next": [
        (WELL, as_it_is),
        (OTHER, altered("tags", link='</v2/hidden/tags/list?last=hidden>; rel="next"')),
        (OTHER, altered("tags", link=None, body=b'{"tags": ["hidden", "hidden"]}')),
        (WRONG, altered("tags", link="hidden")),
        (WRONG, altered("tags", link=None, body=b'{"tags": "hidden"}')),
        (UNSEEN, lambda rig: rig.standin.delete_tag(REPOSITORY, "a-tag")),
        (UNSEEN, altered("tags", 403)),
    ],
    "tags-limit": [
        (WELL, altered("many-tags", 405)),
        (OTHER, as_it_is),  # the stand-in answers 400
        (OTHER, altered("many-tags", 200)),
        (UNSEEN, altered("many-tags", 403)),
    ],
    "referrers": [
        (WELL, as_it_is),
        (WELL, lambda rig: rig.refer(1000)),
        (OTHER, altered("referrers", link='<?hidden>; rel="next"')),
        (OTHER, altered("referrers", 404)),
        (OTHER, altered("referrers", 405)),
        (WRONG, altered("referrers", body=b"hidden", content_type="text/html")),
        (WRONG, altered("referrers", body=b'{"manifests": "hidden"}')),
        (UNSEEN, altered("referrers", 403)),
    ],
    "referrers-of-nothing": [
        (WELL, as_it_is),
        (OTHER, error("no-referrers", 404, "MANIFEST_UNKNOWN")),
        (WRONG, altered("no-referrers", body=b"hidden")),
        (WRONG, altered("no-referrers", 404, b"hidden")),
        (UNSEEN, altered("no-referrers", 403)),
    ],
}


@functools.cache
def seen_in(name: str, number: int) -> tuple[Rig, Seen]:
    """
    Return what is seen in one of the cases.
    """
    rig = Rig()
    CASES[name][number][1](rig)
    return rig, rig.seen()


def found_by(rig: Rig) -> dict[str, Finding]:
    """
    Return the findings by the name of the assumption.
    """
    return {each.check: each for each in findings(rig.seen())}


class JudgementTests(SynchronousTestCase):
    """
    Each assumption, checked against each known behaviour of ECR.
    """

    def test_each_is_judged_by_what_was_seen(self) -> None:
        for name, cases in CASES.items():
            for number, (outcome, _) in enumerate(cases):
                found = judge(name, seen_in(name, number)[1])
                self.assertEqual(outcome, found.outcome, (name, number, found))
                self.assertEqual(outcome in (OTHER, WRONG), bool(found.daemon), (name, found))

    def test_each_outcome_that_it_can_have_is_tried(self) -> None:
        self.assertEqual(list(ASSUMPTIONS), list(CASES))
        shared = {"missing-tag", "missing-repository"}  # judged by one function
        for name, judgement in ASSUMPTIONS.items():
            source = inspect.getsource(judgement)
            expected = {
                WELL,
                UNSEEN,
                *([OTHER] if " otherwise(" in source else []),
                *([WRONG] if " defect(" in source else []),
            }
            expected |= {OTHER, WRONG} if name in shared else set()
            self.assertEqual(expected, {outcome for outcome, _ in CASES[name]}, name)

    def test_each_has_a_row_in_the_documents_and_each_row_that_can_be_checked_is(self) -> None:
        rows = re.findall(r"^   \* - (.+)$", PAGE.read_text("utf-8"), re.MULTILINE)
        named = [row.strip("`") for row in rows if row not in ("check", "none")]
        self.assertEqual(sorted(ASSUMPTIONS), sorted(named))
        self.assertTrue(all(row in ("check", "none") or row.startswith("``") for row in rows), rows)

    def test_where_nothing_answers_nothing_is_judged(self) -> None:
        rig = Rig()
        rig.seconds, rig.token_seconds = 0, None
        seen = rig.seen()
        self.assertEqual({UNSEEN}, {judge(name, seen).outcome for name in ASSUMPTIONS})
        self.assertEqual([], rig.questions)


class QuestionTests(SynchronousTestCase):
    """
    What is asked, and how many requests that takes.
    """

    def test_only_reads_and_of_blobs_a_few_bytes(self) -> None:
        rig = Rig()
        rig.seen()
        self.assertEqual([each.name for each in QUESTIONS], [each.name for each in rig.questions])
        self.assertEqual({"GET", "HEAD"}, {each.method for each in rig.questions})
        self.assertEqual([], [each for each in rig.questions if "{" in each.target])
        of_blobs = [each for each in rig.questions if "/blobs/" in each.target or "starport" in each.target]
        self.assertEqual(5, len(of_blobs))
        for each in of_blobs:
            self.assertTrue(each.method == "HEAD" or (each.most <= 1024 and "Range" in each.headers), each)
        self.assertEqual([], [each for each in rig.questions if each.most > 4 * 2**20 + 1])

    def test_the_token_goes_to_the_registry_alone(self) -> None:
        rig = Rig()
        rig.seen()
        self.assertEqual(3, rig.standin.count("bucket"))
        self.assertEqual([], [each for each in rig.standin.requests("bucket") if "authorization" in each.headers])

    def test_the_largest_layer_is_tried_and_of_an_index_the_first_image(self) -> None:
        rig = Rig()
        rig.store_as(OCI_INDEX)
        known = rig.seen().known
        self.assertEqual(rig.image.digest, known["image"])
        self.assertEqual(rig.image.layers[0], known["blob"])

    def test_no_more_is_asked_when_time_is_up(self) -> None:
        rig = Rig()
        rig.seconds = 4
        rig.seen()
        self.assertEqual(4, len(rig.questions))


class ReportTests(SynchronousTestCase):
    """
    The file for an issue.
    """

    def test_it_has_a_line_for_each_assumption(self) -> None:
        found = found_by(Rig())
        text = report(found, "1.0")
        for name in ASSUMPTIONS:
            self.assertEqual(
                1, len(re.findall(rf"^{name} +(as documented|otherwise|not seen|defect): ", text, re.MULTILINE))
            )
        self.assertIn("not seen: not asked in time", report({}, "1.0"))

    def test_how_it_is_told_follows_from_the_outcome(self) -> None:
        rig = Rig(url_lifetime=900)
        rig.alter("referrers", body=b"x", content_type="text/html")
        found = found_by(rig)
        self.assertEqual(Finding("redirect-host", Verdict.OK, found["redirect-host"].said), found["redirect-host"])
        self.assertEqual(Verdict.WARNING, found["redirect-expiry"].verdict)
        self.assertTrue(found["redirect-expiry"].advice.startswith("the daemon copes: it "))
        self.assertEqual(Verdict.FAILED, found["referrers"].verdict)
        self.assertIn("please report this", found["referrers"].advice)
        self.assertEqual(Verdict.SKIPPED, found["throttling"].verdict)

    def test_no_case_has_a_name_a_digest_or_a_secret_in_it(self) -> None:
        """
        Whatever the stand-in has answered, in each case of each assumption.
        """
        for name, cases in CASES.items():
            for number in range(len(cases)):
                rig, seen = seen_in(name, number)
                text = report({each.check: each for each in findings(seen)}, "1.0")
                hidden = {"hidden", "123456789012", "eu-west-1", rig.image.digest[7:], *rig.standin.tokens.issued()}
                hidden |= {*rig.standin.urls.signatures(), "X-Amz", "AWS4", "AKIASTANDIN", "://"}
                self.assertEqual([], [each for each in hidden if each in text])
                self.assertIsNone(re.search("[0-9a-f]{12}", text))

    @given(st.data())
    def test_nothing_that_anybody_answers_is_repeated(self, data: st.DataObject) -> None:
        """
        No word of any answer gets into the report.
        """
        word = "sesame"
        texts = st.sampled_from([word, f"https://{word}/?X-Amz-Expires={word}", f"application/{word}", f"bytes {word}"])
        codes = st.sampled_from([200, 206, 307, 400, 401, 403, 404, 405, 416, 429, 500])
        names = st.sampled_from(HEADERS)
        words = [{"errors": [{"code": word, "message": f"{word} token"}]}, {"tags": [word]}, {"manifests": [word]}]
        bodies = st.sampled_from([word.encode(), *(json.dumps(each).encode() for each in words)])
        bodies |= st.just(f"<Code>{word}</Code><Message>{word}</Message>".encode())

        _, well = seen_in("manifest-head", 0)

        def ask(question: DoctorRequest) -> Contact:
            true = well.answers[question.name]
            if data.draw(st.booleans()):
                return true
            headers = {**true.headers, **data.draw(st.dictionaries(names, texts, max_size=3))}
            return Contact(word, word, status=data.draw(codes), headers=headers, body=data.draw(bodies))

        seen = interview(ask, f"https://{word}", f"{word}/{word}", word, in_time=lambda: True)
        text = report({each.check: each for each in findings(replace(seen, bucket=[word]))}, "1.0")
        self.assertNotIn(word, text)

    def test_a_judgement_is_short(self) -> None:
        self.assertEqual(Judgement(WELL, "200"), judge("manifest-head", Rig().seen()))
