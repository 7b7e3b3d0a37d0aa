"""
The commands in README.rst and docs/ work as they are shown.

Each page is one shell, from top to bottom, in a copy of the checkout, beside a daemon before the stand-in for ECR.
On a page that starts the daemon itself, that one replaces it. What a page writes to /etc, /opt or /var is visible only
to it. Names that only AWS or the reader can give are replaced: see L{Stage.stand_ins}.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.documents import Block, Command, blocks, pages

from .chain import Chain, Equipment, standard_settings
from .clients import Docker
from .conftest import MakeChain
from .images import Images
from .installing import CHECKOUT, LEFT_OUT
from .processes import PATH, environment, free_port

SECONDS = 420.0
"""Timeout for a page: one of them builds an image."""
MARK = "--- "
BASE = re.compile(r"^ARG BASE=(\S+)$", re.MULTILINE)


def shown_on(page: Path) -> list[Block]:
    """
    Return the blocks of a page that are to be run.
    """
    return [each for each in blocks(page) if each.language == "console" and each.not_run is None]


FILES = {
    "your.env": "",
    "ecr-proxy.env": "",
    "images.txt": "# as a reader has it\nteam/app:latest\n",
    "deploy.yaml": "spec: {containers: [{image: 123456789012.dkr.ecr.eu-west-1.amazonaws.com/team/app:latest}]}\n",
}
"""Files that a reader has."""

SANDBOX = """
set -eu
mount -t tmpfs none "$1"
for each in etc opt var; do
    mkdir "$1/$each" "$1/$each.work"
    mount -t overlay -o "lowerdir=/$each,upperdir=$1/$each,workdir=$1/$each.work" overlay "/$each"
done
exec bash "$2"
"""

PRELUDE = r"""
set -eu -o pipefail
set -m  # what runs on has a process group of its own, by which it is ended
on=
end() {
    [ -z "$on" ] || { kill -- "-$on" 2> /dev/null && wait "$on" || true; on=; }
}
trap end EXIT
answers() {
    for _ in $(seq 900); do
        curl --silent --fail --output /dev/null "$1" && return
        sleep 0.1
    done
    echo "$1 does not answer"
    return 1
}
"""


@dataclass(frozen=True)
class Stage:
    """
    The environment of a page's commands.
    """

    chain: Chain
    docker: Docker
    images: Images
    admin_port: int
    twistd: Path

    def stand_ins(self) -> Mapping[str, str]:
        """
        Return the replacements for names in the documents.
        """
        image = self.images.single
        passed = ("PROXY_PORT", "PROXY_DNS_RESOLVER", "AWS_ENDPOINT_URL", "AWS_EC2_METADATA_DISABLED")
        return {
            "https://123456789012.dkr.ecr.eu-west-1.amazonaws.com": self.chain.front_url,
            # An image's host, not a part of a file's name.
            " 123456789012.dkr.ecr.eu-west-1.amazonaws.com/": f" {urlsplit(self.chain.front_url).netloc}/",
            "AWS_ACCESS_KEY_ID=...": "AWS_ACCESS_KEY_ID=AKIASTANDIN",
            "AWS_SECRET_ACCESS_KEY=...": "AWS_SECRET_ACCESS_KEY=not-a-secret",
            # The engine here has no bridge: containers share the machine's network.
            "-p 5000:5000": " ".join(["--network host", *(f"-e {each}" for each in passed)]),
            "docker build": "docker build --network host",
            "127.0.0.1:5001": f"127.0.0.1:{self.admin_port}",
            "localhost:5001": f"127.0.0.1:{self.admin_port}",
            "localhost:5000": self.chain.daemon.address,
            "proxy.example:5000": self.chain.daemon.address,
            "team/app:latest": f"{image.repository}:{image.tag}",
            "team/app/manifests/latest": f"{image.repository}/manifests/{image.tag}",
        }

    def variables(self) -> dict[str, str]:
        """
        Return the user's environment.
        """
        given = {name: value for name, value in standard_settings(self.chain.front_url).items() if value}
        return {
            **environment(self.chain.home, self.docker.extra),
            **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
            **given,
            "PATH": f"{self.twistd.parent}:{PATH}",
            "PROXY_PORT": str(self.chain.daemon.port),
            "PROXY_ADMIN_LISTEN": f"tcp:{self.admin_port}:interface=127.0.0.1",
            # `make` would take a minute for each page to create another.
            "VENV": str(CHECKOUT / ".venv"),
        }

    def run(self, shown: Sequence[Block]) -> str:
        """
        Run a page's blocks, and return what is wrong, if anything.
        """
        place = self.chain.home / "checkout"
        shutil.copytree(CHECKOUT, place, ignore=LEFT_OUT)
        for name, text in FILES.items():
            (place / name).write_text(self._here(text))
        overlays, script = self.chain.home / "overlays", self.chain.home / "page.sh"
        overlays.mkdir()
        commands = [(block, command) for block in shown for command in block.commands()]
        script.write_text(PRELUDE + "".join(self._typed(n, *each) for n, each in enumerate(commands)))
        argv = ["unshare", "--mount", "bash", "-c", SANDBOX, "sandbox", str(overlays), str(script)]
        with (self.chain.home / "printed").open("w+") as output:
            done = subprocess.run(
                argv,
                cwd=place,
                env=self.variables(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
                check=False,
            )
            output.seek(0)
            printed = re.split(rf"^{MARK}\d+\n", output.read(), flags=re.MULTILINE)[1:]
        return judged(commands, printed, done.returncode)

    def _here(self, text: str) -> str:
        """
        Replace each name.
        """
        for shown, here in self.stand_ins().items():
            text = text.replace(shown, here)
        return text

    def _typed(self, number: int, block: Block, command: Command) -> str:
        """
        Return a command as the shell here needs it.
        """
        text = self._here(command.text)
        if block.answers_at is None or command != block.commands()[-1]:
            return f"echo; echo '{MARK}{number}'\n{text}\n"
        url = self._here(block.answers_at)
        return f"echo; echo '{MARK}{number}'\nend\n{{ {text}\n}} & on=$!\nanswers {url}\n"


def judged(commands: Sequence[tuple[Block, Command]], printed: Sequence[str], status: int) -> str:
    """
    Return which command failed, or printed something else than is shown.
    """
    if status:
        at = max(len(printed) - 1, 0)
        return f"{commands[at][0].place}: status {status}\n$ {commands[at][1].text}\n{''.join(printed[at:])}"
    for (block, command), output in zip(commands, printed, strict=True):
        lines = [each.strip() for each in output.splitlines()]
        for told in command.prints:
            pattern = ".*".join(map(re.escape, told.strip().split("...")))
            if not any(re.fullmatch(pattern, line) for line in lines):
                return f"{block.place}: {told!r} is not printed by\n$ {command.text}\n{output}"
    return ""


@pytest.fixture
def stage(
    make_chain: MakeChain, builder: Docker, base: str, images: Images, twistd: Path, equipment: Equipment
) -> Stage:
    """
    Prepare the environment of a page's commands, and an engine that has the Dockerfile's base.
    """
    named = BASE.search((CHECKOUT / "Dockerfile").read_text("utf-8"))
    assert named
    builder.run("docker", "tag", base, named[1])
    port = free_port()
    chain: Chain = make_chain(settings={"PROXY_ADMIN_LISTEN": f"tcp:{port}:interface=127.0.0.1"})
    return Stage(chain, builder, images, port, twistd)


@pytest.mark.parametrize(
    "page", [page for page in pages() if shown_on(page)], ids=lambda page: str(page.relative_to(CHECKOUT))
)
def test_commands_work_as_they_are_shown(page: Path, stage: Stage) -> None:
    """
    All that are not marked as not to be run.
    """
    shown = shown_on(page)
    if any(each.answers_at for each in shown):
        stage.chain.daemon.process.stop()
    try:
        assert stage.run(shown) == ""
    finally:
        left = stage.docker.run("docker", "ps", "--all", "--quiet").split()
        if left:
            stage.docker.run("docker", "rm", "--force", "--volumes", *left)


@pytest.mark.parametrize(("text", "why"), [("$ true\n$ false", "$ false"), ("$ echo one\ntwo", "'two' is not printed")])
def test_what_does_not_work_is_told(stage: Stage, text: str, why: str) -> None:
    """
    A command that fails, or prints something else than is shown.
    """
    assert why in stage.run([Block(CHECKOUT / "README.rst", 1, "console", text, "")])
