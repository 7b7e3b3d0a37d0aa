"""
A disk that is slow or hangs delays what needs it, and nothing else.
"""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred, fail

from ecrproxy.cache import write_behind, writer
from ecrproxy.cached import stored_manifests
from ecrproxy.threads import Bounded, Disk, patient
from ecrproxy.transfer import file_backed
from ecrproxy.transfer.unattended import MOST
from tests.daemon import DaemonTestCase, Hands, Reply, at_once, noise

SECONDS = 10.0
KINDS = ("reading", "writing", "committing", "hashing", "digesting", "closing")


class DiskTestCase(DaemonTestCase):
    """
    A daemon with an image in the cache and another one at ECR, whose disk does what tests say.
    """

    def setUp(self) -> None:
        super().setUp()
        self.cached = self.standin.push_image("team/app", "cached")
        self.blob = noise("cached", 300_000)
        self.pulled = self.path(self.standin.push_blob("team/app", self.blob))
        self.get("/v2/team/app/manifests/cached")
        self.get(self.pulled)
        self.config = self.path(self.cached.config)
        self.get(self.config)
        self.new = self.standin.push_image("team/app", "new")
        self.data = noise("new", 3_000_000)
        self.unknown = self.path(self.standin.push_blob("team/app", self.data))

    @staticmethod
    def path(digest: str) -> str:
        return f"/v2/team/app/blobs/{digest}"

    def manifest(self, digest: str) -> str:
        return f"/v2/team/app/manifests/{digest}"

    def bounded(self, hands: Hands, size: int = 8) -> Callable[..., Deferred[Any]]:
        """
        Return threads that work when told to, and have a timeout.
        """
        hands.idle = False
        return Bounded(hands, size, SECONDS, self.clock)


class BrokenTests(DiskTestCase):
    def test_a_claim_is_let_go_where_its_file_is_never_begun(self) -> None:
        """
        All threads hang while the file waits for one: the claim is not left to the garbage collector.
        """
        hands = Hands()
        disk = Disk(**{**dict.fromkeys(KINDS, at_once), "writing": self.bounded(hands, 1)})
        hands.idle = True
        self.start(disk=disk)
        hands.idle = False
        other = self.path(self.standin.push_blob("team/app", noise("other", 3_000_000)))
        gc.disable()
        self.addCleanup(gc.enable)
        replies = [self.daemon.send("GET", path) for path in (self.unknown, other)]
        self.flush()
        hands.work()
        self.flush()
        self.clock.advance(SECONDS)
        self.flush()
        self.assertEqual([], self.files("arriving"))
        for reply, data in zip(replies, (self.data, noise("other", 3_000_000)), strict=True):
            self.assertWhole(reply, data, "BYPASS")
        hands.work_off()

    def test_what_a_tag_leads_to_is_written_once_that_can_be(self) -> None:
        """
        However often the tag is requested meanwhile: otherwise the previous image would be served when ECR is silent.
        """

        def writing(blocking: Callable[..., Any], *args: Any) -> Deferred[Any]:
            return fail(TimeoutError(errno.ETIMEDOUT, "")) if hangs else at_once(blocking, *args)

        for broken in ("a disk that hangs", "an index for which too much waits"):
            hangs = False
            self.start(disk=Disk(**{**dict.fromkeys(KINDS, at_once), "writing": writing}))
            path = "/v2/team/app/manifests/cached"
            self.standin.push_image("team/app", "cached", layers=[])
            self.get(path)
            self.pass_time(100)
            moved = self.standin.push_image("team/app", "cached")
            self.get(self.manifest(moved.digest))
            hangs = broken == "a disk that hangs"
            patch = self.patch(write_behind, "LATE_ENTRIES", write_behind.LATE_ENTRIES if hangs else 0)
            self.assertWhole(self.get(path), moved.manifest)
            hangs = False
            patch.restore()
            for _ in range(8):
                self.pass_time(10)
                self.assertWhole(self.get(path), moved.manifest, "REVALIDATED")
            self.standin.refuse("registry")
            self.assertWhole(self.get(path), moved.manifest, "STALE")
            self.standin.heal()

    def test_a_tag_that_ecr_has_not_is_forgotten_though_the_disk_hangs(self) -> None:
        """
        It is not served when ECR is silent, once the disk answers again.
        """

        def writing(blocking: Callable[..., Any], *args: Any) -> Deferred[Any]:
            return fail(TimeoutError(errno.ETIMEDOUT, "")) if hangs else at_once(blocking, *args)

        hangs = False
        self.start(disk=Disk(**{**dict.fromkeys(KINDS, at_once), "writing": writing}))
        path = "/v2/team/app/manifests/cached"
        self.get(path)
        self.standin.delete_tag("team/app", "cached")
        hangs = True
        self.assertEqual(404, self.get(path).code)
        hangs = False
        self.standin.refuse("registry")
        self.assertRefused(self.get(path), 502, "UNAVAILABLE")
        self.pass_time(2)
        self.assertRefused(self.get(path), 502, "UNAVAILABLE")

    def test_a_tag_that_ecr_has_not_is_forgotten_though_it_cannot_be_read_what_is_known_of_it(self) -> None:
        """
        As after a start, when it is not in memory.
        """

        def reading(blocking: Callable[..., Any], *args: Any) -> Deferred[Any]:
            return fail(TimeoutError(errno.ETIMEDOUT, "")) if hangs else at_once(blocking, *args)

        hangs = False
        self.start(disk=Disk(**{**dict.fromkeys(KINDS, at_once), "reading": reading}))
        self.standin.delete_tag("team/app", "cached")
        hangs = True
        self.assertEqual(404, self.get("/v2/team/app/manifests/cached").code)
        hangs = False
        self.standin.refuse("registry")
        self.assertRefused(self.get("/v2/team/app/manifests/cached"), 502, "UNAVAILABLE")

    def test_what_a_slow_disk_could_not_give_in_time_it_gives_where_upstream_gives_nothing(self) -> None:
        """
        The disk is read again before a client is refused cached content.
        """

        def reading(blocking: Callable[..., Any], *args: Any) -> Deferred[Any]:
            return at_once(blocking, *args) if self.standin.asked else fail(TimeoutError(errno.ETIMEDOUT, ""))

        for method, path, right in (
            ("GET", self.pulled, self.blob),
            ("HEAD", self.pulled, self.blob),
            ("GET", self.manifest(self.cached.digest), self.cached.manifest),
            ("HEAD", self.manifest(self.cached.digest), self.cached.manifest),
        ):
            self.standin.heal()
            self.start(disk=Disk(**{**dict.fromkeys(KINDS, at_once), "reading": reading}))
            self.standin.forget_asked()
            self.standin.fail("registry", status=503)
            reply = self.daemon.ask(method, path)
            self.assertEqual((200, "HIT"), (reply.code, reply.header("X-Cache-Status")), (method, path))
            self.assertEqual(right if method == "GET" else b"", reply.body)

    def test_where_the_disk_gives_nothing_either_a_client_is_told_what_upstream_has_said(self) -> None:
        """
        The disk is read twice, and a refusal is no reason for that.
        """

        def reading(blocking: Callable[..., Any], *args: Any) -> Deferred[Any]:
            return fail(TimeoutError(errno.ETIMEDOUT, ""))

        for method, path in (("GET", self.pulled), ("HEAD", self.pulled), ("GET", self.manifest(self.cached.digest))):
            for fails, status in ((partial(self.standin.fail, "registry", status=500), 502), (self.standin.deny, 403)):
                self.standin.heal()
                self.start(disk=Disk(**{**dict.fromkeys(KINDS, at_once), "reading": reading}))
                fails()
                self.assertEqual(status, self.daemon.ask(method, path).code, (method, path))

    def test_a_tag_that_many_ask_for_is_written_once_or_twice(self) -> None:
        """
        Not once for each request: later writes would wait for all of that.
        """
        for broken in (False, True):
            tried, hands = list[object](), Hands()

            def writing(blocking: Callable[..., Any], *args: Any) -> Deferred[Any]:
                tried.append(args)  # noqa: B023 (called before the next turn)
                return fail(TimeoutError(errno.ETIMEDOUT, "")) if broken else at_once(blocking, *args)  # noqa: B023

            kinds: dict[str, Any] = {**dict.fromkeys(KINDS, at_once), "reading": hands, "writing": writing}
            self.start(disk=Disk(**kinds))
            hands.idle = False
            replies = [
                self.daemon.send("GET", f"/v2/team/app/manifests/{'cached' if broken else 'new'}") for _ in "x" * 50
            ]
            for _ in range(5):
                self.flush()
                hands.work_off()
            self.assertEqual({200}, {each.code for each in replies})
            self.assertLess(len(tried), 5)

    def test_a_file_that_cannot_be_made_leaves_neither_a_connection_nor_a_promise(self) -> None:
        """
        Whatever the reason, such as that no thread can be started. The bucket's headers have arrived by then.
        """

        for size in (500_000, 3_000_000):
            digest = self.standin.push_blob("team/app", noise(f"broken {size}", size))

            def fail(blocking: Callable[..., Any], *args: Any, digest: str = digest) -> Deferred[Any]:
                if self.standin.requests("bucket", "GET", digest):
                    raise MemoryError
                return at_once(blocking, *args)

            self.start(disk=Disk(**{**dict.fromkeys(KINDS, at_once), "writing": fail}))
            self.daemon.janitor._in_thread = at_once  # noqa: SLF001 (without room the blob is passed through)
            before = self.promised()
            self.standin.hold(digest)
            self.assertEqual(500, self.get(self.path(digest)).code)
            self.flushLoggedErrors(MemoryError)
            self.assertEqual((0, before), (self.standin.held(digest), self.promised()))


class SlowTests(DiskTestCase):
    """
    One kind of work takes long.
    """

    def begin(self, **kinds: Callable[..., Deferred[Any]]) -> None:
        usual = dict.fromkeys(KINDS, at_once)
        self.start(disk=Disk(**{**usual, **kinds}))

    def test_a_hit_does_not_wait_for_commits(self) -> None:
        hands = Hands()
        self.begin(committing=self.bounded(hands))
        for number in range(8):
            data = noise(str(number), 100_000)
            self.assertWhole(self.get(self.path(self.standin.push_blob("team/app", data))), data, "MISS")
        self.assertEqual(8, len(hands.waiting))
        self.assertWhole(self.get(self.pulled), self.blob, "HIT")
        self.assertWhole(self.get(self.unknown), self.data, "MISS")
        hands.work_off()
        self.assertWhole(self.get(self.unknown), self.data, "HIT")

    def test_what_is_verified_does_not_wait_for_commits(self) -> None:
        """
        However many files wait for one, and though none of them has a reader for now.
        """
        hands = Hands()
        self.begin(committing=self.bounded(hands))
        blobs = [noise(f"verified {number}", 2**21) for number in range(2 * MOST)]
        digests = [self.standin.push_blob("team/app", data) for data in blobs]
        for digest, data in zip(digests, blobs, strict=True):
            self.standin.hold(digest)
            reply = self.get(self.path(digest))
            self.arrive(digest, len(data) - 1000)  # the last bytes come by themselves
            self.standin.release(digest)
            self.flush()
            self.assertWhole(reply, data, "MISS")
        self.assertEqual(len(blobs), len(hands.waiting))
        for digest, data in zip(digests, blobs, strict=True):
            self.assertWhole(self.get(self.path(digest)), data, "JOINED")
        hands.work_off()
        self.flush()
        for digest, data in zip(digests, blobs, strict=True):
            self.assertWhole(self.get(self.path(digest)), data, "HIT")

    def test_many_who_miss_do_not_wait_for_each_other_at_the_disk(self) -> None:
        """
        Each call returns in time, but each waits for all before it: after a long wait a request does without the disk.
        """
        hands = Hands()
        threads = self.bounded(hands, 1)
        hands.idle = True
        self.begin(writing=threads)
        hands.idle = False
        data = [noise(f"miss {number}", 100_000) for number in range(3)]
        replies = [self.daemon.send("GET", self.path(self.standin.push_blob("team/app", each))) for each in data]
        self.flush()
        self.clock.advance(SECONDS - 1)
        hands.work()
        self.flush()
        self.clock.advance(1)
        self.flush()
        self.assertWhole(replies[2], data[2], "BYPASS")
        while hands.waiting:
            hands.work()
            self.flush()
        for reply, each in zip(replies[:2], data, strict=False):
            self.assertWhole(reply, each, "MISS")

    def test_responses_and_files_under_way_wait_for_a_thread(self) -> None:
        there, new = ([self.path(self.standin.push_blob("team/app", noise(a + b, 2**20))) for b in "123"] for a in "ab")
        for path in there:
            self.get(path)
        for kind, paths, cache in (("reading", there, "HIT"), ("hashing", there, "HIT"), ("committing", new, "MISS")):
            hands = Hands()
            threads = self.bounded(hands, 1)
            self.begin(**{kind: threads if kind == "reading" else patient(threads)})
            replies = [self.daemon.send("GET", path) for path in paths]
            self.flush()
            for _ in paths if kind == "reading" else ():  # the look-ups
                hands.work()
                self.flush()
            while hands.waiting:
                self.clock.advance(SECONDS - 1)
                hands.work()
                self.flush()
            self.assertEqual(
                [(200, cache, "whole")] * 3, [(each.code, each.cache, each.ended) for each in replies], kind
            )
            hands.idle = True
            self.assertEqual(["HIT"] * 3, [self.get(path).cache for path in paths], kind)

    def test_a_large_file_is_flushed_a_piece_at_a_time(self) -> None:
        """
        However long all of it takes: no call does more than fits its time.
        """
        hands = Hands()
        self.patch(file_backed, "PIECE", 2**20)
        self.begin(committing=self.bounded(hands))
        self.assertWhole(self.get(self.unknown), self.data, "MISS")
        for _ in range(3):
            self.assertFalse(self.has(self.unknown.rpartition("/")[2]))
            self.pass_time(SECONDS - 1)
            hands.work()
            self.flush()
        self.assertEqual(1, len(hands.waiting))
        hands.work()
        self.assertWhole(self.get(self.unknown), self.data, "HIT")

    def test_a_large_file_that_can_not_be_flushed_is_not_kept(self) -> None:
        def fail(fd: int, start: int, size: int) -> None:
            raise OSError(errno.EIO, f"{size} bytes of {fd} from {start} on")

        self.patch(file_backed, "PIECE", 2**20)
        self.patch(writer, "write_back", fail)
        self.begin()
        self.assertWhole(self.get(self.unknown), self.data, "MISS")
        self.assertFalse(self.has(self.unknown.rpartition("/")[2]))
        self.assertEqual(0, self.promised())

    def test_a_hit_does_not_wait_for_what_is_written(self) -> None:
        hands = Hands()
        self.begin(writing=self.bounded(hands))
        waiting = [self.get(self.path(self.standin.push_blob("team/app", noise(str(n), 100_000)))) for n in range(20)]
        self.assertWhole(self.get(self.pulled), self.blob, "HIT")
        while hands.waiting:
            hands.work()
            self.flush()
        self.assertEqual({200}, {reply.code for reply in waiting})

    def test_a_hit_does_not_wait_for_files_that_are_hashed(self) -> None:
        hands = Hands()
        self.begin(hashing=self.bounded(hands))
        first = self.get(self.pulled)  # it waits for its last byte
        self.assertEqual(self.blob[:-1], first.body)
        self.assertWhole(self.get(self.manifest(self.cached.digest)), self.cached.manifest, "HIT")
        self.assertEqual("HIT", self.get(self.config).cache)
        hands.work_off()
        self.flush()
        self.assertWhole(first, self.blob, "HIT")

    def test_a_manifest_is_sent_before_it_is_stored(self) -> None:
        hands = Hands()
        self.begin(writing=self.bounded(hands), committing=self.bounded(hands))
        self.assertWhole(self.get("/v2/team/app/manifests/new"), self.new.manifest, "MISS")
        asked = self.standin.count()
        self.assertWhole(self.get(self.manifest(self.new.digest)), self.new.manifest, "HIT")
        self.assertEqual(asked, self.standin.count())
        hands.work_off()
        self.start()
        self.assertWhole(self.get(self.manifest(self.new.digest)), self.new.manifest, "HIT")

    def test_what_a_manifest_lists_is_known_before_it_is_stored(self) -> None:
        hands = Hands()
        self.get(self.path(self.new.config))  # another repository's, so to speak
        self.begin(writing=self.bounded(hands), committing=self.bounded(hands))
        self.get("/v2/team/app/manifests/new")
        asked = self.standin.count()
        self.assertEqual("HIT", self.get(self.path(self.new.config)).cache)
        self.assertEqual(asked, self.standin.count())

    def test_manifests_that_wait_for_the_disk_are_bounded_in_bytes(self) -> None:
        hands = Hands()
        self.begin(committing=self.bounded(hands), writing=at_once)
        self.patch(stored_manifests, "_STORING_BYTES", 10_000)
        for number in range(100):
            image = self.standin.push_image("team/app", f"tag{number}")
            self.assertWhole(self.get(f"/v2/team/app/manifests/tag{number}"), image.manifest, "MISS")
        self.assertLessEqual(self.daemon.cache.manifests._storing, 10_000)  # noqa: SLF001
        hands.work_off()
        self.assertEqual(0, self.daemon.cache.manifests._storing)  # noqa: SLF001
        self.assertEqual({}, self.daemon.cache.entries._unwritten)  # noqa: SLF001

    def test_what_they_list_is_bounded_with_them(self) -> None:
        """
        What is known of a layer takes nine times the bytes of its line in a manifest.
        """
        self.begin(committing=self.bounded(Hands()), writing=at_once)
        self.patch(stored_manifests, "_STORING_BYTES", 100_000)
        for number in range(50):
            layers = [b"%d of %d" % (each, number) for each in range(20)]
            self.standin.push_image("team/app", f"tag{number}", layers=layers)
            self.get(f"/v2/team/app/manifests/tag{number}")
        self.assertLess(0, len(self.daemon.cache.entries._unwritten))  # noqa: SLF001
        self.assertLessEqual(len(self.daemon.cache.entries._unwritten), 100)  # noqa: SLF001

    def test_a_tag_that_ecr_no_longer_has_is_not_served_as_last_known(self) -> None:
        hands = Hands()
        self.begin(writing=hands)
        path = "/v2/team/app/manifests/cached"
        self.get(path)
        hands.idle = False
        self.standin.delete_tag("team/app", "cached")
        reply = self.get(path)
        self.pass_time(2)
        self.assertRefused(reply, 404, "MANIFEST_UNKNOWN")
        hands.idle = True
        hands.work_off()
        self.standin.refuse("registry")
        self.assertRefused(self.get(path), 502, "UNAVAILABLE")

    def test_a_tag_that_went_is_not_served_as_last_known_while_it_is_still_being_written(self) -> None:
        hands, path = Hands(), "/v2/team/app/manifests/new"
        self.begin(writing=hands)
        hands.idle = False
        self.assertWhole(self.get(path), self.new.manifest)
        self.standin.delete_tag("team/app", "new")
        reply = self.get(path)
        self.pass_time(2)
        self.assertRefused(reply, 404, "MANIFEST_UNKNOWN")
        for _ in range(3):
            self.standin.refuse("registry")
            reply = self.get(path)
            self.pass_time(2)
            self.assertRefused(reply, 502, "UNAVAILABLE")
            self.standin.heal()
            hands.work(min(1, len(hands.waiting)))
            self.flush()
        hands.idle = True
        hands.work_off()
        self.standin.push_image("team/app", "new")
        self.assertEqual(200, self.get(path).code)
        self.standin.refuse("registry")
        self.assertEqual((200, "STALE"), ((reply := self.get(path)).code, reply.cache))


class JoiningTests(DiskTestCase):
    def test_who_joins_the_transfer_of_its_own_repository_asks_no_disk(self) -> None:
        """
        However slow the disk is: it knows only as much of the blob as the transfer does.
        """
        hands = Hands()
        self.start(disk=Disk(hands, *[at_once] * 5))
        digest = self.unknown.rpartition("/")[2]
        self.standin.hold(digest)
        first = self.daemon.send("GET", self.unknown)
        self.flush()
        hands.idle = False
        second = self.daemon.send("GET", self.unknown)
        self.flush()
        self.assertEqual(0, len(hands.waiting))
        hands.idle = True
        self.standin.release(digest)
        self.flush()
        self.assertWhole(first, self.data, "MISS")
        self.assertWhole(second, self.data, "JOINED")


class HungTests(DiskTestCase):
    """
    No disk call returns any longer.
    """

    def hang(self) -> Hands:
        hands = Hands()
        bounded = self.bounded(hands)
        self.start(disk=Disk(bounded, bounded, bounded, bounded, at_once, hands))
        return hands

    def patiently(self, path: str, **headers: str) -> Reply:
        """
        Send a request, and wait as long as it takes.
        """
        reply = self.get(path, **headers)
        for _ in range(120):
            if reply.ended:
                break
            self.pass_time(1)
        return reply

    def test_what_is_in_memory_needs_no_disk(self) -> None:
        hands, hangs = Hands(), False
        bounded = self.bounded(hands)

        def bounded_if_it_hangs(blocking: Callable[..., Any], *args: Any) -> Deferred[Any]:
            return (bounded if hangs else at_once)(blocking, *args)

        def in_hand_if_it_hangs(blocking: Callable[..., Any], *args: Any) -> Deferred[Any]:
            return (hands if hangs else at_once)(blocking, *args)

        kinds = {**dict.fromkeys(KINDS, bounded_if_it_hangs), "digesting": at_once, "closing": in_hand_if_it_hangs}
        self.start(disk=Disk(**kinds))
        self.get(self.manifest(self.cached.digest))
        self.get(self.config)
        hangs = True
        self.assertWhole(self.get(self.manifest(self.cached.digest)), self.cached.manifest, "HIT")
        self.assertEqual("HIT", self.get(self.config).cache)

    def test_an_image_is_pulled_all_the_same(self) -> None:
        self.hang()
        self.assertWhole(self.patiently("/v2/team/app/manifests/new"), self.new.manifest, "MISS")
        self.assertWhole(self.patiently(self.manifest(self.new.digest)), self.new.manifest, "HIT")
        self.assertEqual(200, self.patiently(self.path(self.new.config)).code)
        self.assertWhole(self.patiently(self.unknown), self.data, "BYPASS")

    def test_what_is_cached_is_pulled_too(self) -> None:
        self.hang()
        self.assertWhole(self.patiently("/v2/team/app/manifests/cached"), self.cached.manifest)
        self.assertWhole(self.patiently(self.pulled), self.blob)

    def test_what_is_cached_is_pulled_also_if_no_read_returns(self) -> None:
        """
        Threads that write still see that it is there. It is sent uncached.
        """
        hands = Hands()
        self.start(disk=Disk(self.bounded(hands), at_once, at_once, at_once, at_once, at_once))
        for _ in range(2):
            self.assertWhole(self.patiently(self.pulled), self.blob, "BYPASS")
            self.assertWhole(self.patiently(self.pulled, Range="bytes=7-2999"), self.blob[7:3000], "BYPASS", 206)
        self.assertTrue(self.has(self.pulled.rpartition("/")[2]))

    def test_what_is_cached_is_pulled_also_if_no_file_can_be_hashed(self) -> None:
        """
        A file of another size than announced has to be hashed.
        """
        digest = self.pulled.rpartition("/")[2]
        with self.file_of(digest).open("r+b") as file:
            file.truncate(1000)
        hands = Hands()
        self.start(disk=Disk(at_once, at_once, at_once, self.bounded(hands), at_once, at_once))
        self.assertWhole(self.patiently(self.pulled), self.blob, "BYPASS")
        self.file_of(digest).write_bytes(self.blob)

    def test_once_it_is_known_nobody_waits(self) -> None:
        self.hang()
        for _ in range(3):
            self.patiently(self.unknown)
        self.pass_time(SECONDS)
        self.assertWhole(self.get(self.unknown), self.data, "BYPASS")

    def test_a_disk_that_hangs_in_the_middle_of_a_transfer_costs_the_file(self) -> None:
        hands = Hands()
        bounded = self.bounded(hands)
        self.start(disk=Disk(at_once, bounded, bounded, bounded, at_once, hands))
        reply = self.get(self.unknown)
        for _ in range(3):  # leftovers, the file, the first bytes
            hands.work()
            self.flush()
        hands.work()
        for _ in range(60):
            self.pass_time(1)
        self.assertWhole(reply, self.data)

    def test_it_serves_from_the_disk_again_when_that_returns(self) -> None:
        hands = self.hang()
        self.patiently(self.unknown)
        hands.idle = True
        hands.work_off()
        self.flush()
        self.assertWhole(self.get(self.pulled), self.blob, "HIT")
        self.get(self.unknown)
        self.assertWhole(self.get(self.unknown), self.data, "HIT")
        self.assertEqual(0, self.promised())
        self.assertEqual([], [path for path in self.arriving() if path.is_file()])
