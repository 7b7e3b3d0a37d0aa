"""
The installer for nodes, deploy/kubernetes/components/nodes/hosts.py, as its DaemonSet runs it: a program, a file of
settings, and containerd's directory.
"""

from __future__ import annotations

import fcntl
import os
import selectors
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from twisted.trial.unittest import SynchronousTestCase

from tests.documents import CHECKOUT

INSTALLER: Final = CHECKOUT / "deploy/kubernetes/components/nodes/hosts.py"
PATIENCE: Final = 30.0
ECR: Final = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
PROXY: Final = "http://proxy.example:5000"
HUB: Final = "docker.io"
FOREIGN: Final = '[host."https://mirror.example"]\n'
# Runs the installer until one of its calls, and kills it there.
KILLED_AT: Final = """
import os, pathlib, runpy, signal, sys
at, sys.argv = sys.argv[1], sys.argv[2:]
def die(*words, **more):
    os.kill(os.getpid(), signal.SIGKILL)
if at == "fsync":
    os.fsync = die
else:
    setattr(pathlib.Path, at, die)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Running:
    """
    The installer, running.
    """

    def __init__(self, settings: Path, certs: Path) -> None:
        argv = [sys.executable, "-I", str(INSTALLER), str(settings), str(certs), "--seconds", "0.02"]
        self._process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert self._process.stdout is not None
        self._output = self._process.stdout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._output, selectors.EVENT_READ)
        self._kept = ""
        self.said = ""

    def until(self, words: str) -> None:
        """
        Wait for words that it has not been heard to say before.
        """
        while words not in self._kept:
            if not self._selector.select(PATIENCE) or not (more := os.read(self._output.fileno(), 65536)):
                raise AssertionError(f"never said: {words}\n{self.said}")
            self._kept += more.decode()
            self.said += more.decode()
        self._kept = self._kept.partition(words)[2]

    def end(self, signum: int = signal.SIGTERM) -> int:
        """
        Send it a signal, and wait for its end.
        """
        self._process.send_signal(signum)
        self.said += self._output.read().decode()
        return self._process.wait(PATIENCE)

    def close(self) -> None:
        """
        End it, whatever it does.
        """
        self._process.kill()
        self._process.wait()
        self._selector.close()
        self._output.close()


class NodesTests(SynchronousTestCase):
    """
    What a node has of it.
    """

    def setUp(self) -> None:
        home = TemporaryDirectory()
        self.addCleanup(home.cleanup)
        self.certs, self.settings = Path(home.name) / "certs.d", Path(home.name) / "nodes.toml"
        self.certs.mkdir()
        self.set()

    def set(self, *registries: str, more: str = "", proxy: str = PROXY) -> None:
        """
        Write the settings, as kubelet does: the new ones take the place of the old.
        """
        listed = ", ".join(f'"{each}"' for each in registries or (ECR,))
        made = self.settings.with_suffix(".new")
        made.write_text(f'proxy = "{proxy}"\nregistries = [{listed}]\n{more}\n')
        made.replace(self.settings)

    def hosts(self, registry: str = ECR) -> Path:
        return self.certs / registry / "hosts.toml"

    def start(self) -> Running:
        """
        Run it, until it has gone over all registries once.
        """
        running = Running(self.settings, self.certs)
        self.addCleanup(running.close)
        running.until("keeping the files")
        return running

    def once(self, *more: str) -> tuple[int, str]:
        """
        Run it to its end.
        """
        argv = [sys.executable, "-I", str(INSTALLER), str(self.settings), str(self.certs), *more]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=False)
        self.assertEqual("", done.stderr)
        return done.returncode, done.stdout

    def files(self) -> list[str]:
        """
        List all that is in containerd's directory.
        """
        return sorted(str(each.relative_to(self.certs)) for each in self.certs.rglob("*"))

    def test_are_told_of_the_proxy_while_it_runs_and_have_nothing_of_it_afterwards(self) -> None:
        """
        containerd falls back to the registry, which it finds by itself where the file names no server.
        """
        running = self.start()
        told = tomllib.loads(self.hosts().read_text())
        self.assertEqual({"host": {PROXY: {"capabilities": ["pull", "resolve"]}}}, told)
        self.assertEqual(0o644, self.hosts().stat().st_mode & 0o777)
        self.assertEqual(0o755, self.hosts().parent.stat().st_mode & 0o777)
        self.assertEqual((0, ""), self.once("--check"))
        self.assertEqual([ECR, f"{ECR}/hosts.toml"], self.files())
        self.assertEqual(0, running.end())
        self.assertEqual([], self.files())
        self.assertIn("removed", running.said)

    def test_that_may_not_fall_back_ask_the_proxy_alone(self) -> None:
        """
        The registry of the file is then the proxy, too, and a CA of the node's is named.
        """
        self.set("docker.io", more='fallback = false\nca = "/etc/ecr-proxy/ca.crt"', proxy="https://proxy.example")
        self.start()
        told = tomllib.loads(self.hosts(HUB).read_text())
        self.assertEqual("https://proxy.example", told["server"])
        self.assertEqual("/etc/ecr-proxy/ca.crt", told["host"]["https://proxy.example"]["ca"])

    def test_get_what_the_settings_say_now_without_a_restart(self) -> None:
        """
        Another proxy, one registry more, one less; settings that can't be used change nothing.
        """
        running = self.start()
        self.set(HUB, "localhost:5001", proxy="http://other.example:5000")
        running.until("wrote")
        running.until("wrote")
        self.assertEqual([HUB, f"{HUB}/hosts.toml", "localhost:5001", "localhost:5001/hosts.toml"], self.files())
        self.assertIn("http://other.example:5000", tomllib.loads(self.hosts(HUB).read_text())["host"])
        for wrong, why in [
            ('more = "x"', "no such setting: more"),
            ("keep = 1", "keep must be a bool"),
            ("]", "can't be read"),
        ]:
            self.set(more=wrong)
            running.until(why)
            running.until("the settings of before stay in force")
            self.assertIn(f"{HUB}/hosts.toml", self.files())
        self.set()
        running.until("no longer")
        running.end()
        self.assertEqual([], self.files())

    def test_get_back_what_somebody_changed_or_removed(self) -> None:
        """
        A file of its own, by its first line.
        """
        running = self.start()
        right = self.hosts().read_text()
        self.hosts().write_text(right.partition("\n")[0] + "\n")
        running.until("wrote")
        self.assertEqual(right, self.hosts().read_text())
        self.hosts().unlink()
        self.hosts().parent.rmdir()
        running.until("wrote")
        self.assertEqual(right, self.hosts().read_text())

    def foreign(self, make: Callable[[Path], object], why: str) -> None:
        """
        What somebody else has in a registry's place stays, is told of once, and is no reason to leave other registries.
        """
        self.set(ECR, HUB)
        make(self.certs / HUB)
        before = self.files()
        running = self.start()
        running.until("problems: 1")
        self.assertIn(f"{why}: left alone, so this node does not pull images of {HUB} through the proxy", running.said)
        self.assertEqual(1, self.once("--check")[0])
        self.assertTrue(self.hosts().exists())
        running.end()
        self.assertEqual(1, running.said.count("left alone"))
        self.assertEqual(before, self.files())

    def test_keep_a_file_that_somebody_else_wrote(self) -> None:
        def make(folder: Path) -> None:
            folder.mkdir()
            (folder / "hosts.toml").write_text(FOREIGN)

        self.foreign(make, "hosts.toml was not written by this installer")
        self.assertEqual(FOREIGN, self.hosts(HUB).read_text())

    def test_keep_certificates_that_a_file_would_replace(self) -> None:
        def make(folder: Path) -> None:
            folder.mkdir()
            (folder / "ca.crt").touch()

        self.foreign(make, "has ca.crt, which a hosts.toml would replace")

    def test_keep_links_to_elsewhere(self) -> None:
        elsewhere = self.certs.with_name("elsewhere")
        elsewhere.mkdir()
        self.foreign(lambda folder: folder.symlink_to(elsewhere), "is a symbolic link")
        self.assertEqual([], list(elsewhere.iterdir()))

    def test_take_a_place_that_becomes_free(self) -> None:
        self.set(HUB)
        self.hosts(HUB).parent.mkdir()
        self.hosts(HUB).write_text(FOREIGN)
        running = self.start()
        self.hosts(HUB).unlink()
        running.until("no longer")
        self.assertIn(PROXY, self.hosts(HUB).read_text())
        running.end()

    def test_keep_what_else_is_in_a_directory(self) -> None:
        running = self.start()
        note = self.hosts().with_name("note")
        note.touch()
        running.end()
        self.assertEqual([ECR, f"{ECR}/note"], self.files())

    def test_keep_the_files_where_that_is_wished(self) -> None:
        self.set(more="keep = true")
        running = self.start()
        self.assertEqual(0, running.end())
        self.assertEqual([ECR, f"{ECR}/hosts.toml"], self.files())
        self.assertIn("are kept", running.said)

    def test_have_a_whole_file_whenever_it_is_killed(self) -> None:
        """
        The old one or none; and the next one ends what was begun, or takes it away.
        """
        for old in ("", f"# Written by ecr-proxy's installer for nodes, an earlier one.\n{FOREIGN}"):
            for at in ("mkdir", "open", "fsync", "replace"):
                if old:
                    self.hosts().parent.mkdir()
                    self.hosts().write_text(old)
                self.killed(at)
                self.assertEqual(old, self.hosts().read_text() if self.hosts().exists() else "")
                running = self.start()
                self.assertIn(PROXY, self.hosts().read_text(), at)
                running.end()
                self.assertEqual([], self.files())

    def killed(self, at: str) -> None:
        """
        Run it until one of its calls, and kill it there.
        """
        argv = [sys.executable, "-Ic", KILLED_AT, at, str(INSTALLER), str(self.settings), str(self.certs)]
        done = subprocess.run(argv, stdout=subprocess.DEVNULL, timeout=PATIENCE, check=False)
        self.assertEqual(-signal.SIGKILL, done.returncode, at)

    def test_lose_what_was_begun_for_a_registry_that_is_no_longer_listed(self) -> None:
        self.killed("replace")
        self.assertEqual(2, len(self.files()))
        self.set(HUB)
        self.start()
        self.assertEqual([HUB, f"{HUB}/hosts.toml"], self.files())

    def test_are_not_without_a_file_while_one_pod_takes_over_from_another(self) -> None:
        """
        The old one of an update leaves the files to the new one, the last one removes them.
        """
        old, new = self.start(), self.start()
        old.end()
        self.assertIn("kept for another installer", old.said)
        self.assertEqual([ECR, f"{ECR}/hosts.toml"], self.files())
        new.end()
        self.assertEqual([], self.files())

    def test_are_written_to_by_one_installer_at_a_time(self) -> None:
        """
        Another one waits for its turn.
        """
        folder = self.hosts().parent
        folder.mkdir()
        descriptor = os.open(folder, os.O_RDONLY)
        self.addCleanup(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        running = Running(self.settings, self.certs)
        self.addCleanup(running.close)
        self.assertEqual([ECR], self.files())
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        running.until("wrote")

    def test_are_left_alone_where_settings_can_not_be_used(self) -> None:
        """
        Also where a name or an address would write elsewhere, or something else.
        """
        self.start().end(signal.SIGKILL)
        before = self.files()
        for registry in ("..", "a/b", ".hidden", "a b", ""):
            self.set(registry)
            self.assertEqual(2, self.once()[0], registry)
        for proxy in ("proxy:5000", "http://", "ftp://proxy", "http://proxy/v2", "http://name@proxy", "http://pro xy"):
            self.set(proxy=proxy)
            status, said = self.once()
            self.assertEqual(2, status)
            self.assertIn("proxy must be like http://proxy.example:5000", said)
        self.settings.unlink()
        self.assertEqual(2, self.once()[0])
        self.assertEqual(before, self.files())
