"""
The stand-in for Amazon ECR that all tests share: the AWS call, the registry, and its bucket.

L{StandIn} is all that a test needs. Push into it, pass its C{resource} to a
C{StubTreq} (or to a C{Site}), and look at C{asked} afterwards. It speaks the
real protocols and reproduces ECR's quirks, which are described in the modules that
build the answers: L{tests.registry_replies}, L{tests.registry_bucket} and
L{tests.registry_content}.

In memory, call C{flush()} on the C{StubTreq} after L{StandIn.deliver},
L{StandIn.release}, L{StandIn.cut} and whenever the clock was advanced.
"""

from __future__ import annotations

import json
from functools import partial
from urllib.parse import urlsplit

from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure
from twisted.web.resource import IResource
from twisted.web.server import NOT_DONE_YET, Request
from zope.interface import implementer

from tests.registry_bucket import BucketSide, Urls
from tests.registry_content import Image, Shelves, digest_of, layer
from tests.registry_faults import Fault, Faults
from tests.registry_http import Asked, Quirks, Reply, Service
from tests.registry_replies import ApiSide, Bearers, RegistrySide, Tokens, named_in
from tests.registry_sending import Outgoing, Sending

__all__ = ["Asked", "Fault", "Image", "Quirks", "Reply", "StandIn", "digest_of", "layer"]


class StandIn(Shelves, Faults):
    """
    An ECR in memory: the AWS call, the registry and its bucket; faults on demand.

    @param realm: the URL of its token service, unless it is a private registry of ECR.
    """

    def __init__(
        self,
        clock: IReactorTime,
        *,
        registry: str = "https://123456789012.dkr.ecr.eu-west-1.amazonaws.com",
        bucket: str = "https://prod-eu-west-1-starport-layer-bucket.s3.eu-west-1.amazonaws.com",
        realm: str = "",
    ) -> None:
        Shelves.__init__(self)
        Faults.__init__(self)
        self.clock, self.registry, self.bucket = clock, registry, bucket
        self.quirks = Quirks()
        self.asked: list[Asked] = []
        self.bytes_sent = 0
        self.resource: IResource = _Door(self)
        self.bearers = Bearers(clock, self.quirks, realm=realm)
        self.tokens = self.bearers if realm else Tokens(clock, self.quirks)
        self.urls = Urls(clock, registry, bucket, self.quirks)
        self._held: set[str] = set()
        self._sendings: list[tuple[str, Sending]] = []
        self._registry_side = RegistrySide(
            registry, self.repositories, self._corrupted, self.tokens, self.urls, self.quirks
        )
        self._bucket_side = BucketSide(self.repositories, self._corrupted, self.urls, self.quirks)
        self._api_side = ApiSide(registry, self.tokens)

    # Tokens and signed URLs

    def issue_token(self) -> str:
        """
        Issue a token that is valid for twelve hours, as the AWS call does: base64 of "AWS:password".
        """
        return self.tokens.issue()[0]

    def expire_tokens(self) -> None:
        """
        Expire all tokens so far: 403 DENIED.
        """
        self.tokens.expire()

    def forget_tokens(self) -> None:
        """
        Treat all tokens so far as never issued: 400, no challenge.
        """
        self.tokens.forget()

    def expire_urls(self) -> None:
        """
        Expire all URLs into the bucket: 403.
        """
        self.urls.expire()

    # What was requested

    def requests(
        self, service: Service | None = None, method: str | None = None, path_contains: str = ""
    ) -> list[Asked]:
        """
        Return the requests to a service, by method, path or digest (the bucket's too).
        """
        return [asked for asked in self.asked if asked.matches(service, method, path_contains)]

    def count(self, service: Service | None = None, method: str | None = None, path_contains: str = "") -> int:
        """
        Return the number of such requests.
        """
        return len(self.requests(service, method, path_contains))

    def forget_asked(self) -> None:
        """
        Reset the recorded requests.
        """
        self.asked.clear()
        self.bytes_sent = 0

    # Bodies by hand

    def hold(self, digest: str) -> None:
        """
        From now on send the headers of that blob, and hold back its body.
        """
        self._held.add(digest)

    def held(self, digest: str) -> int:
        """
        Return how many requests for that blob are in flight.
        """
        return len(self._sending(digest))

    def deliver(self, digest: str, count: int) -> None:
        """
        Send the next bytes to every request held for that blob.
        """
        for sending in self._sending(digest):
            sending.allow(count)

    def release(self, digest: str) -> None:
        """
        Send the rest to every request held for that blob, and stop holding.
        """
        self._held.discard(digest)
        for sending in self._sending(digest):
            sending.allow(None)

    def cut(self, digest: str) -> None:
        """
        Close the connection of every request in flight for that blob; go on holding new ones.
        """
        for sending in self._sending(digest):
            sending.drop()

    # Answers

    def answer(self, request: Outgoing, asked: Asked) -> None:
        """
        Answer one request that is already recorded.
        """
        fault = self._struck_by(asked)
        if fault is None:
            self.send(request, asked, self._reply(asked))
        elif fault.drop:
            request.loseConnection()
        elif fault.pace is not None:
            self.send(request, asked, fault.reply or self._reply(asked), pace=fault.pace)
        elif fault.reply is not None:
            self.send(request, asked, fault.reply)
        elif fault.break_after is not None:
            self.send(request, asked, self._reply(asked), fault.break_after)
        # else silence: the client waits until it times out

    def _reply(self, asked: Asked) -> Reply:
        if asked.service == "registry":
            return self._registry_side.reply(asked)
        if asked.service == "bucket":
            return self._bucket_side.reply(asked)
        return self.bearers.reply(asked) if asked.service == "realm" else self._api_side.reply(asked)

    def send(
        self,
        request: Outgoing,
        asked: Asked,
        reply: Reply,
        after: int | None = None,
        pace: float | None = None,
    ) -> None:
        """
        Send one answer; with C{after} the connection ends after so many bytes of its body.

        @param pace: bytes of its body a second; 0 means no limit.
        """
        request.setResponseCode(reply.status)
        request.defaultContentType = None
        request.setHeader("Content-Length", str(len(reply.body)))
        if asked.service == "registry":
            request.setHeader("Docker-Distribution-Api-Version", "registry/2.0")
        for name, value in reply.headers.items():
            request.setHeader(name, value.encode("latin-1"))
        if asked.method == "HEAD":
            request.finish()
            return
        own = self.quirks.sends_blobs and asked.service == "registry" and bool(asked.digest)
        data = (asked.service == "bucket" or own) and reply.status in (200, 206)
        sending = Sending(
            request,
            reply.body,
            self.clock,
            self._count_bytes if data else lambda _: None,
            rate=pace or (self.quirks.rate if data else None),
            allowed=0 if pace == 0 or (data and asked.digest in self._held) else None,
            break_after=after,
        )
        if data:
            self._sendings.append((asked.digest, sending))
        sending.start()

    def _count_bytes(self, count: int) -> None:
        self.bytes_sent += count

    def _sending(self, digest: str) -> list[Sending]:
        self._sendings = [(name, sending) for name, sending in self._sendings if not sending.over]
        return [sending for name, sending in self._sendings if name == digest]


@implementer(IResource)
class _Door:
    """
    The root resource: records every request, and passes it to the service that its Host names.
    """

    isLeaf = True

    def __init__(self, standin: StandIn) -> None:
        self._standin = standin
        self._services: dict[str, Service] = {
            _place(standin.registry): "registry",
            _place(standin.bucket): "bucket",
        }

    def getChildWithDefault(self, name: bytes, request: Request) -> _Door:
        return self

    def putChild(self, path: bytes, child: IResource) -> None:
        raise NotImplementedError

    def render(self, request: Request) -> int:
        """
        Record the request, and answer it when its time has come.
        """
        asked = self._asked(request)
        if asked.service == "api" and asked.path == "/_asked":
            self._standin.send(request, asked, self._inspection())
            return NOT_DONE_YET
        self._standin.asked.append(asked)
        answer = partial(self._standin.answer, request, asked)
        if not self._standin.quirks.latency:
            answer()
            return NOT_DONE_YET
        later = self._standin.clock.callLater(self._standin.quirks.latency, answer)

        def left(_reason: Failure) -> None:
            if later.active():
                later.cancel()

        request.notifyFinish().addErrback(left)
        return NOT_DONE_YET

    def _asked(self, request: Request) -> Asked:
        path, _, query = request.uri.decode("latin-1").partition("?")
        method = request.method.decode("latin-1")
        headers = {
            name.decode("latin-1").lower(): b", ".join(values).decode("latin-1")
            for name, values in request.requestHeaders.getAllRawHeaders()
        }
        place = _place("//" + headers.get("host", ""))
        service = self._services.get(place, "realm" if place == _place(self._standin.bearers.realm) else "api")
        if method == "POST" and path == "/":
            service = "api"  # one port may serve both, as the standalone stand-in's does
        about = {"registry": named_in, "bucket": self._standin.urls.named_in}.get(service)
        repository, digest = about(path) if about else ("", "")
        body = request.content.read() if request.content else b""
        return Asked(service, method, path, headers, query, body, repository, digest)

    def _inspection(self) -> Reply:
        """
        Return what was requested so far, for users of the standalone stand-in.
        """
        seen = [
            {"service": asked.service, "method": asked.method, "target": asked.target} for asked in self._standin.asked
        ]
        body = json.dumps({"bytes_sent": self._standin.bytes_sent, "asked": seen}).encode()
        return Reply(200, {"Content-Type": "application/json"}, body)


def _place(url: str) -> str:
    """
    Return host and port of a URL, without default ports.
    """
    place = urlsplit(url).netloc.lower()
    return place.removesuffix(":443").removesuffix(":80")
