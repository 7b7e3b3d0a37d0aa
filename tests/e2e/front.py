"""
What Amazon ECR has and a plain registry lacks, as a small program before one.

A registry of the distribution project keeps the images.  This front adds
ECR's behaviour, as known from public documents and reports:

- C{POST /} is the AWS call GetAuthorizationToken.  Only its token opens
  C{/v2/}: a missing one is answered 401 with a Basic challenge in plain text,
  an unknown one 400 without any challenge, an expired one 403.
- The GET of a manifest comes without Docker-Content-Digest, its HEAD with it.
- The GET of a blob is a redirect to a bucket on another port, under a URL
  that is valid for one object and one hour.  See L{bucket}.
- Pages of tags end in an absolute link with an opaque C{last}.
- Errors use ECR's words.

C{GET /_counters} returns the counts of requests so far.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from twisted.internet import reactor as global_reactor
from twisted.web.client import Agent, readBody
from twisted.web.http import Request
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource
from twisted.web.server import Site

from .answering import Answer, Answering, errors
from .bucket import Bucket, Pace
from .tokens import ACCOUNT, Aws, Counters, Tokens

if TYPE_CHECKING:
    from twisted.internet.interfaces import IReactorCore, IReactorTCP, IReactorTime
    from twisted.internet.protocol import ServerFactory

    class Reactor(IReactorCore, IReactorTCP, IReactorTime):
        """
        What the front uses of the reactor.
        """


DEFAULT_PAGE = 100
LONGEST_PAGE = 1000
ROUTE = re.compile(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs|tags|referrers)/(?P<last>[^/]+)")


class Registry(Answering):
    """
    The registry itself, behind the token.
    """

    def __init__(self, behind: str, bucket: Bucket, agent: Agent, tokens: Tokens, counters: Counters) -> None:
        super().__init__()
        self._behind, self._bucket, self._agent = behind, bucket, agent
        self._tokens, self._counters = tokens, counters

    async def answer(self, request: Request) -> Answer:
        """
        Count the request, check its token, and serve it.
        """
        path, method = request.path.decode("ascii"), request.method.decode("ascii")
        route = ROUTE.fullmatch(path)
        kind = route["kind"] if route else "other"
        self._counters.requests[f"{method} {kind}"] += 1
        if route:
            self._counters.repositories[route["name"]] += 1
        refusal = self._tokens.refusal(request.getHeader("Authorization"))
        if refusal is not None:
            self._counters.refused += 1
            return refusal
        if method not in ("GET", "HEAD"):
            return errors(405, "UNSUPPORTED", "This stand-in is for pulling")
        if route is None:
            return Answer(200 if path == "/v2/" else 404)
        if kind == "tags":
            return await self._tags(request, route)
        if kind == "blobs" and method == "GET":
            return await self._redirect(path, route)
        return await self._manifest(request, method, path, route)

    async def _ask(self, method: str, path: str, accept: Sequence[str] = ()) -> tuple[int, Headers, bytes]:
        headers = Headers({"Accept": list(accept)} if accept else {})
        response = await self._agent.request(method.encode(), (self._behind + path).encode(), headers)
        body = b"" if method == "HEAD" else await readBody(response)
        return response.code, response.headers, body

    async def _redirect(self, path: str, route: re.Match[str]) -> Answer:
        status, _, _ = await self._ask("HEAD", path)
        if status != 200:
            return await self._missing(route)
        return Answer(307, b"", {"Location": self._bucket.sign(route["last"])})

    async def _manifest(self, request: Request, method: str, path: str, route: re.Match[str]) -> Answer:
        accept = [each or "" for each in request.requestHeaders.getRawHeaders("Accept", [])]
        status, headers, body = await self._ask(method, path, accept)
        if status == 404:
            return await self._missing(route)
        wanted = ["Content-Type"]
        if method == "HEAD":
            wanted += ["Content-Length", "Docker-Content-Digest"]
        given = {name: (headers.getRawHeaders(name) or [""])[0] or "" for name in wanted}
        given["Docker-Distribution-Api-Version"] = "registry/2.0"
        return Answer(status, body, given)

    async def _missing(self, route: re.Match[str]) -> Answer:
        name = route["name"]
        status, _, _ = await self._ask("GET", f"/v2/{name}/tags/list")
        if status == 404:
            where = f"does not exist in the registry with id '{ACCOUNT}'"
            return errors(404, "NAME_UNKNOWN", f"The repository with name '{name}' {where}")
        if route["kind"] == "blobs":
            return errors(404, "BLOB_UNKNOWN", "blob unknown to registry")
        return errors(404, "MANIFEST_UNKNOWN", "Requested image not found")

    async def _tags(self, request: Request, route: re.Match[str]) -> Answer:
        name, length = route["name"], int(arguments(request).get("n", DEFAULT_PAGE))
        if length > LONGEST_PAGE:
            words = "Invalid parameter at 'maxResults' failed to satisfy constraint"
            return errors(405, "UNSUPPORTED", words)
        status, _, body = await self._ask("GET", f"/v2/{name}/tags/list")
        if status == 404:
            return await self._missing(route)
        tags = sorted(json.loads(body)["tags"] or [])
        start = start_of(arguments(request).get("last", ""))
        page = tags[start : start + length]
        headers = {"Content-Type": "text/plain; charset=utf-8"}
        if start + length < len(tags):
            query = f"n={length}&last={place(start + length)}"
            host = request.getHeader("Host")
            headers["Link"] = f'<http://{host}/v2/{name}/tags/list?{query}>; rel="next"'
        return Answer(200, json.dumps({"name": name, "tags": page}).encode(), headers)


class Figures(Resource):
    """
    The counters, for the tests to read.
    """

    isLeaf = True

    def __init__(self, counters: Counters, bucket: Bucket) -> None:
        super().__init__()
        self._counters, self._bucket = counters, bucket

    def render_GET(self, request: Request) -> bytes:
        """
        Return the counters.
        """
        asked = vars(self._counters) | {"bucket": vars(self._bucket.counters)}
        request.setHeader("Content-Type", "application/json")
        return json.dumps(asked).encode()


def arguments(request: Request) -> dict[str, str]:
    """
    Parse the query, where each name counts once.
    """
    return {name.decode(): values[0].decode() for name, values in (request.args or {}).items()}


def place(number: int) -> str:
    """
    Encode a place in a list as an opaque token.
    """
    return base64.urlsafe_b64encode(secrets.token_bytes(24) + b"%d" % number).decode()


def start_of(last: str) -> int:
    """
    Decode a token of L{place}; return the beginning if there is none.
    """
    return int(base64.urlsafe_b64decode(last)[24:]) if last else 0


def listen(reactor: Reactor, options: argparse.Namespace) -> None:
    """
    Put the parts together and open both ports.
    """
    tokens, counters = Tokens(options.token_life), Counters()
    bucket = Bucket(
        f"http://127.0.0.1:{options.bucket_port}", options.storage, Pace(options.rate, options.hold), reactor
    )
    root = Resource()
    root.putChild(b"", Aws(tokens, counters, refuse=options.refuse_credentials))
    agent = Agent(reactor)
    root.putChild(b"v2", Registry(options.registry, bucket, agent, tokens, counters))
    root.putChild(b"_counters", Figures(counters, bucket))
    for port, resource in ((options.port, root), (options.bucket_port, bucket)):
        site = cast("ServerFactory", Site(resource))
        reactor.listenTCP(port, site, interface="127.0.0.1")


def main() -> None:
    """
    Parse the command line and serve until stopped.
    """
    parser = argparse.ArgumentParser(description="A registry with the manners of Amazon ECR.")
    parser.add_argument("--registry", required=True, help="URL of the plain registry")
    parser.add_argument("--storage", required=True, type=Path, help="its directory")
    parser.add_argument("--port", required=True, type=int, help="for the API and the registry")
    parser.add_argument("--bucket-port", required=True, type=int)
    parser.add_argument("--rate", type=int, default=0, help="bytes a second and connection")
    parser.add_argument("--hold", type=Path, help="while this file is there, no blob goes past its half")
    parser.add_argument("--token-life", type=float, default=12 * 3600.0, help="in seconds")
    parser.add_argument("--refuse-credentials", action="store_true")
    reactor = cast("Reactor", global_reactor)
    listen(reactor, parser.parse_args())
    reactor.run()


if __name__ == "__main__":
    main()
