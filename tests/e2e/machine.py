"""
A machine for systemd: the real one as the first process of its own namespaces, over a disposable copy of this machine's
files. It shares the network, and nothing else.

Only what a test puts there is started: the targets that units refer to are empty.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from .clients import CommandError
from .installing import build, environment_of_pip
from .processes import Process, children, environment, eventually

PREFIX = "/opt/ecrproxy"
UNITS = "run/units"
TARGETS = ("sysinit", "basic", "shutdown", "sockets", "umount", "final", "network-online", "multi-user", "slices")
SECONDS = 300.0

# Writes go to memory. Credentials are passed through mounts that have to propagate.
BOOT = """
set -e
echo $$ > "$1/cgroup.procs"
exec unshare --fork --kill-child --pid --mount --cgroup --uts --ipc sh -ec '
mount --make-rprivate /
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root
cd /mnt/root
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount --rbind /dev dev
mount -t tmpfs tmpfs run
mkdir run/before run/units
pivot_root . run/before
umount -l run/before
mount --make-rshared /
for each in $TARGETS; do echo "[Unit]" > run/units/$each.target; done
exec env -u TARGETS container=e2e SYSTEMD_UNIT_PATH=/run/units SYSTEMD_LOG_TARGET=null \\
    /lib/systemd/systemd --system --unit=multi-user.target
'
"""


def control_groups() -> Path:
    """
    Find where the unified hierarchy of control groups is mounted.
    """
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return Path(next(where for _, where, kind, *_ in mounts if kind == "cgroup2"))


class Machine:
    """
    systemd, and the daemon installed as docs/systemd.rst says.
    """

    def __init__(self, home: Path) -> None:
        wheel = build(home)  # before the copy is taken
        self._group = control_groups() / f"e2e-{os.getpid()}"
        self._group.mkdir()
        env = environment(home, {"TARGETS": " ".join(TARGETS)})
        self._process = Process(["sh", "-c", BOOT, "boot", self._group], env, home / "systemd.log", home)
        try:
            self._process.wait_until(lambda: bool(children(self._process.pid)))
            (self._first,) = children(self._process.pid)
            self._process.wait_until(self._runs)
            self.run("python3", "-m", "venv", PREFIX)
            self.run(f"{PREFIX}/bin/pip", "install", "--quiet", wheel)
        except BaseException:
            self.stop()
            raise

    def path(self, name: str) -> Path:
        """
        Return the path of that machine's file on this one.
        """
        return Path(f"/proc/{self._first}/root") / name.removeprefix("/")

    def write(self, name: str, text: str, mode: int = 0o644) -> None:
        """
        Write a file there.
        """
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode)
        path.write_text(text)

    def attempt(self, *argv: str | Path) -> subprocess.CompletedProcess[str]:
        """
        Run a command there and return its result.
        """
        inside = ["nsenter", f"--target={self._first}", "--mount", "--pid", "--cgroup", "--uts", "--ipc"]
        return subprocess.run(
            [*inside, *map(str, argv)],
            env=environment(Path("/root"), environment_of_pip()),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    def run(self, *argv: str | Path) -> str:
        """
        Run a command there that has to work, and return its output.
        """
        done = self.attempt(*argv)
        if done.returncode:
            raise CommandError(f"{argv} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def show(self, unit: str, name: str) -> str:
        """
        Return a unit's property from systemd.
        """
        return self.run("systemctl", "show", "--value", "--property", name, unit)

    def _runs(self) -> bool:
        return self.attempt("systemctl", "is-active", "multi-user.target").returncode == 0

    def stop(self) -> None:
        """
        Stop everything that runs there.
        """
        self._process.kill()  # with its children
        eventually(self._forget, "its control groups are empty")

    def _forget(self) -> bool:
        try:
            for path, _, _ in os.walk(self._group, topdown=False):
                Path(path).rmdir()
        except OSError:
            return False
        return True
