"""
Several daemons on one cache directory: one of them fetches a blob, the clients of all get it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

from ecrproxy.cache.claim import Claim, claim_path
from ecrproxy.cache.kept_open import KEPT_SECONDS
from ecrproxy.cache.peer import PeerTransfer
from ecrproxy.cache.record import POLL_SECONDS, STALLED_SECONDS
from ecrproxy.oci import Digest
from ecrproxy.registry import race
from ecrproxy.settings.registry_table import Protocol, RegistryTable
from ecrproxy.threads import Disk
from ecrproxy.transfer.gaps import SMALLEST_PART
from ecrproxy.transfer.inflow import GATHER_SECONDS
from ecrproxy.transfer.unattended import SLOW_SECONDS
from tests.daemon import MIB, Daemon, Hands, Reply, at_once, noise
from tests.registry import StandIn
from tests.store_contract import failing
from tests.test_ranges import RangesTestCase

SIZE = 24 * MIB
DATA = noise("following", SIZE)
EACH = MIB


def opened() -> list[str]:
    """
    List the files that this process has open.
    """
    links = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the folder itself
            links.append(str(link.readlink()))
    return links


class FollowingTestCase(RangesTestCase):
    """
    Two daemons on one directory, and a blob of 24 MiB that comes over four connections.
    """

    def setUp(self) -> None:
        super().setUp()
        self.digest = self.standin.push_blob("team/app", DATA)
        self.path = f"/v2/team/app/blobs/{self.digest}"
        self.one, self.two = self.daemon, self.start()
        self.standin.hold(self.digest)

    def check_all(self) -> None:
        """
        Assert that once all transfers have ended, and the pool of open files has expired, no file of the directory is
        open.
        """
        super().check_all()
        self.clock.advance(KEPT_SECONDS)
        self.flush()
        if not any(daemon.pull_through.transfers() for daemon in self.daemons):
            self.assertEqual([], [path for path in opened() if path.startswith(str(self.root))])

    def ask(self, daemon: Daemon, path: str | None = None, **headers: str) -> Reply:
        reply = daemon.ask("GET", path or self.path, **headers)
        self.go_on()
        return reply

    def go_on(self, seconds: float = 0) -> None:
        """
        Advance the clock for all daemons, one look at a time.
        """
        for _ in range(1 + round(seconds / POLL_SECONDS)):
            for daemon in self.daemons:
                daemon.flush()
            self.clock.advance(POLL_SECONDS)
        for daemon in self.daemons:
            daemon.flush()

    def deliver(self, count: int = EACH) -> None:
        self.standin.deliver(self.digest, count)
        self.go_on()

    def release(self) -> None:
        self.standin.release(self.digest)
        self.go_on(0.1)

    def both(self) -> tuple[Reply, Reply]:
        """
        Have a client of each daemon send a request, and deliver the first megabytes.
        """
        replies = self.ask(self.one), self.ask(self.two)
        self.deliver()
        return replies

    def kill(self, daemon: Daemon) -> None:
        daemon.kill()
        self.daemons.remove(daemon)


class TogetherTests(FollowingTestCase):
    def test_each_byte_comes_once(self) -> None:
        """
        The second daemon's client has its bytes as they arrive, and its answer once they are verified.
        """
        first, second = self.both()
        self.assertEqual((200, SIZE, EACH, "JOINED"), (second.code, second.length, len(second.body), second.cache))
        self.release()
        self.assertWhole(first, DATA, "MISS")
        self.assertWhole(second, DATA, "JOINED")
        self.assertEqual((SIZE, []), (self.standin.bytes_sent, self.arriving()))
        for daemon in (self.one, self.two):
            self.assertEqual([], daemon.pull_through.transfers())
            self.assertWhole(self.ask(daemon), DATA, "HIT")

    def test_so_it_is_with_any_number_of_daemons_and_clients(self) -> None:
        more = [self.start() for _ in range(3)]
        replies = [self.ask(daemon) for daemon in (self.one, self.two, *more) for _ in range(3)]
        self.deliver()
        self.release()
        for reply in replies:
            self.assertWhole(reply, DATA)
        self.assertEqual(SIZE, self.standin.bytes_sent)

    def test_small_blobs_come_once_as_well(self) -> None:
        for size in (0, 1, 1000, MIB - 1):
            data = noise("small", size)
            digest = self.standin.push_blob("team/app", data)
            self.standin.hold(digest)
            self.standin.forget_asked()
            replies = [self.ask(daemon, f"/v2/team/app/blobs/{digest}") for daemon in (self.one, self.two)]
            self.standin.release(digest)
            self.go_on(0.1)
            for reply in replies:
                self.assertWhole(reply, data)
            self.assertEqual(size, self.standin.bytes_sent)

    def test_another_repository_is_confirmed_first(self) -> None:
        """
        What another process fetches is for no repository that does not have it.
        """
        self.ask(self.one)
        self.deliver()
        self.standin.push_blob("team/other", b"something else")
        self.assertRefused(self.ask(self.two, self.path.replace("app", "other")), 404, "BLOB_UNKNOWN")
        self.standin.push_blob("team/third", DATA)
        reply = self.ask(self.two, self.path.replace("app", "third"))
        self.assertEqual("JOINED", reply.cache)
        self.release()
        self.assertWhole(reply, DATA)
        self.assertEqual(SIZE, self.standin.bytes_sent)

    def test_clients_that_leave_end_nothing(self) -> None:
        first, second = self.both()
        second.leave()
        self.go_on()
        self.assertEqual([], self.two.pull_through.transfers())
        again = self.ask(self.two)
        first.leave()
        self.release()
        self.assertWhole(again, DATA, "JOINED")
        self.assertEqual(SIZE, self.standin.bytes_sent)

    def test_what_is_being_sent_is_not_evicted_by_the_other(self) -> None:
        first, second = self.both()
        second.stop_reading()
        self.release()
        self.assertWhole(first, DATA)
        self.assertFalse(self.one.store.evict_unused([Digest.parse(self.digest)]))
        second.read_on()
        self.go_on()
        self.assertWhole(second, DATA)
        self.assertTrue(self.one.store.evict_unused([Digest.parse(self.digest)]))


class PartsTests(FollowingTestCase):
    """
    Ranges of what another process fetches.
    """

    def part(self, start: int, stop: int) -> Reply:
        return self.ask(self.two, Range=f"bytes={start}-{stop - 1}")

    def setUp(self) -> None:
        super().setUp()
        self.whole = self.ask(self.one)
        self.deliver()
        self.standin.forget_asked()

    def test_that_are_there_are_sent_at_once(self) -> None:
        for start, stop in ((0, 1000), (1000, EACH), (SMALLEST_PART, SMALLEST_PART + EACH)):
            self.assertWhole(self.part(start, stop), DATA[start:stop], "JOINED", 206)
        self.assertEqual(0, self.standin.bytes_sent)

    def test_that_come_next_are_waited_for(self) -> None:
        reply = self.part(EACH, 2 * EACH)
        self.assertEqual((206, 0, "JOINED"), (reply.code, len(reply.body), reply.cache))
        self.deliver()
        self.assertWhole(reply, DATA[EACH : 2 * EACH], code=206)

    def test_that_are_far_off_are_asked_for_alone(self) -> None:
        """
        The other process can't be told to hurry: these bytes come twice, without a wait.
        """
        self.standin.release(self.digest)  # for requests from now on
        self.standin.hold(self.digest)
        reply = self.part(SIZE - 1000, SIZE)
        self.standin.deliver(self.digest, 1000)
        self.go_on()
        self.assertWhole(reply, DATA[-1000:], "BYPASS", 206)


class FailureTests(FollowingTestCase):
    def test_a_writer_that_is_killed_is_succeeded(self) -> None:
        """
        No client of the other daemon notices; no byte is fetched again.
        """
        _, second = self.both()
        self.kill(self.one)
        self.go_on(0.1)
        self.assertEqual("", second.ended)
        self.release()
        self.assertWhole(second, DATA, "JOINED")
        self.assertEqual((SIZE, []), (self.standin.bytes_sent, self.arriving()))
        self.assertWhole(self.ask(self.two), DATA, "HIT")
        self.assertEqual(0, self.two.store.index.totals.arriving)

    def test_a_writer_of_nothing_that_is_killed_is_succeeded(self) -> None:
        """
        An empty blob has no byte that is missing: there is nothing to resume.
        """
        digest = self.standin.push_blob("team/app", b"")
        claim = self.one.store.claim(Digest.parse(digest))
        assert isinstance(claim, Claim)
        writer = self.one.store.writer(claim, Digest.parse(digest), 0)
        reply = self.ask(self.two, f"/v2/team/app/blobs/{digest}")
        writer.close()
        self.go_on(0.1)
        self.assertWhole(reply, b"", "JOINED")
        self.assertWhole(self.ask(self.two, f"/v2/team/app/blobs/{digest}"), b"", "MISS")
        self.assertTrue(self.has(digest))

    def test_a_successor_whose_clients_have_left_meanwhile_is_watched(self) -> None:
        """
        It goes on for the cache, and stops if it trickles.
        """
        hands = Hands()
        two = self.start(disk=Disk(at_once, hands, at_once, at_once, at_once, at_once))
        self.ask(self.one)
        reply = self.ask(two)
        self.deliver()
        hands.idle = False
        self.kill(self.one)
        self.go_on(0.1)
        self.assertEqual(1, len(hands.waiting))
        reply.leave()
        self.go_on()
        hands.work_off()
        hands.idle = True
        self.go_on()
        self.assertEqual(1, len(two.pull_through.transfers()))
        for _ in range(12):
            self.clock.advance(SLOW_SECONDS / 4)
            self.deliver(5000)
        self.assertEqual([], two.pull_through.transfers())

    def test_one_of_the_others_succeeds_and_is_followed(self) -> None:
        three = self.start()
        _, second = self.both()
        third = self.ask(three)
        self.kill(self.one)
        self.go_on(0.1)
        self.deliver()
        self.kill(self.two if not self.elsewhere(self.two) else three)
        self.go_on(0.1)
        self.release()
        wholes = [reply for reply in (second, third) if reply.ended == "whole"]
        self.assertEqual(1, len(wholes))
        self.assertWhole(wholes[0], DATA, "JOINED")
        self.assertEqual(SIZE, self.standin.bytes_sent)

    def elsewhere(self, daemon: Daemon) -> bool:
        (download,) = daemon.pull_through.transfers()
        return download.elsewhere

    def test_a_disk_that_fails_its_successor_costs_the_clients_nothing(self) -> None:
        """
        What it had taken over, and not yet hashed, is fetched again for the hash; clients that have it already wait.
        """
        _, second = self.both()
        self.kill(self.one)
        self.patch(os, "pwrite", failing(errno.EIO))
        self.go_on(0.1)
        self.release()
        self.assertWhole(second, DATA, "JOINED")
        self.assertFalse(self.has(self.digest))

    def test_upstream_that_fails_its_successor_is_an_abort(self) -> None:
        _, second = self.both()
        self.standin.fail("registry", status=404)
        self.kill(self.one)
        self.go_on(0.1)
        self.assertBroken(second, DATA)
        self.assertEqual(([], 1), (self.two.pull_through.transfers(), len(self.arriving())))
        self.standin.heal()
        self.standin.release(self.digest)
        self.assertWhole(self.ask(self.two), DATA, "MISS")

    def test_another_registry_whose_client_follows_too_gives_what_is_missing(self) -> None:
        """
        If the registry that was asked first does not give the blob to the successor.
        """
        ((table, other),) = self.others("us")
        two = self.start(others={table: other})
        self.ask(self.one)
        replies = self.ask(two), self.ask(two, self.path.replace("/v2/", "/v2/us/"))
        self.deliver()
        self.standin.fail("registry", status=404)
        self.kill(self.one)
        self.go_on(0.1)
        for reply in replies:
            self.assertWhole(reply, DATA, "JOINED")
        self.assertEqual(SIZE - 4 * EACH, other.bytes_sent)

    def test_so_does_one_whose_client_comes_while_the_others_are_asked(self) -> None:
        (first, failing_one), (second, other) = self.others("us", "eu")
        two = self.start(others={first: failing_one, second: other})
        self.ask(self.one)
        replies = [self.ask(two), self.ask(two, self.path.replace("/v2/", "/v2/us/"))]
        self.deliver()
        self.standin.fail("registry", status=404)
        failing_one.fail("registry", status=404)
        failing_one.quirks.latency = 1
        self.kill(self.one)
        self.go_on(0.1)
        replies.append(self.ask(two, self.path.replace("/v2/", "/v2/eu/")))
        self.go_on(2)
        for reply in replies:
            self.assertWhole(reply, DATA, "JOINED")
        self.assertEqual(SIZE - 4 * EACH, other.bytes_sent)

    def test_a_registry_that_is_silent_keeps_its_successor_no_longer_than_another_one_takes(self) -> None:
        """
        The others are asked, too, after the same time as for a first request.
        """
        ((table, other),) = self.others("us")
        two = self.start(others={table: other})
        self.ask(self.one)
        replies = self.ask(two), self.ask(two, self.path.replace("/v2/", "/v2/us/"))
        self.deliver()
        self.standin.hang("bucket")
        self.kill(self.one)
        self.go_on(race.SLOW_SECONDS + 1)
        for reply in replies:
            self.assertWhole(reply, DATA, "JOINED")
        self.assertEqual(SIZE - 4 * EACH, other.bytes_sent)

    def test_one_whose_client_comes_to_wait_for_a_silent_one_is_asked_at_once(self) -> None:
        ((table, other),) = self.others("us")
        two = self.start(others={table: other})
        self.ask(self.one)
        replies = [self.ask(two)]
        self.deliver()
        self.standin.hang("registry")
        self.kill(self.one)
        self.go_on(race.SLOW_SECONDS + 1)
        replies.append(self.ask(two, self.path.replace("/v2/", "/v2/us/")))
        self.go_on(0.5)
        for reply in replies:
            self.assertWhole(reply, DATA, "JOINED")

    def others(self, *prefixes: str) -> list[tuple[RegistryTable, StandIn]]:
        """
        Return other registries that have the blob, too.
        """
        made = []
        for number, prefix in enumerate(prefixes, 4):
            name, region = f"{str(number) * 12}.dkr.ecr.{prefix}-east-1.amazonaws.com", f"{prefix}-east-1"
            bucket = f"https://prod-{region}-starport-layer-bucket.s3.{region}.amazonaws.com"
            standin = StandIn(self.clock, registry=f"https://{name}", bucket=bucket)
            standin.push_blob("team/app", DATA)
            table = RegistryTable(
                name=name, protocol=Protocol.ECR, endpoint=f"https://{name}", region=region, path_prefix=prefix
            )
            made.append((table, standin))
        return made

    def test_wrong_bytes_complete_no_answer(self) -> None:
        self.standin.corrupt(self.digest, DATA[:-1] + b"?")
        first, second = self.both()
        self.release()
        self.assertBroken(first, DATA)
        self.assertBroken(second, DATA)
        self.assertEqual([], self.arriving())
        self.standin.heal()
        self.assertWhole(self.ask(self.two), DATA, "MISS")

    def test_a_disk_that_fails_its_writer_costs_the_others_a_transfer(self) -> None:
        """
        They resume from what is there, and get all of it.
        """
        first, second = self.both()
        pwrite = os.pwrite
        self.patch(os, "pwrite", failing(errno.EIO))
        self.deliver()
        self.go_on(GATHER_SECONDS)
        self.patch(os, "pwrite", pwrite)
        self.go_on(0.1)
        self.release()
        self.assertWhole(first, DATA)
        self.assertWhole(second, DATA)
        self.assertLess(self.standin.bytes_sent, 2.3 * SIZE)
        self.assertFalse(self.has(self.digest))

    def test_a_record_and_bytes_that_can_not_be_read_cost_the_others_a_transfer(self) -> None:
        """
        All of it is fetched again, for the hash; the client waits until its position is reached.
        """
        first, second = self.both()
        for what in ("look", "hash"):
            self.patch(PeerTransfer, what, failing(errno.EIO))
        self.go_on(0.1)
        self.release()
        self.assertWhole(first, DATA, "MISS")
        self.assertWhole(second, DATA, "JOINED")
        self.assertEqual(2 * SIZE, self.standin.bytes_sent)

    def test_a_writer_that_gets_no_further_is_left_alone(self) -> None:
        """
        Its lock is not broken. The rest is fetched without caching it.
        """
        first, second = self.both()
        before = self.standin.bytes_sent
        self.go_on(STALLED_SECONDS + 1)
        self.assertEqual(5, self.standin.held(self.digest))
        self.release()
        self.assertWhole(first, DATA)
        self.assertWhole(second, DATA)
        self.assertEqual(before + 2 * SIZE - 5 * EACH, self.standin.bytes_sent)
        self.assertTrue(self.has(self.digest))

    def test_a_writer_to_which_a_byte_comes_now_and_then_is_left_alone(self) -> None:
        """
        Like a bucket that sends less than 1 KiB within its time. Its own timeout may be longer.
        """
        first, second = self.both()
        for _ in range(round(STALLED_SECONDS) + 1):
            self.standin.deliver(self.digest, 4)
            self.go_on(1)
        self.assertTrue([each for each in self.two.pull_through.transfers() if not each.elsewhere])
        self.release()
        self.assertWhole(second, DATA, "JOINED")
        self.assertWhole(first, DATA, "MISS")

    def test_a_writer_that_is_slow_is_followed(self) -> None:
        first, second = self.both()
        for _ in range(2 * round(STALLED_SECONDS)):
            self.standin.deliver(self.digest, 1024)
            self.go_on(1)
        self.assertTrue(all(each.elsewhere for each in self.two.pull_through.transfers()))
        self.release()
        self.assertWhole(second, DATA, "JOINED")
        self.assertWhole(first, DATA, "MISS")
        self.assertEqual(SIZE, self.standin.bytes_sent)

    def test_a_claim_without_bytes_is_waited_for_and_then_passed_by(self) -> None:
        """
        A process asks ECR, and then is stopped.
        """
        claim = self.one.store.claim(Digest.parse(self.digest))
        assert isinstance(claim, Claim)
        look, looks = self.two.store.claim, list[Digest]()

        def count(digest: Digest) -> Any:
            looks.append(digest)
            return look(digest)

        self.patch(self.two.store, "claim", count)
        reply = self.ask(self.two)
        self.assertEqual(0, self.standin.held(self.digest))
        self.go_on(1.2 * STALLED_SECONDS)
        self.assertLess(len(looks), 60)  # many may wait for a slow ECR
        self.assertEqual(1, self.standin.held(self.digest))
        self.release()
        self.assertWhole(reply, DATA, "BYPASS")
        claim.end()

    def test_a_claim_that_is_let_go_is_taken(self) -> None:
        """
        Its holder found that ECR doesn't return the blob.
        """
        claim = self.one.store.claim(Digest.parse(self.digest))
        assert isinstance(claim, Claim)
        reply = self.ask(self.two)
        self.one.store.arriving.let_go(claim)
        self.go_on(0.1)
        self.release()
        self.assertWhole(reply, DATA, "MISS")

    def test_a_file_that_somebody_removes_is_gone_on_without(self) -> None:
        first, second = self.both()
        for path in self.arriving():
            path.unlink()
            claim_path(path).unlink()
        self.go_on(0.1)
        self.release()
        self.assertWhole(first, DATA)
        self.assertWhole(second, DATA)

    def test_a_machine_that_was_started_anew_shows_nothing_unhashed(self) -> None:
        self.both()
        self.kill(self.one)
        self.kill(self.two)
        three = self.start()
        three.store.arriving.directory.boot = b"another".ljust(16)
        reply = self.ask(three, Range=f"bytes={SMALLEST_PART}-{SMALLEST_PART + 1000}")
        self.assertEqual((206, 0), (reply.code, len(reply.body)))
        self.release()
        self.assertWhole(reply, DATA[SMALLEST_PART : SMALLEST_PART + 1001], code=206)


class KeptManifestTests(FollowingTestCase):
    def test_one_process_stores_a_manifest(self) -> None:
        """
        The other serves it too, and knows what it lists.
        """
        digest = self.standin.push_image("team/app", "latest", layers=[b"layer"]).digest
        claim = self.one.store.claim(Digest.parse(digest))
        assert isinstance(claim, Claim)
        reply = self.ask(self.two, f"/v2/team/app/manifests/{digest}")
        self.assertEqual((200, "MISS"), (reply.code, reply.cache))
        claim.end()
