"""
A file of names and bcrypt hashes is parsed strictly, and nothing of it is shown.
"""

from __future__ import annotations

import bcrypt
from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.access.htpasswd import FILE_LIMIT, HtpasswdError, Users, read_users
from tests.store_contract import scratch


def line(name: str, password: str, prefix: bytes = b"2y", cost: int = 4) -> bytes:
    """
    Return a line as htpasswd -B writes it.
    """
    hashed = bcrypt.hashpw(password.encode(), bcrypt.gensalt(cost))
    return b"%s:%s\n" % (name.encode(), hashed.replace(b"2b", prefix, 1))


class UsersTests(SynchronousTestCase):
    """
    A file has a name and a bcrypt hash in each line.
    """

    def test_each_kind_of_bcrypt_is_read(self) -> None:
        """
        Apache's, Python's and older ones; comments and empty lines are ignored.
        """
        users = Users.parse(
            b"# people\n\n" + line("ann", "one", b"2y") + line("bob", "two", b"2b") + line("eve", "three", b"2a")
        )
        for name, password in ((b"ann", b"one"), (b"bob", b"two"), (b"eve", b"three")):
            self.assertTrue(users.matches(name, password, 0))
            self.assertFalse(users.matches(name, b"other", 0))

    def test_an_unknown_name_has_no_password(self) -> None:
        """
        Not even that of the user whose hash is used for the comparison.
        """
        users = Users.parse(line("ann", "one") + line("bob", "two"))
        for chosen in range(4):
            for password in (b"one", b"two", b""):
                self.assertFalse(users.matches(b"mallory", password, chosen))

    def test_a_long_password_is_what_htpasswd_made_of_it(self) -> None:
        """
        bcrypt uses 72 bytes; further ones neither matter nor fail.
        """
        users = Users.parse(line("ann", "x" * 72))
        self.assertTrue(users.matches(b"ann", b"x" * 100, 0))
        self.assertFalse(users.matches(b"ann", b"x" * 71, 0))

    def test_what_is_no_bcrypt_is_refused_by_its_line(self) -> None:
        """
        Without its text, which may well be a password.
        """
        good = line("ann", "one")
        for wrong in (
            b"bob:secret",
            b"bob",
            b"bob:$apr1$ab$cdefg",
            b"bob:{SHA}2kuSN7rMzfGcB2DKt67EqDWQELA=",
            b"bob:$2y$04$tooshort",
            b":" + good.partition(b":")[2].strip(),
            good.strip() + b":more",
        ):
            problem = str(self.assertRaises(HtpasswdError, Users.parse, good + wrong + b"\n"))
            self.assertIn("line 2 is not a name and a bcrypt hash", problem)
            self.assertIn("htpasswd -B", problem)
            self.assertNotIn("secret", problem)

    def test_a_cost_that_would_take_minutes_is_refused(self) -> None:
        """
        Each check of such a hash would delay all others.
        """
        for cost in (b"$17$", b"$31$", b"$99$", b"$03$"):
            wrong = line("ann", "one").replace(b"$04$", cost)
            self.assertIn("cost", str(self.assertRaises(HtpasswdError, Users.parse, wrong)))

    def test_nobody_at_all_is_refused(self) -> None:
        """
        A file without users would lock out everybody.
        """
        self.assertIn("no name", str(self.assertRaises(HtpasswdError, Users.parse, b"# nobody yet\n")))

    def test_hashes_are_not_shown(self) -> None:
        """
        The repr contains nothing against which guesses could be tested.
        """
        self.assertNotIn("$2", repr(Users.parse(line("ann", "one"))))

    def test_files_that_cannot_be_read_are_told(self) -> None:
        """
        With the system's own words; an endless file is not read to its end.
        """
        self.assertIn("No such file", str(self.assertRaises(HtpasswdError, read_users, "/nowhere")))
        self.assertIn("Is a directory", str(self.assertRaises(HtpasswdError, read_users, "/")))
        self.assertIn("it is a device", str(self.assertRaises(HtpasswdError, read_users, "/dev/zero")))
        large = scratch(self)
        large.write_bytes(b"#" * (FILE_LIMIT + 1))
        self.assertIn("larger", str(self.assertRaises(HtpasswdError, read_users, str(large))))
