"""
Debian's unstable release in a folder: this year's clients, beside the older ones of the machine. And containerd 1.7,
which many nodes have, of the release before it.

Each command runs in a mount namespace of its own, over a disposable copy of the folder's files. It shares the
machine's network and processes, and its home directory.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = (
    *("docker.io", "docker-cli", "docker-buildx", "containerd", "podman", "skopeo", "buildah"),
    *("oras", "soci-snapshotter", "fuse3", "iptables"),
)

OLDER = "trixie"
CONTAINERD_1_7 = "/opt/containerd-1.7/usr/bin/containerd"

# The release's files stay as they are: writes go to memory.
ENTER = """
root=$1 home=$2 etc=$3
shift 3
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay overlay -o "lowerdir=$root,upperdir=/mnt/upper,workdir=/mnt/work" /mnt/root
for each in proc sys dev; do mount --rbind "/$each" "/mnt/root/$each"; done
for each in run tmp data; do mkdir -p "/mnt/root/$each"; mount -t tmpfs tmpfs "/mnt/root/$each"; done
mkdir -p "/mnt/root$home"
mount --rbind "$home" "/mnt/root$home"
[ -z "$etc" ] || cp -a "$etc/." /mnt/root/etc
exec chroot /mnt/root env --chdir "$home" "$@"
"""


@dataclass(frozen=True)
class Sid:
    """
    The release.

    @ivar root: the folder that holds its files.
    """

    root: Path

    def inside(self, home: Path, argv: Sequence[str | Path], etc: Path | None = None) -> list[str | Path]:
        """
        Return the command that runs C{argv} there.

        @param home: the directory that it shares with this machine, under the same name.
        @param etc: files that it finds in /etc besides the release's own.
        """
        return ["unshare", "--mount", "sh", "-ec", ENTER, "sid", self.root, home, etc or "", *argv]


def make_sid(home: Path) -> Sid:
    """
    Create the folder, and install the clients in it.
    """
    root = home / "sid"
    sources = Path("/etc/apt/sources.list.d/debian.sources").read_text("utf-8")
    mirror = re.search(r"^URIs: (\S+)$", sources, re.MULTILINE)
    assert mirror
    _run("debootstrap", "--variant=minbase", "--include=ca-certificates", "sid", root, mirror[1])
    for name in ("etc/ssl/certs/ca-certificates.crt", "etc/resolv.conf"):
        shutil.copyfile(Path("/") / name, root / name)
    # Its packages would start their services at once.
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    quietly = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet", "--quiet", "--yes")
    # Sid's index is only valid for a week; a mirror may be older.
    _run("chroot", root, *quietly, "-o", "Acquire::Check-Valid-Until=false", "update")
    _run("chroot", root, *quietly, "--no-install-recommends", "-o", "APT::Sandbox::User=root", "install", *PACKAGES)
    _unpack(root, mirror[1])
    return Sid(root)


def _unpack(root: Path, mirror: str) -> None:
    """
    Unpack the older containerd beside the other. It is not installed: the two are one package.
    """
    folder = root / "opt/older"
    for name in ("lists", "parts"):
        (folder / name).mkdir(parents=True)
    keyring = root / "usr/share/keyrings/debian-archive-keyring.gpg"
    (folder / "sources.list").write_text(f"deb [signed-by={keyring}] {mirror} {OLDER} main\n")
    places = {"Dir::Etc::SourceList": "sources.list", "Dir::Etc::SourceParts": "parts", "Dir::State::Lists": "lists"}
    options = [f"-o{name}={folder / place}" for name, place in places.items()]
    quietly = ("apt-get", "--quiet", "--quiet", *options, "-oAPT::Sandbox::User=root")
    _run(*quietly, "update")
    _run("env", "--chdir", folder, *quietly, "download", "containerd")
    (package,) = folder.glob("containerd_1.7*.deb")
    _run("dpkg-deb", "--extract", package, root / Path(CONTAINERD_1_7).relative_to("/").parents[2])


def _run(*argv: str | Path) -> None:
    done = subprocess.run(
        [str(each) for each in argv], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{argv}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
