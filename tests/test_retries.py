"""
Which requests to ECR and its bucket are retried, when, and how often.
"""

from __future__ import annotations

import random
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionRefusedError, DNSLookupError
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.registry.ecr import RENEW_SECONDS
from ecrproxy.registry.retries import TRANSIENT_STATUSES, Budget, TransientError, Tries, asked_wait, failure, next_try
from ecrproxy.registry.unavailable import UnavailableError
from tests.test_upstream import UpstreamTestCase

BUDGET = Budget(3, 10.0)


class NextTryTests(SynchronousTestCase):
    """
    When a request is retried.
    """

    def test_waits_grow_exponentially(self) -> None:
        """
        At most 1 s before the second attempt, 2 s before the third, and so on, doubling each time.
        """
        most = [next_try(Budget(6, 100), tries, 0, None, 1.0) for tries in range(1, 7)]
        self.assertEqual([1.0, 2.0, 4.0, 8.0, 16.0, None], most)

    def test_jitter_is_full(self) -> None:
        """
        A wait is anything from 0 to the maximum, so that requests that failed together come back apart.
        """
        self.assertEqual(
            [0.0, 0.5, 1.0, 2.0], [next_try(BUDGET, 2, 0, None, chance) for chance in (0.0, 0.25, 0.5, 1.0)]
        )

    def test_tries_are_counted(self) -> None:
        """
        There is none after the last attempt; one attempt means one request.
        """
        self.assertIsNone(next_try(BUDGET, 3, 0, None, 0.5))
        self.assertIsNone(next_try(Budget(1, 10), 1, 0, None, 0.5))

    def test_seconds_are_counted(self) -> None:
        """
        What took long is not retried, and no wait exceeds the budget.
        """
        self.assertIsNone(next_try(BUDGET, 1, 10.0, None, 0.0))
        self.assertIsNone(next_try(BUDGET, 1, 30.0, None, 0.0))
        self.assertAlmostEqual(0.5, next_try(BUDGET, 2, 9.5, None, 1.0) or 0)

    def test_retry_after_is_the_least(self) -> None:
        """
        Never sooner than upstream says, a little later by chance, and not at all if that is beyond the budget.
        """
        self.assertEqual([4.0, 5.0], [next_try(BUDGET, 1, 0, 4.0, chance) for chance in (0.0, 1.0)])
        self.assertIsNone(next_try(BUDGET, 1, 0, 10.0, 0.0))
        self.assertIsNone(next_try(BUDGET, 1, 7.0, 4.0, 0.0))

    def test_all_waits_together_keep_to_the_budget(self) -> None:
        """
        Whatever the jitter and whatever upstream says, the last attempt begins within the budget.
        """
        dice = random.Random(7)
        for _ in range(2000):
            budget, elapsed = Budget(dice.randint(1, 40), dice.uniform(0, 20)), 0.0
            tries = Tries(budget, 100.0)
            for _ in range(40):
                elapsed += dice.uniform(0, 2)
                problem = TransientError(503, "UNAVAILABLE", "")
                problem.wait = dice.choice([None, dice.uniform(0, 5)])
                wait = tries.failed(problem, 100.0 + elapsed, dice.random())
                if wait is None:
                    break
                elapsed += wait
                self.assertLessEqual(elapsed, budget.seconds + 1e-6)

    def test_who_gives_up_does_not_try_again(self) -> None:
        """
        A cancelled request is not retried, whatever is left of its budget.
        """
        tries = Tries(BUDGET, 0.0)
        tries.give_up()
        self.assertIsNone(tries.failed(TransientError(503, "UNAVAILABLE", ""), 0.0, 0.0))


class RetryAfterTests(SynchronousTestCase):
    """
    Parsing Retry-After.
    """

    def test_of_seconds(self) -> None:
        """
        Whole seconds are taken literally.
        """
        self.assertEqual((None, 0.0, 7.0), (asked_wait(None, None), asked_wait("0", None), asked_wait("7", "x")))

    def test_of_a_moment(self) -> None:
        """
        A date is relative to the answer's own date; one in the past means now.
        """
        now = "Wed, 25 Nov 2026 07:28:00 GMT"
        self.assertEqual(90.0, asked_wait("Wed, 25 Nov 2026 07:29:30 GMT", now))
        self.assertEqual(0.0, asked_wait("Wed, 25 Nov 2026 07:27:00 GMT", now))

    def test_that_makes_no_sense(self) -> None:
        """
        An unreadable value is ignored.
        """
        now = "Wed, 25 Nov 2026 07:28:00 GMT"
        for text in ("", "soon", "-1", "1.5", "٣", "Wed, 99 Nov 2026 07:28:00 GMT", "Wed, 25 Nov 2026 07:28:00"):
            self.assertIsNone(asked_wait(text, now), text)
        self.assertIsNone(asked_wait(now, None))

    def test_of_numbers_beyond_all_bounds(self) -> None:
        now = "Wed, 25 Nov 2026 07:28:00 GMT"
        for text in ("86401", "9" * 500, "9" * 5000, "Wed, 25 Nov 9999 07:28:00 GMT"):
            self.assertEqual(86400.0, asked_wait(text, now), text)
        for text in (
            "Wed, 25 Nov 99999999999999999999 07:28:00 GMT",
            "Wed, 25 Nov 2026 99999999999999999999:28:00 GMT",
            f"Wed, 25 Nov {'9' * 5000} 07:28:00 GMT",
            "Wed, 25 Nov 2026 07:28:00 +99999999999999",
            "1e400",
            "-" + "9" * 5000,
        ):
            self.assertIsNone(asked_wait(text, now), text)
            self.assertIsNone(asked_wait(now, text), text)

    def test_is_what_the_client_is_told(self) -> None:
        """
        A client gets whole seconds, never 0, and a guess if upstream gave none.
        """
        for status, wait, told in (
            (429, None, "1"),
            (429, 0.0, "1"),
            (503, 2.1, "3"),
            (504, None, "5"),
            (500, 7.0, None),
        ):
            self.assertEqual(told, failure("ECR", status, wait).headers.get("Retry-After"), (status, wait))


class AgainTests(UpstreamTestCase):
    """
    Requests to ECR, and to the bucket, that fail.
    """

    def setUp(self) -> None:
        super().setUp()
        self.questions = {
            "GET manifest": lambda: self.daemon.upstream.manifest(self.tag, ""),
            "HEAD manifest": lambda: self.daemon.upstream.head_manifest(self.tag, ""),
            "GET blob": lambda: self.daemon.upstream.blob(self.blob),
            "HEAD blob": lambda: self.daemon.upstream.blob_size(self.blob),
        }

    def test_failures_that_pass_are_not_seen(self) -> None:
        """
        429, 500, 502, 503, 504 and a closed connection, once or twice: the request still succeeds.
        """
        for name, question in self.questions.items():
            for times in (1, 2):
                for status in sorted(TRANSIENT_STATUSES):
                    self.standin.forget_asked()
                    self.standin.fail("registry", status=status, times=times)
                    self.successResultOf(self.asking(question()))
                    self.assertEqual(times + 1, self.standin.count("registry"), (name, status))
                self.standin.refuse("registry", times=times)
                self.successResultOf(self.asking(question()))

    def test_failures_that_stay_are_told(self) -> None:
        """
        After three attempts the client gets an error for ECR's last answer.
        """
        for name, question in self.questions.items():
            for status, told in ((429, 429), (500, 502), (502, 502), (503, 503), (504, 504)):
                self.start()
                self.standin.forget_asked()
                fault = self.standin.fail("registry", status=status)
                self.assertUnavailable(told, "123456789012.dkr.ecr", question())
                self.assertEqual(3, self.standin.count("registry"), (name, status))
                fault.remove()

    def test_what_will_not_pass_is_asked_once(self) -> None:
        """
        Any other refusal is an answer, and is not retried.
        """
        for status in (400, 403, 404, 418, 501, 505):
            self.standin.forget_asked()
            fault = self.standin.fail("registry", status=status, headers={"WWW-Authenticate": "Basic"})
            self.refused(self.daemon.upstream.manifest(self.tag, ""))
            self.assertEqual(1, self.standin.count("registry"), status)
            fault.remove()

    def test_a_bucket_is_asked_again(self) -> None:
        """
        A bucket that fails once or twice sends the blob, without another request to ECR; a lasting failure is reported.
        """
        for times in (1, 2):
            self.standin.throttle("bucket", times=times)
            self.assertEqual(self.data, self.fetched())
            self.standin.refuse("bucket", times=times)
            self.assertEqual(self.data, self.fetched())
        self.assertEqual(4, self.standin.count("registry"))
        self.standin.forget_asked()
        self.standin.throttle("bucket")
        self.assertUnavailable(503, "starport-layer-bucket", self.daemon.upstream.blob(self.blob))
        self.assertEqual((1, 3), (self.standin.count("registry"), self.standin.count("bucket")))

    def test_a_connection_that_can_not_be_made_is_tried_again(self) -> None:
        """
        Refused connections and unresolved names are retried, until they work or the attempts are used up.
        """
        for down in (ConnectionRefusedError(), DNSLookupError("no such name")):
            self.start(chance=0.5)
            self.daemon.back.down = down
            asking = self.asking(self.daemon.upstream.manifest(self.tag, ""))
            self.assertNoResult(asking)
            self.daemon.back.down = None
            self.pass_time(1)
            self.successResultOf(asking)
            self.start()
            self.daemon.back.down = down
            asking = self.asking(self.daemon.upstream.manifest(self.tag, ""))
            self.pass_time(3)
            self.assertEqual(502, self.failureResultOf(asking, UnavailableError).value.status)

    def test_a_manifest_that_breaks_off_is_asked_for_again(self) -> None:
        """
        If the connection breaks in the middle of a manifest the client sees only the whole.
        """
        self.standin.break_off(10, service="registry", times=2)
        manifest = self.successResultOf(self.asking(self.daemon.upstream.manifest(self.tag, "")))
        self.assertEqual(self.image.manifest, manifest.body)

    def test_silence_is_not_asked_again_beyond_the_budget(self) -> None:
        """
        An ECR that is silent after three attempts has used its time: 504. With a larger budget it is asked twice more.
        """
        for seconds, asked in ((10.0, 3), (100.0, 5)):
            self.start(budget=Budget(3, seconds))
            self.standin.forget_asked()
            fault = self.standin.hang("registry")
            asking = self.asking(self.daemon.upstream.manifest(self.tag, ""))
            self.pass_time(95)
            self.assertEqual(504, self.failureResultOf(asking, UnavailableError).value.status)
            self.assertEqual(asked, self.standin.count("registry", path_contains="/manifests/"))
            fault.remove()

    def test_a_small_retry_after_is_waited_for(self) -> None:
        """
        ECR is not asked before the time that it gave, and is asked then.
        """
        self.standin.throttle("registry", times=1, retry_after="4")
        asking = self.asking(self.daemon.upstream.manifest(self.tag, ""))
        self.pass_time(3.5)
        self.assertEqual(1, self.standin.count("registry"))
        self.pass_time(0.6)
        self.successResultOf(asking)

    def test_a_large_retry_after_is_passed_on_at_once(self) -> None:
        """
        A Retry-After beyond the budget is passed on to the client.
        """
        self.standin.throttle("registry", retry_after="17")
        problem = self.refused(self.daemon.upstream.manifest(self.tag, ""))
        self.assertEqual((429, "TOOMANYREQUESTS", "17"), (problem.status, problem.code, problem.headers["Retry-After"]))
        self.assertEqual(1, self.standin.count("registry"))

    def test_who_leaves_while_it_waits_ends_it(self) -> None:
        """
        If the client disconnects between two attempts, there is no further one.
        """
        self.start(chance=0.5)
        self.standin.fail("registry", status=503, times=1)
        asking: Deferred[Any] = self.asking(self.daemon.upstream.manifest(self.tag, ""))
        asking.cancel()
        self.failureResultOf(asking, CancelledError)
        self.pass_time(20)
        self.assertEqual(1, self.standin.count("registry"))

    def test_a_new_token_costs_no_more_tries(self) -> None:
        """
        A rejected token between failures costs one refresh and one repetition; the attempts stay three in total.
        """
        self.standin.fail("registry", status=503, times=2)
        self.standin.expire_tokens()
        answer = self.asking(self.daemon.upstream.manifest(self.tag, ""))
        self.pass_time(1)
        self.successResultOf(answer)
        self.assertEqual((4, 2), (self.standin.count("registry"), len(self.standin.tokens._until)))  # noqa: SLF001
        self.pass_time(RENEW_SECONDS)
        self.standin.forget_asked()
        self.standin.fail("registry", status=503)
        self.standin.fail("registry", status=401, times=1)
        self.standin.fail("registry", status=503, times=2)
        answer = self.asking(self.daemon.upstream.manifest(self.tag, ""))
        self.pass_time(61)
        self.assertEqual(503, self.failureResultOf(answer, UnavailableError).value.status)
        self.assertEqual(4, self.standin.count("registry"))

    def test_pulls_do_not_notice(self) -> None:
        """
        A client that pulls while ECR and the bucket fail now and then gets what it requested.
        """
        for service in ("registry", "bucket"):
            self.standin.throttle(service, times=2)
            self.standin.refuse(service, times=1)
            self.start(budget=Budget(5, 10))
            self.assertWhole(self.get(f"/v2/team/app/blobs/{self.digest}"), self.data)
            self.file_of(str(self.digest)).unlink()
