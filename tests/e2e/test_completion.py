"""
Real shells complete the command line with the scripts that C{ecr-proxy completion} writes.
"""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from .chain import Equipment
from .conftest import MakeChain
from .images import Images
from .processes import PATH, environment, free_port

SECONDS = 120.0
# The program that the completed line runs instead prints the line; queries of the script go to the real program.
TELLS = """
ecr-proxy() {
    if [ "$2" = repositories ]; then command ecr-proxy "$@"; else printf 'RAN:%s:\\n' "$*"; fi
}
"""
PREPARED = {
    "bash": ("bash", "--norc", "--noprofile", "-i"),
    "zsh": ("zsh", "-f", "-i"),
}
START = {
    "bash": "source <(ecr-proxy completion bash)\n",
    "zsh": "autoload -Uz compinit && compinit -u -D\nsource <(ecr-proxy completion zsh)\n",
}


def typed(shell: str, line: str, home: Path, variables: Mapping[str, str]) -> str:
    """
    Type a line into a shell at a terminal, press TAB and Enter, and return which line it ran.
    """
    setup = home / f"setup.{shell}"
    setup.write_text(START[shell] + TELLS + "echo READY:$((40 + 2))\n")
    master, slave = pty.openpty()
    process = subprocess.Popen(
        PREPARED[shell],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment(home, dict(variables)) | {"TERM": "dumb"},
        cwd=home,
        start_new_session=True,
    )
    os.close(slave)
    try:
        os.write(master, f". {setup}\n".encode())
        read_until(master, "READY:42")
        os.write(master, f"{line}\t\n".encode())
        return read_until(master, ":\r\n", after="RAN:")
    finally:
        process.kill()
        process.wait(20)
        os.close(master)


def read_until(master: int, end: str, after: str = "") -> str:
    """
    Read a terminal's output, and return the text between two marks.
    """
    shown, until = "", time.monotonic() + SECONDS
    while True:
        _, found, rest = shown.partition(after) if after else ("", "x", shown)
        if found and end in rest:
            return rest.partition(end)[0]
        ready, _, _ = select.select([master], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            raise TimeoutError(f"{end!r} is not shown:\n{shown}")
        shown += os.read(master, 4096).decode("utf-8", "replace")


def fish(line: str, home: Path, variables: Mapping[str, str]) -> set[str]:
    """
    Have fish complete a line, and return its suggestions.
    """
    script = f"ecr-proxy completion fish | source; complete -C '{line}'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", script],
        env=environment(home, dict(variables)),
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    assert done.stderr == ""
    return {each.partition("\t")[0] for each in done.stdout.splitlines()}


@pytest.fixture
def variables(equipment: Equipment) -> dict[str, str]:
    """
    Put the command on the PATH, without a daemon.
    """
    return {"PATH": f"{equipment.twistd.parent}:{PATH}", "PROXY_ADMIN_LISTEN": "off"}


LINES = {
    "ecr-proxy pref": "prefetch",
    "ecr-proxy prefetch --all-p": "prefetch --all-platforms",
    "ecr-proxy doctor --repos": "doctor --repository",
    "ecr-proxy completion fi": "completion fish",
    "ecr-proxy prefetch --file li": "prefetch --file list.txt",
    "ecr-proxy prefetch --jobs 3 --json --man": "prefetch --jobs 3 --json --manifest",
}


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("shell", PREPARED)
def test_tab_completes(shell: str, line: str, variables: dict[str, str], tmp_path: Path) -> None:
    """
    Subcommands, flags, choices and files, as a user types them.
    """
    (tmp_path / "list.txt").touch()
    # zsh puts the = after a flag that takes a value.
    assert typed(shell, line, tmp_path, variables).strip().rstrip("=") == LINES[line]


@pytest.mark.parametrize("line", LINES)
def test_fish_offers(line: str, variables: dict[str, str], tmp_path: Path) -> None:
    """
    The same, by its own command for it.
    """
    (tmp_path / "list.txt").touch()
    assert LINES[line].rpartition(" ")[2] in fish(line, tmp_path, variables)


def test_repositories_come_from_the_daemon(
    make_chain: MakeChain, images: Images, variables: dict[str, str], tmp_path: Path
) -> None:
    """
    As soon as they are in its cache.
    """
    port = free_port()
    admin = {"PROXY_ADMIN_LISTEN": f"tcp:{port}:interface=127.0.0.1"}
    chain = make_chain(settings=admin)
    repository = images.single.repository
    chain.daemon.ask(f"/v2/{repository}/manifests/{images.single.tag}", headers={"Accept": "*/*"})
    there = variables | admin
    for shell in PREPARED:
        assert typed(shell, f"ecr-proxy ls {repository[:-2]}", tmp_path, there).strip() == f"ls {repository}"
    assert repository in fish(f"ecr-proxy prefetch {repository[:-2]}", tmp_path, there)


def test_zsh_finds_the_script_by_its_name(variables: dict[str, str], tmp_path: Path) -> None:
    """
    In a folder of its fpath, loaded when it is needed.
    """
    script = "mkdir f; ecr-proxy completion zsh > f/_ecr-proxy; fpath=($PWD/f $fpath); autoload -Uz compinit"
    script += "; compinit -u -D; print -r -- $_comps[ecr-proxy]"
    done = subprocess.run(
        ["zsh", "-f", "-c", script],
        env=environment(tmp_path, variables),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    assert done.stdout.strip() == "_ecr-proxy"
