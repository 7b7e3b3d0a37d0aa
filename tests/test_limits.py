"""
Limits for clients, and what happens to those that exceed them.
"""

from __future__ import annotations

from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.access.limits import SPARE, Crowd, Limits, Patience, counted
from ecrproxy.http.closing import SETTLED_SECONDS, YIELD_SECONDS
from ecrproxy.shares import share
from ecrproxy.transfer.windowed import STUCK_SECONDS
from tests.daemon import MIB, DaemonTestCase, End, Raw, Reply, noise

GOOD = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"


class CountingTests(SynchronousTestCase):
    def test_addresses_are_counted_by_their_owner(self) -> None:
        """
        An IPv4 address counts by itself, also on a dual-stack socket; of IPv6 a whole /64 counts as one.
        """
        expected = {
            "192.0.2.7": "192.0.2.7",
            "::ffff:192.0.2.7": "192.0.2.7",
            "::ffff:c000:207": "192.0.2.7",
            "2001:db8:0:1::5": "2001:db8:0:1::/64",
            "2001:db8:0:1:ffff::6": "2001:db8:0:1::/64",
            "2001:db8:0:2::5": "2001:db8:0:2::/64",
            "fe80::1%eth0": "fe80::/64",
            "": "",
            "not:an:address": "not:an:address",
        }
        self.assertEqual(expected, {text: counted(text) for text in expected})

    def test_connections_have_two_limits(self) -> None:
        """
        One per address, one for all together; a closed connection makes room.
        """
        crowd = Crowd(Limits(connections=3, connections_per_address=2))
        self.assertEqual([True, True, False, True, False], [crowd.enter(each) for each in "aaabc"])
        crowd.leave("a")
        self.assertEqual([False, True], [crowd.enter("c") and crowd.enter("d"), crowd.connected == 3])
        self.assertEqual(1, crowd.refused_connections, "the others may be told of the daemon's health")
        for address in "abc":
            crowd.leave(address)
        self.assertEqual((0, 0), (crowd.connected, len(crowd._by_address)))  # noqa: SLF001

    def test_zero_is_no_limit(self) -> None:
        """
        Nor is a client without an address limited by it.
        """
        crowd = Crowd(Limits(connections=0, connections_per_address=0, transfers=0))
        self.assertTrue(all(crowd.enter("a") and crowd.begin_transfer() for _ in range(10_000)))
        self.assertTrue(all(Crowd(Limits(connections_per_address=1)).enter("") for _ in range(2)))

    def test_one_of_several_processes_has_its_part_and_a_quarter_of_it_more(self) -> None:
        """
        The kernel does not distribute connections evenly; unlimited settings stay so.
        """
        parts = [(each.connections, each.transfers) for each in map(Limits(transfers=0).share, (1, 2, 3, 8))]
        self.assertEqual([(10_000, 0), (6250, 0), (4167, 0), (1563, 0)], parts)
        self.assertEqual([1, 1, 1], [share(1, count) for count in (1, 2, 64)])

    def test_memory_of_answers_is_shared_by_the_processes(self) -> None:
        crowd = Crowd(Limits(), 4)
        self.assertEqual((True, True), (crowd.begin_transfer(), crowd.begin_transfer()))
        self.assertEqual((2, 8), (crowd.transferring, crowd.transferring_everywhere))

    def test_patience_ends_once(self) -> None:
        """
        It lasts from its latest start, and one that was ended, or is endless, never runs out.
        """
        clock, out = Clock(), list[float]()
        patience = Patience(clock.callLater, 10, lambda: out.append(clock.seconds()))
        patience.begin()
        clock.advance(9)
        patience.begin()
        clock.advance(9)
        self.assertTrue(patience.waiting)
        clock.advance(1)
        self.assertEqual(([19.0], False), (out, patience.waiting))
        patience.begin()
        patience.end()
        endless = Patience(clock.callLater, 0, lambda: out.append(0))
        endless.begin()
        self.assertEqual(([], False), (clock.getDelayedCalls(), endless.waiting))


class LimitTests(DaemonTestCase):
    """
    More clients than a limit allows.
    """

    def connect(self) -> tuple[Raw, End]:
        """
        Connect a client that stays.
        """
        client = Raw()
        wire = self.daemon.front.connect(client, "proxy.example", 80, secure=False)
        self.flush()
        return client, wire

    def test_a_connection_too_many_is_closed(self) -> None:
        """
        It is closed at once, existing ones are served, and a closed connection makes room.
        """
        self.start(limits=Limits(connections_per_address=2))
        several = [self.connect() for _ in range(3)]
        self.assertEqual([False, False, True], [client.closed for client, _ in several])
        for client, wire in several[:2]:
            wire.write(GOOD)
            self.flush()
            self.assertIn(b" 200 OK", bytes(client.got))
        several[0][1].abortConnection()
        self.flush()
        self.assertIn(b" 200 OK", self.daemon.raw(GOOD))
        self.assertEqual(1, self.daemon.crowd.refused_connections)

    def test_bytes_of_a_connection_too_many_are_not_read(self) -> None:
        """
        What it sent at once is no request.
        """
        self.start(limits=Limits(connections_per_address=1))
        self.connect()
        self.assertEqual(b"", self.daemon.raw(GOOD))

    def test_the_connection_that_is_idle_longest_makes_room(self) -> None:
        self.start(limits=Limits(connections=2))
        first, wire = self.connect()
        second, _ = self.connect()
        self.assertIn(b" 503 ", self.daemon.raw(GOOD), "both have just connected")
        self.pass_time(SETTLED_SECONDS)
        wire.write(GOOD)
        self.flush()
        with capturedLogs() as events:
            self.assertIn(b" 200 OK", self.daemon.raw(GOOD))
        self.assertEqual((False, True), (first.closed, second.closed))
        self.assertIsInstance(second.lost.value, ConnectionDone, "a reset would cut what the kernel has yet to send")
        self.assertEqual(1, sum("idle connections are closed first" in formatEvent(event) for event in events))

    def test_an_address_with_idle_connections_gets_another(self) -> None:
        """
        As for a cluster behind NAT, whose nodes keep unused connections. Those of others stay open.
        """
        self.start(limits=Limits(connections_per_address=2))
        usual, self.daemon.front.client = self.daemon.front.client, "192.0.2.9"
        other_client, other = self.connect()
        self.daemon.front.client = usual
        first, wire = self.connect()
        second, _ = self.connect()
        self.assertEqual(b"", self.daemon.raw(GOOD), "both have just connected")
        self.pass_time(SETTLED_SECONDS)
        wire.write(GOOD)
        self.flush()
        self.assertIn(b" 200 OK", self.daemon.raw(GOOD))
        self.assertEqual((False, True, False), (first.closed, second.closed, other_client.closed))
        other.write(GOOD)
        self.flush()
        self.assertIn(b" 200 OK", bytes(other_client.got))

    def test_an_idle_connection_whose_client_does_not_read_makes_room_too(self) -> None:
        self.start(limits=Limits(connections=1))
        stuck, wire = self.connect()
        wire.pauseProducing()
        wire.write(GOOD)
        self.flush()
        self.pass_time(SETTLED_SECONDS)
        self.assertIn(b" 200 OK", self.daemon.raw(GOOD))
        self.pass_time(2 * YIELD_SECONDS)
        self.assertEqual((False, b""), (wire.peer.connected, bytes(stuck.got)))

    def push(self, name: str = "half closed") -> str:
        """
        Add a blob, and the bytes of a request for it: C{ask}.
        """
        self.data = noise(name, 100_000)
        digest = str(self.standin.push_blob("team/app", self.data))
        self.ask = f"GET /v2/team/app/blobs/{digest} HTTP/1.1\r\nHost: proxy\r\n\r\n".encode()
        return digest

    def ask_and_half_close(self) -> Raw:
        """
        Connect a client that asks for what is not answered yet, and then sends nothing more.
        """
        client, wire = self.connect()
        wire.write(self.ask)
        wire.half_close()
        self.flush()
        return client

    def test_clients_that_have_left_make_room_though_nothing_tells_that_they_have(self) -> None:
        """
        A client that closes looks like one that half-closes until it is sent something: the oldest of both goes.
        """
        for limits in (Limits(connections=2), Limits(connections_per_address=2)):
            self.start(limits=limits)
            self.push(repr(limits))
            fault = self.standin.hang("bucket")
            first, second = self.ask_and_half_close(), self.ask_and_half_close()
            self.assertIn(b" 200 OK", self.daemon.raw(GOOD))
            self.assertEqual((True, False), (first.closed, second.closed))
            fault.remove()
            self.pass_time(6)
            self.assertTrue(second.got.endswith(self.data))
            self.assertEqual({}, self.daemon.crowd.half_closed)

    def test_one_that_has_half_closed_and_is_being_answered_keeps_its_place(self) -> None:
        self.start(limits=Limits(connections=1))
        digest = self.push()
        self.standin.hold(digest)
        client, wire = self.connect()
        wire.write(self.ask)
        self.arrive(digest, 50_000)
        wire.half_close()
        self.flush()
        self.assertIn(b" 503 ", self.daemon.raw(GOOD))
        self.standin.release(digest)
        self.flush()
        self.assertTrue(client.got.endswith(self.data))

    def test_one_that_has_half_closed_and_reads_the_end_of_its_response_keeps_its_place(self) -> None:
        self.start(limits=Limits(connections=1))
        self.push()
        client, wire = self.connect()
        wire.pauseProducing()
        wire.write(GOOD)
        wire.half_close()
        self.flush()
        self.assertIn(b" 503 ", self.daemon.raw(GOOD))
        wire.resumeProducing()
        self.flush()
        self.assertIn(b" 200 OK", bytes(client.got))

    def test_what_was_sent_before_is_not_cut_off(self) -> None:
        """
        A client whose second request is unanswered may still be reading the first response: a reset would discard it.
        """
        self.start(limits=Limits(connections=1))
        self.push()
        self.standin.hang("bucket")
        client, wire = self.connect()
        wire.pauseProducing()
        wire.write(GOOD + self.ask)
        wire.half_close()
        self.flush()
        self.assertIn(b" 200 OK", self.daemon.raw(GOOD))
        wire.resumeProducing()
        self.flush()
        self.assertIn(b" 200 OK", bytes(client.got))
        self.assertTrue(client.closed)
        self.assertIsInstance(client.lost.value, ConnectionDone)

    def test_health_is_told_though_all_connections_are_taken(self) -> None:
        """
        Other requests get 503 with Retry-After, and are closed; a silent connection is closed for the next.
        """
        self.start(limits=Limits(connections=2))
        busy = [self.connect() for _ in range(2)]
        for _, wire in busy:
            wire.write(GOOD[:20])
        self.flush()
        self.assertIn(b" 200 OK", self.daemon.raw(b"GET /healthz HTTP/1.1\r\nHost: proxy\r\n\r\n"))
        answer = self.daemon.raw(b"GET /v2/ HTTP/1.1\r\nHost: proxy\r\n\r\n")
        for part in (b" 503 ", b"Retry-After: 5", b"Connection: close", b"X-Cache-Reason: busy"):
            self.assertIn(part, answer)
        silent = [self.connect() for _ in range(SPARE + 1)]
        self.assertEqual([True] + [False] * SPARE, [client.closed for client, _ in silent])
        self.assertIn(b" 200 OK", self.daemon.raw(b"GET /readyz HTTP/1.1\r\nHost: proxy\r\n\r\n"))
        self.pass_time(11)
        self.assertTrue(all(client.closed for client, _ in silent))
        self.assertEqual({}, self.daemon.crowd.spare)

    def test_an_idle_connection_is_closed(self) -> None:
        """
        After 65 seconds without a request, at first or between two, and not before.
        """
        silent, _ = self.connect()
        asked, wire = self.connect()
        self.pass_time(30)
        wire.write(GOOD)
        self.flush()
        self.pass_time(34)
        self.assertEqual((False, False), (silent.closed, asked.closed))
        self.pass_time(2)
        self.assertEqual((True, False), (silent.closed, asked.closed))
        self.pass_time(31)
        self.assertTrue(asked.closed)
        self.assertEqual((2, 0), (self.daemon.crowd.idle, self.daemon.crowd.connected))

    def test_a_connection_has_one_timer_for_idleness_however_much_it_asks_and_none_when_it_is_lost(self) -> None:
        before = len(self.clock.getDelayedCalls())
        client, wire = self.connect()
        self.flush()
        timers = [len(self.clock.getDelayedCalls()) - before]
        for _ in range(3):
            wire.write(GOOD)
            self.flush()
            self.pass_time(1)
            timers.append(len(self.clock.getDelayedCalls()) - before)
        wire.abortConnection()
        self.flush()
        self.assertEqual([1, 1, 1, 1, 0], [*timers, len(self.clock.getDelayedCalls()) - before])
        self.assertTrue(client.closed)

    def test_a_connection_with_part_of_a_head_is_slow_and_not_idle_however_late_that_is_noticed(self) -> None:
        self.start(limits=Limits(header_seconds=65))
        client, wire = self.connect()
        wire.write(b"G")
        self.flush()
        self.clock.advance(100)
        self.flush()
        self.assertTrue(client.closed)
        self.assertEqual((1, 0), (self.daemon.crowd.slow_heads, self.daemon.crowd.idle))

    def test_a_first_line_has_its_time(self) -> None:
        """
        A client that never ends its first line, or another after a request, is closed, however busily it writes.
        """
        for before in (b"", GOOD, GOOD + b"GE"):
            client, wire = self.connect()
            wire.write(before)
            self.flush()
            for _ in range(10):
                wire.write(b"G")
                self.pass_time(1)
            self.pass_time(1)
            self.assertTrue(client.closed, before)
        self.assertEqual(3, self.daemon.crowd.slow_heads)

    def test_transfers_over_their_limit_are_told_to_come_again(self) -> None:
        """
        Up to the limit blobs are sent at once; another is 503 with Retry-After, and succeeds when retried.
        """
        self.start(limits=Limits(transfers=1))
        data = noise("x", MIB)
        path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data)}"
        slow = self.daemon.send("GET", path)
        slow.stop_reading()
        self.flush()
        refused = self.get(path)
        self.assertRefused(refused, 503, "UNAVAILABLE", "ask again")
        self.assertEqual("5", refused.header("Retry-After"))
        self.assertEqual(200, self.head(path).code)
        slow.read_on()
        self.flush()
        self.assertWhole(slow, data)
        self.assertWhole(self.get(path), data)
        self.assertEqual((1, 0), (self.daemon.crowd.refused_transfers, self.daemon.crowd.transferring))

    def stop_beside_another(self, data: bytes) -> tuple[str, Reply, Reply]:
        """
        Have two clients read a blob that is not cached, of which one stops for long.
        """
        self.start(limit=4 * MIB)
        path = f"/v2/team/app/blobs/{self.standin.push_blob('team/app', data)}"
        slow = self.daemon.send("GET", path)
        slow.stop_reading()
        quick = self.daemon.send("GET", path)
        self.flush()
        self.assertEqual("", quick.ended)
        self.pass_time(STUCK_SECONDS + 1)
        return path, slow, quick

    def test_a_reader_that_stops_does_not_stall_the_others_of_a_blob_that_is_not_kept(self) -> None:
        """
        After some seconds it continues by itself, from its position. Nothing is fetched for it before it reads again.
        """
        data = noise("x", 8 * MIB)
        path, slow, quick = self.stop_beside_another(data)
        self.assertWhole(quick, data, "JOINED")
        self.assertLess(self.standin.bytes_sent, 9 * MIB)
        slow.read_on()
        self.flush()
        self.assertWhole(slow, data, "BYPASS")
        self.assertLess(self.standin.bytes_sent, 2 * 8 * MIB)
        self.assertEqual(0, self.daemon.lanes.buffered.size)
        self.assertWhole(self.get(path), data, "BYPASS")

    def test_a_reader_that_goes_on_by_itself_gets_no_wrong_bytes(self) -> None:
        data = noise("x", 8 * MIB)
        path, slow, _ = self.stop_beside_another(data)
        self.standin.corrupt(path.rpartition("/")[2], data[:-1] + b"x")
        slow.read_on()
        self.flush()
        self.assertBroken(slow, data)

    def test_readers_that_stop_again_and_again_hold_up_nobody(self) -> None:
        data = noise("x", 8 * MIB)
        path, slow, _ = self.stop_beside_another(data)
        others = [self.daemon.send("GET", path) for _ in range(2)]
        others[0].stop_reading()
        self.flush()
        self.pass_time(STUCK_SECONDS + 1)
        self.assertWhole(others[1], data)
        slow.leave()
        others[0].read_on()
        self.flush()
        self.assertWhole(others[0], data)
        self.assertEqual(0, self.daemon.lanes.buffered.size)

    def test_a_reader_that_stops_is_cut_off_where_the_bucket_gives_no_ranges(self) -> None:
        """
        Otherwise neither it nor the others could go on.
        """
        self.standin.quirks.ignore_range = True
        data = noise("x", 8 * MIB)
        path, slow, quick = self.stop_beside_another(data)
        self.assertWhole(quick, data, "JOINED")
        slow.read_on()
        self.flush()
        self.assertBroken(slow, data)
        self.assertWhole(self.get(path), data, "BYPASS")

    def test_who_never_takes_the_end_is_given_up(self) -> None:
        """
        A connection that is to be closed waits for its client to read the answer, but not for ever.
        """
        for request in (GOOD[:-2] + b"Connection: close\r\n\r\n", b"nonsense\r\n\r\n"):
            client, wire = self.connect()
            wire.reading = False
            wire.write(request)
            self.pass_time(310)
            wire.reading = True
            self.flush()
            self.assertTrue(client.closed)
            self.assertEqual(0, self.daemon.crowd.connected)
        self.assertGreaterEqual(self.daemon.crowd.slow_readers, 1)

    def test_headers_have_the_size_that_is_set(self) -> None:
        """
        The operator sets the bytes and number of headers.
        """
        self.start(limits=Limits(header_bytes=1000, header_count=3))
        for fields, good in (
            (b"A: x\r\n" * 2, True),
            (b"A: x\r\n" * 3, False),
            (b"A: " + b"x" * 1000 + b"\r\n", False),
        ):
            got = self.daemon.raw(GOOD[:-2] + fields + b"\r\n")
            self.assertTrue(got.startswith(b"HTTP/1.1 200" if good else b"HTTP/1.1 400"), got)
        self.assertEqual(2, self.daemon.crowd.bad_requests)
