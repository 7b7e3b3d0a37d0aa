"""
A base for containers, made of Debian's packages: there is nowhere to pull one from.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from .clients import Docker

BASE = "base:e2e"
PACKAGES = "python3,python3-venv,ca-certificates"


def import_base(docker: Docker, home: Path) -> str:
    """
    Build the base, and import it into an engine.
    """
    root = home / "base"
    sources = Path("/etc/apt/sources.list.d/debian.sources").read_text("utf-8")
    mirror = re.search(r"^URIs: (\S+)$", sources, re.MULTILINE)
    suite = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text("utf-8"), re.MULTILINE)
    assert mirror
    assert suite
    making = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite[1], str(root), mirror[1]]
    done = subprocess.run(making, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    # If the package index here is trusted, so it is in the build.
    authorities = Path("etc/ssl/certs/ca-certificates.crt")
    (root / authorities).write_bytes((Path("/") / authorities).read_bytes())
    packed = home / "base.tar"
    subprocess.run(["tar", "-C", str(root), "--exclude=./var/cache/apt/*", "-cf", str(packed), "."], check=True)
    docker.run("docker", "import", packed, BASE)
    return BASE
