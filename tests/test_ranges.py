"""
Blobs over several connections, and answers from memory, seen from the client.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from ecrproxy.cache.kept_open import KEPT_SECONDS
from ecrproxy.oci import Digest
from ecrproxy.transfer.gaps import SMALLEST_PART, SPLIT, part_size
from ecrproxy.transfer.inflow import Lanes
from tests.daemon import MIB, Daemon, DaemonTestCase, Reply, at_once, noise

T = TypeVar("T")
SIZE = 40 * MIB
DATA = noise("ranges", SIZE)


def span(header: str) -> tuple[int, int]:
    """
    Parse a Range header: first byte, and the one behind the last.
    """
    first, _, last = header.removeprefix("bytes=").partition("-")
    return int(first), int(last) + 1


class RangesTestCase(DaemonTestCase):
    """
    A daemon of four lanes, and a blob of 40 MiB.
    """

    def setUp(self) -> None:
        super().setUp()
        self.digest = self.standin.push_blob("team/app", DATA)
        self.path = f"/v2/team/app/blobs/{self.digest}"
        self.start()

    def start(self, **options: Any) -> Daemon:
        """
        Start a daemon whose disk finishes a piece a moment later, as threads do.
        """
        return super().start(in_thread=self.soon, **options)

    def soon(self, blocking: Callable[..., T], *args: Any) -> Deferred[T]:
        """
        Run the calls for threads after what comes from the network now.
        """
        return deferLater(self.clock, 0, blocking, *args)

    def spans(self) -> list[tuple[int, int]]:
        """
        Return the ranges that the bucket was asked for, in the order of the bytes.
        """
        asked = self.standin.requests("bucket", "GET", self.digest)
        return sorted(span(each.headers["range"]) for each in asked)

    def free_lanes(self) -> int:
        """
        Return how many connections to buckets are free.
        """
        lanes = self.daemon.lanes
        taken = 0
        while (more := lanes.take(2**60)) > 1:
            taken += more
        lanes.give_back(taken + 1)
        return taken


class LanesTests(RangesTestCase):
    def test_bring_each_byte_once(self) -> None:
        """
        A large blob comes over four connections, in the announced parts, end to end: each byte once.
        """
        self.standin.hold(self.digest)
        reply = self.get(self.path)
        self.assertEqual(4, self.standin.held(self.digest))
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, DATA, "MISS")
        self.assertEqual(SIZE, self.standin.bytes_sent)
        spans = self.spans()
        self.assertEqual([0, *[stop for _, stop in spans[:-1]]], [start for start, _ in spans])
        self.assertEqual((0, SMALLEST_PART), spans[0])
        self.assertEqual(SIZE, spans[-1][1])
        expected, at = [(0, SMALLEST_PART)], SMALLEST_PART
        while at < SIZE:
            expected.append((at, at + part_size(SIZE - at, 4)))
            at = expected[-1][1]
        self.assertEqual(expected, spans)
        self.assertTrue(self.has(self.digest))
        self.assertWhole(self.get(self.path), DATA, "HIT")

    def test_ask_ecr_once(self) -> None:
        """
        All parts come from the one URL that ECR returned.
        """
        self.get(self.path)
        self.assertEqual(1, self.standin.count("registry", "GET"))
        self.assertEqual(1, len({asked.target for asked in self.standin.requests("bucket")}))

    def test_are_not_for_small_blobs(self) -> None:
        """
        A blob under 16 MiB comes as one part, or, while its size is unknown, in its first part and one more.
        """
        for size, parts in ((1000, 1), (SMALLEST_PART, 1), (SMALLEST_PART + 1, 2), (SPLIT - 1, 2)):
            self.standin.forget_asked()
            data = DATA[-size:]
            digest = self.standin.push_blob("team/app", data)
            self.assertWhole(self.get(f"/v2/team/app/blobs/{digest}"), data, "MISS")
            self.assertEqual(parts, self.standin.count("bucket"), size)

    def test_are_not_asked_for_in_parts_where_the_size_is_known(self) -> None:
        """
        A layer that is small according to the manifest comes as one, without a range.
        """
        image = self.standin.push_image("team/app", "small", layers=[DATA[: 5 * MIB]])
        self.get("/v2/team/app/manifests/small")
        self.assertWhole(self.get(f"/v2/team/app/blobs/{image.layers[0]}"), DATA[: 5 * MIB], "MISS")
        (asked,) = self.standin.requests("bucket")
        self.assertNotIn("range", asked.headers)

    def test_of_one_connection(self) -> None:
        """
        With PROXY_BLOB_CONNECTIONS=1 a blob is one request without a range.
        """
        self.start(lanes=Lanes(1, 64))
        self.assertWhole(self.get(self.path), DATA, "MISS")
        (asked,) = self.standin.requests("bucket")
        self.assertNotIn("range", asked.headers)

    def test_are_given_back(self) -> None:
        """
        Lanes are free again after a transfer, whether or not it succeeded.
        """
        free = self.free_lanes()
        self.standin.hold(self.digest)
        reply = self.get(self.path)
        self.assertEqual(free - 4, self.free_lanes())
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, DATA)
        self.assertEqual(free, self.free_lanes())
        other = self.standin.push_blob("team/app", DATA[1:])
        self.standin.corrupt(other, DATA[:-1])
        self.assertEqual("broken", self.get(f"/v2/team/app/blobs/{other}").ended)
        self.assertEqual(free, self.free_lanes())
        third = self.standin.push_blob("team/app", DATA[2:])
        self.standin.hold(third)
        reply = self.get(f"/v2/team/app/blobs/{third}")
        self.standin.fail("bucket", status=500)
        self.standin.cut(third)
        self.flush()
        self.assertEqual("broken", reply.ended)
        self.assertEqual(free, self.free_lanes())

    def test_that_others_have_are_done_without(self) -> None:
        """
        If all connections are in use a blob comes over one; there are never more than PROXY_BUCKET_CONNECTIONS, or one
        for each blob.
        """
        self.start(lanes=Lanes(4, 6))
        others = [self.standin.push_blob("team/app", DATA[number:]) for number in (1, 2)]
        digests = [self.digest, *others]
        for digest in digests:
            self.standin.hold(digest)
        replies = [self.get(f"/v2/team/app/blobs/{digest}") for digest in digests]
        self.assertEqual([4, 2, 1], [self.standin.held(digest) for digest in digests])
        for digest in digests:
            self.standin.release(digest)
        self.flush()
        for number, reply in enumerate(replies):
            self.assertWhole(reply, DATA[number:])


class BrokenLaneTests(RangesTestCase):
    def test_goes_on_from_its_last_byte(self) -> None:
        """
        A lane whose connection breaks requests the rest of its part, the others go on, and no client notices.
        """
        self.standin.hold(self.digest)
        reply = self.get(self.path)
        self.standin.deliver(self.digest, 1000)
        self.flush()
        self.standin.cut(self.digest)
        self.flush()
        again = self.spans()
        self.assertEqual(8, len(again))
        firsts = again[::2]
        self.assertEqual([(start + 1000, stop) for start, stop in firsts], again[1::2])
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, DATA)
        self.assertEqual(SIZE, self.standin.bytes_sent)

    def test_has_a_new_url_where_the_old_one_has_expired(self) -> None:
        """
        A URL that expires in the middle of a blob costs one request to ECR for each affected part, no byte twice.
        """
        self.standin.hold(self.digest)
        reply = self.get(self.path)
        self.standin.expire_urls()
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, DATA)
        self.assertEqual(SIZE, self.standin.bytes_sent)
        self.assertLessEqual(self.standin.count("registry", "GET"), 1 + 4)

    def test_without_a_file_goes_on_too(self) -> None:
        """
        A blob that is not cached is requested from its last byte on, whether its connection broke or its URL expired.
        """
        self.start(limit=10 * MIB)
        self.standin.hold(self.digest)
        reply = self.get(self.path)
        self.standin.deliver(self.digest, 300_000)
        self.flush()
        self.standin.expire_urls()
        self.standin.cut(self.digest)
        self.flush()
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, DATA, "BYPASS")
        self.assertEqual(SIZE, self.standin.bytes_sent)

    def test_that_stays_broken_ends_all(self) -> None:
        """
        If a part can't be fetched, the client's connection is aborted and the other lanes are stopped; the next request
        resumes from what has arrived.
        """
        self.standin.hold(self.digest)
        reply = self.get(self.path)
        self.standin.deliver(self.digest, 1000)
        self.flush()
        self.standin.fail("bucket", status=500)
        self.standin.cut(self.digest)
        self.flush()
        self.assertBroken(reply, DATA)
        self.assertEqual(0, self.standin.held(self.digest))
        self.assertEqual([], [path for path in self.files() if path.name in self.digest])
        self.standin.heal()
        self.standin.release(self.digest)
        self.assertWhole(self.get(self.path), DATA, "MISS")
        self.assertEqual((SIZE, []), (self.standin.bytes_sent, self.arriving()))

    def test_that_brings_nothing_is_not_asked_for_at_once(self) -> None:
        """
        A connection that breaks without a byte is retried after a second, and then two, at most; one that delivered
        something at once.
        """
        self.start(lanes=Lanes(1), chance=1)
        self.standin.hold(self.digest)
        reply = self.get(self.path)
        self.standin.deliver(self.digest, 2000)
        self.flush()
        for wait in (0, 1, 2):
            asked = self.standin.count("bucket")
            self.standin.cut(self.digest)
            self.flush()
            if wait:
                self.pass_time(wait - 0.5)
                self.assertEqual(asked, self.standin.count("bucket"))
                self.pass_time(0.5)
            self.assertEqual(asked + 1, self.standin.count("bucket"))
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, DATA)

    def test_that_brings_next_to_nothing_is_not_asked_for_at_once_either(self) -> None:
        """
        A device on the path may cut off each connection after some bytes; each one is resumed from there.
        """
        self.start(lanes=Lanes(1), chance=1)
        fault = self.standin.break_off(10, times=None)
        reply = self.get(self.path)
        self.pass_time(60)
        self.assertLess(self.standin.count("bucket"), 70)
        self.assertEqual("", reply.ended)
        fault.remove()
        self.pass_time(2)
        self.assertWhole(reply, DATA)

    def test_that_is_silent_is_replaced(self) -> None:
        """
        A lane without a byte for 30 seconds is closed and its part requested again.
        """
        self.standin.hold(self.digest)
        reply = self.get(self.path)
        self.standin.deliver(self.digest, 1000)
        self.pass_time(31)
        self.assertEqual(8, len(self.spans()))
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, DATA)


class NoRangesTests(RangesTestCase):
    def test_come_as_one_stream(self) -> None:
        """
        A bucket that ignores Range is asked once, and its one answer is the blob.
        """
        self.standin.quirks.ignore_range = True
        self.standin.hold(self.digest)
        free = self.free_lanes()
        reply = self.get(self.path)
        self.assertEqual(free - 1, self.free_lanes())
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, DATA, "MISS")
        self.assertEqual((1, SIZE), (self.standin.count("bucket"), self.standin.bytes_sent))

    def test_of_a_bucket_that_stops_giving_parts(self) -> None:
        """
        A bucket that sends the first part and then the whole for each request is still assembled correctly.
        """
        self.standin.hold(self.digest)
        reply = self.get(self.path)
        self.standin.quirks.ignore_range = True
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(reply, DATA)

    def test_of_nothing(self) -> None:
        """
        The empty blob, which has no part, can be fetched too.
        """
        digest = self.standin.push_blob("team/app", b"")
        self.assertWhole(self.get(f"/v2/team/app/blobs/{digest}"), b"", "MISS")
        self.assertWhole(self.get(f"/v2/team/app/blobs/{digest}"), b"", "HIT")


class ReaderTests(RangesTestCase):
    def begin(self) -> Reply:
        """
        Begin the transfer; the lanes stand at the beginnings of their parts.
        """
        self.standin.hold(self.digest)
        return self.get(self.path)

    def test_far_ahead_has_what_is_there(self) -> None:
        """
        A request for a range that a later lane has fetched gets it before the bytes in between.
        """
        whole = self.begin()
        start, stop = self.spans()[2]
        self.assertGreater(start, SMALLEST_PART)
        self.arrive(self.digest, 200_000)
        wanted = (start + 1000, start + 101_000)
        part = self.get(self.path, Range=f"bytes={wanted[0]}-{wanted[1] - 1}")
        self.assertWhole(part, DATA[slice(*wanted)], "JOINED", 206)
        self.assertEqual(200_000, len(whole.body))
        self.assertLess(stop, SIZE)
        self.standin.release(self.digest)
        self.flush()
        self.assertWhole(whole, DATA)
        self.assertEqual(SIZE, self.standin.bytes_sent)

    def test_of_a_gap_waits(self) -> None:
        """
        A range from one lane's bytes into missing ones stops where they end, and goes on when the rest arrives.
        """
        self.begin()
        start, _ = self.spans()[2]
        self.arrive(self.digest, 200_000)
        part = self.get(self.path, Range=f"bytes={start + 150_000}-{start + 299_999}")
        self.assertEqual(50_000, len(part.body))
        self.arrive(self.digest, 50_000)
        self.assertEqual(100_000, len(part.body))
        self.assertTrue(DATA[start + 150_000 : start + 250_000] == bytes(part.body))

    def test_of_the_whole_by_a_range_never_has_the_last_of_wrong_bytes(self) -> None:
        """
        If the digest turns out to be wrong, a client that requested everything by a range is aborted; a real part was
        sent.
        """
        self.standin.corrupt(self.digest, DATA[:-1] + b"x")
        whole = self.begin()
        start, _ = self.spans()[2]
        self.arrive(self.digest, 200_000)
        part = self.get(self.path, Range=f"bytes={start}-{start + 999}")
        self.assertWhole(part, DATA[start : start + 1000], code=206)
        all_of_it = self.get(self.path, Range="bytes=0-")
        self.standin.release(self.digest)
        self.flush()
        self.assertBroken(all_of_it, DATA)
        self.assertBroken(whole, DATA)
        self.assertFalse(self.has(self.digest))


class CountingThreads:
    """
    C{in_thread} that counts the disk operations.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, blocking: Callable[..., T], *args: Any) -> Deferred[T]:
        self.calls.append(getattr(blocking, "__name__", str(blocking)))
        return at_once(blocking, *args)


class MemoryTests(DaemonTestCase):
    """
    Answers without the disk.
    """

    def setUp(self) -> None:
        super().setUp()
        self.image = self.standin.push_image("team/app", "latest")
        self.by_digest = f"/v2/team/app/manifests/{self.image.digest}"
        self.config = f"/v2/team/app/blobs/{self.image.config}"
        self.threads = CountingThreads()
        self.start(in_thread=self.threads)

    def read(self, path: str) -> None:
        """
        Have something fetched, and read once.
        """
        self.get(path)
        self.get(path)
        self.get(path)
        self.threads.calls.clear()

    def test_a_hit_needs_no_disk(self) -> None:
        """
        A manifest or a small blob that was read is answered again and again without a thread, GET and HEAD.
        """
        for path in (self.by_digest, self.config):
            self.read(path)
            for _ in range(100):
                reply = self.get(path)
                self.assertEqual((200, "HIT"), (reply.code, reply.cache))
            self.assertEqual("HIT", self.head(path).cache)
            self.assertEqual([], self.threads.calls)

    def test_a_use_is_in_the_index_a_second_later(self) -> None:
        """
        A use from memory, too; without a thread of the request's own.
        """
        for path, digest in ((self.by_digest, self.image.digest), (self.config, self.image.config)):
            self.read(path)
            self.pass_time(30)
            used = self.daemon.now()
            self.threads.calls.clear()
            self.get(path)
            self.assertEqual([], self.threads.calls)
            self.pass_time(1)
            known = self.index.known(Digest.parse(digest))
            assert known is not None
            self.assertEqual(used, known.used)

    def test_a_use_is_seen_by_who_makes_room(self) -> None:
        """
        Content that is used only from memory is not evicted first, though others were read later.
        """
        self.read(self.config)
        others = [self.standin.push_blob("team/app", noise(f"other{number}", 100_000)) for number in range(3)]
        for other in others:
            self.get(f"/v2/team/app/blobs/{other}")
        self.pass_time(61)
        self.get(self.config)
        order = [str(each.what) for each in self.daemon.store.candidates()]
        places = [order.index(each) for each in (*others, self.image.config)]
        self.assertEqual(places[-1], max(places))

    def test_a_large_blob_is_not_held(self) -> None:
        """
        Blobs of more than 64 KiB are read from the disk each time, and looked up again a second later.
        """
        digest = self.standin.push_blob("team/app", noise("larger", 2**16 + 1))
        path = f"/v2/team/app/blobs/{digest}"
        self.read(path)
        self.get(path)
        self.assertEqual(["_pread"], self.threads.calls)
        self.pass_time(KEPT_SECONDS)
        self.get(path)
        self.assertIn("_look_up", self.threads.calls)

    def test_those_who_wait_for_a_blob_write_nothing_more_of_what_ecr_says(self) -> None:
        """
        The request that fetches the file records that the repository has it.
        """
        data = noise("larger", 2**16 + 1)
        digest = self.standin.push_blob("team/app", data)
        self.standin.hold(digest)
        replies = [self.daemon.send("GET", f"/v2/team/app/blobs/{digest}") for _ in range(20)]
        self.flush()
        self.standin.release(digest)
        self.flush()
        self.assertEqual([data] * 20, [each.body for each in replies])
        self.assertNotIn("save", self.threads.calls)

    def test_another_repository_is_asked_about(self) -> None:
        """
        Content in memory is a repository's only if ECR said so, like content on the disk.
        """
        self.read(self.config)
        self.read(self.by_digest)
        self.standin.push_blob("team/other", b"x")
        for path in (self.config, self.by_digest):
            self.assertEqual(404, self.get(path.replace("team/app", "team/other")).code)

    def test_a_tag_needs_ecr_and_no_disk(self) -> None:
        """
        An unchanged tag costs one HEAD, and no thread.
        """
        path = "/v2/team/app/manifests/latest"
        self.read(path)
        self.standin.forget_asked()
        for _ in range(3):
            self.assertWhole(self.get(path), self.image.manifest, "REVALIDATED")
        self.assertEqual(["HEAD"] * 3, [asked.method for asked in self.standin.asked])
        self.assertEqual([], self.threads.calls)
