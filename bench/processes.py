"""
Programs that the benchmarks start, pin to a processor, measure from outside, and stop by their process id.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

LOCAL = "127.0.0.1"
ROOT = Path(__file__).resolve().parent.parent
READY_SECONDS = 90.0
END_SECONDS = 15.0
DESCRIPTORS = 16384
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Processors:
    """
    The processor of the program under test, and the one that the upstream and the clients share.
    """

    server: int
    others: int

    @property
    def both(self) -> str:
        """
        Return both for taskset.
        """
        return f"{self.server},{self.others}"

    @classmethod
    def choose(cls) -> Processors:
        """
        Choose the first two that this process may use; one for both if there is no second.
        """
        usable = sorted(os.sched_getaffinity(0))
        return cls(usable[0], usable[1 % len(usable)])


def settle_down() -> Processors:
    """
    Prepare this process: on the clients' processor, with enough descriptors, and a clean exit on SIGTERM.
    """
    chosen = Processors.choose()
    os.sched_setaffinity(0, {chosen.others})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return chosen


def environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """
    Return a program's environment without this process's variables.
    """
    return {"PATH": PATH, "HOME": str(home), "LANG": "C.UTF-8", **(extra or {})}


def said(output: Path) -> str:
    """
    Return the end of a program's output.
    """
    return output.read_bytes()[-2000:].decode(errors="replace") if output.exists() else ""


@contextlib.contextmanager
def running(
    argv: Sequence[str],
    *,
    cpu: int | str,
    env: Mapping[str, str],
    output: Path,
    cwd: Path | None = None,
    stdout: int | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """
    Run a program on one processor, and stop it whatever happens.

    @param cpu: or on several, as taskset lists them.
    @param stdout: where its standard output goes, if not into C{output} with its errors.
    """
    with output.open("ab") as sink:
        process = subprocess.Popen(
            ["taskset", "--cpu-list", str(cpu), *argv],
            env=dict(env),
            cwd=cwd or output.parent,
            stdin=subprocess.DEVNULL,
            stdout=sink if stdout is None else stdout,
            stderr=sink,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """
    Ask a program to end; after a while, kill it and what it started.
    """
    family = tree(process.pid)
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        for pid in family[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    if process.stdout is not None:
        process.stdout.close()


def first_line(process: subprocess.Popen[bytes], output: Path) -> bytes:
    """
    Wait for the line in which a program says that it is ready.
    """
    stream: IO[bytes] | None = process.stdout
    line = stream.readline() if stream is not None else b""
    if not line:
        raise RuntimeError(f"{output.stem} did not start:\n{said(output)}")
    return line


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], output: Path, pause: float = 0.02) -> None:
    """
    Wait until a program is ready; show its output if it never is.
    """
    deadline = time.monotonic() + READY_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{output.stem} is not ready:\n{said(output)}")
        time.sleep(pause)


def tree(pid: int) -> list[int]:
    """
    Return a process and its descendants.
    """
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def cpu_seconds(pid: int) -> float:
    """
    Return the CPU time that a process and its descendants have used, including those that ended.
    """
    ticks = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(field) for field in fields[11:15])  # utime, stime, cutime, cstime: proc(5)
    return ticks / _TICKS


def resident(pid: int) -> float:
    """
    Return the MiB of memory that a process and its descendants hold; shared memory is counted once.
    """
    private, shared = 0, 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            kib = {"Private": 0, "Shared": 0}
            for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
                kind, _, rest = line.partition("_")
                if kind in kib and rest.startswith(("Clean:", "Dirty:")):
                    kib[kind] += int(rest.split()[1])
            private, shared = private + kib["Private"], max(shared, kib["Shared"])
    return (private + shared) / 1024
