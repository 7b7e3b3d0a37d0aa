"""
What the stand-in for ECR answers: the registry, and the two AWS calls.

This module decides and sends nothing: it maps an L{Asked} to a
L{Reply}. Time is read from the given clock.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import parse_qs, quote, unquote

from twisted.internet.interfaces import IReactorTime

from tests.registry_bucket import Urls, byte_range
from tests.registry_content import OCI_INDEX, Repository, digest_of, negotiated
from tests.registry_http import Asked, Quirks, Reply, account_of

TARGET: Final = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken"
EXPIRED: Final = "Your authorization token has expired. Reauthenticate and try again."
_ROUTE: Final = re.compile(r"/v2/(?P<name>.+)/(?:(?P<kind>manifests|blobs|referrers)/(?P<reference>[^/]+)|tags/list)")


def registry_error(status: int, code: str, message: str) -> Reply:
    """
    Build an error as the distribution specification writes it.
    """
    body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
    return Reply(status, {"Content-Type": "application/json; charset=utf-8"}, body)


def api_error(status: int, kind: str, message: str) -> Reply:
    """
    Build an error as AWS writes it in its JSON protocol.
    """
    body = json.dumps({"__type": kind, "message": message}).encode()
    return Reply(status, {"Content-Type": "application/x-amz-json-1.1"}, body)


def named_in(path: str) -> tuple[str, str]:
    """
    Return the repository and the digest in a registry path; empty where there is none.
    """
    route = _ROUTE.fullmatch(unquote(path))
    if route is None:
        return "", ""
    reference = route["reference"] or ""
    return route["name"], reference if ":" in reference else ""


def _sent(data: bytes, wanted: str) -> Reply:
    """
    Answer like a registry that has its blobs on its own disk.
    """
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
    chosen = byte_range(wanted, len(data))
    if chosen is None:
        return Reply(200, headers, memoryview(data))
    start, end = chosen
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
    return Reply(206, headers, memoryview(data)[start:end])


@dataclass
class Tokens:
    """
    The registry tokens that were issued, and their state.
    """

    clock: IReactorTime
    quirks: Quirks
    _until: dict[str, float] = field(default_factory=dict)
    _serials: Iterator[int] = field(default_factory=itertools.count)

    def issue(self) -> tuple[str, float]:
        """
        Issue a new token; return it and its expiry.
        """
        until = self.clock.seconds() + self.quirks.token_lifetime
        serial = f"{next(self._serials):08d}"
        payload = serial + "A" * max(0, self.quirks.token_padding - len(serial))
        secret = {"payload": payload, "version": "2", "type": "DATA_KEY", "expiration": until}
        password = base64.b64encode(json.dumps(secret).encode()).decode()
        token = base64.b64encode(f"AWS:{password}".encode()).decode()
        self._until[token] = until
        return token, until

    def take(self, token: str) -> None:
        """
        Accept, for good, a token that another service issues.
        """
        self._until[token] = float("inf")

    def issued(self) -> list[str]:
        """
        Return all issued tokens that are remembered.
        """
        return list(self._until)

    def expire(self) -> None:
        """
        Expire all of them now.
        """
        self._until = dict.fromkeys(self._until, float("-inf"))

    def forget(self) -> None:
        """
        Treat all of them as never issued.
        """
        self._until.clear()

    def refusal(self, authorization: str | None, registry: str, repository: str = "") -> Reply | None:
        """
        Return why the registry rejects a request for its Authorization header, if it does.
        """
        if authorization is None:
            challenge = f'Basic realm="{registry}/",service="ecr.amazonaws.com"'
            headers = {"Content-Type": "text/plain; charset=utf-8", "WWW-Authenticate": challenge}
            return Reply(401, headers, b"Not Authorized\n")
        scheme, _, token = authorization.partition(" ")
        until = self._until.get(token) if scheme.lower() == "basic" else None
        if until is None:
            return Reply(400, {"Content-Type": "text/plain; charset=utf-8"}, b"Bad Request\n")
        if self.clock.seconds() >= until:
            return registry_error(403, "DENIED", EXPIRED)
        return None


@dataclass
class Bearers(Tokens):
    """
    The tokens of a registry other than ECR's private ones, and its token service: distribution's "Token Authentication
    Specification"; ECR Public's quirks by docs/ecr.rst.

    @ivar realm: the service's URL.
    @ivar public: whether this is like ECR Public: its tokens are for all repositories, and an expired one is a 400.
    @ivar logins: the logins that it accepts, as they follow C{Basic}; empty if anonymous clients get a token.
    @ivar denied: the repositories for which it issues a token without any rights, as Docker Hub does.
    @ivar lifetime: of tokens, in seconds; as stated in answers, too.
    """

    realm: str = ""
    public: bool = False
    logins: set[str] = field(default_factory=set)
    denied: set[str] = field(default_factory=set)
    lifetime: float = 300

    @property
    def challenge(self) -> str:
        """
        Return the challenge for requests without a token.
        """
        said = f'Bearer realm="{self.realm}",service="registry.test"'
        return f'{said},scope="aws"' if self.public else said

    def reply(self, asked: Asked) -> Reply:
        """
        Issue a token.
        """
        scheme, _, login = asked.headers.get("authorization", "").partition(" ")
        if self.logins and (scheme != "Basic" or login not in self.logins):
            return registry_error(401, "UNAUTHORIZED", "incorrect username or password")
        query = parse_qs(asked.query)
        if query.get("service") != ["registry.test"]:
            return registry_error(400, "UNSUPPORTED", "no such service")
        (scope,) = query.get("scope", [""])  # without, a token that only proves the login
        token = f"{next(self._serials):04d}.{scope}"
        self._until[token] = self.clock.seconds() + self.lifetime
        body = json.dumps({"token": token, "expires_in": self.lifetime}).encode()
        return Reply(200, {"Content-Type": "application/json"}, body)

    def refusal(self, authorization: str | None, registry: str, repository: str = "") -> Reply | None:
        """
        Return why the registry rejects a request for its Authorization header, if it does.
        """
        scheme, _, token = (authorization or "").partition(" ")
        until = self._until.get(token) if scheme == "Bearer" else None
        scope = "aws" if self.public else f"repository:{repository}:pull"
        if until is not None and self.clock.seconds() < until and (not repository or token[5:] == scope):
            if repository not in self.denied:
                return None
        elif self.public and authorization is not None:
            return Reply(400, {"Content-Type": "text/plain; charset=utf-8"}, b"Bad Request\n")
        refused = registry_error(401, "UNAUTHORIZED", "authentication required")
        return Reply(401, {**refused.headers, "WWW-Authenticate": self.challenge}, refused.body)


@dataclass(frozen=True)
class RegistrySide:
    """
    The registry's half of ECR: authorization, content, and redirects to the bucket.
    """

    url: str
    repositories: Mapping[str, Repository]
    corrupted: Mapping[str, bytes]
    tokens: Tokens
    urls: Urls
    quirks: Quirks

    def reply(self, asked: Asked) -> Reply:
        """
        Answer one request.
        """
        refusal = self.tokens.refusal(asked.headers.get("authorization"), self.url, asked.repository)
        if refusal is not None:
            return refusal
        if asked.method not in ("GET", "HEAD"):
            return registry_error(405, "UNSUPPORTED", "The operation is unsupported.")
        path = unquote(asked.path)
        if path in ("/v2", "/v2/"):
            return Reply(200, {"Content-Type": "text/plain; charset=utf-8"})
        if path == "/v2/_catalog":
            return self._catalog(asked)
        route = _ROUTE.fullmatch(path)
        if route is None:
            return Reply(404, {"Content-Type": "text/plain; charset=utf-8"}, b"404 page not found\n")
        return self._about(route["name"], route["kind"], route["reference"], asked)

    def _about(self, name: str, kind: str | None, reference: str, asked: Asked) -> Reply:
        """
        Answer a request about one repository.
        """
        repository = self.repositories.get(name)
        if repository is None:
            text = f"The repository with name '{name}' does not exist in the registry with id"
            return registry_error(404, "NAME_UNKNOWN", f"{text} '{account_of(self.url)}'")
        if kind == "manifests":
            return self._manifest(repository, reference, asked)
        if kind == "blobs":
            return self._blob(name, repository, reference, asked)
        if kind == "referrers":
            return _referrers(repository, reference, asked)
        return self._tags(name, repository, asked)

    def _manifest(self, repository: Repository, reference: str, asked: Asked) -> Reply:
        by_digest = ":" in reference
        digest = reference if by_digest else repository.tags.get(reference, "")
        found = repository.manifests.get(digest)
        if found is None:
            return registry_error(404, "MANIFEST_UNKNOWN", "Requested image not found")
        if not by_digest:
            found = negotiated(found, asked.headers.get("accept"))
        headers = {"Content-Type": found.media_type}
        if asked.method == "HEAD":  # missing in answers to GET, see aws/containers-roadmap#1931
            headers["Docker-Content-Digest"] = found.digest
            return Reply(200, headers, found.data)
        return Reply(200, headers, self.corrupted.get(found.digest, found.data))

    def _blob(self, name: str, repository: Repository, digest: str, asked: Asked) -> Reply:
        if digest not in repository.blobs:
            return registry_error(404, "BLOB_UNKNOWN", "blob unknown to registry")
        if asked.method == "HEAD" and self.quirks.blob_head == 401:
            return self.tokens.refusal(None, self.url) or Reply(401)
        if asked.method == "HEAD" and self.quirks.blob_head == 200:
            headers = {"Content-Type": "application/octet-stream", "Docker-Content-Digest": digest}
            return Reply(200, headers, repository.blobs[digest])
        if self.quirks.sends_blobs:
            return _sent(repository.blobs[digest], asked.headers.get("range", ""))
        return Reply(307, {"Location": self.urls.sign(name, digest)})

    def _tags(self, name: str, repository: Repository, asked: Asked) -> Reply:
        size = _page_size(asked, self.quirks.page_size)
        if isinstance(size, Reply):
            return size
        last = parse_qs(asked.query).get("last", [""])[0]
        names = repository.tag_names()
        try:
            start = _place(last, names) if last else 0
        except ValueError:
            return _invalid("nextToken", "Invalid token")
        page = names[start : start + size]
        headers = {"Content-Type": "text/plain; charset=utf-8"}
        if start + size < len(names):
            limit = f"&n={size}" if "n=" in asked.query else ""
            following = f"{self.url}/v2/{name}/tags/list?last={_page_token(page[-1])}{limit}"
            headers["Link"] = f'<{following}>; rel="next"'
        return Reply(200, headers, json.dumps({"name": name, "tags": page}).encode())

    def _catalog(self, asked: Asked) -> Reply:
        size = _page_size(asked, self.quirks.page_size)
        if isinstance(size, Reply):
            return size
        if "last=" in asked.query:
            return registry_error(405, "UNSUPPORTED", "The operation is unsupported.")
        names = {"repositories": sorted(self.repositories)[:size]}
        return Reply(200, {"Content-Type": "text/plain; charset=utf-8"}, json.dumps(names).encode())


def _invalid(parameter: str, why: str) -> Reply:
    """
    Reject a query in ECR's own words.
    """
    text = f"Invalid parameter at '{parameter}' failed to satisfy constraint: '{why}'"
    return registry_error(400, "UNSUPPORTED", text)


def _page_size(asked: Asked, default: int) -> int | Reply:
    """
    Return how many names fit a page, or ECR's error: it does not clamp n.
    """
    given = parse_qs(asked.query, keep_blank_values=True).get("n", [str(default)])[0]
    if not given.isascii() or not given.isdigit() or int(given) < 1:
        return _invalid("maxResults", "Member must have value greater than or equal to 1")
    if int(given) > 1000:
        return _invalid("maxResults", "Member must have value less than or equal to 1000")
    return int(given)


def _page_token(last: str) -> str:
    """
    Return a long opaque page token that breaks when it is decoded twice: it holds a plus and an equals sign.
    """
    # "~" as the third byte of a group of three becomes "+"; one byte over a group becomes "==".
    text = f"{digest_of(last.encode())}{digest_of(last.encode(), 'sha512')}~~~|{last}|"
    text += "x" * ((1 - len(text.encode())) % 3)
    return quote(base64.b64encode(text.encode()).decode(), safe="")


def _place(token: str, names: list[str]) -> int:
    """
    Return where the page after L{_page_token} starts; raise ValueError if the token is invalid.
    """
    text = base64.b64decode(token, validate=True).decode()
    _, last, _ = text.split("|")
    return names.index(last) + 1


def _referrers(repository: Repository, digest: str, asked: Asked) -> Reply:
    """
    Return an index of the referrers of a digest; empty if there are none.
    """
    found = list(repository.referrers(digest))
    headers = {"Content-Type": OCI_INDEX}
    wanted = parse_qs(asked.query).get("artifactType", [""])[0]
    if wanted:
        found = [descriptor for descriptor in found if descriptor["artifactType"] == wanted]
        headers["OCI-Filters-Applied"] = "artifactType"
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": found}
    return Reply(200, headers, json.dumps(index).encode())


@dataclass(frozen=True)
class ApiSide:
    """
    The two AWS calls a proxy makes: a registry token from ECR, and "who am I" from STS.
    """

    registry: str
    tokens: Tokens

    def reply(self, asked: Asked) -> Reply:
        """
        Answer one call, in either of the two AWS protocols used here.
        """
        signed = asked.headers.get("authorization", "").startswith("AWS4-HMAC-SHA256 ")
        if asked.method != "POST" or asked.path != "/":
            return api_error(404, "UnknownOperationException", "no such operation")
        if "x-amz-target" in asked.headers:
            return self._ecr(asked, signed=signed)
        return self._sts(asked, signed=signed)

    def _ecr(self, asked: Asked, *, signed: bool) -> Reply:
        if asked.headers["x-amz-target"] != TARGET:
            return api_error(400, "UnknownOperationException", "no such operation")
        if not signed:
            return api_error(400, "MissingAuthenticationTokenException", "Missing Authentication Token")
        token, until = self.tokens.issue()
        answer = {"authorizationToken": token, "expiresAt": until, "proxyEndpoint": self.registry}
        body = json.dumps({"authorizationData": [answer]}).encode()
        return Reply(200, {"Content-Type": "application/x-amz-json-1.1"}, body)

    def _sts(self, asked: Asked, *, signed: bool) -> Reply:
        called = parse_qs(asked.body.decode("latin-1")).get("Action", [""])[0]
        if called != "GetCallerIdentity":
            return _sts_reply(400, "Error", "<Code>InvalidAction</Code>")
        if not signed:
            return _sts_reply(403, "Error", "<Code>MissingAuthenticationToken</Code>")
        account = account_of(self.registry)
        arn = f"arn:aws:iam::{account}:user/stand-in"
        inner = f"<Arn>{arn}</Arn><UserId>AIDASTANDIN</UserId><Account>{account}</Account>"
        return _sts_reply(200, "GetCallerIdentityResult", inner)


def _sts_reply(status: int, element: Literal["Error", "GetCallerIdentityResult"], inner: str) -> Reply:
    """
    Build an answer in the XML of AWS's query protocol.
    """
    root = "ErrorResponse" if element == "Error" else "GetCallerIdentityResponse"
    xml = f'<{root} xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{element}>{inner}</{element}></{root}>'
    return Reply(status, {"Content-Type": "text/xml"}, xml.encode())
