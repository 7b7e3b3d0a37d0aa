"""
The API for the command C{ecr-proxy}, on the admin port below /api/.

Rules:

- No web page but our own can send requests: each needs a header of ours, which browsers send to other sites only after
  a preflight, and this port allows none. Requests with side effects are POSTs of JSON without an Origin, or with that
  of this very port, whose names no stranger can own: see L{port}.
- The work is done step by step in its own threads, so neither the event loop nor a pull waits for it.
- Long responses are JSON documents, one per line, generated while they are sent, at the client's pace. If one fails
  midway, its connection is aborted. If the client disconnects, the work ends.
- Errors are the distribution spec's JSON, as everywhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.http import OK
from zope.interface import implementer

from ecrproxy.access.browsers import is_own_page
from ecrproxy.cache.entries import EntryKey
from ecrproxy.cache.inventory import STEP, Document, Inventory
from ecrproxy.cache.upkeep import Meant, Upkeep
from ecrproxy.http.answering import Answering, begin, send_body
from ecrproxy.http.request import field, fields
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.oci import Digest, RegistryError
from ecrproxy.transfer.response_body import LEAST_PIECE

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorTime
    from twisted.web.server import Request

    from ecrproxy.prefetch_progress import RunningPrefetch
    from ecrproxy.threads import InThread

log = Logger()

SHOWN: Final = b"X-Ecrproxy-Api"
"""The header that each request needs."""
BODY_LIMIT: Final = 2**16
"""Maximum bytes of a request's body, which Twisted keeps in memory: hundreds of names."""
_TOGETHER: Final = 256
"""Documents per step: that many small files are read in milliseconds."""
_LONG: Final = frozenset({"imported", "files"})
"""What documents of longer steps have: an import, and a removal."""
_PATHS: Final = "entries, content, remove, verify, purge, prefetch"
_PLATFORMS: Final = 20
LOOK_SECONDS: Final = 0.5
"""Seconds between two reports of a prefetch."""
_MOST: Final = 10**18
"""The largest valid number: bytes per second, or seconds since the epoch."""


class Api(Answering):
    """
    The resource /api/.

    @param purged: drops purged content from memory.
    @param prefetch: begins a prefetch: see L{Prefetching.begin}.
    @param listing: runs listings and removals in a thread.
    @param hashing: runs verification in a thread.
    """

    methods = (b"GET", b"HEAD", b"POST")

    def __init__(
        self,
        inventory: Inventory,
        upkeep: Upkeep,
        purged: Callable[[], Awaitable[None]],
        prefetch: Callable[[Repository, str, Sequence[str]], RunningPrefetch],
        listing: InThread,
        hashing: InThread,
        clock: IReactorTime,
    ) -> None:
        super().__init__()
        self._inventory, self._upkeep, self._purged, self._clock = inventory, upkeep, purged, clock
        self._prefetch, self._listing, self._hashing = prefetch, listing, hashing

    async def respond(self, request: Request) -> None:
        """
        Handle a request.

        @raise RegistryError: if the request is invalid, or may be from a web page.
        """
        _refuse_pages(request)
        match (request.method, b"/".join(request.postpath or [])):
            case (b"GET", b"entries"):
                await self._stream(request, self._listing, self._inventory.entries())
            case (b"GET", b"content"):
                await self._stream(request, self._listing, self._inventory.content())
            case (b"POST", b"remove"):
                await self._remove(request, _document(request))
            case (b"POST", b"verify"):
                await self._verify(request, _document(request))
            case (b"POST", b"purge"):
                await self._stream(
                    request, self._listing, self._upkeep.purge(_meant(_document(request))), after=self._purged
                )
            case (b"POST", b"prefetch"):
                await self._send_prefetch(request, _document(request))
            case (_, b"entries" | b"content"):
                raise _not_so("GET")
            case (_, b"remove" | b"verify" | b"purge" | b"prefetch"):
                raise _not_so("POST")
            case _:
                raise RegistryError(404, "UNSUPPORTED", f"no such path: below /api/ are {_PATHS}")

    async def _remove(self, request: Request, document: Document) -> None:
        entries, content = _keys(document, "entries"), _digests(document, "content")
        unused_since = _number(document, "unused_since")
        try:
            removed = await self._listing(self._inventory.remove, entries, content, unused_since)
        except OSError as problem:
            raise RegistryError(503, "UNAVAILABLE", f"the cache's index can't be written: {problem}") from problem
        await self._purged()
        log.info(
            "Purged {entries} entries and {files} files of content, {bytes} bytes",
            entries=removed.entries,
            files=removed.files,
            bytes=removed.bytes,
        )
        await send_body(request, OK, "application/json", _line(dataclasses.asdict(removed)))

    async def _verify(self, request: Request, document: Document) -> None:
        keep, rate = document.get("keep") is True, _number(document, "rate")
        if "digests" not in document:
            await self._stream(request, self._hashing, self._upkeep.verify(_meant(document)), rate)
            return
        each = (self._inventory.verify(digest, keep=keep) for digest in _digests(document, "digests"))
        await self._stream(request, self._hashing, itertools.chain.from_iterable(each), rate)

    async def _send_prefetch(self, request: Request, document: Document) -> None:
        """
        Prefetch an image, and send the progress. The prefetch stops if the client disconnects.
        """
        meant, platforms = _meant(document), _list(document, "platforms")
        if meant.repository is None or meant.reference is None:
            raise _wrong("give a registry, a repository, and a reference")
        if not all(isinstance(each, str) for each in platforms) or len(platforms) > _PLATFORMS:
            raise _wrong(f"platforms is no list of {_PLATFORMS} texts at most")
        prefetch = self._prefetch(Repository(meant.registry, meant.repository), meant.reference, platforms)
        begin(request, OK)
        request.setHeader("Content-Type", "application/x-ndjson")
        flow = _Flow(request)
        try:
            while True:
                progress = prefetch.progress
                request.write(_line(dataclasses.asdict(progress)))
                if progress.over:
                    break
                await flow.open()
                await deferLater(self._clock, LOOK_SECONDS)
        finally:
            prefetch.stop()
        request.unregisterProducer()
        request.finish()

    async def _stream(
        self,
        request: Request,
        in_thread: InThread,
        documents: Iterator[Document],
        rate: float | None = None,
        after: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """
        Send documents as they are generated.

        @param rate: maximum bytes per second to hash.
        @param after: called after each step that has some.
        """
        begin(request, OK)
        request.setHeader("Content-Type", "application/x-ndjson")
        flow = _Flow(request)
        while True:
            lines, hashed, more = await in_thread(_step, documents)
            if lines and after is not None:
                await after()
            for start in range(0, len(lines), LEAST_PIECE):
                request.write(lines[start : start + LEAST_PIECE])
                await flow.open()
            if rate and hashed:
                await deferLater(self._clock, hashed / rate)
            if not more:
                break
        request.unregisterProducer()
        request.finish()


@implementer(IPushProducer)
class _Flow:
    """
    Tracks whether the client accepts more data.
    """

    def __init__(self, request: Request) -> None:
        self._paused: Deferred[None] | None = None
        request.registerProducer(self, True)  # noqa: FBT003 (Twisted's signature)

    async def open(self) -> None:
        """
        Wait until the client accepts more data.
        """
        if self._paused is not None:
            await self._paused

    def pauseProducing(self) -> None:
        """
        Pause.
        """
        self._paused = self._paused or Deferred()

    def resumeProducing(self) -> None:
        """
        Resume.
        """
        paused, self._paused = self._paused, None
        if paused is not None:
            paused.callback(None)

    def stopProducing(self) -> None:
        """
        Do nothing: the sender is notified in other ways that the client has disconnected.
        """


def _step(documents: Iterator[Document]) -> tuple[bytes, int, bool]:
    """
    Generate some documents. Runs in a thread.

    @return: their lines, the bytes that were hashed for them, and False at the end. Empty documents have no line.
    """
    lines, hashed, more = bytearray(), 0, False
    for each in itertools.islice(documents, _TOGETHER):
        more = True
        lines += _line(each) if each else b""
        hashed += each.get("hashed", 0)
        if hashed >= STEP or len(lines) >= LEAST_PIECE or _LONG & each.keys():
            break
    return bytes(lines), hashed, more


def _line(document: Document) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def _refuse_pages(request: Request) -> None:
    """
    Refuse requests that a web page may have sent.

    @raise RegistryError: if so.
    """
    if not request.requestHeaders.hasHeader(SHOWN):
        raise RegistryError(403, "DENIED", f"this is for programs: send the header {SHOWN.decode()}: 1")
    if request.method == b"POST" and request.requestHeaders.hasHeader(b"Origin") and not _is_own_page(request):
        raise RegistryError(403, "DENIED", "this is not for web pages of others")
    if request.method == b"POST" and (field(request, b"Content-Type") or "").partition(";")[0] != "application/json":
        raise RegistryError(415, "UNSUPPORTED", "send JSON, and say so: Content-Type: application/json")


def _is_own_page(request: Request) -> bool:
    origins, hosts = fields(request, b"Origin"), fields(request, b"Host")
    if len(origins) != 1 or len(hosts) != 1:
        return False
    return is_own_page(origins[0], field(request, b"Sec-Fetch-Site"), hosts[0], secure=request.isSecure())


def _not_so(method: str) -> RegistryError:
    return RegistryError(405, "UNSUPPORTED", f"ask for this with {method}", {"Allow": method})


def _document(request: Request) -> Document:
    try:
        document = json.loads(request.content.read()) if request.content is not None else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise _wrong("the body is no JSON object")
    return document


def _meant(document: Document) -> Meant:
    registry, repository, reference = (document.get(name) for name in ("registry", "repository", "reference"))
    found = [each for each in (registry, repository, reference) if each is not None]
    texts = all(isinstance(each, str) and each.isascii() and each.isprintable() and each for each in found)
    if registry is None or not texts or (reference is not None and repository is None):
        raise _wrong("give a registry, as /api/entries does, and possibly a repository, and a reference in it")
    try:
        if reference is not None and ":" in reference:
            Digest.parse(reference)
    except ValueError as problem:
        raise _wrong(str(problem)) from None
    return Meant(RegistryId(registry), repository, reference)


def _list(document: Document, name: str) -> list[Any]:
    found = document.get(name, [])
    if not isinstance(found, list):
        raise _wrong(f"{name} is no list")
    return found


def _keys(document: Document, name: str) -> list[EntryKey]:
    try:
        return [EntryKey.parse(each) for each in _list(document, name)]
    except (ValueError, AttributeError):
        raise _wrong(f"{name} has something in it that is no name of an entry, as /api/entries gives them") from None


def _digests(document: Document, name: str) -> list[Digest]:
    try:
        return [Digest.parse(each) for each in _list(document, name)]
    except (ValueError, AttributeError):
        raise _wrong(f"{name} has something in it that is no digest") from None


def _number(document: Document, name: str) -> float | None:
    found = document.get(name)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float) or not 1 <= found <= _MOST:
        raise _wrong(f"{name} is no number from 1 to {_MOST}")
    return float(found)


def _wrong(what: str) -> RegistryError:
    return RegistryError(400, "UNSUPPORTED", what)
