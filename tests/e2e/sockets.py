"""
The sockets of processes, as the kernel lists them: proc_pid_net(5).
"""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from .processes import PATIENCE, children

LISTENS: Final = "0A"
ACCEPTS: Final = 0x10000
"""The flag of a listening UNIX socket."""
TRIES: Final = 300
"""Maximum connections until each of a few processes has accepted some."""


class Tcp(NamedTuple):
    """
    A TCP socket of a process.
    """

    port: int
    peer: int
    state: str


def descendants(pid: int) -> list[int]:
    """
    List a process and its descendants.
    """
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            found += children(each)
    return found


def sockets_of(pid: int) -> set[str]:
    """
    List a process's sockets, by their numbers.
    """
    links = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            links.append(str(each.readlink()))
    return {each.removeprefix("socket:[").removesuffix("]") for each in links if each.startswith("socket:")}


def _rows(pid: int, *names: str) -> Iterator[list[str]]:
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # a kernel without it has no such socket
            yield from (line.split() for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:])


def tcp_sockets(pid: int) -> list[Tcp]:
    """
    List a process's TCP sockets.
    """
    own = sockets_of(pid)
    ports = [(row[1], row[2], row[3]) for row in _rows(pid, "tcp", "tcp6") if row[9] in own]
    return [Tcp(_port(local), _port(remote), state) for local, remote, state in ports]


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


def listening(pid: int) -> set[int | str]:
    """
    List where a process can be reached: TCP ports; paths of UNIX sockets, of abstract ones with an @ before it; and by
    its type any socket for datagrams or raw packets, which need no accepted connections.
    """
    own = sockets_of(pid)
    paths = {row[7] if len(row) > 7 else "no name" for row in _rows(pid, "unix") if row[6] in own and _accepts(row[3])}
    ports = {each.port for each in tcp_sockets(pid) if each.state == LISTENS}
    kinds = "udp", "udp6", "udplite", "udplite6", "raw", "raw6"
    others = {f"{kind} {_port(row[1])}" for kind in kinds for row in _rows(pid, kind) if row[9] in own}
    return ports | paths | others


def _accepts(flags: str) -> bool:
    return bool(int(flags, 16) & ACCEPTS)


def connected(pid: int) -> int:
    """
    Count a process's TCP connections.
    """
    return sum(each.state != LISTENS for each in tcp_sockets(pid))


def accepted_by(pids: Sequence[int], port: int, count: int) -> dict[int, list[http.client.HTTPConnection]]:
    """
    Connect to a port that several processes accept from until each of them has C{count} of the connections.

    Whichever is awake first accepts: if all are idle, that may be the same one for a while.
    """
    found: dict[int, list[http.client.HTTPConnection]] = {pid: [] for pid in pids}
    for _ in range(TRIES):
        if all(len(each) >= count for each in found.values()):
            break
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        client.request("GET", "/healthz")
        client.getresponse().read()
        here = client.sock.getsockname()[1]
        (pid,) = [pid for pid in pids if any(each.peer == here for each in tcp_sockets(pid))]
        found[pid].append(client)
    for each in found.values():
        for client in each[count:]:
            client.close()
        del each[count:]
    assert {len(each) for each in found.values()} == {count}, "some process accepts nothing"
    return found
