"""
The hot path: answers a request whose head, byte for byte, was answered from memory before.

Rules:

- The long way is the truth: the channel's parser, L{site.Front}, L{web.Registry}. It notes what it has answered with
  a hit; the bytes of that request's head lead to the same answer, and to nothing that isn't known of them.
- All that an answer depends on besides the head is asked again, of those whom the long way asks: the registries, who
  may ask, the limits, and what memory holds. If one of them has another answer than it had, or has to wait for one, the
  long way answers. So nobody has to tell this module what was purged, moved or changed.
- It is turned off where C{PROXY_CACHE_KEY} asks about clients.
- Heads hold passwords: a hash of them is kept, by a key that this process alone has.
- What is answered here is counted and logged by the same function, in the same words.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from twisted.internet.interfaces import ISSLTransport
from twisted.internet.tcp import Connection
from twisted.web.http import datetimeToString

from ecrproxy.access.clients import Admission, Caller
from ecrproxy.answers import Answer, Asked
from ecrproxy.cache.memory import Memory
from ecrproxy.http.request import Hit, RegistryRequest, fields
from ecrproxy.oci import Kind
from ecrproxy.request_id import REQUEST_ID
from ecrproxy.world import Worlds

LONGEST_HEAD: Final = 4096
"""Bytes of heads that are noted. Docker's have 300, with the password of a cloud's own login 3,000."""
LARGEST_BODY: Final = 2**16
"""Bytes of bodies that are sent at once: a transport buffers as many."""
NOTED_BYTES: Final = 8 * 2**20
"""Bytes of memory for heads and what they lead to."""
_ENTRY_BYTES = 3000
_UNFIT: Final = (REQUEST_ID, b"Transfer-Encoding")
"""Headers of requests that are not noted: the answer has the id, and a body is to come."""
_END = b"\r\n\r\n"


class Words(NamedTuple):
    """
    What is counted and logged of a request, but for what differs from one to the next.

    @ivar kind: the labels of the figure.
    @ivar size: bytes of the body that was sent.
    """

    kind: tuple[str, ...]
    method: str
    path: str
    status: int
    size: int
    cache: str
    reason: str
    repository: str


@dataclass(frozen=True, slots=True)
class _Noted:
    """
    Where a head leads.

    @ivar authorization: where in the head the value of its Authorization header is, if it has one.
    @ivar transfers: whether it counts as a transfer.
    @ivar before: the response up to the request's id.
    @ivar between: from there to the date.
    @ivar after: the rest.
    """

    hit: Hit
    authorization: slice | None
    transfers: bool
    before: bytes
    between: bytes
    after: bytes
    words: Words


class HotPath:
    """
    Notes what heads lead to, and answers those that come again.

    @param at_hand: answers from memory, see L{ecrproxy.proxy.PullThrough.at_hand}.
    @param admission: lets in clients; none for all.
    @param now: seconds since the epoch.
    @param key: random bytes that are nobody else's.
    @ivar answered: how many requests were answered here.
    """

    def __init__(
        self,
        at_hand: Callable[[Asked], Answer | None],
        worlds: Worlds,
        admission: Admission | None,
        now: Callable[[], float],
        key: bytes,
    ) -> None:
        self._at_hand, self._worlds, self._admission, self._now = at_hand, worlds, admission, now
        self._key, self.answered = key, 0
        self._noted: Memory[bytes, _Noted] = Memory(NOTED_BYTES)
        self._second, self._date = 0, b""

    def note(self, request: RegistryRequest, words: Words) -> None:
        """
        Note where the head of C{request} has led, if it may lead there again.
        """
        head, hit = request.head, request.hit
        if head is None or hit is None or len(head) > LONGEST_HEAD or words.size > LARGEST_BODY:
            return
        if request.code not in (200, 304) or not request.channel.persistent or self._at_hand(hit.asked) != hit.answer:
            return
        if any(map(request.requestHeaders.hasHeader, _UNFIT)):
            return
        response = _response(request, hit.answer.body if words.size else None)
        if response is None:
            return
        noted = _Noted(
            hit=hit,
            authorization=_authorization(request, head),
            transfers=hit.asked.route.kind is Kind.BLOB and not hit.asked.head,
            before=response[0],
            between=response[1],
            after=response[2],
            words=words,
        )
        secure = bool(request.isSecure())  # type: ignore[no-untyped-call]
        self._noted.put(self._name(head, secure=secure), noted, 2 * len(response[2]) + _ENTRY_BYTES)

    def answer(self, channel: Any, head: bytes) -> bool:  # noqa: ANN401 (a StrictChannel, which knows this)
        """
        Answer what C{channel}, which waits for a request, has received, if it is a head that is known.

        @return: False if the long way has to.
        """
        if len(head) > LONGEST_HEAD or not channel.may_answer_at_once:
            return False
        transport: Any = channel.transport
        secure = ISSLTransport.providedBy(transport)
        noted = self._noted.get(self._name(head, secure=secure))
        if noted is None or noted.hit.world is not self._worlds.latest:
            return False
        if self._admission is not None:
            certified = secure and transport.getPeerCertificate() is not None
            shown = None if noted.authorization is None else head[noted.authorization].decode("latin-1")
            if not self._admission.knows(Caller(channel.client, certified, shown)):
                return False
        if noted.transfers and channel.crowd.is_full_of_transfers:
            return False
        if self._at_hand(noted.hit.asked) != noted.hit.answer:
            return False
        site: Any = channel.factory
        request_id = site.new_id()
        _write(transport, b"".join((noted.before, request_id.encode(), noted.between, self._today(), noted.after)))
        self.answered += 1
        site.tell(noted.words, site.reactor.seconds(), 0.0, 0.0, channel.client, request_id)
        return True

    def _name(self, head: bytes, *, secure: bool) -> bytes:
        return hashlib.blake2b(head, key=self._key, salt=b"TLS" if secure else b"", digest_size=32).digest()

    def _today(self) -> bytes:
        now = int(self._now())
        if now != self._second:
            self._second, self._date = now, datetimeToString(now)
        return self._date


def _authorization(request: RegistryRequest, head: bytes) -> slice | None:
    shown = fields(request, b"Authorization")
    if len(shown) != 1:
        return None
    at = head.index(shown[0].encode("latin-1"))
    return slice(at, at + len(shown[0]))


def _response(request: RegistryRequest, body: object) -> tuple[bytes, bytes, bytes] | None:
    """
    Write the response that was just sent, without its id and its date: what comes before, between and after them.

    @return: none if it has them in another order, or only once.
    """
    lines = [b"HTTP/1.1 %d %b\r\n" % (request.code, request.code_message)]
    parts = []
    for name, values in request.responseHeaders.getAllRawHeaders():
        if name in (REQUEST_ID, b"Date"):
            parts.append((name, b"".join([*lines, name, b": "])))
            lines = [b"\r\n"]
        else:
            lines += [b"%b: %b\r\n" % (name, value) for value in values]
    if [name for name, _ in parts] != [REQUEST_ID, b"Date"]:
        return None
    return parts[0][1], parts[1][1], b"".join([*lines, b"\r\n", body if isinstance(body, bytes) else b""])


def _write(transport: Any, data: bytes) -> None:  # noqa: ANN401
    """
    Send C{data}, at once where nothing waits: a turn of the event loop for it costs as much as all else here.
    """
    if isinstance(transport, Connection) and not (
        transport.TLS or transport.dataBuffer or transport._tempDataBuffer or transport.disconnecting  # noqa: SLF001
    ):
        with contextlib.suppress(OSError):  # it takes none now, or has ended: the transport finds out which
            data = data[transport.socket.send(data) :]
        if not data:
            return
    transport.write(data)
