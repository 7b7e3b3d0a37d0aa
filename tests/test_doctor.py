"""
The command C{ecr-proxy doctor}: all checks together, their output, and their dependencies.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.command.checkup.assumptions import ASSUMPTIONS
from ecrproxy.command.checkup.aws import AwsRefusedError, AwsUnreachableError, Identity, NoCredentialsError, Provider
from ecrproxy.command.checkup.doctor import run
from ecrproxy.command.checkup.findings import Check, Once, SkippedError, Verdict, examine, ok
from ecrproxy.command.checkup.names import LookupResult
from ecrproxy.command.checkup.reach import Contact
from ecrproxy.command.checkup.senses import Senses
from ecrproxy.command.doctor import DOCTOR
from ecrproxy.oci import Digest
from ecrproxy.registry.aws import Credentials
from ecrproxy.registry.egress import Proxy
from tests.caller import NOW, Caller
from tests.store_contract import scratch
from tests.test_checkup_account import ARN, BODY, CONFIG
from tests.test_checkup_machine import WELL
from tests.test_checkup_network import AMAZON, ECR

TOKEN = "c2VjcmV0LXRva2Vu"
T = TypeVar("T")
LOCATION = "https://prod.s3.eu-west-1.amazonaws.com/blob?X-Amz-Signature=secret-signature"
LOGIN = "Basic YW5uOmNhbmFyeQ=="
"""ann:canary"""


@dataclass
class World:
    """
    An AWS where everything works, unless a test says otherwise.

    @ivar problems: what happens instead, by request.
    """

    problems: dict[str, Exception] = field(default_factory=dict)
    touched: list[tuple[str, str, Mapping[str, str]]] = field(default_factory=list)
    read: dict[str, int] = field(default_factory=dict)
    addresses: dict[str, list[str]] = field(default_factory=dict)
    hanging: bool = False
    greeting: int = 200
    challenge: str = ""
    login: int = 200
    through: list[str] = field(default_factory=list)
    roles: dict[str, World] = field(default_factory=dict)
    opened: list[tuple[str, Credentials]] = field(default_factory=list)

    def account(self, region: str, credentials: Credentials) -> World:
        self.opened.append((region, credentials))
        return self.roles.get(credentials.role or "", self)

    def provider(self) -> Provider:
        return self._told("provider", Provider("iam-role"))

    def identity(self) -> Identity:
        return self._told("identity", Identity(ARN, "123456789012"))

    def token(self) -> tuple[str, float]:
        return self._told("token", (TOKEN, NOW + 43200))

    def simulate(self, arn: str, actions: Sequence[str], resource: str) -> Mapping[str, str]:
        assert resource == "arn:aws:ecr:eu-west-1:123456789012:repository/*"
        return self._told("simulate", dict.fromkeys(actions, "allowed"))

    def _told(self, what: str, answer: T) -> T:
        if what in self.problems:
            raise self.problems[what]
        return answer

    def touch(
        self,
        url: str,
        address: str,
        headers: Mapping[str, str],
        *,
        method: str = "GET",
        through: Proxy | None = None,
        most: int = 64 * 2**10,
    ) -> Contact:
        self.touched.append((url, address, headers))
        if headers.get("Authorization") == LOGIN:
            return Contact(address, status=self.login)
        self.read[url] = min(most, self.read.get(url, most))
        self.through.append(str(through or ""))
        blob = f"/blobs/{Digest.of(CONFIG)}"
        shown = replace(AMAZON, until=NOW + 10**8)
        answers: dict[str, Contact] = {
            "/v2/": Contact(
                address,
                status=self.greeting if headers else 401,
                headers={} if headers else {"www-authenticate": self.challenge},
                shown=shown,
            ),
            "/tags/list?n=1": Contact(address, status=200, body=b'{"tags": ["1"]}'),
            "/manifests/1": Contact(address, status=200, body=BODY),
            "/manifests/none": Contact(address, status=404),
            f"/manifests/{Digest.of(BODY)}": Contact(address, status=200, body=BODY),
            blob: Contact(address, status=307, headers={"location": LOCATION}),
            f"/blobs/{Digest.of(b'layer')}": Contact(address, status=307, headers={"location": LOCATION}),
            f"/referrers/{Digest.of(BODY)}": Contact(address, status=200),
        }
        for end, answer in answers.items():
            if url.endswith(end):
                return answer
        return Contact(address, status=206, shown=shown)

    def ask_system(self, host: str) -> LookupResult:
        return LookupResult(self.addresses.get(host, ["52.0.0.1"]))

    def ask_metadata(self, method: str, url: str, headers: Mapping[str, str]) -> Contact:
        return Contact("x", status=200, body=b"puller")

    def start(self, work: Callable[[], None]) -> None:
        if not self.hanging:
            work()

    def senses(self) -> Senses:
        """
        Return the senses for this world.
        """
        return Senses(
            account=self.account,
            touch=self.touch,
            touch_place=lambda place, path: Contact("x", "Connection refused"),
            bind=lambda place: 0,
            ask_system=self.ask_system,
            ask_metadata=self.ask_metadata,
            survey=lambda path, seconds: WELL,
            most_files=lambda: 65536,
            cores=lambda: 2,
            user=lambda: 0,
            start=self.start,
        )


class DoctorTestCase(SynchronousTestCase):
    """
    A world where everything works, and a caller.
    """

    def setUp(self) -> None:
        self.world, self.caller = World(), Caller()
        self.caller.variables = {
            "PROXY_ECR_ENDPOINT": ECR,
            "PROXY_DNS_RESOLVER": "system",
            "AWS_SECRET_ACCESS_KEY": "secret-key",
        }

    def call(self, *arguments: str) -> str:
        """
        Run the doctor.
        """
        subcommands = [replace(DOCTOR, run=partial(run, senses=self.world.senses()))]
        return self.caller.call("doctor", *arguments, subcommands=subcommands)

    def verdicts(self, *arguments: str) -> dict[str, str]:
        """
        Run the doctor, and return the verdict of each check.
        """
        told = json.loads(self.call("--json", *arguments))
        return {each["check"]: each["verdict"] for each in told["findings"]}


class DoctorTests(DoctorTestCase):
    """
    One run.
    """

    def test_where_all_is_well_each_line_says_so(self) -> None:
        """
        The exit status is that of success.
        """
        said = self.call("--repository", "team/app:1")
        self.assertEqual(0, self.caller.status, said)
        lines = said.splitlines()
        self.assertEqual({"ok"}, {line.split()[0] for line in lines}, said)
        self.assertIn("ecr:GetDownloadUrlForLayer", said)
        self.assertIn("bucket", said)

    def test_what_failed_is_told_with_what_to_do(self) -> None:
        """
        Below the failure; the exit status reports it, and the other checks still run.
        """
        self.world.problems["token"] = AwsUnreachableError("Connect timeout on endpoint URL")
        said = self.call("--repository", "team/app:1")
        self.assertEqual(1, self.caller.status)
        self.assertIn("failed   token", said)
        self.assertIn("-> see that api.ecr of the region can be reached", said)
        self.assertIn("skipped  permissions", said)
        self.assertIn("ok       cache", said)

    def test_without_credentials_what_needs_none_is_looked_at(self) -> None:
        """
        Checks that need them are skipped.
        """
        for each in ("provider", "identity", "token"):
            self.world.problems[each] = NoCredentialsError("no AWS credentials found")
        del self.caller.variables["AWS_SECRET_ACCESS_KEY"]
        found = self.verdicts()
        self.assertEqual("failed", found["credentials"])
        self.assertIn("hop limit must be 2", self.caller.stdout.getvalue())
        self.assertEqual(["skipped"] * 3, [found[each] for each in ("identity", "token", "permissions")])
        self.assertEqual(["ok"] * 4, [found[each] for each in ("registry", "clock", "bucket", "cache")])

    def test_programs_read_json(self) -> None:
        """
        All findings, and the number of failures.
        """
        self.world.problems["token"] = AwsUnreachableError("no")
        told = json.loads(self.call("--json"))
        self.assertEqual(1, told["failed"])
        self.assertEqual({"check", "verdict", "said", "advice"}, set(told["findings"][0]))

    def test_no_secret_is_told(self) -> None:
        """
        Neither token nor key nor the URL of a blob.
        """
        said = self.call("--repository", "team/app:1") + self.call("--json", "--repository", "team/app:1")
        for secret in (TOKEN, "secret-key", "secret-signature", "X-Amz"):
            self.assertNotIn(secret, said)

    def test_the_token_goes_to_the_registry_alone(self) -> None:
        """
        The bucket is asked without it.
        """
        self.call("--repository", "team/app:1")
        to_bucket = [headers for url, _, headers in self.world.touched if not url.startswith(f"https://{ECR}/")]
        self.assertEqual([{"Range": "bytes=0-0"}], to_bucket)

    def test_without_a_repository_iam_is_asked(self) -> None:
        """
        If that is allowed; if not, it is no failure.
        """
        found = self.verdicts()
        for action in ("ecr:BatchGetImage", "ecr:BatchImportUpstreamImage", "ecr:CreateRepository"):
            self.assertEqual("ok", found[action])
        self.world.problems["simulate"] = AwsUnreachableError("no way to IAM")
        self.assertEqual("skipped", self.verdicts()["permissions"])
        self.assertEqual(0, self.caller.status)

    def test_wrong_settings_have_a_line_each_after_the_warnings(self) -> None:
        self.caller.variables = {"PROXY_DEBUG": "1", "PROXY_ECR_ENDPONT": ECR}
        self.call()
        lines = [line.removeprefix("ecr-proxy: ").split()[:2] for line in self.caller.complaint.splitlines()]
        expected = [["warning:", "PROXY_DEBUG"], ["PROXY_ECR_ENDPOINT", "is"], ["PROXY_ECR_ENDPONT", "is"]]
        self.assertEqual((2, expected), (self.caller.status, lines))

    def test_a_repository_that_the_pattern_keeps_out_is_told(self) -> None:
        """
        ECR would allow it, the proxy does not.
        """
        found = self.verdicts("--repository", f"{ECR}/team/app:1", "--namespace-pattern", "other/.*")
        self.assertEqual("failed", found["namespace"])
        self.assertEqual("ok", found["ecr:BatchGetImage"])

    def test_a_bucket_where_the_proxy_does_not_go_is_told(self) -> None:
        """
        Loopback and metadata addresses; if the registry itself is on loopback, only the latter.
        """
        bucket = "prod.s3.eu-west-1.amazonaws.com"
        expected = {("52.0.0.1", "127.0.0.1"): "failed", ("127.0.0.1", "127.0.0.1"): "ok"}
        expected |= {(registry, "169.254.169.254"): "failed" for registry in ("52.0.0.1", "127.0.0.1")}
        for (registry, at), verdict in expected.items():
            self.world.addresses.update({ECR: [registry], bucket: [at]})
            self.world.touched.clear()
            self.assertEqual(verdict, self.verdicts("--repository", "team/app:1")["bucket"], (registry, at))
            self.assertEqual(
                verdict == "ok", at in [address for url, address, _ in self.world.touched if bucket in url]
            )

    def test_a_registry_on_loopback_is_told_to_open_loopback_to_redirects(self) -> None:
        self.assertNotIn("redirects", self.verdicts())
        self.world.addresses[ECR] = ["127.0.0.1"]
        self.assertEqual("warning", self.verdicts()["redirects"])
        self.caller.variables["HTTPS_PROXY"] = "http://proxy.test:3128"
        self.assertNotIn("redirects", self.verdicts())

    def test_registry_and_bucket_are_looked_at_through_the_egress_proxy(self) -> None:
        self.caller.variables["HTTPS_PROXY"] = "http://ann:hidden@proxy.test:3128"
        self.world.addresses.update({ECR: [], "prod.s3.eu-west-1.amazonaws.com": []})
        found = self.verdicts("--repository", "team/app:1")
        self.assertEqual(["ok"] * 4, [found[each] for each in ("resolver", "registry", "login", "bucket")])
        self.assertEqual({"proxy.test:3128"}, set(self.world.through))
        self.assertNotIn("hidden", self.call())
        self.caller.variables["HTTPS_PROXY"] = "http://ann:hidden@"
        self.assertIn("HTTPS_PROXY: not the URL", self.call() + self.caller.complaint)

    def test_a_registry_without_an_address_fails_once(self) -> None:
        """
        In the check of names; checks that need an address are skipped.
        """
        self.world.addresses[ECR] = []
        found = self.verdicts()
        self.assertEqual("failed", found["resolver"])
        self.assertEqual(["skipped"] * 2, [found[each] for each in ("registry", "clock")])

    def test_what_takes_too_long_is_a_failure_of_its_own(self) -> None:
        """
        Nothing is waited for without end.
        """
        self.world.hanging = True
        self.caller.step = 10.0
        found = self.verdicts("--seconds", "1")
        self.assertEqual({"failed"}, set(found.values()))

    def test_what_is_wrong_with_the_call_is_one_line(self) -> None:
        """
        With the status for usage errors.
        """
        for arguments in (("--seconds", "soon"), ("--repository", "App"), ("--port", "many")):
            self.call(*arguments)
            self.assertEqual(2, self.caller.status, arguments)
            self.assertEqual(1, self.caller.complaint.count("\n"), arguments)


class ImageTests(DoctorTestCase):
    """
    The daemon's assumptions about ECR, checked with an image.
    """

    def setUp(self) -> None:
        super().setUp()
        self.file = scratch(self)

    def test_each_assumption_has_a_line(self) -> None:
        """
        Beside all other checks.
        """
        found = self.verdicts("--image", "team/app:1")
        self.assertEqual(set(), {*ASSUMPTIONS, "ecr:BatchGetImage", "bucket", "cache"} - found.keys())
        self.assertEqual("ok", found["token-lifetime"])
        self.assertEqual(set(), ASSUMPTIONS.keys() & self.verdicts("--repository", "team/app:1").keys())

    def test_the_report_has_neither_names_nor_digests_nor_secrets(self) -> None:
        self.call("--image", "team/app:1", "--report", str(self.file))
        text = self.file.read_text()
        self.assertIn("as documented: 12 hours", text)
        for hidden in ("team/app", ECR, "123456789012", TOKEN, "secret", "X-Amz", str(Digest.of(BODY)), ARN):
            self.assertNotIn(hidden, text)
        self.assertIsNone(re.search("[0-9a-f]{12}", text))

    def test_the_report_goes_to_the_output_alone_where_that_is_asked_for(self) -> None:
        self.call("--image", "team/app:1", "--report", str(self.file))
        output = self.call("--image", "team/app:1", "--report", "-")
        self.assertEqual(self.file.read_text(), output)
        self.call("--image", "team/app:1", "--report", "-", "--json")
        self.assertIn("both want the standard output", self.caller.complaint)

    def test_an_image_that_is_not_there_is_told_and_nothing_is_told_of_it(self) -> None:
        """
        Otherwise a misspelt name would say of ECR that it has no HEAD.
        """
        found = self.verdicts("--image", "team/app:none")
        self.assertEqual(1, self.caller.status)
        self.assertEqual("failed", found["image"])
        self.assertEqual({"skipped"}, {found[each] for each in ("manifest-head", "missing-tag", "manifest-type")})
        self.assertNotIn("image", self.verdicts("--image", "team/app:1"))

    def test_without_a_token_the_report_says_that_nothing_was_asked(self) -> None:
        self.world.problems["token"] = AwsUnreachableError("no")
        self.call("--image", "team/app:1", "--report", str(self.file))
        self.assertEqual(1, self.caller.status)
        self.assertEqual(
            len(ASSUMPTIONS), self.file.read_text().count("not seen: not asked in time, or without a token")
        )

    def test_a_blob_where_the_proxy_does_not_go_is_not_asked_for(self) -> None:
        bucket = "prod.s3.eu-west-1.amazonaws.com"
        self.assertNotEqual("skipped", self.verdicts("--image", "team/app:1")["bucket-ranges"])
        self.world.addresses[bucket] = ["127.0.0.1"]
        self.world.touched.clear()
        self.assertEqual("skipped", self.verdicts("--image", "team/app:1")["bucket-ranges"])
        self.assertEqual([], [url for url, _, _ in self.world.touched if bucket in url])

    def test_the_token_goes_to_the_registry_alone(self) -> None:
        self.call("--image", "team/app:1")
        elsewhere = [headers for url, _, headers in self.world.touched if not url.startswith(f"https://{ECR}/")]
        self.assertGreater(len(elsewhere), 2)
        self.assertEqual([{"Range"}] * len(elsewhere), [set(headers) for headers in elsewhere])

    def test_a_kilobyte_of_a_blob_is_read_at_most(self) -> None:
        self.call("--image", "team/app:1")
        blob = f"https://{ECR}/v2/team/app/blobs/{Digest.of(b'layer')}"
        self.assertEqual([1024, 1024], [self.world.read[url] for url in (blob, LOCATION)])

    def test_no_question_is_asked_late(self) -> None:
        """
        Questions that are left are reported as not seen, and the report is still written.
        """
        self.caller.step = 1.0
        self.call("--image", "team/app:1", "--seconds", "300", "--report", str(self.file))
        whole = self.file.read_text().count("not seen: not asked")
        self.caller.step = 40.0
        self.call("--image", "team/app:1", "--seconds", "300", "--report", str(self.file))
        self.assertGreater(self.file.read_text().count("not seen: not asked"), whole)

    def test_what_is_wrong_with_the_call_is_one_line(self) -> None:
        digest = f"team/app@{Digest.of(BODY)}"
        for arguments in (("--image", "team/app"), ("--image", digest), ("--report", "x")):
            self.call(*arguments)
            self.assertEqual((2, 1), (self.caller.status, self.caller.complaint.count("\n")), arguments)
        self.call("--image", "a:1", "--repository", "a:1")
        self.assertEqual(2, self.caller.status)
        self.call("--image", "team/app:1", "--report", str(self.file / "absent" / "x"))
        self.assertEqual(3, self.caller.status)
        self.assertIn("can't be written: No such file or directory", self.caller.complaint)


class SeveralTests(DoctorTestCase):
    """
    A configuration with several registries.
    """

    TWO, ROLE = "444455556666.dkr.ecr.us-east-1.amazonaws.com", "arn:aws:iam::444455556666:role/pull"

    def setUp(self) -> None:
        super().setUp()
        with tempfile.NamedTemporaryFile("w", suffix=".toml", delete=False) as file:
            file.write(
                f'[registry."{self.TWO}"]\nrole = "{self.ROLE}"\npath-prefix = "us"\nnamespaces = "team/.*"\n'
                '[registry."*.dkr.ecr.eu-central-1.amazonaws.com"]\n'
                f'[registry."docker.io"]\nendpoint = "https://{ECR}"\necr-repository-prefix = "hub"\n'
            )
        self.addCleanup(os.unlink, file.name)
        self.caller.variables["PROXY_CONFIG"] = file.name
        self.theirs = self.world.roles[self.ROLE] = World()

    def lines(self, *arguments: str) -> dict[str, list[tuple[str, str]]]:
        """
        Run the doctor, and return the verdict and text for each of the other registries.
        """
        found: dict[str, list[tuple[str, str]]] = {}
        for each in json.loads(self.call("--json", *arguments))["findings"]:
            found.setdefault(each["check"], []).append((each["verdict"], each["said"]))
        return found

    def test_each_has_a_line_for_role_token_and_answer(self) -> None:
        found = self.lines()
        self.assertEqual(0, self.caller.status, found)
        role, token, registry = found[self.TWO]
        self.assertEqual(("ok", f"role: assumed: {ARN}"), role)
        self.assertEqual(("ok", "token: ECR issues one, valid for 12.0 hours"), token)
        self.assertEqual(("ok", True), (registry[0], registry[1].endswith("; it accepts the token")))
        self.assertTrue(registry[1].startswith(f"registry: {self.TWO} answers at 52.0.0.1"), registry)
        self.assertEqual(
            ["token"], [said.partition(":")[0] for _, said in found["*.dkr.ecr.eu-central-1.amazonaws.com"]]
        )
        self.assertEqual(["token", "registry"], [said.partition(":")[0] for _, said in found["docker.io"]])
        of_role = [region for region, credentials in self.world.opened if credentials.role == self.ROLE]
        self.assertEqual(["us-east-1"], of_role)

    def test_a_password_that_the_daemon_could_not_read_is_told(self) -> None:
        password, path = scratch(self), Path(self.caller.variables["PROXY_CONFIG"])
        table = f'[registry."quay.io"]\nusername = "ann"\npassword-file = "{password}"\n'
        path.write_text(path.read_text() + table)
        for data, verdict, said in (
            (b"canary\n", "ok", f"password: {password} has one"),
            (b"\n", "failed", f"password: '{password}' has no password: give one line of text"),
            (None, "failed", f"password: the password in '{password}' can't be read: No such file or directory"),
        ):
            password.unlink(missing_ok=True)
            if data is not None:
                password.write_bytes(data)
            self.assertEqual((verdict, said), self.lines()["quay.io"][0])
            self.assertEqual(int(verdict == "failed"), self.caller.status)
            self.assertNotIn("canary", self.caller.complaint)

    def test_tokens_that_the_daemon_would_not_ask_for_are_told(self) -> None:
        """
        Tokens of a realm outside the registry's domain that no table lists; others need no line.
        """
        path = Path(self.caller.variables["PROXY_CONFIG"])
        before = path.read_text()
        for realm, listed, told in (
            ("https://auth.quay.io/token", "", []),
            ("https://login.example/token", "", ["failed"]),
            ("https://login.example/token", 'realms = ["login.example"]', []),
            ("http://quay.io/token", "", ["failed"]),
            ("", "", []),
        ):
            self.world.challenge = f'Bearer realm="{realm}",service="quay"' if realm else 'Basic realm="quay"'
            path.write_text(f'{before}[registry."quay.io"]\n{listed}\n')
            found = [verdict for verdict, said in self.lines()["quay.io"] if said.startswith("realm: ")]
            self.assertEqual(told, found, realm)

    def test_a_login_that_is_refused_is_told(self) -> None:
        """
        By the registry itself or by its token service, which gets the password only where the daemon would send it.
        """
        password, path = scratch(self), Path(self.caller.variables["PROXY_CONFIG"])
        password.write_bytes(b"canary\n")
        path.write_text(f'{path.read_text()}[registry."quay.io"]\nusername = "ann"\npassword-file = "{password}"\n')
        bearer = 'Bearer realm="https://auth.quay.io/token",service="quay"'
        realm, own = "https://auth.quay.io/token?service=quay", "https://quay.io/v2/"
        for challenge, url, status, verdict, host in (
            (bearer, realm, 200, "ok", "auth.quay.io accepts"),
            (bearer, realm, 401, "failed", "auth.quay.io answers 401 to"),
            (bearer, realm, 503, "warning", "auth.quay.io answers 503 to"),
            ('Basic realm="x"', own, 401, "failed", "quay.io answers 401 to"),
            (bearer.replace("auth.quay.io", "login.example"), None, 200, None, ""),
            ("", None, 200, None, ""),
        ):
            self.world.challenge, self.world.login = challenge, status
            self.world.touched.clear()
            found = [(each, said) for each, said in self.lines()["quay.io"] if said.startswith("login: ")]
            told = [(verdict, f"login: {host} the username and the password")] if verdict else []
            self.assertEqual(told, found, (challenge, status))
            shown = [at for at, _, headers in self.world.touched if headers.get("Authorization") == LOGIN]
            self.assertEqual([url] if url else [], shown)
            self.assertNotIn("canary", self.caller.complaint)

    def test_ecr_public_is_asked_for_a_token_where_it_is_to_be_pulled_from_with_one(self) -> None:
        """
        It is ECR Public's own call, with a permission of its own. The registry itself is not shown what that gives.
        """
        path = Path(self.caller.variables["PROXY_CONFIG"])
        path.write_text(f'{path.read_text()}[registry."public.ecr.aws"]\ncredentials = "aws"\nrole = "{self.ROLE}"\n')
        found = self.lines()["public.ecr.aws"]
        self.assertEqual(["role", "token", "registry"], [said.partition(":")[0] for _, said in found])
        self.assertIn(("us-east-1", Credentials(role=self.ROLE, public=True)), self.world.opened)
        shown = [headers for url, _, headers in self.world.touched if "public.ecr.aws" in url]
        self.assertEqual([{}], shown)
        self.theirs.problems["token"] = AwsRefusedError(
            "AccessDeniedException", "User: arn:x is not authorized to perform: ecr-public:GetAuthorizationToken"
        )
        self.assertEqual("failed", self.lines()["public.ecr.aws"][1][0])
        self.assertIn("allow ecr-public:GetAuthorizationToken", self.call())

    def test_a_role_that_is_refused_fails_its_own_registry_alone(self) -> None:
        self.theirs.problems = dict.fromkeys(("identity", "token"), AwsRefusedError("AccessDenied", "not authorized"))
        found = self.lines()
        self.assertEqual(["failed", "failed", "ok"], [verdict for verdict, _ in found.pop(self.TWO)])
        self.assertEqual({"ok"}, {verdict for several in found.values() for verdict, _ in several})
        self.assertIn(f"see that the trust policy of {self.ROLE} names", self.call())

    def test_a_token_that_a_registry_refuses_is_told(self) -> None:
        self.world.greeting = 403
        self.assertEqual(("failed", "registry: answers 403 to a fresh token"), self.lines()[self.TWO][-1])

    def test_permissions_are_tried_on_an_image_of_the_registry_that_is_named(self) -> None:
        for name in (f"{self.TWO.replace('.ecr.', '.ecr-fips.')}/team/app:1", "us/team/app:1"):
            self.world.touched.clear()
            self.assertEqual([("ok", "allowed: tried")], self.lines("--repository", name)["ecr:BatchGetImage"])
            asked = [url for url, _, _ in self.world.touched if url.endswith("/manifests/1")]
            self.assertEqual([f"https://{self.TWO}/v2/team/app/manifests/1"], asked)
        self.assertEqual("failed", self.lines("--repository", "us/other/app:1")["namespace"][0][0])
        self.lines("--repository", "docker.io/nginx:1")
        self.assertIn(f"https://{ECR}/v2/hub/library/nginx/manifests/1", [url for url, _, _ in self.world.touched])
        self.call("--repository", "ghcr.io/x/y:1")
        self.assertEqual((2, True), (self.caller.status, "ghcr.io is not a configured" in self.caller.complaint))

    def test_a_token_of_ecr_is_shown_to_no_other_registry(self) -> None:
        """
        ECR's permissions can't be tried there.
        """
        with Path(self.caller.variables["PROXY_CONFIG"]).open("a") as file:
            file.write('[registry."public.ecr.aws"]\n[registry."quay.io"]\n')
        for name in ("public.ecr.aws", "quay.io"):
            self.call("--repository", f"{name}/x/y:1")
            said = f"{name} is not a private ECR registry, so permissions can't be tested"
            self.assertEqual((2, True), (self.caller.status, said in self.caller.complaint), self.caller.complaint)
        self.assertEqual([], self.world.touched)

    def test_the_role_of_the_default_is_assumed(self) -> None:
        del self.caller.variables["PROXY_ECR_ENDPOINT"]
        text = f'[registry."{ECR}"]\ndefault = true\nrole = "{self.ROLE}"\n'
        Path(self.caller.variables["PROXY_CONFIG"]).write_text(text)
        self.assertEqual([("ok", f"assumed: {ARN}")], self.lines()["role"])
        self.theirs.problems["identity"] = AwsRefusedError("AccessDenied", "no")
        found = self.lines()
        self.assertEqual(["ok", "failed"], [found[each][0][0] for each in ("identity", "role")])


class ExamineTests(SynchronousTestCase):
    """
    Checks that run side by side.
    """

    def test_what_several_need_is_found_once(self) -> None:
        """
        If it fails, one check says why, and the others that they were skipped.
        """
        asked = []

        def find() -> str:
            asked.append(1)
            raise AwsUnreachableError("away")

        once = Once(find)
        self.assertRaises(AwsUnreachableError, once.get)
        problem = self.assertRaises(SkippedError, once.need, "a token")
        self.assertEqual("not without a token", str(problem))
        self.assertEqual([1], asked)

    def test_a_check_that_breaks_takes_none_with_it(self) -> None:
        """
        It is a finding, in one line, without a traceback.
        """

        def broken() -> list[Any]:
            raise ZeroDivisionError("first\nsecond")

        checks = [Check("one", broken), Check("two", lambda: [ok("two", "well")])]
        first, second = examine(checks, 1.0, lambda: 0.0, lambda work: work())
        self.assertEqual((Verdict.FAILED, True), (first.verdict, first.said.endswith("ZeroDivisionError: first")))
        self.assertEqual(Verdict.OK, second.verdict)

    def test_they_are_told_in_order_however_they_end(self) -> None:
        """
        The last may be the first to end.
        """
        later: list[Callable[[], None]] = []

        def start(work: Callable[[], None]) -> None:
            later.insert(0, work)
            if len(later) == 3:
                for each in later:
                    each()

        checks = [Check(name, lambda name=name: [ok(name, "")]) for name in ("a", "b", "c")]  # type: ignore[misc]
        self.assertEqual(["a", "b", "c"], [each.check for each in examine(checks, 1.0, lambda: 0.0, start)])
