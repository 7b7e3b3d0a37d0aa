"""
The programs that people pull images with.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .processes import PATIENCE, Process, environment
from .sid import Sid

PULL = 2 * PATIENCE

# Files are added to /etc for one program only.
ADDING = """
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work
cp -a "$1/." /mnt/upper
mount -t overlay overlay -o lowerdir=/etc,upperdir=/mnt/upper,workdir=/mnt/work /etc
shift
exec "$@"
"""


@dataclass(frozen=True)
class Done:
    """
    The result of a command.
    """

    status: int
    output: str
    complaint: str


class CommandError(Exception):
    """
    Raised if a command that should have worked did not.
    """


def adding(etc: Path | None, argv: Sequence[str | Path]) -> list[str | Path]:
    """
    Return a command that finds these files in /etc, besides all that is there.
    """
    return ["unshare", "--mount", "sh", "-ec", ADDING, "sh", etc, *argv] if etc else list(argv)


@dataclass
class Client:
    """
    A program with a home of its own.

    @ivar seconds: how long a command may take.
    @ivar etc: what it finds in /etc besides what is there.
    @ivar sid: the release that the program is of; None for this machine's own.
    """

    home: Path
    extra: dict[str, str] = field(default_factory=dict)
    seconds: float = PULL
    etc: Path | None = None
    sid: Sid | None = None

    def command(self, argv: Sequence[str | Path]) -> list[str | Path]:
        """
        Return the command that runs C{argv} where the program is installed.
        """
        if self.sid is not None:
            return self.sid.inside(self.home, argv, self.etc)
        return adding(self.etc, argv)

    def attempt(self, *argv: str | Path) -> Done:
        """
        Run a command and return its result.
        """
        done = subprocess.run(
            [str(each) for each in self.command(argv)],
            env=environment(self.home, self.extra),
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=self.seconds,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def run(self, *argv: str | Path) -> str:
        """
        Run a command that has to work, and return its output.
        """
        done = self.attempt(*argv)
        if done.status:
            raise CommandError(f"{argv} ended with {done.status}:\n{done.output}{done.complaint}")
        return done.output.strip()


class Docker(Client):
    """
    The docker command, and its engine.
    """

    def pull(self, reference: str) -> str:
        """
        Pull an image and return its id.
        """
        self.run("docker", "pull", "--quiet", reference)
        return self.run("docker", "image", "inspect", "--format", "{{.Id}}", reference)

    def log_in(self, registry: str, name: str, password: str) -> Done:
        """
        Try to log in to a registry.
        """
        return self.attempt("docker", "login", "--username", name, "--password", password, registry)

    def log_out(self, registry: str) -> None:
        """
        Log out of a registry.
        """
        self.run("docker", "logout", registry)

    def complaint(self, reference: str) -> str:
        """
        Pull what can't be pulled, and return docker's error.
        """
        done = self.attempt("docker", "pull", reference)
        if not done.status:
            raise CommandError(f"{reference} should not have been pulled:\n{done.output}")
        return done.complaint

    def forget(self) -> None:
        """
        Remove all images, so that the next pull starts from nothing.
        """
        listing = ("docker", "image", "ls", "--quiet", "--no-trunc")
        images = self.run(*listing).split()
        if images:
            self.run("docker", "image", "rm", "--force", *sorted(set(images)))
        # A layer that stayed would not be pulled again.
        if left := self.run(*listing, "--all"):
            raise CommandError(f"docker keeps {left}")


class Skopeo(Client):
    """
    The skopeo command, which copies images between registries and directories.
    """

    def copy(self, source: str, target: str, *options: str | Path) -> None:
        """
        Copy an image with every platform that it has, bytes unchanged.
        """
        words = ("skopeo", "--policy", self.policy(), "copy", "--quiet", "--all")
        self.run(*words, "--preserve-digests", *options, source, target)

    def tags(self, repository: str, *options: str | Path) -> list[str]:
        words = self.run("skopeo", "list-tags", *options, f"docker://{repository}")
        tags: list[str] = json.loads(words)["Tags"]
        return tags

    def policy(self) -> Path:
        """
        Write the policy that accepts unsigned images.
        """
        return write_policy(self.home)


class Podman(Client):
    """
    The podman command, with a store of its own.
    """

    def pull(self, reference: str, *options: str | Path) -> str:
        """
        Pull an image and return its id.
        """
        write_policy(self.home / ".config/containers")
        pulled = self._podman("pull", "--quiet", *options, reference).splitlines()[-1]
        return f"sha256:{pulled}"

    def forget(self) -> None:
        self._podman("rmi", "--all", "--force")

    def _podman(self, *words: str | Path) -> str:
        store: Sequence[str | Path] = (
            *("--root", self.home / "store", "--runroot", self.home / "run"),
            *("--tmpdir", self.home / "tmp", "--storage-driver", "vfs"),
            *("--cgroup-manager", "cgroupfs", "--events-backend", "file"),
        )
        return self.run("podman", *store, *words)


def write_policy(directory: Path) -> Path:
    """
    Write a policy for skopeo and podman: images need no signature here.
    """
    directory.mkdir(parents=True, exist_ok=True)
    policy: dict[str, Any] = {"default": [{"type": "insecureAcceptAnything"}]}
    path = directory / "policy.json"
    path.write_text(json.dumps(policy))
    return path


def start_engine(home: Path, etc: Path | None = None) -> tuple[Process, Docker]:
    """
    Start a Docker Engine with its own directory, on loopback only.

    The best storage driver needs a file system that supports overlays;
    without one, plain directories do.
    """
    complaints = []
    for driver in ("overlay2", "vfs"):
        try:
            return start_engine_on(driver, home / driver, etc)
        except (RuntimeError, TimeoutError) as error:
            complaints.append(str(error))
    raise RuntimeError("\n".join(complaints))


def start_engine_on(driver: str, home: Path, etc: Path | None) -> tuple[Process, Docker]:
    """
    Start a Docker Engine with a storage driver, and wait until it answers.
    """
    home.mkdir()
    host = f"unix://{home}/docker.sock"
    docker = Docker(home, {"DOCKER_HOST": host, "DOCKER_BUILDKIT": "0"})
    argv: list[str | Path] = [
        *("dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none"),
        *("--data-root", home / "data", "--exec-root", home / "exec"),
        *("--pidfile", home / "pid", "--host", host, "--storage-driver", driver),
    ]
    # An engine leaves the network of --network host mounted: in a mount namespace of its own, that goes with it.
    argv = ["unshare", "--mount", *adding(etc, argv)]
    engine = Process(argv, environment(home), home / "dockerd.log", home)
    try:
        engine.wait_until(lambda: docker.attempt("docker", "version").status == 0)
    except BaseException:
        engine.stop()
        raise
    return engine, docker
