"""
Programs that the tests start, wait for, and stop: each by its own process id.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Final

# The system's own programs come first: these tests are about those.
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
TAIL = 4000
PATIENCE: Final = 90.0
"""Timeout in seconds for steps that are immediate on an idle machine; this one may be busy."""
PORTS: Final = range(15000, 30000)
"""Below the ports for outgoing connections, which therefore can't take one before a program does."""
SHARE: Final = 500
"""Ports per run."""


def environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """
    Return a program's environment without this process's variables.
    """
    return {"PATH": PATH, "HOME": str(home), "LANG": "C.UTF-8", **(extra or {})}


def free_port() -> int:
    """
    Find a free port that was not returned recently: it takes a while until it is bound.
    """
    while True:
        port = next(own_ports())
        with socket.socket() as probe:
            # As servers do: a closed connection in TIME_WAIT is no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@cache
def own_ports() -> Iterator[int]:
    """
    Claim ports that other runs on this machine leave alone, and return one after another.
    """
    for first in PORTS[::SHARE]:
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0tests/e2e ports {first}")  # such a name has no file, and is gone with the process
        except OSError:
            claim.close()
            continue
        return _in_turn(claim, range(first, first + SHARE))
    raise RuntimeError("too many runs at once: each has ports of its own")


def _in_turn(claim: socket.socket, ports: Sequence[int]) -> Iterator[int]:
    with claim:
        yield from itertools.cycle(ports)


def eventually(holds: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """
    Wait until something holds, or fail with what did not.
    """
    deadline, late = time.monotonic() + seconds, False
    while not holds():
        if late:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)
        # The last check is after the deadline: whatever delayed this process may have delayed nothing else.
        late = time.monotonic() > deadline


def children(pid: int) -> list[int]:
    """
    List the processes that a process has started.
    """
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """
    Return True if a process runs, and is no zombie.
    """
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def hears(pid: int, number: signal.Signals) -> bool:
    """
    Return True if a process has a handler of its own for a signal by now.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> number - 1 & 1)


def serving(pid: int, count: int) -> list[int]:
    """
    Wait until all workers of a daemon serve, and list them. They listen before they handle signals, which would end
    them until then.
    """

    def serve() -> bool:
        pids = children(pid)
        return len(pids) == count and all(hears(each, signal.SIGHUP) for each in pids)

    eventually(serve, "all workers serve")
    return children(pid)


class Process:
    """
    One running program, whose output goes to a file.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        env: Mapping[str, str],
        output: Path,
        cwd: Path,
        *,
        inherits: Sequence[int] = (),
    ) -> None:
        self.name, self.output = output.stem, output
        with output.open("ab") as sink:
            self._popen = subprocess.Popen(
                [str(each) for each in argv],
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                # A signal that is meant for pytest is not meant for these.
                start_new_session=True,
                pass_fds=inherits,
            )

    @property
    def pid(self) -> int:
        """
        Return the process id of this program.
        """
        return self._popen.pid

    @property
    def status(self) -> int | None:
        """
        Return the exit status, or None while it runs.
        """
        return self._popen.poll()

    def tail(self) -> str:
        """
        Return the end of the program's output.
        """
        return self.output.read_bytes()[-TAIL:].decode(errors="replace")

    def wait_until(self, ready: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """
        Wait until the program is ready, and show its output if it is not.
        """

        def ready_or_gone() -> bool:
            return self.status is not None or ready()

        try:
            eventually(ready_or_gone, f"{self.name} is ready", seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.tail()}") from None
        if self.status is not None:
            raise RuntimeError(f"{self.name} ended with {self.status}:\n{self.tail()}")

    def terminate(self, seconds: float = PATIENCE) -> int:
        """
        Ask the program to end, and return its exit status.
        """
        self.send(signal.SIGTERM)
        return self.wait(seconds)

    def send(self, number: signal.Signals) -> None:
        """
        Send a signal, unless the program has ended.
        """
        if self.status is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float = PATIENCE) -> int:
        """
        Wait for its end, and return its exit status.
        """
        return self._popen.wait(seconds)

    def kill(self) -> None:
        """
        Kill the program as a power cut would.
        """
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
        self._popen.wait(PATIENCE)

    def stop(self) -> None:
        """
        Stop the program, by SIGKILL if necessary.
        """
        try:
            self.terminate()
        except subprocess.TimeoutExpired:
            self.kill()
