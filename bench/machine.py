"""
The conditions of a run: machine, programs, commit.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import shutil
import ssl
import subprocess
from pathlib import Path

from bench.peers import available
from bench.processes import PATH, ROOT


def _output(*argv: str) -> str:
    program = shutil.which(argv[0], path=PATH)
    if program is None:
        return ""
    done = subprocess.run([program, *argv[1:]], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    return (done.stdout or done.stderr).strip()


def commit() -> str:
    """
    Return the commit that is measured.
    """
    named = _output("git", "rev-parse", "--short", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", "ecrproxy")
    return (named or "unknown") + (" with changes" if changed else "")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"


def facts() -> dict[str, str]:
    """
    Describe everything that a result depends on.
    """
    versions = {"Python": platform.python_version(), "Twisted": importlib.metadata.version("Twisted")}
    versions |= {"OpenSSL": ssl.OPENSSL_VERSION.split()[1], **available()}
    tools = [_output("curl", "--version").split()[1:2], _output("wrk", "-v").split()[1:2]]
    versions |= {name: found[0] for name, found in zip(("curl", "wrk"), tools, strict=True) if found}
    return {
        "Machine": f"{os.cpu_count()} cores, {_processor()}, {_memory()} of memory, Linux {platform.release()}",
        "Programs": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Commit": commit(),
        "Date": dt.datetime.now(dt.UTC).date().isoformat(),
    }
