"""
A request that was answered from memory before is answered by the bytes of its head, as the long way would answer it.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.stale import STALE_SECONDS
from ecrproxy.transfer.response_body import PIECE
from tests.both_ways import PASSWORD, USER, Scene, compare, deeds, heads, step_of
from tests.daemon import BUFFER, MIB, DaemonTestCase, Raw, noise, ours
from tests.store_contract import being_read
from tests.test_passwords import basic

STEPS = st.integers(0, 255)


class SameStoryTests(SynchronousTestCase):
    """
    With the hot path and without: the same answers, log lines, metrics, requests to ECR, and open connections.
    """

    @settings(max_examples=60, deadline=None)
    @given(st.lists(STEPS, max_size=40))
    @example([])
    def test_a_story_is_the_same_both_ways(self, steps: list[int]) -> None:
        compare(bytes(steps))

    def test_each_deed_between_two_requests_is_seen_by_the_second(self) -> None:
        """
        Each head is sent until it is known, then something happens, and it is sent again.
        """
        scene = Scene(hot_path=True)
        requests, others = len(heads(scene)), len(deeds(scene))
        scene.close()
        known = [
            step for request in range(requests) for step in (step_of(request), step_of(request), step_of(request, 2))
        ]
        answered = 0
        for deed in range(others):
            story = [*known, step_of(requests + deed), *known]
            answered += compare(bytes(story))
            answered += compare(bytes([*story, 255]))
        self.assertGreater(answered, others * 20)

    def test_an_empty_line_before_and_after_a_known_request_is_skipped_both_ways(self) -> None:
        """
        One before each request, as on the long way (RFC 9112, 2.2).
        """
        scene = Scene(hot_path=True)
        requests = heads(scene)
        scene.close()
        known, line = step_of(0), step_of(requests.index(b"\r\n"))
        self.assertGreater(compare(bytes([known, known, known, line, known, line, known, known])), 0)


class NotedTests(SynchronousTestCase):
    """
    What is kept of answered heads.
    """

    def setUp(self) -> None:
        self.scene = Scene(hot_path=True)
        self.addCleanup(self.scene.close)
        assert self.scene.daemon.hot_path is not None
        self.hot_path = self.scene.daemon.hot_path

    def test_bodies_that_not_modified_responses_leave_out_are_counted(self) -> None:
        scene, sizes = self.scene, []
        noted: Any = self.hot_path._noted  # noqa: SLF001
        for size in (1000, 60_000):
            digest = scene.standin.push_blob("team/app", bytes(size))
            head = f"GET /v2/team/app/blobs/{digest} HTTP/1.1\r\nHost: proxy.example\r\n{scene.shown}".encode()
            scene.send(0, head + b"\r\n")
            before = noted._total  # noqa: SLF001
            for _ in range(2):
                scene.send(0, head + f'If-None-Match: "{digest}"\r\n\r\n'.encode())
            sizes.append(noted._total - before)  # noqa: SLF001
        self.assertEqual(59_000, sizes[1] - sizes[0])

    def test_registries_of_before_a_reload_are_forgotten_with_what_was_noted_of_them(self) -> None:
        scene, head = self.scene, heads(self.scene)[0]
        for _ in range(2):
            scene.send(0, head)
        before = weakref.ref(scene.daemon.worlds.latest.registries)
        scene.reload()
        scene.send(0, head)
        scene.daemon.flush()
        gc.collect()
        self.assertIsNone(before())

    def test_what_waits_for_a_tag_shows_no_password(self) -> None:
        scene = Scene(hot_path=True, tag_ttl=0)
        self.addCleanup(scene.close)
        for _ in range(2):
            scene.send(0, heads(scene)[4])
        scene.standin.hang("registry")
        scene.send(0, heads(scene)[4])
        shown = [repr(each) for each in ours(scene.daemon)]
        self.assertIn("Revalidation(", "".join(each[:20] for each in shown))
        self.assertEqual([], [each for each in shown if basic(USER, PASSWORD) in each])


class SharedQuestionTests(SynchronousTestCase):
    """
    Tags that ECR is asked for each time: once for all clients that send the same head meanwhile.
    """

    CLIENTS = 4

    def setUp(self) -> None:
        self.scene = Scene(hot_path=True, tag_ttl=0)
        self.addCleanup(self.scene.close)
        self.head = heads(self.scene)[4]
        for _ in range(2):  # the first request fetches it, the second confirms it: then the head is known
            self.scene.send(0, self.head)
        self.scene.standin.forget_asked()
        self.scene.lines.clear()

    def ask_together(self) -> None:
        """
        Have all clients send a request at once; one of them over TLS, for which the head differs.
        """
        self.scene.gather()
        for number in range(self.CLIENTS - 1):
            self.scene.send(number, self.head)

    def told(self) -> list[tuple[int, str]]:
        return [(line.status, line.cache) for line in self.scene.lines]

    def test_ecr_is_asked_once_for_all(self) -> None:
        self.ask_together()
        self.scene.gather()
        self.assertEqual(3, self.scene.answered)
        self.assertEqual([(200, "REVALIDATED")] * 3, self.told())
        self.assertEqual(["HEAD"], [asked.method for asked in self.scene.standin.asked])

    def test_all_get_what_a_tag_leads_to_now(self) -> None:
        """
        ECR is asked only as often as if each had taken the long way, and the heads are known from then on.
        """
        self.scene.move_tag()
        self.ask_together()
        self.scene.gather()
        self.assertEqual(0, self.scene.answered)
        self.assertEqual(["HEAD", "GET"], [asked.method for asked in self.scene.standin.asked])
        self.assertEqual({200}, {status for status, _ in self.told()})
        for _ in range(2):
            self.scene.send(0, self.head)
        self.assertEqual(1, self.scene.answered)

    def assertAnsweredDespite(self, change: Callable[[], object]) -> None:
        """
        Assert that an accepted client is answered, as on the long way, whatever changes while ECR is silent.
        """
        self.scene.standin.hang("registry")
        for number in range(2):
            self.scene.send(number, self.head)
        change()
        self.scene.lines.clear()
        self.scene.wait(STALE_SECONDS)
        self.assertEqual([(200, "STALE")] * 2, self.told())

    def test_another_password_meanwhile_is_asked_of_the_next_request(self) -> None:
        self.assertAnsweredDespite(self.scene.change_password)

    def test_guesses_meanwhile_from_the_same_address_lock_out_the_next_request(self) -> None:
        self.assertAnsweredDespite(lambda: self.scene.guess(2))

    def test_registries_of_a_reload_meanwhile_are_those_of_the_next_request(self) -> None:
        self.assertAnsweredDespite(self.scene.reload)

    def test_one_that_leaves_takes_no_answer_from_another(self) -> None:
        self.ask_together()
        self.scene.daemon.front.move()
        self.scene.leave()
        self.scene.gather()
        self.assertEqual([(0, "-"), (200, "REVALIDATED"), (200, "REVALIDATED")], sorted(self.told()))

    def test_all_get_the_last_answer_where_ecr_is_silent(self) -> None:
        """
        After the same time as on the long way, and each once.
        """
        self.scene.standin.hang("registry")
        self.ask_together()
        self.scene.gather()
        self.assertEqual([], self.told())
        self.scene.wait(STALE_SECONDS)
        self.assertEqual([(200, "STALE")] * 3, self.told())
        self.assertEqual([STALE_SECONDS] * 3, [line.seconds for line in self.scene.lines])
        self.assertEqual([STALE_SECONDS] * 3, [line.upstream for line in self.scene.lines])

    def test_what_comes_behind_a_request_that_waits_is_answered_after_it(self) -> None:
        self.scene.gather()
        for _ in range(3):
            self.scene.send(0, self.head)
        self.scene.gather()
        self.assertEqual([(200, "REVALIDATED")] * 3, self.told())

    def test_a_connection_whose_request_waits_is_not_idle(self) -> None:
        """
        It is neither closed as idle, nor for another connection; on shutdown it gets its answer first.
        """
        self.scene.standin.hang("registry", times=1)
        self.scene.send(0, self.head)
        self.assertEqual(self.scene.daemon.crowd.connected - 1, len(self.scene.daemon.crowd.idle_ones))
        self.scene.drain()
        self.scene.wait(STALE_SECONDS)
        self.assertEqual([(200, "STALE")], self.told())
        self.assertIn(b"Connection: close", bytes(self.scene.clients[0][0].got))
        self.assertTrue(self.scene.clients[0][0].closed)


class PiecesTests(DaemonTestCase):
    """
    Heads that arrive in two pieces.
    """

    def test_the_beginning_of_several_heads_leads_to_none_of_them_however_long_it_is(self) -> None:
        blobs = [b"one blob", b"another"]
        asked = [f"GET /v2/team/app/blobs/{self.standin.push_blob('team/app', blob)} HTTP/1.1" for blob in blobs]
        client = Raw()
        end = self.daemon.front.connect(client, "proxy.example", 80, secure=False)
        lengths = range(1, len("GET /v2/"))
        for length in lengths:
            for line in asked:
                head = f"{line}\r\nHost: proxy.example\r\n\r\n".encode()
                for piece in (head[:length], head[length:]):
                    end.write(piece)
                    self.flush()
        answers = bytes(client.got).split(b"HTTP/1.1 200 OK")[1:]
        self.assertEqual(blobs * len(lengths), [each.partition(b"\r\n\r\n")[2] for each in answers])


class FileTests(DaemonTestCase):
    """
    A blob that is sent from its file, to a client that does not read all of it at once.
    """

    def setUp(self) -> None:
        super().setUp()
        self.data = noise("blob", 3 * MIB)
        self.digest = self.standin.push_blob("team/app", self.data)
        self.head_sent = f"GET /v2/team/app/blobs/{self.digest} HTTP/1.1\r\nHost: proxy.example\r\n\r\n".encode()
        self.client = Raw()
        self.end = self.daemon.front.connect(self.client, "proxy.example", 80, secure=False)
        for _ in range(2):  # it is fetched, then recorded
            self.ask()
        self.client.got.clear()
        self.end.reading = False
        self.ask()
        self.assertEqual((1, 1), (self.answered, self.daemon.crowd.transferring))

    def ask(self) -> None:
        self.end.write(self.head_sent)
        self.flush()

    def read(self) -> None:
        self.end.reading = True
        self.flush()

    @property
    def answered(self) -> int:
        assert self.daemon.hot_path is not None
        return self.daemon.hot_path.answered

    def assertSent(self, times: int = 1) -> None:
        """
        Assert that the client has received the whole blob so often, and that nothing is held for it any longer.
        """
        answers = bytes(self.client.got).split(b"HTTP/1.1 200 OK")[1:]
        self.assertEqual([True] * times, [each.partition(b"\r\n\r\n")[2] == self.data for each in answers])
        self.assertLetGo()

    def assertLetGo(self) -> None:
        self.assertEqual((0, set()), (self.daemon.crowd.transferring, being_read(self.daemon.store)))

    def lines(self) -> list[str]:
        """
        Return the lines of the log about the last request.
        """
        self.pass_time(1)
        return [each for each in self.logged().splitlines() if "/blobs/" in each][2:]

    def test_it_gets_the_rest_as_it_takes_it(self) -> None:
        """
        Another request is answered after it, on the same connection.
        """
        self.assertLessEqual(self.end.peer.waiting, PIECE + BUFFER)
        self.read()
        self.assertSent()
        self.ask()
        self.assertSent(2)
        self.assertEqual(2, self.answered)

    def test_what_is_asked_meanwhile_is_answered_after_it(self) -> None:
        self.ask()
        self.read()
        self.assertSent(2)

    def test_who_leaves_is_logged_as_gone_and_nothing_is_held_for_it(self) -> None:
        self.end.abortConnection()
        self.flush()
        self.assertLetGo()
        (line,) = self.lines()
        self.assertIn(f"GET /v2/team/app/blobs/{self.digest} 200 {PIECE} bytes", line)
        self.assertIn("aborted", line)

    def test_it_is_the_last_of_its_connection_when_the_daemon_ends(self) -> None:
        self.daemon.site.connections.drain()
        self.flush()
        self.assertFalse(self.client.closed)
        self.read()
        self.assertSent()
        self.assertTrue(self.client.closed)

    def test_what_is_cut_when_the_daemon_has_waited_long_enough_is_let_go(self) -> None:
        self.daemon.site.connections.drain()
        self.daemon.site.connections.cut()
        self.flush()
        self.assertLetGo()
        (line,) = self.lines()
        self.assertIn("aborted", line)

    def test_a_client_that_closes_its_side_gets_it_whole(self) -> None:
        self.end.half_close()
        self.read()
        self.assertSent()
        self.assertTrue(self.client.closed)

    def test_a_client_that_takes_nothing_is_given_up(self) -> None:
        """
        After the timeout for sending, not that for idle connections.
        """
        limits = self.daemon.crowd.limits
        self.pass_time(limits.idle_seconds + 1)
        self.assertEqual(1, self.daemon.crowd.transferring)
        self.clock.advance(limits.send_seconds)
        self.flush()
        self.assertEqual(1, self.daemon.crowd.slow_readers)
        self.assertLetGo()

    def test_a_file_that_is_cut_meanwhile_is_no_whole_answer(self) -> None:
        os.truncate(self.file_of(self.digest), PIECE)
        self.addCleanup(self.file_of(self.digest).unlink, missing_ok=True)
        self.read()
        self.assertTrue(self.client.closed)
        self.assertLess(len(self.client.got), len(self.data))
        self.assertLetGo()
        self.assertFalse(self.has(self.digest))
