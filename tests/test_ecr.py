"""
botocore fetches the registry token, and the daemon keeps it fresh, whatever AWS does.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from botocore.awsrequest import AWSResponse
from botocore.exceptions import BotoCoreError, ConnectTimeoutError
from botocore.httpsession import URLLib3Session
from botocore.loaders import JSONFileLoader
from botocore.utils import ContainerMetadataFetcher
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import ILogObserver, capturedLogs, formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.registry.aws import Credentials, CredentialsError, TokenUnavailableError
from ecrproxy.registry.credential_process import CredentialProcess
from ecrproxy.registry.ecr import (
    ASKED_RETRY,
    FETCH_SECONDS,
    MOST_OVERDUE,
    OVERDUE,
    OVERDUE_SECONDS,
    PATIENCE,
    Token,
    TokenService,
    fetch_token,
    next_refresh,
)
from tests.store_contract import scratch

START = 1_767_225_600.0
"""A time in January 2026: dates in or before 1970 hide mistakes."""
LIFE = 43_200.0
MOTOS_EXPIRY = 1_420_070_400.0
"""2015: the expiry of all of moto's tokens."""
GRANTED = {"authorizationData": [{"authorizationToken": "QVdTOnRva2Vu", "expiresAt": START + LIFE}]}
SECRET = "canary-of-an-aws-secret"
SESSION = "canary-of-a-session"
KEYS = {"AWS_ACCESS_KEY_ID": "AKIDENVIRONMENT", "AWS_SECRET_ACCESS_KEY": SECRET}


class Raw:
    """
    The body of an answer, as botocore reads it.
    """

    def __init__(self, body: bytes) -> None:
        self._body = body

    def stream(self, *_: object) -> Iterator[bytes]:
        """
        Return it in one piece.
        """
        yield self._body


class FakeAws:
    """
    All that botocore can reach: the HTTP layer below the real signing, parsing and credential lookup.

    After the test, no secret of AWS's may be in the log.

    @ivar answers: status and body by method and URL; other URLs can't be reached.
    @ivar asked: the requests for tokens.
    """

    def __init__(self, case: SynchronousTestCase, environ: Mapping[str, str] = KEYS) -> None:
        self.answers: dict[tuple[str, str], tuple[int, object]] = {}
        self.asked: list[Any] = []
        self.urls: list[str] = []
        home = scratch(case)
        home.mkdir()
        case.patch(
            os,
            "environ",
            {
                "HOME": str(home.absolute()),
                "AWS_CONFIG_FILE": str(home.absolute() / "config"),
                "AWS_SHARED_CREDENTIALS_FILE": str(home.absolute() / "credentials"),
                "AWS_EC2_METADATA_DISABLED": "true",
                **environ,
            },
        )
        self._told: list[str] = []
        observer = cast(ILogObserver, lambda event: self._told.append(f"{formatEvent(event)} {event!r}"))
        globalLogPublisher.addObserver(observer)
        case.addCleanup(globalLogPublisher.removeObserver, observer)
        case.addCleanup(self._check, case)
        case.patch(URLLib3Session, "send", lambda _, request: self._send(request))

    def _check(self, case: SynchronousTestCase) -> None:
        for secret in (SECRET, SESSION):
            case.assertNotIn(secret, "".join(self._told))

    def grants(self, answer: object = GRANTED, status: int = 200) -> None:
        """
        Answer requests for ECR tokens.
        """
        self.answers["POST", "https://api.ecr.eu-west-1.amazonaws.com/"] = (status, answer)

    def refuses(self, code: str, message: str = "no", status: int = 400) -> None:
        """
        Answer with an error of AWS's.
        """
        self.grants({"__type": code, "message": message}, status)

    def gives_the_instance_a_role(self) -> None:
        """
        Answer as the metadata service does.
        """
        base = "http://169.254.169.254/latest"
        roles = f"{base}/meta-data/iam/security-credentials/"
        self.answers["PUT", f"{base}/api/token"] = (200, "session")
        self.answers["GET", roles] = (200, "role")
        self.answers["GET", f"{roles}role"] = (200, credentials("AKIDINSTANCE"))

    def signed_with(self) -> str:
        """
        Return the key with which the last request for a token was signed.
        """
        header = self.asked[-1].headers["Authorization"]
        text = header.decode() if isinstance(header, bytes) else header
        return str(text.partition("Credential=")[2].partition("/")[0])

    def _send(self, request: Any) -> AWSResponse:
        self.urls.append(request.url)
        if (request.method, request.url) not in self.answers:
            raise ConnectTimeoutError(endpoint_url=request.url)
        if request.method == "POST":
            self.asked.append(request)
        status, body = self.answers[request.method, request.url]
        data = body if isinstance(body, str) else json.dumps(body)
        headers: Any = {"Content-Type": "application/x-amz-json-1.1"}
        return AWSResponse(request.url, status, headers, Raw(data.encode()))


def credentials(key: str) -> dict[str, str]:
    """
    Return temporary credentials as metadata services issue them.
    """
    return {
        "Code": "Success",
        "Type": "AWS-HMAC",
        "AccessKeyId": key,
        "SecretAccessKey": SECRET,
        "Token": "session",
        "Expiration": "2099-01-01T00:00:00Z",
        "LastUpdated": "2026-01-01T00:00:00Z",
    }


def fetch(*, instance_auth: bool = False) -> Token:
    """
    Request the token of a region.
    """
    return fetch_token("eu-west-1", Credentials(instance_auth=instance_auth))


class FetchTests(SynchronousTestCase):
    """
    Requests to AWS.
    """

    def test_a_token_is_fetched_for_the_region(self) -> None:
        """
        One signed request to the region's ECR returns the token and its expiry.
        """
        aws = FakeAws(self)
        aws.grants()
        self.assertEqual(Token("QVdTOnRva2Vu", START + LIFE, "the environment"), fetch())
        self.assertEqual(["https://api.ecr.eu-west-1.amazonaws.com/"], aws.urls)
        self.assertEqual("AKIDENVIRONMENT", aws.signed_with())
        target = aws.asked[0].headers["X-Amz-Target"]
        self.assertIn(b"GetAuthorizationToken", target if isinstance(target, bytes) else target.encode())

    def test_blanks_around_a_token_are_no_part_of_it(self) -> None:
        """
        Some stand-ins for ECR end tokens with a newline, which would break the header.
        """
        aws = FakeAws(self)
        aws.grants({"authorizationData": [{"authorizationToken": " QVdT\n", "expiresAt": START}]})
        self.assertEqual("QVdT", fetch().secret)

    def test_what_botocore_knows_of_awss_services_is_read_once(self) -> None:
        """
        Not for each role, and each token: it is megabytes.
        """
        aws, read = FakeAws(self), list[str]()
        aws.grants()
        fetch()
        self.patch(JSONFileLoader, "load_file", lambda _, path: read.append(path))
        fetch()
        self.assertEqual([], read)

    def test_botocores_own_settings_work(self) -> None:
        """
        AWS_ENDPOINT_URL leads to a stand-in for AWS, and a profile provides its keys.
        """
        aws = FakeAws(self, {"AWS_ENDPOINT_URL": "http://moto:5000", "AWS_PROFILE": "team"})
        Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).write_text(
            "[team]\naws_access_key_id = AKIDPROFILE\naws_secret_access_key = secret\n"
        )
        aws.answers["POST", "http://moto:5000/"] = (200, GRANTED)
        self.assertEqual("QVdTOnRva2Vu", fetch().secret)
        self.assertEqual("AKIDPROFILE", aws.signed_with())

    def test_refusals_that_will_not_change_are_told_from_the_others(self) -> None:
        """
        The operator has to fix wrong keys; throttling and failures pass.
        """
        expected = {
            "UnrecognizedClientException": CredentialsError,
            "InvalidSignatureException": CredentialsError,
            "AccessDeniedException": CredentialsError,
            "ExpiredTokenException": CredentialsError,
            "IncompleteSignature": CredentialsError,
            "ThrottlingException": TokenUnavailableError,
            "TooManyRequestsException": TokenUnavailableError,
            "ServerException": TokenUnavailableError,
            "ServiceUnavailable": TokenUnavailableError,
            "RequestExpired": TokenUnavailableError,
            "SomethingNew": TokenUnavailableError,
        }
        aws, seen = FakeAws(self), {}
        for code in expected:
            aws.refuses(code, f"about {code}")
            problem = self.assertRaises((CredentialsError, TokenUnavailableError), fetch)
            self.assertIn(code, str(problem))
            self.assertIn(f"about {code}", str(problem))
            seen[code] = type(problem)
        self.assertEqual(expected, seen)

    def test_a_wrong_clock_is_not_a_wrong_key(self) -> None:
        """
        If the clock is set later, the token is fetched then; until then the message blames the clock.
        """
        aws = FakeAws(self)
        for message in (
            "Signature expired: 20260101T000000Z is now earlier than 20260101T010000Z",
            "Signature not yet current: 20260101T020000Z is still later than 20260101T010500Z",
        ):
            aws.refuses("InvalidSignatureException", message)
            self.assertIn("clock", str(self.assertRaises(TokenUnavailableError, fetch)))

    def test_a_refusal_that_repeats_the_request_tells_no_secret(self) -> None:
        """
        AWS shows what it would have signed, including the session token: no log and no /readyz does.
        """
        aws = FakeAws(self, {**KEYS, "AWS_SESSION_TOKEN": SESSION})
        message = (
            "The request signature we calculated does not match the signature you provided.\n\n"
            f"The Canonical String for this request should have been\n'POST\n/\n\nx-amz-security-token:{SESSION}\n'"
        )
        for code in ("InvalidSignatureException", "SignatureDoesNotMatch", "Whatever"):
            aws.refuses(code, message)
            problem = str(self.assertRaises((CredentialsError, TokenUnavailableError), fetch))
            self.assertIn("does not match", problem)
            self.assertNotIn(SESSION, problem)
        tokens = TokenService(lambda: fail(ValueError(message)), Clock(), lambda: START)
        tokens.startService()
        self.addCleanup(tokens.stopService)
        self.assertNotIn(SESSION, str(tokens.problem()))
        self.assertNotIn(SESSION, f"{tokens!r}{vars(tokens)!r}")

    def test_an_answer_is_asked_for_once(self) -> None:
        """
        The thread neither waits nor retries, since nothing could stop it there.
        """
        aws = FakeAws(self)
        aws.refuses("InternalFailure", status=500)
        self.assertRaises(TokenUnavailableError, fetch)
        self.assertEqual(1, len(aws.asked))

    def test_aws_out_of_reach_is_no_refusal(self) -> None:
        """
        A network that is down says nothing about the credentials.
        """
        FakeAws(self)
        problem = self.assertRaises(BotoCoreError, fetch)
        self.assertNotIsInstance(problem, CredentialsError)
        self.assertIn("api.ecr.eu-west-1.amazonaws.com", str(problem))

    def test_no_credentials_at_all_are_told_with_what_to_set(self) -> None:
        """
        The operator reads which variable is missing, and no request goes to AWS.
        """
        aws = FakeAws(self, {})
        problem = self.assertRaises(CredentialsError, fetch)
        self.assertTrue(str(problem).startswith("AWS_ACCESS_KEY_ID: no AWS credentials found"), problem)
        self.assertIn("hop limit must be 2", str(problem))
        self.assertEqual([], aws.urls)

    def test_credentials_that_cannot_be_used_are_told(self) -> None:
        """
        Half a key, a missing profile and an invalid file are mistakes; waiting doesn't help.
        """
        FakeAws(self, {"AWS_ACCESS_KEY_ID": "AKID"})
        self.assertIn("AWS_SECRET_ACCESS_KEY", str(self.assertRaises(CredentialsError, fetch)))
        FakeAws(self, {"AWS_PROFILE": "nobody"})
        self.assertIn("nobody", str(self.assertRaises(CredentialsError, fetch)))
        FakeAws(self, {})
        Path(os.environ["AWS_CONFIG_FILE"]).write_text("no configuration")
        self.assertIn("config", str(self.assertRaises(CredentialsError, fetch)))


class CredentialProcessTests(SynchronousTestCase):
    """
    A profile's program that hangs is killed with all its children, and its thread is free.
    """

    def setUp(self) -> None:
        self.aws = FakeAws(self, {})
        self.config = Path(os.environ["AWS_CONFIG_FILE"])
        self.child = self.config.with_name("child")
        self.program = self.config.with_name("program")
        self.patch(CredentialProcess, "seconds", 0.3)

    def write(self, script: str, config: str) -> None:
        """
        Create a program, and profiles that use it.
        """
        self.program.write_text(f"#!/bin/sh\n{script}\n")
        self.program.chmod(0o700)
        self.config.write_text(config.format(program=self.program))

    def assert_ended(self) -> None:
        """
        Assert that the program that hung has left no child.
        """
        self.write(f"sleep 1000 & echo $! > {self.child}; wait", self.config.read_text())
        problem = self.assertRaises(TokenUnavailableError, fetch)
        self.assertIn(f"credential_process {self.program} has not answered for 0.3 s and was killed", str(problem))
        with contextlib.suppress(ProcessLookupError):
            ended = select.poll()
            ended.register(os.pidfd_open(int(self.child.read_text())))
            self.assertTrue(ended.poll(10_000))

    def test_what_hangs_is_ended(self) -> None:
        self.write("", "[default]\ncredential_process = {program}\n")
        self.assert_ended()

    def test_what_hangs_for_a_role_is_ended(self) -> None:
        self.write(
            "",
            "[default]\nrole_arn = arn:aws:iam::123456789012:role/r\nsource_profile = base\nregion = eu-west-1\n"
            "[profile base]\ncredential_process = {program}\n",
        )
        self.assert_ended()

    def test_what_answers_is_used(self) -> None:
        self.patch(CredentialProcess, "seconds", 30.0)
        self.aws.grants()
        self.write(
            f"""echo '{{"Version": 1, "AccessKeyId": "AKIDPROGRAM", "SecretAccessKey": "{SECRET}"}}'""",
            "[default]\ncredential_process = {program}\n",
        )
        fetch()
        self.assertEqual("AKIDPROGRAM", self.aws.signed_with())


class InstanceAuthTests(SynchronousTestCase):
    """
    AWS_INSTANCE_AUTH uses the role of the instance, container or pod, and nothing else.
    """

    def test_keys_that_are_set_are_ignored(self) -> None:
        """
        Neither the environment's nor a file's keys are used if the instance's role is required.
        """
        aws = FakeAws(self, {**KEYS, "AWS_EC2_METADATA_DISABLED": "false"})
        Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).write_text(
            "[default]\naws_access_key_id = AKIDFILE\naws_secret_access_key = secret\n"
        )
        aws.gives_the_instance_a_role()
        aws.grants()
        fetch(instance_auth=True)
        self.assertEqual("AKIDINSTANCE", aws.signed_with())
        fetch(instance_auth=False)
        self.assertEqual("AKIDENVIRONMENT", aws.signed_with())

    def test_a_containers_role_is_used(self) -> None:
        """
        ECS tasks get their role from the agent on their host.
        """
        aws = FakeAws(self, {**KEYS, "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/v2/credentials/x"})
        aws.answers["GET", "http://169.254.170.2/v2/credentials/x"] = (200, credentials("AKIDTASK"))
        aws.grants()
        fetch(instance_auth=True)
        self.assertEqual("AKIDTASK", aws.signed_with())

    def test_no_role_is_told_with_what_to_do(self) -> None:
        """
        Other keys that are set don't replace the missing role.
        """
        aws = FakeAws(self)
        problem = self.assertRaises(TokenUnavailableError, fetch, instance_auth=True)
        self.assertTrue(str(problem).startswith("AWS_INSTANCE_AUTH=true: no role found"), problem)
        self.assertIn("unset AWS_INSTANCE_AUTH", str(problem))
        self.assertEqual([], aws.asked)

    def trouble(self) -> Exception:
        """
        Request a token, and return the error.
        """
        try:
            fetch(instance_auth=True)
        except Exception as problem:  # noqa: BLE001 (each provider has errors of its own)
            return problem
        return self.fail("there is a token")

    def test_a_metadata_service_in_trouble_is_waited_for(self) -> None:
        """
        Whether it is down, throttles, fails or answers nonsense, the daemon goes on; once it works there is a token.
        """
        aws = FakeAws(self, {"AWS_EC2_METADATA_DISABLED": "false"})
        aws.grants()
        self.assertRaises(TokenUnavailableError, fetch, instance_auth=True)
        for status, body in ((429, "Too Many Requests"), (503, ""), (500, ""), (200, "<html>"), (200, "{}")):
            aws.gives_the_instance_a_role()
            well = dict(aws.answers)
            for question in well:
                if question[0] == "GET":
                    aws.answers[question] = (status, body)
            self.assertRaises(TokenUnavailableError, fetch, instance_auth=True)
        aws.gives_the_instance_a_role()
        self.assertEqual("QVdTOnRva2Vu", fetch(instance_auth=True).secret)

    def test_a_containers_agent_in_trouble_is_waited_for(self) -> None:
        """
        So it is with the service for a task's role.
        """
        self.patch(ContainerMetadataFetcher, "SLEEP_TIME", 0)
        aws = FakeAws(self, {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/v2/credentials/x"})
        for answer in (None, (429, "Too Many Requests"), (503, ""), (200, "<html>")):
            if answer is not None:
                aws.answers["GET", "http://169.254.170.2/v2/credentials/x"] = answer
            self.assertNotIsInstance(self.trouble(), CredentialsError)

    def test_sts_in_trouble_is_waited_for(self) -> None:
        """
        A pod's role comes from STS: if that throttles, fails or can't be reached, the daemon retries.
        """
        self.patch(time, "sleep", lambda _: None)  # botocore waits between its attempts
        folder = scratch(self)
        folder.mkdir()
        (folder / "jwt").write_text("a.web.token")
        aws = FakeAws(
            self,
            {
                "AWS_WEB_IDENTITY_TOKEN_FILE": str(folder.absolute() / "jwt"),
                "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/pull",
                "AWS_DEFAULT_REGION": "eu-west-1",
            },
        )
        sts = "POST", "https://sts.eu-west-1.amazonaws.com/"
        error = "<ErrorResponse><Error><Code>{}</Code><Message>no</Message></Error></ErrorResponse>"
        for answer in (None, (400, error.format("Throttling")), (503, error.format("ServiceUnavailable")), (500, "")):
            if answer is not None:
                aws.answers[sts] = answer
            self.assertNotIsInstance(self.trouble(), CredentialsError)
        aws.answers[sts] = (403, error.format("AccessDenied"))
        self.assertRaises(CredentialsError, fetch, instance_auth=True)
        self.assertIn(sts[1], aws.urls)


class TokenServiceTests(SynchronousTestCase):
    """
    The token is there before it is needed.
    """

    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(START)
        self.fetches: list[Deferred[Token]] = []
        self.refusals: list[CredentialsError] = []
        self.chance = self.set_by = 0.0
        self.ends = False
        self.service = TokenService(self.fetch, self.clock, self.now, self.refused, lambda: self.chance)
        self.addCleanup(self.service.stopService)

    def now(self) -> float:
        """
        Return the wall-clock time, which may be set.
        """
        return self.clock.seconds() + self.set_by

    def refused(self, problem: CredentialsError) -> bool:
        """
        Record that credentials were rejected.
        """
        self.refusals.append(problem)
        return self.ends

    def fetch(self) -> Deferred[Token]:
        self.fetches.append(Deferred())
        return self.fetches[-1]

    def answer(self, secret: str, life: float = LIFE) -> None:
        """
        Have AWS answer the last request with a token.
        """
        self.fetches[-1].callback(Token(secret, self.now() + life))

    def refuse(self, problem: Exception | None = None) -> None:
        """
        Have AWS fail the last request.
        """
        self.fetches[-1].errback(problem or TokenUnavailableError("AWS is down"))

    def start(self, secret: str | None = None, life: float = LIFE) -> None:
        """
        Start, with a token if there is to be one.
        """
        self.service.startService()
        if secret:
            self.answer(secret, life)

    def get(self) -> Deferred[str]:
        """
        Request the token.
        """
        return Deferred.fromCoroutine(self.service.get())

    def renew(self, refused: str) -> Deferred[str]:
        return Deferred.fromCoroutine(self.service.renew(refused))

    def pass_time(self, seconds: int) -> None:
        """
        Advance the clock second by second.
        """
        self.clock.pump([1.0] * seconds)

    def test_the_first_token_is_asked_for_at_the_start(self) -> None:
        """
        No client has to send a request first.
        """
        self.assertEqual(0, len(self.fetches))
        self.start()
        self.assertEqual(1, len(self.fetches))
        self.answer("first")
        self.assertEqual("first", self.successResultOf(self.get()))

    def test_a_token_is_refreshed_at_half_of_its_life(self) -> None:
        """
        A token of twelve hours is replaced after six, and the new one is used from then on.
        """
        self.start("first")
        self.clock.advance(21_599)
        self.assertEqual(1, len(self.fetches))
        self.clock.advance(1)
        self.assertEqual(2, len(self.fetches))
        self.assertEqual("first", self.successResultOf(self.get()))
        self.answer("second")
        self.assertEqual("second", self.successResultOf(self.get()))
        self.clock.advance(21_599)
        self.assertEqual(2, len(self.fetches))
        self.clock.advance(1)
        self.assertEqual(3, len(self.fetches))

    def test_a_token_of_the_past_is_refreshed_once_a_minute_at_most(self) -> None:
        """
        moto's tokens all expired in 2015; they work, and AWS is not asked in a loop.
        """
        self.start("first", life=MOTOS_EXPIRY - START)
        self.pass_time(59)
        self.assertEqual(1, len(self.fetches))
        self.pass_time(1)
        self.assertEqual(2, len(self.fetches))
        self.assertIsNone(self.service.problem())
        self.assertEqual(60.0, next_refresh(MOTOS_EXPIRY, START))
        self.assertEqual(60.0, next_refresh(START + 10, START))

    def test_a_clock_set_forward_refreshes_once(self) -> None:
        """
        A token that has expired by this machine's clock is replaced at once, and AWS is not asked in a loop.
        """
        self.start("first")
        self.pass_time(60)
        self.set_by = 10 * 365 * 86400.0
        self.pass_time(1)
        self.assertEqual(2, len(self.fetches))
        self.assertEqual("first", self.successResultOf(self.get()))
        self.fetches[-1].callback(Token("second", self.clock.seconds() + LIFE))  # AWS's clock is right
        self.pass_time(59)
        self.assertEqual(2, len(self.fetches))
        self.assertEqual(("second", None), (self.successResultOf(self.get()), self.service.problem()))

    def test_a_clock_set_forward_a_little_refreshes_nothing(self) -> None:
        """
        While the token is valid, the refresh keeps its time.
        """
        self.start("first")
        self.set_by = 3600.0
        self.clock.advance(21_599)
        self.assertEqual(1, len(self.fetches))
        self.clock.advance(1)
        self.assertEqual(2, len(self.fetches))

    def test_a_clock_set_back_delays_no_refresh(self) -> None:
        """
        A token is replaced after its lifetime, whatever the wall clock says; the next one too.
        """
        self.start("first")
        self.set_by = -10 * 365 * 86400.0
        self.clock.advance(21_600)
        self.assertEqual(2, len(self.fetches))
        self.fetches[-1].callback(Token("second", self.clock.seconds() + LIFE))
        self.clock.advance(21_600)
        self.assertEqual(3, len(self.fetches))

    def test_a_clock_set_while_aws_fails_changes_no_retry(self) -> None:
        """
        After a failure the next attempt keeps its time.
        """
        for jump in (10 * 365 * 86400.0, -10 * 365 * 86400.0):
            self.setUp()
            self.start("first", life=120)
            self.clock.advance(60)
            self.chance = 1.0
            self.refuse()
            self.set_by = jump
            self.pass_time(2)
            self.assertEqual(2, len(self.fetches))
            self.pass_time(1)
            self.assertEqual(3, len(self.fetches))

    def test_aws_is_not_asked_twice_at_once(self) -> None:
        self.start()
        self.pass_time(int(FETCH_SECONDS) - 1)
        self.assertEqual(1, len(self.fetches))

    def test_a_fetch_that_hangs_is_a_failure_after_half_a_minute(self) -> None:
        self.start("first")
        self.clock.advance(21_600)
        self.pass_time(int(FETCH_SECONDS))
        self.assertEqual(1, self.service.failed)
        self.pass_time(2)
        self.assertEqual(3, len(self.fetches))
        self.answer("second")
        self.assertEqual("second", self.successResultOf(self.get()))

    def test_fetches_that_hang_are_few(self) -> None:
        """
        Each keeps a thread. When one returns, another is made.
        """
        self.start()
        self.pass_time(int(OVERDUE_SECONDS / 2))
        self.assertEqual(OVERDUE, len(self.fetches))
        self.assertIn("has not answered", self.service.problem() or "")
        self.fetches[0].errback(TokenUnavailableError("at last"))
        self.pass_time(70)
        self.assertEqual(OVERDUE + 1, len(self.fetches))

    def test_fetches_that_never_return_are_counted_out_after_a_while(self) -> None:
        """
        The cause may be gone: attempts go on, and each thread is counted to the end.
        """
        self.start()
        self.pass_time(3600)
        known = len(self.fetches)
        self.pass_time(int(OVERDUE_SECONDS) + 70)
        self.assertLessEqual(known + 1, len(self.fetches))
        self.answer("well again")
        self.assertEqual(("well again", None), (self.successResultOf(self.get()), self.service.problem()))

    def test_there_is_an_end_to_threads_that_never_return(self) -> None:
        self.start()
        self.clock.pump([1.0] * 4 * 3600)
        self.assertEqual(MOST_OVERDUE, len(self.fetches))
        self.assertIn("has not answered 32 times; check the way to AWS", self.service.problem() or "")
        self.fetches[0].errback(TokenUnavailableError("at last"))
        self.pass_time(70)
        self.assertEqual(MOST_OVERDUE + 1, len(self.fetches))

    def test_a_token_that_comes_after_the_deadline_is_used(self) -> None:
        self.start()
        self.pass_time(int(FETCH_SECONDS) + 1)
        self.fetches[0].callback(Token("late", self.now() + LIFE))
        self.assertEqual(("late", None), (self.successResultOf(self.get()), self.service.problem()))

    def test_an_older_token_that_comes_late_replaces_none(self) -> None:
        self.start()
        self.pass_time(int(FETCH_SECONDS) + 2)
        self.answer("second")
        self.fetches[0].callback(Token("first", self.now() + LIFE - 10))
        self.assertEqual("second", self.successResultOf(self.get()))

    def test_a_hung_fetch_is_told_once_the_token_has_expired(self) -> None:
        self.start("first")
        self.clock.advance(21_600)
        self.clock.pump([1.0] * 60)
        self.assertIsNone(self.service.problem())
        self.clock.advance(21_600)
        self.assertIn("the token has expired: AWS", self.service.problem() or "")

    def failing_for(self, seconds: int, chance: float) -> list[float]:
        """
        Return when AWS is asked if it fails all the time.
        """
        self.chance = chance
        self.start()
        times = [0.0]
        self.refuse()
        for second in range(1, seconds + 1):
            self.clock.advance(1)
            if not self.fetches[-1].called:
                times.append(float(second))
                self.refuse()
        return times

    def test_failures_back_off(self) -> None:
        """
        The longer AWS fails the longer the pauses, up to about a minute.
        """
        times = self.failing_for(600, 1.0)
        pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
        self.assertEqual(sorted(pauses), pauses)
        self.assertLess(pauses[0], 5)
        self.assertLess(max(pauses), 65)
        self.assertGreater(max(pauses), 55)

    def test_pauses_differ_by_chance(self) -> None:
        """
        Many proxies that lost AWS together don't come back together.
        """
        by_chance = []
        for chance in (0.0, 0.5, 1.0):
            self.setUp()
            by_chance.append(len(self.failing_for(120, chance)))
        self.assertEqual(sorted(set(by_chance), reverse=True), by_chance)

    def test_a_success_ends_the_backing_off(self) -> None:
        """
        The next failure is retried as soon as a first one.
        """
        self.chance = 1.0
        self.start()
        for _ in range(8):
            self.refuse()
            self.pass_time(70)
        self.answer("first")
        self.clock.advance(21_600)
        self.refuse()
        count = len(self.fetches)
        self.pass_time(4)
        self.assertEqual(count + 1, len(self.fetches))

    def test_requests_that_fail_for_want_of_a_token_bring_the_retry_forward(self) -> None:
        """
        AWS is asked ten seconds after it failed, however long it has failed, and no sooner however many requests there
        are.
        """
        self.failing_for(600, 1.0)
        self.refuse_next()
        for _ in range(3):
            failed_at = self.clock.seconds()
            while self.fetches[-1].called:
                self.failureResultOf(self.get(), TokenUnavailableError)
                self.clock.advance(1)
            self.assertEqual(ASKED_RETRY, self.clock.seconds() - failed_at)
            self.refuse()

    def test_rejected_tokens_bring_the_retry_forward_too(self) -> None:
        self.chance = 1.0
        self.start("first")
        self.clock.advance(21_600)
        for _ in range(10):
            self.refuse_next()
        self.pass_time(20)
        self.assertTrue(self.fetches[-1].called)
        self.assertEqual("first", self.successResultOf(self.renew("first")))
        self.pass_time(1)
        self.assertFalse(self.fetches[-1].called)

    def refuse_next(self) -> None:
        """
        Wait until AWS is asked, and have it fail.
        """
        while self.fetches[-1].called:
            self.clock.advance(1)
        self.refuse()

    def test_the_old_token_stays_in_use_while_aws_fails(self) -> None:
        """
        A token is valid until it expires, whatever the refresh says; then the error is reported.
        """
        self.start("first")
        self.clock.advance(21_600)
        self.refuse()
        self.assertEqual("first", self.successResultOf(self.get()))
        self.assertIsNone(self.service.problem())
        self.clock.advance(21_600)
        self.refuse(TokenUnavailableError("AWS is down still"))
        self.assertEqual("first", self.successResultOf(self.get()))
        self.assertIn("AWS is down still", self.service.problem() or "")
        self.pass_time(70)
        self.answer("second")
        self.assertIsNone(self.service.problem())

    def test_requests_wait_for_the_first_token(self) -> None:
        """
        A pull during the daemon's start is served, even if AWS fails once meanwhile.
        """
        self.start()
        one, other = self.get(), self.get()
        self.refuse()
        self.pass_time(5)
        self.assertNoResult(one)
        self.answer("first")
        self.assertEqual(["first", "first"], [self.successResultOf(one), self.successResultOf(other)])
        self.assertEqual(1, len(self.clock.getDelayedCalls()), "only the service's own rhythm goes on")

    def test_requests_wait_ten_seconds_and_no_longer(self) -> None:
        """
        Then they get the reason why there is no token; later requests get it at once, for the cache may do.
        """
        self.start()
        waiting = self.get()
        self.refuse(TokenUnavailableError("AWS is down"))
        self.clock.advance(9.9)
        self.assertNoResult(waiting)
        self.clock.advance(0.2)
        self.assertIn("AWS is down", str(self.failureResultOf(waiting, TokenUnavailableError).value))
        self.failureResultOf(self.get(), TokenUnavailableError)

    def test_a_client_that_leaves_cancels_nobody(self) -> None:
        """
        Other waiting clients, and the refresh itself, go on.
        """
        self.start()
        gone, kept = self.get(), self.get()
        gone.cancel()
        self.failureResultOf(gone, CancelledError)
        self.answer("first")
        self.assertEqual("first", self.successResultOf(kept))
        self.assertEqual(1, len(self.clock.getDelayedCalls()))

    def test_one_refresh_serves_all_whose_token_was_refused(self) -> None:
        """
        However many pulls are rejected, AWS is asked once, and all go on with the new token.
        """
        self.start("first")
        waiting = [self.renew("first") for _ in range(20)]
        self.assertEqual(2, len(self.fetches))
        gone = self.renew("first")
        gone.cancel()
        self.failureResultOf(gone, CancelledError)
        self.answer("second")
        self.assertEqual({"second"}, {self.successResultOf(each) for each in waiting})
        self.assertEqual(2, len(self.fetches))

    def test_a_refused_token_that_was_replaced_already_is_not_refreshed(self) -> None:
        """
        A late request with the old token gets the new one at once.
        """
        self.start("first")
        self.renew("first")
        self.answer("second")
        self.assertEqual("second", self.successResultOf(self.renew("first")))
        self.assertEqual(2, len(self.fetches))

    def test_a_refused_token_waits_for_a_refresh_under_way(self) -> None:
        """
        A refresh that was due anyway serves the requests whose token is rejected meanwhile.
        """
        self.start("first")
        self.clock.advance(21_600)
        waiting = self.renew("first")
        self.assertEqual(2, len(self.fetches))
        self.answer("second")
        self.assertEqual("second", self.successResultOf(waiting))

    def test_a_renewal_that_fails_gives_the_old_token(self) -> None:
        """
        ECR's own answer to it then says what is wrong; requests wait until AWS fails, but no longer than ten seconds.
        """
        self.start("first")
        waiting = self.renew("first")
        self.refuse()
        self.assertEqual("first", self.successResultOf(waiting))

    def test_a_renewal_that_hangs_is_waited_for_ten_seconds(self) -> None:
        self.start("first")
        waiting = self.renew("first")
        self.clock.advance(PATIENCE)
        self.assertEqual("first", self.successResultOf(waiting))

    def test_while_aws_fails_rejected_tokens_are_not_waited_for(self) -> None:
        self.start("first")
        self.renew("first")
        self.refuse()
        self.pass_time(2)
        self.assertEqual(3, len(self.fetches))
        self.assertNoResult(self.fetches[-1])
        self.assertEqual("first", self.successResultOf(self.renew("first")))

    def test_rejections_cost_one_token_a_minute(self) -> None:
        """
        However many requests ECR rejects, even if it rejects each new token too.
        """
        self.start("token 0")
        for second in range(299):
            self.renew(self.successResultOf(self.get()))
            if not self.fetches[-1].called:
                self.answer(f"token {second + 1}")
            self.clock.advance(1)
        self.assertEqual(1 + 5, len(self.fetches))

    def test_a_token_rejected_soon_after_the_last_is_replaced_within_the_minute_unasked(self) -> None:
        self.start("first")
        self.renew("first")
        self.answer("second")
        self.clock.advance(1)
        self.assertEqual("second", self.successResultOf(self.renew("second")))
        self.assertEqual("ECR rejects the token", self.service.problem())
        self.pass_time(60)
        self.assertEqual(3, len(self.fetches))
        self.answer("third")
        self.assertIsNone(self.service.problem())

    def test_it_is_said_that_ecr_rejects_the_token_and_aws_gives_no_other(self) -> None:
        self.start("first")
        self.renew("first")
        self.assertIsNone(self.service.problem(), "AWS may give another in a moment")
        self.refuse(TokenUnavailableError("AWS is down"))
        for _ in range(300):
            self.clock.advance(1)
            self.assertEqual("ECR rejects the token, and AWS gives no other: AWS is down", self.service.problem())
            if not self.fetches[-1].called:
                self.refuse(TokenUnavailableError("AWS is down"))
        self.pass_time(70)
        self.answer("second")
        self.assertIsNone(self.service.problem())

    def test_a_renewed_token_has_its_own_half_life(self) -> None:
        """
        The refresh that was due for the old token is cancelled.
        """
        self.start("first")
        self.clock.advance(21_000)
        self.renew("first")
        self.answer("second")
        self.clock.advance(21_599)
        self.assertEqual(2, len(self.fetches))

    def test_credentials_refused_at_the_start_may_end_the_daemon(self) -> None:
        """
        Then no retry is announced, and none is made.
        """
        self.ends = True
        problem = CredentialsError("AWS credentials are refused")
        with capturedLogs() as events:
            self.start()
            self.refuse(problem)
            self.pass_time(70)
        self.assertEqual([problem], self.refusals)
        self.assertEqual([], [formatEvent(event) for event in events])
        self.assertEqual(1, len(self.fetches))

    def test_credentials_refused_at_the_start_are_tried_again_where_the_daemon_goes_on(self) -> None:
        with capturedLogs() as events:
            self.start()
            self.refuse(CredentialsError("AWS credentials are refused"))
        self.assertIn("Next try in", formatEvent(events[-1]))
        self.pass_time(5)
        self.answer("first")
        self.assertEqual("first", self.successResultOf(self.get()))

    def test_credentials_refused_later_do_not_end_the_daemon(self) -> None:
        """
        It serves what it has, and retries.
        """
        self.ends = True
        self.start("first")
        self.clock.advance(21_600)
        self.refuse(CredentialsError("AWS credentials are refused"))
        self.assertEqual([], self.refusals)
        self.pass_time(5)
        self.assertEqual(3, len(self.fetches))

    def test_aws_being_down_at_the_start_does_not_end_the_daemon(self) -> None:
        """
        Any exception short of a refusal leads to a retry.
        """
        self.start()
        self.refuse(ValueError())
        self.assertEqual([], self.refusals)
        self.assertIn("ValueError", self.service.problem() or "")
        self.pass_time(5)
        self.assertEqual(2, len(self.fetches))

    def test_it_is_said_why_there_is_no_token_yet(self) -> None:
        """
        From the start until the first token.
        """
        self.assertIn("AWS", self.service.problem() or "")
        self.start()
        self.assertIn("AWS", self.service.problem() or "")
        self.refuse(TokenUnavailableError("throttled"))
        self.assertEqual("throttled", self.service.problem())
        self.pass_time(5)
        self.answer("first")
        self.assertIsNone(self.service.problem())

    def test_a_stopped_service_asks_no_more(self) -> None:
        """
        No timer is left, whether or not it ever started.
        """
        self.start("first")
        self.service.stopService()
        self.clock.advance(LIFE)
        self.assertEqual(1, len(self.fetches))
        self.assertEqual([], self.clock.getDelayedCalls())
        TokenService(self.fetch, self.clock, self.now).stopService()

    def test_a_fetch_that_fails_before_it_begins_is_a_failure_like_others(self) -> None:
        """
        A thread pool that refuses work does not end the refreshing.
        """
        calls: list[int] = []

        def refuse_work() -> Deferred[Token]:
            calls.append(1)
            if len(calls) == 1:
                raise RuntimeError("no thread")
            return succeed(Token("first", self.clock.seconds() + LIFE))

        service = TokenService(refuse_work, self.clock, self.now, chance=lambda: 0.0)
        service.startService()
        self.addCleanup(service.stopService)
        self.assertEqual("no thread", service.problem())
        self.pass_time(3)
        self.assertIsNone(service.problem())

    def test_no_secret_is_shown(self) -> None:
        """
        Neither the log nor a token's repr contains it.
        """
        with capturedLogs() as events:
            self.start("c2VjcmV0")
            self.renew("c2VjcmV0")
            self.refuse()
        lines = [formatEvent(event) for event in events]
        self.assertGreaterEqual(len(lines), 3)
        self.assertNotIn("c2VjcmV0", repr(lines) + repr(events) + repr(Token("c2VjcmV0", START)))
