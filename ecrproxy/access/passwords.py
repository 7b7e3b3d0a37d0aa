"""
Password checks: remembers correct passwords, and delays addresses after too many wrong ones.

Rules:

- No password is stored. Correct ones are remembered for some minutes, by a hash with a key of this process.
- A check costs a tenth of a second of CPU or more. Few run at once, in threads of their own, and clients that present
  the same name and password meanwhile share one. A check waits some seconds for its turn at most. Only a few checks of
  an address may fail.
- Unknown names take as long as known ones, get the same response, and count the same.
- An address that repeats a wrong password counts once a minute: a node with an old password retries again and again,
  and must not lock out others behind its address. A repeated guess gains an attacker nothing.
- After too many failures an address is refused before its password is checked, so a correct guess looks like a wrong
  one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import re
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from twisted.application.service import Service
from twisted.logger import Logger

from ecrproxy.access.htpasswd import HtpasswdError, UnreadableError, read_users, signature
from ecrproxy.access.limits import counted
from ecrproxy.access.turns import QueueTimeoutError, Turns
from ecrproxy.flights import Flights
from ecrproxy.oci import RegistryError
from ecrproxy.periodic import Periodic
from ecrproxy.reasons import Reason
from ecrproxy.shares import share
from ecrproxy.threads import InThread, on_its_own

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime

log = Logger()

AT_ONCE: Final = 2
"""Concurrent password checks, all processes together."""
LONGEST_WAIT: Final = 20.0
"""Seconds that a check may wait for its turn; after that the client is told to retry."""
FAILURES: Final = 10
"""Wrong passwords that an address may send within C{FAILURE_SECONDS}."""
FEWEST_FAILURES: Final = 3
"""Minimum of that for each of several processes: with fewer, a typo would lock users out."""
FAILURE_SECONDS: Final = 60.0
REMEMBER_SECONDS: Final = 300.0
"""Seconds for which a correct password is not checked again."""
REREAD_SECONDS: Final = 5.0
"""Interval for checking whether the file has changed."""
KEPT: Final = 10_000
"""Maximum number of addresses, and of correct passwords, that are remembered."""

_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")


def parse_basic(header: str | None) -> tuple[bytes, bytes] | None:
    """
    Parse an Authorization header: RFC 7617. None if it has no name and password.
    """
    scheme, _, encoded = (header or "").strip().partition(" ")
    try:
        shown = base64.b64decode(encoded.strip(), validate=True) if scheme.lower() == "basic" else b""
    except (binascii.Error, ValueError):
        return None
    name, colon, password = shown.partition(b":")
    if not colon or not name or _CONTROL.search(shown):
        return None
    return name, password


Guess: TypeAlias = tuple[Hashable, bytes]
"""A file's signature, and the hash of a name and password that are wrong according to this file."""


ECR_USER: Final = b"AWS"
"""
The user name of ECR's own tokens, which differ between nodes. The kubelet's credential provider sends them to a mirror
that asks for a password. They are not guesses, and must not delay other clients behind the node's address.
"""


class WrongPasswords:
    """
    The recent wrong passwords of each address.

    An IPv6 network that one client may own counts as one address.

    @param most: wrong passwords that an address may send within C{FAILURE_SECONDS}.
    """

    def __init__(self, clock: IReactorTime, most: int = FAILURES) -> None:
        self._clock, self.most = clock, most
        self._wrong: OrderedDict[str, tuple[float, frozenset[Guess]]] = OrderedDict()

    def note(self, address: str, guess: Guess) -> bool:
        """
        Count a guess; return True if it is the last that is allowed for now.
        """
        since, wrong = self._recent(address)
        if guess in wrong:
            return False
        place = counted(address)
        self._wrong[place] = since, wrong | {guess}
        self._wrong.move_to_end(place)
        if len(self._wrong) > KEPT:
            self._wrong.popitem(last=False)
        return len(wrong) + 1 == self.most

    def knows(self, address: str, guess: Guess) -> bool:
        """
        Return True if this address has sent the same wrong guess before.
        """
        return guess in self._recent(address)[1]

    def wait(self, address: str) -> int:
        """
        Return how many seconds C{address} must wait; 0 if not at all.
        """
        since, wrong = self._recent(address)
        return math.ceil(since + FAILURE_SECONDS - self._clock.seconds()) if len(wrong) >= self.most else 0

    def _recent(self, address: str) -> tuple[float, frozenset[Guess]]:
        now = self._clock.seconds()
        since, wrong = self._wrong.get(counted(address), (now, frozenset()))
        return (since, wrong) if now - since < FAILURE_SECONDS else (now, frozenset())


@dataclass(frozen=True, slots=True)
class PasswordVerdict:
    """
    The result of a check.

    @ivar held_back: addresses that presented this password but had failed too often before its turn came.
    """

    right: bool
    held_back: frozenset[str]


class Passwords(Service):
    """
    Checks clients' names and passwords against a file, and reloads the file after changes.

    @param in_thread: runs password checks.
    @param key: random bytes, unique to this process.
    @param reading: runs file reads, which may hang, so not in the thread of the checks.
    @param processes: number of processes that share the limits.
    @raise HtpasswdError: if the file can't be used.
    """

    def __init__(
        self,
        path: str,
        in_thread: InThread,
        clock: IReactorTime,
        key: bytes,
        processes: int = 1,
        *,
        reading: InThread | None = None,
    ) -> None:
        self._path, self._in_thread, self._clock, self._key = path, in_thread, clock, key
        self._reading = reading or in_thread
        self._users = read_users(path)
        self._seen = self._users.seen
        self._right: OrderedDict[bytes, float] = OrderedDict()
        self._failures = WrongPasswords(clock, max(FEWEST_FAILURES, share(FAILURES, processes)))
        self._flights: Flights[PasswordVerdict] = Flights()
        self._presented: dict[bytes, set[str]] = {}
        self._turns = Turns(share(AT_ONCE, processes), LONGEST_WAIT, clock)
        self._loop = Periodic("Looking for new passwords", self._look, clock)

    def startService(self) -> None:  # noqa: D102
        super().startService()
        self._loop.start(REREAD_SECONDS, now=False)

    def stopService(self) -> None:  # noqa: D102
        super().stopService()
        self._loop.stop()

    async def admit(self, address: str, header: str | None) -> None:
        """
        Return if C{header}, an Authorization header from C{address}, has a valid name and password.

        @raise RegistryError: otherwise.
        """
        shown = self._shown(header)
        if shown is None:
            raise _unauthorized()
        self._hold_back(address)
        name = self._name(b":".join(shown))
        if self._remembers(name):
            return
        if self._failures.knows(address, (self._users.seen, name)):
            raise _unauthorized()
        self._presented.setdefault(name, set()).add(address)
        verdict = await self._flights.join(name, partial(self._check, shown, name))
        if address in verdict.held_back:
            self._hold_back(address)
        if not verdict.right:
            raise _unauthorized()

    def knows(self, address: str, header: str | None) -> bool:
        """
        Return True if L{admit} would accept C{header} without a check.
        """
        shown = self._shown(header)
        return shown is not None and not self._failures.wait(address) and self._remembers(self._name(b":".join(shown)))

    def _shown(self, header: str | None) -> tuple[bytes, bytes] | None:
        """
        Return the name and password in a header; None if there are none that could be valid.
        """
        shown = parse_basic(header)
        return None if shown and shown[0] == ECR_USER and ECR_USER not in self._users.hashes else shown

    def _remembers(self, name: bytes) -> bool:
        return self._right.get(name, 0) > self._clock.seconds()

    async def _check(self, shown: tuple[bytes, bytes], name: bytes) -> PasswordVerdict:
        try:
            async with self._turns.turn():
                # Other passwords from the same address may have failed since this one arrived.
                held_back = frozenset(filter(self._failures.wait, self._presented[name]))
                if held_back == self._presented[name]:
                    return PasswordVerdict(right=False, held_back=held_back)
                users = self._users
                chosen = int.from_bytes(self._name(shown[0])[:8], "big")
                right = await self._in_thread(users.matches, *shown, chosen)
                if not right:
                    # Count before the turn ends: the next check may be for the same address.
                    self._count(self._presented[name] - held_back, (users.seen, name))
        except QueueTimeoutError:
            said = "too many passwords are being checked"
            raise RegistryError(503, "UNAVAILABLE", said, {"Retry-After": "1"}, Reason.BUSY) from None
        finally:
            del self._presented[name]
        if right and users is self._users:
            self._remember(name)
        return PasswordVerdict(right, held_back)

    def _count(self, addresses: Iterable[str], guess: Guess) -> None:
        for address in addresses:
            if self._failures.note(address, guess):
                log.warn(
                    "{address} gave {count} wrong passwords within a minute",
                    address=address,
                    count=self._failures.most,
                    once=address,
                )

    def _name(self, secret: bytes) -> bytes:
        return hashlib.blake2b(secret, key=self._key, digest_size=32).digest()

    def _remember(self, name: bytes) -> None:
        self._right[name] = self._clock.seconds() + REMEMBER_SECONDS
        self._right.move_to_end(name)
        if len(self._right) > KEPT:
            self._right.popitem(last=False)

    def _hold_back(self, address: str) -> None:
        if seconds := self._failures.wait(address):
            said, wait = "too many wrong passwords from your address", {"Retry-After": str(seconds)}
            raise RegistryError(429, "TOOMANYREQUESTS", said, wait, Reason.PASSWORD)

    def reread(self) -> None:
        """
        Read the file again. If that fails, log the error and keep the previous contents.
        """
        on_its_own(self._reread())

    async def _look(self) -> None:
        if await self._reading(signature, self._path) != self._seen:
            await self._reread()

    async def _reread(self) -> None:
        self._seen = await self._reading(signature, self._path)
        try:
            users = await self._reading(read_users, self._path)
        except HtpasswdError as problem:
            said = "{path} {problem}; the previous passwords stay in use"
            log.error(said, path=self._path, problem=str(problem), once=str(problem))
            if isinstance(problem, UnreadableError):
                self._seen = ()  # retry: permissions and free descriptors change without the file
        else:
            self._users, self._seen = users, users.seen
            self._right.clear()
            log.info("{path} was read again", path=self._path)


def _unauthorized() -> RegistryError:
    return RegistryError(
        401,
        "UNAUTHORIZED",
        "this proxy asks for a name and a password: docker login",
        {"WWW-Authenticate": 'Basic realm="ecrproxy"'},
        Reason.PASSWORD,
    )
