"""
How the doctor judges AWS's answers: credentials, identity, token, permissions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from botocore import exceptions
from botocore.parsers import ResponseParserError
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.command.checkup import account
from ecrproxy.command.checkup.aws import (
    Aws,
    AwsRefusedError,
    AwsUnreachableError,
    Identity,
    NoCredentialsError,
    Provider,
    as_ours,
)
from ecrproxy.command.checkup.findings import Finding, Once, Verdict
from ecrproxy.command.checkup.permissions import Trial
from ecrproxy.command.checkup.reach import Contact
from ecrproxy.oci import Digest
from ecrproxy.registry.aws import Credentials, CredentialsError
from tests.test_ecr import FakeAws

ARN = "arn:aws:sts::123456789012:assumed-role/puller/i-0abc"
DENIED = (
    f"User: {ARN} is not authorized to perform: ecr:BatchGetImage on resource:"
    " arn:aws:ecr:eu-west-1:123456789012:repository/app because {}"
)


def raising(problem: Exception) -> Callable[[], Any]:
    """
    Return a function that raises.
    """

    def fail() -> Any:
        raise problem

    return fail


class AnswersTests(SynchronousTestCase):
    """
    botocore's many exceptions.
    """

    def told(self, problem: Exception) -> Exception:
        """
        Convert one to ours.
        """
        try:
            with as_ours():
                raising(problem)()
        except Exception as ours:  # noqa: BLE001 (whichever it is)
            return ours
        return problem

    def test_each_is_a_refusal_or_silence_or_nothing_to_ask_with(self) -> None:
        """
        A proxy's error page is no answer of AWS, and counts as silence.
        """
        error: Any = {"Error": {"Code": "ExpiredToken", "Message": "expired\nsecret"}}
        refused = self.told(exceptions.ClientError(error, "GetCallerIdentity"))
        self.assertEqual((AwsRefusedError, "ExpiredToken: expired"), (type(refused), str(refused)))
        silent = (exceptions.EndpointConnectionError(endpoint_url="x"), ResponseParserError("a page"))
        self.assertEqual({AwsUnreachableError}, {type(self.told(each)) for each in silent})
        none = (CredentialsError("none"), exceptions.ProfileNotFound(profile="x"), exceptions.NoCredentialsError())
        self.assertEqual({NoCredentialsError}, {type(self.told(each)) for each in none})


class CredentialsTests(SynchronousTestCase):
    """
    Where credentials come from.
    """

    def look(self, find: Callable[[], Provider], environ: Mapping[str, str] | None = None) -> Finding:
        """
        Run the check.
        """
        (found,) = account.look_at_credentials(Once(find), instance_auth=False, environ=environ or {})
        return found

    def test_their_provider_is_named(self) -> None:
        """
        In words, for each that botocore knows; a later one by botocore's own name.
        """
        for method, words in account.PROVIDERS.items():
            found = self.look(lambda method=method: Provider(method))  # type: ignore[misc]
            self.assertEqual((Verdict.OK, f"by {words}"), (found.verdict, found.said))
        self.assertEqual("by something-new", self.look(lambda: Provider("something-new")).said)

    def test_none_is_a_failure_that_tells_what_was_begun(self) -> None:
        """
        The advice depends on what has been set.
        """
        cases = {
            "AWS_WEB_IDENTITY_TOKEN_FILE": "AWS_ROLE_ARN",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": "Pod Identity",
            "AWS_PROFILE": "the profile",
            "AWS_ACCESS_KEY_ID": "set both",
            "HOME": "attach a role",
        }
        for name, advice in cases.items():
            found = self.look(raising(NoCredentialsError("none found")), {name: "x"})
            self.assertEqual(Verdict.FAILED, found.verdict)
            self.assertIn(advice, found.advice)

    def test_temporary_keys_are_told(self) -> None:
        """
        Without their session token they are useless, with it they expire.
        """
        found = self.look(lambda: Provider("env"), {"AWS_ACCESS_KEY_ID": "ASIAX"})
        self.assertEqual((Verdict.FAILED, "set AWS_SESSION_TOKEN too"), (found.verdict, found.advice))
        found = self.look(lambda: Provider("env"), {"AWS_ACCESS_KEY_ID": "ASIAX", "AWS_SESSION_TOKEN": "t"})
        self.assertEqual(Verdict.WARNING, found.verdict)

    def test_a_role_that_can_not_be_assumed_is_told(self) -> None:
        """
        With AWS's reason, and what to check; a wrong clock is reported as such.
        """
        found = self.look(raising(AwsRefusedError("AccessDenied", "not authorized to perform: sts:AssumeRole")))
        self.assertIn("trust policy", found.advice)
        found = self.look(raising(AwsRefusedError("SignatureDoesNotMatch", "Signature expired: 2020 is now earlier")))
        self.assertIn("clock", found.advice)
        found = self.look(raising(AwsUnreachableError("Connect timeout")))
        self.assertEqual(Verdict.FAILED, found.verdict)


class IdentityTests(SynchronousTestCase):
    """
    The identity that AWS reports.
    """

    def look(self, find: Callable[[], Identity], registry: str | None = "123456789012") -> list[Finding]:
        """
        Run the check.
        """
        return list(account.look_at_identity(Once(find), registry))

    def test_it_is_told(self) -> None:
        """
        By its ARN.
        """
        (found,) = self.look(lambda: Identity(ARN, "123456789012"))
        self.assertEqual((Verdict.OK, ARN), (found.verdict, found.said))

    def test_another_account_than_the_registrys_is_told(self) -> None:
        """
        It may be intended; then the repositories' policies matter.
        """
        found = self.look(lambda: Identity(ARN, "210987654321"))[1]
        self.assertEqual(Verdict.OK, found.verdict)
        self.assertIn("policies of the repositories", found.advice)

    def test_sts_is_not_needed(self) -> None:
        """
        A VPC without an endpoint for STS is no failure; rejected keys are.
        """
        self.assertEqual(Verdict.WARNING, self.look(raising(AwsUnreachableError("timeout")))[0].verdict)
        self.assertEqual(Verdict.FAILED, self.look(raising(AwsRefusedError("InvalidClientTokenId", "no")))[0].verdict)
        self.assertEqual(Verdict.SKIPPED, self.look(raising(NoCredentialsError("none")))[0].verdict)


class TokenTests(SynchronousTestCase):
    """
    ECR's token.
    """

    def look(self, find: Callable[[], tuple[str, float]]) -> Finding:
        """
        Run the check.
        """
        (found,) = account.look_at_token(Once(find), 1000.0)
        return found

    def test_how_long_it_is_good_is_told_and_it_is_not(self) -> None:
        """
        In hours.
        """
        found = self.look(lambda: ("secret-token", 1000.0 + 12 * 3600))
        self.assertEqual("ECR issues one, valid for 12.0 hours", found.said)
        self.assertNotIn("secret", repr(found))

    def test_what_keeps_it_back_is_told(self) -> None:
        """
        The missing action, the clock, or the network path to the API.
        """
        words = f"User: {ARN} is not authorized to perform: ecr:GetAuthorizationToken on resource: *"
        denied = self.look(raising(AwsRefusedError("AccessDeniedException", words)))
        self.assertIn("allow ecr:GetAuthorizationToken on *", denied.advice)
        skewed = self.look(raising(AwsRefusedError("InvalidSignatureException", "Signature not yet current: x")))
        self.assertIn("clock", skewed.advice)
        self.assertIn("ecr.api", self.look(raising(AwsUnreachableError("Connect timeout"))).advice)


class PermissionAdviceTests(SynchronousTestCase):
    """
    The advice for a refusal.
    """

    def test_the_action_and_the_policy_are_read_from_it(self) -> None:
        """
        AWS's words say which of the many policies has to change.
        """
        cases = {
            "no identity-based policy allows the ecr:BatchGetImage action": "in the policy of the role or user",
            "no resource-based policy allows the ecr:BatchGetImage action": "repository's own policy",
            "no permissions boundary allows the ecr:BatchGetImage action": "permissions boundary",
            "no session policy allows the ecr:BatchGetImage action": "session's policy",
            "no VPC endpoint policy allows the ecr:BatchGetImage action": "VPC endpoint's policy",
            "with an explicit deny in a service control policy": "organization",
            "with an explicit deny in an identity-based policy": "remove that statement",
        }
        for because, advice in cases.items():
            self.assertEqual("ecr:BatchGetImage", account.denied_action(DENIED.format(because)))
            self.assertIn(advice, account.permission_advice(DENIED.format(because)))
        self.assertIsNone(account.denied_action("Not Authorized"))

    def test_a_sessions_role_is_what_iam_knows(self) -> None:
        """
        Users and roles are unchanged.
        """
        self.assertEqual("arn:aws:iam::123456789012:role/puller", account.principal(ARN))
        self.assertEqual("arn:aws:iam::1:user/x", account.principal("arn:aws:iam::1:user/x"))

    def test_what_iam_would_decide_is_told(self) -> None:
        """
        What pulls need is a failure, what else is useful is a warning.
        """
        told = {"ecr:BatchGetImage": "implicitDeny", "ecr:ListImages": "explicitDeny", "ecr:X": "allowed"}
        verdicts = [each.verdict for each in account.judge_simulation(told)]
        self.assertEqual([Verdict.FAILED, Verdict.WARNING, Verdict.OK], verdicts)


CONFIG = b"{}"
BODY = json.dumps(
    {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "x", "digest": str(Digest.of(CONFIG)), "size": 2},
        "layers": [{"mediaType": "x", "digest": str(Digest.of(b"layer")), "size": 5}],
    }
).encode()


class TrialTests(SynchronousTestCase):
    """
    Each request of a pull, tried.
    """

    def setUp(self) -> None:
        """
        Set up a registry that allows everything.
        """
        blob = f"/v2/app/blobs/{Digest.of(CONFIG)}"
        self.answers = {
            ("GET", "/v2/app/tags/list?n=1"): Contact("a", status=200, body=b'{"tags": ["1"]}'),
            ("GET", "/v2/app/manifests/1"): Contact("a", status=200, body=BODY),
            ("HEAD", blob): Contact("a", status=200),
            ("GET", blob): Contact("a", status=307, headers={"location": "https://bucket.test/x?X-Amz-Signature=s"}),
            ("GET", f"/v2/app/referrers/{Digest.of(BODY)}"): Contact("a", status=200, body=b"{}"),
        }
        self.blob = blob

    def run_trial(self, reference: str | None = None) -> tuple[Trial, dict[str, Finding]]:
        """
        Run the trial.
        """
        trial = Trial(lambda method, path, _: self.answers[method, path], "app")
        trial.run(reference)
        return trial, {each.check: each for each in trial.findings}

    def test_all_that_a_pull_needs_is_tried(self) -> None:
        """
        The first tag is used if none is named; the blob's location is known then, and not printed.
        """
        trial, found = self.run_trial()
        actions = {*account.NEEDED[1:], *account.USEFUL}
        self.assertEqual(dict.fromkeys(actions, Verdict.OK), {name: each.verdict for name, each in found.items()})
        self.assertEqual("https://bucket.test/x?X-Amz-Signature=s", trial.location)
        self.assertNotIn("X-Amz", repr(trial.findings))

    def test_of_a_blob_one_byte_is_asked_for(self) -> None:
        """
        A registry may send it itself.
        """
        asked: list[Mapping[str, str]] = []

        def ask(method: str, path: str, headers: Mapping[str, str]) -> Contact:
            if (method, path) != ("GET", self.blob):
                return self.answers[method, path]
            asked.append(headers)
            return Contact("a", status=206, body=b"{")

        trial = Trial(ask, "app")
        trial.run("1")
        self.assertEqual([{"Range": "bytes=0-0"}], asked)
        self.assertEqual({Verdict.OK}, {each.verdict for each in trial.findings})

    def test_what_is_refused_is_named(self) -> None:
        """
        Each action by itself, in ECR's own words.
        """
        message = DENIED.replace("BatchGetImage", "GetDownloadUrlForLayer").format("no identity-based policy allows it")
        denied = json.dumps({"errors": [{"code": "DENIED", "message": message}]}).encode()
        self.answers["GET", self.blob] = Contact("a", status=403, body=denied)
        self.answers["HEAD", self.blob] = Contact("a", status=403)
        _, found = self.run_trial("1")
        self.assertEqual(Verdict.FAILED, found["ecr:GetDownloadUrlForLayer"].verdict)
        self.assertIn("allow ecr:GetDownloadUrlForLayer on arn:aws:ecr", found["ecr:GetDownloadUrlForLayer"].advice)
        self.assertEqual(Verdict.FAILED, found["ecr:BatchCheckLayerAvailability"].verdict)
        self.assertEqual(Verdict.OK, found["ecr:BatchGetImage"].verdict)

    def test_what_is_only_useful_is_a_warning(self) -> None:
        """
        Pulls work without tag lists.
        """
        denied = json.dumps({"errors": [{"message": DENIED.replace("BatchGetImage", "ListImages").format("no")}]})
        self.answers["GET", "/v2/app/tags/list?n=1"] = Contact("a", status=403, body=denied.encode())
        _, found = self.run_trial("1")
        self.assertEqual(Verdict.WARNING, found["ecr:ListImages"].verdict)
        self.assertIn("list tags", found["ecr:ListImages"].advice)
        _, found = self.run_trial()
        self.assertIn("--repository app:TAG", found["ecr:BatchGetImage"].advice)

    def test_what_is_not_there_tells_nothing_of_permissions(self) -> None:
        """
        It is skipped.
        """
        missing = b'{"errors": [{"code": "NAME_UNKNOWN", "message": "no such repository"}]}'
        self.answers["GET", "/v2/app/manifests/1"] = Contact("a", status=404, body=missing)
        _, found = self.run_trial("1")
        self.assertEqual(Verdict.SKIPPED, found["ecr:BatchGetImage"].verdict)
        self.assertIn("no such repository", found["ecr:BatchGetImage"].said)
        self.assertNotIn("ecr:GetDownloadUrlForLayer", found)

    def test_a_repository_that_a_rule_is_to_make_needs_two_more_permissions(self) -> None:
        missing = b'{"errors": [{"code": "NAME_UNKNOWN", "message": "no such repository"}]}'
        self.answers["GET", "/v2/app/manifests/1"] = Contact("a", status=404, body=missing)
        _, found = self.run_trial("1")
        for action in account.IMPORTING:
            self.assertIn(action, found["ecr:BatchGetImage"].advice)
        denied = {"errors": [{"message": DENIED.replace("BatchGetImage", "BatchImportUpstreamImage").format("no")}]}
        self.answers["GET", "/v2/app/manifests/1"] = Contact("a", status=403, body=json.dumps(denied).encode())
        _, found = self.run_trial("1")
        self.assertEqual(Verdict.FAILED, found["ecr:BatchGetImage"].verdict)
        self.assertIn("refused by ECR: ecr:BatchImportUpstreamImage", found["ecr:BatchGetImage"].said)
        self.assertIn("pull-through cache rule needs it", found["ecr:BatchGetImage"].advice)

    def test_permissions_that_only_a_rules_repositories_need_are_no_fault_where_they_are_missing(self) -> None:
        found = list(account.judge_simulation(dict.fromkeys(account.IMPORTING, "implicitDeny")))
        self.assertEqual({Verdict.OK}, {each.verdict for each in found})
        self.assertTrue(all("pull-through cache rule" in each.said and each.advice for each in found))

    def test_of_an_index_one_of_its_manifests_is_taken(self) -> None:
        """
        Manifests list the blobs.
        """
        kind = "application/vnd.oci.image.index.v1+json"
        listed = [
            {
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": str(Digest.of(BODY)),
                "size": len(BODY),
            }
        ]
        index = json.dumps({"mediaType": kind, "manifests": listed}).encode()
        self.answers["GET", "/v2/app/manifests/1"] = Contact("a", status=200, body=index)
        self.answers["GET", f"/v2/app/manifests/{Digest.of(BODY)}"] = Contact("a", status=200, body=BODY)
        self.answers["GET", f"/v2/app/referrers/{Digest.of(index)}"] = Contact("a", status=200)
        _, found = self.run_trial("1")
        self.assertEqual(Verdict.OK, found["ecr:GetDownloadUrlForLayer"].verdict)


class RoleTests(SynchronousTestCase):
    """
    The role of a registry.
    """

    def test_what_is_asked_is_asked_in_the_role(self) -> None:
        """
        As the daemon does.
        """
        fake, role = FakeAws(self), "arn:aws:iam::444455556666:role/pull"
        fake.grants()
        keys = "<AccessKeyId>AKIDROLE</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>"
        given = f"<Credentials>{keys}<Expiration>2099-01-01T00:00:00Z</Expiration></Credentials>"
        answer = f"<AssumeRoleResponse><AssumeRoleResult>{given}</AssumeRoleResult></AssumeRoleResponse>"
        fake.answers["POST", "https://sts.eu-west-1.amazonaws.com/"] = (200, answer)
        Aws("eu-west-1", Credentials(role=role)).token()
        self.assertEqual("AKIDROLE", fake.signed_with())
        Aws("eu-west-1", Credentials()).token()
        self.assertNotEqual("AKIDROLE", fake.signed_with())

    def test_a_token_for_ecr_public_is_asked_of_its_own_api(self) -> None:
        fake = FakeAws(self)
        given = {"authorizationData": {"authorizationToken": "QVdTOng=", "expiresAt": 4102444800}}
        fake.answers["POST", "https://api.ecr-public.us-east-1.amazonaws.com/"] = (200, given)
        self.assertEqual("QVdTOng=", Aws("us-east-1", Credentials(public=True)).token()[0])

    def test_one_that_is_refused_is_told_with_what_to_do(self) -> None:
        for problem, verdict, words in (
            (AwsRefusedError("AccessDenied", "not authorized"), Verdict.FAILED, "trust policy of arn:x names"),
            (AwsRefusedError("AccessDenied", "Signature expired: x"), Verdict.FAILED, "clock"),
            (AwsUnreachableError("timeout"), Verdict.FAILED, "endpoint for sts"),
            (NoCredentialsError("none"), Verdict.SKIPPED, ""),
        ):
            (found,) = account.look_at_role(Once(raising(problem)), "arn:x")
            self.assertEqual(verdict, found.verdict)
            self.assertIn(words, found.advice)
