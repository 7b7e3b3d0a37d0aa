"""
The hot path: answer a request whose head, byte for byte, was answered from memory before.

Rules:

- The long way is authoritative: the channel's parser, L{site.Front}, L{web.Registry}. It notes the requests that it
  answers with a hit; the bytes of such a request's head then lead to the same answer, and to nothing else.
- Everything else that an answer depends on is checked again, with the same objects as on the long way: registries,
  admission, limits, and the contents of memory. If a result differs, or is not available at once, the long way
  answers. So purges, moves and changes need no notification here.
- The hot path is disabled if C{PROXY_CACHE_KEY} depends on clients.
- Heads contain passwords: only a hash is kept, keyed with a secret of this process.
- Concurrent requests with the same head share one request to ECR for a tag. If ECR's answer has changed, each takes
  the long way, with that outcome and the registries of when it arrived, because it was admitted then.
- Requests answered here are counted and logged by the same function, with the same words.
- A larger blob is sent here if its file is open, by the same senders, and counted as a transfer: the channel treats
  its reply as a request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import datetimeToString

from ecrproxy.access.clients import Admission, Caller
from ecrproxy.access.limits import Crowd
from ecrproxy.answers import Answer, Asked, CacheStatus, joined
from ecrproxy.cache.content import Content
from ecrproxy.cache.memory import Memory
from ecrproxy.http.answering import KNOWN, send_source
from ecrproxy.http.reply import FileReply, Written, write_with_file
from ecrproxy.http.request import Hit, RegistryRequest, Told, fields
from ecrproxy.oci import Kind
from ecrproxy.proxy import PullThrough
from ecrproxy.request_id import REQUEST_ID, current
from ecrproxy.threads import InThread, patient
from ecrproxy.transfer.outgoing import write
from ecrproxy.transfer.sending import piece_size
from ecrproxy.transfer.sources import Shelved
from ecrproxy.world import World, Worlds

log = Logger()

LONGEST_HEAD: Final = 4096
"""Maximum bytes of heads that are noted. Docker's have 300, with the password of a cloud's own login 3,000."""
LARGEST_BODY: Final = 2**16
"""Maximum bytes of bodies that are sent in one write: as many as a transport buffers."""
NOTED_BYTES: Final = 8 * 2**20
"""Bytes of memory for hashes of heads and their responses."""
_ENTRY_BYTES = 3000
_UNFIT: Final = (REQUEST_ID, b"Transfer-Encoding")
"""Requests with these headers are not noted: the response repeats the id, and a body follows."""


class Words(NamedTuple):
    """
    The counted and logged values of a request, without those that differ between requests for the same head.

    @ivar kind: the metric's labels; the last is the registry's.
    @ivar size: bytes of the body sent.
    @ivar several: whether more than one registry is configured.
    """

    kind: tuple[str, ...]
    method: str
    path: str
    status: int
    size: int
    cache: str
    reason: str
    repository: str
    several: bool

    def of_none(self) -> Words:
        """
        Return the words for a request that was not answered.
        """
        route, method, _, _, registry = self.kind
        kind = (route, method, "-", "-", registry)
        return self._replace(kind=kind, status=0, size=0, cache="-", reason="-")


@dataclass(frozen=True, slots=True)
class _Noted:
    """
    The response to a head.

    @ivar hit: the answer, without the file.
    @ivar authorization: the position of the Authorization header's value in the head, if there is one.
    @ivar asks: whether ECR must confirm the answer each time.
    @ivar transfers: whether the response counts as a transfer.
    @ivar has_file: whether the body is a file.
    """

    hit: Hit
    authorization: slice | None
    asks: bool
    transfers: bool
    has_file: bool
    response: Written
    words: Words


@dataclass(slots=True)
class Waiting:
    """
    A request that waits for ECR to resolve a tag.

    @ivar started: when the request arrived.
    """

    head: bytes = field(repr=False)  # may contain a password
    request_id: str
    started: float


@dataclass(eq=False, slots=True)
class Revalidation:
    """
    A request to ECR for a tag, and the client requests that wait for its result.

    @ivar first: the client request that started it.
    @ivar waiting: client requests by channel.
    """

    noted: _Noted
    first: Waiting
    waiting: dict[Any, Waiting] = field(default_factory=dict)


class HotPath:
    """
    Notes responses by request head, and answers requests with a known head.

    @param pull_through: answers from memory, and asks ECR for tags.
    @param admission: admits clients; None to admit all.
    @param now: seconds since the epoch.
    @param in_thread: reads what is not in the page cache.
    @param key: secret random bytes, for hashes of heads.
    @ivar answered: number of requests answered here.
    """

    def __init__(
        self,
        pull_through: PullThrough,
        worlds: Worlds,
        admission: Admission | None,
        now: Callable[[], float],
        in_thread: InThread,
        key: bytes,
    ) -> None:
        self._pull_through, self._at_hand = pull_through, pull_through.at_hand
        self._worlds, self._admission = worlds, admission
        self._now, self._in_thread, self._key, self.answered = now, patient(in_thread), key, 0
        self._questions: dict[bytes, Revalidation] = {}
        self._noted: Memory[bytes, _Noted] = Memory(NOTED_BYTES)
        self._world = worlds.latest
        self._second, self._date = 0, b""

    def note(self, request: RegistryRequest, words: Words) -> None:
        """
        Note the response to the head of C{request}, if it can be repeated.
        """
        head, hit = request.head, request.hit
        if head is None or hit is None or len(head) > LONGEST_HEAD:
            return
        has_file = isinstance(hit.answer.body, Content) and hit.asked.route.kind is Kind.BLOB
        if hit.world is not self._entered() or (words.size > LARGEST_BODY and not has_file):
            return
        asks = hit.answer.status is CacheStatus.REVALIDATED
        if request.code not in (200, 304) or not request.channel.persistent:
            return
        if any(map(request.requestHeaders.hasHeader, _UNFIT)):
            return
        if has_file:  # whether the file is open is checked each time
            hit = hit._replace(answer=hit.answer._replace(body=None))
        elif self._at_hand(hit.asked) != (None if asks else hit.answer):
            return
        response = Written.of(request, hit.answer.body if words.size else None)
        if response is None:
            return
        noted = _Noted(
            hit=hit,
            authorization=_authorization(request, head),
            asks=asks,
            transfers=hit.asked.route.kind is Kind.BLOB and not hit.asked.head,
            has_file=has_file and words.size > 0,
            response=response,
            words=words,
        )
        secure = bool(request.isSecure())  # type: ignore[no-untyped-call]
        held = hit.answer.body if isinstance(hit.answer.body, bytes) else b""
        size = len(response.after) + len(held) + len(head) + _ENTRY_BYTES
        self._noted.put(self._name(head, secure=secure), noted, size)

    def answer(self, channel: Any, head: bytes) -> bool:  # noqa: ANN401 (a StrictChannel, which knows this)
        """
        Answer C{head}, received on an idle C{channel}, if it is known.

        @return: False if the long way must answer.
        """
        if len(head) > LONGEST_HEAD or not channel.may_answer_at_once:
            return False
        self._entered()
        name = self._name(head, secure=channel.secure)
        noted = self._noted.get(name)
        if noted is None:
            return False
        if self._admission is not None:
            certified = channel.secure and channel.transport.getPeerCertificate() is not None
            shown = None if noted.authorization is None else head[noted.authorization].decode("latin-1")
            if not self._admission.knows(Caller(channel.client, certified, shown)):
                return False
        if noted.transfers and channel.crowd.is_full_of_transfers:
            return False
        found, file = _apart(self._at_hand(noted.hit.asked))
        if not self._is_same(found, noted):
            _close(file)
            return False
        site: Any = channel.factory
        request_id, now = site.new_id(), site.reactor.seconds()
        if noted.asks:
            self._wait(channel, Waiting(head, request_id, now), noted, name)
        elif file is not None and noted.has_file:
            self._send_file(channel, noted, request_id, now, file)
        else:
            _close(file)
            self._send(channel, noted, request_id, now)
            channel.await_next(now)
        return True

    def _entered(self) -> World:
        """
        Return the latest registries. After a reload, drop what was noted for the previous ones, which frees them.
        """
        if self._world is not self._worlds.latest:
            self._world = self._worlds.latest
            self._noted.clear()
        return self._world

    def _is_same(self, found: Answer | None, noted: _Noted) -> bool:
        """
        Return True if the lookup in memory, with result C{found}, still leads to the noted answer.
        """
        if noted.asks:
            return found is None and self._pull_through.knows_tag(noted.hit.asked)
        return found == noted.hit.answer

    def _wait(self, channel: Any, waiting: Waiting, noted: _Noted, name: bytes) -> None:  # noqa: ANN401
        """
        Let a request wait for ECR.
        """
        question, begins = self._questions.get(name), False
        if question is None or question.noted is not noted:
            question, begins = Revalidation(noted, waiting), True
            self._questions[name] = question
        question.waiting[channel] = waiting
        channel.wait_for(question)
        if begins:
            asking = Deferred.fromCoroutine(self._asked(noted.hit.asked, waiting.request_id))
            asking.addBoth(self._told, name, question).addErrback(_failed)

    async def _asked(self, asked: Asked, request_id: str) -> Answer:
        current.set(request_id)
        self._worlds.enter()
        return await self._pull_through.latest(asked)

    def _told(self, outcome: Answer | Failure, name: bytes, question: Revalidation) -> None:
        """
        Answer all requests that wait for a question.
        """
        if self._questions.get(name) is question:
            del self._questions[name]
        noted, waiting = question.noted, question.waiting
        same = outcome == noted.hit.answer
        while waiting:
            channel = next(iter(waiting))
            each = waiting.pop(channel)
            if same and channel.may_answer_at_once:
                now = channel.factory.reactor.seconds()
                self._send(channel, noted, each.request_id, now, now - each.started)
                channel.go_on(now)
            else:
                found = outcome.value if isinstance(outcome, Failure) else outcome
                if isinstance(found, Answer) and each is not question.first:
                    found = joined(found)
                channel.take_long_way(each.head, Told(found, each.request_id, each.started, noted.hit.world))

    @staticmethod
    def leave(channel: Any, question: Revalidation) -> None:  # noqa: ANN401
        """
        Stop waiting: the client's connection ends. The request to ECR continues.
        """
        if (waiting := question.waiting.pop(channel, None)) is not None:
            site: Any = channel.factory
            now = site.reactor.seconds()
            seconds, words = now - waiting.started, question.noted.words.of_none()
            site.tell(words, now, seconds, seconds, channel.client, waiting.request_id, aborted=True)

    def _send(self, channel: Any, noted: _Noted, request_id: str, now: float, waited: float = 0.0) -> None:  # noqa: ANN401
        """
        Send a response.

        @param now: on the reactor's clock; work later in this reactor turn is not included in the logged time.
        @param waited: seconds spent waiting for ECR.
        """
        write(channel.transport, noted.response.with_those(request_id, self._today()))
        self._pull_through.answered_at_hand(noted.hit.asked, noted.hit.answer)
        self.answered += 1
        channel.factory.tell(noted.words, now, waited, waited, channel.client, request_id)

    def _send_file(self, channel: Any, noted: _Noted, request_id: str, started: float, file: Content) -> None:  # noqa: ANN401
        """
        Send a response with a file: at once as much as possible, the rest as on the long way.
        """
        site, crowd, client = channel.factory, channel.crowd, channel.client
        self.answered += 1

        def tell(size: int, *, aborted: bool) -> None:
            now = site.reactor.seconds()
            site.tell(noted.words._replace(size=size), now, now - started, 0.0, client, request_id, aborted=aborted)

        self._pull_through.answered_at_hand(noted.hit.asked, noted.hit.answer)
        sent = write_with_file(channel.transport, noted.response.with_those(request_id, self._today()), file)
        if sent == file.size:
            file.close()
            tell(sent, aborted=False)
            channel.await_next(site.reactor.seconds())
            return
        crowd.begin_transfer()
        reply = FileReply(channel, sent, tell)
        channel.begin_reply(reply)
        reply.sending = Deferred.fromCoroutine(self._send_rest(reply, file, crowd))
        reply.sending.addErrback(_broken, reply).addErrback(_failed)

    async def _send_rest(self, reply: FileReply, file: Content, crowd: Crowd) -> None:
        source = Shelved(file, reply.sentLength, file.size)
        try:
            await send_source(reply, source, file, self._in_thread, lambda: piece_size(crowd.transferring_everywhere))
            reply.finish()
        finally:
            crowd.end_transfer()

    def _name(self, head: bytes, *, secure: bool) -> bytes:
        return hashlib.blake2b(head, key=self._key, salt=b"TLS" if secure else b"", digest_size=32).digest()

    def _today(self) -> bytes:
        now = int(self._now())
        if now != self._second:
            self._second, self._date = now, datetimeToString(now)
        return self._date


def _failed(failure: Failure) -> None:
    log.failure("Answering by the hot path", failure)


def _broken(failure: Failure, reply: FileReply) -> None:
    """
    Break off a failed reply.
    """
    if reply.channel is None:  # the client has disconnected
        return
    if not failure.check(*KNOWN):
        log.failure("Sending a file", failure)
    reply.channel.break_off()


def _apart(found: Answer | None) -> tuple[Answer | None, Content | None]:
    """
    Separate the file from an answer; noted answers have none.
    """
    if found is None or not isinstance(found.body, Content):
        return found, None
    return found._replace(body=None), found.body


def _close(file: Content | None) -> None:
    if file is not None:
        file.close()


def _authorization(request: RegistryRequest, head: bytes) -> slice | None:
    shown = fields(request, b"Authorization")
    if len(shown) != 1:
        return None
    at = head.index(shown[0].encode("latin-1"))
    return slice(at, at + len(shown[0]))
