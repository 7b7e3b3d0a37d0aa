"""
Checks of the name servers in PROXY_DNS_RESOLVER, compared with the host's own resolver.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from twisted.names.dns import AAAA, ENAME, IN, A, Message, Query

from ecrproxy.command.checkup.findings import Finding, failed, ok, warning

SECONDS: Final = 2.0
TRIES: Final = 2
_LARGEST: Final = 4096

Send = Callable[[tuple[str, int], bytes], bytes]
"""Sends a query to a server, and returns the response. Raises C{OSError} if there is none."""


@dataclass(frozen=True, slots=True)
class LookupResult:
    """
    A server's response for a name.

    @ivar problem: why there is none.
    """

    addresses: Sequence[str] = ()
    problem: str = ""


def over_udp(server: tuple[str, int], question: bytes) -> bytes:
    """
    Send a query, at most twice.
    """
    family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as asking:
        asking.settimeout(SECONDS)
        asking.connect(server)
        for last in (False,) * (TRIES - 1) + (True,):
            asking.send(question)
            try:
                while (answer := asking.recv(_LARGEST))[:2] != question[:2]:
                    pass  # the response to another query
            except TimeoutError:
                if last:
                    raise
            else:
                return answer
    raise TimeoutError


def ask_server(server: tuple[str, int], host: str, number: int, send: Send) -> LookupResult:
    """
    Ask one server for a host's addresses.

    @param number: an unpredictable query id.
    """
    found: list[str] = []
    try:
        for kind in (A, AAAA):
            asked = Message(number, recDes=1)
            asked.queries = [Query(host.encode(), kind, IN)]
            told = Message()
            told.fromStr(send(server, asked.toStr()))
            if told.rCode not in (0, ENAME):
                return LookupResult(problem=f"answers with error {told.rCode}")
            records: list[Any] = [each.payload for each in told.answers if each.type == kind]
            found += [str(ipaddress.ip_address(each.address)) for each in records]
    except OSError as problem:
        silent = isinstance(problem, TimeoutError)
        return LookupResult(problem="does not answer" if silent else problem.strerror or type(problem).__name__)
    except Exception as problem:  # noqa: BLE001 (invalid responses fail in many ways)
        return LookupResult(problem=f"sends an invalid DNS response: {type(problem).__name__}")
    return LookupResult(found)


def judge_names(
    host: str, servers: Mapping[str, LookupResult], system: LookupResult, variable: str = "PROXY_DNS_RESOLVER"
) -> Iterator[Finding]:
    """
    Check that the configured servers resolve a host, and to the same kind of addresses as the host's own resolver.
    """
    check = "resolver"
    for server, answer in servers.items():
        if answer.problem:
            said = f"{server} {answer.problem}; the host's own resolver is used instead, after seconds of waiting"
            yield warning(check, said, f"set {variable}=system, or to name servers that can be reached from here")
        elif not answer.addresses and system.addresses:
            said = f"{server} knows no {host}, but the host's own resolver does"
            yield failed(check, said, f"set {variable}=system")
        elif not answer.addresses:
            yield failed(check, f"{server} knows no {host}", "check the spelling of PROXY_ECR_ENDPOINT")
        elif _private(system.addresses) and not _private(answer.addresses):
            said = f"{server} gives public addresses for {host}, the host's own resolver private ones: a VPC endpoint's"
            yield warning(check, said, f"set {variable}=system to use the endpoint")
        else:
            yield ok(check, f"{server} finds {host} at {answer.addresses[0]}")
    if not servers:
        yield (
            ok(check, f"the host's own finds {host} at {system.addresses[0]}")
            if system.addresses
            else failed(check, f"the host's own does not find {host}: {system.problem}", "see /etc/resolv.conf")
        )


def _private(addresses: Sequence[str]) -> bool:
    return any(ipaddress.ip_address(each).is_private for each in addresses)


def ask_system(host: str) -> LookupResult:
    """
    Ask the host's own resolver.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as problem:
        return LookupResult(problem=problem.strerror or type(problem).__name__)
    return LookupResult(list(dict.fromkeys(str(each[4][0]) for each in found)))


def is_local(host: str) -> bool:
    """
    Return True for addresses and this machine, which need no name server.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True
