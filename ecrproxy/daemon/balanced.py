"""
Connections from a load balancer that uses the PROXY protocol, versions 1 and 2: HAProxy's doc/proxy-protocol.txt.

The wrapped protocol sees a connection only after its header has arrived: it knows the client's address from the start,
and connections without a header do not count against the limits for clients. They have their own limit and timeout.

Twisted's wrapper connects the wrapped protocol at once, waits forever for a header, rejects C{PROXY UNKNOWN} without
addresses and headers that arrive in two pieces, and raises on malformed addresses.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from zope.interface import directlyProvides, implementer, providedBy

from ecrproxy.access.limits import Patience
from ecrproxy.addresses import unmapped

if TYPE_CHECKING:
    from twisted.python.failure import Failure

log = Logger()

HEADER_SECONDS: Final = 5
"""Timeout for the header, in seconds. The protocol's specification recommends at least 3, for one retransmission."""
WAITING: Final = 1024
"""Maximum number of connections without a header, if there are enough descriptors."""
LONGEST: Final = 4096
"""Maximum bytes of a version 2 header: the addresses take 36, extensions the rest."""

_TEXT: Final = b"PROXY "
_TEXT_LONGEST: Final = 107
_VERSIONS: Final = {"TCP4": ipaddress.IPv4Address, "TCP6": ipaddress.IPv6Address}
_SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED: Final = 16
_LOCAL, _PROXY = 0x20, 0x21
_ADDRESSES: Final = {1: "!4s4s2H", 2: "!16s16s2H"}
"""Layout of addresses and ports, by family."""
_UNIX: Final = 3
_DATAGRAM: Final = 2

Address = IPv4Address | IPv6Address


class Header(NamedTuple):
    """
    A PROXY header.

    @ivar size: length in bytes.
    @ivar source: the client's address; None if the balancer itself connected, or does not know it.
    @ivar destination: the address that the client connected to; None likewise.
    """

    size: int
    source: Address | None = None
    destination: Address | None = None


def parse_header(data: bytes) -> Header | None:
    """
    Parse the header at the start of a connection; return None if more bytes are needed.

    @raise ValueError: if the header is missing or invalid.
    """
    if data.startswith(_SIGNATURE[: len(data)]):
        return _parse_binary(data)
    if data.startswith(_TEXT[: len(data)]):
        return _parse_text(data)
    raise ValueError("no PROXY header")


def _parse_text(data: bytes) -> Header | None:
    end = data.find(b"\r\n", 0, _TEXT_LONGEST)
    if end < 0:
        if len(data) >= _TEXT_LONGEST:
            raise ValueError("a PROXY header that does not end")
        return None
    family, *fields = data[len(_TEXT) : end].decode("latin-1").split(" ")
    if family == "UNKNOWN":
        return Header(end + 2)
    if family not in _VERSIONS:
        raise ValueError("a PROXY header of an unknown kind")
    if len(fields) != 4:  # noqa: PLR2004 (two addresses, two ports)
        raise ValueError(f"a PROXY header with {len(fields)} fields after {family}, which has 4")
    source, destination, from_port, to_port = fields
    return Header(
        end + 2,
        _address(_ip(family, source), _port(from_port)),
        _address(_ip(family, destination), _port(to_port)),
    )


def _ip(family: str, text: str) -> object:
    try:
        found = _VERSIONS[family](text)
    except ValueError:
        found = None
    if found is None or "%" in text:
        raise ValueError(f"a PROXY header with an address that is not {family}")
    return found


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > len("65535"):
        raise ValueError("a PROXY header with an invalid port")
    return int(text)


def _parse_binary(data: bytes) -> Header | None:
    if len(data) < _FIXED:
        return None
    command, kind, length = struct.unpack_from("!BBH", data, len(_SIGNATURE))
    family, transport = kind >> 4, kind & 0xF
    if command not in (_LOCAL, _PROXY) or family > _UNIX or transport > _DATAGRAM or length > LONGEST - _FIXED:
        raise ValueError("a PROXY header of an unknown kind")
    size = _FIXED + length
    if len(data) < size:
        return None
    if command == _LOCAL or not transport or family not in _ADDRESSES:
        return Header(size)
    layout = _ADDRESSES[family]
    if length < struct.calcsize(layout):
        raise ValueError("a PROXY header without addresses")
    source, destination, from_port, to_port = struct.unpack_from(layout, data, _FIXED)
    packed = ipaddress.ip_address
    return Header(size, _address(packed(source), from_port), _address(packed(destination), to_port))


def _address(found: object, port: int) -> Address:
    host = unmapped(str(found))
    return IPv6Address("TCP", host, port) if ":" in host else IPv4Address("TCP", host, port)


@implementer(IHalfCloseableProtocol)
class Balanced(ProtocolWrapper):
    """
    One connection. The wrapped protocol is connected after the header has arrived.
    """

    factory: BalancedFactory
    transport: Any
    wrappedProtocol: Any
    _header: Header | None = None

    def __init__(self, factory: BalancedFactory) -> None:
        super().__init__(factory, None)  # type: ignore[arg-type]  # until the header has come
        self._received = b""
        self._deadline = Patience(factory.reactor.callLater, HEADER_SECONDS, self.cut)

    def logPrefix(self) -> str:  # noqa: D102
        return "PROXY"

    def makeConnection(self, transport: Any) -> None:  # noqa: ANN401, D102
        directlyProvides(self, providedBy(transport))
        Protocol.makeConnection(self, transport)
        self._deadline.begin()
        self.factory.arrived(self)

    def cut(self) -> None:
        """
        Close at once.
        """
        self.transport.abortConnection()

    def dataReceived(self, data: bytes) -> None:  # noqa: D102
        if self.wrappedProtocol is not None:
            self.wrappedProtocol.dataReceived(data)
            return
        self._received += data
        try:
            self._header = parse_header(self._received)
        except ValueError as problem:
            peer = getattr(self.transport.getPeer(), "host", "")
            said = "{peer} was refused: {problem}; let load balancers alone connect to a haproxy: endpoint"
            log.warn(said, peer=peer, problem=problem, once=peer)
            self.cut()
            return
        if self._header is not None:
            rest, self._received = self._received[self._header.size :], b""
            self._introduce(rest)

    def _introduce(self, rest: bytes) -> None:
        self._leave()
        self.wrappedProtocol = self.factory.wrappedFactory.buildProtocol(self.getPeer())
        self.wrappedProtocol.makeConnection(self)
        if rest:
            self.wrappedProtocol.dataReceived(rest)

    def _leave(self) -> None:
        self._deadline.end()
        self.factory.waiting.pop(self, None)

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: D102
        self._leave()
        wrapped, self.wrappedProtocol = self.wrappedProtocol, None
        if wrapped is not None:
            wrapped.connectionLost(reason)

    def readConnectionLost(self) -> None:
        """
        Pass the end of the client's data on. Without a header nothing is connected yet, and TLS has no half-close.
        """
        # Ask the class: an instance that proxies its transport's interfaces, such as TLS, may answer for this one.
        if IHalfCloseableProtocol.implementedBy(type(self.wrappedProtocol)):
            self.wrappedProtocol.readConnectionLost()
        else:
            self.transport.loseConnection()

    def writeConnectionLost(self) -> None:
        """
        Do nothing: the wrapped protocol asked for it.
        """

    def getPeer(self) -> Any:  # noqa: ANN401, D102
        return (self._header and self._header.source) or self.transport.getPeer()

    def getHost(self) -> Any:  # noqa: ANN401, D102
        return (self._header and self._header.destination) or self.transport.getHost()


class BalancedFactory(WrappingFactory[Balanced]):
    """
    Builds L{Balanced} connections.

    @param most: maximum number of connections without a header. At the limit the oldest is closed: balancers send the
        header at once, so the longest silent connection is the least likely to be one.
    @ivar waiting: the connections without a header, oldest first.
    """

    noisy = False

    def __init__(self, wrapped: Any, reactor: Any, most: int = WAITING) -> None:  # noqa: ANN401
        super().__init__(wrapped)  # type: ignore[no-untyped-call]
        self.reactor, self._most = reactor, most
        self.waiting: dict[Balanced, None] = {}

    def buildProtocol(self, addr: Any) -> Balanced:  # noqa: ANN401, ARG002, D102
        return Balanced(self)

    def arrived(self, connection: Balanced) -> None:
        """
        Register a connection that waits for its header.
        """
        if len(self.waiting) >= self._most:
            oldest = next(iter(self.waiting))
            del self.waiting[oldest]
            oldest.cut()
        self.waiting[connection] = None
