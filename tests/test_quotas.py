"""
How often ECR may be asked: the quotas, and the rate limit for each.
"""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.oci import Kind
from ecrproxy.registry.quotas import LONGEST_REST, Call, Quotas, TokenBucket, call_of


class CallTests(SynchronousTestCase):
    """
    Which API call ECR counts a request as.
    """

    def test_each_question_is_one(self) -> None:
        """
        A blob's HEAD and GET are different calls, a manifest's are the same.
        """
        expected = {
            ("GET", Kind.MANIFEST): Call.MANIFEST,
            ("HEAD", Kind.MANIFEST): Call.MANIFEST,
            ("GET", Kind.BLOB): Call.BLOB,
            ("HEAD", Kind.BLOB): Call.CHECK,
            ("GET", Kind.TAGS): Call.LIST,
            ("GET", Kind.REFERRERS): Call.LIST,
        }
        self.assertEqual(expected, {asked: call_of(*asked) for asked in expected})


class QuotasTests(SynchronousTestCase):
    """
    The operator's setting.
    """

    def test_processes_that_share_them_keep_within_them_together(self) -> None:
        """
        In the first second, for which their buckets are full, and in each later one, however small the quota.
        """
        for processes in (1, 2, 3, 7, 8, 64):
            whole = Quotas(lists=5)
            part = whole.share(processes)
            for call in Call:
                buckets = [TokenBucket(part.of(call), 0) for _ in range(processes)]
                first, second = (sum(self.calls(each, now) for each in buckets) for now in (0, 1))
                spare = processes if part.of(call) < 10 else 0  # a bucket holds at least one call
                self.assertLessEqual(first, whole.of(call) + spare)
                self.assertLessEqual(second, whole.of(call) + spare)
                self.assertGreater(second + processes, 0.85 * whole.of(call))
        self.assertEqual(Quotas(), Quotas().share(1))

    @staticmethod
    def calls(bucket: TokenBucket, now: float) -> int:
        """
        Send as many calls as allowed within a second.
        """
        end, count = now + 1, 0
        while now < end:
            if wait := bucket.wait(now):
                now += wait + 1e-9
            else:
                bucket.take()
                count += 1
        return count

    def test_what_is_not_named_keeps_its_default(self) -> None:
        """
        One kind may be set without the others, in any order, with blanks or commas between.
        """
        self.assertEqual(Quotas(checks=7), Quotas.parse("checks=7"))
        self.assertEqual(Quotas(1, 2, 3, 4), Quotas.parse("lists=4, blobs=3  checks=2,manifests=1"))

    def test_each_kind_has_one(self) -> None:
        """
        All kinds of calls have a quota, AWS's own by default.
        """
        self.assertEqual([2000, 1000, 3000, 100], [Quotas().of(call) for call in Call])

    def test_what_is_none_is_named(self) -> None:
        """
        The invalid word is in the error.
        """
        for word in (
            "2000",
            "blobs",
            "blobs=",
            "blobs=0",
            "blobs=-1",
            "Blobs=1",
            "pulls=1",
            "blobs=1.5",
            "blobs=9999999",
        ):
            problem = self.assertRaises(ValueError, Quotas.parse, f"lists=5 {word}")
            self.assertIn(repr(word), str(problem))
        for text in ("", "lists=5 lists=5"):
            self.assertRaises(ValueError, Quotas.parse, text)


class TokenBucketTests(SynchronousTestCase):
    """
    A rate limit.
    """

    def went(self, quota: int, seconds: float) -> list[float]:
        """
        Send calls for some time, as fast as allowed; return when.
        """
        now, when = 100.0, list[float]()
        bucket = TokenBucket(quota, now)
        while now < 100.0 + seconds:
            if wait := bucket.wait(now):
                now += max(wait, 1e-4)
            else:
                bucket.take()
                when.append(now)
        return when

    def test_no_second_has_more_than_the_quota(self) -> None:
        """
        Wherever a second begins, it has at most the quota, and nearly as much.
        """
        for quota in (10, 100, 3000):
            when = self.went(quota, 5)
            for first, later in zip(when, when[quota:], strict=False):
                self.assertGreater(later - first, 1.0 - 1e-6)
            self.assertGreaterEqual(len(when), 0.9 * 5 * quota)

    def test_a_small_quota_is_kept_to_as_well(self) -> None:
        """
        With one call a second one goes at a time.
        """
        self.assertEqual([100, 101, 102], [round(when) for when in self.went(1, 3)])

    def test_a_tenth_of_a_second_may_go_at_once(self) -> None:
        """
        After a pause, however long, a burst is a tenth of the quota.
        """
        bucket = TokenBucket(100, 0.0)
        for now in (0.0, 1000.0):
            count = 0
            while not bucket.wait(now):
                bucket.take()
                count += 1
            self.assertEqual(10, count)

    def test_a_rest_is_kept(self) -> None:
        """
        While ECR wants no calls none is sent, for as long as it says, but at most a minute.
        """
        bucket = TokenBucket(100, 0.0)
        bucket.rest(0.0, 7.0)
        bucket.rest(1.0, 2.0)
        self.assertEqual((7.0, 2.0, 0.0), (bucket.wait(0.0), bucket.wait(5.0), bucket.wait(7.0)))
        bucket.rest(10.0, 86400.0)
        self.assertEqual(LONGEST_REST, bucket.wait(10.0))
