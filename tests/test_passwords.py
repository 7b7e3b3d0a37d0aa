"""
Clients need names and passwords, guesses are limited, and refusals don't reveal users.
"""

from __future__ import annotations

import base64
import builtins
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bcrypt
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.access.htpasswd import read_users, signature
from ecrproxy.access.passwords import (
    AT_ONCE,
    FAILURE_SECONDS,
    FAILURES,
    FEWEST_FAILURES,
    KEPT,
    LONGEST_WAIT,
    REMEMBER_SECONDS,
    REREAD_SECONDS,
    Guess,
    Passwords,
    WrongPasswords,
    parse_basic,
)
from ecrproxy.oci import RegistryError
from tests.daemon import Hands, at_once
from tests.store_contract import scratch
from tests.test_htpasswd import line

HERE = "192.0.2.7"


def basic(name: str, password: str) -> str:
    """
    Build an Authorization header.
    """
    return f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"


def guess(number: int) -> Guess:
    """
    Return a wrong password.
    """
    return "file", b"%d" % number


class BasicTests(SynchronousTestCase):
    """
    The Authorization header.
    """

    def test_name_and_password_are_read(self) -> None:
        """
        The scheme in any case; colons belong to the password, and non-ASCII characters too.
        """
        self.assertEqual((b"ann", b"a:b"), parse_basic(basic("ann", "a:b")))
        self.assertEqual((b"ann", b""), parse_basic("bAsIc  " + basic("ann", "")[6:]))
        self.assertEqual(("änn".encode(), "ü".encode()), parse_basic(basic("änn", "ü")))

    def test_anything_else_is_nobody(self) -> None:
        """
        Other schemes, invalid base64, and control bytes, at which some programs would end a password.
        """
        for header in (
            None,
            "",
            "Basic",
            "Basic !!!",
            "Basic ä",
            "Bearer " + basic("ann", "one")[6:],
            basic("", "one"),
            "Basic YW5u",
            basic("ann", "on\0e"),
            basic("a\nnn", "one"),
        ):
            self.assertIsNone(parse_basic(header), header)


class FailuresTests(SynchronousTestCase):
    """
    Wrong passwords are limited per address.
    """

    def setUp(self) -> None:
        self.clock = Clock()
        self.failures = WrongPasswords(self.clock)

    def fail_often(self, *addresses: str) -> None:
        """
        Fail as often as allowed, from these addresses in turn.
        """
        for each in range(FAILURES):
            self.failures.note(addresses[each % len(addresses)], guess(each))

    def test_the_last_one_is_told(self) -> None:
        """
        Once, so that it is logged once.
        """
        self.assertEqual(
            [each == FAILURES for each in range(1, FAILURES + 4)],
            [self.failures.note(HERE, guess(each)) for each in range(FAILURES + 3)],
        )

    def test_whoever_failed_waits_for_the_rest_of_the_minute(self) -> None:
        """
        From the first failure on; then all attempts are available again.
        """
        self.failures.note(HERE, guess(-1))
        self.clock.advance(20)
        self.assertEqual(0, self.failures.wait(HERE))
        self.fail_often(HERE)
        self.assertEqual(FAILURE_SECONDS - 20, self.failures.wait(HERE))
        self.clock.advance(FAILURE_SECONDS - 20)
        self.assertEqual(0, self.failures.wait(HERE))
        self.assertEqual(0, self.failures.wait("192.0.2.8"))

    def test_a_repeated_guess_counts_once_in_its_minute(self) -> None:
        for each in range(2 * FAILURES):
            self.failures.note(HERE, guess(each % 2))
        self.assertEqual((0, True), (self.failures.wait(HERE), self.failures.knows(HERE, guess(1))))
        self.assertEqual(
            [False, False], [self.failures.knows(HERE, guess(2)), self.failures.knows("192.0.2.8", guess(1))]
        )
        self.clock.advance(FAILURE_SECONDS)
        self.assertFalse(self.failures.knows(HERE, guess(1)))

    def test_a_network_of_ipv6_is_one_client(self) -> None:
        """
        A client with 2^64 addresses has no more attempts; an IPv4-mapped address is an IPv4 address.
        """
        self.fail_often("2001:db8::1", "2001:db8::2:3", "2001:db8:0:0:ffff::")
        self.assertTrue(self.failures.wait("2001:db8::4"))
        self.assertFalse(self.failures.wait("2001:db8:0:1::1"))
        self.fail_often("::ffff:192.0.2.9")
        self.assertTrue(self.failures.wait("192.0.2.9"))

    def test_what_is_remembered_is_bounded(self) -> None:
        """
        Clients from many addresses fill no memory; those that are silent longest are forgotten.
        """
        self.fail_often(HERE)
        for number in range(KEPT):
            self.failures.note(f"10.0.{number // 256}.{number % 256}", guess(0))
        self.assertFalse(self.failures.wait(HERE))
        self.assertEqual(KEPT, len(self.failures._wrong))  # noqa: SLF001


class PasswordsTests(SynchronousTestCase):
    """
    Clients with a name and a password.
    """

    def setUp(self) -> None:
        """
        Two users; calls in threads are counted.
        """
        self.path = Path(str(scratch(self)) + ".htpasswd")
        self.path.write_bytes(line("ann", "one") + line("bob", "two"))
        self.clock, self.hands = Clock(), Hands()
        self.passwords = Passwords(str(self.path), self.hands, self.clock, b"key")
        self.passwords.startService()
        self.addCleanup(self.passwords.stopService)

    def ask(self, name: str, password: str, address: str = HERE) -> Deferred[None]:
        """
        Try to log in.
        """
        return Deferred.fromCoroutine(self.passwords.admit(address, basic(name, password)))

    def refusal(self, asked: Deferred[None]) -> RegistryError:
        """
        Return how a client was rejected.
        """
        problem: Any = self.failureResultOf(asked, RegistryError).value
        assert isinstance(problem, RegistryError)
        return problem

    def test_a_right_password_is_let_in(self) -> None:
        """
        Each user with their own.
        """
        self.successResultOf(self.ask("ann", "one"))
        self.successResultOf(self.ask("bob", "two"))
        self.assertEqual(401, self.refusal(self.ask("ann", "two")).status)

    def test_tokens_of_ecr_hold_nobody_back(self) -> None:
        """
        Nodes behind one address send a token each, and no user is called AWS: the right password is still accepted.
        """
        self.hands.idle = False
        for number in range(3 * FAILURES):
            self.assertEqual(401, self.refusal(self.ask("AWS", f"token{number}")).status)
        self.hands.idle = True
        self.successResultOf(self.ask("ann", "one"))

    def test_guesses_for_a_user_called_aws_count(self) -> None:
        """
        The name is only special if no user has it.
        """
        self.path.write_bytes(line("AWS", "one"))
        self.passwords.reread()
        for number in range(FAILURES):
            self.refusal(self.ask("AWS", f"guess{number}"))
        self.assertEqual(429, self.refusal(self.ask("AWS", "one")).status)

    def test_unknown_names_wrong_passwords_and_none_at_all_are_refused_alike(self) -> None:
        """
        Status, words, headers: nothing reveals which users exist.
        """
        nothing: Deferred[None] = Deferred.fromCoroutine(self.passwords.admit(HERE, None))
        found = [self.refusal(each) for each in (nothing, self.ask("mallory", "one"), self.ask("ann", "other"))]
        self.assertEqual(1, len({(each.status, each.body(), str(each.headers)) for each in found}))
        self.assertEqual((401, "UNAUTHORIZED"), (found[0].status, found[0].code))
        self.assertEqual({"WWW-Authenticate": 'Basic realm="ecrproxy"'}, found[0].headers)

    def test_an_unknown_name_costs_what_a_known_one_does(self) -> None:
        """
        It is compared with a user's hash, the same one each time.
        """
        compared: list[bytes] = []
        checkpw = bcrypt.checkpw

        def spy(password: bytes, hashed: bytes) -> bool:
            compared.append(hashed)
            return checkpw(password, hashed)

        self.patch(bcrypt, "checkpw", spy)
        for name, password in (("ann", "wrong"), ("mallory", "wrong"), ("mallory", "other")):
            self.refusal(self.ask(name, password))
        self.assertEqual(3, len(compared))
        self.assertEqual(compared[1], compared[2])
        names = [f"mallory{number}" for number in range(FAILURES - 3)]
        for name in names:
            self.refusal(self.ask(name, "wrong", f"198.51.100.{len(compared)}"))
        self.assertEqual(2, len(set(compared)))

    def test_a_right_password_is_checked_once_in_a_while(self) -> None:
        """
        A pull of many blobs costs one check, whatever the address; after some minutes it is repeated.
        """
        self.successResultOf(self.ask("ann", "one"))
        self.hands.idle = False
        self.successResultOf(self.ask("ann", "one"))
        self.successResultOf(self.ask("ann", "one", "198.51.100.1"))
        self.clock.advance(REMEMBER_SECONDS)
        self.hands.work_off()
        late = self.ask("ann", "one")
        self.assertNoResult(late)
        self.hands.work_off()
        self.successResultOf(late)

    def test_no_password_is_kept(self) -> None:
        """
        Only a hash with a key of this process is kept.
        """
        self.successResultOf(self.ask("ann", "one"))
        (kept,) = self.passwords._right  # noqa: SLF001
        other = Passwords(str(self.path), self.hands, self.clock, b"another key")
        self.successResultOf(Deferred.fromCoroutine(other.admit(HERE, basic("ann", "one"))))
        self.assertNotIn(kept, other._right)  # noqa: SLF001

    def test_those_who_ask_together_pay_for_one_check(self) -> None:
        """
        A client's connections share it; one that disconnects does not affect the others.
        """
        self.hands.idle = False
        asked = [self.ask("ann", "one") for _ in range(5)]
        self.assertEqual(1, len(self.hands.waiting))
        asked[0].addErrback(lambda _: None)
        asked[0].cancel()
        self.hands.work_off()
        for each in asked[1:]:
            self.successResultOf(each)

    def herd(self, size: int) -> list[str]:
        return [f"198.51.100.{number}" for number in range(size)]

    def test_a_herd_pays_for_one_check_of_one_password(self) -> None:
        self.hands.idle = False
        asked = [self.ask("ann", "one", address) for address in self.herd(200)]
        self.assertEqual(1, len(self.hands.waiting))
        self.hands.work_off()
        self.assertEqual([None] * 200, [self.successResultOf(each) for each in asked])

    def test_a_herd_with_a_password_each_is_let_in_two_at_a_time(self) -> None:
        self.path.write_bytes(b"".join(line(f"user{number}", str(number)) for number in range(200)))
        self.passwords.reread()
        self.hands.idle = False
        asked = [self.ask(f"user{number}", str(number), address) for number, address in enumerate(self.herd(200))]
        self.assertEqual(AT_ONCE, len(self.hands.waiting))
        self.hands.work_off()
        self.assertEqual([None] * 200, [self.successResultOf(each) for each in asked])

    def test_a_password_waits_twenty_seconds_for_its_turn_at_most(self) -> None:
        self.hands.idle = False
        asked = [self.ask("ann", f"wrong{number}", address) for number, address in enumerate(self.herd(200))]
        late = self.ask("bob", "two")
        self.clock.advance(LONGEST_WAIT)
        self.hands.work_off()
        self.assertEqual((503, "1"), ((problem := self.refusal(late)).status, problem.headers["Retry-After"]))
        found = [self.refusal(each).status for each in asked]
        self.assertEqual([AT_ONCE, 200 - AT_ONCE], [found.count(401), found.count(503)])
        self.hands.idle = True
        self.successResultOf(self.ask("bob", "two"))

    def test_a_wrong_password_counts_for_each_address_that_presents_it(self) -> None:
        for number in range(FAILURES):
            self.hands.idle = False
            asked = [self.ask("ann", f"guess{number}", address) for address in (HERE, "198.51.100.1", HERE)]
            self.hands.work_off()
            self.assertEqual([401] * 3, [self.refusal(each).status for each in asked])
        for address in (HERE, "198.51.100.1"):
            self.assertEqual(429, self.refusal(self.ask("ann", "one", address)).status)

    def test_a_guess_learns_nothing_from_another_address(self) -> None:
        """
        A right password that is queued with too many guesses looks like one of them.
        """
        self.hands.idle = False
        guesses = [self.ask("ann", f"guess{number}") for number in range(FAILURES + AT_ONCE)]
        mixed = self.ask("ann", "one")
        honest = self.ask("ann", "one", "198.51.100.1")
        self.hands.work_off()
        self.assertEqual({401, 429}, {self.refusal(each).status for each in guesses})
        self.assertEqual(429, self.refusal(mixed).status)
        self.successResultOf(honest)

    def test_a_wrong_password_that_is_repeated_locks_nobody_out(self) -> None:
        """
        A node with an old password retries each second, behind the address that all nodes share.
        """
        self.successResultOf(self.ask("ann", "one"))
        for _ in range(10 * FAILURES):
            self.clock.advance(1)
            self.assertEqual(401, self.refusal(self.ask("ann", "old")).status)
            self.successResultOf(self.ask("ann", "one"))
            self.successResultOf(self.ask("bob", "two"))

    def test_a_wrong_password_that_is_repeated_is_checked_once_a_minute(self) -> None:
        users = self.passwords._users  # noqa: SLF001
        checked: list[bytes] = []
        real = users.matches

        def spy(_: object, name: bytes, password: bytes, chosen: int) -> bool:
            checked.append(password)
            return real(name, password, chosen)

        self.patch(type(users), "matches", spy)
        for _ in range(FAILURES):
            self.assertEqual(401, self.refusal(self.ask("ann", "old")).status)
        self.assertEqual([b"old"], checked)
        self.assertEqual(401, self.refusal(self.ask("ann", "old", "198.51.100.1")).status)
        self.assertEqual([b"old"] * 2, checked, "what one address has tried is not told to another")
        self.clock.advance(FAILURE_SECONDS)
        self.refusal(self.ask("ann", "old"))
        self.assertEqual([b"old"] * 3, checked)

    def test_what_was_wrong_by_the_former_file_is_checked_again(self) -> None:
        self.assertEqual(401, self.refusal(self.ask("ann", "new")).status)
        self.path.write_bytes(line("ann", "new"))
        self.clock.advance(REREAD_SECONDS)
        self.successResultOf(self.ask("ann", "new"))

    def test_guesses_from_one_address_are_limited(self) -> None:
        """
        After ten in a minute not even a right password is checked, and a line in the log says so; other addresses are
        not affected.
        """
        self.successResultOf(self.ask("ann", "one"))
        with capturedLogs() as events:
            for number in range(FAILURES):
                self.assertEqual(401, self.refusal(self.ask("ann", f"guess{number}")).status)
            for password in ("one", "two", "guess"):
                problem = self.refusal(self.ask("ann", password))
                self.assertEqual((429, "TOOMANYREQUESTS"), (problem.status, problem.code))
                self.assertEqual("60", problem.headers["Retry-After"])
        self.assertEqual([HERE], [each["address"] for each in events if each["log_level"] == LogLevel.warn])
        self.successResultOf(self.ask("ann", "one", "198.51.100.1"))
        self.clock.advance(FAILURE_SECONDS)
        self.successResultOf(self.ask("ann", "one"))

    def test_each_of_several_processes_allows_its_part_of_the_guesses(self) -> None:
        """
        And a quarter more, but no fewer than three: a typo locks nobody out.
        """
        for processes, most in ((2, 7), (4, 4), (64, FEWEST_FAILURES)):
            self.passwords = Passwords(str(self.path), self.hands, self.clock, b"key", processes)
            refused = [self.refusal(self.ask("ann", f"guess{number}")).status for number in range(most + 1)]
            self.assertEqual([401] * most + [429], refused)

    def test_guesses_that_come_together_are_limited_too(self) -> None:
        """
        Queued guesses are not checked once enough were wrong.
        """
        self.hands.idle = False
        asked = [self.ask("ann", f"guess{number}") for number in range(1000)]
        looked_at = 0
        while self.hands.waiting:
            self.hands.work()
            looked_at += 1
        found = [self.refusal(each).status for each in asked]
        self.assertLessEqual(looked_at, FAILURES + AT_ONCE - 1)
        self.assertEqual(looked_at, found.count(401))
        self.assertEqual(1000 - looked_at, found.count(429))

    def test_who_shows_nothing_is_not_counted(self) -> None:
        """
        Docker sends a request without a password first, each time.
        """
        for _ in range(FAILURES + 5):
            asked: Deferred[None] = Deferred.fromCoroutine(self.passwords.admit(HERE, None))
            self.assertEqual(401, self.refusal(asked).status)
        self.successResultOf(self.ask("ann", "one"))

    def test_a_file_that_has_changed_is_read_again(self) -> None:
        """
        Within seconds; cached checks of the previous file are dropped.
        """
        self.successResultOf(self.ask("ann", "one"))
        self.path.write_bytes(line("ann", "new") + b"# longer than before\n")
        self.clock.advance(REREAD_SECONDS)
        self.assertEqual(401, self.refusal(self.ask("ann", "one")).status)
        self.assertEqual(401, self.refusal(self.ask("bob", "two")).status)
        self.successResultOf(self.ask("ann", "new"))

    def test_a_check_of_the_former_file_is_not_remembered(self) -> None:
        """
        A user who is removed while their password is being checked is rejected with the next request.
        """
        self.hands.idle = False
        asked = self.ask("bob", "two")
        self.path.write_bytes(line("ann", "one"))
        self.passwords.reread()
        for _ in range(2):  # the file is checked, and read, before the password
            self.hands.waiting.rotate(-1)
            self.hands.work()
        self.assertEqual(1, len(self.hands.waiting))
        self.hands.work_off()
        self.successResultOf(asked)
        self.hands.idle = True
        self.assertEqual(401, self.refusal(self.ask("bob", "two")).status)

    def test_a_file_that_is_replaced_while_it_is_read_is_read_again(self) -> None:
        """
        The users of the final file are accepted seconds later, and no others.
        """
        for moment in (signature, read_users):
            replacements = [line("ann", f"after {moment.__name__}")]

            def late(blocking: Callable[..., Any], *args: Any, moment: Any = moment, to: Any = replacements) -> Any:
                done = at_once(blocking, *args)
                if blocking is moment and to:
                    self.replace(to.pop())
                return done

            self.replace(line("ann", "one"))
            passwords = Passwords(str(self.path), late, self.clock, b"key")
            passwords.startService()
            self.replace(line("ann", "two"))
            self.clock.pump([REREAD_SECONDS] * 2)
            passwords.stopService()
            for password, right in (("one", False), ("two", False), (f"after {moment.__name__}", True)):
                asked = Deferred.fromCoroutine(passwords.admit(HERE, basic("ann", password)))
                if right:
                    self.successResultOf(asked)
                else:
                    self.failureResultOf(asked, RegistryError)

    def test_a_file_whose_disk_hangs_keeps_nobody_out(self) -> None:
        """
        However often it is to be read again: the hanging read has a thread of its own, and the previous users stay.
        """
        hanging = Hands()
        hanging.idle = False
        passwords = Passwords(str(self.path), at_once, self.clock, b"key", reading=hanging)
        passwords.startService()
        self.addCleanup(passwords.stopService)
        self.clock.advance(REREAD_SECONDS)
        passwords.reread()
        self.assertEqual(2, len(hanging.waiting))
        self.successResultOf(Deferred.fromCoroutine(passwords.admit(HERE, basic("ann", "one"))))

    def replace(self, users: bytes) -> None:
        """
        Replace the users' file by another of the same size and time.
        """
        draft = self.path.with_suffix(".draft")
        draft.write_bytes(users)
        os.utime(draft, (1, 1))
        draft.replace(self.path)

    def test_a_file_is_known_by_what_was_read_of_it(self) -> None:
        """
        Not by the file that has replaced it since.
        """
        fstat = os.fstat

        def late(fd: int) -> os.stat_result:
            status = fstat(fd)
            self.replace(line("eve", "other"))
            return status

        former = signature(str(self.path))
        self.patch(os, "fstat", late)
        users = read_users(str(self.path))
        self.assertEqual(({b"ann", b"bob"}, former), (users.hashes.keys(), users.seen))
        self.assertNotEqual(signature(str(self.path)), users.seen)

    def test_a_broken_file_changes_nothing_and_is_told_once(self) -> None:
        """
        Half-written or gone, the previous users stay until it is whole again.
        """
        for broken in (b"ann:one\n", b"", None):
            if broken is None:
                self.path.unlink()
            else:
                self.path.write_bytes(broken)
            with capturedLogs() as events:
                self.clock.pump([REREAD_SECONDS] * 3)
            told = [each for each in events if each["log_level"] == LogLevel.error]
            self.assertEqual([str(self.path)], [each["path"] for each in told])
            self.successResultOf(self.ask("ann", "one"))
        self.path.write_bytes(line("ann", "new"))
        self.clock.advance(REREAD_SECONDS)
        self.successResultOf(self.ask("ann", "new"))

    def test_a_file_that_could_not_be_read_is_read_once_it_can_be(self) -> None:
        """
        The daemon had no descriptor left, or the file not yet its mode: later the file itself does not change.
        """

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        self.path.write_bytes(line("bob", "new"))
        refusing = self.patch(builtins, "open", refuse)
        self.clock.pump([REREAD_SECONDS] * 3)
        refusing.restore()
        self.successResultOf(self.ask("ann", "one"))
        self.clock.advance(REREAD_SECONDS)
        self.assertEqual(401, self.refusal(self.ask("ann", "one")).status)
        self.successResultOf(self.ask("bob", "new"))

    def test_a_file_that_stays_is_not_read(self) -> None:
        """
        Checking costs one system call.
        """
        with capturedLogs() as events:
            self.clock.pump([REREAD_SECONDS] * 3)
            self.assertEqual([], [each for each in events if "path" in each])
            os.utime(self.path, (1, 1))
            self.clock.advance(REREAD_SECONDS)
        self.assertEqual(1, len([each for each in events if "path" in each]))
